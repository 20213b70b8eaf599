"""A task's loss and score on the tail, from the packed activations that a device sends.

Shapes: B examples, T tokens of the batch without padding (for images positions), L longest example, D width, N labels,
C classes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hosl_cloud.exceptions import BatchError
from hosl_export.model.halves import Tail
from hosl_protocol.run.tasks import TOKEN_KINDS, UNSCORED, TaskKind


@dataclass(frozen=True)
class Score:
    """The loss of a batch, and how many of its predictions were right."""

    loss: Tensor
    """Mean over its examples, or over the predicted tokens where tokens are labels; a float32 scalar."""
    correct: int
    """Right predictions."""
    scored: int
    """Out of how many."""
    predicted_B: Tensor | None = None
    """The class that each example was given; None where the task has no classes."""


def unpack(activations_TD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack activations [T, D] to h [B, L, D], padded with zeros on the right, and the mask of real tokens [B, L]."""
    h_BLD = pad_sequence(list(torch.split(activations_TD, lengths_B.tolist())), batch_first=True)
    mask_BL = torch.arange(h_BLD.shape[1], device=h_BLD.device) < lengths_B.to(h_BLD.device)[:, None]
    return h_BLD, mask_BL.long()


def score(kind: TaskKind, tail: Tail, activations_TD: Tensor, lengths_B: Tensor, labels_N: Tensor) -> Score:
    """Do the forward through the tail to the task's mean loss, of what `check_batch` let pass."""
    h_BLD, mask_BL = unpack(activations_TD, lengths_B)
    if kind in TOKEN_KINDS:
        return _score_tokens(tail, h_BLD, mask_BL, labels_N)
    # A prompt is answered at its last token, by a head that was narrowed to the verbalizers. A classifier finds its
    # own place: the first token of an encoder, the last real one of a causal model, an image's first token or mean.
    last_B = mask_BL.sum(dim=1) - 1 if kind == "prompt-classification" else None
    return _score_classes(tail(h_BLD, mask_BL, last_B), labels_N)


def _score_classes(logits_BC: Tensor, labels_B: Tensor) -> Score:
    loss = F.cross_entropy(logits_BC.float(), labels_B)
    predicted_B = logits_BC.detach().argmax(dim=1)
    return Score(loss, int((predicted_B == labels_B).sum()), len(labels_B), predicted_B)


def _score_tokens(tail: Tail, h_BLD: Tensor, mask_BL: Tensor, tokens_T: Tensor) -> Score:
    """Score a language model, whose labels are tokens; logits are computed only where one of them is predicted."""
    targets_BL = torch.full(mask_BL.shape, UNSCORED, device=tokens_T.device)
    targets_BL[mask_BL.bool()] = tokens_T
    targets_BL[:, : max(tail.prompt_tokens, 1)] = UNSCORED

    # Of each example the places before its scored tokens; those with fewer than others get places that do not count.
    is_scored_BL = targets_BL != UNSCORED
    most = max(int(is_scored_BL.sum(dim=1).max()), 1)
    order_BS = torch.argsort(~is_scored_BL, dim=1, stable=True)[:, :most]
    targets = targets_BL.gather(1, order_BS).flatten()
    logits = tail(h_BLD, mask_BL, (order_BS - 1).clamp(min=0)).flatten(0, 1).float()
    scored = int(is_scored_BL.sum())
    # A batch of single tokens predicts nothing: loss 0 and no gradient, rather than 0 / 0.
    loss = F.cross_entropy(logits, targets, ignore_index=UNSCORED, reduction="sum") / max(scored, 1)
    return Score(loss, int((logits.detach().argmax(dim=1) == targets).sum()), scored)


def targets(kind: TaskKind, tail: Tail, lengths_B: Tensor, labels_N: Tensor) -> int:
    """Count the predictions over which the loss of these examples is a mean."""
    if kind not in TOKEN_KINDS:
        return len(lengths_B)
    is_scored_N = labels_N != UNSCORED
    # The first tokens of an example are predicted from nothing.
    unseen = max(tail.prompt_tokens, 1)
    starts = (lengths_B.cumsum(0) - lengths_B).tolist()
    return int(is_scored_N.sum()) - sum(int(is_scored_N[start : start + unseen].sum()) for start in starts)


def check_batch(kind: TaskKind, tail: Tail, token_count: int, lengths_B: Tensor, labels_N: Tensor) -> None:
    """Raise BatchError for the first thing that a well-behaved device would not send."""
    shortest = tail.prompt_tokens + 1
    if len(lengths_B) == 0 or int(lengths_B.min()) < shortest:
        raise BatchError("lengths of a batch", f"one or more, each {shortest} or more", lengths_B.tolist())

    if int(lengths_B.sum()) != token_count:
        raise BatchError("tokens of a batch", f"{int(lengths_B.sum())} by its lengths", token_count)
    expected = token_count if kind in TOKEN_KINDS else len(lengths_B)
    if len(labels_N) != expected:
        raise BatchError("labels of a batch", expected, len(labels_N))

    classes = int(tail.class_count or tail.model.get_output_embeddings().out_features)  # rows of the head
    least = UNSCORED if kind in ("completion", "chat") else 0
    if int(labels_N.min()) < least or int(labels_N.max()) >= classes:
        out_of_range = [label for label in labels_N.tolist() if not least <= label < classes]
        raise BatchError("labels of a batch", f"{least} to {classes - 1}", out_of_range[0])
