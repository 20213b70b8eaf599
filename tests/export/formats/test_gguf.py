"""A .gguf file computes in llama.cpp what the folder computes, and reads its texts as the same tokens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from decoders import CONFIGS, TEXTS, VOCABULARY, decoder_tokenizer, make_decoder, save_decoder
from hosl_export.exceptions import ExportError, ModelError
from hosl_export.formats.gguf_file import check_gguf, write_gguf
from hosl_export.sources.loading import load_model

ENDS = (2, 5)
"""</s> and <|im_end|>, where an answer ends."""
PROMPTS = 50


def prompts(tokenizer: Any) -> list[list[int]]:
    """Fifty beginnings of texts, ids."""
    ids = [token for text in TEXTS for token in tokenizer(text).input_ids]
    return [ids[start : start + 4 + start % 17] for start in range(PROMPTS)]


def answer(model: Any, ids: list[int], tokens: int) -> list[int]:
    """What transformers goes on with, greedily, up to the end of the text."""
    given = torch.tensor([ids])
    made = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=list(ENDS),
        pad_token_id=0,
    )
    return [token for token in made[0, len(ids) :].tolist() if token not in ENDS]


def log_likelihoods(model: Any, ids: list[int]) -> Any:
    """Of every token to come next, by transformers."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).numpy()


def score_at(scores: Any, ids: list[int], place: int) -> float:
    """Of the token at a place of an answer, or of its end there."""
    return float(scores[ids[place]] if place < len(ids) else max(scores[end] for end in ENDS))


@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_cpp_computes_what_the_folder_computes(tmp_path: Path, kind: str) -> None:
    llamacpp = pytest.importorskip("decoders.llamacpp")
    model = save_decoder(kind, tmp_path / "model")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "model")
    for type_, limit in (("f16", 0.03), ("q8_0", 0.8)):  # measured: at most 0.018 and 0.43, of likelihoods to -12
        write_gguf(tmp_path / "model", tmp_path / f"{type_}.gguf", type_, kind)
        with llamacpp.LlamaCpp(tmp_path / f"{type_}.gguf") as served:
            for text in TEXTS:
                ids = tokenizer(text).input_ids
                assert served.tokenize(text) == ids
                ids = ids[:120]
                found, expected = served.log_likelihoods(ids, VOCABULARY), log_likelihoods(model, ids)
                assert np.abs(found - expected).max() < limit


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_llama_cpp_gives_the_same_answers(tmp_path: Path, kind: str) -> None:
    llamacpp = pytest.importorskip("decoders.llamacpp")
    model = save_decoder(kind, tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16", kind)
    with llamacpp.LlamaCpp(tmp_path / "model.gguf") as served:
        given = prompts(hf.AutoTokenizer.from_pretrained(tmp_path / "model"))
        pairs = [(served.greedy(ids, 8), answer(model, ids, 8), ids) for ids in given]
    assert len({tuple(expected) for _, expected, _ in pairs}) > 40
    for found, expected, ids in pairs:
        if found == expected:
            continue
        # Random weights make ties that float16 breaks the other way: then the two are as likely as each other.
        place = next(
            (place for place, (one, other) in enumerate(zip(found, expected, strict=False)) if one != other),
            min(len(found), len(expected)),
        )
        scores = log_likelihoods(model, [*ids, *expected[:place]])
        one, other = (score_at(scores, each, place) for each in (found, expected))
        assert abs(one - other) < 0.03
    assert sum(found == expected for found, expected, _ in pairs) >= PROMPTS - 3


# Those whose every tensor transformers finds in a .gguf file: of others it passes over biases or sizes of heads.
@pytest.mark.parametrize("kind", ["llama", "llama3", "llama2", "mistral", "qwen2", "gemma3_text"])
def test_transformers_reads_back_the_weights_of_the_folder(tmp_path: Path, kind: str) -> None:
    model = save_decoder(kind, tmp_path / "model")
    facts = write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16", "a name")
    assert facts.type == "f16"
    assert 0 < facts.largest_error < 1e-3
    back = load_model(str(tmp_path / "model.gguf")).state_dict()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(back[name], expected, atol=2e-6, rtol=2.0**-10, msg=name)


def test_the_file_has_the_template_the_special_tokens_and_the_pre_tokenizer(tmp_path: Path) -> None:
    import gguf

    save_decoder("llama3", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "q8_0", "tickets, fine-tuned")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = decoder_tokenizer("llama-bpe")
    assert said["general.name"] == "tickets, fine-tuned"
    assert said["tokenizer.ggml.pre"] == "llama-bpe"
    assert said["tokenizer.chat_template"] == tokenizer.chat_template
    assert (said["tokenizer.ggml.bos_token_id"], said["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert said["tokenizer.ggml.add_bos_token"] is True
    assert said["tokenizer.ggml.tokens"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (
            "llama",
            {"hidden_act": "relu"},
            "gguf is 'llama': llama.cpp needs hidden_act = 'silu', this model has 'relu'",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "needs scale_attn_by_inverse_layer_idx = False"),
        ("gemma3_text", {"query_pre_attn_scalar": 7}, "needs query_pre_attn_scalar = 32"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "llama.cpp has no class head; use the folder"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, r"\(dynamic\)"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, kind: str, change: dict[str, Any], said: str
) -> None:
    config = CONFIGS[kind][1]()
    decoder_tokenizer(CONFIGS[kind][0]).save_pretrained(tmp_path)
    check_gguf(config, tmp_path)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ModelError, match=said):
        check_gguf(config, tmp_path)


def test_an_architecture_that_llama_cpp_lacks_is_named_with_what_works_instead(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gguf is 'opt': .* use the folder that merge --out writes, or --onnx"):
        check_gguf(hf.OPTConfig(), tmp_path)


def test_a_tokenizer_that_divides_texts_in_another_way_is_refused(tmp_path: Path) -> None:
    decoder_tokenizer("gpt-2").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(facts))
    with pytest.raises(ModelError, match=r"gguf is 'x\+': llama.cpp has no pre-tokenizer"):
        check_gguf(CONFIGS["llama"][1](), tmp_path)


def test_a_number_that_does_not_fit_is_told(tmp_path: Path) -> None:
    model = make_decoder("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e6
    model.save_pretrained(tmp_path / "model")
    decoder_tokenizer("gpt-2").save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match=r"blk.1.ffn_up.weight .* a number is too large for float16: use --type q8_0"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16", "llama")


def test_a_context_ends_with_a_window_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    save_decoder("mistral", tmp_path / "model")
    facts = write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16", "mistral")
    assert (facts.context_length, facts.window) == (128, 128)
    assert dataclasses.replace(facts, window=None) != facts
