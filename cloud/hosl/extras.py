"""What a function needs beside the device's packages: one clear line where it is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from hosl_protocol.exceptions import ExitCode, HoslError
from hosl_protocol.program.installing import install_line

Extra = Literal["cloud", "export"]


class MissingExtra(HoslError):
    """A package is not installed. Stores the function, the extra of hosl that brings it, and the module."""

    exit_code = ExitCode.SETTINGS

    def __init__(self, function: str, extra: Extra, module: str) -> None:
        self.function, self.extra, self.module = function, extra, module
        super().__init__(f"{function} needs: {install_line(extra)} ({module} is missing)")


@contextlib.contextmanager
def needs(function: str, extra: Extra) -> Iterator[None]:
    """Within are imports: raise MissingExtra for a package that is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "hosl").startswith("hosl"):
            raise  # a fault of ours, which no package mends
        raise MissingExtra(function, extra, error.name or "") from None
