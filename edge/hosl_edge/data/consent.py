"""What a run may read of the device's data: the fields of the shipped task, or those that the device names."""

from __future__ import annotations

from hosl_edge.exceptions import ConsentError
from hosl_protocol.run.tasks import Task, preset_fields


def check_consent(
    task: Task, fields: tuple[str, ...] | None, *, share_text: bool, share_fields: tuple[str, ...] | None = None
) -> None:
    """Raise ConsentError where the task reads, or sends, more than the device allows.

    `share_fields` are those whose text it may send; with `share_text` alone it may send what it may read.
    """
    shares_all = share_text and share_fields is None
    sent = [] if shares_all else [field for field in task.shared_fields if field not in (share_fields or ())]
    if sent:
        raise ConsentError(
            f"task {task.name!r} sends the text of {', '.join(sent)} itself as labels: "
            f"start hosl-edge with --share-text or --share-fields {','.join(task.shared_fields)} to allow it"
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
