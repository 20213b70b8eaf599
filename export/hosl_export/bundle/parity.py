"""Parity: what shard and tail compute from the bundle's files, against what the uncut model computes.

`compute_references` runs while the uncut model is in memory, `check_bundle` when it is gone: from the files alone, the
shard in ONNX Runtime as on a device, the tail in torch as on the cloud. What both must agree on is a list of `Case`.

Shapes: B batch, T tokens or positions of an image, D width, S positions compared, V vocabulary, L labels, C channels, H
rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hosl_export.bundle.reading import load_tail
from hosl_export.bundle.runtime import ShardRuntime
from hosl_export.exceptions import ParityError
from hosl_export.model.families import find_family
from hosl_export.model.halves import Tail
from hosl_export.model.heads import class_head
from hosl_protocol.run.manifest import ImageEntry, Manifest

TOLERANCE = 1e-4
"""Largest difference as a share of the output's largest magnitude. Two float32 runtimes that sum in different orders
differ by 1e-7 to 1e-5 here, growing with depth; a block too many, a wrong position or mask differs by 1e-2 and more."""

LONGEST = 2048
"""Longest input compared, in tokens: attention over more takes minutes and gigabytes without a fused kernel."""

COMPARED = 16
"""Positions of a row whose logits are compared: all of them, for a vocabulary of 262144, would take gigabytes."""

SAMPLE = (
    "A film that begins as a quiet study of two sisters turns, about half way, into something stranger and far more "
    "moving. The script is uneven and the last scene (shot in 1974?) is 20% too long; still, I'd see it again. "
)


class Case(Protocol):
    """One batch of the check: how each side runs it, and what of the outputs is compared."""

    @property
    def name(self) -> str:
        """The batch's size, in words."""
        ...

    def graph_feed(self) -> dict[str, Tensor]:
        """The client graph's inputs that are not weights."""
        ...

    def cut(self, length: int) -> Case:
        """Make the batch of its texts' first tokens; the same where it has no more, or images."""
        ...

    def run_uncut(self, model: Any) -> dict[str, Tensor]:
        """Run the uncut model on the batch. Returns its outputs by name."""
        ...

    def run_tail(self, tail: Tail, h_BTD: Tensor) -> dict[str, Tensor]:
        """Run the tail on the batch's activations. Returns outputs of the same names."""
        ...

    def select_real(self, name: str, difference: Tensor) -> Tensor:
        """Select from the output's differences those that are not of padding."""
        ...

    def without_padding(self, h_BTD: Tensor) -> Tensor:
        """Set what stands at padding to zero."""
        ...


@dataclass(frozen=True)
class TextCase:
    """One padded batch of real tokens, and the positions whose logits are compared."""

    input_ids: Tensor  # [B, T]
    lengths: Tensor  # [B]
    positions: Tensor  # [S]

    @property
    def shape(self) -> tuple[int, int]:
        """B and T."""
        return self.input_ids.shape[0], self.input_ids.shape[1]

    @property
    def name(self) -> str:
        """The batch's size, in words."""
        return f"{self.shape[0]} x {self.shape[1]} tokens"

    @property
    def mask(self) -> Tensor:
        """1 on real tokens, 0 on the padding at the right [B, T]."""
        return (torch.arange(self.shape[1]) < self.lengths[:, None]).long()

    def graph_feed(self) -> dict[str, Tensor]:
        """Ids and mask; a graph takes those that it has inputs for."""
        return {"input_ids": self.input_ids, "attention_mask": self.mask}

    def cut(self, length: int) -> TextCase:
        """Make the batch of the first tokens of each text."""
        kept = self.positions[self.positions < length]
        return TextCase(self.input_ids[:, :length].contiguous(), self.lengths.clamp(max=length), kept)

    def run_uncut(self, model: Any) -> dict[str, Tensor]:
        """Run the uncut model: hidden states [B, T, D], pooler [B, D] and classes [B, L] of an encoder; else logits.

        Those are [B, S, V], or [B, S, L] of a classifier, at `positions`.
        """
        head = class_head(model)
        if find_family(model.config.model_type).is_encoder:
            outputs = _name_outputs(model.base_model(**self.graph_feed()))
            return outputs if head is None else {**outputs, "classes": model(**self.graph_feed()).logits}

        if head is None:
            return {"logits": model(**self.graph_feed(), logits_to_keep=self.positions).logits}
        # A causal classifier gives logits at the end of each text alone, which it looks for by the ids. Its head is
        # compared at every position instead.
        h_BTD = model.base_model(**self.graph_feed()).last_hidden_state
        return {"logits": head(h_BTD[:, self.positions])}

    def run_tail(self, tail: Tail, h_BTD: Tensor) -> dict[str, Tensor]:
        """Run the tail on activations [B, T, D]. Returns outputs of the same names and shapes."""
        if not tail.family.is_encoder:
            return {"logits": tail(h_BTD, self.mask, self.positions.expand(self.shape[0], -1))}
        outputs = _name_outputs(tail.base_outputs(h_BTD, self.mask))
        return outputs if tail.classifier is None else {**outputs, "classes": tail(h_BTD, self.mask)}

    def select_real(self, name: str, difference: Tensor) -> Tensor:
        """Select the differences at real tokens; outputs with one row a text count whole."""
        if name in ("pooler_output", "classes"):
            return difference
        positions = self.positions if name == "logits" else torch.arange(self.shape[1])
        return difference[positions < self.lengths[:, None]]

    def without_padding(self, h_BTD: Tensor) -> Tensor:
        """Set what stands at padding to zero."""
        return h_BTD * self.mask[..., None]


@dataclass(frozen=True)
class ImageCase:
    """One batch of made-up images, as the graph takes them."""

    pixel_values: Tensor  # [B, C, H, W]

    @property
    def name(self) -> str:
        """The batch's size, in words."""
        rows, _, height, width = self.pixel_values.shape
        return f"{rows} x {height} x {width} pixels"

    def graph_feed(self) -> dict[str, Tensor]:
        """The images."""
        return {"pixel_values": self.pixel_values}

    def cut(self, length: int) -> ImageCase:
        """Images have one size."""
        return self

    def run_uncut(self, model: Any) -> dict[str, Tensor]:
        """Run the uncut model. Returns logits [B, L]."""
        return {"logits": model(self.pixel_values).logits}

    def run_tail(self, tail: Tail, h_BTD: Tensor) -> dict[str, Tensor]:
        """Run the tail on activations [B, T, D]. Returns logits [B, L]."""
        return {"logits": tail(h_BTD)}

    def select_real(self, name: str, difference: Tensor) -> Tensor:
        """Select all of them: images have no padding."""
        return difference

    def without_padding(self, h_BTD: Tensor) -> Tensor:
        """There is none."""
        return h_BTD


@dataclass(frozen=True)
class Reference:
    """A batch, and what the uncut model makes of it, by name of the output."""

    case: Case
    outputs: dict[str, Tensor]


def make_image_cases(image: ImageEntry) -> list[Case]:
    """Make batches of one image and of more, for the batch is dynamic in the graph and the size of images is not."""
    generator = torch.Generator().manual_seed(0)
    shape = (image.channels, image.height, image.width)
    return [ImageCase(torch.randn(rows, *shape, generator=generator)) for rows in (1, 3)]


def make_text_cases(tokenizer: Any, pad_token_id: int, max_length: int, prompt_tokens: int = 0) -> list[Case]:
    """Make batches from one token after the soft prompt's to the longest length, with rows of different lengths."""
    tokens = tokenizer(SAMPLE, truncation=False)["input_ids"]
    longest = min(max_length, LONGEST) - prompt_tokens
    shapes = dict.fromkeys((rows, min(length, longest)) for rows, length in ((1, 1), (3, 7), (2, 33), (2, longest)))
    return [_make_case(tokens, pad_token_id, rows, length, prompt_tokens) for rows, length in shapes]


def _make_case(tokens: list[int], pad_token_id: int, rows: int, length: int, prompt_tokens: int) -> TextCase:
    """Make a batch of `length` tokens after the prompt's in the first row, and of a third less in each row after it."""
    lengths = prompt_tokens + torch.tensor([max(1, length - row * length // 3) for row in range(rows)])
    length += prompt_tokens

    # Each row starts elsewhere in the sample, which repeats as often as the length needs.
    stream = torch.tensor(tokens * (2 + (length + rows) // len(tokens)))
    input_ids = torch.stack([stream[row : row + length] for row in range(rows)])

    case = TextCase(input_ids, lengths, torch.linspace(0, length - 1, min(length, COMPARED)).long())
    return TextCase(input_ids.masked_fill(case.mask == 0, pad_token_id), lengths, case.positions)


@torch.no_grad()
def compute_references(model: Any, cases: list[Case]) -> list[Reference]:
    """Run the uncut model on each batch. What trains must be on its lattice before, as it is in the files."""
    return [Reference(case, case.run_uncut(model)) for case in cases]


def _name_outputs(outputs: Any) -> dict[str, Tensor]:
    """Name those outputs of an encoder that the halves must agree on: not all have a pooler."""
    names = ("last_hidden_state", "pooler_output")
    return {name: outputs[name] for name in names if outputs.get(name) is not None}


def check_bundle(bundle: Path, manifest: Manifest, references: list[Reference]) -> float:
    """Run the bundle's halves on each batch. Returns the largest difference, relative; raises ParityError."""
    shard, tail = ShardRuntime(bundle, manifest), load_tail(bundle, manifest)
    return max(_check_case(shard, tail, reference) for reference in references)


@torch.no_grad()
def _check_case(shard: ShardRuntime, tail: Tail, reference: Reference) -> float:
    case = reference.case
    outputs = case.run_tail(tail, shard.run(case.graph_feed()))
    return max(_compare(case, name, outputs[name], expected) for name, expected in reference.outputs.items())


def _compare(case: Case, name: str, got: Tensor, expected: Tensor) -> float:
    """Return the largest difference at real tokens, as a share of the largest expected magnitude."""
    difference = case.select_real(name, (got - expected).abs())
    error = float(difference.max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    if not error <= TOLERANCE:  # a difference that is not a number fails too
        raise ParityError(name, case.name, error, TOLERANCE)
    return error
