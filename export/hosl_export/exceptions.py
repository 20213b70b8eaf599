"""Errors of the exporter."""

from __future__ import annotations

from hosl_protocol.exceptions import ExitCode, HoslError, SettingsError


class ExportError(HoslError):
    """Root of every error that the exporter raises on purpose, beside a wrong setting.

    ExportError
    ├── ModelError           the model cannot be read, or lacks what a bundle needs: choose or repair the model
    │   └── UnknownFamily    an architecture that the exporter cannot cut
    ├── ParityError          shard and tail together do not compute what the uncut model computes: no bundle is left
    └── SpaceError           the disk cannot hold the bundle
    """


class ModelError(ExportError, SettingsError):
    """The model cannot be used. Stores the field, the value and the remedy."""

    exit_code = ExitCode.SETTINGS


class UnknownFamily(ModelError):
    """The exporter has no entry for this `model_type`."""

    def __init__(self, model_type: str, known: list[str]) -> None:
        self.known = known
        super().__init__("architecture", model_type, f"hosl-export can cut {', '.join(known)}")


class ParityError(ExportError):
    """The two halves depart from the uncut model."""

    exit_code = ExitCode.BUNDLE

    def __init__(self, output: str, batch: str, error: float, tolerance: float) -> None:
        self.output, self.batch, self.error, self.tolerance = output, batch, error, tolerance
        super().__init__(
            f"shard and tail depart from the uncut model: {output} at {batch} differ by "
            f"{error:.3g} of their range, the limit is {tolerance:.3g}; no bundle was written"
        )


class SpaceError(ExportError):
    """Too little room for the bundle."""

    exit_code = ExitCode.RESOURCES

    def __init__(self, folder: str, needed_bytes: int, free_bytes: int) -> None:
        self.folder, self.needed_bytes, self.free_bytes = folder, needed_bytes, free_bytes
        super().__init__(
            f"the bundle takes {needed_bytes / 2**20:.0f} MiB and {folder} has {free_bytes / 2**20:.0f} MiB free: "
            "free some space or choose another --out"
        )
