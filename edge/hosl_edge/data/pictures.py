"""Pictures in files: which of a folder's are read, how one becomes pixels, and which are broken.

A picture is what Pillow reads of the usual formats: upright as its EXIF orientation says, the first of several frames,
16 bits of grey as their upper 8, transparency left away; all as transformers' own loader reads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hosl_edge.exceptions import DataError
from hosl_protocol.program.installing import install_line

Pixels = npt.NDArray[np.uint8]

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Endings of the files that are read, in capitals or not."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
"""Pillow's names of what may be in them: it knows others, whose readers start programs."""
_OF_DESKTOPS = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "icon\r", "@eadir", "$recycle.bin", "lost+found")
)
"""What desktops leave in folders that they show, beside files whose names begin with a dot."""
_ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "GIF": b";"}
"""The last bytes of a file that is whole, before padding."""
SHOWN = 5
"""Names in a sentence about files."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's names for the model's channels."""


def visible_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the pictures at any depth below a folder, by name, and the other files; no hidden ones nor a desktop's."""
    pictures: list[Path] = []
    others: list[Path] = []
    for path in sorted(_walk(folder, set())):
        (pictures if path.suffix.lower() in SUFFIXES else others).append(path)
    return pictures, others


def _walk(folder: Path, above: set[str]) -> Iterator[Path]:
    """All files; a link that leads back up is not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for path in filter(is_visible, folder.iterdir()):
        if path.is_dir():
            yield from _walk(path, above | {real})
        else:
            yield path


def is_visible(path: Path) -> bool:
    """Whether a file or folder is neither hidden nor left by a desktop."""
    return not path.name.startswith(".") and path.name.lower() not in _OF_DESKTOPS


def some_of(paths: Sequence[Path], folder: Path) -> str:
    """Name the first of some files below a folder, and how many more there are."""
    names = ", ".join(str(path.relative_to(folder)) for path in paths[:SHOWN])
    return names + (f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else "")


@dataclass(frozen=True)
class PictureFiles:
    """Pictures that are decoded when they are asked for."""

    paths: Sequence[Path]
    mode: str
    """Pillow's name for the model's channels."""

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int, /) -> Pixels:
        path = self.paths[place]
        pillow = pillow_for(path, "pictures are decoded by Pillow")
        try:
            with path.open("rb") as file, pillow.open(file, formats=_FORMATS) as picture:
                return _pixels(picture, self.mode)
        except Exception as error:  # each of Pillow's decoders has its own kinds
            raise DataError(path, None, f"cannot be decoded: {_reason(error)}") from error


def broken_among(paths: Iterable[Path], folder: Path) -> dict[Path, str]:
    """Find the files that are no whole pictures, and why, as far as their first and last bytes tell."""
    pillow = pillow_for(folder, "pictures are decoded by Pillow")
    broken = {}

    # Decoding all of them would take as long as an epoch; a file that was cut short shows it at its end.
    for path in paths:
        try:
            with path.open("rb") as file, pillow.open(file, formats=_FORMATS) as picture:
                _depth_of(picture)
                if not _looks_whole(picture.format, file):
                    picture.load()  # what it looks like is no proof
        except Exception as error:  # each of Pillow's decoders has its own kinds
            broken[path] = _reason(error)
    return broken


def _looks_whole(format_: str, file: BinaryIO) -> bool:
    """Whether a file ends as its format says, where that says anything; the place in the file stays."""
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(8)
    file.seek(max(0, size - 64))
    tail = file.read()
    file.seek(place)

    if format_ == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    if format_ == "BMP":
        return int.from_bytes(head[2:6], "little") <= size
    return tail.rstrip(b"\0").endswith(_ENDS.get(format_, b""))


def _pixels(picture: Any, mode: str) -> Pixels:
    from PIL import Image, ImageOps

    depth = _depth_of(picture)
    picture = ImageOps.exif_transpose(picture)
    if depth == 16:
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("P", "PA") and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # of a palette Pillow would otherwise warn
    return np.asarray(picture.convert(mode))


def _depth_of(picture: Any) -> int:
    """Tell the bits of a channel, 8 or 16. Raises ValueError for others."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return 16
    if picture.mode in ("I", "F"):
        raise ValueError("it has 32 bits a pixel: save it with 8 or 16")
    return 8


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is no picture of a format that hosl reads"
    return str(error) or type(error).__name__


def pillow_for(path: Path, need: str) -> Any:
    """Pillow's Image module. Raises DataError where it is not installed."""
    try:
        # The plugins of the last two are loaded by name: Pillow would load them with forty others.
        from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401
    except ImportError:
        raise DataError(path, None, f"{need}: {install_line('images')}") from None
    return Image
