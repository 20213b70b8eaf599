"""The device's images: a `.npz` file, mapped where it is not compressed, or a folder of pictures by class.

Pixels stay uint8 until a micro-batch runs, and pictures are decoded when their turn comes: a dataset takes no memory
but its labels'. Shapes: B images, H rows, W columns, C channels, N images of the data.
"""

from __future__ import annotations

import logging
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hosl_edge.data.pictures import (
    MODES,
    SUFFIXES,
    PictureFiles,
    Pixels,
    broken_among,
    is_visible,
    pillow_for,
    some_of,
    visible_files,
)
from hosl_edge.data.records import warn_of_absent, warn_once
from hosl_edge.exceptions import DataError
from hosl_protocol.run.augmentation import draw_variations, vary
from hosl_protocol.run.manifest import ImageEntry
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.tasks import Task

log = logging.getLogger(__name__)

_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a zip member: the lengths of its name and of its extra field."""


@dataclass(frozen=True)
class ImageBatch:
    """Some images of the model's size."""

    pixels_BHWC: Pixels
    lengths_B: npt.NDArray[np.int32]
    """Positions of each at the cut layer, always the same."""
    labels_N: npt.NDArray[np.int32]
    """Class per image."""
    image: ImageEntry
    places_B: npt.NDArray[np.int64] | None = None
    indices_B: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Where each was asked for in the data; empty where these are of none."""

    @property
    def tokens(self) -> int:
        """T: positions of all images."""
        return int(self.lengths_B.sum())

    def inputs(self, rows: slice) -> dict[str, npt.NDArray[Any]]:
        """Make what the graph takes of these images: pixel values [b, C, H, W], anew for each run."""
        return {"pixel_values": normalize(self.pixels_BHWC[rows], self.image)}


def normalize(pixels_BHWC: Pixels, image: ImageEntry) -> npt.NDArray[np.float32]:
    """Compute (v · rescale - mean) / std of each channel, in float32 [B, C, H, W]."""
    mean, std = np.array(image.mean)[:, None, None], np.array(image.std)[:, None, None]
    pixels_BCHW = pixels_BHWC.transpose(0, 3, 1, 2)
    values = np.empty(pixels_BCHW.shape, np.float32)
    np.multiply(pixels_BCHW, (image.rescale / std).astype(np.float32), out=values)
    values -= (mean / std).astype(np.float32)
    return values


class Pictures(Protocol):
    """Images as they are kept, by place: uint8 [h, w] or [h, w, c]."""

    def __len__(self) -> int:
        """N."""
        ...

    def __getitem__(self, place: int, /) -> Any:
        """One image."""
        ...


@dataclass(frozen=True)
class _Subset:
    """Some of the pictures, numbered anew."""

    pictures: Pictures
    places: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int, /) -> Any:
        return self.pictures[int(self.places[place])]


@dataclass(frozen=True)
class ImageDataset:
    """Images with their classes."""

    pictures: Pictures
    labels: npt.NDArray[np.int32]
    """[N]."""
    image: ImageEntry
    positions: int
    """Positions of each image at the cut layer."""
    path: Path
    """Where they come from, for errors."""
    skip_broken: bool = False
    """Let the next picture take the place of one that turns out to be broken."""
    first_place: int | None = None
    """The first image's number in the device's cache; None where nothing is kept."""
    _told: set[str] = field(default_factory=set)
    """What has been said of broken ones."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: npt.NDArray[np.int64]) -> ImageBatch:
        """The images at `indices` [B], in that order. Raises DataError where one cannot be read."""
        entry = self.image
        pixels = np.empty((len(indices), entry.height, entry.width, entry.channels), np.uint8)
        places = [self._read(place, target) for target, place in zip(pixels, indices.tolist(), strict=True)]
        lengths = np.full(len(indices), self.positions, np.int32)
        numbers = None if self.first_place is None else self.first_place + np.array(places, np.int64)
        return ImageBatch(pixels, lengths, self.labels[places], entry, numbers, indices)

    def _read(self, wanted: int, target: Pixels) -> int:
        """Write the picture at place `wanted` to `target`, or the next that can be decoded; the place that it has."""
        # The next in order, not one at random: what a device trains on is a function of the seed and the data.
        for place in chain(range(wanted, len(self)), range(wanted)):
            try:
                target[...] = fit(self.pictures[place], self.image, self.path)
                return place
            except DataError as error:
                if not self.skip_broken:
                    raise

                if str(error) not in self._told:
                    self._told.add(str(error))
                    log.warning("%s; another takes its place", error)
        raise DataError(self.path, None, "holds no picture that can be decoded")

    def training_batch(
        self, indices: npt.NDArray[np.int64], settings: RunSettings, round_: int, device: str
    ) -> ImageBatch:
        """The images at `indices` [B] as `device` sees them in a round: cropped and flipped where the run asks for it.

        A pure function of its arguments and the data.
        """
        batch, augmentation = self.batch(indices), settings.augmentation
        if not augmentation.is_on:
            return batch
        variations = draw_variations(settings.seed, round_, device, indices, augmentation)
        pixels_BHWC = vary(batch.pixels_BHWC, variations, augmentation.crop_padding)
        return replace(batch, pixels_BHWC=pixels_BHWC, places_B=None)

    def evaluation_order(self) -> npt.NDArray[np.int64]:
        """Places in the order in which held-out data is sent."""
        return np.arange(len(self))

    def subset(self, places: npt.NDArray[np.int64]) -> ImageDataset:
        """The images at `places` [n], still where they are."""
        return replace(self, pictures=_Subset(self.pictures, places), labels=self.labels[places], first_place=None)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Positions of each image at the cut layer [N]."""
        return np.full(len(self), self.positions, np.int64)

    def numbered(self, first_place: int) -> ImageDataset:
        """The same images, with numbers in the device's cache."""
        return replace(self, first_place=first_place)


def blank_images(rows: int, image: ImageEntry, positions: int) -> ImageBatch:
    """Make black images, to measure a forward with."""
    pixels = np.zeros((rows, image.height, image.width, image.channels), np.uint8)
    return ImageBatch(pixels, np.full(rows, positions, np.int32), np.zeros(rows, np.int32), image)


def fit(picture: Pixels, image: ImageEntry, path: Path) -> Pixels:
    """Bring an image into the model's size and channels [H, W, C]. Raises DataError where it has other channels."""
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = picture[..., 0]
    if picture.ndim == 3 and picture.shape[2] != image.channels:
        raise DataError(path, None, f"images have {picture.shape[2]} channels, the model takes {image.channels}")
    if picture.shape[:2] != (image.height, image.width):
        picture = _resize(picture, image, path)
    return picture if picture.ndim == 3 else np.repeat(picture[..., None], image.channels, axis=2)


def _resize(picture: Pixels, image: ImageEntry, path: Path) -> Pixels:
    pillow = pillow_for(path, f"images of {picture.shape[0]} x {picture.shape[1]} are resized by Pillow")
    filter_ = pillow.Resampling[image.resample.upper()]
    return np.asarray(pillow.fromarray(np.ascontiguousarray(picture)).resize((image.width, image.height), filter_))


def load_images(
    path: Path, task: Task, image: ImageEntry, positions: int, *, skip_broken: bool = False
) -> ImageDataset:
    """Open a `.npz` file or a folder with one folder a class. Raises DataError."""
    if path.is_dir():
        return _open_folder(path, task, image, positions, skip_broken=skip_broken)
    if path.suffix.lower() != ".npz":
        raise DataError(path, None, "give a .npz file with images and labels, or a folder with a folder for each class")

    images, labels = _read_array(path, "images"), _read_array(path, "labels")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise DataError(path, None, f"images should be uint8 [N, H, W] or [N, H, W, C], not {_describe(images)}")

    if labels.dtype.kind == "f" and np.array_equal(labels, np.trunc(labels)):
        labels = labels.astype(np.int64)  # a table that had gaps makes 1.0 of 1
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataError(path, None, f"labels should be {len(images)} whole numbers, not {_describe(labels)}")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(task.labels)))
    if wrong.size:
        place = int(wrong[0])
        raise DataError(path, None, f"the label at place {place} is not one of 0 to {len(task.labels) - 1}")
    warn_of_absent(path, task, labels.tolist())

    dataset = ImageDataset(images, labels.astype(np.int32), image, positions, path)
    dataset.batch(np.zeros(1, np.int64))  # one is like another: size, channels, and Pillow where it is needed
    return dataset


def _describe(array: npt.NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _read_array(path: Path, name: str) -> npt.NDArray[Any]:
    """Read one array of a `.npz` file: a map of it where it is stored as it is, else in memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{name}.npy")
            # An array that is stored as it is, in C order, is mapped: it stays on the disk, whatever its size.
            with archive.open(member) as file:
                if member.compress_type == zipfile.ZIP_STORED and np.lib.format.read_magic(file) == (1, 0):
                    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
                    if not (is_fortran or dtype.hasobject):
                        place = _start(path, member) + file.tell()
                        return np.memmap(path, dtype, "r", place, shape)

            log.info("%s: %s is compressed and is read into memory", path, name)
            with archive.open(member) as file:
                return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except KeyError:
        raise DataError(path, None, f"has no array named {name!r}") from None
    except OSError as error:
        raise DataError(path, None, error.strerror or "cannot be read") from error
    except _UNREADABLE as error:
        problem = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(path, None, f"cannot be read as .npz: {problem}") from error


_UNREADABLE = (
    *(ValueError, TypeError, EOFError, SyntaxError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(NotImplementedError, RuntimeError),  # from zipfile, where flags or versions say what it cannot do
)


def _start(path: Path, member: zipfile.ZipInfo) -> int:
    """Find where a stored member's bytes begin; its own header may differ from the archive's directory."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return member.header_offset + _LOCAL_HEADER.size + int(name) + int(extra)


def _open_folder(path: Path, task: Task, image: ImageEntry, positions: int, *, skip_broken: bool) -> ImageDataset:
    """The pictures below a folder, by class and name."""
    if image.channels not in MODES:
        raise DataError(path, None, f"the model takes {image.channels} channels, which pictures do not have")
    paths, labels = find_pictures(path, task, skip_broken=skip_broken)
    pictures = PictureFiles(paths, MODES[image.channels])
    dataset = ImageDataset(pictures, np.array(labels, np.int32), image, positions, path, skip_broken)
    dataset.batch(np.zeros(1, np.int64))
    return dataset


def find_pictures(path: Path, task: Task, *, skip_broken: bool) -> tuple[list[Path], list[int]]:
    """Find the pictures of a folder with a folder for each class, by class and name, and their classes.

    What is left out is told in a line. Raises DataError for folders of other names, and for broken pictures unless
    they are to be left out.
    """
    try:
        pictures, others = visible_files(path)
        for folder in sorted(each for each in path.iterdir() if each.is_dir() and is_visible(each)):
            if _class_of(folder, task) is None:
                raise DataError(folder, None, f"is not named after a class: {', '.join(task.labels)}")
    except OSError as error:
        raise DataError(path, None, error.strerror or "cannot be read") from error

    others += [each for each in pictures if each.parent == path]
    pictures = [each for each in pictures if each.parent != path]
    if others:
        warn_once(f"{path}: files that are no pictures of a class: {len(others)} ({some_of(others, path)})")

    if broken := broken_among(pictures, path):
        _tell_broken(path, broken, len(pictures), skip_broken=skip_broken)
        pictures = [each for each in pictures if each not in broken]
    if not pictures:
        raise DataError(path, None, f"holds no pictures ({', '.join(SUFFIXES)}) in folders named after the classes")

    labels = [_class_of(path / each.relative_to(path).parts[0], task) for each in pictures]
    found = [label for label in labels if label is not None]
    warn_of_absent(path, task, found)
    return pictures, found


def _class_of(folder: Path, task: Task) -> int | None:
    """Find the class that a folder is named after, in whatever form of Unicode its file system keeps names."""
    names = [unicodedata.normalize("NFC", label) for label in task.labels]
    name = unicodedata.normalize("NFC", folder.name)
    return names.index(name) if name in names else None


def _tell_broken(path: Path, broken: Mapping[Path, str], count: int, *, skip_broken: bool) -> None:
    reason = next(iter(broken.values()))
    which = some_of(list(broken), path) + (f": {reason}" if len(broken) == 1 else f"; of the first: {reason}")
    if not skip_broken:
        remedy = "mend or delete them, or leave them out with --skip-broken"
        raise DataError(path, None, f"{len(broken)} of {count} pictures cannot be decoded ({which}): {remedy}")
    warn_once(f"{path}: {len(broken)} of {count} pictures cannot be decoded and are left out ({which})")
