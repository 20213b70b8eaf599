"""A new simulated run in a data folder, which is locked and open as long as the run goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from hosl_cloud.runs.run import Run
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.data_folder import DATABASE, lock, make_data_dir, new_run_id, run_folder
from hosl_cloud.storage.store import Store
from hosl_protocol.run.manifest import Manifest, check_files


@contextlib.contextmanager
def new_simulated_run(data_dir: Path, bundle: Path, manifest: Manifest, config: RunConfig) -> Iterator[Run]:
    """Store a new run, with settings that are checked; what it needs is there within.

    Raises BundleError for damaged files, and ServiceError where a service uses the folder. Slow, off the event loop.
    """
    make_data_dir(data_dir)
    check_files(bundle, manifest)
    # The lock before the store: a service may be writing to it.
    with contextlib.closing(lock(data_dir)), contextlib.closing(Store(data_dir / DATABASE)) as store:
        id_, bundle = new_run_id(config.name, store), bundle.resolve()
        run = Run(id_, config, manifest, bundle, run_folder(data_dir, id_), store)
        store.create_run(id_, bundle, manifest.shard_digest, config, "simulate")
        yield run
