"""What an estimate would gain from directions of another shape.

python examples/study/shapes.py examples/study/settings/shift-images.toml --data DIR --tasks darken blur --known clean

An estimate of P directions is Σ_p ⟨g, s ⊙ z_p⟩ s ⊙ z_p, with random signs z_p, a scale s of every number, and the
gradient g of a batch as torch computes it: what a device measures, without the rounding and the finite step, which
estimator.py finds to be small. Shapes of directions, by the mean cosine of estimate and gradient:

- even: s = 1, what ships;
- by blocks: each direction moves its own share of the tensors, all others stand still;
- tensor, known: s is a tensor's root mean squared gradient on data that an export could have, which --known names:
  `clean`, the task's data without its shift, or another task of the settings;
- number, known: s is that of each number, and a tenth of its tensor's;
- number, own: from other batches of the device's own data; it bounds what any scale could bring, since a device that
  could compute it would have no need of estimates.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
from estimator import Table, make_parser, open_site
from msgspec import structs
from plan import Cell, Study, TaskEntry, merge, read_study
from sources import export_bundle, prepare_data

from hosl_protocol.run.manifest import load_manifest

COLUMNS = ("task", "split", "trains", "trained", "directions", "shape", "cosine")
GROUPS = (8, 32)
BATCHES, DRAWS = 6, 20
Gradients = np.ndarray
"""[BATCHES, d_c]."""


def gradients(
    study: Study, task: TaskEntry, name: str, split: int, train: str, options: argparse.Namespace
) -> Gradients:
    """Of the first batches of a task's training data, at the weights where training begins."""
    bundle = export_bundle(study, split, train, options.data, options.work)
    run = merge(study.run, task.run, {"batch_size": options.batch})
    data, _ = prepare_data(task, Cell(name, split, "", "", 0, run), options.data, options.work)
    sites = (open_site(bundle, data, run, place) for place in range(BATCHES))
    return np.stack([site.gradient for site in sites])


def scales(seen: Gradients, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Root mean squares [d_c]: of the number's tensor, and of the number itself with a tenth of its tensor's."""
    parts = np.split(seen, np.cumsum(sizes)[:-1], axis=1)
    tensor = np.concatenate([np.full(part.shape[1], np.sqrt(np.mean(part**2))) for part in parts])
    return tensor, np.sqrt(np.mean(seen**2, axis=0)) + 0.1 * tensor


def measure(own: Gradients, known: Gradients, sizes: list[int]) -> Iterator[dict[str, float | str]]:
    """Mean cosines of each shape over batches and draws."""
    by_tensor, by_number = scales(known, sizes)
    by_others = [scales(np.delete(own, batch, axis=0), sizes)[1] for batch in range(BATCHES)]
    for size in GROUPS:
        share = np.concatenate([np.full(count, size * place // len(sizes)) for place, count in enumerate(sizes)])
        of_blocks = (share == np.arange(size)[:, None]).astype(float)
        shapes: dict[str, Sequence[float | np.ndarray]] = {
            "even": [1.0] * BATCHES,
            "by blocks": [of_blocks] * BATCHES,
            "tensor, known": [by_tensor] * BATCHES,
            "number, known": [by_number] * BATCHES,
            "number, own": by_others,
        }
        for name, shape in shapes.items():
            yield {"directions": size, "shape": name, "cosine": _cosine(own, size, shape)}


def _cosine(own: Gradients, size: int, scale_of: Sequence[float | np.ndarray]) -> float:
    """`scale_of` each batch: of every number alike, of each [d_c], or of each in every direction [P, d_c]."""
    random, cosines = np.random.default_rng(0), []
    for gradient, scale in zip(own, scale_of, strict=True):
        for _ in range(DRAWS):
            directions = scale * random.choice([-1.0, 1.0], (size, gradient.size))
            estimate = directions @ gradient @ directions
            cosines.append(estimate @ gradient / (np.linalg.norm(estimate) * np.linalg.norm(gradient)))
    return float(np.mean(cosines))


def main() -> None:
    """Measure the tasks that are named."""
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", required=True, help="of the settings")
    parser.add_argument("--known", default="clean", help="data that scales are taken from (default: %(default)s)")
    parser.add_argument("--train", default="norm", help="as a method of the settings has it (default: %(default)s)")
    parser.add_argument("--split", type=int, help="of the settings (default: the first)")
    options = parser.parse_args()
    study = read_study(options.settings)
    split = options.split or study.splits[0]
    options.results.mkdir(parents=True, exist_ok=True)
    table = Table(options.results / f"{options.settings.stem}-shapes.csv", COLUMNS)
    for name in options.tasks:
        task = study.tasks[name]
        other = structs.replace(task, shift="") if options.known == "clean" else study.tasks[options.known]
        own = gradients(study, task, name, split, options.train, options)
        known = gradients(study, other, options.known, split, options.train, options)
        manifest = load_manifest(export_bundle(study, split, options.train, options.data, options.work))
        sizes = [int(np.prod(entry.shape)) for entry in manifest.trainable]
        facts = {"task": name, "split": split, "trains": options.train, "trained": sum(sizes)}
        table.write(facts | row for row in measure(own, known, sizes))
    print(f"the table is {table.path}")


if __name__ == "__main__":
    main()
