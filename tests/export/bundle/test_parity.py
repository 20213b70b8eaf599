"""The two halves compute what the uncut Hugging Face model computes."""

from __future__ import annotations

import pytest
import torch

from hosl_export.bundle.reading import load_client, load_tail
from hosl_export.model.halves import client_half, tail_half
from tiny import BLOCKS, CONFIGS, DECODERS, WINDOWED, largest_difference, make_batch, make_model, run_shard

SHAPES = [(1, 1), (3, 7), (2, 16), (3, 37)]


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("split", range(1, BLOCKS))
def test_halves_of_a_model_compute_the_same_bits_as_the_model(kind: str, split: int) -> None:
    model = make_model(kind)
    client, tail = client_half(model, split), tail_half(model, split)
    for rows, length in SHAPES:
        ids, mask = make_batch(rows, length)
        expected = model(input_ids=ids, attention_mask=mask)[0]
        assert largest_difference(tail(client(ids, mask), mask), expected, mask) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_bundle_computes_what_the_model_computes(exported, kind: str) -> None:
    case = exported(kind)
    tail = load_tail(case.bundle, case.manifest)
    model = case.model
    for rows, length in SHAPES:
        ids, mask = make_batch(rows, length)
        expected = model(input_ids=ids, attention_mask=mask)[0]
        got = tail(run_shard(case.bundle, case.weights, ids, mask), mask)
        assert largest_difference(got, expected, mask) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_devices_half_as_a_torch_module_computes_what_its_graph_does(exported, kind: str) -> None:
    """A baseline backpropagates through it."""
    case = exported(kind)
    client = load_client(case.bundle, case.manifest, case.weights)
    for rows, length in SHAPES:
        ids, mask = make_batch(rows, length)
        expected = run_shard(case.bundle, case.weights, ids, mask)
        assert largest_difference(client(ids, mask), expected, mask) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", WINDOWED)
def test_a_sliding_window_reaches_the_output(exported, kind: str) -> None:
    """Otherwise the parity of the lengths beyond it would show nothing."""
    model, (ids, mask) = make_model(kind), make_batch(1, 37)
    windowed = model(input_ids=ids, attention_mask=mask)[0]
    for part in model.modules():
        if getattr(part, "sliding_window", None) is not None:
            part.sliding_window = None
    model.config.sliding_window = 1000
    assert largest_difference(model(input_ids=ids, attention_mask=mask)[0], windowed, mask) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_padding_does_not_change_real_tokens(exported, kind: str) -> None:
    case = exported(kind)
    ids, mask = make_batch(1, 6)
    longer, longer_mask = torch.nn.functional.pad(ids, (0, 9)), torch.nn.functional.pad(mask, (0, 9))
    alone = run_shard(case.bundle, case.weights, ids, mask)
    padded = run_shard(case.bundle, case.weights, longer, longer_mask)[:, :6]
    assert largest_difference(padded, alone, mask) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", DECODERS)
def test_tail_gives_logits_at_asked_positions(kind: str) -> None:
    model = make_model(kind)
    client, tail = client_half(model, 1), tail_half(model, 1)
    ids, mask = make_batch(3, 9)
    h, rows = client(ids, mask), torch.arange(3)
    every, last = tail(h, mask), mask.sum(dim=1) - 1
    assert torch.allclose(tail(h, mask, last), every[rows, last], atol=1e-6)
    two = torch.stack([last, torch.zeros_like(last)], dim=1)
    assert torch.allclose(tail(h, mask, two), every[rows[:, None], two], atol=1e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_halves_share_the_models_tensors(kind: str) -> None:
    model = make_model(kind)
    known = {tensor.data_ptr() for tensor in model.parameters()}
    for half in (client_half(model, 2), tail_half(model, 2)):
        assert {tensor.data_ptr() for tensor in half.parameters()} <= known
    assert model.config.num_hidden_layers == len(model.get_submodule(client_half(model, 1).family.blocks))


def test_tail_holds_neither_embeddings_nor_the_devices_blocks(exported) -> None:
    case = exported("opt-350m")
    names = load_tail(case.bundle, case.manifest).model.state_dict()
    assert not [name for name in names if "embed" in name or "project_in" in name]
    assert {name.split(".")[3] for name in names if ".layers." in name} == {"0"}
    assert "model.decoder.project_out.weight" not in case.weights
    assert "model.decoder.project_in.weight" in case.weights


def test_trained_tail_leaves_the_bundle_as_it_was(exported) -> None:
    case = exported("llama")
    with torch.no_grad():
        for parameter in load_tail(case.bundle, case.manifest).parameters():
            parameter.add_(1.0)
    again = load_tail(case.bundle, case.manifest).model.lm_head.weight
    assert torch.equal(again, case.model.lm_head.weight)


def test_gradient_reaches_the_cut_layer(exported) -> None:
    case = exported("llama")
    h = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    load_tail(case.bundle, case.manifest)(h).logsumexp(dim=-1).sum().backward()
    assert h.grad is not None
    assert torch.all(h.grad.abs().sum(dim=(1, 2)) > 0)
