"""A simulated fleet is the fleet: the same bits as real devices on a real port, and a result that merges."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hosl_cloud.__main__ import main as cloud_main
from hosl_cloud.runs.run import LEAST_KEPT, Run
from hosl_cloud.settings import parse_config
from hosl_cloud.simulation.partition import Partition
from hosl_cloud.simulation.virtual_devices import simulate
from hosl_cloud.storage.records import Evaluation
from hosl_cloud.storage.store import Store
from hosl_edge import EdgeSettings, run_agent
from hosl_protocol.exceptions import ExitCode
from hosl_protocol.run.manifest import load_manifest
from pictures import CLASSES, SIZES, make_pictures
from services import Service, serving
from support import TASK, count_right, count_right_by_card, write_reviews

DEVICES, EXAMPLES = 3, 41
MakeBundle = Callable[..., Path]


def configure(**more: Any) -> dict[str, Any]:
    return {
        **msgspec.toml.decode(TASK),
        "rounds": 6,
        "seed": 9,
        "batch_size": 4,
        "max_length": 16,
        "report_every": 2,
        "client": {"learning_rate": 0.01},
        "tail": {"learning_rate": 3e-3, "device": "cpu"},
        "evaluation": {"every": 3},
        "devices": {"start_with": DEVICES, "per_round": 2},
        **more,
    }


def run_simulated(bundle: Path, folder: Path, settings: dict[str, Any], alpha: float | None = None) -> Store:
    """The store of a simulated run over the reviews."""
    folder.mkdir()
    manifest, store = load_manifest(bundle), Store(folder / "hosl.sqlite")
    run = Run("run-1", parse_config(settings, manifest), manifest, bundle, folder / "runs" / "run-1", store)
    store.create_run("run-1", bundle, manifest.shard_digest, run.config)
    train, held_out = write_reviews(folder / "train.jsonl", EXAMPLES), write_reviews(folder / "eval.jsonl", 10, 400)
    assert asyncio.run(simulate(run, train, held_out, Partition(alpha), 1, lambda sentence: None)) == "completed"
    return store


def run_real(bundle: Path, folder: Path, settings: dict[str, Any]) -> Store:
    """The store of a run of agents that hold the parts of the same reviews."""
    folder.mkdir()
    lines = write_reviews(folder / "all.jsonl", EXAMPLES).read_text(encoding="utf-8").splitlines(keepends=True)

    def agent(service: Service, number: int, part: Any) -> EdgeSettings:
        data = folder / f"{number}.jsonl"
        data.write_text("".join(lines[place] for place in part), encoding="utf-8")
        held_out = write_reviews(folder / "eval.jsonl", 10, 400)
        return EdgeSettings(
            server=service.address,
            token_file=str(service.token_file),
            data=str(data),
            eval=str(held_out) if number == 0 else None,
            name=f"device-{number}",
            threads=1,
            state_dir=str(folder / "state"),
            cache_dir=str(folder / "cache"),
        )

    async def main() -> None:
        async with serving(bundle, folder / "cloud", {**settings, "strict": True}) as service:
            parts = Partition().deal(None, EXAMPLES, DEVICES, settings["seed"])
            agents = [run_agent(agent(service, number, part)) for number, part in enumerate(parts)]
            await asyncio.wait_for(asyncio.gather(*agents), 60.0)
            assert await service.serving == "completed"

    asyncio.run(main())
    return Store(folder / "cloud" / "hosl.sqlite")


def scores(store: Store) -> list[Evaluation]:
    """The evaluations; a simulated device has no file whose digest could be the real one's."""
    return [dataclasses.replace(evaluation, held_out="") for evaluation in store.evaluations("run-1")]


@pytest.mark.parametrize(
    ("train", "more"),
    [
        ("lora", {}),
        ("lora", {"client": {"learning_rate": 0.01, "optimizer": "adamw"}, "anchor": "midpoint"}),
        ("lora", {"wire_dtype": "bfloat16"}),
        ("lora", {"wire_dtype": "float16"}),
        ("lora", {"wire_dtype": "int8"}),
        ("lora", {"algorithm": "hosl"}),
        ("lora", {"algorithm": "frozen"}),
        ("prompt", {}),
        ("lora", {"algorithm": "first-order"}),
        ("norm", {"algorithm": "first-order", "client": {"optimizer": "sgd"}, "wire_dtype": "float16"}),
    ],
    ids=[
        "ho-sfl",
        "adamw",
        "bfloat16",
        "float16",
        "int8",
        "hosl",
        "frozen",
        "prompt",
        "first-order",
        "first-order sgd",
    ],
)
def test_a_simulated_run_gives_the_bits_of_a_real_one(
    make_bundle: MakeBundle, tmp_path: Path, train: str, more: dict[str, Any]
) -> None:
    bundle = make_bundle(train, 2)
    simulated, real = (
        run_simulated(bundle, tmp_path / "s", configure(**more)),
        run_real(bundle, tmp_path / "r", configure(**more)),
    )
    updates = [
        [(update.coefficients.tobytes(), update.codes.tobytes()) for update in store.updates("run-1", 1, 6)]
        for store in (simulated, real)
    ]
    assert updates[0] == updates[1]
    assert [row.loss for row in simulated.rounds("run-1")] == [row.loss for row in real.rounds("run-1")]
    assert scores(simulated) == scores(real)
    assert [evaluation.round for evaluation in real.evaluations("run-1")] == [0, 3, 6]
    # Whoever answered late, or joined, is in the real count alone, and counts for more beside activations of few bits.
    counts = [sum(row.wire_bytes for row in store.rounds("run-1")) for store in (simulated, real)]
    assert 0.85 * counts[1] < counts[0] <= counts[1]
    simulated.close()
    real.close()


def test_uneven_parts_train_differently(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle("lora", 2)
    stores = [
        run_simulated(bundle, tmp_path / name, configure(), how) for name, how in (("iid", None), ("dirichlet", 0.1))
    ]
    first, second = ([row.loss for row in store.rounds("run-1")] for store in stores)
    assert first != second
    for store in stores:
        store.close()


@pytest.mark.parametrize(
    ("train", "rounds", "more"),
    [
        ("lora", 4, []),
        ("prompt", 4, []),
        # So many that the store has dropped updates of the first rounds.
        ("lora", LEAST_KEPT + 2, ["algorithm=first-order", "gradient_bits=32", "tail.train=lora"]),
    ],
    ids=["lora", "prompt", "first-order"],
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
def test_the_command_writes_a_table_and_a_run_that_merges(
    make_bundle: MakeBundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    train: str,
    rounds: int,
    more: list[str],
) -> None:
    data, held_out = write_reviews(tmp_path / "train.jsonl", 40), write_reviews(tmp_path / "eval.jsonl", 40, 400)
    (tmp_path / "run.toml").write_text(TASK, encoding="utf-8")
    options = ["--bundle", str(make_bundle(train, 2)), "--config", str(tmp_path / "run.toml")]
    capsys.readouterr()  # what the export said
    options += ["--data", str(data), "--eval", str(held_out), "--devices", "8", "--per-round", "3"]
    options += [
        "--set",
        f"rounds={rounds}",
        "--set",
        "tail.device=cpu",
        "--set",
        "name=fleet",
        "--set",
        "max_length=24",
    ]
    options += ["--data-dir", str(tmp_path / "data"), "--csv", str(tmp_path / "table.csv"), "--json", "--threads", "1"]
    options += [part for setting in more for part in ("--set", setting)]
    assert cloud_main(["simulate", *options]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["run"].startswith("fleet-")
    assert (summary["state"], summary["rounds"]) == ("completed", rounds)
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["round"]) for row in rows] == [*range(rounds + 1)]
    assert float(rows[-1]["accuracy"]) == summary["final_accuracy"]
    assert int(rows[-1]["wire_bytes"]) == summary["wire_bytes"] > 0
    assert rows[0]["accuracy"]
    check_evaluation(summary["evaluation"], rows[-1])
    merged = ["merge", summary["run"], "--out", str(tmp_path / "merged"), "--data-dir", str(tmp_path / "data")]
    merged += ["--adapter", str(tmp_path / "adapter")] if "tail.train=lora" in more else []
    assert cloud_main(merged) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "adapter").exists() == ("tail.train=lora" in more)
    assert ("its soft prompt is a PEFT adapter" in said) == (train == "prompt")
    right = round(40 * summary["final_accuracy"])
    assert count_right(tmp_path / "merged", [held_out]) == (right, 40)
    assert count_right_by_card(tmp_path / "merged", [held_out]) == (right, 40)
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert f"accuracy {100 * right / 40:.1f} % ({right} of 40 right, 40 of 40 examples scored)" in card
    assert f"| run | `{summary['run']}` |" in card
    assert re.search(r"^## Held-out data, class by class$.*^\| `0` \| 20 \|", card, re.MULTILINE | re.DOTALL)
    task = json.loads((tmp_path / "merged" / "hosl_task.json").read_text(encoding="utf-8"))
    assert (task["template"], task["labels"], task["verbalizers"]) == ("{text} it was", ["0", "1"], ["bad", "good"])


def check_evaluation(shown: dict[str, Any], row: dict[str, str]) -> None:
    """The summary and the table's last row have the same numbers, and those of the classes add up to them."""
    assert (row["right"], row["scored"], row["examples"], row["of_examples"]) == (str(shown["right"]), "40", "40", "40")
    assert (float(row["macro_f1"]), row["perplexity"]) == (shown["macro_f1"], "")
    assert sum(each["right"] for each in shown["classes"]) == shown["right"]
    assert sum(map(sum, shown["confusion"])) == shown["scored"] == 40


@pytest.mark.parametrize("model", ["tiny_model", "tiny_encoder"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
def test_a_classifier_and_its_soft_prompt_load_in_peft_with_the_trained_head(
    request: pytest.FixtureRequest, export_bundle: Callable[..., Path], tmp_path: Path, model: str
) -> None:
    task = {"name": "classes", "kind": "sequence-classification", "template": "{text}", "labels": ["0", "1"]}
    tail = {"learning_rate": 3e-3, "device": "cpu", "train": "lora"}
    bundle = export_bundle(request.getfixturevalue(model), "prompt", 2)
    store = run_simulated(bundle, tmp_path / "run", configure(task=task, tail=tail, max_length=24))
    evaluation = store.evaluations("run-1")[-1]
    store.close()
    merged = ["merge", "run-1", "--out", str(tmp_path / "merged"), "--data-dir", str(tmp_path / "run")]
    assert cloud_main([*merged, "--checkpoint", "last"]) == 0
    found = count_right(tmp_path / "merged", [tmp_path / "run" / "eval.jsonl"], is_classifier=True)
    assert found == (evaluation.correct, evaluation.scored)
    assert count_right_by_card(tmp_path / "merged", [tmp_path / "run" / "eval.jsonl"]) == found


@pytest.mark.parametrize(("rate", "is_harmed"), [(1.0, True), (3e-3, False)])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
def test_merge_says_when_a_run_has_made_the_model_worse(
    make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], rate: float, is_harmed: bool
) -> None:
    tail = {"learning_rate": rate, "device": "cpu", "clip_norm": 0.0}
    settings = configure(task={"preset": "lm"}, tail=tail, rounds=3)
    store = run_simulated(make_bundle("norm", 2), tmp_path / "run", settings)
    before, after = (each.loss for each in store.evaluations("run-1"))
    store.close()
    capsys.readouterr()
    assert (after > before) == is_harmed
    assert cloud_main(["merge", "run-1", "--out", str(tmp_path / "merged"), "--data-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert ("training made it worse" in said) == is_harmed
    assert not is_harmed or f"loss {before:.4f} before the first round" in said
    assert not is_harmed or f"loss {after:.4f} now" in said


def test_a_run_may_begin_without_an_evaluation(make_bundle: MakeBundle, tmp_path: Path) -> None:
    settings = configure(rounds=2, evaluation={"every": 0, "start": False})
    store = run_simulated(make_bundle("norm", 2), tmp_path / "run", settings)
    assert [evaluation.round for evaluation in store.evaluations("run-1")] == [2]
    store.close()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--partition", "even"], "use iid or dirichlet:ALPHA"),
        (["--devices", "99"], "use at most 40, the examples in the data"),
        (["--devices", "3", "--set", "devices.quorum=4"], "devices.quorum is 4: use at most --devices, 3"),
        (["--set", "round=4"], "round"),
        (["--set", "rounds"], "use KEY=VALUE"),
    ],
)
def test_what_cannot_be_simulated_is_named(
    make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str], sentence: str
) -> None:
    (tmp_path / "run.toml").write_text(TASK, encoding="utf-8")
    options = [
        "--bundle",
        str(make_bundle("lora", 2)),
        "--config",
        str(tmp_path / "run.toml"),
        "--set",
        "max_length=16",
    ]
    options += ["--data", str(write_reviews(tmp_path / "train.jsonl", 40)), "--data-dir", str(tmp_path / "data")]
    assert cloud_main(["simulate", *options, *option]) == ExitCode.SETTINGS
    assert sentence in capsys.readouterr().err


def test_a_picture_that_cannot_be_decoded_ends_a_simulation_at_once_unless_it_is_left_out(
    make_image_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pillow = pytest.importorskip("PIL.Image")
    bundle, (images, labels) = make_image_bundle("resnet", "norm"), make_pictures(9, SIZES["resnet"])
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "data" / CLASSES[label] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pillow.fromarray(image).save(path)
    content = bytearray((tmp_path / "data" / "green" / "4.png").read_bytes())
    content[len(content) // 2] ^= 0xFF  # so that only who decodes it finds out
    (tmp_path / "data" / "green" / "4.png").write_bytes(content)
    (tmp_path / "run.toml").write_text(
        'rounds = 2\nbatch_size = 9\n[task]\nkind = "image-classification"\nlabels = ["red", "green", "blue"]\n'
        '[tail]\ndevice = "cpu"\n[evaluation]\nevery = 0\nstart = false\n',
        encoding="utf-8",
    )
    command = ["simulate", "--bundle", str(bundle), "--config", str(tmp_path / "run.toml"), "--threads", "1"]
    command += ["--data", str(tmp_path / "data"), "--devices", "1", "--data-dir", str(tmp_path / "cloud")]
    assert cloud_main(command) == ExitCode.DATA
    assert "4.png: cannot be decoded: " in capsys.readouterr().err
    assert cloud_main([*command, "--skip-broken"]) == ExitCode.OK
