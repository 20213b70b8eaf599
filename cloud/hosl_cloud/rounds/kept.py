"""What a frozen run keeps of its devices' activations, so that each goes over the wire once.

Nothing that a device of a frozen run sends changes from pass to pass, and which examples a round takes is known here
(`batch_indices`). A round, or an evaluation, whose examples are all here asks the device for nothing. What was first
received stands: an example that is here already is never replaced by another computation of it. `note` and `set_aside`
are called on the event loop, everything else on the run's compute thread; the names may be asked from both.

Shapes: B examples, T tokens of a batch without padding, D width of the cut layer, N labels.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from hosl_cloud import metrics
from hosl_cloud.exceptions import is_disk_full
from hosl_cloud.rounds.exchange import BatchArrays
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.kept_data import KeptFolder
from hosl_cloud.storage.kept_file import Example, KeptData, KeptFile
from hosl_protocol.run.manifest import Manifest
from hosl_protocol.run.ordering import batch_indices

log = logging.getLogger(__name__)

TRAIN, HELD_OUT = "train", "held-out"


@dataclass(frozen=True)
class Holding:
    """What a device has said of its data."""

    data_digest: str
    train_examples: int
    eval_digest: str
    eval_examples: int


def may_keep(config: RunConfig) -> bool:
    """Whether a run's activations stay the same from pass to pass, and are to be kept."""
    return config.cache.budget_bytes > 0 and config.algorithm == "frozen" and not config.augmentation.is_on


def key_of(config: RunConfig, manifest: Manifest) -> str:
    """Digest what activations depend on, beside the data and the device.

    A batch's other examples decide how far each is padded, and with that its last bits: a strict run has activations
    only of runs that draw the same batches.
    """
    facts = [manifest.shard_digest, config.task, config.max_length, config.wire_dtype]
    drawn = [config.seed, config.batch_size] if config.strict else []
    return hashlib.sha256(msgspec.json.encode([*facts, *drawn])).hexdigest()


class KeptActivations:
    """The kept activations of one run's devices."""

    def __init__(
        self, config: RunConfig, manifest: Manifest, bundle: str, folder: KeptFolder, say: Callable[[str], None]
    ) -> None:
        self._config, self._manifest, self._bundle = config, manifest, bundle
        self._folder, self._say = folder, say
        self._key = key_of(config, manifest)
        self._holdings: dict[str, Holding] = {}
        self._files: dict[tuple[str, str, str], KeptFile] = {}
        """By device, part and data digest."""
        self._aside: set[str] = set()
        self._is_full = False

    def load(self) -> None:
        """Find the devices whose whole training data is here."""
        for part in (TRAIN, HELD_OUT):  # of each device what was used last
            for data in self._folder.find(self._key):
                known = self._holdings.get(data.device)
                if data.part != part or (known is not None and (part == TRAIN or known.eval_examples)):
                    continue
                if part == TRAIN:
                    self._holdings[data.device] = Holding(data.data_digest, data.examples, "", 0)
                elif known is not None:
                    more = {"eval_digest": data.data_digest, "eval_examples": data.examples}
                    self._holdings[data.device] = Holding(known.data_digest, known.train_examples, **more)  # type: ignore[arg-type]
        self.open()
        self._holdings = {name: each for name, each in self._holdings.items() if name in self.training_names()}

    def open(self) -> None:
        """Open the files of all devices that are known, so that the names tell who needs not be there."""
        for device in list(self._holdings):
            self._open(device, TRAIN)
            self._open(device, HELD_OUT)

    def note(self, device: str, holding: Holding) -> None:
        """Note the data of a device that is ready."""
        if holding.data_digest:
            self._holdings[device] = holding

    def set_aside(self, device: str) -> None:
        """Use nothing of a device that is put aside for its faults."""
        self._aside.add(device)

    def holding(self, device: str) -> Holding | None:
        """Look up what a device has said of its data; None for one that is not known."""
        return self._holdings.get(device)

    def training_names(self) -> set[str]:
        """Devices that need not be there for a round."""
        return {name for name in list(self._holdings) if self._is_whole(name, TRAIN)}

    def evaluation_names(self) -> set[str]:
        """Devices that need not be there for an evaluation: all their held-out data is here, and they have some."""
        return {
            name for name, each in list(self._holdings.items()) if each.eval_examples and self._is_whole(name, HELD_OUT)
        }

    def without_held_out(self) -> set[str]:
        """Devices whose training data is here, and that have nothing held out."""
        return {name for name in self.training_names() if not self._holdings[name].eval_examples}

    def by_device(self) -> dict[str, tuple[int, int]]:
        """Count the examples that are here by device: for training, and held out."""
        files = {name: (self._file(name, TRAIN), self._file(name, HELD_OUT)) for name in list(self._holdings)}
        return {name: (len(train or ()), len(held_out or ())) for name, (train, held_out) in files.items()}

    def has_batch(self, device: str, round_: int) -> bool:
        """Whether a round's whole batch is here."""
        file = self._open(device, TRAIN)
        return file is not None and all(place in file for place in self._places(device, round_))

    def batch(self, device: str, round_: int) -> BatchArrays | None:
        """Read a round's batch, in the order in which the device sends it; None where a part of it is damaged."""
        batch = self._read(device, TRAIN, self._places(device, round_))
        if batch is None:
            return None
        metrics.kept_batches.labels(self._bundle).inc()
        return batch

    def settle(self, device: str, round_: int, batch: BatchArrays, places: Sequence[int] | None) -> BatchArrays:
        """Put what is here already in the place of what has come again."""
        file = self._open(device, TRAIN)
        if file is None or places is None or not any(place in file for place in places):
            return batch
        if sorted(places) != sorted(self._places(device, round_)):
            return batch
        examples = [file.get(place) or came for place, came in zip(places, _examples(batch), strict=True)]
        if [len(example[0]) for example in examples] != batch[1].tolist():
            return batch
        return _joined(examples)

    def keep(self, device: str, round_: int, batch: BatchArrays, places: Sequence[int] | None) -> None:
        """Keep a batch with which the tail has trained, if the device has said where its examples stand."""
        if places is None or device not in self._holdings:
            return
        if sorted(places) != sorted(self._places(device, round_)):
            log.warning("device %s: the places in its anchor are not those of round %d", device, round_)
            return
        self._add(device, TRAIN, places, batch)

    def held_out(self, device: str) -> Iterator[BatchArrays | None]:
        """Read the held-out data batch by batch; None, and no more, where a part of it is damaged."""
        holding = self._holdings[device]
        for first in range(0, holding.eval_examples, self._config.batch_size):
            last = min(first + self._config.batch_size, holding.eval_examples)
            batch = self._read(device, HELD_OUT, range(first, last))
            yield batch
            if batch is None:
                return

    def keep_held_out(self, device: str, first: int, batch: BatchArrays) -> None:
        """Keep a batch of held-out data, whose first example is the one after `first` others."""
        holding = self._holdings.get(device)
        if holding is not None and holding.eval_digest and first + len(batch[1]) <= holding.eval_examples:
            self._add(device, HELD_OUT, range(first, first + len(batch[1])), batch)

    def close(self) -> None:
        """Let the files go."""
        self._folder.close()

    def _places(self, device: str, round_: int) -> list[int]:
        examples = self._holdings[device].train_examples
        places: list[int] = batch_indices(self._config.seed, round_, device, examples, self._config.batch_size).tolist()
        return places

    def _is_whole(self, device: str, part: str) -> bool:
        file = self._file(device, part)
        return device not in self._aside and file is not None and not file.is_removed and file.is_whole

    def _file(self, device: str, part: str) -> KeptFile | None:
        """Look up a device's file where it is open."""
        holding = self._holdings.get(device)
        if holding is None:
            return None
        return self._files.get((device, part, holding.data_digest if part == TRAIN else holding.eval_digest))

    def _open(self, device: str, part: str) -> KeptFile | None:
        """Open a device's file, or make it; None for a device without such data, or where the disk does not let us."""
        file, holding = self._file(device, part), self._holdings.get(device)
        if file is not None and not file.is_removed:
            return file
        if holding is None or file is not None or device in self._aside:
            return None

        is_train = part == TRAIN
        digest = holding.data_digest if is_train else holding.eval_digest
        examples = holding.train_examples if is_train else holding.eval_examples
        if not digest or not examples:
            return None
        is_half = self._config.wire_dtype in ("float16", "bfloat16")
        data = KeptData(
            key=self._key,
            bundle=self._bundle,
            task=self._config.task.name,
            device=device,
            data_digest=digest,
            part=part,
            examples=examples,
            width=self._manifest.width,
            dtype=self._config.wire_dtype if is_half else "float32",
        )
        try:
            file = self._files[device, part, digest] = self._folder.open(data)
        except OSError as error:
            self._give_up(error)
        return file

    def _read(self, device: str, part: str, places: Sequence[int]) -> BatchArrays | None:
        file = self._open(device, part)
        if file is None:
            return None
        try:
            examples = [file.get(place) for place in places]
        except OSError as error:
            log.warning("kept activations of %s cannot be read: %s", device, error)
            return None
        if any(example is None for example in examples):
            log.warning("kept activations of device %s are damaged: it is asked for them again", device)
            return None
        # As the device has them in a batch: by length, and otherwise as they were drawn.
        return _joined(sorted((each for each in examples if each is not None), key=lambda each: len(each[0])))

    def _add(self, device: str, part: str, places: Sequence[int], batch: BatchArrays) -> None:
        file = None if self._is_full else self._open(device, part)
        if file is None:
            return
        # A place may come twice in a batch, where the device has fewer examples than a batch.
        new = {p: each for p, each in zip(places, _examples(batch), strict=True) if p not in file}
        if not new:
            return
        try:
            if not self._folder.make_room(sum(file.record_bytes(each) for each in new.values())):
                budget = self._config.cache.bytes
                self._stop(f"the cache is full (cache.bytes, {budget}); devices go on sending what is not in it")
                return
            file.add(new.items())
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        what = "the disk is full" if is_disk_full(error) else "the cache cannot be written"
        self._stop(f"{what} ({error}); devices go on sending what is not in the cache")

    def _stop(self, sentence: str) -> None:
        if not self._is_full:  # once
            self._say(sentence)
        self._is_full = True


def _examples(batch: BatchArrays) -> list[Example]:
    """Take a batch apart; labels are one for each example, or one for each token."""
    activations_TD, lengths_B, labels_N = batch
    ends = np.cumsum(lengths_B)[:-1]
    labels = np.split(labels_N, np.arange(1, len(lengths_B)) if len(labels_N) == len(lengths_B) else ends)
    return list(zip(np.split(activations_TD, ends), labels, strict=True))


def _joined(examples: Sequence[Example]) -> BatchArrays:
    activations, labels = zip(*examples, strict=True)
    lengths = np.array([len(each) for each in activations], np.int32)
    return np.concatenate(activations), lengths, np.concatenate(labels).astype(np.int32, copy=False)
