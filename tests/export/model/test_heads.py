"""The classification head that a checkpoint brings: kept, replaced, or told that it is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from hosl_cloud.settings import parse_config
from hosl_cloud.tail.building import build_tail
from hosl_export import ExportSettings, export_bundle, load_tail
from hosl_export.sources.loading import find_source, load_model
from hosl_export.summary import describe
from hosl_export.tensor_files import read_tensors
from hosl_protocol.run.manifest import SHARD_WEIGHTS, load_manifest
from tiny import CONFIGS, make_batch, make_tokenizer, run_shard

NAMES = ("bad", "so so", "good")


@pytest.fixture(scope="module")
def classifier(made_once: Callable[..., Path]) -> Callable[[str], Path]:
    """A folder with a tiny classifier in `model`, its bundle in `bundle`, and what the export said in `said`."""

    def get(kind: str) -> Path:
        def make(folder: Path) -> None:
            config = CONFIGS[kind]()
            config.id2label = dict(enumerate(NAMES))
            config.label2id = {name: place for place, name in enumerate(NAMES)}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                model = hf.AutoModelForSequenceClassification.from_config(config)
                for parameter in model.parameters():
                    parameter.data.normal_(0.0, 0.3)
            model.save_pretrained(folder / "model")
            make_tokenizer().save_pretrained(folder / "model")
            summary = export_bundle(
                ExportSettings(model=str(folder / "model"), split=1, out=folder / "bundle", gradients=False)
            )
            (folder / "said").write_text(describe(summary))

        return made_once(f"classifier-{kind}", make)

    return get


@pytest.mark.parametrize("kind", ["bert", "llama", "opt-350m", "gpt2"])
def test_a_text_classifier_goes_on_with_its_own_head(classifier: Callable[[str], Path], kind: str) -> None:
    folder = classifier(kind)
    manifest = load_manifest(folder / "bundle")
    tail = load_tail(folder / "bundle", manifest, num_labels=3)
    ids, mask = make_batch(3, 9)
    h_BTD = run_shard(folder / "bundle", read_tensors(folder / "bundle" / SHARD_WEIGHTS), ids, mask)
    whole = hf.AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(tail(h_BTD, mask), expected, atol=1e-4, rtol=1e-4)
    assert "head    of 3 labels (bad, so so, good)" in (folder / "said").read_text()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_task_of_other_labels_gets_a_new_head_and_says_so(
    classifier: Callable[[str], Path], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = classifier(kind) / "bundle"
    tail, _ = build_tail(bundle, manifest := load_manifest(bundle), configure(manifest, ["no", "yes"]))
    again = load_tail(bundle, manifest, num_labels=2, seed=0)
    assert tail.class_count == 2
    assert all(torch.equal(one, other) for one, other in zip(tail.parameters(), again.parameters(), strict=True))
    assert [record.message for record in caplog.records] == [
        "model has a head of 3 labels, and the task has 2: a new one takes its place"
    ]


def test_a_kept_heads_rows_follow_the_tasks_labels_by_name(classifier: Callable[[str], Path]) -> None:
    bundle = classifier("bert") / "bundle"
    manifest = load_manifest(bundle)
    heads = {}
    for labels in (["good", "Bad", "so so"], list(NAMES), ["0", "1", "2"]):
        tail, _ = build_tail(bundle, manifest, configure(manifest, labels))
        heads[labels[0]] = torch.cat([tail.model.classifier.weight, tail.model.classifier.bias[:, None]], dim=1)
    assert torch.equal(heads["good"], heads["bad"][[2, 0, 1]])
    assert torch.equal(heads["0"], heads["bad"])


def configure(manifest: Any, labels: list[str]) -> Any:
    task = {"name": "x", "kind": "sequence-classification", "template": "{text}", "labels": labels}
    return parse_config({"task": task, "max_length": 16, "tail": {"device": "cpu"}}, manifest)


@pytest.mark.parametrize(
    ("class_", "kind", "head"),
    [
        (hf.BertForTokenClassification, "bert", "classifier"),
        (hf.BertForQuestionAnswering, "bert", "qa_outputs"),
        (hf.LlamaForTokenClassification, "llama", "score"),
    ],
)
def test_a_head_of_another_kind_is_left_out_and_named(
    tmp_path: Path, class_: Any, kind: str, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    class_(CONFIGS[kind]()).save_pretrained(tmp_path / "model")
    load_model(find_source(str(tmp_path / "model")))
    said = f"model is a {class_.__name__}: its {head} is left out, no task of hosl has a use for it"
    assert said in [record.message for record in caplog.records]
