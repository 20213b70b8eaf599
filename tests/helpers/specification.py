"""protocol/README.md as tests read it."""

from __future__ import annotations

import re

from support import ROOT

README = ROOT / "protocol" / "README.md"


def section(title: str) -> str:
    """The text below a heading, up to the next heading of its rank or above."""
    text = README.read_text(encoding="utf-8")
    rank = title.partition(" ")[0]
    found = re.search(rf"^{re.escape(title)}\n(.*?)(?=^#{{1,{len(rank)}}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found.group(1)


def table_below(heading: str) -> list[list[str]]:
    """The cells of each row of the table that follows a heading or a bold line, without its own two."""
    text = README.read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1]
    found = re.search(r"^\|.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    assert found
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in found.group().split("\n")[2:]]
