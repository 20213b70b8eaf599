"""The map of the code in cloud/README.md names what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "cloud" / "README.md"


def inside() -> str:
    """The section of that name."""
    return README.read_text(encoding="utf-8").partition("## Inside\n")[2].partition("\n## ")[0]


def test_every_name_in_the_map_of_the_code_is_in_the_code() -> None:
    packages = ("cloud/hosl_cloud", "cloud/hosl", "protocol/hosl_protocol")  # of the last the links' targets
    modules = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in modules)
    places = {path.stem for path in modules} | {path.parent.name for path in modules}
    defined = set(re.findall(r"(?:def|class) (\w+)|^(\w+)(?:: .+)? =", source, re.MULTILINE))
    names = {name for pair in defined for name in pair} | places
    named = set(re.findall(r"`([\w./]+)`", inside()))
    parts = {part for name in named for part in re.split(r"[./]", name) if part}
    assert len(parts) > 50
    assert parts - names == set()


def test_every_link_in_the_map_of_the_code_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", inside())
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
