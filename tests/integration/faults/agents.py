"""Several agents in one process: python agents.py --server URL --token-file FILE --folder DIR --out FILE NAME ...

Each has a state folder of its own below DIR and prints to stderr as `hosl-edge` does. How each ended is a line of JSON
in FILE, which is only added to.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from pathlib import Path

from hosl_edge.agent import run_agent
from hosl_edge.settings import load_settings


async def attend(options: argparse.Namespace, name: str) -> None:
    """One agent to the end of the run."""
    folder: Path = options.folder
    settings = {
        "server": options.server,
        "token_file": options.token_file,
        "data": str(folder / f"{name}.jsonl"),
        "state_dir": str(folder / "state"),
        "cache_dir": str(folder / "cache"),
        "threads": 1,
        "name": name,
    }
    summary = await run_agent(load_settings(settings, None))
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(summary)) + "\n")


async def attend_all(options: argparse.Namespace) -> None:
    """All of them at once."""
    await asyncio.gather(*(attend(options, name) for name in options.names))


def main() -> None:
    """Run the agents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server")
    parser.add_argument("--token-file")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("names", nargs="+")
    asyncio.run(attend_all(parser.parse_args()))


if __name__ == "__main__":
    main()
