"""The one thread that owns sockets, clock and entropy, and drives the machines.  It runs no user code.

Here: which peer is dialed when (and again, after a connection broke), which session carries whose channel, which
circuit is built over whom and goes on to whom, timers, and the two queues between this thread and the one that
computes.  Not here: what may be said on a connection (``session``), what frames add up to and what is sent again
(``channel``), what a circuit does with its cells (``circuit``), how frames travel (``base`` and the transports).  The
story goes on above, in ``splitsec``: names of parties, tensors, training.

    computing thread  --commands, bell-->  I/O thread  --events-->  computing thread

Machines and ports belong to whoever has the *turn*: the I/O thread, as a rule.  Nothing in a turn blocks, and waking a
thread costs more than sealing and sending a small message.  So a computing thread takes the turn where it is free: to
send one small message on the spot (``send_now``), and, where messages come and go quickly, to do the I/O thread's work
while it has nothing to do but wait for it (``lead``).

``IOThread`` is the side that computing code holds; ``_Driver`` lives in the thread.  A *line* is one session on one
path, and a path is a connection of a port, or a circuit that begins or ends here.  A *link* is a peer with a connection
of its own; circuits go over links.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import queue
import selectors
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias, final

from splitsec.transports import base, circuit
from splitsec.transports.channel import Cell, CellSource, Channel, Message, Outgoing
from splitsec.transports.circuit import Built, Data, Extend, Leg, Memory, Origin, Relay, Sizes
from splitsec.transports.errors import (
    Damaged,
    LocalProtocolError,
    Lost,
    PeerMisbehaved,
    RefusalReason,
    Refused,
    Restarted,
    TransportsError,
)
from splitsec.transports.handshake import MAGIC, MAX_FRAME, Initiator, Responder, wants_computing
from splitsec.transports.limits import (
    BURST_FRAMES,
    BUSY_RETRY_SECONDS,
    CELL_COST,
    CELL_MAX,
    CIRCUIT_CELLS,
    CIRCUITS_SPARE,
    CLOSE_SECONDS,
    CROWD_MAX,
    CROWD_SECONDS,
    FRAME_MAX,
    HANDSHAKES_BURST,
    HANDSHAKES_PER_SECOND,
    INLINE_MAX,
    KEY_SIZE,
    LINK_WINDOW,
    LOGS_BURST,
    LOGS_PER_SECOND,
    MESSAGE_COST,
    OUTBOX_BYTES,
    REDIAL_MAX_SECONDS,
    REDIAL_SECONDS,
    REST_SECONDS,
    ROUTE_TRIES,
    RUN_SIZE,
    STRANGERS_MAX,
    WINDOW,
)
from splitsec.transports.meter import Meter
from splitsec.transports.noise import public_key_of
from splitsec.transports.session import Ended, Frame, Lend, Session, State
from splitsec.transports.session import Opened as SessionOpened
from splitsec.transports.wire import NO_RUN, ChunkHeader, CloseCode, Kind, Ready, Why

if TYPE_CHECKING:
    from typing_extensions import Buffer  # only a hint; Python 3.12 has it in collections.abc

__all__ = ["CloseCode", "Closed", "Event", "IOThread", "Interrupted", "Opened", "Peer", "Received", "Resumed"]

_log = logging.getLogger("splitsec.transports")
_FOREVER: Final = float("inf")
DOUBLED_SECONDS: Final = 60.0
"""Between two lines in the log about a second process with one peer's key."""


@final
@dataclass(frozen=True, slots=True)
class Peer:
    """Somebody to talk to.  ``key``: X25519 public key, 32 bytes.

    ``dial``: address to dial; None: the peer dials us.  Where we listen, a peer that we dial may dial us, too, even at
    the same moment: one session comes of it.  ``lanes``: lane number (0 to 65535) to the largest body accepted on it,
    bytes; a message on a lane that is not there closes the channel.  ``cells_only``: the link carries circuits and no
    messages.  No events are told of it, and it may come, go and be started anew as it likes.

    ``routes``: keys of the relays of each circuit that may lead there, in order from whoever builds it, the best first;
    such a peer has no link with us.  ``initiator``: we build the circuit and open the handshake.  ``cell``: bytes of
    every cell that carries a part of a message; None: by size (``limits.padme``).

    ``proves``: private key to prove in place of our own.  ``on_call``: reached only between ``open_peer`` and
    ``leave_peer``.  ``crowd``: many may prove this key, each with a channel of its own; one speaks at a time, and what
    is sent goes to whoever spoke last.
    """

    key: bytes
    dial: str | None = None
    lanes: Mapping[int, int] = field(default_factory=dict)
    cells_only: bool = False
    routes: tuple[tuple[bytes, ...], ...] = ()
    initiator: bool = False
    cell: int | None = None
    proves: bytes | None = field(default=None, repr=False)
    on_call: bool = False
    crowd: bool = False

    def __post_init__(self) -> None:
        if len(self.key) != KEY_SIZE:
            raise LocalProtocolError(f"a peer's key has {KEY_SIZE} bytes, not {len(self.key)}")
        if self.routes and (self.dial is not None or self.cells_only):
            raise LocalProtocolError("a peer is dialed or reached by a circuit, not both")
        if not all(self.routes):
            raise LocalProtocolError("a route has at least one relay")
        if (self.on_call and not self.initiator) or (self.crowd and self.initiator):
            raise LocalProtocolError("who is on call is reached by us, and a crowd reaches us")


@final
@dataclass(frozen=True, slots=True)
class Opened:
    """The channel with this peer is open: both sides proved their keys and hold the same contract."""

    peer: bytes


@final
@dataclass(frozen=True, slots=True)
class Interrupted:
    """The connection broke, or was damaged; nothing is lost, and what is sent waits.  ``seconds``: until the peer is
    given up, if it does not come back.
    """

    peer: bytes
    error: TransportsError
    seconds: float


@final
@dataclass(frozen=True, slots=True)
class Resumed:
    """The channel goes on where it stood."""

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
    went away for longer than it may, or stopped (``code`` says what it said).  Restarted: one side forgot what was
    exchanged.  PeerMisbehaved: it sent what it may not.
    """

    peer: bytes
    error: TransportsError | None
    code: CloseCode


Event: TypeAlias = Opened | Interrupted | Resumed | Received | Closed


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
class _ClosePeer:
    peer: bytes
    code: CloseCode
    reason: str


@final
@dataclass(frozen=True, slots=True)
class _OpenPeer:
    peer: bytes


@final
@dataclass(frozen=True, slots=True)
class _LeavePeer:
    peer: bytes


@final
@dataclass(frozen=True, slots=True)
class _Close:
    code: CloseCode
    linger: float


_Command: TypeAlias = _Send | _Taken | _ClosePeer | _OpenPeer | _LeavePeer | _Close
_Circuit: TypeAlias = Origin | Relay


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
        passages: Collection[tuple[bytes, bytes]] = (),
        cell_limit: int = CELL_MAX,
        cover: float | None = None,
        labels: Mapping[bytes, str] | None = None,
        connect_timeout: float = 60.0,
        lost_after: float = 20.0,
        gone_after: float = 60.0,
        post_quantum: bool = True,
        options: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """``private_key``: X25519, 32 bytes.  ``digest``: the contract's, 32 bytes.  ``listen``: address to listen at.

        ``passages``: from which link circuits may go on to which, by key; as often as there are such circuits.
        ``cell_limit``: bytes of the largest cell that all agree on. ``cover``: seconds; our ends of circuits then send
        one cell every so many, with something in it or not. ``labels``: what messages call a peer, by its key.
        ``connect_timeout``: seconds from ``start`` until a peer that is not there is given up. ``lost_after``: seconds
        of silence after which a connection is held for broken. ``gone_after``: seconds without a connection after
        which a peer is given up. ``post_quantum``: whether ML- KEM-768 stands beside X25519; all sides must say the
        same. ``options``: for a transport, by scheme.
        """
        self._peers = {peer.key: peer for peer in peers}
        if len(self._peers) != len(peers):
            raise LocalProtocolError("two peers with one key")
        for peer in peers:
            if not all(self._is_link(route[0 if peer.initiator else -1]) for route in peer.routes):
                raise LocalProtocolError("a route begins and ends with a peer with whom there is a link")
        self._commands: deque[_Command] = deque()
        self._events: queue.SimpleQueue[Event | _Failed] = queue.SimpleQueue()
        self._bell = base.Bell()
        self._asleep = True  # whoever has the turn waits for descriptors, or is about to, or nobody has it
        self._waits = False  # a computing thread waits in ``receive``
        self._room = threading.Condition()  # guards the next three
        self._outbox = dict.fromkeys(self._peers, 0)  # bytes accepted by ``send``, and not acknowledged yet
        self._ended: dict[bytes, Exception] = {}
        self._failed: BaseException | None = None
        self._untold = dict.fromkeys(self._peers, 0)  # bytes taken from ``receive`` and not told to the I/O thread yet
        self._bound: queue.SimpleQueue[str | BaseException] = queue.SimpleQueue()
        self._endpoint: str | None = None
        self._closed = False
        self._driver = _Driver(
            self,
            private_key,
            digest,
            self._peers,
            listen,
            _Circuits(Counter(passages), cell_limit, cover),
            labels or {},
            _Timeouts(connect_timeout, lost_after, gone_after),
            post_quantum,
            options or {},
        )
        self._thread = threading.Thread(target=self._driver.run, name="splitsec-io", daemon=True)

    def _is_link(self, key: bytes) -> bool:
        return key in self._peers and not self._peers[key].routes

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
        """Queue one message.  The buffers of ``body`` are sent as one, and are lent until the peer has it.

        Waits while more than OUTBOX_BYTES are under way to this peer, unless told not to: two sides that both wait here
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
        self._commands.append(_Send(peer, message))
        if not (size <= INLINE_MAX and self._asleep and self._driver.send_now(peer)):
            self._wake()

    def receive(self, timeout: float | None = None) -> Event | None:
        """The next event, in order of arrival; None after ``timeout`` seconds without one."""
        if self._closed and self._events.empty():
            raise LocalProtocolError("this I/O thread is closed")
        try:
            event = self._next(timeout)
        except queue.Empty:
            return None
        if isinstance(event, Received):
            untold = self._untold[event.peer] + len(event.header) + len(event.body) + MESSAGE_COST
            if untold >= WINDOW // 4:
                self._command(_Taken(event.peer, untold))
                untold = 0
            self._untold[event.peer] = untold
        elif isinstance(event, _Failed):
            self._events.put(event)  # for the next call
            raise LocalProtocolError(f"the I/O thread failed: {event.error!r}") from event.error
        return event

    def _next(self, timeout: float | None) -> Event | _Failed:
        """The next event; queue.Empty after ``timeout`` seconds.  We take the I/O thread's turn where it rests."""
        until = _FOREVER if timeout is None else time.monotonic() + timeout
        if self._events.empty() and self._driver.rests:
            self._driver.lead(until)
        self._waits = True
        try:
            return self._events.get(timeout=None if timeout is None else max(0.0, until - time.monotonic()))
        finally:
            self._waits = False

    def open_peer(self, peer: bytes) -> None:
        """Reach a peer that is on call: a new circuit, a new session, a new channel.  Opened follows, or Closed."""
        with self._room:
            if peer not in self._peers or not self._peers[peer].on_call:
                raise LocalProtocolError("only a peer on call can be opened")
            self._ended.pop(peer, None)
            self._outbox[peer] = self._untold[peer] = 0
        self._command(_OpenPeer(peer))

    def leave_peer(self, peer: bytes) -> None:
        """Say goodbye to a peer that is on call, once it has all that was sent.  Closed follows, without an error if
        all went well; then it may be opened again, and nothing tells it that it is the same who comes.
        """
        self._command(_LeavePeer(peer))

    def close_peer(self, peer: bytes, reason: int, why: str) -> None:
        """End the channel with one peer, at once; the others go on.  The peer is told the code ``reason`` and nothing
        else; ``why`` stands in our log and in the Closed that follows.
        """
        self._command(_ClosePeer(peer, CloseCode(reason), why))

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
        self._wake()

    def _wake(self) -> None:
        if self._asleep and not self._driver.stir():
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
        if self._waits:
            self._driver.delivered = True

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
class _Line:
    """One session on one path.  ``channel`` is what it carries, once we know whose it is."""

    __slots__ = (
        "block",
        "buffer",
        "channel",
        "circuit",
        "connection",
        "forget_at",
        "held",
        "known",
        "pending",
        "port",
        "session",
    )

    def __init__(
        self, session: Session, connection: Hashable, *, port: base.Port | None, circuit: _Circuit | None
    ) -> None:
        self.session = session
        self.channel: Channel | None = None
        self.connection = connection
        self.port = port  # of a connection of our own
        self.circuit = circuit  # or what it travels in
        self.known: _State | None = None  # whose line it is
        self.pending: Frame | None = None  # a frame that the port did not take yet
        self.held: int | None = None  # bytes that may wait below us, as far as the port was told
        self.buffer: bytearray | None = None  # in which it may lie
        self.block: bytearray | None = None  # that the last cell lies in
        self.forget_at = _FOREVER  # over, and kept only until its goodbye has left

    @property
    def machine(self) -> Session | Channel:
        return self.session if self.channel is None else self.channel


@final
@dataclass(frozen=True, slots=True)
class _Circuits:
    """What is agreed on about circuits; see ``IOThread``."""

    passages: Counter[tuple[bytes, bytes]]
    limit: int
    cover: float | None

    def most(self, link: bytes, peers: Collection[Peer]) -> int:
        """Circuits that may go over one link: twice what the contract has, since one is built anew before all know that
        the old one is over, and those that are being built.
        """
        through = sum(count for way, count in self.passages.items() if link in way)
        ending = sum(any(link in (route[0], route[-1]) for route in peer.routes) for peer in peers)
        crowds = any(peer.crowd for peer in peers)
        return 2 * (through + ending) + CIRCUITS_SPARE + (CROWD_MAX if crowds else 0)

    def sizes(self, peer: Peer | None = None) -> Sizes:
        """Of the cells of a circuit that leads to ``peer``, or passes here."""
        window = CIRCUIT_CELLS * self.limit
        if peer is None:
            return Sizes(None, self.limit, window)
        return Sizes(None if peer.cell is None else min(peer.cell, self.limit), self.limit, window, self.cover)


@final
@dataclass(frozen=True, slots=True)
class _Place:
    """Where a leg is: on whose link, of which circuit."""

    link: _State
    circuit: _Circuit
    source: CellSource
    way: tuple[bytes, bytes] | None = None
    """From whom to whom it goes on here."""


@final
@dataclass(frozen=True, slots=True)
class _Timeouts:
    """Seconds; see ``IOThread``."""

    connect: float
    lost: float
    gone: float


@final
class _State:
    """What the driver knows about one peer."""

    __slots__ = (
        "channel",
        "circuit",
        "creates",
        "doubled_at",
        "ended",
        "gone_by",
        "last_try",
        "leaving",
        "legs",
        "line",
        "opened",
        "opened_at",
        "owed",
        "pause",
        "peer",
        "port",
        "progress",
        "redial_at",
        "route",
        "tries",
    )

    def __init__(self, peer: Peer, channel: Channel, gone_by: float) -> None:
        self.peer = peer
        self.channel = channel
        self.line: _Line | None = None  # what carries the channel, or the one that we dial
        self.port: base.Port | None = None  # that we dial with
        self.opened = False  # at least once
        self.opened_at = 0.0  # the last time
        self.doubled_at = -_FOREVER  # we last said that there is a second process with its key
        self.gone_by = gone_by  # given up then, where no session is open
        self.progress = 0  # of the channel, when the last session broke
        self.redial_at = _FOREVER
        self.pause = REDIAL_SECONDS
        self.last_try = ""  # how it ended, for the error message
        self.ended = False
        self.owed = 0  # bytes that were given to the channel, and are not acknowledged
        self.leaving = False  # says goodbye when it has sent everything
        self.legs: dict[int, Leg] = {}  # of circuits over this link, by their numbers
        self.creates: _Bucket | None = None  # how many may still begin there
        self.circuit: Origin | None = None  # that is being built, or leads there
        self.route = 0  # which of the peer's is tried next
        self.tries = 0  # of circuits that came to nothing

    @property
    def is_open(self) -> bool:
        return not self.ended and self.channel.is_open


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
        circuits: _Circuits,
        labels: Mapping[bytes, str],
        timeouts: _Timeouts,
        post_quantum: bool,
        options: Mapping[str, Mapping[str, str]],
    ) -> None:
        Responder(
            private_key, digest, peers, post_quantum=post_quantum
        )  # raises here, in the caller's thread, what is wrong with the keys
        self._owner = owner
        self._private_key = private_key
        self._digest = digest
        self._listen = listen
        self._circuits = circuits
        self._labels = labels
        self._timeouts = timeouts
        self._post_quantum = post_quantum
        self._options = options
        self._own_key = public_key_of(private_key)
        self._peers = peers
        self._states: dict[bytes, _State] = {}  # by key; those of a crowd by key and run, beside one for all of it
        self._speakers: dict[bytes, _State] = {}  # who of a crowd spoke last
        self._untaken: dict[bytes, deque[tuple[_State, int]]] = {  # of crowds: whose messages nobody took yet, in order
            key: deque() for key, peer in peers.items() if peer.crowd
        }
        self._linked = frozenset(key for key, peer in peers.items() if not peer.routes)
        self._legs: dict[Leg, _Place] = {}
        self._passing: Counter[tuple[bytes, bytes]] = Counter()  # circuits, by from whom to whom
        self._most = {key: circuits.most(key, peers.values()) for key in self._linked}
        self._ends: dict[_Circuit, None] = {}  # circuits that begin or end here, in order
        self._memory = Memory()
        self._buffer = bytearray()  # where the next frame is sealed
        self._soon: dict[_Line, None] = {}  # links that were given cells
        self._stirred: dict[_Line, None] = {}  # lines that may have something to send, in order
        self._all_stirred = True  # something happened that is no message: any of them may
        self._transports: dict[str, base.Transport] = {}
        self._ports: dict[base.Port, _State | None] = {}  # None: the port that listens
        self._lines: dict[tuple[object, Hashable], _Line] = {}  # by path
        self._selector = selectors.DefaultSelector()
        self._now = 0.0
        self._wake_at = 0.0
        self._handshakes = _Bucket(HANDSHAKES_PER_SECOND, HANDSHAKES_BURST)
        self._refusals = _Bucket(HANDSHAKES_PER_SECOND, HANDSHAKES_BURST)  # of hellos that need no computing
        self._logs = _Bucket(LOGS_PER_SECOND, LOGS_BURST)
        self._turn = threading.Lock()  # held by whoever touches machines and ports
        self._gate = threading.Lock()  # the I/O thread rests here
        self._gate.acquire()
        self._leads = False  # a computing thread takes our turns
        self.rests = False
        """The I/O thread is in ``_rest``."""
        self.delivered = False
        """A computing thread that waited for an event has one."""
        self._fault: BaseException | None = None
        self._closing: _Close | None = None
        self._close_by = _FOREVER

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """The thread's whole life."""
        with self._turn:
            self._run()

    def send_now(self, peer: bytes) -> bool:
        """Called by a computing thread while the I/O thread sleeps: seal and send its small message on the spot, where
        nothing else waits.  That saves waking a thread, which costs more than the sending.  False: let it be woken.
        """
        if not self._turn.acquire(blocking=False):
            return False
        try:
            state = self._speakers.get(peer) or self._states.get(peer)
            line = None if state is None else state.line
            if line is None or line.channel is None or line.channel.queued:
                return False
            carrier = line if line.circuit is None else self._carrier(line.circuit)
            if carrier is None or carrier.port is None or carrier.pending is not None:
                return False
            if carrier.port.look_after_send or self._closing is not None:
                return False
            self._now = time.monotonic()
            self._obey()
            if line.circuit is not None:
                self._nudge(line.circuit)
            return not self._pump(carrier, carrier.port) and self._closing is None
        except Exception as error:
            self._fault = error  # raised where all faults are
            return False
        finally:
            self._turn.release()

    def _run(self) -> None:
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
        if self._listen is not None:
            port = self._transport(self._listen).listen(self._listen)
            self._add_port(port, None)
            endpoint = port.endpoint
        for key, peer in self._peers.items():
            state = self._states[key] = self._new_state(peer)
            state.ended = peer.on_call
            if peer.dial is not None:
                self._dial(state)
        return endpoint

    def _new_state(self, peer: Peer) -> _State:
        cell = None if not peer.routes else self._circuits.limit - CELL_COST
        if peer.routes and peer.cell is not None:
            cell = min(peer.cell, self._circuits.limit) - CELL_COST
        channel = Channel(
            peer.lanes,
            run=os.urandom(RUN_SIZE),
            window=LINK_WINDOW,
            cell=cell,
            paced=bool(peer.routes and self._circuits.cover),
            meter=None if peer.routes else Meter(),  # what goes through a circuit tells nobody how it is measured
        )
        gone_by = _FOREVER if peer.cells_only else self._now + self._timeouts.connect
        return _State(peer, channel, gone_by)

    def _loop(self) -> None:
        """The I/O thread's: steps, and sleep in between."""
        while True:
            busy = self._step()
            if self._closing is not None and self._leave(self._closing.code):
                return
            if busy:
                continue
            if self.delivered and self._closing is None:
                self._rest()
            else:
                self._sleep(_FOREVER)
            if self._fault is not None:
                raise self._fault

    def _step(self) -> bool:
        """Do all that can be done now.  True: there may be more."""
        self._owner._asleep = False
        self._now = time.monotonic()
        self._obey()
        busy = False
        for port in list(self._ports):
            if port in self._ports:  # what came in at another may have ended it
                busy |= self._drain(port)
        if self._now >= self._wake_at:
            self._tick()
        return self._pump_all() | busy

    def _sleep(self, until: float) -> None:
        """Give the turn away until something happens, something is due, or it is ``until``."""
        owner = self._owner
        owner._asleep = True  # before the last look at the commands: whoever adds one after it rings
        if owner._commands:
            return
        wait = min(self._wake_at, until) - time.monotonic()
        self._turn.release()
        try:
            ready = self._selector.select(None if wait == _FOREVER else max(0.0, wait))
        finally:
            self._turn.acquire()
        for key, _ in ready:
            if key.fileobj is owner._bell:
                owner._bell.quiet()

    def _rest(self) -> None:
        """The I/O thread's, after it has woken a computing thread: that one will soon wait again, and can do our work
        while it waits.  It has the turn for as long as it stays away for less than REST_SECONDS at a time.
        """
        self.delivered = False
        owner = self._owner
        owner._asleep = True
        if owner._commands:
            return
        self.rests = True
        while True:
            self._turn.release()
            self._gate.acquire(timeout=REST_SECONDS)
            self._turn.acquire()
            if not self._leads:  # two must not wait at the selector: one of them would miss what the other takes
                self.rests = False
                return

    def lead(self, until: float) -> None:
        """A computing thread's, while it waits for an event: the I/O thread's work, without waking it."""
        self._leads = True
        busy = False
        try:
            with self._turn:
                while self.rests and self._owner._events.empty() and self._closing is None and self._fault is None:
                    busy = self._step()
                    if not busy and self._owner._events.empty():
                        self._sleep(until)
                        if time.monotonic() >= until:
                            break
        except Exception as error:
            self._fault = error  # raised where all faults are
        finally:
            self._leads = False
            self._owner._asleep = True
            if busy or self._owner._commands or self._closing is not None or self._fault is not None:
                self.stir()

    def stir(self) -> bool:
        """Call the I/O thread from its rest.  False: it does not rest, or somebody leads, who hears the bell."""
        if not self.rests or self._leads:
            return False
        with contextlib.suppress(RuntimeError):
            self._gate.release()  # called twice is called once
        return True

    def _end(self, linger: float) -> None:
        for port in list(self._ports):
            self._remove_port(port, linger)
        for transport in self._transports.values():
            transport.close(linger)
        self._selector.close()

    def _obey(self) -> None:
        """Take what the computing side wants."""
        commands = self._owner._commands
        while commands:
            match commands.popleft():
                case _Send(peer, message):
                    state = self._speakers.get(peer) or self._states[peer]
                    if state.peer.crowd and peer not in self._speakers:
                        self._owner._left(peer, message.left)  # nobody is there to hear it
                    elif not state.ended:
                        state.owed += message.left
                        state.channel.send(message)
                        self._stir(state)
                case _Taken(peer, size):
                    self._taken(peer, size)
                case _OpenPeer(peer):
                    if self._states[peer].ended and self._closing is None:
                        state = self._states[peer] = self._new_state(self._states[peer].peer)
                        self._wake_at = 0.0
                        self._dial(state)
                case _LeavePeer(peer):
                    self._states[peer].leaving = True
                    self._leave_if_done(self._states[peer])
                case _ClosePeer(peer, code, reason):
                    self._close_peer(self._states[peer], code, reason)
                case _Close() as close:
                    self._closing = close
                    self._close_by = self._now + close.linger
                    self._wake_at = 0.0

    def _taken(self, peer: bytes, size: int) -> None:
        """The computing side took messages, the oldest first; of a crowd, each has a window of its own."""
        waiting = self._untaken.get(peer)
        if waiting is None:
            self._states[peer].channel.taken(size)
            self._stir(self._states[peer])
            return
        while size > 0 and waiting:
            state, taken = waiting.popleft()
            state.channel.taken(taken)
            self._stir(state)
            size -= taken

    def _stir(self, state: _State) -> None:
        """The state's channel may have something to send."""
        if state.line is not None:
            self._stirred[state.line] = None

    def _drain(self, port: base.Port) -> bool:
        """Take what came in at one port, up to a burst; True where there may be more."""
        for _ in range(BURST_FRAMES):
            match port.receive():
                case None:
                    self._wake_at = min(self._wake_at, port.deadline() or _FOREVER)
                    return False
                case base.Arrival(connection, frame):
                    line = self._lines.get((port, connection))
                    self._now = time.monotonic()  # for who measures: a burst takes milliseconds
                    if line is not None:
                        self._arrived(line, frame)
                        while self._soon:  # while it is still in the cache
                            carrier, _ = self._soon.popitem()
                            if carrier.port in self._ports:
                                self._pump(carrier, carrier.port)
                    elif self._ports[port] is None:
                        self._stranger(port, None, connection, frame, self._linked)
                case base.Connected(connection):
                    state = self._ports[port]
                    if state is not None:
                        self._open_line(state, connection, port=port)
                case base.Disconnected(connection):
                    line = self._lines.pop((port, connection), None)
                    if line is not None:
                        self._over(line, Lost("the connection broke"), CloseCode.LOST)
                    state = self._ports.get(port)
                    if state is not None:
                        self._remove_port(port, 0)
                        state.redial_at = min(state.redial_at, self._now + self._pause(state))
                        self._wake_at = 0.0
            if port not in self._ports:
                return True
        return True

    def _tick(self) -> None:
        """Do what is due, and find out when something is due next.  Whoever did more than to send or take messages said
        that this is due at 0: then all lines are looked at.
        """
        now = self._now
        for port in list(self._ports):
            port.tick(now)
        for line in list(self._lines.values()):
            due = line.machine.deadline()
            if due is not None and now >= due:
                self._stirred[line] = None
                for event in line.machine.tick(now):
                    assert isinstance(event, Ended)
                    self._over(line, event.error, event.code)
            if now >= line.forget_at:
                self._forget(line)
        for end in list(self._ends):
            self._happened(end, end.tick(now))
        for state in list(self._states.values()):
            if state.ended or state.is_open:
                continue
            if now >= state.gone_by:
                if state.opened:
                    why = f"the peer is gone: no connection that lasted for {self._timeouts.gone:g} s"
                else:
                    why = f"the peer did not come up within {self._timeouts.connect:g} s"
                self._give_up(state, Lost(why + self._what_is_wrong(state)), CloseCode.LOST)
            elif now >= state.redial_at:
                state.redial_at = _FOREVER
                self._dial(state)
        if not self._wake_at:
            self._all_stirred = True
        self._wake_at = min(self._due(), self._close_by)

    def _due(self) -> float:
        due = _FOREVER
        for port in self._ports:
            due = min(due, port.deadline() or _FOREVER)
        for line in self._lines.values():
            due = min(due, line.forget_at, line.machine.deadline() or _FOREVER)
        for end in self._ends:
            due = min(due, end.deadline())
        for state in self._states.values():
            if not state.ended and not state.is_open:
                due = min(due, state.redial_at, state.gone_by)
        return due

    def _pump_all(self) -> bool:
        """Hand over frames that can go now; True where there are more, or a port wants to be looked at again.

        A server has a line to each of hundreds of clients, of whom one or two are at work: only those are asked.
        """
        for end in self._ends:
            self._nudge(end)
        every = self._all_stirred or self._closing is not None
        lines = list(self._lines.values() if every else {**self._stirred, **self._soon})
        self._soon.clear()
        self._stirred.clear()
        self._all_stirred = False
        busy = False
        for line in lines:
            if line.port is not None and self._lines.get(self._path(line)) is line:
                busy |= self._pump(line, line.port)
        return busy or bool(self._soon)

    def _pump(self, line: _Line, port: base.Port) -> bool:
        """Frames of one line, until there are no more, the port takes no more, or there is something else to do.

        True where there may be more to do without waiting.
        """
        commands = self._owner._commands
        for count in range(BURST_FRAMES):
            frame = line.pending or self._next_frame(line, port)
            if frame is None:
                if line.forget_at != _FOREVER and line.session.is_over:
                    self._forget(line)
                return count > 0 and port.look_after_send
            if not port.send(line.connection, frame):
                if line.pending is None:
                    line.pending = frame
                    line.buffer, self._buffer = self._buffer, bytearray()
                self._stirred[line] = None
                return port.look_after_send
            if line.buffer is not None:
                self._buffer, line.buffer = max(self._buffer, line.buffer, key=len), None
            line.pending = None
            if commands:  # a small message is not to wait for a large one
                break
        self._stirred[line] = None
        return True

    def _lend(self, size: int) -> memoryview:
        """Memory for one frame, of whichever line: the same each time, until a port leaves a frame in it."""
        if len(self._buffer) < size:
            self._buffer = bytearray(size if size < FRAME_MAX // 8 else FRAME_MAX)
        return memoryview(self._buffer)[:size]

    def _next_frame(self, line: _Line, port: base.Port) -> Frame | None:
        """What goes next on a line of a port."""
        channel = line.channel
        if channel is None:
            return line.session.next_frame(self._lend)
        frame = channel.next_frame(self._lend, time.monotonic())
        meter = channel.meter
        if meter is not None and (unsent := meter.unsent) is not None and unsent != line.held:
            line.held = unsent
            port.hold(line.connection, unsent)
        return frame

    def _leave(self, code: CloseCode) -> bool:
        """One step towards the end: what is queued, goodbyes of channels in circuits, goodbyes of the others.  True:
        all is said.
        """
        owed = {name for name, state in self._states.items() if not state.ended and self._is_owed(state, code)}
        by_relays = any(self._states[name].peer.routes for name in owed)  # then their links may come back
        for name, state in self._states.items():
            if not (state.is_open or name in owed or (by_relays and state.peer.cells_only)):
                state.ended = True
        here = [state for state in self._states.values() if not state.ended]
        if self._now >= self._close_by:
            for state in here:
                state.channel.close(code)
            self._pump_all()
            return True
        if any(leg.waiting for state in here if state.is_open for leg in state.legs.values()):
            return False
        for state in [state for state in here if state.peer.routes] or here:
            if state.channel.leaving is None:
                state.channel.leave(code)
                self._wake_at = 0.0
                self._pump_all()
        return not here and not any(line.forget_at != _FOREVER for line in self._lines.values())

    def _is_owed(self, state: _State, code: CloseCode) -> bool:
        """Whether a peer that is not connected now is worth waiting for: something is due to it, if only a goodbye."""
        if code is not CloseCode.NORMAL or state.peer.cells_only:
            return False
        if state.peer.crowd:
            return bool(state.channel.queued or state.channel.unacknowledged)
        return state.opened or state.channel.queued > 0

    # --- paths --------------------------------------------------------------------------------------------------------

    def _transport(self, address: str) -> base.Transport:
        scheme, kind = base.find_transport(address)
        if scheme not in self._transports:
            self._transports[scheme] = kind(scheme, self._options.get(scheme, {}))
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
        if state.port is not None or state.line is not None or state.circuit is not None:
            return
        if peer.dial is not None:
            state.port = self._transport(peer.dial).dial(peer.dial)
            self._add_port(state.port, state)
            self._wake_at = 0.0
        elif peer.initiator:
            self._build(state)

    def _open_line(
        self, state: _State, connection: Hashable, *, port: base.Port | None = None, circuit: Origin | None = None
    ) -> None:
        """Begin a handshake with a peer whom we dial."""
        private_key = state.peer.proves or self._private_key
        handshake = Initiator(private_key, state.peer.key, self._digest, post_quantum=self._post_quantum)
        session = Session(handshake, now=self._now, lost_after=self._timeouts.lost, greet=self._greet_as_dialer)
        line = self._add_line(session, connection, port, circuit)
        line.known = state
        state.line = line

    def _greet_as_dialer(self, peer: bytes, theirs: Ready | None) -> Ready | CloseCode:
        """The peer took our hello."""
        return self._states[peer].channel.ready()

    def _greet_as_listener(self, peer: bytes, theirs: Ready | None) -> Ready | CloseCode:
        """The peer dialled us and proved its key.  From here on its session counts, and no older one."""
        assert theirs is not None
        state = self._state_of(peer, theirs)
        if state is None:
            return CloseCode.RESTARTED
        line = state.line
        if state.ended:
            return CloseCode.RESTARTED if state.opened else CloseCode.ERROR
        if line is not None and line.session.state is State.CONFIRMING and self._own_key < peer:
            return CloseCode.CROSSED  # ours, of which the peer knows already
        another = state.is_open and theirs.run != state.channel.peer_run and not state.peer.cells_only
        if another and self._now >= state.doubled_at + DOUBLED_SECONDS:
            state.doubled_at = self._now
            _log.warning(
                "turned away: somebody who has the key of %s, with which we are connected; "
                "it was started twice, or its key was stolen",
                self._called(peer),
            )
        if another or not state.channel.fits(theirs):
            if state.opened and not state.is_open and not state.peer.cells_only:
                restarted = Restarted(
                    "the peer was started anew, and has lost what was exchanged with its earlier start"
                )
                self._give_up(state, restarted, CloseCode.RESTARTED)
            return CloseCode.RESTARTED
        if line is not None:
            self._drop(line)
        if state.port is not None:
            self._remove_port(state.port, 0)
        state.channel.detach()
        return state.channel.ready()

    def _state_of(self, peer: bytes, theirs: Ready) -> _State | None:
        """Who of the peers of this key it is; one of a crowd is known by its run.  None where there are too many, or it
        goes on with what is over.
        """
        state = self._states[peer]
        if not state.peer.crowd:
            return state
        one = self._states.get(peer + theirs.run)
        if one is None:
            if state.ended or self._closing is not None or theirs.known != NO_RUN:
                return None
            if sum(other.peer is state.peer for other in self._states.values()) > CROWD_MAX:
                return None
            one = self._states[peer + theirs.run] = self._new_state(state.peer)
            one.gone_by = _FOREVER
        return one

    def _drop(self, line: _Line) -> None:
        """A line that another one has replaced: nothing more is said or heard on it."""
        if line.known is not None:
            self._lose_link(line.known)
        line.known = None
        line.channel = None
        self._forget(line)

    def _add_line(
        self, session: Session, connection: Hashable, port: base.Port | None, circuit: _Circuit | None
    ) -> _Line:
        line = _Line(session, connection, port=port, circuit=circuit)
        self._lines[self._path(line)] = line
        if circuit is not None:
            circuit.pull = lambda lend: self._pulled(line, lend)
            self._ends[circuit] = None
        self._wake_at = 0.0
        return line

    @staticmethod
    def _path(line: _Line) -> tuple[object, Hashable]:
        return line.circuit or line.port, line.connection

    def _forget(self, line: _Line) -> None:
        self._lines.pop(self._path(line), None)
        if line.circuit is not None:
            self._ends.pop(line.circuit, None)
            self._happened(line.circuit, line.circuit.close())
        if line.port is None or line.port not in self._ports:
            return
        if self._ports[line.port] is None:
            line.port.hang_up(line.connection)
        else:
            self._remove_port(line.port, BUSY_RETRY_SECONDS)

    # --- frames -------------------------------------------------------------------------------------------------------

    def _stranger(
        self,
        port: base.Port | None,
        circuit: Relay | None,
        connection: Hashable,
        frame: memoryview,
        known: Collection[bytes],
    ) -> None:
        """The first frame of somebody whom we do not know yet.  Rubbish costs no cryptography and leaves no trace."""
        if len(frame) > MAX_FRAME or bytes(frame[: len(MAGIC)]) != MAGIC:
            self._log_stranger("ignored a frame that is no hello")
            if port is not None:
                port.hang_up(connection)
            elif circuit is not None:
                self._happened(circuit, circuit.close(Why.MISBEHAVED))
            return
        bucket = self._handshakes if wants_computing(frame, self._digest) else self._refusals
        if not bucket.take(self._now):
            self._log_stranger("ignored a hello: too many of late")
            return
        strangers = [line for line in self._lines.values() if line.known is None and line.forget_at == _FOREVER]
        if len(strangers) >= STRANGERS_MAX:  # all of them replays, or the oldest would be done by now
            strangers[0].session.close(CloseCode.LOST)
            self._over(strangers[0], Lost("another handshake took its place"), CloseCode.LOST)
        session = Session(
            Responder(self._private_key, self._digest, known, post_quantum=self._post_quantum),
            now=self._now,
            lost_after=self._timeouts.lost,
            greet=self._greet_as_listener,
        )
        self._arrived(self._add_line(session, connection, port, circuit), frame)

    def _arrived(self, line: _Line, frame: memoryview) -> None:
        channel = line.channel
        self._stirred[line] = None
        try:
            events = line.machine.receive(frame, self._now)
        except (PeerMisbehaved, Restarted) as fault:
            code = CloseCode.RESTARTED if isinstance(fault, Restarted) else CloseCode.MISBEHAVED
            line.session.close(code)
            self._over(line, fault, code)
            return
        except LocalProtocolError:
            return  # it failed before, and only its goodbye has to leave
        if channel is not None:
            if channel.ack_at < self._wake_at:
                self._wake_at = channel.ack_at
            if channel.released and line.known is not None:
                self._released(line.known)
        for event in events:
            match event:
                case Message(lane, header, body) if line.known is not None:
                    if line.known.peer.crowd:
                        self._speakers[line.known.peer.key] = line.known
                        size = len(header) + len(body) + MESSAGE_COST
                        self._untaken[line.known.peer.key].append((line.known, size))
                    self._owner._tell(Received(line.known.peer.key, lane, header, body))
                case Cell() as cell:
                    self._cell(line, cell)
                case SessionOpened(peer, ready):
                    self._opened(line, peer, ready)
                case Ended(error, reason):
                    self._over(line, error, reason)

    def _released(self, state: _State) -> None:
        """The peer has acknowledged something."""
        self._owner._left(state.peer.key, state.channel.released)
        state.owed -= state.channel.released
        state.channel.released = 0
        self._leave_if_done(state)

    def _leave_if_done(self, state: _State) -> None:
        """Say goodbye to a peer that was on call, if it has everything."""
        if not state.leaving or state.ended or state.owed:
            return
        if state.is_open:
            state.channel.leave(CloseCode.NORMAL)
            self._wake_at = 0.0
        elif not state.opened:
            self._give_up(state, None, CloseCode.NORMAL)

    def _opened(self, line: _Line, peer: bytes, ready: Ready) -> None:
        """Both sides have said READY."""
        state = self._state_of(peer, ready)
        if state is None:
            return
        channel = state.channel
        line.known = state
        line.channel = channel
        state.line = line
        channel.carry(line.session)
        try:
            channel.opened(ready)
        except (PeerMisbehaved, Restarted) as error:
            code = CloseCode.RESTARTED if isinstance(error, Restarted) else CloseCode.MISBEHAVED
            line.session.close(code)
            self._over(line, error, code)
            return
        if line.port is not None:
            line.port.trust(line.connection)
        if isinstance(line.circuit, Relay):
            line.circuit.become_end(self._circuits.sizes(state.peer), self._now)
        if channel.released:
            self._released(state)
        state.opened_at = self._now
        if not state.opened:
            state.gone_by = _FOREVER
        if state.peer.crowd:
            self._states[peer].gone_by = _FOREVER
            self._states[peer].opened = True
        state.pause = REDIAL_SECONDS
        state.redial_at = _FOREVER
        self._wake_at = 0.0
        if not state.peer.cells_only:
            self._owner._tell(Resumed(peer) if state.opened else Opened(peer))
        else:
            _log.info("connected with %s, over which circuits go", self._called(peer))
        if state.peer.initiator and len(state.peer.routes) > 1 and state.opened:
            route = state.peer.routes[state.route % len(state.peer.routes)]
            _log.info("%s is reached through %s now", self._called(peer), ", ".join(map(self._called, route)))
        state.opened = True
        self._leave_if_done(state)
        if line.port is not None:
            for other in list(self._states.values()):
                if other.peer.initiator and not other.ended:
                    self._dial(other)

    # --- circuits -----------------------------------------------------------------------------------------------------

    def _build(self, state: _State) -> None:
        """Begin a circuit to a peer, by the first of its routes, from the one that is due on, whose first relay is
        there.  If none is, the next link that opens calls again.
        """
        routes = state.peer.routes
        for turn in range(len(routes)):
            number = (state.route + turn) % len(routes)
            link = self._states[routes[number][0]]
            if link.is_open:
                state.route = number
                state.circuit = Origin(
                    self._number(link),
                    (*routes[number], state.peer.key),
                    digest=self._digest,
                    sizes=self._circuits.sizes(state.peer),
                    memory=self._memory,
                    now=self._now,
                    post_quantum=self._post_quantum,
                )
                self._ends[state.circuit] = None
                self._attach(link, state.circuit, state.circuit.leg)
                self._nudge(state.circuit)
                self._wake_at = 0.0
                return

    def _what_is_wrong(self, state: _State) -> str:
        """Why a peer was not reached, as far as we know."""
        near = dict.fromkeys(route[0 if state.peer.initiator else -1] for route in state.peer.routes)
        away = [self._states[key] for key in near if not self._states[key].is_open]
        if not away:
            return f"; the last try ended so: {state.last_try}" if state.last_try else ""
        return "; " + ", and ".join(
            f"the relay {self._called(link.peer.key)} is not connected with us"
            + (f" ({link.last_try})" if link.last_try else "")
            for link in away
        )

    def _called(self, key: bytes) -> str:
        """What people call a peer."""
        return self._labels.get(key) or "x25519:" + base64.b64encode(key).decode()

    def _number(self, link: _State) -> int:
        """A number for another circuit on a link: random, but odd where our key is the larger one."""
        while True:
            number = int.from_bytes(os.urandom(4), "big") & ~1 | (self._own_key > link.peer.key)
            if number not in link.legs:
                return number

    def _attach(self, link: _State, circuit: _Circuit, leg: Leg, way: tuple[bytes, bytes] | None = None) -> None:
        link.legs[leg.number] = leg
        self._legs[leg] = _Place(link, circuit, CellSource(lambda lend: self._next_cell(leg, lend)), way)
        if way is not None:
            self._passing[way] += 1

    def _detach(self, leg: Leg) -> None:
        place = self._legs.pop(leg, None)
        if place is not None and place.way is not None:
            self._passing[place.way] -= 1
        if place is not None and place.link.legs.get(leg.number) is leg:
            del place.link.legs[leg.number]

    def _carrier(self, circuit: _Circuit) -> _Line | None:
        """The line of the link on which a circuit that begins or ends here leaves."""
        place = self._legs.get(circuit.legs[0])
        return None if place is None else place.link.line

    def _nudge(self, circuit: _Circuit) -> None:
        """What a circuit has to send gets its turn on the links that it goes over."""
        for leg in circuit.legs:
            if leg.idle and circuit.pull is None and isinstance(circuit, Relay):
                continue
            place = self._legs.get(leg)
            if place is not None and place.link.is_open:
                place.link.channel.carry_cells(place.source)
                if place.link.line is not None:
                    self._soon[place.link.line] = None

    def _next_cell(self, leg: Leg, lend: Lend) -> tuple[ChunkHeader, memoryview, bytes] | None:
        place = self._legs.get(leg)
        if place is None:
            return None
        line = place.link.line
        assert line is not None
        if line.block is not None:  # the frame before this one has left
            self._memory.give(line.block)
            line.block = None
        cell = place.circuit.next_cell(leg, lend)
        if cell is None and leg.over:  # it ended just now
            cell = place.circuit.next_cell(leg, lend)
        line.block, leg.block = leg.block, None
        if leg.done:
            self._detach(leg)
        elif len(place.circuit.legs) > 1:  # where it came from there may be room again
            for other in place.circuit.legs:
                beyond = self._legs.get(other)
                if other is not leg and other.owes_credit and beyond is not None and beyond.link.is_open:
                    beyond.link.channel.carry_cells(beyond.source)
                    if beyond.link.line is not None:
                        self._soon[beyond.link.line] = None
        return cell

    def _pulled(self, line: _Line, lend: Lend) -> tuple[Frame, bool] | None:
        """The next frame of a session that travels in a circuit."""
        frame = line.machine.next_frame(lend)
        if frame is None:
            if line.forget_at != _FOREVER and line.session.is_over:
                self._forget(line)
            return None
        return frame, line.channel is not None and line.channel.holds_chunk

    def _cell(self, line: _Line, cell: Cell) -> None:
        link = line.known
        if link is None or link.peer.routes:
            return
        number = cell.header.number
        if cell.header.kind is Kind.CREATE:
            if len(link.legs) >= 2 * self._most[link.peer.key]:  # it does not even read that we have no room
                self._blame(line, PeerMisbehaved("more circuits than the contract has"))
                return
            if number in link.legs or (number & 1) != (link.peer.key > self._own_key):
                self._blame(line, PeerMisbehaved("a circuit by a number that is taken, or not the peer's to give"))
                return
            leg = Leg(number, self._circuits.sizes())
            relay = Relay(
                leg,
                self._private_key,
                digest=self._digest,
                memory=self._memory,
                post_quantum=self._post_quantum,
            )
            self._attach(link, relay, leg)
            if link.creates is None:
                link.creates = _Bucket(HANDSHAKES_PER_SECOND, max(HANDSHAKES_BURST, self._most[link.peer.key]))
            full = len(link.legs) > self._most[link.peer.key] or not link.creates.take(self._now)
            self._happened(relay, relay.close(Why.BUSY) if full else relay.create(cell))
        elif (found := link.legs.get(number)) is not None:  # else it is over, and the peer will soon know
            circuit = self._legs[found].circuit
            self._happened(circuit, circuit.receive(found, cell, self._now))

    def _happened(self, end: _Circuit, events: Sequence[circuit.Event]) -> None:
        """A circuit did something."""
        for event in events:
            match event:
                case Data(frame):
                    self._inside(end, frame)
                case Extend(key, message):
                    assert isinstance(end, Relay)
                    self._extend(end, key, message)
                case Built():
                    state = self._leads_to(end)
                    if state is not None and isinstance(end, Origin):
                        self._open_line(state, None, circuit=end)
                case circuit.Ended(why, hop):
                    self._circuit_over(end, why, hop)
        self._nudge(end)
        for leg in end.legs:
            if leg.done:
                self._detach(leg)

    def _inside(self, end: _Circuit, frame: memoryview) -> None:
        """A frame that came in a circuit, for a session here."""
        line = self._lines.get((end, None))
        if line is not None:
            self._arrived(line, frame)
        elif isinstance(end, Relay) and (place := self._legs.get(end.back)) is not None:
            neighbour = place.link.peer.key
            behind = {
                peer.key
                for peer in self._peers.values()
                if not peer.initiator and any(route[-1] == neighbour for route in peer.routes)
            }
            if behind:
                self._stranger(None, end, None, frame, behind)
            else:
                self._happened(end, end.close(Why.UNREACHABLE))

    def _extend(self, relay: Relay, key: bytes, message: bytes) -> None:
        """Somebody's circuit is to go on to a neighbour of ours, if the contract has such a route."""
        place = self._legs.get(relay.back)
        link = self._states.get(key)
        way = (b"" if place is None else place.link.peer.key, key)
        allowed = self._circuits.passages[way]
        if not allowed or link is None or not link.is_open:
            relay.refuse(Why.UNREACHABLE)
        elif self._passing[way] >= 2 * allowed or len(link.legs) >= self._most[key]:
            relay.refuse(Why.BUSY)
        else:
            leg = Leg(self._number(link), self._circuits.sizes())
            self._attach(link, relay, leg, way)
            relay.extend(leg, message)

    def _leads_to(self, end: _Circuit) -> _State | None:
        return next((state for state in self._states.values() if state.circuit is end), None)

    def _circuit_over(self, end: _Circuit, why: Why, hop: int | None) -> None:
        self._ends.pop(end, None)
        self._wake_at = 0.0
        line = self._lines.pop((end, None), None)
        state = self._leads_to(end)
        error = Lost(self._how_it_ended(state, why, hop))
        if state is not None:
            state.circuit = None
        if line is not None:
            self._over(line, error, CloseCode.LOST)
        elif state is not None and not state.ended:
            state.tries += 1
            if state.tries % ROUTE_TRIES == 0:
                state.route += 1
            state.last_try = str(error)
            state.redial_at = self._now + self._pause(state)
            state.pause = min(2 * state.pause, REDIAL_MAX_SECONDS)

    def _how_it_ended(self, state: _State | None, why: Why, hop: int | None) -> str:
        """Of a circuit, in names of who is on it."""
        if state is None or not state.peer.initiator:
            return f"the circuit ended ({why.name.lower()})"
        routes = state.peer.routes
        hops = [self._called(key) for key in (*routes[state.route % len(routes)], state.peer.key)]
        if hop is None or hop + 1 >= len(hops):
            return f"the circuit through {', '.join(hops[:-1])} ended ({why.name.lower()})"
        match why:
            case Why.UNREACHABLE:
                return f"the relay {hops[hop]} has no connection with {hops[hop + 1]}"
            case Why.LOST:
                return f"the relay {hops[hop]} lost its connection with {hops[hop + 1]}"
            case Why.BUSY:
                return f"the relay {hops[hop]} carries as many circuits as it may"
            case _:
                return f"the circuit ended at the relay {hops[hop]} ({why.name.lower()})"

    def _lose_link(self, link: _State) -> None:
        """A connection is no more, and no circuit over it."""
        if link.peer.routes:
            return
        for leg in list(link.legs.values()):
            place = self._legs.get(leg)
            self._detach(leg)
            if place is not None:
                self._happened(place.circuit, place.circuit.lose(leg))
        link.legs.clear()

    def _blame(self, line: _Line, fault: PeerMisbehaved) -> None:
        line.session.close(CloseCode.MISBEHAVED)
        self._over(line, fault, CloseCode.MISBEHAVED)

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _over(self, line: _Line, error: TransportsError | None, code: CloseCode) -> None:
        """A session has ended.  The channel goes on with the next, unless the peer or we have said that it is over."""
        if line.forget_at != _FOREVER:
            return
        state, carried = line.known, line.channel is not None
        line.known = None
        line.channel = None
        line.forget_at = self._now + BUSY_RETRY_SECONDS
        self._wake_at = 0.0
        if state is None or state.line is not line:
            if isinstance(error, Refused | PeerMisbehaved):
                self._log_stranger(f"turned somebody down: {error}")
            return
        state.line = None
        state.channel.detach()
        self._lose_link(state)
        if state.peer.cells_only:
            error = error or Lost("it has said goodbye")
            if self._logs.take(self._now):
                level = logging.WARNING if isinstance(error, Refused) else logging.INFO
                _log.log(
                    level, "no connection with %s, over which circuits go: %s", self._called(state.peer.key), error
                )
        elif state.leaving and not state.owed:  # it has all that we said, if perhaps not our goodbye
            self._give_up(state, None, CloseCode.NORMAL)
            return
        elif self._is_final(line, error, code, state.opened, carried):
            self._give_up(state, error, code)
            return
        assert error is not None
        if line.circuit is not None:
            state.circuit = None
            state.route += 1
            self._forget(line)  # nobody waits at its other end
        if line.port is not None and self._ports.get(line.port) is state:
            self._lines.pop(self._path(line), None)  # its end is goodbye enough
            self._remove_port(line.port, 0)
        state.last_try = str(error)
        state.redial_at = self._now + self._pause(state)
        state.pause = min(2 * state.pause, REDIAL_MAX_SECONDS)
        if carried:
            self._interrupted(state, error)

    def _is_final(
        self, line: _Line, error: TransportsError | None, code: CloseCode, opened: bool, carried: bool
    ) -> bool:
        """Whether the channel ends with this session."""
        if line.session.said_goodbye:
            return code not in (CloseCode.LOST, CloseCode.CROSSED, CloseCode.DAMAGED)
        match error:
            case None | Restarted():
                return True
            case Refused(reason=reason):  # not authenticated: believed only where there is nothing to lose yet
                return not opened and reason is not RefusalReason.BUSY
            case Damaged():
                return False
            case PeerMisbehaved():
                return carried
            case _:
                return False

    def _pause(self, state: _State) -> float:
        """Seconds before the next try.  Where both sides dial, one waits longer, so that they seldom cross."""
        other_dials = self._listen is not None and self._own_key > state.peer.key and not state.peer.routes
        return state.pause * (0.75 + os.urandom(1)[0] / 512) + (BUSY_RETRY_SECONDS if other_dials else 0.0)

    def _interrupted(self, state: _State, error: TransportsError) -> None:
        """An open session broke.  The time until the peer is given up begins anew only where the channel got on, or had
        no need to.
        """
        if state.peer.cells_only:
            return  # it may come and go; a circuit that ends says so
        gone = self._timeouts.gone
        waits = state.channel.queued or state.channel.unacknowledged
        got_on = state.channel.progress > state.progress or self._now - state.opened_at > gone
        if got_on or not waits or state.gone_by == _FOREVER:
            state.gone_by = self._now + gone
        state.progress = state.channel.progress
        if self._logs.take(self._now):
            _log.info(
                "the connection with %s broke: %s; trying again for %g s", self._called(state.peer.key), error, gone
            )
        seconds = max(0.0, state.gone_by - self._now)
        if state.peer.crowd:  # another of it may come
            seconds += max(self._timeouts.connect, gone)
        if self._closing is None:
            self._owner._tell(Interrupted(state.peer.key, error, seconds))

    def _close_peer(self, state: _State, code: CloseCode, why: str) -> None:
        """The computing side has seen enough of this peer."""
        if state.ended:
            return
        for one in [one for one in self._states.values() if state.peer.crowd and one.peer is state.peer]:
            if one is not state and one.line is not None:
                one.line.session.close(code)
                one.line.known = None
                one.line.channel = None
                one.line.forget_at = self._now + BUSY_RETRY_SECONDS
                one.line = None
        line = state.line
        if line is not None:
            line.session.close(code)
            line.known = None
            line.channel = None
            line.forget_at = self._now + BUSY_RETRY_SECONDS
            state.line = None
        state.channel.detach()
        self._give_up(state, PeerMisbehaved(why), code)

    def _give_up(self, state: _State, error: TransportsError | None, code: CloseCode) -> None:
        """The peer's channel is over, or will never be."""
        key = state.peer.key
        if isinstance(error, PeerMisbehaved):
            _log.warning("closed the channel with %s: %s", self._called(key), error)
        if state.line is not None:
            self._drop(state.line)
            state.line = None
        gone, state.circuit = state.circuit, None
        if gone is not None and (gone, None) not in self._lines:  # else once the goodbye in it has left
            self._happened(gone, gone.close())
        self._lose_link(state)
        state.ended = True
        self._wake_at = 0.0
        self._owner._left(key, state.owed)
        state.owed = 0
        if state.port is not None and not any(line.port is state.port for line in self._lines.values()):
            self._remove_port(state.port, 0)
        if state.peer.crowd:
            self._part(state, error, code)
        elif self._closing is None:
            self._owner._tell(Closed(key, error, code))

    def _part(self, state: _State, error: TransportsError | None, code: CloseCode) -> None:
        """One of a crowd is gone, or all of it."""
        key = state.peer.key
        everybody = self._states[key]
        alone = state is not everybody
        for name, one in list(self._states.items()):
            if one.peer is state.peer and one is not everybody and (one is state or not alone or one.ended):
                del self._states[name]
                one.ended = True
        if self._speakers.get(key) is state or not alone:
            self._speakers.pop(key, None)
        if isinstance(error, PeerMisbehaved) or not alone:
            everybody.ended = True
            if self._closing is None:
                self._owner._tell(Closed(key, error, code))
        elif not any(one.is_open for one in self._states.values() if one.peer is state.peer):
            patience = max(self._timeouts.connect, self._timeouts.gone)
            if error is None:  # the next one may have weights to wait for
                patience = max(patience, CROWD_SECONDS)
            everybody.gone_by = self._now + patience

    def _log_stranger(self, message: str) -> None:
        """One line for the operator, unless strangers have caused too many."""
        if self._logs.take(self._now):
            _log.warning("%s", message)
