"""The command that adds an extra installs this hosl, not whatever an index has under its name."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hosl_protocol.program.installing import install_line


@pytest.fixture
def installed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, object] | None], None]:
    """Puts the records of an installation on the path, as pip writes them."""

    def install(origin: dict[str, object] | None) -> None:
        records = tmp_path / "hosl-0.1.0.dist-info"
        records.mkdir()
        (records / "METADATA").write_text("Metadata-Version: 2.1\nName: hosl\nVersion: 0.1.0\n", encoding="utf-8")
        if origin is not None:
            (records / "direct_url.json").write_text(json.dumps(origin), encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert importlib.metadata.distribution("hosl").read_text("METADATA") is not None

    return install


def test_what_came_from_a_file_is_installed_from_that_file(
    installed_from: Callable[[dict[str, object] | None], None],
) -> None:
    installed_from({"url": "file:///srv/my%20files/hosl.tar.gz", "archive_info": {}})
    assert install_line("images") == "pip install 'hosl[images] @ file:///srv/my%20files/hosl.tar.gz'"


def test_an_editable_checkout_stays_one(installed_from: Callable[[dict[str, object] | None], None]) -> None:
    installed_from({"url": "file:///srv/my%20files/hosl", "dir_info": {"editable": True}})
    assert install_line("cloud") == "pip install -e '/srv/my files/hosl[cloud]'"


def test_the_bare_name_is_for_what_an_index_gave(installed_from: Callable[[dict[str, object] | None], None]) -> None:
    installed_from(None)
    assert install_line("export") == "pip install 'hosl[export]'"
