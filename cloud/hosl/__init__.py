"""hosl in Python: export a model, train it on data at hand or with devices, and have it back as a transformers model.

cloud/python.md tells all of it. The import loads neither torch nor a service: that is left to who calls a function.
"""

from hosl.bundles import Bundle, Cost, export
from hosl.extras import MissingExtra
from hosl.rounds import Evaluation, Round
from hosl.runs import Run
from hosl.serving import ServedRun, serve
from hosl.simulating import simulate
from hosl.trained import Trained
from hosl_protocol.exceptions import HoslError, SettingsError

__all__ = [
    "Bundle",
    "Cost",
    "Evaluation",
    "HoslError",
    "MissingExtra",
    "Round",
    "Run",
    "ServedRun",
    "SettingsError",
    "Trained",
    "export",
    "serve",
    "simulate",
]
