"""Tasks: presets, strict templates, labels."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.settings import convert
from hosl_protocol.run.tasks import (
    Task,
    check_task,
    fill,
    label_of,
    load_preset,
    look_up,
    preset_fields,
    preset_names,
    render,
    text_of_value,
)
from support import ROOT

EXAMPLES = {
    "boolq": ({"passage": "Ice floats.", "question": "does ice float"}, "Ice floats. does ice float?\n"),
    "cb": (
        {"premise": "It rained.", "hypothesis": "it was wet"},
        'Suppose It rained. Can we infer that "it was wet"? Yes, No, or Maybe?\n',
    ),
    "completion": ({"prompt": "Once", "completion": " upon"}, "Once"),
    "instruct": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n",
    ),
    "lm": ({"text": "Once."}, "Once."),
    "reviews": ({"text": "A fine film."}, "A fine film. It was"),
    "rte": (
        {"premise": "It rained.", "hypothesis": "It was wet."},
        'It rained.\nDoes this mean that "It was wet." is true? Yes or No?\n',
    ),
    "sequence-classification": ({"text": "A fine film."}, "A fine film."),
    "squad": (
        {"context": "Ice floats.", "question": "What floats?", "answers": [{"text": "Ice", "answer_start": 0}]},
        "Ice floats.\nQuestion: What floats?\nAnswer:",
    ),
    "sst2": ({"sentence": "a fine film"}, "a fine film It was"),
    "wic": (
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "The bank lends."},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA river bank.\nThe bank lends.\n',
    ),
    "wsc": (
        {"text": "Ann said she left.", "target": {"span1_text": "Ann", "span2_text": "she"}},
        'Ann said she left.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
    ),
}


def make_task(**changes):
    fields = {"name": "t", "kind": "sequence-classification", "template": "{text}", "labels": ("0", "1"), **changes}
    return convert(fields, Task, "task")


IMAGES = {"cifar10": "airplane", "mnist": "0"}
"""Presets of images, and the first of their ten classes."""


def test_every_preset_has_an_example_here():
    assert preset_names() == sorted([*EXAMPLES, *IMAGES, "chat"])


@pytest.mark.parametrize("name", IMAGES)
def test_presets_of_images_check_out(name):
    task = convert(load_preset(name), Task, "task")
    check_task(task)
    assert (len(task.labels), task.labels[0], task.template) == (10, IMAGES[name], "")
    assert preset_fields(name) == task.fields == ("images", "labels")
    assert task.is_image
    assert task.has_class_head


def test_images_have_no_template():
    with pytest.raises(SettingsError, match="the kind image-classification has none: leave it out"):
        check_task(make_task(kind="image-classification"))
    with pytest.raises(SettingsError, match="name at least one field"):
        check_task(make_task(template=""))


@pytest.mark.parametrize("name", EXAMPLES)
def test_presets_check_out_and_read_as_expected(name):
    task = convert(load_preset(name), Task, "task")
    check_task(task)
    example, text = EXAMPLES[name]
    assert render(task, example) == text
    assert preset_fields(name) == task.fields
    if not task.scores_tokens:
        assert [label_of(task, {**example, "label": place}) for place in range(len(task.labels))] == [
            *range(len(task.labels))
        ]


@pytest.mark.parametrize(
    "answers", [[{"text": "Ice"}, {"text": "It"}], {"text": ["Ice", "It"], "answer_start": [0, 3]}, "Ice"]
)
def test_answers_of_squad_are_read_in_each_of_their_public_forms(answers):
    task = convert(load_preset("squad"), Task, "task")
    name = "answer" if isinstance(answers, str) else "answers"
    assert fill(task.completion, {name: answers}) == " Ice"
    assert task.shared_fields == ("answers.0.text", "answers.text.0", "answer")


def test_conversations_have_a_field_of_messages():
    task = convert(load_preset("chat"), Task, "task")
    check_task(task)
    assert task.fields == task.shared_fields == preset_fields("chat") == ("messages",)
    with pytest.raises(SettingsError, match=r"task\.messages_field is 'a b': give the name of a field"):
        check_task(convert({"name": "t", "kind": "chat", "messages_field": "a b"}, Task, "task"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "completion"}, r"task\.completion is '': name at least one field"),
        ({"kind": "completion", "completion": "{a} {"}, r"task\.completion .*braces may only enclose"),
        ({"kind": "lm", "completion": "{a}"}, r"task\.completion is '{a}': the kind lm has none"),
        ({"kind": "chat"}, r"task\.template is '{text}': the kind chat has none"),
    ],
)
def test_each_kind_has_its_templates(changes, match):
    with pytest.raises(SettingsError, match=match):
        check_task(make_task(**changes))


def test_what_is_shared_is_what_the_model_is_to_write():
    task = make_task(kind="completion", template="{a}", completion="{b}")
    assert (task.fields, task.shared_fields) == (("a", "b"), ("b",))
    assert make_task(kind="lm", template="{a} {b}").shared_fields == ("a", "b")
    assert make_task().shared_fields == ()


@pytest.mark.parametrize("field", ["a.2", "a.-1", "a.x", "a.0.1", "a.00000000000000000000"])
def test_a_place_that_a_list_has_not_is_named(field):
    with pytest.raises(KeyError, match=field):
        look_up({"a": ["x", "y"]}, field)


def test_unknown_preset_names_those_there_are():
    with pytest.raises(SettingsError, match=r"task\.preset is 'sst3': use one of boolq, cb, chat, cifar10, completion"):
        load_preset("sst3")
    assert preset_fields("../sst2") is None


def test_a_missing_field_is_named():
    with pytest.raises(KeyError, match="text"):
        render(make_task(), {"sentence": "x"})


@pytest.mark.parametrize("example", [{"target": "Ann"}, {"target": {}}, {"target": None}, {"target": ["Ann"]}, {}])
def test_a_dotted_field_that_leads_nowhere_is_named_whole(example):
    with pytest.raises(KeyError, match=r"target\.span"):
        render(make_task(template="{target.span}"), example)


def test_a_dotted_name_of_its_own_goes_before_nested_objects():
    task = make_task(template="{a.b} {c.d.e}")
    assert render(task, {"a.b": "plain", "a": {"b": "nested"}, "c": {"d": {"e": 7}}}) == "plain 7"


@pytest.mark.parametrize("field", ["text.__class__", "text.upper", "__class__", "text.__class__.__mro__"])
def test_attributes_are_never_looked_up(field):
    with pytest.raises(KeyError, match=re.escape(field)):
        render(make_task(template=f"{{{field}}}"), {"text": "x"})


def test_braces_in_the_data_stay_as_they_are():
    assert render(make_task(), {"text": "{label} {0} {text}"}) == "{label} {0} {text}"


@pytest.mark.parametrize("template", ["{text!r}", "{text:>10}", "{text[0]}", "{}", "{0}", "{text", "text}", "{{text}}"])
def test_format_specifications_are_refused(template):
    with pytest.raises(SettingsError) as caught:
        check_task(make_task(template=template))
    assert (caught.value.field, caught.value.value) == ("task.template", template)


def test_a_template_without_a_field_is_refused_with_a_remedy():
    with pytest.raises(SettingsError, match=r"name at least one field in braces, such as \{text\}"):
        check_task(make_task(template="always the same"))


@pytest.mark.parametrize("labels", [(), ("0",), ("0", "0")])
def test_labels_that_do_not_tell_classes_apart_are_refused(labels):
    with pytest.raises(SettingsError, match=r"task.labels .* list two or more different label values"):
        check_task(make_task(labels=labels))


def test_each_class_needs_its_verbalizer():
    task = make_task(kind="prompt-classification", verbalizers=("yes",))
    with pytest.raises(SettingsError, match=r"task.verbalizers is \['yes'\]: give one for each of \['0', '1'\]"):
        check_task(task)


@pytest.mark.parametrize(
    ("labels", "value", "expected"),
    [
        (("0", "1"), 1, 1),
        (("0", "1"), "0", 0),
        (("false", "true"), True, 1),
        (("false", "true"), False, 0),
        (("bad", "good"), "good", 1),
        (("0", "1"), 1.0, 1),
        (("0", "1"), "1.0", 1),
        (("1.0", "1"), "1.0", 0),
        (("0", "0.5"), 0.5, 1),
        (("-1", "1"), "-1.00", 0),
    ],
)
def test_labels_are_numbers_booleans_or_text(labels, value, expected):
    assert label_of(make_task(labels=labels), {"label": value}) == expected


@pytest.mark.parametrize(
    "value", [2, "Good", True, 1.5, "1.5", "-0.0", "+1.0", "1.", math.nan, math.inf, None, ["0"], {}]
)
def test_an_unknown_label_is_an_error_that_does_not_quote_it(value):
    with pytest.raises(ValueError, match="one of 0, 1") as caught:
        label_of(make_task(), {"label": value})
    assert str(value) not in str(caught.value)


def test_a_label_that_is_nearly_right_is_told_how():
    with pytest.raises(ValueError, match="it differs from Good in case or blanks alone"):
        label_of(make_task(labels=("Bad", "Good")), {"label": "good "})
    with pytest.raises(ValueError, match=r"it is a boolean: name false and true in task\.label_names"):
        label_of(make_task(), {"label": True})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, ["a"], {"a": 1}])
def test_a_field_that_is_no_text_and_no_finite_number_is_refused(value):
    with pytest.raises(
        TypeError, match=r"field 'text' should be text or a number, it is (null|a number that|a list|an o)"
    ):
        render(make_task(), {"text": value})


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_as_text_is_read_back_as_itself_and_has_no_exponent(value):
    text = text_of_value(value)
    assert text is not None
    assert float(text) == value
    assert re.fullmatch(r"-?(0|[1-9]\d*)(\.\d*[1-9])?", text)
    assert text == text_of_value(int(value)) or not value.is_integer() or abs(value) > 2**53


def test_the_first_of_several_fields_that_an_example_has_is_taken():
    task = make_task(template="{a.b|c}")
    assert render(task, {"a": {"b": "nested"}, "c": "flat"}) == "nested"
    assert render(task, {"c": "flat"}) == "flat"
    assert task.fields == ("a.b", "c", "label")
    with pytest.raises(KeyError, match="c"):
        render(task, {"a": {}})


def test_labels_may_have_other_names():
    task = make_task(label_names=("false", "true"))
    check_task(task)
    assert [label_of(task, {"label": value}) for value in (False, True, "0", 1)] == [0, 1, 0, 1]
    for names in (("true",), ("0", "yes"), ("a", "a")):
        with pytest.raises(SettingsError, match=r"task.label_names .* give another name for each of \['0', '1'\]"):
            check_task(make_task(label_names=names))


PUBLIC = {
    "boolq": [{"passage": "Ice floats.", "question": "does ice float", "label": True}],
    "cb": [{"premise": "It rained.", "hypothesis": "it was wet", "label": "contradiction"}],
    "rte": [{"premise": "It rained.", "hypothesis": "It was wet.", "label": "not_entailment"}],
    "wic": [{"word": "bank", "sentence1": "A river bank.", "sentence2": "The bank lends.", "label": True}],
    "wsc": [
        {"text": "Ann said she left.", "target": {"span1_text": "Ann", "span2_text": "she"}, "label": True},
        {"text": "Ann said she left.", "span1_text": "Ann", "span2_text": "she", "label": 1},
    ],
}
"""As SuperGLUE's own files have them, and flat as on the hub."""


@pytest.mark.parametrize("name", PUBLIC)
def test_presets_read_the_public_forms_of_their_data(name):
    task = convert(load_preset(name), Task, "task")
    for example in PUBLIC[name]:
        assert render(task, example) == EXAMPLES[name][1]
        assert label_of(task, example) == 1


def test_a_missing_label_is_named():
    with pytest.raises(KeyError, match="verdict"):
        label_of(make_task(label_field="verdict"), {"label": 1})


def test_fields_are_those_of_the_template_and_the_label_once_each():
    assert make_task(template="{a} {b.c} {a}").fields == ("a", "b.c", "label")
    assert make_task(kind="lm").fields == ("text",)


def test_the_table_of_presets_is_that_of_the_shipped_ones() -> None:
    text = (ROOT / "cloud" / "run-toml.md").read_text(encoding="utf-8")
    start = text.index("| preset | kind | fields | labels |")
    rows = [line.strip("| ").split(" | ") for line in text[start:].split("\n\n")[0].splitlines()[2:]]
    assert [row[0] for row in rows] == [f"`{name}`" for name in sorted(preset_names())]
    for preset, *row in rows:
        task: Task = convert(load_preset(preset.strip("`")), Task, "task")
        lists = (task.fields, task.labels, task.label_names)
        fields, labels, names = (", ".join(f"`{name}`" for name in each) for each in lists)
        assert row == [f"`{task.kind}`", fields, (labels or "the text itself") + (names and f" or {names}")], preset
