"""What protocol/README.md says of the cloud against the code: its requests, its times and its counts."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from starlette.routing import Match

from hosl_cloud.rounds.algorithms import LARGEST_PROJECTION
from hosl_cloud.rounds.first_order import LARGEST_SCALE
from hosl_cloud.runs.admission import JOIN_DEADLINE_S, LONGEST_CATCH_UP_S
from hosl_cloud.runs.peer import MAX_WAITING, OUTBOX_BYTES
from hosl_cloud.service.access import Denied
from hosl_cloud.service.device_routes import HELLO_DEADLINE_S, DeviceRoutes
from hosl_cloud.service.server import HEARTBEAT_S
from hosl_cloud.settings import DeviceSettings, EvaluationSettings
from hosl_edge.agent import LONGEST_PAUSE_S
from hosl_edge.session import PATIENCE
from specification import README, table_below


def test_every_request_that_a_device_may_make_has_its_row_and_no_other_has() -> None:
    asked = {name.strip("`") for name, *_ in table_below("## Connection") if name not in ("", "any")}
    runs: Any = None
    authenticator: Any = SimpleNamespace(identify=None)
    served: list[Any] = DeviceRoutes(runs, authenticator).routes()

    def route_of(request: str) -> str | None:
        path = request.replace("ROUND", "7").partition("?")[0]
        scope = {"type": "websocket" if request == "/v1/device" else "http", "path": path, "method": "GET"}
        return next((str(route.path) for route in served if route.matches(scope)[0] is Match.FULL), None)

    assert {request for request in asked if route_of(request) is None} == {"/v1/ca.pem"}
    assert {route_of(request) for request in asked} - {None} == {route.path for route in served}


def test_an_answer_to_a_request_that_is_denied_has_its_row() -> None:
    codes = {code for name, answer, _ in table_below("## Connection") if name == "any" for code in answer.split(", ")}
    assert codes == {"401", "403", "429", "another", "5xx"}
    assert "Retry-After" in Denied(429, 1.0).headers


def test_times_and_counts_of_the_cloud_are_those_of_the_code() -> None:
    waits = {what: seconds for what, seconds, _ in table_below("**How long the cloud waits**")}
    assert waits["Hello"].startswith(f"{HELLO_DEADLINE_S:.0f} from")
    assert waits["Ready"].startswith(f"{JOIN_DEADLINE_S:.0f} from")
    assert f"of this {LONGEST_CATCH_UP_S:.0f} at most" in waits["Ready"]
    assert f"all of an evaluation {EvaluationSettings().deadline_s:.0f}, or" in waits["EvalBatch"]
    assert f"{OUTBOX_BYTES >> 20} MiB" in waits["room for what it sends"]
    text = README.read_text(encoding="utf-8")
    assert f"a ping every {HEARTBEAT_S:.0f} seconds" in text
    assert f"At most {MAX_WAITING} Probes, Anchors" in text
    assert f"After {DeviceSettings().strikes}, or what the cloud's settings say" in text
    limits = {
        name: limit
        for name, *_, limit in table_below("### Projections (`projections`)") + table_below("### Gradient (`gradient`)")
    }
    for name, limit in (("projections", LARGEST_PROJECTION), ("scales", LARGEST_SCALE)):
        assert limits[f"tensor `{name}`"].startswith(f"magnitudes below 1e{math.log10(limit):.0f}, else")
    assert f"more than {PATIENCE} times `deadline_s`" in text
    assert f"min({LONGEST_PAUSE_S:.0f}, 0.5" in text
