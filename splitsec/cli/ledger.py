"""``splitsec ledger``: what each party has spent of its privacy budget.

Here: which files, and what they look like on a screen.  Not here: the ledger (``splitsec.privacy.ledger``).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitsec.privacy.ledger import Entry

__all__ = ["FILE", "add_parser", "files_at", "run"]

FILE = "ledger.sqlite"
"""What a party's ledger is called, in its folder of the state folder."""

DESCRIPTION = """\
Show what every party has released about its samples, and what that costs: one line for each cut, mechanism and data
set, with the largest epsilon of any sample.  Also while a party runs; nothing is written.

  splitsec ledger examples/private                      every party whose state is here (state/PARTY/ledger.sqlite)
  splitsec ledger state/clinic/ledger.sqlite --json     one file, as JSON
"""

CLEAR = "in_the_clear"
CLEAR_KEYS = ("party", "cut", "dataset", "protects", "releases", "samples")

COLUMNS = """\
The columns: releases, the most of any sample, with what was reserved and not used before a crash; epsilon, over
everything that carried the same sample and protects the same thing (inputs, or labels), so lines of two cuts show one
value, not two to be added; alone, what this line would cost without the others.  What left without noise stands
apart (in JSON `in_the_clear`), and makes the epsilon of what it carried unbounded.  In JSON, `null` stands for an
epsilon that nothing bounds, for no budget, and for what a mechanism does not have.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "ledger",
        help="what was spent of the privacy budget",
        description=DESCRIPTION,
        epilog=COLUMNS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="graph folder, state folder, or one ledger file")
    parser.add_argument(
        "--delta", type=float, metavar="D", help="account at this delta, not at the one of the last run (no budgets)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Read and print."""
    from splitsec.errors import UserError

    if arguments.delta is not None and not 0 < arguments.delta < 1:
        raise UserError(
            f"--delta {arguments.delta:g}", expected="a number above 0 and below 1", fix="try 1e-5, or leave it out"
        )
    place = Path(arguments.folder)
    entries: list[Entry] = []
    for file in files_at(place, FILE, what="ledger", how="a run whose graph or party file asks for privacy keeps one"):
        entries += _statement(file, arguments.delta)
    clear = [entry for entry in entries if entry.mechanism == CLEAR]
    entries = [entry for entry in entries if entry.mechanism != CLEAR]
    if arguments.json:
        document = {
            "entries": [_as_json(entry) for entry in entries],
            "in_the_clear": [
                {name: value for name, value in _as_json(entry).items() if name in CLEAR_KEYS} for entry in clear
            ],
        }
        print(json.dumps(document, indent=2, allow_nan=False))
        return 0
    if entries:
        _print(entries)
    for entry in clear:
        print(
            f"in the clear: {entry.party}, {entry.cut}, {entry.dataset}: {entry.protects} of {entry.samples:,} "
            f"samples, {entry.releases:,} times"
        )
    if not entries and not clear:
        print("nothing was released that a ledger counts")
    return 0


def files_at(place: Path, name: str, *, what: str, how: str) -> list[Path]:
    """Every party's file called ``name`` at ``place``: a graph folder, a state folder, a party's, or the file itself.

    ``what``, ``how``: what it is, and how one comes to be, for errors.  Raises ``UserError`` where there is none.
    """
    from splitsec.errors import UserError

    try:
        if place.is_file():
            return [place]
        if found := [file for folder in _state_folders(place) if (file := folder / name).is_file()]:
            return found
        for pattern in (f"state/*/{name}", f"*/{name}", name):
            if found := sorted(file for file in place.glob(pattern) if file.is_file()):
                return found
        seen = f"no {what} there" if place.exists() else "there is no such file or folder"
    except OSError as error:
        seen = f"cannot be read: {error.strerror}"
    raise UserError(
        f"{place}: {seen}",
        expected=f"a graph folder with state/PARTY/{name}, its state folder, or a {what} file",
        fix=f"check the path; {how}",
    )


def _state_folders(place: Path) -> list[Path]:
    """Where the parties of a graph folder keep their books, as their files say; none where it is another folder."""
    from splitsec.partyfile import load_party

    if not (place / "graph.yaml").is_file():
        return []
    return [load_party(file).state_folder for file in sorted((place / "parties").glob("*.yaml"))]


def _statement(file: Path, delta: float | None) -> list[Entry]:
    from splitsec.errors import UserError
    from splitsec.privacy.errors import PrivacyError
    from splitsec.privacy.ledger import read

    try:
        return read(file).statement(delta)
    except PrivacyError as error:
        seen = str(error) if str(error).startswith(f"{file}: ") else f"{file}: {error}"
        lacks_delta = "which delta" in seen
        raise UserError(
            seen,
            expected="a ledger that a run of this version, or an older one, keeps",
            fix="give --delta" if lacks_delta else "check the path; do not begin anew in place of a damaged ledger",
        ) from None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _as_json(entry: Entry) -> dict[str, Any]:
    from dataclasses import asdict

    return {name: _finite(value) if isinstance(value, float) else value for name, value in asdict(entry).items()}


def _print(entries: list[Entry]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140)
    table = Table(title="privacy spent", title_justify="left")
    for column in ("party", "cut", "data set", "protects", "mechanism"):
        table.add_column(column, overflow="fold")
    for column in ("noise", "clip", "samples", "releases", "delta", "alone", "epsilon", "budget"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in entries:
        table.add_row(
            entry.party,
            entry.cut,
            entry.dataset,
            entry.protects,
            entry.mechanism.replace("_", " "),
            _number(entry.noise_multiplier),
            _number(entry.clip),
            f"{entry.samples:,}",
            f"{entry.releases:,}",
            f"{entry.delta:g}",
            _epsilon(entry.epsilon_alone),
            _epsilon(entry.epsilon),
            "none" if entry.epsilon_budget is None else _number(entry.epsilon_budget),
        )
    console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _epsilon(value: float) -> str:
    """Rounded up: a figure that is shown is never below the one that holds."""
    return f"{math.ceil(value * 1000) / 1000:.3f}" if math.isfinite(value) else "no bound"
