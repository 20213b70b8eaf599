"""The store: what a device is sent is read back bit for bit, after a crash too, and from any thread."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hosl_cloud.exceptions import RunNotFound, StoreError
from hosl_cloud.settings import RunConfig, TailSettings
from hosl_cloud.storage.class_counts import ClassCounts
from hosl_cloud.storage.records import DeviceRow, Evaluation, NewEvent
from hosl_cloud.storage.schema import MIGRATIONS, SCHEMA_VERSION
from hosl_cloud.storage.store import Store
from hosl_protocol.run.tasks import Task
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.messages import Report

CONFIG = RunConfig(
    task=Task(name="text", kind="lm", template="{text}"), seed=7, tail=TailSettings(train="head", learning_rate=0.1)
)
AWKWARD = np.array([0.1, -0.0, 1e-45, -3.4028235e38, 1 / 3], np.float32)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "hosl.sqlite")
    store.create_run("run-1", tmp_path / "bundle", "5" * 64, CONFIG)
    yield store
    store.close()


def test_a_store_that_reads_only_writes_nothing(tmp_path: Path, store: Store) -> None:
    reader = Store(tmp_path / "hosl.sqlite", reads_only=True)
    store.set_state("run-1", "running")
    assert reader.run("run-1").state == "running"
    with pytest.raises(StoreError, match="readonly"):
        reader.set_state("run-1", "stopped")
    reader.close()


def test_tables_are_brought_up_to_date_once_where_several_open_them(tmp_path: Path) -> None:
    """A command may look into a folder in the moment in which a service starts there."""
    path, together = tmp_path / "hosl.sqlite", threading.Barrier(4)
    database = sqlite3.connect(path)
    database.executescript(f"PRAGMA journal_mode = WAL; {MIGRATIONS[0]} PRAGMA user_version = 1;")
    database.close()

    def open_it(_: int) -> None:
        together.wait()
        Store(path).close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(open_it, range(4)))
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    database.close()


def test_a_store_is_closed_only_after_what_is_under_way(tmp_path: Path) -> None:
    """SQLite crashes the process where a connection is closed under a statement."""
    store = Store(tmp_path / "hosl.sqlite")
    is_held, may_go_on = threading.Event(), threading.Event()

    def commit_slowly() -> None:
        with store._transaction() as database:
            is_held.set()
            may_go_on.wait(5.0)
            database.execute("SELECT 1")

    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(commit_slowly)
        is_held.wait()
        closing = threads.submit(store.close)
        with pytest.raises(TimeoutError):
            closing.result(0.2)
        may_go_on.set()
        slow.result()
        closing.result()
    with pytest.raises(StoreError):
        store.run_ids()


def add_round(store: Store, round_: int, epoch: int = 0, coefficients: np.ndarray = AWKWARD) -> None:
    update = UpdateRecord(round_, coefficients, 0.1 * round_)
    store.add_round("run-1", epoch, update, seconds=0.5, loss=1.0 / round_, devices=["a", "b"])


def reopen(path: Path) -> Store:
    """Another connection to the same file, as after a crash: the first was never closed."""
    return Store(path / "hosl.sqlite")


def test_a_run_is_read_back_as_it_was_made(store: Store, tmp_path: Path) -> None:
    row = store.run("run-1")
    assert (row.id, row.bundle, row.shard_digest, row.state) == ("run-1", tmp_path / "bundle", "5" * 64, "pending")
    assert (row.epoch, row.round) == (0, 0)
    assert row.config == CONFIG


def test_updates_come_back_bit_for_bit(store: Store) -> None:
    for round_ in (1, 2, 3):
        add_round(store, round_, coefficients=np.roll(AWKWARD, round_))
    updates = store.updates("run-1", 1, 3)
    assert [update.round for update in updates] == [1, 2, 3]
    assert [update.learning_rate for update in updates] == [0.1 * round_ for round_ in (1, 2, 3)]
    for update in updates:
        assert update.coefficients.tobytes() == np.roll(AWKWARD, update.round).tobytes()
    assert [update.round for update in store.updates("run-1", 2, 2)] == [2]
    assert store.updates("run-1", 4, 9) == []
    assert store.updates("run-2", 1, 3) == []
    assert [(row.round, row.loss, row.seconds) for row in store.rounds("run-1")] == [
        (1, 1.0, 0.5),
        (2, 0.5, 0.5),
        (3, 1 / 3, 0.5),
    ]
    assert store.run("run-1").round == 3


def test_a_replay_reads_a_portion_at_a_time_and_misses_no_round(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hosl_cloud.storage.store.PORTION", 2)
    for round_ in range(1, 6):
        add_round(store, round_)
    asked: list[tuple[int, int]] = []
    updates = Store.updates
    monkeypatch.setattr(Store, "updates", lambda self, run, *span: asked.append(span) or updates(self, run, *span))
    assert [update.round for update in store.replay("run-1", 5)] == [1, 2, 3, 4, 5]
    assert asked == [(1, 2), (3, 4), (5, 5)]
    assert list(store.replay("run-1", 0)) == []
    with pytest.raises(StoreError, match="the update of round 6 is missing"):
        list(store.replay("run-1", 6))
    with sqlite3.connect(tmp_path / "hosl.sqlite") as database:
        database.execute("DELETE FROM rounds WHERE round = 3")
    database.close()
    with pytest.raises(StoreError, match="the update of round 3 is missing"):
        list(store.replay("run-1", 5))


def add_gradient(store: Store, round_: int, epoch: int = 0, pruned: int = 0) -> UpdateRecord:
    codes = np.arange(5, dtype=np.uint8) + np.uint8(round_)
    update = UpdateRecord(round_, AWKWARD, 0.1 * round_, codes)
    store.add_round("run-1", epoch, update, seconds=0.5, loss=1.0, devices=["a"], pruned=pruned)
    return update


def test_codes_come_back_bit_for_bit_and_are_checked(store: Store, tmp_path: Path) -> None:
    added = [add_gradient(store, round_) for round_ in (1, 2)]
    found = store.updates("run-1", 1, 2)
    assert [update.codes.tobytes() for update in found] == [update.codes.tobytes() for update in added]
    assert found[0].codes.dtype == np.uint8
    with sqlite3.connect(tmp_path / "hosl.sqlite") as database:
        database.execute("UPDATE rounds SET codes = x'0203040507' WHERE round = 2")
    database.close()
    with pytest.raises(StoreError, match="the update of round 2"):
        store.updates("run-1", 1, 2)


def test_an_update_that_is_pruned_leaves_its_figures_and_cannot_be_replayed(store: Store, tmp_path: Path) -> None:
    for round_ in range(1, 6):
        add_gradient(store, round_, pruned=round_ - 3)
    assert store.pruned_to("run-1") == 2
    assert [update.round for update in store.updates("run-1", 1, 9)] == [3, 4, 5]
    assert [row.round for row in store.rounds("run-1")] == [1, 2, 3, 4, 5]
    assert [update.round for update in store.replay("run-1", 5, after=2)] == [3, 4, 5]
    for after in (0, 1):
        with pytest.raises(StoreError, match=f"the update of round {after + 1} is missing"):
            list(store.replay("run-1", 5, after))
    with sqlite3.connect(tmp_path / "hosl.sqlite") as database:
        sizes = database.execute("SELECT length(coefficients), length(codes) FROM rounds ORDER BY round").fetchall()
    database.close()
    assert sizes == [(0, 0)] * 2 + [(20, 5)] * 3


def test_what_was_pruned_of_rounds_that_were_dropped_says_nothing_of_those_made_again(store: Store) -> None:
    for round_ in range(1, 6):
        add_gradient(store, round_, pruned=round_ - 1)
    store.rewind_run("run-1", 2)
    assert store.pruned_to("run-1") == 2
    add_gradient(store, 3, epoch=1)
    assert [update.round for update in store.updates("run-1", 1, 9)] == [3]


def test_without_pruning_everything_is_kept(store: Store) -> None:
    for round_ in range(1, 4):
        add_gradient(store, round_)
    assert (store.pruned_to("run-1"), len(store.updates("run-1", 1, 3))) == (0, 3)


def test_a_round_without_coefficients_is_kept(store: Store) -> None:
    add_round(store, 1, coefficients=np.zeros(0, np.float32))
    assert store.updates("run-1", 1, 1)[0].coefficients.size == 0


def test_what_was_added_outlives_the_process(store: Store, tmp_path: Path) -> None:
    add_round(store, 1)
    store.add_device("run-1", "pi")
    store.set_data("run-1", "pi", 100, 20, "d" * 64, "e" * 64)
    store.add_evaluation("run-1", 0, Evaluation(1, 0.5, 3, 4))
    again = reopen(tmp_path)
    assert again.updates("run-1", 1, 1)[0].coefficients.tobytes() == AWKWARD.tobytes()
    assert again.run("run-1").round == 1
    assert again.device("run-1", "pi") == DeviceRow("d" * 64, "e" * 64, 0)
    assert again.evaluations("run-1") == [Evaluation(1, 0.5, 3, 4)]
    again.close()


def test_a_round_is_stored_once_and_a_failed_transaction_leaves_nothing(store: Store) -> None:
    add_round(store, 1)
    with pytest.raises(StoreError, match=r"hosl.sqlite: \w+ \w* ?constraint failed"):
        add_round(store, 1, coefficients=np.ones(5, np.float32))
    assert store.updates("run-1", 1, 1)[0].coefficients.tobytes() == AWKWARD.tobytes()
    add_round(store, 2)
    assert store.run("run-1").round == 2


def test_superseded_rounds_are_kept_but_never_replayed(store: Store, tmp_path: Path) -> None:
    for round_ in (1, 2, 3):
        add_round(store, round_)
    with sqlite3.connect(tmp_path / "hosl.sqlite") as database:
        database.execute("UPDATE rounds SET superseded = 1 WHERE round > 1")
    database.close()
    newer = np.ones(5, np.float32)
    add_round(store, 2, epoch=1, coefficients=newer)
    updates = store.updates("run-1", 1, 9)
    assert [(update.round, update.coefficients.tobytes()) for update in updates] == [
        (1, AWKWARD.tobytes()),
        (2, newer.tobytes()),
    ]
    assert [row.round for row in store.rounds("run-1")] == [1, 2]


def test_an_unknown_run_names_the_known_ones(store: Store, tmp_path: Path) -> None:
    store.create_run("run-2", tmp_path, "5" * 64, CONFIG)
    with pytest.raises(RunNotFound, match="no run 'run-3'; stored runs: run-1, run-2") as caught:
        store.run("run-3")
    assert (caught.value.run, caught.value.known) == ("run-3", ["run-1", "run-2"])


def test_a_run_is_made_once(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"hosl.sqlite: \w+ \w* ?constraint failed"):
        store.create_run("run-1", tmp_path, "6" * 64, CONFIG)
    assert store.run("run-1").shard_digest == "5" * 64


def test_a_newer_database_is_refused_and_left_alone(store: Store, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "hosl.sqlite") as database:
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(StoreError, match=f"has schema {SCHEMA_VERSION + 1}, this hosl reads up to {SCHEMA_VERSION}"):
        reopen(tmp_path)
    assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION + 1,)
    database.close()


def test_a_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "hosl.sqlite"
    path.write_text("something else entirely, and long enough\n" * 100, encoding="ascii")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"hosl.sqlite is damaged \(file is not a database\)"):
        reopen(tmp_path)
    assert path.read_bytes() == before


def test_an_older_database_is_brought_up_to_date_with_its_runs(tmp_path: Path) -> None:
    path = tmp_path / "hosl.sqlite"
    with sqlite3.connect(path) as database:
        for number, script in enumerate(MIGRATIONS[:6], 1):
            database.executescript(f"{script} PRAGMA user_version = {number};")
        text = msgspec.json.encode(CONFIG).decode()
        row = ("run-1", 1.0, str(tmp_path), "5" * 64, text, "running")
        database.execute(
            "INSERT INTO runs (id, created_at, bundle, shard_digest, config, state) VALUES (?, ?, ?, ?, ?, ?)", row
        )
        database.execute("INSERT INTO devices (run, name, data_digest, joined_at) VALUES ('run-1', 'pi', 'd', 1.0)")
        database.execute("INSERT INTO evaluations VALUES ('run-1', 0, 5, 0.5, 3, 4, 0)")
    database.close()
    store = reopen(tmp_path)
    assert (store.run("run-1").begun_by, store.run("run-1").config) == ("start", CONFIG)
    assert store.device("run-1", "pi") == DeviceRow("", "", 0)
    assert store.evaluations("run-1") == [store.evaluation("run-1", 5)] == [Evaluation(5, 0.5, 3, 4)]
    assert store.evaluation("run-1", 5).by_class is None  # type: ignore[union-attr]
    store.close()


def test_runs_that_a_crash_left_open_are_found(store: Store, tmp_path: Path) -> None:
    for name, state in (("run-2", "running"), ("run-3", "completed"), ("run-4", "stopped"), ("run-5", "paused")):
        store.create_run(name, tmp_path, "5" * 64, CONFIG)
        store.set_state(name, state)
    assert store.unfinished_runs() == ["run-1", "run-2", "run-5"]


def test_a_cut_begins_an_epoch_and_keeps_what_it_drops_as_superseded(store: Store) -> None:
    for round_ in range(1, 8):
        add_round(store, round_)
    store.add_evaluation("run-1", 0, Evaluation(4, 0.5, 3, 4))
    store.add_evaluation("run-1", 0, Evaluation(6, 0.5, 3, 4))
    assert store.lowest_rewind("run-1", 0) is None
    assert store.rewind_run("run-1", 5) == 1
    assert [update.round for update in store.updates("run-1", 1, 100)] == [1, 2, 3, 4, 5]
    assert [row.round for row in store.rounds("run-1")] == [1, 2, 3, 4, 5]
    assert [evaluation.round for evaluation in store.evaluations("run-1")] == [4]
    assert (store.run("run-1").epoch, store.run("run-1").round) == (1, 5)
    store.add_round("run-1", 1, UpdateRecord(6, np.zeros(2, np.float32), 0.0), seconds=1.0, loss=0.5, devices=["a"])
    assert [update.round for update in store.updates("run-1", 1, 100)] == [1, 2, 3, 4, 5, 6]


def test_a_cut_that_drops_nothing_stays_in_its_epoch(store: Store) -> None:
    add_round(store, 1)
    assert store.rewind_run("run-1", 1) == 0
    assert store.lowest_rewind("run-1", 0) is None


def test_the_lowest_cut_since_an_epoch_decides(store: Store) -> None:
    for epoch, (last, cut) in enumerate([(10, 8), (9, 3), (6, 5)]):
        for round_ in range(store.run("run-1").round + 1, last + 1):
            update = UpdateRecord(round_, np.zeros(2, np.float32), 0.0)
            store.add_round("run-1", epoch, update, seconds=1.0, loss=0.5, devices=["a"])
        assert store.rewind_run("run-1", cut) == epoch + 1
    assert [store.lowest_rewind("run-1", epoch) for epoch in range(4)] == [3, 3, 5, None]


def test_the_roster_of_a_strict_run_is_kept(store: Store, tmp_path: Path) -> None:
    assert store.roster("run-1") == []
    store.set_roster("run-1", ["a", "b"])
    assert store.roster("run-1") == ["a", "b"]


def test_devices_are_counted_and_keep_the_data_they_were_ready_with(store: Store) -> None:
    assert store.device("run-1", "pi") is None
    store.add_device("run-1", "pi")
    store.add_device("run-1", "pi")
    store.add_device("run-1", "jetson")
    assert store.device("run-1", "pi") == DeviceRow("", "", 0), "its data counts from when it is ready on"
    store.set_data("run-1", "pi", 100, 20, "d" * 64, "e" * 64)
    jetson, pi = store.devices("run-1")
    assert (pi["name"], pi["connections"], pi["train_examples"], pi["eval_examples"]) == ("pi", 2, 100, 20)
    assert (jetson["name"], jetson["connections"], jetson["train_examples"]) == ("jetson", 1, 0)
    assert store.device("run-1", "pi") == DeviceRow("d" * 64, "e" * 64, 0)
    assert store.devices("run-2") == []


def test_a_device_of_no_run_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match=r"hosl.sqlite: \w+ \w* ?constraint failed"):
        store.add_device("run-9", "pi")


def test_the_newest_report_of_a_device_is_kept_for_its_own_run(store: Store) -> None:
    store.add_device("run-1", "pi")
    store.add_device("run-1", "jetson")
    for round_ in (10, 20):
        report = Report(
            run="run-1",
            epoch=0,
            applied_round=round_,
            weights_digest="a" * 64,
            step_seconds=0.25,
            peak_rss_bytes=2**40,
            anonymous_bytes=7,
            sent_bytes=8,
            received_bytes=9,
        )
        store.set_reports({"pi": report})
    jetson, pi = store.devices("run-1")
    assert (pi["applied_round"], pi["step_seconds"], pi["peak_rss_bytes"]) == (20, 0.25, 2**40)
    assert (pi["anonymous_bytes"], pi["sent_bytes"], pi["received_bytes"]) == (7, 8, 9)
    assert (jetson["applied_round"], jetson["step_seconds"]) == (0, None)


def test_a_repeated_evaluation_takes_the_place_of_the_first(store: Store) -> None:
    store.add_evaluation("run-1", 0, Evaluation(5, 0.7, 1, 4))
    store.add_evaluation("run-1", 0, Evaluation(10, 0.6, 2, 4, 3, 9))
    store.add_evaluation("run-1", 0, Evaluation(5, 0.5, 3, 4))
    assert store.evaluations("run-1") == [Evaluation(5, 0.5, 3, 4), Evaluation(10, 0.6, 2, 4, 3, 9)]
    assert store.evaluations("run-1")[0].accuracy == 0.75


def test_counts_by_class_are_read_with_one_evaluation_and_not_with_all(store: Store, tmp_path: Path) -> None:
    by_class = ClassCounts.count(np.array([0, 1, 1]), np.array([0, 1, 0]), 2)
    evaluation = Evaluation(5, 0.7, 2, 3, 3, 3, "", by_class.macro_f1, by_class)
    store.add_evaluation("run-1", 0, evaluation)
    assert store.evaluations("run-1") == [evaluation]
    assert store.evaluations("run-1")[0].by_class is None
    found = store.evaluation("run-1", 5)
    assert found == evaluation
    assert found.by_class.confusion_KK.tolist() == [[1, 0], [1, 1]]  # type: ignore[union-attr]
    assert store.evaluation("run-1", 4) is None
    store.rewind_run("run-1", 4)
    assert store.evaluation("run-1", 5) is None

    store.add_evaluation("run-1", 1, evaluation)
    with sqlite3.connect(tmp_path / "hosl.sqlite") as database:
        database.execute("UPDATE evaluations SET by_class = x'00'")
    database.close()
    assert store.evaluations("run-1") == [evaluation]
    with pytest.raises(StoreError, match=r"is damaged \(the counts by class of round 5\)"):
        store.evaluation("run-1", 5)


def test_a_store_that_is_used_on_an_event_loop_is_heard_of(store: Store) -> None:
    async def ask() -> None:
        store.run_ids()

    with pytest.warns(RuntimeWarning, match="on an event loop"):
        asyncio.run(ask())


def say(store: Store, *sentences: str, is_ending: bool = False) -> None:
    store.add_events([NewEvent("run-1", 1.0, "info", text, is_ending) for text in sentences])


def test_the_oldest_sentences_of_a_log_make_room_but_not_those_that_say_how_the_run_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hosl_cloud.storage.store.MOST_EVENTS", 10)
    monkeypatch.setattr("hosl_cloud.storage.store._PRUNE_EVERY", 5)
    store.create_run("run-2", tmp_path, "5" * 64, CONFIG)
    store.add_events([NewEvent("run-2", 1.0, "info", "another run's")])
    for number in range(30):
        say(store, f"failed {number}", is_ending=True)
        say(store, *(f"round {number}.{place}" for place in range(3)))
    texts = [event.text for event in store.events("run-1")]
    assert texts[-1] == "round 29.2"
    assert len(texts) <= 2 * (10 + 5)
    assert [text for text in texts if text.startswith("failed")][-10:] == [f"failed {n}" for n in range(20, 30)]
    assert len(store.events("run-2")) == 1


def test_what_is_said_of_a_run_that_was_deleted_is_dropped_and_nothing_else_with_it(store: Store) -> None:
    store.add_events([NewEvent("gone", 1.0, "info", "its last word"), NewEvent("run-1", 1.0, "info", "a word")])
    assert [event.text for event in store.events("run-1")] == ["a word"]


def test_threads_may_write_and_read_at_once(store: Store) -> None:
    store.add_device("run-1", "pi")

    def write(round_: int) -> None:
        add_round(store, round_)

    def count(_: int) -> int:
        store.add_device("run-1", "pi")
        return len(store.updates("run-1", 1, 1000))

    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(write, round_) for round_ in range(1, 41)]
        counts = [pool.submit(count, n) for n in range(40)]
        for future in writes:
            future.result()
        assert all(0 <= future.result() <= 40 for future in counts)
    assert [update.round for update in store.updates("run-1", 1, 1000)] == list(range(1, 41))
    assert store.devices("run-1")[0]["connections"] == 41
