"""`hosl.simulate`: a run on data at hand, with devices that are all in this process."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hosl.bundles import Bundle, as_bundle
from hosl.data import Data, DataFile, named
from hosl.extras import needs
from hosl.given import TaskSettings, read_given
from hosl.leading import Leader, say
from hosl.rounds import Round
from hosl.runs import Run

if TYPE_CHECKING:
    from hosl_cloud.runs.run import Ending


def simulate(
    bundle: Bundle | str | os.PathLike[str],
    data: Data,
    *,
    eval: Data | None = None,
    task: TaskSettings | None = None,
    config: str | os.PathLike[str] | None = None,
    devices: int | Mapping[str, Any] = 1,
    partition: str = "iid",
    threads: int = 0,
    skip_broken: bool = False,
    callback: Callable[[Round], object] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Run:
    """Train on `data`, dealt out to virtual devices, and score the held-out data `eval`.

    `task` is a preset's name, or a dict of the settings of `[task]`; `settings` are all others of run.toml, tables as
    dicts: `rounds=50, tail={"learning_rate": 3e-4}`. They go over a file `config`. `devices` is a number, or the table.
    `partition` deals the data out: "iid" or "dirichlet:0.5".

    It returns when everything is loaded; rounds are made as they are asked for. With `callback` it trains to the end
    first, and calls that with each round. Without `data_dir` the run's folder is temporary, and gone with the run.
    Raises SettingsError, DataError and BundleError.
    """
    # OpenMP threads that spin while they wait take the cores from the devices' forwards; read at torch's import.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    bundle = as_bundle(bundle)
    given = read_given("hosl.simulate", bundle.manifest, task=task, config=config, devices=devices, settings=settings)
    with needs("hosl.simulate", "cloud"):
        from hosl_cloud.simulation.baselines import prepare_config
        from hosl_cloud.simulation.opening import new_simulated_run
        from hosl_cloud.simulation.partition import Partition
        from hosl_cloud.simulation.virtual_devices import check_fleet
        from hosl_cloud.simulation.virtual_devices import simulate as train

    run_config, parts = prepare_config(given), Partition.parse(partition)
    check_fleet(run_config)

    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="hosl-run-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        examples = DataFile("data", data, run_config.task, bundle.manifest, folder)
        held_out = None if eval is None else DataFile("eval", eval, run_config.task, bundle.manifest, folder)
        home = folder / "data" if data_dir is None else Path(data_dir)

        def work(leader: Leader) -> str:
            with (
                named(examples, held_out),
                new_simulated_run(home, bundle.path, bundle.manifest, run_config) as run,
            ):
                leader.run = run.id
                run.listeners.append(leader.hear)

                def main() -> Coroutine[Any, Any, Ending]:
                    return train(
                        run,
                        examples.path,
                        None if held_out is None else held_out.path,
                        parts,
                        threads or len(os.sched_getaffinity(0)),
                        say,
                        skip_broken=skip_broken,
                        on_loaded=lambda coordinator: leader.ready(coordinator.request_stop),
                        pace=leader.pace,
                    )

                return leader.run_loop(main)

        leader = Leader(work, run_config.task, is_paced=True)
        leader.start()
        stack.pop_all()

    run = Run(leader, bundle, run_config, home, folder)
    if callback is not None:
        run.call_back(callback)
    return run
