"""What a run may read of the device's data: the fields of the shipped task, or those that the device names."""

from __future__ import annotations

from hosl_edge.exceptions import ConsentError
from hosl_protocol.run.tasks import Task, preset_fields


def check_consent(task: Task, fields: tuple[str, ...] | None, *, share_text: bool) -> None:
    """Raise ConsentError where the task reads more than the device allows."""
    if task.kind == "lm" and not share_text:
        raise ConsentError(
            f"task {task.name!r} sends the text itself as labels: start hosl-edge with --share-text to allow it"
        )

    allowed = fields if fields is not None else preset_fields(task.name)
    if allowed is None:
        raise ConsentError(
            f"task {task.name!r} is not one that hosl ships and reads {', '.join(task.fields)}: "
            "name the fields it may read with --fields"
        )

    refused = [field for field in task.fields if field not in allowed]
    if refused:
        raise ConsentError(
            f"task {task.name!r} reads {', '.join(refused)}, this device allows {', '.join(allowed)}: see --fields"
        )
