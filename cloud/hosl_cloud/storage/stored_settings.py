"""A run's settings as they were stored: those of this version, or of another one, of which this one knows a part.

A run is never trained with settings of which a part is not known; but it can be shown, and merged where the unknown
part has no say in the merged model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_type_hints

import msgspec

from hosl_cloud.exceptions import ForeignSettings
from hosl_cloud.settings import RunConfig
from hosl_protocol.exceptions import MalformedSettings
from hosl_protocol.run.settings import ClientOptimizer, convert

# Made here, on import: threads that use a type for the first time at once crash msgspec.
_CONFIG = msgspec.json.Decoder(RunConfig)

_REPLAYED = ("task", "algorithm", "seed", "directions", "distribution", "client", "tail")
"""Settings on which a merged model depends; in `client` all of them, and no others."""


@dataclass(frozen=True)
class StoredSettings:
    """A run's settings, and whether this version can use them."""

    known: RunConfig | None
    """What this version makes of them; None where that is nothing."""
    data: dict[str, Any]
    """All of them, with the names that they were stored with."""
    problem: str = ""
    """Why this version cannot train with them; empty where it can."""
    unknown: tuple[str, ...] = ()
    """Names that this version does not have."""

    def config(self, run: str) -> RunConfig:
        """Give the settings to train with. Raises ForeignSettings."""
        if self.problem or self.known is None:
            raise ForeignSettings(run, self.problem)
        return self.known

    def for_merge(self, run: str) -> StoredSettings:
        """Give settings to merge with: those that no merged model depends on may be another version's.

        Raises ForeignSettings.
        """
        client = self.data.get("client")
        is_whole = set(_REPLAYED) <= self.data.keys() and isinstance(client, dict)
        is_own = is_whole and {*ClientOptimizer.__struct_fields__} == client.keys()  # type: ignore[union-attr]
        if self.problem and (self.known is None or not is_own):
            raise ForeignSettings(run, self.problem)
        return replace(self, problem="")


def read_stored(text: str | bytes) -> StoredSettings:
    """Read settings from their JSON text, whoever wrote them."""
    try:
        config = _CONFIG.decode(text)
    except msgspec.ValidationError:
        return read_known(msgspec.json.decode(text))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return StoredSettings(None, {}, f"its settings are damaged ({error})")
    return StoredSettings(config, msgspec.to_builtins(config))


def read_known(data: Any) -> StoredSettings:
    """Read settings from a mapping, without those that this version does not have."""
    if not isinstance(data, dict):
        return StoredSettings(None, {}, "its settings are damaged (they are no table)")

    unknown: list[str] = []
    other = "its settings are of another version of hosl"
    try:
        known = convert(_without_unknown(data, RunConfig, "", unknown), RunConfig, "settings")
    except MalformedSettings as error:
        return StoredSettings(None, data, f"{other}: {error}", tuple(unknown))

    if not unknown:
        return StoredSettings(known, data)
    return StoredSettings(known, data, f"{other}: this one has no setting {', '.join(unknown)}", tuple(unknown))


def _without_unknown(data: dict[str, Any], table: type[msgspec.Struct], place: str, unknown: list[str]) -> Any:
    """Keep the settings of a table that this version has; the names of the others go into `unknown`."""
    kinds, kept = get_type_hints(table), {}
    for name, value in data.items():
        if name not in table.__struct_fields__:
            unknown.append(place + name)
            continue
        is_table = isinstance(value, dict) and isinstance(kinds[name], type) and issubclass(kinds[name], msgspec.Struct)
        kept[name] = _without_unknown(value, kinds[name], f"{place}{name}.", unknown) if is_table else value
    return kept
