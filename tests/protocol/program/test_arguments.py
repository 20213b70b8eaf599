"""What the commands say of words that they cannot read."""

from __future__ import annotations

import pytest

from hosl_protocol.program.arguments import Parser


def make_parser() -> Parser:
    parser = Parser(prog="tool")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve")
    serve.add_argument("--bundle", required=True)
    serve.add_argument("--out", choices=("best", "last"))
    commands.add_parser("device").add_subparsers(required=True, metavar="COMMAND").add_parser("add")
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
    assert (caught.value.code, shown.err) == (0, "")
    assert "--help" in shown.out
    assert "COMMAND" in shown.out


def test_what_is_right_is_read() -> None:
    assert make_parser().parse_args(["serve", "--bund", "x", "--out=last"]).bundle == "x"


def test_a_misspelt_command_of_a_program_that_needs_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Parser(prog="tool", commands=["status"]).parse_args(["statu"])
    assert "statu is not expected here: did you mean status?" in capsys.readouterr().err
