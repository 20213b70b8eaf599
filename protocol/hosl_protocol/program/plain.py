"""Text of the other side, of files and of names, as people may be shown it: one line that moves no cursor."""

from __future__ import annotations

import re

_BREAKS = re.compile(r"\s*[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]\s*")


def plain(text: str) -> str:
    """Put `text` on one line; what a terminal would obey, or not show, stands there as its escape."""
    line = _BREAKS.sub(" ", text)
    if line.isprintable():
        return line
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
