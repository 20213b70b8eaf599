"""Runs with faults, drawn from a seed, must end as runs without: the same weights, losses and evaluations, to the bit.

make chaos SEEDS=1-20
make chaos SEEDS=1-20 CHAOS="--work DIR --ordinary"
make chaos SEEDS=1-100 CHAOS="--algorithm first-order"

Every seed is a run of real processes (deployment.py) that five to eight faults are drawn for (faults.py); those that
find nothing to hit are not counted. Finished seeds are kept in DIR/results-*.jsonl and skipped, what is printed is in
DIR/table-*.txt, too; the folder of a seed that failed stays. In an ordinary run, which is not strict, only the digests
must agree at the end. --spare-cloud spares the cloud. A device is "away" that was not told of the end: its journal must
hold rounds that were.

--bundle runs another model than the tiny one, and --cold starts each process as an operator would, instead of forking
it from one that has torch imported: together they measure how long recovery takes.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chaos.deployment import DATABASE, ROUNDS, ChaosSettings, Deployment
from chaos.faults import do_faults, draw_faults, draw_settings, targets_of
from hosl_cloud.storage.mirror import load_shard_weights
from hosl_cloud.storage.store import Store
from hosl_cloud.tail.checkpoint import find_checkpoint, read_client, read_tensors
from hosl_edge.history.journal import open_journal
from hosl_protocol.run.manifest import load_manifest
from hosl_protocol.weights.client_weights import make_client_weights

LIMIT_S = 180.0
"""Longest time of a run; one takes a quarter of a minute where nothing else runs."""
LIMIT_OF_ANOTHER_S = 1200.0
"""The same with another model than the tiny one."""


@dataclasses.dataclass
class Result:
    """How a seed's run ended."""

    seed: int
    settings: str
    faults: dict[str, int]
    """By kind, those that hit something."""
    outcome: str
    """`same bits`, `digests agree`, or what went wrong."""
    is_good: bool
    seconds: float
    recoveries: dict[str, list[float]]
    snapshots: int = 0
    """Snapshots that devices took to catch up."""


def run_seed(
    seed: int,
    bundle: Path,
    work: Path,
    *,
    strict: bool = True,
    with_cloud: bool = True,
    limit_s: float = LIMIT_S,
    is_cold: bool = False,
    algorithm: str = "",
) -> Result:
    """One run with faults, and its comparison with the unbroken one; `algorithm` takes the place of the drawn one."""
    generator = random.Random(seed)
    settings = draw_settings(generator, strict=strict)
    if algorithm:
        settings = dataclasses.replace(settings, algorithm=algorithm)
    faults = draw_faults(generator, settings, targets_of(with_cloud=with_cloud))
    expected = _unbroken(settings, bundle, work, limit_s) if strict else None

    folder = work / f"{'strict' if strict else 'ordinary'}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    deployment = Deployment(folder, bundle, settings, generator, is_cold)
    done: Counter[str] = Counter()
    began = time.monotonic()

    try:
        away = asyncio.run(_run(deployment, faults, done, limit_s))
        end = _end_of(deployment, away)
        outcome = _compare(end, expected) if expected is not None else ""
        outcome = outcome or ("same bits" if strict else "digests agree") + (
            f" ({', '.join(away)} away)" if away else ""
        )
        is_good = expected is None or _compare(end, expected) == ""
    except asyncio.TimeoutError:
        outcome, is_good = f"did not end in {limit_s:.0f} s", False
    except AssertionError as error:
        outcome, is_good = str(error), False

    result = Result(
        seed,
        str(settings),
        dict(done),
        outcome,
        is_good,
        round(time.monotonic() - began, 1),
        deployment.recoveries,
        deployment.snapshots(),
    )

    # What failed stays to be looked at, with the faults that led there.
    if is_good:
        shutil.rmtree(folder)
    else:
        (folder / "faults.txt").write_text("".join(f"{fault}\n" for fault in faults), encoding="utf-8")
    return result


async def _run(deployment: Deployment, faults: list[Any], done: Counter[str], limit_s: float) -> list[str]:
    await deployment.open()
    breaking = asyncio.create_task(do_faults(deployment, faults, done))
    try:
        return await deployment.run(limit_s)
    finally:
        breaking.cancel()
        await asyncio.gather(breaking, return_exceptions=True)
        await deployment.close()


def _unbroken(settings: ChaosSettings, bundle: Path, work: Path, limit_s: float) -> dict[str, Any]:
    """How the run ends that nothing happens to; computed once for each settings."""
    shard = load_manifest(bundle).shard_digest
    name = "unbroken-" + hashlib.sha256((settings.toml + shard).encode()).hexdigest()[:16]
    cached = work / f"{name}.json"
    if not cached.exists():
        shutil.rmtree(work / name, ignore_errors=True)

        deployment = Deployment(work / name, bundle, settings, random.Random(0))
        away = asyncio.run(_run(deployment, [], Counter(), limit_s))
        assert not away, away
        cached.write_text(json.dumps(_end_of(deployment, away)), encoding="utf-8")
        shutil.rmtree(work / name)
    return json.loads(cached.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _end_of(deployment: Deployment, away: Iterable[str]) -> dict[str, Any]:
    """What a run came to, as JSON has it. Raises AssertionError where its parts contradict each other."""
    store = Store(deployment.folder / "cloud" / DATABASE)
    try:
        runs = store.run_ids()
        assert len(runs) == 1, f"{len(runs)} runs: the first was not resumed"

        run = store.run(runs[0])
        assert (run.state, run.round) == ("completed", ROUNDS), f"{run.state} at round {run.round}"
        updates, rounds = store.updates(run.id, 1, ROUNDS), store.rounds(run.id)
        checkpoint = find_checkpoint(deployment.folder / "cloud" / "runs" / run.id, "last")
        assert checkpoint.info.round == ROUNDS, f"the last checkpoint is of round {checkpoint.info.round}"
        digest = _mirror_digest(deployment.bundle, run.config.wire_settings(), updates, checkpoint.path)
        _check_devices(deployment, digest, set(away), store, run.id)
        return {
            "client weights": digest,
            "tail": _tensors_digest(checkpoint.path),
            "updates": [
                [each.round, each.learning_rate, each.coefficients.tobytes().hex(), each.codes.tobytes().hex()]
                for each in updates
            ],
            "losses": [[row.round, row.loss.hex()] for row in rounds],
            "evaluations": [[e.round, e.loss.hex(), e.correct, e.scored] for e in store.evaluations(run.id)],
        }
    finally:
        store.close()


def _check_devices(deployment: Deployment, digest: str, away: set[str], store: Store, run: str) -> None:
    """Devices must hold the final weights; one that was away, rounds that were, to go on from when it is back."""
    rows = store._query("SELECT round, coefficients, codes, is_pruned FROM rounds WHERE run = ?", (run,))
    known = {(row["round"], row["coefficients"], row["codes"]) for row in rows}
    gone = {row["round"] for row in rows if row["is_pruned"]}
    for name in deployment.proxies:
        summary = deployment.summary(name)
        if name not in away and summary is not None:
            assert summary["weights_digest"] == digest, f"{name} ends with other weights than the cloud's mirror"
            continue

        journal = open_journal(deployment.folder / "state" / name)
        if journal is None:
            continue
        journal.close()
        for update in journal.updates():
            is_known = (update.round, update.coefficients.tobytes(), update.codes.tobytes()) in known
            assert is_known or update.round in gone, f"{name}'s journal has a round {update.round} that was not"


def _mirror_digest(bundle: Path, settings: Any, updates: list[Any], checkpoint: Path) -> str:
    """Of the checkpoint's state where it has one, else of all updates."""
    manifest = load_manifest(bundle)
    client = make_client_weights(manifest, load_shard_weights(bundle, manifest, only_trainable=True), settings)
    state = read_client(checkpoint, manifest)
    if state is not None:
        client.load_state(state)
    else:
        client.apply(updates)
    try:
        return client.digest()
    finally:
        client.close()


def _tensors_digest(path: Path) -> str:
    _, tensors = read_tensors(path)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _compare(end: dict[str, Any], expected: dict[str, Any]) -> str:
    """What differs from the unbroken run; empty where nothing does."""
    found = []
    for name, value in expected.items():
        if end[name] == value:
            continue
        if isinstance(value, list):
            places = [each[0] for each in value if each not in end[name]]
            name += f" (first at round {min(places)})" if places else " (more than there should be)"
        found.append(name)
    return f"differs in {', '.join(found)}" if found else ""


def main() -> int:
    """Run the seeds that have no result yet, and print all; 1 where any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1-10", help="A-B, or one")
    parser.add_argument("--work", type=Path, default=Path(".cache/chaos"), metavar="DIR")
    parser.add_argument("--ordinary", action="store_true", help="runs that are not strict")
    parser.add_argument("--spare-cloud", action="store_true", help="nothing happens to the cloud")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="another bundle than that of the tiny model")
    parser.add_argument("--algorithm", default="", help="of all runs; without, each draws its own")
    parser.add_argument("--cold", action="store_true", help="start processes anew instead of forking them")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    options.work.mkdir(parents=True, exist_ok=True)
    bundle = options.bundle.resolve() if options.bundle else _make_bundle(options.work.resolve())
    limit_s = LIMIT_OF_ANOTHER_S if options.bundle else LIMIT_S
    first, _, last = options.seeds.partition("-")
    mode = ("ordinary" if options.ordinary else "strict") + ("-spared" if options.spare_cloud else "")
    mode += f"-{options.algorithm}" if options.algorithm else ""
    table = options.work / f"results-{mode}.jsonl"
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    results = {result.seed: result for result in (Result(**json.loads(line)) for line in lines)}
    seeds, printed = range(int(first), int(last or first) + 1), (options.work / f"table-{mode}.txt").open("w")

    def show(text: str) -> None:
        for file in (sys.stdout, printed):
            print(text, file=file, flush=True)

    for seed in seeds:
        if seed not in results or not results[seed].is_good:
            result = results[seed] = run_seed(
                seed,
                bundle,
                options.work.resolve(),
                strict=not options.ordinary,
                with_cloud=not options.spare_cloud,
                limit_s=limit_s,
                is_cold=options.cold,
                algorithm=options.algorithm,
            )
            with table.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(result)) + "\n")
        show(_row(results[seed]))
    chosen = [results[seed] for seed in seeds]
    show(_summary(chosen))
    printed.close()
    return 0 if all(result.is_good for result in chosen) else 1


def _make_bundle(work: Path) -> Path:
    from hosl_export.__main__ import main as export
    from saved_models import save_tiny_llama

    bundle = work / "bundle"
    if not bundle.exists():
        save_tiny_llama(work / "model")
        options = ["--model", str(work / "model"), "--split", "2", "--train", "lora", "--max-length", "32"]
        assert export([*options, "--out", str(bundle)]) == 0
    return bundle


def _row(result: Result) -> str:
    faults = " ".join(f"{kind} {count}" for kind, count in sorted(result.faults.items()))
    return f"{result.seed:5}  {result.settings:34}  {result.seconds:6.1f} s  {faults:48}  {result.outcome}"


def _summary(results: list[Result]) -> str:
    faults: Counter[str] = Counter()
    for result in results:
        faults.update(result.faults)
    good = sum(result.is_good for result in results)
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(faults.items()))

    lines = [f"{good} of {len(results)} runs are good; {sum(faults.values())} faults: {kinds}"]
    lines.append(f"{sum(result.snapshots for result in results)} times a device took a snapshot to catch up")
    for name in ("device", "cloud"):
        times = sorted(time for result in results for time in result.recoveries[name])
        if times:
            middle, most = statistics.median(times), times[-1]
            lines.append(
                f"{name} back in the run after its start: {len(times)} times, median {middle:.1f} s, most {most:.1f} s"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
