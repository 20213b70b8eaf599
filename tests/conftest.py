"""What all tests share: a tiny model with a tokenizer, its bundles, and small data."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pictures import save_image_model
from saved_models import save_tiny_bert, save_tiny_llama


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first: they take longest, and no worker should be left alone with one at the end."""
    items.sort(key=lambda item: "integration" not in item.path.parts)


_frozen: tuple[Path, int] | None = None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Take what libraries keep for ever from the garbage collector: with torch it is a million objects and more, and a
    device that starts has all of them looked at several times, which took longer than most tests.

    Again for each file: graphs that are traced leave as many again, in torch's caches.
    """
    global _frozen
    if _frozen is None or item.path != _frozen[0] or len(sys.modules) > _frozen[1] + 100:
        gc.collect()
        gc.freeze()
        _frozen = item.path, len(sys.modules)


# A tenth of the time of a test that exports goes into collections, at Python's own 700.
gc.set_threshold(50_000)


# Tiny tensors gain nothing from threads, and lose much where cores are few. Read by torch and numpy as they load, here
# and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """A folder by its name, which one of all test processes makes at its first use."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, mark = root / "shared" / name, root / "shared" / f"{name}.made"
        folder.parent.mkdir(exist_ok=True)
        with (folder.parent / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not mark.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a test that was broken off, by a signal as it should
                make(folder)
                mark.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def tiny_model(made_once: MadeOnce) -> Path:
    """The tiny Llama's folder."""
    return made_once("tiny-llama", save_tiny_llama)


@pytest.fixture(scope="session")
def tiny_encoder(made_once: MadeOnce) -> Path:
    """The folder of a BERT of the same size and tokenizer."""
    return made_once("tiny-bert", save_tiny_bert)


@pytest.fixture(scope="session")
def traced_once(made_once: MadeOnce) -> Iterator[None]:
    """No test traces a graph that another one has traced."""
    from tracing import spare_the_exporter, write_graph_once, write_whole_gradient_once

    with pytest.MonkeyPatch.context() as patch:
        spare_the_exporter(patch)
        patch.setattr("hosl_export.bundle.writing.write_graph", partial(write_graph_once, made_once))
        once = partial(write_whole_gradient_once, made_once)
        patch.setattr("hosl_export.bundle.gradients.write_whole_gradient", once)
        yield


@pytest.fixture(scope="session")
def export_bundle(made_once: MadeOnce, traced_once: None) -> Callable[[Path, str, int], Path]:
    """The bundle of a model's folder by what trains (`norm:-1`: of the last block) and where it is cut; made once."""
    from hosl_export.__main__ import main

    def make(model: Path, train: str = "lora", split: int = 2) -> Path:
        def export(folder: Path) -> None:
            mode, _, blocks = train.partition(":")
            options = ["--model", str(model), "--split", str(split), "--train", mode, "--max-length", "32"]
            options += ["--train-blocks", blocks] if blocks else []
            assert main([*options, "--out", str(folder / "bundle")]) == 0

        return made_once(_folder_of(model.name, train, split), export) / "bundle"

    return make


def _folder_of(model: str, train: str, split: int) -> str:
    return f"{model}-{train.replace(':', '-')}-{split}"


@pytest.fixture(scope="session")
def make_bundle(request: pytest.FixtureRequest) -> Callable[[str, int], Path]:
    """A bundle of the tiny model by what trains and where it is cut.

    HOSL_TEST_BUNDLES names a folder in which `made_once` has made them, for machines that have no torch.
    """
    if ready := os.environ.get("HOSL_TEST_BUNDLES"):
        return lambda train="lora", split=2: Path(ready, _folder_of("tiny-llama", train, split), "bundle")
    model, export = request.getfixturevalue("tiny_model"), request.getfixturevalue("export_bundle")
    return lambda train="lora", split=2: export(model, train, split)


@pytest.fixture(scope="session")
def make_image_bundle(request: pytest.FixtureRequest, made_once: MadeOnce) -> Callable[..., Path]:
    """The bundle of a tiny model of images by its kind, what trains and where it is cut; made once each."""
    pytest.importorskip("torch")
    from hosl_export.__main__ import main

    request.getfixturevalue("traced_once")

    def make(kind: str, train: str, split: int = 1, *, gradients: bool = True) -> Path:
        def export(folder: Path) -> None:
            model = save_image_model(kind, folder / kind)
            options = ["--model", str(model), "--split", str(split), "--train", train]
            options += [] if gradients else ["--no-gradients"]
            assert main([*options, "--out", str(folder / "bundle")]) == 0

        return made_once(f"{kind}-{train}-{split}{'' if gradients else '-forward'}", export) / "bundle"

    return make
