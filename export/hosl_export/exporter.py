"""The whole export in one story: load, cut, round, compute references, write, check.

Both halves share the uncut model's tensors. So the order matters: what trains is rounded in place before the references
are computed, which are then those of the rounded weights, and so are the files.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hosl_export.bundle import writing
from hosl_export.bundle.gradient_check import check_gradients
from hosl_export.bundle.gradients import shown_blocks, write_gradients
from hosl_export.bundle.graph import OUTPUT, graph_inputs
from hosl_export.bundle.parity import Reference, check_bundle, compute_references
from hosl_export.bundle.staging import check_output, staging
from hosl_export.exceptions import as_trace_error
from hosl_export.inputs import ModelInput, choose_input
from hosl_export.model.families import find_family
from hosl_export.model.halves import ClientHalf, Tail, client_half, tail_half
from hosl_export.model.heads import auto_class
from hosl_export.model.lora import choose_lora, inject_lora
from hosl_export.model.prompt import add_prompt, draw_prompt
from hosl_export.model.rope import settle_rope
from hosl_export.model.trainable import put_on_lattice, trained_blocks, uses_lora
from hosl_export.settings import ExportSettings, check_prompt, check_split, count_prompt_tokens
from hosl_export.sources.loading import Source, find_source, load_model, load_source_config, quiet_transformers
from hosl_export.sources.origin import find_origin, write_origin
from hosl_export.summary import Summary, summarize
from hosl_protocol.run.manifest import BlockGradient, LoraEntry, Manifest

ShowStep = Callable[[str], contextlib.AbstractContextManager[object]]
"""What shows progress: called with the step's name, entered while the step runs."""


def export_bundle(settings: ExportSettings, show_step: ShowStep = contextlib.nullcontext) -> Summary:
    """Cut a model and write its bundle, checked against the uncut model. Raises HoslError and leaves nothing behind."""
    # What can be refused without the weights is refused before they are loaded, which may take minutes.
    check_output(settings.out)
    with show_step("reading the configuration"):
        source = find_source(settings.model, settings.revision)
        config = load_source_config(source)
        check_split(settings, config)
        model_input = choose_input(source, config, settings.max_length, settings.image_size)
        check_prompt(settings, model_input.max_length, config)
        lora = _choose_lora(settings, config)

    with staging(settings.out) as folder:
        manifest, references = _cut_and_write(settings, source, config, model_input, lora, folder, show_step)
        # The check loads the halves from the files. The cut ones go first: torch's exporter leaves circles around them.
        gc.collect()

        checking = "checking the halves against the uncut model"
        with show_step(checking), as_trace_error(config.model_type, checking):
            parity_error = check_bundle(folder, manifest, references)
        gradient = None
        if manifest.gradients:
            checking = "checking the gradients against torch"
            with show_step(checking), as_trace_error(config.model_type, checking):
                gradient = check_gradients(folder, manifest, [reference.case for reference in references])
        writing.write_manifest(folder, manifest)

    return summarize(settings.out, manifest, config, parity_error, gradient)


def _choose_lora(settings: ExportSettings, config: Any) -> LoraEntry | None:
    """Choose the adapters; None where none train. Raises SettingsError for such that the model's blocks cannot have."""
    if not uses_lora(settings.train):
        return None
    family = find_family(config.model_type)
    asked = (settings.lora_rank, settings.lora_alpha, settings.lora_targets)
    if asked == (None, None, ()):
        return LoraEntry(targets=family.lora_targets)

    # A model without memory, for the shapes of its matrices; a copy, because building one may write into its config.
    with torch.device("meta"), quiet_transformers():
        model = auto_class(family, is_classifier=False).from_config(copy.deepcopy(config))
    return choose_lora(model, family, *asked)


def _cut_and_write(
    settings: ExportSettings,
    source: Source,
    config: Any,
    model_input: ModelInput,
    lora: LoraEntry | None,
    folder: Path,
    show_step: ShowStep,
) -> tuple[Manifest, list[Reference]]:
    """Do all that needs the whole model in memory: nothing that is returned keeps its weights.

    Returns the manifest, still unwritten, and what the uncut model computes of the batches of the check.
    """
    family = find_family(config.model_type)
    with show_step("loading the weights"):
        model = load_model(source, config=config, seed=settings.seed)

    # Before the cut: a soft prompt is part of the embedding, so that the uncut model, the reference, has it too.
    prompt_tokens = count_prompt_tokens(settings)
    if prompt_tokens:
        add_prompt(model, prompt_tokens)
        draw_prompt(model, settings.seed)

    client, tail = client_half(model, settings.split, model_input.image), tail_half(model, settings.split)
    # After the cut: adapters compute nothing yet, their B being zero, and the uncut model does without them.
    if lora is not None:
        inject_lora(client, lora, family, settings.seed)

    # Before minutes of tracing, though another program may fill the disk meanwhile.
    writing.check_space(folder, _count_bytes(client) + _count_bytes(tail))

    trained = trained_blocks(settings.split, settings.train_blocks)
    tensors, largest_change = put_on_lattice(client, settings.train, trained)
    fields = model_input.manifest_fields(client)
    prefix, grid = model_input.describe_prefix(client, trained.start) if trained.start > 0 else (None, None)

    # After the rounding, so that the references are those of the weights that are written.
    with show_step("computing reference outputs"), as_trace_error(config.model_type, "computing reference outputs"):
        references = compute_references(model, model_input.make_cases(model.config, prompt_tokens))

    # After the references, which the model's own choice of angles computed.
    settle_rope(client.model)
    shown = shown_blocks(client, tensors, prefix) if settings.gradients else ()
    with show_step("tracing the client half"), as_trace_error(config.model_type, "tracing the client half"):
        writing.write_shard_graphs(folder, client, tensors, prefix, grid, shown)
    gradients: tuple[BlockGradient, ...] = ()
    if settings.gradients and settings.train != "none":
        with show_step("tracing the gradients"), as_trace_error(config.model_type, "tracing the gradients"):
            gradients = write_gradients(folder, client, tensors, prefix)

    with show_step("writing the weights"):
        writing.write_weights(folder, client, tail)
        model.config.architectures = [type(model).__name__]
        model_input.write_files(folder, model)
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
            gradients=gradients,
            # Last of all, when every other file is there: it takes their sizes and digests.
            files=writing.describe_files(folder),
            versions=writing.tool_versions(),
            **fields,
        )
    return manifest, references


def _count_bytes(half: ClientHalf | Tail) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in half.model.state_dict().values())
