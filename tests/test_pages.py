"""What the pages say can be followed and typed: their links, commands, settings and targets exist."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

import hosl_cloud.__main__ as cloud
import hosl_edge.__main__ as edge
import hosl_export.__main__ as export
from hosl_cloud.settings import RunConfig
from hosl_edge.settings import TYPES

ROOT = Path(__file__).parents[1]
FOLDERS = ("cloud", "docs", "edge", "examples", "export", "protocol", "tests")
PROGRAMS = {"hosl-cloud": cloud, "hosl-edge": edge, "hosl-export": export}

OPERATORS = {"|", "||", "&", "&&", ";", ";;", "(", ")", "<", ">", ">>"}
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^\s)>]+)>?[^)]*\)|(?:src|srcset|href)=\"([^\"\s]+)")
HEADING = re.compile(r"^#{1,6} +(.*?)(?: +#*)?$")
OF_TORCHRUN = {"--local-addr", "--max-restarts", "--shutdown-timeout"}
ASSIGNMENT = re.compile(r"\w+=")
WRAPPERS = {"docker", "podman", "sudo"}
"""Programs that start another one, which is named behind their options."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    line: int
    """Of its first line."""
    language: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Page:
    """A page, taken apart."""

    path: Path
    text: Sequence[tuple[int, str]]
    """Its lines that stand in no block, by number."""
    blocks: Sequence[Block]

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"

    def anchors(self) -> set[str]:
        """Give the anchors of its headings, as GitHub makes them."""
        found: dict[str, int] = {}
        for _, line in self.text:
            if heading := HEADING.match(line):
                words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
                anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
                found[anchor] = found.get(anchor, -1) + 1
        return {f"{anchor}-{n}" if n else anchor for anchor, times in found.items() for n in range(times + 1)}

    def code(self) -> Iterator[tuple[int, str]]:
        """Yield what stands between single backticks, by the line on which it begins."""
        text = "\n".join(line for _, line in self.text)
        numbers = [number for number, _ in self.text]
        for found in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
            yield numbers[text.count("\n", 0, found.start())], " ".join(found[1].split())


def read(path: Path) -> Page:
    text: list[tuple[int, str]] = []
    blocks: list[Block] = []
    fence, block = "", Block(0, "", [])
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        mark = re.match(r"\s*(`{3,}|~{3,})\s*(\w*)", line)
        if fence:
            if mark and mark[1].startswith(fence):
                fence = ""
                blocks.append(block)
            else:
                block = Block(block.line, block.language, [*block.lines, line])
        elif mark:
            fence, block = mark[1], Block(number + 1, mark[2], [])
        else:
            text.append((number, line))
    assert not fence, f"{path}: a block is never closed"
    return Page(path, text, blocks)


def find_pages() -> list[Page]:
    """Read every page of ours; what examples and tools have made lies in folders that git ignores."""
    paths = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
    inside = {path: path.relative_to(ROOT).parts for path in paths}
    return [
        read(path) for path, parts in sorted(inside.items()) if "work" not in parts and not parts[0].startswith(".")
    ]


PAGES = find_pages()


def is_there(page: Page, target: str, anchors: Callable[[Path], set[str]]) -> bool:
    """Whether a relative link leads to a file or folder of ours, and to a heading of it where it names one."""
    name, _, anchor = target.partition("#")
    path = (page.path.parent / name).resolve() if name else page.path
    if not path.exists() or not path.is_relative_to(ROOT):
        return False
    return not anchor or (path.suffix == ".md" and anchor in anchors(path))


def test_every_link_leads_to_a_file_and_a_heading_that_there_are() -> None:
    anchors = {page.path: page.anchors() for page in PAGES}
    links = [
        (page, number, found[1] or found[2])
        for page in PAGES
        for number, line in page.text
        for found in LINK.finditer(re.sub(r"`[^`]*`", "", line))
        if not re.match(r"[a-z]+:", found[1] or found[2])
    ]
    assert len(links) > 50
    broken = [
        f"{page.at(number)}: {link}"
        for page, number, link in links
        if not is_there(page, link, lambda path: anchors.get(path, set()))
    ]
    assert broken == []


def commands(lines: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the commands of a block as lists of words, by the place of their first line."""
    place = 0
    while place < len(lines):
        first, text = place, lines[place]
        while text.endswith("\\") and place + 1 < len(lines):
            place += 1
            text = text[:-1] + lines[place]
        place += 1
        for words in split(re.sub(r"^\s*[$#] (?=\S)", "", text)):
            yield first, words


def split(text: str) -> Iterator[list[str]]:
    """Split a line into the commands that it has; none where it is no line of a shell."""
    lexer = shlex.shlex(text.replace("...", ""), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # an apostrophe in a line of prose
        return
    command: list[str] = []
    before = ""
    for word in [*words, ";"]:
        before, operator = word, before
        if operator in (">", ">>", "<"):  # this is a file
            continue
        if word in OPERATORS or re.fullmatch(r"[|&;()<>]+", word):
            yield command
            command = []
        else:
            command.append(word)


def program(words: Sequence[str]) -> tuple[str, list[str]]:
    """Find a program of ours in a command, behind sudo and the like, and what it is given; empty for another's."""
    words = list(itertools.dropwhile(ASSIGNMENT.match, words))
    wrapper = words[0] if words and words[0] in WRAPPERS else ""
    for place, word in enumerate(words):
        name = word.rpartition("/")[2]
        # `sudo -u hosl-cloud hosl-cloud init`: the user has the name, too.
        if name in PROGRAMS and not (place and words[place - 1].startswith("-")):
            return name, words[place + 1 :]
        if not wrapper or word == "systemctl":
            break
    return "", []


@pytest.fixture
def complaint(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], str]:
    """What a program says against its words; empty where it would do what they ask."""
    for module in PROGRAMS.values():
        monkeypatch.setattr(module, "run_command", lambda parser, command, given: parser.parse_args(given))

    def complain(program: str, words: list[str]) -> str:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                PROGRAMS[program].main(words)
            except SystemExit as error:
                return said.getvalue() if error.code else ""
        return ""

    return complain


def test_every_command_in_a_block_is_one_that_its_program_takes(complaint: Callable[[str, list[str]], str]) -> None:
    typed = [
        (page.at(block.line + place), *program(words))
        for page in PAGES
        for block in page.blocks
        for place, words in commands(block.lines)
    ]
    ours = [(at, name, words) for at, name, words in typed if name]
    assert len(ours) > 50
    assert {name for _, name, _ in ours} == set(PROGRAMS)
    wrong = [f"{at}: {name} {' '.join(words)}: {said}" for at, name, words in ours if (said := complaint(name, words))]
    assert wrong == []


def test_what_a_page_says_of_a_command_in_passing_is_so(complaint: Callable[[str, list[str]], str]) -> None:
    """Parts of a command line: what is not there may be missing, but what is there has to exist."""
    named = [
        (page.at(number), *program(words)) for page in PAGES for number, code in page.code() for words in split(code)
    ]
    ours = [(at, name, [word.strip("[]") for word in words]) for at, name, words in named if words]
    assert len(ours) > 20
    told = [(f"{at}: {name} {' '.join(words)}", complaint(name, words)) for at, name, words in ours]
    is_short = re.compile(r"the following arguments are required|expected one argument|^usage: .* COMMAND \.\.\.\n")
    assert [f"{what}: {said}" for what, said in told if said and not is_short.search(said)] == []


def options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options_of(below)


def test_every_option_that_a_page_names_is_one_of_a_program() -> None:
    parsers = [cloud._parser(), export._parser(), *(edge.make_parser(name, "x") for name in edge.COMMANDS)]
    ours = {option for parser in parsers for option in options_of(parser)}
    scripts = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "tests" / "benchmarks").rglob("*.py")]
    theirs = {option for path in scripts for option in re.findall(r"\"(--[\w-]+)\"", path.read_text(encoding="utf-8"))}
    named = [
        (page.at(number), found[1])
        for page in PAGES
        for number, code in page.code()
        if (found := re.match(r"(--[a-z][\w-]*\w)(?![\w-])", code))
    ]
    assert len(named) > 100
    assert [(at, option) for at, option in named if option not in ours | theirs | OF_TORCHRUN] == []


def known(name: str, kind: Any) -> bool:
    """Whether a setting of a dotted name is one of a struct's, or of those in it."""
    first, _, rest = name.partition(".")
    for each in (kind, *get_args(kind)):
        if isinstance(each, type) and issubclass(each, msgspec.Struct):
            hints = get_type_hints(each)
            return first in hints and (not rest or known(rest, hints[first]))
    return not rest


def names(table: dict[str, Any], before: str = "") -> Iterator[str]:
    for name, value in table.items():
        yield before + name
        if isinstance(value, dict):
            yield from names(value, f"{before}{name}.")


def is_setting(page: Page, name: str) -> bool:
    """Whether there is such a setting; pages of the device have its own file's, too."""
    if page.path.is_relative_to(ROOT / "edge") and name in TYPES:
        return True
    return name == "task.preset" or known(name, RunConfig)


def test_every_setting_in_a_block_is_one_that_there_is() -> None:
    found = []
    for page in PAGES:
        for block in page.blocks:
            with contextlib.suppress(msgspec.DecodeError):
                table = msgspec.toml.decode("\n".join(block.lines))
                if block.language in ("", "toml"):
                    found += [(page, block.line, name) for name in names(table)]
            for place, words in commands(block.lines):
                _, given = program(words)
                pairs = itertools.pairwise(given)
                found += [(page, block.line + place, value.partition("=")[0]) for key, value in pairs if key == "--set"]
    assert len(found) > 10
    assert [f"{page.at(line)}: {name}" for page, line, name in found if not is_setting(page, name)] == []


def is_file(page: Page, name: str) -> bool:
    """Whether a page may name a file: ours, also from beside the checkout, or one that the reader makes of a block."""
    places = ROOT / name, ROOT / name.removeprefix("hosl/"), page.path.parent / name
    return any(place.exists() for place in places) or any(f"This is `{name}`:" in line for _, line in page.text)


def test_every_target_of_make_and_every_file_of_python_is_there() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", text, re.MULTILINE))
    assert {"check", "test", "demo"} <= targets
    wrong, count = [], 0
    for page in PAGES:
        lines = [(block.line + place, words) for block in page.blocks for place, words in commands(block.lines)]
        lines += [(number, words) for number, code in page.code() for words in split(code)]
        for number, words in lines:
            goals, files = [], []
            if words[:1] == ["make"]:
                given = words[3:] if words[1:2] == ["-C"] else words[1:]
                goals = [word for word in given if re.fullmatch(r"[a-z][\w-]*", word)]
            elif words and re.fullmatch(r"(\S*/)?python3?", words[0]):
                files = [word for word in words[1:2] if re.fullmatch(r"[\w./-]+\.py", word)]
            count += len(goals) + len(files)
            wrong += [f"{page.at(number)}: make {goal}" for goal in goals if goal not in targets]
            wrong += [f"{page.at(number)}: {file}" for file in files if not is_file(page, file)]
    assert count > 30
    assert wrong == []
