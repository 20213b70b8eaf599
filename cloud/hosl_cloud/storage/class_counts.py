"""How an evaluation's predictions fell on the classes of its task: counts, from which recall, precision and F1 follow.

Shapes: K classes of the task, N examples.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

MOST_CLASSES = 1000
"""Of a task whose classes are counted one by one."""

MOST_IN_MATRIX = 100
"""Classes of a task that has a confusion matrix."""

Integers = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


class _Stored(msgspec.Struct, array_like=True, frozen=True):
    """The counts as bytes: little-endian uint32."""

    classes: int
    counts: bytes
    """Right predictions, predictions and examples of each class [3, K]; empty where there is a matrix."""
    confusion: bytes
    """[K, K], row by row; empty with too many classes."""


# Made here, on import: threads that use a type for the first time at once crash msgspec.
_DECODER = msgspec.msgpack.Decoder(_Stored)


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """The counts of one evaluation."""

    right_K: Integers
    """Examples of the class that were given it."""
    predicted_K: Integers
    """Examples that were given the class."""
    examples_K: Integers
    """Examples of the class."""
    confusion_KK: Integers | None
    """By true class (row) and predicted class (column); None with more than MOST_IN_MATRIX classes."""

    @classmethod
    def count(
        cls, labels_N: npt.NDArray[np.integer], predicted_N: npt.NDArray[np.integer], classes: int
    ) -> ClassCounts:
        """Count the predictions of an evaluation. Both arrays hold classes from 0 to `classes` - 1."""
        labels, predicted = labels_N.astype(np.int64), predicted_N.astype(np.int64)
        if classes <= MOST_IN_MATRIX:
            pairs = np.bincount(labels * classes + predicted, minlength=classes * classes)
            return cls.of_matrix(pairs.reshape(classes, classes))
        right, given, true = (
            np.bincount(each, minlength=classes) for each in (labels[labels == predicted], predicted, labels)
        )
        return cls(right, given, true, None)

    @classmethod
    def of_matrix(cls, confusion_KK: Integers) -> ClassCounts:
        """Take the counts from a confusion matrix."""
        return cls(confusion_KK.diagonal(), confusion_KK.sum(axis=0), confusion_KK.sum(axis=1), confusion_KK)

    @property
    def recall_K(self) -> Doubles:
        """The accuracy among the examples of each class; NaN for a class without any."""
        return _share(self.right_K, self.examples_K)

    @property
    def precision_K(self) -> Doubles:
        """The share of right ones among the predictions of each class; NaN for a class that was never predicted."""
        return _share(self.right_K, self.predicted_K)

    @property
    def f1_K(self) -> Doubles:
        """The harmonic mean of precision and recall; NaN for a class without examples and predictions."""
        return _share(2 * self.right_K, self.examples_K + self.predicted_K)

    @property
    def macro_f1(self) -> float:
        """The mean of the classes' F1, without the classes that have none."""
        return float(np.nanmean(self.f1_K))

    def encode(self) -> bytes:
        """Pack the counts, to be stored."""
        counts = np.stack([self.right_K, self.predicted_K, self.examples_K])
        matrix = self.confusion_KK
        stored = _Stored(
            len(self.right_K),
            _bytes_of(counts) if matrix is None else b"",
            b"" if matrix is None else _bytes_of(matrix),
        )
        return zlib.compress(msgspec.msgpack.encode(stored))

    @classmethod
    def decode(cls, data: bytes) -> ClassCounts:
        """Unpack counts. Raises ValueError for what `encode` has not written."""
        try:
            stored = _DECODER.decode(zlib.decompress(data))
        except zlib.error as error:  # msgspec's errors are ValueErrors themselves
            raise ValueError(str(error)) from error
        if stored.confusion:
            return cls.of_matrix(_integers(stored.confusion).reshape(stored.classes, stored.classes))
        right, predicted, examples = _integers(stored.counts).reshape(3, stored.classes)
        return cls(right, predicted, examples, None)


def _share(part_K: Integers, whole_K: Integers) -> Doubles:
    share_K = np.full(len(part_K), np.nan)
    np.divide(part_K, whole_K, out=share_K, where=whole_K > 0)
    return share_K


def _bytes_of(counts: Integers) -> bytes:
    return counts.astype("<u4").tobytes()


def _integers(data: bytes) -> Integers:
    return np.frombuffer(data, "<u4").astype(np.int64)
