"""Many clients in turn: what they weigh beside each other, and that they train to what one process would.

The short version of ``splitsec bench clients``, which counts a hundred.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from splitsec.bench import clients
from splitsec.bench.clients import Memory, Report, Run, weigh
from splitsec.bench.crowd import write
from splitsec.simulation import simulate

MEMBERS = 12
MB = 1_000_000


def test_a_client_that_waits_for_its_turn_weighs_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some 22 MB that no other process shares, after each has had its turn; started anew it would be 190.

    What it shares with the others (torch, for the most part) is counted once for all.
    """
    weighed: list[tuple[str, Memory]] = []

    def watch(party: str, event: dict[str, Any]) -> None:
        if (party, event["event"]) == ("server", "turn") and event["phase"] == "evaluate" and not weighed:
            weighed.extend(weigh())  # the last that trained begins to evaluate: all others wait

    simulate(write(tmp_path, MEMBERS, batches=2, epochs=1), watch=watch)
    members = [one for name, one in weighed if name.startswith("client-")]
    assert len(members) == MEMBERS
    private = statistics.median(one.private for one in members)
    by_name = dict(weighed)
    with capsys.disabled():
        print(
            f"\na client that waits: {private / MB:.1f} MB of its own, "
            f"{statistics.median(one.shared for one in members) / MB:.1f} MB with its share of the rest; "
            f"server {by_name['server'].shared / MB:.0f} MB, warm {by_name['splitsec.nest'].shared / MB:.0f} MB"
        )
    assert private < 30 * MB
    assert 100 * private < clients.BYTES_MAX
    assert sum(one.shared for name, one in weighed if name) < MEMBERS * 60 * MB


def run(members: int, step_ms: float, turn_ms: float, peak: int) -> Run:
    return Run(members, 1.0, step_ms, turn_ms, 2 * step_ms, peak, 20 * MB, 18 * MB, 250 * MB, 180 * MB, 30 * MB)


def test_the_report_compares_rounds_with_themselves() -> None:
    """The machine may be slower in one round than in another: what counts is the median of the rounds' own ratios."""
    report = Report(
        [
            run(5, 10.0, 11.0, 600 * MB),
            run(100, 10.5, 12.0, 2700 * MB),
            run(100, 21.0, 24.0, 2800 * MB),
            run(5, 20.0, 20.0, 600 * MB),
            run(5, 30.0, 40.0, 600 * MB),
            run(100, 31.2, 48.0, 2750 * MB),
        ],
        forked=True,
        load=0.5,
    )
    assert report.peak_bytes == 2800 * MB
    assert report.ratio("step_ms") == pytest.approx(1.05)
    assert report.ratio("turn_ms") == pytest.approx(1.2)
    assert list(report.verdicts.values()) == [True, True, False]
    told = json.loads(json.dumps(report.as_json()))
    assert told["step_ratio"] == told["cpu_ratio"] == pytest.approx(1.05) and len(told["runs"]) == 6
    assert told["runs"][1]["private_bytes"] == 18 * MB


def test_memory_and_processor_time_are_those_of_all_that_came_of_us() -> None:
    """A process that holds 64 MB and computes, and its child that does the same."""
    work = (
        "import os, sys, time\n"
        "held = bytearray(os.urandom(64_000_000))\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    held = bytearray(held)\n"
        "while time.process_time() < 0.5:\n"
        "    pass\n"
        "print('here', flush=True)\n"
        "sys.stdin.read()\n"
    )
    before = clients.processor_seconds()
    with subprocess.Popen(
        [sys.executable, "-c", work, "its-name"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as one:
        assert one.stdout is not None
        assert [one.stdout.readline(), one.stdout.readline()] == [b"here\n", b"here\n"]
        found = [memory for name, memory in weigh() if name == "its-name"]
        worked = clients.processor_seconds() - before
    assert len(found) == 2
    # the first 64 MB are the parent's alone by now, or still shared by both: either way counted once
    assert 128 * MB <= sum(one.shared for one in found) < 170 * MB
    assert 0.9 < worked < 3


def test_one_size_alone_has_no_ratio() -> None:
    report = Report([run(5, 10.0, 11.0, 3100 * MB)], forked=True, load=0.5)
    assert report.ratio("step_ms") is None
    assert report.verdicts == {"at most 3 GB in all": False}
