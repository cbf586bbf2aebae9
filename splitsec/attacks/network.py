"""Network abuse: somebody on the line between two parties, or somebody with a key that was stolen.

Here: the cases (``CASES``), the line that they meddle with, the thieves, and the judge.  All parties are honest and run
in processes of their own; whoever attacks has what the case grants: the line, and at most one stolen key.  A case is
held where nothing left that does not leave in peace, whoever attacked got into no session and read nothing, and either
the run went on, to weights equal to the last bit, or it ended with a line that says what was wrong.  To stop a run is
within the power of anybody on the line; it is not to alter or to read it.  Not here: parties that misbehave with their
own key (``abuse``).

Sources: ours; for key-compromise impersonation, the Noise Protocol Framework, revision 34, section 7.8 (IK).
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from splitsec.attacks.abuse import Peace, judgement, line_of, survived
from splitsec.attacks.arena import Fought, Ground
from splitsec.attacks.attack import Attack, Judgement
from splitsec.attacks.outcome import Case, Outcome
from splitsec.contract import digest
from splitsec.graph import Graph, Link
from splitsec.nest import Nest, open_nest
from splitsec.plan import largest_bodies, make_plan, taking_part
from splitsec.simulation import Processes
from splitsec.transports import handshake, hybrid, layer
from splitsec.transports.circuit import Place
from splitsec.transports.circuit import Relay as Hop
from splitsec.transports.errors import TransportsError
from splitsec.transports.handshake import ACCEPT, MAGIC, REFUSE, SHORT_DIGEST_SIZE, VERSION
from splitsec.transports.iothread import IOThread, Opened, Peer, Received
from splitsec.transports.limits import CELL_HEAD, SMALL_CELL
from splitsec.transports.noise.symmetricstate import SymmetricState
from splitsec.transports.wire import Command, FrameType
from splitsec.transports.zmtp import GREETING_SIZE, Role, Stream, frame_header
from splitsec.wiring import cell_limit_of, keys_of, passages_of, peers_of

__all__ = ["CASES", "Line", "Man", "NetworkAbuse", "Passing"]

STRIKE: Final = 3
"""At which of the frames that carry a cut's tensors it is struck."""
LARGE: Final = 1 << 19
"""Bytes; chunks of messages have at most twice as many."""
PATIENCE: Final = 3.0
"""Seconds for which an intruder listens."""
SOON: Final = 6.0
"""Seconds for all parties to come up, where somebody sees to it that they do not."""
_MORE, _LONG, _COMMAND = 1, 2, 4  # flags of a frame (ZMTP 3.1, section 3.2)


# --- the line


class Passing(NamedTuple):
    """One frame on its way.  ``number``: in its connection and direction, from 0: the hello, or the answer to it."""

    connection: int
    to_listener: bool
    number: int
    body: bytes


class CutError(Exception):
    """The cable is cut."""


class Line:
    """Listens in front of ``address``, connects each caller with it, and hands every frame to ``man``."""

    def __init__(self, address: str, man: Man) -> None:
        self._target = int(address.rpartition(":")[2])
        self._man = man
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._connections = 0
        self._follow(self._accept)

    def _follow(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name="line", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                caller, _ = self._listener.accept()
                number = self._connections + 1
                try:
                    port = self._man.leads_to(number) or self._target
                    called = socket.create_connection(("127.0.0.1", port), timeout=5)
                except OSError:  # nobody listens yet; the caller will call again
                    caller.close()
                    continue
                self._connections = number
                called.settimeout(None)
                for end in (caller, called):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._ends += [caller, called]
                self._follow(self._carry, number, True, caller, called)
                self._follow(self._carry, number, False, called, caller)

    def _carry(self, connection: int, to_listener: bool, source: socket.socket, target: socket.socket) -> None:
        unread, number, greeting, first = bytearray(), 0, GREETING_SIZE, b""
        with suppress(OSError, CutError):
            while data := source.recv(1 << 18):
                self._man.overhears(connection, to_listener, data)
                target.sendall(data[:greeting])
                unread += data[greeting:]
                greeting = max(0, greeting - len(data))
                while size := _whole(unread):
                    flags, raw = unread[0], bytes(unread[:size])
                    del unread[:size]
                    if flags & _COMMAND:
                        target.sendall(raw)
                        continue
                    body = raw[9 if flags & _LONG else 2 :]
                    repeated = number == 1 and body == first  # a hello is, until it is answered
                    with self._lock:
                        out = list(self._man.passes(Passing(connection, to_listener, 0 if repeated else number, body)))
                    for one in out:
                        target.sendall(frame_header(len(one)) + one)
                    if not repeated:
                        first = first or body
                        number += 1
        for end in (source, target):  # as a broken cable: both ends notice
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cut every connection and wait for the threads."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for end in self._ends:
            end.close()


def _whole(unread: bytearray) -> int:
    """Bytes of the first frame in ``unread``, 0 where it is not all there yet."""
    long = bool(unread) and bool(unread[0] & _LONG)
    head = 9 if long else 2
    if len(unread) < head:
        return 0
    size = head + int.from_bytes(unread[1:head], "big")
    return size if len(unread) >= size else 0


# --- who meddles with it


class Man:
    """On the line in front of ``listener``; lets everything pass.  ``struck``: it has done what it came for."""

    timeouts: ClassVar[Mapping[str, float]] = {}
    """In place of those that a case has otherwise, seconds."""
    ends_runs: ClassVar[bool] = False
    """It cuts the line for good, or before there are keys to tell it by: then a run may end.  Else it must go on."""

    def __init__(self, graph: Graph, listener: str) -> None:
        self.graph = graph
        self.listener = listener
        self.struck = False
        self.got = ""
        """What it got that it should not have."""
        self.processes: Processes | None = None
        self._threads: list[threading.Thread] = []

    @staticmethod
    def stands_before(graph: Graph) -> str | None:
        """In front of which party it stands; None: there is no such place in ``graph``."""
        link = first_link(graph)
        return None if link is None else link.listener

    def leads_to(self, connection: int) -> int | None:
        """The port to which a call goes on; None: that of the party in front of which it stands."""
        return None

    def overhears(self, connection: int, to_listener: bool, data: bytes) -> None:
        """Bytes as they came in, greetings and all."""

    def passes(self, frame: Passing) -> Iterable[bytes]:
        """What goes on in place of ``frame``."""
        return [frame.body]

    def hears(self, event: Mapping[str, Any], processes: Processes) -> None:
        """Something happened at a party: all keys and addresses are known, and a run that trains says so."""
        if self.processes is None:
            self.processes = processes
            self.begins(processes)
        if event["event"] == "step" and not self._threads:
            thread = threading.Thread(target=self._comes, args=(processes,), name="intruder", daemon=True)
            self._threads.append(thread)
            thread.start()

    def begins(self, processes: Processes) -> None:
        """Before any party dials."""

    def comes(self, processes: Processes) -> None:
        """In a thread of its own, in the middle of training."""

    def _comes(self, processes: Processes) -> None:
        with suppress(OSError, TransportsError):
            self.comes(processes)

    def ends(self) -> None:
        """The run is over."""
        for thread in self._threads:
            thread.join(PATIENCE + 2)

    def own(self) -> Graph:
        """The graph with the keys and addresses of this run."""
        assert self.processes is not None
        return self.processes.graph

    def address(self) -> str:
        """Where the party in front of which it stands really listens."""
        return self.own().parties[self.listener].listen or ""

    def stolen(self, party: str) -> bytes:
        """The private key of ``party``."""
        assert self.processes is not None
        return self.processes.private[party].private_bytes_raw()


def first_link(graph: Graph) -> Link | None:
    """The link over which most is to be seen: the first that a cut's tensors cross, else the first."""
    links = graph.links()
    crossed = {frozenset(pair) for pair, _ in largest_bodies(graph)}
    return next((link for link in links if frozenset(link) in crossed), links[0] if links else None)


class Striker(Man):
    """Strikes once, at a frame that carries tensors of a cut."""

    to_listener = True

    def __init__(self, graph: Graph, listener: str) -> None:
        super().__init__(graph, listener)
        direct = {frozenset(link) for link in graph.links() if link.listener == listener}
        bodies = [size for pair, size in largest_bodies(graph) if pair in direct]
        self._kind = FrameType.SEALED if bodies else FrameType.CELL  # else all that passes is on its way to others
        self._large = min(LARGE, max(bodies, default=2 * SMALL_CELL) // 2)
        self._seen = 0

    def passes(self, frame: Passing) -> Iterable[bytes]:
        if self.struck:
            return self.afterwards(frame)
        carries = frame.body[:1] == bytes([self._kind]) and len(frame.body) >= self._large
        if frame.to_listener is self.to_listener and frame.number >= 2 and carries:
            self._seen += 1
            if self._seen == STRIKE:
                self.struck = True
                return self.strikes(frame)
        self.before(frame)
        return [frame.body]

    def before(self, frame: Passing) -> None:
        """A frame that passes before the one that is struck."""

    def strikes(self, frame: Passing) -> Iterable[bytes]:
        """What goes on in place of it."""
        raise NotImplementedError

    def afterwards(self, frame: Passing) -> Iterable[bytes]:
        """What goes on in place of a later one."""
        return [frame.body]


class Tamperer(Striker):
    def strikes(self, frame: Passing) -> Iterable[bytes]:
        altered = bytearray(frame.body)
        at = CELL_HEAD + 8 if self._kind is FrameType.CELL else len(altered) // 2  # the end of a cell means nothing
        altered[at] ^= 1
        return [bytes(altered)]


class GradientTamperer(Tamperer):
    to_listener = False


class HeaderTamperer(Striker):
    def strikes(self, frame: Passing) -> Iterable[bytes]:
        altered = bytearray(frame.body)
        altered[9] ^= 0x10
        return [bytes(altered)]


class Dropper(Striker):
    def strikes(self, frame: Passing) -> Iterable[bytes]:
        return []


class Truncater(Striker):
    def strikes(self, frame: Passing) -> Iterable[bytes]:
        return [frame.body[:-16]]


class Repeater(Striker):
    def strikes(self, frame: Passing) -> Iterable[bytes]:
        return [frame.body, frame.body]


class Inventor(Striker):
    def strikes(self, frame: Passing) -> Iterable[bytes]:
        return [frame.body[:1] + os.urandom(len(frame.body) - 1), frame.body]


class Reorderer(Striker):
    """The struck frame comes behind the one that follows it."""

    _held: Passing | None = None

    def strikes(self, frame: Passing) -> Iterable[bytes]:
        self._held = frame
        return []

    def afterwards(self, frame: Passing) -> Iterable[bytes]:
        held = self._held
        if held is None or (frame.connection, frame.to_listener) != (held.connection, held.to_listener):
            return [frame.body]
        self._held = None
        return [frame.body, held.body]


class Replayer(Striker):
    """Cuts the cable, and says in the next connection what was said in this one."""

    _old: bytes | None = None
    _done = False

    def before(self, frame: Passing) -> None:
        if frame.to_listener and frame.number >= 2:
            self._old = frame.body

    def strikes(self, frame: Passing) -> Iterable[bytes]:
        self._cut_at = frame.connection
        raise CutError

    def afterwards(self, frame: Passing) -> Iterable[bytes]:
        if self._done or not frame.to_listener or frame.number != 2 or frame.connection <= self._cut_at:
            return [frame.body]
        self._done = True
        return [self._old or frame.body, frame.body]


class Cutter(Striker):
    """Cuts this connection and every later one."""

    ends_runs: ClassVar = True

    def strikes(self, frame: Passing) -> Iterable[bytes]:
        raise CutError

    def afterwards(self, frame: Passing) -> Iterable[bytes]:
        raise CutError


class HelloEditor(Man):
    """Alters the first hello, and lets all others pass."""

    def passes(self, frame: Passing) -> Iterable[bytes]:
        if frame.to_listener and frame.number == 0 and frame.connection == 1:
            self.struck = True
            return [self.edited(frame.body)]
        return [frame.body]

    def edited(self, hello: bytes) -> bytes:
        """What goes on in its place."""
        raise NotImplementedError


class VersionEditor(HelloEditor):
    timeouts: ClassVar = {"connect": SOON}
    ends_runs: ClassVar = True

    def edited(self, hello: bytes) -> bytes:
        return hello[: len(MAGIC)] + bytes([VERSION - 1]) + hello[len(MAGIC) + 1 :]


class KemRemover(HelloEditor):
    """Once: the dialer repeats its hello until it is answered, and what it repeats passes."""

    def passes(self, frame: Passing) -> Iterable[bytes]:
        return [frame.body] if self.struck else super().passes(frame)

    def edited(self, hello: bytes) -> bytes:
        return hello[: -hybrid.KEY_SIZE]


class DigestEditor(HelloEditor):
    def edited(self, hello: bytes) -> bytes:
        at = len(MAGIC) + 1
        return (
            hello[:at]
            + bytes(byte ^ 0xFF for byte in hello[at : at + SHORT_DIGEST_SIZE])
            + hello[at + SHORT_DIGEST_SIZE :]
        )


class Refuser(Man):
    """Answers the first hello itself: the key is unknown."""

    timeouts: ClassVar = {"connect": SOON}
    ends_runs: ClassVar = True

    def passes(self, frame: Passing) -> Iterable[bytes]:
        if not frame.to_listener and frame.number == 0 and frame.connection == 1:
            self.struck = True
            return [bytes([REFUSE, 4]) + digest(self.own())[:SHORT_DIGEST_SIZE]]
        return [frame.body]


# --- who comes by himself, or stands in for somebody


class Caller:
    """A connection of its own to ``address``; what it hears is read for a while and counted."""

    def __init__(self, address: str) -> None:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=PATIENCE)

    def says(self, data: bytes) -> None:
        """Bytes, as they are."""
        self._socket.sendall(data)

    def hears(self, until: Callable[[list[bytes]], bool] = lambda frames: False) -> list[bytes]:
        """The frames that come until ``until``, the end, or its patience is over."""
        unread, frames, greeting = bytearray(), list[bytes](), GREETING_SIZE
        ends = time.monotonic() + PATIENCE
        with suppress(OSError):
            while not until(frames) and (left := ends - time.monotonic()) > 0:
                self._socket.settimeout(left)
                if not (data := self._socket.recv(1 << 16)):
                    break
                unread += data[greeting:]
                greeting = max(0, greeting - len(data))
                while size := _whole(unread):
                    if not unread[0] & _COMMAND:
                        frames.append(bytes(unread[9 if unread[0] & _LONG else 2 : size]))
                    del unread[:size]
        return frames

    def close(self) -> None:
        self._socket.close()


def _told(frames: Iterable[bytes]) -> str:
    """What of ``frames`` is more than an answer to a hello."""
    sealed = [len(frame) for frame in frames if frame[:1] in (bytes([FrameType.SEALED]), bytes([FrameType.CELL]))]
    return f"{len(sealed)} sealed frames of {sum(sealed)} bytes" if sealed else ""


class WholeReplayer(Man):
    """Records what a party that dials says, from its first byte on, and says it all once more, by itself."""

    MOST: Final = 1 << 20

    def __init__(self, graph: Graph, listener: str) -> None:
        super().__init__(graph, listener)
        self._recorded = bytearray()

    def overhears(self, connection: int, to_listener: bool, data: bytes) -> None:
        if connection == 1 and to_listener and len(self._recorded) < self.MOST:
            self._recorded += data

    def comes(self, processes: Processes) -> None:
        caller = Caller(self.address())
        with suppress(OSError):  # it hangs up on us
            caller.says(bytes(self._recorded))
        self.struck = True
        self.got = _told(caller.hears())
        caller.close()


class Impostor(Man):
    """Answers calls in place of the party that listens, with a key of its own."""

    timeouts: ClassVar = {"connect": SOON}
    ends_runs: ClassVar = True

    _thread: IOThread | None = None

    def key(self) -> bytes:
        """The private key that it has."""
        return os.urandom(32)

    def begins(self, processes: Processes) -> None:
        graph = self.own()
        keys = keys_of(graph)
        lanes = {number: 1 << 30 for number in range(1 << 10)}
        dialers = {link.dialer for link in graph.links() if link.listener == self.listener}
        self._thread = IOThread(
            private_key=self.key(),
            digest=digest(graph),
            peers=[Peer(keys[name], lanes=lanes) for name in dialers],
            listen="tcp://127.0.0.1:*",
            connect_timeout=PATIENCE * 10,
            post_quantum=graph.post_quantum,
        )
        self._thread.start()

    def leads_to(self, connection: int) -> int | None:
        assert self._thread is not None
        self.struck = True
        return int((self._thread.endpoint or "").rpartition(":")[2])

    def ends(self) -> None:
        super().ends()
        if self._thread is None:
            return
        while (event := self._thread.receive(0)) is not None:
            if isinstance(event, Opened | Received):
                self.got = f"a session ({type(event).__name__})"
        self._thread.close(linger=0.2)


def _public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def _shared(private: bytes, public: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))


def forged_accept(
    hello: bytes, contract: bytes, *, dialer: bytes, listener: bytes, stolen: bytes, es: bytes, post_quantum: bool
) -> bytes:
    """The answer to ``hello`` by somebody who has the dialer's private key and not the listener's.

    ``dialer``, ``listener``: public keys.  ``es``: what is taken for DH(e of the dialer, s of the listener).
    """
    message = hello[len(MAGIC) + 1 + SHORT_DIGEST_SIZE :]
    noise = _beginning(b"IK", handshake.HYBRID if post_quantum else None, handshake.PROLOGUE, contract, listener)
    ephemeral, static, payload = message[:32], message[32:80], message[80:]
    noise.mix_hash(ephemeral)
    noise.mix_key(es)
    noise.mix_hash(static)
    noise.mix_key(_shared(stolen, listener))  # ss
    noise.mix_hash(payload)
    return bytes([ACCEPT]) + _answer(noise, ephemeral, dialer, post_quantum)


def forged_hello(contract: bytes, *, dialer: bytes, listener: bytes, ss: bytes, post_quantum: bool) -> bytes:
    """A hello by somebody who has not the dialer's private key.  ``ss``: DH(s of the dialer, s of the listener), which
    the private key of either gives.
    """
    noise = _beginning(b"IK", handshake.HYBRID if post_quantum else None, handshake.PROLOGUE, contract, listener)
    own = X25519PrivateKey.generate()
    noise.mix_hash(_public(own))
    noise.mix_key(_shared(own.private_bytes_raw(), listener))  # es
    static = noise.encrypt_and_hash(dialer)
    noise.mix_key(ss)
    payload = noise.encrypt_and_hash(hybrid.EphemeralKey(os.urandom).encapsulation_key if post_quantum else b"")
    return MAGIC + bytes([VERSION]) + contract[:SHORT_DIGEST_SIZE] + _public(own) + static + payload


def forged_answer(key: bytes, contract: bytes, message: bytes, *, es: bytes, post_quantum: bool) -> bytes:
    """The answer of a circuit's hop whose public key is ``key`` by somebody who has not the private one.

    ``es``: what is taken for DH(e of the origin, s of the hop).
    """
    noise = _beginning(b"NK", layer.HYBRID if post_quantum else None, layer.PROLOGUE, contract, key)
    ephemeral, payload = message[:32], message[32:]
    noise.mix_hash(ephemeral)
    noise.mix_key(es)
    noise.mix_hash(payload)
    return _answer(noise, ephemeral, None, post_quantum)


def _beginning(pattern: bytes, with_kem: bytes | None, without: bytes, contract: bytes, known: bytes) -> SymmetricState:
    """Noise's state before the first message, where the responder's public key is ``known``."""
    noise = SymmetricState(b"Noise_" + pattern + b"_25519_AESGCM_SHA256")
    noise.mix_hash((without if with_kem is None else with_kem + b" ") + contract)
    noise.mix_hash(known)
    return noise


def _answer(noise: SymmetricState, ephemeral: bytes, static: bytes | None, post_quantum: bool) -> bytes:
    """e, ee, and se where the initiator has a static key; then a ciphertext of ML-KEM, made up."""
    own = X25519PrivateKey.generate()
    noise.mix_hash(_public(own))
    noise.mix_key(_shared(own.private_bytes_raw(), ephemeral))
    if static is not None:
        noise.mix_key(_shared(own.private_bytes_raw(), static))
    return _public(own) + noise.encrypt_and_hash(os.urandom(hybrid.CIPHERTEXT_SIZE) if post_quantum else b"")


class CompromisedDialer(Man):
    """Has the private key of a party that dials, and answers it in place of the one that listens.

    Of the four secrets in IK's first message and the answer it can compute all but one: DH(e of the dialer, s of the
    listener).  It uses another in its place, which is as good as anything.
    """

    timeouts: ClassVar = {"connect": SOON}
    ends_runs: ClassVar = True

    def passes(self, frame: Passing) -> Iterable[bytes]:
        if frame.to_listener and frame.number == 0:
            self._hellos[frame.connection] = frame.body
        elif not frame.to_listener and frame.number == 0 and frame.body[:1] == bytes([ACCEPT]):
            self.struck = True
            return [self._forged(self._hellos[frame.connection])]
        elif frame.number == 1 and frame.to_listener:
            self.got = "the first sealed frame of a session that it had the keys of"
        return [frame.body]

    def begins(self, processes: Processes) -> None:
        self._hellos: dict[int, bytes] = {}
        self._victim = next(link.dialer for link in self.own().links() if link.listener == self.listener)

    def _forged(self, hello: bytes) -> bytes:
        graph = self.own()
        keys, stolen = keys_of(graph), self.stolen(self._victim)
        return forged_accept(
            hello,
            digest(graph),
            dialer=keys[self._victim],
            listener=keys[self.listener],
            stolen=stolen,
            es=_shared(stolen, keys[self.listener]),
            post_quantum=graph.post_quantum,
        )


class CompromisedListener(Man):
    """Has the private key of the party that listens, and calls it as one that dials.

    Its hello is as good as the real one's (IK, section 7.8: the first message gives no protection against this); but
    the answer takes DH(e of the listener, s of the dialer), which it cannot compute, so no frame of its opens.
    """

    def comes(self, processes: Processes) -> None:
        graph = self.own()
        keys = keys_of(graph)
        victim = next(link.dialer for link in graph.links() if link.listener == self.listener)
        hello = forged_hello(
            digest(graph),
            dialer=keys[victim],
            listener=keys[self.listener],
            ss=_shared(self.stolen(self.listener), keys[victim]),
            post_quantum=graph.post_quantum,
        )
        caller = Caller(self.address())
        caller.says(bytes(Stream(Role.DIALS).control) + frame_header(len(hello)) + hello)
        frames = caller.hears(until=bool)
        self.struck = bool(frames) and frames[0][:1] == bytes([ACCEPT])
        with suppress(OSError):
            ready = bytes([FrameType.SEALED]) + os.urandom(150)
            caller.says(frame_header(len(ready)) + ready)
        self.got = _told([*frames, *caller.hears()])
        caller.close()


class Twin(Man):
    """Has the private key of a party that dials, and comes as that party while it is there."""

    def comes(self, processes: Processes) -> None:
        graph = self.own()
        victim = next(link.dialer for link in graph.links() if link.listener == self.listener)
        listener = keys_of(graph)[self.listener]
        lanes = {number: lane.max_body for (_, number), lane in make_plan(graph, victim).lanes_in.items()}
        thread = IOThread(
            private_key=self.stolen(victim),
            digest=digest(graph),
            peers=[Peer(listener, dial=self.address(), lanes=lanes)],
            connect_timeout=PATIENCE,
            post_quantum=graph.post_quantum,
        )
        thread.start()
        until = time.monotonic() + PATIENCE
        events = []
        while (left := until - time.monotonic()) > 0 and (event := thread.receive(left)) is not None:
            events.append(event)
            if not isinstance(event, Opened | Received):
                break
        self.struck = bool(events)
        got = [type(event).__name__ for event in events if isinstance(event, Opened | Received)]
        self.got = f"a session ({', '.join(got)})" if got else ""
        thread.close(linger=0.2)


class RelayThief(Impostor):
    """Has a relay's private key and stands in for it; whoever is to be reached through it, it claims to be.

    As a relay it is believed: a link with it opens.  What a circuit's origin asks the far end it answers itself, with
    all secrets of the answer (Noise NK) but DH(e of the origin, s of the far end).
    """

    @staticmethod
    def stands_before(graph: Graph) -> str | None:
        listeners = {(link.dialer, link.listener) for link in graph.links()}
        for one in graph.circuits_between():
            for route in one.routes:
                if (one.first, route[0]) in listeners:
                    return route[0]
        return None

    def begins(self, processes: Processes) -> None:
        graph = self.own()
        plan = make_plan(graph, self.listener) if self.listener in taking_part(graph) else None
        peers = peers_of(graph, self.listener, plan)
        self._thread = IOThread(
            private_key=self.stolen(self.listener),
            digest=digest(graph),
            peers=[Peer(peer.key, cells_only=True) for peer in peers if not peer.routes and peer.dial is None],
            listen="tcp://127.0.0.1:*",
            passages=passages_of(graph, self.listener),
            cell_limit=cell_limit_of(graph),
            connect_timeout=PATIENCE * 10,
            post_quantum=graph.post_quantum,
        )
        self._asked = 0
        self._thread._driver._extend = self._claims  # type: ignore[method-assign, assignment]
        self._thread.start()

    def leads_to(self, connection: int) -> int | None:
        assert self._thread is not None
        return int((self._thread.endpoint or "").rpartition(":")[2])

    def _claims(self, hop: Hop, key: bytes, message: bytes) -> None:
        """Be the far end whose key is ``key``."""
        self.struck = True
        graph = self.own()
        answer = forged_answer(key, digest(graph), message, es=bytes(32), post_quantum=graph.post_quantum)
        hop._place = Place.END
        hop._say(Command.EXTENDED, answer)

    def ends(self) -> None:
        Man.ends(self)
        if self._thread is not None:
            self._thread.close(linger=0.2)


# --- the cases


@contextmanager
def _silence() -> Iterator[None]:
    """Thieves speak our protocol in this process; what they log is nobody's business."""
    logger = logging.getLogger("splitsec.transports")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@dataclass(frozen=True)
class Meddling:
    """One case."""

    name: str
    tried: str
    man: type[Man]


CASES: Final = (
    Meddling("tampering: an activation", "flips one bit of a frame that carries an activation", Tamperer),
    Meddling("tampering: a gradient", "flips one bit of a frame that carries a gradient", GradientTamperer),
    Meddling("tampering: a header", "flips one bit of a frame's sealed header", HeaderTamperer),
    Meddling("dropping", "takes one frame out", Dropper),
    Meddling("truncation", "cuts the end off one frame", Truncater),
    Meddling("reordering", "swaps a frame with the next one", Reorderer),
    Meddling("replay: a frame", "sends a frame twice", Repeater),
    Meddling(
        "replay: a frame of an older connection", "cuts the cable, and repeats an old frame in the next", Replayer
    ),
    Meddling(
        "replay: a whole recorded connection", "says a party's hello and all that followed once more", WholeReplayer
    ),
    Meddling("invention", "sends a frame of its own in front of a real one", Inventor),
    Meddling("cutting the cable for good", "cuts every connection from the middle of training on", Cutter),
    Meddling("downgrade: version", "puts an older version into the first hello", VersionEditor),
    Meddling("downgrade: no ML-KEM", "takes the ML-KEM key out of a hello", KemRemover),
    Meddling("downgrade: another graph", "edits the short digest in the first hello", DigestEditor),
    Meddling("a forged refusal", "answers the first hello itself: unknown key", Refuser),
    Meddling("impersonation: a fresh key", "answers all calls with a key of its own", Impostor),
    Meddling(
        "impersonation: a stolen relay key",
        "stands in for a relay with its key, and for whoever is behind it",
        RelayThief,
    ),
    Meddling(
        "key-compromise impersonation: of the listener",
        "has the key of a party that dials, and poses to it as the one that listens",
        CompromisedDialer,
    ),
    Meddling(
        "key-compromise impersonation: of the dialer",
        "has the key of the party that listens, and poses to it as one that dials",
        CompromisedListener,
    ),
    Meddling("a second process with a stolen key", "comes as a party that is there, with its key", Twin),
)
"""Every case, in the order of the report."""

BY_NAME: Final = {case.name: case for case in CASES}


class NetworkAbuse(Attack):
    """Every case that applies to the graph, one after the other.

    ``cases``: only these, by name.  ``nest``: where party processes come from; else one of its own.
    """

    name: ClassVar[str] = "network-abuse"

    def __init__(self, cases: Sequence[str] | None = None, nest: Nest | None = None) -> None:
        self._nest = nest
        self.cases = [BY_NAME[name] for name in cases] if cases is not None else list(CASES)

    def run(self, ground: Ground) -> Outcome:
        began = time.monotonic()
        wanted = [(case, where) for case in self.cases if (where := case.man.stands_before(ground.graph)) is not None]
        if not wanted:
            judged = Judgement("does not apply", "no two parties are connected here, so there is no line to be on")
            return self.outcome(ground, judged, seconds=time.monotonic() - began)
        with _silence(), open_nest() if self._nest is None else nullcontext(self._nest) as nest:
            peace = Peace.on(ground, self.name, nest)
            found = []
            for tried, (case, where) in enumerate(wanted, 1):
                if (one := self._one(ground, case, where, peace, nest)) is not None:
                    found.append(one)
                ground.report({"event": "progress", "done": tried, "of": len(wanted)})
        return self.outcome(ground, judgement(found, len(wanted)), seconds=time.monotonic() - began)

    def _one(self, ground: Ground, case: Meddling, where: str, peace: Peace, nest: Nest | None) -> Case | None:
        """None: the run gave no occasion for it."""
        man = case.man(ground.graph, where)
        lines: list[Line] = []

        def in_front(party: str, address: str) -> str:
            if party != where:
                return address
            lines.append(Line(address, man))
            return lines[0].address

        try:
            fought = ground.fight(
                self.name,
                None,
                batches=1,
                timeouts={**peace.timeouts, **man.timeouts},
                in_front=in_front,
                when=lambda party, event, processes: man.hears(event, processes),
                quiet=peace.quiet + max(man.timeouts.values(), default=0.0),
                nest=nest,
            )
        finally:
            man.ends()
            for line in lines:
                line.close()
        return judge(case, fought, peace, man) if man.struck else None


ENDED: Final = ("PeerRefusedUs", "PeerMisbehaved", "PeerUnreachable", "PeerLost")
"""Errors that say that something is wrong between two parties; the first of them say most about what."""


def judge(case: Meddling, fought: Fought, peace: Peace, man: Man) -> Case:
    """Whether all parties held."""
    honest = [name for name in man.graph.parties if name in taking_part(man.graph)]

    def found(held: bool, seen: str) -> Case:
        return Case(case.name, case.tried, held, seen)

    if man.got:
        return found(False, f"it got {man.got}")
    if (more := peace.leaves_more(fought, honest)) is not None:
        return found(False, more)
    if (moved := peace.weights_moved(fought, honest)) is not None:
        return found(False, moved)
    if fought.stalled:
        return found(False, "the run stood still, without a word from anybody")
    if not fought.failures:
        return survived(case.name, case.tried, fought, peace, honest)
    faults = {party: failure for party, failure in fought.failures.items() if failure["code"] not in ENDED}
    if faults:
        party, failure = next(iter(faults.items()))
        return found(False, f"{party} stopped with {failure['code']}: {line_of(failure)}")
    ranked = sorted(
        fought.failures.items(),
        key=lambda one: (ENDED.index(one[1]["code"]), "last try" not in one[1]["text"], "stopped" in line_of(one[1])),
    )
    party, failure = ranked[0]
    return found(man.ends_runs, f"the run ended; {party}: {line_of(failure)}")
