"""The slow line is as slow as it says, in each direction for itself, and ends with whoever made it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from splitsec.transports.testing import SlowLink

PATIENCE = 20.0
MBIT = 1e6 / 8  # bytes a second


class Lines:
    """Slow links and connections through them, all closed at the end."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        self.listeners: dict[SlowLink, socket.socket] = {}

    def __call__(self, **arguments: float) -> tuple[SlowLink, socket.socket, socket.socket]:
        """A slow link, and the two ends of a connection through it; whoever dialed first."""
        listener = self.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(PATIENCE)
        link = self.stack.enter_context(SlowLink(listener.getsockname()[1], **arguments))
        self.listeners[link] = listener
        return link, *self.more(link)

    def more(self, link: SlowLink) -> tuple[socket.socket, socket.socket]:
        """The ends of one more connection."""
        ends = (socket.create_connection(("127.0.0.1", link.port), PATIENCE), self.listeners[link].accept()[0])
        for end in ends:
            end.settimeout(PATIENCE)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.stack.enter_context(end)
        return ends


@pytest.fixture
def meet() -> Iterator[Lines]:
    with contextlib.ExitStack() as stack:
        yield Lines(stack)


def pull(end: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = end.recv(min(1 << 18, size - len(data)))
        assert part, "it ended before all was there"
        data += part
    return bytes(data)


def seconds_for(here: socket.socket, there: socket.socket, data: bytes) -> float:
    """From the first byte sent to the last received; the bytes must be the same."""
    sender = threading.Thread(target=here.sendall, args=(data,))
    began = time.perf_counter()
    sender.start()
    came = pull(there, len(data))
    took = time.perf_counter() - began
    sender.join()
    assert came == data
    return took


def pattern(size: int) -> bytes:
    return b"".join(b"%08d" % number for number in range(size // 8))


def tries(measure: Callable[[], float], right: Callable[[float], bool]) -> float:
    """What ``measure`` gives when the machine leaves it alone: the first that is right, of three."""
    found = 0.0
    for _ in range(3):
        if right(found := measure()):
            break
    return found


def test_it_carries_as_much_as_it_says(meet: Lines) -> None:
    """5 MiB at 100 Mbit/s and 25 ms: within one per cent, and a millisecond of delay."""
    link, here, there = meet(rate=100 * MBIT, delay=0.025)
    data = pattern(5 << 20)
    exact = len(data) / (100 * MBIT) + 0.025
    took = tries(lambda: seconds_for(here, there, data), lambda took: took < 1.01 * exact + 0.001)
    assert exact - 0.001 < took < 1.01 * exact + 0.001
    assert link.carried[0] % len(data) == 0
    assert link.carried[1] == 0


def test_a_byte_takes_the_delay(meet: Lines) -> None:
    _, here, there = meet(rate=100 * MBIT, delay=0.025)

    def there_and_back() -> float:
        began = time.perf_counter()
        here.sendall(b"?")
        assert pull(there, 1) == b"?"
        there.sendall(b"!")
        assert pull(here, 1) == b"!"
        return time.perf_counter() - began

    times = [there_and_back() for _ in range(15)]
    assert min(times) >= 0.05
    assert statistics.median(times) < 0.052


def at_once(data: bytes, *pairs: tuple[socket.socket, socket.socket]) -> list[float]:
    """Seconds for ``data`` over each pair, all at the same time, from the start of the first."""
    took = [0.0] * len(pairs)
    began = time.monotonic()

    def one(number: int) -> None:
        seconds_for(*pairs[number], data)
        took[number] = time.monotonic() - began

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took


def test_the_directions_do_not_slow_each_other(meet: Lines) -> None:
    """And may differ: 80 Mbit/s there, 40 back."""
    _, here, there = meet(rate=80 * MBIT, delay=0.01, rate_back=40 * MBIT, delay_back=0.03)
    data = pattern(2 << 20)
    exact = (len(data) / (80 * MBIT) + 0.01, len(data) / (40 * MBIT) + 0.03)

    def both() -> float:
        took = at_once(data, (here, there), (there, here))
        assert all(one > right - 0.001 for one, right in zip(took, exact, strict=True))
        return max(one / right for one, right in zip(took, exact, strict=True))

    assert tries(both, lambda worst: worst < 1.02) < 1.02


def test_connections_share_the_link(meet: Lines) -> None:
    """Two at once take twice as long as one, and get on side by side."""
    link, here, there = meet(rate=80 * MBIT)
    data = pattern(1 << 20)
    exact = 2 * len(data) / (80 * MBIT)
    first, second = sorted(at_once(data, (here, there), meet.more(link)))
    assert exact - 0.001 < second
    assert 0.8 * exact < first


def test_what_nobody_takes_stays_with_the_sender(meet: Lines) -> None:
    """No buffer of the proxy hides the link: at 1 Mbit/s a sender gets rid of little more than its own socket takes."""
    _, here, there = meet(rate=1 * MBIT)
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
    here.setblocking(False)
    sent = 0
    until = time.perf_counter() + 0.2
    while time.perf_counter() < until:
        with contextlib.suppress(BlockingIOError):
            sent += here.send(bytes(4096))
    assert sent < 200_000
    assert len(there.recv(1 << 20)) < 0.3 * MBIT


def test_one_end_says_that_there_is_no_more_and_still_hears_the_other(meet: Lines) -> None:
    _, here, there = meet(rate=100 * MBIT, delay=0.01)
    here.sendall(b"the last words")
    here.shutdown(socket.SHUT_WR)
    assert pull(there, 14) == b"the last words"
    assert there.recv(1) == b""
    there.sendall(b"the answer")
    there.close()
    assert pull(here, 10) == b"the answer"
    assert here.recv(1) == b""


def test_a_connection_that_breaks_breaks_at_the_other_end_and_as_late(meet: Lines) -> None:
    _, here, there = meet(rate=100 * MBIT, delay=0.1)
    here.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    began = time.perf_counter()
    here.close()
    with pytest.raises(ConnectionResetError):
        there.recv(1)
    assert 0.09 < time.perf_counter() - began < 1


def test_it_can_be_cut_and_changed(meet: Lines) -> None:
    link, here, there = meet(rate=100 * MBIT, delay=0.001)
    assert seconds_for(here, there, pattern(1 << 17)) < 0.1
    link.change(rate=4 * MBIT, delay=0.05)
    exact = (1 << 17) / (4 * MBIT) + 0.05
    assert seconds_for(here, there, pattern(1 << 17)) == pytest.approx(exact, rel=0.03)
    link.cut()
    for end in (here, there):
        with pytest.raises(ConnectionResetError):
            end.recv(1)


def test_where_nobody_listens_a_connection_ends_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    with (
        SlowLink(free, rate=1e6) as link,
        contextlib.suppress(ConnectionResetError),
        socket.create_connection(("127.0.0.1", link.port), PATIENCE) as end,
    ):
        assert end.recv(1) == b""


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"rate": 1.0, "delay": -1.0}, {"rate": 1.0, "rate_back": 0.0}])
def test_what_no_link_can_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="more than 0 bytes a second"):
        SlowLink(1, **wrong)


def gone(pid: int) -> bool:
    """Whether no such process is left (one that nobody waited for does not count)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks at /proc")
def test_its_process_ends_with_the_block_and_with_its_parent() -> None:
    with SlowLink(1, rate=1e6) as link:
        pid = link.pid
        assert not gone(pid)
    assert gone(pid)
    code = "import time; from splitsec.transports.slowlink import SlowLink\n"
    code += "with SlowLink(1, rate=1e6) as link: print(link.pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + PATIENCE
    while not gone(pid):
        assert time.monotonic() < until, "it goes on without anybody"
        time.sleep(0.01)
