"""Where a bundle's model came from: for the cards of what is made of it, and for adapters, which name their base.

An export writes it and a merge reads it. It stays beside the tail, which devices do not get: they are told the model's
name and nothing of the folders of this machine.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
from transformers.utils import cached_file

from hosl_export.sources.loading import Source, quiet_transformers
from hosl_protocol.run.manifest import TAIL_CONFIG, Manifest

ORIGIN_FILE = "origin.json"


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
        """Further arguments of `from_pretrained`, as Python code for a card."""
        options = {"gguf_file": self.gguf_file, "revision": self.revision}
        return "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)


def find_origin(source: Source) -> Origin:
    """Describe where a model that is being exported came from."""
    name_or_path = source.name_or_path if source.adapter is None else str(source.adapter)
    is_local = Path(name_or_path).is_dir()
    return Origin(
        model=str(Path(name_or_path).resolve()) if is_local else name_or_path,
        is_hub_id=not is_local,
        is_adapter=source.adapter is not None,
        revision=source.revision,
        gguf_file=source.gguf_file,
        license=_find_license(source),
    )


def _find_license(source: Source) -> str | None:
    """Look up the license in the card beside the model; None where there is none."""
    from huggingface_hub import metadata_load

    # A card is nothing that an export could fail for: there may be none, no network, or no YAML in it.
    with quiet_transformers(), contextlib.suppress(Exception):
        card = cached_file(source.name_or_path, "README.md", revision=source.revision)
        named = (metadata_load(card) or {}).get("license")
        return named if isinstance(named, str) else None
    return None


def write_origin(bundle: Path, origin: Origin) -> None:
    """Write `tail/origin.json`."""
    path = (bundle / TAIL_CONFIG).with_name(ORIGIN_FILE)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(origin), indent=2) + b"\n")


def read_origin(bundle: Path, manifest: Manifest) -> Origin:
    """Read `tail/origin.json`; a bundle without one is taken to be of the hub id or name in its manifest."""
    path = (bundle / TAIL_CONFIG).with_name(ORIGIN_FILE)
    if not path.exists():
        return Origin(model=manifest.model, revision=manifest.revision)
    return msgspec.json.decode(path.read_bytes(), type=Origin)
