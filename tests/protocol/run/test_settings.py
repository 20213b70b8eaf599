"""Run settings: every refusal names field, value and remedy; schedules."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosl_protocol.exceptions import MalformedSettings, SettingsError
from hosl_protocol.run.manifest import ImageEntry, Manifest
from hosl_protocol.run.schedule import schedule_factor, scheduled_rate
from hosl_protocol.run.settings import (
    TRAITS,
    Algorithm,
    Augmentation,
    ClientOptimizer,
    RunSettings,
    check_run,
    check_run_settings,
    convert,
    read_toml,
)
from hosl_protocol.run.tasks import Task, load_preset


def make_settings(**changes):
    return convert({"task": load_preset("sst2"), **changes}, RunSettings, "run")


def test_every_algorithm_has_its_traits():
    assert set(TRAITS) == set(get_args(Algorithm))


def test_defaults_check_out():
    check_run_settings(make_settings())
    assert make_settings().max_tokens == 16 * 128


@pytest.mark.parametrize(
    ("changes", "field", "value", "remedy"),
    [
        ({"seed": -1}, "seed", -1, "whole number from 0 to 9007199254740991"),
        ({"seed": 2**53}, "seed", 2**53, "whole number from 0"),
        ({"rounds": 0}, "rounds", 0, "whole number from 1"),
        ({"directions": 0}, "directions", 0, "from 1 to 65535"),
        ({"directions": 65536}, "directions", 65536, "from 1 to 65535"),
        ({"batch_size": 0}, "batch_size", 0, "from 1 to 65536"),
        ({"max_length": 1}, "max_length", 1, "from 2 to"),
        ({"report_every": 0}, "report_every", 0, "from 1 to"),
        ({"probe_step": 0.0}, "probe_step", 0.0, "above 0"),
        ({"probe_step": math.inf}, "probe_step", math.inf, "above 0"),
        ({"probe_step": 1e308}, "probe_step", 1e308, "above 0, and at most 1e+09"),
        ({"client": {"learning_rate": -1.0}}, "client.learning_rate", -1.0, "above 0, and at most 1e+09"),
        ({"client": {"learning_rate": 1e39}}, "client.learning_rate", 1e39, "above 0, and at most 1e+09"),
        ({"client": {"epsilon": 0.0}}, "client.epsilon", 0.0, "from 1e-12 to 1"),
        ({"client": {"epsilon": 1e-30}}, "client.epsilon", 1e-30, "from 1e-12 to 1"),
        ({"client": {"epsilon": 1e39}}, "client.epsilon", 1e39, "from 1e-12 to 1"),
        ({"client": {"warmup_rounds": 101}}, "client.warmup_rounds", 101, "from 0 to 100"),
        ({"client": {"beta1": 1.0}}, "client.beta1", 1.0, "from 0 to 0.999"),
        ({"client": {"beta1": 0.9995}}, "client.beta1", 0.9995, "from 0 to 0.999"),
        ({"client": {"beta2": -0.1}}, "client.beta2", -0.1, "from 0.8109 up to, not including, 1"),
        ({"client": {"beta2": 1.0}}, "client.beta2", 1.0, "from 0.8109 up to, not including, 1"),
        ({"client": {"beta1": 0.0, "beta2": 1e-45}}, "client.beta2", 1e-45, "from 0.001 up to"),
        ({"client": {"beta1": 0.95, "beta2": 0.9}}, "client.beta2", 0.9, "from 0.9035 up to"),
        ({"client": {"beta1": 0.9, "beta2": 0.8105}}, "client.beta2", 0.8105, "beta1² needs as much"),
        ({"client": {"weight_decay": 2.0}}, "client.weight_decay", 2.0, "from 0 up to, not including, 1"),
        ({"algorithm": "frozen", "anchor": "midpoint"}, "anchor", "midpoint", "makes no probes"),
        ({"algorithm": "hosl", "wire_dtype": "float16"}, "wire_dtype", "float16", "needs float32"),
        ({"algorithm": "hosl", "wire_dtype": "int8"}, "wire_dtype", "int8", "needs float32"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_its_remedy(changes, field, value, remedy):
    with pytest.raises(SettingsError) as caught:
        check_run_settings(make_settings(**changes))
    assert (caught.value.field, caught.value.value) == (field, value)
    assert str(caught.value).startswith(f"{field} is {value!r}: ")
    assert remedy in caught.value.remedy


def test_a_number_that_is_not_one_is_refused():
    with pytest.raises(SettingsError, match="probe_step is nan"):
        check_run_settings(make_settings(probe_step=math.nan))


def test_inputs_longer_than_the_bundle_was_checked_for_are_refused():
    check_run_settings(make_settings(max_length=64), bundle_max_length=64)
    with pytest.raises(SettingsError, match="max_length is 65: use a whole number from 2 to 64"):
        check_run_settings(make_settings(max_length=65), bundle_max_length=64)


@pytest.mark.parametrize(
    ("changes", "path", "sentence"),
    [
        ({"rounds": "10"}, "rounds", "use a whole number instead of '10'"),
        ({"rounds": True}, "rounds", "use a whole number instead of True"),
        ({"algorithm": "fedavg"}, "algorithm", "'fedavg' is none of first-order, frozen, ho-sfl, hosl"),
        ({"client": {"optimizer": "lion"}}, "client.optimizer", "'lion' is none of adamw, sgd"),
        ({"max_lenght": 1}, "", "no setting has the name max_lenght; did you mean max_length?"),
        ({"learning_rate": 1.0}, "", "no setting has the name learning_rate; one of "),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_by_its_path(changes, path, sentence):
    with pytest.raises(MalformedSettings) as caught:
        make_settings(**changes)
    assert caught.value.path == path
    assert str(caught.value).startswith(f"run: {path}: " if path else "run: ")
    assert sentence in caught.value.problem


@pytest.mark.parametrize("wire_dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_ho_sfl_may_send_any_type(wire_dtype):
    check_run_settings(make_settings(wire_dtype=wire_dtype))


def test_constant_schedule_stays_after_its_warm_up():
    assert [schedule_factor("constant", 4, n, 10) for n in (1, 2, 3, 4, 5, 10)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@given(rounds=st.integers(1, 200), data=st.data())
def test_schedules_rise_to_one_and_fall_towards_zero(schedule, rounds, data):
    warmup = data.draw(st.integers(0, rounds))
    factors = [schedule_factor(schedule, warmup, n, rounds) for n in range(1, rounds + 1)]
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert all(0.0 < factor <= 1.0 for factor in factors)
    assert max(factors) == 1.0
    assert schedule_factor(schedule, warmup, rounds + 1, rounds) == 0.0


def test_linear_and_cosine_take_half_the_rate_half_way():
    assert schedule_factor("linear", 0, 51, 100) == 0.5
    assert schedule_factor("cosine", 0, 51, 100) == pytest.approx(0.5)
    assert schedule_factor("cosine", 0, 26, 100) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))


def test_rate_is_the_base_rate_times_the_schedule():
    optimizer = ClientOptimizer(learning_rate=0.2, schedule="linear", warmup_rounds=2)
    assert scheduled_rate(optimizer, 1, 10) == 0.1
    assert scheduled_rate(optimizer, 3, 10) == 0.2


def make_image_settings(**changes):
    task = Task(name="things", kind="image-classification", labels=("a", "b"))
    return RunSettings(**{"task": task, "max_length": 4, **changes})


def make_manifest(image=None, train="norm", **changes):
    return Manifest(
        model="m", family="f", architecture="a", split=1, blocks=2, width=4, max_length=4, pad_token_id=0, train=train,
        tensors=(), files=(), image=image, **changes,
    )  # fmt: skip


IMAGE = ImageEntry(channels=1, height=8, width=8, mean=(0.5,), std=(0.5,))


def test_texts_and_images_go_with_their_own_bundles():
    check_run(make_image_settings(), make_manifest(IMAGE))
    check_run(make_settings(max_length=4), make_manifest())
    with pytest.raises(SettingsError, match=r"task.kind .* the bundle's model takes text"):
        check_run(make_image_settings(), make_manifest())
    with pytest.raises(SettingsError, match=r"task.kind .* the bundle's model takes images"):
        check_run(make_settings(max_length=4), make_manifest(IMAGE))


def test_a_soft_prompt_leaves_texts_room():
    check_run(make_settings(max_length=4), make_manifest(prompt_tokens=2))
    with pytest.raises(SettingsError, match="max_length is 3: the bundle's soft prompt takes 2 of them: use more"):
        check_run(make_settings(max_length=3), make_manifest(prompt_tokens=2))


@pytest.mark.parametrize("algorithm", ["ho-sfl", "hosl"])
def test_a_shard_of_which_nothing_trains_is_for_frozen_runs_alone(algorithm):
    with pytest.raises(SettingsError, match=f"algorithm is '{algorithm}': the bundle trains nothing on the device"):
        check_run(make_settings(algorithm=algorithm, max_length=4), make_manifest(train="none"))
    check_run(make_settings(algorithm="frozen", max_length=4), make_manifest(train="none"))


def test_an_image_has_as_many_positions_as_the_bundle_says():
    with pytest.raises(SettingsError, match="max_length is 3: an image has 4 positions"):
        check_run(make_image_settings(max_length=3), make_manifest(IMAGE))


def test_augmentation_is_for_images_alone():
    varied = Augmentation(crop_padding=4, flip=True)
    check_run_settings(make_image_settings(augmentation=varied))
    assert not Augmentation().is_on
    with pytest.raises(SettingsError, match="augmentation is 'on': only images are cropped and flipped"):
        check_run_settings(make_settings(augmentation=Augmentation(flip=True)))
    with pytest.raises(SettingsError, match=r"augmentation.crop_padding is 256: use a whole number from 0 to 255"):
        check_run_settings(make_image_settings(augmentation=Augmentation(crop_padding=256)))


def test_a_settings_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("\ufeffrounds = 3\r\n", encoding="utf-8")
    assert read_toml(path, "--config") == {"rounds": 3}


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"rounds = = 3", "is not TOML: "), ("rounds = 3".encode("utf-16"), "is not UTF-8: save it with that encoding")],
)
def test_a_settings_file_that_is_none_is_named_by_its_path(tmp_path, content, problem):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        read_toml(path, "--config")
    assert str(caught.value).startswith(f"{path}: {problem}")


def test_a_setting_without_a_value_is_not_given():
    assert str(SettingsError("--bundle", None, "give it")) == "--bundle is not given: give it"
