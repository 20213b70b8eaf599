"""The figures of an evaluation for Prometheus: those that the last one has, and no others."""

from __future__ import annotations

from typing import Any

from prometheus_client import generate_latest

from hosl_cloud import metrics


def note(bundle: str, **figures: Any) -> dict[str, float]:
    """What Prometheus reads of a bundle's evaluation."""
    absent: dict[str, Any] = {"macro_f1": None, "perplexity": None, "accuracy_of": {}}
    metrics.note_evaluation(bundle, **{"accuracy": 0.75, "right": 3, "scored": 4, **absent, **figures})
    shown = {}
    for line in generate_latest().decode().splitlines():
        if line.startswith("hosl_eval_") and f'bundle="{bundle}"' in line:
            name, value = line.rsplit(" ", 1)
            shown[name.removeprefix("hosl_eval_").replace(f'bundle="{bundle}"', "").replace("{}", "")] = float(value)
    return shown


ALWAYS = {"accuracy": 0.75, "right": 3.0, "scored": 4.0}


def test_an_evaluation_shows_what_it_has_and_hides_what_the_last_one_had() -> None:
    first = note("figures", macro_f1=0.5, accuracy_of={"cat": 1.0, "dog": 0.5})
    classes = {'class_accuracy{,class="cat"}': 1.0, 'class_accuracy{,class="dog"}': 0.5}
    assert first == {**ALWAYS, "macro_f1": 0.5, **classes}
    assert note("figures", macro_f1=0.5, accuracy_of={"cat": 0.25}) == {
        **ALWAYS,
        "macro_f1": 0.5,
        'class_accuracy{,class="cat"}': 0.25,
    }
    assert note("figures", perplexity=50.0) == {**ALWAYS, "perplexity": 50.0}


def test_many_classes_have_no_series_each() -> None:
    few, many = ({str(k): 1.0 for k in range(metrics.MOST_CLASSES + more)} for more in (0, 1))
    assert len(note("many", accuracy_of=few)) == metrics.MOST_CLASSES + 3
    assert note("many", accuracy_of=many) == ALWAYS
