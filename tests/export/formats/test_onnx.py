"""The graph of a whole model computes what the folder computes, at every size of a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
import transformers as hf

import pictures
import tiny
from decoders import make_decoder
from hosl_export.exceptions import ExportError
from hosl_export.formats import onnx_model
from hosl_export.formats.onnx_model import GRAPH, write_onnx


def classifier(config: Any) -> Any:
    """A tiny classifier of texts."""
    config.num_labels = 3
    return hf.AutoModelForSequenceClassification.from_config(config)


MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "llama": (lambda: make_decoder("llama"), hf.AutoModelForCausalLM),
    "classes": (lambda: classifier(tiny.CONFIGS["llama"]()), hf.AutoModelForSequenceClassification),
    "bert": (lambda: classifier(tiny.CONFIGS["bert"]()), hf.AutoModelForSequenceClassification),
    "resnet": (
        lambda: hf.AutoModelForImageClassification.from_config(pictures.make_config("resnet")),
        hf.AutoModelForImageClassification,
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_graph_computes_what_the_folder_computes(tmp_path: Path, kind: str) -> None:
    make, loader = MODELS[kind]
    model = make().eval()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "onnx").mkdir()
    facts = write_onnx(tmp_path / "model", tmp_path / "onnx", loader)
    assert facts.largest_error < 1e-5

    session = ort.InferenceSession(str(tmp_path / "onnx" / GRAPH), providers=["CPUExecutionProvider"])
    assert tuple(value.name for value in session.get_inputs()) == facts.inputs
    if kind == "resnet":
        size = pictures.make_config("resnet").num_channels
        given = {"pixel_values": torch.randn(4, size, 32, 32)}
    else:
        ids = torch.randint(3, 60, (4, 19))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = model(**given).logits
    (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in given.items()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
    assert not (tmp_path / "onnx" / "model.safetensors").exists()


def test_a_graph_that_departs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_decoder("gpt2").save_pretrained(tmp_path / "model")
    (tmp_path / "onnx").mkdir()
    monkeypatch.setattr(onnx_model, "TOLERANCE", 0.0)
    with pytest.raises(ExportError, match=r"the graph departs from the folder by .* nothing was written"):
        write_onnx(tmp_path / "model", tmp_path / "onnx", hf.AutoModelForCausalLM)
