"""``splitsec bench circuit``: the document, what the figures mean, and an end without anything left behind.

Whether a machine meets the targets is not tested here: other programs use it meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
from pathlib import Path

import pytest

from splitsec.bench import circuit
from splitsec.bench.circuit import Cost, Crowd, Measured, Report, _alone, _check, _connections, _cost, _ground
from splitsec.cli.bench import _relays
from splitsec.graph import parse_graph
from splitsec.transports.limits import CELL_HEAD, cell_limit, fixed_cell
from tests.conftest import PATIENCE, Shell, ended

KIB, MIB = 1 << 10, 1 << 20
PATHS = [(0, "none"), (2, "fixed"), (2, "padme")]


def test_the_document(shell: Shell) -> None:
    """A real run, ends and relays in processes of their own.  A wrong answer would have ended it."""
    found = shell.run(
        "bench", "circuit", "--json", "--relays", "0,2", "--sizes", "1KiB,2MiB", "--rounds", "1", "--circuits", "3"
    )
    assert found.code == 0, found.stderr
    document = json.loads(found.stdout)
    results = document["results"]
    assert [(one["size_bytes"], one["relays"], one["padding"]) for one in results] == [
        (size, *path) for size in (KIB, 2 * MIB) for path in PATHS
    ]
    for one in results:
        assert one["rounds"] == 1
        assert 0 < one["round_trip_min_ms"] <= one["round_trip_ms"] < 10_000
        assert len(one["links"]) == one["relays"] + 1
        for link in one["links"]:  # counted by the kernel, on each connection by itself
            assert link["there_bytes"] > one["size_bytes"] and link["back_bytes"] < 1000 + one["size_bytes"] / 50
        assert one["overhead"] == pytest.approx(
            max(link["there_bytes"] + link["back_bytes"] for link in one["links"]) / one["size_bytes"] - 1, abs=0.001
        )
        if one["relays"]:
            assert one["relay_cpu_ms_per_mib"] > 0
            direct = next(two for two in results if not two["relays"] and two["size_bytes"] == one["size_bytes"])
            share = one["bytes_per_second"] / direct["bytes_per_second"]  # there is one round
            assert one["share_of_direct"] == pytest.approx(share, abs=0.001)
    fixed = results[4]
    assert fixed["cell_bytes"] == fixed_cell(2 * MIB, cell_limit(1))
    cells = fixed["links"][0]["there_bytes"] / (CELL_HEAD + fixed["cell_bytes"])
    assert cells == pytest.approx(round(cells), abs=0.1), "the wire carries whole cells of that size"
    assert results[5]["cell_bytes"] is None
    assert {(target["value"] <= 0.12) is target["met"] for target in document["targets"]} == {True}
    assert len(document["targets"]) == 2
    for hop in document["hop"]:
        parts = hop["cipher_ms_per_mib"] + hop["sockets_ms_per_mib"] + hop["rest_ms_per_mib"]
        assert hop["total_ms_per_mib"] == pytest.approx(parts, abs=0.001)
        assert hop["cipher_ms_per_mib"] > 0 and hop["sockets_ms_per_mib"] > 0
    crowd = document["crowd"]
    assert (crowd["circuits"], crowd["met"]) == (3, None)
    assert crowd["carried_bytes"] == 2 * 3 * circuit.CROWD_MESSAGES * circuit.CROWD_MESSAGE
    assert 20 * MIB < crowd["idle_bytes"] < crowd["peak_bytes"]
    assert "2 MiB: round trips and streams" in found.stderr and "\x1b" not in found.stderr
    assert list(shell.scratch.iterdir()) == []


def test_a_hundred_circuits_through_one_relay(shell: Shell) -> None:
    """All of them come up and transfer; what they take is told.  The bound itself is for an idle machine."""
    found = shell.run(
        "bench", "circuit", "--json", "--relays", "1", "--sizes", "1KiB", "--rounds", "1", "--circuits", "100"
    )
    assert found.code == 0, found.stderr
    crowd = json.loads(found.stdout)["crowd"]
    assert crowd["circuits"] == 100
    assert crowd["met"] is (crowd["peak_bytes"] < 150_000_000)


def test_the_tables(shell: Shell) -> None:
    found = shell.run("bench", "circuit", "--relays", "0", "1", "--sizes", "128KiB", "--rounds", "1", "--circuits", "0")
    assert found.code == 0, found.stderr
    assert "128 KiB through 1 relays, fixed: at most 12% more bytes than in the messages" in found.stdout
    assert "copies and the rest" in found.stdout and "memory" not in found.stdout
    assert "\x1b" not in found.stdout


def test_ctrl_c_leaves_no_process(shell: Shell) -> None:
    command = shell.start(
        "bench", "circuit", "--relays", "1", "--sizes", "1KiB", "--rounds", "100000", "--circuits", "0"
    )
    command.err.line_with("round trips and streams")
    children = [os.pidfd_open(pid) for pid in shell.alive() if pid != command.pid]
    assert len(children) == 4, "two ends, and a relay for each of two kinds of cells"
    command.process.send_signal(signal.SIGINT)
    found = command.end()
    assert (found.code, found.stdout) == (130, "")
    assert "Traceback" not in found.stderr
    assert all(ended(child, PATIENCE) for child in children)
    for child in children:
        os.close(child)
    assert list(shell.scratch.iterdir()) == []


def path(
    size: int, relays: int, seconds: float, *, padding: str = "fixed", there: float = 0.0, cpu: float = 0.0
) -> Measured:
    """Ten messages in ``seconds``, ``there`` bytes on each link and a hundred back."""
    links = [(there, 100.0)] * (relays + 1) if there else []
    return Measured(size, relays, padding, 1000, [1.0], [seconds], 10, links, [cpu] * relays)


def test_verdicts() -> None:
    direct, far = path(MIB, 0, 1.0), path(MIB, 3, 4.0, there=11 * MIB, cpu=0.5)
    report = Report([direct, far, path(MIB, 1, 5.0, padding="padme", there=12 * MIB)], [], None, None, 1.0)
    assert report.share(far) == pytest.approx(0.25)
    assert far.overhead == pytest.approx(0.1, abs=0.001)
    assert far.cpu_per_mib == pytest.approx(0.05)
    assert [(verdict.text, verdict.met) for verdict in report.verdicts] == [
        ("1 MiB through 3 relays: throughput at least 0.25 of the direct channel's", True),
        ("1 MiB through 3 relays, fixed: at most 12% more bytes than in the messages", True),
        ("1 MiB through 1 relays, padme: at most 12% more bytes than in the messages", False),
    ]
    slow = Report([direct, path(MIB, 3, 4.1)], [], None, None, 1.0)
    assert [verdict.met for verdict in slow.verdicts] == [False]
    small = Report([path(64 * KIB, 1, 1.0, there=100 * MIB)], [], None, None, 1.0)
    assert small.verdicts == [], "padding is promised above 64 KiB only"
    assert Crowd(100, 1, 1.0, 1, 1, 149_999_999).met is True
    assert Crowd(100, 1, 1.0, 1, 1, 150_000_000).met is False
    assert Crowd(99, 1, 1.0, 1, 1, 1).met is Crowd(100, 1, 1.0, 1, None, None).met is None


def test_what_cannot_be_counted_is_left_out(tmp_path: Path) -> None:
    unknown = path(MIB, 1, 1.0)
    assert unknown.wire is unknown.overhead is unknown.as_json()["overhead"] is None
    assert _cost(str(tmp_path), [unknown]) is None
    assert _cost(str(tmp_path), [path(MIB, 0, 1.0, there=1.0)]) is None


@pytest.mark.parametrize("answer", [b"ab", b"abcd", b"abx"])
def test_another_answer_voids_the_measurement(answer: bytes) -> None:
    _check(memoryview(bytearray(b"abc")), b"abc")
    with pytest.raises(ValueError, match="not what was sent"):
        _check(memoryview(bytearray(answer)), b"abc")


def test_a_hop_is_what_was_measured_and_the_rest_is_what_remains() -> None:
    cost = Cost(MIB, 1.0, 0.25, 0.5)
    assert cost.rest == pytest.approx(0.25)
    _, alone = _alone({"cell": 16 * KIB}, lambda error: None)
    assert alone["frame"] == 16 * KIB + CELL_HEAD
    assert 0 < alone["cipher"] < 0.01 and 0 < alone["sockets"] < 0.01


def test_bytes_of_connections_are_the_kernels() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as here:
            there, _ = server.accept()
            with there:
                here.sendall(bytes(5000))
                there.sendall(bytes(300))
                while len(there.recv(8192, socket.MSG_PEEK)) < 5000:
                    pass
                while len(here.recv(8192, socket.MSG_PEEK)) < 300:
                    pass
                sent, received = dict(_connections())[port]
    assert received == 300
    assert 5000 <= sent <= 5001, "the kernel counts the opening, too"


def test_the_graphs() -> None:
    """As many circuits as asked for, each through all relays, in the order of the ports."""
    with _ground(4 * MIB, 3) as ground:
        graph = parse_graph(ground.graph, "bench")
        ((first, second, routes),) = graph.circuits_between()
        assert (first, second, routes) == ("near-0", "far", (("relay-1", "relay-2", "relay-3"),))
        ports = [graph.parties[name].listen for name in ("relay-1", "relay-2", "relay-3", "far")]
        assert ports == [f"tcp://127.0.0.1:{port}" for port in ground.links]
    with _ground(KIB, 1, near=7, padding="padme") as ground:
        graph = parse_graph(ground.graph, "bench")
        assert (graph.busiest, graph.circuits.padding) == (7, "padme")
    with _ground(KIB, 0) as ground:
        assert not parse_graph(ground.graph, "bench").relays


def test_options() -> None:
    assert _relays("0,1, 3,1") == (0, 1, 3)
    for wrong in ("", "8", "-1", "1,,2", "two", "\u0661"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number of relays from 0 to 7"):
            _relays(wrong)
