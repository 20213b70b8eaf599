"""Settings of a run that both sides must share; the cloud sends them in its Welcome."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import msgspec.inspect

from hosl_protocol.arithmetic.directions import MAX_DIRECTION, MAX_SEED, Distribution
from hosl_protocol.arithmetic.rotation import GradientBits
from hosl_protocol.exceptions import MalformedSettings, SettingsError
from hosl_protocol.run.manifest import SHORTEST_TEXT, Manifest
from hosl_protocol.run.tasks import Task, check_task

Algorithm = Literal["ho-sfl", "hosl", "first-order", "frozen"]
AnchorPoint = Literal["clean", "midpoint"]
WireDtype = Literal["float32", "float16", "bfloat16", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What code outside the rounds themselves must know of an algorithm."""

    trains_client: bool
    """Whether the device's weights move, so that updates carry something."""
    waits_for_lambda: bool
    """Whether the device waits for λ, and holds the Anchor's activations until it comes."""
    probes: bool
    """Whether the device computes forwards at weights around θ, along random directions."""
    subtracts_losses: bool
    """Whether the estimate comes from differences of losses, which need every digit of float32."""
    sends_gradient: bool
    """Whether devices send the gradient itself, compressed, and updates carry the average of theirs."""


TRAITS: dict[Algorithm, Traits] = {
    "ho-sfl": Traits(
        trains_client=True, waits_for_lambda=True, probes=True, subtracts_losses=False, sends_gradient=False
    ),
    "hosl": Traits(
        trains_client=True, waits_for_lambda=False, probes=True, subtracts_losses=True, sends_gradient=False
    ),
    "first-order": Traits(
        trains_client=True, waits_for_lambda=True, probes=False, subtracts_losses=False, sends_gradient=True
    ),
    "frozen": Traits(
        trains_client=False, waits_for_lambda=False, probes=False, subtracts_losses=False, sends_gradient=False
    ),
}
"""Of every algorithm: one without an entry ends with a KeyError, not with what suits another."""

MAX_STEP = 1e9
"""Largest learning rate, of either half, and probe step; what one of more comes to would soon leave float32."""

MIN_EPSILON, MAX_EPSILON = 1e-12, 1.0
"""AdamW's. Where the squares of tiny estimates underflow, v̂ is off by up to 2e-29 whatever beta2 is; the lower limit is
far above the root of that, so that m̂ / (√v̂ + epsilon) keeps its bound."""

MAX_BETA1, MIN_BETA2, MAX_BETA_RATIO = 0.999, 0.001, 0.999
"""With beta1² / beta2 up to this float32's roundings of the moments stay within the thousandth that the bound on
AdamW's steps has for them; nearer to 1 they would not, and above 1 there is no bound."""


class ClientOptimizer(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How the device turns estimates into steps (protocol/README.md, section "Updates")."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd` is reversible and its updates commute; `adamw` replays in order and costs two more copies of d_c."""
    learning_rate: float = 1e-3
    """η_c before the schedule, above 0 and up to 1e9. Only the cloud uses it: updates carry coefficients, or this
    round's rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the rate over the run's rounds; `linear` and `cosine` end at 0."""
    warmup_rounds: int = 0
    """Rounds over which the rate rises from 0."""
    beta1: float = 0.9
    """AdamW: decay of the first moment, from 0 to 0.999."""
    beta2: float = 0.999
    """AdamW: decay of the second moment, from 0.001, and beta1² / 0.999, up to, not including, 1."""
    epsilon: float = 1e-8
    """AdamW: added to the root of the second moment, from 1e-12 to 1."""
    weight_decay: float = 0.0
    """AdamW: decoupled decay, times the rate, in [0, 1)."""


class Augmentation(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """`[augmentation]`: how training images vary from round to round; held-out images never do."""

    crop_padding: int = 0
    """Black pixels put around an image, of which a crop of the image's own size is cut, 0 to 255; 0 does not crop."""
    flip: bool = False
    """Mirror half of the images, left to right."""

    @property
    def is_on(self) -> bool:
        """Whether anything varies."""
        return self.flip or self.crop_padding > 0


class RunSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a device must know to take part in a run."""

    task: Task
    algorithm: Algorithm = "ho-sfl"
    seed: int = 0
    """Root of all the run's randomness, 0 to 2^53 - 1; the only seed that ever crosses the wire."""
    rounds: int = 100
    """Rounds of training."""
    directions: int = 2
    """P of HO-SFL, Q of HOSL."""
    probe_step: float = 1e-3
    """μ of HO-SFL, ε of HOSL, in weight units, above 0 and up to 1e9."""
    distribution: Distribution = "rademacher"
    """Of a direction's entries: ±1, or the papers' normals, which cost many times the time."""
    anchor: AnchorPoint = "clean"
    """Where the tail takes its step: at the activations of θ, or half way between those of θ ± εz, which differ in
    second order of ε only and save a forward: HOSL sends no Anchor, HO-SFL takes central differences."""
    gradient_bits: GradientBits = 1
    """First-order: bits of each number of a gradient on the wire, 1, 2, 4, 8 or 32 (not compressed)."""
    batch_size: int = 16
    """Examples a device draws each round."""
    max_length: int = 128
    """Tokens an example is cut to; for images exactly the bundle's positions per image."""
    wire_dtype: WireDtype = "float32"
    """Type of activations and of their gradients on the wire; HOSL's loss differences need float32."""
    client: ClientOptimizer = ClientOptimizer()
    report_every: int = 10
    """Rounds between a device's reports (weights digest, memory, bytes)."""
    augmentation: Augmentation = Augmentation()

    @property
    def max_tokens(self) -> int:
        """Most tokens, or positions of images, in one batch."""
        return self.batch_size * self.max_length

    @property
    def traits(self) -> Traits:
        """What the run's algorithm is like."""
        return TRAITS[self.algorithm]


def check_run_settings(settings: RunSettings, *, bundle_max_length: int | None = None) -> None:
    """Raise SettingsError for the first field whose value cannot be used."""
    check_task(settings.task)
    _check_range("seed", settings.seed, 0, MAX_SEED)
    _check_range("rounds", settings.rounds, 1, 10**9)
    _check_range("directions", settings.directions, 1, MAX_DIRECTION)
    _check_range("batch_size", settings.batch_size, 1, 65536)
    _check_range("max_length", settings.max_length, 1 if settings.task.is_image else 2, bundle_max_length or 2**20)
    _check_range("augmentation.crop_padding", settings.augmentation.crop_padding, 0, 255)
    if settings.augmentation.is_on and not settings.task.is_image:
        raise SettingsError("augmentation", "on", "only images are cropped and flipped: leave it out for this task")

    _check_range("report_every", settings.report_every, 1, 10**9)
    check_step("probe_step", settings.probe_step)
    _check_client(settings.client, settings.rounds)
    if not settings.traits.probes and settings.anchor == "midpoint":
        remedy = f"a device makes no probes with {settings.algorithm} to take the mean of: use clean"
        raise SettingsError("anchor", settings.anchor, remedy)
    if settings.traits.subtracts_losses and settings.wire_dtype != "float32":
        raise SettingsError("wire_dtype", settings.wire_dtype, "HOSL subtracts losses, which needs float32")


def _check_client(client: ClientOptimizer, rounds: int) -> None:
    check_step("client.learning_rate", client.learning_rate)
    _check_range("client.warmup_rounds", client.warmup_rounds, 0, rounds)
    for name, lowest, highest in (("beta1", 0.0, MAX_BETA1), ("epsilon", MIN_EPSILON, MAX_EPSILON)):
        value = getattr(client, name)
        if not lowest <= value <= highest:
            raise SettingsError(f"client.{name}", value, f"use a number from {lowest:g} to {highest:g}")

    # Nearer to 1 the bound on AdamW's steps would not hold; see MAX_BETA_RATIO.
    lowest = max(MIN_BETA2, client.beta1 * client.beta1 / MAX_BETA_RATIO)
    if not lowest <= client.beta2 < 1.0:
        remedy = f"use a number from {math.ceil(lowest * 1e4) / 1e4:g} up to, not including, 1; beta1² needs as much"
        raise SettingsError("client.beta2", client.beta2, remedy)
    if not 0.0 <= client.weight_decay < 1.0:
        raise SettingsError("client.weight_decay", client.weight_decay, "use a number from 0 up to, not including, 1")


def check_run(settings: RunSettings, manifest: Manifest) -> None:
    """Raise SettingsError for the first setting that cannot be used with the bundle."""
    check_run_settings(settings, bundle_max_length=manifest.max_length)
    if manifest.train == "none" and settings.traits.trains_client:
        raise SettingsError("algorithm", settings.algorithm, "the bundle trains nothing on the device: use 'frozen'")
    if settings.traits.sends_gradient and not manifest.gradients:
        raise SettingsError("algorithm", settings.algorithm, "the bundle has no gradient graphs: export it again")

    if settings.task.is_image != (manifest.image is not None):
        takes = "images: use 'image-classification'" if manifest.image is not None else "text: use a task of texts"
        raise SettingsError("task.kind", settings.task.kind, f"the bundle's model takes {takes}")
    if not settings.task.is_image and settings.max_length < manifest.prompt_tokens + SHORTEST_TEXT:
        remedy = f"the bundle's soft prompt takes {manifest.prompt_tokens} of them: use more"
        raise SettingsError("max_length", settings.max_length, remedy)
    if settings.task.is_image and settings.max_length != manifest.max_length:
        raise SettingsError("max_length", settings.max_length, f"an image has {manifest.max_length} positions")


def read_toml(path: Path, option: str) -> dict[str, Any]:
    """Read the mapping in a TOML file, with or without a byte order mark.

    SettingsError names the file, or the option that named one which cannot be read.
    """
    try:
        data: dict[str, Any] = msgspec.toml.decode(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingsError(option, str(path), error.strerror or "cannot be read") from error
    except UnicodeDecodeError as error:
        raise MalformedSettings(str(path), "", "is not UTF-8: save it with that encoding") from error
    except msgspec.DecodeError as error:
        raise MalformedSettings(str(path), "", f"is not TOML: {error}") from error
    return data


def convert(data: Any, type_: type[Any], where: str) -> Any:
    """Make `data` (from TOML or JSON) a `type_`. Raises SettingsError, which names the place where it does not fit."""
    try:
        return msgspec.convert(data, type_)
    except msgspec.ValidationError as error:
        sentence, _, path = str(error).partition(" - at ")
        path = path.strip("`").removeprefix("$").lstrip(".")
        raise MalformedSettings(
            where, path, _explain(sentence, data, type_, path.split(".") if path else [])
        ) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Say for a name that is none of the known ones which was meant, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}"


def wanted(sentence: str) -> str:
    """Say what msgspec expected, in words; its own where there are none."""
    found = re.search(r"[Ee]xpected `(.*?)`", sentence)
    return " or ".join(_WORDS.get(kind, kind) for kind in found[1].split(" | ")) if found else sentence


_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text in quotes",
    "array": "a list",
    "object": "a table",
}


def _explain(sentence: str, data: Any, type_: type[Any], path: list[str]) -> str:
    """Make a better sentence of msgspec's about the value at `path`: with the value and what to do."""
    kind, value = msgspec.inspect.type_info(type_), data

    try:
        for step in path:
            kind, value = _fields(kind)[step], value[step]
    except (KeyError, TypeError):  # in a list, or a mapping of free names
        return sentence

    if found := re.search(r"unknown field `(.*)`", sentence):
        return f"no setting has the name {found[1]}; {nearest(found[1], _fields(kind))}"
    if found := re.search(r"missing required field `(.*)`", sentence):
        return f"the setting {found[1]} is missing"
    if isinstance(kind, msgspec.inspect.LiteralType) and isinstance(value, str):
        return f"{value!r} is none of {', '.join(map(str, kind.values))}"
    return f"use {wanted(sentence)} instead of {value!r}" if "xpected `" in sentence else sentence


def _fields(kind: msgspec.inspect.Type) -> dict[str, msgspec.inspect.Type]:
    """The settings in a table, by name."""
    # A table that may be left out is a union with None.
    kinds = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
    tables = (each for each in kinds if isinstance(each, msgspec.inspect.StructType))
    return {field.encode_name: field.type for table in tables for field in table.fields}


def _check_range(name: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise SettingsError(name, value, f"use a whole number from {lowest} to {highest}")


def check_step(name: str, value: float) -> None:
    """Raise SettingsError for a learning rate or a probe step that cannot be used."""
    if not 0.0 < value <= MAX_STEP:
        raise SettingsError(name, value, f"use a number above 0, and at most {MAX_STEP:g}")
