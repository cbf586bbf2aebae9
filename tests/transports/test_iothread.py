"""The I/O thread over real sockets: who gets in, who is passed on, how it ends, and that nothing is left behind."""

from __future__ import annotations

import base64
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from splitsec.transports import channel, iothread
from splitsec.transports.base import AddressError
from splitsec.transports.circuit import Leg
from splitsec.transports.errors import LocalProtocolError, Lost, PeerMisbehaved, RefusalReason, Refused, Restarted
from splitsec.transports.handshake import MAGIC, Initiator
from splitsec.transports.iothread import CloseCode, Closed, Interrupted, IOThread, Opened, Peer, Received
from splitsec.transports.limits import CELL_MAX, CIRCUIT_CELLS, FRAME_MAX, LOGS_BURST
from splitsec.transports.noise import public_key_of
from splitsec.transports.session import Session
from splitsec.transports.testing import lend
from splitsec.transports.wire import NO_RUN, Ready

from .conftest import PATIENCE, Party

ANY = "tcp://127.0.0.1:*"


class Meet:
    """Two parties whose channel is open; the second dialed."""

    def __init__(self, party: Callable[[int], Party], **arguments: object) -> None:
        self.a, self.b = party(1), party(2)
        start = party.start  # type: ignore[attr-defined]
        start(self.a, [self.a.peer(self.b)], listen=ANY, **arguments)
        start(self.b, [self.b.peer(self.a, dial=self.a.io.endpoint)], **arguments)
        assert self.b.next() == Opened(self.a.key)
        assert self.a.next() == Opened(self.b.key)


Make = Callable[[int], Party]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Messages.


def test_messages_go_both_ways_and_keep_their_order(party: Make) -> None:
    meet = Meet(party)
    for number in range(100):
        meet.a.io.send(meet.b.key, 1, b"a%d" % number, [b"x" * number])
        meet.b.io.send(meet.a.key, 1, b"b%d" % number, [b"y" * number])
    for number in range(100):
        assert meet.b.next() == Received(meet.a.key, 1, b"a%d" % number, memoryview(b"x" * number))
        assert meet.a.next() == Received(meet.b.key, 1, b"b%d" % number, memoryview(b"y" * number))


def test_a_body_of_64_mib_arrives(party: Make) -> None:
    meet = Meet(party)
    body = os.urandom(1 << 20) * 64
    meet.a.io.send(meet.b.key, 1, b"large", [body])
    received = meet.b.next()
    assert isinstance(received, Received)
    assert received.body == body


def test_messages_sent_before_the_peer_is_there_arrive_first(party: Make) -> None:
    a, b = party(1), party(2)
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    party.start(b, [b.peer(a, dial=address)])  # type: ignore[attr-defined]
    b.io.send(a.key, 1, b"first")
    b.io.send(a.key, 1, b"second")
    assert b.io.receive(0.3) is None
    party.start(a, [a.peer(b)], listen=address)  # type: ignore[attr-defined]
    assert a.next() == Opened(b.key)
    assert [a.next(), a.next()] == [Received(b.key, 1, text, memoryview(b"")) for text in (b"first", b"second")]


def test_a_small_message_is_not_held_back_by_a_large_one(party: Make) -> None:
    a, b = party(1), party(2)
    party.start(a, [a.peer(b)], listen=ANY)  # type: ignore[attr-defined]
    a.io.send(b.key, 1, b"large", [bytes(64 << 20)])
    a.io.send(b.key, 2, b"small")
    party.start(b, [b.peer(a, dial=a.io.endpoint)])  # type: ignore[attr-defined]
    assert b.next() == Opened(a.key)
    assert [event.header for event in (b.next(), b.next()) if isinstance(event, Received)] == [b"small", b"large"]


@pytest.mark.parametrize("size", [10, 300_000])
def test_no_message_of_a_conversation_waits_for_a_timer(
    party: Make, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Whoever has the turn is told of every message, and sees every one that comes in: computing threads take turns
    with I/O threads here, hundreds of times.
    """
    monkeypatch.setattr(channel, "ACK_SECONDS", 4.0)
    meet = Meet(party, lost_after=60.0)
    longest = 0.0
    body = bytes(size)

    def echo() -> None:
        for _ in range(300):
            event = meet.a.next()
            assert isinstance(event, Received)
            meet.a.io.send(meet.b.key, 1, event.header, [event.body])

    other = threading.Thread(target=echo)
    other.start()
    for _ in range(300):
        began = time.monotonic()
        meet.b.io.send(meet.a.key, 1, b"h", [body])
        assert isinstance(meet.b.next(), Received)
        longest = max(longest, time.monotonic() - began)
    other.join(PATIENCE)
    assert longest < 3.0


def meet_all(party: Make, count: int) -> tuple[Party, list[Party]]:
    """A listener, and so many who have dialed it."""
    hub, others = party(1), [party(number) for number in range(2, 2 + count)]
    start = party.start  # type: ignore[attr-defined]
    start(hub, [hub.peer(other) for other in others], listen=ANY, lost_after=60.0)
    for other in others:
        start(other, [other.peer(hub, dial=hub.io.endpoint)], lost_after=60.0)
    for other in others:
        assert other.next() == Opened(hub.key)
        assert isinstance(hub.next(), Opened)
    return hub, others


def exchange(hub: Party, other: Party, body: bytes) -> None:
    """A message there, the same back."""
    other.io.send(hub.key, 1, b"h", [body])
    event = hub.next()
    assert isinstance(event, Received)
    hub.io.send(other.key, 1, event.header, [event.body])
    assert isinstance(other.next(), Received)


def test_who_is_silent_costs_a_listener_nothing(party: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, (first, *others) = meet_all(party, 12)
    driver = hub.io._driver
    asked: Counter[bytes] = Counter()
    pump = driver._pump

    def counted(line: iothread._Line, port: object) -> bool:
        asked[line.known.peer.key if line.known is not None else b""] += 1
        return pump(line, port)  # type: ignore[arg-type]

    monkeypatch.setattr(driver, "_pump", counted)
    for _ in range(100):
        exchange(hub, first, bytes(1000))
    assert asked[first.key] >= 100
    assert sum(asked[other.key] for other in others) <= 2 * len(others), "at a tick or two, not at each message"
    for other in others:  # and none of them was forgotten
        exchange(hub, other, bytes(1000))


def test_who_is_silent_keeps_no_buffer_of_a_listener(party: Make) -> None:
    hub, others = meet_all(party, 12)
    for _ in range(2):
        for other in others:
            exchange(hub, other, bytes(300_000))
    driver = hub.io._driver
    (port,) = driver._ports
    reading = [len(link.stream._buffer) for link in port._links.values()]  # type: ignore[attr-defined]
    sealing = [len(driver._buffer), *(len(line.buffer or b"") for line in driver._lines.values())]
    assert max(sealing) >= 300_000
    assert sum(reading) + sum(sealing) <= 3 * FRAME_MAX


def test_send_waits_while_too_much_is_queued(party: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window stops the wire, the outbox bound stops ``send``, and taking events sets both going again."""
    monkeypatch.setattr(iothread, "OUTBOX_BYTES", 4 << 20)
    monkeypatch.setattr(iothread, "LINK_WINDOW", 16 << 20)
    meet = Meet(party)
    sent = threading.Semaphore(0)

    def send_all() -> None:
        for number in range(40):
            meet.a.io.send(meet.b.key, 1, b"%d" % number, [bytes(1 << 20)])
            sent.release()

    sender = threading.Thread(target=send_all)
    sender.start()
    count = 0
    while sent.acquire(timeout=0.5):
        count += 1
    assert 16 <= count <= 16 + 4 + 1  # a window, an outbox, and one that is being cut
    for number in range(40):
        received = meet.b.next()
        assert isinstance(received, Received)
        assert received.header == b"%d" % number
    sender.join(PATIENCE)
    assert not sender.is_alive()


def test_send_need_not_wait(party: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iothread, "OUTBOX_BYTES", 1 << 20)
    monkeypatch.setattr(iothread, "LINK_WINDOW", 16 << 20)
    meet = Meet(party)
    for number in range(40):
        meet.a.io.send(meet.b.key, 1, b"%d" % number, [bytes(1 << 20)], wait=False)
    for number in range(40):
        received = meet.b.next()
        assert isinstance(received, Received)
        assert received.header == b"%d" % number


def test_two_processes_talk(party: Make, tmp_path: Path) -> None:
    script = tmp_path / "echo.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from splitsec.transports.iothread import Closed, IOThread, Peer, Received

            peer = Peer(bytes.fromhex(sys.argv[1]), dial=sys.argv[2], lanes={1: 1 << 30})
            with IOThread(private_key=bytes([2]) * 32, digest=bytes(32), peers=[peer]) as io:
                while not isinstance(event := io.receive(), Closed):
                    if isinstance(event, Received):
                        io.send(peer.key, 1, event.header, [event.body])
            print(event.error, event.code.name)
            """
        )
    )
    a, b = party(1), party(2)
    party.start(a, [a.peer(b)], listen=ANY)  # type: ignore[attr-defined]
    process = subprocess.Popen(
        [sys.executable, str(script), a.key.hex(), str(a.io.endpoint)], stdout=subprocess.PIPE, text=True
    )
    assert a.next() == Opened(b.key)
    for size in (0, 65_536, 3_000_000):
        body = os.urandom(size)
        a.io.send(b.key, 1, b"%d" % size, [body])
        assert a.next() == Received(b.key, 1, b"%d" % size, memoryview(body))
    a.io.close()
    out, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, "None NORMAL\n")


# Who does not get in.


def refused(
    party: Make, caplog: pytest.LogCaptureFixture, listener: Peer | None, expected: bytes, digest: bytes
) -> Refused:
    """The dialer (key 2) is turned down by the listener (key 1)."""
    a, b = party(1), party(2)
    caplog.set_level(logging.WARNING, "splitsec.transports")
    party.start(a, [listener or a.peer(b)], listen=ANY)  # type: ignore[attr-defined]
    party.start(b, [Peer(expected, dial=a.io.endpoint)], digest=digest)  # type: ignore[attr-defined]
    closed = b.next()
    assert isinstance(closed, Closed)
    assert closed.peer == expected
    assert isinstance(closed.error, Refused)
    assert a.io.receive(0.05) is None
    until = time.monotonic() + PATIENCE
    while "refused by us" not in caplog.text:
        assert time.monotonic() < until
    with pytest.raises(Refused):
        b.io.send(expected, 1, b"anyway")
    return closed.error


def test_a_differing_contract_is_refused_and_both_are_named(party: Make, caplog: pytest.LogCaptureFixture) -> None:
    error = refused(party, caplog, None, party(1).key, b"\xab" * 32)
    assert error.reason is RefusalReason.DIGEST_DIFFERS
    assert str(error).endswith("the graphs differ: ours abababababababab, theirs 0000000000000000")
    assert "the graphs differ: ours 0000000000000000, theirs abababababababab" in caplog.text


def test_a_dialer_who_expects_another_key_is_told(party: Make, caplog: pytest.LogCaptureFixture) -> None:
    error = refused(party, caplog, None, party(9).key, bytes(32))
    assert error.reason is RefusalReason.WRONG_KEY


def test_a_key_that_is_not_among_the_peers_is_told(party: Make, caplog: pytest.LogCaptureFixture) -> None:
    error = refused(party, caplog, Peer(party(3).key), party(1).key, bytes(32))
    assert error.reason is RefusalReason.UNKNOWN_KEY


@pytest.mark.threat("T54")
def test_no_secret_is_logged(party: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    meet = Meet(party)
    meet.a.io.send(meet.b.key, 1, b"secret header", [b"secret body"])
    meet.b.next()
    meet.a.io.send(meet.b.key, 77, b"undeclared")
    assert isinstance(meet.b.next(), Closed)
    assert "lane 77, which is not declared" in caplog.text
    for secret in ("secret", meet.a.private_key.hex(), str(meet.a.private_key)):
        assert secret not in caplog.text


@pytest.mark.threat("T33")
def test_a_second_process_with_one_key_is_turned_away_and_disturbs_nobody(party: Make) -> None:
    meet = Meet(party)
    twin = party(2)
    party.start(twin, [twin.peer(meet.a, dial=meet.a.io.endpoint)])  # type: ignore[attr-defined]
    closed = twin.next()
    assert isinstance(closed, Closed)
    assert isinstance(closed.error, Restarted)
    assert closed.code is CloseCode.RESTARTED
    meet.b.io.send(meet.a.key, 1, b"still here")
    assert meet.a.next() == Received(meet.b.key, 1, b"still here", memoryview(b""))


@pytest.mark.threat("T22", "T24")
def test_rubbish_at_the_door_disturbs_nobody_and_floods_no_log(
    party: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "splitsec.transports")
    meet = Meet(party)
    computed: list[object] = []
    real = iothread.Responder
    monkeypatch.setattr(iothread, "Responder", lambda *arguments: computed.append(0) or real(*arguments))
    context = zmq.Context()
    try:
        strangers = []
        for _ in range(5):
            stranger = context.socket(zmq.DEALER)
            stranger.set(zmq.LINGER, 0)
            stranger.connect(meet.a.io.endpoint or "")
            strangers.append(stranger)
        for _ in range(50):
            for stranger in strangers:
                stranger.send(b"")
                stranger.send(os.urandom(500))
                stranger.send(b"\3" + os.urandom(100))
                stranger.send_multipart([MAGIC, b"in", b"parts"])
                stranger.send(MAGIC + os.urandom(10_000))
        strangers[0].send(bytes(FRAME_MAX + 1))
        tcp = socket.create_connection(("127.0.0.1", int((meet.a.io.endpoint or "").rpartition(":")[2])))
        tcp.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        for number in range(100):
            meet.b.io.send(meet.a.key, 1, b"%d" % number)
            assert meet.a.next() == Received(meet.b.key, 1, b"%d" % number, memoryview(b""))
        for stranger in strangers[1:]:
            stranger.send(b"last")
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            assert meet.a.io.receive(0.05) is None
        tcp.close()
    finally:
        context.destroy(0)
    assert computed == []
    assert 0 < len(caplog.records) <= LOGS_BURST + 1


@pytest.mark.threat("T22")
def test_hellos_are_computed_at_a_bounded_rate(party: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who knows the contract's digest sends hellos that look right: a burst costs something, more do not."""
    meet = Meet(party)
    monkeypatch.setattr(meet.a.io._driver, "_handshakes", iothread._Bucket(rate=0.0, burst=5.0))
    initiator = Initiator(b"\5" * 32, meet.a.key, bytes(32))
    initiator.start()
    (hello,) = initiator.frames_to_send()
    context = zmq.Context()
    poller = zmq.Poller()
    try:
        for _ in range(20):
            stranger = context.socket(zmq.DEALER)
            stranger.connect(meet.a.io.endpoint or "")
            stranger.send(hello)
            poller.register(stranger, zmq.POLLIN)
        answered = set()
        while ready := dict(poller.poll(500)):
            answered.update(ready)
            for stranger in ready:
                assert stranger.recv()[:2] == bytes([2, RefusalReason.UNKNOWN_KEY])
        assert len(answered) == 5
        meet.b.io.send(meet.a.key, 1, b"after all that")
        assert isinstance(meet.a.next(), Received)
    finally:
        context.destroy(0)


def test_a_stranger_who_was_put_out_cannot_come_back_on_the_same_line(
    party: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than STRANGERS_MAX handshakes are in flight: the oldest goes, and its late READY opens nothing."""
    monkeypatch.setattr(iothread, "STRANGERS_MAX", 1)
    a, b = party(1), party(2)
    party.start(a, [a.peer(b)], listen=ANY)  # type: ignore[attr-defined]
    context = zmq.Context()
    try:
        slow, late = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
        sessions = []
        for stranger in (slow, late):
            stranger.connect(a.io.endpoint or "")
            handshake = Initiator(b.private_key, a.key, bytes(32))
            session = Session(handshake, now=0, lost_after=20, greet=lambda *_: Ready(b"b" * 16, NO_RUN, 0, 0))
            for frame in session.frames_to_send(lend):
                stranger.send(frame)
            session.receive(memoryview(stranger.recv()), 0)
            sessions.append(session)
        for stranger, session in zip((slow, late), sessions, strict=True):
            for frame in session.frames_to_send(lend):
                stranger.send(frame)
            assert a.io.receive(0.2 if stranger is slow else PATIENCE) == (None if stranger is slow else Opened(b.key))
    finally:
        context.destroy(0)


# Who misbehaves.


@pytest.mark.threat("T28", "T58")
def test_an_undeclared_lane_closes_the_channel_on_both_sides(party: Make) -> None:
    meet = Meet(party)
    meet.a.io.send(meet.b.key, 7, b"not in the contract")
    here = meet.b.next()
    assert isinstance(here, Closed)
    assert isinstance(here.error, PeerMisbehaved)
    assert "lane 7, which is not declared" in str(here.error)
    there = meet.a.next()
    assert isinstance(there, Closed)
    assert isinstance(there.error, Lost)
    assert there.code is CloseCode.MISBEHAVED
    assert "lane" not in str(there.error)  # the reason stays with the operator who has to look
    with pytest.raises(PeerMisbehaved):
        meet.b.io.send(meet.a.key, 1, b"more")


@pytest.mark.threat("T29")
def test_a_body_over_the_lanes_limit_closes_the_channel(party: Make) -> None:
    meet = Meet(party)
    meet.a.io.send(meet.b.key, 2, b"", [bytes(1001)])
    closed = meet.b.next()
    assert isinstance(closed, Closed)
    assert "at most 1000" in str(closed.error)


# How it ends.


@pytest.mark.parametrize("code", [CloseCode.NORMAL, CloseCode.ERROR, CloseCode.STOPPED])
def test_whoever_leaves_sends_all_and_says_why(party: Make, code: CloseCode) -> None:
    meet = Meet(party)
    body = bytes(40 << 20)
    meet.a.io.send(meet.b.key, 1, b"large", [body])
    meet.a.io.send(meet.b.key, 2, b"small")
    meet.a.io.close(code, linger=PATIENCE)
    headers = {event.header for event in (meet.b.next(), meet.b.next()) if isinstance(event, Received)}
    assert headers == {b"large", b"small"}
    closed = meet.b.next()
    assert isinstance(closed, Closed)
    assert closed.code is code
    assert (closed.error is None) == (code is CloseCode.NORMAL)
    with pytest.raises(Lost):
        meet.b.io.send(meet.a.key, 1, b"too late")


def test_close_does_not_wait_for_somebody_who_takes_nothing(party: Make) -> None:
    meet = Meet(party)
    for _ in range(5):
        meet.a.io.send(meet.b.key, 1, b"", [bytes(30 << 20)])
    started = time.monotonic()
    meet.a.io.close(linger=0.5)
    assert time.monotonic() - started < 3


def test_close_twice_is_close_once(party: Make) -> None:
    meet = Meet(party)
    meet.a.io.close()
    meet.a.io.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        meet.a.io.send(meet.b.key, 1, b"")
    with pytest.raises(LocalProtocolError, match="closed"):
        meet.a.io.receive()
    never = IOThread(private_key=b"\1" * 32, digest=bytes(32), peers=[])
    never.close()


def test_close_frees_a_sender_who_waits(party: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iothread, "OUTBOX_BYTES", 1 << 20)
    a = party(1)
    silent = party(2)
    party.start(a, [a.peer(silent)], listen=ANY)  # type: ignore[attr-defined]
    a.io.send(silent.key, 1, b"", [bytes(1 << 20)])
    raised: list[Exception] = []

    def send() -> None:
        try:
            a.io.send(silent.key, 1, b"", [bytes(1 << 20)])
        except LocalProtocolError as error:
            raised.append(error)

    waiting = threading.Thread(target=send)
    waiting.start()
    a.io.close(linger=0.1)
    waiting.join(PATIENCE)
    assert "closed" in str(raised[0])


def test_a_peer_that_is_killed_is_missed_at_once_and_given_up_in_time(party: Make, tmp_path: Path) -> None:
    """Not only after ``lost_after``: the operating system tells of the broken connection, whoever dialed."""
    script = tmp_path / "sit.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from splitsec.transports.iothread import IOThread, Peer

            dial = sys.argv[2] or None
            peer = Peer(bytes.fromhex(sys.argv[1]), dial=dial)
            listen = None if dial else "tcp://127.0.0.1:*"
            io = IOThread(private_key=bytes([2]) * 32, digest=bytes(32), peers=[peer], listen=listen)
            io.start()
            print(io.endpoint, flush=True)
            while True:
                io.receive()
            """
        )
    )
    for dials in (True, False):
        a, b = party(1), party(2)
        if dials:
            party.start(a, [a.peer(b)], listen=ANY, gone_after=1.0)  # type: ignore[attr-defined]
        address = a.io.endpoint or "" if dials else ""
        process = subprocess.Popen(
            [sys.executable, str(script), a.key.hex(), address], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        if not dials:
            party.start(a, [a.peer(b, dial=endpoint)], gone_after=1.0)  # type: ignore[attr-defined]
        assert a.next() == Opened(b.key)
        process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        interrupted = a.next()
        assert isinstance(interrupted, Interrupted)
        assert interrupted.seconds == pytest.approx(1.0)
        assert time.monotonic() - killed < 0.9
        closed = a.next()
        assert isinstance(closed, Closed)
        assert isinstance(closed.error, Lost)
        assert "the peer is gone: no connection that lasted for 1 s; the last try ended so:" in str(closed.error)
        assert closed.code is CloseCode.LOST
        assert 0.9 < time.monotonic() - killed < 3
        process.communicate()
        a.io.close()


def test_a_peer_that_stands_still_is_lost_by_its_silence(party: Make, tmp_path: Path) -> None:
    script = tmp_path / "stand.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, sys
            from splitsec.transports.iothread import IOThread, Peer, Received

            peer = Peer(bytes.fromhex(sys.argv[1]), dial=sys.argv[2], lanes={1: 0})
            io = IOThread(private_key=bytes([2]) * 32, digest=bytes(32), peers=[peer])
            io.start()
            while not isinstance(io.receive(), Received):
                pass
            os.kill(os.getpid(), signal.SIGSTOP)
            """
        )
    )
    a, b = party(1), party(2)
    party.start(a, [a.peer(b)], listen=ANY, lost_after=0.8, gone_after=0.2)  # type: ignore[attr-defined]
    process = subprocess.Popen([sys.executable, str(script), a.key.hex(), str(a.io.endpoint)])
    try:
        assert a.next() == Opened(b.key)
        a.io.send(b.key, 1, b"stop")
        interrupted = a.next()
        assert isinstance(interrupted, Interrupted)
        assert str(interrupted.error) == "nothing was heard for 0.8 s"
        assert isinstance(a.next(), Closed)
    finally:
        process.kill()
        process.wait()


def test_heartbeats_keep_an_idle_channel(party: Make) -> None:
    meet = Meet(party, lost_after=0.8)
    assert meet.a.io.receive(2.0) is None
    meet.a.io.send(meet.b.key, 1, b"still here")
    assert isinstance(meet.b.next(), Received)


@pytest.mark.parametrize("dials", [True, False])
def test_a_peer_that_never_comes_up_is_given_up(party: Make, dials: bool) -> None:
    a, b = party(1), party(2)
    dial = f"tcp://127.0.0.1:{free_port()}" if dials else None
    started = time.monotonic()
    party.start(a, [a.peer(b, dial=dial)], listen=ANY, connect_timeout=0.5)  # type: ignore[attr-defined]
    a.io.send(b.key, 1, b"anybody?")
    closed = a.next()
    assert isinstance(closed, Closed)
    assert isinstance(closed.error, Lost)
    assert "did not come up within 0.5 s" in str(closed.error)
    assert 0.5 <= time.monotonic() - started < 3
    with pytest.raises(Lost, match="did not come up"):
        a.io.send(b.key, 1, b"nobody")


# Circuits lead to whom there is no link with.


class Chain:
    """A and C have no link; B, whom both dial, is a relay between them."""

    def __init__(self, party: Make, *, allowed: bool = True, c_first: bool = True, **arguments: object) -> None:
        self.a, self.b, self.c = party(1), party(2), party(3)
        self.party, self.arguments = party, arguments
        passages = [(end.key, party(4).key) for end in (self.a, self.c)]  # to somebody else
        passages.append((self.c.key, self.a.key))  # and the other way, which nobody goes
        if allowed:
            passages.append((self.a.key, self.c.key))
        self.start(self.b, [self.b.peer(self.a), self.b.peer(self.c)], listen=ANY, passages=passages)
        self.start_end(self.a, self.c, True)
        if c_first:
            self.start_end(self.c, self.a, False)

    def start(self, *arguments: object, **named: object) -> None:
        self.party.start(*arguments, **self.arguments, **named)  # type: ignore[attr-defined]

    def start_end(self, here: Party, there: Party, initiator: bool) -> None:
        self.start(
            here,
            [
                here.peer(self.b, dial=self.b.io.endpoint),
                here.peer(there, routes=((self.b.key,),), initiator=initiator),
            ],
        )

    def meet(self) -> None:
        assert [self.a.next(), self.a.next()] == [Opened(self.b.key), Opened(self.c.key)]
        assert [self.c.next(), self.c.next()] == [Opened(self.b.key), Opened(self.a.key)]
        assert {self.b.next(), self.b.next()} == {Opened(self.a.key), Opened(self.c.key)}


@pytest.mark.threat("T47", "T129")
def test_two_peers_talk_through_a_third_who_cannot_read(party: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[bytes] = []  # all that B's links give out
    went: list[bytes] = []  # and what is left of it under B's layer, or gets one
    chain = Chain(party)
    chain.meet()
    real_cell, real_wait = iothread._Driver._cell, Leg.wait

    def cell(self: iothread._Driver, line: iothread._Line, cell: channel.Cell) -> None:
        if self is chain.b.io._driver:
            came.append(bytes(cell.payload))
        real_cell(self, line, cell)

    def wait(self: Leg, block: bytearray, used: int, size: int, came_by: Leg | None) -> None:
        went.append(bytes(block))
        real_wait(self, block, used, size, came_by)

    monkeypatch.setattr(iothread._Driver, "_cell", cell)
    monkeypatch.setattr(Leg, "wait", wait)
    secret = b"the weights of a segment " * 100_000
    chain.a.io.send(chain.c.key, 1, b"a telling header", [secret])
    assert chain.c.next() == Received(chain.a.key, 1, b"a telling header", memoryview(secret))
    chain.c.io.send(chain.a.key, 1, b"a telling answer", [secret])
    assert chain.a.next() == Received(chain.c.key, 1, b"a telling answer", memoryview(secret))
    for seen in (came, went):
        assert sum(map(len, seen)) > 2 * len(secret)
        for what in seen:
            assert b"weights" not in what
            assert b"telling" not in what
    assert chain.b.io.receive(0.05) is None


def test_the_far_end_may_come_up_later(party: Make) -> None:
    chain = Chain(party, c_first=False)
    chain.a.io.send(chain.c.key, 1, b"waiting for you")
    assert chain.a.next() == Opened(chain.b.key)
    assert chain.b.next() == Opened(chain.a.key)
    assert chain.a.io.receive(0.6) is None
    chain.start_end(chain.c, chain.a, False)
    assert chain.a.next() == Opened(chain.c.key)
    assert [chain.c.next(), chain.c.next(), chain.c.next()] == [
        Opened(chain.b.key),
        Opened(chain.a.key),
        Received(chain.a.key, 1, b"waiting for you", memoryview(b"")),
    ]


def test_large_messages_pass_both_ways_at_once_and_nothing_piles_up_in_the_middle(
    party: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    real = Leg.wait

    def wait(self: Leg, block: bytearray, used: int, size: int, came_by: Leg | None) -> None:
        real(self, block, used, size, came_by)
        if came_by is not None:
            held.append(sum(waiting[2] for waiting in self.waiting))

    monkeypatch.setattr(Leg, "wait", wait)
    chain = Chain(party)
    chain.meet()
    body = os.urandom(1 << 20) * 64
    chain.a.io.send(chain.c.key, 1, b"there", [body])
    chain.c.io.send(chain.a.key, 1, b"back", [body])
    chain.a.io.send(chain.b.key, 1, b"for you", [body])
    assert chain.c.next() == Received(chain.a.key, 1, b"there", memoryview(body))
    assert chain.a.next() == Received(chain.c.key, 1, b"back", memoryview(body))
    assert chain.b.next() == Received(chain.a.key, 1, b"for you", memoryview(body))
    assert sum(held) > 1 << 20
    assert max(held) <= CIRCUIT_CELLS * CELL_MAX


@pytest.mark.threat("T31")
@pytest.mark.parametrize("allowed", [False, None], ids=["somewhere else", "nowhere"])
def test_nobody_is_passed_on_to_whom_the_contract_does_not_say(party: Make, allowed: bool | None) -> None:
    """B passes circuits on, but none from A to C.  That is no fault of A's: its channel with B goes on."""
    chain = Chain(party, allowed=False, connect_timeout=1.0)
    if allowed is None:
        chain.b.io._driver._circuits = replace(chain.b.io._driver._circuits, passages=Counter())
    assert chain.a.next() == Opened(chain.b.key)
    closed = chain.a.next()
    assert isinstance(closed, Closed)
    assert closed.peer == chain.c.key
    assert closed.code is CloseCode.LOST
    says = str(closed.error)
    assert "did not come up within 1 s; the last try ended so: the relay x25519:" in says
    assert says.endswith(f"has no connection with x25519:{base64.b64encode(chain.c.key).decode()}")
    assert {chain.b.next(), chain.b.next()} == {Opened(chain.a.key), Opened(chain.c.key)}
    chain.a.io.send(chain.b.key, 1, b"we go on")
    assert chain.b.next() == Received(chain.a.key, 1, b"we go on", memoryview(b""))
    assert chain.c.next() == Opened(chain.b.key)
    assert isinstance(chain.c.next(), Closed)


@pytest.mark.threat("T31", "T48", "T126")
@pytest.mark.parametrize("whose", ["its own", "the relay's"])
def test_nobody_can_speak_for_the_far_end(party: Make, caplog: pytest.LogCaptureFixture, whose: str) -> None:
    """D reaches A by the way on which C would come, and proves another key than C's: one that A knows, from a link."""
    caplog.set_level(logging.WARNING, "splitsec.transports")
    a, b, c, d = (party(number) for number in (1, 2, 3, 4))
    start = party.start  # type: ignore[attr-defined]
    start(b, [b.peer(a), b.peer(d)], listen=ANY, passages=[(d.key, a.key)])
    start(a, [a.peer(b, dial=b.io.endpoint), a.peer(c, routes=((b.key,),))])
    assert [a.next(), b.next()] == [Opened(b.key), Opened(a.key)]
    proves = b.private_key if whose == "the relay's" else None
    start(d, [d.peer(b, dial=b.io.endpoint), d.peer(a, routes=((b.key,),), initiator=True, proves=proves)])
    assert d.next() == Opened(b.key)
    closed = d.next()
    assert isinstance(closed, Closed)
    assert isinstance(closed.error, Refused)
    assert closed.error.reason is RefusalReason.UNKNOWN_KEY
    assert str(Refused(RefusalReason.UNKNOWN_KEY, by_peer=False)) in caplog.text
    b.io.send(a.key, 1, b"after the forgery")
    assert a.next() == Received(b.key, 1, b"after the forgery", memoryview(b""))


@pytest.mark.threat("T31")
def test_who_has_a_link_cannot_come_by_a_circuit_nor_the_other_way(party: Make) -> None:
    """A knows C by a circuit only: C's hello on a connection of its own is turned down."""
    a, b, c = party(1), party(2), party(3)
    start = party.start  # type: ignore[attr-defined]
    start(a, [a.peer(b), a.peer(c, routes=((b.key,),))], listen=ANY)
    start(c, [c.peer(a, dial=a.io.endpoint)])
    closed = c.next()
    assert isinstance(closed, Closed)
    assert isinstance(closed.error, Refused)
    assert closed.error.reason is RefusalReason.UNKNOWN_KEY


def test_when_the_far_end_goes_the_near_end_hears_of_it(party: Make) -> None:
    chain = Chain(party, lost_after=1.0)
    chain.meet()
    chain.c.io.close()
    closed = chain.a.next()
    assert closed == Closed(chain.c.key, None, CloseCode.NORMAL)
    chain.a.io.send(chain.b.key, 1, b"we go on")
    assert {type(chain.b.next()), type(chain.b.next())} == {Closed, Received}


@pytest.mark.threat("T49")
def test_when_the_far_end_dies_the_near_end_finds_out_by_its_silence(
    party: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(party, lost_after=1.0)
    chain.meet()
    monkeypatch.setattr(chain.b.io._driver, "_cell", lambda *_: None)  # B passes nothing on any more
    interrupted = chain.a.next()
    assert isinstance(interrupted, Interrupted)
    assert (interrupted.peer, str(interrupted.error)) == (chain.c.key, "nothing was heard for 1 s")


@pytest.mark.threat("T49")
def test_when_the_middle_goes_for_good_both_ends_lose_each_other(party: Make) -> None:
    chain = Chain(party, gone_after=0.5)
    chain.meet()
    chain.b.io.close()
    for end, other in ((chain.a, chain.c), (chain.c, chain.a)):
        events = [end.next() for _ in range(3)]
        assert Closed(chain.b.key, None, CloseCode.NORMAL) in events
        (interrupted,) = [event for event in events if isinstance(event, Interrupted)]
        assert interrupted.peer == other.key
        closed = events[-1]
        assert isinstance(closed, Closed)
        assert closed.peer == other.key
        assert "no connection that lasted for 0.5 s" in str(closed.error)


# Our own mistakes.


def test_an_address_that_is_taken_is_told_at_once(party: Make) -> None:
    a, b = party(1), party(2)
    party.start(a, [], listen=ANY)  # type: ignore[attr-defined]
    io = IOThread(private_key=b.private_key, digest=bytes(32), peers=[], listen=a.io.endpoint)
    with pytest.raises(AddressError, match="in use"):
        io.start()
    io.close()


@pytest.mark.parametrize("address", ["carrier-pigeon://loft", "nothing", "tcp://nowhere", "tcp://127.0.0.1:ten"])
def test_an_address_that_means_nothing_is_told_at_once(address: str) -> None:
    for arguments in ({"listen": address}, {"peers": [Peer(public_key_of(b"\2" * 32), dial=address)]}):
        io = IOThread(**{"private_key": b"\1" * 32, "digest": bytes(32), "peers": [], **arguments})  # type: ignore[arg-type]
        with pytest.raises(AddressError):
            io.start()


def test_arguments_that_cannot_be_meant_are_told_at_once() -> None:
    key = public_key_of(b"\2" * 32)
    with pytest.raises(LocalProtocolError, match="32 bytes"):
        Peer(b"short")
    with pytest.raises(LocalProtocolError, match="not both"):
        Peer(key, dial=ANY, routes=((key,),))
    with pytest.raises(LocalProtocolError, match="not both"):
        Peer(key, cells_only=True, routes=((key,),))
    with pytest.raises(LocalProtocolError, match="at least one relay"):
        Peer(key, routes=((),))
    with pytest.raises(LocalProtocolError, match="on call"):
        Peer(key, on_call=True)
    with pytest.raises(LocalProtocolError, match="crowd"):
        Peer(key, routes=((key,),), crowd=True, initiator=True)
    for arguments, match in (
        ({"peers": [Peer(key), Peer(key)]}, "one key"),
        ({"peers": [Peer(key, routes=((b"v" * 32,),))]}, "begins and ends with a peer"),
        ({"peers": [Peer(key, routes=((public_key_of(b"\3" * 32),),)), Peer(b"v" * 32)]}, "begins and ends"),
        ({"private_key": b"short"}, "private key"),
        ({"digest": b"short"}, "digest"),
    ):
        with pytest.raises(LocalProtocolError, match=match):
            IOThread(**{"private_key": b"\1" * 32, "digest": bytes(32), "peers": [], **arguments})  # type: ignore[arg-type]


def test_a_message_for_a_stranger_is_our_own_mistake(party: Make) -> None:
    meet = Meet(party)
    with pytest.raises(LocalProtocolError, match="not among the peers"):
        meet.a.io.send(party(9).key, 1, b"")
    with pytest.raises(LocalProtocolError, match="no lane"):
        meet.a.io.send(meet.b.key, -1, b"")


def test_a_fault_in_the_thread_comes_out_in_the_caller(party: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    meet = Meet(party)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(meet.a.io._driver, "_arrived", fail)
    meet.b.io.send(meet.a.key, 1, b"")
    for _ in range(2):
        with pytest.raises(LocalProtocolError, match="a bug of ours") as caught:
            meet.a.io.receive(PATIENCE)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(LocalProtocolError, match="a bug of ours"):
        meet.a.io.send(meet.b.key, 1, b"")


def test_ctrl_c_interrupts_receive(tmp_path: Path) -> None:
    script = tmp_path / "wait.py"
    script.write_text(
        textwrap.dedent(
            """
            from splitsec.transports.iothread import IOThread

            with IOThread(private_key=bytes([2]) * 32, digest=bytes(32), peers=[], listen="tcp://127.0.0.1:*") as io:
                print("waiting", flush=True)
                io.receive()
            """
        )
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT


def test_transports_load_no_torch_and_nothing_else_of_splitsec() -> None:
    script = (
        "import sys, splitsec.transports.iothread, splitsec.transports.zeromq, splitsec.transports.memory\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy', 'pydantic', 'yaml')"
        " or (name.startswith('splitsec.') and not name.startswith('splitsec.transports'))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
