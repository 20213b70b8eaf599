"""The shard's graph and files: what a device relies on."""

from __future__ import annotations

import onnx
import pytest
import torch
from tokenizers import Tokenizer

from hosl_export.bundle.graph import IR_VERSION, OPSET
from hosl_export.bundle.reading import load_model_config
from hosl_export.bundle.writing import write_texts
from hosl_protocol.run.chat import TextForm
from hosl_protocol.run.manifest import (
    SHARD_GRAPH,
    SHARD_TOKENIZER,
    SHARD_WEIGHTS,
    TAIL_CONFIG,
    TAIL_WEIGHTS,
    describe_file,
    load_manifest,
)
from tiny import CONFIGS, SPLITS, make_batch, make_model, make_tokenizer, run_shard


def _buffers(graph: onnx.GraphProto) -> set[str]:
    return {entry.name.rpartition(".")[2] for entry in graph.initializer}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_is_an_input_under_its_hugging_face_name(exported, kind: str) -> None:
    case = exported(kind)
    graph = onnx.load(case.bundle / SHARD_GRAPH).graph
    names = [entry.name for entry in graph.input]
    assert set(names) == {*case.manifest.inputs, *(entry.name for entry in case.manifest.tensors)}
    assert len(names) == len(set(names))
    shapes = {entry.name: tuple(d.dim_value for d in entry.type.tensor_type.shape.dim) for entry in graph.input}
    for entry in case.manifest.tensors:
        assert entry.shape == tuple(case.weights[entry.name].shape)
        free = 1 if entry.lookup else 0  # a client may bind just some rows of the token embedding
        assert shapes[entry.name][free:] == entry.shape[free:]
    (table,) = (entry for entry in case.manifest.tensors if entry.lookup)
    assert table.name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
    base = set(case.model.state_dict())
    assert {entry.name for entry in case.manifest.tensors if ".lora_" not in entry.name} <= base


@pytest.mark.parametrize("kind", CONFIGS)
def test_only_buffers_stay_inside_the_graph(exported, kind: str) -> None:
    case = exported(kind)
    graph = onnx.load(case.bundle / SHARD_GRAPH).graph
    assert _buffers(graph) <= {
        "inv_freq",
        "full_attention_inv_freq",
        "sliding_attention_inv_freq",
        "embed_scale",
        "position_ids",
        "token_type_ids",
    }
    sizes = {len(node.attribute[0].t.raw_data) for node in graph.node if node.op_type == "Constant"}
    assert max(sizes) <= 64  # shapes and scalars: no weight was folded into a constant


@pytest.mark.parametrize("kind", CONFIGS)
def test_graph_has_standard_operators_and_no_external_data(exported, kind: str) -> None:
    case = exported(kind)
    model = onnx.load(case.bundle / SHARD_GRAPH, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert model.ir_version == IR_VERSION
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert not [entry for entry in model.graph.initializer if entry.data_location == onnx.TensorProto.EXTERNAL]


@pytest.mark.parametrize(("kind", "inputs"), [("llama", {"input_ids"}), ("bert", {"input_ids", "attention_mask"})])
def test_only_encoders_take_a_mask(exported, kind: str, inputs: set[str]) -> None:
    assert set(exported(kind).manifest.inputs) == inputs


def test_an_encoders_mask_hides_padding(exported) -> None:
    case = exported("bert")
    ids, mask = make_batch(1, 6)
    mask[0, 3:] = 0
    changed = ids.clone()
    changed[0, 3:] = 5
    first, second = (run_shard(case.bundle, case.weights, given, mask) for given in (ids, changed))
    assert torch.allclose(first[0, :3], second[0, :3], atol=1e-5)


def test_manifest_describes_every_file(exported) -> None:
    case = exported("llama")
    present = {path.relative_to(case.bundle).as_posix() for path in case.bundle.rglob("*") if path.is_file()}
    assert {entry.path for entry in case.manifest.files} == present - {"manifest.json"}
    assert {SHARD_GRAPH, SHARD_WEIGHTS, SHARD_TOKENIZER, TAIL_CONFIG, TAIL_WEIGHTS} <= present
    for entry in case.manifest.files:
        assert describe_file(case.bundle, entry.path) == entry


def test_manifest_says_what_was_cut(exported) -> None:
    manifest = load_manifest(exported("gpt2").bundle)
    assert (manifest.model, manifest.family, manifest.architecture) == ("gpt2", "gpt2", "GPT2LMHeadModel")
    assert (manifest.split, manifest.blocks, manifest.width) == (SPLITS["gpt2"], 4, 16)
    assert (manifest.max_length, manifest.pad_token_id) == (48, 0)
    assert manifest.lora is not None
    assert manifest.lora.targets == ("c_attn",)


def test_device_tokenizer_neither_pads_nor_cuts(tmp_path) -> None:
    """tokenizer.json of many models asks for both."""
    source = make_tokenizer()
    assert source.backend_tokenizer.padding is not None
    assert source.backend_tokenizer.truncation is not None
    for folder in ("shard", "tail"):
        (tmp_path / folder).mkdir()
    write_texts(tmp_path, make_model("llama"), source, source.pad_token_id, TextForm(end=None, chat=None))
    tokenizer = Tokenizer.from_file(str(tmp_path / SHARD_TOKENIZER))
    assert tokenizer.padding is None
    assert tokenizer.truncation is None
    assert len(tokenizer.encode("a film about two sisters, and far more").ids) > 5
    assert len(tokenizer.encode("a").ids) < 5


def test_tail_config_is_the_whole_models(exported) -> None:
    case = exported("gemma3_text")
    config = load_model_config(case.bundle)
    assert config.num_hidden_layers == len(config.layer_types) == case.manifest.blocks == 7
    assert config.architectures == ["Gemma3ForCausalLM"]
