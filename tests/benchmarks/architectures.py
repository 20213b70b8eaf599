"""Which architectures of transformers hosl can cut: each is built tiny with random weights, exported and checked.

python tests/benchmarks/architectures.py            # all of them, half an hour and more
python tests/benchmarks/architectures.py llama lfm2 # some
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
from hosl_export import ExportSettings, export_bundle
from hosl_export.exceptions import ParityError, TraceError, UnknownFamily, first_line
from hosl_export.model.families import FAMILIES, find_family
from hosl_protocol.exceptions import HoslError
from tiny import VOCABULARY, make_tokenizer

BLOCKS, SPLIT = 4, 2
LIMIT_S = 240
MOST_NUMBERS = 20_000_000

_WIDTHS = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "word_embed_proj_dim", "embedding_size")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "hidden_dim", "mlp_dim")
_EXPERT = ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size")
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
SMALL: dict[str, int] = {
    **dict.fromkeys(_WIDTHS, 32),
    **dict.fromkeys(_INNER, 48),
    **dict.fromkeys(_EXPERT, 16),
    **dict.fromkeys(_DEPTHS, BLOCKS),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_POSITIONS, 64),
    **{"num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "rotary_dim": 8},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "first_k_dense_replace": 1},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "sliding_window": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
"""What makes a model tiny, where its config has a field of the name."""


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture."""

    architecture: str
    kind: str
    """`causal` or `encoder`."""
    outcome: str
    """`exported`, `refused`, `failed`, or `not built`: transformers made no tiny model of it."""
    entry: str
    """`own` or `general`."""
    detail: str
    """The largest difference, or the reason."""


def main() -> None:
    """Try each, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", help="as transformers names them (default: all)")
    parser.add_argument("--train", default="norm", help="as hosl-export has it (default: %(default)s)")
    parser.add_argument("--no-gradients", action="store_true", help="leave out the gradients' graphs and their check")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(1)

    outcomes = []
    for kind, names in kinds().items():
        for name in names:
            if options.architectures and name not in options.architectures:
                continue
            outcomes.append(alone(attempt, name, kind, options.train, not options.no_gradients))
            print(json.dumps(asdict(outcomes[-1])) if options.json else row(outcomes[-1]), flush=True)
    if not options.json:
        counts = Counter(outcome.outcome for outcome in outcomes)
        print(f"{len(outcomes)} architectures:", ", ".join(f"{count} {name}" for name, count in counts.items()))


def kinds() -> dict[str, list[str]]:
    """Architectures by kind."""
    masked, classified = (
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        set(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    )
    return {
        "causal": sorted(set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(masked)),
        "encoder": sorted(set(masked) & classified),
    }


def row(outcome: Outcome) -> str:
    """A line of the table."""
    return f"| {outcome.architecture} | {outcome.kind} | {outcome.outcome} | {outcome.entry} | {outcome.detail} |"


def alone(work: Callable[..., Outcome], name: str, kind: str, *rest: object) -> Outcome:
    """Do it in a process of its own, which may run out of memory or crash without the others."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(work(name, kind, *rest)))
    child.start()
    sender.close()
    try:
        outcome: Outcome = receiver.recv()
    except EOFError:
        child.join()
        outcome = Outcome(name, kind, "failed", "", f"the process ended with {child.exitcode}")
    child.join()
    return outcome


def attempt(name: str, kind: str, train: str, gradients: bool) -> Outcome:
    """Build one, export it, and say what came of it."""
    entry = "own" if name in FAMILIES else "general"
    folder = Path(tempfile.mkdtemp(prefix="hosl-architecture-"))
    try:
        with quiet(), limited(), contextlib.redirect_stdout(io.StringIO()):
            try:
                find_family(name)
            except UnknownFamily as error:
                return Outcome(name, kind, "refused", "none", error.reason)
            try:
                save_tiny(name, kind, folder / "model")
            except Exception as error:
                return Outcome(name, kind, "not built", entry, f"{type(error).__name__}: {first_line(error)}")
            settings = ExportSettings(
                model=str(folder / "model"), split=SPLIT, out=folder / "bundle", train=train, gradients=gradients
            )
            summary = export_bundle(settings)
        return Outcome(name, kind, "exported", entry, f"{summary.parity_error:.0e}")
    except (ParityError, TraceError, HoslError) as error:
        return Outcome(name, kind, "refused", entry, first_line(error))
    except Exception as error:
        return Outcome(name, kind, "failed", entry, f"{type(error).__name__}: {first_line(error)}")
    finally:
        shutil.rmtree(folder)


def save_tiny(name: str, kind: str, folder: Path) -> None:
    """Write a tiny model with random weights, and a tokenizer."""
    config = tiny_config(name)
    auto = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModel
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in auto.from_config(copy.deepcopy(config)).parameters())
    if numbers > MOST_NUMBERS:
        raise ValueError(f"its config stays large: {numbers:,} numbers")
    torch.manual_seed(0)
    model = auto.from_config(config).float().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def tiny_config(name: str) -> Any:
    """The architecture's own default, with all sizes made small."""
    kind = CONFIG_MAPPING[name]
    names = set(kind().to_dict()) | set(kind.attribute_map)
    small = {field: value for field, value in SMALL.items() if field in names}
    for field, other in kind.attribute_map.items():
        if other in small:
            small.pop(field, None)
    return kind(**small)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what the libraries say."""
    transformers.utils.logging.set_verbosity_error()
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise TimeoutError after LIMIT_S."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {LIMIT_S} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    main()
