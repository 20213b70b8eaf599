"""The service on a real port: who may do what, and that a client which breaks the protocol harms nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from hosl_cloud.runs.run import Run
from hosl_cloud.service import server as service_module
from hosl_protocol.run.manifest import MANIFEST, SHARD_WEIGHTS, load_manifest
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.codec import MAX_HEADER_BYTES, PIECE_BYTES, encode
from hosl_protocol.wire.messages import (
    CATCH_UP_ROUNDS,
    Anchor,
    CatchUp,
    Complete,
    EvalBatch,
    EvalResult,
    EvalStart,
    Goodbye,
    Projections,
    Refusal,
    Report,
    RoundStart,
    Welcome,
)
from services import Service, serving
from speaking import WAIT_S, Client, client, get
from support import TASK


@pytest.fixture
def bundle(export_bundle: Callable[..., Path], tiny_model: Path) -> Path:
    return export_bundle(tiny_model, "lora", 2)


@pytest.fixture
def run(bundle: Path, tmp_path: Path) -> Callable[..., None]:
    """Run a test against a service that waits for two devices."""

    def run(test: Callable[[Service], Awaitable[None]], *, strict: bool = False, **devices: Any) -> None:
        settings = {"batch_size": 4, "max_length": 16, "devices": {"start_with": 2, **devices}, "rounds": 10**6}
        settings["strict"] = strict

        async def main() -> None:
            async with serving(bundle, tmp_path / "cloud", {**msgspec.toml.decode(TASK), **settings}) as service:
                await asyncio.wait_for(test(service), 30.0)

        asyncio.run(main())

    return run


async def status_of(service: Service) -> Any:
    """The run, as the admin sees it."""
    return json.loads((await get(service, "/v1/runs/run-1", Authorization=f"Bearer {service.admin_token}"))[1])


async def add_round(run: Run, update: UpdateRecord) -> None:
    await asyncio.to_thread(run.store.add_round, run.id, run.epoch, update, seconds=0.0, loss=0.0, devices=[])


CLOSED_PATHS = ("/metrics", f"/v1/bundle/{MANIFEST}", f"/v1/bundle/{SHARD_WEIGHTS}")


def test_every_route_but_health_wants_the_token(run: Callable[..., None], bundle: Path) -> None:
    async def test(service: Service) -> None:
        assert await get(service, "/healthz") == (200, b"ok\n")
        wrong = ["", "Bearer", "Bearer wrong", service.token, f"Basic {service.token}", f"Bearer {service.token}x"]
        wrong += [f"Bearer {service.token[:-1]}", "Bearer \xe9"]
        for given in wrong:
            assert (await get(service, "/metrics", Authorization=given))[0] == 401, given
        for path in CLOSED_PATHS:
            assert (await get(service, path))[0] == 401
            assert (await get(service, path, Authorization=f"Bearer {service.token}"))[0] == 200
        assert (await get(service, "/v1/runs/run-1", Authorization=f"Bearer {service.token}"))[0] == 403
        status = await status_of(service)
        assert (status["id"], status["state"], status["round"], status["members"]) == ("run-1", "pending", 0, [])

    run(test)


def test_downloads_honour_ranges_and_name_nothing_but_the_shard(run: Callable[..., None], bundle: Path) -> None:
    whole = (bundle / SHARD_WEIGHTS).read_bytes()

    async def test(service: Service) -> None:
        token = f"Bearer {service.token}"
        assert await get(service, f"/v1/bundle/{SHARD_WEIGHTS}", Authorization=token) == (200, whole)
        for wanted, part in (("bytes=100-199", whole[100:200]), (f"bytes={len(whole) - 7}-", whole[-7:])):
            got = await get(service, f"/v1/bundle/{SHARD_WEIGHTS}", Authorization=token, Range=wanted)
            assert got == (206, part)
        beyond = await get(service, f"/v1/bundle/{SHARD_WEIGHTS}", Authorization=token, Range=f"bytes={len(whole)}-")
        assert beyond[0] == 416
        for path in ("tail/tail.safetensors", "tail/config.json", "shard/../tail/config.json", "/etc/passwd", "", "x"):
            assert (await get(service, f"/v1/bundle/{path}", Authorization=token))[0] == 404, path

    run(test)


def test_a_snapshot_is_served_to_the_tokens_holders_in_parts_and_404_once_it_is_gone(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        token, here = f"Bearer {service.token}", service.coordinator.run
        for round_ in range(1, 21):
            update = UpdateRecord(round_, np.array([2.0**-12, -(2.0**-12)], np.float32), 0.0)
            here.apply(update)
            await add_round(here, update)
            here.round = round_
        async with client(service) as device:
            await device.send(device.hello(replay_s=1.0, link_bytes_per_s=1e9))
            welcome, catch_up = await device.receive(), await device.receive()
            assert isinstance(welcome, Welcome)
            assert isinstance(catch_up, CatchUp)
            assert (welcome.plan, catch_up.first_round, catch_up.last) == ("snapshot", 21, True)
            offered = welcome.snapshot
            assert offered is not None
            assert offered.round == 20
            path = "/v1/snapshot/run-1/20"
            status, body = await get(service, path, Authorization=token)
            assert (status, len(body), hashlib.sha256(body).hexdigest()) == (200, offered.size_bytes, offered.sha256)
            assert await get(service, path, Authorization=token, Range="bytes=100-") == (206, body[100:])
            assert (await get(service, path))[0] == (await get(service, path, Authorization="Bearer wrong"))[0] == 401
            for absent in (
                "/v1/snapshot/run-1/19",
                "/v1/snapshot/run-2/20",
                "/v1/snapshot/run-1/",
                "/v1/snapshot/run-1/x",
            ):
                assert (await get(service, absent, Authorization=token))[0] == 404, absent
            for name, bundle, expected in (("own", here.bundle.name, 200), ("other", "another", 404)):
                secret = await asyncio.to_thread(service.authenticator.access.add, name, bundle)
                assert (await get(service, path, Authorization=f"Bearer {secret}"))[0] == expected, name

    run(test)


def test_a_snapshot_that_leads_to_other_weights_is_followed_by_a_rebuild(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        here = service.coordinator.run
        update = UpdateRecord(1, np.array([2.0**-12, -(2.0**-12)], np.float32), 0.0)
        here.apply(update)
        await add_round(here, update)
        here.round = 1
        async with client(service) as device:
            await device.send(device.hello(replay_s=1.0, link_bytes_per_s=1e9))
            for plan, first in (("snapshot", 2), ("rebuild", 1)):
                welcome, catch_up = await device.receive(), await device.receive()
                assert isinstance(welcome, Welcome)
                assert isinstance(catch_up, CatchUp)
                assert (welcome.plan, welcome.snapshot is None, catch_up.first_round) == (
                    plan,
                    plan != "snapshot",
                    first,
                )
                await device.send(msgspec.structs.replace(device.ready("0" * 64), applied_round=1))
            assert (await device.refusal()).code == "weights"

    run(test)


SAID = {
    401: b"no token, or not a right one: it follows Authorization: Bearer, and of a device's token NAME~SECRET alone\n",
    403: b"this token may not do that\n",
}


def test_a_websocket_without_the_token_or_with_an_origin_is_not_opened(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        site = {"origin": "https://example.org"}
        for token, more, status in (("wrong", {}, 401), ("", {}, 401), (None, site, 403)):
            with pytest.raises(InvalidStatus) as caught:
                async with client(service, token, **more):
                    pass
            assert caught.value.response.status_code == status
            assert caught.value.response.body == SAID[status]
        whole = await asyncio.to_thread(service.authenticator.access.add, "pi") + "~fingerprint"
        answer = await get(service, f"/v1/bundle/{MANIFEST}", Authorization=f"Bearer {whole}")
        assert answer == (401, SAID[401])
        assert service.coordinator.fleet.peers == {}

    run(test)


def test_a_device_that_comes_back_after_the_end_catches_up_before_it_hears_of_it(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        service.coordinator.run.ending = "completed"
        async with client(service) as stranger:
            await stranger.send(stranger.hello("stranger"))
            assert isinstance(await stranger.receive(), Complete)
        async with client(service) as device:
            await device.send(device.hello(run="run-1"))
            assert isinstance(await device.receive(), Welcome)
            assert isinstance(await device.receive(), CatchUp)
            await device.send(device.ready())
            assert isinstance(await device.receive(), Complete)

    run(test)


def test_a_device_joins_and_leaves(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        async with client(service) as device:
            await device.join("pi")
            assert service.said == [
                "waits for devices: 0 of 2 are there",
                "device pi is ready: 8 examples, 0 held out",
            ]
            await device.send(Goodbye(reason="the battery is low"))
            with pytest.raises(ConnectionClosed):
                await asyncio.wait_for(device.socket.recv(), WAIT_S)
        while service.coordinator.fleet.peers:
            await asyncio.sleep(0.01)
        assert service.said[-1] == "device pi is away: the battery is low"

    run(test)


@pytest.mark.parametrize(
    ("fields", "code", "retry"),
    [
        ({"protocol": 99}, "protocol", False),
        ({"device": "a b"}, "device", False),
        ({"device": ""}, "device", False),
        ({"device": ".."}, "device", False),
        ({"device": "n" * 65}, "device", False),
        ({"shard_digest": "0" * 64}, "shard", False),
    ],
)
def test_a_hello_that_does_not_fit_is_refused_by_its_code(
    run: Callable[..., None], fields: dict[str, Any], code: str, retry: bool
) -> None:
    async def test(service: Service) -> None:
        async with client(service) as device:
            await device.send(msgspec.structs.replace(device.hello(), **fields))
            refusal = await device.refusal()
        assert (refusal.code, refusal.retry) == (code, retry)
        assert service.coordinator.fleet.peers == {}

    run(test)


def test_a_device_whose_data_changed_is_refused_by_name(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        async with client(service) as device:
            await device.join("pi")
        async with client(service) as device:
            await device.send(device.hello("pi", data_digest="e" * 64))
            refusal = await device.refusal()
        assert (refusal.code, refusal.retry) == ("data", False)
        assert "hosl-cloud device add OTHER" in refusal.reason
        async with client(service) as device:
            await device.join("pi")

    run(test)


def test_data_counts_only_from_when_the_device_was_ready_on(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        async with client(service) as device:
            await device.send(device.hello("pi", data_digest="e" * 64))
            assert isinstance(await device.receive(), Welcome)  # and it leaves: a line of its file is faulty
        async with client(service) as device:
            await device.join("pi")

    run(test)


@pytest.mark.parametrize("strict", [False, True])
def test_held_out_data_may_change_but_in_a_strict_run(run: Callable[..., None], *, strict: bool) -> None:
    async def test(service: Service) -> None:
        async with client(service) as device:
            await device.join("pi")
        async with client(service) as device:
            await device.send(device.hello("pi", eval_digest="e" * 64))
            answer = await device.receive()
        assert isinstance(answer, Refusal if strict else Welcome)
        assert not strict or (answer.code, answer.retry) == ("eval-data", False)

    run(test, strict=strict)


def test_weights_that_differ_even_after_a_rebuild_are_refused_with_both_digests(
    run: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def test(service: Service) -> None:
        async with client(service) as device:
            await device.send(device.hello())
            for plan in ("continue", "rebuild"):
                welcome = await device.receive()
                assert isinstance(welcome, Welcome)
                assert welcome.plan == plan
                assert isinstance(await device.receive(), CatchUp)
                await device.send(device.ready("0" * 64))
            refusal = await device.refusal()
        assert (refusal.code, refusal.retry) == ("weights", False)
        ours = service.coordinator.run.digests[0]
        differs = f"its weights differ at round 0, their digest is {'0' * 64}, the cloud's {ours}"
        assert refusal.reason.startswith(f"even after a rebuild {differs}: ")
        assert f"device pi: {differs}" in caplog.text

    run(test)


def test_a_device_that_is_told_that_the_run_is_over_is_not_said_to_be_away(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        coordinator = service.coordinator
        async with client(service) as device:
            await device.join("pi")
            coordinator.run.ending = "completed"
            coordinator.admission.complete(coordinator.fleet.peers["pi"])
            assert isinstance(await device.receive(), Complete)
        while coordinator.fleet.peers:
            await asyncio.sleep(0.01)
        assert [each for each in service.said if "device pi" in each] == ["device pi is ready: 8 examples, 0 held out"]

    run(test)


async def make_round(service: Service) -> None:
    """A round that no device was asked for."""
    run = service.coordinator.run
    update = UpdateRecord(run.round + 1, np.array([2.0**-12, -(2.0**-12)], np.float32), 0.0)
    run.apply(update)
    await add_round(run, update)
    run.round = update.round


ASTRAY = {
    "ahead": ({"applied_round": 7}, "at round 7, the run is at round 2"),
    "of another run": ({"run": "other"}, "of run other, epoch 0, this connection is in run run-1, epoch 0"),
    "of another epoch": ({"epoch": 7}, "of run run-1, epoch 7, this connection is in run run-1, epoch 0"),
}


@pytest.mark.parametrize("how", [*ASTRAY, "behind"])
def test_a_ready_that_no_catch_up_leads_to_is_refused_with_what_was_expected(
    run: Callable[..., None], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    changes, sentence = ASTRAY.get(how, ({"applied_round": 1}, "at round 1, the catch-up ended with round 2"))

    async def test(service: Service) -> None:
        await make_round(service)
        await make_round(service)
        async with client(service) as device:
            await device.send(device.hello())
            assert isinstance(await device.receive(), Welcome)
            await device.send(msgspec.structs.replace(device.ready(), **{"applied_round": 2, **changes}))
            refusal = await device.refusal()
        assert (refusal.code, refusal.reason, refusal.retry) == ("message", f"ready {sentence}", False)
        assert f"device pi: ready {sentence}" in caplog.text

    run(test)


@pytest.mark.parametrize("how", ASTRAY)
def test_a_report_of_what_cannot_be_is_refused(run: Callable[..., None], how: str) -> None:
    changes, sentence = ASTRAY[how]

    async def test(service: Service) -> None:
        async with client(service) as device:
            await device.join("pi")
            await device.next_round()
            await make_round(service)
            await make_round(service)
            await device.send(msgspec.structs.replace(report(service), **changes))
            refusal = await device.refusal()
        assert (refusal.code, refusal.reason, refusal.retry) == ("message", f"report {sentence}", False)

    run(test, start_with=1)


def test_a_run_begins_with_the_devices_that_a_round_needs(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        async with client(service) as first, client(service) as second:
            await first.join("first")
            assert (await status_of(service))["waits_for"]["what"] == "devices"
            await second.join("second")
            await first.next_round()

    run(test, start_with=1, quorum=2, rejoin_deadline_s=1e-3)


def test_a_device_that_never_sends_its_held_out_data_is_asked_no_more(run: Callable[..., None]) -> None:
    one = np.ones(1, np.int32)
    batch = {"activations": np.zeros((1, 32), np.float32), "lengths": one, "labels": one}

    async def join(device: Client, name: str, eval_examples: int) -> None:
        await device.send(device.hello(name))
        assert isinstance(await device.receive(), Welcome)
        assert isinstance(await device.receive(), CatchUp)
        await device.send(msgspec.structs.replace(device.ready(), eval_examples=eval_examples))
        while not device.is_ready(name):
            await asyncio.sleep(0.01)

    async def test(service: Service) -> None:
        coordinator = service.coordinator
        async with client(service) as silent, client(service) as good:
            await join(silent, "silent", 10**9)
            await join(good, "good", 1)
            for is_asked in (True, True, False):
                scoring = asyncio.create_task(coordinator._score())
                start = await good.receive()
                assert isinstance(start, EvalStart)
                named = {"run": "run-1", "epoch": 0, "round": 0, "attempt": start.attempt}
                await good.send(EvalBatch(**named, last=True), batch)
                evaluation = await scoring
                assert isinstance(await good.receive(), EvalResult)
                assert evaluation is not None
                assert (evaluation.examples, evaluation.of_examples) == (1, 1 + is_asked * 10**9)
                if is_asked:
                    assert isinstance(await silent.receive(), EvalStart)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(silent.socket.recv(), 0.2)
        sentence = "device silent did not send all its held-out data in 2 evaluations: it is asked no more"
        assert sentence in service.said

    run(test, start_with=3, strikes=2, round_deadline_s=1.0)


def test_what_a_device_says_as_it_leaves_stays_on_one_line(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        async with client(service) as device:
            await device.join("pi")
            await device.send(Goodbye(reason="bye\n2026 hosl-cloud: it is done\x1b[2J\x9b\u202e"))
            while "away" not in service.said[-1]:
                await asyncio.sleep(0.01)
        assert service.said[-1] == r"device pi is away: bye 2026 hosl-cloud: it is done\x1b[2J\x9b\u202e"

    run(test)


@pytest.mark.parametrize(("run_id", "epoch", "applied"), [("run-0", 0, 3), ("run-1", 1, 0), ("run-1", 0, 7)])
def test_a_device_of_another_past_is_told_to_rebuild(
    run: Callable[..., None], run_id: str, epoch: int, applied: int
) -> None:
    async def test(service: Service) -> None:
        async with client(service) as device:
            past = {"run": run_id, "epoch": epoch, "applied_round": applied, "weights_digest": "1" * 64}
            await device.send(device.hello(**past))
            welcome = await device.receive()
            assert isinstance(welcome, Welcome)
            assert welcome.plan == "rebuild"

    run(test)


def test_a_device_that_connects_again_takes_the_place_of_its_old_connection(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        async with client(service) as first, client(service) as second:
            await first.join("pi")
            await second.join("pi")
            refusal = await first.refusal()
            assert (refusal.code, refusal.retry) == ("device", False)
            assert second.is_ready("pi")

    run(test)


async def say_text(device: Client) -> None:
    await device.socket.send("hello")


async def say_ready_first(device: Client) -> None:
    await device.send(device.ready("0" * 64))


async def say_nonsense(device: Client) -> None:
    await device.socket.send(b"\xff" * 100)


async def say_a_long_header(device: Client) -> None:
    await device.socket.send(b" " * (MAX_HEADER_BYTES + 9))


async def say_what_is_not_due(device: Client) -> None:
    await device.send(device.hello())
    await device.receive()
    message = Anchor(run="run-1", epoch=0, round=1)
    one = np.ones(1, np.int32)
    await device.send(message, {"activations": np.zeros((1, 32), np.float32), "lengths": one, "labels": one})


WRONGS = [say_text, say_ready_first, say_nonsense, say_a_long_header, say_what_is_not_due]


def test_a_client_that_breaks_the_protocol_is_refused_and_disturbs_nobody(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        async with client(service) as good:
            await good.join("good")
            for wrong in WRONGS:
                async with client(service) as bad:
                    await wrong(bad)
                    refusal = await bad.refusal()
                    assert (refusal.code, refusal.retry) == ("message", False), wrong.__name__
                assert good.is_ready("good"), wrong.__name__
            async with client(service) as second:
                await second.join("second")
                # Two are ready: the run begins, and the first device is part of it.
                assert isinstance(await good.receive(), RoundStart)

    run(test)


def test_a_frame_larger_than_the_run_allows_is_refused_before_it_is_sent(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        async with client(service) as device:
            await device.send(device.hello())
            await device.receive()
            await device.receive()
            await device.send(device.ready())
            message = await device.receive()
            while not isinstance(message, (RoundStart, EvalStart)):
                message = await device.receive()
            await announce(device)
            refusal = await device.refusal()
        assert refusal.code == "message"
        assert "is 65, the limit is 64" in refusal.reason

    async def announce(device: Client) -> None:
        tensors = {
            "activations": np.zeros((65, 32), np.float32),
            "lengths": np.full(4, 16, np.int32),
            "labels": np.zeros(4, np.int32),
        }
        await device.socket.send(next(iter(encode(Anchor(run="run-1", epoch=0, round=1), tensors))))

    run(test, start_with=1)


def test_a_websocket_message_beyond_a_piece_ends_the_connection(
    run: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def test(service: Service) -> None:
        async with client(service) as device:
            await device.socket.send(b" " * (PIECE_BYTES + 1))
            with pytest.raises(ConnectionClosed) as caught:
                await asyncio.wait_for(device.socket.recv(), WAIT_S)
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1009
        assert f"device ? sent a piece of more than {PIECE_BYTES} bytes" in caplog.text

    run(test)


def test_a_flood_of_messages_that_nobody_asked_for_ends_the_connection(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        async with client(service) as device:
            await device.join("pi")
            for _ in range(9):
                await device.send(device.ready())
            refusal = await device.refusal()
        assert refusal.code == "message"
        assert refusal.reason == "ready while 4 messages wait already"

    run(test)


def test_a_second_hello_ends_the_connection(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        async with client(service) as device:
            await asyncio.gather(device.send(device.hello()), device.send(device.hello()))
            await asyncio.wait_for(device.socket.wait_closed(), WAIT_S)
        for _ in range(500):
            if not service.coordinator.fleet.peers:
                break
            await asyncio.sleep(0.01)
        assert not service.coordinator.fleet.peers

    run(test)


def test_answers_to_another_round_are_dropped(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        async with client(service) as device:
            await device.join("pi")
            await device.next_round()
            for round_ in (7, 8, 9):
                message = Projections(run="run-1", epoch=0, round=round_)
                await device.send(message, {"projections": np.full(2, 1e9, np.float32)})
                await asyncio.sleep(0.02)
            assert device.is_ready("pi")
            assert service.coordinator.run.round == 0

    run(test, start_with=1, round_deadline_s=0.5)


def test_the_manifest_that_is_served_is_the_bundles(run: Callable[..., None], bundle: Path) -> None:
    async def test(service: Service) -> None:
        _, body = await get(service, f"/v1/bundle/{MANIFEST}", Authorization=f"Bearer {service.token}")
        assert body == (bundle / MANIFEST).read_bytes()
        assert load_manifest(bundle).shard_digest == service.coordinator.run.manifest.shard_digest

    run(test)


def test_the_status_says_what_is_waited_for_and_since_when(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        async def waits_for() -> Any:
            return (await status_of(service))["waits_for"]

        while (waiting := await waits_for()) is None:  # it has just begun
            await asyncio.sleep(0.01)
        assert (waiting["what"], waiting["ready"], waiting["needed"]) == ("devices", 0, 1)
        async with client(service) as device:
            await device.join("pi")
            await device.next_round()
            waiting = await waits_for()
            assert (waiting["what"], waiting["devices"]) == ("anchor", ["pi"])
            assert 0.0 <= time.time() - waiting["since"] < WAIT_S

    run(test, start_with=1)


def test_a_device_whose_numbers_are_absurd_is_put_aside_for_good(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        async with client(service) as device:
            await device.join("pi")
            for _ in range(2):
                start = await device.next_round()
                one = np.ones(1, np.int32)
                tensors = {"activations": np.full((1, 32), np.nan, np.float32), "lengths": one, "labels": one}
                await device.send(Anchor(run="run-1", epoch=0, round=start.round, attempt=start.attempt), tensors)
            refusal = await device.refusal()
            assert (refusal.code, refusal.retry) == ("device", False)
            assert "put aside: 2 of its answers" in refusal.reason
        async with client(service) as device:
            await device.send(device.hello())
            assert "put aside" in (await device.refusal()).reason
        assert any(line.startswith("device pi is put aside after 2 faults") for line in service.said)

    run(test, start_with=1, strikes=2)


def test_a_device_that_vanishes_with_bytes_on_their_way_is_noticed_by_its_silence(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "HEARTBEAT_S", 0.5)

    async def test(service: Service) -> None:
        async with client(service, max_queue=1) as device:
            await device.join("pi")
            # More than the kernels' buffers hold, and nobody reads.
            peer = service.coordinator.fleet.peers["pi"]
            rows = {"coefficients": np.zeros((CATCH_UP_ROUNDS, 2), np.float32)}
            rows["learning_rates"] = np.zeros(CATCH_UP_ROUNDS)
            for _ in range(300):
                peer.tell(CatchUp(run="run-1", epoch=0, first_round=1, last=False), rows)
            while "pi" in service.coordinator.fleet.peers:
                await asyncio.sleep(0.05)
            device.socket.transport.abort()

    run(test)


def report(service: Service) -> Report:
    figures = dict.fromkeys(("peak_rss_bytes", "anonymous_bytes", "sent_bytes", "received_bytes"), 1)
    digest = service.coordinator.run.digests[0]
    return Report(run="run-1", epoch=0, applied_round=0, weights_digest=digest, step_seconds=2.0, **figures)


def test_reports_that_come_together_are_stored_together(run: Callable[..., None]) -> None:
    async def test(service: Service) -> None:
        store, stored = service.coordinator.store, list[int]()
        set_reports = store.set_reports

        def slowly(reports: Any) -> None:
            stored.append(len(reports))
            time.sleep(0.3)
            set_reports(reports)

        async def rows() -> list[dict[str, Any]]:
            return await asyncio.to_thread(store.devices, "run-1")

        store.set_reports = slowly  # type: ignore[method-assign]
        async with contextlib.AsyncExitStack() as stack:
            devices = [await stack.enter_async_context(client(service)) for _ in range(5)]
            for number, device in enumerate(devices):
                await device.join(f"pi-{number}")
                await device.next_round()
            for device in devices:
                await device.send(report(service))
            while len([row for row in await rows() if row["step_seconds"] == 2.0]) < 5:
                await asyncio.sleep(0.05)
        assert sum(stored) == 5
        assert len(stored) <= 3

    run(test, start_with=1, round_deadline_s=0.2)
