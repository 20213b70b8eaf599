"""Made-up messages to a shop, of four classes, as two machines could hold them: CSV files for docs/first-run.md.

python examples/own-data/tickets.py FOLDER
"""

from __future__ import annotations

import csv
import itertools
import random
import sys
from pathlib import Path

OPENINGS = ("Hello,", "Hi there,", "Dear team,", "Good morning,", "Please help,", "Urgent:", "Hi,", "Once more:")
PROBLEMS = {
    "account": (
        *("I cannot sign in any more", "my password is not accepted", "I want to change my e-mail address"),
        *("please delete my profile", "the code to log in never comes", "my user name is wrong"),
    ),
    "billing": (
        *("you charged my card twice", "the invoice has a wrong amount", "I am waiting for my refund"),
        *("the discount was not taken off the price", "I need a receipt for my taxes", "my payment was declined"),
    ),
    "delivery": (
        *("my parcel has not come", "the driver left the box in the rain", "the tracking number shows nothing"),
        *("I want it sent to another address", "two items are missing from the package", "it came a week late"),
    ),
    "technical": (
        *("the app crashes when I open it", "the screen stays black", "the update does not install"),
        *("it shows error 620 and stops", "the battery is empty after an hour", "it does not connect to the network"),
    ),
}
CLOSINGS = ("Thank you.", "What can I do?", "It is the third time.", "Please answer soon.", "I have waited for days.")


def main() -> None:
    """Deal all messages out to two machines: three of four to train with, the rest to measure with."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        (f"{opening} {problem}. {closing}", category)
        for category, problems in PROBLEMS.items()
        for opening, problem, closing in itertools.product(OPENINGS, problems, CLOSINGS)
    ]
    random.Random(0).shuffle(rows)
    for place, machine in enumerate(("kitchen", "garage")):
        own = rows[place::2]
        _write(folder / f"{machine}-train.csv", own[120:])
        _write(folder / f"{machine}-test.csv", own[:120])


def _write(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("message", "category"), *rows])


if __name__ == "__main__":
    main()
