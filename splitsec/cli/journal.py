"""``splitsec journal``: what left each party, and whether its journal is still as it was written.

Here: which files, and what they look like on a screen.  Not here: the journal (``splitsec.journal``).
"""

from __future__ import annotations

import argparse
import json
import re
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitsec.cli.ledger import files_at

if TYPE_CHECKING:
    from splitsec.journal import Entry

__all__ = ["FILE", "add_parser", "run"]

FILE = "journal.jsonl"
"""What a party's journal is called, in its folder of the state folder."""

DESCRIPTION = """\
Every message that leaves a party stands in its journal, each line chained to the one before.

  splitsec journal show examples/private            what left every party whose state is here
  splitsec journal show state/clinic --last 20      the last lines of one of them
  splitsec journal verify examples/private          was any line changed, removed, added or moved?
  splitsec journal verify state/clinic --head HEX   and does it lead to the entry whose hash was kept elsewhere?
"""

VERIFY = """\
Exit code 0: every journal is as it was written.  3: it is not; one sentence for each finding says which entry.
Who can write a journal and the .head file beside it can work both out anew: keep the hash that `verify` prints
somewhere else, and give it as --head later.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "journal",
        help="what left a party, and whether the journal of it is unchanged",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print the entries", description="Print what left, one line an entry.")
    show.add_argument("--last", type=int, metavar="N", help="only the last N entries of each journal")
    verify = actions.add_parser(
        "verify",
        help="find what was changed",
        description=VERIFY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("--head", metavar="HEX", help="hash of an entry, kept elsewhere; for one journal")
    for action in (show, verify):
        action.add_argument("path", metavar="PATH", help="graph folder, state folder, or one journal")
        action.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Show or verify."""
    files = files_at(Path(arguments.path), FILE, what="journal", how="every run writes one")
    return _show(files, arguments) if arguments.action == "show" else _verify(files, arguments)


def _show(files: list[Path], arguments: argparse.Namespace) -> int:
    from splitsec.errors import UserError
    from splitsec.journal import read

    if arguments.last is not None and arguments.last < 1:
        raise UserError(f"--last {arguments.last}", expected="a number of at least 1", fix="choose another --last")
    for file in files:
        entries = read(file) if arguments.last is None else deque(read(file), arguments.last)
        if len(files) > 1 and not arguments.json:
            print(f"{file}:")
        for entry in entries:
            print(json.dumps(entry.values) if arguments.json else _printable(_line(entry)))
    return 0


def _line(entry: Entry) -> str:
    values = entry.values
    when = f"{entry.number:>8}  {entry.time[:23]}"
    if entry.kind == "opened":
        notes = [f"graph {str(values.get('graph'))[:16]}", f"splitsec {values.get('version')}"]
        if values.get("torn_bytes"):
            notes.append(f"{values['torn_bytes']} bytes of a line that was never finished were cut off")
        if values.get("lost_entries"):
            notes.append(f"{values['lost_entries']} entries before it were lost, or removed")
        return f"{when}  run of {values.get('party')} began: {', '.join(notes)}"
    if entry.kind == "alarm":
        evidence = values.get("evidence")
        numbers = [
            f"{name} {value:.4g}" if isinstance(value, int | float) else f"{name} {value}"
            for name, value in (evidence.items() if isinstance(evidence, dict) else ())
        ]
        return (
            f"{when}  ALARM {values.get('detector')}: {values.get('cut')} from {values.get('peer')}, "
            f"training step {values.get('batch')}: {', '.join(numbers)}"
        )
    place = "" if values.get("step") is None else f"step {values['step']}"
    if values.get("micro_batch") is not None:
        place += f"/{values['micro_batch']}"
    shapes = ", ".join(
        f"{dtype} {shape}" for dtype, shape in zip(_list(values, "dtypes"), _list(values, "shapes"), strict=False)
    )
    parts = (
        f"to {values.get('to')}",
        f"{entry.kind} {values.get('cut')}",
        place,
        shapes,
        f"{values.get('bytes')} bytes",
        f"{values.get('records')} samples",
        _privacy(values.get("privacy")),
        str(values.get("digest"))[:16],
    )
    return "  ".join((when, *filter(None, parts)))


def _printable(text: str) -> str:
    """Without what would speak to the terminal, in case somebody wrote the file who should not have."""
    return "".join(one if one.isprintable() else "?" for one in text)


def _list(values: dict[str, Any], name: str) -> list[Any]:
    found = values.get(name)
    return found if isinstance(found, list) else []


def _privacy(value: object) -> str:
    if value is None:
        return "no privacy"
    return value if isinstance(value, str) else json.dumps(value)


def _verify(files: list[Path], arguments: argparse.Namespace) -> int:
    from splitsec.errors import UserError
    from splitsec.journal import Finding, verify

    head = arguments.head
    if head is not None:
        if not re.fullmatch(r"[0-9a-fA-F]{64}", head):
            raise UserError(
                f"--head {head[:80]}",
                expected="64 hexadecimal digits, as `splitsec journal verify` prints them",
                fix="copy the whole hash",
            )
        if len(files) > 1:
            raise UserError(
                f"--head with {len(files)} journals", expected="one journal", fix="name the file that the hash is of"
            )
    reports = [(file, *_last(file), verify(file, head)) for file in files]
    for gone in _gone(Path(arguments.path), files):
        reports.append(
            (gone, 0, None, [Finding(None, None, "the journal is gone, and its head file or ledger is there")])
        )
    if arguments.json:
        document = [
            {
                "file": str(file),
                "entries": number,
                "head": last,
                "findings": [{"entry": one.number, "line": one.line, "what": one.what} for one in findings],
            }
            for file, number, last, findings in reports
        ]
        print(json.dumps({"journals": document}, indent=2))
    else:
        for file, number, last, findings in reports:
            if not findings and not number:
                print(f"{file}: no entry: a run was killed as it began, or somebody emptied it")
            elif not findings:
                print(f"{file}: {number} entries, as they were written; the last one's hash is\n  {last}")
            for one in findings:
                print(f"{file}: {one.what}")
    return 3 if any(findings for *_, findings in reports) else 0


def _gone(place: Path, files: list[Path]) -> list[Path]:
    """Journals that are not there, beside books that are, in the folders that were looked through."""
    from splitsec.journal import HEAD_SUFFIX

    folders = {file.parent.parent for file in files} if place.is_dir() else set()
    missing = []
    for folder in sorted({party for around in folders for party in around.iterdir() if party.is_dir()}):
        left = (folder / f"{FILE}{HEAD_SUFFIX}").exists() or (folder / "ledger.sqlite").exists()
        if left and not (folder / FILE).exists():
            missing.append(folder / FILE)
    return missing


def _last(file: Path) -> tuple[int, str | None]:
    """Number and hash of the last entry that can be read, as the file has them."""
    from splitsec.errors import UserError
    from splitsec.journal import read

    number, last = 0, None
    try:
        for entry in read(file):
            number, last = entry.number, entry.hash
    except UserError:  # ``verify`` says more about it
        pass
    return number, last
