"""Heat, throttling and memory, read from files of the kernel's form, and what the agent does about them."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import psutil
import pytest

from hosl_edge.exceptions import LowMemoryError
from hosl_edge.host.display import Display, Progress
from hosl_edge.host.health import Health, HealthMonitor, read_available, read_health
from hosl_edge.settings import EdgeSettings
from hosl_protocol.exceptions import ExitCode


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="ascii")
    return root


THERMAL = "sys/class/thermal/thermal_zone"
JETSON = {
    f"{THERMAL}0/type": "CPU-therm",
    f"{THERMAL}0/temp": "41500",
    f"{THERMAL}1/type": "GPU-therm",
    f"{THERMAL}1/temp": "47250",
    f"{THERMAL}2/type": "PMIC-Die",
    f"{THERMAL}2/temp": "100000",
    f"{THERMAL}3/type": "broken",
    f"{THERMAL}3/temp": "",
}


def test_the_hottest_zone_counts_and_a_fixed_figure_does_not(tmp_path: Path) -> None:
    assert read_health(write(tmp_path, JETSON)) == Health(47.25, ())
    assert read_health(tmp_path / "absent") == Health(None, ())


@pytest.mark.parametrize("soc", ["soc/soc:firmware", "soc@107c000000/soc@107c000000:firmware"])
@pytest.mark.parametrize(
    ("bits", "throttled"),
    [
        ("0", ()),
        ("50000", ()),  # it has happened, and is over
        ("50005", ("under-voltage", "throttled")),
        ("8", ("soft temperature limit",)),
    ],
)
def test_a_raspberry_pi_tells_that_it_is_throttled_now(
    tmp_path: Path, soc: str, bits: str, throttled: tuple[str, ...]
) -> None:
    write(tmp_path, {f"sys/devices/platform/{soc}/get_throttled": bits})
    assert read_health(tmp_path).throttled == throttled


def test_a_low_voltage_alarm_is_throttling_too(tmp_path: Path) -> None:
    write(tmp_path, {"sys/class/hwmon/hwmon1/name": "rpi_volt", "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1"})
    write(tmp_path, {"sys/class/hwmon/hwmon0/name": "other", "sys/class/hwmon/hwmon0/in0_lcrit_alarm": "1"})
    assert read_health(tmp_path).throttled == ("under-voltage",)


def test_available_memory_is_that_of_the_narrowest_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii").strip()
    write(tmp_path, {"proc/meminfo": re.sub(r"(MemAvailable: *)\d+", r"\g<1>4000000", meminfo)})
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    assert read_available(tmp_path) == 4_096_000_000
    group = "sys/fs/cgroup/a/b"
    stat = "anon 90000000\ninactive_file 7000000\nactive_file 3000000"
    write(tmp_path, {"proc/self/cgroup": "0::/a/b", f"{group}/memory.max": "max"})
    assert read_available(tmp_path) == 4_096_000_000
    above = {"memory.max": "120000000", "memory.current": "100000000", "memory.stat": stat}
    write(tmp_path, {f"sys/fs/cgroup/a/{name}": text for name, text in above.items()})
    assert read_available(tmp_path) == 30_000_000


def test_this_machine_can_be_read() -> None:
    assert read_available() > 10**6
    assert read_health().temperature_c is None or -50 < read_health().temperature_c < 150  # type: ignore[operator]


def monitor(reading: Health, available: int = 10**9, **settings: object) -> HealthMonitor:
    given = EdgeSettings(server="ws://localhost:1", token_file="t", data="d", **settings)  # type: ignore[arg-type]
    return HealthMonitor(given, Display("pi"), lambda: reading, lambda: available)


def paused_s(watch: HealthMonitor, deadline_s: float, progress: Progress | None = None) -> float:
    began = time.monotonic()
    asyncio.run(watch.cool_down(progress or Progress(), deadline_s))
    return time.monotonic() - began


def test_a_hot_device_pauses_before_a_round_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = monitor(Health(81.0, ()), max_temperature_c=80.0)
    assert 0.1 <= paused_s(watch, deadline_s=0.4) < 0.5
    assert 0.1 <= paused_s(watch, deadline_s=0.4) < 0.5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("pi: 81 °C, above max_temperature_c = 80: pauses before each round until that has passed")


def test_a_throttled_device_pauses_without_a_setting() -> None:
    assert paused_s(monitor(Health(40.0, ("throttled",))), deadline_s=0.8) >= 0.2


def test_the_pause_shows_in_the_status_and_is_as_long_as_a_round_at_least_a_second() -> None:
    progress = Progress(step_seconds=0.2)

    async def look() -> str:
        pacing = asyncio.create_task(monitor(Health(40.0, ("throttled",))).cool_down(progress, 0.0))
        await asyncio.sleep(0.8)
        assert not pacing.done()
        state = progress.state
        await asyncio.wait_for(pacing, 2.0)
        return state

    assert asyncio.run(look()) == "paused: throttled"
    assert progress.state == "training"


@pytest.mark.parametrize(
    ("reading", "highest"), [(Health(79.0, ()), 80.0), (Health(99.0, ()), None), (Health(None, ()), 80.0)]
)
def test_a_cool_device_or_one_without_a_limit_does_not_pause(reading: Health, highest: float | None) -> None:
    assert paused_s(monitor(reading, max_temperature_c=highest), deadline_s=100.0) < 5.0


def test_an_agent_stops_with_a_number_of_its_own_before_memory_is_gone() -> None:
    ended: list[str] = []

    async def run() -> None:
        async with monitor(Health(None, ()), 20_000_000, min_available_memory="64M").stopping_at_low_memory():
            try:
                await asyncio.sleep(5.0)
            finally:
                ended.append("tidied up")

    with pytest.raises(LowMemoryError, match=r"20 MB of memory are left.* 64 MB") as caught:
        asyncio.run(run())
    assert ended == ["tidied up"]
    assert caught.value.exit_code == ExitCode.RESOURCES
    assert "\n" not in str(caught.value)


def test_who_is_cancelled_while_memory_is_watched_is_cancelled_and_nothing_else() -> None:
    async def run() -> None:
        async with monitor(Health(None, ()), 20_000_000, min_available_memory="19M").stopping_at_low_memory():
            await asyncio.sleep(5.0)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(run(), 0.1))


@pytest.mark.parametrize("lowest", ["19M", 0, "0"])
def test_enough_memory_stops_nothing(lowest: int | str) -> None:
    async def watch() -> None:
        await asyncio.wait_for(monitor(Health(None, ()), 20_000_000, min_available_memory=lowest).watch_memory(), 0.2)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(watch())
