"""The HTTP API against its own OpenAPI document: requests that fit it and requests that do not, to a real service."""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from hosl_protocol.exceptions import ExitCode
from processes import Program
from support import TASK

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
"""Of the library's; that all which fits the schema is accepted can't be asked, for settings depend on the bundle."""


class Site:
    """A service with one run that waits for devices."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        shutil.copytree(bundle, folder / "bundles" / "tiny")
        self.folder = folder
        self.log = folder / "serve.log"
        options = ["--port", "0", "--log-format", "json", "--log-level", "debug", "--data-dir", folder]
        self.process = Program("hosl_cloud", "serve", *options, errors=self.log)
        deadline = time.monotonic() + 60.0
        while not (folder / "service.json").exists():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        self.url = json.loads((folder / "service.json").read_text())["address"].replace("ws", "http", 1)
        token = (folder / "admin-token").read_text(encoding="ascii").strip()
        self.headers = {"Authorization": f"Bearer {token}"}
        config = folder / "run.toml"
        config.write_text('rounds = 3\nmax_length = 16\nname = "fuzzed"\n' + TASK, encoding="utf-8")
        options = ["--bundle", "tiny", "--config", config, "--json", "--data-dir", folder]
        start = Program("hosl_cloud", "run", "start", *options, errors=folder / "start.log")
        self.run = json.loads(start.communicate(timeout=60)[0])["id"]

    def finish(self) -> int:
        """Wait for the service's end; its exit code."""
        self.said = self.process.communicate(timeout=30)[0]
        return self.process.wait()

    def ask(self, method: str, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers=self.headers, method=method)
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)


@pytest.fixture(scope="module")
def site(make_bundle: Callable[[str, int], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(make_bundle("lora", 2), tmp_path_factory.mktemp("api"))
    yield site
    site.process.kill()
    site.finish()


@pytest.fixture(scope="module")
def operations(site: Site) -> list[Any]:
    """All but the one that ends the service."""
    document = schemathesis.openapi.from_url(f"{site.url}/v1/openapi.json")
    return [each.ok() for each in document.exclude(path="/v1/drain").get_all_operations()]


@pytest.mark.parametrize("mode", GenerationMode)
def test_every_answer_is_one_that_the_document_has(site: Site, operations: list[Any], mode: GenerationMode) -> None:
    assert len(operations) >= 13
    for operation in operations:
        ask(site, operation.as_strategy(generation_mode=mode))


def ask(site: Site, strategy: Any) -> None:
    """Every second request about a run is about the one that is there."""

    @hypothesis.settings(
        max_examples=10,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=strategy, is_there=hypothesis.strategies.booleans())
    def check(case: schemathesis.Case, is_there: bool) -> None:
        if is_there and "run" in case.path_parameters:
            case.path_parameters["run"] = site.run
        case.call_and_validate(headers=site.headers, checks=CHECKS)

    check()


def test_a_path_that_is_not_there_is_refused_as_the_document_says(site: Site) -> None:
    for method, path, status in (("GET", "/v1/runs/a/b/c", 404), ("PUT", "/v1/runs", 405)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            site.ask(method, path)
        with caught.value as answer:
            assert (answer.code, list(json.load(answer))) == (status, ["error"])


def test_the_service_is_whole_afterwards_and_drains(site: Site) -> None:
    assert [run["id"] for run in site.ask("GET", "/v1/runs")["runs"]] == [site.run]
    site.ask("POST", "/v1/drain")
    assert site.finish() == ExitCode.OK


def test_every_line_of_its_log_is_an_object_and_none_has_a_secret(site: Site) -> None:
    text = site.log.read_text(encoding="utf-8") + site.said
    lines = [json.loads(line) for line in text.splitlines()]
    assert any(line.get("run") == site.run for line in lines)
    for name in ("admin-token", "join-token", "metrics-token"):
        assert (site.folder / name).read_text(encoding="ascii").strip() not in text
