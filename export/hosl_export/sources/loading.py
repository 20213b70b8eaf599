"""Open a model wherever it is: a hub id, a local folder, or a .gguf file. Everything is loaded as float32."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin

from hosl_export.exceptions import ModelError, first_line
from hosl_export.model.families import find_family
from hosl_export.model.heads import HEADS, is_classifier, uncut_class
from hosl_export.sources.adapters import adopt_head, base_without_adapter, find_base, is_adapter, merge_adapter

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
    adapter: Path | None = None
    """A folder of PEFT, whose weights are merged into what lies at `place`."""

    @property
    def tokens_place(self) -> str:
        """Where the tokenizer lies: an adapter may have one of its own."""
        has_own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return str(self.adapter) if has_own else self.place

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for every `from_pretrained`."""
        arguments = {"gguf_file": self.gguf_file, "revision": self.revision}
        return {key: value for key, value in arguments.items() if value is not None}


def find_source(model: str, revision: str | None = None) -> Source:
    """Find what `--model` stands for. Raises ModelError where a file or folder is missing."""
    path = Path(model)
    with contextlib.suppress(RuntimeError):  # a user without a home
        path = path.expanduser()

    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError("model", model, "there is no such file")
        return Source(path.name, str(path.parent), gguf_file=path.name)
    if path.is_dir():
        if is_adapter(path):
            return Source(path.resolve().name, find_base(path), adapter=path)
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

    # transformers looks both up in the module each time, and has no other way in.
    former = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = _read_gguf, lru_cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = former


@lru_cache(maxsize=1)
def _read_gguf(path: str) -> Any:
    import gguf.gguf_reader

    return gguf.gguf_reader.GGUFReader(path)


@contextlib.contextmanager
def _opening(source: Source, what: str) -> Iterator[None]:
    """Turn the many errors of `from_pretrained` into one line."""
    has_base = source.adapter not in (None, Path(source.place))
    missing = f"the {what} of its base {source.place}" if has_base else f"its {what}"

    try:
        with quiet_transformers(), _one_gguf_parse(source):
            yield
    except (MemoryError, ModelError):
        raise
    except Exception as error:
        # The library lets errors of the hub, of parsers and of its own pass through, in many types.
        logger.debug("cannot load %s of %s", what, source.name, exc_info=True)
        raise ModelError("model", source.name, f"cannot load {missing}: {first_line(error)}") from error


def load_source_config(source: Source) -> Any:
    """Load the model's configuration. Raises ModelError."""
    with _opening(source, "configuration"):
        config = AutoConfig.from_pretrained(source.place, **source.arguments)
        find_family(config.model_type)
        if source.adapter is not None:
            adopt_head(config, source.adapter)
    _check_quantized(source, config)
    return config


DEQUANTIZED = ("fp8", "gguf")
"""Kinds of quantized checkpoints that transformers makes floating-point numbers of, on a CPU and with no other
package."""


def _check_quantized(source: Source, config: Any) -> None:
    """Raise ModelError for a checkpoint whose numbers cannot be had; ask for those of others."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    facts = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(getattr(facts.get("quant_method"), "value", facts.get("quant_method")))
    if method not in DEQUANTIZED:
        remedy = f"the checkpoint is quantized ({method}): give the model that it was made from, or its .gguf file"
        raise ModelError("model", source.name, remedy)
    # transformers keeps fp8 as it is unless it is told; a .gguf file it dequantizes by itself.
    if method == "fp8":
        config.quantization_config = {**facts, "quant_method": method, "dequantize": True}


def load_tokenizer(source: Source) -> Any:
    """Load the model's tokenizer. Raises ModelError where it has none that the `tokenizers` library runs."""
    with _opening(source, "tokenizer"), _naming_sentencepiece(source):
        tokenizer = AutoTokenizer.from_pretrained(source.tokens_place, **source.arguments)
    if not getattr(tokenizer, "is_fast", False) or not tokenizer.get_vocab():
        raise ModelError("model", source.name, "it has no tokenizer.json, nor a tokenizer that converts to one")
    return tokenizer


@contextlib.contextmanager
def _naming_sentencepiece(source: Source) -> Iterator[None]:
    """Name the package that a tokenizer.model needs; transformers then asks for another one."""
    try:
        yield
    except Exception as error:
        if importlib.util.find_spec("sentencepiece") is None and re.search("sentencepiece|tiktoken", str(error)):
            remedy = "its tokenizer has no tokenizer.json, and a tokenizer.model needs: pip install sentencepiece"
            raise ModelError("model", source.name, remedy) from error
        raise


def load_preprocessor(source: Source) -> dict[str, Any]:
    """Read what the model's image preprocessor says; empty where it has none."""
    with quiet_transformers(), contextlib.suppress(OSError):
        facts, _ = ImageProcessingMixin.get_image_processor_dict(source.place, **source.arguments)
        return dict(facts)
    return {}


def load_model(source: Source | str, *, config: Any = None, seed: int = 0) -> Any:
    """Load the whole Hugging Face model, float32, in eval mode.

    It is a causal language model, an encoder with its pooler, or a classifier of images or, where the checkpoint is
    one, of texts.

    Weights that the checkpoint lacks are an error, but for an encoder's pooler and head and an image classifier's,
    which are initialised from `seed`. Other heads that it has are left out, with a warning.
    """
    if isinstance(source, str):
        source = find_source(source)
    config = load_source_config(source) if config is None else config
    family = find_family(config.model_type)
    auto = uncut_class(family, is_classifier=is_classifier(config))

    # Heads that the checkpoint lacks are drawn from torch's global generator, which is left as it was.
    with (
        _opening(source, "weights"),
        base_without_adapter(source.place, source.adapter) as place,
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(seed)
        options = {"ignore_mismatched_sizes": True} if source.adapter is not None else {}
        model, report = auto.from_pretrained(
            place, config=config, dtype=torch.float32, output_loading_info=True, **options, **source.arguments
        )
        _check_complete(source, config, report)
        if source.adapter is not None:
            model = merge_adapter(model, source.adapter)

    # Left by those who dequantize, and some weights in another type; all are plain float32 from here on.
    vars(model.config).pop("quantization_config", None)
    # The model's own float() refuses one that was dequantized, too.
    return torch.nn.Module.float(model).eval()


def _check_complete(source: Source, config: Any, report: dict[str, Any]) -> None:
    """Raise ModelError where the checkpoint lacks weights that nothing may draw; tell what of it is left out."""
    missing, mismatched = sorted(report["missing_keys"]), sorted(map(str, report["mismatched_keys"]))

    if source.adapter is not None:
        # The adapter of a classifier brings its head, of its own size.
        missing = [name for name in missing if name.partition(".")[0] not in HEADS]
        mismatched = [name for name in mismatched if not any(f"{head}." in name for head in HEADS)]
    if find_family(config.model_type).is_encoder:
        for part in ("pooler", "classifier"):
            absent = [name for name in missing if part in name.split(".")[:2]]
            missing = [name for name in missing if name not in absent]
            if absent:
                logger.warning("%s has no %s: it starts from random weights", source.name, part)

    if names := missing or mismatched:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ModelError("model", source.name, f"the checkpoint lacks {names[0]}{more}")

    dropped = " and ".join(sorted({name.partition(".")[0] for name in report["unexpected_keys"]}))
    if dropped:
        kind = " and ".join(config.architectures or ["checkpoint"])
        logger.warning("%s is a %s: its %s is left out, no task of hosl has a use for it", source.name, kind, dropped)
