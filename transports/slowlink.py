"""A slow line on purpose: a TCP proxy with a rate and a delay, in a process of its own.

Here: ``SlowLink``, which stands between whoever dials it and a port of this machine, and carries each direction at so
many bytes a second, every byte so many seconds late, in order.  For tests and measurements, of this package and of
those who build on it.  Not here: mishaps (``trouble``), and what the two ends make of such a line (``meter``).

Each direction is a link that is busy until some time: what comes while it is busy waits in a short queue, and where
that is full nothing more is read, so that the sender's own socket fills.  What has left the link arrives ``delay``
later.  All connections through one SlowLink share it, quantum by quantum in turn, as they would share a real one.

What it is not: TCP ends at the proxy, so a connection is accepted at once, nothing is lost, and a sender's TCP knows
neither slow start nor the round trip; rates are of what TCP carries, without its headers.  See docs/wide-area.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from typing import Any, Final, TypeAlias, final

__all__ = ["SlowLink"]

_QUANTUM_SECONDS: Final = 0.001  # that the link is busy with what it takes from one connection before the next
_QUANTUM_MIN, _QUANTUM_MAX = 1448, 64 << 10  # bytes: what one packet carries; what one read takes
_BUFFER_SECONDS: Final = 0.002  # that a socket's buffer may hide
_BUFFER_MIN, _BUFFER_MAX = 16 << 10, 512 << 10  # bytes; less, and loopback's large packets do not fit
_START_SECONDS: Final = 30.0
_END_SECONDS: Final = 5.0


@final
class SlowLink:
    """Listens on a free port of 127.0.0.1, and passes on to ``target``, a port of 127.0.0.1.  Use it with ``with``::

        with SlowLink(7400, rate=100e6 / 8, delay=0.025) as link:
            dial(link.address)

    The process ends with the ``with``, and with the process that started it, however that ends.
    """

    def __init__(
        self,
        target: int,
        *,
        rate: float,
        delay: float = 0.0,
        rate_back: float | None = None,
        delay_back: float | None = None,
        queue: float = 0.005,
    ) -> None:
        """``rate``: bytes a second.  ``delay``: seconds, one way.  Both hold from the dialer to the target, and back
        unless ``rate_back`` and ``delay_back`` say otherwise.  ``queue``: seconds that the link may have ahead of it
        before it takes nothing more; two quanta of 1 ms at least.  ValueError where one is not possible.
        """
        back = (rate if rate_back is None else rate_back, delay if delay_back is None else delay_back)
        if min(rate, back[0]) <= 0 or min(delay, back[1], queue) < 0:
            raise ValueError("a link carries more than 0 bytes a second, and nothing before it was sent")
        self._directions = ((rate, delay), back)
        self._queue = queue
        self._target = target
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        """Where to dial, once entered."""

    @property
    def address(self) -> str:
        """Where to dial."""
        return f"tcp://127.0.0.1:{self.port}"

    def __enter__(self) -> SlowLink:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "splitsec.transports.slowlink"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for whoever started us, who then ends it
        )
        try:
            said = self._ask({"target": self._target, "directions": self._directions, "queue": self._queue})
        except BaseException:
            self.__exit__()
            raise
        self.port = int(said["port"][0])
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # it ends when that does
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    @property
    def pid(self) -> int:
        """Of its process, once entered."""
        assert self._process is not None, "used before `with`, or after"
        return self._process.pid

    @property
    def carried(self) -> tuple[int, int]:
        """Bytes that it has taken so far: towards the target, and back."""
        there, back = self._ask({"say": "carried"})["carried"]
        return int(there), int(back)

    def cut(self) -> None:
        """End all connections now; what is under way is lost."""
        self._ask({"say": "cut"})

    def change(
        self, *, rate: float, delay: float, rate_back: float | None = None, delay_back: float | None = None
    ) -> None:
        """Another rate and delay from now on.  What is under way arrives as it would have."""
        back = (rate if rate_back is None else rate_back, delay if delay_back is None else delay_back)
        self._ask({"say": "change", "directions": ((rate, delay), back)})

    def _ask(self, what: dict[str, object]) -> dict[str, list[int]]:
        process = self._process
        assert process is not None, "used before `with`, or after"
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(what).encode() + b"\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
            answer = process.stdout.readline() if ready else b""
        except BrokenPipeError:
            answer = b""
        if not answer:
            raise RuntimeError(f"the process of a slow link says nothing (exit status {process.poll()})")
        said: dict[str, list[int]] = json.loads(answer)
        return said


# --- in the process ---------------------------------------------------------------------------------------------------

_Piece: TypeAlias = tuple[float, bytes | None]  # when it arrives; None: there is no more


@final
class _Direction:
    """One direction of the link, shared by all connections."""

    def __init__(self, rate: float, delay: float, queue: float) -> None:
        self.queue = queue
        self.busy_until = 0.0
        self.carried = 0
        self.flows: deque[_Flow] = deque()
        self.set(rate, delay)

    def set(self, rate: float, delay: float) -> None:
        self.rate = rate
        self.delay = delay
        self.quantum = int(min(_QUANTUM_MAX, max(_QUANTUM_MIN, rate * _QUANTUM_SECONDS)))
        self.ahead = max(self.queue, 2 * self.quantum / rate)

    def has_room(self, now: float) -> bool:
        return self.busy_until <= now + self.ahead

    @property
    def room_at(self) -> float:
        """When it takes the next."""
        return self.busy_until - self.ahead

    def arrival(self, size: int, now: float) -> float:
        """When ``size`` bytes that come now have arrived."""
        self.carried += size
        self.busy_until = max(now, self.busy_until) + size / self.rate
        return self.busy_until + self.delay


@final
class _Flow:
    """One direction of one connection."""

    def __init__(self, source: socket.socket, sink: socket.socket, direction: _Direction) -> None:
        self.source = source
        self.sink = sink
        self.direction = direction
        self.pieces: deque[_Piece] = deque()  # under way
        self.reads = True
        self.blocked = False  # the receiver takes nothing more
        self.ended = False  # the receiver was told that there is no more

    def read(self, now: float) -> None:
        """Take a quantum from the sender.  OSError where its connection broke."""
        try:
            data = self.source.recv(self.direction.quantum)
        except BlockingIOError:
            return
        if not data:
            self.reads = False
        self.pieces.append((self.direction.arrival(len(data), now), data or None))

    def deliver(self, now: float) -> None:
        """Hand over what has arrived.  OSError where nobody is there to take it."""
        while self.pieces and self.pieces[0][0] <= now:
            due, data = self.pieces[0]
            if data is None:
                self.pieces.popleft()
                self.ended = True
                self.sink.shutdown(socket.SHUT_WR)
                return
            try:
                sent = self.sink.send(data)
            except BlockingIOError:
                sent = 0
            self.blocked = sent < len(data)
            if self.blocked:
                self.pieces[0] = (due, data[sent:])
                return
            self.pieces.popleft()


@final
class _Proxy:
    def __init__(self, target: int, directions: list[tuple[float, float]], queue: float) -> None:
        self.target = target
        self.directions = [_Direction(rate, delay, queue) for rate, delay in directions]
        self.pairs: list[tuple[_Flow, _Flow]] = []
        self.broken: list[tuple[float, tuple[_Flow, _Flow]]] = []  # and when the other end hears of it
        self.listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._prepare(self.listener)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(64)

    def _prepare(self, end: socket.socket) -> None:
        """Small buffers, or the link would not be felt; those that are accepted have the listener's."""
        end.setblocking(False)
        rate = max(direction.rate for direction in self.directions)
        size = int(min(_BUFFER_MAX, max(_BUFFER_MIN, rate * _BUFFER_SECONDS)))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def accept(self) -> None:
        try:
            near, _ = self.listener.accept()
        except OSError:
            return
        far = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._prepare(far)
        self._prepare(near)
        far.setblocking(True)
        try:
            far.connect(("127.0.0.1", self.target))  # on one machine: at once, or nobody listens
        except OSError:
            _abort(near)
            far.close()
            return
        far.setblocking(False)
        there, back = _Flow(near, far, self.directions[0]), _Flow(far, near, self.directions[1])
        for flow in (there, back):
            flow.direction.flows.append(flow)
        self.pairs.append((there, back))

    def cut(self) -> None:
        for pair in list(self.pairs):
            self.drop(pair)

    def drop(self, pair: tuple[_Flow, _Flow]) -> None:
        """Both ends, without another word."""
        self._forget(pair)
        for flow in pair:
            _abort(flow.source)

    def _forget(self, pair: tuple[_Flow, _Flow]) -> None:
        self.pairs.remove(pair)
        self.broken = [each for each in self.broken if each[1] is not pair]
        for flow in pair:
            flow.direction.flows.remove(flow)

    def _break(self, pair: tuple[_Flow, _Flow], flow: _Flow, now: float) -> None:
        """One end of a connection is gone: the other hears of it after what was sent before, and as late."""
        for each in pair:
            each.reads = False
        self.broken.append((flow.direction.arrival(0, now), pair))

    def step(self, now: float) -> None:
        """Hand over what has arrived."""
        for due, pair in list(self.broken):
            if due <= now:
                for flow in pair:
                    with contextlib.suppress(OSError):
                        flow.deliver(now)
                self.drop(pair)
        for pair in list(self.pairs):
            for flow, other in (pair, pair[::-1]):
                try:
                    flow.deliver(now)
                except OSError:
                    flow.pieces.clear()
                    if not any(each is pair for _, each in self.broken):
                        self._break(pair, other, now)
            if all(flow.ended for flow in pair):
                self._forget(pair)
                for flow in pair:
                    flow.source.close()

    def wait(self, extra: int) -> bool:
        """Until something can be done; True: somebody has said something at ``extra``, a descriptor."""
        now = time.monotonic()
        due = [when for when, _ in self.broken]
        reads: dict[socket.socket, _Flow] = {}
        writes = []
        for direction in self.directions:
            wanting = [flow for flow in direction.flows if flow.reads and not flow.blocked]
            if direction.has_room(now):
                reads |= {flow.source: flow for flow in wanting}
            elif wanting:
                due.append(direction.room_at)
            for flow in direction.flows:
                if flow.blocked:
                    writes.append(flow.sink)
                elif flow.pieces:
                    due.append(flow.pieces[0][0])
        timeout = None if not due else max(0.0, min(due) - now)
        watched: list[int | socket.socket] = [extra, self.listener, *reads]
        readable, _, _ = select.select(watched, writes, [], timeout)
        now = time.monotonic()
        ready = set(readable)
        if self.listener in ready:
            self.accept()
        for direction in self.directions:
            for flow in list(direction.flows):
                if flow.source in ready and direction.has_room(now) and flow.reads:
                    direction.flows.remove(flow)  # its next turn is after all others
                    direction.flows.append(flow)
                    try:
                        flow.read(now)
                    except OSError:
                        pair = next(pair for pair in self.pairs if flow in pair)
                        self._break(pair, flow, now)
        return extra in ready

    def run(self) -> None:
        """Until whoever started us has no more to say, or is gone."""
        unread = b""
        while True:
            self.step(time.monotonic())
            if not self.wait(0):
                continue
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                _say(self._obey(json.loads(line)))

    def _obey(self, said: dict[str, Any]) -> dict[str, object]:
        if said["say"] == "cut":
            self.cut()
        elif said["say"] == "change":
            for direction, (rate, delay) in zip(self.directions, said["directions"], strict=True):
                direction.set(rate, delay)
        return {"carried": [direction.carried for direction in self.directions]}


def _abort(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closed means reset
    end.close()


def _say(what: dict[str, object]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def _hurry() -> None:
    """A link does not wait for a processor: where we may, we go before all that computes."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def main() -> None:
    """The process: reads what to be from its standard input, and ends with it."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            return
        line += byte
    proxy = _Proxy(**json.loads(line))
    _hurry()
    _say({"port": [proxy.listener.getsockname()[1]]})
    with contextlib.suppress(KeyboardInterrupt):
        proxy.run()


if __name__ == "__main__":
    main()
