"""What every rank but the first does: obey rank 0 until it leaves.

All of it is one thread, the process's main one. Each command is answered with the collective calls that rank 0 makes in
ranks/leader.py for the same command, in the same order: the two files are read side by side.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from pathlib import Path

from hosl_cloud.exceptions import BatchError, NotFiniteError, RoundSpoiltError
from hosl_cloud.ranks import commands
from hosl_cloud.ranks.group import Group
from hosl_cloud.ranks.trainers import BroadcastTensors, RankTrainer, Result, digest_of, load_part
from hosl_cloud.tail.trainer import EvalScore, StepResult
from hosl_protocol.exceptions import ExitCode, HoslError
from hosl_protocol.run.manifest import BundleError, check_files, load_manifest


def follow(group: Group) -> int:
    """Obey rank 0 until it leaves; the exit code. Any error ends this process at once.

    The launcher passes signals on to every rank: here they are left to rank 0, which ends the round first.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    tails: dict[int, RankTrainer] = {}
    try:
        while not isinstance(command := group.receive_command(), commands.ShutDown):
            _obey(group, tails, command)
        group.disband()
    except Exception as error:
        group.abort(error)
    return int(ExitCode.OK)


def _obey(group: Group, tails: dict[int, RankTrainer], command: commands.Command) -> None:
    if isinstance(command, commands.Load):
        group.send_reply(_load(group, tails, command))
    elif isinstance(command, commands.Train | commands.Evaluate):
        trainer = tails[command.tail]
        # All of them before the first is computed: rank 0 sends while it computes its own.
        batches = [group.receive_batch(part, trainer.width) for part in command.shares[group.rank]]
        _answer(group, trainer.work(batches, command))
    elif isinstance(command, commands.Step):
        with contextlib.suppress(RoundSpoiltError):  # rank 0 has it, too
            tails[command.tail].step(command.round, command.total_weight)
    elif isinstance(command, commands.Discard):
        tails[command.tail].discard()
    elif isinstance(command, commands.Gather):
        for _ in tails[command.tail].gather():  # each step is a collective call; rank 0 writes the tensors
            pass
    elif isinstance(command, commands.Restore):
        tails[command.tail].load_state(BroadcastTensors(command.entries, None))
    elif isinstance(command, commands.Free):
        tails.pop(command.tail, None)
    else:  # a heartbeat
        group.is_true_everywhere(True)


def _load(group: Group, tails: dict[int, RankTrainer], command: commands.Load) -> commands.Reply:
    """Load a tail; why that fails goes to rank 0, which raises it there."""
    bundle = Path(command.bundle)
    try:
        manifest = load_manifest(bundle)
        if digest_of(manifest) != command.digest:
            raise BundleError(f"{bundle} is another bundle than rank 0 has at this path: copy that one here")
        if group.local_rank == 0:  # once on each machine; rank 0 has checked its own
            check_files(bundle, manifest)

        tails[command.tail] = load_part(group, bundle, manifest, command.config)
    except HoslError as error:
        return commands.Reply(error=str(error), exit_code=int(error.exit_code))
    except Exception as error:
        return commands.Reply(error=f"{type(error).__name__}: {error}", exit_code=int(ExitCode.INTERNAL))
    return commands.Reply()


def _answer(group: Group, results: Sequence[Result]) -> None:
    """Send rank 0 the outcome of each batch, and then λ [T, D] of those that have one."""
    group.send_reply(commands.Reply(outcomes=tuple(map(_outcome, results))))
    for result in results:
        if isinstance(result, StepResult) and result.cut_gradient_TD is not None:
            group.send_array(result.cut_gradient_TD)


def _outcome(result: Result) -> commands.BatchOutcome:
    if isinstance(result, NotFiniteError):
        error = "spoilt" if isinstance(result, RoundSpoiltError) else "not-finite"
        return commands.BatchOutcome(error=error, what=result.what, value=repr(result.value))
    assert not isinstance(result, BatchError)  # rank 0 has checked it
    predicted = result.predicted_B if isinstance(result, EvalScore) else None
    return commands.BatchOutcome(
        value=repr(result.loss),
        correct=result.correct,
        scored=result.scored,
        predicted=None if predicted is None else tuple(predicted.tolist()),
    )
