"""The victim, and those who mean it harm.

Here: ``Victim``, an I/O thread that listens and has one honest peer; ``BadPeer``, somebody with the right key who says
on the wire whatever a test wants.  The strangers are those of ``splitsec bench strangers``.

``BadPeer`` uses our handshake, records and layouts (whose first users are other tests), but neither session, channel
nor I/O thread: so it keeps no rule by accident.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final

import pytest

from splitsec.bench.strangers import catch_hello
from splitsec.transports.handshake import Established, Initiator
from splitsec.transports.iothread import Closed, Event, IOThread, Opened, Peer, Received
from splitsec.transports.limits import (
    CELL_HEAD,
    CHUNK_HEADER_SIZE,
    CHUNK_MAX,
    OVERHEAD,
    RUN_SIZE,
    SMALL_CELL,
    TAG_SIZE,
)
from splitsec.transports.noise import public_key_of
from splitsec.transports.record import Opener, Sealer
from splitsec.transports.wire import (
    NO_RUN,
    ChunkHeader,
    FrameType,
    Kind,
    Ready,
    pack_chunk_header,
    pack_ready,
    unpack_chunk_header,
)

PATIENCE: Final = 60.0
"""Seconds; what is waited for takes milliseconds on an idle machine."""

DIGEST: Final = b"\x5a" * 32
LANE: Final = 1
SEALED: Final = bytes([FrameType.SEALED])
CELL: Final = bytes([FrameType.CELL])
HANDSHAKES: Final = (Kind.CREATE, Kind.CREATED)
GREETING: Final = (b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0")).ljust(64, b"\0")
READY: Final = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


class Dialer:
    """An honest party that dials ``address``, and takes messages of up to 1 MB."""

    def __init__(self, address: str, victim: bytes, number: int = 2) -> None:
        private_key = bytes([number]) * 32
        self.key = public_key_of(private_key)
        self.victim = victim
        self.io = IOThread(
            private_key=private_key,
            digest=DIGEST,
            peers=[Peer(victim, dial=address, lanes={LANE: 1_000_000})],
            connect_timeout=PATIENCE,
        )

    def __enter__(self) -> Dialer:
        self.io.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.io.close(linger=0.2)

    def next(self, patience: float = PATIENCE) -> Event:
        """The next event; fails where none comes."""
        event = self.io.receive(patience)
        assert event is not None, "nothing happened"
        return event

    def comes_in(self) -> None:
        """Waits until its channel is open."""
        assert self.next() == Opened(self.victim)


class Victim:
    """Listens, and expects the parties whose keys are 2 and 3."""

    def __init__(self) -> None:
        private_key = bytes([1]) * 32
        self.key = public_key_of(private_key)
        self.io = IOThread(
            private_key=private_key,
            digest=DIGEST,
            peers=[Peer(public_key_of(bytes([number]) * 32), lanes={LANE: 1_000_000}) for number in (2, 3)],
            listen="tcp://127.0.0.1:*",
            connect_timeout=PATIENCE,
        )
        self.io.start()
        self.address = self.io.endpoint or ""

    def next(self) -> Event:
        event = self.io.receive(PATIENCE)
        assert event is not None, "nothing happened"
        return event

    def close(self) -> None:
        self.io.close(linger=0.2)

    def dialer(self, number: int = 2) -> Dialer:
        """Somebody who is expected."""
        return Dialer(self.address, self.key, number)

    def exchanges_with(self, dialer: Dialer, count: int = 20) -> None:
        """Messages go both ways, and come as they were sent."""
        for number in range(count):
            text, body = b"%d" % number, bytes([number]) * 50_000
            dialer.io.send(self.key, LANE, text, [body])
            assert self.next() == Received(dialer.key, LANE, text, memoryview(body))
            self.io.send(dialer.key, LANE, text, [body])
            assert dialer.next() == Received(self.key, LANE, text, memoryview(body))


@pytest.fixture
def victim() -> Iterator[Victim]:
    victim = Victim()
    yield victim
    victim.close()


@pytest.fixture(scope="session")
def overheard() -> bytes:
    """A hello that the party with key 2 once said to the victim, as the wire had it."""
    return catch_hello(lambda address: Dialer(address, public_key_of(bytes([1]) * 32)))


# --- somebody with keys


@dataclass(frozen=True)
class Heard:
    """One frame that the victim sent, opened."""

    header: ChunkHeader
    payload: bytes


class BadPeer:
    """Dials ``address`` and comes in as the party that holds ``private_key``."""

    def __init__(self, address: str, private_key: bytes, victim: bytes, digest: bytes) -> None:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""
        self.received = 0
        """Chunks that it says it has received."""
        self._socket.sendall(GREETING + READY)
        self._take(64)
        initiator = Initiator(private_key, victim, digest)
        initiator.start()
        for frame in initiator.frames_to_send():
            self.send(frame)
        self._keys: Established = initiator.receive(self._frame())
        self.sealer = Sealer(self._keys.send_key)
        self._opener = Opener(self._keys.receive_key)

    def comes_in(self) -> BadPeer:
        """READY, both ways."""
        header, payload = pack_ready(Ready(os.urandom(RUN_SIZE), NO_RUN, 0, 1 << 40))
        self.say(header, payload)
        assert self.hear().header.kind is Kind.READY
        return self

    def __enter__(self) -> BadPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    # --- what it says

    def send(self, frame: bytes) -> None:
        """One frame, as it is."""
        self._socket.sendall(b"\x02" + len(frame).to_bytes(8, "big") + frame)

    def say(self, header: ChunkHeader | bytes, payload: bytes = b"") -> None:
        """One sealed frame; ``header`` may be any 32 bytes."""
        if isinstance(header, ChunkHeader):
            header = pack_chunk_header(header._replace(received=self.received))
        frame = bytearray(1 + CHUNK_HEADER_SIZE + TAG_SIZE + (len(payload) + TAG_SIZE if payload else 0))
        frame[0] = SEALED[0]
        view = memoryview(frame)
        self.sealer.seal_into(header, view[1:], SEALED)
        if payload:
            self.sealer.seal_into(payload, view[1 + CHUNK_HEADER_SIZE + TAG_SIZE :])
        self.send(bytes(frame))

    def say_cell(self, header: ChunkHeader, content: bytes = b"", size: int = SMALL_CELL) -> None:
        """One cell of ``size`` bytes with ``content``: sealed, of a handshake; as it is, of anything else."""
        if header.kind in HANDSHAKES:
            header = header._replace(payload_size=len(content))
        frame = memoryview(bytearray(CELL_HEAD + size))
        frame[:1] = CELL
        self.sealer.seal_into(pack_chunk_header(header._replace(received=self.received)), frame[1:CELL_HEAD], CELL)
        if header.kind in HANDSHAKES:
            self.sealer.seal_into(content, frame[CELL_HEAD:])
        else:
            frame[CELL_HEAD : CELL_HEAD + len(content)] = content
        self.send(bytes(frame))

    def message(self, lane: int, header: bytes, body: bytes = b"", number: int = 0) -> None:
        """A whole message, number ``number`` of its lane."""
        whole = header + body
        for start in range(0, max(1, len(whole)), CHUNK_MAX):
            chunk = whole[start : start + CHUNK_MAX]
            self.say(ChunkHeader(Kind.CHUNK, lane, len(header), len(body), len(chunk), number), chunk)

    # --- what it hears

    def hear(self) -> Heard:
        """The next frame of the victim.  EOFError where there is none any more."""
        frame = memoryview(self._frame())
        assert frame[0] in SEALED + CELL, "a frame in the clear, after the handshake"
        header = memoryview(bytearray(CHUNK_HEADER_SIZE))
        self._opener.open_into(frame[1 : 1 + CHUNK_HEADER_SIZE + TAG_SIZE], header, frame[:1])
        if frame[0] == CELL[0]:
            return self._hear_cell(unpack_chunk_header(header), frame[CELL_HEAD:])
        payload = bytearray(max(0, len(frame) - OVERHEAD))
        if payload:
            self._opener.open_into(frame[1 + CHUNK_HEADER_SIZE + TAG_SIZE :], memoryview(payload))
        heard = Heard(unpack_chunk_header(header), bytes(payload))
        self.received += heard.header.kind is Kind.CHUNK
        return heard

    def _hear_cell(self, header: ChunkHeader, content: memoryview) -> Heard:
        if header.kind not in HANDSHAKES:
            return Heard(header, bytes(content[: header.payload_size]))
        payload = bytearray(header.payload_size)
        self._opener.open_into(content[: len(payload) + TAG_SIZE], memoryview(payload))
        return Heard(header, bytes(payload))

    def hear_out(self) -> list[Heard]:
        """Everything, until the victim hangs up."""
        heard = []
        try:
            while True:
                heard.append(self.hear())
        except (EOFError, ConnectionResetError):
            return heard

    def _frame(self) -> bytes:
        """The next whole frame; commands of ZMTP are passed over."""
        while True:
            flags, first = self._take(2)
            size = int.from_bytes(bytes([first]) + self._take(7), "big") if flags & 2 else first
            body = self._take(size)
            if not flags & 4:
                return body

    def _take(self, size: int) -> bytes:
        while len(self._unread) < size:
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._unread += data
        taken, self._unread = self._unread[:size], self._unread[size:]
        return taken


def until(happened: Callable[[], bool], victim: Victim) -> None:
    """Wait for something that no event tells of: look again whenever the victim's thread had a turn."""
    import time

    by = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < by, "it never happened"
        assert not isinstance(victim.io.receive(0.01), Closed)
