"""Fails where a test of the device or the protocol needs the cloud, the exporter or their packages: in `make lint`.

These tests run on devices, where there is none of that. What they import is followed through tests/helpers. Within a
function an import may be of the exporter or torch, for tests and fixtures that are left out without torch; of the cloud
none may.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
FOLDERS = ("edge", "protocol")
CLOUD = {
    *("hosl", "hosl_cloud", "cryptography", "h11", "prometheus_client", "rich", "starlette", "tensorboardX", "uvicorn"),
}
OTHERS = {"hosl_export", "accelerate", "gguf", "onnx", "onnx_ir", "onnxscript", "peft", "torch", "transformers"}


def imports_of(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, module and whether it is imported with the file, not just by a function or for types."""

    def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[int, str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "", at_once
        is_later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_once and not is_later and not is_for_types)

    return walk(ast.parse(path.read_text(encoding="utf-8")), True)


def faults(paths: list[Path]) -> Iterator[str]:
    """A line for each import that no device can serve, in these files and the helpers that they import."""
    todo = [(path, True) for path in paths]
    seen = set(todo)
    while todo:
        path, is_at_once = todo.pop()
        for line, module, comes_with_file in imports_of(path):
            at_once = is_at_once and comes_with_file
            root = module.partition(".")[0]
            if root in CLOUD or (at_once and root in OTHERS):
                yield f"{path}:{line}: imports {module}, which no device has"
            helper = TESTS / "helpers" / f"{root}.py", at_once
            if helper[0].exists() and helper not in seen:
                seen.add(helper)
                todo.append(helper)


if __name__ == "__main__":
    first = [TESTS / "conftest.py", *(path for folder in FOLDERS for path in sorted((TESTS / folder).rglob("*.py")))]
    found = list(faults(first))
    print("\n".join(found), end="\n" * bool(found))
    sys.exit(bool(found))
