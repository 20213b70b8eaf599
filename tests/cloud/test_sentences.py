"""What is said to people about a run."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from hosl_cloud.sentences import advise
from hosl_protocol.run.manifest import BlockGradient, Manifest, TensorEntry
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.tasks import Task

SETTINGS = RunSettings(task=Task(name="t", kind="lm", template="{text}"), directions=2)
MANIFEST = Manifest(
    model="m", family="llama", architecture="a", split=1, blocks=2, width=8, max_length=16, pad_token_id=0,
    train="norm", tensors=(TensorEntry(name="w", shape=(100, 50), trainable=True, exponent=-24),), files=(),
    gradients=(BlockGradient(block=0, graph="shard/gradient-0.onnx", parameters={}, gradients={"g": "w"}),),
)  # fmt: skip


@pytest.mark.parametrize("algorithm", ["ho-sfl", "hosl"])
def test_a_run_with_probes_hears_what_they_are_worth(algorithm: Any) -> None:
    assert advise(msgspec.structs.replace(SETTINGS, algorithm=algorithm), MANIFEST) == (
        "an estimate from 2 directions points 2.0 % towards the gradient of the 5,000 numbers that train; "
        'algorithm = "first-order" computes it exactly'
    )


@pytest.mark.parametrize(
    ("settings", "manifest"),
    [
        ({"algorithm": "first-order"}, {}),
        ({"algorithm": "frozen"}, {}),
        ({"directions": 1251}, {}),
        ({}, {"gradients": ()}),
    ],
)
def test_a_run_that_would_gain_nothing_hears_nothing(settings: dict[str, Any], manifest: dict[str, Any]) -> None:
    chosen = msgspec.structs.replace(SETTINGS, **settings), msgspec.structs.replace(MANIFEST, **manifest)
    assert advise(*chosen) is None
