"""The device between connections: catch-ups, snapshots as the journal's base, and what a start makes of damage."""

from __future__ import annotations

import errno
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hosl_edge import device as device_module
from hosl_edge.connection.catch_up_speed import CatchUpSpeed
from hosl_edge.connection.goodbye import goodbye_reason
from hosl_edge.device import Device
from hosl_edge.exceptions import ConnectionLost, HistoryError, MemoryBudgetError, SnapshotError, UnservedError
from hosl_edge.history import journal as journal_module
from hosl_edge.history.journal import journal_path
from hosl_edge.model.memory import Memory
from hosl_edge.settings import EdgeSettings
from hosl_protocol.exceptions import IrreversibleError, LatticeError, ProtocolError
from hosl_protocol.run.manifest import BundleError, load_manifest
from hosl_protocol.run.settings import ClientOptimizer, RunSettings, convert
from hosl_protocol.run.tasks import Task, load_preset
from hosl_protocol.run.updates import update_shape
from hosl_protocol.weights import client_weights as client
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.messages import Snapshot, Welcome
from support import mirror_of, write_reviews, write_snapshot

OPTIMIZERS = {
    "sgd": ClientOptimizer(),
    "adamw": ClientOptimizer(optimizer="adamw"),
}


class Site:
    """A device's folders, and a cloud's mirror to make snapshots from."""

    def __init__(self, folder: Path, bundle: Path, kind: str) -> None:
        self.folder, self.bundle, self.manifest = folder, bundle, load_manifest(bundle)
        task = convert(load_preset("reviews"), Task, "task")
        self.run_settings = RunSettings(task=task, max_length=16, batch_size=4, client=OPTIMIZERS[kind])
        self.settings = EdgeSettings(
            server="ws://127.0.0.1:1",
            token_file="unused",
            data=str(write_reviews(folder / "train.jsonl", 8)),
            name="pi",
            threads=1,
            state_dir=str(folder / "state"),
        )
        self.state = folder / "state" / "pi"
        self.mirror = mirror_of(bundle, self.manifest, self.run_settings)
        self.devices: list[Device] = []

    def start(self) -> Device:
        self.devices.append(Device(self.settings, self.bundle, self.manifest))
        return self.devices[-1]

    def stop(self) -> None:
        for device in self.devices:
            device.close()
        self.devices.clear()

    def restart(self) -> Device:
        self.stop()
        return self.start()

    def welcome(self, plan: str, snapshot: Snapshot | None = None, **more: Any) -> Welcome:
        fields: dict[str, Any] = {"run": "r", "epoch": 0, "round": 0, "width": self.manifest.width} | more
        fields |= {"update": update_shape(self.run_settings, self.manifest)}
        return Welcome(settings=self.run_settings, plan=plan, snapshot=snapshot, **fields)  # type: ignore[arg-type]

    def snapshot(self, run: str = "r", epoch: int = 0) -> Snapshot:
        return write_snapshot(self.folder / "served", run, epoch, self.mirror.state(), self.manifest)

    def fetch(self, snapshot: Snapshot, path: Path) -> None:
        shutil.copy(self.folder / "served", path)

    def rebased(self, rounds: int = 50, **size: float) -> Device:
        """A device that stands at a snapshot of the mirror after so many rounds."""
        device = self.start()
        self.mirror.apply(make_updates(1, rounds, **size))
        device.join(self.welcome("snapshot", self.snapshot()), self.fetch)
        return device


@pytest.fixture
def make_site(make_bundle: Callable[[str, int], Path], tmp_path: Path) -> Iterator[Callable[[str], Site]]:
    made: list[Site] = []

    def make(kind: str = "sgd", train: str = "lora") -> Site:
        made.append(Site(tmp_path, make_bundle(train, 2), kind))
        return made[-1]

    yield make
    for site in made:
        site.stop()


def make_updates(first: int, last: int, size: float = 2.0**-13, rate: float = 1e-3) -> list[UpdateRecord]:
    rows = [[((7 * r + 5 * p) % 13 - 6) * size for p in range(2)] for r in range(first, last + 1)]
    return [UpdateRecord(first + n, np.array(row, np.float32), rate) for n, row in enumerate(rows)]


def never(snapshot: Snapshot, path: Path) -> None:
    raise AssertionError("nothing is to be fetched")


def test_a_catch_up_is_applied_in_one_pass_and_journaled(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    device = site.start()
    device.join(site.welcome("continue"), never)
    passes: list[int] = []
    add = client.add_directions
    monkeypatch.setattr(
        client, "add_directions", lambda tensors, terms, *rest: (passes.append(len(terms)), add(tensors, terms, *rest))
    )
    updates = make_updates(1, 500)
    device.apply(updates)
    assert passes == [1000], "two directions of 500 rounds at once"
    site.mirror.apply(updates)
    assert device.digest() == site.mirror.digest()
    again = site.restart()
    assert (again.applied_round, again.digest()) == (500, site.mirror.digest())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_snapshot_becomes_the_journals_base(make_site: Callable[..., Site], kind: str) -> None:
    site = make_site(kind)
    device = site.rebased(50)
    assert (device.applied_round, device.digest()) == (50, site.mirror.digest())
    later = make_updates(51, 60)
    for weights in (device, site.mirror):
        weights.apply(later)  # type: ignore[attr-defined]
    again = site.restart()
    assert again.header is not None
    assert again.header.base_round == 50
    assert (again.applied_round, again.digest()) == (60, site.mirror.digest())
    again.join(site.welcome("continue"), never)
    assert again.applied_round == 60, "its run, wherever its journal begins"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_snapshot_after_a_relattice_event_is_taken_on(make_site: Callable[..., Site], kind: str) -> None:
    site = make_site(kind)
    big = {"size": 2.0**-5, "rate": 0.25}
    device = site.rebased(30, **big)
    assert site.mirror.coarsenings
    for weights in (device, site.mirror):
        weights.apply(make_updates(31, 60, **big))  # type: ignore[attr-defined]
    assert site.restart().digest() == site.mirror.digest()


def test_rounds_before_the_snapshot_cannot_be_taken_back(make_site: Callable[..., Site]) -> None:
    device = make_site().rebased(50)
    assert device.weights is not None
    with pytest.raises(IrreversibleError, match="after round 50"):
        device.weights.revert(make_updates(50, 50))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [(flip, "it is damaged"), (Path.unlink, "No such file"), (lambda path: path.write_bytes(b""), "it is damaged")],
)
def test_a_start_without_its_snapshot_begins_at_the_base_shard_and_says_so_in_a_line(
    make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], sentence: str
) -> None:
    site = make_site()
    base = site.mirror.digest()
    site.rebased(50)
    site.stop()
    damage(next(site.state.glob("snapshot-*")))
    with caplog.at_level(logging.WARNING):
        device = site.start()
    assert (device.header, device.applied_round) == (None, 0)
    (record,) = caplog.records
    assert "starting at the base shard" in record.message
    assert sentence in record.message
    device.join(site.welcome("continue"), never)
    assert device.digest() == base
    assert not list(site.state.glob("snapshot-*")), "the journal names none any more"


def test_until_a_snapshot_is_whole_the_device_keeps_what_it_has(make_site: Callable[..., Site]) -> None:
    site = make_site()
    device = site.rebased(50)
    kept, digest = set(site.state.iterdir()), device.digest()
    site.mirror.apply(make_updates(51, 90))

    def lose(snapshot: Snapshot, path: Path) -> None:
        path.with_name(path.name + ".part").write_bytes(b"the first of it")
        raise ConnectionLost("the link is down")

    with pytest.raises(ConnectionLost):
        device.join(site.welcome("snapshot", site.snapshot()), lose)
    assert (device.applied_round, device.digest()) == (50, digest)
    again = site.restart()
    assert (again.applied_round, again.digest()) == (50, digest)
    again.join(site.welcome("snapshot", site.snapshot()), site.fetch)
    assert (again.applied_round, again.digest()) == (90, site.mirror.digest())
    assert len(set(site.state.iterdir())) == len(kept), "neither the old snapshot nor the part stays"


def test_a_snapshot_that_cannot_be_used_is_not_asked_for_again(make_site: Callable[..., Site]) -> None:
    site = make_site()
    device = site.start()
    assert device.catch_up_speed().replay_s > 0
    site.mirror.apply(make_updates(1, 5))
    with pytest.raises(SnapshotError, match="it is of run another, round 5"):
        device.join(site.welcome("snapshot", site.snapshot(run="another")), site.fetch)
    assert device.catch_up_speed() == CatchUpSpeed()
    assert device.header is None


def test_a_snapshot_of_another_digest_is_a_snapshot_error(make_site: Callable[..., Site]) -> None:
    def differ(snapshot: Snapshot, path: Path) -> None:
        raise BundleError("another digest")

    site = make_site()
    with pytest.raises(SnapshotError, match="another digest"):
        site.start().join(site.welcome("snapshot", site.snapshot()), differ)


def test_a_snapshot_of_another_optimizer_leaves_a_device_that_can_rebuild(make_site: Callable[..., Site]) -> None:
    site = make_site()
    base = site.mirror.digest()
    settings = msgspec.structs.replace(site.run_settings, client=OPTIMIZERS["adamw"])
    site.mirror = mirror_of(site.bundle, site.manifest, settings)
    device = site.start()
    with pytest.raises(SnapshotError, match="not one of sgd"):
        device.join(site.welcome("snapshot", site.snapshot()), site.fetch)
    assert device.catch_up_speed() == CatchUpSpeed()
    device.join(site.welcome("rebuild"), never)
    assert device.digest() == base


@pytest.mark.parametrize("snapshot", [None, Snapshot(round=1, size_bytes=10**12, sha256="0" * 64)])
def test_an_offer_that_makes_no_sense_is_refused_before_it_is_fetched(
    make_site: Callable[..., Site], snapshot: Snapshot | None
) -> None:
    site = make_site()
    with pytest.raises(ProtocolError, match="snapshot"):
        site.start().join(site.welcome("snapshot", snapshot), never)


def test_a_rebuild_drops_the_snapshot(make_site: Callable[..., Site]) -> None:
    site = make_site()
    base = site.mirror.digest()
    device = site.rebased(50)
    device.join(site.welcome("rebuild"), never)
    assert (device.applied_round, device.digest()) == (0, base)
    assert not list(site.state.glob("snapshot-*"))
    assert journal_path(site.state).exists()


def stands_at_the_base(device: Device, base: str, site: Site) -> bool:
    """Whether nothing of a run is left, and what comes next is right."""
    found = (device.header, device.applied_round, device.digest()) == (None, 0, "")
    device.join(site.welcome("continue", epoch=1), never)
    return found and device.digest() == base


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_rewind_ends_with_the_bits_of_the_round_it_goes_back_to(make_site: Callable[..., Site], kind: str) -> None:
    site = make_site(kind)
    device = site.rebased(50)
    site.mirror.apply(make_updates(51, 55))
    device.apply(make_updates(51, 70))
    device.join(site.welcome("rewind", epoch=1, rewind_to=55), never)
    assert (device.applied_round, device.digest()) == (55, site.mirror.digest())
    again = site.restart()
    assert again.header is not None
    assert (again.header.epoch, again.applied_round, again.digest()) == (1, 55, site.mirror.digest())


def test_many_rounds_are_taken_back_in_portions(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hosl_edge.history.history.REVERTED_ROUNDS", 7)
    site = make_site()
    device = site.rebased(50)
    device.apply(make_updates(51, 100))
    device.join(site.welcome("rewind", epoch=1, rewind_to=52), never)
    site.mirror.apply(make_updates(51, 52))
    assert (device.applied_round, device.digest()) == (52, site.mirror.digest())


def cut_short(path: Path) -> None:
    """All twenty updates are 640 bytes."""
    path.write_bytes(path.read_bytes()[:-630])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    ("pattern", "damage"), [("snapshot-*", flip), ("snapshot-*", Path.unlink), ("journal", cut_short)]
)
def test_a_rewind_that_lacks_a_file_leaves_no_run_and_not_half_of_one(
    make_site: Callable[..., Site], kind: str, pattern: str, damage: Callable[[Path], object]
) -> None:
    site = make_site(kind)
    base = site.mirror.digest()
    device = site.rebased(50)
    device.apply(make_updates(51, 70))
    damage(next(site.state.glob(pattern)))
    if (kind, pattern) == ("sgd", "snapshot-*"):
        device.join(site.welcome("rewind", epoch=1, rewind_to=51), never)
        assert device.applied_round == 51, "what is taken back needs no snapshot"
        return
    with pytest.raises(HistoryError, match="the rounds after 51 cannot be taken back"):
        device.join(site.welcome("rewind", epoch=1, rewind_to=51), never)
    assert stands_at_the_base(device, base, site)


def full_site(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, kind: str) -> tuple[Site, Device]:
    """A device of a first-order run at round 20, whose journal had room for 12 rounds."""
    site = make_site(kind, train="norm")
    site.run_settings = msgspec.structs.replace(site.run_settings, algorithm="first-order")
    site.mirror = mirror_of(site.bundle, site.manifest, site.run_settings)
    size = 24 + update_shape(site.run_settings, site.manifest).size_bytes
    monkeypatch.setattr(journal_module, "MAX_GRADIENT_BYTES", 12 * size + 5)
    device = site.start()
    device.join(site.welcome("rebuild"), never)
    for weights in (device, site.mirror):
        weights.apply(make_gradients(site, 1, 20))  # type: ignore[attr-defined]
    assert (device.applied_round, device.digest()) == (20, site.mirror.digest())
    return site, device


def make_gradients(site: Site, first: int, last: int) -> list[UpdateRecord]:
    shape = update_shape(site.run_settings, site.manifest)
    updates = []
    for round_ in range(first, last + 1):
        generator = np.random.default_rng(round_)
        scales = generator.normal(0.0, 1e-3, shape.coefficients).astype(np.float32)
        updates.append(UpdateRecord(round_, scales, 1e-3, generator.integers(0, 256, shape.codes, np.uint8)))
    return updates


def digest_after(site: Site, rounds: int) -> str:
    mirror = mirror_of(site.bundle, site.manifest, site.run_settings)
    mirror.apply(make_gradients(site, 1, rounds))
    return mirror.digest()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_start_goes_on_where_a_full_journal_ends(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    site, _ = full_site(make_site, monkeypatch, kind)
    for _ in range(2):
        device = site.restart()
        assert (device.applied_round, device.digest()) == (12, digest_after(site, 12))
        device.join(site.welcome("continue"), never)
        device.apply(make_gradients(site, 13, 20))
        assert device.digest() == site.mirror.digest()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    ("plan", "to", "stands"), [("continue", 20, 20), ("rewind", 20, 20), ("rewind", 12, 12), ("rewind", 5, 5)]
)
def test_a_device_with_a_full_journal_follows_its_cloud_into_another_epoch(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, kind: str, plan: str, to: int, stands: int
) -> None:
    site, device = full_site(make_site, monkeypatch, kind)
    device.join(site.welcome(plan, epoch=1, rewind_to=to), never)
    assert (device.applied_round, device.digest()) == (stands, digest_after(site, stands))
    again = site.restart()
    assert again.header is not None
    assert (again.header.epoch, again.applied_round) == (1, min(stands, 12))
    assert again.digest() == digest_after(site, min(stands, 12))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_round_that_a_full_journal_lacks_is_fetched_from_where_the_journal_ends(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    site, device = full_site(make_site, monkeypatch, kind)
    with pytest.raises(HistoryError, match="the rounds after 17 cannot be taken back: the journal ends at round 12"):
        device.join(site.welcome("rewind", epoch=1, rewind_to=17), never)
    assert (device.applied_round, device.digest()) == (12, digest_after(site, 12))
    device.join(site.welcome("continue", epoch=1), never)
    device.apply(make_gradients(site, 13, 20))
    assert device.digest() == site.mirror.digest()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("place", ["hosl_edge.history.journal.os.fsync", "hosl_edge.history.journal.Path.replace"])
@pytest.mark.parametrize("plan", ["rewind", "snapshot", "rebuild"])
def test_a_disk_that_fails_between_journal_and_weights_leaves_a_state_that_is_whole(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, kind: str, place: str, plan: str
) -> None:
    site = make_site(kind)
    base = site.mirror.digest()
    device = site.rebased(50)
    device.apply(make_updates(51, 70))
    digest = device.digest()
    site.mirror.apply(make_updates(51, 80))
    snapshot = site.snapshot() if plan == "snapshot" else None

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, fail)
    with pytest.raises((OSError, HistoryError)):
        device.join(site.welcome(plan, snapshot, epoch=1, rewind_to=60), site.fetch)
    monkeypatch.undo()
    if device.header is None:
        assert stands_at_the_base(device, base, site)
    else:
        assert (device.applied_round, device.digest()) == (70, digest)
        assert (site.restart().applied_round, site.restart().digest()) == (70, digest)


def test_updates_that_cannot_be_applied_leave_weights_that_the_journal_knows(make_site: Callable[..., Site]) -> None:
    site = make_site()
    base = site.mirror.digest()
    device = site.start()
    device.join(site.welcome("continue"), never)
    device.apply(make_updates(1, 5))
    with pytest.raises(LatticeError):
        device.apply([*make_updates(6, 9), UpdateRecord(10, np.full(2, 2.0**100, np.float32), 1e-3)])
    assert stands_at_the_base(device, base, site)


def test_a_setting_that_cannot_be_served_is_named_to_the_cloud(make_site: Callable[..., Site]) -> None:
    site = make_site("adamw")
    site.run_settings = msgspec.structs.replace(site.run_settings, client=ClientOptimizer(epsilon=1e-30))
    with pytest.raises(UnservedError) as caught:
        site.start().join(site.welcome("continue"), never)
    assert goodbye_reason(caught.value) == (
        "it cannot serve the run, whose client.epsilon is 1e-30: use a number from 1e-12 to 1"
    )


def test_data_of_a_run_that_could_not_be_joined_is_not_taken_for_that_of_the_one_before(
    make_site: Callable[..., Site],
) -> None:
    site = make_site()
    device = site.start()
    device.join(site.welcome("continue"), never)
    before, other = device.train, msgspec.structs.replace(site.run_settings, max_length=8)
    welcome = site.welcome("snapshot", site.snapshot(), run="other")

    def lose(snapshot: Snapshot, path: Path) -> None:
        raise ConnectionLost("the link is down")

    with pytest.raises(ConnectionLost):
        device.join(msgspec.structs.replace(welcome, settings=other), lose)
    device.join(site.welcome("continue"), never)
    assert before is not None
    assert device.train is not None
    assert device.train is not before
    assert device.shard.max_length == 16


def test_the_links_speed_is_kept_across_restarts(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.start().note_link(1.5e6)
    assert site.restart().catch_up_speed().link_bytes_per_s == 1.5e6
    (site.state / "pace.json").write_bytes(b"{")
    assert site.restart().catch_up_speed().link_bytes_per_s == 0.0


def test_the_pace_of_a_replay_is_that_of_the_last_long_one(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    device = site.start()
    device.join(site.welcome("continue"), never)
    monkeypatch.setattr(device_module, "measure_replay_s", lambda *arguments: 123.0)
    device.apply(make_updates(1, 1))
    assert device.catch_up_speed().replay_s == 123.0, "a single round tells nothing"
    device.apply(make_updates(2, 100))
    assert 0 < device.catch_up_speed().replay_s < 1.0


@pytest.mark.parametrize(("directions", "sets"), [(2, 2), (32, 8)])
def test_without_a_budget_a_round_holds_a_set_for_each_direction_up_to_eight(
    make_site: Callable[..., Site], directions: int, sets: int
) -> None:
    site = make_site()
    site.run_settings = msgspec.structs.replace(site.run_settings, directions=directions)
    device = site.start()
    device.join(site.welcome("rebuild"), never)
    assert device.held_sets == sets


@pytest.mark.parametrize("train", ["blocks", "norm:-1"])
@pytest.mark.parametrize("spare", [-1, 0, 1, 5])
def test_a_memory_budget_pays_for_what_a_round_needs_and_then_for_held_sets(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, train: str, spare: int
) -> None:
    site = make_site(train=train)
    settings = msgspec.structs.replace(site.run_settings, directions=4)
    set_bytes = settings.max_tokens * site.manifest.width * 4
    trained_bytes = sum(4 * math.prod(entry.shape) for entry in site.manifest.trainable)
    needed = 3 * set_bytes + trained_bytes  # the anchor's set, λ, one in transit; the shard's pages, once copied
    if train == "norm:-1":
        needed += set_bytes  # what the blocks that stand still computed
    nothing = Memory(resident=0, peak=0, anonymous=0, file_backed=0)
    monkeypatch.setattr("hosl_edge.model.memory.read_memory", lambda: nothing)
    site.run_settings = settings
    site.settings = msgspec.structs.replace(site.settings, memory_budget=str(needed + spare * set_bytes))
    device = site.start()
    if spare < 0:
        with pytest.raises(MemoryBudgetError) as caught:
            device.join(site.welcome("rebuild"), never)
        assert caught.value.needed_bytes == needed
    else:
        device.join(site.welcome("rebuild"), never)
        assert device.held_sets == min(spare, 4)


@pytest.mark.parametrize(("train", "blocks"), [("blocks", 2), ("norm:-1", 0)])
@pytest.mark.parametrize("spare", [-1, 0, 1, 5])
def test_a_memory_budget_pays_for_a_first_order_round_and_then_for_what_further_blocks_are_given(
    make_site: Callable[..., Site],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    train: str,
    blocks: int,
    spare: int,
) -> None:
    caplog.set_level(logging.INFO)
    site = make_site(train=train)
    settings = msgspec.structs.replace(site.run_settings, algorithm="first-order")
    set_bytes = settings.max_tokens * site.manifest.width * 4
    sizes = {entry.name: 4 * math.prod(entry.shape) for entry in site.manifest.trainable}
    largest = max(sum(sizes[name] for name in entry.gradients.values()) for entry in site.manifest.gradients)
    # λ, the anchor's set in transit or a cotangent, what a block was given; a block's gradient, and a micro-batch's;
    # what is sent; the shard's pages, once copied
    needed = (2 + min(1, blocks)) * set_bytes + 2 * largest + sum(sizes.values())
    needed += update_shape(settings, site.manifest).size_bytes
    if blocks == 0:
        needed += set_bytes  # what the blocks that stand still computed
    nothing = Memory(resident=0, peak=0, anonymous=0, file_backed=0)
    monkeypatch.setattr("hosl_edge.model.memory.read_memory", lambda: nothing)
    site.run_settings = settings
    site.settings = msgspec.structs.replace(site.settings, memory_budget=str(needed + spare * set_bytes))
    device = site.start()
    if spare < 0:
        with pytest.raises(MemoryBudgetError) as caught:
            device.join(site.welcome("rebuild"), never)
        assert caught.value.needed_bytes == needed
    else:
        device.join(site.welcome("rebuild"), never)
        assert device.held_sets == max(0, min(spare, blocks - 1))
        forced = "the memory budget holds what 1 of 2 blocks are given, and micro-batches of 1: 2 forwards a round"
        assert (forced in caplog.text) == (blocks > 0 and spare == 0)


def test_without_a_budget_a_first_order_round_keeps_what_every_block_is_given(make_site: Callable[..., Site]) -> None:
    site = make_site(train="blocks")
    site.run_settings = msgspec.structs.replace(site.run_settings, algorithm="first-order")
    device = site.start()
    device.join(site.welcome("rebuild"), never)
    assert device.held_sets == 1
    assert list(device.shard.last_inputs(1 + device.held_sets)) == [0, 1]
