"""The files that operators take: what they name exists, and systemd is told what it waits for."""

from __future__ import annotations

import asyncio
import configparser
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import prometheus_client
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from hosl_cloud import metrics
from hosl_cloud.__main__ import main
from hosl_cloud.runs.queue import GOODBYE_S
from hosl_cloud.service.secrets import METRICS_TOKEN_FILE
from hosl_cloud.settings import DeviceSettings
from hosl_protocol.program.notify import feed_watchdog, notify
from services import Service, serving
from speaking import client, get
from support import ROOT, TASK

CLOUD = ROOT / "cloud"
OF_THE_SPECIFICATION = {
    "hosl_build_info": {"version"},
    "hosl_runs": {"state"},
    "hosl_rounds_total": {"bundle"},
    "hosl_round_duration_seconds": {"bundle"},
    "hosl_train_loss": {"bundle"},
    "hosl_eval_accuracy": {"bundle"},
    "hosl_eval_right": {"bundle"},
    "hosl_eval_scored": {"bundle"},
    "hosl_eval_macro_f1": {"bundle"},
    "hosl_eval_perplexity": {"bundle"},
    "hosl_eval_class_accuracy": {"bundle", "class"},
    "hosl_devices_connected": {"bundle"},
    "hosl_device_reconnects_total": {"bundle"},
    "hosl_wire_bytes_total": {"direction", "kind"},
    "hosl_catchup_rounds": {"bundle"},
    "hosl_checkpoint_last_success_timestamp_seconds": {"bundle"},
    "hosl_auth_failures_total": {"reason"},
    "hosl_edge_peak_rss_bytes": {"bundle"},
}
"""What others build on: names and labels."""


def names_and_labels() -> dict[str, set[str]]:
    """Every figure of ours as Prometheus calls it."""
    found: dict[str, set[str]] = {}
    for metric in vars(metrics).values():
        if isinstance(metric, prometheus_client.metrics.MetricWrapperBase):
            suffix = "_total" if metric._type == "counter" else ""
            found[metric._name + suffix] = set(metric._labelnames)
    return found


def test_the_figures_have_the_names_and_labels_that_others_build_on() -> None:
    known = names_and_labels()
    assert {name: known.get(name) for name in OF_THE_SPECIFICATION} == OF_THE_SPECIFICATION
    assert set().union(*known.values()) == {"version", "state", "bundle", "class", "direction", "kind", "reason"}


def expressions() -> Iterator[str]:
    for panel in json.loads((CLOUD / "grafana" / "dashboard.json").read_text(encoding="utf-8"))["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for group in yaml.safe_load((CLOUD / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def test_the_dashboard_and_the_alerts_name_figures_and_labels_that_there_are() -> None:
    known = names_and_labels()
    for expression in expressions():
        used = re.findall(r"(hosl_\w+?)(?:_bucket)?\b(?:\{([^}]*)\})?", expression)
        assert used or "up{" in expression
        for name, matchers in used:
            assert name in known, expression
            labels = set(re.findall(r"(\w+)=", matchers))
            assert labels <= known[name] | {"instance"}, expression
        for grouped in re.findall(r"by \(([^)]*)\)", expression):
            labels = set(re.findall(r"\w+", grouped))
            assert labels <= set().union(*(known[name] for name, _ in used)) | {"instance", "le"}, expression


def test_every_figure_of_a_run_is_on_the_dashboard() -> None:
    shown = " ".join(expressions())
    assert [name for name in OF_THE_SPECIFICATION if name not in shown] == []


def test_compose_gives_prometheus_the_files_that_the_service_writes() -> None:
    compose = yaml.safe_load((CLOUD / "compose.yaml").read_text(encoding="utf-8"))
    scrape = yaml.safe_load((CLOUD / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"][0]
    data = Path("/data/hosl-cloud")
    assert scrape["authorization"]["credentials_file"] == str(data / METRICS_TOKEN_FILE)
    assert scrape["tls_config"]["ca_file"] == str(data / "tls" / "ca.pem")
    services = compose["services"]
    assert services["prometheus"]["user"] in (CLOUD / "Containerfile").read_text(encoding="utf-8")
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert (CLOUD / source).exists() if source.startswith(".") else source in compose["volumes"]


def test_the_image_is_built_from_what_its_file_copies(tmp_path: Path) -> None:
    """As its build does it: from the files that .containerignore lets through, and no others."""
    pytest.importorskip("hatchling")
    let_through = {line[1:] for line in (ROOT / ".containerignore").read_text().splitlines() if line.startswith("!")}
    lines = (CLOUD / "Containerfile").read_text(encoding="utf-8").splitlines()
    copied = {name for line in lines if re.match("COPY [^-]", line) for name in line.split()[1:-1]}
    assert copied == let_through
    for name in copied:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    offline = {**os.environ, "PIP_NO_INDEX": "1", "npm_config_offline": "true"}
    build = [sys.executable, "-m", "hatchling", "build", "-d", tmp_path / "dist", "-t", "wheel"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True, env=offline)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        assert {"hosl_cloud/__main__.py", "hosl_cloud/hosl-cloud.service"} <= set(wheel.namelist())


def test_the_unit_names_where_the_program_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unit"]) == 0
    assert f"ExecStart={sys.prefix}/bin/hosl-cloud serve " in capsys.readouterr().out


def test_systemd_gives_the_service_the_time_that_a_drain_may_take() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(CLOUD / "hosl_cloud" / "hosl-cloud.service")
    drain_s = 2 * DeviceSettings().round_deadline_s + GOODBYE_S
    assert float(unit["Service"]["TimeoutStopSec"]) > drain_s
    assert unit["Service"]["Type"] == "notify"


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5.0)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def test_the_watchdog_is_fed_twice_in_its_time_while_all_is_well(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "40000")

    def fed(is_well: bool) -> int:
        async def some_time() -> None:
            feeding = asyncio.create_task(feed_watchdog(lambda: is_well))
            await asyncio.sleep(0.11)
            feeding.cancel()

        asyncio.run(some_time())
        systemd.setblocking(False)
        count = 0
        while True:
            try:
                assert systemd.recv(100) == b"WATCHDOG=1"
            except BlockingIOError:
                return count
            count += 1

    assert fed(True) >= 2
    assert fed(False) == 0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert fed(True) == 0, "the watchdog waits for another process"


def test_nobody_who_listens_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for address in ("", str(tmp_path / "absent"), "@absent"):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        notify("READY=1")


Ask = Callable[..., Awaitable[tuple[int, bytes]]]


def test_a_service_tells_systemd_and_prometheus_and_its_metrics_token_opens_nothing_else(
    export_bundle: Callable[..., Path], tiny_model: Path, tmp_path: Path, systemd: socket.socket
) -> None:
    settings = {"batch_size": 4, "max_length": 16, "devices": {"start_with": 2}, "rounds": 10**6}
    bundle = export_bundle(tiny_model, "lora", 2)

    async def talk(service: Service) -> str:
        assert systemd.recv(100) == b"READY=1"
        token = {"Authorization": f"Bearer {service.metrics_token}"}
        for path, status in (("/metrics", 200), ("/v1/runs", 403), ("/v1/bundle/manifest.json", 403)):
            assert (await get(service, path, **token))[0] == status, path
        for hostile in ("x" * 50, "pi~nonsense", "__name__"):
            assert (await get(service, f"/{hostile}", Authorization=f"Bearer {hostile}"))[0] == 404
            assert (await get(service, "/metrics", Authorization=f"Bearer {hostile}"))[0] == 401
        async with client(service) as device:
            await device.join("a-device-of-any-name")
            return (await get(service, "/metrics", **token))[1].decode()

    async def main() -> str:
        async with serving(bundle, tmp_path / "cloud", {**msgspec.toml.decode(TASK), **settings}) as service:
            return await asyncio.wait_for(talk(service), 30.0)

    text = asyncio.run(main())
    assert systemd.recv(100) == b"STOPPING=1"
    types = dict(re.findall(r"^# TYPE (hosl_\S+) (\S+)$", text, re.MULTILINE))
    assert [name for name in OF_THE_SPECIFICATION if name not in types] == []
    check_labels(text, bundle)


def check_labels(text: str, bundle: Path) -> None:
    """No label has a value that a client chose."""
    values: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for label, value in sample.labels.items():
                if sample.name.startswith("hosl_"):
                    values.setdefault(label, set()).add(value)
    assert values["reason"] == {"missing", "wrong", "revoked", "remote", "role", "origin", "rate"}
    assert values["state"] == set(metrics.STATES)
    assert values["direction"] == {"sent", "received"}
    assert bundle.name in values["bundle"]
    assert "a-device-of-any-name" not in text
    assert "nonsense" not in text
