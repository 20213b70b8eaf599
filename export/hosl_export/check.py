"""Parity: what shard and tail compute from the bundle's files, against what the uncut model computed before the cut.

Shapes: B batch, T tokens, D width, V vocabulary, S positions compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor

from hosl_export.exceptions import ParityError
from hosl_export.families import Family, find_family
from hosl_export.halves import Tail, load_tail
from hosl_export.weights import read_tensors
from hosl_protocol.manifest import SHARD_GRAPH, SHARD_WEIGHTS, Manifest

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


@dataclass(frozen=True)
class Case:
    """One padded batch of real tokens, and the positions whose logits are compared."""

    input_ids: Tensor  # [B, T]
    lengths: Tensor  # [B]
    positions: Tensor  # [S]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.input_ids.shape[0], self.input_ids.shape[1]

    @property
    def mask(self) -> Tensor:
        """1 on real tokens, 0 on the padding at the right [B, T]."""
        return (torch.arange(self.shape[1]) < self.lengths[:, None]).long()


@dataclass(frozen=True)
class Reference:
    """A batch, and what the uncut model makes of it, by name of the output."""

    case: Case
    outputs: dict[str, Tensor]


def make_cases(tokenizer: Any, pad_token_id: int, max_length: int) -> list[Case]:
    """Batches from one token to the longest length, with rows of different lengths."""
    tokens = tokenizer(SAMPLE, truncation=False)["input_ids"]
    longest = min(max_length, LONGEST)
    shapes = dict.fromkeys((rows, min(length, longest)) for rows, length in ((1, 1), (3, 7), (2, 33), (2, longest)))
    return [_make_case(tokens, pad_token_id, rows, length) for rows, length in shapes]


def _make_case(tokens: list[int], pad_token_id: int, rows: int, length: int) -> Case:
    lengths = torch.tensor([max(1, length - row * length // 3) for row in range(rows)])
    # Each row starts elsewhere in the sample, which repeats as often as the length needs.
    stream = torch.tensor(tokens * (2 + (length + rows) // len(tokens)))
    input_ids = torch.stack([stream[row : row + length] for row in range(rows)])
    case = Case(input_ids, lengths, torch.linspace(0, length - 1, min(length, COMPARED)).long())
    return Case(input_ids.masked_fill(case.mask == 0, pad_token_id), lengths, case.positions)


@torch.no_grad()
def compute_references(model: Any, cases: list[Case]) -> list[Reference]:
    """Run the uncut model on each batch."""
    family = find_family(model.config.model_type)
    references = []
    for case in cases:
        arguments = {"input_ids": case.input_ids, "attention_mask": case.mask}
        if not family.is_encoder:
            arguments["logits_to_keep"] = case.positions
        references.append(Reference(case, _name_outputs(model(**arguments), family)))
    return references


def _name_outputs(outputs: Any, family: Family) -> dict[str, Tensor]:
    if not family.is_encoder:
        return {"logits": outputs.logits}
    names = ("last_hidden_state", "pooler_output")
    return {name: outputs[name] for name in names if outputs.get(name) is not None}


def check_bundle(bundle: Path, manifest: Manifest, references: list[Reference]) -> float:
    """Run the bundle's halves on each batch. Returns the largest difference, relative; raises ParityError."""
    shard, tail = Shard(bundle, manifest), load_tail(bundle, manifest)
    return max(_check_case(shard, tail, reference) for reference in references)


class Shard:
    """The client half in ONNX Runtime, its weights given as inputs from a memory map of the file."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        options = ort.SessionOptions()
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        graph = str(bundle / SHARD_GRAPH)
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._weights = {name: tensor.numpy() for name, tensor in read_tensors(bundle / SHARD_WEIGHTS).items()}
        self._manifest = manifest

    def run(self, case: Case) -> Tensor:
        """Activations [B, T, D]."""
        given = {"input_ids": case.input_ids.numpy(), "attention_mask": case.mask.numpy()}
        feed: dict[str, npt.NDArray[Any]] = {name: given[name] for name in self._manifest.inputs}
        (activations,) = self._session.run([self._manifest.output], {**feed, **self._weights})
        return torch.from_numpy(np.asarray(activations))


@torch.no_grad()
def _check_case(shard: Shard, tail: Tail, reference: Reference) -> float:
    case = reference.case
    h_BTD = shard.run(case)
    if tail.family.is_encoder:
        outputs = _name_outputs(tail.model(inputs_embeds=h_BTD, attention_mask=case.mask), tail.family)
    else:
        positions = case.positions.expand(case.shape[0], -1)
        outputs = {"logits": tail(h_BTD, case.mask, positions)}
    return max(_compare(case, name, outputs[name], expected) for name, expected in reference.outputs.items())


def _compare(case: Case, name: str, got: Tensor, expected: Tensor) -> float:
    """Largest difference on real tokens, as a share of the largest expected magnitude."""
    difference = (got - expected).abs()
    if name != "pooler_output":
        positions = case.positions if name == "logits" else torch.arange(case.shape[1])
        difference = difference[positions < case.lengths[:, None]]
    error = float(difference.max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    if not error <= TOLERANCE:  # a difference that is not a number fails too
        raise ParityError(name, case.shape, error, TOLERANCE)
    return error
