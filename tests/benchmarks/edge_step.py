"""One training step on the device: hosl's rounds against plain forwards and against clients in torch.

    python tests/benchmarks/edge_step.py [--models ...] [--splits ...] [--trains ...] [--train-blocks N] [--shapes ...]
        [--prefix-cached] [--all] [--json]

Client halves with random weights. Each method has a process of its own, which tells its peak resident memory at its
end; the processes are asked in turn for one repetition each, and times are medians. A hosl step is the device's own
generator, answered at once, and the update; the time of an answer is not counted. A first-order round keeps what every
block is given, one of the others no more than it must. "forward" is the shard's forward of the whole batch, nothing
else: a third of three in a row. The torch clients run the same half whole, as transformers
runs it: first-order is forward, backward from a given gradient and SGD; MeZO is three forwards and four passes of
seeded normals, three to probe and one to update. Rows are as long as they may be: nothing is padding. On a machine
that does other work besides, compare the processor's seconds, which --json gives too. Memory ratios say how many times
less hosl's device needs at its peak, its uploads encoded as they are sent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:  # a worker imports nothing that its method does not need
    import numpy as np
    import numpy.typing as npt
    import torch

    from hosl_edge.rounds import Receive, Send, Step
    from hosl_export.model.halves import ClientHalf
    from hosl_protocol.run.manifest import Manifest
    from hosl_protocol.run.settings import RunSettings
    from hosl_protocol.wire.codec import Frame

GEOMETRIES: dict[str, dict[str, int]] = {
    "OPT-125M": {},
    "OPT-1.3B": {"hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192, "num_attention_heads": 32},
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
LLAMAS = ("SmolLM2-135M",)
"""The others are OPTs."""
VOCABULARY = 50272
FORWARDS = 3
"""Of one step of HOSL with Q = 1, of HO-SFL with P = 2, and of MeZO's two probes with the clean forward."""
ROUNDS = {
    "hosl": {"algorithm": "hosl", "directions": 1},
    "hosl-midpoint": {"algorithm": "hosl", "directions": 1, "anchor": "midpoint"},
    "ho-sfl": {"algorithm": "ho-sfl", "directions": 2},
    "first-order": {"algorithm": "first-order"},
}
CACHED_ROUNDS = {**ROUNDS, "ho-sfl-8": {"algorithm": "ho-sfl", "directions": 8}}
"""Of cases with a cache of frozen blocks."""
HOLDS_SETS = {"hosl": 1, "hosl-midpoint": 1, "ho-sfl": 2, "ho-sfl-8": 2, "first-order": 2}
"""Sets of activations that a step must hold at once: HOSL the one it sends, HO-SFL the clean one and λ, first-order λ
and what one block was given."""
TORCH = ("torch-fo", "torch-mezo")
FORWARDS_BY = {"forward": "ho-sfl", "torch-forward": "torch-fo"}
"""Plain forwards, and the method whose process makes them."""


@dataclass(frozen=True)
class Case:
    """One row."""

    model: str
    split: int
    train: str
    batch: int
    length: int
    train_blocks: int | None = None
    """As of hosl-export."""
    prefix_cached: bool = False
    """Whether the device has kept what its frozen blocks compute: rounds are those from the second epoch on."""

    @property
    def rounds(self) -> dict[str, dict[str, Any]]:
        """The methods of hosl that are measured, and what they set."""
        return CACHED_ROUNDS if self.prefix_cached else ROUNDS


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """What the options ask for; without any, a part of the grid that takes about a quarter of an hour."""
    narrowed = (options.models, options.splits, options.trains, options.shapes, options.train_blocks)
    if not any(narrowed) and not options.all:
        return [
            Case("OPT-125M", 6, "blocks", 8, 64),
            Case("OPT-125M", 6, "blocks", 16, 128),
            Case("OPT-125M", 6, "lora", 16, 128),
            Case("OPT-125M", 3, "blocks", 16, 128),
            Case("OPT-1.3B", 3, "blocks", 16, 128),
        ]
    defaults = {"OPT-125M": [(8, 64), (16, 128), (64, 128)], "OPT-1.3B": [(16, 128)], "SmolLM2-135M": [(16, 128)]}
    return [
        Case(model, split, train, *shape, train_blocks=options.train_blocks, prefix_cached=options.prefix_cached)
        for model in options.models or ("OPT-125M", "OPT-1.3B")
        for split in options.splits or (6, 3)
        for train in options.trains or ("blocks", "lora")
        for shape in options.shapes or defaults[model]
    ]


# The parent: files, processes, rows.


class Worker:
    """A method in a process of its own, which answers each line with a line."""

    def __init__(self, method: str, folder: Path, script: str = __file__) -> None:
        command = [sys.executable, script, "--worker", method, "--folder", str(folder)]
        self.method = method
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()  # that it is ready

    def ask(self, question: str) -> Any:
        """Its answer, once it has it."""
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """The next line from it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.method} ended with code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def measure_case(case: Case, folder: Path, repeats: int) -> dict[str, Any]:
    """One row; `folder` holds the bundle."""
    import numpy as np

    (folder / "case.json").write_text(json.dumps(asdict(case)), encoding="utf-8")
    make_data(folder, case)
    workers: dict[str, Worker] = {}
    try:
        for method in (*case.rounds, *TORCH):
            workers[method] = Worker(method, folder)
        activations = {name: np.load(worker.ask("activations")) for name, worker in workers.items()}
        for name, values in activations.items():
            np.testing.assert_allclose(values, activations["ho-sfl"], atol=1e-3, err_msg=name)
        asked = {**FORWARDS_BY, **{name: name for name in workers}}
        taken: dict[str, list[list[float]]] = {name: [] for name in asked}
        for turn in range(repeats + 1):
            for name, times in taken.items():
                pair = workers[asked[name]].ask("forward" if name in FORWARDS_BY else "step")
                if turn:
                    times.append(pair)
        ends = {name: worker.ask("end") for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    seconds, cpu_seconds = (
        {name: statistics.median(pair[place] for pair in pairs) for name, pairs in taken.items()} for place in (0, 1)
    )
    return make_row(case, seconds, cpu_seconds, ends)


def make_row(
    case: Case, seconds: dict[str, float], cpu_seconds: dict[str, float], ends: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """The figures and what follows from them."""
    forwards = FORWARDS * seconds["forward"]
    peaks = {name: end["peak_bytes"] / 1e6 for name, end in ends.items()}
    largest = max(("hosl", "ho-sfl"), key=lambda name: peaks[name])
    return {
        **asdict(case),
        "forward_s": seconds["forward"],
        "hosl_step_s": seconds["hosl"],
        "hosl_midpoint_step_s": seconds["hosl-midpoint"],
        "ho_sfl_step_s": seconds["ho-sfl"],
        "hosl_step_over_forwards": seconds["hosl"] / forwards,
        "ho_sfl_step_over_forwards": seconds["ho-sfl"] / forwards,
        "first_order_step_s": seconds["first-order"],
        "first_order_over_forwards": seconds["first-order"] / seconds["forward"],
        **(
            {"ho_sfl_8_step_s": seconds["ho-sfl-8"], "ho_sfl_8_over_forwards": seconds["ho-sfl-8"] / seconds["forward"]}
            if case.prefix_cached
            else {}
        ),
        "torch_forward_s": seconds["torch-forward"],
        "torch_fo_step_s": seconds["torch-fo"],
        "torch_mezo_step_s": seconds["torch-mezo"],
        "speedup_over_fo": seconds["torch-fo"] / seconds["ho-sfl"],
        "speedup_first_order_over_torch_fo": seconds["torch-fo"] / seconds["first-order"],
        "speedup_over_mezo": seconds["torch-mezo"] / seconds["ho-sfl"],
        "midpoint_speedup_over_fo": seconds["torch-fo"] / seconds["hosl-midpoint"],
        "peak_rss_mb": peaks[largest],
        "floor_rss_mb": ends[largest]["floor_bytes"] / 1e6,
        "torch_fo_peak_rss_mb": peaks["torch-fo"],
        "memory_ratio_to_fo": peaks["torch-fo"] / peaks[largest],
        "hosl_peak_rss_mb": peaks["hosl"],
        "hosl_midpoint_peak_rss_mb": peaks["hosl-midpoint"],
        "ho_sfl_peak_rss_mb": peaks["ho-sfl"],
        "first_order_peak_rss_mb": peaks["first-order"],
        "torch_mezo_peak_rss_mb": peaks["torch-mezo"],
        "idle_rss_mb": ends[largest]["idle_bytes"] / 1e6,
        "cpu_s": cpu_seconds,
    }


def make_data(folder: Path, case: Case) -> None:
    """Texts of `length` words; word n is drawn as often as the n-th word of a natural text."""
    import numpy as np

    generator = np.random.default_rng(0)
    ids = 4 + np.minimum(generator.zipf(1.1, (case.batch, case.length)), VOCABULARY - 5)
    np.save(folder / "ids.npy", ids)
    rows = [{"text": " ".join(f"w{token}" for token in row), "label": n % 2} for n, row in enumerate(ids)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(
    cases: list[Case], repeats: int, folder: Path | None, show: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """All rows, each shown when it is there; shapes share a bundle."""
    rows = []
    for model, split, train in dict.fromkeys((case.model, case.split, case.train) for case in cases):
        group = [case for case in cases if (case.model, case.split, case.train) == (model, split, train)]
        with tempfile.TemporaryDirectory(dir=folder) as name:
            bundle = Path(name)
            (bundle / "case.json").write_text(json.dumps(asdict(group[0])), encoding="utf-8")
            Worker("export", bundle).close()
            for case in group:
                rows.append(measure_case(case, bundle, repeats))
                show(rows[-1])
    return rows


# What the workers do.


def work(method: str, folder: Path) -> None:
    """Answer the parent's lines until it says end; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    case = Case(**json.loads((folder / "case.json").read_text(encoding="utf-8")))
    if method == "export":
        export(case, folder)
        print("null", file=answers)
        return
    # torch's threads spin while they wait, which beside other work costs it many times the computation.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    client: EdgeClient | TorchClient
    client = EdgeClient(method, case, folder) if method in CACHED_ROUNDS else TorchClient(method, case, folder)
    print("null", file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(client, line.strip(), folder / f"{method}.npy")), file=answers)


def answer(client: EdgeClient | TorchClient, question: str, path: Path) -> Any:
    """Seconds of a step or a forward, the file with the activations [T, D], or the bytes at the end."""
    import numpy as np

    watch = Stopwatch()
    if question == "step":
        client.step(watch)
        return watch.seconds, watch.cpu_seconds
    if question == "forward":
        client.forward(watch)
        return watch.seconds / FORWARDS, watch.cpu_seconds / FORWARDS
    if question == "activations":
        np.save(path, client.activations())
        return str(path)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return {"peak_bytes": 1024 * peak, **client.sizes}


class Stopwatch:
    """Adds up the seconds inside its `with` blocks, on the clock and of the processor by all threads."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> None:
        self.seconds -= time.perf_counter()
        self.cpu_seconds -= time.process_time()

    def __exit__(self, *reason: object) -> None:
        self.seconds += time.perf_counter()
        self.cpu_seconds += time.process_time()


class EdgeClient:
    """The device, without its connection: no torch in this process."""

    def __init__(self, method: str, case: Case, folder: Path) -> None:
        import numpy as np

        from hosl_edge.device import Device
        from hosl_edge.model.memory import choose_micro_batch, keep_heap_small, read_memory
        from hosl_edge.settings import EdgeSettings
        from hosl_protocol.run.manifest import load_manifest
        from hosl_protocol.run.updates import update_shape
        from hosl_protocol.wire.messages import Welcome

        keep_heap_small()
        self._settings = run_settings(method, case)
        manifest = load_manifest(folder)
        state = folder / f"state-{case.batch}x{case.length}"
        own = EdgeSettings(
            server="",
            token_file="",
            data=str(folder / "data.jsonl"),
            name=method,
            state_dir=str(state),
            cache_dir="",
            cache_budget="8G" if case.prefix_cached else None,
        )
        self._device = Device(own, folder, manifest)
        shape = update_shape(self._settings, manifest)
        welcome = Welcome(
            run="r", epoch=0, round=0, width=manifest.width, update=shape, settings=self._settings, plan="rebuild"
        )
        idle = 0

        def choose(*arguments: Any) -> int:
            nonlocal idle
            idle = read_memory().resident  # up to here nothing has read the weights
            return choose_micro_batch(*arguments)

        with mock.patch("hosl_edge.model.memory.choose_micro_batch", choose):
            self._device.join(welcome, lambda *_: None)
        if not self._settings.traits.sends_gradient:
            self._device.held_sets = 0  # the least memory; what is held only fills the wait for the cloud
        assert self._device.train is not None
        self._batch = self._device.train.batch(np.arange(case.batch))
        set_bytes = 4 * self._batch.tokens * manifest.width
        floor = idle + touched_bytes(manifest, self._batch.ids_BL) + HOLDS_SETS[method] * set_bytes
        self.sizes = {"idle_bytes": idle, "floor_bytes": floor}
        self._generator = np.random.default_rng(0)
        assert "torch" not in sys.modules

    def forward(self, watch: Stopwatch) -> None:
        """Three forwards of the whole half; nothing is kept of them."""
        shard = self._device.shard
        cache, shard.cache = shard.cache, None
        with watch:
            for _ in range(FORWARDS):
                for _ in shard.forward(self._batch):
                    pass
        shard.cache = cache

    def activations(self) -> npt.NDArray[np.float32]:
        """Of the whole batch."""
        import numpy as np

        shape = self._batch.tokens, self._device.manifest.width
        return self._device.shard.activations(self._batch, np.empty(shape, np.float32))

    def step(self, watch: Stopwatch) -> None:
        """A round and its update."""
        import numpy as np

        from hosl_edge import rounds
        from hosl_protocol.weights.estimates import UpdateRecord

        device = self._device
        assert device.weights is not None
        round_ = device.applied_round + 1
        context = rounds.DeviceRound(
            run="r",
            device=self._settings.algorithm,
            epoch=0,
            round=round_,
            settings=self._settings,
            shard=device.shard,
            weights=device.weights,
            held_sets=device.held_sets,
        )
        sent = self._drive(rounds.PARTS[self._settings.algorithm](context, self._batch), round_, watch)
        # Large enough to be no 0 on the lattice, small enough to move nothing much.
        count, move, codes = self._settings.directions, 1e-5, np.empty(0, np.uint8)
        if sent:
            count, move, codes = sent[0].size, 1e-7, sent[1]
        coefficients = self._generator.choice(np.array([-move, move], np.float32), count)
        update = UpdateRecord(round_, coefficients, 0.0, codes)
        with watch:
            device.weights.apply([update])

    def _drive(self, steps: Step, round_: int, watch: Stopwatch) -> tuple[npt.NDArray[Any], ...]:
        """Lead a round to its end; the scales and codes that it sent, if any."""
        from hosl_edge import rounds

        sent: tuple[npt.NDArray[Any], ...] = ()
        reply = None
        while True:
            try:
                with watch:
                    action = steps.send(reply)
            except StopIteration:
                return sent
            reply = self._reply(action, round_)
            if isinstance(action, rounds.Send) and "codes" in action.tensors:
                sent = action.tensors["scales"], action.tensors["codes"]
            del action  # its activations are sent

    def _reply(self, action: Send | Receive, round_: int) -> Frame | None:
        import numpy as np

        from hosl_edge import rounds
        from hosl_protocol.wire.codec import Frame, encode
        from hosl_protocol.wire.messages import CutGradient, ProbeLoss

        if isinstance(action, rounds.Send):
            # As a session does: piece by piece, so that no second copy of a set exists.
            for piece in encode(action.message, action.tensors, self._settings.wire_dtype):
                assert len(piece) > 0
            return None
        loss = np.array(0.5, np.float32)
        if action.kind is ProbeLoss:
            return Frame(ProbeLoss(run="r", epoch=0, round=round_, direction=0, sign=1), {"loss": loss})
        shape = self._batch.tokens, self._device.manifest.width
        lambda_TD = self._generator.standard_normal(shape, np.float32)
        return Frame(CutGradient(run="r", epoch=0, round=round_), {"lambda": lambda_TD, "loss": loss})


def run_settings(method: str, case: Case) -> RunSettings:
    """As the cloud's Welcome has them."""
    from hosl_protocol.run.settings import RunSettings, convert

    data = {"task": {**as_task(), "name": "reviews"}, "batch_size": case.batch, "max_length": case.length}
    settings: RunSettings = convert({**data, **CACHED_ROUNDS[method]}, RunSettings, method)
    return settings


def as_task() -> dict[str, Any]:
    """Texts as they are."""
    return {
        "kind": "prompt-classification",
        "template": "{text}",
        "labels": ["0", "1"],
        "verbalizers": ["w10", "w11"],
    }


def touched_bytes(manifest: Manifest, ids_BL: npt.NDArray[np.int64]) -> int:
    """Bytes of the weights that a forward reads: of an embedding only its tokens' or positions' rows."""
    import numpy as np

    total = 0
    for entry in manifest.tensors:
        rows = entry.shape[0]
        if entry.lookup:
            rows = np.unique(ids_BL).size
        elif "embed_positions" in entry.name:
            rows = ids_BL.shape[1]
        total += 4 * rows * int(np.prod(entry.shape[1:]))
    return total


class TorchClient:
    """The same half with the same weights in torch. They are memory-mapped: rows that no token uses cost nothing."""

    def __init__(self, method: str, case: Case, folder: Path) -> None:
        import numpy as np
        import torch

        from hosl_export.bundle.reading import fill
        from hosl_export.model.lora import plain_name
        from hosl_export.model.trainable import is_trainable, trained_blocks
        from hosl_export.tensor_files import read_tensors
        from hosl_protocol.run.manifest import SHARD_WEIGHTS

        torch.manual_seed(0)
        self.sizes: dict[str, int] = {}
        with torch.device("meta"):
            half = make_half(case)
        state = read_tensors(folder / SHARD_WEIGHTS)
        fill(half.model, {name: state[plain_name(name)] for name in half.model.state_dict()})
        self._trained: list[torch.nn.Parameter] = []
        for name, parameter in half.model.named_parameters():
            blocks = trained_blocks(case.split, case.train_blocks)
            parameter.requires_grad = is_trainable(plain_name(name), parameter, case.train, half.family, blocks)  # type: ignore[arg-type]
            self._trained += [parameter] if parameter.requires_grad else []
        self._half = half
        self._ids_BL = torch.from_numpy(np.load(folder / "ids.npy"))
        self._optimizer = torch.optim.SGD(self._trained, lr=1e-7)
        self._rounds = 0
        self.step = self._step_first_order if method == "torch-fo" else self._step_mezo

    def activations(self) -> npt.NDArray[np.float32]:
        """Of the whole batch."""
        import torch

        with torch.no_grad():
            values: npt.NDArray[np.float32] = self._half(self._ids_BL).flatten(0, 1).numpy()
        return values

    def forward(self, watch: Stopwatch) -> None:
        """Three forwards; nothing is kept of them."""
        import torch

        with watch, torch.inference_mode():
            for _ in range(FORWARDS):
                self._half(self._ids_BL)

    def _step_first_order(self, watch: Stopwatch) -> None:
        """Forward, backward from λ and SGD."""
        import torch

        with watch:
            h_BLD = self._half(self._ids_BL)
        lambda_BLD = torch.randn(h_BLD.shape)
        with watch:
            h_BLD.backward(lambda_BLD)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def _step_mezo(self, watch: Stopwatch) -> None:
        """MeZO's step, with the clean forward that split learning adds."""
        import torch

        self._rounds += 1
        with watch, torch.inference_mode():
            for move in (1e-3, -2e-3, 1e-3):
                self._add_normals(move)
                self._half(self._ids_BL)
            self._add_normals(-1e-7)

    def _add_normals(self, factor: float) -> None:
        import torch

        torch.manual_seed(self._rounds)
        for parameter in self._trained:
            parameter.data.add_(torch.normal(0.0, 1.0, parameter.shape), alpha=factor)


def family_of(model: str) -> str:
    """Hugging Face's name of a geometry's architecture."""
    return "llama" if model in LLAMAS else "opt"


def make_half(case: Case) -> ClientHalf:
    """The first blocks, with adapters where they train; no further block is made."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from hosl_export.model.halves import client_half
    from hosl_export.model.lora import inject_lora

    sizes = {"num_hidden_layers": case.split, "vocab_size": VOCABULARY, **GEOMETRIES[case.model]}
    config = AutoConfig.for_model(family_of(case.model), max_position_embeddings=2048, **sizes)
    half = client_half(AutoModelForCausalLM.from_config(config), case.split)
    lora = lora_entry(case)
    if lora is not None:
        inject_lora(half, lora, half.family, seed=0)
    return half


def lora_entry(case: Case) -> Any:
    """As the exporter chooses it."""
    from hosl_export.model.families import find_family
    from hosl_protocol.run.manifest import LoraEntry

    return LoraEntry(targets=find_family(family_of(case.model)).lora_targets) if case.train == "lora" else None


def export(case: Case, folder: Path) -> None:
    """What a device needs of a bundle, without a tail; the tokenizer has as many words as the model."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    from hosl_export.bundle import writing as bundle
    from hosl_export.bundle.gradients import shown_blocks, write_gradients
    from hosl_export.model.trainable import plain_parameters, put_on_lattice, trained_blocks
    from hosl_export.tensor_files import write_tensors
    from hosl_protocol.run.manifest import SHARD_TOKENIZER, SHARD_WEIGHTS, Manifest, PrefixEntry

    torch.manual_seed(0)
    half = make_half(case)
    trained = trained_blocks(case.split, case.train_blocks)
    tensors, _ = put_on_lattice(half, case.train, trained)  # type: ignore[arg-type]
    width = half.model.config.hidden_size
    prefix = PrefixEntry(blocks=trained.start, width=width) if trained.start > 0 else None
    bundle.write_shard_graphs(folder, half, tensors, prefix, shown=shown_blocks(half, tensors, prefix))
    gradients = write_gradients(folder, half, tensors, prefix)
    write_tensors(folder / SHARD_WEIGHTS, plain_parameters(half))
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, **{f"w{n}": n for n in range(4, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / SHARD_TOKENIZER))
    manifest = Manifest(
        model=case.model,
        family=family_of(case.model),
        architecture=type(half.model).__name__,
        split=case.split,
        blocks=case.split,
        width=width,
        max_length=2048,
        pad_token_id=1,
        train=case.train,  # type: ignore[arg-type]
        lora=lora_entry(case),
        inputs=("input_ids",),
        tensors=tensors,
        files=bundle.describe_files(folder),
        prefix=prefix,
        gradients=gradients,
    )
    bundle.write_manifest(folder, manifest)


# The command.


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(GEOMETRIES))
    parser.add_argument("--splits", nargs="+", type=int)
    parser.add_argument("--trains", nargs="+", choices=("lora", "norm", "blocks", "all"))
    parser.add_argument("--train-blocks", type=int, metavar="N", help="as of hosl-export")
    parser.add_argument(
        "--prefix-cached", action="store_true", help="with hosl-edge --cache-budget, from the second epoch on"
    )
    parser.add_argument("--shapes", nargs="+", type=as_shape, metavar="BATCHxLENGTH")
    parser.add_argument("--all", action="store_true", help="every model, split, --train and shape (an hour and more)")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where bundles go for the time (up to 2 GB)")
    parser.add_argument("--json", action="store_true", help="print the rows as a list")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.folder)
        return
    if not options.json:
        print(describe_machine(options.repeats))
        print(heading())
    show = (lambda row: None) if options.json else (lambda row: print(describe(row), flush=True))
    rows = measure(choose_cases(options), options.repeats, options.folder, show)
    if options.json:
        print(json.dumps(rows))


def as_shape(text: str) -> tuple[int, int]:
    """`16x128` as (16, 128)."""
    batch, _, length = text.partition("x")
    return int(batch), int(length)


def describe_machine(repeats: int) -> str:
    """Machine, versions and work."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("hosl", "onnxruntime", "numpy", "torch"))
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {versions}\n"
        f"seconds of a step, median of {repeats}; peak resident MB; HOSL Q = 1 (and its midpoint), HO-SFL P = 2;\n"
        "/fwd: a step over 3 forwards; xFO, xMeZO: how many times faster HO-SFL is, mid xFO: HOSL's midpoint;\n"
        "exact: first-order rounds, over one forward, and how many times faster than FO, torch's first-order client"
    )


def heading() -> str:
    """Names of the columns."""
    return (
        f"{'model':<13}{'split':>6}{'train':>8}{'shape':>9}{'forward':>9}{'HOSL':>8}{'mid':>8}{'HO-SFL':>8}{'exact':>8}"
        f"{'FO':>8}{'MeZO':>8}{'HOSL/fwd':>10}{'HO-SFL/fwd':>12}{'xFO':>6}{'xMeZO':>7}{'mid xFO':>9}"
        f"{'exact/fwd':>11}{'exact xFO':>11}{'peak':>7}{'floor':>7}{'exact':>7}{'FO':>7}{'MeZO':>7}{'FO/own':>7}"
    )


def describe(row: dict[str, Any]) -> str:
    """A row of the table."""
    steps = [f"{name}_step_s" for name in ("hosl", "hosl_midpoint", "ho_sfl", "first_order", "torch_fo", "torch_mezo")]
    peaks = ("peak", "floor", "first_order_peak", "torch_fo_peak", "torch_mezo_peak")
    sizes = [f"{name}_rss_mb" for name in peaks]
    return (
        f"{row['model']:<13}{row['split']:>6}{row['train']:>8}{row['batch']:>4} x{row['length']:>3}"
        f"{row['forward_s']:>9.3f}{''.join(f'{row[name]:>8.3f}' for name in steps)}"
        f"{row['hosl_step_over_forwards']:>10.2f}{row['ho_sfl_step_over_forwards']:>12.2f}"
        f"{row['speedup_over_fo']:>6.2f}{row['speedup_over_mezo']:>7.2f}{row['midpoint_speedup_over_fo']:>9.2f}"
        f"{row['first_order_over_forwards']:>11.2f}{row['speedup_first_order_over_torch_fo']:>11.2f}"
        f"{''.join(f'{row[name]:>7.0f}' for name in sizes)}{row['memory_ratio_to_fo']:>7.1f}"
    )


if __name__ == "__main__":
    main()
