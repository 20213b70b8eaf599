"""Graphs of equal halves are traced once for all tests: torch's exporter takes seconds even for the smallest model."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from onnxscript.rewriter import RewriteRule
from torch import Tensor
from torch.onnx._internal.exporter._registration import ONNXRegistry

from hosl_export.bundle.gradients import describe_part, write_whole_gradient
from hosl_export.bundle.graph import graph_inputs, write_graph
from hosl_export.model.halves import ClientHalf
from hosl_export.model.lora import plain_name
from hosl_protocol.run.manifest import PrefixEntry

MadeOnce = Callable[[str, Callable[[Path], object]], Path]


def write_graph_once(
    made_once: MadeOnce,
    half: ClientHalf,
    path: Path,
    constants: Collection[str] = (),
    prefix: PrefixEntry | None = None,
    shown: Sequence[int] = (),
) -> None:
    """`hosl_export.bundle.graph.write_graph`, whose files are kept by everything that a graph is made of.

    Weights that are inputs count by their shapes alone. Every export checks its graph against the model that it is of,
    so that one taken for another would not stay unnoticed.
    """

    def write(folder: Path) -> None:
        folder.mkdir()
        write_graph(half, folder / "graph.onnx", constants, prefix, shown)

    digest = _digest(half, constants, prefix, shown)
    half.model.set_attn_implementation("eager")  # as write_graph leaves it
    shutil.copyfile(made_once(f"graph-{digest}", write) / "graph.onnx", path)


def write_whole_gradient_once(made_once: MadeOnce, part: ClientHalf, path: Path, given: Tensor) -> None:
    """`hosl_export.bundle.gradients.write_whole_gradient`, likewise, by what decides whether blocks share one."""

    def write(folder: Path) -> None:
        folder.mkdir()
        write_whole_gradient(part, folder / "graph.onnx", given)

    # What transformers reads of the config as it runs, too: blocks of one model have that in common.
    facts = (describe_part(part), _config(part), tuple(given.shape), part.image)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    shutil.copyfile(made_once(f"gradient-{digest}", write) / "graph.onnx", path)


def spare_the_exporter(patch: pytest.MonkeyPatch) -> None:
    """Let the exporter do less for the same graph, which takes a fifth of its time for models as small as these.

    It reads the same table of all functions for each graph, and tries each rule on every node, whatever its operator.
    """
    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
    try_rewrite = RewriteRule.try_rewrite

    def try_on_its_operator(rule: RewriteRule, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        operator = rule._target_pattern.output_nodes[0].op_identifier()
        if operator is not None and operator[1] != node.op_type:
            return None
        return try_rewrite(rule, model, graph, node, **options)

    patch.setattr(RewriteRule, "try_rewrite", try_on_its_operator)


def _config(half: ClientHalf) -> str:
    """What transformers may read as it runs: not where the model lies."""
    return json.dumps({**half.model.config.to_dict(), "_name_or_path": ""}, sort_keys=True, default=str)


def _digest(half: ClientHalf, constants: Collection[str], prefix: PrefixEntry | None, shown: Sequence[int]) -> str:
    model = half.model
    inside: list[tuple[str, Tensor]] = list(model.named_buffers())
    inside += [(name, value) for name, value in model.named_parameters() if plain_name(name) in constants]
    facts: list[Any] = [
        *(repr(model), repr(half.family), graph_inputs(half), half.first_block, half.grid, half.prompt_tokens),
        *(_config(half), list(shown)),
        msgspec.json.encode((half.image, prefix)).decode(),
        [(name, list(value.shape)) for name, value in model.named_parameters()],
        [(path, str(vars(module).get("scaling"))) for path, module in model.named_modules()],
        [(path, str(vars(module)["_forward_pre_hooks"])) for path, module in model.named_modules()],
        sorted(constants),
        [(name, hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()) for name, value in inside],
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
