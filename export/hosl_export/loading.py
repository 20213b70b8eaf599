"""Open a model wherever it is: a hub id, a local folder, or a .gguf file. Everything is loaded as float32."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin

from hosl_export.exceptions import ModelError
from hosl_export.families import find_family
from hosl_export.heads import is_classifier, uncut_class

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Where a model lies, in the words of `from_pretrained`."""

    name: str
    """Hub id, or the name of the local folder or file."""
    place: str
    gguf_file: str | None = None
    revision: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for every `from_pretrained`."""
        arguments = {"gguf_file": self.gguf_file, "revision": self.revision}
        return {key: value for key, value in arguments.items() if value is not None}


def find_source(model: str, revision: str | None = None) -> Source:
    """What `--model` stands for. Raises ModelError where a file or folder is missing."""
    path = Path(model)
    with contextlib.suppress(RuntimeError):  # a user without a home
        path = path.expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError("model", model, "there is no such file")
        return Source(path.name, str(path.parent), gguf_file=path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                "model", model, "the folder holds no config.json; give a folder that save_pretrained wrote"
            )
        return Source(path.resolve().name, str(path))
    if path.exists() or not _HUB_ID.fullmatch(model):
        raise ModelError("model", model, "use a folder, a .gguf file, or a hub id such as facebook/opt-125m")
    return Source(model, model, revision=revision)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back the library's bars and reports: what matters of them becomes an error or a line of ours."""
    library = transformers.utils.logging
    verbosity, has_bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        # Some bars are plain tqdm, which knows no switch.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        library.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if has_bars:
            library.enable_progress_bar()


@contextlib.contextmanager
def _one_gguf_parse(source: Source) -> Iterator[None]:
    """Share one parse of a .gguf file between config, tokenizer and weights, and one table of names between modules.

    Each would make its own; for 135 M parameters that takes 15 s of the 25 s that loading takes.
    """
    if source.gguf_file is None:
        yield
        return
    import gguf

    names = lru_cache(gguf.get_tensor_name_map)
    with mock.patch.multiple(gguf, GGUFReader=_read_gguf, get_tensor_name_map=names):
        yield


@lru_cache(maxsize=1)
def _read_gguf(path: str) -> Any:
    import gguf.gguf_reader

    return gguf.gguf_reader.GGUFReader(path)


@contextlib.contextmanager
def _opening(source: Source, what: str) -> Iterator[None]:
    """Turn the many errors of `from_pretrained` into one line."""
    try:
        with quiet_transformers(), _one_gguf_parse(source):
            yield
    except MemoryError:
        raise
    except Exception as error:
        # The library lets errors of the hub, of parsers and of its own pass through, in many types.
        logger.debug("cannot load %s of %s", what, source.name, exc_info=True)
        raise ModelError("model", source.name, f"cannot load its {what}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def load_config(source: Source) -> Any:
    """The model's configuration. Raises ModelError."""
    with _opening(source, "configuration"):
        config = AutoConfig.from_pretrained(source.place, **source.arguments)
    find_family(config.model_type)
    return config


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer. Raises ModelError where it has none that the `tokenizers` library runs."""
    with _opening(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.place, **source.arguments)
    if not getattr(tokenizer, "is_fast", False) or not tokenizer.get_vocab():
        raise ModelError("model", source.name, "it has no tokenizer.json, nor a tokenizer that converts to one")
    return tokenizer


def load_preprocessor(source: Source) -> dict[str, Any]:
    """What the model's image preprocessor says; empty where it has none."""
    with quiet_transformers(), contextlib.suppress(OSError):
        facts, _ = ImageProcessingMixin.get_image_processor_dict(source.place, **source.arguments)
        return dict(facts)
    return {}


def load_model(source: Source | str, *, config: Any = None, seed: int = 0) -> Any:
    """The whole Hugging Face model, float32, in eval mode: a causal language model, an encoder with its pooler, or a
    classifier of images or, where the checkpoint is one, of texts.

    Weights that the checkpoint lacks are an error, but for an encoder's pooler and head and an image classifier's,
    which are initialised from `seed`. Other heads that it has are left out, with a warning.
    """
    if isinstance(source, str):
        source = find_source(source)
    config = load_config(source) if config is None else config
    family = find_family(config.model_type)
    auto = uncut_class(family, is_classifier=is_classifier(config))
    with _opening(source, "weights"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, report = auto.from_pretrained(
            source.place, config=config, dtype=torch.float32, output_loading_info=True, **source.arguments
        )
    _check_complete(source, config, report)
    # Left by the .gguf loader; weights are plain float32 from here on.
    vars(model.config).pop("quantization_config", None)
    return model.eval()


def _check_complete(source: Source, config: Any, report: dict[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if find_family(config.model_type).is_encoder:
        for part in ("pooler", "classifier"):
            absent = [name for name in missing if part in name.split(".")[:2]]
            missing = [name for name in missing if name not in absent]
            if absent:
                logger.warning("%s has no %s: it starts from random weights", source.name, part)
    if missing or report["mismatched_keys"]:
        names = missing or sorted(str(entry) for entry in report["mismatched_keys"])
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ModelError("model", source.name, f"the checkpoint lacks {names[0]}{more}")
    dropped = " and ".join(sorted({name.partition(".")[0] for name in report["unexpected_keys"]}))
    if dropped:
        kind = " and ".join(config.architectures or ["checkpoint"])
        logger.warning("%s is a %s: its %s is left out, no task of hosl has a use for it", source.name, kind, dropped)
