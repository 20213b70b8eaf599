"""`python -m hosl_cloud` as a rank, which says as the last thing how many threads of gloo are left."""

from __future__ import annotations

import atexit
import sys
from pathlib import Path

from hosl_cloud.__main__ import main


def say_what_is_left() -> None:
    """For test_ranks.py, in the log."""
    names = [each.read_text().strip() for each in Path("/proc/self/task").glob("*/comm")]
    print(f"threads of gloo left: {names.count('pt_gloo_runloop')}", flush=True)


if __name__ == "__main__":
    atexit.register(say_what_is_left)  # after all that is registered from here on
    sys.exit(main())
