"""A run ends in formats for other programs: from Python and from the command, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hosl
from decoders import save_decoder
from hosl_cloud.__main__ import main as cloud_main
from hosl_export.sources.loading import load_model
from hosl_protocol.exceptions import ExitCode, SettingsError

SETTINGS = {
    "task": {"name": "notes", "kind": "lm", "template": "{text}"},
    "batch_size": 2,
    "max_length": 16,
    "threads": 1,
    "tail": {"train": "lora", "learning_rate": 3e-3, "device": "cpu"},
}
TEXTS = [{"text": f"A film of {number} sisters is still moving."} for number in range(8)]


def test_a_run_is_merged_for_llama_cpp_and_for_onnx_runtime(
    tmp_path: Path, traced_once: None, capsys: pytest.CaptureFixture[str]
) -> None:
    save_decoder("llama", tmp_path / "model")
    bundle = hosl.export(tmp_path / "model", 1, train="lora", max_length=16, out=tmp_path / "bundle")
    with hosl.simulate(bundle, TEXTS, eval=TEXTS[:2], rounds=2, data_dir=tmp_path / "data", **SETTINGS) as run:
        folder = run.merge(tmp_path / "out", gguf=tmp_path / "a.gguf", onnx=tmp_path / "onnx")

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(6, 300, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
        found = load_model(str(tmp_path / "a.gguf"))(ids).logits
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()
    session = ort.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})
    torch.testing.assert_close(torch.from_numpy(made), expected, atol=1e-4, rtol=1e-4)
    assert (tmp_path / "onnx" / "tokenizer.json").exists()

    capsys.readouterr()
    options = ["merge", "latest", "--data-dir", str(tmp_path / "data")]
    assert cloud_main([*options, "--gguf", str(tmp_path / "b.gguf"), "--type", "q8_0", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == {"run": run.id, "round": 2, "gguf": str(tmp_path / "b.gguf")}
    assert (tmp_path / "b.gguf").stat().st_size < (tmp_path / "a.gguf").stat().st_size
    assert cloud_main([*options, "--gguf", str(tmp_path / "b.gguf")]) == ExitCode.SETTINGS
    assert "--gguf is" in (said := capsys.readouterr().err)
    assert "exists already; choose another name" in said
    assert cloud_main(options) == ExitCode.SETTINGS
    assert "name what to write: --out DIR" in capsys.readouterr().err
    asked = ["try", "latest", "A film that", "It is", "--max-new-tokens", "5", "--data-dir", str(tmp_path / "data")]
    assert cloud_main(asked) == ExitCode.OK
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, said in zip(asked[2:4], capsys.readouterr().out.splitlines(), strict=True):
        prompt = tokenizer(text, return_tensors="pt").input_ids
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
        answer = tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True)
        assert said.split() == answer.split()

    names = {"model", "bundle", "data", "out", "onnx", "a.gguf", "b.gguf"}
    assert {path.name for path in tmp_path.iterdir()} == names, "nothing half-made is left"


def test_what_a_format_has_no_place_for_is_refused_before_anything_is_written(
    tmp_path: Path, traced_once: None
) -> None:
    save_decoder("llama", tmp_path / "model")
    bundle = hosl.export(tmp_path / "model", 1, train="prompt", prompt_tokens=2, max_length=16)
    with hosl.simulate(bundle, TEXTS, eval=TEXTS[:2], rounds=1, **SETTINGS) as run:
        for name in ("gguf", "onnx"):
            with pytest.raises(SettingsError, match=f"--{name} is .* the run trained a soft prompt"):
                run.merge(tmp_path / "out", **{name: tmp_path / "file"})
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
