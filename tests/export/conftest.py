"""Bundles of tiny models, exported once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hosl_export import ExportSettings, export_bundle
from hosl_export.tensor_files import read_tensors
from hosl_protocol.run.manifest import SHARD_WEIGHTS, Manifest, load_manifest
from tiny import SPLITS, make_model, make_tokenizer, uncut_class


@pytest.fixture(scope="session", autouse=True)
def one_thread(traced_once: None) -> None:
    """Matrices this small gain nothing from a second thread, and lose much where other work runs beside."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(made_once: Callable[..., Path]) -> Callable[[str], Path]:
    """The folder of a tiny model, as `save_pretrained` writes it."""

    def get(kind: str) -> Path:
        def save(folder: Path) -> None:
            make_model(kind).save_pretrained(folder / kind)
            make_tokenizer().save_pretrained(folder / kind)

        return made_once(f"model-{kind}", save) / kind

    return get


class ExportedTextModel:
    """A tiny model, its bundle, and the bundle's weights."""

    def __init__(self, kind: str, source: Path, bundle: Path) -> None:
        self.kind, self.source, self.bundle = kind, source, bundle
        self.manifest: Manifest = load_manifest(bundle)

    @property
    def model(self) -> Any:
        """The uncut model."""
        return uncut_class(self.kind).from_pretrained(self.source, dtype=torch.float32).eval()

    @property
    def weights(self) -> dict[str, Tensor]:
        """The shard's weights."""
        return read_tensors(self.bundle / SHARD_WEIGHTS)


@pytest.fixture(scope="session")
def exported(made_once: Callable[..., Path], model_folder: Callable[[str], Path]) -> Callable[..., ExportedTextModel]:
    """The bundle of a tiny model, exported on first use; without graphs of the gradient unless they are asked for."""

    def get(kind: str, train: Any = "lora", *, gradients: bool = False) -> ExportedTextModel:
        source = model_folder(kind)

        def export(bundle: Path) -> None:
            settings = ExportSettings(
                model=str(source), split=SPLITS[kind], out=bundle, train=train, gradients=gradients
            )
            export_bundle(settings)

        return ExportedTextModel(kind, source, made_once(f"exported-{kind}-{train}{'-gradients' * gradients}", export))

    return get
