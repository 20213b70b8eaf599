"""The graphs of the gradient against torch's autograd, for each family and what may train."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from hosl_export.bundle.gradient_check import GRADIENT_TOLERANCE, check_gradients
from hosl_export.bundle.gradients import shown_blocks, write_gradients
from hosl_export.bundle.graph import IR_VERSION, OPSET, showing_inputs
from hosl_export.bundle.parity import TextCase, make_text_cases
from hosl_export.bundle.reading import load_client
from hosl_export.exceptions import GradientError
from hosl_export.model.halves import ClientHalf, client_half
from hosl_export.model.lora import inject_lora
from hosl_export.model.prompt import add_prompt, draw_prompt
from hosl_export.model.trainable import plain_parameters, put_on_lattice, trained_blocks, uses_lora
from hosl_protocol.run.manifest import SHARD_GRAPH, BlockGradient, LoraEntry
from tiny import BLOCKS, CONFIGS, make_batch, make_model, make_tokenizer

SHAPES = [(1, 1), (3, 7), (2, 16), (3, 37)]
"""Of batches: a single token, odd lengths, and lengths beyond a sliding window."""

SPLIT = BLOCKS - 1

FEW = ("llama", "gpt2", "bert")
"""For what does not depend on the family: causal, with transposed weights, and an encoder."""

CASES = [
    *((kind, "norm", None) for kind in CONFIGS),
    *((kind, "all", None) for kind in CONFIGS if kind not in ("mistral", "qwen2", "qwen3")),  # Llama's embedding
    *((kind, mode, None) for kind in FEW for mode in ("lora", "lora-b", "blocks")),
    *((kind, "prompt", None) for kind in (*FEW, "gemma3_text")),
    *((kind, "norm", blocks) for kind in ("opt", "bert") for blocks in (-2, 1)),
]


@pytest.mark.parametrize(("kind", "mode", "blocks"), CASES)
def test_gradients_are_those_of_autograd(tmp_path: Path, kind: str, mode: Any, blocks: int | None) -> None:
    model = make_model(kind)
    if mode == "prompt":
        add_prompt(model, 3)
        draw_prompt(model, 0)
    # A trace takes seconds. The third block has no other adapters, and Qwen3's only what Qwen2's has.
    split = 2 if uses_lora(mode) or kind == "qwen3" else SPLIT
    client = client_half(model, split)
    if uses_lora(mode):
        inject_lora(client, LoraEntry(targets=client.family.lora_targets), client.family, 0)
        for name, parameter in client.named_parameters():
            if "lora_B" in name:  # zero at first, so that nothing would reach A
                torch.nn.init.normal_(parameter, std=0.3)
    tensors, _ = put_on_lattice(client, mode, trained_blocks(split, blocks))
    trained = {entry.name for entry in tensors if entry.trainable}

    (tmp_path / "shard").mkdir()
    entries = write_gradients(tmp_path, client, tensors)
    assert [entry.block for entry in entries] == list(range(entries[0].block, split))
    assert {name for entry in entries for name in entry.gradients.values()} <= trained
    for rows, length in SHAPES:
        length = max(length, client.prompt_tokens + 1)
        ids, mask = make_batch(rows, length)
        check(client, tmp_path, entries, trained, ids, mask)


def check(
    client: ClientHalf, folder: Path, entries: tuple[BlockGradient, ...], trained: set[str], ids: Tensor, mask: Tensor
) -> None:
    """Compare every tensor's gradient with autograd's, where that at the cut is random, and zero at padding."""
    parameters = plain_parameters(client)
    blocks = [entry.block for entry in entries if entry.block >= 0]
    with torch.enable_grad(), showing_inputs(client, blocks):
        h_BTD, *inputs = client(ids, mask)
    cotangent_BTD = torch.randn(h_BTD.shape, generator=torch.Generator().manual_seed(1)) * mask[..., None]
    names = sorted(trained)
    found = torch.autograd.grad(h_BTD, [parameters[name] for name in names], cotangent_BTD, materialize_grads=True)
    expected = dict(zip(names, found, strict=True))
    whole = torch.stack([gradient.norm() for gradient in found]).norm()

    given = dict(zip(blocks, inputs, strict=True))
    got = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
    got |= dict(run_blocks(client, folder, entries, {"input_ids": ids, "attention_mask": mask}, given, cotangent_BTD))
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        # Where others are so much larger, rounding is more than that of it, in torch as here.
        scale = max(expected[name].norm(), 1e-3 * whole)
        assert (gradient - expected[name]).norm() <= GRADIENT_TOLERANCE * scale, name


def run_blocks(
    client: ClientHalf,
    folder: Path,
    entries: tuple[BlockGradient, ...],
    feed: dict[str, Tensor],
    given: dict[int, Tensor],
    cotangent: Tensor,
) -> Iterator[tuple[str, Tensor]]:
    """Run the graphs from the last block to the first, as the specification tells it."""
    parameters = plain_parameters(client)
    for entry in reversed(entries):
        session = ort.InferenceSession(str(folder / entry.graph))
        weights = {name: parameters[tensor] for name, tensor in entry.parameters.items()}
        known = {**feed, **weights, "boundary": given.get(entry.block), "cotangent": cotangent}
        arrays = {value.name: known[value.name].detach().numpy() for value in session.get_inputs()}
        assert weights.keys() <= arrays.keys(), "no entry names what its graph does not read"
        outputs = dict(zip([value.name for value in session.get_outputs()], session.run(None, arrays), strict=True))
        assert ("input_gradient" in outputs) == (entry is not entries[0])
        assert outputs.keys() - {"input_gradient"} == entry.gradients.keys()
        yield from ((tensor, torch.from_numpy(outputs[name])) for name, tensor in entry.gradients.items())
        cotangent = torch.from_numpy(outputs.get("input_gradient", cotangent.numpy()))


GRAPHS = {"llama": 2, "gemma3_text": 2, "gpt2": 3, "qwen2": 3}
"""Of three blocks: equal ones share one, the first has its own, which gives no gradient of its input. Here the third of
Qwen2 has a sliding window, as all of Gemma's have, and each of GPT-2's has a scale of its own."""


@pytest.mark.parametrize("kind", GRAPHS)
def test_equal_blocks_share_a_graph(tmp_path: Path, kind: str) -> None:
    client = client_half(make_model(kind), SPLIT)
    tensors, _ = put_on_lattice(client, "norm")
    (tmp_path / "shard").mkdir()
    entries = write_gradients(tmp_path, client, tensors)
    assert len({entry.graph for entry in entries}) == len(list((tmp_path / "shard").iterdir())) == GRAPHS[kind]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_graphs_are_such_that_a_device_can_run_them(exported: Any, kind: str) -> None:
    case = exported(kind, gradients=True)
    for path in {entry.graph for entry in case.manifest.gradients}:
        model = onnx.load(case.bundle / path, load_external_data=False)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
        assert model.ir_version == IR_VERSION
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions
        assert b"/" not in b"".join(prop.value.encode() for node in model.graph.node for prop in node.metadata_props)
        assert not model.metadata_props
        dims = {entry.name: [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim]
                for entry in (*model.graph.input, *model.graph.output)}  # fmt: skip
        assert dims["cotangent"] == ["batch", "token", case.manifest.width]
        largest = max((len(entry.raw_data) for entry in model.graph.initializer), default=0)
        assert largest <= 64, "no weight is inside"


def test_the_shard_gives_what_each_block_is_given(exported: Any) -> None:
    case = exported("llama", gradients=True)
    client = load_client(case.bundle, case.manifest, case.weights)
    blocks = shown_blocks(client, case.manifest.tensors, None)
    assert blocks == list(range(case.manifest.split))
    ids, mask = make_batch(3, 7)
    with torch.no_grad(), showing_inputs(client, blocks):
        _, *expected = client(ids, mask)
    session = ort.InferenceSession(str(case.bundle / SHARD_GRAPH))
    given = {"input_ids": ids, **case.weights}
    feed = {value.name: given[value.name].numpy() for value in session.get_inputs()}
    names = [f"input.{block}" for block in blocks]
    assert [value.name for value in session.get_outputs()] == ["activations", *names]
    for got, want in zip(session.run(names, feed), expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)


def cases_of(case: Any) -> list[Any]:
    return make_text_cases(make_tokenizer(), case.manifest.pad_token_id, case.manifest.max_length)


def test_a_round_costs_the_operations_of_its_graphs(exported: Any) -> None:
    """A forward, it again in the graphs, and backward a product or two for each of its own."""
    case = exported("opt", gradients=True)
    found = check_gradients(case.bundle, case.manifest, cases_of(case))
    assert found.error < 1e-5
    assert found.probed == 1.0
    assert 2.0 < found.forwards < 3.0


@pytest.mark.parametrize(("kind", "right", "wrong"), [("llama", "Sigmoid", "Tanh"), ("opt", "Relu", "Abs")])
def test_a_graph_that_computes_something_else_is_found(
    exported: Any, tmp_path: Path, kind: str, right: str, wrong: str
) -> None:
    case = exported(kind, gradients=True)
    folder = tmp_path / "bundle"
    shutil.copytree(case.bundle, folder)
    graph = folder / case.manifest.gradients[0].graph
    model = onnx.load(graph)
    next(node for node in model.graph.node if node.op_type == right).op_type = wrong
    onnx.save(model, graph)
    sentence = r"the gradient of model\.\S+ at \d+ x \d+ tokens departs from that of torch by .*--no-gradients leaves"
    with pytest.raises(GradientError, match=sentence):
        check_gradients(folder, case.manifest, cases_of(case))


def test_a_trained_tensor_that_no_graph_names_must_have_no_gradient(exported: Any) -> None:
    case = exported("llama", gradients=True)
    first, *rest = case.manifest.gradients
    fewer = msgspec.structs.replace(first, gradients=dict(list(first.gradients.items())[1:]))
    manifest = msgspec.structs.replace(case.manifest, gradients=(fewer, *rest))
    with pytest.raises(GradientError, match=r"q_proj\.lora_A\.weight at .* by 1 of its norm"):
        check_gradients(case.bundle, manifest, cases_of(case))


def test_a_long_batch_is_compared_in_part() -> None:
    ids = torch.arange(300).repeat(2, 1)
    case = TextCase(ids, torch.tensor([300, 90]), torch.tensor([0, 150, 299])).cut(128)
    assert case.shape == (2, 128)
    assert case.lengths.tolist() == [128, 90]
    assert case.positions.tolist() == [0]
