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
from hosl_export.model.halves import ClientHalf, split_prefix
from hosl_export.model.rope import check_rope, rope_limit
from hosl_export.sources.chat import text_form
from hosl_export.sources.images import read_image_entry, write_preprocessor
from hosl_export.sources.loading import Source, load_preprocessor, load_tokenizer
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import ImageEntry, PrefixEntry

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 512


class ModelInput(Protocol):
    """What an export does with the kind of input that the model takes."""

    @property
    def image(self) -> ImageEntry | None:
        """What an image becomes; None for text."""
        ...

    @property
    def max_length(self) -> int | None:
        """Longest text in tokens; None for images."""
        ...

    def make_cases(self, config: Any, prompt_tokens: int = 0) -> list[Case]:
        """Make the batches of the parity check, of texts that are longer than a soft prompt."""
        ...

    def write_files(self, bundle: Path, model: Any) -> None:
        """Write what turns raw examples into the model's input, for the device and beside the tail."""
        ...

    def manifest_fields(self, client: ClientHalf) -> dict[str, Any]:
        """The manifest's fields about inputs and activations."""
        ...

    def describe_prefix(self, client: ClientHalf, blocks: int) -> tuple[PrefixEntry, tuple[int, int] | None]:
        """The manifest's entry of the first `blocks` of the device's half as a graph of their own.

        Beside it rows and columns of their output where that is a feature map.
        """
        ...


UNBOUNDED = 1 << 17
"""Tokens that a model may be exported for whose positions have no end (ALiBi, convolutions)."""


def choose_input(source: Source, config: Any, max_length: int | None, image_size: int | None) -> ModelInput:
    """Choose the input by the model's config. Raises SettingsError where a length or a size cannot be, and ModelError.

    Texts load the tokenizer, images the preprocessor.
    """
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
    """Token ids [B, T] with padding on the right, and their mask for an encoder."""

    tokenizer: Any
    max_length: int
    config: Any
    image: None = None

    def make_cases(self, config: Any, prompt_tokens: int = 0) -> list[Case]:
        """Make padded batches of real tokens, up to the longest length."""
        return make_text_cases(self.tokenizer, _choose_padding(self.tokenizer, config), self.max_length, prompt_tokens)

    def write_files(self, bundle: Path, model: Any) -> None:
        """Write the device's tokenizer and how conversations look, and tokenizer and config beside the tail."""
        form, problem = text_form(self.tokenizer)
        if problem:
            logger.warning("the bundle serves no task of the kind chat: %s", problem)
        writing.write_texts(bundle, model, self.tokenizer, _choose_padding(self.tokenizer, self.config), form)

    def manifest_fields(self, client: ClientHalf) -> dict[str, Any]:
        """Width, longest length and padding, all of which the config and the tokenizer say."""
        padding = _choose_padding(self.tokenizer, self.config)
        return {"width": self.config.hidden_size, "max_length": self.max_length, "pad_token_id": padding}

    def describe_prefix(self, client: ClientHalf, blocks: int) -> tuple[PrefixEntry, None]:
        """The prefix's entry: between blocks of a text model the width is that at the cut."""
        return PrefixEntry(blocks=blocks, width=self.config.hidden_size), None


@dataclass(frozen=True)
class ImageInput:
    """Images [B, C, H, W] of one size, which the graph fixes."""

    image: ImageEntry
    max_length: None = None

    def make_cases(self, config: Any, prompt_tokens: int = 0) -> list[Case]:
        """Make batches of random images."""
        return make_image_cases(self.image)

    def write_files(self, bundle: Path, model: Any) -> None:
        """Write config and preprocessor beside the tail: the device reads the manifest alone."""
        writing.write_config(bundle, model)
        write_preprocessor(bundle, self.image)

    def manifest_fields(self, client: ClientHalf) -> dict[str, Any]:
        """Width, positions and feature map at the cut, as one image shows them."""
        positions, width, grid = self._measure(client)
        image = msgspec.structs.replace(self.image, grid=grid)
        return {"width": width, "max_length": positions, "pad_token_id": 0, "image": image}

    def describe_prefix(self, client: ClientHalf, blocks: int) -> tuple[PrefixEntry, tuple[int, int] | None]:
        """The prefix's entry: stages of a ResNet differ in width and in positions, so that one image is run."""
        first, _ = split_prefix(client, blocks)
        positions, width, grid = self._measure(first)
        return PrefixEntry(blocks=blocks, width=width, positions=positions), grid

    @torch.no_grad()
    def _measure(self, client: ClientHalf) -> tuple[int, int, tuple[int, int] | None]:
        """Run one image. Returns positions and width of its activations, and rows and columns of a feature map."""
        # Asked of the model itself: strides and paddings would be guesses.
        features = client.features(torch.zeros(1, self.image.channels, self.image.height, self.image.width))
        if features.ndim == 3:
            return features.shape[1], features.shape[2], None
        rows, columns = features.shape[2:]
        return rows * columns, features.shape[1], (rows, columns)


def _choose_max_length(asked: int | None, config: Any) -> int:
    positions, limit = count_positions(config), rope_limit(config)
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, positions, positions if limit is None else limit[1])
    if not 2 <= asked <= positions:
        raise SettingsError("max-length", asked, f"use 2 to {positions}, the model's positions")
    check_rope(config, asked)
    return asked


def count_positions(config: Any) -> int:
    """How many tokens the model has positions for."""
    positions = getattr(config, "max_position_embeddings", None) or UNBOUNDED
    padding = (getattr(config, "pad_token_id", None) or 0) + 1 if find_family(config.model_type).skips_padding else 0
    return int(positions) - padding


def _check_tokens(tokenizer: Any, config: Any, name: str) -> None:
    """Raise ModelError where a text comes to no tokens, or to one that the embedding has no row for.

    Special tokens come of texts only where somebody writes them out: models are published with some, for padding or
    for images, that they have no row for. Those are told, and a device refuses a text that has one.
    """
    # Some tokenizers put special tokens around every text: those come of texts, too.
    in_every_text = set(tokenizer(SAMPLE)["input_ids"])
    if not in_every_text:
        kind = f"{config.model_type} models have another kind of tokenizer than its files hold"
        raise ModelError("tokenizer", name, f"as a {type(tokenizer).__name__} it makes no tokens of a text: {kind}")

    without_row = {token: number for token, number in tokenizer.get_vocab().items() if number >= config.vocab_size}
    if not without_row:
        return

    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    rows = f"the embedding has {config.vocab_size} rows"
    remedy = "resize it with model.resize_token_embeddings(len(tokenizer)) and save the model, or remove the token"
    for token, number in sorted(without_row.items(), key=lambda entry: entry[1]):
        if number in in_every_text or number not in special:
            raise ModelError("tokenizer", name, f"its token {token!r} is number {number}, and {rows}: {remedy}")

    few = ", ".join(sorted(without_row, key=lambda token: without_row[token])[:4])
    few += ", ..." if len(without_row) > 4 else ""
    logger.warning("%s has no embedding for its special tokens %s: no text may have them", name, few)


def _choose_padding(tokenizer: Any, config: Any) -> int:
    """The id that fills batches; models without one of their own get the end of text, which no real token sees."""
    eos = tokenizer.eos_token_id
    for candidate in (tokenizer.pad_token_id, getattr(config, "pad_token_id", None), eos, 0):
        if candidate is not None and 0 <= candidate < config.vocab_size:
            return int(candidate)
    raise ModelError("vocab_size", config.vocab_size, "the model has no tokens")
