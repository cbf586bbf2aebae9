"""``splitsec bench clients``: a simulation of many clients in turn, beside one of a few: its memory, and a step's time.

Here: one folder for any number of clients (a ``round_robin`` group and a server, the network of examples/vanilla,
made-up images), runs of each size in turn, and the memory of all their processes together as the kernel counts it (PSS:
a page that several share is divided among them).  The processes are those of ``simulate``.  Linux only: /proc.

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

import torch
from torch import nn

__all__ = ["Report", "Run", "add_arguments", "bench_clients", "memory_of", "run", "samples", "stem", "trunk", "write"]

MEMBERS: Final = (5, 100)
BATCH: Final = 50
BATCHES: Final = 16
"""Training batches of a turn."""
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
        """The largest size over the smallest, of ``step_ms`` or ``turn_ms``: the median of the rounds' own ratios."""
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

    with tempfile.TemporaryDirectory(prefix="splitsec-bench-") as place, _Scales() as scales:
        folder = write(Path(place), members, batches=batches, epochs=epochs)

        def watch(party: str, event: dict[str, Any]) -> None:
            if event["event"] == "turn":
                scales.rest = event["epoch"] > 0 and event["phase"] == "train"
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
    children: dict[int, list[int]] = {}
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                parent = int((place / "stat").read_text().rpartition(") ")[2].split()[1])
            except OSError:
                continue  # it ended meanwhile
            children.setdefault(parent, []).append(int(place.name))
    found = []
    waiting = [os.getpid()]
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        if (memory := memory_of(pid)) is not None:
            words = (
                Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0") if pid != os.getpid() else [b""]
            )
            found.append((words[-1].decode(), memory))
    return found


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


# --- what is trained


def stem() -> nn.Module:
    """Images ``[n, 1, 28, 28]`` to activations ``[n, 32, 7, 7]``."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def trunk() -> nn.Module:
    """Activations ``[n, 32, 7, 7]`` to scores ``[n, 10]``."""
    return nn.Sequential(
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 7 * 7, 128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, 10),
    )


def samples(site: int, batches: int) -> dict[str, torch.Tensor]:
    """Ten patterns under noise, and which it is: ``batches`` full batches of them."""
    patterns = torch.rand(10, 1, 28, 28, generator=torch.Generator().manual_seed(10))
    generator = torch.Generator().manual_seed(site)
    count = batches * BATCH
    y = torch.randint(10, (count,), generator=generator)
    return {"x": (patterns[y] + torch.rand(count, 1, 28, 28, generator=generator)) / 2, "y": y}


def test(site: int, batches: int) -> dict[str, torch.Tensor]:
    """One batch to evaluate with."""
    return samples(10_000 + site, 1)


def write(folder: Path, members: int, *, batches: int = BATCHES, epochs: int = 2) -> Path:
    """A folder as ``simulate`` takes it, in ``folder``: so many clients in turn, and a server."""
    names = [f"client-{number:03}" for number in range(members)]
    graph = {
        "splitsec": 1,
        "name": "bench-clients",
        "parties": {
            **{name: {} for name in names},
            "server": {"listen": "tcp://127.0.0.1:7400", "address": "tcp://127.0.0.1:7400"},
        },
        "groups": {"clients": {"members": names, "schedule": "round_robin"}},
        "segments": {"stem": {"at": "clients", "data": "x"}, "trunk": {"at": "server", "loss": "cross_entropy"}},
        "cuts": [{"from": "stem", "to": "trunk", "shape": [32, 7, 7], "dtype": "float32"}],
        "labels": [{"from": "clients", "to": "trunk"}],
        "training": {"epochs": epochs, "batch_size": BATCH, "seed": 7},
        "timeouts": {"connect": 300},
    }
    optimizer = {"name": "adam", "lr": 0.001}
    (folder / "parties").mkdir()
    (folder / "graph.yaml").write_text(json.dumps(graph))  # JSON is YAML
    for site, name in enumerate(names):
        party: dict[str, Any] = {
            "party": name,
            "segments": {"stem": {"model": "splitsec.bench.clients:stem", "optimizer": optimizer}},
            "data": {
                "train": "splitsec.bench.clients:samples",
                "test": "splitsec.bench.clients:test",
                "args": {"site": site, "batches": batches},
            },
            "threads": 1,
            "detectors": False,  # they look more often the more epochs a client sees, and here few see more than many
        }
        (folder / "parties" / f"{name}.yaml").write_text(json.dumps(party))
    server = {
        "party": "server",
        "segments": {"trunk": {"model": "splitsec.bench.clients:trunk", "optimizer": optimizer}},
        "threads": 1,
    }
    (folder / "parties" / "server.yaml").write_text(json.dumps(server))
    return folder


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


def _lines(report: Report) -> Iterator[str]:
    how = "forked from one warm process" if report.forked else "each process started anew"
    yield f"clients in turn, batches of {report.batch}, {report.batches} to a turn; {how}; medians of the runs"
    yield ""
    yield "clients   start   step, ms   turn, ms   in all, GB   a client, MB   its own, MB   server, MB   parent, MB"
    for members in sorted({one.members for one in report.runs}):
        runs = report.of(members)

        def middle(what: str, runs: list[Run] = runs) -> float:
            return float(statistics.median(getattr(one, what) for one in runs))

        yield (
            f"{members:7} {middle('startup_seconds'):6.1f}s {middle('step_ms'):10.2f} {middle('turn_ms'):10.2f} "
            f"{max(one.peak_bytes for one in runs) / 1e9:12.2f} {middle('clients_bytes') / 1e6:14.1f} "
            f"{middle('private_bytes') / 1e6:13.1f} {middle('server_bytes') / 1e6:12.0f} "
            f"{middle('parent_bytes') / 1e6:12.0f}"
        )
    if (step := report.ratio("step_ms")) is not None and (turn := report.ratio("turn_ms")) is not None:
        yield f"\nmany over few: a step {step:.3f}, a step with its share of the turn {turn:.3f}"
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
