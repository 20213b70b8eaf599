"""Whose activations a run keeps, and which runs may use them."""

from __future__ import annotations

from typing import Any

import pytest

from hosl_cloud.rounds.kept import key_of, may_keep
from hosl_cloud.settings import RunConfig, convert_config
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import Manifest


def config(**settings: Any) -> RunConfig:
    given = {"task": {"preset": "cifar10"}, "algorithm": "frozen", "cache": {"bytes": "1G"}}
    return convert_config({**given, **settings}, "run.toml")


def manifest() -> Manifest:
    facts: dict[str, Any] = {"model": "m", "family": "vit", "architecture": "A", "split": 1, "blocks": 2, "width": 4}
    return Manifest(**facts, max_length=64, pad_token_id=0, train="none", tensors=(), files=())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"cache": {"bytes": 0}}, False),
        ({"cache": {}}, False),
        ({"algorithm": "ho-sfl"}, False),
        ({"augmentation": {"flip": True}}, False),
        ({"augmentation": {"crop_padding": 2}}, False),
    ],
)
def test_only_what_never_changes_is_kept(settings: dict[str, Any], expected: bool) -> None:
    assert may_keep(config(**settings)) is expected


@pytest.mark.parametrize(
    ("settings", "is_shared"),
    [
        ({"tail": {"learning_rate": 1e-3}}, True),
        ({"rounds": 7, "name": "other", "seed": 3, "batch_size": 8}, True),
        ({"wire_dtype": "float16"}, False),
        ({"max_length": 32}, False),
        ({"task": {"preset": "mnist"}}, False),
    ],
)
def test_runs_share_what_is_of_the_same_data_and_type(settings: dict[str, Any], is_shared: bool) -> None:
    assert (key_of(config(**settings), manifest()) == key_of(config(), manifest())) is is_shared


@pytest.mark.parametrize(
    ("settings", "is_shared"),
    [({"tail": {"learning_rate": 1e-3}}, True), ({"seed": 3}, False), ({"batch_size": 8}, False)],
)
def test_strict_runs_share_what_strict_runs_with_the_same_batches_keep(
    settings: dict[str, Any], is_shared: bool
) -> None:
    assert (key_of(config(strict=True, **settings), manifest()) == key_of(config(strict=True), manifest())) is is_shared
    assert key_of(config(strict=True), manifest()) != key_of(config(), manifest())


def test_a_budget_that_is_no_size_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"cache\.bytes.*much"):
        _ = config(cache={"bytes": "much"}).cache.budget_bytes
