"""run.toml: presets and overrides, and faults named by field, value and remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hosl_cloud.settings import RunConfig, load_config, parse_config, read_config
from hosl_export.summary import default_directions
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import BlockGradient, Manifest, TensorEntry
from hosl_protocol.run.tasks import label_of, render


def manifest(train: Any = "lora", trains: int = 1000, width: int = 4) -> Manifest:
    return Manifest(
        model="m",
        family="llama",
        architecture="LlamaForCausalLM",
        split=1,
        blocks=2,
        width=width,
        max_length=64,
        pad_token_id=0,
        train=train,
        tensors=(TensorEntry(name="w", shape=(trains,), trainable=True, exponent=-20),),
        files=(),
        gradients=(BlockGradient(block=0, graph="shard/gradient-0.onnx", parameters={}, gradients={"g": "w"}),),
    )


def parse(train: Any = "lora", **data: Any) -> RunConfig:
    return parse_config({"task": {"preset": "sst2"}, "max_length": 64, **data}, manifest(train))


def test_a_preset_is_a_whole_task() -> None:
    task = parse().task
    assert (task.name, task.kind, task.labels) == ("sst2", "prompt-classification", ("0", "1"))
    assert len(task.verbalizers) == 2


def test_a_run_may_override_what_a_preset_says() -> None:
    task = parse(task={"preset": "sst2", "template": "{text} was", "verbalizers": [" bad", " good"]}).task
    assert (task.name, task.template, task.verbalizers) == ("sst2", "{text} was", (" bad", " good"))
    assert task.labels == ("0", "1")


def test_a_task_may_be_given_in_full() -> None:
    task = parse(task={"name": "own", "kind": "lm", "template": "{body}"}).task
    assert (task.name, task.fields) == ("own", ("body",))


@pytest.mark.parametrize(
    ("train", "given", "expected"),
    [
        ("norm", {}, (8, "adamw", 3e-3)),
        ("norm", {"client": {"learning_rate": 1e-2}}, (8, "adamw", 1e-2)),
        ("norm", {"client": {"optimizer": "sgd"}, "directions": 3}, (3, "sgd", 1e-3)),
        ("norm", {"algorithm": "hosl"}, (2, "adamw", 3e-3)),
        ("lora", {}, (2, "sgd", 1e-3)),
        ("norm", {"algorithm": "first-order"}, (2, "adamw", 1e-2)),
        ("lora", {"algorithm": "first-order"}, (2, "adamw", 3e-3)),
        ("lora-b", {"algorithm": "first-order", "client": {"schedule": "linear"}}, (2, "adamw", 3e-3)),
        ("blocks", {"algorithm": "first-order"}, (2, "adamw", 1e-3)),
        ("lora", {"algorithm": "first-order", "client": {"optimizer": "sgd"}}, (2, "sgd", 1e-3)),
    ],
)
def test_what_is_left_open_follows_from_what_the_device_trains(
    train: str, given: dict[str, Any], expected: tuple[int, str, float]
) -> None:
    config = parse(train, **given)
    assert (config.directions, config.client.optimizer, config.client.learning_rate) == expected


@pytest.mark.parametrize("train", ["norm", "lora", "blocks", "prompt"])
def test_the_exporter_counts_the_directions_that_a_run_takes_unasked(train: Any) -> None:
    assert default_directions(train) == parse(train).directions


@pytest.mark.parametrize(
    ("trains", "bits"),
    [(600, 8), (1200, 4), (2400, 2), (4096, 1), (10**6, 1)],
)
def test_a_gradient_takes_as_many_bits_as_leave_it_small_beside_the_activations(trains: int, bits: int) -> None:
    """A fiftieth of 16 x 64 activations of width 8 is 655 bytes."""
    settings = {"task": {"preset": "sst2"}, "algorithm": "first-order", "max_length": 64}
    for given, expected in ({}, bits), ({"gradient_bits": 32}, 32):
        config = parse_config({**settings, **given}, manifest(trains=trains, width=8))
        assert (config.gradient_bits, config.wire_settings().gradient_bits) == (expected, expected)


def test_a_file_is_read_with_its_tables(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'name = "first"\nalgorithm = "hosl"\nmax_length = 32\n[task]\npreset = "rte"\n[client]\noptimizer = "adamw"\n'
        '[tail]\ntrain = "lora"\n[evaluation]\nevery = 7\n[devices]\nweighting = "examples"\n',
        encoding="utf-8",
    )
    config = load_config(path, manifest())
    assert (config.name, config.algorithm, config.task.name, config.client.optimizer) == (
        "first",
        "hosl",
        "rte",
        "adamw",
    )
    assert (config.tail.train, config.evaluation.every, config.devices.weighting) == ("lora", 7, "examples")


def test_devices_are_told_the_runs_settings_and_none_of_the_tails() -> None:
    config = parse(seed=9, rounds=5, directions=3, probe_step=0.01, batch_size=2, report_every=4, wire_dtype="bfloat16")
    wire = config.wire_settings()
    for name in wire.__struct_fields__:
        assert getattr(wire, name) == getattr(config, name), name
    assert not hasattr(wire, "tail")


@pytest.mark.parametrize(
    ("data", "field", "value"),
    [
        ({"name": "a b"}, "name", "a b"),
        ({"name": "n" * 41}, "name", "n" * 41),
        ({"seed": -1}, "seed", -1),
        ({"rounds": 0}, "rounds", 0),
        ({"directions": 0}, "directions", 0),
        ({"probe_step": 0.0}, "probe_step", 0.0),
        ({"batch_size": 0}, "batch_size", 0),
        ({"max_length": 65}, "max_length", 65),
        ({"report_every": 0}, "report_every", 0),
        ({"client": {"learning_rate": -0.1}}, "client.learning_rate", -0.1),
        ({"client": {"beta1": 1.0}}, "client.beta1", 1.0),
        ({"client": {"warmup_rounds": 101}}, "client.warmup_rounds", 101),
        ({"tail": {"learning_rate": 0.0}}, "tail.learning_rate", 0.0),
        ({"tail": {"learning_rate": float("inf")}}, "tail.learning_rate", float("inf")),
        ({"tail": {"warmup_rounds": -1}}, "tail.warmup_rounds", -1),
        ({"tail": {"clip_norm": -1.0}}, "tail.clip_norm", -1.0),
        ({"tail": {"weight_decay": -0.5}}, "tail.weight_decay", -0.5),
        ({"tail": {"weight_decay": float("inf")}}, "tail.weight_decay", float("inf")),
        ({"tail": {"momentum": 1.0}}, "tail.momentum", 1.0),
        ({"tail": {"momentum": -0.1}}, "tail.momentum", -0.1),
        ({"tail": {"threads": -1}}, "tail.threads", -1),
        ({"evaluation": {"every": -1}}, "evaluation.every", -1),
        ({"evaluation": {"patience": -1}}, "evaluation.patience", -1),
        ({"evaluation": {"deadline_s": 0.0}}, "evaluation.deadline_s", 0.0),
        ({"devices": {"start_with": 0}}, "devices.start_with", 0),
        ({"devices": {"per_round": -1}}, "devices.per_round", -1),
        ({"devices": {"round_deadline_s": 0.0}}, "devices.round_deadline_s", 0.0),
        ({"devices": {"round_deadline_s": float("inf")}}, "devices.round_deadline_s", float("inf")),
        ({"devices": {"rejoin_deadline_s": -1.0}}, "devices.rejoin_deadline_s", -1.0),
        ({"algorithm": "hosl", "wire_dtype": "bfloat16"}, "wire_dtype", "bfloat16"),
        ({"devices": {"quorum": 0}}, "devices.quorum", 0),
        ({"devices": {"quorum": 4, "per_round": 3}}, "devices.quorum", 4),
        ({"devices": {"trim": 0.5}}, "devices.trim", 0.5),
        ({"devices": {"clip": -1.0}}, "devices.clip", -1.0),
        ({"devices": {"strikes": -1}}, "devices.strikes", -1),
        ({"task": {"preset": "absent"}}, "task.preset", "absent"),
        ({"task": {"preset": "sst2", "labels": ["0", "0"]}}, "task.labels", ["0", "0"]),
        ({"task": {"preset": "sst2", "verbalizers": ["x"]}}, "task.verbalizers", ["x"]),
        ({"task": {"preset": "sst2", "template": "none"}}, "task.template", "none"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_its_remedy(data: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(**data)
    error = caught.value
    assert (error.field, error.value) == (field, value)
    assert str(error) == f"{field} is {value!r}: {error.remedy}"
    assert error.remedy


@pytest.mark.parametrize("field", ["tail.learning_rate", "tail.clip_norm", "tail.weight_decay", "tail.momentum"])
def test_a_number_that_is_none_is_refused(field: str) -> None:
    table, name = field.split(".")
    with pytest.raises(SettingsError, match=f"{field} is nan"):
        parse(**{table: {name: float("nan")}})


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ({"colour": "red"}, "colour"),
        ({"tail": {"colour": "red"}}, "tail"),
        ({"rounds": "many"}, "rounds"),
        ({"tail": {"optimizer": "lion"}}, "tail.optimizer"),
        ({"task": {"preset": "sst2", "kind": "regression"}}, "task.kind"),
        ({"task": 3}, "task"),
    ],
)
def test_a_field_that_does_not_fit_is_named_by_its_path(data: dict[str, Any], place: str) -> None:
    with pytest.raises(SettingsError, match=rf"^run\.toml: .*{place}"):
        parse(**data)


@pytest.mark.parametrize("algorithm", ["ho-sfl", "hosl"])
def test_a_bundle_that_trains_nothing_on_the_device_runs_frozen_only(algorithm: str) -> None:
    with pytest.raises(SettingsError, match=r"algorithm is .*: the bundle trains nothing on the device: use 'frozen'"):
        parse("none", algorithm=algorithm)
    assert not parse("none", algorithm="frozen").wire_settings().traits.trains_client
    assert (parse("none").algorithm, parse("lora").algorithm) == ("frozen", "ho-sfl")


def test_texts_are_cut_to_what_the_bundle_takes() -> None:
    task = {"task": {"preset": "sst2"}}
    assert parse_config(task, manifest()).max_length == 64
    assert parse_config(task, msgspec.structs.replace(manifest(), max_length=512)).max_length == 128


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.toml.*No such file"):
        load_config(tmp_path / "absent.toml", manifest())
    path = tmp_path / "run.toml"
    path.write_text("rounds = = 3\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="is not TOML"):
        load_config(path, manifest())


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("labels=['a', 'b']", "no setting has the name labels; did you mean task.labels?"),
        ("tail.lr=15", "no setting has the name lr; one of train, "),
        ("tail.learning_rat=1", "no setting has the name learning_rat; did you mean learning_rate?"),
        ("rounds=many", "use a whole number instead of 'many'"),
        ("tail.optimizer=lion", "'lion' is none of adamw, sgd"),
        ("task=3", "use a table instead of 3"),
        ("task={colour='red'}", "no setting has the name colour; "),
    ],
)
def test_a_fault_of_an_override_is_the_overrides(tmp_path: Path, override: str, problem: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[task]\npreset = "sst2"\n', encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        read_config(path, [override])
    assert str(caught.value).startswith(f"--set {override}: {problem}")


def test_overrides_of_any_depth_are_taken() -> None:
    overrides = ["task.preset=sst2", "tail={learning_rate=0.5}", "tail.momentum=0.1", "name=7up", "task.label_field=x"]
    config = load_config(None, manifest(), ["max_length=64", *overrides])
    assert (config.tail.learning_rate, config.tail.momentum) == (0.5, 0.1)
    assert (config.name, config.task.label_field) == ("7up", "x")


def test_labels_of_ones_own_take_the_place_of_a_presets_other_names() -> None:
    task = parse(task={"preset": "boolq", "labels": ["false", "true"]}).task
    assert (task.labels, task.label_names) == (("false", "true"), ())


PAGE = Path(__file__).parents[2] / "cloud" / "run-toml.md"


def test_the_pages_task_of_ones_own_is_a_whole_one() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## A task of your own")[2]
    settings, example = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("toml", "json"))
    assert settings is not None
    assert example is not None
    config = parse_config(msgspec.toml.decode(settings[1]), manifest())
    assert render(config.task, json.loads(example[1])) == "The parcel has not come.\nThis is about"
    assert label_of(config.task, json.loads(example[1])) == 1
    assert f"--fields {','.join(config.task.fields)}" in text


def test_a_task_of_ones_own_needs_no_name() -> None:
    assert parse(task={"kind": "lm", "template": "{body}"}).task.name == "own"


def test_every_setting_has_its_place_in_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("\n## All settings\n")[2].partition("\n## ")[0]
    parts = re.split(r"^### `\[(\w+)\]`$", text, flags=re.MULTILINE)
    tables = {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    fields = msgspec.structs.fields(RunConfig)
    kinds = {"": RunConfig, **{field.name: field.type for field in fields if field.name in tables}}
    for name, kind in kinds.items():
        cells = re.findall(r"^\| (`[^|]*) \|", tables[name], re.MULTILINE)
        shown = [setting for cell in cells for setting in re.findall("`([^`]+)`", cell)]
        assert sorted(shown) == sorted(set(kind.__struct_fields__) - set(tables)), name
