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
from hosl_protocol.run.tasks import TaskKind

_NO_TARGET = -100


@dataclass(frozen=True)
class Score:
    """The loss of a batch, and how many of its predictions were right."""

    loss: Tensor
    """Mean over its examples, or over the predicted tokens of `lm`; a float32 scalar."""
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
    if kind == "lm":
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
    """Score a language model: each token but an example's first is predicted, and none of a soft prompt is."""
    padded_BL = torch.full(mask_BL.shape, _NO_TARGET, device=tokens_T.device)
    padded_BL[mask_BL.bool()] = tokens_T
    padded_BL[:, : tail.prompt_tokens] = _NO_TARGET
    targets = padded_BL[:, 1:].flatten()
    places_BS = torch.arange(mask_BL.shape[1] - 1, device=tokens_T.device).expand(len(mask_BL), -1)
    logits = tail(h_BLD, mask_BL, places_BS).flatten(0, 1).float()
    scored = int((targets != _NO_TARGET).sum())
    # A batch of single tokens predicts nothing: loss 0 and no gradient, rather than 0 / 0.
    loss = F.cross_entropy(logits, targets, ignore_index=_NO_TARGET, reduction="sum") / max(scored, 1)
    return Score(loss, int((logits.detach().argmax(dim=1) == targets).sum()), scored)


def targets(kind: TaskKind, tail: Tail, lengths_B: Tensor) -> int:
    """Count the predictions over which the loss of these examples is a mean."""
    if kind != "lm":
        return len(lengths_B)
    return int(lengths_B.sum()) - len(lengths_B) * max(tail.prompt_tokens, 1)


def check_batch(kind: TaskKind, tail: Tail, token_count: int, lengths_B: Tensor, labels_N: Tensor) -> None:
    """Raise BatchError for the first thing that a well-behaved device would not send."""
    shortest = tail.prompt_tokens + 1
    if len(lengths_B) == 0 or int(lengths_B.min()) < shortest:
        raise BatchError("lengths of a batch", f"one or more, each {shortest} or more", lengths_B.tolist())

    if int(lengths_B.sum()) != token_count:
        raise BatchError("tokens of a batch", f"{int(lengths_B.sum())} by its lengths", token_count)
    expected = token_count if kind == "lm" else len(lengths_B)
    if len(labels_N) != expected:
        raise BatchError("labels of a batch", expected, len(labels_N))

    classes = int(tail.class_count or tail.model.get_output_embeddings().out_features)  # rows of the head
    if int(labels_N.min()) < 0 or int(labels_N.max()) >= classes:
        out_of_range = [label for label in labels_N.tolist() if not 0 <= label < classes]
        raise BatchError("labels of a batch", f"0 to {classes - 1}", out_of_range[0])
