"""A bundle: a model that was cut in two, with what it trains on the device and what that costs."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from hosl.extras import needs
from hosl_protocol.exceptions import SettingsError
from hosl_protocol.run.manifest import Manifest, TrainMode, load_manifest

if TYPE_CHECKING:
    from hosl_export.summary import Summary

OnStep = Callable[[str], object]
"""Told of each step of an export when it begins."""


class Cost(NamedTuple):
    """Computation of a round on the device, in forwards of its half, by floating-point operations."""

    ho_sfl: float
    """With the directions that HO-SFL takes unasked."""
    first_order: float


class Bundle:
    """A folder that `hosl.export` or `hosl-export` wrote."""

    def __init__(self, path: str | os.PathLike[str], *, summary: Summary | None = None) -> None:
        """Open a bundle. Raises BundleError where the folder is none."""
        self.path = Path(path)
        self.manifest: Manifest = load_manifest(self.path)
        self.summary = summary
        """What the export found out; None for a bundle that was there before."""

    @property
    def digest(self) -> str:
        """SHA-256 of what devices are given: two bundles with the same one are the same for them."""
        return self.manifest.shard_digest

    @property
    def model(self) -> str:
        """The model's hub id or name."""
        return self.manifest.model

    @property
    def split(self) -> int:
        """Blocks on the device."""
        return self.manifest.split

    @property
    def blocks(self) -> int:
        """Blocks of the whole model."""
        return self.manifest.blocks

    @property
    def device_parameters(self) -> int:
        """Numbers of the device's half, embeddings included."""
        return sum(math.prod(entry.shape) for entry in self.manifest.tensors)

    @property
    def trained_parameters(self) -> int:
        """Those of them that train."""
        return sum(math.prod(entry.shape) for entry in self.manifest.trainable)

    @property
    def cost(self) -> Cost | None:
        """What a round costs; None where the export did not find out: without gradients, or in another program."""
        summary = self.summary
        if summary is None or summary.ho_sfl_forwards is None or summary.first_order_forwards is None:
            return None
        return Cost(summary.ho_sfl_forwards, summary.first_order_forwards)

    def describe(self) -> str:
        """Say what is in it, as `hosl-export` does after an export; of an older bundle in one line."""
        if self.summary is None:
            return repr(self)
        from hosl_export.summary import describe

        return describe(self.summary)

    def __repr__(self) -> str:
        trained = f"{self.trained_parameters:,} numbers train there" if self.trained_parameters else "frozen there"
        return f"<hosl.Bundle {self.model}: {self.split} of {self.blocks} blocks on the device, {trained}; {self.path}>"


def as_bundle(bundle: Bundle | str | os.PathLike[str]) -> Bundle:
    """Open a bundle that is named by its folder. Raises BundleError."""
    return bundle if isinstance(bundle, Bundle) else Bundle(bundle)


def export(
    model: Any,
    split: int,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    train: TrainMode = "norm",
    out: str | os.PathLike[str] | None = None,
    train_blocks: int | None = None,
    prompt_tokens: int | None = None,
    lora_rank: int | None = None,
    lora_alpha: int | None = None,
    lora_targets: str | Sequence[str] = (),
    max_length: int | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    seed: int = 0,
    gradients: bool = True,
    on_step: OnStep | None = None,
) -> Bundle:
    """Cut a model after `split` blocks, for a device and a trainer; the options are those of `hosl-export`.

    `model` is a hub id, a folder, a .gguf file, or a transformers model at hand, which comes with its `tokenizer`, or,
    for images, its `processor`. Without `out` the bundle's folder is a temporary one, and gone with the Bundle.
    `on_step` is told what is done. Raises SettingsError, ModelError, UnknownFamily, ParityError and SpaceError.
    """
    # torch's threads spin while they wait, which beside other work costs ten times the computation; read at its import.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with needs("hosl.export", "export"):
        from hosl_export.exporter import export_bundle
        from hosl_export.settings import ExportSettings

    with contextlib.ExitStack() as stack:
        if hasattr(model, "save_pretrained"):
            model = stack.enter_context(_saved(model, tokenizer, processor))
        elif tokenizer is not None or processor is not None:
            name = "tokenizer" if tokenizer is not None else "processor"
            raise SettingsError(name, "given", "it goes with a model at hand; a hub id or a folder has its own")

        kept = stack.enter_context(contextlib.ExitStack())
        if out is None:
            folder = Path(tempfile.mkdtemp(prefix="hosl-bundle-"))
            kept.callback(shutil.rmtree, folder, ignore_errors=True)

        settings = ExportSettings(
            model=os.fspath(model),
            split=split,
            out=folder / "bundle" if out is None else Path(out),
            train=_checked_mode(train),
            train_blocks=train_blocks,
            prompt_tokens=prompt_tokens,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_targets=tuple(lora_targets.split(",") if isinstance(lora_targets, str) else lora_targets),
            max_length=max_length,
            revision=revision,
            seed=seed,
            image_size=image_size,
            gradients=gradients,
        )
        bundle = Bundle(settings.out, summary=export_bundle(settings, _shower(on_step)))
        if out is None:
            weakref.finalize(bundle, kept.pop_all().close)
    return bundle


def _checked_mode(train: str) -> TrainMode:
    if train not in get_args(TrainMode):
        raise SettingsError("train", train, f"use one of {', '.join(get_args(TrainMode))}")
    return train  # type: ignore[return-value]


def _shower(on_step: OnStep | None) -> Callable[[str], contextlib.AbstractContextManager[object]]:
    def show(step: str) -> contextlib.AbstractContextManager[object]:
        if on_step is not None:
            on_step(step)
        return contextlib.nullcontext()

    return show


@contextlib.contextmanager
def _saved(model: Any, tokenizer: Any, processor: Any) -> Iterator[Path]:
    """Save a model at hand for as long as it is needed; its folder is called as devices are told the model is."""
    if tokenizer is None and processor is None:
        remedy = "a model at hand comes with its tokenizer=, or for images with its processor="
        raise SettingsError("tokenizer", None, remedy)
    from hosl_export.sources.loading import quiet_transformers

    name = Path(getattr(model, "name_or_path", "") or type(model).__name__).name
    with tempfile.TemporaryDirectory(prefix="hosl-model-") as folder:
        path = Path(folder) / (re.sub(r"[^\w.-]", "-", name).lstrip(".") or "model")
        with quiet_transformers():
            for part in (model, tokenizer, processor):
                if part is not None:
                    part.save_pretrained(path)
        yield path
