"""The journal: what is written is read, and nothing after a torn or damaged record is believed."""

from __future__ import annotations

import contextlib
import logging
import resource
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hosl_edge.history.journal import JournalHeader, create_journal, journal_path, open_journal
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.tasks import Task
from hosl_protocol.run.updates import UpdateShape
from hosl_protocol.weights.estimates import UpdateRecord

HEADER = JournalHeader(
    run="r",
    epoch=0,
    shard_digest="s",
    data_digest="d",
    settings=RunSettings(task=Task(name="lm", kind="lm", template="{text}")),
    width=8,
)


def updates(count: int) -> list[UpdateRecord]:
    return [UpdateRecord(n, np.array([n, -n], np.float32), 0.1 * n) for n in range(1, count + 1)]


def write(folder: Path, count: int) -> None:
    journal = create_journal(folder, HEADER)
    journal.append(updates(count))
    journal.close()


def read(folder: Path) -> list[int]:
    found = open_journal(folder)
    assert found is not None
    rounds = [update.round for update in found.updates()]
    found.close()
    return rounds


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    write(tmp_path, 3)
    journal = open_journal(tmp_path)
    assert journal is not None
    records = list(journal.updates())
    journal.close()
    assert journal.header == HEADER
    for got, expected in zip(records, updates(3), strict=True):
        assert (got.round, got.learning_rate) == (expected.round, expected.learning_rate)
        assert got.coefficients.tobytes() == expected.coefficients.tobytes()


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_tail_is_cut_off_and_appending_goes_on(tmp_path: Path, cut: int) -> None:
    write(tmp_path, 3)
    path = journal_path(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    journal = open_journal(tmp_path)
    assert journal is not None
    assert [update.round for update in journal.updates()] == [1, 2]
    journal.append(updates(3)[2:])
    journal.close()
    assert read(tmp_path) == [1, 2, 3]


def test_nothing_after_a_damaged_record_is_believed(tmp_path: Path) -> None:
    write(tmp_path, 3)
    path = journal_path(tmp_path)
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(bytes(data))
    assert read(tmp_path) == [1]


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """What the kernel refuses beyond that, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_refuses_is_written_once_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = create_journal(tmp_path, HEADER)
    full = journal.path.stat().st_size + 40
    with no_file_larger_than(full):
        for update in updates(3):
            journal.append([update])
        assert journal.path.stat().st_size == full, "the second is torn"
        assert [update.round for update in journal.updates()] == [1, 2, 3]
    assert caplog.text.count("cannot be written") == 1
    journal.append(updates(4)[3:])
    journal.close()
    assert read(tmp_path) == [1, 2, 3, 4]


def test_a_device_ends_though_its_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = create_journal(tmp_path, HEADER)
    with no_file_larger_than(journal.path.stat().st_size):
        journal.append(updates(1))
        journal.close()
    assert read(tmp_path) == []
    assert "comes again from the cloud" in caplog.text


GRADIENTS = msgspec.structs.replace(
    HEADER,
    settings=RunSettings(task=Task(name="lm", kind="lm", template="{text}"), algorithm="first-order"),
    update=UpdateShape(coefficients=90, codes=46_080),
)
"""Of 368,640 numbers, one bit each."""


def gradients(first: int, last: int) -> list[UpdateRecord]:
    codes = np.arange(46_080, dtype=np.uint16).astype(np.uint8)
    return [UpdateRecord(n, np.full(90, n, np.float32), 0.1 * n, codes) for n in range(first, last + 1)]


def test_a_journal_of_gradients_takes_the_first_four_megabytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    journal = create_journal(tmp_path, GRADIENTS)
    for first in range(1, 1001, 10):
        journal.append(gradients(first, first + 9))
    held = journal.last_round
    journal.close()
    assert 3_900_000 < journal.path.stat().st_size < 4_010_000
    (record,) = caplog.records
    assert f"is full: a start goes on at round {held}, and gets the rest from the cloud" in record.message

    again = open_journal(tmp_path)
    assert again is not None
    again.append(gradients(held + 1, held + 5))
    records = list(again.updates())
    again.close()
    assert (again.last_round, [update.round for update in records]) == (held, list(range(1, held + 1)))
    for got, expected in zip(records, gradients(1, held), strict=True):
        assert got.coefficients.tobytes() == expected.coefficients.tobytes()
        assert got.codes.tobytes() == expected.codes.tobytes()


def test_a_journal_of_directions_takes_as_many_rounds_as_there_are(tmp_path: Path) -> None:
    header = msgspec.structs.replace(HEADER, settings=msgspec.structs.replace(HEADER.settings, directions=4096))
    journal = create_journal(tmp_path, header)
    journal.append([UpdateRecord(n, np.zeros(4096, np.float32), 0.0) for n in range(1, 301)])
    journal.close()
    assert journal.path.stat().st_size > 4_900_000
    assert read(tmp_path) == list(range(1, 301))


def test_a_journal_without_a_readable_header_is_none(tmp_path: Path) -> None:
    assert open_journal(tmp_path) is None
    write(tmp_path, 1)
    path = journal_path(tmp_path)
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(bytes(data))
    assert open_journal(tmp_path) is None


def test_a_new_journal_takes_the_place_of_the_old(tmp_path: Path) -> None:
    write(tmp_path, 3)
    write(tmp_path, 1)
    assert read(tmp_path) == [1]


def test_a_journal_written_before_there_were_snapshots_begins_at_the_shard(tmp_path: Path) -> None:
    fields = msgspec.to_builtins(HEADER)
    del fields["base_round"], fields["base_sha256"]
    text = msgspec.json.encode(fields)
    journal_path(tmp_path).write_bytes(struct.pack("<II", len(text), zlib.crc32(text)) + text)
    journal = open_journal(tmp_path)
    assert journal is not None
    assert (journal.header, list(journal.updates())) == (HEADER, [])
    journal.close()
    assert (journal.header.base_round, journal.header.base_sha256) == (0, "")


def test_a_journal_belongs_to_its_run_wherever_it_begins() -> None:
    rebased = msgspec.structs.replace(HEADER, base_round=7, base_sha256="0" * 64)
    assert rebased.belongs_with(HEADER)
    assert HEADER.belongs_with(rebased)
    assert rebased.belongs_with(msgspec.structs.replace(HEADER, epoch=1))
    assert not rebased.belongs_with(msgspec.structs.replace(HEADER, data_digest="other"))


def test_rounds_are_read_from_any_one_on_also_what_no_disk_has_taken(tmp_path: Path) -> None:
    header = msgspec.structs.replace(HEADER, base_round=100, base_sha256="0" * 64)
    journal = create_journal(tmp_path, header)
    records = [UpdateRecord(100 + update.round, update.coefficients, 0.1) for update in updates(9)]
    with no_file_larger_than(journal.path.stat().st_size + 150):
        journal.append(records)
        for first, last in ((0, None), (101, 109), (103, 104), (106, 106), (109, 200), (110, None)):
            expected = [number for number in range(101, 110) if first <= number <= (last or 999)]
            assert [update.round for update in journal.updates(first, last)] == expected
    journal.close()


def test_a_long_journal_is_read_in_little_memory(tmp_path: Path) -> None:
    write(tmp_path, 20_000)
    path = journal_path(tmp_path)
    path.write_bytes(path.read_bytes() + bytes(100_000))
    tracemalloc.start()
    found = open_journal(tmp_path)
    assert found is not None
    assert sum(1 for _ in found.updates()) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found.close()
    assert path.stat().st_size > 3 * peak


@pytest.mark.parametrize("length", [0, 2**24 + 1, 2**32 - 1])
def test_a_record_of_an_absurd_length_is_the_end(tmp_path: Path, length: int) -> None:
    write(tmp_path, 3)
    with journal_path(tmp_path).open("ab") as file:
        file.write(struct.pack("<II", length, 0) + b"x" * 100)
    assert read(tmp_path) == [1, 2, 3]
