"""What messages take over a slow line, beside what the line itself takes.  The figures of docs/wide-area.md.

    python -m tests.transports.slow_lines [--fixed] [MBIT MILLISECONDS]...

Two processes, one on each side of a ``SlowLink``; times are of one clock, which both read.  ``--fixed``: without
measuring, with chunks of a mebibyte, as it was before.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from splitsec.transports import iothread
from splitsec.transports.iothread import Closed, Interrupted, IOThread, Opened, Peer, Received, Resumed
from splitsec.transports.noise import public_key_of
from splitsec.transports.testing import SlowLink

MBIT: Final = 1e6 / 8  # bytes a second
PATIENCE: Final = 120.0
SECRETS: Final = (b"\1" * 32, b"\2" * 32)
KEYS: Final = tuple(map(public_key_of, SECRETS))
ECHO, URGENT, LARGE = 1, 2, 3
LANES: Final = {ECHO: 64 << 20, URGENT: 1000, LARGE: 64 << 20}
ROOT: Final = Path(__file__).parents[2]


@dataclass
class Figures:
    """Seconds."""

    exact: float
    """That the line itself takes for one message."""
    lock_step: list[float]
    """For one message there, or back."""
    both: float
    """For as many both ways at once, over what the line takes for those."""
    urgent: list[float]
    """For 100 bytes there on another lane, while a large message is under way."""
    carried: tuple[int, int]
    """Bytes on the line: there, back."""
    meter: str

    @property
    def ratio(self) -> float:
        """Of a message in lock-step, in the middle, to what the line takes."""
        return statistics.median(self.lock_step) / self.exact


class Near:
    """The side that measures.  ``io`` is open."""

    def __init__(self, io: IOThread) -> None:
        self.io = io
        assert self.io.receive(PATIENCE) == Opened(KEYS[0])
        self.broken = 0
        """How often the connection broke."""
        self._answers: dict[int, deque[tuple[float, float]]] = defaultdict(deque)

    def send(self, lane: int, size: int, header: bytes = b"") -> float:
        now = time.monotonic()
        self.io.send(KEYS[0], lane, header, [bytes(size)], wait=False)
        return now

    def answer(self, lane: int) -> tuple[float, float]:
        """When the far side had the message, and when its answer was here."""
        while not self._answers[lane]:
            event = self.io.receive(PATIENCE)
            if isinstance(event, Received):
                self._answers[event.lane].append((float(event.header), time.monotonic()))
            else:
                assert isinstance(event, Interrupted | Resumed), event
                self.broken += isinstance(event, Interrupted)
        return self._answers[lane].popleft()

    def lock_step(self, size: int, rounds: int, pause: float) -> list[float]:
        took = []
        for _ in range(rounds):
            sent = self.send(ECHO, size, b"%d" % size)
            there, back = self.answer(ECHO)
            took += [there - sent, back - there]
            time.sleep(pause)  # somebody computes
        return took

    def both(self, size: int, count: int) -> float:
        began = self.send(ECHO, size, b"%d" % size)
        for _ in range(count - 1):
            self.send(ECHO, size, b"%d" % size)
        return [self.answer(ECHO)[1] for _ in range(count)][-1] - began

    def urgent(self, large: int, rate: float, most: int = 20) -> list[float]:
        """Small messages during the middle of a large one."""
        began = self.send(LARGE, large)
        took = []
        while len(took) < most and time.monotonic() - began < 0.8 * large / rate:
            time.sleep(0.03 * large / rate)
            sent = self.send(URGENT, 100)
            took.append(self.answer(URGENT)[0] - sent)
        self.answer(LARGE)
        return took


@contextlib.contextmanager
def far(*options: str) -> Iterator[int]:
    """The other side, in a process of its own: the port where it listens."""
    command = [sys.executable, "-m", "tests.transports.slow_lines", "--far", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().decode().rpartition(":")[2])
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def run_far(lost_after: float) -> None:
    """Say where we listen, and answer what comes, until the other side leaves."""
    peer = Peer(KEYS[1], lanes=LANES)
    with IOThread(
        private_key=SECRETS[0], digest=bytes(32), peers=[peer], listen="tcp://127.0.0.1:*", lost_after=lost_after
    ) as io:
        print(io.endpoint, flush=True)
        while not isinstance(event := io.receive(PATIENCE), Closed):
            if isinstance(event, Received):
                size = int(event.header or b"0")
                io.send(KEYS[1], event.lane, b"%.9f" % time.monotonic(), [bytes(size)], wait=False)


def near(port: int, lost_after: float = 20.0) -> IOThread:
    """An I/O thread that dials ``port``; to be entered."""
    peer = Peer(KEYS[0], dial=f"tcp://127.0.0.1:{port}", lanes=LANES)
    return IOThread(private_key=SECRETS[1], digest=bytes(32), peers=[peer], lost_after=lost_after)


def measure(rate: float, delay: float, *, fixed: bool = False) -> Figures:
    """All figures of one line: ``rate`` in bytes a second, ``delay`` in seconds."""
    size = 1 << 21 if rate >= 20 * MBIT else max(1 << 16, int(rate) & -65536)
    exact = size / rate + delay
    count = 8
    options = ["--fixed"] if fixed else []
    with far(*options) as port, SlowLink(port, rate=rate, delay=delay) as link, near(link.port) as io:
        side = Near(io)
        side.lock_step(size, 1, 0.1)
        lock_step = side.lock_step(size, 6, 0.1)
        both = side.both(size, count) / ((count + 1) * size / rate + 2 * delay)
        urgent = side.urgent(8 * size, rate)
        meter = next(iter(io._driver._states.values())).channel.meter
        return Figures(exact, lock_step, both, urgent, link.carried, repr(meter))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--far", action="store_true")
    parser.add_argument("--lost-after", type=float, default=20.0)
    parser.add_argument("lines", nargs="*", type=float)
    options = parser.parse_args()
    sys.setswitchinterval(0.0002)  # as a party's process
    if options.fixed:
        iothread.Meter = lambda: None  # type: ignore[assignment, misc, return-value]
    if options.far:
        run_far(options.lost_after)
        return
    given = options.lines or [1, 25, 10, 25, 100, 25, 100, 100, 1000, 10, 1000, 100]
    for mbit, milliseconds in zip(given[::2], given[1::2], strict=True):
        found = measure(mbit * MBIT, milliseconds / 1e3, fixed=options.fixed)
        print(
            f"{mbit:g} Mbit/s, {milliseconds:g} ms: lock-step {found.ratio:.3f} (from {min(found.lock_step) * 1e3:.1f} "
            f"to {max(found.lock_step) * 1e3:.1f} ms, exact {found.exact * 1e3:.1f}); both ways {found.both:.3f}; "
            f"urgent {statistics.median(found.urgent) * 1e3:.0f}, at most {max(found.urgent) * 1e3:.0f} ms; "
            f"{found.meter}",
            flush=True,
        )


if __name__ == "__main__":
    main()
