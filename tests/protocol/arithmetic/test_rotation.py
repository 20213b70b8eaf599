"""Gradients in a few bits: against a decoder written from the specification, without bias, and with the least error."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from hosl_protocol.arithmetic import kernel
from hosl_protocol.arithmetic.directions import CHUNK, direction
from hosl_protocol.arithmetic.rotation import GradientLayout, Rotation, hadamard, rotation_of
from hosl_protocol.exceptions import HoslError

pytestmark = pytest.mark.usefixtures("arithmetic")

BITS = [1, 2, 4, 8]
COMPILED = kernel.load_hadamard()
ROTATION = Rotation(42, 1, 0)


def make_gradient(elements, seed=0):
    """Entries as unlike each other as a gradient's are."""
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(elements) * generator.exponential(1.0, elements)).astype(np.float32)


def encode(values, bits, rotation=ROTATION, index=0):
    layout = GradientLayout([values.size] * (index + 1), bits)
    codes, scales = layout.empty()
    layout.encode(values, index, rotation, codes, scales)
    return layout, codes, scales


def decode(layout, codes, scales, rotation=ROTATION, index=0):
    out = np.empty(layout.sizes[index], np.float32)
    for start in range(0, out.size, CHUNK):
        layout.decode(codes, scales, index, rotation, start, out[start : start + CHUNK])
    return out


def blocks_by_hand(elements):
    lengths = []
    while elements > 0:
        fits = [2**power for power in range(5, 13) if 2**power <= elements]
        length = fits[-1] if fits else next(2**power for power in range(3, 6) if 2**power >= elements)
        lengths.append(length)
        elements -= length
    return lengths


def decode_by_hand(codes, scales, elements, bits, rotation, index):
    """As protocol/README.md says it, an element at a time, in whole numbers."""
    bit_stream = [byte >> place & 1 for byte in codes.tolist() for place in range(8)]
    levels = [sum(bit_stream[n * bits + j] << j for j in range(bits)) for n in range(len(bit_stream) // bits)]
    z = direction(rotation.seed, rotation.round, rotation.number, index, elements).tolist()

    values, first = [], 0
    for length, scale in zip(blocks_by_hand(elements), scales, strict=True):
        c = [2 * level + 1 - 2**bits for level in levels[first : first + length]]
        for i in range(min(length, elements - first)):
            whole = sum(-each if (i & j).bit_count() % 2 else each for j, each in enumerate(c))
            values.append(np.float32(scale) * np.float32(whole * int(z[first + i])) + np.float32(0.0))
        first += length
    return np.array(values, np.float32)


@pytest.mark.parametrize(("elements", "lengths"), [(300, [256, 32, 16]), (17, [32]), (5000, [4096, 512, 256, 128, 8])])
def test_a_tensor_is_cut_into_blocks_of_powers_of_two(elements, lengths):
    assert blocks_by_hand(elements) == lengths
    layout = GradientLayout([elements], 1)
    assert (layout.scales, layout.codes) == (len(lengths), sum(lengths) // 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("elements", [1, 8, 11, 31, 32, 300, 576])
def test_decoding_is_what_the_specification_says(bits, elements):
    layout = GradientLayout([5, elements], bits)
    codes = np.random.default_rng(elements).integers(0, 256, layout.codes, np.uint8)
    scales = np.random.default_rng(bits).standard_normal(layout.scales).astype(np.float32)
    rotation = Rotation(2**53 - 1, 2**48 - 1, 65534)
    skipped = len(blocks_by_hand(5))
    expected = decode_by_hand(
        codes[sum(blocks_by_hand(5)) * bits // 8 :], scales[skipped:], elements, bits, rotation, 1
    )
    assert decode(layout, codes, scales, rotation, 1).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("bits", "values"),
    [
        (1, [-1.5, -0.5, -1.5, -0.5, 0.5, -0.5, -0.5, 0.5, 0.5, -0.5, -0.5]),
        (2, [-2, 3, -1, 2, -1, -2, 4, 3, -2, 1, 1]),
        (4, [-1, 9, -9, -3, -5, -3, 7, 25, -18, 2, -8]),
        (8, [-120, -20, -88, 128, -208, -128, -384, 128, -32, 128, -128]),
    ],
)
def test_decoding_gives_the_golden_values(bits, values):
    layout = GradientLayout([11], bits)
    codes = ((37 * np.arange(layout.codes) + 11) % 256).astype(np.uint8)
    assert decode(layout, codes, np.array([0.25], np.float32)).tolist() == values


@pytest.mark.parametrize(
    ("bits", "codes", "scale"),
    [
        (1, "7568", 0.102008931),
        (2, "623b9069", 0.043807514),
        (4, "286a8c4d4387a77a", 0.013798309),
        (8, "84449f6cac8abb5d53567b8a7b9c967b", 0.001283016),
    ],
)
def test_encoding_gives_the_golden_codes(bits, codes, scale):
    values = (((37 * np.arange(11) + 11) % 23 - 11) / 16).astype(np.float32)
    _, found, scales = encode(values, bits, Rotation(42, 1, 56009))
    assert found.tobytes().hex() == codes
    assert scales.tolist() == [pytest.approx(scale, rel=1e-6)]


@pytest.mark.parametrize(("bits", "largest_error"), [(1, 0.6), (2, 0.14), (4, 0.0125), (8, 0.0002)])
@pytest.mark.parametrize("elements", [4096, 4608, 3 * CHUNK + 77])
def test_more_bits_leave_less_error(bits, largest_error, elements):
    """At one bit no unbiased estimate of a rotated block leaves less than π/2 - 1 = 0.571 of its square."""
    values = make_gradient(elements)
    decoded = decode(*encode(values, bits))
    assert np.square(decoded - values).sum() < largest_error * np.square(values).sum()


@pytest.mark.parametrize("bits", BITS)
def test_the_mean_over_rotations_is_the_gradient(bits):
    values, rotations = make_gradient(2048), 200
    mean = np.zeros(values.size)
    for number in range(1, rotations + 1):
        rotation = Rotation(42, 1, number)
        mean += decode(*encode(values, bits, rotation), rotation) / rotations
    left = np.linalg.norm(mean - values) / np.linalg.norm(values)
    assert left < 1.2 * math.sqrt(0.6 / rotations)
    assert abs(float(mean @ values) / float(values @ values) - 1.0) < 1e-3


def test_thirty_two_bits_are_the_values_themselves():
    values = make_gradient(70_001)
    assert np.signbit(decode(*encode(np.array([-0.0], np.float32), 32))).tolist() == [False]
    layout, codes, scales = encode(values, 32)
    assert (layout.codes, scales.tobytes()) == (0, values.tobytes())
    assert decode(layout, codes, scales).tobytes() == values.tobytes()
    assert layout.largest(codes, scales, 0, ROTATION) == np.abs(values).max()


@settings(max_examples=40)
@given(
    npst.arrays(np.float32, st.integers(1, 200), elements=st.floats(width=32)), st.sampled_from(BITS), st.integers(0, 9)
)
def test_whatever_a_gradient_holds_it_is_encoded_or_marked(values, bits, round_):
    rotation = Rotation(1, round_, 3)
    layout, codes, scales = encode(values, bits, rotation)
    if np.isfinite(values).all():
        with np.errstate(over="ignore", invalid="ignore"):
            decoded = decode(layout, codes, scales, rotation)
        # A sum over a block may be more than float32 holds, where nearly its largest numbers are added.
        if np.abs(values).max() < 1e35:
            assert np.isfinite(scales).all()
            assert np.linalg.norm(decoded.astype(float) - values) <= 2 * np.linalg.norm(values.astype(float)) + 1e-37
    else:
        assert not np.isfinite(scales).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_gradient_of_zeros_stays_one(bits):
    layout, codes, scales = encode(np.zeros(70, np.float32), bits)
    assert scales.tolist() == [0.0] * layout.scales
    assert not decode(layout, codes, scales).any()


@pytest.mark.parametrize("bits", [*BITS, 32])
def test_chunks_are_those_of_the_whole_tensor(bits):
    values = make_gradient(2 * CHUNK + 4096 + 33)
    layout, codes, scales = encode(values, bits, index=1)
    whole = decode(layout, codes, scales, index=1)
    part = np.empty(4096 + 33, np.float32)
    layout.decode(codes, scales, 1, ROTATION, 2 * CHUNK, part)
    assert part.tobytes() == whole[2 * CHUNK :].tobytes()
    assert layout.largest(codes, scales, 1, ROTATION) == np.abs(whole).max()


def test_a_gradient_of_another_shape_is_refused():
    layout = GradientLayout([3, 4], 1)
    with pytest.raises(HoslError, match=r"gradient of tensor 1 has shape \[3\], expected 4"):
        layout.encode(np.zeros(3, np.float32), 1, ROTATION, *layout.empty())


def test_devices_have_rotations_of_their_own():
    assert rotation_of("pi-1") == 56009
    assert len({rotation_of(f"device-{n}") for n in range(100)}) > 95
    assert all(1 <= rotation_of(f"device-{n}") <= 65534 for n in range(1000))


@pytest.mark.skipif(COMPILED is None, reason="installed without a C compiler")
@pytest.mark.parametrize("length", [8, 16, 32, 512, 4096])
def test_both_transforms_round_alike(length):
    assert COMPILED is not None
    compiled = make_gradient(3 * length).reshape(3, length)
    plain = compiled.copy()
    COMPILED(compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "load_hadamard", lambda: None)
        hadamard(plain)
    assert plain.tobytes() == compiled.tobytes()
