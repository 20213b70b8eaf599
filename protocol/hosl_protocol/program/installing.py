"""How an extra of hosl is added to the installation that runs."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from urllib.parse import urlsplit
from urllib.request import url2pathname


def install_line(extra: str) -> str:
    """Make the pip command that adds `extra` from where this hosl was installed.

    pip keeps the address of what was installed from a folder or a file (PEP 610, `direct_url.json`). The bare name is
    right only where an index gave this installation: on another index that name may be anybody's.
    """
    record = importlib.metadata.distribution("hosl").read_text("direct_url.json")
    if record is None:
        return f"pip install {shlex.quote(f'hosl[{extra}]')}"

    origin = json.loads(record)
    if origin.get("dir_info", {}).get("editable", False):
        folder = url2pathname(urlsplit(origin["url"]).path)
        return f"pip install -e {shlex.quote(f'{folder}[{extra}]')}"
    requirement = f"hosl[{extra}] @ {origin['url']}"
    return f"pip install {shlex.quote(requirement)}"
