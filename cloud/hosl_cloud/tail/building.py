"""The tail of a bundle, made ready for a task: its head, and which of its tensors train.

Shapes: V vocabulary, C classes, D width.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

from hosl_cloud.exceptions import VerbalizerError
from hosl_cloud.settings import RunConfig
from hosl_export.bundle.reading import load_model_config, load_tail
from hosl_export.model.family import Family
from hosl_export.model.halves import Tail, base_prefix
from hosl_export.model.heads import has_class_head, keeps_head, linear_of, own_labels
from hosl_export.model.lora import inject_lora, plain_name
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.chat import load_form
from hosl_protocol.run.manifest import SHARD_TOKENIZER, BundleError, LoraEntry, Manifest
from hosl_protocol.run.tasks import Task, sample_text

log = logging.getLogger(__name__)


def build_tail(bundle: Path, manifest: Manifest, config: RunConfig) -> tuple[Tail, tuple[int, ...]]:
    """Build the tail with `requires_grad` set as `tail.train` says; beside it the vocabulary rows that its head keeps.

    Rows are empty where the head is whole. New heads and adapters are drawn from the run's seed. Raises
    SettingsError, VerbalizerError and BundleError.
    """
    tail = load_tail(bundle, manifest, num_labels=class_count(config.task), seed=config.seed)
    # The tail's head is its own tensor; PEFT would look for the embedding that the config says it is tied to.
    tail.model.config.tie_word_embeddings = False

    rows: tuple[int, ...] = ()
    if config.task.has_class_head:
        _settle_head(tail, bundle, manifest, config.task)
    else:
        _check_language_head(tail, manifest, config.task)
    if config.task.scores_answers:
        _check_form(bundle, config.task)
    if config.task.kind == "prompt-classification":
        rows = verbalizer_rows(config.task, bundle / SHARD_TOKENIZER)
        _check_rows(tail, config.task, rows)
        narrow_head(tail, rows)

    # After the head is what it will be: what trains is chosen among the modules that are there.
    choose_trainable(tail, manifest, config)
    return tail.eval(), rows


def class_count(task: Task) -> int | None:
    """Count the classes of the trained head; None where the language model's own head scores."""
    return len(task.labels) if task.has_class_head else None


def _settle_head(tail: Tail, bundle: Path, manifest: Manifest, task: Task) -> None:
    """Say whether the model's own classification head is kept, and put its rows in the order of the task's labels."""
    if not has_class_head(manifest):
        return
    own = load_model_config(bundle)
    if not keeps_head(manifest, own, len(task.labels)):
        made = f"a head of {own.num_labels} labels, and the task has {len(task.labels)}: a new one takes its place"
        log.warning("%s has %s", manifest.model, made)
        return

    log.info("the classification head of %s is kept", manifest.model)

    # The bundle's head may know the same labels in another order; a device sends the task's numbers.
    names, wanted = ([label.casefold() for label in labels] for labels in (own_labels(own), task.labels))
    if names != wanted and sorted(names) == sorted(wanted):
        order = [names.index(label) for label in wanted]
        assert tail.classifier is not None
        for parameter in linear_of(tail.classifier)[1].parameters():
            parameter.data = parameter.data[torch.tensor(order)]


def _check_form(bundle: Path, task: Task) -> None:
    """Raise SettingsError where the bundle does not say how the task's texts look, and BundleError for an old one."""
    if load_form(bundle).chat is None and task.kind == "chat":
        remedy = "the bundle's model has no chat template that a device can follow: use the kind 'completion'"
        raise SettingsError("task.kind", task.kind, remedy)


def _check_language_head(tail: Tail, manifest: Manifest, task: Task) -> None:
    if language_head(tail) is None:
        remedy = f"{manifest.architecture} has no language-model head: use 'sequence-classification'"
        raise SettingsError("task.kind", task.kind, remedy)


def language_head(tail: Tail) -> nn.Linear | None:
    """Find the layer from hidden states to the vocabulary."""
    return cast("nn.Linear | None", tail.model.get_output_embeddings())


def verbalizer_rows(task: Task, tokenizer_path: Path) -> tuple[int, ...]:
    """Find the token of each class's verbalizer. Raises VerbalizerError where one is not just one token of its own."""
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    except Exception as error:  # tokenizers raises nothing finer
        raise BundleError(f"{tokenizer_path} cannot be used ({error}): export the bundle again") from error

    rows: list[int] = []
    for verbalizer in task.verbalizers:
        ids = answer_ids(tokenizer, task, verbalizer)
        tokens = [tokenizer.id_to_token(each) for each in ids]
        if len(ids) != 1:
            remedy = f"it is the tokens {tokens}, use a word of exactly one token" + _hint(tokenizer, task, verbalizer)
            raise VerbalizerError("task.verbalizers", verbalizer, remedy)
        if tokens[0] == getattr(tokenizer.model, "unk_token", None):
            remedy = f"it is no token of the model's: {tokens[0]!r} stands for all such words; use another"
            raise VerbalizerError("task.verbalizers", verbalizer, remedy)
        if ids[0] in rows:
            other = task.verbalizers[rows.index(ids[0])]
            remedy = f"it is the token {tokens[0]!r}, as {other!r} is: use a different word for each class"
            raise VerbalizerError("task.verbalizers", verbalizer, remedy)
        rows.append(ids[0])
    return tuple(rows)


def _check_rows(tail: Tail, task: Task, rows: tuple[int, ...]) -> None:
    """Raise VerbalizerError for a token that the tokenizer has and the head has no row for."""
    head = language_head(tail)
    assert head is not None
    for verbalizer, row in zip(task.verbalizers, rows, strict=True):
        if row >= head.out_features:
            remedy = f"it is token {row}, and the model's head has {head.out_features} rows: use another word"
            raise VerbalizerError("task.verbalizers", verbalizer, remedy)


def answer_ids(tokenizer: Tokenizer, task: Task, verbalizer: str) -> list[int]:
    """Find the tokens that a verbalizer adds to a text of the task, or failing one such token those that it is alone.

    The two differ where a tokenizer puts a space before every text, as those of the SentencePiece kind do: " great"
    alone has two then, of which the text has one.
    """

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    prompt = sample_text(task)
    before, whole = ids_of(prompt), ids_of(prompt + verbalizer)
    added = whole[len(before) :]
    if whole[: len(before)] == before and len(added) == 1:
        return added
    return ids_of(verbalizer)


def _hint(tokenizer: Tokenizer, task: Task, verbalizer: str) -> str:
    """Suggest the same word with or without its leading space, where that is one token."""
    word = verbalizer.strip()
    others = (other for other in (f" {word}", word) if other != verbalizer)
    fitting = next((other for other in others if word and len(answer_ids(tokenizer, task, other)) == 1), None)
    return f", such as {fitting!r}" if fitting is not None else ""


def narrow_head(tail: Tail, rows: tuple[int, ...]) -> None:
    """Keep only `rows` of the head [V, D]: it then gives logits of the classes, [..., C].

    A whole head would get a dense gradient, and optimizer state, of V rows for the sake of C.
    """
    head = language_head(tail)
    assert head is not None
    # On no device first: its weights are the old one's rows, and drawing others would take time and random numbers.
    narrow = nn.Linear(head.in_features, len(rows), bias=head.bias is not None, device="meta")
    narrow.weight = nn.Parameter(head.weight.detach()[list(rows)])
    if head.bias is not None:
        narrow.bias = nn.Parameter(head.bias.detach()[list(rows)])

    tail.model.set_output_embeddings(narrow)


def choose_trainable(tail: Tail, manifest: Manifest, config: RunConfig) -> None:
    """Set `requires_grad` of every tensor, and put adapters in where `tail.train` is `lora`.

    Raises SettingsError where the model has no modules for adapters.
    """
    tail.model.requires_grad_(config.tail.train == "full")
    if config.tail.train == "lora":
        if not tail.family.lora_targets:
            remedy = f"{manifest.family} has no modules for adapters: use full or head"
            raise SettingsError("tail.train", config.tail.train, remedy)
        inject_lora(tail.model, tail_lora(manifest, tail.family), tail.family, config.seed)

    if config.tail.train == "head":
        _head_modules(tail).requires_grad_()
    if config.tail.train == "lora" and tail.classifier is not None:
        # A head that starts from random weights must learn; PEFT keeps it as one of `modules_to_save`.
        tail.classifier.requires_grad_()


def _head_modules(tail: Tail) -> nn.ModuleList:
    """Find the output head: for a classifier also the pooler that only it reads, where there is one."""
    if tail.classifier is None:
        return nn.ModuleList([tail.model.get_output_embeddings()])
    pooler: Any = getattr(tail.model.base_model, "pooler", None)
    return nn.ModuleList([tail.classifier] if pooler is None else [tail.classifier, pooler])


def tail_lora(manifest: Manifest, family: Family) -> LoraEntry:
    """Choose the adapters of a tail: as the device's half has them, or r 8, alpha 16 on the family's targets."""
    return manifest.lora or LoraEntry(targets=family.lora_targets)


def block_list(tail: Tail) -> list[nn.Module]:
    """List the tail's blocks, or a ResNet's stages, in the order in which they run."""
    path = base_prefix(tail.model, tail.family) + tail.family.blocks
    return list(tail.model.get_submodule(path).children())


def recompute(block: nn.Module) -> None:
    """Keep none of the block's inner activations for the backward, which runs the block again."""
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def trainable_parameters(tail: Tail) -> dict[str, nn.Parameter]:
    """List what trains, by plain name, in the model's order."""
    return {plain_name(name): value for name, value in tail.model.named_parameters() if value.requires_grad}
