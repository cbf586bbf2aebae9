"""The one thread that owns sockets, clock and entropy, and drives the machines.  It runs no user code.

Here: which peer is dialed when (and again, after a connection broke), which session carries whose channel, what is
forwarded, timers, and the two queues between this thread and the one that computes.  Not here: what may be said on a
connection (``session``), what frames add up to and what is sent again (``channel``), how they travel (``base`` and the
transports).  The story goes on above, in ``splitsec``: names of parties, tensors, training.

    computing thread  --commands, bell-->  I/O thread  --events-->  computing thread

Machines and ports belong to whoever has the *turn*: the I/O thread, as a rule.  Nothing in a turn blocks, and waking a
thread costs more than sealing and sending a small message.  So a computing thread takes the turn where it is free: to
send one small message on the spot (``send_now``), and, where messages come and go quickly, to do the I/O thread's work
while it has nothing to do but wait for it (``lead``).

``IOThread`` is the side that computing code holds; ``_Driver`` lives in the thread.  A *line* is one session on one
path, and a path is a connection of a port, or a pair of forwarded directions through the channel of a peer in the
middle.
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
from collections import deque
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias, final

from splitsec.transports import base
from splitsec.transports.channel import Channel, Forwarded, Message, Outgoing, Relay
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
    CLOSE_SECONDS,
    FORWARD_PREFIX,
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
    RELAY_BYTES,
    REST_SECONDS,
    RUN_SIZE,
    STRANGERS_MAX,
    WINDOW,
)
from splitsec.transports.noise import public_key_of
from splitsec.transports.session import Ended, Frame, Session, State
from splitsec.transports.session import Opened as SessionOpened
from splitsec.transports.wire import CloseCode, FrameType, Ready, pack_forward_prefix

if TYPE_CHECKING:
    from typing_extensions import Buffer  # only a hint; Python 3.12 has it in collections.abc

__all__ = ["CloseCode", "Closed", "Event", "IOThread", "Interrupted", "Opened", "Peer", "Received", "Resumed"]

_log = logging.getLogger("splitsec.transports")
_FOREVER: Final = float("inf")


@final
@dataclass(frozen=True, slots=True)
class Peer:
    """Somebody to talk to.  ``key``: X25519 public key, 32 bytes.

    ``dial``: address to dial; None: the peer dials us.  Where we listen, a peer that we dial may dial us, too, even at
    the same moment: one session comes of it.  ``via``: key of the peer who forwards between us.
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
class _Close:
    code: CloseCode
    linger: float


_Command: TypeAlias = _Send | _Taken | _ClosePeer | _Close


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
        gone_after: float = 60.0,
        post_quantum: bool = True,
        options: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """``private_key``: X25519, 32 bytes.  ``digest``: the contract's, 32 bytes.  ``listen``: address to listen at.

        ``forwards``: pairs of peers whose frames we pass on; we cannot read them.  ``connect_timeout``: seconds from
        ``start`` until a peer that is not there is given up.  ``lost_after``: seconds of silence after which a
        connection is held for broken.  ``gone_after``: seconds without a connection after which a peer is given up.
        ``post_quantum``: whether ML-KEM-768 stands beside X25519; all sides must say the same.  ``options``: for a
        transport, by scheme.
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
            frozenset(forwards),
            _Timeouts(connect_timeout, lost_after, gone_after),
            post_quantum,
            options or {},
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
    """One session on one path.  ``channel`` is what it carries, once we know whose it is."""

    __slots__ = (
        "buffer",
        "channel",
        "connection",
        "forget_at",
        "known",
        "pending",
        "port",
        "relay",
        "session",
        "through",
    )

    def __init__(
        self, session: Session, connection: Hashable, *, port: base.Port | None, through: _State | None
    ) -> None:
        self.session = session
        self.channel: Channel | None = None
        self.connection = connection
        self.port = port  # of a connection of our own
        self.through = through  # the peer in the middle, if there is one
        self.known: _State | None = None  # whose line it is
        self.pending: Frame | None = None  # a frame that the port did not take yet
        self.buffer = bytearray()
        self.relay: Relay | None = None  # our turns in the channel of the peer in the middle
        self.forget_at = _FOREVER  # over, and kept only until its goodbye has left

    @property
    def machine(self) -> Session | Channel:
        return self.session if self.channel is None else self.channel

    def lend(self, size: int) -> memoryview:
        """Memory for one frame; the same each time."""
        if len(self.buffer) < size:
            self.buffer = bytearray(size if size < FRAME_MAX // 8 else FRAME_MAX)
        return memoryview(self.buffer)[:size]


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
        "ended",
        "gone_by",
        "last_try",
        "line",
        "notes",
        "opened",
        "opened_at",
        "pause",
        "peer",
        "port",
        "progress",
        "redial_at",
        "relays",
        "through_number",
    )

    def __init__(self, peer: Peer, channel: Channel, gone_by: float) -> None:
        self.peer = peer
        self.channel = channel
        self.line: _Line | None = None  # what carries the channel, or the one that we dial
        self.port: base.Port | None = None  # that we dial with
        self.opened = False  # at least once
        self.opened_at = 0.0  # the last time
        self.gone_by = gone_by  # given up then, where no session is open
        self.progress = 0  # of the channel, when the last session broke
        self.redial_at = _FOREVER
        self.pause = REDIAL_SECONDS
        self.last_try = ""  # how it ended, for the error message
        self.ended = False
        self.relays: dict[bytes, _Passage] = {}  # frames that we pass on to this peer, by whom they come from
        self.notes = _Passage()  # what we tell peers behind this one, outside their sessions
        self.through_number: int | None = None  # of the last connection that the peer opened through another

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
        forwards: frozenset[frozenset[bytes]],
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
        self._forwards = forwards
        self._timeouts = timeouts
        self._post_quantum = post_quantum
        self._options = options
        self._own_key = public_key_of(private_key)
        self._peers = peers
        self._states: dict[bytes, _State] = {}
        self._linked = frozenset(key for key, peer in peers.items() if peer.via is None)
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
            state = self._states.get(peer)
            line = None if state is None else state.line
            if line is None or line.channel is None or line.port is None or line.pending is not None:
                return False
            if line.channel.queued or line.port.look_after_send or self._closing is not None:
                return False
            self._now = time.monotonic()
            self._obey()
            return not self._pump(line, line.port) and self._closing is None
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
            forwards = any(key in pair for pair in self._forwards) or any(
                other.via == key for other in self._peers.values()
            )
            window = LINK_WINDOW if peer.via is None else WINDOW  # fewer where somebody in the middle has to hold them
            channel = Channel(peer.lanes, run=os.urandom(RUN_SIZE), forwards=forwards, window=window)
            self._states[key] = _State(peer, channel, self._now + self._timeouts.connect)
        for state in self._states.values():
            if state.peer.dial is not None:
                self._dial(state)
        return endpoint

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
                    if not self._states[peer].ended:
                        self._states[peer].channel.send(message)
                case _Taken(peer, size):
                    self._states[peer].channel.taken(size)
                case _ClosePeer(peer, code, reason):
                    self._close_peer(self._states[peer], code, reason)
                case _Close() as close:
                    self._closing = close
                    self._close_by = self._now + close.linger
                    self._wake_at = 0.0

    def _drain(self, port: base.Port) -> bool:
        """Take what came in at one port, up to a burst; True where there may be more."""
        for _ in range(BURST_FRAMES):
            match port.receive():
                case None:
                    self._wake_at = min(self._wake_at, port.deadline() or _FOREVER)
                    return False
                case base.Arrival(connection, frame):
                    line = self._lines.get((port, connection))
                    if line is not None:
                        self._arrived(line, frame)
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
        """Do what is due, and find out when something is due next."""
        now = self._now
        for port in list(self._ports):
            port.tick(now)
        for line in list(self._lines.values()):
            for event in line.machine.tick(now):
                assert isinstance(event, Ended)
                self._over(line, event.error, event.code)
            if now >= line.forget_at:
                self._forget(line)
        for state in self._states.values():
            if state.ended or state.is_open:
                continue
            if now >= state.gone_by:
                if state.opened:
                    why = f"the peer is gone: no connection that lasted for {self._timeouts.gone:g} s"
                else:
                    why = f"the peer did not come up within {self._timeouts.connect:g} s"
                self._give_up(state, Lost(why + state.last_try), CloseCode.LOST)
            elif now >= state.redial_at:
                state.redial_at = _FOREVER
                self._dial(state)
        self._wake_at = min(self._due(), self._close_by)

    def _due(self) -> float:
        due = _FOREVER
        for port in self._ports:
            due = min(due, port.deadline() or _FOREVER)
        for line in self._lines.values():
            due = min(due, line.forget_at, line.machine.deadline() or _FOREVER)
        for state in self._states.values():
            if not state.ended and not state.is_open:
                due = min(due, state.redial_at, state.gone_by)
        return due

    def _pump_all(self) -> bool:
        """Hand over frames that can go now; True where there are more, or a port wants to be looked at again."""
        for line in self._lines.values():
            if line.relay is not None and line.through is not None and line.through.is_open:
                line.through.channel.forward(line.relay)
        busy = False
        for line in list(self._lines.values()):
            if line.port is not None:
                busy |= self._pump(line, line.port)
        return busy

    def _pump(self, line: _Line, port: base.Port) -> bool:
        """Frames of one line, until there are no more, the port takes no more, or there is something else to do.

        True where there may be more to do without waiting.
        """
        commands = self._owner._commands
        for count in range(BURST_FRAMES):
            frame = line.pending or line.machine.next_frame(line.lend)
            if frame is None:
                if line.forget_at != _FOREVER and line.session.is_over:
                    self._forget(line)
                return count > 0 and port.look_after_send
            if not port.send(line.connection, frame):
                line.pending = frame
                return port.look_after_send
            line.pending = None
            if commands:  # a small message is not to wait for a large one
                return True
        return True

    def _leave(self, code: CloseCode) -> bool:
        """One step towards the end: what is queued, goodbyes of forwarded channels, goodbyes of the others.  True: all
        is said.
        """
        for state in self._states.values():
            if not state.ended and not (state.is_open or self._is_owed(state, code)):
                state.ended = True
        here = [state for state in self._states.values() if not state.ended]
        if self._now >= self._close_by:
            for state in here:
                state.channel.close(code)
            self._pump_all()
            return True
        if any(passage.frames for state in here if state.is_open for passage in state.relays.values()):
            return False
        for state in [state for state in here if state.peer.via is not None] or here:
            if state.channel.leaving is None:
                state.channel.leave(code)
                self._wake_at = 0.0
                self._pump_all()
        return not here and not any(line.forget_at != _FOREVER for line in self._lines.values())

    def _is_owed(self, state: _State, code: CloseCode) -> bool:
        """Whether a peer that is not connected now is worth waiting for: something is due to it, if only a goodbye."""
        if code is not CloseCode.NORMAL:
            return False
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
        if state.port is not None or state.line is not None:
            return
        if peer.dial is not None:
            state.port = self._transport(peer.dial).dial(peer.dial)
            self._add_port(state.port, state)
            self._wake_at = 0.0
        elif peer.via is not None and peer.initiator and self._states[peer.via].is_open:
            number = int.from_bytes(os.urandom(8), "big")
            self._open_line(state, (peer.key, number), through=self._states[peer.via])

    def _open_line(
        self, state: _State, connection: Hashable, *, port: base.Port | None = None, through: _State | None = None
    ) -> None:
        """Begin a handshake with a peer whom we dial."""
        handshake = Initiator(self._private_key, state.peer.key, self._digest, post_quantum=self._post_quantum)
        session = Session(handshake, now=self._now, lost_after=self._timeouts.lost, greet=self._greet_as_dialer)
        line = self._add_line(session, connection, port, through)
        line.known = state
        state.line = line

    def _greet_as_dialer(self, peer: bytes, theirs: Ready | None) -> Ready | CloseCode:
        """The peer took our hello."""
        return self._states[peer].channel.ready()

    def _greet_as_listener(self, peer: bytes, theirs: Ready | None) -> Ready | CloseCode:
        """The peer dialled us and proved its key.  From here on its session counts, and no older one."""
        state = self._states[peer]
        line = state.line
        assert theirs is not None
        if state.ended:
            return CloseCode.RESTARTED if state.opened else CloseCode.ERROR
        if line is not None and line.session.state is State.CONFIRMING and self._own_key < peer:
            return CloseCode.CROSSED  # ours, of which the peer knows already
        another = state.is_open and theirs.run != state.channel.peer_run
        if another or not state.channel.fits(theirs):
            if state.opened and not state.is_open:
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

    def _drop(self, line: _Line) -> None:
        """A line that another one has replaced: nothing more is said or heard on it."""
        line.known = None
        line.channel = None
        if line.through is not None or line.port is None:
            self._lines.pop(self._path(line), None)
            line.relay = None
        else:
            self._forget(line)

    def _add_line(
        self, session: Session, connection: Hashable, port: base.Port | None, through: _State | None
    ) -> _Line:
        line = _Line(session, connection, port=port, through=through)
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
        frame = line.machine.next_frame(lambda size: line.lend(FORWARD_PREFIX + size)[FORWARD_PREFIX:])
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
        through: _State | None,
        connection: Hashable,
        frame: memoryview,
        known: Collection[bytes],
    ) -> None:
        """The first frame of somebody whom we do not know yet.  Rubbish costs no cryptography and leaves no trace."""
        if len(frame) > MAX_FRAME or bytes(frame[: len(MAGIC)]) != MAGIC:
            self._log_stranger("ignored a frame that is no hello")
            if port is not None:
                port.hang_up(connection)
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
        self._arrived(self._add_line(session, connection, port, through), frame)

    def _arrived(self, line: _Line, frame: memoryview) -> None:
        channel = line.channel
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
                self._owner._left(line.known.peer.key, channel.released)
                channel.released = 0
        for event in events:
            match event:
                case Message(lane, header, body) if line.known is not None:
                    self._owner._tell(Received(line.known.peer.key, lane, header, body))
                case Forwarded(key, number, payload):
                    self._forwarded(line, key, number, payload)
                case SessionOpened(peer, ready):
                    self._opened(line, peer, ready)
                case Ended(error, reason):
                    self._over(line, error, reason)

    def _opened(self, line: _Line, peer: bytes, ready: Ready) -> None:
        """Both sides have said READY."""
        state = self._states[peer]
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
        if channel.released:
            self._owner._left(peer, channel.released)
            channel.released = 0
        state.opened_at = self._now
        if not state.opened:
            state.gone_by = _FOREVER
        state.pause = REDIAL_SECONDS
        state.redial_at = _FOREVER
        self._wake_at = 0.0
        self._owner._tell(Resumed(peer) if state.opened else Opened(peer))
        state.opened = True
        if line.through is not None:
            assert isinstance(line.connection, tuple)
            state.through_number = line.connection[1]
        for other in self._states.values():
            if other.peer.via == peer and not other.ended:
                if not other.peer.initiator and other.through_number is not None:
                    self._disown(state, other.peer.key, other.through_number)
                self._dial(other)

    def _disown(self, middle: _State, key: bytes, number: int) -> None:
        """Tell a peer behind ``middle`` that its session with us is no more, so that it opens another at once."""
        if middle.notes.put(bytearray(pack_forward_prefix(key, number) + bytes([FrameType.UNKNOWN]))):
            middle.channel.forward(middle.notes.relay)

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
            elif frame[0] == FrameType.SEALED and not far.peer.initiator:
                self._disown(sender, key, number)
            elif not far.peer.initiator:
                self._stranger(None, sender, (key, number), frame, frozenset({key}))
        elif far is not None and frozenset({sender.peer.key, key}) in self._forwards:
            if not far.is_open:
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
        if self._is_final(line, error, code, state.opened, carried):
            self._give_up(state, error, code)
            return
        assert error is not None
        for other in self._states.values():
            if other.peer.via == state.peer.key and other.line is not None:
                lost = Lost("the connection with the peer who forwards between us broke")
                other.line.forget_at = _FOREVER
                self._over(other.line, lost, CloseCode.LOST)
        for path in [path for path, other in self._lines.items() if other.through is state]:
            del self._lines[path]
        if line.port is not None and self._ports.get(line.port) is state:
            self._lines.pop(self._path(line), None)  # its end is goodbye enough
            self._remove_port(line.port, 0)
        state.last_try = f"; the last try ended so: {error}"
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
        other_dials = self._listen is not None and self._own_key > state.peer.key
        return state.pause * (0.75 + os.urandom(1)[0] / 512) + (BUSY_RETRY_SECONDS if other_dials else 0.0)

    def _interrupted(self, state: _State, error: TransportsError) -> None:
        """An open session broke.  The time until the peer is given up begins anew only where the channel got on."""
        gone = self._timeouts.gone
        got_on = state.channel.progress > state.progress or self._now - state.opened_at > gone
        if got_on or state.gone_by == _FOREVER:
            state.gone_by = self._now + gone
        state.progress = state.channel.progress
        if self._logs.take(self._now):
            key = base64.b64encode(state.peer.key).decode()
            _log.warning("the connection with x25519:%s broke: %s; trying again for %g s", key, error, gone)
        if self._closing is None:
            self._owner._tell(Interrupted(state.peer.key, error, max(0.0, state.gone_by - self._now)))

    def _close_peer(self, state: _State, code: CloseCode, why: str) -> None:
        """The computing side has seen enough of this peer."""
        if state.ended:
            return
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
            _log.warning("closed the channel with x25519:%s: %s", base64.b64encode(key).decode(), error)
        if state.line is not None:
            self._drop(state.line)
            state.line = None
        state.ended = True
        self._wake_at = 0.0
        state.relays.clear()
        if state.port is not None and not any(line.port is state.port for line in self._lines.values()):
            self._remove_port(state.port, 0)
        if self._closing is None:
            self._owner._tell(Closed(key, error, code))
        for other in self._states.values():
            if other.peer.via == key and not other.ended:
                self._give_up(other, Lost("the peer who forwards between us is gone"), CloseCode.LOST)
        for path in [path for path, line in self._lines.items() if line.through is state]:
            del self._lines[path]

    def _log_stranger(self, message: str) -> None:
        """One line for the operator, unless strangers have caused too many."""
        if self._logs.take(self._now):
            _log.warning("%s", message)
