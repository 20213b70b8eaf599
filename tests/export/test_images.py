"""Models of images: both halves compute what the uncut model computes, and the bundle says what an image becomes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
import transformers as hf
from torch import Tensor

from hosl_export import ExportSettings, export_bundle, exporter
from hosl_export.__main__ import main
from hosl_export.bundle import parity as check
from hosl_export.bundle.reading import load_client, load_tail
from hosl_export.model.halves import client_half, tail_half
from hosl_export.tensor_files import read_tensors, write_tensors
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.run.manifest import SHARD_GRAPH, SHARD_WEIGHTS, TAIL_WEIGHTS, Manifest, load_manifest
from pictures import BLOCKS, SIZES, make_image_model, save_image_model

SPLITS = {"vit": 3, "vit-wide": 1, "resnet": 1, "resnet-bottleneck": 3, "resnet-grey": 2}
"""Where each model's bundle is cut: odd and even, early and late."""

TRAINS = {"vit": "lora", "vit-wide": "norm", "resnet": "norm", "resnet-bottleneck": "blocks", "resnet-grey": "all"}
RESNETS = ("resnet", "resnet-bottleneck", "resnet-grey")


def make_images(kind: str, rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1 if kind == "resnet-grey" else 3, *SIZES[kind], generator=generator)


class ExportedImageModel:
    """A tiny model and its bundle."""

    def __init__(self, kind: str, folder: Path, train: Any) -> None:
        self.kind, self.source, self.path = kind, save_image_model(kind, folder / "model"), folder / "bundle"
        settings = ExportSettings(model=str(self.source), split=SPLITS[kind], out=self.path, train=train)
        self.summary = export_bundle(settings)
        self.manifest: Manifest = load_manifest(self.path)
        self.weights = read_tensors(self.path / SHARD_WEIGHTS)

    def run_shard(self, images: Tensor, **changed: Tensor) -> Tensor:
        """Activations [B, T, D] of the bundle's graph."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(self.path / SHARD_GRAPH), options)
        given = {**self.weights, **changed, "pixel_values": images}
        feed = {entry.name: given[entry.name].numpy() for entry in session.get_inputs()}
        return torch.from_numpy(session.run(["activations"], feed)[0])


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ExportedImageModel]:
    made: dict[tuple[str, str], ExportedImageModel] = {}

    def get(kind: str, train: str | None = None) -> ExportedImageModel:
        key = kind, train or TRAINS[kind]
        if key not in made:
            made[key] = ExportedImageModel(kind, tmp_path_factory.mktemp("-".join(key)), key[1])
        return made[key]

    return get


def assert_same(got: Tensor, expected: Tensor, share: float) -> None:
    assert float((got - expected).abs().max() / expected.abs().max()) < share


@torch.no_grad()
@pytest.mark.parametrize(("kind", "split"), [(kind, split) for kind in SIZES for split in range(1, BLOCKS[kind])])
def test_halves_of_a_model_compute_what_the_model_computes(kind: str, split: int) -> None:
    model, images = make_image_model(kind), make_images(kind, 3)
    client = client_half(model, split)
    features = client.features(images)
    tail = tail_half(model, split, None if features.ndim == 3 else tuple(features.shape[2:]))
    assert_same(tail(client(pixel_values=images)), model(images).logits, 1e-6)
    # A block too few or too many would show.
    assert model(images).logits.std(dim=0).min() > 1e-3


@pytest.mark.parametrize("kind", RESNETS)
def test_convolutions_on_a_cpu_get_maps_whose_channels_lie_apart(kind: str) -> None:
    """With those of a position together, torch crashes in the backward of some shapes on some processors."""
    model, seen = make_image_model(kind), []
    client = client_half(model, 1)
    h_BTD = client(pixel_values=make_images(kind, 2)).detach().contiguous().requires_grad_()
    tail = tail_half(model, 1, tuple(client.features(make_images(kind, 1)).shape[2:]))
    for module in tail.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    tail(h_BTD).sum().backward()
    assert len(seen) > 2
    assert all(seen)


def test_the_gradient_of_one_image_is_that_of_it_among_others() -> None:
    """Torch computes another, from the gradient of a map whose channels lie together."""
    client = client_half(make_image_model("resnet-grey"), 2)
    images, parameters = make_images("resnet-grey", 2), list(client.parameters())
    images[1] = images[0]
    one, two = (
        torch.autograd.grad(client(pixel_values=given)[0, 1:].sum(), parameters) for given in (images[:1], images)
    )
    for got, expected in zip(one, two, strict=True):
        assert_same(got, expected, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", SIZES)
def test_bundle_computes_what_the_model_computes_for_any_batch(exported, kind: str) -> None:
    case = exported(kind)
    tail, model = load_tail(case.path, case.manifest), hf.AutoModelForImageClassification.from_pretrained(case.source)
    for rows in (1, 2, 5):
        images = make_images(kind, rows)
        h_BTD = case.run_shard(images)
        assert h_BTD.shape == (rows, case.manifest.max_length, case.manifest.width)
        assert_same(tail(h_BTD), model.eval()(images).logits, 2e-5)
        assert_same(load_client(case.path, case.manifest, case.weights)(pixel_values=images), h_BTD, 2e-5)
    assert case.summary.parity_error < check.TOLERANCE


@pytest.mark.parametrize("kind", SIZES)
def test_manifest_says_what_an_image_becomes(exported, kind: str) -> None:
    manifest = exported(kind).manifest
    image = manifest.image
    assert image is not None
    assert (image.height, image.width) == SIZES[kind]
    assert (image.mean, image.std) == ((0.4, 0.5, 0.6)[: image.channels], (0.2, 0.25, 0.3)[: image.channels])
    assert (image.rescale, image.resample) == (1 / 255, "bicubic")
    assert manifest.inputs == ("pixel_values",)
    assert (manifest.blocks, manifest.split) == (BLOCKS[kind], SPLITS[kind])
    expected = {
        "vit": (17, 16, None),
        "vit-wide": (9, 16, None),
        "resnet": (64, 8, (8, 8)),
        "resnet-bottleneck": (6, 32, (3, 2)),
        "resnet-grey": (4, 16, (2, 2)),
    }
    assert (manifest.max_length, manifest.width, image.grid) == expected[kind]


@pytest.mark.parametrize(
    ("kind", "train"),
    [
        *((kind, train) for kind in ("vit", "resnet") for train in ("none", "norm", "blocks", "all")),
        ("resnet-bottleneck", "blocks"),
        ("resnet-grey", "all"),
    ],
)
def test_what_trains_is_an_input_and_what_does_not_is_a_constant_of_a_resnet(exported, kind: str, train: str) -> None:
    case = exported(kind, train)
    graph = onnx.load(case.path / SHARD_GRAPH).graph
    inputs = {entry.name for entry in graph.input} - {"pixel_values"}
    entries = case.manifest.tensors
    assert inputs == {entry.name for entry in entries if not entry.constant}
    assert {entry.name for entry in entries} == set(case.weights)
    assert not [entry for entry in entries if entry.lookup]
    trainable = {entry.name for entry in entries if entry.trainable}
    parameters = dict(client_half(make_image_model(kind), SPLITS[kind]).model.named_parameters())
    block = "vit.layers." if kind.startswith("vit") else "resnet.encoder.stages."
    expected = {
        "none": [],
        "norm": [name for name, tensor in parameters.items() if tensor.ndim == 1],
        "blocks": [name for name in parameters if name.startswith(block)],
        "all": list(parameters),
    }
    assert trainable == set(expected[train])
    if kind in RESNETS:
        assert inputs == trainable
        # A norm that does not train is folded into its convolution, and no bias is computed while it runs.
        norms = {name.rpartition(".")[0] for name in trainable if ".normalization." in name}
        assert sum(node.op_type == "BatchNormalization" for node in graph.node) == len(norms)
        assert not {node.op_type for node in graph.node} & {"Expand", "CastLike"}
        convolutions = [name for name in parameters if name.endswith("convolution.weight")]
        statistics = [name for name in case.weights if name.rpartition(".")[2] in ("running_mean", "running_var")]
        assert len(statistics) == 2 * len(convolutions)
    else:
        assert inputs == set(parameters)


@pytest.mark.parametrize(
    ("kind", "train"),
    [
        *(("vit", train) for train in ("lora", "norm", "blocks", "all")),
        *(("resnet", train) for train in ("norm", "blocks", "all")),
        *(("vit-wide", "norm"), ("resnet-bottleneck", "blocks"), ("resnet-grey", "all")),
    ],
)
def test_gradients_are_those_of_autograd(exported, kind: str, train: str) -> None:
    """The export compares them, for one image and for three."""
    case = exported(kind, train)
    assert 0.0 < case.summary.gradient_error < 1e-5
    entries = case.manifest.gradients
    named = [name for entry in entries for name in entry.gradients.values()]
    assert set(named) == {entry.name for entry in case.manifest.trainable}
    starts_with_embeddings = train in ("norm", "all")
    assert [entry.block for entry in entries] == list(range(-1 if starts_with_embeddings else 0, SPLITS[kind]))
    for entry in entries:
        graph = onnx.load(case.path / entry.graph).graph
        assert entry.parameters.keys() <= {value.name for value in graph.input}
        assert not [value.name for value in graph.initializer if value.name in case.weights]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "train"), [("vit", "lora"), ("resnet", "norm"), ("resnet-bottleneck", "blocks")])
def test_a_change_of_any_trainable_tensor_reaches_the_activations(exported, kind: str, train: str) -> None:
    case = exported(kind, train)
    images = make_images(kind, 1)
    base = case.run_shard(images)
    for entry in case.manifest.trainable:
        if entry.name.endswith("lora_A.weight"):
            continue  # B is zero
        changed = case.weights[entry.name] + 0.1 * torch.randn(entry.shape, generator=torch.Generator().manual_seed(1))
        assert (case.run_shard(images, **{entry.name: changed}) - base).abs().max() > 1e-5, entry.name


@torch.no_grad()
def test_a_head_of_as_many_labels_is_kept_and_another_is_drawn_from_the_seed(exported) -> None:
    for kind in ("vit", "resnet"):
        case = exported(kind)
        state = make_image_model(kind).state_dict()
        name = "classifier.weight" if kind == "vit" else "classifier.1.weight"
        kept = load_tail(case.path, case.manifest, num_labels=3, seed=1)
        assert torch.equal(kept.model.state_dict()[name], state[name])
        drawn = [load_tail(case.path, case.manifest, num_labels=5, seed=seed) for seed in (1, 1, 2)]
        weights = [tail.model.state_dict()[name] for tail in drawn]
        assert weights[0].shape == (5, state[name].shape[1])
        assert drawn[0].class_count == 5
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


def test_only_the_tails_part_is_in_the_tail(exported) -> None:
    names = set(read_tensors(exported("resnet").path / TAIL_WEIGHTS))
    assert not [name for name in names if "embedder" in name]
    assert {name.split(".")[3] for name in names if ".stages." in name} == {"0", "1"}
    shard = exported("vit").weights
    assert not [name for name in shard if ("layernorm." in name and "vit.layers" not in name) or "classifier" in name]


def run(folder: Path, model: Path, *options: str) -> int:
    return main(["--model", str(model), "--split", "1", "--out", str(folder / "bundle"), *options])


def said(capsys: Any) -> str:
    """The one error line."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return str(line)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models without a preprocessor."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("vit", "resnet"):
        save_image_model(kind, folder / kind, preprocessor=False)
    return folder


def test_lora_of_a_resnet_is_refused_with_what_to_use_instead(models: Path, tmp_path: Path, capsys: Any) -> None:
    assert run(tmp_path, models / "resnet", "--train", "lora") == ExitCode.SETTINGS
    assert said(capsys).endswith(
        "train is 'lora': resnet has no modules for adapters: use --train norm, blocks, all or none"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "options", "remedy"),
    [
        ("vit", ["--max-length", "9"], "the size of its images decides"),
        ("vit", ["--image-size", "32"], "the model embeds the positions of 16 x 16 pixels"),
        ("resnet", ["--image-size", "4"], "use 8 to 4096 pixels"),
        ("resnet", ["--split", "3"], "the model has 3 blocks, use 1 to 2"),
    ],
)
def test_settings_that_do_not_fit_images_are_refused(
    models: Path, tmp_path: Path, capsys: Any, kind: str, options: list[str], remedy: str
) -> None:
    assert run(tmp_path, models / kind, "--train", "norm", *options) == ExitCode.SETTINGS
    assert remedy in said(capsys)
    assert not list(tmp_path.iterdir())


def test_a_model_that_says_nothing_of_its_images_gets_defaults_and_a_warning(
    models: Path, tmp_path: Path, caplog: Any
) -> None:
    assert run(tmp_path, models / "vit", "--train", "norm") == 0
    image = load_manifest(tmp_path / "bundle").image
    assert image is not None
    assert (image.height, image.width, image.mean, image.std) == (16, 16, (0.5,) * 3, (0.5,) * 3)
    assert (image.rescale, image.resample) == (1 / 255, "bilinear")
    assert "vit says nothing of its images" in caplog.text


def test_the_size_of_a_resnets_images_may_be_chosen(tmp_path: Path, capsys: Any) -> None:
    model = save_image_model("resnet", tmp_path / "model")
    assert run(tmp_path, model, "--train", "norm", "--image-size", "48", "--json") == 0
    assert json.loads(capsys.readouterr().out)["image_size"] == [48, 48]
    manifest = load_manifest(tmp_path / "bundle")
    assert manifest.image is not None
    assert (manifest.image.height, manifest.image.grid, manifest.image.std) == (48, (12, 12), (0.2, 0.25, 0.3))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"size": 48}, (48, 48)),
        ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 24}}, (32, 24)),
        ({"size": {"shortest_edge": 40}}, (40, 40)),
        ({}, (224, 224)),
    ],
)
def test_preprocessors_name_their_size_in_many_ways(facts: dict[str, Any], expected: tuple[int, int]) -> None:
    from hosl_export.model.families import find_family
    from hosl_export.sources.images import read_image_entry

    config = make_image_model("resnet").config
    image = read_image_entry(
        {"do_normalize": False, "do_rescale": False, **facts}, config, find_family("resnet"), "m", None
    )
    assert (image.height, image.width) == expected
    assert (image.mean, image.std, image.rescale) == ((0.0,) * 3, (1.0,) * 3, 1.0)


def test_a_checkpoint_without_a_head_starts_from_a_random_one(tmp_path: Path, caplog: Any) -> None:
    model = make_image_model("vit")
    model.vit.config.save_pretrained(tmp_path / "model")
    model.vit.save_pretrained(tmp_path / "model")
    assert run(tmp_path, tmp_path / "model", "--train", "norm") == 0
    assert "model has no classifier: it starts from random weights" in caplog.text


def _corrupt_statistics(folder: Path, *arguments: Any) -> float:
    path = folder / TAIL_WEIGHTS
    state = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    state["resnet.encoder.stages.0.layers.0.layer.0.normalization.running_mean"] += 0.1
    write_tensors(path, state)
    return check.check_bundle(folder, *arguments)


def test_a_wrong_statistic_of_a_batch_norm_leaves_no_bundle(
    models: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "check_bundle", _corrupt_statistics)
    assert run(tmp_path, models / "resnet", "--train", "norm", "--image-size", "32") == ExitCode.BUNDLE
    assert "logits at 1 x 32 x 32 pixels differ by" in said(capsys)
    assert not list(tmp_path.iterdir())
