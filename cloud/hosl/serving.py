"""`hosl.serve`: the service in the background, for real devices, with one run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hosl.bundles import Bundle, as_bundle
from hosl.extras import needs
from hosl.given import TaskSettings, read_given
from hosl.leading import Leader, elsewhere, say
from hosl.rounds import Round
from hosl.runs import Run
from hosl_cloud.exceptions import ApiError
from hosl_cloud.sentences import device_command
from hosl_cloud.storage.data_folder import BUNDLES, make_data_dir
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import check_files

if TYPE_CHECKING:
    from hosl_cloud.service.access import DeviceTokens


@dataclass
class Places:
    """Where a service is, once it listens."""

    address: str = ""
    """As this machine reaches it."""
    public_address: str = ""
    """As devices on other machines do."""
    token_path: Path = field(default_factory=Path)
    """The file with the join token."""
    tokens: DeviceTokens | None = None


class ServedRun(Run):
    """A run with real devices, which goes on whether somebody goes through it or not.

    As a context manager it stops at the end of the block; `stop` does it by hand.
    """

    _places: Places
    _ends_with_loop = False

    @property
    def address(self) -> str:
        """What devices on other machines are told: `wss://host:port`."""
        return self._places.public_address

    @property
    def page(self) -> str:
        """The status page, which asks for the token in the file `admin-token` of `data_dir`."""
        return self._places.public_address.replace("ws", "http", 1) + "/"

    @property
    def device_command(self) -> str:
        """What to type on this machine to start a device, with its own data in the place of FILE."""
        return device_command(self._places.address, self._places.token_path, self.settings.task)

    def add_device(self, name: str, out: str | os.PathLike[str] | None = None) -> str:
        """Make a device's own token, in a file NAME.token or `out`; what to type on the device, beside that file.

        Raises ApiError where the name has a token, and FileExistsError where the file is there.
        """
        path = Path(f"{name}.token" if out is None else out)
        tokens = self._places.tokens
        assert tokens is not None
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            try:
                file.write(elsewhere(lambda: tokens.add(name)) + "\n")
            except BaseException:
                path.unlink()
                raise
        return device_command(self.address, Path(path.name), self.settings.task)

    def __repr__(self) -> str:
        where = "" if self._leader.is_over else f"; it listens on {self.address}"
        return f"<hosl.ServedRun {self.id}: {self._status()}{where}>"


def serve(
    bundle: Bundle | str | os.PathLike[str],
    *,
    task: TaskSettings | None = None,
    config: str | os.PathLike[str] | None = None,
    devices: int | Mapping[str, Any] = 1,
    host: str = "127.0.0.1",
    port: int = 8765,
    tls_cert: str | os.PathLike[str] | None = None,
    tls_key: str | os.PathLike[str] | None = None,
    insecure: bool = False,
    callback: Callable[[Round], object] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> ServedRun:
    """Serve a run for real devices from a thread of this process; the run begins when enough devices are there.

    `task`, `config`, `devices` (how many it begins with) and `settings` are those of `simulate`. `host`, `port` (0: a
    free one) and the rest of its line are those of `hosl-cloud serve`: beyond this machine it needs a `data_dir` in
    which `hosl-cloud init` has made a certificate, or another one, or `insecure`. In a `data_dir` a run of the
    same settings that was cut off goes on; without one the folder is temporary, and gone with the run.

    It returns when the service listens. With `callback` it first waits for the end, and calls that with each round.
    Raises SettingsError, BundleError and ServiceError.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `simulate`
    bundle = as_bundle(bundle)
    run_config = read_given("hosl.serve", bundle.manifest, task=task, config=config, devices=devices, settings=settings)
    if run_config.baseline:
        raise SettingsError("baseline", run_config.baseline, "baselines are for hosl.simulate: leave it out")
    check_files(bundle.path, bundle.manifest)
    with needs("hosl.serve", "cloud"):
        from hosl_cloud.service.listen import ListenSettings, write_service_file
        from hosl_cloud.service.opening import ahead_of, choose_first, open_service
        from hosl_cloud.service.server import Service
        from hosl_cloud.service.server import serve as serve_devices

    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="hosl-run-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        home = folder / "data" if data_dir is None else Path(data_dir)

        cert, key = (None if path is None else Path(path) for path in (tls_cert, tls_key))
        listen = ListenSettings(host, port, cert, key)
        if not insecure:
            listen = listen.with_authority(home)
        listen.check(insecure=insecure)
        make_data_dir(home)
        places = Places()

        def work(leader: Leader) -> str | None:
            with open_service(home, listen, say) as opened:
                run = choose_first(opened.runs, bundle.path, bundle.manifest, run_config)
                if run is None:
                    remedy = "a run of these settings is completed there: choose another data_dir, or another seed"
                    raise SettingsError("data_dir", str(home), remedy)
                leader.run = run
                opened.runs.listeners.append(leader.hear)
                is_first = not ahead_of(opened.runs.store, run)
                places.token_path, places.tokens = opened.token_path, opened.authenticator.access
                service = Service(opened.runs, opened.authenticator, listen, home / BUNDLES, run, run)

                def on_listening(address: str) -> None:
                    write_service_file(home, listen, address)
                    places.address = address
                    places.public_address = listen.public_address(urlsplit(address).port or 0)
                    leader.ready(stop)

                async def stop() -> None:
                    with contextlib.suppress(ApiError):  # it has ended meanwhile
                        await opened.runs.stop(run)

                async def main() -> str | None:
                    if is_first:
                        await opened.runs.open(run)  # before anybody can come
                    return await serve_devices(service, on_listening, asyncio.Event())

                return leader.run_loop(main)

        leader = Leader(work, run_config.task, is_paced=False)
        leader.start()
        stack.pop_all()

    served = ServedRun(leader, bundle, run_config, home, folder)
    served._places = places
    if callback is not None:
        served.call_back(callback)
    return served
