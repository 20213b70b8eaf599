"""Tail checkpoints: what trains and the optimizer's state as safetensors, everything else as JSON beside it.

`epoch-0001-round-000050.safetensors` is whole as soon as its `.json` exists, for that is written last; both are
synced before they get their names, so a crash leaves the checkpoints before it and at worst a stray file. A change of
that order would break resuming (runs/resume.py), which believes every JSON whose checksums are right.

In first-order training `epoch-0001-round-000050.client.safetensors` holds the devices' weights, too, in the form of a
snapshot: the store does not keep all the updates that lead there.

All of it is slow and blocks: a run calls it on its compute thread (runs/checkpointer.py), so that the tail stands still
meanwhile; the HTTP API and the commands only read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from torch import Tensor

from hosl_cloud.exceptions import CheckpointDamaged, CheckpointMismatch, CheckpointMissing
from hosl_cloud.rounds.exchange import StatefulTrainer
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.stored_settings import read_known
from hosl_edge.exceptions import SnapshotError
from hosl_edge.history.snapshot import read_snapshot
from hosl_export import tensor_files
from hosl_protocol.exceptions import MalformedSettings
from hosl_protocol.run.manifest import Manifest, sha256_of_file
from hosl_protocol.run.settings import convert
from hosl_protocol.run.tasks import TOKEN_KINDS, TaskKind
from hosl_protocol.weights.state import ClientState
from hosl_protocol.wire.messages import Snapshot

logger = logging.getLogger(__name__)

_PART = ".part"
_WEIGHT = "weights/"


class CheckpointScore(msgspec.Struct, kw_only=True, frozen=True):
    """The score of the held-out data at a checkpoint."""

    loss: float
    """Mean over the scored examples, or tokens of `lm`."""
    correct: int
    scored: int
    examples: int = 0
    """Of devices that sent all they have."""
    of_examples: int = 0
    """Of all devices of the run, those that are away too."""
    held_out: str = ""
    """Digest of whose held-out data was scored."""
    macro_f1: float | None = None
    """Mean of the classes' F1; None where the task has no classes."""


class CheckpointInfo(msgspec.Struct, kw_only=True, frozen=True):
    """The JSON beside a checkpoint."""

    round: int
    """The last round in its weights."""
    epoch: int
    sha256: str
    """Digest of the safetensors file."""
    head_rows: tuple[int, ...]
    """Vocabulary rows that the head keeps, in the order of its weight's rows; empty where the head is whole."""
    metrics: CheckpointScore | None
    """None where the checkpoint was not evaluated."""
    config: RunConfig
    """The run's effective settings."""
    client_sha256: str = ""
    """Digest of the file with the client's state; empty where there is none, and the store's updates lead there."""
    checksum: int = 0
    """CRC-32 of the JSON as it is written, with 0 for this number; 0 in what was written before there was one."""


# Made here, on import: threads that use a type for the first time at once crash msgspec.
_INFO = msgspec.json.Decoder(CheckpointInfo)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path
    """Its safetensors file."""
    info: CheckpointInfo


def save_checkpoint(
    folder: Path,
    round_: int,
    epoch: int,
    trainer: StatefulTrainer,
    config: RunConfig,
    metrics: CheckpointScore | None = None,
    write_client: Callable[[Path], Snapshot] | None = None,
) -> Path:
    """Write the trainer's state at the end of `round_`, with its score; the path of the safetensors file.

    `write_client` writes the client's state to a path, where the checkpoint is to have it. Once this returns, the
    checkpoint survives a power cut. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _file_name(epoch, round_)
    # Without its JSON an older file of this name stops counting before it is replaced.
    _info_path(path).unlink(missing_ok=True)

    part = path.with_name(path.name + _PART)
    shapes = {name: tensor.shape for name, tensor in trainer.state().items()}
    with _whole_or_none(part), contextlib.closing(trainer.gather()) as tensors:
        tensor_files.stream_tensors(part, shapes, tensors)
        _sync(part)
        client = None if write_client is None else write_client(_client_path(path))

    info = CheckpointInfo(
        round=round_,
        epoch=epoch,
        sha256=sha256_of_file(part),
        head_rows=trainer.head_rows,
        metrics=metrics,
        config=config,
        client_sha256="" if client is None else client.sha256,
    )

    # The name, and then the JSON: only with it the checkpoint counts.
    _put(part, path)
    _write_info(path, info)
    return path


def _file_name(epoch: int, round_: int) -> str:
    return f"epoch-{epoch:04}-round-{round_:06}.safetensors"


def record_score(path: Path, metrics: CheckpointScore) -> None:
    """Write down what an existing checkpoint scored. Raises CheckpointMissing and CheckpointDamaged."""
    _write_info(path, msgspec.structs.replace(read_info(path), metrics=metrics))


def _write_info(path: Path, info: CheckpointInfo) -> None:
    target = _info_path(path)
    part = target.with_name(target.name + _PART)
    text = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(info, checksum=0)), indent=1) + b"\n"
    with _whole_or_none(part):
        part.write_bytes(_CHECKSUM.sub(b'"checksum": %d' % zlib.crc32(text), text))
        _sync(part)
    _put(part, target)


_CHECKSUM = re.compile(rb'"checksum": \d+(?=\s*}\s*\Z)')


def _info_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _client_path(path: Path) -> Path:
    return path.with_suffix(".client.safetensors")


@contextlib.contextmanager
def _whole_or_none(part: Path) -> Iterator[None]:
    """Remove a file whose writing failed: on a full disk half of it would take the room that the database needs."""
    try:
        yield
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _put(part: Path, target: Path) -> None:
    """Give a finished file its name, durably."""
    part.replace(target)
    # A name is the folder's data, and survives a power cut once that is synced.
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_info(path: Path) -> CheckpointInfo:
    """Read the JSON of a checkpoint. Raises CheckpointMissing and CheckpointDamaged."""
    where = _info_path(path)
    try:
        data = where.read_bytes()
        info = _decode(data)
    except FileNotFoundError:
        raise CheckpointMissing(path, "there is none of this name") from None
    except OSError as error:
        raise CheckpointDamaged(where, error.strerror or str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, MalformedSettings) as error:
        raise CheckpointDamaged(where, str(error)) from error

    # A file that was damaged, or renamed, may still be JSON of the right form.
    if info.checksum and zlib.crc32(_CHECKSUM.sub(b'"checksum": 0', data)) != info.checksum:
        raise CheckpointDamaged(where, f"its checksum is not {info.checksum}")
    if path.name != _file_name(info.epoch, info.round):
        raise CheckpointDamaged(where, f"it is of epoch {info.epoch}, round {info.round}")
    return info


def _decode(data: bytes) -> CheckpointInfo:
    """Decode the JSON; of settings that another version wrote, what this one knows."""
    try:
        return _INFO.decode(data)
    except msgspec.ValidationError:
        fields = msgspec.json.decode(data)
        settings = read_known(fields.get("config")) if isinstance(fields, dict) else None
        if settings is None or settings.known is None or not settings.problem:
            raise
        info: CheckpointInfo = convert({**fields, "config": msgspec.to_builtins(settings.known)}, CheckpointInfo, "it")
        return info


def verify(path: Path) -> CheckpointInfo:
    """Check the digests of a checkpoint's files. Raises CheckpointMissing and CheckpointDamaged."""
    info = read_info(path)
    files = {path: info.sha256}
    if info.client_sha256:
        files[_client_path(path)] = info.client_sha256
    for file, expected in files.items():
        if not file.is_file():
            raise CheckpointMissing(file, "the file is gone")
        try:
            digest = sha256_of_file(file)
        except OSError as error:
            raise CheckpointDamaged(file, error.strerror or str(error)) from error
        if digest != expected:
            raise CheckpointDamaged(file, f"SHA-256 is {digest}, expected {expected}")
    return info


def read_client(path: Path, manifest: Manifest) -> ClientState | None:
    """Read the client's state of a checkpoint, as a memory map; None where it has none.

    Raises CheckpointMissing and CheckpointDamaged.
    """
    info = read_info(path)
    if not info.client_sha256:
        return None
    try:
        return read_snapshot(_client_path(path), info.client_sha256, manifest)[1]
    except SnapshotError as error:
        raise CheckpointDamaged(_client_path(path), error.problem) from error


def quarantine(path: Path) -> None:
    """Let a checkpoint count no more, its files kept under another name."""
    # The JSON first, as ever: without it the other file counts for nothing.
    for each in (_info_path(path), path, _client_path(path)):
        if each.exists():
            each.replace(each.with_name(each.name + ".aside"))


def read_tensors(path: Path) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Read all tensors of a checkpoint, as memory maps, after its digest was checked. Raises CheckpointMissing and
    CheckpointDamaged."""
    info = verify(path)
    return info, tensor_files.read_tensors(path)


def read_weights(path: Path) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Read what trained, by plain name, without the optimizer's state. Raises as `read_tensors` does."""
    info, tensors = read_tensors(path)
    return info, {name.removeprefix(_WEIGHT): value for name, value in tensors.items() if name.startswith(_WEIGHT)}


def load_checkpoint(path: Path, trainer: StatefulTrainer) -> CheckpointInfo:
    """Put a checkpoint into the trainer, which then continues with the same bits.

    Raises CheckpointMissing, CheckpointDamaged, and CheckpointMismatch with the trainer as it was.
    """
    info, tensors = read_tensors(path)

    stored = {name.removeprefix(_WEIGHT): value.shape for name, value in tensors.items() if name.startswith(_WEIGHT)}
    expected = {name: value.shape for name, value in trainer.parameters.items()}
    if stored != expected:
        name = min(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
        reason = f"{name} is {_shape(stored.get(name))}, this run's tail trains {_shape(expected.get(name))}"
        raise CheckpointMismatch(path, reason)

    trainer.load_state(tensors)
    return info


def _shape(shape: Iterable[int] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """List a folder's checkpoints by epoch and round, without reading weights; damaged JSON is skipped and logged."""
    found = []
    for info_path in sorted(folder.glob("epoch-*-round-*.json")):
        path = info_path.with_suffix(".safetensors")
        try:
            found.append(Checkpoint(path, read_info(path)))
        except CheckpointDamaged as error:
            logger.warning("%s", error)
    return sorted(found, key=lambda checkpoint: (checkpoint.info.epoch, checkpoint.info.round))


def find_checkpoint(folder: Path, which: Literal["best", "last"] | int = "best") -> Checkpoint:
    """Find the last checkpoint, the best one by evaluation, or the newest of a round. Raises CheckpointMissing.

    Where none was evaluated `best` is the last, too.
    """
    checkpoints = list_checkpoints(folder)
    if isinstance(which, int):
        checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint.info.round == which]
    if not checkpoints:
        raise CheckpointMissing(
            folder,
            "the run has made none yet; hosl-cloud run show says how far it is"
            if isinstance(which, str)
            else f"it holds none of round {which}",
        )
    best = best_checkpoint(checkpoints) if which == "best" else None
    return best or checkpoints[-1]


def best_checkpoint(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """Choose the best of a run's checkpoints by evaluation; None where none was evaluated."""
    evaluated = {each.path: each for each in checkpoints if each.info.metrics is not None}
    comparable = comparable_scores([(path, each.info.metrics) for path, each in evaluated.items() if each.info.metrics])
    if not comparable:
        return None
    kind = checkpoints[-1].info.config.task.kind
    path, _ = max(comparable, key=lambda entry: score_key(entry[1], kind))
    return evaluated[path]


T = TypeVar("T")


def comparable_scores(evaluations: Sequence[tuple[T, CheckpointScore]]) -> list[tuple[T, CheckpointScore]]:
    """Choose, of evaluations, oldest first, those that may be compared: of the same held-out data, and of the most.

    Scores of other examples say nothing about each other. Where as much of other data was scored later, because a
    device's has changed, the newest counts.
    """
    most = max((metrics.examples for _, metrics in evaluations), default=0)
    newest = next((metrics for _, metrics in reversed(evaluations) if metrics.examples == most), None)
    if newest is None:
        return []

    # The newest of the most: of equal amounts of different data the one that devices hold now.
    same = (newest.examples, newest.held_out)
    return [entry for entry in evaluations if (entry[1].examples, entry[1].held_out) == same]


def score_key(metrics: CheckpointScore, kind: TaskKind) -> tuple[float, float]:
    """Make what scores are compared by, larger is better: accuracy, then lower loss; of tokens the loss alone."""
    return (0.0 if kind in TOKEN_KINDS else metrics.correct / max(metrics.scored, 1), -metrics.loss)


def prune_checkpoints(folder: Path, keep_last: int = 2) -> list[Path]:
    """Delete all but the best checkpoint and the last `keep_last` (1 or more), and what a crash left; the deleted."""
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return []

    kept = {find_checkpoint(folder, "best").path, *(each.path for each in checkpoints[-max(keep_last, 1) :])}
    deleted = [each.path for each in checkpoints if each.path not in kept]
    for path in deleted:
        # The JSON first: a checkpoint that loses its weights first would look damaged.
        _info_path(path).unlink()
        path.unlink(missing_ok=True)
        _client_path(path).unlink(missing_ok=True)

    for stray in folder.glob(f"epoch-*{_PART}"):
        stray.unlink()
    return deleted
