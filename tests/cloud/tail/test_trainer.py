"""Steps of the tail are those of plain torch; λ and weights are kept apart; only what should train does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hosl_cloud.exceptions import NotFiniteError, RoundSpoiltError
from hosl_cloud.tail.building import block_list
from hosl_cloud.tail.trainer import TailTrainer, split_rows
from hosl_export import plain_state, tail_half
from hosl_protocol.exceptions import SettingsError

PROMPTS, CLASSES, TEXT = "prompt-classification", "sequence-classification", "lm"


def weights(trainer: TailTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in plain_state(trainer.tail.model).items()}


def changed_by_a_step(trainer: TailTrainer, batch: Any) -> set[str]:
    before = weights(trainer)
    for round_ in (1, 2):
        trainer.forward_backward(*batch.sent)
        trainer.step(round_, 1.0)
    return {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("settings", "make_plain"),
    [
        (
            {"optimizer": "sgd", "learning_rate": 0.3, "momentum": 0.9, "weight_decay": 0.01, "clip_norm": 0.5},
            lambda values: torch.optim.SGD(values, lr=0.3, momentum=0.9, weight_decay=0.01),
        ),
        (
            {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.0, "clip_norm": 0.5},
            lambda values: torch.optim.AdamW(values, lr=0.01, weight_decay=0.0, eps=1e-8),
        ),
    ],
)
def test_steps_equal_plain_torch_on_the_whole_head(
    bundle: Any, settings: dict[str, Any], make_plain: Callable[..., torch.optim.Optimizer]
) -> None:
    trainer = bundle.trainer(PROMPTS, schedule="linear", warmup_rounds=2, **settings)
    plain = tail_half(bundle.uncut, bundle.manifest.split).model
    plain.load_state_dict({name: tensor.clone() for name, tensor in plain.state_dict().items()}, assign=True)
    optimizer = make_plain(list(plain.requires_grad_().parameters()))
    batch = bundle.batch(PROMPTS, (6, 6, 6))
    rows = list(trainer.head_rows)
    clipped = 0
    for round_, factor in ((1, 1 / 2), (2, 1.0), (3, 8 / 8), (4, 7 / 8)):
        trainer.forward_backward(*batch.sent)
        statistics = trainer.step(round_, 1.0)
        logits = plain(inputs_embeds=torch.from_numpy(batch.activations_TD).reshape(3, 6, -1), use_cache=False).logits[
            :, -1, rows
        ]
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.from_numpy(batch.labels_N).long()).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = settings["learning_rate"] * factor
        optimizer.step()
        clipped += norm > 0.5
        assert statistics.gradient_norm == pytest.approx(norm.item(), rel=1e-3)
        assert statistics.learning_rate == pytest.approx(settings["learning_rate"] * factor)
    assert clipped
    expected = plain.state_dict()
    head = expected.pop("lm_head.weight")[rows]
    if settings["weight_decay"] == 0.0:
        assert torch.equal(plain.lm_head.weight[8:], bundle.uncut.lm_head.weight[8:])
    assert_same(weights(trainer), expected | {"lm_head.weight": head}, tolerance=2e-4)


@pytest.mark.parametrize("kind", [PROMPTS, CLASSES])
def test_two_devices_weighted_by_examples_are_one_batch_of_both(bundle: Any, kind: str) -> None:
    apart, together = bundle.trainer(kind), bundle.trainer(kind)
    whole = bundle.batch(kind, (3, 7, 1, 5, 2))
    first = (whole.activations_TD[:10], whole.lengths_B[:2], whole.labels_N[:2])
    second = (whole.activations_TD[10:], whole.lengths_B[2:], whole.labels_N[2:])
    apart.forward_backward(*first, weight=2.0)
    apart.forward_backward(*second, weight=3.0)
    together.forward_backward(*whole.sent)
    norms = apart.step(1, 5.0).gradient_norm, together.step(1, 1.0).gradient_norm
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert_same(weights(apart), weights(together), tolerance=1e-6)


def test_lambda_is_the_devices_own_whatever_its_weight(bundle: Any) -> None:
    trainer, batch = bundle.trainer(clip_norm=1e-3), bundle.batch(PROMPTS)
    own = trainer.forward_backward(*batch.sent).cut_gradient_TD
    weighted = trainer.forward_backward(*batch.sent, weight=7.0).cut_gradient_TD
    np.testing.assert_allclose(weighted, own, rtol=1e-5, atol=1e-6 * np.abs(own).max())
    assert own.shape == batch.activations_TD.shape
    assert own.dtype == np.float32


def test_without_lambda_the_weights_move_alike(bundle: Any) -> None:
    asked, unasked, batch = bundle.trainer(), bundle.trainer(), bundle.batch(PROMPTS)
    asked.forward_backward(*batch.sent)
    assert unasked.forward_backward(*batch.sent, wants_cut_gradient=False).cut_gradient_TD is None
    asked.step(1, 1.0)
    unasked.step(1, 1.0)
    assert_same(weights(unasked), weights(asked), tolerance=1e-7)


def test_discarded_gradients_leave_no_trace(bundle: Any) -> None:
    trainer, fresh, batch = bundle.trainer(), bundle.trainer(), bundle.batch(PROMPTS)
    trainer.forward_backward(*bundle.batch(PROMPTS, seed=9).sent)
    trainer.discard()
    for each in (trainer, fresh):
        each.forward_backward(*batch.sent)
        each.step(1, 1.0)
    assert_same(weights(trainer), weights(fresh), tolerance=0.0)


def test_evaluation_changes_nothing_and_agrees_with_training(bundle: Any) -> None:
    trainer, batch = bundle.trainer(), bundle.batch(PROMPTS)
    before = weights(trainer)
    score = trainer.evaluate(*batch.sent)
    assert all(value.grad is None for value in trainer.parameters.values())
    assert_same(weights(trainer), before, tolerance=0.0)
    result = trainer.forward_backward(*batch.sent)
    assert (result.loss, result.correct, result.scored) == (score.loss, score.correct, score.scored)


@pytest.mark.parametrize("kind", [PROMPTS, CLASSES, TEXT])
def test_full_trains_every_tensor_of_the_tail(bundle: Any, kind: str) -> None:
    trainer = bundle.trainer(kind)
    assert changed_by_a_step(trainer, bundle.batch(kind)) == set(plain_state(trainer.tail.model))


@pytest.mark.parametrize(("family", "adapted"), [("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn"])])
def test_lora_trains_the_adapters_alone(make_bundle: Callable[..., Any], family: str, adapted: list[str]) -> None:
    bundle = make_bundle(family)
    trainer = bundle.trainer(PROMPTS, train="lora")
    changed = changed_by_a_step(trainer, bundle.batch(PROMPTS))
    assert all(".lora_A." in name or ".lora_B." in name for name in changed)
    assert {name.split(".")[-3] for name in changed} == set(adapted)
    assert len(changed) == 2 * 2 * len(adapted)  # A and B in each of two blocks
    assert changed == set(trainer.parameters)


def test_lora_trains_a_fresh_classification_head_too(make_bundle: Callable[..., Any]) -> None:
    for family, head in (("llama", {"score.weight"}), ("bert", {"classifier.weight", "classifier.bias"})):
        bundle = make_bundle(family)
        changed = changed_by_a_step(bundle.trainer(CLASSES, train="lora"), bundle.batch(CLASSES))
        assert {name for name in changed if "lora" not in name} == head


@pytest.mark.parametrize(
    ("family", "kind", "expected"),
    [
        ("llama", PROMPTS, {"lm_head.weight"}),
        ("gpt2", TEXT, {"lm_head.weight"}),
        ("llama", CLASSES, {"score.weight"}),
        (
            "bert",
            CLASSES,
            {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"},
        ),
    ],
)
def test_head_trains_the_head_alone(
    make_bundle: Callable[..., Any], family: str, kind: str, expected: set[str]
) -> None:
    bundle = make_bundle(family)
    assert changed_by_a_step(bundle.trainer(kind, train="head"), bundle.batch(kind)) == expected


def test_lora_without_adapters_on_the_device_takes_the_familys_targets(make_bundle: Callable[..., Any]) -> None:
    trainer = make_bundle("llama", "none").trainer(PROMPTS, train="lora")
    shapes = {name.split(".")[-3]: tuple(value.shape) for name, value in trainer.parameters.items() if "_A" in name}
    assert shapes == {"q_proj": (8, 32), "v_proj": (8, 32)}


def test_a_prompts_head_is_kept_to_the_verbalizers(bundle: Any) -> None:
    trainer = bundle.trainer(PROMPTS)
    assert trainer.head_rows == (2, 3)
    assert torch.equal(trainer.parameters["lm_head.weight"], bundle.uncut.lm_head.weight[2:4])


def test_new_tensors_are_drawn_from_the_runs_seed_alone(bundle: Any) -> None:
    for kind, train in ((CLASSES, "full"), (PROMPTS, "lora")):
        torch.manual_seed(1)
        one = weights(bundle.trainer(kind, train=train))
        state = torch.random.get_rng_state()
        two = weights(bundle.trainer(kind, train=train))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert_same(one, two, tolerance=0.0)


def test_the_bundle_stays_as_it_was(bundle: Any) -> None:
    path = bundle.path / "tail" / "tail.safetensors"
    before = path.read_bytes()
    changed_by_a_step(bundle.trainer(), bundle.batch(PROMPTS))
    assert path.read_bytes() == before


def test_an_infinite_activation_is_refused_and_spares_the_others(bundle: Any) -> None:
    trainer, alone, batch = bundle.trainer(), bundle.trainer(), bundle.batch(PROMPTS)
    trainer.forward_backward(*batch.sent)
    spoilt = batch.activations_TD.copy()
    spoilt[-1] = np.inf
    with pytest.raises(NotFiniteError, match="the tail's loss is nan"):
        trainer.forward_backward(spoilt, batch.lengths_B, batch.labels_N)
    with pytest.raises(NotFiniteError):
        trainer.evaluate(spoilt, batch.lengths_B, batch.labels_N)
    alone.forward_backward(*batch.sent)
    trainer.step(1, 1.0)
    alone.step(1, 1.0)
    assert_same(weights(trainer), weights(alone), tolerance=0.0)


def test_a_gradient_that_is_not_finite_changes_no_weight(bundle: Any) -> None:
    trainer, batch = bundle.trainer(), bundle.batch(PROMPTS)
    before = weights(trainer)
    trainer.forward_backward(*batch.sent, wants_cut_gradient=False)
    next(iter(trainer.parameters.values())).grad.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="norm of the tail's gradient"):
        trainer.step(1, 1.0)
    assert_same(weights(trainer), before, tolerance=0.0)
    assert all(value.grad is None for value in trainer.parameters.values())


def test_a_lambda_that_is_not_finite_drops_the_round(bundle: Any) -> None:
    trainer, batch = bundle.trainer(), bundle.batch(PROMPTS)
    with pytest.raises(NotFiniteError, match="gradient at the cut layer"):
        trainer.forward_backward(*batch.sent, weight=1e39)
    assert all(value.grad is None for value in trainer.parameters.values())


def test_bfloat16_computes_nearly_the_same_and_keeps_float32_weights(bundle: Any) -> None:
    half, full, batch = bundle.trainer(precision="bfloat16"), bundle.trainer(), bundle.batch(PROMPTS)
    result, expected = half.forward_backward(*batch.sent), full.forward_backward(*batch.sent)
    assert result.loss != expected.loss
    assert result.loss == pytest.approx(expected.loss, rel=0.1)
    cosine = F.cosine_similarity(
        torch.from_numpy(result.cut_gradient_TD).flatten(), torch.from_numpy(expected.cut_gradient_TD).flatten(), dim=0
    )
    assert cosine > 0.95
    half.step(1, 1.0)
    assert {value.dtype for value in half.parameters.values()} == {torch.float32}


def test_losses_that_hosl_subtracts_are_float32_whatever_the_precision(bundle: Any) -> None:
    config, batch = bundle.config(PROMPTS, precision="bfloat16"), bundle.batch(PROMPTS)
    hosl = TailTrainer(bundle.path, bundle.manifest, msgspec.structs.replace(config, algorithm="hosl"))
    assert hosl.evaluate(*batch.sent).loss == bundle.trainer().evaluate(*batch.sent).loss
    half = bundle.trainer(precision="bfloat16").forward_backward(*batch.sent)
    assert hosl.forward_backward(*batch.sent).loss == half.loss, "the tail's own step is in bfloat16"


def test_float32_is_no_tf32(bundle: Any) -> None:
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    for switch in switches:
        switch.allow_tf32 = True
    bundle.trainer()
    assert [switch.allow_tf32 for switch in switches] == [False, False]


@pytest.mark.parametrize("name", ["cuda:99", "warp"])
def test_a_device_that_is_not_there_is_named(bundle: Any, name: str) -> None:
    with pytest.raises(SettingsError, match=f"tail.device is '{name}'"):
        bundle.trainer(device=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_computes_what_the_cpu_computes(bundle: Any) -> None:
    cuda, cpu, batch = bundle.trainer(device="cuda"), bundle.trainer(), bundle.batch(PROMPTS)
    results = [each.forward_backward(*batch.sent) for each in (cuda, cpu)]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-4)
    np.testing.assert_allclose(results[0].cut_gradient_TD, results[1].cut_gradient_TD, atol=1e-4)
    cuda.step(1, 1.0)
    cpu.step(1, 1.0)
    assert_same({name: tensor.cpu() for name, tensor in weights(cuda).items()}, weights(cpu), tolerance=1e-4)


@pytest.mark.parametrize("kind", [PROMPTS, CLASSES, TEXT])
def test_micro_batches_add_up_to_the_whole_batch(bundle: Any, kind: str) -> None:
    whole, split = bundle.trainer(kind), bundle.trainer(kind, micro_batch_tokens=7)
    batch = bundle.batch(kind, (3, 7, 1, 5, 2, 2))
    assert split.evaluate(*batch.sent).loss == pytest.approx(whole.evaluate(*batch.sent).loss, rel=1e-5)
    results = [each.forward_backward(*batch.sent, 3.0) for each in (whole, split)]
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-5)
    assert [results[1].correct, results[1].scored] == [results[0].correct, results[0].scored]
    np.testing.assert_allclose(results[1].cut_gradient_TD, results[0].cut_gradient_TD, rtol=1e-4, atol=1e-6)
    assert split.step(1, 3.0).gradient_norm == pytest.approx(whole.step(1, 3.0).gradient_norm, rel=1e-5)
    assert_same(weights(split), weights(whole), tolerance=1e-6)


def test_a_micro_batch_holds_whole_examples_and_no_more_tokens_than_it_may() -> None:
    lengths = np.array([3, 7, 1, 5, 9, 2, 2], np.int32)
    assert split_rows(lengths, 0) == [slice(0, 7)]
    assert split_rows(lengths, 8) == [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4), slice(4, 5), slice(5, 7)]
    assert split_rows(lengths, 14) == [slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 7)]
    assert split_rows(lengths, 10**6) == [slice(0, 7)]


def test_an_infinite_activation_of_a_split_batch_is_refused_before_anything_is_added(bundle: Any) -> None:
    trainer, batch = bundle.trainer(micro_batch_tokens=4), bundle.batch(PROMPTS)
    spoilt = batch.activations_TD.copy()
    spoilt[-1] = np.inf
    with pytest.raises(NotFiniteError, match="an activation is nan"):
        trainer.forward_backward(spoilt, batch.lengths_B, batch.labels_N)
    assert all(value.grad is None for value in trainer.parameters.values())


def test_a_later_micro_batch_without_a_finite_loss_spoils_the_round(
    bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, batch = bundle.trainer(micro_batch_tokens=8), bundle.batch(PROMPTS)
    score, calls = trainer._score, list[Any]()

    def overflow(part: Any) -> Any:
        """No activations at hand are finite and have no finite loss."""
        calls.append(part)
        return replace(score(part), loss=torch.tensor(np.inf)) if len(calls) == 2 else score(part)

    monkeypatch.setattr(trainer, "_score", overflow)
    with pytest.raises(RoundSpoiltError, match="the tail's loss is inf"):
        trainer.forward_backward(*batch.sent)
    assert all(value.grad is None for value in trainer.parameters.values())


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_activations_that_are_computed_again_give_the_same_bits(make_bundle: Callable[..., Any], family: str) -> None:
    bundle, forwards = make_bundle(family), dict[bool, int]()
    kept, again = (bundle.trainer(CLASSES, activation_checkpointing=is_on) for is_on in (False, True))
    results = []
    for each in (kept, again):
        runs: list[Any] = []
        inner = next(block_list(each.tail)[0].children())
        inner.register_forward_hook(lambda *call, runs=runs: runs.append(call))
        results.append(each.forward_backward(*bundle.batch(CLASSES).sent))
        forwards[each is again] = len(runs)
        each.step(1, 1.0)
    assert forwards == {False: 1, True: 2}
    np.testing.assert_array_equal(results[0].cut_gradient_TD, results[1].cut_gradient_TD)
    assert_same(weights(again), weights(kept), tolerance=0.0)


@pytest.mark.filterwarnings("ignore")  # of what torch itself does while it compiles
def test_compiled_blocks_compute_nearly_the_same(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced and differentiated as for the default backend, which would then call a C++ compiler for minutes.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    compiled, plain = bundle.trainer(compile=True), bundle.trainer()
    batch = bundle.batch(PROMPTS)
    results = [each.forward_backward(*batch.sent) for each in (compiled, plain)]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    np.testing.assert_allclose(results[0].cut_gradient_TD, results[1].cut_gradient_TD, atol=1e-5)
    assert sum(torch._dynamo.utils.counters["frames"].values()), "nothing was compiled"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_computes_several_batches_of_which_the_later_ones_travel_meanwhile(bundle: Any) -> None:
    cuda, cpu = bundle.trainer(device="cuda"), bundle.trainer()
    batches = [bundle.batch(PROMPTS, lengths).sent for lengths in ((3, 7), (1, 5, 2))]
    assert cuda.at_once >= len(batches)
    got, expected = (each.forward_backward_many(batches, [1.0, 2.0], wants_cut_gradient=True) for each in (cuda, cpu))
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)
        np.testing.assert_allclose(mine.cut_gradient_TD, theirs.cut_gradient_TD, atol=1e-4)
