"""What every rank but the first does: obey rank 0 until it leaves."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from pathlib import Path

from hosl_cloud.exceptions import BatchError, NotFiniteError, RoundSpoiltError
from hosl_cloud.ranks import group as words
from hosl_cloud.ranks.group import Group
from hosl_cloud.ranks.trainers import Passing, RankTrainer, Result, digest_of, load_part
from hosl_cloud.tail.trainer import StepResult
from hosl_protocol.exceptions import ExitCode, HoslError
from hosl_protocol.run.manifest import BundleError, check_files, load_manifest


def follow(group: Group) -> int:
    """Obey rank 0 until it leaves; the exit code. What goes wrong but by our own errors ends this process.

    The launcher passes signals on to every rank: here they are left to rank 0, which ends the round first.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    tails: dict[int, RankTrainer] = {}
    try:
        while not isinstance(command := group.hear(), words.Leave):
            _obey(group, tails, command)
        group.part()
    except Exception as error:
        group.lose(error)
    return int(ExitCode.OK)


def _obey(group: Group, tails: dict[int, RankTrainer], command: words.Command) -> None:
    if isinstance(command, words.Load):
        group.reply(_load(group, tails, command))
    elif isinstance(command, words.Train | words.Evaluate):
        trainer = tails[command.tail]
        batches = [group.receive_batch(part, trainer.width) for part in command.shares[group.rank]]
        _answer(group, trainer.work(batches, command))
    elif isinstance(command, words.Step):
        with contextlib.suppress(RoundSpoiltError):  # rank 0 has it, too
            tails[command.tail].step(command.round, command.total_weight)
    elif isinstance(command, words.Discard):
        tails[command.tail].discard()
    elif isinstance(command, words.Gather):
        for _ in tails[command.tail].gather():
            pass
    elif isinstance(command, words.Restore):
        tails[command.tail].load_state(Passing(command.entries, None))
    elif isinstance(command, words.Forget):
        tails.pop(command.tail, None)
    else:
        group.is_true_everywhere(True)


def _load(group: Group, tails: dict[int, RankTrainer], command: words.Load) -> words.Reply:
    bundle = Path(command.bundle)
    try:
        manifest = load_manifest(bundle)
        if digest_of(manifest) != command.digest:
            raise BundleError(f"{bundle} is another bundle than rank 0 has at this path: copy that one here")
        if group.local_rank == 0:  # once on each machine; rank 0 has checked its own
            check_files(bundle, manifest)
        tails[command.tail] = load_part(group, bundle, manifest, command.config)
    except HoslError as error:
        return words.Reply(error=str(error), exit_code=int(error.exit_code))
    except Exception as error:
        return words.Reply(error=f"{type(error).__name__}: {error}", exit_code=int(ExitCode.INTERNAL))
    return words.Reply()


def _answer(group: Group, results: Sequence[Result]) -> None:
    """Say what came of each batch, and then send λ of those that have one."""
    group.reply(words.Reply(outcomes=tuple(map(_outcome, results))))
    for result in results:
        if isinstance(result, StepResult) and result.cut_gradient_TD is not None:
            group.send_array(result.cut_gradient_TD)


def _outcome(result: Result) -> words.Outcome:
    if isinstance(result, NotFiniteError):
        error = "spoilt" if isinstance(result, RoundSpoiltError) else "not-finite"
        return words.Outcome(error=error, what=result.what, value=repr(result.value))
    assert not isinstance(result, BatchError)  # rank 0 has checked it
    return words.Outcome(value=repr(result.loss), correct=result.correct, scored=result.scored)
