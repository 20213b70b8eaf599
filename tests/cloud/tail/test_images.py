"""Classifying images: the tail's loss is the uncut model's, and merge writes an ordinary checkpoint of the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hosl_cloud.exceptions import BatchError
from hosl_cloud.settings import parse_config
from hosl_cloud.tail.checkpoint import save_checkpoint
from hosl_cloud.tail.merge import Targets, merge_run
from hosl_cloud.tail.trainer import TailTrainer
from hosl_edge.data.datasets import Batch
from hosl_edge.data.images import ImageDataset
from hosl_edge.model.shard import Shard
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import SHARD_WEIGHTS, Manifest, load_manifest
from pictures import BLOCKS, SIZES, TASK, make_image_model, make_pictures

CASES = [("resnet", "norm", 1), ("resnet", "blocks", 2), ("vit", "lora", 1), ("vit", "all", 3)]


def configure(manifest: Manifest, task: dict[str, Any] | None = None, **tail: Any) -> Any:
    settings = {"train": "full", "optimizer": "sgd", "learning_rate": 0.05, "clip_norm": 0.0, "device": "cpu", **tail}
    algorithm = "frozen" if manifest.train == "none" else "ho-sfl"
    return parse_config({"task": task or TASK, "seed": 5, "algorithm": algorithm, "tail": settings}, manifest)


class Halves:
    """A bundle with a trainer, and a device's shard that moved as a run would have moved it."""

    def __init__(self, bundle: Path, kind: str, **options: Any) -> None:
        self.bundle, self.kind, self.manifest = bundle, kind, load_manifest(bundle)
        self.trainer = TailTrainer(bundle, self.manifest, configure(self.manifest, **options))
        self.shard = Shard(bundle, self.manifest, threads=1)
        self.shard.open()
        self.images, self.labels = make_pictures(6, SIZES[kind])
        generator = np.random.default_rng(3)
        for entry in self.manifest.trainable:
            self.shard.weights[entry.name][...] += generator.normal(0.0, 0.05, entry.shape).astype(np.float32)

    @property
    def batch(self) -> Batch:
        assert self.manifest.image is not None
        classes = self.labels.astype(np.int32)
        dataset = ImageDataset(self.images, classes, self.manifest.image, self.manifest.max_length, Path("made-up"))
        return dataset.batch(np.arange(6))

    @property
    def sent(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """What a frame carries."""
        batch = self.batch
        activations_TD = np.empty((batch.tokens, self.manifest.width), np.float32)
        return self.shard.activations(batch, activations_TD), batch.lengths_B, batch.labels_N

    def logits(self) -> torch.Tensor:
        activations_TD, lengths_B, _ = self.sent
        h_BTD = torch.from_numpy(activations_TD).reshape(len(lengths_B), -1, self.manifest.width)
        with torch.no_grad():
            return self.trainer.tail(h_BTD)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_loss_and_gradient_at_the_cut_are_those_of_the_uncut_model(
    make_image_bundle: Callable[..., Path], kind: str
) -> None:
    halves = Halves(make_image_bundle(kind, "none", 1), kind)
    got = halves.trainer.forward_backward(*halves.sent)
    model, cuts = make_image_model(kind), []
    block = (model.vit.layers if kind == "vit" else model.resnet.encoder.stages)[0]
    block.register_forward_hook(lambda *call: cuts.append(call[2]))
    logits = model(torch.from_numpy(halves.batch.inputs(slice(0, 6))["pixel_values"])).logits
    loss = F.cross_entropy(logits, torch.from_numpy(halves.labels))
    (gradient,) = torch.autograd.grad(loss, cuts)
    expected = gradient if kind == "vit" else gradient.flatten(2).transpose(1, 2)
    assert got.loss == pytest.approx(loss.item(), rel=1e-4)
    assert got.correct == int((logits.argmax(1) == torch.from_numpy(halves.labels)).sum())
    assert got.cut_gradient_TD is not None
    np.testing.assert_allclose(got.cut_gradient_TD, expected.reshape(got.cut_gradient_TD.shape).numpy(), atol=1e-5)


def test_a_run_of_images_takes_the_bundles_positions_whatever_its_file_says(
    make_image_bundle: Callable[..., Path],
) -> None:
    manifest = load_manifest(make_image_bundle("resnet", "norm"))
    assert configure(manifest).max_length == 64
    data = {"task": {"preset": "cifar10"}, "max_length": 500, "augmentation": {"crop_padding": 4, "flip": True}}
    wire = parse_config(data, manifest).wire_settings()
    assert (wire.max_length, wire.max_tokens, wire.task.labels[9]) == (64, 16 * 64, "truck")
    assert (wire.augmentation.crop_padding, wire.augmentation.flip) == (4, True)
    with pytest.raises(SettingsError, match="the bundle's model takes images"):
        parse_config({"task": {"preset": "sst2"}}, manifest)


@pytest.mark.parametrize("lengths", [(64, 63, 65, 64, 64, 64), (32,) * 12, (384,)])
def test_images_of_another_number_of_positions_are_refused(
    make_image_bundle: Callable[..., Path], lengths: tuple[int, ...]
) -> None:
    halves = Halves(make_image_bundle("resnet", "norm"), "resnet")
    labels = np.zeros(len(lengths), np.int32)
    with pytest.raises(BatchError):
        halves.trainer.forward_backward(halves.sent[0], np.array(lengths, np.int32), labels)


def test_a_label_beyond_the_classes_is_refused(make_image_bundle: Callable[..., Path]) -> None:
    halves = Halves(make_image_bundle("resnet", "norm"), "resnet")
    activations_TD, lengths_B, labels_N = halves.sent
    with pytest.raises(BatchError, match="0 to 2"):
        halves.trainer.evaluate(activations_TD, lengths_B, labels_N + 1)


def test_adapters_in_the_tail_of_a_resnet_are_refused_with_what_to_use(make_image_bundle: Callable[..., Path]) -> None:
    with pytest.raises(SettingsError, match=r"tail.train is 'lora': resnet has no modules for adapters: use full or"):
        Halves(make_image_bundle("resnet", "norm"), "resnet", train="lora")


@pytest.mark.parametrize(("kind", "names"), [("resnet", {"classifier.1"}), ("vit", {"classifier"})])
def test_training_the_head_alone_trains_the_classifier(
    make_image_bundle: Callable[..., Path], kind: str, names: set[str]
) -> None:
    halves = Halves(make_image_bundle(kind, "norm" if kind == "resnet" else "lora"), kind, train="head")
    assert {name.rpartition(".")[0] for name in halves.trainer.parameters} == names


@pytest.mark.parametrize(("kind", "train", "split"), CASES)
@pytest.mark.parametrize("classes", [3, 4])
def test_the_merged_checkpoint_computes_what_the_halves_compute(
    make_image_bundle: Callable[..., Path], tmp_path: Path, kind: str, train: str, split: int, classes: int
) -> None:
    task = {**TASK, "labels": ["red", "green", "blue", "none of them"][:classes]}
    bundle = make_image_bundle(kind, train, split, gradients=split == 1)  # as other tests have them, or none
    halves = Halves(bundle, kind, task=task)
    for round_ in (1, 2, 3):
        halves.trainer.forward_backward(*halves.sent)
        halves.trainer.step(round_, 1.0)
    checkpoint = save_checkpoint(tmp_path / "checkpoints", 3, 1, halves.trainer, halves.trainer.config)
    merge_run(bundle, halves.manifest, halves.shard.weights, checkpoint, tmp_path / "out")
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    pixels = torch.from_numpy(halves.batch.inputs(slice(0, 6))["pixel_values"])
    with torch.no_grad():
        torch.testing.assert_close(merged(pixels).logits, halves.logits(), atol=1e-4, rtol=1e-4)
    assert merged.config.id2label == dict(enumerate(task["labels"]))
    # Statistics come out as they went in; weights of both halves moved.
    before, after = make_image_model(kind).state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert {name: tensor.dtype for name, tensor in before.items()} == {name: after[name].dtype for name in before}
    for name in before:
        if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(before[name], after[name]), name
    for block in range(BLOCKS[kind]):
        path = f"vit.layers.{block}." if kind == "vit" else f"resnet.encoder.stages.{block}."
        assert [name for name in before if name.startswith(path) and not torch.equal(before[name], after[name])]


def test_the_merged_folders_processor_makes_the_pixels_that_the_device_made(
    make_image_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    bundle = make_image_bundle("resnet", "norm")
    halves = Halves(bundle, "resnet")
    checkpoint = save_checkpoint(tmp_path / "checkpoints", 1, 1, halves.trainer, halves.trainer.config)
    merge_run(bundle, halves.manifest, halves.shard.weights, checkpoint, tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False)
    halves.images = make_pictures(6, size=(50, 24))[0]
    made = processor([Image.fromarray(image) for image in halves.images], return_tensors="pt").pixel_values
    sent = torch.from_numpy(halves.batch.inputs(slice(0, 6))["pixel_values"])
    torch.testing.assert_close(made, sent, atol=1e-5, rtol=0.0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
def test_a_vits_adapter_loads_in_peft(make_image_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = make_image_bundle("vit", "lora", 1)
    halves = Halves(bundle, "vit", train="lora", optimizer="adamw", learning_rate=0.02)
    for round_ in (1, 2):
        halves.trainer.forward_backward(*halves.sent)
        halves.trainer.step(round_, 1.0)
    checkpoint = save_checkpoint(tmp_path / "checkpoints", 2, 1, halves.trainer, halves.trainer.config)
    merge_run(
        bundle,
        halves.manifest,
        halves.shard.weights,
        checkpoint,
        Targets(out=tmp_path / "out", adapter=tmp_path / "adapter"),
    )
    make_image_model("vit").save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base").eval()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    pixels = torch.from_numpy(halves.batch.inputs(slice(0, 6))["pixel_values"])
    with torch.no_grad():
        torch.testing.assert_close(adapted(pixel_values=pixels).logits, halves.logits(), atol=1e-4, rtol=1e-4)


def test_the_shards_file_holds_the_statistics_that_the_graph_keeps(make_image_bundle: Callable[..., Path]) -> None:
    state, kept = (
        make_image_model("resnet").state_dict(),
        load_file(make_image_bundle("resnet", "norm") / SHARD_WEIGHTS),
    )
    statistics = [name for name in kept if "running" in name]
    assert len(statistics) == 6
    assert all(torch.equal(kept[name], state[name]) for name in statistics)
