"""Where a bundle's model came from: for the cards of what is made of it, and for adapters, which name their base.

It stays beside the tail: devices are told the model's name and nothing of the folders of this machine.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
from transformers.utils import cached_file

from hosl_export.sources.loading import Source, quiet_transformers
from hosl_protocol.run.manifest import TAIL_CONFIG, Manifest

FILE = "origin.json"


class Origin(msgspec.Struct, kw_only=True, frozen=True):
    """`tail/origin.json`."""

    model: str
    """Hub id, or the absolute path of the local folder."""
    is_hub_id: bool = False
    revision: str | None = None
    gguf_file: str | None = None
    """The name of a .gguf file in the folder."""
    is_adapter: bool = False
    """Whether the model was a PEFT adapter, merged into its base."""
    license: str | None = None
    """As the model's card names it; None where it does not."""

    @property
    def loading_options(self) -> str:
        """Python, as further arguments of `from_pretrained`."""
        options = {"gguf_file": self.gguf_file, "revision": self.revision}
        return "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)


def find_origin(source: Source) -> Origin:
    """Find the origin of a model that is being exported."""
    place = source.place if source.adapter is None else str(source.adapter)
    is_local = Path(place).is_dir()
    return Origin(
        model=str(Path(place).resolve()) if is_local else place,
        is_hub_id=not is_local,
        is_adapter=source.adapter is not None,
        revision=source.revision,
        gguf_file=source.gguf_file,
        license=_license_of(source),
    )


def _license_of(source: Source) -> str | None:
    """Read the license that the card beside the model names."""
    from huggingface_hub import metadata_load

    # A card is nothing that an export could fail for: there may be none, no network, or no YAML in it.
    with quiet_transformers(), contextlib.suppress(Exception):
        card = cached_file(source.place, "README.md", revision=source.revision)
        named = (metadata_load(card) or {}).get("license")
        return named if isinstance(named, str) else None
    return None


def write_origin(bundle: Path, origin: Origin) -> None:
    """Write the origin beside the tail's config."""
    path = (bundle / TAIL_CONFIG).with_name(FILE)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(origin), indent=2) + b"\n")


def read_origin(bundle: Path, manifest: Manifest) -> Origin:
    """Read the origin of a bundle; one that does not say has its model's name."""
    path = (bundle / TAIL_CONFIG).with_name(FILE)
    if not path.exists():
        return Origin(model=manifest.model, revision=manifest.revision)
    return msgspec.json.decode(path.read_bytes(), type=Origin)
