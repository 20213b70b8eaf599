"""The three commands' parser: what it cannot read it says for the command concerned, with what was probably meant."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A command, or one that has others below it. Without a word, the latter shows its help."""

    def __init__(self, *arguments: Any, commands: Iterable[str] = (), **more: Any) -> None:
        """`commands` are words that the program takes for commands without a parser's help."""
        super().__init__(*arguments, **more)
        self._commands = list(commands)

    # argparse lets the parser on top complain of what one below it has left over; here each speaks for itself.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but nothing is left over."""
        words = list(sys.argv[1:] if args is None else args)
        # argparse would say that a command is missing, and not which there are.
        if self._subparsers is not None and not words:
            self.print_help()
            self.exit()
        if unknown := next((word for word in self._own_options(words) if not self._is_known(word)), None):
            self._refuse(unknown)
        found, extra = super().parse_known_args(words, namespace)
        if extra:
            self._refuse(extra[0])
        return found, extra

    def _own_options(self, words: Sequence[str]) -> list[str]:
        """The long options that are this parser's to read, before argparse misses one that is required."""
        end = words.index("--") if "--" in words else len(words)
        if self._subparsers is not None:  # from the first other word on they are a command's
            end = next((place for place, word in enumerate(words[:end]) if not word.startswith("-")), end)
        return [word.partition("=")[0] for word in words[:end] if word.startswith("--") and len(word) > 2]

    def _is_known(self, word: str) -> bool:
        return any(option.startswith(word) for option in self._option_string_actions)

    def _refuse(self, word: str) -> NoReturn:
        name = word.partition("=")[0]
        if not name.startswith("-"):
            self.error(f"{name} is not expected here{_meant(name, self._commands)}")
        remedy = _meant(name, [option for option in self._option_string_actions if option.startswith("--")])
        if not remedy and self._subparsers is not None:
            remedy = ": options of a command stand behind it"
        self.error(f"there is no option {name}{remedy}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        raise argparse.ArgumentError(action, f"{value} is none of {', '.join(known)}{_meant(str(value), known)}")


def _meant(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f": did you mean {near[0]}?" if near else ""
