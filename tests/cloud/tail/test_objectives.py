"""The split loss is the uncut model's loss, and λ is its gradient."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from hosl_cloud.exceptions import BatchError, CloudError, VerbalizerError
from hosl_cloud.settings import parse_config
from hosl_cloud.tail.building import build_tail
from hosl_cloud.tail.objectives import unpack
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import SHARD_TOKENIZER

PROMPTS, CLASSES, TEXT, ANSWERS = "prompt-classification", "sequence-classification", "lm", "completion"

CASES = [
    *((family, PROMPTS) for family in ("llama", "gpt2", "opt", "gemma3_text")),
    *((family, CLASSES) for family in ("llama", "gpt2", "gemma3_text", "bert")),
    *((family, TEXT) for family in ("llama", "gpt2", "gemma3_text")),
    *((family, ANSWERS) for family in ("llama", "gpt2", "gemma3_text")),
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_split_loss_and_lambda_are_those_of_the_uncut_model_run_without_padding(
    make_bundle: Callable[..., Any], family: str, kind: str
) -> None:
    bundle = make_bundle(family)
    trainer, batch = bundle.trainer(kind), bundle.batch(kind, (3, 9, 1, 5))
    expected_loss, expected_TD = bundle.uncut_loss_and_gradient(trainer, batch)
    result = trainer.forward_backward(*batch.sent)
    assert result.loss == pytest.approx(expected_loss, rel=1e-5)
    scale = np.abs(expected_TD).max()
    assert scale > 1e-4
    np.testing.assert_allclose(result.cut_gradient_TD, expected_TD, atol=2e-5 * scale)
    assert trainer.evaluate(*batch.sent).loss == pytest.approx(expected_loss, rel=1e-5)


def test_softcapping_of_the_config_changes_the_loss(make_bundle: Callable[..., Any]) -> None:
    bundle = make_bundle("gemma3_text")
    trainer, batch = bundle.trainer(PROMPTS), bundle.batch(PROMPTS)
    capped = trainer.evaluate(*batch.sent).loss
    trainer.tail.model.config.final_logit_softcapping = None
    assert abs(trainer.evaluate(*batch.sent).loss - capped) > 1e-2


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        *((kind, (1 / 2, 1 / 2)) for kind in (PROMPTS, CLASSES)),
        *((TEXT, (2 / 21, 19 / 21)), (ANSWERS, (2 / 15, 13 / 15))),
    ],
)
def test_longer_neighbours_do_not_change_an_example(bundle: Any, kind: str, shares: tuple[float, float]) -> None:
    trainer, batch = bundle.trainer(kind), bundle.batch(kind, (3, 20))
    both = trainer.forward_backward(*batch.sent)
    alone = [trainer.forward_backward(*example) for example in batch.examples]
    assert both.loss == pytest.approx(sum(share * one.loss for share, one in zip(shares, alone, strict=True)), rel=1e-5)
    expected_TD = np.concatenate([share * one.cut_gradient_TD for share, one in zip(shares, alone, strict=True)])
    np.testing.assert_allclose(both.cut_gradient_TD, expected_TD, atol=1e-6)


def test_classes_are_scored_by_examples_and_text_by_predicted_tokens(bundle: Any) -> None:
    for kind, scored in ((PROMPTS, 4), (CLASSES, 4), (TEXT, 12), (ANSWERS, 9)):
        score = bundle.trainer(kind).evaluate(*bundle.batch(kind, (3, 7, 1, 5)).sent)
        assert score.scored == scored
        assert 0 <= score.correct <= scored


def test_correct_counts_hits_of_the_largest_class(bundle: Any) -> None:
    trainer, batch = bundle.trainer(PROMPTS), bundle.batch(PROMPTS, (4,) * 12)
    with torch.no_grad():
        logits = bundle.uncut(torch.stack(batch.ids)).logits[:, -1, list(trainer.head_rows)]
    right = (logits.argmax(dim=1).numpy() == batch.labels_N).sum()
    flipped = trainer.evaluate(batch.activations_TD, batch.lengths_B, 1 - batch.labels_N)
    assert trainer.evaluate(*batch.sent).correct == right
    assert flipped.correct == 12 - right


@pytest.mark.parametrize(("kind", "places"), [(TEXT, 6), (ANSWERS, 4)])
def test_logits_are_computed_only_where_tokens_are_scored(bundle: Any, kind: str, places: int) -> None:
    trainer = bundle.trainer(kind)
    shapes: list[tuple[int, ...]] = []
    head = trainer.tail.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _inputs, logits: shapes.append(tuple(logits.shape)))
    trainer.evaluate(*bundle.batch(kind, (3, 7, 1, 5)).sent)
    assert shapes == [(4, places, 48)]


@pytest.mark.parametrize(("kind", "label", "limits"), [(TEXT, -1, "0 to 47"), (ANSWERS, -2, "-1 to 47")])
def test_only_of_answers_a_token_may_be_no_label(bundle: Any, kind: str, label: int, limits: str) -> None:
    activations, lengths, labels = bundle.batch(kind).sent
    with pytest.raises(BatchError, match=f"expected {limits}.* {label}"):
        bundle.trainer(kind).forward_backward(activations, lengths, np.full_like(labels, label))


def test_answers_of_which_none_is_scored_pull_nowhere(bundle: Any) -> None:
    activations, lengths, labels = bundle.batch(ANSWERS).sent
    result = bundle.trainer(ANSWERS).forward_backward(activations, lengths, np.full_like(labels, -1))
    assert (result.loss, result.scored) == (0.0, 0)
    assert not result.cut_gradient_TD.any()


@pytest.mark.parametrize("kind", [TEXT, ANSWERS])
def test_parts_of_a_batch_add_up_by_their_scored_tokens(bundle: Any, kind: str) -> None:
    batch = bundle.batch(kind, (3, 7, 1, 5))
    whole, parts = (bundle.trainer(kind, micro_batch_tokens=size).forward_backward(*batch.sent) for size in (0, 7))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    np.testing.assert_allclose(parts.cut_gradient_TD, whole.cut_gradient_TD, atol=1e-6)


def test_single_tokens_predict_nothing_and_pull_nowhere(bundle: Any) -> None:
    trainer = bundle.trainer(TEXT)
    result = trainer.forward_backward(*bundle.batch(TEXT, (1, 1)).sent)
    assert (result.loss, result.scored) == (0.0, 0)
    assert not result.cut_gradient_TD.any()


def test_unpacking_pads_on_the_right_with_zeros() -> None:
    h_BLD, mask_BL = unpack(torch.arange(1.0, 9.0).reshape(4, 2), torch.tensor([1, 3]))
    assert h_BLD.tolist() == [[[1, 2], [0, 0], [0, 0]], [[3, 4], [5, 6], [7, 8]]]
    assert mask_BL.tolist() == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("lengths", "labels", "said"),
    [
        ([], [], "lengths of a batch"),
        ([4, 0], [0, 1], "lengths of a batch"),
        ([5, -1], [0, 1], "lengths of a batch"),
        ([2, 3], [0, 1], "tokens of a batch: expected 5 by its lengths, got 4"),
        ([2, 2], [0], "labels of a batch: expected 2, got 1"),
        ([2, 2], [0, 2], "labels of a batch: expected 0 to 1, got 2"),
        ([2, 2], [-100, 0], "labels of a batch: expected 0 to 1, got -100"),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(
    bundle: Any, lengths: list[int], labels: list[int], said: str
) -> None:
    h_TD = np.zeros((4, 32), np.float32)
    with pytest.raises(BatchError, match=said):
        bundle.trainer(PROMPTS).forward_backward(h_TD, np.array(lengths, np.int32), np.array(labels, np.int32))


@pytest.mark.parametrize(
    ("verbalizers", "value", "said"),
    [
        ([" bad", " very good"], " very good", "'<unk>', 'good'"),
        ([" bad", ""], "", r"it is the tokens \[\]"),
        ([" bad", "bad"], "bad", "the token 'bad', as ' bad' is"),
    ],
)
def test_a_verbalizer_that_is_not_one_token_of_its_own_is_named(
    bundle: Any, verbalizers: list[str], value: str, said: str
) -> None:
    task = {"name": "t", "kind": PROMPTS, "template": "{text}", "labels": ["0", "1"], "verbalizers": verbalizers}
    config = parse_config({"task": task, "max_length": 32}, bundle.manifest)
    with pytest.raises(VerbalizerError, match=said) as caught:
        build_tail(bundle.path, bundle.manifest, config)
    assert caught.value.value == value
    assert isinstance(caught.value, SettingsError)
    assert isinstance(caught.value, CloudError)


def test_a_verbalizer_that_the_head_has_no_row_for_is_named(bundle: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    tokenizer = Tokenizer.from_file(str(folder / SHARD_TOKENIZER))
    tokenizer.add_special_tokens(["<late>"])
    tokenizer.save(str(folder / SHARD_TOKENIZER))
    task = {"name": "t", "kind": PROMPTS, "template": "{text}", "labels": ["0", "1"], "verbalizers": ["bad", "<late>"]}
    config = parse_config({"task": task, "max_length": 32}, bundle.manifest)
    with pytest.raises(VerbalizerError, match="'<late>': it is token 48, and the model's head has 48 rows"):
        build_tail(folder, bundle.manifest, config)


@pytest.mark.parametrize("kind", [PROMPTS, TEXT])
def test_an_encoder_has_no_head_for_words(make_bundle: Callable[..., Any], kind: str) -> None:
    with pytest.raises(SettingsError, match="use 'sequence-classification'"):
        make_bundle("bert").trainer(kind)


def test_a_text_is_scored_from_the_end_of_its_soft_prompt_on(bundle: Any) -> None:
    trainer, batch = bundle.trainer(TEXT), bundle.batch(TEXT, (4, 7))
    halved = bundle.trainer(TEXT, micro_batch_tokens=7)
    for each in (trainer, halved):
        each.tail.prompt_tokens = 3
    logits = [bundle.uncut(ids[None]).logits[0, 2:-1] for ids in batch.ids]
    expected = F.cross_entropy(torch.cat(logits), torch.cat([ids[3:] for ids in batch.ids]))
    score = trainer.forward_backward(*batch.sent)
    assert (score.scored, score.loss) == (5, pytest.approx(expected.item(), rel=1e-5))
    assert halved.forward_backward(*batch.sent).loss == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(BatchError, match="each 4 or more"):
        trainer.forward_backward(*bundle.batch(TEXT, (3, 5)).sent)
