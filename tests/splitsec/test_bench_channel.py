"""``splitsec bench channel``: the document it prints, the contenders' bytes, and an end without anything left behind.

Whether a machine meets the targets is not tested here: other programs use it meanwhile.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from splitsec.bench import channel
from splitsec.bench.channel import Memory, Report, RoundTrips, Target, Verdict, _measure, _Processes
from splitsec.bench.rivals import CONTENDERS
from splitsec.cli.bench import _count, _sizes, _transports
from splitsec.errors import InternalError
from tests.conftest import PATIENCE, SOURCE, Shell, ended

NAMES = ("splitsec", "plain", "curve", "grpc_tls", "ssl")
HERE = NAMES if importlib.util.find_spec("grpc") else tuple(name for name in NAMES if name != "grpc_tls")


def test_the_document(shell: Shell) -> None:
    """A real run, all contenders at once.  A wrong answer would have ended it (below)."""
    found = shell.run(
        "bench", "channel", "--json", "--quick", "--sizes", "1KiB,64KiB", "--rounds", "2", "--tensors", "2"
    )
    assert found.code == 0, found.stderr
    document = json.loads(found.stdout)
    places = [(entry["transport"], entry["size_bytes"]) for entry in document["results"]]
    assert places == [("tcp", 1 << 10), ("ipc", 1 << 10), ("tcp", 64 << 10), ("ipc", 64 << 10)]
    for entry in document["results"]:
        assert entry["rounds"] == 2
        assert {name for name in NAMES if entry[f"{name}_ms"] is not None} == set(HERE)
        for name in HERE:
            assert 0 < entry[f"{name}_min_ms"] <= entry[f"{name}_ms"] < 10_000 and entry[f"{name}_iqr_ms"] >= 0
    (target,) = document["targets"]
    ratio = document["results"][0]["splitsec_ms"] / document["results"][0]["plain_ms"]
    assert (target["size_bytes"], target["against"], target["at_most"]) == (1024, "plain", 2.5)
    assert target["ratio"] == pytest.approx(ratio, rel=0.01) and target["met"] is (ratio <= 2.5)
    memory = document["memory"]
    assert (memory["tensors"], memory["tensor_bytes"]) == (2, 64 << 20)
    assert memory["sender_multiple"] > 1, "the tensors of the sender count"
    assert memory["sender_multiple"] == pytest.approx(memory["sender_peak_bytes"] / (64 << 20), rel=0.01)
    assert {"plain_ms", "hybrid_ms", "open_plain_ms", "open_hybrid_ms"} <= document["handshake"].keys()
    assert "64 KiB over ipc" in found.stderr and "\x1b" not in found.stderr
    assert list(shell.scratch.iterdir()) == []


EVERY_CONTENDER = """
import os, sys, tempfile
from splitsec.bench.rivals import CONTENDERS, FAMILIES, Ground
with tempfile.TemporaryDirectory(dir="/tmp") as folder:
    ground = Ground.prepare(folder, 3 << 20)
    ends = {}
    for family in FAMILIES:
        for name in sys.argv[1:]:
            contender = CONTENDERS[name]
            ends[family, name] = contender.dial(family, ground, contender.listen(family, ground))
    for size in (1, 1000, (16 << 10) + 1, 3 << 20):
        sent = {key: os.urandom(size) for key in ends}
        for key, round_trip in ends.items():
            assert bytes(round_trip(sent[key])) == sent[key], key
print(*ends)
sys.stdout.flush()
os._exit(0)
"""


def test_every_contender_answers_with_its_own_bytes() -> None:
    """Over tcp and ipc, around the sizes where they change their ways.  In a process: they stay until it ends."""
    end = subprocess.run(
        [sys.executable, "-c", EVERY_CONTENDER, *HERE],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert end.returncode == 0, end.stderr
    assert end.stdout.count("tcp") == end.stdout.count("ipc") == len(HERE)
    assert tuple(CONTENDERS) == NAMES


@pytest.mark.parametrize("answer", [lambda sent: sent[:-1], lambda sent: sent + b"x", lambda sent: b"x" * len(sent)])
def test_another_answer_voids_the_measurement(answer: Callable[[bytes], bytes]) -> None:
    assert _measure(lambda sent: memoryview(bytearray(sent)), b"abc", 3) > 0
    with pytest.raises(ValueError, match="not what was sent"):
        _measure(answer, b"abc", 1)


def test_without_grpcio(shell: Shell, tmp_path: Path) -> None:
    """The others are measured, and a line says what to install."""
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "grpc.py").write_text("raise ImportError\n")
    path = f"{tmp_path / 'without'}{os.pathsep}{shell.env['PYTHONPATH']}"
    quick = ("--quick", "--sizes", "1KiB", "--transports", "tcp", "--rounds", "1", "--tensors", "0")
    found = shell.run("bench", "channel", *quick, PYTHONPATH=path)
    assert found.code == 0, found.stderr
    assert "not measured: gRPC TLS over tcp: grpcio is not installed: pip install 'splitsec[bench]'" in found.stdout
    assert "1 KiB tcp: at most 2.5 x plain pyzmq" in found.stdout and "\x1b" not in found.stdout


def test_ctrl_c(shell: Shell) -> None:
    """No traceback, no process, no file."""
    command = shell.start("bench", "channel", "--sizes", "1KiB", "--rounds", "100000", "--tensors", "0")
    command.err.line_with("1 KiB over tcp")
    command.process.send_signal(signal.SIGINT)
    found = command.end()
    assert (found.code, found.stdout) == (130, "")
    assert "stopped by Ctrl-C" in found.stderr and "Traceback" not in found.stderr
    assert not shell.alive() and list(shell.scratch.iterdir()) == []


def test_processes_end_with_their_parent(shell: Shell) -> None:
    command = shell.start("bench", "channel", "--sizes", "1KiB", "--rounds", "100000", "--tensors", "0")
    command.err.line_with("1 KiB over tcp")
    children = [os.pidfd_open(pid) for pid in shell.alive() if pid != command.pid]
    assert len(children) == 2
    command.process.kill()
    assert all(ended(child, PATIENCE) for child in children)
    for child in children:
        os.close(child)


def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    failed = pytest.raises(InternalError, match="'nonsense' of this measurement failed: KeyError")
    with failed, _Processes(str(tmp_path), lambda event: None) as processes:
        processes.start("nonsense", {})
        processes.until("listening")


def test_verdicts() -> None:
    """Ratios of medians; "faster" is not "as fast"; what did not run is neither met nor missed."""
    times = {"splitsec": [2.0, 1.0, 9.0], "plain": [1.0, 1.0, 1.0], "ssl": [2.0, 2.0, 2.0], "curve": [4.0, 8.0, 2.0]}
    result = RoundTrips("tcp", 4 << 20, 2, times)
    assert (result.rounds, result.median("splitsec"), result.ratio("plain")) == (3, 2.0, 2.0)
    entry = result.as_json()
    assert (entry["curve_ms"], entry["curve_min_ms"], entry["curve_iqr_ms"]) == (4.0, 2.0, 3.0)
    assert entry["grpc_tls_ms"] is entry["grpc_tls_min_ms"] is entry["grpc_tls_iqr_ms"] is None
    report = Report([result], None, None, [], None, 1.0)
    met = {verdict.target.against: verdict.met for verdict in report.verdicts}
    assert met == {"plain": False, "curve": False, "grpc_tls": None, "ssl": False}
    assert Verdict(Target("tcp", 1, "curve", 0.5), 0.5).met
    assert Memory(100, 64 << 20, 1.0, (256 << 20) - 1, 0).met is True
    assert Memory(100, 64 << 20, 1.0, 256 << 20, 0).met is False
    assert Memory(100, 64 << 20, 1.0, None, 0).met is Memory(100, 1 << 20, 1.0, 0, 0).met is None


def test_targets_of_a_full_run() -> None:
    """Every target speaks of something that a run without options measures."""
    assert {target.size_bytes for target in channel.TARGETS} <= set(channel.SIZES)
    assert {target.against for target in channel.TARGETS} <= set(CONTENDERS)
    assert channel.rounds_of(64 << 20) < channel.rounds_of(1 << 10)


def test_options() -> None:
    assert _sizes("1KiB,256KiB, 4mib,64MiB,512,512B") == (1 << 10, 256 << 10, 4 << 20, 64 << 20, 512)
    for wrong in ("", "0", "2GiB", "1.5MiB", "1XB", "1KiB,,2KiB", "-1", "\u0661"):
        with pytest.raises(argparse.ArgumentTypeError, match="no size"):
            _sizes(wrong)
    assert _transports("ipc,tcp") == ("ipc", "tcp")
    with pytest.raises(argparse.ArgumentTypeError, match="'udp' is not tcp or ipc"):
        _transports("tcp,udp")
    assert (_count("0"), _count("7")) == (0, 7)
