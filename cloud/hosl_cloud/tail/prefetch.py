"""Devices' batches on their way to the tail's device: on a GPU the next one travels while one is computed.

Used by the trainer on its compute thread. A tensor is on the way on a stream of its own; `take` makes the computing
stream wait for it, and tells the allocator that it is in use there, or its memory could be given to the next batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


class Prefetcher:
    """Copies arrays to one device. To CUDA they go from pinned memory, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._under_way: dict[int, Tensor] = {}
        """By the array's identity: the batches that `start` was given live until they are taken."""

    def start(self, batches: Iterable[tuple[Array, Array, Array]]) -> None:
        """Send activations and labels of batches that are computed next, where that can go on beside the computing."""
        self._under_way.clear()
        if self._stream is None:
            return
        for activations, _, labels in batches:
            for array, dtype in ((activations, torch.float32), (labels, torch.int64)):
                self._under_way[id(array)] = self._send(array, dtype)

    def _send(self, array: Array, dtype: torch.dtype) -> Tensor:
        pinned = torch.tensor(array, dtype=dtype).pin_memory()
        with torch.cuda.stream(self._stream):
            return pinned.to(self._device, non_blocking=True)

    def take(self, array: Array, dtype: torch.dtype) -> Tensor:
        """Copy the array to the device, or take the copy that is on its way: frames arrive in read-only memory."""
        if self._stream is None:
            return torch.tensor(array, dtype=dtype, device=self._device)

        tensor = self._under_way.pop(id(array), None)
        if tensor is None:
            tensor = self._send(array, dtype)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        tensor.record_stream(current)
        return tensor
