"""The whole export in one story: load, round, compute references, cut, write, check."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from hosl_export.bundle import writing
from hosl_export.bundle.graph import OUTPUT, graph_inputs
from hosl_export.bundle.parity import Reference, check_bundle, compute_references
from hosl_export.bundle.staging import check_output, staging
from hosl_export.exceptions import as_trace_error
from hosl_export.inputs import Input, choose_input
from hosl_export.model.families import find_family
from hosl_export.model.halves import ClientHalf, Tail, client_half, tail_half
from hosl_export.model.lora import inject_lora
from hosl_export.model.prompt import add_prompt, draw_prompt
from hosl_export.model.rope import settle_rope
from hosl_export.model.trainable import put_on_lattice, trained_blocks, uses_lora
from hosl_export.sources.loading import Source, find_source, load_model, load_source_config
from hosl_export.sources.origin import find_origin, write_origin
from hosl_export.summary import Summary, summarize
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import SHORTEST_TEXT, LoraEntry, Manifest, TrainMode

ShowStep = Callable[[str], contextlib.AbstractContextManager[object]]
"""What shows progress: called with the step's name, entered while the step runs."""


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
    max_length: int | None = None
    """Longest input in tokens, 2 to the model's positions; None for 512, or the model's positions if fewer."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    seed: int = 0
    """Seed of the first weights of adapters or of a soft prompt."""
    image_size: int | None = None
    """Height and width of images, where positions do not fix them; None for what the preprocessor says."""


def export_bundle(settings: ExportSettings, show_step: ShowStep = contextlib.nullcontext) -> Summary:
    """Cut a model and write its bundle, checked against the uncut model. Raises HoslError and leaves nothing behind."""
    check_output(settings.out)

    with show_step("reading the configuration"):
        source = find_source(settings.model, settings.revision)
        config = load_source_config(source)
        _check_settings(settings, config)
        given = choose_input(source, config, settings.max_length, settings.image_size)
        _check_prompt(settings, given, config)

    # Nothing is at `out` before the halves were found to compute what the model does.
    with staging(settings.out) as folder:
        manifest, references = _write(settings, source, config, given, folder, show_step)
        checking = "checking the halves against the uncut model"
        with show_step(checking), as_trace_error(config.model_type, checking):
            parity_error = check_bundle(folder, manifest, references)
        writing.write_manifest(folder, manifest)
    return summarize(settings.out, manifest, config, parity_error)


def _write(
    settings: ExportSettings, source: Source, config: Any, given: Input, folder: Path, show_step: ShowStep
) -> tuple[Manifest, list[Reference]]:
    """Write all that needs the whole model in memory: when this returns, the model is gone."""
    family = find_family(config.model_type)
    with show_step("loading the weights"):
        model = load_model(source, config=config, seed=settings.seed)

    # The halves share the model's tensors: what is put on the lattice in one is so in the other, and in the model.
    prompt_tokens = _count_prompt(settings)
    if prompt_tokens:
        add_prompt(model, prompt_tokens)
        draw_prompt(model, settings.seed)
    client, tail = client_half(model, settings.split, given.image), tail_half(model, settings.split)
    lora = LoraEntry(targets=family.lora_targets) if uses_lora(settings.train) else None
    if lora is not None:
        inject_lora(client, lora, family, settings.seed)
    writing.check_space(folder, _count_bytes(client) + _count_bytes(tail))

    trained = trained_blocks(settings.split, settings.train_blocks)
    tensors, largest_change = put_on_lattice(client, settings.train, trained)
    facts = given.facts(client)
    prefix, grid = given.prefix(client, trained.start) if trained.start > 0 else (None, None)

    # After the rounding, so that the references are those of the weights that are written.
    with show_step("computing reference outputs"), as_trace_error(config.model_type, "computing reference outputs"):
        references = compute_references(model, given.cases(model.config, prompt_tokens))

    settle_rope(client.model)
    with show_step("tracing the client half"), as_trace_error(config.model_type, "tracing the client half"):
        writing.write_shard_graphs(folder, client, tensors, prefix, grid)

    with show_step("writing the weights"):
        writing.write_weights(folder, client, tail)
        model.config.architectures = [type(model).__name__]
        given.write(folder, model)
        write_origin(folder, find_origin(source))
        manifest = Manifest(
            model=source.name,
            revision=source.revision,
            family=config.model_type,
            architecture=type(model).__name__,
            split=settings.split,
            blocks=family.count_blocks(config),
            train=settings.train,
            lora=lora,
            inputs=graph_inputs(client),
            output=OUTPUT,
            tensors=tensors,
            lattice_max_change=largest_change,
            prompt_tokens=prompt_tokens,
            prefix=prefix,
            files=writing.describe_files(folder),
            versions=writing.tool_versions(),
            **facts,
        )

    # The check loads the halves again, beside which the model must not lie in memory.
    del model, client, tail
    gc.collect()
    return manifest, references


def _check_settings(settings: ExportSettings, config: Any) -> None:
    family = find_family(config.model_type)
    blocks = family.count_blocks(config)
    if not 1 <= settings.split < blocks:
        raise SettingsError("split", settings.split, f"the model has {blocks} blocks, use 1 to {blocks - 1}")
    if uses_lora(settings.train) and not family.lora_targets:
        remedy = f"{config.model_type} has no modules for adapters: use --train norm, blocks, all or none"
        raise SettingsError("train", settings.train, remedy)
    if settings.train_blocks is not None:
        _check_train_blocks(settings, settings.train_blocks)


def _check_train_blocks(settings: ExportSettings, blocks: int) -> None:
    if not 1 <= abs(blocks) <= settings.split:
        few = f"use 1 to {settings.split}, or -1 to -{settings.split} for the last ones"
        remedy = f"the device has {settings.split} blocks, {few}"
        raise SettingsError("train-blocks", blocks, remedy)
    if settings.train in ("none", "prompt"):
        raise SettingsError("train-blocks", blocks, f"--train {settings.train} trains no block")


def _count_prompt(settings: ExportSettings) -> int:
    if settings.train != "prompt":
        return 0
    return DEFAULT_PROMPT_TOKENS if settings.prompt_tokens is None else settings.prompt_tokens


def _check_prompt(settings: ExportSettings, given: Input, config: Any) -> None:
    if settings.train != "prompt":
        if settings.prompt_tokens is not None:
            raise SettingsError("prompt-tokens", settings.prompt_tokens, f"--train {settings.train} has no soft prompt")
        return

    if given.max_length is None:
        raise SettingsError("train", settings.train, "a model of images has no prompt: use --train norm, blocks or all")
    if given.max_length < SHORTEST_TEXT + 1:
        raise SettingsError("max-length", given.max_length, "a soft prompt and a text have no room in it")
    tokens, longest = _count_prompt(settings), min(given.max_length - SHORTEST_TEXT, config.vocab_size)
    if not 1 <= tokens <= longest:
        remedy = f"use 1 to {longest}, which leaves a text of --max-length {given.max_length} room"
        raise SettingsError("prompt-tokens", tokens, remedy)


def _count_bytes(half: ClientHalf | Tail) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in half.model.state_dict().values())
