"""`hosl-cloud try`: the trained model of a run answers texts, or names their classes, on this machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hosl_cloud.commands.results.merge import merge_with_hint
from hosl_cloud.storage.data_folder import DATABASE, add_data_dir
from hosl_cloud.storage.run_names import find_run_id
from hosl_cloud.storage.store import Store
from hosl_protocol.exceptions import ExitCode, SettingsError
from hosl_protocol.program.terminal import add_common_options
from hosl_protocol.run.tasks import Task

if TYPE_CHECKING:
    from hosl_cloud.tail.trained import Trained


def add_try(parser: argparse.ArgumentParser) -> None:
    """Options of `hosl-cloud try`."""
    parser.add_argument("run", metavar="RUN", help="its id, a beginning of it that no other run has, or latest")
    parser.add_argument(
        "texts",
        metavar="TEXT",
        nargs="+",
        help="a text, a JSON object with its fields, a picture's path, or - for stdin",
    )
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="by evaluation, or the newest (default: best)"
    )
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="the bundle, if it has moved since the run")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128 tokens)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 takes the likeliest token; more draws (default: 0)",
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each text")
    add_data_dir(parser)
    add_common_options(parser)
    parser.set_defaults(command=_try)


def _try(options: argparse.Namespace) -> int:
    if options.max_new_tokens < 1:
        raise SettingsError("--max-new-tokens", options.max_new_tokens, "give 1 or more")
    if not 0 <= options.temperature <= 10:
        raise SettingsError("--temperature", options.temperature, "give 0 to 10")
    trained = _load(options)
    for given in _texts(options.texts):
        if trained.task.scores_tokens:
            _answer(trained, given, options)
        else:
            _classify(trained, given, options)
    return int(ExitCode.OK)


def _texts(texts: list[str]) -> Iterator[str]:
    """The texts, and in the place of a `-` the lines of standard input."""
    for text in texts:
        if text == "-":
            yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        else:
            yield text


def _load(options: argparse.Namespace) -> Trained:
    """Merge the run to a folder that is gone as soon as it is loaded."""
    from hosl_cloud.tail.merge import Targets
    from hosl_cloud.tail.trained import load_folder
    from hosl_export.steps import Steps

    database = options.data_dir / DATABASE
    if not database.exists():
        raise SettingsError("--data-dir", str(options.data_dir), "no service has run there")
    steps = Steps("hosl-cloud", keeps_lines=False)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hosl-try-"))) / "model"
        store = stack.enter_context(contextlib.closing(Store(database, reads_only=True)))
        id_ = find_run_id(options.run, store.run_ids())
        with steps.shown(), steps(f"loading {id_}"):
            found = merge_with_hint(store, id_, Targets(out=folder), options)
            return load_folder(folder, found.merged.info.config.task)


def _answer(trained: Trained, given: str, options: argparse.Namespace) -> None:
    pieces: list[str] = []

    def say(piece: str) -> None:
        pieces.append(piece)
        if not options.json:
            print(piece, end="", flush=True)

    prompt = _prompt(trained, given)
    trained.answer(prompt, say, most_tokens=options.max_new_tokens, temperature=options.temperature)
    print(json.dumps({"text": given, "answer": "".join(pieces)}, ensure_ascii=False) if options.json else "")


def _prompt(trained: Trained, given: str) -> str:
    """What the model is to go on with: of a completion the prompt of the task, where the fields are known."""
    task = trained.task
    if task.kind != "completion":
        return given
    names = _asked(task)
    fields = _fields(given, names)
    return given if fields is None else trained.text_of(fields)


def _classify(trained: Trained, given: str, options: argparse.Namespace) -> None:
    likelihoods = trained.likelihoods(_example(trained, given))
    if options.json:
        print(json.dumps({"text": given, "likelihoods": likelihoods}, ensure_ascii=False))
        return
    ordered = sorted(likelihoods.items(), key=lambda each: -each[1])
    print(", ".join(f"{label} {100 * share:.1f} %" for label, share in ordered))


def _example(trained: Trained, given: str) -> Any:
    if trained.task.is_image:
        from PIL import Image, UnidentifiedImageError

        try:
            return Image.open(given).convert("RGB")
        except (OSError, UnidentifiedImageError):
            raise SettingsError("TEXT", given, "the task is one of images: give the path of a picture") from None
    names = _asked(trained.task)
    fields = _fields(given, names)
    if fields is None:
        remedy = f"the task has several fields: give a JSON object with {', '.join(names)}"
        raise SettingsError("TEXT", given, remedy)
    return fields


def _asked(task: Task) -> tuple[str, ...]:
    """The fields of the task's template."""
    given = set(task.shared_fields if task.scores_tokens else (task.label_field,))
    return tuple(name for name in task.fields if name not in given)


def _fields(given: str, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The fields of a text: those of a JSON object, or the only one; None where it can be neither."""
    if given.lstrip().startswith("{"):
        with contextlib.suppress(json.JSONDecodeError):
            found = json.loads(given)
            if isinstance(found, dict):
                return found
    return {names[0]: given} if len(names) == 1 else None
