"""``splitsec bench clients``: a simulation of many clients in turn, beside one of a few: its memory, and a step's time.

Here: runs of each size in turn, and the memory of all their processes together as the kernel counts it (PSS: a page
that several share is divided among them).  The processes are those of ``simulate``.  Linux only: /proc.  Not here: what
is trained (``crowd``).

A client's step is what its own turns took, divided by their steps.  A turn is that at the server, from the end of one
turn to the end of the next: with the weights handed on and what a client needs to come out of its sleep.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from splitsec.bench.crowd import BATCH, BATCHES, write

__all__ = ["Memory", "Report", "Run", "add_arguments", "bench_clients", "memory_of", "run", "weigh"]

MEMBERS: Final = (5, 100)
TURNS: Final = 100
"""Training turns that are timed in a run, at least; those of the first epoch are not."""
ROUNDS: Final = 3
BYTES_MAX: Final = 3_000_000_000
"""What the whole simulation of 100 clients may take."""
RATIO_MAX: Final = 1.10
"""How many times a step of 5 clients a step of 100 may take."""
SAMPLING_SECONDS: Final = 0.5


@dataclass(frozen=True)
class Run:
    """One simulation.  Times: medians over training turns after the first epoch.  Bytes: PSS."""

    members: int
    startup_seconds: float
    """From the first process to the last connection."""
    step_ms: float
    turn_ms: float
    """Of a turn, divided by its steps."""
    cpu_ms: float
    """Processor time of all processes but the one that measures, by step: also that of those who wait."""
    peak_bytes: int
    """All processes together, at the most."""
    clients_bytes: int
    """The median client at that moment."""
    private_bytes: int
    """What of it no other process shares."""
    server_bytes: int
    parent_bytes: int
    """The process that called ``simulate``, and that measures."""
    warm_bytes: int
    """What the processes are forked from; 0 where they are not."""


@dataclass(frozen=True)
class Report:
    """Runs of each size, in the order in which they took turns."""

    runs: Sequence[Run]
    forked: bool
    batch: int = BATCH
    batches: int = BATCHES
    load: float = field(default_factory=lambda: os.getloadavg()[0])

    def of(self, members: int) -> list[Run]:
        """The runs of one size."""
        return [one for one in self.runs if one.members == members]

    def ratio(self, what: str) -> float | None:
        """The largest size over the smallest, of a field of ``Run``: the median of the rounds' own ratios."""
        sizes = sorted({one.members for one in self.runs})
        if len(sizes) < 2:
            return None
        pairs = zip(self.of(sizes[0]), self.of(sizes[-1]), strict=True)
        return float(statistics.median(getattr(many, what) / getattr(few, what) for few, many in pairs))

    @property
    def peak_bytes(self) -> int:
        """Of any run."""
        return max(one.peak_bytes for one in self.runs)

    @property
    def verdicts(self) -> dict[str, bool]:
        """Whether it is as it should be, in words."""
        found = {f"at most {BYTES_MAX / 1e9:g} GB in all": self.peak_bytes < BYTES_MAX}
        for what, name in (("step_ms", "a step"), ("turn_ms", "a step with its share of the turn")):
            if (ratio := self.ratio(what)) is not None:
                found[f"{name}: at most {RATIO_MAX:g} times that of few clients"] = ratio <= RATIO_MAX
        return found

    def as_json(self) -> dict[str, Any]:
        """The document that ``--json`` prints."""
        import torch

        return {
            "bench": "clients",
            "cores": os.cpu_count(),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "load": round(self.load, 2),
            "forked": self.forked,
            "batch": self.batch,
            "batches": self.batches,
            "runs": [asdict(one) for one in self.runs],
            "step_ratio": self.ratio("step_ms"),
            "turn_ratio": self.ratio("turn_ms"),
            "cpu_ratio": self.ratio("cpu_ms"),
            "verdicts": self.verdicts,
        }


def bench_clients(
    members: Sequence[int] = MEMBERS,
    *,
    rounds: int = ROUNDS,
    batches: int = BATCHES,
    turns: int = TURNS,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Simulate each number of clients in ``members``, ``rounds`` times in turn."""
    from splitsec.process import leave_the_compiler_out

    leave_the_compiler_out()
    runs = []
    load = os.getloadavg()[0]
    for number in range(rounds):
        for size in members if number % 2 == 0 else members[::-1]:
            tell(f"round {number + 1} of {rounds}: {size} clients ...")
            runs.append(measure(size, batches=batches, epochs=1 + max(1, -(-turns // size))))
            tell(f"  {runs[-1].step_ms:.2f} ms a step, {runs[-1].peak_bytes / 1e9:.2f} GB")
    return Report(runs, forked=all(one.warm_bytes for one in runs), batches=batches, load=load)


def measure(members: int, *, batches: int, epochs: int) -> Run:
    """One simulation."""
    from splitsec.simulation import simulate

    steps: list[float] = []
    whole: list[float] = []
    worked = 0.0
    began: float | None = None

    with tempfile.TemporaryDirectory(prefix="splitsec-bench-") as place, _Scales() as scales:
        folder = write(Path(place), members, batches=batches, epochs=epochs)

        def watch(party: str, event: dict[str, Any]) -> None:
            nonlocal worked, began
            if event["event"] == "turn":
                scales.rest = event["epoch"] > 0 and event["phase"] == "train"
                if scales.rest and began is None:
                    began = processor_seconds()
                elif not scales.rest and began is not None:
                    worked, began = worked + processor_seconds() - began, None
            if event["event"] == "turn over" and event["phase"] == "train" and event["epoch"] > 0:
                (whole if party == "server" else steps).append(1000 * event["seconds"] / batches)

        result = simulate(folder, watch=watch)
    clients = [one for name, one in scales.heaviest if name.startswith("client-")]
    by_name = dict(scales.heaviest)
    return Run(
        members=members,
        startup_seconds=round(result.startup_seconds, 2),
        step_ms=round(statistics.median(steps), 3),
        turn_ms=round(statistics.median(whole), 3),
        cpu_ms=round(1000 * worked / (len(whole) * batches), 3),
        peak_bytes=sum(one.shared for _, one in scales.heaviest),
        clients_bytes=int(statistics.median(one.shared for one in clients)),
        private_bytes=int(statistics.median(one.private for one in clients)),
        server_bytes=by_name["server"].shared,
        parent_bytes=by_name[""].shared,
        warm_bytes=by_name["splitsec.nest"].shared if "splitsec.nest" in by_name else 0,
    )


# --- memory


@dataclass(frozen=True)
class Memory:
    """Of one process, in bytes.  ``shared``: PSS; ``private``: what no other process maps."""

    shared: int
    private: int


def memory_of(pid: int) -> Memory | None:
    """What the kernel counts; None where the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    found = {name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return Memory(found["Pss"], found["Private_Dirty"] + found["Private_Clean"]) if found.get("Pss") else None


def weigh() -> list[tuple[str, Memory]]:
    """This process (named ``""``) and all that come of it, each by the last word of its command line."""
    found = []
    for pid in _family():
        memory, name = memory_of(pid), _name(pid)
        if memory is not None and name is not None:
            found.append((name if pid != os.getpid() else "", memory))
    return found


def processor_seconds() -> float:
    """What all that came of this process, and still runs, has computed so far."""
    ticks = 0
    for pid in _family():
        if pid != os.getpid() and (numbers := _stat(pid)) is not None:
            ticks += int(numbers[11]) + int(numbers[12])  # utime, stime of proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")


def _family() -> list[int]:
    """Process ids: this one, and all that came of it."""
    children: dict[int, list[int]] = {}
    for place in Path("/proc").iterdir():
        if place.name.isdecimal() and (numbers := _stat(int(place.name))) is not None:
            children.setdefault(int(numbers[1]), []).append(int(place.name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found


def _stat(pid: int) -> list[str] | None:
    """The numbers of /proc/PID/stat from the third on; None where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None


def _name(pid: int) -> str | None:
    """The last word of its command line; None where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")[-1].decode()
    except OSError:
        return None


class _Scales:
    """Weighs now and again, but while it is told to rest: reading the memory of a hundred processes takes a moment."""

    def __init__(self) -> None:
        self.rest = False
        self.heaviest: list[tuple[str, Memory]] = []
        self._most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._weigh, name="scales", daemon=True)

    def __enter__(self) -> _Scales:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _weigh(self) -> None:
        while not self._over.wait(SAMPLING_SECONDS):
            if self.rest:
                continue
            found = weigh()
            total = sum(memory.shared for _, memory in found)
            if total > self._most:
                self._most, self.heaviest = total, found


# --- the command ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``splitsec bench clients``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, nothing else, on standard output")
    parser.add_argument(
        "--members", type=_sizes, default=MEMBERS, metavar="LIST", help="clients of each simulation (default: 5,100)"
    )
    parser.add_argument(
        "--rounds", type=_counted, default=ROUNDS, metavar="N", help="runs of each (default: %(default)s)"
    )
    parser.add_argument(
        "--batches", type=_counted, default=BATCHES, metavar="N", help="batches of a turn (default: %(default)s)"
    )


def _counted(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 1000")
    return int(text)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_counted(one) for one in text.split(","))


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 0 where all is as it should be."""
    os.environ["OMP_NUM_THREADS"] = "1"
    report = bench_clients(
        arguments.members,
        rounds=arguments.rounds,
        batches=arguments.batches,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        print("\n".join(_lines(report)))
    return 0 if all(report.verdicts.values()) else 1


COLUMNS: Final[Sequence[tuple[str, str, float, int]]] = (
    ("start, s", "startup_seconds", 1, 1),
    ("step, ms", "step_ms", 1, 2),
    ("turn, ms", "turn_ms", 1, 2),
    ("cpu, ms", "cpu_ms", 1, 2),
    ("in all, GB", "peak_bytes", 1e9, 2),
    ("a client, MB", "clients_bytes", 1e6, 1),
    ("its own, MB", "private_bytes", 1e6, 1),
    ("server, MB", "server_bytes", 1e6, 0),
    ("parent, MB", "parent_bytes", 1e6, 0),
)
"""Of the table: title, field of a run, unit, digits."""


def _lines(report: Report) -> Iterator[str]:
    how = "forked from one warm process" if report.forked else "each process started anew"
    yield f"clients in turn, batches of {report.batch}, {report.batches} to a turn; {how}; medians of the runs"
    yield "clients" + "".join(f"{title:>14}" for title, *_ in COLUMNS)
    for members in sorted({one.members for one in report.runs}):
        middle = [
            f"{statistics.median(getattr(one, name) for one in report.of(members)) / unit:14.{digits}f}"
            for _, name, unit, digits in COLUMNS
        ]
        yield f"{members:7}" + "".join(middle)
    ratios = [(what, report.ratio(f"{what}_ms")) for what in ("step", "turn", "cpu")]
    if all(ratio is not None for _, ratio in ratios):
        yield "many over few: " + ", ".join(f"{what} {ratio:.3f}" for what, ratio in ratios)
    for text, met in report.verdicts.items():
        yield f"{'yes' if met else 'NO':4}{text}"


def main() -> int:
    """``python -m splitsec.bench.clients``."""
    parser = argparse.ArgumentParser(prog="splitsec bench clients", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    sys.exit(code)
