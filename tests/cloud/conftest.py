"""Tiny random models cut into bundles, and what the uncut models compute for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from hosl_cloud.settings import RunConfig, parse_config
from hosl_cloud.tail.trainer import TailTrainer
from hosl_export import client_half, find_family, inject_lora, plain_state, tail_half
from hosl_protocol.run.chat import TextForm, encode_form
from hosl_protocol.run.manifest import (
    MANIFEST,
    SHARD_CHAT,
    TAIL_CONFIG,
    TAIL_WEIGHTS,
    LoraEntry,
    Manifest,
    TensorEntry,
    encode_manifest,
)
from hosl_protocol.run.tasks import TOKEN_KINDS, UNSCORED

VOCABULARY = 48
BLOCKS, SPLIT = 3, 1
PROMPT_TOKENS = 2

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=BLOCKS,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.2,
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=64,
        do_layer_norm_before=False,
        init_std=0.2,
    ),
    "gemma3_text": Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        final_logit_softcapping=1.5,
        initializer_range=0.2,
    ),
    "bert": BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    ),
}

PROMPTS: dict[str, Any] = {
    "name": "prompts",
    "kind": "prompt-classification",
    "template": "{text}",
    "labels": ["0", "1"],
    "verbalizers": [" bad", " good"],
}
CLASSES: dict[str, Any] = {
    "name": "classes",
    "kind": "sequence-classification",
    "template": "{text}",
    "labels": ["no", "maybe", "yes"],
}
TEXT: dict[str, Any] = {"name": "text", "kind": "lm", "template": "{text}"}
ANSWERS: dict[str, Any] = {"name": "answers", "kind": "completion", "template": "{text}", "completion": "{answer}"}
TASKS = {task["kind"]: task for task in (PROMPTS, CLASSES, TEXT, ANSWERS)}


@dataclass(frozen=True)
class Batch:
    """Examples as token ids, and as the device sends them."""

    ids: list[Tensor]
    activations_TD: npt.NDArray[np.float32]
    lengths_B: npt.NDArray[np.int32]
    labels_N: npt.NDArray[np.int32]

    @property
    def sent(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """What a frame carries."""
        return self.activations_TD, self.lengths_B, self.labels_N

    @property
    def examples(self) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]]:
        """Each example as a batch of its own."""
        ends = self.lengths_B.cumsum()
        is_text = len(self.labels_N) != len(self.lengths_B)
        parts = [slice(end - length, end) for end, length in zip(ends, self.lengths_B, strict=True)]
        rows = [slice(row, row + 1) for row in range(len(ends))]
        return [
            (self.activations_TD[part], self.lengths_B[row], self.labels_N[part if is_text else row])
            for part, row in zip(parts, rows, strict=True)
        ]


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk (all that the cloud's torch side reads of it) and the models it was made from."""

    path: Path
    manifest: Manifest
    uncut: Any
    client: Any
    moved: list[bool] = field(default_factory=list)
    """Not empty once a test moved the client half's weights."""

    def settings(self, kind: str = "prompt-classification", **tail: Any) -> dict[str, Any]:
        """What run.toml would say; the tail trains in full by plain SGD unless `tail` says otherwise."""
        settings = {"train": "full", "optimizer": "sgd", "learning_rate": 0.1, "clip_norm": 0.0, "device": "cpu"}
        algorithm = "frozen" if self.manifest.train == "none" else "ho-sfl"
        return {
            "task": TASKS[kind],
            "seed": 5,
            "algorithm": algorithm,
            "rounds": 10,
            "max_length": 32,
            "tail": settings | tail,
        }

    def config(self, kind: str = "prompt-classification", **tail: Any) -> RunConfig:
        """Those settings, checked."""
        return parse_config(self.settings(kind, **tail), self.manifest)

    def trainer(self, kind: str = "prompt-classification", **tail: Any) -> TailTrainer:
        """A trainer with `config`'s settings."""
        return TailTrainer(self.path, self.manifest, self.config(kind, **tail))

    def batch(self, kind: str, lengths: tuple[int, ...] = (3, 7, 1, 5), seed: int = 0) -> Batch:
        """Random examples of these lengths."""
        generator = torch.Generator().manual_seed(seed)
        ids = [torch.randint(4, VOCABULARY, (length,), generator=generator) for length in lengths]
        classes = len(TASKS[kind].get("labels", ())) or 1
        labels = torch.arange(len(ids)) % classes
        if kind == "lm":
            labels = torch.cat(ids)
        elif kind == "completion":  # what comes after the first third
            labels = torch.cat([torch.where(torch.arange(len(each)) * 3 < len(each), UNSCORED, each) for each in ids])
        return Batch(ids, self.activate(ids), np.array(lengths, np.int32), labels.numpy().astype(np.int32))

    def client_weights(self) -> dict[str, npt.NDArray[np.float32]]:
        """The shard's tensors as the cloud replays them."""
        return {name: tensor.detach().numpy() for name, tensor in plain_state(self.client.model).items()}

    def uncut_loss_and_gradient(self, trainer: TailTrainer, batch: Batch) -> tuple[float, npt.NDArray[np.float32]]:
        """Loss of the whole Hugging Face model, example by example, and autograd's gradient at the cut layer [T, D]."""
        return uncut_loss_and_gradient(self, trainer, batch)

    def save_uncut(self, folder: Path) -> None:
        """The model before the cut, as a Hugging Face folder."""
        self.uncut.save_pretrained(folder)

    def activate(self, ids: list[Tensor]) -> npt.NDArray[np.float32]:
        """Packed activations [T, D] of examples that were run one by one, so without padding."""
        with torch.no_grad():
            return np.concatenate([self.client(example[None])[0].numpy() for example in ids])


def uncut_loss_and_gradient(
    bundle: Bundle, trainer: TailTrainer, batch: Batch
) -> tuple[float, npt.NDArray[np.float32]]:
    kind = trainer.config.task.kind
    model = bundle.uncut if kind != "sequence-classification" else uncut_classifier(bundle, trainer)
    block = model.base_model.get_submodule(_below_base(bundle.manifest.family))[SPLIT - 1]
    cuts: list[Tensor] = []
    hook = block.register_forward_hook(lambda *call: cuts.append(_keep_gradient(call[2])))
    losses = [_example_loss(model, kind, trainer.head_rows, *example) for example in _examples(kind, batch)]
    hook.remove()
    loss = torch.cat(losses).mean()
    gradients = torch.autograd.grad(loss, cuts)
    return loss.item(), np.concatenate([gradient[0].numpy() for gradient in gradients])


def _keep_gradient(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden if hidden.requires_grad else hidden.requires_grad_()


def _below_base(family: str) -> str:
    """Where the blocks are, from the base model on."""
    return find_family(family).blocks.removeprefix("model.").removeprefix("transformer.")


def _examples(kind: str, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    labels = list(torch.from_numpy(batch.labels_N.astype(np.int64)))
    if kind in TOKEN_KINDS:
        labels = list(torch.from_numpy(batch.labels_N.astype(np.int64)).split(batch.lengths_B.tolist()))
    return list(zip(batch.ids, labels, strict=True))


def _example_loss(model: Any, kind: str, rows: tuple[int, ...], ids: Tensor, label: Tensor) -> Tensor:
    """Losses of one example: one, or one a predicted token."""
    logits = model(input_ids=ids[None]).logits[0]
    if kind in TOKEN_KINDS:
        is_scored = label[1:] != UNSCORED
        return F.cross_entropy(logits[:-1][is_scored], label[1:][is_scored], reduction="none")
    scores = logits if kind == "sequence-classification" else logits[-1, list(rows)]
    return F.cross_entropy(scores[None], label[None], reduction="none")


def uncut_classifier(bundle: Bundle, trainer: TailTrainer) -> Any:
    """The uncut model as its Hugging Face classifier, with the trainer's fresh head."""
    config = AutoModelForSequenceClassification.from_config(bundle.uncut.config).config
    config.num_labels = len(trainer.config.task.labels)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.base_model.load_state_dict(bundle.uncut.base_model.state_dict())
    name = "classifier" if hasattr(model, "classifier") else "score"
    getattr(model, name).load_state_dict(trainer.tail.classifier.state_dict())
    return model


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Cut a tiny random model of a family into a bundle; made once for each family and way of training."""
    made: dict[tuple[str, str, str], Bundle] = {}

    def make(family: str = "llama", train: str = "lora", use: str = "whole") -> Bundle:
        key = family, train, use
        if key not in made:
            made[key] = _cut(tmp_path_factory.mktemp("-".join(key)), family, train)
        return made[key]

    return make


def _cut(path: Path, name: str, train: str) -> Bundle:
    uncut, family = _random_model(name), find_family(name)
    client, tail = client_half(_random_model(name), SPLIT), tail_half(uncut, SPLIT)
    lora = LoraEntry(r=2, alpha=4, targets=family.lora_targets) if train == "lora" else None
    if lora is not None:
        inject_lora(client, lora, family, seed=1)
    prompt = TensorEntry(name="prompt", shape=(PROMPT_TOKENS, 32), trainable=True, exponent=-20)
    (path / TAIL_CONFIG).parent.mkdir()
    uncut.config.architectures = [type(uncut).__name__]
    uncut.config.to_json_file(path / TAIL_CONFIG)
    save_file({key: tensor.clone() for key, tensor in tail.model.state_dict().items()}, path / TAIL_WEIGHTS)
    _write_tokenizer(path)
    manifest = Manifest(
        model=f"tiny-{name}",
        family=name,
        architecture=type(uncut).__name__,
        split=SPLIT,
        blocks=BLOCKS,
        width=32,
        max_length=64,
        pad_token_id=0,
        train=train,  # type: ignore[arg-type]
        lora=lora,
        prompt_tokens=PROMPT_TOKENS if train == "prompt" else 0,
        tensors=(prompt,) if train == "prompt" else (),
        files=(),
    )
    (path / MANIFEST).write_bytes(encode_manifest(manifest))
    (path / SHARD_CHAT).write_bytes(encode_form(TextForm()))
    return Bundle(path, manifest, uncut, client)


def _random_model(name: str) -> Any:
    auto = AutoModel if find_family(CONFIGS[name].model_type).is_encoder else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = auto.from_config(CONFIGS[name]).eval()
        for parameter in model.parameters():
            # Norms of ones and biases of zeros would hide that one is missing.
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def _write_tokenizer(path: Path) -> None:
    words = ["<pad>", "<unk>", "bad", "good", *(f"w{index}" for index in range(VOCABULARY - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (path / "shard").mkdir()
    tokenizer.save(str(path / "shard" / "tokenizer.json"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(path / "tail")


@pytest.fixture
def bundle(make_bundle: Callable[..., Bundle]) -> Bundle:
    """A tiny Llama with LoRA on the device."""
    return make_bundle()
