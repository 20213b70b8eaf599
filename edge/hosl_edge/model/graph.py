"""A graph on ONNX Runtime: its session, and the memory that its inputs and outputs are bound to."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from hosl_edge.model.graph_check import check_graph
from hosl_edge.model.weights import usable

Inputs: TypeAlias = dict[str, npt.NDArray[Any]]
Outputs: TypeAlias = Mapping[str, npt.NDArray[np.float32]]


def describe_computer(threads: int) -> str:
    """Name what the bits of a graph's outputs depend on besides its inputs, as far as it can be named."""
    return f"onnxruntime {ort.__version__} {platform.machine()} {threads}"


def new_shared_arena() -> None:
    """Let graphs that are opened with `shares_arena` from here on have one arena, in place of any before.

    Of a forward and a backward, which never run at once, the second finds room in what the first has left: 15 MB on
    top at OPT-125M's width, where an arena of its own takes 45.
    """
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # Before version 1.23 the first one stays: it is shared all the same, and keeps what the largest forward took.
    with contextlib.suppress(RuntimeError):
        ort.create_and_register_allocator(place, None)


def _session_options(threads: int, shares_arena: bool) -> ort.SessionOptions:
    """Make the options that tests/benchmarks/session_options.py chose."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1

    # The arena keeps what a forward took; without it each value is fresh pages of the kernel's: 6 MB more at the peak
    # and 5 to 20 % more time. It packs values best if they are not planned into each other's buffers.
    options.enable_cpu_mem_arena = True
    options.enable_mem_reuse = False
    options.enable_mem_pattern = False
    # Threads that spin take processors from other work, or from the battery, and gained a tenth of time at most.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if shares_arena:
        options.add_session_config_entry("session.use_env_allocators", "1")
    return options


class Graph:
    """A session, and what is bound to its inputs."""

    def __init__(self, path: Path, threads: int, *, shares_arena: bool = False) -> None:
        self._path = path
        with usable(path):
            # The bytes that are checked are those that ONNX Runtime gets; by its path it would read the file again.
            data = path.read_bytes()
            check_graph(data)
            options = _session_options(threads, shares_arena)
            self._session = ort.InferenceSession(data, options, ["CPUExecutionProvider"])
            self._binding = self._session.io_binding()
            self.inputs = {value.name: tuple(value.shape) for value in self._session.get_inputs()}
            """Names and shapes; a dimension that is free is a name, too."""
            self.outputs = {value.name: tuple(value.shape) for value in self._session.get_outputs()}

    def bind(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Let the inputs of these names read this memory, as often as it changes."""
        with usable(self._path):
            for name, array in arrays.items():
                if name in self.inputs:
                    self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def compute(self, given: Inputs, out: Outputs) -> None:
        """Let ONNX Runtime compute the outputs that `out` names into its memory, from `given` and what was bound
        before. What no wanted output needs is computed all the same, and dropped."""
        self.bind(given)
        with usable(self._path):
            self._binding.clear_binding_outputs()
            for name, array in out.items():
                self._binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
            self._session.run_with_iobinding(self._binding)
