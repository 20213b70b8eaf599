"""What the service offers a device before it joins, and whether its data fits: before anything large is fetched."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import msgspec

from hosl_edge.connection.fetch import read_url
from hosl_edge.connection.trust import Cloud
from hosl_edge.data.consent import check_consent
from hosl_edge.data.images import load_images
from hosl_edge.data.records import check_readable
from hosl_edge.data.texts import check_first_example
from hosl_edge.exceptions import ConnectionLost, NotFoundError, RefusedError
from hosl_edge.settings import EdgeSettings
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.tasks import Task, check_task


class Offer(msgspec.Struct, frozen=True):
    """What the service says of a device whose token is right."""

    task: Task | None = None
    """The task of the run that waits for it; None without one."""
    data_digest: str = ""
    """Of the training data that it has been in that run with; empty before."""
    eval_digest: str = ""
    """Of the held-out data that it must keep to; empty where it may change."""
    max_length: int = 0
    """Tokens to which texts are cut; 0 where an older service does not tell."""


# Made here, on import: threads that use a type for the first time at once crash msgspec.
_DECODER = msgspec.json.Decoder(Offer)


def fetch_offer(cloud: Cloud, name: str) -> Offer | None:
    """Ask what waits for the device of this name; None where an older service cannot tell.

    Raises RefusedError where the token is another device's, SettingsError for a task that is none, and ConnectionLost.
    """
    url = cloud.url("device/") + quote(name, safe="")
    try:
        offer = _DECODER.decode(read_url(cloud, url))
    except NotFoundError:
        return None  # an older service
    except RefusedError as error:
        reason = (
            f"the token is not one of device {name}: leave out the name, and the token's own counts, or take its own"
        )
        raise RefusedError(reason, retry=False) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConnectionLost(f"{url} answered with what no hosl-cloud says: {error}") from error

    if offer.task is not None:
        check_task(offer.task)
    return offer


def check_fit(settings: EdgeSettings, task: Task, manifest: Manifest | None) -> None:
    """Check what the run asks for before it reads everything: fields, text, and the first example of each file.

    Raises ConsentError and DataError.
    """
    check_consent(task, settings.fields, share_text=settings.share_text, share_fields=settings.share_fields)
    for path in (settings.data, settings.eval):
        if path is not None:
            check_data_file(Path(path), task, manifest, skip_broken=settings.skip_broken)


def check_data_file(path: Path, task: Task | None, manifest: Manifest | None, *, skip_broken: bool = False) -> str:
    """Say what `task` can do with a file, or at least that it can be read. Raises DataError."""
    check_readable(path)
    if task is None and (path.is_dir() or path.suffix.lower() == ".npz"):
        return "can be read"

    if task is not None and task.is_image:
        if manifest is None or manifest.image is None:
            return "can be read"
        examples = len(load_images(path, task, manifest.image, manifest.max_length, skip_broken=skip_broken))
        return f"{examples} images, which task {task.name} can use"

    fields = check_first_example(path, task)
    fits = f", which task {task.name} can use" if task is not None else ""
    return f"its first example has {fields} field{'s' if fields != 1 else ''}{fits}"
