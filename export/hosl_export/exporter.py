"""The whole export in one story: load, round, compute references, cut, write, check."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from hosl_export import bundle as files
from hosl_export.check import Reference, check_bundle, compute_references, make_cases
from hosl_export.exceptions import ModelError
from hosl_export.families import find_family
from hosl_export.graph import OUTPUT, graph_inputs
from hosl_export.halves import ClientHalf, Tail, client_half, tail_half
from hosl_export.loading import Source, find_source, load_config, load_model, load_tokenizer
from hosl_export.lora import inject_lora
from hosl_export.staging import check_output, staging
from hosl_export.summary import Summary, summarize
from hosl_export.trainable import put_on_lattice
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.manifest import LoraEntry, Manifest, TrainMode

DEFAULT_MAX_LENGTH = 512

Step = Callable[[str], contextlib.AbstractContextManager[object]]
"""What shows progress: called with the step's name, entered while the step runs."""


class ExportSettings(msgspec.Struct, kw_only=True, frozen=True):
    """What `hosl-export` is asked for."""

    model: str
    """Hub id, local folder, or .gguf file."""
    split: int
    """Blocks on the device, 1 to the model's blocks less 1."""
    out: Path
    """The bundle's folder, which must not exist."""
    train: TrainMode = "lora"
    """What the device trains."""
    max_length: int | None = None
    """Longest input in tokens, 2 to the model's positions; None for 512, or the model's positions if fewer."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    seed: int = 0
    """Seed of LoRA's initial weights."""


def export_bundle(settings: ExportSettings, step: Step = contextlib.nullcontext) -> Summary:
    """Cut a model and write its bundle, checked against the uncut model. Raises HoslError and leaves nothing behind."""
    check_output(settings.out)
    with step("reading the configuration"):
        source = find_source(settings.model, settings.revision)
        config = load_config(source)
        _check_split(settings.split, config.num_hidden_layers)
        max_length = _choose_max_length(settings.max_length, config.max_position_embeddings)
        tokenizer = load_tokenizer(source)
    with staging(settings.out) as folder:
        manifest, references = _write(settings, source, config, tokenizer, max_length, folder, step)
        with step("checking the halves against the uncut model"):
            parity_error = check_bundle(folder, manifest, references)
        files.write_manifest(folder, manifest)
    return summarize(settings.out, manifest, config, parity_error)


def _write(
    settings: ExportSettings, source: Source, config: Any, tokenizer: Any, max_length: int, folder: Path, step: Step
) -> tuple[Manifest, list[Reference]]:
    """Everything that needs the whole model in memory: when this returns, the model is gone."""
    family = find_family(config.model_type)
    with step("loading the weights"):
        model = load_model(source, config=config, seed=settings.seed)
    client, tail = client_half(model, settings.split), tail_half(model, settings.split)
    lora = LoraEntry(targets=family.lora_targets) if settings.train == "lora" else None
    if lora is not None:
        inject_lora(client, lora, family, settings.seed)
    files.check_space(folder, _count_bytes(client) + _count_bytes(tail))
    tensors, largest_change = put_on_lattice(client, settings.train)
    pad_token_id = _choose_padding(tokenizer, model.config)
    with step("computing reference outputs"):
        references = compute_references(model, make_cases(tokenizer, pad_token_id, max_length))
    with step("tracing the client half"):
        files.write_shard_graph(folder, client)
    with step("writing the weights"):
        files.write_weights(folder, client, tail)
        model.config.architectures = [type(model).__name__]
        files.write_texts(folder, model, tokenizer)
        manifest = Manifest(
            model=source.name,
            revision=source.revision,
            family=config.model_type,
            architecture=type(model).__name__,
            split=settings.split,
            blocks=config.num_hidden_layers,
            width=config.hidden_size,
            max_length=max_length,
            pad_token_id=pad_token_id,
            train=settings.train,
            lora=lora,
            inputs=graph_inputs(client),
            output=OUTPUT,
            tensors=tensors,
            lattice_max_change=largest_change,
            files=files.describe_files(folder),
            versions=files.tool_versions(),
        )
    del model, client, tail
    gc.collect()
    return manifest, references


def _check_split(split: int, blocks: int) -> None:
    if not 1 <= split < blocks:
        raise SettingsError("split", split, f"the model has {blocks} blocks, use 1 to {blocks - 1}")


def _choose_max_length(asked: int | None, positions: int) -> int:
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, positions)
    if not 2 <= asked <= positions:
        raise SettingsError("max-length", asked, f"use 2 to {positions}, the model's positions")
    return asked


def _choose_padding(tokenizer: Any, config: Any) -> int:
    """The id that fills batches; models without one of their own get the end of text, which no real token sees."""
    eos = tokenizer.eos_token_id
    for candidate in (tokenizer.pad_token_id, config.pad_token_id, eos, 0):
        if candidate is not None and 0 <= candidate < config.vocab_size:
            return int(candidate)
    raise ModelError("vocab_size", config.vocab_size, "the model has no tokens")


def _count_bytes(half: ClientHalf | Tail) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in half.model.state_dict().values())
