"""The order of the code: rooms stand on those before them, no import leads back, and no folder grows into a hall."""

from __future__ import annotations

import ast
import re
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PACKAGES = {
    "hosl_protocol": ("protocol", set()),
    "hosl_edge": ("edge", {"hosl_protocol"}),
    "hosl_export": ("export", {"hosl_protocol"}),
    "hosl_cloud": ("cloud", {"hosl_protocol", "hosl_edge", "hosl_export"}),
    "hosl": ("cloud", {"hosl_protocol", "hosl_edge", "hosl_export", "hosl_cloud"}),
}
"""Each package's folder, and the packages that it may import."""

ROOMS = {
    "hosl_protocol": ["exceptions", "program", "arithmetic", "run", "weights", "wire"],
    "hosl_edge": [
        *("exceptions", "settings", "options", "data", "model", "host", "connection", "history"),
        *("rounds", "driver", "device", "session", "agent", "preflight", "data_view", "__main__"),
    ],
    "hosl_export": [
        *("exceptions", "tensor_files", "model", "sources", "bundle", "formats"),
        *("summary", "settings", "inputs", "exporter", "inspection", "steps", "__main__"),
    ],
    "hosl_cloud": [
        *("exceptions", "settings", "metrics", "sentences", "storage", "rounds", "tail", "ranks", "runs"),
        *("simulation", "service", "commands", "__main__"),
    ],
    "hosl": ["extras", "bundles", "given", "data", "rounds", "trained", "leading", "runs", "simulating", "serving"],
}
"""Folders and modules of each package: one may import those before it."""

MOST_MODULES = 16
"""In one folder."""


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for package, (folder, _) in PACKAGES.items():
        for path in (ROOT / folder / package).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports() -> dict[str, set[str]]:
    """The product's modules that each of them imports, at once or later."""
    known, found = modules(), {}
    for module, path in known.items():
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        named = {
            name if (name := f"{node.module}.{alias.name}") in known else node.module or ""
            for node in nodes
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        found[module] = {name for name in named if name in known and name != module}
    return found


def test_every_room_has_a_place_in_the_order() -> None:
    inside = {tuple(module.split(".")[:2]) for module in modules() if "." in module}
    assert inside == {(package, room) for package, rooms in ROOMS.items() for room in rooms}


def test_no_room_imports_one_above_it() -> None:
    backwards = []
    for module, imported in imports().items():
        package, *rest = module.split(".")
        for other in imported:
            other_package, *other_rest = other.split(".")
            if other_package != package:
                is_allowed = other_package in PACKAGES[package][1]
            else:  # a package's own door may open onto everything, and nothing inside goes through it
                order = ROOMS[package]
                is_allowed = not rest or (bool(other_rest) and order.index(other_rest[0]) <= order.index(rest[0]))
            if not is_allowed:
                backwards.append(f"{module} imports {other}")
    assert backwards == []


def test_no_import_leads_back() -> None:
    TopologicalSorter(imports()).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("top", ["cloud", "edge", "export", "protocol", "tests"])
def test_no_folder_holds_more_modules_than_a_reader_can_survey(top: str) -> None:
    sizes = Counter(
        path.parent for path in (ROOT / top).rglob("*.py") if path.name not in ("__init__.py", "conftest.py")
    )
    assert {str(folder): size for folder, size in sizes.items() if size > MOST_MODULES} == {}


def test_every_path_that_contributors_are_sent_to_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = {found for found in re.findall(r"`([\w./-]+)`", text) if "/" in found}
    assert len(paths) > 25
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_contributors_are_told_of_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for package, (folder, _) in PACKAGES.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{folder}/{package}` |"))
        rooms = [room for room in ROOMS[package] if (ROOT / folder / package / room).is_dir()]
        assert re.findall(r"`(\w+)`", row.split("|")[2]) == rooms


def test_a_round_goes_through_functions_that_there_are() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## A round, there and back\n")[2].partition("\n## ")[0]
    source = "\n".join(path.read_text(encoding="utf-8") for path in modules().values())
    defined = set(re.findall(r"^ *(?:async )?(?:def|class) (\w+)", source, re.MULTILINE))
    named = {part for name in re.findall(r"`([\w.]+)`", section) for part in name.split(".")}
    assert len(named) > 25
    assert named - defined == set()
