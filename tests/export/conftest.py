"""Bundles of tiny models, exported once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from hosl_export.exporter import ExportSettings, export_bundle
from hosl_export.weights import read_tensors
from hosl_protocol.manifest import SHARD_WEIGHTS, Manifest, load_manifest

sys.path.insert(0, str(Path(__file__).parent))

from tiny import SPLITS, make_model, make_tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Matrices this small gain nothing from a second thread, and lose much where other work runs beside."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model, as `save_pretrained` writes it."""
    root = tmp_path_factory.mktemp("models")

    def get(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            make_model(kind).save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
        return folder

    return get


class Exported:
    """A tiny model, its bundle, and the bundle's weights."""

    def __init__(self, kind: str, source: Path, bundle: Path) -> None:
        self.kind, self.source, self.bundle = kind, source, bundle
        self.manifest: Manifest = load_manifest(bundle)

    @property
    def model(self) -> Any:
        """The uncut model."""
        auto = hf.AutoModel if self.kind == "bert" else hf.AutoModelForCausalLM
        return auto.from_pretrained(self.source, dtype=torch.float32).eval()

    @property
    def weights(self) -> dict[str, Tensor]:
        """The shard's weights."""
        return read_tensors(self.bundle / SHARD_WEIGHTS)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]) -> Callable[..., Exported]:
    """The bundle of a tiny model, exported on first use."""
    root = tmp_path_factory.mktemp("bundles")
    made: dict[tuple[str, str], Exported] = {}

    def get(kind: str, train: Any = "lora") -> Exported:
        key = (kind, train)
        if key not in made:
            source, bundle = model_folder(kind), root / f"{kind}-{train}"
            export_bundle(ExportSettings(model=str(source), split=SPLITS[kind], out=bundle, train=train))
            made[key] = Exported(kind, source, bundle)
        return made[key]

    return get
