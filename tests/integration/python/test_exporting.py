"""An export from Python: by a folder, and of a model at hand; its folder, its figures, and what it refuses."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import hosl
from hosl_protocol.run.manifest import load_manifest

MakeBundle = Callable[..., Path]


@pytest.fixture
def tmpdir_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `tempfile` makes its folders."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_an_export_says_what_it_made_and_its_folder_goes_with_it(
    tiny_model: Path, make_bundle: MakeBundle, traced_once: None, tmpdir_of_python: Path
) -> None:
    steps: list[str] = []
    bundle = hosl.export(tiny_model, 2, max_length=32, on_step=steps.append)
    assert steps[0] == "reading the configuration"
    assert len(steps) > 5
    assert bundle.digest == load_manifest(make_bundle("norm", 2)).shard_digest
    assert (bundle.model, bundle.split, bundle.blocks) == (tiny_model.name, 2, 4)
    assert 0 < bundle.trained_parameters < bundle.device_parameters
    assert bundle.cost is not None
    assert bundle.cost.ho_sfl > bundle.cost.first_order > 2
    assert f"{bundle.trained_parameters:,} parameters" in bundle.describe()

    path = bundle.path
    assert path.is_relative_to(tmpdir_of_python)
    assert repr(hosl.Bundle(path)) == repr(bundle) == hosl.Bundle(path).describe()
    assert hosl.Bundle(path).cost is None
    del bundle
    gc.collect()
    assert list(tmpdir_of_python.iterdir()) == []


def test_a_model_at_hand_is_exported_as_it_is_in_memory(
    tiny_model: Path, make_bundle: MakeBundle, traced_once: None, tmp_path: Path, tmpdir_of_python: Path
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    same = hosl.export(model, 2, tokenizer=tokenizer, max_length=32, out=tmp_path / "same")
    assert same.path == tmp_path / "same"
    assert (same.model, same.digest) == (tiny_model.name, load_manifest(make_bundle("norm", 2)).shard_digest)

    model.model.layers[0].input_layernorm.weight.data += 0.5
    changed = hosl.export(model, 2, tokenizer=tokenizer, max_length=32, out=tmp_path / "changed")
    assert changed.digest != same.digest
    assert list(tmpdir_of_python.iterdir()) == [], "what was saved for the export is gone"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"train": "norms"}, "train is 'norms': use one of none, "),
        ({"split": 4}, "split is 4: the model has 4 blocks, use 1 to 3"),
        ({"tokenizer": object()}, "tokenizer is 'given': it goes with a model at hand"),
        ({"model": "no/such/folder"}, "model is 'no/such/folder': use a folder"),
    ],
)
def test_what_an_export_cannot_use_is_named(
    tiny_model: Path, tmpdir_of_python: Path, given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(hosl.SettingsError) as raised:
        hosl.export(**{"model": tiny_model, "split": 2, **given})
    assert str(raised.value).startswith(sentence)
    assert list(tmpdir_of_python.iterdir()) == []


def test_a_model_at_hand_comes_with_its_tokenizer(tiny_model: Path) -> None:
    with pytest.raises(hosl.SettingsError, match="tokenizer is not given: a model at hand comes with its tokenizer="):
        hosl.export(AutoModelForCausalLM.from_pretrained(tiny_model), 2)
