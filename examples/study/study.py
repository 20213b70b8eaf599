"""What hybrid-order training is worth: methods x tasks x splits x seeds, through `hosl-cloud simulate`.

python examples/study/study.py examples/study/settings/minilm.toml --data DIR

It tunes on training data, runs what is missing, and writes a table, curves and a report. Stop it at any time.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from cells import Workshop, choose, run_cells
from msgspec import structs
from plan import Cell, read_study, study_cells, timing_cells, tuning_cells, untried_rates
from report import write_results

HERE = Path(__file__).parent


def main() -> None:
    """Tune, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, nargs="+", help="what to study: settings/*.toml")
    parser.add_argument("--data", type=Path, required=True, help="folder with the tasks' data, one folder a task")
    parser.add_argument("--model", help="another model than the settings': a hub id, a folder, a .gguf file")
    parser.add_argument("--splits", type=int, nargs="+", help="other splits than the settings'")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="models, bundles, runs (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="tables and curves (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: one a core)")
    parser.add_argument("--threads", type=int, help="of each run (default: the cores, divided among --jobs)")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="only runs whose name holds one of these"
    )
    parser.add_argument("--time", action="store_true", help="also time a few rounds of each method, one run at a time")
    parser.add_argument("--report", action="store_true", help="only write the report of what has run")
    options = parser.parse_args()
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
    for path in options.settings:
        study = read_study(path)
        name = path.stem if options.model is None else f"{path.stem}-{Path(options.model).stem.lower()}"
        study = structs.replace(study, model=options.model or study.model, splits=options.splits or study.splits)
        shop = Workshop(study, name, options.data, options.work, options.jobs, threads)
        for line in untried_rates(shop.study):
            print(f"{name}: {line}")
        tuned = tuning_cells(shop.study)
        if not options.report:
            run_cells(shop, wanted(tuned, options.only))
        cells = study_cells(shop.study, choose(shop, tuned))
        timing = timing_cells(shop.study, cells)
        if not options.report:
            run_cells(shop, wanted(cells, options.only))
        if options.time:
            run_cells(
                replace(shop, jobs=1, threads=options.threads or os.cpu_count() or 1), wanted(timing, options.only)
            )
        write_results(shop, tuned, cells, timing, options.results)


def wanted(cells: list[Cell], texts: list[str]) -> list[Cell]:
    """Cells whose name holds one of the texts."""
    return [cell for cell in cells if any(text in cell.name for text in texts)]


if __name__ == "__main__":
    main()
