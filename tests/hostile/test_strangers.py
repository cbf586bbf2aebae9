"""Strangers at the port, many of every kind: they learn nothing, cost little, and training does not notice.

The crowd is that of ``splitsec bench strangers``, which measures the same with 2,000 of them on an idle machine
(``make strangers``).  It is one process of its own.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import pytest

from splitsec.bench.strangers import KINDS, Crowd, bench_strangers
from splitsec.transports import hybrid, iothread, sockets
from splitsec.transports.handshake import MAGIC
from splitsec.transports.iothread import Opened
from splitsec.transports.limits import (
    HANDSHAKES_BURST,
    HANDSHAKES_PER_SECOND,
    LOGS_BURST,
    LOGS_PER_SECOND,
    STRANGER_BYTES,
    STRANGERS_CONNECTED_MAX,
    STRANGERS_MAX,
)
from splitsec.transports.noise import HandshakeState, public_key_of
from tests.conftest import SOURCE

from .conftest import DIGEST, GREETING, LANE, PATIENCE, READY, Dialer, Victim, until

SOON: Final = 0.5
"""In place of STRANGER_SECONDS, so that a test need not wait for ten."""

MET: Final = 94  # bytes: our greeting and READY, the same for everybody
HELLO_KINDS: Final = (
    "magic and random bytes",
    "right digest and random bytes",
    "a replayed hello",
    "a replayed hello and rubbish",
)
SAY_NOTHING: Final = ("connect and close",)
RUBBISH: Final = tuple(kind for kind in KINDS if kind not in HELLO_KINDS)


class Costs:
    """What the victim spends on strangers, counted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.hellos = 0
        """That came, and at least began like one."""
        self.hellos_opened = 0
        """Noise: one or more X25519 for each."""
        self.encapsulated = 0
        """ML-KEM."""
        self.in_flight = 0
        """Handshakes, at most."""
        read, encapsulate = HandshakeState.read_message, hybrid.EncapsulationKey.encapsulate
        add_line, stranger = iothread._Driver._add_line, iothread._Driver._stranger

        def stranger_(self_: Any, *arguments: Any) -> None:
            self.hellos += bytes(arguments[3][:8]) == MAGIC
            stranger(self_, *arguments)

        def read_message(self_: Any, *arguments: Any) -> Any:
            self.hellos_opened += 1
            return read(self_, *arguments)

        def encapsulate_(self_: Any) -> Any:
            self.encapsulated += 1
            return encapsulate(self_)

        def add(self_: Any, *arguments: Any) -> Any:
            line = add_line(self_, *arguments)
            going_on = [other for other in self_._lines.values() if other.known is None and not _is_over(other)]
            self.in_flight = max(self.in_flight, len(going_on))
            return line

        patch.setattr(HandshakeState, "read_message", read_message)
        patch.setattr(hybrid.EncapsulationKey, "encapsulate", encapsulate_)
        patch.setattr(iothread._Driver, "_add_line", add)
        patch.setattr(iothread._Driver, "_stranger", stranger_)


def _is_over(line: Any) -> bool:
    return bool(line.forget_at != float("inf"))


def seen_off(victim: Victim, overheard: bytes, kinds: tuple[str, ...], each: int) -> dict[str, dict[str, int]]:
    """``each`` strangers of each kind come once, and are hung up on.  What they say became of them."""
    with (
        victim.dialer() as friend,
        Crowd(victim.address, overheard, count=each * len(kinds), kinds=kinds, again=3600.0) as crowd,
    ):
        assert victim.next() == Opened(friend.key)
        friend.comes_in()
        crowd.wait_until("put out")
        victim.exchanges_with(friend)
        tallies: dict[str, dict[str, int]] = crowd.go()["kinds"]
        driver = victim.io._driver
        (port,) = driver._ports
        until(lambda: len(port._links) == 1 and not port._strangers, victim)
        until(lambda: len(driver._lines) == 1, victim)
        victim.exchanges_with(friend)
    for kind, tally in tallies.items():
        assert tally["strangers"] == tally["opened"] == each, kind
        assert (tally["left"] if kind in SAY_NOTHING else tally["hung_up"]) == each, kind
    return tallies


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Strangers cause a bounded number of lines in the operator's log."""
    caplog.set_level(logging.DEBUG)
    began = time.monotonic()
    yield
    assert 0 < len(caplog.get_records("call")) <= LOGS_BURST + LOGS_PER_SECOND * (time.monotonic() - began)


@pytest.mark.threat("T22")
def test_rubbish_costs_no_cryptography_and_tells_nobody_anything(
    victim: Victim, overheard: bytes, monkeypatch: pytest.MonkeyPatch, lines: None
) -> None:
    """All kinds that know no hello; those who say nothing wrong are hung up on when their time is over."""
    monkeypatch.setattr(sockets, "STRANGER_SECONDS", SOON)
    costs = Costs(monkeypatch)
    tallies = seen_off(victim, overheard, RUBBISH, 10)
    assert (costs.hellos_opened, costs.encapsulated, costs.in_flight) == (2, 1, 1)  # the friend's, at both ends
    for kind, tally in tallies.items():
        if kind != "endless pings":  # each asks for a PONG, which is shorter
            assert tally["heard_most"] <= MET, kind
        assert tally["heard"] <= MET * 10 or tally["heard"] < tally["sent"], kind


@pytest.mark.threat("T23")
@pytest.mark.parametrize(
    "begin",
    [
        os.urandom(100),
        GREETING + READY + b"\x02" + (1 << 62).to_bytes(8, "big"),
        GREETING + READY + b"\x01\x08SPLITSEC" * 1000,
        GREETING + READY + b"\x00\x08no hello",
        GREETING + READY + b"\x02" + (1297).to_bytes(8, "big") + b"SPLITSEC\x01" + bytes(1288),
    ],
    ids=["no ZMTP", "a huge frame", "endless parts", "a frame that is no hello", "another digest"],
)
def test_few_bytes_are_taken_from_a_stranger(begin: bytes, victim: Victim) -> None:
    """However fast it sends: it is hung up on, and not read to its end.

    What the operating system's buffers at both ends hold counts here, too: some megabytes.
    """
    host, _, port = victim.address.removeprefix("tcp://").rpartition(":")
    flood = bytes(1 << 20)
    for _ in range(3):
        taken = 0
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as stranger:
            stranger.sendall(begin)
            with suppress(ConnectionError):
                while taken < 16 << 20:
                    taken += stranger.send(flood)
        assert taken < 16 << 20


def test_who_only_asks_gets_few_answers(victim: Victim, overheard: bytes) -> None:
    """PINGs without end: each is good, and all of them are too many."""
    tally = seen_off(victim, overheard, ("endless pings",), 10)["endless pings"]
    assert tally["heard_most"] <= STRANGER_BYTES


@pytest.mark.threat("T22")
def test_a_guessed_hello_costs_one_opening_at_most_and_no_ml_kem(
    victim: Victim, overheard: bytes, monkeypatch: pytest.MonkeyPatch, lines: None
) -> None:
    """Who does not know the digest costs none; both get a refusal, which is the same for everybody."""
    costs = Costs(monkeypatch)
    tallies = seen_off(victim, overheard, HELLO_KINDS[:2], 20)
    assert costs.hellos_opened == 2 + 20
    assert costs.encapsulated == 1
    assert {tally["heard_most"] for tally in tallies.values()} == {MET + 2 + 10}


def test_replayed_hellos_are_bounded_in_number_and_in_flight(
    victim: Victim, overheard: bytes, monkeypatch: pytest.MonkeyPatch, lines: None
) -> None:
    """More come than may be in flight, and more than may be computed at once."""
    costs = Costs(monkeypatch)
    with victim.dialer() as friend:
        assert victim.next() == Opened(friend.key)
        friend.comes_in()
        began = time.monotonic()
        with Crowd(victim.address, overheard, count=100, kinds=HELLO_KINDS[2:], again=0.05) as crowd:
            until(lambda: costs.hellos >= 600, victim)
            allowed = HANDSHAKES_BURST + HANDSHAKES_PER_SECOND * (time.monotonic() - began)
            assert STRANGERS_MAX < costs.encapsulated <= allowed
            victim.exchanges_with(friend)
            tallies = crowd.go()["kinds"]
    assert costs.in_flight <= STRANGERS_MAX + 1  # the friend's
    assert tallies["a replayed hello"]["heard_most"] == MET + 9 + 1137


@pytest.mark.threat("T26")
def test_who_comes_late_gets_in_past_a_crowd(victim: Victim, overheard: bytes, lines: None) -> None:
    """And one whose connection broke comes back.  The crowd is larger than what a listener holds."""
    with (
        Crowd(victim.address, overheard, count=STRANGERS_CONNECTED_MAX + 50, again=1.0) as crowd,
        victim.dialer() as first,
    ):
        crowd.wait_until("here")
        assert victim.next() == Opened(first.key)
        first.comes_in()
        victim.exchanges_with(first)
        with victim.dialer(3) as second:
            assert victim.next() == Opened(second.key)
            second.comes_in()
            victim.exchanges_with(second)
            victim.exchanges_with(first)
        crowd.go()


LISTENS: Final = """\
import resource, sys
from splitsec.transports.iothread import Closed, IOThread, Peer, Received

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
peer = Peer(bytes.fromhex(sys.argv[1]), lanes={LANE: 1_000_000})
with IOThread(
    private_key=bytes([1]) * 32, digest=bytes.fromhex(sys.argv[2]), peers=[peer], listen="tcp://127.0.0.1:*"
) as io:
    print(io.endpoint, flush=True)
    while not isinstance(event := io.receive(), Closed):
        if isinstance(event, Received):
            with open("/dev/null", "rb"):  # as user code does, and whoever saves weights
                io.send(event.peer, event.lane, event.header, [event.body])
print(event.error)
""".replace("LANE", str(LANE))


def test_a_listener_without_descriptors_for_all_goes_on(overheard: bytes) -> None:
    """It may have 64 open, and more strangers than that come and say nothing.

    Who is expected comes in all the same, and descriptors are left for everything else that a party does.
    """
    arguments = (public_key_of(bytes([2]) * 32).hex(), DIGEST.hex())
    with subprocess.Popen(
        [sys.executable, "-c", LISTENS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            address = process.stdout.readline().strip()
            with Crowd(address, overheard, count=200, kinds=["silent", "greeting and nothing"], again=0.2) as crowd:
                crowd.wait_until("here")
                with Dialer(address, public_key_of(bytes([1]) * 32)) as dialer:
                    dialer.comes_in()
                    for number in range(50):
                        dialer.io.send(dialer.victim, LANE, b"%d" % number, [bytes(1000)])
                        assert getattr(dialer.next(), "header", None) == b"%d" % number
                    dialer.io.close()
                crowd.go()
            assert process.wait(PATIENCE) == 0, process.stderr.read()
            assert process.stdout.read() == "None\n"
        finally:
            process.kill()


@pytest.mark.threat("T26")
def test_a_training_does_not_notice() -> None:
    """Two parties in processes of their own, over tcp: in peace, and with 300 strangers from before the client comes
    until the last weight is written.  The server may have 128 files and connections open.

    How long it takes is measured elsewhere; the bound here is for a busy machine.
    """
    report = bench_strangers(strangers=300, rounds=1, steps=500, network="mlp", descriptors=128)
    (peace,), (siege,) = report.peace, report.siege
    assert sorted(siege.weights) == ["out/client/stem.safetensors", "out/server/trunk.safetensors"]
    assert report.weights_equal
    assert siege.crowd is not None
    assert all(tally["opened"] >= tally["strangers"] > 15 for tally in siege.crowd["kinds"].values())
    assert peace.log_lines == 0
    assert siege.log_lines <= LOGS_BURST + 10
    assert report.growth_bytes is not None and report.growth_bytes < 100 << 20
    assert siege.descriptors is not None and siege.descriptors < 128
    assert siege.connect_seconds < 30
    assert siege.seconds < 3 * peace.seconds + 2
    assert json.loads(json.dumps(report.as_json()))["weights_equal"] is True
