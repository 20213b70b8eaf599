"""What a graph may hold: operators of the standard domains, and tensors with their values inside.

ONNX Runtime reads files that a node's tensor names, and the cloud would learn what stands in them. So the graph is
first read here, as the protobuf that it is, down to each tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

from hosl_protocol.run.manifest import BundleError

STANDARD_DOMAINS = (b"", b"ai.onnx")
_MAX_DEPTH = 64

_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "tensor": {},
}
"""The messages of onnx.proto on the way to a tensor: which of their fields, by number, hold which message."""
_NODE_DOMAIN, _EXTERNAL_DATA, _DATA_LOCATION = 7, 13, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def check_graph(data: bytes) -> None:
    """Raise BundleError for a graph that names files or operators of others, or is none."""
    if data[4:8] == b"ORTM":
        raise BundleError("it is of ONNX Runtime's own format, expected ONNX")
    try:
        _check(memoryview(data), "model", 0)
    except IndexError:
        raise BundleError("it is no ONNX graph: it ends in the middle of a field") from None


def _check(message: memoryview, kind: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise BundleError(f"its graphs are nested more than {_MAX_DEPTH} deep")
    for field, wire_type, value in _fields(message):
        if kind == "tensor" and (field == _EXTERNAL_DATA or (field == _DATA_LOCATION and value != 0)):
            raise BundleError("a tensor of the graph has its values in another file")
        if isinstance(value, int):
            continue
        if kind == "node" and field == _NODE_DOMAIN and bytes(value) not in STANDARD_DOMAINS:
            raise BundleError(f"the graph uses operators of the domain {bytes(value)[:80]!r}, expected ONNX's own")
        if wire_type == _BYTES and field in _MESSAGES[kind]:
            _check(value, _MESSAGES[kind][field], depth + 1)


def _fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yield a message's fields: number, wire type, and a number or bytes. Raises IndexError where it ends too soon."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        if key >= 1 << 32:  # other readers cut it off, and see another field
            raise BundleError("it is no ONNX graph: a field's number is too large")
        field, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, place = _varint(message, place)
            yield field, wire_type, value
            continue

        if wire_type == _BYTES:
            size, place = _varint(message, place)
        elif wire_type in (_FIXED64, _FIXED32):
            size = 8 if wire_type == _FIXED64 else 4
        else:
            raise BundleError(f"it is no ONNX graph: a field of the wire type {wire_type}")
        if size > len(message) - place:
            raise IndexError

        yield field, wire_type, message[place : place + size]
        place += size


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise BundleError("it is no ONNX graph: a number of more than 64 bits")
