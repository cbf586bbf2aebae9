"""Channels over lines with a rate and a delay: real sockets, two processes, ``SlowLink`` between them.

The machine of a test may be busy, so bounds are wide and the best of three counts; figures are in docs/wide-area.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

from splitsec.transports.limits import CHUNK_MIN
from splitsec.transports.testing import SlowLink

from .slow_lines import MBIT, ROOT, Near, far, near


def best(measure: Callable[[], float], right: float) -> float:
    """The first of three that is below ``right``, or the last."""
    found = 0.0
    for _ in range(3):
        if (found := measure()) < right:
            break
    return found


def test_a_message_takes_the_line_and_the_delay() -> None:
    """2 MiB at 100 Mbit/s and 25 ms, there and back in turn, and both ways at once."""
    rate, delay, size = 100 * MBIT, 0.025, 2 << 20
    with far() as port, SlowLink(port, rate=rate, delay=delay) as link, near(link.port) as io:
        side = Near(io)
        side.lock_step(size, 1, 0.05)
        exact = size / rate + delay
        assert best(lambda: sum(side.lock_step(size, 2, 0.05)) / 4 / exact, 1.05) < 1.05
        together = (5 * size) / rate + 2 * delay
        assert best(lambda: side.both(size, 4) / together, 1.05) < 1.05


def test_a_small_message_overtakes_a_large_one() -> None:
    """At 10 Mbit/s it waited for 1.5 s behind a chunk of a mebibyte and the socket's buffer."""
    rate, delay = 10 * MBIT, 0.025
    with far() as port, SlowLink(port, rate=rate, delay=delay) as link, near(link.port) as io:
        side = Near(io)
        side.lock_step(256 << 10, 1, 0.05)
        bound = delay + 10 * CHUNK_MIN / rate
        assert best(lambda: max(side.urgent(3 << 20, rate, 6)), bound) < bound


def test_a_slow_line_is_not_taken_for_a_dead_one() -> None:
    """Half a mebibyte at 1 Mbit/s takes 4 s, and a connection that is silent for 2 s is given up."""
    with (
        far("--lost-after", "2") as port,
        SlowLink(port, rate=MBIT, delay=0.1) as link,
        near(link.port, lost_after=2.0) as io,
    ):
        side = Near(io)
        side.both(512 << 10, 1)
        assert side.broken == 0


# A line of the kernel's own, in a network namespace: TCP from end to end.

NAMESPACE = """
set -e
ip link set lo up mtu 1500
tc qdisc add dev lo root tbf rate 100mbit burst 32kb latency 20ms
exec "$0" -m tests.transports.test_wide
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not all(map(shutil.which, ("unshare", "ip", "tc"))),
    reason="needs Linux with unshare, ip and tc",
)
def test_over_a_line_of_the_kernel() -> None:
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces are allowed here")
    command = ["unshare", "-rn", "sh", "-c", NAMESPACE, sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), timeout=120)
    if "RTNETLINK" in done.stderr or "qdisc kind is unknown" in done.stderr:
        pytest.skip(f"this kernel has no tbf: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    lock_step, urgent = map(float, done.stdout.split())
    # 1500-byte packets carry 1448 bytes, and what they answer with takes the same way
    assert 1.03 < lock_step < 1.15
    assert urgent < 0.15


def main() -> None:
    """Inside the namespace: what 2 MiB take over what the line takes, and the longest that 100 bytes took."""
    rate, size = 100 * MBIT, 2 << 20
    with far() as port, near(port) as io:
        side = Near(io)
        side.lock_step(size, 2, 0.05)
        lock_step = best(lambda: sum(side.lock_step(size, 3, 0.05)) / 6 / (size / rate), 1.1)
        urgent = best(lambda: max(side.urgent(8 << 20, 0.95 * rate, 8)), 0.1)
    print(lock_step, urgent)


if __name__ == "__main__":
    main()
