"""Fetching the shard from a real HTTP server: whole, resumed, refused, damaged, and by two at once."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from hosl_edge.connection import trust
from hosl_edge.connection.fetch import NoSpaceError, fetch_bundle, fetch_snapshot
from hosl_edge.exceptions import ConnectionLost, RefusedError, WrongDigestError
from hosl_protocol.run.manifest import (
    MANIFEST,
    SHARD_GRAPH,
    SHARD_WEIGHTS,
    BundleError,
    FileEntry,
    Manifest,
    describe_file,
    encode_manifest,
)
from hosl_protocol.wire.messages import Snapshot

TOKEN = "the-token"
CONTENT = {SHARD_WEIGHTS: bytes(range(256)) * 12_000, SHARD_GRAPH: b"a graph"}


@dataclass
class Cloud:
    """What the server serves, how it misbehaves, and what it was asked."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    knows_ranges: bool = True
    cuts: dict[str, int] = field(default_factory=dict)
    """Bytes after which the next answer for a path breaks off, once; below zero in its head."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """(path, Range header) of every request."""

    def count(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.asked)


class Handler(BaseHTTPRequestHandler):
    def __init__(self, cloud: Cloud, *rest: object) -> None:
        self.cloud = cloud
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path, wanted = self.path.removeprefix("/v1/").removeprefix("bundle/"), self.headers["Range"]
        self.cloud.asked.append((path, wanted))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.send_error(401)
            return
        if path not in self.cloud.files:
            self.send_error(404)
            return
        body = self.cloud.files[path]
        start = int(re.findall(r"\d+", wanted)[0]) if wanted and self.cloud.knows_ranges else 0
        self.send_response(206 if start else 200)
        if self.cloud.cuts.get(path, 0) < 0:
            self.flush_headers()
            self.cloud.cuts.pop(path)
            return
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : self.cloud.cuts.pop(path, None)])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    bundle = tmp_path / "bundle"
    for path, data in CONTENT.items():
        (bundle / path).parent.mkdir(parents=True, exist_ok=True)
        (bundle / path).write_bytes(data)
    entries = tuple(describe_file(bundle, path) for path in CONTENT)
    cloud = Cloud(files={MANIFEST: encode_manifest(manifest(entries)), **CONTENT})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, cloud))
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    cloud.address = f"ws://127.0.0.1:{server.server_address[1]}"
    yield cloud
    server.shutdown()
    thread.join()
    server.server_close()


def manifest(files: tuple[FileEntry, ...]) -> Manifest:
    return Manifest(
        model="m",
        family="llama",
        architecture="A",
        split=1,
        blocks=2,
        width=4,
        max_length=8,
        pad_token_id=0,
        train="none",
        tensors=(),
        files=files,
    )


def hosl(cloud: Cloud, token: str = TOKEN) -> trust.Cloud:
    return trust.Cloud(cloud.address, trust.Token("", token))


def fetch(cloud: Cloud, cache: Path, token: str = TOKEN) -> Path:
    folder, got = fetch_bundle(hosl(cloud, token), cache, lambda done, size: None)
    assert encode_manifest(got) == cloud.files[MANIFEST]
    return folder


def assert_whole(folder: Path) -> None:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files.pop(".lock")
    assert {name: path.read_bytes() for name, path in files.items()} == CONTENT


def test_a_shard_is_fetched_whole_and_kept_by_its_digest(cloud: Cloud, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    folder, got = fetch_bundle(hosl(cloud), tmp_path / "cache", lambda *pair: heard.append(pair))
    assert_whole(folder)
    assert folder == tmp_path / "cache" / "shards" / got.shard_digest
    size = len(CONTENT[SHARD_WEIGHTS])
    assert [done for done, of in heard if of == size] == sorted({done for done, of in heard if of == size})
    assert (size, size) in heard
    assert fetch(cloud, tmp_path / "cache") == folder
    assert cloud.count(SHARD_WEIGHTS) == 1, "a second start finds it in the cache"


def test_a_broken_download_goes_on_where_it_broke(cloud: Cloud, tmp_path: Path) -> None:
    cloud.cuts[SHARD_WEIGHTS] = 1_500_000
    with pytest.raises(ConnectionLost, match="at 1500000 of 3072000 bytes"):
        fetch(cloud, tmp_path)
    assert_whole(fetch(cloud, tmp_path))
    assert (SHARD_WEIGHTS, "bytes=1500000-") in cloud.asked


def test_a_server_without_ranges_sends_all_of_it_again(cloud: Cloud, tmp_path: Path) -> None:
    cloud.knows_ranges, cloud.cuts[SHARD_WEIGHTS] = False, 1_500_000
    with pytest.raises(ConnectionLost):
        fetch(cloud, tmp_path)
    assert_whole(fetch(cloud, tmp_path))


def test_a_file_of_the_wrong_digest_is_thrown_away(cloud: Cloud, tmp_path: Path) -> None:
    good = cloud.files[SHARD_WEIGHTS]
    cloud.files[SHARD_WEIGHTS] = b"\xff" + good[1:]
    with pytest.raises(WrongDigestError, match=rf"{SHARD_WEIGHTS} has digest \w+, expected") as caught:
        fetch(cloud, tmp_path / "cache")
    assert caught.value.expected == hashlib.sha256(good).hexdigest()
    assert not list((tmp_path / "cache").rglob("shard.safetensors*")), "neither the file nor its part stays"
    cloud.files[SHARD_WEIGHTS] = good
    assert_whole(fetch(cloud, tmp_path / "cache"))


@pytest.mark.parametrize("change", [lambda data: data + b"more", lambda data: data[:-1]])
def test_a_file_of_another_length_is_never_taken(cloud: Cloud, tmp_path: Path, change: object) -> None:
    good = cloud.files[SHARD_WEIGHTS]
    cloud.files[SHARD_WEIGHTS] = change(good)  # type: ignore[operator]
    with pytest.raises(ConnectionLost, match="of 3072000 bytes"):
        fetch(cloud, tmp_path)
    cloud.files[SHARD_WEIGHTS] = good
    assert_whole(fetch(cloud, tmp_path))


def test_an_unknown_token_is_not_tried_again(cloud: Cloud, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="does not know the token") as caught:
        fetch(cloud, tmp_path, "wrong")
    assert not caught.value.retry


def test_a_file_that_the_cloud_lacks_is_named(cloud: Cloud, tmp_path: Path) -> None:
    del cloud.files[SHARD_GRAPH]
    with pytest.raises(ConnectionLost, match=f"{SHARD_GRAPH} answered 404"):
        fetch(cloud, tmp_path)


def test_a_cloud_that_is_away_is_tried_again(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_address[1]
    with pytest.raises(ConnectionLost, match=f"cannot reach http://127.0.0.1:{port}"):
        fetch(Cloud(f"ws://127.0.0.1:{port}"), tmp_path)


def test_a_manifest_that_breaks_off_is_tried_again(cloud: Cloud, tmp_path: Path) -> None:
    cloud.cuts[MANIFEST] = 100
    with pytest.raises(ConnectionLost, match=MANIFEST):
        fetch(cloud, tmp_path)
    assert_whole(fetch(cloud, tmp_path))


def test_a_manifest_whose_head_breaks_off_is_tried_again(cloud: Cloud, tmp_path: Path) -> None:
    cloud.cuts[MANIFEST] = -1
    with pytest.raises(ConnectionLost, match="before its length came"):
        fetch(cloud, tmp_path)
    fetch(cloud, tmp_path)


@pytest.mark.parametrize("data", [b"", b"{}", b"not json"])
def test_a_manifest_that_is_none_is_a_bundle_error(cloud: Cloud, tmp_path: Path, data: bytes) -> None:
    cloud.files[MANIFEST] = data
    with pytest.raises(BundleError, match="is not a manifest"):
        fetch(cloud, tmp_path)


@pytest.mark.parametrize("path", ["shard/../../../stolen", "shard/../../stolen"])
def test_a_manifest_cannot_name_a_file_outside(cloud: Cloud, tmp_path: Path, path: str) -> None:
    entry = FileEntry(path=path, size_bytes=3, sha256="0" * 64)
    cloud.files |= {MANIFEST: encode_manifest(manifest((entry,))), path: b"bad"}
    with pytest.raises(BundleError, match="names a file outside"):
        fetch(cloud, tmp_path / "cache")
    assert not list(tmp_path.rglob("stolen*"))


def test_only_the_shard_is_fetched(cloud: Cloud, tmp_path: Path) -> None:
    entries = msgspec.json.decode(cloud.files[MANIFEST], type=Manifest).files
    tail = FileEntry(path="tail/tail.safetensors", size_bytes=3, sha256="0" * 64)
    cloud.files[MANIFEST] = encode_manifest(manifest((*entries, tail)))
    assert_whole(fetch(cloud, tmp_path))
    assert cloud.count("tail/tail.safetensors") == 0


def test_a_disk_that_is_too_small_is_named_before_the_download(cloud: Cloud, tmp_path: Path) -> None:
    entry = FileEntry(path=SHARD_WEIGHTS, size_bytes=10**18, sha256="0" * 64)
    cloud.files[MANIFEST] = encode_manifest(manifest((entry,)))
    with pytest.raises(NoSpaceError, match=rf"shard.safetensors needs {10**18} more"):
        fetch(cloud, tmp_path)
    assert cloud.count(SHARD_WEIGHTS) == 0


def test_two_agents_that_share_a_cache_fetch_it_once(cloud: Cloud, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: fetch(cloud, tmp_path), range(2))
    assert first == second
    assert_whole(first)
    assert cloud.count(SHARD_WEIGHTS) == 1


def test_a_cached_file_that_was_damaged_is_fetched_again(
    cloud: Cloud, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fetch(cloud, tmp_path)
    damaged = folder / SHARD_WEIGHTS
    damaged.write_bytes(b"\xff" + CONTENT[SHARD_WEIGHTS][1:])
    with caplog.at_level(logging.WARNING):
        assert_whole(fetch(cloud, tmp_path))
    assert cloud.count(SHARD_WEIGHTS) == 2
    assert cloud.count(SHARD_GRAPH) == 1, "what is whole stays"
    assert [record.message for record in caplog.records] == [f"{damaged} is damaged; it is fetched again"]


def test_only_a_download_of_a_megabyte_tells_the_links_speed(cloud: Cloud, tmp_path: Path) -> None:
    rates: list[float] = []
    fetch_bundle(hosl(cloud), tmp_path, lambda done, size: None, rates.append)
    assert len(rates) == 1, "of the weights, not of the graph"
    assert rates[0] > 0
    fetch_bundle(hosl(cloud), tmp_path, lambda done, size: None, rates.append)
    assert len(rates) == 1, "what is cached was not downloaded"


def snapshot_of(data: bytes) -> Snapshot:
    return Snapshot(round=7, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def test_a_snapshot_is_fetched_in_parts_and_checked(cloud: Cloud, tmp_path: Path) -> None:
    data, target = CONTENT[SHARD_WEIGHTS], tmp_path / "snapshot-x"
    cloud.files["snapshot/run-1/7"], cloud.cuts["snapshot/run-1/7"] = data, 1_500_000
    rates: list[float] = []

    def fetch_it() -> None:
        fetch_snapshot(hosl(cloud), "run-1", snapshot_of(data), target, lambda done, size: None, rates.append)

    with pytest.raises(ConnectionLost, match="at 1500000 of 3072000 bytes"):
        fetch_it()
    assert len(rates) == 1, "what broke off tells the link's speed, too"
    fetch_it()
    assert target.read_bytes() == data
    assert ("snapshot/run-1/7", "bytes=1500000-") in cloud.asked
    assert len(rates) == 2
    fetch_it()
    assert cloud.count("snapshot/run-1/7") == 2, "what is there is not fetched again"


def test_a_snapshot_that_is_gone_is_asked_for_by_connecting_again(cloud: Cloud, tmp_path: Path) -> None:
    with pytest.raises(ConnectionLost, match="snapshot/run-1/7 answered 404"):
        fetch_snapshot(hosl(cloud), "run-1", snapshot_of(b"x"), tmp_path / "s", lambda *pair: None, lambda rate: None)
