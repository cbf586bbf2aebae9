"""The one thread that owns sockets, clock and entropy, and drives the machines.  It runs no user code.

Here: which peer is dialed when, whose session a frame belongs to, what is forwarded, timers, and the two queues between
this thread and the one that computes.  Not here: what may be said on a connection (``session``), what frames add up to
(``channel``), how they travel (``base`` and the transports).  The story goes on above, in ``splitsec``: names of
parties, tensors, training.

    computing thread  --commands, bell-->  I/O thread  --events-->  computing thread

``IOThread`` is the side that computing code holds; ``_Driver`` lives in the thread.  A *line* is one session on one
path, and a path is a connection of a port, or a pair of forwarded directions through the channel of a peer in the
middle.
"""

from __future__ import annotations

import base64
import logging
import os
import queue
import selectors
import threading
import time
from collections import deque
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias, final

from splitsec.transports import base
from splitsec.transports.channel import Channel, Forwarded, Message, Outgoing, Relay
from splitsec.transports.errors import (
    LocalProtocolError,
    Lost,
    PeerMisbehaved,
    RefusalReason,
    Refused,
    TransportsError,
)
from splitsec.transports.handshake import MAGIC, MAX_FRAME, Initiator, Responder
from splitsec.transports.limits import (
    BURST_FRAMES,
    BUSY_RETRY_SECONDS,
    CLOSE_SECONDS,
    FORWARD_PREFIX,
    FRAME_MAX,
    HANDSHAKES_BURST,
    HANDSHAKES_PER_SECOND,
    KEY_SIZE,
    LINK_WINDOW,
    LOGS_BURST,
    LOGS_PER_SECOND,
    OUTBOX_BYTES,
    RELAY_BYTES,
    STRANGERS_MAX,
    WINDOW,
)
from splitsec.transports.session import Ended, Frame, Lend, Session, State
from splitsec.transports.session import Opened as SessionOpened
from splitsec.transports.wire import CloseCode, pack_forward_prefix

if TYPE_CHECKING:
    from typing_extensions import Buffer  # only a hint; Python 3.12 has it in collections.abc

__all__ = ["CloseCode", "Closed", "Event", "IOThread", "Opened", "Peer", "Received"]

_log = logging.getLogger("splitsec.transports")
_FOREVER: Final = float("inf")


@final
@dataclass(frozen=True, slots=True)
class Peer:
    """Somebody to talk to.  ``key``: X25519 public key, 32 bytes.

    ``dial``: address to dial; None: the peer dials us.  ``via``: key of the peer who forwards between us.
    ``initiator``: for a peer reached ``via`` another, whether we open the handshake.  ``lanes``: lane number (0 to
    65535) to the largest body accepted on it, bytes; a message on a lane that is not there closes the channel.
    """

    key: bytes
    dial: str | None = None
    via: bytes | None = None
    initiator: bool = False
    lanes: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.key) != KEY_SIZE:
            raise LocalProtocolError(f"a peer's key has {KEY_SIZE} bytes, not {len(self.key)}")
        if self.via is not None and self.dial is not None:
            raise LocalProtocolError("a peer is dialed or reached via another, not both")


@final
@dataclass(frozen=True, slots=True)
class Opened:
    """The channel with this peer is open: both sides proved their keys and hold the same contract."""

    peer: bytes


@final
@dataclass(frozen=True, slots=True)
class Received:
    """One message.  ``body`` is writable and belongs to whoever takes the event."""

    peer: bytes
    lane: int
    header: bytes
    body: memoryview


@final
@dataclass(frozen=True, slots=True)
class Closed:
    """The channel with this peer is over, or never came to be; nothing follows from it.

    ``error`` is None after the peer's normal goodbye.  Refused: the handshake was turned down.  Lost: it never came up,
    fell silent, or stopped (``code`` says what it said).  PeerMisbehaved: it sent what it may not.
    """

    peer: bytes
    error: TransportsError | None
    code: CloseCode


Event: TypeAlias = Opened | Received | Closed


@final
@dataclass(frozen=True, slots=True)
class _Failed:
    """The I/O thread is no more, through a fault of ours."""

    error: BaseException


@final
@dataclass(frozen=True, slots=True)
class _Send:
    peer: bytes
    message: Outgoing


@final
@dataclass(frozen=True, slots=True)
class _Taken:
    peer: bytes
    size: int


@final
@dataclass(frozen=True, slots=True)
class _Close:
    code: CloseCode
    linger: float


_Command: TypeAlias = _Send | _Taken | _Close


@final
class IOThread:
    """Channels to a fixed set of peers, driven by a thread of their own.  ``with`` starts and closes it.

    Everything but the constructor may be called from any thread; ``receive`` from one at a time.
    """

    def __init__(
        self,
        *,
        private_key: bytes,
        digest: bytes,
        peers: Sequence[Peer],
        listen: str | None = None,
        forwards: Collection[frozenset[bytes]] = (),
        connect_timeout: float = 60.0,
        lost_after: float = 20.0,
    ) -> None:
        """``private_key``: X25519, 32 bytes.  ``digest``: the contract's, 32 bytes.  ``listen``: address to listen at.

        ``forwards``: pairs of peers whose frames we pass on; we cannot read them.  ``connect_timeout``: seconds from
        ``start`` until a peer that is not there is given up.  ``lost_after``: seconds of silence after which a peer is
        lost.
        """
        self._peers = {peer.key: peer for peer in peers}
        if len(self._peers) != len(peers):
            raise LocalProtocolError("two peers with one key")
        for peer in peers:
            if peer.via is not None and (peer.via not in self._peers or self._peers[peer.via].via is not None):
                raise LocalProtocolError("a peer is reached via a peer with whom there is a link, and via no other")
        self._commands: deque[_Command] = deque()
        self._events: queue.SimpleQueue[Event | _Failed] = queue.SimpleQueue()
        self._bell = base.Bell()
        self._room = threading.Condition()  # guards the next three
        self._outbox = dict.fromkeys(self._peers, 0)  # bytes accepted by ``send`` and not sealed yet
        self._ended: dict[bytes, Exception] = {}
        self._failed: BaseException | None = None
        self._untold = dict.fromkeys(self._peers, 0)  # bytes taken from ``receive`` and not told to the I/O thread yet
        self._bound: queue.SimpleQueue[str | BaseException] = queue.SimpleQueue()
        self._endpoint: str | None = None
        self._closed = False
        self._driver = _Driver(
            self, private_key, digest, self._peers, listen, frozenset(forwards), connect_timeout, lost_after
        )
        self._thread = threading.Thread(target=self._driver.run, name="splitsec-io", daemon=True)

    @property
    def endpoint(self) -> str | None:
        """Where we listen, with the real port, once started; None where we do not listen."""
        return self._endpoint

    def start(self) -> None:
        """Listen, then begin to dial.  Raises TransportsError if the address is taken or means nothing; returns at
        once.
        """
        self._thread.start()
        bound = self._bound.get()
        if isinstance(bound, BaseException):
            self._thread.join()
            self._closed = True
            raise bound
        self._endpoint = bound or None

    def send(self, peer: bytes, lane: int, header: bytes, body: Sequence[Buffer] = (), *, wait: bool = True) -> None:
        """Queue one message.  The buffers of ``body`` are sent as one, and are lent until the message has left.

        Waits while more than OUTBOX_BYTES are queued for this peer, unless told not to: two sides that both wait here
        take nothing from each other, so whoever answers every message (and so bounds what is queued) must not wait.
        Raises the peer's error once its channel is closed.
        """
        message = Outgoing(lane, header, body)
        size = message.left
        with self._room:
            if peer not in self._outbox:
                raise LocalProtocolError("a message for somebody who is not among the peers")
            while True:
                self._raise_if_over(peer)
                if not wait or not self._outbox[peer] or self._outbox[peer] + size <= OUTBOX_BYTES:
                    break
                self._room.wait()
            self._outbox[peer] += size
        self._command(_Send(peer, message))

    def receive(self, timeout: float | None = None) -> Event | None:
        """The next event, in order of arrival; None after ``timeout`` seconds without one."""
        if self._closed and self._events.empty():
            raise LocalProtocolError("this I/O thread is closed")
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(event, Received):
            untold = self._untold[event.peer] + len(event.header) + len(event.body)
            if untold >= WINDOW // 4:
                self._command(_Taken(event.peer, untold))
                untold = 0
            self._untold[event.peer] = untold
        elif isinstance(event, _Failed):
            self._events.put(event)  # for the next call
            raise LocalProtocolError(f"the I/O thread failed: {event.error!r}") from event.error
        return event

    def close(self, reason: int = CloseCode.NORMAL, linger: float = CLOSE_SECONDS) -> None:
        """Send what is queued, say goodbye with the code ``reason``, and end the thread; takes about ``linger`` seconds
        at most.
        """
        with self._room:
            if self._closed:
                return
            self._closed = True
            self._room.notify_all()  # whoever waits in ``send`` is told
        if self._thread.ident is not None:
            self._command(_Close(CloseCode(reason), linger))
            self._thread.join()
        self._bell.close()

    def __enter__(self) -> IOThread:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(CloseCode.NORMAL if kind is None else CloseCode.ERROR)

    def _command(self, command: _Command) -> None:
        self._commands.append(command)
        self._bell.ring()

    def _raise_if_over(self, peer: bytes) -> None:
        if self._failed is not None:
            raise LocalProtocolError(f"the I/O thread failed: {self._failed!r}") from self._failed
        if peer in self._ended:
            raise self._ended[peer]
        if self._closed:
            raise LocalProtocolError("this I/O thread is closed")

    # --- called by the driver, in its thread --------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        if isinstance(event, Closed):
            with self._room:
                self._ended[event.peer] = event.error or Lost("the peer has closed the channel")
                self._room.notify_all()
        self._events.put(event)

    def _left(self, peer: bytes, size: int) -> None:
        with self._room:
            self._outbox[peer] -= size
            self._room.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._room:
            self._failed = error
            self._room.notify_all()
        self._events.put(_Failed(error))


@final
class _Bucket:
    """Allows ``rate`` things a second in the long run, and ``burst`` at once."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = 0.0

    def take(self, now: float) -> bool:
        """Whether one more may be."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


@final
class _Passage:
    """Frames that we pass on from one peer to another, between being opened and being sealed again."""

    __slots__ = ("frames", "relay", "size")

    def __init__(self) -> None:
        self.frames: deque[bytearray] = deque()
        self.size = 0
        self.relay = Relay(self._take)

    def put(self, frame: bytearray) -> bool:
        """False, and nothing is kept, where more would wait than the ends' window allows."""
        if self.size + len(frame) > RELAY_BYTES:
            return False
        self.frames.append(frame)
        self.size += len(frame)
        return True

    def _take(self) -> Frame | None:
        if not self.frames:
            return None
        frame = self.frames.popleft()
        self.size -= len(frame)
        return frame


@final
class _Line:
    """One session on one path.  ``machine`` is a Session until it is open or the peer is known, then a Channel."""

    __slots__ = ("buffer", "connection", "forget_at", "known", "machine", "pending", "port", "relay", "through")

    def __init__(
        self, machine: Session | Channel, connection: Hashable, *, port: base.Port | None, through: _State | None
    ) -> None:
        self.machine = machine
        self.connection = connection
        self.port = port  # of a connection of our own
        self.through = through  # the peer in the middle, if there is one
        self.known: _State | None = None  # whose line it is
        self.pending: Frame | None = None  # a frame that the port did not take yet
        self.buffer = bytearray()
        self.relay: Relay | None = None  # our turns in the channel of the peer in the middle
        self.forget_at = _FOREVER  # over, and kept only until its goodbye has left

    @property
    def session(self) -> Session:
        return self.machine.session if isinstance(self.machine, Channel) else self.machine

    def lend(self, size: int) -> memoryview:
        """Memory for one frame; the same each time."""
        if len(self.buffer) < size:
            self.buffer = bytearray(size if size < FRAME_MAX // 8 else FRAME_MAX)
        return memoryview(self.buffer)[:size]


@final
class _State:
    """What the driver knows about one peer."""

    __slots__ = ("channel", "ended", "last_try", "line", "peer", "port", "redial_at", "relays", "waiting")

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.line: _Line | None = None  # the open one, or the one that we dial
        self.channel: Channel | None = None  # open
        self.port: base.Port | None = None  # that we dial with
        self.redial_at = _FOREVER
        self.last_try = ""  # how it ended, for the error message
        self.ended = False
        self.waiting: deque[Outgoing] = deque()  # messages from before the channel was open
        self.relays: dict[bytes, _Passage] = {}  # frames that we pass on to this peer, by whom they come from


@final
class _Driver:
    """What runs in the I/O thread.  Touches the computing side through ``_tell``, ``_left``, ``_fail`` and the command
    queue only.
    """

    def __init__(
        self,
        owner: IOThread,
        private_key: bytes,
        digest: bytes,
        peers: Mapping[bytes, Peer],
        listen: str | None,
        forwards: frozenset[frozenset[bytes]],
        connect_timeout: float,
        lost_after: float,
    ) -> None:
        Responder(private_key, digest, peers)  # raises here, in the caller's thread, what is wrong with the keys
        self._owner = owner
        self._private_key = private_key
        self._digest = digest
        self._listen = listen
        self._forwards = forwards
        self._connect_timeout = connect_timeout
        self._lost_after = lost_after
        self._states = {key: _State(peer) for key, peer in peers.items()}
        self._dialing_us = frozenset(key for key, peer in peers.items() if peer.dial is None and peer.via is None)
        self._transports: dict[str, base.Transport] = {}
        self._ports: dict[base.Port, _State | None] = {}  # None: the port that listens
        self._lines: dict[tuple[object, Hashable], _Line] = {}  # by path
        self._selector = selectors.DefaultSelector()
        self._now = 0.0
        self._wake_at = 0.0
        self._connect_by = _FOREVER
        self._handshakes = _Bucket(HANDSHAKES_PER_SECOND, HANDSHAKES_BURST)
        self._logs = _Bucket(LOGS_PER_SECOND, LOGS_BURST)
        self._closing: _Close | None = None
        self._close_by = _FOREVER

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """The thread's whole life."""
        linger = 0.0
        bound = False
        try:
            self._now = time.monotonic()
            self._selector.register(self._owner._bell, selectors.EVENT_READ)
            endpoint = self._begin()
            bound = True
            self._owner._bound.put(endpoint)
            self._loop()
            linger = max(0.2, self._close_by - time.monotonic())
        except BaseException as error:
            if bound:
                _log.exception("the I/O thread failed")
                self._owner._fail(error)
            else:
                self._owner._bound.put(error)
        finally:
            self._end(linger)

    def _begin(self) -> str:
        endpoint = ""
        self._connect_by = self._now + self._connect_timeout
        if self._listen is not None:
            port = self._transport(self._listen).listen(self._listen)
            self._add_port(port, None)
            endpoint = port.endpoint
        for state in self._states.values():
            if state.peer.dial is not None:
                self._dial(state)
        return endpoint

    def _loop(self) -> None:
        while True:
            self._now = time.monotonic()
            busy = self._obey()
            for port in list(self._ports):
                busy |= self._drain(port)
            if self._now >= self._wake_at:
                self._tick()
            busy |= self._pump_all()
            if self._closing is not None and self._leave(self._closing.code):
                return
            if busy:
                continue
            wait = self._wake_at - time.monotonic()
            for key, _ in self._selector.select(None if wait == _FOREVER else max(0.0, wait)):
                if key.fileobj is self._owner._bell:
                    self._owner._bell.quiet()

    def _end(self, linger: float) -> None:
        for port in list(self._ports):
            self._remove_port(port, linger)
        for transport in self._transports.values():
            transport.close(linger)
        self._selector.close()

    def _obey(self) -> bool:
        """Take what the computing side wants."""
        commands = self._owner._commands
        busy = bool(commands)
        while commands:
            match commands.popleft():
                case _Send(peer, message):
                    state = self._states[peer]
                    if state.channel is not None:
                        state.channel.send(message)
                    elif not state.ended:
                        state.waiting.append(message)
                case _Taken(peer, size):
                    channel = self._states[peer].channel
                    if channel is not None:
                        channel.taken(size)
                case _Close() as close:
                    self._closing = close
                    self._close_by = self._now + close.linger
                    self._wake_at = 0.0
        return busy

    def _drain(self, port: base.Port) -> bool:
        """Take what came in at one port, up to a burst."""
        for count in range(BURST_FRAMES):
            match port.receive():
                case None:
                    return count > 0
                case base.Arrival(connection, frame):
                    line = self._lines.get((port, connection))
                    if line is not None:
                        self._arrived(line, frame)
                    elif self._ports[port] is None:
                        self._stranger(port, None, connection, frame, self._dialing_us)
                case base.Connected(connection):
                    state = self._ports[port]
                    if state is not None:
                        self._open_line(state, connection, port=port)
                case base.Disconnected(connection):
                    line = self._lines.pop((port, connection), None)
                    if line is not None:
                        self._over(line, Lost("the connection broke"), CloseCode.LOST)
                    if self._ports.get(port) is not None:
                        self._remove_port(port, 0)
            if port not in self._ports:
                return True
        return True

    def _tick(self) -> None:
        """Do what is due, and find out when something is due next."""
        now = self._now
        for line in list(self._lines.values()):
            for event in line.machine.tick(now):
                assert isinstance(event, Ended)
                self._over(line, event.error, event.code)
            if now >= line.forget_at:
                self._forget(line)
        for state in self._states.values():
            if state.ended or state.channel is not None:
                continue
            if now >= self._connect_by:
                self._give_up(
                    state,
                    Lost(f"the peer did not come up within {self._connect_timeout:g} s{state.last_try}"),
                    CloseCode.LOST,
                )
            elif now >= state.redial_at:
                state.redial_at = _FOREVER
                self._dial(state)
        self._wake_at = min(self._due(), self._close_by)

    def _due(self) -> float:
        due = _FOREVER
        for line in self._lines.values():
            due = min(due, line.forget_at, line.machine.deadline() or _FOREVER)
        for state in self._states.values():
            if not state.ended and state.channel is None:
                due = min(due, state.redial_at, self._connect_by)
        return due

    def _pump_all(self) -> bool:
        """Hand over all frames that can go now."""
        for line in self._lines.values():
            if line.relay is not None and line.through is not None and line.through.channel is not None:
                line.through.channel.forward(line.relay)
        busy = False
        for line in list(self._lines.values()):
            if line.port is not None:
                busy |= self._pump(line, line.port)
        return busy

    def _pump(self, line: _Line, port: base.Port) -> bool:
        busy = False
        while (frame := line.pending or self._next_frame(line, line.lend)) is not None:
            if not port.send(line.connection, frame):
                line.pending = frame
                return busy
            line.pending = None
            busy = True
        if line.forget_at != _FOREVER and line.session.state is State.CLOSED:
            self._forget(line)
        return busy

    def _next_frame(self, line: _Line, lend: Lend) -> Frame | None:
        machine = line.machine
        if isinstance(machine, Session) or line.known is None:
            return machine.next_frame(lend)
        queued = machine.queued
        frame = machine.next_frame(lend)
        if queued != machine.queued:
            self._owner._left(line.known.peer.key, queued - machine.queued)
        return frame

    def _leave(self, code: CloseCode) -> bool:
        """One step towards the end: outboxes, goodbyes of forwarded channels, goodbyes of the others.  True: all is
        said.
        """
        late = self._now >= self._close_by
        open_states = [state for state in self._states.values() if state.channel is not None]
        if not late and any(_has_work(state) for state in self._states.values()):
            return False
        closing = [line for line in self._lines.values() if line.session.state is State.CLOSING]
        if not late and any(line.through is not None for line in closing):
            return False  # a goodbye that still has to go, and be answered, through somebody else's channel
        forwarded = [state for state in open_states if state.peer.via is not None]
        for state in forwarded or open_states:
            assert state.channel is not None
            state.channel.close(code)
            state.channel = None
            if state.line is not None:
                state.line.known = None
                state.line.forget_at = self._close_by
        if open_states:
            self._pump_all()
            return False
        return late or not closing

    # --- paths --------------------------------------------------------------------------------------------------------

    def _transport(self, address: str) -> base.Transport:
        scheme, kind = base.find_transport(address)
        if scheme not in self._transports:
            self._transports[scheme] = kind(scheme)
        return self._transports[scheme]

    def _add_port(self, port: base.Port, state: _State | None) -> None:
        self._ports[port] = state
        for descriptor in port.descriptors():
            self._selector.register(descriptor, selectors.EVENT_READ)

    def _remove_port(self, port: base.Port, linger: float) -> None:
        state = self._ports.pop(port)
        if state is not None and state.port is port:
            state.port = None
        for descriptor in port.descriptors():
            self._selector.unregister(descriptor)
        port.close(linger)

    def _dial(self, state: _State) -> None:
        peer = state.peer
        if peer.dial is not None:
            state.port = self._transport(peer.dial).dial(peer.dial)
            self._add_port(state.port, state)
        elif peer.via is not None and peer.initiator and self._states[peer.via].channel is not None:
            number = int.from_bytes(os.urandom(8), "big")
            self._open_line(state, (peer.key, number), through=self._states[peer.via])

    def _open_line(
        self, state: _State, connection: Hashable, *, port: base.Port | None = None, through: _State | None = None
    ) -> None:
        """Begin a handshake with a peer whom we dial."""
        handshake = Initiator(self._private_key, state.peer.key, self._digest)
        session = Session(handshake, now=self._now, lost_after=self._lost_after, window=_window(through))
        line = self._add_line(self._channel(session, state, through), connection, port, through)
        line.known = state
        state.line = line

    def _channel(self, session: Session, state: _State, through: _State | None, grant: int = 0) -> Channel:
        key = state.peer.key
        forwards = any(key in pair for pair in self._forwards) or any(
            other.peer.via == key for other in self._states.values()
        )
        return Channel(session, state.peer.lanes, forwards=forwards, grant=grant, window=_window(through))

    def _add_line(
        self, machine: Session | Channel, connection: Hashable, port: base.Port | None, through: _State | None
    ) -> _Line:
        line = _Line(machine, connection, port=port, through=through)
        if through is not None:
            line.relay = Relay(lambda: self._forwarded_frame(line))
        self._lines[self._path(line)] = line
        self._wake_at = 0.0
        return line

    @staticmethod
    def _path(line: _Line) -> tuple[object, Hashable]:
        return (line.port if line.through is None else line.through.peer.key), line.connection

    def _forwarded_frame(self, line: _Line) -> Frame | None:
        """The line's next frame, with the prefix that tells the peer in the middle for whom it is."""
        assert isinstance(line.connection, tuple)
        prefix = pack_forward_prefix(*line.connection)
        frame = self._next_frame(line, lambda size: line.lend(FORWARD_PREFIX + size)[FORWARD_PREFIX:])
        if frame is None:
            if line.forget_at != _FOREVER and line.session.state is State.CLOSED:
                self._forget(line)
            return None
        if isinstance(frame, bytes):
            return prefix + frame
        whole = line.lend(FORWARD_PREFIX + len(frame))  # sealed behind the prefix already
        whole[:FORWARD_PREFIX] = prefix
        return whole

    def _forget(self, line: _Line) -> None:
        self._lines.pop(self._path(line), None)
        line.relay = None
        if line.port is not None and self._ports.get(line.port) is not None:
            self._remove_port(line.port, BUSY_RETRY_SECONDS)

    # --- frames -------------------------------------------------------------------------------------------------------

    def _stranger(
        self,
        port: base.Port | None,
        through: _State | None,
        connection: Hashable,
        frame: memoryview,
        known: Collection[bytes],
    ) -> None:
        """The first frame of somebody whom we do not know yet.  Rubbish costs no cryptography and leaves no trace."""
        if len(frame) > MAX_FRAME or bytes(frame[: len(MAGIC)]) != MAGIC:
            self._log_stranger("ignored a frame that is no hello")
            return
        if not self._handshakes.take(self._now):
            self._log_stranger("ignored a hello: too many of late")
            return
        strangers = [line for line in self._lines.values() if line.known is None and line.forget_at == _FOREVER]
        if len(strangers) >= STRANGERS_MAX:  # all of them replays, or the oldest would be done by now
            strangers[0].machine.close(CloseCode.ERROR)
            self._over(strangers[0], Lost("another handshake took its place"), CloseCode.LOST)
        session = Session(
            Responder(self._private_key, self._digest, known),
            now=self._now,
            lost_after=self._lost_after,
            window=_window(through),
            admit=lambda peer: self._states[peer].channel is None and not self._states[peer].ended,
        )
        self._arrived(self._add_line(session, connection, port, through), frame)

    def _arrived(self, line: _Line, frame: memoryview) -> None:
        try:
            events = line.machine.receive(frame, self._now)
        except PeerMisbehaved as misbehaved:
            self._over(line, misbehaved, CloseCode.MISBEHAVED)
            return
        except LocalProtocolError:
            return  # it failed before, and only its goodbye has to leave
        for event in events:
            match event:
                case Message(lane, header, body) if line.known is not None:
                    self._owner._tell(Received(line.known.peer.key, lane, header, body))
                case Forwarded(key, number, payload):
                    self._forwarded(line, key, number, payload)
                case SessionOpened(peer, grant):
                    self._opened(line, peer, grant)
                case Ended(error, code):
                    self._over(line, error, code)

    def _opened(self, line: _Line, peer: bytes, grant: int) -> None:
        state = self._states[peer]
        if isinstance(line.machine, Session):
            if state.channel is not None or state.ended:  # another one was faster
                line.machine.close(CloseCode.ERROR)
                self._over(line, Lost("there is a channel already"), CloseCode.ERROR)
                return
            line.machine = self._channel(line.machine, state, line.through, grant)
        line.known = state
        state.line = line
        state.channel = line.machine
        self._wake_at = 0.0
        self._owner._tell(Opened(peer))
        for message in state.waiting:
            state.channel.send(message)
        state.waiting.clear()
        for other in self._states.values():
            if other.peer.via == peer and not other.ended:
                self._dial(other)

    def _forwarded(self, line: _Line, key: bytes, number: int, payload: bytearray) -> None:
        """A frame of somebody else's session, either for us or to be passed on."""
        sender = line.known
        if sender is None:
            return
        far = self._states.get(key)
        if far is not None and far.peer.via == sender.peer.key:
            frame = memoryview(payload)[FORWARD_PREFIX:]
            inner = self._lines.get((sender.peer.key, (key, number)))
            if inner is not None:
                self._arrived(inner, frame)
            elif not far.peer.initiator:
                self._stranger(None, sender, (key, number), frame, frozenset({key}))
        elif far is not None and frozenset({sender.peer.key, key}) in self._forwards:
            if far.channel is None:
                return  # whoever sent it will notice
            passage = far.relays.get(sender.peer.key)
            if passage is None:
                passage = far.relays[sender.peer.key] = _Passage()
            payload[:KEY_SIZE] = sender.peer.key
            if not passage.put(payload):
                self._log_stranger("dropped a forwarded frame: more wait than a window holds")
            far.channel.forward(passage.relay)
        else:
            line.session.close(CloseCode.MISBEHAVED)
            self._over(
                line,
                PeerMisbehaved("a frame to be forwarded to somebody with whom it has no business"),
                CloseCode.MISBEHAVED,
            )

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _over(self, line: _Line, error: TransportsError | None, code: CloseCode) -> None:
        """A session has ended.  Dialing goes on, if it never was open and trying again may help."""
        if line.forget_at != _FOREVER:
            return
        state = line.known
        line.known = None
        line.forget_at = self._now + BUSY_RETRY_SECONDS
        self._wake_at = 0.0
        if state is None or state.line is not line:
            if isinstance(error, Refused | PeerMisbehaved):
                self._log_stranger(f"turned somebody down: {error}")
            return
        state.line = None
        busy = isinstance(error, Refused) and error.reason is RefusalReason.BUSY
        if state.channel is None and (busy or isinstance(error, Lost)):
            state.redial_at = self._now + BUSY_RETRY_SECONDS
            state.last_try = f"; the last try ended so: {error}"
        else:
            self._give_up(state, error, code)

    def _give_up(self, state: _State, error: TransportsError | None, code: CloseCode) -> None:
        """The peer's channel is over, or will never be."""
        key = state.peer.key
        if isinstance(error, PeerMisbehaved):
            _log.warning("closed the channel with x25519:%s: %s", base64.b64encode(key).decode(), error)
        state.ended = True
        state.channel = None
        state.waiting.clear()
        state.relays.clear()
        if (
            state.port is not None
            and state.line is None
            and not any(line.port is state.port for line in self._lines.values())
        ):
            self._remove_port(state.port, 0)
        self._owner._tell(Closed(key, error, code))
        for other in self._states.values():
            if other.peer.via != key or other.ended:
                continue
            lost = Lost("the peer who forwards between us is gone")
            if other.line is not None:
                self._over(other.line, lost, CloseCode.LOST)
            if not other.ended:
                self._give_up(other, lost, CloseCode.LOST)
        for path in [path for path, line in self._lines.items() if line.through is state]:
            del self._lines[path]

    def _log_stranger(self, message: str) -> None:
        """One line for the operator, unless strangers have caused too many."""
        if self._logs.take(self._now):
            _log.warning("%s", message)


def _window(through: _State | None) -> int:
    """Bytes that a peer may send beyond what was taken: fewer where somebody in the middle has to hold them."""
    return LINK_WINDOW if through is None else WINDOW


def _has_work(state: _State) -> bool:
    """Whether something waits to be sent to the peer."""
    if state.ended:
        return False
    if state.channel is None:
        return bool(state.waiting)
    return state.channel.queued > 0 or any(passage.frames for passage in state.relays.values())
