"""The three commands' parser: what it cannot read it says for the command concerned, with what was probably meant."""

from __future__ import annotations

import argparse
import difflib
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A command, or one that has others below it. Without a word, the latter shows its help.

    `--help` begins with an example, and leaves options out that few people need; `--help-all` has them all.
    """

    def __init__(self, *arguments: Any, commands: Mapping[str, str] | None = None, **more: Any) -> None:
        """`commands` are words that the program takes for commands without a parser's help, and what they do."""
        super().__init__(*arguments, **more)
        self.example = ""
        """A command line, or several."""
        self.rare: Collection[str] = ()
        """Options that `--help` leaves out."""
        self._commands = list(commands or {})
        if commands:
            # Only for the help: they are never parsed.
            group = self.add_argument_group("commands")
            group._group_actions += [argparse.Action([], name, help=text) for name, text in commands.items()]
        self.add_argument("--help-all", action=_HelpAll, help="show every option")

    def add_subparsers(self, **more: Any) -> Any:
        """As argparse's, under a title of their own."""
        return super().add_subparsers(**{"title": "commands", **more})

    def explain(self, examples: Mapping[str, str], rare: Collection[str]) -> None:
        """Give this command, and those below it, their examples, by their whole name, and their rare options."""
        self.example, self.rare = examples.get(self.prog, ""), rare
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                helps = {choice.dest: choice.help or "" for choice in action._get_subactions()}
                for name, parser in action.choices.items():
                    text = helps.get(name, "")
                    parser.description = parser.description or (text and f"{text[0].upper()}{text[1:]}.")
                    parser.explain(examples, rare)

    def format_usage(self) -> str:
        """Name what has to be given, and not every option that may be."""
        formatter = self._get_formatter()

        def value(action: argparse.Action) -> str:
            return formatter._format_args(action, action.dest.upper() if action.option_strings else action.dest)

        needed = [action for action in self._actions if action.required and action.option_strings]
        words = ["[COMMAND]"] if self._commands else []
        words += [f"{action.option_strings[0]} {value(action)}" for action in needed]
        words += ["[OPTION]...", *map(value, self._get_positional_actions())]
        return f"usage: {self.prog} {' '.join(words)}\n"

    def format_help(self, *, has_all: bool = False) -> str:
        """Format the help: usage, example, description, and the options, rare ones among them with `has_all`."""
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        # Commands, which are for who does not know yet what he looks for, come first, and what helps comes last.
        for group in sorted(self._action_groups, key=lambda group: _ORDER.get(f"{group.title}", len(_ORDER))):
            shown = [action for action in group._group_actions if self._is_shown(action, has_all)]
            if group.title == "commands" and isinstance(shown[0], argparse._SubParsersAction):
                shown = shown[0]._get_subactions()
            formatter.start_section(group.title)
            formatter.add_arguments(sorted(shown, key=lambda action: isinstance(action, _HELPING)))
            formatter.end_section()
        example = f"\n{textwrap.indent(self.example, '  ')}\n" if self.example else ""
        return f"{self.format_usage()}{example}\n{formatter.format_help()}"

    def _is_shown(self, action: argparse.Action, has_all: bool) -> bool:
        if isinstance(action, _HelpAll):
            return not has_all and any(map(self._is_rare, self._actions))
        return has_all or not self._is_rare(action)

    def _is_rare(self, action: argparse.Action) -> bool:
        return any(option in self.rare for option in action.option_strings)

    # argparse lets the parser on top complain of what one below it has left over; here each speaks for itself.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but nothing is left over."""
        words = list(sys.argv[1:] if args is None else args)
        # argparse would say that a command is missing, and not which there are.
        if self._subparsers is not None and not words:
            self.print_help(sys.stderr)
            self.exit(2)
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


class _HelpAll(argparse.Action):
    """Shows every option, and ends the program."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
        assert isinstance(parser, Parser)
        print(parser.format_help(has_all=True), end="")
        parser.exit()


_ORDER = {"commands": 0, "settings": 1}
"""Of the groups; others follow."""
_HELPING = (argparse._HelpAction, _HelpAll, argparse._VersionAction)
