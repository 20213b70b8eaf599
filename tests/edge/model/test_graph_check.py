"""What a hostile cloud may put into a graph, and that ONNX Runtime never gets to see it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosl_edge.model.graph_check import check_graph
from hosl_edge.model.shard import Shard
from hosl_protocol.run.manifest import SHARD_GRAPH, BundleError, load_manifest


def number(value: int) -> bytes:
    """A protobuf varint."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def part(field: int, value: bytes | int) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return number(field << 3) + number(value)
    return number(field << 3 | 2) + number(len(value)) + value


# By the numbers of onnx.proto.
ENTRY = part(1, b"location") + part(2, b"../private.key")
EXTERNAL = part(1, 4) + part(2, 1) + part(8, b"w") + part(13, ENTRY) + part(14, 1)
INSIDE = part(1, 1) + part(2, 1) + part(8, b"w") + part(9, bytes(4)) + part(14, 0)
GOOD_NODE = part(2, b"y") + part(4, b"Constant") + part(5, part(1, b"value") + part(5, INSIDE))


def model(graph: bytes) -> bytes:
    return part(1, 9) + part(7, graph) + part(8, part(2, 17))


def node(attribute: bytes) -> bytes:
    return part(1, part(2, b"y") + part(4, b"Constant") + part(5, part(1, b"value") + attribute))


def test_a_graph_that_holds_its_values_passes() -> None:
    check_graph(model(part(1, GOOD_NODE) + part(5, INSIDE)))


EXTERNALS = {
    "an initializer": model(part(5, EXTERNAL)),
    "a node's tensor": model(node(part(5, EXTERNAL))),
    "one of a node's tensors": model(node(part(10, INSIDE) + part(10, EXTERNAL))),
    "a branch": model(node(part(6, node(part(5, EXTERNAL))))),
    "one of the branches": model(node(part(11, part(5, EXTERNAL)))),
    "a sparse initializer": model(part(15, part(1, EXTERNAL))),
    "a sparse tensor's indices": model(node(part(22, part(2, EXTERNAL)))),
    "a function": part(25, part(7, node(part(5, EXTERNAL))[2:])) + model(b""),
    "a function's defaults": part(25, part(11, part(5, EXTERNAL))) + model(b""),
    "a training graph": part(20, part(1, part(5, EXTERNAL))) + model(b""),
    "no location": model(part(5, part(13, ENTRY))),
    "no file": model(part(5, part(14, 1))),
    "a location of more bits": model(part(5, part(14, (1 << 32) + 1))),
    "a location in bytes": model(part(5, part(14, b"\x01"))),
    "a second graph": model(part(5, INSIDE)) + part(7, part(5, EXTERNAL)),
}


@pytest.mark.parametrize("name", EXTERNALS)
def test_a_tensor_in_another_file_is_refused_wherever_it_stands(name: str) -> None:
    with pytest.raises(BundleError, match="a tensor of the graph has its values in another file"):
        check_graph(EXTERNALS[name])


@pytest.mark.parametrize("domain", [b"com.microsoft", b"my.ops", b"ai.onnx.ml", b"\xff"])
def test_operators_of_another_domain_are_refused(domain: bytes) -> None:
    check_graph(model(part(1, part(4, b"Add") + part(7, b"ai.onnx"))))
    with pytest.raises(BundleError, match="the graph uses operators of the domain"):
        check_graph(model(part(1, part(4, b"Add") + part(7, domain))))


def nested(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        graph = node(part(6, graph))
    return model(graph)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x08\x01\x00\x00ORTM" + bytes(100), "ONNX Runtime's own format"),
        (model(b"\x01")[:-1], "ends in the middle"),
        (part(7, b"abc")[:-1], "ends in the middle"),
        (b"\x0b", "wire type 3"),
        (number((1 << 35) | 7 << 3 | 2) + b"\x00", "number is too large"),
        (b"\x08" + b"\xff" * 11, "more than 64 bits"),
        (nested(100), "nested more than 64 deep"),
    ],
)
def test_what_is_no_graph_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(BundleError, match=problem):
        check_graph(data)
    check_graph(nested(10))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_to_their_end_or_refused(data: bytes) -> None:
    with contextlib.suppress(BundleError):
        check_graph(data)


def test_a_shard_whose_graph_names_a_file_is_not_opened(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = make_bundle("lora", 2)
    manifest = load_manifest(bundle)
    for path in bundle.glob("shard/*"):
        (tmp_path / "shard").mkdir(exist_ok=True)
        (tmp_path / "shard" / path.name).write_bytes(path.read_bytes())
    good = Shard(tmp_path, manifest, threads=1)
    good.open()
    graph = tmp_path / SHARD_GRAPH
    graph.write_bytes(graph.read_bytes() + part(7, node(part(5, EXTERNAL))))
    with pytest.raises(BundleError, match=r"shard\.onnx cannot be used \(a tensor of the graph has its values in"):
        Shard(tmp_path, manifest, threads=1).open()
