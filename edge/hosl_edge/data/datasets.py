"""What a round needs of the device's data, texts or images: batches, and the dataset that they are drawn from.

Texts are here; images, which have the same methods, are in images.py. Both are read-only once they are made, so that
worker threads may draw from them at any time.
Shapes: B examples, T tokens of a batch without padding, L longest example, N labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.tasks import UNSCORED


class Batch(Protocol):
    """Some examples, texts or images, neighbours alike in length."""

    @property
    def lengths_B(self) -> npt.NDArray[np.int32]:
        """Tokens, or positions at the cut layer, of each example."""
        ...

    @property
    def labels_N(self) -> npt.NDArray[np.int32]:
        """What the cloud scores them against."""
        ...

    @property
    def indices_B(self) -> npt.NDArray[np.int64]:
        """Where each example stands in the data; empty where these are of none."""
        ...

    @property
    def tokens(self) -> int:
        """T: the lengths' sum."""
        ...

    @property
    def places_B(self) -> npt.NDArray[np.int64] | None:
        """The number of each example in the device's cache; None where nothing is kept of them."""
        ...

    def inputs(self, rows: slice) -> dict[str, npt.NDArray[Any]]:
        """What a graph may take of these examples, by name, contiguous."""
        ...


class Dataset(Protocol):
    """Examples of either kind."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        """The examples at `indices` [B], as they are."""
        ...

    def training_batch(self, indices: npt.NDArray[np.int64], settings: RunSettings, round_: int, device: str) -> Batch:
        """The examples at `indices` [B] as `device` trains on them in a round; no state but the data decides."""
        ...

    def evaluation_order(self) -> npt.NDArray[np.int64]:
        """All places, in the order in which held-out data is sent."""
        ...

    def subset(self, places: npt.NDArray[np.int64]) -> Dataset:
        """The examples at `places` alone, as data of their own."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int32] | None:
        """Class per example; None where the text is its own label."""
        ...

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens, or positions at the cut layer, of each example [examples]."""
        ...

    def numbered(self, first_place: int) -> Dataset:
        """The same examples, whose batches number them in the device's cache, from `first_place` on."""
        ...


@dataclass(frozen=True)
class TextBatch:
    """Some texts, padded on the right, shortest first."""

    ids_BL: npt.NDArray[np.int64]
    lengths_B: npt.NDArray[np.int32]
    labels_N: npt.NDArray[np.int32]
    """Class per example; where tokens are labels the T token ids themselves, `UNSCORED` for those that are none."""
    places_B: npt.NDArray[np.int64] | None = None
    indices_B: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Where each example stands in the data; empty where these are of none."""

    @property
    def tokens(self) -> int:
        """T: tokens without padding."""
        return int(self.lengths_B.sum())

    def inputs(self, rows: slice) -> dict[str, npt.NDArray[Any]]:
        """Token ids and the mask of real ones [b, L], padded to the longest of these rows."""
        lengths_B = self.lengths_B[rows]
        # Micro-batches are sorted by length, so that cutting to their own longest row takes most of the padding away.
        ids_BL = np.ascontiguousarray(self.ids_BL[rows, : int(lengths_B.max())])
        mask_BL = np.arange(ids_BL.shape[1]) < lengths_B[:, None]
        return {"input_ids": ids_BL, "attention_mask": mask_BL.astype(np.int64)}


@dataclass(frozen=True)
class TextDataset:
    """Examples as token ids."""

    ids: npt.NDArray[np.int32]
    """All examples, one after the other."""
    offsets: npt.NDArray[np.int64]
    """Where each example starts, and the end: [examples + 1]."""
    labels: npt.NDArray[np.int32] | None
    """[examples]; None where tokens are the labels."""
    pad_token_id: int
    is_answer: npt.NDArray[np.bool_] | None = None
    """Which of `ids` are labels; None for all."""
    first_place: int | None = None
    """The first example's number in the device's cache; None where nothing is kept."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def batch(self, indices: npt.NDArray[np.int64]) -> TextBatch:
        """The examples at `indices` [B], sorted by length so that micro-batches carry little padding."""
        lengths = self.lengths[indices]
        order = np.argsort(lengths, kind="stable")  # stable: the same batch on every machine
        indices, lengths = indices[order], lengths[order]
        spans = [slice(self.offsets[i], self.offsets[i + 1]) for i in indices]
        rows = [self.ids[span] for span in spans]
        ids_BL = np.full((len(rows), int(lengths.max())), self.pad_token_id, np.int64)
        for target, row in zip(ids_BL, rows, strict=True):
            target[: row.size] = row
        labels = self._token_labels(spans) if self.labels is None else self.labels[indices]
        places = None if self.first_place is None else self.first_place + indices
        return TextBatch(ids_BL, lengths.astype(np.int32), labels.astype(np.int32), places, indices)

    def _token_labels(self, places: Sequence[slice]) -> npt.NDArray[np.int32]:
        """The token ids there, of which only answers are labels."""
        ids = np.concatenate([self.ids[place] for place in places])
        if self.is_answer is None:
            return ids
        return np.where(np.concatenate([self.is_answer[place] for place in places]), ids, np.int32(UNSCORED))

    def training_batch(
        self, indices: npt.NDArray[np.int64], settings: RunSettings, round_: int, device: str
    ) -> TextBatch:
        """The same as `batch`: texts do not vary."""
        return self.batch(indices)

    def evaluation_order(self) -> npt.NDArray[np.int64]:
        """By length: neighbours make batches with little padding, and the order does not matter."""
        return np.argsort(self.lengths, kind="stable")

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example [examples]."""
        return np.diff(self.offsets)

    def numbered(self, first_place: int) -> TextDataset:
        """The same examples, with numbers in the device's cache."""
        return replace(self, first_place=first_place)

    def subset(self, places: npt.NDArray[np.int64]) -> TextDataset:
        """The examples at `places` [n], copied."""
        slices = [slice(self.offsets[place], self.offsets[place + 1]) for place in places]
        offsets = np.concatenate([[0], np.cumsum(self.lengths[places])]).astype(np.int64)
        labels = None if self.labels is None else self.labels[places]
        is_answer = None if self.is_answer is None else np.concatenate([self.is_answer[each] for each in slices])
        ids = np.concatenate([self.ids[each] for each in slices])
        return TextDataset(ids, offsets, labels, self.pad_token_id, is_answer)
