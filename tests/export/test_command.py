"""The command: what it prints, and that bad input gives one line, its exit code, and nothing half-written."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, processors

from hosl_cloud.service.authority import make_authority
from hosl_export import exporter
from hosl_export.__main__ import main
from hosl_export.bundle import parity as check
from hosl_export.bundle import writing as bundle
from hosl_export.bundle.staging import staging
from hosl_export.inputs import choose_input
from hosl_export.sources.loading import find_source, load_source_config
from hosl_export.steps import Steps
from hosl_export.tensor_files import read_tensors, write_tensors
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.run.manifest import TAIL_WEIGHTS, load_manifest
from tiny import CONFIGS, make_model, make_tokenizer, save_scaled, save_with_sentencepiece


@pytest.fixture
def export(tmp_path: Path, model_folder: Callable[[str], Path]) -> Callable[..., int]:
    """Run the command on a tiny model; options given here come last and so win."""

    def run(*options: str, kind: str = "llama") -> int:
        usual = ["--model", str(model_folder(kind)), "--split", "1", "--out", str(tmp_path / "bundle")]
        return main([*usual, *options])

    return run


def _assert_refused(capsys: Any, folder: Path, *words: str) -> None:
    """One error line with these words in it, nothing on stdout, nothing in the folder."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("hosl-export: error: ")
    assert "Traceback" not in err
    assert not out
    for word in words:
        assert word in lines[0]
    assert not list(folder.iterdir())


@pytest.mark.parametrize("split", ["0", "-1", "4", "99"])
def test_split_outside_the_model_is_refused(export, capsys, tmp_path, split: str) -> None:
    assert export("--split", split) == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, "split", split, "use 1 to 3")


@pytest.mark.parametrize(
    ("train", "blocks", "remedy"),
    [("norm", "0", "use 1 to 1"), ("norm", "2", "use 1 to 1"), ("none", "1", "trains no block")],
)
def test_train_blocks_that_make_no_sense_are_refused(export, capsys, tmp_path, train, blocks, remedy) -> None:
    assert export("--train", train, "--train-blocks", blocks) == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, "train-blocks", blocks, remedy)


@pytest.mark.parametrize("length", ["1", "-5", "49"])
def test_length_beyond_the_positions_is_refused(export, capsys, tmp_path, length: str) -> None:
    assert export("--max-length", length) == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, "max-length", length, "use 2 to 48")


def test_unknown_architecture_is_refused_with_what_works(export, capsys, tmp_path) -> None:
    model = tmp_path / "model"
    hf.T5Config(d_model=16, num_layers=2, num_heads=2).save_pretrained(model)
    assert export("--model", str(model)) == ExitCode.SETTINGS
    (model / "config.json").unlink()
    model.rmdir()
    _assert_refused(capsys, tmp_path, "'t5'", "neither a causal language model nor an encoder", "use a causal")


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "missing.gguf"])
def test_missing_model_is_refused(export, capsys, tmp_path, name: str) -> None:
    assert export("--model", name) == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, name)


def test_folder_without_config_is_refused(export, capsys, tmp_path) -> None:
    assert export("--model", str(tmp_path)) == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, str(tmp_path), "config.json")


def _copy_of_llama(folder: Path, **saved: bool) -> Path:
    if saved.get("weights", True):
        make_model("llama").save_pretrained(folder)
    else:
        CONFIGS["llama"]().save_pretrained(folder)
    if saved.get("tokenizer", True):
        make_tokenizer().save_pretrained(folder)
    return folder


def test_model_without_weights_is_refused(export, capsys, tmp_path, tmp_path_factory) -> None:
    model = _copy_of_llama(tmp_path_factory.mktemp("model"), weights=False)
    assert export("--model", str(model)) == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, "cannot load its weights", "model.safetensors")


def test_model_without_tokenizer_is_refused(export, capsys, tmp_path, tmp_path_factory) -> None:
    model = _copy_of_llama(tmp_path_factory.mktemp("model"), tokenizer=False)
    assert export("--model", str(model)) == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, "tokenizer")


def _retokenized(source: Path, folder: Path, tokenizer: Any) -> Path:
    """The model of a folder, with another tokenizer."""
    shutil.copytree(source, folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_token_that_the_embedding_has_no_row_for_is_refused(
    export, capsys, tmp_path, tmp_path_factory, model_folder
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new1>", "<new2>"])
    folder = _retokenized(model_folder("llama"), tmp_path_factory.mktemp("model") / "m", tokenizer)
    assert export("--model", str(folder)) == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, "'<new1>'", "64", "resize_token_embeddings")


def test_tokenizer_that_makes_no_tokens_is_refused(export, capsys, tmp_path, tmp_path_factory, model_folder) -> None:
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"<pad>": 0}, [])), pad_token="<pad>")
    folder = _retokenized(model_folder("llama"), tmp_path_factory.mktemp("model") / "m", tokenizer)
    assert export("--model", str(folder)) == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, "tokenizer", "makes no tokens of a text", "llama")


def test_special_token_without_a_row_that_every_text_gets_is_refused(
    export, capsys, tmp_path, tmp_path_factory, model_folder
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "<cls>"})
    special = [("<cls>", tokenizer.cls_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<cls> $A", special_tokens=special)
    folder = _retokenized(model_folder("llama"), tmp_path_factory.mktemp("model") / "m", tokenizer)
    assert export("--model", str(folder)) == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, "'<cls>'", "64", "resize_token_embeddings")


def test_special_token_without_a_row_that_only_a_text_can_have_is_told(tmp_path, model_folder, caplog) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<fill>", "additional_special_tokens": ["<image>"]})
    source = find_source(str(_retokenized(model_folder("llama"), tmp_path / "m", tokenizer)))
    given = choose_input(source, load_source_config(source), None, None)
    assert [record.message for record in caplog.records] == [
        "m has no embedding for its special tokens <fill>, <image>: no text may have them"
    ]
    for side in ("shard", "tail"):
        (tmp_path / "bundle" / side).mkdir(parents=True)
    given.write_files(tmp_path / "bundle", make_model("llama"))
    merged = hf.AutoTokenizer.from_pretrained(tmp_path / "bundle" / "tail")
    assert merged.pad_token_id == 0, "batches of the merged model are padded with a token that it has"


def test_incomplete_checkpoint_is_refused(export, capsys, tmp_path, tmp_path_factory) -> None:
    model = _copy_of_llama(tmp_path_factory.mktemp("model"))
    state = {name: tensor.clone() for name, tensor in read_tensors(model / "model.safetensors").items()}
    del state["model.layers.2.mlp.up_proj.weight"]
    write_tensors(model / "model.safetensors", state)
    assert export("--model", str(model)) == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, "lacks model.layers.2.mlp.up_proj.weight")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "mxfp4", "compressed-tensors"])
def test_checkpoint_whose_weights_only_a_kernel_can_read_is_refused(
    export, capsys, tmp_path, tmp_path_factory, model_folder, method: str
) -> None:
    folder = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(model_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    assert export("--model", str(folder)) == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, f"the checkpoint is quantized ({method})", "give the model that it was made from")


def test_tokenizer_model_without_its_package_is_named(
    export, capsys, tmp_path, tmp_path_factory, model_folder, monkeypatch
) -> None:
    folder = save_with_sentencepiece(model_folder("llama"), tmp_path_factory.mktemp("model") / "m")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert export("--model", str(folder)) == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, "tokenizer.model needs: pip install sentencepiece")


def test_length_at_which_rotary_angles_change_is_refused(export, capsys, tmp_path, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("model") / "m"
    save_scaled(folder, "longrope")
    assert export("--model", str(folder), "--max-length", "25") == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, "max-length is 25", "rope_scaling (longrope)", "use at most 24")


@pytest.mark.filterwarnings("default::UserWarning")
def test_whatever_the_exporter_of_torch_says_becomes_one_line(export, capsys, tmp_path, monkeypatch) -> None:
    whole = exporter.load_model

    def load(*arguments: Any, **options: Any) -> Any:
        """The model, with a branch on its data, of which there is no graph."""
        model = whole(*arguments, **options)
        norm = model.model.layers[0].input_layernorm
        norm.register_forward_pre_hook(lambda module, given: None if given[0].sum() > 0 else given)
        return model

    monkeypatch.setattr(exporter, "load_model", load)
    assert export() == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, "tracing the client half of this llama failed", "constraints.txt", "--debug")


def test_a_step_is_a_line_when_it_is_over(capsys) -> None:
    log = logging.getLogger("hosl_export.anything")
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    steps = Steps("tool")
    try:
        with steps.shown():
            with steps("reading"):
                log.warning("one")
            with pytest.raises(KeyboardInterrupt), steps("loading"):
                raise KeyboardInterrupt
    finally:
        logging.getLogger().removeHandler(handler)
    lines = [re.sub(r"^[\d :-]+ tool|\d+\.\d s", "N", line) for line in capsys.readouterr().err.splitlines()]
    assert lines == ["one", "N: reading: N", "N: loading: stopped after N"]


def test_damaged_gguf_is_refused(export, capsys, tmp_path, tmp_path_factory) -> None:
    model = tmp_path_factory.mktemp("model") / "model.gguf"
    model.write_bytes(b"GGUF" + bytes(200))
    assert export("--model", str(model)) == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, "model.gguf", "cannot load its configuration")


def test_weights_that_are_not_finite_are_refused(export, capsys, tmp_path, tmp_path_factory) -> None:
    folder = _copy_of_llama(tmp_path_factory.mktemp("model"))
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = float("inf")
    model.save_pretrained(folder)
    assert export("--model", str(folder), "--train", "norm") == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, "inf", "not finite")


@pytest.mark.parametrize("is_empty", [True, False])
def test_existing_output_is_refused_and_kept(export, capsys, tmp_path, is_empty: bool) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    if not is_empty:
        (out / "file").write_text("kept")
    assert export() == ExitCode.SETTINGS
    assert "it exists already" in capsys.readouterr().err
    assert [path.read_text() for path in out.iterdir()] == ([] if is_empty else ["kept"])
    assert list(tmp_path.iterdir()) == [out]


def test_output_under_a_file_is_refused(export, capsys, tmp_path, tmp_path_factory) -> None:
    file = tmp_path_factory.mktemp("other") / "file"
    file.write_text("")
    assert export("--out", str(file / "bundle")) == ExitCode.SETTINGS
    _assert_refused(capsys, tmp_path, "out", "no folder")


def test_full_disk_is_refused_before_anything_is_written(export, capsys, tmp_path, monkeypatch) -> None:
    usage = SimpleNamespace(total=2**30, used=2**30 - 2**20, free=2**20)
    monkeypatch.setattr(bundle.shutil, "disk_usage", lambda folder: usage)
    assert export() == ExitCode.RESOURCES
    _assert_refused(capsys, tmp_path, "1 MiB free")


def test_disk_that_fills_up_while_writing_leaves_nothing(export, capsys, tmp_path, monkeypatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter.writing, "write_graph", lambda client, path, *_: path.write_bytes(b"graph"))
    monkeypatch.setattr(exporter.writing, "write_tensors", fail)
    assert export() == ExitCode.RESOURCES
    _assert_refused(capsys, tmp_path, "No space left on device")


def _corrupt_tail(folder: Path, *arguments: Any) -> float:
    path = folder / TAIL_WEIGHTS
    state = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    state["model.layers.1.mlp.down_proj.weight"] *= 1.01
    write_tensors(path, state)
    return check.check_bundle(folder, *arguments)


def test_halves_that_depart_from_the_model_leave_no_bundle(export, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(exporter, "check_bundle", _corrupt_tail)
    assert export() == ExitCode.BUNDLE
    _assert_refused(capsys, tmp_path, "depart from the uncut model", "no bundle was written")


def test_values_that_are_not_numbers_fail_the_check(export, capsys, tmp_path, monkeypatch) -> None:
    def spoil(folder: Path, manifest: Any, references: Any) -> float:
        for reference in references:
            reference.outputs["logits"][:] = float("nan")
        return check.check_bundle(folder, manifest, references)

    monkeypatch.setattr(exporter, "check_bundle", spoil)
    assert export() == ExitCode.BUNDLE
    _assert_refused(capsys, tmp_path, "depart from the uncut model")


def test_unreachable_hub_is_one_line() -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hosl_export", "--model", "nobody/nothing", "--split", "1", "--out", "never-made"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == ExitCode.SETTINGS
    last = result.stderr.splitlines()[-1]
    assert last.startswith("hosl-export: error: model is 'nobody/nothing': cannot load its configuration")
    assert not Path("never-made").exists()


def test_a_signal_while_the_folder_is_made_leaves_none(tmp_path, monkeypatch) -> None:
    make = os.mkdir

    def make_and_be_interrupted(path, *arguments, **keywords) -> None:
        make(path, *arguments, **keywords)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", make_and_be_interrupted)
        with pytest.raises(KeyboardInterrupt), staging(tmp_path / "bundle"):
            pass
        with pytest.raises(KeyboardInterrupt):
            make_authority(tmp_path, ["localhost"])
    assert not list(tmp_path.iterdir())


def test_sigterm_removes_what_was_written(tmp_path, model_folder) -> None:
    out = tmp_path / "bundle"
    command = [sys.executable, "-m", "hosl_export", "--model", str(model_folder("llama")), "--split", "1"]
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".bundle.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED
    assert err.endswith("hosl-export: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_json_summary_counts_what_is_written(export, capsys, tmp_path) -> None:
    assert export("--json", "--train", "lora", "--max-length", "20") == ExitCode.OK
    out, err = capsys.readouterr()
    summary, manifest = json.loads(out), load_manifest(tmp_path / "bundle")
    client = 64 * 16 + (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24 + 2 * 16) + 8 * (16 + 16) + 8 * (16 + 8)
    assert summary["client_parameters"] == client
    assert summary["client_bytes"] == 4 * client
    assert summary["trainable_parameters"] == 8 * (16 + 16) + 8 * (16 + 8)
    assert summary["trainable_tensors"] == len(manifest.trainable) == 4
    assert summary["tail_parameters"] == 64 * 16 + 16 + 3 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24 + 2 * 16)
    assert summary["max_length"] == summary["checked_length"] == 20
    assert 0.0 < summary["parity_error"] < check.TOLERANCE
    assert "tracing the client half: " in err
    assert list(tmp_path.iterdir()) == [tmp_path / "bundle"]


def test_summary_says_what_a_round_costs(export, capsys, tmp_path) -> None:
    assert export("--train", "norm", "--json") == ExitCode.OK
    summary = json.loads(capsys.readouterr().out)
    assert summary["ho_sfl_forwards"] == 9.0
    assert 2.0 < summary["first_order_forwards"] < 4.0
    assert 0.0 < summary["gradient_error"] < 1e-5

    shutil.rmtree(tmp_path / "bundle")
    assert export("--train", "lora") == ExitCode.OK
    *_, first, last, following = capsys.readouterr().out.splitlines()
    serve = f"hosl-cloud serve --bundle {tmp_path / 'bundle'} --config run.toml"
    assert following == f"next: hosl-cloud config --example > run.toml && {serve}"
    costs = r"  round   first-order costs [23]\.\d forwards of the device's half, HO-SFL with its 2 directions 3\.0 "
    assert re.match(costs, first)
    assert re.match(r" +first-order has the exact gradient, an estimate of HO-SFL's points \d\.\d % towards it", last)


def test_gradients_may_be_left_out(export, capsys, tmp_path) -> None:
    assert export("--train", "norm", "--no-gradients") == ExitCode.OK
    assert "round" not in capsys.readouterr().out.splitlines()[-2]
    manifest = load_manifest(tmp_path / "bundle")
    assert manifest.gradients == ()
    assert sorted(path.name for path in (tmp_path / "bundle" / "shard").iterdir()) == [
        "chat.json",
        "shard.onnx",
        "shard.safetensors",
        "tokenizer.json",
    ]


def test_summary_says_where_the_sliding_window_stays_untested(export, capsys) -> None:
    assert export("--max-length", "6", "--train", "none", kind="mistral") == ExitCode.OK
    out, _ = capsys.readouterr()
    assert "cut after block 1 of 4" in out
    assert "nothing on the device" in out
    assert "sliding window of 8, which stays untested" in out
