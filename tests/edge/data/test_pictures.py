"""Picture files of every usual kind become the pixels that transformers' own loader reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hosl_edge.data.pictures import PictureFiles, broken_among, some_of, visible_files
from hosl_edge.exceptions import DataError

Image = pytest.importorskip("PIL.Image")

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)
RAMP = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)


def read(path: Path, mode: str = "RGB") -> Any:
    return PictureFiles([path], mode)[0]


def with_palette(transparency: int | bytes | None = None) -> Any:
    picture = Image.fromarray(COLOURS).quantize(16)
    if transparency is not None:
        picture.info["transparency"] = transparency
    return picture


KINDS = {
    "png": Image.fromarray(COLOURS),
    "jpg": Image.fromarray(COLOURS),
    "JPEG": Image.fromarray(COLOURS),
    "webp": Image.fromarray(COLOURS),
    "bmp": Image.fromarray(COLOURS),
    "gif": with_palette(),
    "tif": Image.fromarray(COLOURS),
    "ppm": Image.fromarray(COLOURS),
    "grey.png": Image.fromarray(COLOURS[..., 0]),
    "black-and-white.png": Image.fromarray(COLOURS[..., 0]).convert("1"),
    "grey-with-alpha.png": Image.fromarray(COLOURS[..., 0]).convert("LA"),
    "alpha.png": Image.fromarray(np.dstack([COLOURS, COLOURS[..., :1]])),
    "palette.png": with_palette(),
    "transparent-palette.png": with_palette(3),
    "palette-with-alpha.png": with_palette(bytes(range(0, 160, 10))),
    "cmyk.jpg": Image.fromarray(COLOURS).convert("CMYK"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_picture_is_what_transformers_reads(tmp_path: Path, name: str) -> None:
    load_image = pytest.importorskip("transformers.image_utils").load_image
    path = tmp_path / (name if "." in name else f"a.{name}")
    KINDS[name].save(path)
    with Image.open(path) as picture:
        expected = picture.convert("RGBA").convert("RGB") if "alpha" in name else load_image(picture)
        expected.load()
    np.testing.assert_array_equal(read(path), np.asarray(expected))
    assert read(path, "L").shape == (12, 16)
    assert visible_files(tmp_path) == ([path], [])
    assert broken_among([path], tmp_path) == {}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright(tmp_path: Path, orientation: int) -> None:
    load_image = pytest.importorskip("transformers.image_utils").load_image
    picture = Image.fromarray(COLOURS)
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as picture:
        np.testing.assert_array_equal(read(tmp_path / "a.jpg"), np.asarray(load_image(picture)))
    assert read(tmp_path / "a.jpg").shape == ((12, 16, 3) if orientation < 5 else (16, 12, 3))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bits_of_grey_become_8(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    Image.fromarray(RAMP).save(path)
    np.testing.assert_array_equal(read(path, "L"), RAMP >> 8)
    np.testing.assert_array_equal(read(path), np.repeat((RAMP >> 8)[..., None], 3, axis=2))


def test_16_bits_of_a_pgm_become_8(tmp_path: Path) -> None:
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes())
    np.testing.assert_array_equal(read(path, "L"), RAMP >> 8)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_are_refused(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(RAMP.astype(dtype)).save(path)
    with pytest.raises(DataError, match="it has 32 bits a pixel: save it with 8 or 16"):
        read(path)
    assert list(broken_among([path], tmp_path)) == [path]


def test_of_several_frames_the_first_is_read(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (200, 10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert [int(read(tmp_path / name).max()) for name in ("a.gif", "a.tif")] == [200, 200]


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("tif", "ppm")])
def test_a_file_that_ends_too_early_is_found(tmp_path: Path, name: str) -> None:
    path = tmp_path / (name if "." in name else f"a.{name}")
    KINDS[name].save(path)
    path.write_bytes(path.read_bytes()[:-30])
    assert list(broken_among([path], tmp_path)) == [path]


def test_what_follows_a_pictures_end_does_not_make_it_broken(tmp_path: Path) -> None:
    for name in ("jpg", "png", "gif", "webp", "bmp"):
        path = tmp_path / f"a.{name}"
        KINDS[name].save(path)
        path.write_bytes(path.read_bytes() + b"more" * 100)
        assert broken_among([path], tmp_path) == {}


def test_a_long_list_of_files_is_shortened(tmp_path: Path) -> None:
    paths = [tmp_path / "red" / f"{place}.png" for place in range(7)]
    assert some_of(paths, tmp_path) == "red/0.png, red/1.png, red/2.png, red/3.png, red/4.png and 2 more"
    assert some_of(paths[:1], tmp_path) == "red/0.png"
