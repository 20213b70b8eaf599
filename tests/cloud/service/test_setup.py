"""What the service tells of bundles, tasks, and a run's settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from hosl_cloud.service.setup_api import describe_bundles, describe_presets, describe_settings
from hosl_cloud.settings import parse_config
from hosl_protocol.run.manifest import load_manifest


def test_settings_that_somebody_changed_are_told_from_those_that_follow(
    make_bundle: Callable[[str, str], Any],
) -> None:
    bundle = make_bundle("llama", "norm").path
    given = {"task": {"preset": "sst2"}, "algorithm": "hosl", "rounds": 7, "tail": {"learning_rate": 1e-3}}
    config = parse_config(given, load_manifest(bundle))
    settings = {each.name: each for each in describe_settings(msgspec.to_builtins(config), bundle)}
    changed = {name for name, each in settings.items() if each.is_changed}
    assert changed == {"algorithm", "rounds", "tail.learning_rate"}
    assert (settings["rounds"].value, settings["rounds"].default) == (7, 100)
    assert settings["client.optimizer"].default == "adamw", "norms train with it unless somebody says otherwise"


def test_a_task_of_ones_own_counts_as_changed_and_a_bundle_that_is_gone_does_not_matter(tmp_path: Path) -> None:
    stored = {"task": {"name": "own", "kind": "lm", "template": "{text}"}, "rounds": 100, "other": 3}
    settings = {each.name: each for each in describe_settings(stored, tmp_path / "gone")}
    assert {name for name, each in settings.items() if each.is_changed} == {
        *("task.name", "task.kind", "task.template", "other"),
    }
    assert settings["other"].default is None


def test_a_folder_without_a_manifest_is_no_bundle_and_a_damaged_one_says_so(
    make_bundle: Callable[[str, str], Any], tmp_path: Path
) -> None:
    (tmp_path / "whole").symlink_to(make_bundle("llama", "lora").path)
    (tmp_path / "other").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{", encoding="utf-8")
    damaged, whole = describe_bundles(tmp_path)
    assert (damaged.name, whole.name) == ("damaged", "whole")
    assert damaged.problem
    assert (whole.problem, whole.split, whole.blocks, whole.train) == ("", 1, 3, "lora")


def test_presets_say_which_fields_an_example_needs() -> None:
    presets = {each.name: each for each in describe_presets()}
    assert presets["sst2"].fields == ["sentence", "label"]
    assert presets["cifar10"].kind == "image-classification"
