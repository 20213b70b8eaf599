"""PEFT adapters given as a model: found with their base, and merged into it when that is loaded."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification

from hosl_export.exceptions import ModelError
from hosl_export.model.heads import HEADS
from hosl_export.tensor_files import read_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's names of an adapter's files."""


def is_adapter(folder: Path) -> bool:
    """Whether PEFT wrote this folder; it may hold the base, too."""
    return (folder / CONFIG).is_file()


def find_base(folder: Path) -> str:
    """Find the folder or hub id of the adapter's base. Raises ModelError where it is not there, or no base is named.

    It is in the adapter's own folder, or where the adapter says, or beside the adapter under that name.
    """
    if (folder / "config.json").is_file():
        return str(folder)

    name = _read_config(folder).get("base_model_name_or_path") or ""
    for base in (Path(name).expanduser(), folder.absolute().parent / name):
        if name and (base / "config.json").is_file():
            return str(base)

    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not is_hub_id:
        where = f"and its base {name!r} is not there" if name else "and does not name its base"
        remedy = "merge it into its base (merge_and_unload of PEFT), and give the folder of that"
        raise ModelError("model", str(folder), f"it is a PEFT adapter, {where}: {remedy}")
    return str(name)


def _read_config(folder: Path) -> dict[str, Any]:
    """Read the adapter's config. Raises ModelError."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError("model", str(folder), f"its {CONFIG} cannot be read: {error}") from error
    return config if isinstance(config, dict) else {}


@contextlib.contextmanager
def base_without_adapter(name_or_path: str, adapter: Path | None) -> Iterator[str]:
    """Yield where the base can be loaded from alone: transformers puts an adapter on that it finds beside a model.

    Where both lie in one folder, that is a temporary folder of links to the base's files.
    """
    if adapter is None or Path(name_or_path) != adapter:
        yield name_or_path
        return

    # Links, for weights may be large.
    with tempfile.TemporaryDirectory() as folder:
        for path in adapter.absolute().iterdir():
            if not path.name.startswith("adapter_"):
                (Path(folder) / path.name).symlink_to(path)
        yield folder


def adopt_head(config: Any, adapter: Path) -> None:
    """Make the base's config that of a classifier, in place, where the adapter brings a classification head."""
    if _read_config(adapter).get("task_type") != "SEQ_CLS" or not (adapter / WEIGHTS).is_file():
        return

    tensors = read_tensors(adapter / WEIGHTS)
    rows = [len(tensor) for name, tensor in tensors.items() if name.split(".")[-2] in HEADS and name.endswith("weight")]
    if rows:
        config.architectures = [AutoModelForSequenceClassification._model_mapping[type(config)].__name__]
        config.num_labels = rows[0]


def merge_adapter(model: Any, adapter: Path) -> Any:
    """Merge the adapter into the base's weights. Raises ModelError for one that is none of them, as a soft prompt."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, adapter)
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = _read_config(adapter).get("peft_type")
        raise ModelError(
            "model", str(adapter), f"a PEFT adapter of kind {kind} is no part of the weights: use its base"
        )
    return adapted.merge_and_unload()
