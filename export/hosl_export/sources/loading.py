"""Open a model wherever it is: a hub id, a local folder, or a .gguf file. Everything is loaded as float32.

`find_source` looks at names and files alone. What loads (config, tokenizer, preprocessor, weights) does so inside
`_opening`, which keeps the libraries quiet and turns their errors into a ModelError.
"""

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
from hosl_export.model.heads import HEADS, auto_class, is_classifier
from hosl_export.sources.adapters import adopt_head, base_without_adapter, find_base, is_adapter, merge_adapter

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Where a model lies, in the words of `from_pretrained`."""

    name: str
    """Hub id, or the name of the local folder or file: what devices are told."""
    name_or_path: str
    """Hub id, or the path of the folder."""
    gguf_file: str | None = None
    """A file's name in the folder."""
    revision: str | None = None
    adapter: Path | None = None
    """A folder of PEFT, whose weights are merged into those at `name_or_path`."""

    @property
    def tokenizer_name_or_path(self) -> str:
        """Where the tokenizer is: an adapter may have one of its own."""
        has_own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return str(self.adapter) if has_own else self.name_or_path

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

    # A path with nothing there is told here: the hub, asked for it, would say something else.
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

    # transformers imports both names anew at each use.
    package = vars(gguf)
    shared = {"GGUFReader": _read_gguf, "get_tensor_name_map": lru_cache(gguf.get_tensor_name_map)}
    originals = {name: package[name] for name in shared}
    package.update(shared)
    try:
        yield
    finally:
        package.update(originals)


@lru_cache(maxsize=1)
def _read_gguf(path: str) -> Any:
    import gguf.gguf_reader

    return gguf.gguf_reader.GGUFReader(path)


@contextlib.contextmanager
def _opening(source: Source, what: str) -> Iterator[None]:
    """Turn the many errors of `from_pretrained` into a ModelError of one line, and keep the libraries quiet."""
    has_base = source.adapter not in (None, Path(source.name_or_path))
    missing = f"the {what} of its base {source.name_or_path}" if has_base else f"its {what}"

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
    """Load the model's config; with an adapter that brings a head, a classifier's. Raises ModelError, UnknownFamily."""
    with _opening(source, "configuration"):
        config = AutoConfig.from_pretrained(source.name_or_path, **source.arguments)
        find_family(config.model_type)  # an error of its own, rather than of what follows
        if source.adapter is not None:
            adopt_head(config, source.adapter)
    _check_quantized(source, config)
    return config


DEQUANTIZED = ("fp8", "gguf")
"""Kinds of quantized checkpoints that transformers makes floating-point numbers of, on a CPU and with no other
package."""


def _check_quantized(source: Source, config: Any) -> None:
    """Raise ModelError for a quantized checkpoint that cannot become float32; let the config of others ask for it."""
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
    """Load the model's tokenizer. Raises ModelError where it has none that the device's `tokenizers` library runs."""
    with _opening(source, "tokenizer"), _naming_sentencepiece(source):
        tokenizer = AutoTokenizer.from_pretrained(source.tokenizer_name_or_path, **source.arguments)
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
    """Load what the model's image preprocessor says; empty where it has none."""
    with quiet_transformers(), contextlib.suppress(OSError):
        facts, _ = ImageProcessingMixin.get_image_processor_dict(source.name_or_path, **source.arguments)
        return dict(facts)
    return {}


def load_model(source: Source | str, *, config: Any = None, seed: int = 0) -> Any:
    """Load the whole Hugging Face model, float32, in eval mode. Raises ModelError.

    It is a causal language model, an encoder with its pooler, or a classifier of images or, where the checkpoint is
    one, of texts. Weights that the checkpoint lacks are an error, but for an encoder's pooler and head and an image
    classifier's, which are initialised from `seed`. Other heads that it has are left out, with a warning.
    """
    if isinstance(source, str):
        source = find_source(source)
    config = load_source_config(source) if config is None else config
    family = find_family(config.model_type)
    auto = auto_class(family, is_classifier=is_classifier(config))

    # Heads that the checkpoint lacks are drawn from torch's global generator, which is left as it was.
    with (
        _opening(source, "weights"),
        base_without_adapter(source.name_or_path, source.adapter) as name_or_path,
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(seed)
        # The head that an adapter brings, of another size than the base's, comes when it is merged.
        options = {"ignore_mismatched_sizes": True} if source.adapter is not None else {}
        model, report = auto.from_pretrained(
            name_or_path, config=config, dtype=torch.float32, output_loading_info=True, **options, **source.arguments
        )
        _check_complete(source, config, report)
        if source.adapter is not None:
            model = merge_adapter(model, source.adapter)

    # Left by those who dequantize, and some weights in another type; all are plain float32 from here on.
    vars(model.config).pop("quantization_config", None)
    # The model's own float() refuses one that was dequantized, too.
    return torch.nn.Module.float(model).eval()


def _check_complete(source: Source, config: Any, report: dict[str, Any]) -> None:
    """Raise ModelError where the checkpoint lacks weights, by the loading report of transformers. Warns of the rest."""
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
