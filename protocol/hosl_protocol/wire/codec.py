"""Frames: a message and its tensors in the safetensors layout, cut into pieces for the websocket.

First piece: 8-byte little-endian header length and JSON header. Then data pieces of at most 256 KiB.
Every length is checked against the agreed bounds before memory is taken. Specification: protocol/README.md.
"""

from __future__ import annotations

import math
import struct
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from hosl_protocol.exceptions import FrameError, LimitError
from hosl_protocol.run.settings import WireDtype
from hosl_protocol.wire.messages import FLOATS, FromCloud, FromEdge, Message, TensorSpec, name_of
from hosl_protocol.wire.packing import Dither, pack, row_bytes, unpack

PIECE_BYTES = 256 * 1024
MAX_HEADER_BYTES = 64 * 1024
MAX_FRAME_BYTES = 2**34
"""Most tensor bytes in a frame, whatever a run's bounds come to."""
MESSAGE_KEY = "hosl"

Array = npt.NDArray[Any]
Piece = bytes | memoryview

_SAFETENSORS_NAME: dict[WireDtype, str] = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "I8",
    "int4": "U8",
}
# bfloat16 has no numpy type: its bits travel as uint16.
_STORAGE = {"F64": "<f8", "F32": "<f4", "I32": "<i4", "F16": "<f2", "BF16": "<u2", "I8": "|i1", "U8": "|u1"}
_PACKED_BITS = {"I8": 8, "U8": 4}
"""Bits of a number in packed rows, whose bytes the shape counts."""


class _TensorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Kind(msgspec.Struct, frozen=True):
    type: str = ""


_METADATA_KEY = "__metadata__"
_LONGEST_SENTENCE = 300
"""Most characters of an error that quotes the peer."""

_KIND = msgspec.json.Decoder(_Kind)
_ENTRIES = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TEXT = msgspec.json.Decoder(str)
_TENSOR_INFO = msgspec.json.Decoder(_TensorInfo)


@dataclass(frozen=True)
class Frame:
    """A message with its tensors by name; floating tensors arrive as float32 (or float64 where the spec says F64)."""

    message: Message
    tensors: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Bounds:
    """Largest size of each named dimension; `D`, `P` and `C` must be met exactly. Nothing is allowed at first."""

    largest: Mapping[str, int] = field(default_factory=dict)
    exact: frozenset[str] = frozenset({"D", "P", "C"})
    wire_dtypes: tuple[str, ...] = FLOATS
    """Types that activations and their gradients may have."""

    def check(self, tensor: str, dimension: str, size: int) -> None:
        """Raise LimitError or FrameError where `size` does not fit."""
        bound = self.largest.get(dimension, 0)
        if size > bound:
            raise LimitError(f"dimension {dimension} of {tensor}", size, bound)
        if dimension in self.exact and size != bound:
            raise FrameError(f"dimension {dimension} of {tensor} is {size}, expected {bound}")


def encode(
    message: Message, tensors: Mapping[str, Array], wire_dtype: WireDtype = "float32", dither: Dither | None = None
) -> Iterator[Piece]:
    """Yield the frame's pieces in order; converts to the wire dtype piece by piece, so that no second copy exists.

    What is small goes as one piece with its neighbours: a message on a websocket costs more than a few bytes do.
    `dither` is for λ in 8 or 4 bits; its round is the message's.

    Raises KeyError where `tensors` lacks one that the message must carry, LimitError where the header is too long.
    """
    plan = [
        (name, tensors[name], spec, wire_name(spec, wire_dtype))
        for name, spec in type(message).tensors.items()
        if spec.required or (name in tensors and tensors[name].shape[-1])
    ]
    dither = replace(dither or Dither(), round=getattr(message, "round", 0))

    shapes = [(name, _wire_shape(array.shape, packed_bits(spec, dtype)), dtype) for name, array, spec, dtype in plan]
    yield encode_header(message, shapes)
    yield from _joined(piece for _, array, spec, dtype in plan for piece in _pieces(array, spec, dtype, dither))


def encode_header(message: Message, tensors: list[tuple[str, tuple[int, ...], str]]) -> bytes:
    """Make the first piece of a frame, padded with spaces so that tensor data would start at a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {MESSAGE_KEY: msgspec.json.encode(message).decode()}}
    offset = 0
    for name, shape, dtype in tensors:
        end = offset + math.prod(shape) * np.dtype(_STORAGE[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, end)}
        offset = end

    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise LimitError("header in bytes", len(text), MAX_HEADER_BYTES)
    return struct.pack("<Q", len(text)) + text


def wire_name(spec: TensorSpec, wire_dtype: WireDtype) -> str:
    """The safetensors name of the type that a tensor has on the wire."""
    return _SAFETENSORS_NAME[wire_dtype] if spec.dtypes == FLOATS else spec.dtypes[0]


def packed_bits(spec: TensorSpec, dtype: str) -> int:
    """Bits of a number where the tensor goes in packed rows; else 0."""
    return _PACKED_BITS.get(dtype, 0) if spec.dtypes == FLOATS else 0


def _wire_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    return (*shape[:-1], row_bytes(shape[-1], bits)) if bits else shape


def _pieces(array: Array, spec: TensorSpec, dtype: str, dither: Dither) -> Iterator[memoryview]:
    if bits := packed_bits(spec, dtype):
        yield from _packed_pieces(array, bits, dither if spec.dithered else None)
        return
    flat = np.ascontiguousarray(array).reshape(-1)
    elements = PIECE_BYTES // np.dtype(_STORAGE[dtype]).itemsize
    # Converted as they are sent: a half-precision copy of a whole set would come on top of the set.
    for start in range(0, flat.size, elements):
        yield _to_wire(flat[start : start + elements], dtype).data.cast("B")


def _packed_pieces(values_TD: Array, bits: int, dither: Dither | None) -> Iterator[memoryview]:
    size = row_bytes(values_TD.shape[1], bits)
    rows = max(1, PIECE_BYTES // max(size, 1))
    for start in range(0, len(values_TD), rows):
        packed = pack(values_TD[start : start + rows], bits, dither, start).data.cast("B")
        for place in range(0, len(packed), PIECE_BYTES):  # one, but for rows that are longer
            yield packed[place : place + PIECE_BYTES]


def _joined(pieces: Iterable[memoryview]) -> Iterator[Piece]:
    """Join neighbours that fit into one piece."""
    held: list[memoryview] = []
    size = 0
    for piece in pieces:
        if size + len(piece) > PIECE_BYTES:
            yield _one(held)
            held, size = [], 0
        held.append(piece)
        size += len(piece)
    if held:
        yield _one(held)


def _one(pieces: list[memoryview]) -> Piece:
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _to_wire(values: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return to_bfloat16_bits(values)
    if dtype == "F16":
        largest = np.float32(65504.0)  # float16's; above it stands infinity
        return np.clip(values, -largest, largest).astype("<f2")
    return np.ascontiguousarray(values, dtype=_STORAGE[dtype])


def to_bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """float32 to the bits of bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    # Half of the last place that stays, and one more where that place is odd: ties go to even.
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    # Rounding would carry a NaN's bits over into infinity; the quiet bit keeps it one.
    quiet = bits >> np.uint32(16) | np.uint32(0x40)
    return np.asarray(np.where(np.isnan(values), quiet, rounded), dtype="<u2")


def from_bfloat16_bits(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The bits of bfloat16 as float32, exactly."""
    return np.asarray((bits.astype("<u4") << np.uint32(16)).view("<f4"))


Bytes = npt.NDArray[np.uint8]

_TWO_BYTES: dict[str, Callable[[npt.NDArray[np.uint16]], Array]] = {
    "F16": lambda bits: bits.view("<f2"),
    "BF16": from_bfloat16_bits,
}
"""What makes numbers of a two-byte type's bits."""


class _Widened:
    """A tensor of small numbers as far as it is there: to convert a whole one takes long, a piece does not."""

    def __init__(self, info: _TensorInfo, bits: int, width: int) -> None:
        """`bits` and `width` are those of packed rows; 0 bits are numbers of two bytes."""
        self._start, self._end = info.data_offsets
        self._dtype, self._bits = info.dtype, bits
        self._unit_bytes = max(info.shape[-1], 1) if bits else 2  # of what is converted at once: a row, or a number
        self.values = np.empty((info.shape[0], width) if bits else info.shape, np.float32)

    def take(self, buffer: Bytes, former: int, filled: int) -> None:
        """Convert what ends in the bytes of the frame from `former` to `filled`; a piece may cut a row in two."""
        first, last = (max(min(place, self._end) - self._start, 0) // self._unit_bytes for place in (former, filled))
        if first == last:
            return
        stored = buffer[self._start + first * self._unit_bytes : self._start + last * self._unit_bytes]
        if self._bits:
            unpack(stored.reshape(last - first, -1), self._bits, self.values[first:last])
        else:
            self.values.reshape(-1)[first:last] = _TWO_BYTES[self._dtype](np.frombuffer(stored.data, "<u2"))


# Made once, for that takes milliseconds, and on import: threads that first use a type at the same time crash msgspec.
_DECODERS: dict[Any, msgspec.json.Decoder[Any]] = {
    union: msgspec.json.Decoder(union) for union in (FromEdge, FromCloud)
}


class FrameReader:
    """Puts pieces together: `feed` returns a frame when its last byte is in, else None.

    Between frames it holds nothing; within one, memory for all its tensors, whose sizes were checked before. After an
    error it is in the middle of nothing known, and must not be fed again.
    """

    def __init__(
        self, union: Any, bounds: Bounds | None = None, check_due: Callable[[Message], None] = lambda message: None
    ) -> None:
        self.bounds = bounds or Bounds()
        self._check_due = check_due  # raises where the message is not due, before memory is taken for its tensors
        self._decoder = _DECODERS[union] if union in _DECODERS else msgspec.json.Decoder(union)
        self._message: Message | None = None
        self._layout: dict[str, _TensorInfo] = {}
        self._buffer: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        self._filled = 0
        self._widened: dict[str, _Widened] = {}

    @property
    def is_between_frames(self) -> bool:
        """Whether a connection that ends now ends cleanly."""
        return self._message is None

    def feed(self, piece: bytes | bytearray | memoryview) -> Frame | None:
        """Take one websocket message. Raises FrameError or LimitError; the reader is then unusable."""
        if self._message is None:
            self._start(bytes(piece) if len(piece) <= MAX_HEADER_BYTES + 8 else _refuse_header(len(piece)))
        else:
            self._fill(piece)
        return self._finish() if self._filled == self._buffer.size else None

    def _start(self, piece: bytes) -> None:
        message, layout = decode_header(piece, self._decoder)
        # All checks come before memory is taken: a peer must not cost us what it only announces.
        self._check_due(message)
        total = check_layout(message, layout, self.bounds)

        try:
            self._buffer, self._filled = np.empty(total, np.uint8), 0
            self._widened = {
                name: _Widened(info, bits, self.bounds.largest.get("D", 0))
                for name, info in layout.items()
                if (bits := packed_bits(type(message).tensors[name], info.dtype)) or info.dtype in _TWO_BYTES
            }
        except MemoryError as error:
            raise FrameError(f"{name_of(message)} of {total} bytes does not fit into memory") from error
        self._message, self._layout = message, layout

    def _fill(self, piece: bytes | bytearray | memoryview) -> None:
        end = self._filled + len(piece)
        if not piece or len(piece) > PIECE_BYTES or end > self._buffer.size:
            raise FrameError(
                f"data piece of {len(piece)} bytes, expected 1 to {min(PIECE_BYTES, self._buffer.size - self._filled)}"
            )
        self._buffer[self._filled : end] = np.frombuffer(piece, np.uint8)
        for widened in self._widened.values():
            widened.take(self._buffer, self._filled, end)
        self._filled = end

    def _finish(self) -> Frame:
        assert self._message is not None
        tensors = {
            name: self._widened[name].values if name in self._widened else _view(self._buffer, info)
            for name, info in self._layout.items()
        }
        frame = Frame(self._message, tensors)
        self._message, self._layout, self._buffer, self._filled = None, {}, np.empty(0, np.uint8), 0
        self._widened = {}
        return frame


def _refuse_header(size: int) -> bytes:
    raise LimitError("header piece in bytes", size, MAX_HEADER_BYTES + 8)


def decode_header(piece: bytes, decoder: msgspec.json.Decoder[Any]) -> tuple[Message, dict[str, _TensorInfo]]:
    """Parse a frame's first piece; shapes and offsets are not judged yet. Raises FrameError."""
    if len(piece) < 8:
        raise FrameError(f"header piece of {len(piece)} bytes, expected at least 8")
    (length,) = struct.unpack_from("<Q", piece)
    if length != len(piece) - 8:
        raise FrameError(f"header length says {length}, the piece holds {len(piece) - 8}")

    entries = _decode("frame header", piece[8:], _ENTRIES)
    message = _decode_message(entries.pop(_METADATA_KEY, None), decoder)
    layout = {
        name: _decode(f"entry {name!r:.80} of the frame header", raw, _TENSOR_INFO) for name, raw in entries.items()
    }
    return message, dict(sorted(layout.items(), key=lambda item: item[1].data_offsets))


def _decode_message(raw: msgspec.Raw | None, decoder: msgspec.json.Decoder[Any]) -> Message:
    if raw is None:
        raise FrameError(f"frame header without {_METADATA_KEY}, where the message is")
    entries = _decode(f"{_METADATA_KEY} of the frame header", raw, _ENTRIES)
    metadata = {name: _decode(f"entry {name!r:.80} of {_METADATA_KEY}", each, _TEXT) for name, each in entries.items()}
    if MESSAGE_KEY not in metadata:
        raise FrameError(f"{_METADATA_KEY} of the frame header has no entry {MESSAGE_KEY!r}, the message")

    # The type first: what is wrong is then told of that message, and not of all that it might be.
    text = metadata[MESSAGE_KEY]
    kind = _decode("message", text, _KIND).type
    known = [name_of(each) for each in typing.get_args(decoder.type)]
    if kind not in known:
        raise FrameError(f"message: field type: expected {' or '.join(known)}, got {kind!r:.80}")
    message: Message = _decode(f"message {kind}", text, decoder)
    return message


def _decode(what: str, text: bytes | str | msgspec.Raw, decoder: msgspec.json.Decoder[Any]) -> Any:
    """Decode JSON. Raises FrameError, which says what is wrong with `what`, the field and the type it should have."""
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        sentence, _, path = str(error).partition(" - at ")
        field = path.strip("`").removeprefix("$").lstrip(".")
        problem = f"{sentence[:1].lower()}{sentence[1:]}"
        raise FrameError(f"{what}: {f'field {field}: ' if field else ''}{problem}"[:_LONGEST_SENTENCE]) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"{what} is not JSON: {error}"[:_LONGEST_SENTENCE]) from error


def check_layout(message: Message, layout: Mapping[str, _TensorInfo], bounds: Bounds) -> int:
    """Check names, types, shapes and offsets against the message's specification. Returns the payload's bytes."""
    specs = type(message).tensors
    what = name_of(message)
    for name in specs.keys() - layout.keys():
        if specs[name].required or bounds.largest.get(specs[name].shape[-1]):
            raise FrameError(f"{what} lacks tensor {name}")

    # Offsets must follow each other without a gap: a byte that no tensor has could say anything.
    sizes: dict[str, int] = {}
    end = 0
    for name, info in layout.items():
        if name not in specs:
            raise FrameError(f"{what} carries unknown tensor {name!r:.80}")
        _check_shape(f"{what}.{name}", info, specs[name], sizes, bounds)
        expected = (end, end + math.prod(info.shape) * np.dtype(_STORAGE[info.dtype]).itemsize)
        if info.data_offsets != expected:
            raise FrameError(f"{what}.{name} has offsets {list(info.data_offsets)}, expected {list(expected)}")
        end = expected[1]
    if end > MAX_FRAME_BYTES:
        raise LimitError(f"tensor bytes of {what}", end, MAX_FRAME_BYTES)
    return end


def _check_shape(what: str, info: _TensorInfo, spec: TensorSpec, sizes: dict[str, int], bounds: Bounds) -> None:
    dtypes = bounds.wire_dtypes if spec.dtypes == FLOATS else spec.dtypes
    if info.dtype not in dtypes:
        raise FrameError(f"{what} has type {info.dtype!r:.20}, expected {' or '.join(dtypes)}")
    if len(info.shape) != len(spec.shape):
        raise FrameError(f"{what} has {len(info.shape)} dimensions, expected {len(spec.shape)}")
    bits = packed_bits(spec, info.dtype)
    for dimension, size in zip(spec.shape, info.shape, strict=True):
        if size < 0:
            raise FrameError(f"{what} has a negative dimension {size}")
        if bits and dimension == "D":
            _check_row(what, size, bounds.largest.get("D", 0), bits)
            continue
        bounds.check(what, dimension, size)
        # One letter, one size: lengths, labels and activations of a frame must belong together.
        if sizes.setdefault(dimension, size) != size:
            raise FrameError(f"{what} has {dimension} = {size}, another tensor of the frame has {sizes[dimension]}")


def _check_row(what: str, size: int, width: int, bits: int) -> None:
    expected = row_bytes(width, bits)
    if size != expected:
        raise FrameError(f"{what} has rows of {size} bytes, expected {expected} for a width of {width}")


def _view(buffer: npt.NDArray[np.uint8], info: _TensorInfo) -> Array:
    start, end = info.data_offsets
    return np.frombuffer(buffer[start:end].data, dtype=_STORAGE[info.dtype]).reshape(info.shape)
