"""``splitsec listen``: read traces, as lines for people, as JSON, or as sums by lane; also while they grow.

Here: which files, which entries, what they look like.  Not here: the file (``splitsec.trace``).
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from splitsec.trace import Entry, TraceReader

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Read what `--trace` of `splitsec join` or `splitsec simulate` wrote: one line for each message that passed a party's
door, and for each connection that opened, broke, came back or closed.  Never what was in a message: it is not there.

  splitsec listen traces                        every party of a simulation, merged by time
  splitsec listen clinic-a.trace.jsonl -f       a run as it goes on, to its end or Ctrl-C
  splitsec listen traces --summary              sums by lane: messages, bytes, gaps, speed, time spent waiting
  splitsec listen traces --peer server --kind gradient --kind interrupted
"""

COLUMNS = """\
The columns: seconds since the first of the runs began; who wrote the line, the way the message went, and the peer;
kind and lane; step and micro-batch; bytes before encryption; shapes; `gap`, the time since the message before it on
this lane; `waited`, how long the computing thread stood still until it came.
"""

POLL_SECONDS: Final = 0.2
QUIET_SECONDS: Final = 1.0
"""After which a trace that does not grow is looked at: does anybody still write it?"""
BATCH: Final = 1000
"""Lines whose widths are learned together."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    from splitsec.trace import CONNECTION, KINDS

    parser = commands.add_parser(
        "listen",
        help="read the trace of a party's traffic",
        description=DESCRIPTION,
        epilog=COLUMNS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "places", metavar="FILE_OR_DIR", nargs="+", help="a trace, or a folder with files that end in .trace.jsonl"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run's last line, or Ctrl-C")
    parser.add_argument("--peer", metavar="P", action="append", help="only what went to or came from P (repeatable)")
    parser.add_argument(
        "--kind",
        metavar="K",
        action="append",
        choices=(*KINDS, *CONNECTION),
        help=f"only {', '.join(KINDS)}; or {', '.join(CONNECTION)} (repeatable)",
    )
    parser.add_argument("--all-runs", action="store_true", help="also earlier runs in the same file, not only the last")
    parser.add_argument("--summary", action="store_true", help="sums by lane in place of lines")
    parser.add_argument("--json", action="store_true", help="JSON: one object a line; with --summary, one document")


def run(arguments: argparse.Namespace) -> int:
    """Read, choose, print."""
    places = [Path(place) for place in arguments.places]
    traces = _Traces(places, all_runs=arguments.all_runs, may_be_empty=arguments.follow)
    summary = _Summary() if arguments.summary else None
    lines = _Lines(colours=_wants_colours(), plain=not _can_write("→←"))
    choosy = bool(arguments.peer or arguments.kind)
    checked = shown = False

    def show(entries: list[Entry]) -> None:
        nonlocal checked, shown
        if not checked:
            _check_peers(arguments.peer, traces)
            checked = True
        chosen = [entry for entry in entries if _frames(entry) or _is_chosen(entry, arguments)]
        shown = shown or any(not _frames(entry) for entry in chosen)
        if summary is not None:
            for entry in chosen:
                summary.add(entry)
        elif arguments.json:
            for entry in chosen:
                if not (choosy and _frames(entry)):
                    print(json.dumps(_as_json(entry)))
        else:
            for line in lines.of(chosen):
                print(line)
        sys.stdout.flush()

    try:
        if arguments.follow:
            _follow(traces, show)
        else:
            entries = traces.merged()
            while batch := list(islice(entries, BATCH)):
                show(batch)
        if summary is not None:
            summary.print(as_json=arguments.json)
        for note in traces.notes(followed=arguments.follow):
            print(f"splitsec: {note}", file=sys.stderr)
        if not shown:
            print("splitsec: there is nothing to show", file=sys.stderr)
    finally:
        traces.close()
    return 0


def _frames(entry: Entry) -> bool:
    """Whether it says how a run begins or ends: no message, and nobody's connection."""
    return entry.event in ("begun", "over")


def _is_chosen(entry: Entry, arguments: argparse.Namespace) -> bool:
    return (not arguments.peer or entry.peer in arguments.peer) and (
        not arguments.kind or (entry.event or entry.kind) in arguments.kind
    )


def _check_peers(wanted: list[str] | None, traces: _Traces) -> None:
    from splitsec.errors import UserError

    known = sorted({party for reader in traces.readers if reader.begun for party in reader.begun.parties})
    for peer in wanted or ():
        if known and peer not in known:
            raise UserError(
                f"--peer {peer}: no trace here knows such a party",
                expected="one of " + ", ".join(known),
                fix="choose another --peer",
            )


# --- the files


class _Traces:
    """All traces at ``places``; those of a folder are looked for again while they are followed."""

    def __init__(self, places: list[Path], *, all_runs: bool, may_be_empty: bool) -> None:
        from splitsec.errors import UserError

        self.places = places
        self.all_runs = all_runs
        self.readers: list[TraceReader] = []
        self._known: set[Path] = set()
        self.abandoned: list[Path] = []
        for place in places:
            if not place.exists():
                raise UserError(
                    f"{place}: there is no such file or folder",
                    expected="a trace, or a folder of traces",
                    fix="check the path; a run writes one with --trace",
                )
        self.look()
        if not self.readers and not may_be_empty:
            raise UserError(
                f"{', '.join(map(str, places))}: no trace there",
                expected="files whose names end in .trace.jsonl",
                fix="write them with `splitsec simulate FOLDER --trace DIR`, or name a file of another name itself",
            )

    def look(self) -> None:
        """Open what is there and was not before."""
        from splitsec.trace import SUFFIX, TraceReader

        for place in self.places:
            for file in sorted(place.glob(f"*{SUFFIX}")) if place.is_dir() else [place]:
                if file not in self._known:
                    self._known.add(file)
                    self.readers.append(TraceReader(file, all_runs=self.all_runs))

    def merged(self) -> Iterator[Entry]:
        """Every entry that is there by now and was not given before, by the clock."""
        return heapq.merge(*(reader.entries() for reader in self.readers), key=attrgetter("clock"))

    def over(self, *, quiet: bool) -> bool:
        """Nothing will come any more: every run has said its last line, or (asked when ``quiet``) nobody writes it."""
        open_ones = [reader for reader in self.readers if not reader.over]
        if not self.readers or (open_ones and not quiet):
            return False
        self.abandoned = [reader.file for reader in open_ones if reader.begun is not None and reader.abandoned()]
        return len(self.abandoned) == len(open_ones)

    def notes(self, *, followed: bool) -> Iterator[str]:
        """What a person should know beside what was shown."""
        for reader in self.readers:
            yield from reader.notes
            if reader.earlier and reader.begun is not None:
                runs = "an earlier run" if reader.earlier == 1 else f"{reader.earlier} earlier runs"
                yield f"{reader.file}: also holds {runs}: --all-runs shows all"
            if reader.begun is None and not followed:
                yield f"{reader.file}: empty"
            elif reader.cut_off and not followed:
                yield f"{reader.file}: the last line is cut off: the run goes on, was killed, or the disk was full"
            if reader.file in self.abandoned:
                yield f"{reader.file}: nobody writes it any more, and the run's last line is missing: it was killed?"

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


def _follow(traces: _Traces, show: Callable[[list[Entry]], None]) -> None:
    """Show what is there, then what comes, until every run is over; Ctrl-C ends it in peace."""
    try:
        grew = time.monotonic()
        if not traces.readers:
            print("splitsec: no trace there yet; waiting for one", file=sys.stderr)
        ending = False
        while True:
            if entries := list(traces.merged()):
                show(entries)
                grew = time.monotonic()
            elif ending:
                return
            # A run may have written between our reading and our asking: so once more, then it is over.
            ending = traces.over(quiet=time.monotonic() - grew >= QUIET_SECONDS)
            if not ending:
                time.sleep(POLL_SECONDS)
                traces.look()
    except KeyboardInterrupt:
        if sys.stdout.isatty():
            print()


# --- lines for people


def _wants_colours() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _can_write(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


HEADING: Final = ("seconds", "", "", "", "kind", "lane", "step", "micro", "size", "shape", "gap", "waited")
RIGHT: Final = frozenset((0, 6, 7, 8, 10, 11))
LEAST: Final = (9, 0, 1, 0, 11, 0, 4, 5, 9, 0, 8, 8)
COLOURS: Final = {
    "out": "32",
    "in": "36",
    "begun": "1",
    "over": "1",
    "interrupted": "31",
    "resumed": "33",
    "gap": "2",
    "heading": "2",
}


class _Lines:
    """Entries as aligned lines.  Columns grow with what they have to hold, and never shrink."""

    def __init__(self, *, colours: bool, plain: bool) -> None:
        self.colours = colours
        self.arrows = ("->", "<-") if plain else ("→", "←")
        self.widths = list(LEAST)
        self.began: float | None = None
        self.headed = False

    def of(self, entries: list[Entry]) -> Iterator[str]:
        """The lines of ``entries``; the first ones come after a heading."""
        if not entries:
            return
        if self.began is None:
            self.began = min(entry.begun.clock for entry in entries)
        rows = [(entry, self._cells(entry)) for entry in entries]
        for entry, cells in rows:
            if not _frames(entry):
                self.widths = [max(width, len(cell)) for width, cell in zip(self.widths, cells, strict=True)]
            self.widths[1] = max(self.widths[1], len(cells[1]))
        if not self.headed:
            self.headed = True
            yield self._painted("heading", self._line(HEADING))
        for entry, cells in rows:
            if _frames(entry):
                yield self._painted(
                    entry.event, f"{cells[0]:>{self.widths[0]}}  {cells[1]:<{self.widths[1]}} {cells[4]}"
                )
            else:
                yield self._painted(entry.event or ("out" if entry.out else "in"), self._line(cells))

    def _cells(self, entry: Entry) -> tuple[str, ...]:
        assert self.began is not None
        at = f"{entry.clock - self.began:.3f}"
        party = entry.begun.party
        match entry.event:
            case "begun":
                clock = datetime.fromtimestamp(entry.begun.clock, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
                return at, party, "", "", f"begins to {entry.begun.action}: {entry.begun.graph}, {clock}", *[""] * 7
            case "over":
                return at, party, "", "", f"is over: {entry.how}", *[""] * 7
            case "":
                key = (*map(str, entry.key), "", "")
                return (
                    at,
                    party,
                    self.arrows[0 if entry.out else 1],
                    entry.peer,
                    entry.kind,
                    entry.lane,
                    key[0],
                    key[1],
                    _size(entry.bytes),
                    _shapes(entry.tensors),
                    "" if entry.gap is None else _seconds(entry.gap),
                    "" if entry.out else _seconds(entry.waited),
                )
            case "interrupted":
                about = f"tries again for {entry.patience:g} s"
            case _:
                about = entry.how
        return at, party, "-", entry.peer, entry.event, about, *[""] * 6

    def _line(self, cells: Iterable[str]) -> str:
        padded = [
            f"{cell:>{width}}" if place in RIGHT else f"{cell:<{width}}"
            for place, (cell, width) in enumerate(zip(cells, self.widths, strict=True))
        ]
        return f"{padded[0]}  {padded[1]} {padded[2]} {'  '.join(padded[3:])}".rstrip()

    def _painted(self, what: str, line: str) -> str:
        colour = COLOURS.get(what)
        return f"\x1b[{colour}m{line}\x1b[0m" if self.colours and colour else line


def _shapes(tensors: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
    if len(tensors) > 1:
        return f"{len(tensors)} tensors"
    return "".join(f"{dtype} {list(shape)}" for dtype, shape in tensors)


def _size(count: float) -> str:
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GiB"


def _seconds(value: float) -> str:
    return f"{1000 * value:.1f} ms" if value < 0.99995 else f"{value:.2f} s"


def _as_json(entry: Entry) -> dict[str, Any]:
    """The line as it stands in the file, with the party and the time by its clock in front."""
    at = datetime.fromtimestamp(entry.clock, UTC).isoformat(timespec="microseconds")
    return {"party": entry.begun.party, "at": at, **(entry.line or {})}


# --- sums


@dataclass
class _Sum:
    """What passed one lane in one direction, over all runs that are read."""

    messages: int = 0
    bytes: int = 0
    timed_bytes: int = 0
    """Without the first message of a run: nothing says how long that one took."""
    waited: float = 0.0
    gaps: array[float] = field(default_factory=lambda: array("d"))

    def as_json(self) -> dict[str, Any]:
        gaps = sorted(self.gaps)
        lasted = math.fsum(gaps)
        return {
            "messages": self.messages,
            "bytes": self.bytes,
            "gap_median": round(statistics.median(gaps), 6) if gaps else None,
            "gap_p95": gaps[math.ceil(0.95 * len(gaps)) - 1] if gaps else None,
            "mib_per_second": round(self.timed_bytes / lasted / 2**20, 6) if lasted else None,
            "waited": round(self.waited, 6),
        }


@dataclass
class _PartySum:
    runs: int = 0
    before: float = 0.0
    """Seconds that the runs before the last one took."""
    last: float = 0.0
    waited: float = 0.0
    interruptions: int = 0


class _Summary:
    """Sums by party and lane."""

    def __init__(self) -> None:
        self.lanes: dict[tuple[str, bool, str, str, str], _Sum] = {}
        self.parties: dict[str, _PartySum] = {}

    def add(self, entry: Entry) -> None:
        """Count one entry."""
        party = self.parties.setdefault(entry.begun.party, _PartySum())
        if entry.event == "begun":
            party.runs += 1
            party.before += party.last
            party.last = 0.0
            return
        party.last = entry.seconds
        party.interruptions += entry.event == "interrupted"
        if entry.event:
            return
        lane = self.lanes.setdefault((entry.begun.party, entry.out, entry.peer, entry.kind, entry.lane), _Sum())
        lane.messages += 1
        lane.bytes += entry.bytes
        lane.waited += entry.waited
        party.waited += entry.waited
        if entry.gap is not None:
            lane.gaps.append(entry.gap)
            lane.timed_bytes += entry.bytes

    def as_json(self) -> dict[str, Any]:
        """One document."""
        return {
            "parties": {
                name: {
                    "runs": party.runs,
                    "seconds": round(party.before + party.last, 6),
                    "waited": round(party.waited, 6),
                    "interruptions": party.interruptions,
                }
                for name, party in self.parties.items()
            },
            "lanes": [
                {
                    "party": party,
                    "dir": "out" if out else "in",
                    "peer": peer,
                    "kind": kind,
                    "lane": lane,
                    **sums.as_json(),
                }
                for (party, out, peer, kind, lane), sums in sorted(
                    self.lanes.items(), key=lambda item: (item[0][0], not item[0][1], *item[0][2:])
                )
            ],
        }

    def print(self, *, as_json: bool) -> None:
        """The table, or the document, on standard output."""
        document = self.as_json()
        if as_json:
            print(json.dumps(document, indent=2))
            return
        from rich.console import Console
        from rich.table import Table

        console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140)
        table = Table(title="what passed", title_justify="left")
        for column in ("party", "", "peer", "kind", "lane"):
            table.add_column(column)
        for column in ("messages", "bytes", "median gap", "95% of gaps", "MiB/s", "waited"):
            table.add_column(column, justify="right")
        arrows = ("→", "←") if _can_write("→←") else ("->", "<-")
        for row in document["lanes"]:
            out = row["dir"] == "out"
            table.add_row(
                row["party"],
                arrows[0 if out else 1],
                row["peer"],
                row["kind"],
                row["lane"],
                f"{row['messages']:,}",
                _size(row["bytes"]),
                "-" if row["gap_median"] is None else _seconds(row["gap_median"]),
                "-" if row["gap_p95"] is None else _seconds(row["gap_p95"]),
                "-" if row["mib_per_second"] is None else f"{row['mib_per_second']:.3f}",
                "" if out else _seconds(row["waited"]),
            )
        console.print(table)
        for name, party in document["parties"].items():
            runs = "" if party["runs"] == 1 else f" in {party['runs']} runs"
            breaks = party["interruptions"]
            broken = f"; {breaks} interruption{'s' if breaks != 1 else ''} of a connection" if breaks else ""
            console.print(
                f"{name}: {party['seconds']:.1f} s{runs}, {party['waited']:.1f} s of them waiting for messages{broken}"
            )
