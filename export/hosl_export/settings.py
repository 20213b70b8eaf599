"""What an export is asked for, and the checks that need the model's config but none of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from hosl_export.model.families import find_family
from hosl_export.model.trainable import uses_lora
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import SHORTEST_TEXT, TrainMode

DEFAULT_PROMPT_TOKENS = 8


class ExportSettings(msgspec.Struct, kw_only=True, frozen=True):
    """What `hosl-export` is asked for."""

    model: str
    """Hub id, local folder, or .gguf file."""
    split: int
    """Blocks (stages of a ResNet) on the device, 1 to the model's blocks less 1."""
    out: Path
    """The bundle's folder, which must not exist."""
    train: TrainMode = "norm"
    """What the device trains."""
    train_blocks: int | None = None
    """Only in the first so many blocks of the device, 1 to `split`, or, below zero, the last; None for all of them.

    What comes before the first of them is a graph of its own, which a round runs once.
    """
    prompt_tokens: int | None = None
    """Vectors of a soft prompt, where that trains: 1 or more; None for 8."""
    lora_rank: int | None = None
    """Rank of adapters, where they train: 1 to the smallest dimension of the matrices; None for 8."""
    lora_alpha: int | None = None
    """Adapters are scaled by it over the rank; None for 16."""
    lora_targets: tuple[str, ...] = ()
    """Names of the modules that get one, as in PEFT's `target_modules`, or `all-linear`; none for PEFT's choice."""
    max_length: int | None = None
    """Longest input in tokens, 2 to the model's positions; None for 512, or the model's positions if fewer."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    seed: int = 0
    """Seed of the first weights of adapters or of a soft prompt."""
    image_size: int | None = None
    """Height and width of images, where positions do not fix them; None for what the preprocessor says."""
    gradients: bool = True
    """Whether the bundle has graphs of the exact gradient, which first-order training takes."""


def count_prompt_tokens(settings: ExportSettings) -> int:
    """Vectors of the soft prompt; 0 where none trains."""
    if settings.train != "prompt":
        return 0
    return DEFAULT_PROMPT_TOKENS if settings.prompt_tokens is None else settings.prompt_tokens


def check_split(settings: ExportSettings, config: Any) -> None:
    """Raise SettingsError where the model has no such cut, or cannot train so."""
    family = find_family(config.model_type)
    blocks = family.count_blocks(config)
    if not 1 <= settings.split < blocks:
        raise SettingsError("split", settings.split, f"the model has {blocks} blocks, use 1 to {blocks - 1}")

    if uses_lora(settings.train) and not family.lora_targets and not settings.lora_targets:
        remedy = f"PEFT has no choice of modules for {config.model_type}: use --lora-targets, or --train norm"
        if family.takes_images:
            remedy = f"{config.model_type} has no modules for adapters: use --train norm, blocks, all or none"
        raise SettingsError("train", settings.train, remedy)

    if not uses_lora(settings.train):
        _check_no_lora(settings)
    if settings.train_blocks is not None:
        _check_train_blocks(settings, settings.train_blocks)


def _check_no_lora(settings: ExportSettings) -> None:
    for option in ("lora_rank", "lora_alpha", "lora_targets"):
        value = getattr(settings, option)
        if value not in (None, ()):
            said = ",".join(value) if isinstance(value, tuple) else value
            remedy = f"--train {settings.train} has no adapters: use --train lora or lora-b"
            raise SettingsError(option.replace("_", "-"), said, remedy)


def _check_train_blocks(settings: ExportSettings, blocks: int) -> None:
    if not 1 <= abs(blocks) <= settings.split:
        few = f"use 1 to {settings.split}, or -1 to -{settings.split} for the last ones"
        remedy = f"the device has {settings.split} blocks, {few}"
        raise SettingsError("train-blocks", blocks, remedy)
    if settings.train in ("none", "prompt"):
        raise SettingsError("train-blocks", blocks, f"--train {settings.train} trains no block")


def check_prompt(settings: ExportSettings, max_length: int | None, config: Any) -> None:
    """Raise SettingsError where a soft prompt has no room in inputs of `max_length` tokens (None: images)."""
    if settings.train != "prompt":
        if settings.prompt_tokens is not None:
            raise SettingsError("prompt-tokens", settings.prompt_tokens, f"--train {settings.train} has no soft prompt")
        return

    if max_length is None:
        raise SettingsError("train", settings.train, "a model of images has no prompt: use --train norm, blocks or all")
    if max_length < SHORTEST_TEXT + 1:
        raise SettingsError("max-length", max_length, "a soft prompt and a text have no room in it")

    # It begins as tokens of the vocabulary, all different, so that there are no more vectors than tokens.
    tokens, longest = count_prompt_tokens(settings), min(max_length - SHORTEST_TEXT, config.vocab_size)
    if not 1 <= tokens <= longest:
        remedy = f"use 1 to {longest}, which leaves a text of --max-length {max_length} room"
        raise SettingsError("prompt-tokens", tokens, remedy)
