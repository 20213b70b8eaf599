"""The compiled passes over weights and gradients (kernel.c), where the installation has them; numpy does the same
elsewhere."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("libhosl_kernel.so")

MAX_TERMS = 64
"""Most terms in one call; kernel.c holds their bits on its stack."""

TERM = np.dtype([("key", "<u8", 2), ("index", "<u8"), ("step", "<f4"), ("padding", "<u4")])

AddDirections: TypeAlias = Callable[[npt.NDArray[np.float32], int, npt.NDArray[np.void]], None]
Hadamard: TypeAlias = Callable[[npt.NDArray[np.float32]], None]


@lru_cache(maxsize=1)
def open_library() -> ctypes.CDLL | None:
    """Open the library; None where the installation has none, or one that this machine cannot use."""
    if sys.byteorder != "little":
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for function in (library.hosl_add_terms, library.hosl_hadamard):
            function.restype = None
    except (OSError, AttributeError) as error:
        log.debug("directions are made with numpy: %s", error)
        return None
    return library


@lru_cache(maxsize=1)
def load() -> AddDirections | None:
    """Load the compiled pass; None where the installation has none.

    It adds: values [n] ← values + Σ step · z over entries [start, start + n), `start` a multiple of 256.

    It runs outside the interpreter's lock, so threads share the work.
    """
    library = open_library()
    if library is None:
        return None
    function = library.hosl_add_terms
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]

    def add(values: npt.NDArray[np.float32], start: int, terms: npt.NDArray[np.void]) -> None:
        function(values.ctypes.data, start, values.size, terms.ctypes.data, terms.size)

    return add


def pack(rows: Sequence[tuple[tuple[int, int], int, float]]) -> npt.NDArray[np.void]:
    """Pack terms as kernel.c reads them, of key words, tensor and step. Raises ValueError above MAX_TERMS."""
    if len(rows) > MAX_TERMS:
        raise ValueError(f"{len(rows)} terms, expected at most {MAX_TERMS}")
    return np.array([(*row, 0) for row in rows], TERM)


@lru_cache(maxsize=1)
def load_hadamard() -> Hadamard | None:
    """Load the compiled Hadamard transform; None where the installation has none.

    It multiplies each row of contiguous values [R, B] by the Hadamard matrix of B, a power of two, in place.
    """
    library = open_library()
    if library is None:
        return None
    function = library.hosl_hadamard
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]

    def transform(values_RB: npt.NDArray[np.float32]) -> None:
        function(values_RB.ctypes.data, *values_RB.shape)

    return transform
