"""Images on the device: read where they lie, fitted to the model, varied by seed, normalized in float32."""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hosl_edge.data.images import ImageDataset, fit, load_images, normalize
from hosl_edge.data.records import digest_of_data
from hosl_edge.exceptions import DataError
from hosl_edge.model.shard import Shard
from hosl_protocol.program.installing import install_line
from hosl_protocol.run.augmentation import draw_variations, vary
from hosl_protocol.run.manifest import ImageEntry, load_manifest
from hosl_protocol.run.settings import Augmentation, RunSettings
from hosl_protocol.run.tasks import Task
from pictures import CLASSES, SIZES, TASK, make_image_model, make_pictures

IMAGE = ImageEntry(channels=3, height=32, width=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), resample="bicubic")
GREY = msgspec.structs.replace(IMAGE, channels=1, mean=(0.5,), std=(0.5,))
COLOURS = msgspec.convert(TASK, Task)
POSITIONS = 64


def load(path: Path, image: ImageEntry = IMAGE) -> ImageDataset:
    return load_images(path, COLOURS, image, POSITIONS)


def save(path: Path, images: Any, labels: Any) -> Path:
    np.savez(path, images=images, labels=labels)
    return path


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return save(tmp_path / "train.npz", *make_pictures(9))


def test_a_batch_holds_the_images_asked_for_in_their_order(stored: Path) -> None:
    images, labels = make_pictures(9)
    dataset = load(stored)
    batch = dataset.batch(np.array([7, 0, 7]))
    assert len(dataset) == 9
    assert batch.pixels_BHWC.dtype == np.uint8
    np.testing.assert_array_equal(batch.pixels_BHWC, images[[7, 0, 7]])
    assert batch.labels_N.tolist() == labels[[7, 0, 7]].tolist()
    assert batch.lengths_B.tolist() == [POSITIONS] * 3
    assert batch.tokens == 3 * POSITIONS
    assert sorted(dataset.evaluation_order().tolist()) == list(range(9))


def test_a_stored_file_is_mapped_and_a_compressed_one_is_read(stored: Path, tmp_path: Path) -> None:
    images, labels = make_pictures(9)
    compressed = tmp_path / "compressed.npz"
    np.savez_compressed(compressed, images=images, labels=labels)
    mapped, read = load(stored).pictures, load(compressed).pictures
    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable
    assert not isinstance(read, np.memmap)
    assert read.dtype == np.uint8  # type: ignore[attr-defined]
    np.testing.assert_array_equal(mapped, images)
    np.testing.assert_array_equal(read, images)


def test_columns_first_arrays_are_read_too(tmp_path: Path) -> None:
    images, labels = make_pictures(4)
    path = save(tmp_path / "fortran.npz", np.asfortranarray(images), labels.astype(np.uint8))
    np.testing.assert_array_equal(load(path).batch(np.arange(4)).pixels_BHWC, images)


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 1)])
def test_grey_images_are_repeated_to_the_models_channels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    path = save(tmp_path / "grey.npz", grey, np.arange(3))
    pixels = load(path).batch(np.arange(3)).pixels_BHWC
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], grey.reshape(3, 32, 32))
    np.testing.assert_array_equal(load(path, GREY).batch(np.arange(3)).pixels_BHWC, grey.reshape(3, 32, 32, 1))


def test_values_are_normalized_by_channel_in_float32() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    values = normalize(pixels, IMAGE)
    exact = (pixels.astype(np.float64) / 255 - np.array(IMAGE.mean)) / np.array(IMAGE.std)
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    np.testing.assert_allclose(values, exact.transpose(0, 3, 1, 2), atol=1e-6)


def test_a_run_is_given_the_rows_it_asks_for(stored: Path) -> None:
    batch = load(stored).batch(np.arange(5))
    values = batch.inputs(slice(1, 3))["pixel_values"]
    np.testing.assert_array_equal(values, normalize(batch.pixels_BHWC, IMAGE)[1:3])


def test_images_of_another_size_are_resized_whole(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    images, labels = make_pictures(2, size=(20, 50))
    pixels = load(save(tmp_path / "wide.npz", images, labels)).batch(np.array([1])).pixels_BHWC
    expected = pillow.fromarray(images[1]).resize((32, 32), pillow.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels[0], np.asarray(expected))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(("kind", "train"), [("resnet", "norm"), ("resnet", "none"), ("vit", "lora")])
def test_activations_are_those_of_torch_for_any_micro_batch(
    make_image_bundle: Callable[..., Path], kind: str, train: str, rows: int
) -> None:
    torch = pytest.importorskip("torch")
    from hosl_export.model.halves import client_half

    bundle = make_image_bundle(kind, train)
    manifest = load_manifest(bundle)
    assert manifest.image is not None
    shard = Shard(bundle, manifest, threads=1)
    shard.open()
    shard.rows = rows
    images, labels = make_pictures(5, SIZES[kind])
    dataset = ImageDataset(images, labels.astype(np.int32), manifest.image, manifest.max_length, Path("made-up"))
    batch = dataset.batch(np.arange(5))
    packed_TD = shard.activations(batch, np.full((batch.tokens, manifest.width), np.nan, np.float32))
    with torch.no_grad():
        h_BTD = client_half(make_image_model(kind), 1)(pixel_values=torch.from_numpy(normalize(images, manifest.image)))
    np.testing.assert_allclose(packed_TD, h_BTD.numpy().reshape(packed_TD.shape), rtol=1e-4, atol=1e-4)


def settings_of(**augmentation: Any) -> RunSettings:
    return RunSettings(task=COLOURS, seed=42, max_length=POSITIONS, augmentation=Augmentation(**augmentation))


def test_training_images_vary_by_seed_round_device_and_place_alone(stored: Path) -> None:
    dataset, settings = load(stored), settings_of(crop_padding=4, flip=True)
    places = np.array([5, 0, 8])
    batch = dataset.training_batch(places, settings, 3, "pi-1")
    variations = draw_variations(42, 3, "pi-1", places, settings.augmentation)
    np.testing.assert_array_equal(batch.pixels_BHWC, vary(make_pictures(9)[0][places], variations, 4))
    assert batch.labels_N.tolist() == dataset.batch(places).labels_N.tolist()
    again = load(stored).training_batch(places, settings, 3, "pi-1")
    np.testing.assert_array_equal(again.pixels_BHWC, batch.pixels_BHWC)
    for round_, device in ((4, "pi-1"), (3, "pi-2")):
        other = dataset.training_batch(places, settings, round_, device)
        assert not np.array_equal(other.pixels_BHWC, batch.pixels_BHWC)


def test_nothing_varies_unless_the_run_says_so(stored: Path) -> None:
    dataset = load(stored)
    batch = dataset.training_batch(np.arange(9), settings_of(), 3, "pi-1")
    np.testing.assert_array_equal(batch.pixels_BHWC, dataset.batch(np.arange(9)).pixels_BHWC)


def test_images_have_a_place_in_the_cache_only_where_they_are_the_same_in_each_round(stored: Path) -> None:
    dataset, places = load(stored).numbered(100), np.array([5, 0, 8])
    same = dataset.training_batch(places, settings_of(), 3, "pi-1").places_B
    assert same is not None
    assert same.tolist() == [105, 100, 108]
    assert dataset.training_batch(places, settings_of(flip=True), 3, "pi-1").places_B is None
    assert dataset.subset(places).batch(np.arange(3)).places_B is None


IMAGES, LABELS = make_pictures(4)


@pytest.mark.parametrize(
    ("images", "labels", "problem"),
    [
        (IMAGES.astype(np.float32), LABELS, "images should be uint8"),
        (IMAGES[0, 0], LABELS, "images should be uint8"),
        (IMAGES[:0], LABELS[:0], "images should be uint8"),
        (IMAGES, LABELS[:3], "labels should be 4 whole numbers, not int64 [3]"),
        (IMAGES, LABELS + 0.5, "labels should be 4 whole numbers, not float64 [4]"),
        (IMAGES, LABELS * np.nan, "labels should be 4 whole numbers, not float64 [4]"),
        (IMAGES, LABELS + 1, "the label at place 2 is not one of 0 to 2"),
        (IMAGES, LABELS - 1, "the label at place 0 is not one of 0 to 2"),
        (IMAGES[..., :2], LABELS, "images have 2 channels, the model takes 3"),
    ],
)
def test_arrays_that_are_no_images_or_classes_are_refused(
    tmp_path: Path, images: Any, labels: Any, problem: str
) -> None:
    path = save(tmp_path / "bad.npz", images, labels)
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {problem}")


def test_whole_floats_are_labels_and_a_name_may_be_in_capitals(tmp_path: Path) -> None:
    path = save(tmp_path / "data.npz", IMAGES, LABELS.astype(np.float32)).rename(tmp_path / "DATA.NPZ")
    assert load(path).labels.tolist() == LABELS.tolist()


def test_files_that_are_no_archives_are_refused_with_their_name(tmp_path: Path, stored: Path) -> None:
    whole = stored.read_bytes()
    for name, content, problem in (
        ("text.npz", b"images", "cannot be read as .npz"),
        ("short.npz", whole[: len(whole) // 2], "cannot be read as .npz"),
        ("train.jsonl", b"{}", "give a .npz file with images and labels, or a folder"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: {problem}"):
            load(tmp_path / name)
    np.savez(tmp_path / "half.npz", images=IMAGES)
    with pytest.raises(DataError, match="has no array named 'labels'"):
        load(tmp_path / "half.npz")
    with pytest.raises(DataError, match="No such file"):
        load(tmp_path / "absent.npz")


def test_objects_in_an_archive_are_never_unpickled(tmp_path: Path) -> None:
    path = save(tmp_path / "objects.npz", np.array([{}, {}], object), np.arange(2))
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures in folders by class, one of them grey."""
    pillow = pytest.importorskip("PIL.Image")
    images, labels = make_pictures(3, size=(40, 30))
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "pictures" / CLASSES[label]).mkdir(parents=True)
        pillow.fromarray(image).save(tmp_path / "pictures" / CLASSES[label] / f"{place}.png")
    pillow.fromarray(images[0, ..., 0]).save(tmp_path / "pictures" / "red" / "grey.JPG")
    (tmp_path / "pictures" / "red" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def test_a_folder_of_pictures_is_read_by_class(folder: Path) -> None:
    from PIL import Image

    dataset = load(folder)
    assert dataset.labels.tolist() == [2, 1, 0, 0]  # folders and files by name: blue, green, red
    batch = dataset.batch(np.arange(4))
    expected = Image.open(folder / "green" / "1.png").resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(batch.pixels_BHWC[1], np.asarray(expected))
    grey = batch.pixels_BHWC[3]
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    assert load(folder, GREY).batch(np.arange(4)).pixels_BHWC.shape == (4, 32, 32, 1)


def test_a_folder_that_is_no_class_is_named(folder: Path) -> None:
    (folder / "purple").mkdir()
    with pytest.raises(DataError, match=r"purple: is not named after a class: red, green, blue"):
        load(folder)


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    (tmp_path / "red").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        load(tmp_path)


def test_what_is_no_picture_of_a_class_is_counted_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "green" / "1.heic").write_bytes(b"")
    (folder / "red" / "0.png").rename(folder / "0.png")
    (folder / "red" / "grey.JPG").unlink()
    assert load(folder).labels.tolist() == [2, 1]
    assert "no pictures of a class: 3 (green/1.heic, red/notes.txt, 0.png)" in caplog.text
    assert "no example of red" in caplog.text


def test_pictures_are_read_at_any_depth(folder: Path) -> None:
    (folder / "red" / "2021" / "may").mkdir(parents=True)
    (folder / "red" / "0.png").rename(folder / "red" / "2021" / "may" / "0.png")
    assert load(folder).labels.tolist() == [2, 1, 0, 0]


def test_a_link_is_followed_and_one_that_leads_back_is_not(folder: Path, tmp_path: Path) -> None:
    (folder / "red").rename(tmp_path / "elsewhere")
    (folder / "red").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    assert load(folder).labels.tolist() == [2, 1, 0, 0]


def test_hidden_files_and_those_of_desktops_are_passed_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest, count = digest_of_data(folder), len(load(folder))
    before = len(caplog.records)
    for name in ("red/._0.png", "red/.DS_Store", "red/Thumbs.db", ".ipynb_checkpoints/0.png", "__MACOSX/red/._0.png"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"\0\5\x16\7")
    assert (digest_of_data(folder), len(load(folder))) == (digest, count)
    assert "(red/notes.txt)" in caplog.text
    assert caplog.records[before:] == [], "nothing new, and what is known is said once"


def test_a_class_is_found_in_either_form_of_unicode(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    for place, name in enumerate(("e\u0301t\u00e9", "hiver")):
        (tmp_path / name).mkdir()
        pillow.fromarray(make_pictures(1)[0][0]).save(tmp_path / name / f"{place}.png")
    task = msgspec.structs.replace(COLOURS, labels=("\u00e9te\u0301", "hiver"))
    assert load_images(tmp_path, task, IMAGE, POSITIONS).labels.tolist() == [0, 1]


def break_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:10])


def break_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def break_middle(path: Path) -> None:
    """So that only who decodes it finds out."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(byte ^ 0xFF for byte in content[middle : middle + 8])
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [break_header, break_end])
def test_a_broken_picture_is_named_at_the_start_or_left_out(
    folder: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder / "red" / "0.png")
    with pytest.raises(DataError, match=r"1 of 4 pictures cannot be decoded \(red/0\.png: .*\): .*--skip-broken"):
        load(folder)
    dataset = load_images(folder, COLOURS, IMAGE, POSITIONS, skip_broken=True)
    assert dataset.labels.tolist() == [2, 1, 0]
    assert "1 of 4 pictures cannot be decoded and are left out (red/0.png" in caplog.text


def test_a_picture_that_turns_out_to_be_broken_is_named_or_another_takes_its_place(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    break_middle(folder / "green" / "1.png")
    with pytest.raises(DataError, match=r"green/1\.png: cannot be decoded"):
        load(folder).batch(np.arange(4))
    dataset = load_images(folder, COLOURS, IMAGE, POSITIONS, skip_broken=True)
    batch = dataset.batch(np.array([1, 0, 1]))
    assert batch.labels_N.tolist() == [0, 2, 0]
    np.testing.assert_array_equal(batch.pixels_BHWC[0], dataset.batch(np.array([2])).pixels_BHWC[0])
    assert caplog.text.count("1.png: cannot be decoded") == 1
    assert dataset.subset(np.array([1, 3])).batch(np.array([0])).labels_N.tolist() == [0], "of its own pictures"


def test_the_digest_of_a_folder_covers_names_and_contents_of_its_pictures(folder: Path) -> None:
    first = digest_of_data(folder)
    (folder / "red" / "notes.txt").write_text("changed")
    assert digest_of_data(folder) == first
    (folder / "red" / "0.png").rename(folder / "red" / "9.png")
    renamed = digest_of_data(folder)
    (folder / "red" / "9.png").write_bytes(b"changed")
    assert len({first, renamed, digest_of_data(folder)}) == 3


def test_without_pillow_one_line_says_what_to_install(
    tmp_path: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = save(tmp_path / "wide.npz", *make_pictures(2, size=(20, 50)))
    (tmp_path / "pictures" / "red").mkdir(parents=True)
    (tmp_path / "pictures" / "red" / "0.png").write_bytes(b"")
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    load(stored)  # images of the model's size need none
    for path in (wide, tmp_path / "pictures"):
        with pytest.raises(DataError, match=f"by Pillow: {re.escape(install_line('images'))}"):
            load(path)


def test_fit_leaves_what_fits_alone() -> None:
    image = make_pictures(1)[0][0]
    assert fit(image, IMAGE, Path("x")) is image
