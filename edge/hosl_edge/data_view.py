"""What a run would read of a file: how many examples, of which labels, how long, what is cut, and some as it sees them.

Which run: the one that waits for this device, as the service tells it; or a bundle's folder and a shipped task.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from hosl_edge.connection.fetch import fetch_bundle
from hosl_edge.connection.offer import fetch_offer
from hosl_edge.connection.token import device_name, read_token
from hosl_edge.connection.trust import connect_securely
from hosl_edge.data.images import load_images
from hosl_edge.data.records import check_readable, digest_of_data
from hosl_edge.data.texts import Texts, opened_tokenizer, read_texts
from hosl_edge.exceptions import NoRun
from hosl_edge.settings import EdgeSettings
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.program.plain import plain
from hosl_protocol.run.manifest import (
    MANIFEST,
    SHARD_CHAT,
    SHARD_TOKENIZER,
    BundleError,
    ImageEntry,
    Manifest,
    decode_manifest,
)
from hosl_protocol.run.tasks import Task, load_preset

_WIDTH = 100
_MOST_LABELS = 12
"""Classes in a line for people; JSON has all."""


@dataclass(frozen=True)
class Reading:
    """What decides how a file is read."""

    shard: Path
    """Folder with the tokenizer."""
    manifest: Manifest
    task: Task
    max_length: int


@dataclass(frozen=True)
class ExampleView:
    """One example as the model has it."""

    file: str
    line: int
    """From 1."""
    label: str | None
    parts: list[tuple[str, bool]]
    """Its text, special tokens included, in parts; whether each is learned."""
    ids: list[int] | None
    """Token ids, where they were asked for."""


@dataclass(frozen=True)
class DataView:
    """What a run would read of a file."""

    file: str
    digest: str
    task: str
    kind: str
    max_length: int
    examples: int
    labels: dict[str, int] | None
    """Examples of each class; None where tokens are the labels."""
    tokens: dict[str, int] | None
    """`median`, `most` (of 95 in 100), `longest` and `sum`, special tokens included; None for images."""
    learned: int | None
    """Tokens that are labels; None for classes."""
    cut: int
    """Examples that are longer than `max_length`."""
    shown: list[ExampleView]


def reading_of_run(settings: EdgeSettings) -> Reading:
    """Ask the service how the run that waits for this device reads data, and fetch its tokenizer.

    Raises NoRun where none waits, and as `fetch_bundle` does.
    """
    token = read_token(Path(settings.token_file))
    cloud = connect_securely(settings.server, token, Path(settings.cache_dir))
    offer = fetch_offer(cloud, device_name(settings, token))
    if offer is None or offer.task is None:
        raise NoRun(None)
    files = (SHARD_TOKENIZER, SHARD_CHAT)
    folder, manifest = fetch_bundle(cloud, Path(settings.cache_dir), lambda done, size: None, files=files)
    return Reading(folder, manifest, offer.task, offer.max_length or manifest.max_length)


def reading_of_shard(shard: Path, task: str, max_length: int | None) -> Reading:
    """Take a bundle's folder and the name of a shipped task. Raises SettingsError and BundleError."""
    path = shard / MANIFEST
    try:
        manifest = decode_manifest(path.read_bytes(), str(path))
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}): name the folder of a bundle") from error
    if max_length is not None and not 1 <= max_length <= manifest.max_length:
        raise SettingsError("max_length", max_length, f"use 1 to {manifest.max_length}, which the bundle was made for")
    return Reading(shard, manifest, msgspec.convert(load_preset(task), Task), max_length or manifest.max_length)


def view_data(path: Path, reading: Reading, examples: int, *, with_ids: bool, skip_broken: bool = False) -> DataView:
    """Read a file as the run would. Raises DataError, BundleError and UnservedError."""
    check_readable(path)
    task, manifest = reading.task, reading.manifest
    if task.is_image != (manifest.image is not None):
        kinds = ("texts", "images") if task.is_image else ("images", "texts")
        raise SettingsError("task", task.name, f"the bundle's model takes {kinds[0]}, and the task has {kinds[1]}")
    if manifest.image is not None:
        return _view_images(path, reading, manifest.image, skip_broken=skip_broken)

    with opened_tokenizer(reading.shard, task) as (tokenizer, text_form):
        texts = read_texts(path, task, tokenizer, reading.max_length, manifest, text_form)
        count = min(examples, len(texts.dataset))
        shown = [_example(texts, place, reading, tokenizer, with_ids=with_ids) for place in range(count)]
    dataset = texts.dataset
    learned = None
    if dataset.labels is None:
        learned = dataset.ids.size if dataset.is_answer is None else int(dataset.is_answer.sum())
    return DataView(
        **_facts(path, reading),
        examples=len(dataset),
        labels=_counted(task, dataset.labels),
        tokens=_lengths(np.diff(dataset.offsets)),
        learned=learned,
        cut=len(texts.cut),
        shown=shown,
    )


def _view_images(path: Path, reading: Reading, image: ImageEntry, *, skip_broken: bool) -> DataView:
    images = load_images(path, reading.task, image, reading.manifest.max_length, skip_broken=skip_broken)
    return DataView(
        **_facts(path, reading),
        examples=len(images),
        labels=_counted(reading.task, images.labels),
        tokens=None,
        learned=None,
        cut=0,
        shown=[],
    )


def _facts(path: Path, reading: Reading) -> dict[str, Any]:
    task = reading.task
    facts = {"task": task.name, "kind": task.kind, "max_length": reading.max_length}
    return {"file": str(path), "digest": digest_of_data(path), **facts}


def _counted(task: Task, labels: npt.NDArray[np.int32] | None) -> dict[str, int] | None:
    """Count the examples of each class; those of an unnamed class go by its number."""
    if labels is None:
        return None
    counts = Counter(labels.tolist())
    names = dict(enumerate(task.labels)) or {number: str(number) for number in sorted(counts)}
    return {name: counts[number] for number, name in names.items()}


def _lengths(lengths: npt.NDArray[np.int64]) -> dict[str, int]:
    median, most = np.percentile(lengths, (50, 95), method="higher")
    return {"median": int(median), "most": int(most), "longest": int(lengths.max()), "sum": int(lengths.sum())}


def _example(texts: Texts, index: int, reading: Reading, tokenizer: Tokenizer, *, with_ids: bool) -> ExampleView:
    dataset, task = texts.dataset, reading.task
    # The places of a soft prompt hold no text.
    span = slice(int(dataset.offsets[index]) + reading.manifest.prompt_tokens, int(dataset.offsets[index + 1]))
    ids = dataset.ids[span].tolist()
    flags = [task.scores_tokens] * len(ids) if dataset.is_answer is None else dataset.is_answer[span].tolist()

    # Each part as the end of all that is before it: by itself a tokenizer may leave out its first space.
    parts, text, start = [], "", 0
    for flag, group in groupby(flags):
        start += len(list(group))
        whole: str = tokenizer.decode(ids[:start], skip_special_tokens=False)
        parts.append((whole[len(text) :], flag))
        text = whole

    place = texts.places[index]
    label = None if dataset.labels is None else task.labels[dataset.labels[index]]
    return ExampleView(place.path.name, place.line, label, parts, ids if with_ids else None)


def lines(view: DataView, name: str) -> Iterator[str]:
    """Say it to people, a line each."""
    yield f"{name}: {view.examples:,} examples for the task {view.task} ({view.kind})"
    if view.labels is not None:
        labels = [plain(f"{name}: {count:,}") for name, count in view.labels.items()]
        further = f"; and {len(labels) - _MOST_LABELS} more classes" if len(labels) > _MOST_LABELS else ""
        yield f"{'labels':10}{'; '.join(labels[:_MOST_LABELS])}{further}"
    if view.tokens is not None:
        half, most, longest = (view.tokens[name] for name in ("median", "most", "longest"))
        yield f"{'tokens':10}half have at most {half}, 95 % at most {most}; the longest has {longest}"
        cut = f"{view.cut:,} of {view.examples:,} are longer and lose the rest" if view.cut else "none is longer"
        yield f"{'cut':10}to {view.max_length} tokens: {cut}"
    if view.learned is not None and view.tokens is not None:
        yield f"{'learned':10}{view.learned:,} of {view.tokens['sum']:,} tokens"
    yield f"{'digest':10}{view.digest}"

    for number, example in enumerate(view.shown, 1):
        label = f", {example.label}" if example.label is not None else ""
        yield ""
        yield f"example {number}: {example.file}, line {example.line}{label}"
        for text, is_learned in example.parts:
            yield from _paragraph("learned" if is_learned else "read", text)
        if example.ids is not None:
            yield from _paragraph("ids", " ".join(map(str, example.ids)))


def _paragraph(head: str, text: str) -> Iterator[str]:
    rows = [row for line in text.split("\n") for row in _wrapped(plain(line))]
    yield from (f"  {head if not place else '':10}{row}".rstrip() for place, row in enumerate(rows))


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, _WIDTH, drop_whitespace=False, break_on_hyphens=False) or [""]
