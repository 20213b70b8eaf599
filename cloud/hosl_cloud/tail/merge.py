"""Join a run's two halves into what Hugging Face loads: a model folder and, where both are LoRA, a PEFT adapter.

A soft prompt is no part of a model; it becomes a PEFT adapter in a folder of the model's.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from hosl_cloud.exceptions import AdapterError
from hosl_cloud.storage.evaluations import ClassFigures
from hosl_cloud.tail.building import class_count, tail_lora
from hosl_cloud.tail.card import Facts, write_card
from hosl_cloud.tail.checkpoint import CheckpointInfo, read_weights
from hosl_export.bundle.reading import full_config, load_model_config, load_tail
from hosl_export.bundle.staging import staging, staging_file
from hosl_export.formats.gguf_file import GgufFacts, GgufType, check_gguf, write_gguf
from hosl_export.model.families import find_family
from hosl_export.model.heads import keeps_head, own_labels
from hosl_export.model.joining import join_state
from hosl_export.model.lora import fold_lora, plain_state
from hosl_export.model.peft_files import peft_adapter, peft_prompt
from hosl_export.model.prompt import is_prompt
from hosl_export.sources.origin import ORIGIN_FILE, read_origin
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import TAIL_CONFIG, TAIL_WEIGHTS, BundleError, Manifest
from hosl_protocol.run.tasks import Task

if TYPE_CHECKING:
    from hosl_export.formats.onnx_model import OnnxFacts

_GENERATION_CONFIG = "generation_config.json"

PROMPT_FOLDER = "prompt"
"""In the merged folder, where the device trained a soft prompt."""

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is made of a run. At least the folder."""

    out: Path
    """The Hugging Face folder."""
    adapter: Path | None = None
    """The PEFT folder."""
    gguf: Path | None = None
    """The file for llama.cpp."""
    gguf_type: GgufType = "f16"
    """Of its matrices."""
    onnx: Path | None = None
    """The folder for ONNX Runtime."""


@dataclass(frozen=True)
class Merged:
    """The facts of a merge that a person is told."""

    info: CheckpointInfo
    """Of the checkpoint."""
    untied_bytes: int
    """Of a head that was tied to the embedding and is a tensor of its own now; 0 where there is none."""
    gguf: GgufFacts | None = None
    onnx: OnnxFacts | None = None


def merge_run(
    bundle: Path,
    manifest: Manifest,
    client_weights: Mapping[str, npt.NDArray[np.float32]],
    checkpoint: Path,
    targets: Targets | Path,
    run: str = "",
    classes: Sequence[ClassFigures] = (),
) -> Merged:
    """Write the Hugging Face folder, and what else of `targets` is asked for; a path stands for the folder alone.

    `client_weights` holds every tensor of the shard under its plain name, at the checkpoint's round. The folder
    computes what the two halves compute: adapters are folded in, and a head that was tied to the embedding is a tensor
    of its own unless both are still the same. After a soft prompt it does so with the PEFT adapter in its folder
    prompt. Each folder has a card, which names the `run` and how each of `classes` fared, and the task.
    All appear whole or none does. Raises SettingsError where one exists, or a format has no place for the model,
    AdapterError, BundleError, ExportError, and CheckpointMissing or CheckpointDamaged.
    """
    if isinstance(targets, Path):
        targets = Targets(out=targets)
    info, trained = read_weights(checkpoint)
    if targets.adapter is not None:
        check_adapter(manifest, info)
        if read_origin(bundle, manifest).is_adapter:
            raise AdapterError("the exported model was an adapter on its base itself, and PEFT loads none on another")

    _check_formats(bundle, manifest, info, targets)

    client = {name: torch.from_numpy(np.array(value)) for name, value in client_weights.items()}
    tail = tail_state(bundle, manifest, info, trained)
    facts = _facts(bundle, manifest, info, run, classes)

    # All are staged before any takes its name, so that an error in one leaves none.
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(staging(targets.out, "--out"))
        if targets.adapter is not None:
            _write_adapter(stack.enter_context(staging(targets.adapter, "--adapter")), facts, client, tail)
        gguf = None if targets.gguf is None else stack.enter_context(staging_file(targets.gguf, "--gguf"))
        onnx = None if targets.onnx is None else stack.enter_context(staging(targets.onnx, "--onnx"))
        untied_bytes = _write_model(out, bundle, facts, client, tail)
        del client, tail
        gguf_facts = None if gguf is None else write_gguf(out, gguf, targets.gguf_type, facts.title)
        onnx_facts = None if onnx is None else _write_onnx(out, onnx, info)
    return Merged(info, untied_bytes, gguf_facts, onnx_facts)


def _write_onnx(out: Path, folder: Path, info: CheckpointInfo) -> OnnxFacts:
    from hosl_export.formats.onnx_model import write_onnx

    return write_onnx(out, folder, _class_of(info))


def _check_formats(bundle: Path, manifest: Manifest, info: CheckpointInfo, targets: Targets) -> None:
    """Raise SettingsError where a format has no place for the model, before anything is written."""
    for option, path in (("--gguf", targets.gguf), ("--onnx", targets.onnx)):
        if path is not None and manifest.prompt_tokens:
            remedy = (
                "the run trained a soft prompt, for which the format has no place: use the folder of --out, with PEFT"
            )
            raise SettingsError(option, str(path), remedy)
    if targets.gguf is not None:
        config = full_config(bundle, manifest, num_labels=class_count(info.config.task))
        check_gguf(config, (bundle / TAIL_CONFIG).parent)


def check_adapter(manifest: Manifest, info: CheckpointInfo) -> None:
    """Raise AdapterError where the run changed more than adapters, which alone could then not carry the result."""
    if info.config.tail.train != "lora":
        raise AdapterError(f"the tail trained {info.config.tail.train!r}, an adapter needs tail.train = 'lora'")
    if manifest.train not in ("lora", "lora-b", "none"):
        raise AdapterError(
            f"the device trained {manifest.train!r}, an adapter needs a bundle of --train lora, lora-b or none"
        )


def tail_state(bundle: Path, manifest: Manifest, info: CheckpointInfo, trained: State) -> State:
    """Put the trained tail together under plain names, adapters apart, its head whole again."""
    tail = load_tail(bundle, manifest, num_labels=class_count(info.config.task), seed=info.config.seed)
    state = plain_state(tail.model)
    for name, value in trained.items():
        # A head that was narrowed to the verbalizers: its rows go back to their places, the others stay the bundle's.
        if info.head_rows and name.rpartition(".")[0] == tail.family.head:
            state[name] = state[name].index_copy(0, torch.tensor(info.head_rows), value)
        else:
            state[name] = value
    return state


def _facts(bundle: Path, manifest: Manifest, info: CheckpointInfo, run: str, classes: Sequence[ClassFigures]) -> Facts:
    task = info.config.task
    return Facts(
        manifest=manifest,
        info=info,
        origin=read_origin(bundle, manifest),
        run=run,
        prompt_folder=PROMPT_FOLDER if manifest.prompt_tokens else None,
        class_names=_class_names(bundle, manifest, task) if task.has_class_head else (),
        pad_token_id=manifest.pad_token_id if task.kind == "sequence-classification" else None,
        classes=classes,
    )


def _write_model(folder: Path, bundle: Path, facts: Facts, client: State, tail: State) -> int:
    """Write the merged folder; the bytes of a head that is tied to the embedding no more."""
    manifest, info = facts.manifest, facts.info
    lora, family = tail_lora(manifest, find_family(manifest.family)), find_family(manifest.family)
    state = join_state(manifest, fold_lora(client, lora, family), fold_lora(tail, lora, family))

    config = full_config(bundle, manifest, num_labels=class_count(info.config.task))
    if info.config.task.has_class_head:
        config.id2label = dict(enumerate(facts.class_names))
        config.label2id = {label: place for place, label in config.id2label.items()}
    state = _checked(state, config, info)

    # The two sides trained the embedding and the head apart. Where both are still the same, one tensor holds both.
    was_tied = getattr(load_model_config(bundle), "tie_word_embeddings", False)
    head = f"{family.head}.weight" if was_tied else ""
    if head in state and torch.equal(state[head], state[f"{family.embeddings[0]}.weight"]):
        config.tie_word_embeddings = True
        del state[head]

    _save(state, folder / "model.safetensors")
    for prompt in [tensor for name, tensor in client.items() if is_prompt(name)]:
        (folder / PROMPT_FOLDER).mkdir()
        _save_adapter(folder / PROMPT_FOLDER, *peft_prompt(prompt, state))

    config.to_json_file(folder / "config.json")
    _copy_texts((bundle / TAIL_CONFIG).parent, folder, is_language_model=not info.config.task.has_class_head)
    write_card(folder, facts)
    return state[head].nbytes if head in state else 0


def _class_names(bundle: Path, manifest: Manifest, task: Task) -> tuple[str, ...]:
    """Name the classes: by the task's labels, or as the head that the run went on with where the task only numbers."""
    own = load_model_config(bundle)
    is_numbered = task.labels == tuple(map(str, range(len(task.labels))))
    names = own_labels(own) if is_numbered and keeps_head(manifest, own, len(task.labels)) else ()
    return names or task.labels


_CLASSES: dict[str, Any] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
}
"""What loads the merged folder, by the kind of task; a language model for the others."""


def _class_of(info: CheckpointInfo) -> Any:
    return _CLASSES.get(info.config.task.kind, AutoModelForCausalLM)


def _checked(state: State, config: Any, info: CheckpointInfo) -> State:
    """Cast the state to the types of the config's class. Raises BundleError where it is not just what that holds."""
    with torch.device("meta"):
        skeleton = _class_of(info).from_config(config)
    types = {name: tensor.dtype for name, tensor in skeleton.state_dict().items()}

    try:
        skeleton.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise BundleError(f"the two halves do not join to a {type(skeleton).__name__}: {error}") from error
    # A bundle holds everything as float32; a batch-norm counts its batches in whole numbers.
    return {name: tensor if types[name].is_floating_point else tensor.to(types[name]) for name, tensor in state.items()}


def _save(state: State, path: Path) -> None:
    # "format" is what from_pretrained asks a safetensors file for.
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    path.touch()  # save_file makes its own with mode 0600, whatever the umask says
    mode = path.stat().st_mode
    safetensors.torch.save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(mode)


def _copy_texts(source: Path, folder: Path, *, is_language_model: bool) -> None:
    """Copy the tokenizer's files or the image preprocessor, and how a language model generates."""
    skipped = {Path(TAIL_CONFIG).name, Path(TAIL_WEIGHTS).name, ORIGIN_FILE}
    if not is_language_model:
        skipped.add(_GENERATION_CONFIG)
    for path in source.iterdir():
        if path.is_file() and path.name not in skipped:
            shutil.copyfile(path, folder / path.name)


def _write_adapter(folder: Path, facts: Facts, client: State, tail: State) -> None:
    manifest = facts.manifest
    state, config = peft_adapter(_with_lora(manifest), client, tail)
    # A folder's bare name, which the manifest has, leads nowhere.
    config["base_model_name_or_path"] = facts.origin.model
    if manifest.lora is None:
        # The device's half has no adapters: without this PEFT would expect them there too.
        config["layers_to_transform"] = list(range(manifest.split, manifest.blocks))
    _save_adapter(folder, state, config)
    write_card(folder, facts, is_adapter=True)


def _save_adapter(folder: Path, state: State, config: dict[str, Any]) -> None:
    _save(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _with_lora(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, lora=tail_lora(manifest, find_family(manifest.family)))
