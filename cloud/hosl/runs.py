"""A run: an iterable of its rounds, and what it came to."""

from __future__ import annotations

import contextlib
import html
import itertools
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from hosl.bundles import Bundle
from hosl.extras import needs
from hosl.leading import Leader, elsewhere
from hosl.rounds import Evaluation, Round
from hosl.trained import Trained, load_trained
from hosl_cloud.settings import RunConfig
from hosl_protocol.exceptions import HoslError

if TYPE_CHECKING:
    from typing_extensions import Self

LEAVING_S = 30.0
"""Longest time for a run to end when nobody holds it any more."""


class Run:
    """A run that goes on in a thread of its own.

    To go through it gives its rounds. A simulation waits for whoever goes through it: the next round is made when it is
    asked for, and the run is stopped when the loop is left. After the loop, or without one, `merge`, `model` and `wait`
    give the result; without a loop they first train to the end.
    """

    _ends_with_loop = True

    def __init__(self, leader: Leader, bundle: Bundle, config: RunConfig, data_dir: Path, folder: Path) -> None:
        """`folder` is a temporary one, and goes with the run."""
        self.bundle = bundle
        self.settings = config
        """All settings of the run, with their defaults."""
        self.data_dir = data_dir
        """The folder with its database and checkpoints, for `hosl-cloud merge` and the other commands."""
        self._leader, self._folder = leader, folder
        self._is_followed = False
        self._numbers = itertools.count(1)
        self._leave = weakref.finalize(self, _leave, leader, folder)

    @property
    def id(self) -> str:
        """The run's name in its data folder."""
        return self._leader.run

    @property
    def state(self) -> str:
        """`running`, `completed`, `stopped-early` (by `evaluation.patience`), `stopped` or `failed`."""
        if not self._leader.is_over:
            return "running"
        return "failed" if self._leader.error is not None else self._leader.ending or "stopped"

    @property
    def rounds(self) -> list[Round]:
        """The rounds until now."""
        return list(self._leader.rounds)

    @property
    def evaluations(self) -> list[Evaluation]:
        """The scores of the held-out data until now; the first is that before the first round."""
        return list(self._leader.evaluations)

    def __iter__(self) -> Iterator[Round]:
        """Go through all rounds, those that are over and those that come. Raises what ends the run."""
        self._is_followed = True
        try:
            place = 0
            while (finished := self._leader.next_round(place)) is not None:
                yield finished
                place += 1
        except GeneratorExit:  # the loop was left
            if self._ends_with_loop:
                self.stop()
            raise
        except KeyboardInterrupt:
            self.stop()
            raise

    def wait(self) -> Self:
        """Train to the end, or wait for it. Raises what ends the run; Ctrl-C stops it."""
        self._is_followed = True
        self._leader.allow(None)
        try:
            self._leader.wait()
        except KeyboardInterrupt:
            self.stop()
            raise
        self._leader.check()
        return self

    def call_back(self, callback: Callable[[Round], object]) -> None:
        """Train to the end, and call back with each round; an error, there or in the run, closes the run."""
        try:
            for each in self:
                callback(each)
        except BaseException:
            self.close()
            raise

    def stop(self) -> None:
        """End the run after the round under way, with a checkpoint; nothing where it is over."""
        self._leader.stop()

    def close(self) -> None:
        """Stop the run, and remove what is temporary of it."""
        self.stop()
        self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def merge(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        adapter: str | os.PathLike[str] | None = None,
        gguf: str | os.PathLike[str] | None = None,
        gguf_type: Literal["f16", "q8_0"] = "f16",
        onnx: str | os.PathLike[str] | None = None,
        checkpoint: Literal["best", "last"] = "best",
    ) -> Path:
        """Join the halves of the best checkpoint, by evaluation, or the last into a folder that transformers loads.

        Without `out` the folder is gone with the run. `adapter` names a folder for a PEFT adapter besides, where both
        halves trained LoRA, `gguf` a file for llama.cpp with matrices of `gguf_type`, and `onnx` a folder for ONNX
        Runtime. Raises SettingsError where one exists or a format has no place for the model, CheckpointError,
        AdapterError and ExportError.
        """
        if not self._is_followed:
            self.wait()
        if not self._leave.alive and out is None:
            raise HoslError("the run is closed: give merge a folder, out=")

        with needs("Run.merge", "cloud"):
            from hosl_cloud.storage.data_folder import DATABASE, run_folder
            from hosl_cloud.storage.store import Store
            from hosl_cloud.tail.merge import Targets
            from hosl_cloud.tail.stored_merge import merge_stored

        folder = self._folder / f"merged-{next(self._numbers)}" if out is None else Path(out)

        targets = Targets(
            out=folder,
            adapter=None if adapter is None else Path(adapter),
            gguf=None if gguf is None else Path(gguf),
            gguf_type=gguf_type,
            onnx=None if onnx is None else Path(onnx),
        )

        def merge() -> None:
            with contextlib.closing(Store(self.data_dir / DATABASE, reads_only=True)) as store:
                merge_stored(
                    store,
                    self.id,
                    run_folder(self.data_dir, self.id),
                    targets,
                    which=checkpoint,
                    bundle=self.bundle.path,
                )

        elsewhere(merge)
        return folder

    def model(self, *, checkpoint: Literal["best", "last"] = "best") -> Trained:
        """Load what `merge` makes: the model, in eval mode, with its tokenizer, and a way to ask it."""
        folder = self.merge(checkpoint=checkpoint)
        try:
            return load_trained(folder, self.settings.task)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def to_frame(self) -> Any:
        """Make a pandas frame of the rounds: a row for each, round 0 with the score before the first."""
        import pandas

        scores = {evaluation.round: evaluation for evaluation in self.evaluations}
        rounds = {each.number: each for each in self.rounds}
        rows = [
            {
                "round": number,
                "loss": each.loss if (each := rounds.get(number)) else None,
                "seconds": each.seconds if each else 0.0,
                "bytes": each.bytes if each else 0,
                "eval_loss": score.loss if (score := scores.get(number)) else None,
                "accuracy": score.accuracy if score else None,
            }
            for number in sorted(rounds.keys() | scores.keys())
        ]
        return pandas.DataFrame(rows)

    def __repr__(self) -> str:
        return f"<hosl.Run {self.id}: {self._status()}>"

    def _status(self) -> str:
        made = f"{len(self.rounds)} of {self.settings.rounds} rounds"
        waits = f", {self._leader.waits}" if self._leader.waits else ""
        scored = f"; {self.evaluations[-1]}" if self.evaluations else ""
        return f"{self.state}, {made}{waits}{scored}"

    def _repr_html_(self) -> str:
        """A table of the scored rounds, for notebooks."""
        losses = {each.number: f"{each.loss:.4f}" for each in self.rounds}
        rows = [
            f"<tr><td>{each.round}</td><td>{losses.get(each.round, '')}</td><td>{each.loss:.4f}</td>"
            f"<td>{100 * each.accuracy:.1f} % ({each.right} of {each.scored} right)</td></tr>"
            for each in self.evaluations
        ]
        head = "<tr><th>round</th><th>training loss</th><th>held-out loss</th><th>accuracy</th></tr>"
        table = f"<table>{head}{''.join(rows)}</table>" if rows else ""
        return f"<p>{html.escape(repr(self))}</p>{table}"


def _leave(leader: Leader, folder: Path) -> None:
    """End what nobody holds any more."""
    leader.stop(LEAVING_S)
    shutil.rmtree(folder, ignore_errors=True)
