"""Updates as messages carry them: one place for who sends them and who reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hosl_protocol.run.updates import UpdateShape
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.codec import Array, Frame
from hosl_protocol.wire.messages import CatchUp, Update


def update_tensors(record: UpdateRecord, loss: float) -> dict[str, Array]:
    """Make the tensors of an Update; the codes are left out where there are none."""
    return {"coefficients": record.coefficients, "codes": record.codes, "loss": np.float32(loss).reshape(())}


def read_update(frame: Frame) -> UpdateRecord:
    """Make the record of an Update that has come."""
    message = frame.message
    assert isinstance(message, Update)
    codes = frame.tensors.get("codes", np.empty(0, np.uint8))
    return UpdateRecord(message.round, frame.tensors["coefficients"], message.learning_rate, codes)


def catch_up_tensors(records: Sequence[UpdateRecord], shape: UpdateShape) -> dict[str, Array]:
    """Make the tensors of a CatchUp, a row for each record."""
    rows = len(records)
    return {
        "coefficients": np.array([each.coefficients for each in records], np.float32).reshape(rows, shape.coefficients),
        "codes": np.array([each.codes for each in records], np.uint8).reshape(rows, shape.codes),
        "learning_rates": np.array([each.learning_rate for each in records], np.float64),
    }


def read_catch_up(frame: Frame) -> list[UpdateRecord]:
    """Make the records of a CatchUp that has come."""
    message = frame.message
    assert isinstance(message, CatchUp)
    coefficients, rates = frame.tensors["coefficients"], frame.tensors["learning_rates"].tolist()
    codes = frame.tensors.get("codes", np.empty((len(rates), 0), np.uint8))
    return [
        UpdateRecord(message.first_round + row, coefficients[row], rate, codes[row]) for row, rate in enumerate(rates)
    ]
