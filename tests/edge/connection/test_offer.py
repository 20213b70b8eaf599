"""What an agent finds out before it fetches anything large, and what it does with a run that is over or another."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from answers import Answers, answering
from hosl_edge.agent import run_agent
from hosl_edge.connection.offer import fetch_offer
from hosl_edge.connection.token import Token
from hosl_edge.connection.trust import Cloud
from hosl_edge.device import Device
from hosl_edge.exceptions import ConsentError, DataError, RefusedError
from hosl_edge.session import Session
from hosl_edge.settings import EdgeSettings
from hosl_protocol.run.manifest import MANIFEST, load_manifest
from hosl_protocol.run.tasks import load_preset
from hosl_protocol.wire.messages import Complete
from support import write_reviews

OWN_TASK = {**load_preset("reviews"), "name": "tickets"}


@pytest.fixture
def settings(tmp_path: Path) -> EdgeSettings:
    (tmp_path / "token").write_text("secret", encoding="ascii")
    return EdgeSettings(
        server="",
        token_file=str(tmp_path / "token"),
        data=str(write_reviews(tmp_path / "train.jsonl", 8)),
        name="pi",
        threads=1,
        state_dir=str(tmp_path / "state"),
        cache_dir=str(tmp_path / "cache"),
    )


def serve_bundle(answers: Answers, bundle: Path) -> list[str]:
    """Every file as hosl-cloud serves it; the paths of those that are large."""
    manifest = load_manifest(bundle)
    paths = [f"/v1/bundle/{entry.path}" for entry in manifest.shard_files]
    for path in (f"/v1/bundle/{MANIFEST}", f"/v1/bundle/{MANIFEST}?waits=1", *paths):
        answers.by_path[path] = 200, {}, (bundle / path.split("/", 3)[3].partition("?")[0]).read_bytes()
    return paths


def attend(settings: EdgeSettings, answers: Answers, **changed: Any) -> object:
    server = f"ws://127.0.0.1:{answers.port}"
    settings = msgspec.structs.replace(settings, server=server, **changed)
    return asyncio.run(asyncio.wait_for(run_agent(settings), 60.0))


@pytest.mark.parametrize(
    ("place", "data", "error", "sentence"),
    [
        ({"task": OWN_TASK}, None, ConsentError, "name the fields it may read with --fields"),
        ({"task": load_preset("lm")}, None, ConsentError, "--share-text"),
        ({"task": load_preset("sst2")}, None, DataError, "has no field 'sentence'"),
        ({"task": load_preset("reviews")}, "folder", DataError, "holds no file of examples"),
        (None, None, RefusedError, "the token is not one of device pi"),
    ],
)
def test_what_a_run_would_refuse_is_refused_before_anything_large_is_fetched(
    make_bundle: Callable[..., Path],
    settings: EdgeSettings,
    tmp_path: Path,
    place: dict[str, Any] | None,
    data: str | None,
    error: type[Exception],
    sentence: str,
) -> None:
    (tmp_path / "folder").mkdir()
    changed = {"data": str(tmp_path / data)} if data is not None else {}
    with answering() as answers:
        paths = serve_bundle(answers, make_bundle("lora", 2))
        status = 200 if place is not None else 403
        answers.by_path["/v1/device/pi"] = status, {}, json.dumps(place).encode()
        with pytest.raises(error, match=sentence):
            attend(settings, answers, **changed)
    assert not set(answers.asked) & set(paths)


def test_an_older_service_that_does_not_know_places_is_no_hindrance() -> None:
    with answering() as answers:
        assert fetch_offer(Cloud(f"ws://127.0.0.1:{answers.port}", Token("", "secret")), "pi") is None


def end_with(monkeypatch: pytest.MonkeyPatch, *outcomes: Complete | RefusedError) -> None:
    """All of the agent but the websocket: its connections end so, one after the other."""
    left = list(outcomes)

    async def run(session: Session) -> Complete:
        outcome = left.pop(0)
        if isinstance(outcome, RefusedError):
            raise outcome
        return outcome

    monkeypatch.setattr(Session, "take_part", run)


COMPLETE = Complete(run="run-1", reason="completed", round=30)
OTHER_SHARD = RefusedError("another shard; fetch this service's shard again", retry=False, code="shard")


def test_a_device_that_is_late_does_not_say_that_it_took_part(
    make_bundle: Callable[..., Path],
    settings: EdgeSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    end_with(monkeypatch, COMPLETE)
    with answering() as answers:
        serve_bundle(answers, make_bundle("lora", 2))
        with pytest.raises(RefusedError, match=r"run run-1 has ended \(completed at round 30\) without this device"):
            attend(settings, answers)
    assert "peak memory" not in capsys.readouterr().err


@pytest.mark.parametrize("stay", [False, True])
def test_a_shard_that_no_run_wants_any_more_is_let_go_and_the_new_one_fetched(
    make_bundle: Callable[..., Path],
    settings: EdgeSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stay: bool,
) -> None:
    monkeypatch.setattr("hosl_edge.agent.LONGEST_PAUSE_S", 0.1)
    seen: list[str] = []
    bundles = [make_bundle("lora", 2), make_bundle("blocks", 2)]

    async def run(session: Session) -> Complete:
        seen.append(session.device.manifest.shard_digest)
        serve_bundle(answers, bundles[1])
        if len(seen) == 1:
            raise OTHER_SHARD
        raise RefusedError("enough", retry=False)

    monkeypatch.setattr(Session, "take_part", run)
    with answering() as answers:
        serve_bundle(answers, bundles[0])
        with pytest.raises(RefusedError, match="enough"):
            attend(settings, answers, stay=stay)
    assert seen == [load_manifest(bundle).shard_digest for bundle in bundles]
    assert "another shard, which is fetched now" in capsys.readouterr().err


def test_an_agent_that_joined_a_run_and_does_not_stay_ends_with_it(
    make_bundle: Callable[..., Path], settings: EdgeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(session: Session) -> Complete:
        session.progress.run = "run-1"
        raise OTHER_SHARD

    monkeypatch.setattr(Session, "take_part", run)
    with answering() as answers:
        serve_bundle(answers, make_bundle("lora", 2))
        with pytest.raises(RefusedError, match="another shard"):
            attend(settings, answers)


def test_the_weights_are_digested_for_the_summary_while_the_event_loop_goes_on(
    make_bundle: Callable[..., Path], settings: EdgeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    async def run(session: Session) -> Complete:
        session.progress.run = COMPLETE.run
        return COMPLETE

    def digest(device: Device) -> str:
        threads.append(threading.current_thread())
        return "0" * 64

    monkeypatch.setattr(Session, "take_part", run)
    monkeypatch.setattr(Device, "digest", digest)
    with answering() as answers:
        serve_bundle(answers, make_bundle("lora", 2))
        attend(settings, answers)
    assert len(threads) == 1
    assert threads != [threading.main_thread()]
