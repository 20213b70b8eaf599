"""What the commands say of words that they cannot read."""

from __future__ import annotations

import importlib
import re

import pytest

from hosl_protocol.program.arguments import Parser


def make_parser() -> Parser:
    parser = Parser(prog="tool")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="run it")
    serve.add_argument("--bundle", required=True)
    serve.add_argument("--out", choices=("best", "last"))
    device = commands.add_parser("device", help="make devices")
    device.add_subparsers(required=True, metavar="COMMAND").add_parser("add", help="make one")
    return parser


@pytest.mark.parametrize(
    ("words", "usage", "sentence"),
    [
        ("serve --bundel x", "tool serve", "there is no option --bundel: did you mean --bundle?"),
        ("serve --bundel=x", "tool serve", "there is no option --bundel: did you mean --bundle?"),
        ("serve --bundle x --zzz", "tool serve", "there is no option --zzz"),
        ("serve --bundle x y", "tool serve", "y is not expected here"),
        ("serve --bundle x -q", "tool serve", "there is no option -q"),
        ("serve", "tool serve", "the following arguments are required: --bundle"),
        ("serve --bundle x --out bets", "tool serve", "argument --out: bets is none of best, last: did you mean best?"),
        ("srve", "tool", "argument COMMAND: srve is none of serve, device: did you mean serve?"),
        ("--bundle x serve", "tool", "there is no option --bundle: options of a command stand behind it"),
        ("device ad", "tool device", "argument COMMAND: ad is none of add: did you mean add?"),
    ],
)
def test_what_cannot_be_read_is_named_by_the_command_concerned(
    words: str, usage: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        make_parser().parse_args(words.split())
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said.startswith(f"usage: {usage} ")
    assert said.splitlines()[-1] == f"{usage}: error: {sentence}"


@pytest.mark.parametrize("words", ["", "device"])
def test_a_command_with_others_below_it_shows_them(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        make_parser().parse_args(words.split())
    shown = capsys.readouterr()
    assert (caught.value.code, shown.out) == (2, "")
    assert "--help" in shown.err
    assert "commands:\n  " in shown.err


def test_what_is_right_is_read() -> None:
    assert make_parser().parse_args(["serve", "--bund", "x", "--out=last"]).bundle == "x"


def test_a_misspelt_command_of_a_program_that_needs_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Parser(prog="tool", commands={"status": "what it does"}).parse_args(["statu"])
    assert "statu is not expected here: did you mean status?" in capsys.readouterr().err


def explained() -> Parser:
    parser = make_parser()
    parser.explain({"tool serve": "tool serve --bundle here/"}, {"--out"})
    return parser


def shown_by(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        explained().parse_args(words.split())
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_begins_with_an_example_and_leaves_rare_options_out(capsys: pytest.CaptureFixture[str]) -> None:
    few = shown_by("serve --help", capsys)
    assert few.startswith("usage: tool serve --bundle BUNDLE [OPTION]...\n\n  tool serve --bundle here/\n\n")
    assert "--help-all" in few
    assert "--out" not in few
    every = shown_by("serve --help-all", capsys)
    assert "--out {best,last}" in every
    assert "--help-all" not in every
    assert "--help-all" not in shown_by("device add --help", capsys), "there is nothing more to show"


def test_a_rare_option_is_read_as_any_other() -> None:
    assert explained().parse_args(["serve", "--bundle", "x", "--out", "best"]).out == "best"


@pytest.mark.parametrize("program", ["hosl_edge", "hosl_cloud", "hosl_export"])
def test_every_help_fits_a_screen_and_begins_with_an_example(
    program: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main = importlib.import_module(f"{program}.__main__").main
    todo: list[list[str]] = [[]]
    while todo:
        words = todo.pop()
        with pytest.raises(SystemExit) as caught:
            main([*words, "--help"])
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        name = " ".join([program.replace("_", "-"), *words])
        assert shown.splitlines()[2].startswith(f"  {name.removesuffix(' run')}"), name
        assert shown.count("\n") <= 40, name
        assert max(map(len, shown.splitlines())) <= 80, name
        commands = shown.partition("\ncommands:\n")[2].partition("\n\n")[0]
        found = re.findall(r"^  ([a-z-]+)\b", commands, re.MULTILINE)
        # `hosl-edge run` is `hosl-edge`.
        todo += [[*words, each] for each in found if (program, each) != ("hosl_edge", "run")]
