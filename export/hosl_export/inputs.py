"""The two kinds of input that a model may take, text and images: what differs between them in an export."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch

from hosl_export.bundle import writing
from hosl_export.bundle.parity import SAMPLE, Case, make_image_cases, make_text_cases
from hosl_export.exceptions import ModelError
from hosl_export.model.families import find_family
from hosl_export.model.halves import ClientHalf, divide
from hosl_export.model.rope import check_rope, rope_limit
from hosl_export.sources.images import read_image_entry, write_preprocessor
from hosl_export.sources.loading import Source, load_preprocessor, load_tokenizer
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import ImageEntry, PrefixEntry

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 512


class Input(Protocol):
    """Text or images, as an export meets them."""

    @property
    def image(self) -> ImageEntry | None:
        """What an image becomes; None for text."""
        ...

    @property
    def max_length(self) -> int | None:
        """Longest text in tokens; None for images."""
        ...

    def cases(self, config: Any, prompt_tokens: int = 0) -> list[Case]:
        """Batches for the parity check, of texts that are longer than a soft prompt."""
        ...

    def write(self, bundle: Path, model: Any) -> None:
        """What turns raw examples into the model's input, on the device and beside the tail."""
        ...

    def facts(self, client: ClientHalf) -> dict[str, Any]:
        """The manifest's fields about inputs and activations."""
        ...

    def prefix(self, client: ClientHalf, blocks: int) -> tuple[PrefixEntry, tuple[int, int] | None]:
        """What the first `blocks` of the device's half come to, and its grid where that is a feature map."""
        ...


def choose_input(source: Source, config: Any, max_length: int | None, image_size: int | None) -> Input:
    """Choose the model's input by its config. Raises SettingsError for a wrong length or size, and ModelError."""
    family = find_family(config.model_type)
    if family.takes_images:
        if max_length is not None:
            raise SettingsError("max-length", max_length, "the size of its images decides; see --image-size")
        return ImageInput(read_image_entry(load_preprocessor(source), config, family, source.name, image_size))
    if image_size is not None:
        raise SettingsError("image-size", image_size, f"{config.model_type} reads text: see --max-length")
    tokenizer = load_tokenizer(source)
    _check_tokens(tokenizer, config, source.name)
    return TextInput(tokenizer, _choose_max_length(max_length, config), config)


@dataclass(frozen=True)
class TextInput:
    """Texts, which a model takes as token ids."""

    tokenizer: Any
    max_length: int
    config: Any
    image: None = None

    def cases(self, config: Any, prompt_tokens: int = 0) -> list[Case]:
        """Make batches for the parity check."""
        return make_text_cases(self.tokenizer, _choose_padding(self.tokenizer, config), self.max_length, prompt_tokens)

    def write(self, bundle: Path, model: Any) -> None:
        """Write what turns raw examples into the model's input."""
        writing.write_texts(bundle, model, self.tokenizer, _choose_padding(self.tokenizer, self.config))

    def facts(self, client: ClientHalf) -> dict[str, Any]:
        """Find the manifest's fields about inputs and activations."""
        padding = _choose_padding(self.tokenizer, self.config)
        return {"width": self.config.hidden_size, "max_length": self.max_length, "pad_token_id": padding}

    def prefix(self, client: ClientHalf, blocks: int) -> tuple[PrefixEntry, None]:
        """Measure what the first `blocks` of the device's half come to."""
        return PrefixEntry(blocks=blocks, width=self.config.hidden_size), None


@dataclass(frozen=True)
class ImageInput:
    """Images, which a model takes as pixels of one size."""

    image: ImageEntry
    max_length: None = None

    def cases(self, config: Any, prompt_tokens: int = 0) -> list[Case]:
        """Make batches for the parity check."""
        return make_image_cases(self.image)

    def write(self, bundle: Path, model: Any) -> None:
        """Write what turns raw examples into the model's input."""
        writing.write_config(bundle, model)
        write_preprocessor(bundle, self.image)

    def facts(self, client: ClientHalf) -> dict[str, Any]:
        """Find the manifest's fields about inputs and activations."""
        positions, width, grid = self._measure(client)
        image = msgspec.structs.replace(self.image, grid=grid)
        return {"width": width, "max_length": positions, "pad_token_id": 0, "image": image}

    def prefix(self, client: ClientHalf, blocks: int) -> tuple[PrefixEntry, tuple[int, int] | None]:
        """Measure what the first `blocks` of the device's half come to."""
        first, _ = divide(client, blocks)
        positions, width, grid = self._measure(first)
        return PrefixEntry(blocks=blocks, width=width, positions=positions), grid

    @torch.no_grad()
    def _measure(self, client: ClientHalf) -> tuple[int, int, tuple[int, int] | None]:
        """Positions, width, and rows and columns of a feature map, that one image comes to."""
        # Asked of the model itself: strides and paddings would be guesses.
        features = client.features(torch.zeros(1, self.image.channels, self.image.height, self.image.width))
        if features.ndim == 3:
            return features.shape[1], features.shape[2], None
        rows, columns = features.shape[2:]
        return rows * columns, features.shape[1], (rows, columns)


def _choose_max_length(asked: int | None, config: Any) -> int:
    positions, limit = int(config.max_position_embeddings), rope_limit(config)
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, positions, positions if limit is None else limit[1])
    if not 2 <= asked <= positions:
        raise SettingsError("max-length", asked, f"use 2 to {positions}, the model's positions")
    check_rope(config, asked)
    return asked


def _check_tokens(tokenizer: Any, config: Any, name: str) -> None:
    """Raise ModelError for a token that texts come to and that the embedding has no row for.

    Special tokens come of texts only where somebody writes them out: models are published with some, for padding or
    for images, that they have no row for. Those are told, and a device refuses a text that has one.
    """
    beyond = {token: place for token, place in tokenizer.get_vocab().items() if place >= config.vocab_size}
    if not beyond:
        return

    special = {place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    made = set(tokenizer(SAMPLE)["input_ids"])

    rows = f"the embedding has {config.vocab_size} rows"
    remedy = "resize it with model.resize_token_embeddings(len(tokenizer)) and save the model, or remove the token"
    for token, place in sorted(beyond.items(), key=lambda entry: entry[1]):
        if place in made or place not in special:
            raise ModelError("tokenizer", name, f"its token {token!r} is number {place}, and {rows}: {remedy}")

    some = ", ".join(sorted(beyond, key=lambda token: beyond[token])[:4]) + (", ..." if len(beyond) > 4 else "")
    logger.warning("%s has no embedding for its special tokens %s: no text may have them", name, some)


def _choose_padding(tokenizer: Any, config: Any) -> int:
    """Choose the id that fills batches; models without one get the end of text, which no real token sees."""
    eos = tokenizer.eos_token_id
    for candidate in (tokenizer.pad_token_id, config.pad_token_id, eos, 0):
        if candidate is not None and 0 <= candidate < config.vocab_size:
            return int(candidate)
    raise ModelError("vocab_size", config.vocab_size, "the model has no tokens")
