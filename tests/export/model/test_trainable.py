"""What trains by `--train`, and that it is on the lattice before anything is computed."""

from __future__ import annotations

import pytest
import torch

from hosl_export.model.families import find_family
from hosl_export.model.halves import client_half
from hosl_export.model.lora import inject_lora
from hosl_export.model.trainable import plain_parameters, put_on_lattice, trained_blocks, uses_lora
from hosl_export.tensor_files import read_tensors
from hosl_protocol.arithmetic.lattice import exponent_for, is_on_lattice, spacing
from hosl_protocol.run.manifest import LoraEntry
from tiny import make_model

EXPECTED = {
    "none": lambda name, ndim: False,
    "lora": lambda name, ndim: ".lora_" in name,
    "lora-b": lambda name, ndim: ".lora_B" in name,
    "norm": lambda name, ndim: ".layers." in name and ndim == 1,
    "blocks": lambda name, ndim: ".layers." in name and ".lora_" not in name,
    "all": lambda name, ndim: True,
}


@pytest.mark.parametrize("mode", EXPECTED)
def test_mode_says_which_tensors_train(mode) -> None:
    model = make_model("opt")
    client = client_half(model, 2)
    if uses_lora(mode):
        inject_lora(client, LoraEntry(targets=("q_proj", "v_proj")), client.family, seed=0)
    entries, _ = put_on_lattice(client, mode)
    expected = {name for name, tensor in plain_parameters(client).items() if EXPECTED[mode](name, tensor.ndim)}
    assert {entry.name for entry in entries if entry.trainable} == expected
    assert bool(expected) == (mode != "none")


@pytest.mark.parametrize("mode", ["lora", "norm", "blocks"])
def test_train_blocks_keeps_training_to_the_first_blocks(mode) -> None:
    client = client_half(make_model("opt"), 2)
    if uses_lora(mode):
        inject_lora(client, LoraEntry(targets=("q_proj", "v_proj")), client.family, seed=0)
    entries, _ = put_on_lattice(client, mode, trained_blocks(2, 1))
    names = plain_parameters(client)
    allowed = {name for name, tensor in names.items() if EXPECTED[mode](name, tensor.ndim)}
    expected = {name for name in allowed if ".layers.0." in name}
    assert {entry.name for entry in entries if entry.trainable} == expected < allowed


@pytest.mark.parametrize("mode", ["norm", "blocks", "all"])
def test_every_trainable_tensor_lies_on_its_lattice_and_moved_by_half_a_step_at_most(mode) -> None:
    model, original = make_model("opt"), make_model("opt")
    entries, largest_change = put_on_lattice(client_half(model, 2), mode)
    before, after = original.state_dict(), model.state_dict()
    for entry in entries:
        change = (after[entry.name] - before[entry.name]).abs().max().item()
        if not entry.trainable:
            assert change == 0.0
            continue
        assert entry.exponent == exponent_for(before[entry.name].abs().max().item())
        assert is_on_lattice(after[entry.name].numpy(), entry.exponent)
        assert 0.0 < change <= spacing(entry.exponent) / 2
        assert change <= largest_change
    assert largest_change > 0.0


def test_a_bundles_weights_are_on_the_lattice_of_its_manifest(exported) -> None:
    for mode in ("lora", "blocks"):
        case = exported("llama", train=mode)
        assert case.manifest.trainable
        for entry in case.manifest.tensors:
            if entry.trainable:
                assert is_on_lattice(case.weights[entry.name].numpy(), entry.exponent)
            else:
                assert entry.exponent is None
        assert case.manifest.lattice_max_change > 0.0


def test_export_leaves_the_models_own_files_as_they_were(exported) -> None:
    """The loaded weights may be a memory map of the file, and rounding is in place."""
    case, original = exported("llama", train="blocks"), make_model("llama").state_dict()
    for name, tensor in read_tensors(case.source / "model.safetensors").items():
        assert torch.equal(tensor, original[name])


def test_bundle_that_trains_blocks_has_no_adapters(exported) -> None:
    case = exported("llama", train="blocks")
    assert case.manifest.lora is None
    assert not [entry.name for entry in case.manifest.tensors if ".lora_" in entry.name]


def test_lora_is_drawn_from_its_seed_and_leaves_the_global_generator_alone() -> None:
    def draw(seed: int) -> torch.Tensor:
        client = client_half(make_model("llama"), 1)
        inject_lora(client, LoraEntry(targets=("q_proj",)), find_family("llama"), seed)
        return plain_parameters(client)["model.layers.0.self_attn.q_proj.lora_A.weight"]

    state = torch.random.get_rng_state()
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert torch.equal(torch.random.get_rng_state(), state)
