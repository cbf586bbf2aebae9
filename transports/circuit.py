"""Circuits: a way through relays, of which each knows the one before and the one behind it and nothing else.

Here: the two machines, ``Origin`` (the end that builds a circuit) and ``Relay`` (everybody else on it, the far end
too), and ``Leg``, a circuit's share of one link: its number there, what may be sent, what waits.  Not here: the keys of
a hop (``layer``), how a cell's head is sealed on its link (``session``), which links there are, who may extend to whom,
and what travels inside (``iothread``; a session between both ends, which does not know that it does).

    origin ==leg==> relay ==leg==> relay ==leg==> far end
           \\_______________________________________/  a session: DATA
           \\______________/\\______/  ...              layers: everything

The origin asks its neighbour for a circuit (CREATE, CREATED: the first layer), and then, through what there is, the
last hop to ask the next (EXTEND, EXTENDED).  A cell that the origin sends is sealed for every hop, the last one's layer
inside; each opens its own and passes the rest on.  A cell that the far end sends gets a layer at every hop, and the
origin opens them all.  Every layer counts its cells, so one that is altered, repeated, swapped, or of another circuit
does not open at the next honest hop, and the circuit is over.

Frames keep their length from link to link.  What layers do not need of it is random.
"""

from __future__ import annotations

import enum
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, final

from splitsec.transports import layer
from splitsec.transports.errors import Damaged, LocalProtocolError, PeerMisbehaved
from splitsec.transports.layer import Layer
from splitsec.transports.limits import (
    ANSWER_SECONDS,
    CELL_HEAD,
    CELL_LENGTH,
    CELL_MAX,
    CELL_ROOM,
    COUNTER_LIMIT,
    HOPS_MAX,
    KEY_SIZE,
    LAYER_COST,
    SMALL_CELL,
    padme,
)
from splitsec.transports.session import Cell, Frame, Lend
from splitsec.transports.wire import ChunkHeader, Command, Kind, Why, pack_meant, unpack_meant, unpack_why

__all__ = [
    "Built",
    "Data",
    "Ended",
    "Event",
    "Extend",
    "Leg",
    "Memory",
    "Origin",
    "Outgoing",
    "Place",
    "Pull",
    "Relay",
    "Sizes",
    "State",
]

_NEVER: Final = float("inf")
_ZEROS: Final = memoryview(bytes(CELL_MAX))
_START: Final = 1 + CELL_LENGTH  # where data begins under a layer
_HANDSHAKE_MAX: Final = SMALL_CELL - CELL_ROOM - CELL_LENGTH - KEY_SIZE  # bytes that go in every cell they travel in

Outgoing: TypeAlias = tuple[ChunkHeader, memoryview, bytes]
"""A cell to be sent: header, the frame with all but its head in place, the handshake message of CREATE and CREATED."""

Pull: TypeAlias = Callable[[Lend], "tuple[Frame, bool] | None"]
"""The next frame of the session inside, sealed into lent memory, and whether it holds a part of a message; or None."""


@final
@dataclass(frozen=True, slots=True)
class Built:
    """The circuit leads to its far end."""


@final
@dataclass(frozen=True, slots=True)
class Extend:
    """The origin wants this circuit to go on to the neighbour of this key.  ``message``: for it, in CREATE."""

    key: bytes
    message: bytes


@final
@dataclass(frozen=True, slots=True)
class Data:
    """A frame from the other end.  Valid until the machine's next call."""

    frame: memoryview


@final
@dataclass(frozen=True, slots=True)
class Ended:
    """The circuit is over.  ``hop``: which one said so, counted from 0, where that is known for sure."""

    why: Why
    hop: int | None = None


Event: TypeAlias = Built | Extend | Data | Ended


@final
class Memory:
    """Memory for cells, used again and again: fresh memory costs a page fault every 4 KiB."""

    _STEP: Final = 16 << 10  # bytes; blocks of larger cells are multiples
    _SPARE_BYTES: Final = 8 << 20  # kept at most

    def __init__(self) -> None:
        self._spare: dict[int, list[bytearray]] = {}
        self._kept = 0  # bytes in those
        self._scratch = (bytearray(), bytearray())

    def take(self, cell: int) -> bytearray:
        """Room for the frame of a cell of so many bytes."""
        size = CELL_HEAD + (SMALL_CELL if cell <= SMALL_CELL else -(-cell // self._STEP) * self._STEP)
        spare = self._spare.get(size)
        if not spare:
            return bytearray(size)
        self._kept -= size
        return spare.pop()

    def give(self, block: bytearray) -> None:
        """Back, after nobody looks at it any more."""
        if self._kept + len(block) <= self._SPARE_BYTES:
            self._kept += len(block)
            self._spare.setdefault(len(block), []).append(block)

    def scratch(self, cell: int) -> tuple[memoryview, memoryview]:
        """Two rooms for the layers of one cell.  What was there before is lost."""
        if len(self._scratch[0]) < cell:
            self._scratch = (bytearray(cell), bytearray(cell))
        return memoryview(self._scratch[0]), memoryview(self._scratch[1])


@final
@dataclass(frozen=True, slots=True)
class Sizes:
    """How large cells are.

    ``cell``: bytes of each that carries a part of a message; None: as Padme rounds.  ``largest``: bytes of any cell.
    ``window``: bytes of cells that may wait at this end of a leg.  ``cover``: seconds; then exactly one cell goes every
    so many, with something in it or not, and all have the size ``cell``.
    """

    cell: int | None
    largest: int
    window: int
    cover: float | None = None

    def of(self, length: int, *, message: bool) -> int:
        """Bytes of the cell for a frame of ``length`` bytes; ``message``: it carries a part of one."""
        if self.cell is not None and (message or self.cover is not None):
            return self.cell
        if self.cell is not None:
            return SMALL_CELL
        return max(SMALL_CELL, padme(length + CELL_ROOM + CELL_LENGTH))


@final
class Leg:
    """One circuit on one link, seen from one end of it."""

    __slots__ = (
        "_arrived",
        "_held",
        "_orders",
        "_told",
        "allowed",
        "block",
        "number",
        "over",
        "sent",
        "sizes",
        "waiting",
    )

    def __init__(self, number: int, sizes: Sizes) -> None:
        self.number = number
        self.sizes = sizes
        self.allowed = 0  # bytes of cells that we may send, and have sent, since the circuit began
        self.sent = 0
        self._arrived = 0
        self._held = 0  # bytes of those that wait to go on
        self._told = sizes.window  # what the other side knows that it may send
        self._orders: deque[tuple[Kind, bytes, Why]] = deque()
        self.waiting: deque[tuple[bytearray, int, int, Leg | None]] = deque()
        self.block: bytearray | None = None  # that the last cell lies in
        self.over = False

    def order(self, kind: Kind, handshake: bytes = b"", why: Why = Why.DONE) -> None:
        """Queue a CREATE, CREATED or DESTROY."""
        self._orders.append((kind, handshake, why))

    def finish(self, why: Why | None) -> None:
        """Nothing more goes over it; the other side is told ``why``, unless it is None."""
        if not self.over:
            self.over = True
            self.waiting.clear()
            if why is not None:
                self.order(Kind.DESTROY, why=why)

    def wait(self, block: bytearray, used: int, size: int, came_by: Leg | None) -> None:
        """Queue a cell of ``size`` bytes, whose payload of ``used`` bytes lies in its frame in ``block``.

        ``came_by``: over whose link, which has room again once this has left.
        """
        if came_by is not None:
            came_by._held += size
        self.waiting.append((block, used, size, came_by))

    def arrive(self, cell: Cell) -> None:
        """Count what came.  PeerMisbehaved where it is more than we allow."""
        header = cell.header
        if header.value > self.allowed:
            self.allowed = header.value
        if header.kind is Kind.CELL:
            if cell.size > self.sizes.largest:
                raise PeerMisbehaved(f"a cell of {cell.size} bytes; at most {self.sizes.largest} are agreed on")
            if self._arrived + cell.size > self._told:
                raise PeerMisbehaved("more cells on a circuit than its window allows")
            self._arrived += cell.size

    def let_go(self, size: int) -> None:
        """So many bytes wait no more."""
        self._held -= size

    @property
    def done(self) -> bool:
        """It is over, and nothing has to be said of that any more."""
        return self.over and not self._orders

    @property
    def owes_credit(self) -> bool:
        """The other side does not know yet how much it may send again."""
        return not self.over and self._room() - self._told >= self.sizes.window * 3 // 4

    @property
    def idle(self) -> bool:
        """There is nothing to send, but what its machine has."""
        return not self.waiting and not self._orders and not self.owes_credit

    def _room(self) -> int:
        return self._arrived - self._held + self.sizes.window

    def may_send(self, size: int) -> bool:
        """Whether the other side has room for a cell of ``size`` bytes."""
        return self.sent + size <= self.allowed

    def head(self, kind: Kind, used: int = 0, why: Why = Why.DONE) -> ChunkHeader:
        """The header of a cell with ``used`` bytes that are meant."""
        self._told = self._room()
        return ChunkHeader(kind, lane=why, value=self._told, payload_size=used, number=self.number)

    def next_order(self, lend: Lend, entropy: Callable[[int], bytes]) -> Outgoing | None:
        """What the link itself has to be told: orders, and that there is room again."""
        handshake, why = b"", Why.DONE
        if self._orders:
            kind, handshake, why = self._orders.popleft()
        elif self.owes_credit:
            kind = Kind.CREDIT
        else:
            return None
        frame = lend(CELL_HEAD + SMALL_CELL)
        frame[CELL_HEAD:] = entropy(SMALL_CELL)
        return self.head(kind, len(handshake), why), frame, handshake


class State(enum.Enum):
    """Where a circuit stands, at its origin."""

    BUILDING = "being built"
    OPEN = "open"
    OVER = "over"


class _Paced:
    """One cell every so many seconds, where that is wanted.  Silence must look like talk, and talk like silence.

    The times are fixed when it begins, so that they tell nothing of when a cell came that another one answers.
    """

    def __init__(self, every: float | None, now: float) -> None:
        self._every = every
        self._next = _NEVER if every is None else now
        self._due = False

    def tick(self, now: float) -> bool:
        """Whether a cell is due that was not before."""
        if self._every is None or now < self._next:
            return False
        self._next += self._every
        if self._next <= now:  # we were held up: a burst would tell of it
            self._next = now + self._every
        self._due = True
        return True

    @property
    def deadline(self) -> float:
        return self._next

    def take(self) -> bool:
        """Whether a cell may go now."""
        if self._every is None:
            return True
        due, self._due = self._due, False
        return due

    @property
    def covers(self) -> bool:
        return self._every is not None


@final
class Origin:
    """The end that builds the circuit."""

    def __init__(
        self,
        number: int,
        hops: Sequence[bytes],
        *,
        digest: bytes,
        sizes: Sizes,
        memory: Memory,
        now: float,
        post_quantum: bool = True,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """``number``: the circuit's on the link to the first hop.  ``hops``: public keys of the relays, then of the far
        end.  ``now``: seconds.
        """
        if not 1 <= len(hops) <= HOPS_MAX:
            raise LocalProtocolError(f"a circuit has 1 to {HOPS_MAX} hops, not {len(hops)}")
        self.leg = Leg(number, sizes)
        self.pull: Pull | None = None
        """Where frames for the far end come from, once it is built."""
        self._hops = hops
        self._digest = digest
        self._sizes = sizes
        self._memory = memory
        self._post_quantum = post_quantum
        self._entropy = entropy
        self._layers: list[Layer] = []
        self._state = State.BUILDING
        self._built_by = now + ANSWER_SECONDS + 2 * len(hops) * (sizes.cover or 0.0)
        self._pace = _Paced(sizes.cover, now + (sizes.cover or 0.0))  # CREATE goes at the first beat
        self._command: bytes | None = None  # EXTEND, to the last hop so far
        self._asking = self._ask()
        self.leg.order(Kind.CREATE, self._asking.message)

    @property
    def state(self) -> State:
        """Where it stands."""
        return self._state

    @property
    def legs(self) -> tuple[Leg, ...]:
        """Its share of links."""
        return (self.leg,)

    def _ask(self) -> layer.Asking:
        key = self._hops[len(self._layers)]
        return layer.Asking(key, self._digest, post_quantum=self._post_quantum, entropy=self._entropy)

    def receive(self, leg: Leg, cell: Cell, now: float) -> list[Event]:
        """Take one cell from the first hop.  Whatever is wrong with it ends the circuit."""
        if self._state is State.OVER:
            return []
        try:
            leg.arrive(cell)
            match cell.header.kind:
                case Kind.CREATED if not self._layers:
                    return self._answered(bytes(cell.payload), now)
                case Kind.CELL:
                    return self._opened(cell, now)
                case Kind.CREDIT:
                    return []
                case Kind.DESTROY:
                    return self._end(unpack_why(cell.header.lane), tell=None)
                case kind:
                    raise PeerMisbehaved(f"a {kind.name} to a circuit that is {self._state.value}")
        except Damaged:
            return self._end(Why.DAMAGED, tell=Why.DAMAGED)
        except PeerMisbehaved:
            return self._end(Why.MISBEHAVED, tell=Why.MISBEHAVED)

    def _answered(self, message: bytes, now: float) -> list[Event]:
        self._layers.append(self._asking.answered(message))
        if len(self._layers) == len(self._hops):
            self._state = State.OPEN
            return [Built()]
        self._asking = self._ask()
        self._command = pack_meant(Command.EXTEND, self._hops[len(self._layers)] + self._asking.message)
        return []

    def _opened(self, cell: Cell, now: float) -> list[Event]:
        sealed = cell.payload
        here, there = self._memory.scratch(cell.size)
        for hop, (_, opener) in enumerate(self._layers):
            size = opener.open_into(sealed, here, _bound(cell.size))
            command, rest = _command(here[:size]), here[1:size]
            if command is not Command.PASS:
                return self._obey(hop, command, unpack_meant(rest), now)
            sealed, here, there = rest, there, here
        raise PeerMisbehaved("a cell from behind the last hop")

    def _obey(self, hop: int, command: Command, data: memoryview, now: float) -> list[Event]:
        last = hop == len(self._layers) - 1
        match command:
            case Command.EXTENDED if last and self._state is State.BUILDING:
                return self._answered(bytes(data), now)
            case Command.DATA if last and self._state is State.OPEN:
                return [Data(data)]
            case Command.COVER if last and self._state is State.OPEN:
                return []
            case Command.FAILED if len(data) == 1:
                return self._end(unpack_why(data[0]), tell=Why.DONE, hop=hop)
            case _:
                raise PeerMisbehaved(f"{command.name} from hop {hop} of a circuit that is {self._state.value}")

    def next_cell(self, leg: Leg, lend: Lend) -> Outgoing | None:
        """The next cell for the first hop, or None."""
        order = leg.next_order(lend, self._entropy)
        if order is not None or self._state is State.OVER:
            return order
        if self._state is State.BUILDING:
            if not self._pace.take() or self._command is None or not leg.may_send(SMALL_CELL):
                return None
            here, _ = self._memory.scratch(SMALL_CELL)
            command, self._command = self._command, None
            here[: len(command)] = command
            return self._seal(len(command), SMALL_CELL, lend)
        content = _content(leg, self._pull_now, self._pace, self._sizes, self._memory)
        return None if content is None else self._seal(*content, lend)

    def _is_old(self) -> bool:
        """Its keys have sealed half of what they may.  Whoever uses it builds another."""
        sealer, opener = self._layers[0]
        return max(sealer.counter, opener.counter) >= COUNTER_LIMIT // 2

    def _pull_now(self, lend: Lend) -> tuple[Frame, bool] | None:
        return None if self.pull is None else self.pull(lend)

    def _seal(self, used: int, size: int, lend: Lend) -> Outgoing:
        """Seal what lies in the first scratch, for every hop there is, the nearest outside."""
        here, there = self._memory.scratch(size)
        rest = size - CELL_ROOM
        here[used : 1 + rest] = _ZEROS[: 1 + rest - used]
        plain = here[: 1 + rest]
        bound = _bound(size)
        for sealer, _ in self._layers[:0:-1]:
            count = sealer.seal_into(plain, there[1:], bound)
            there[0] = Command.PASS
            plain = there[: 1 + count]
            here, there = there, here
        frame = lend(CELL_HEAD + size)
        count = self._layers[0].sealer.seal_into(plain, frame[CELL_HEAD:], bound)
        frame[CELL_HEAD + count :] = self._entropy(size - count)
        self.leg.sent += size
        return self.leg.head(Kind.CELL, count), frame, b""

    def close(self, why: Why = Why.DONE) -> list[Event]:
        """End it from here."""
        return [] if self._state is State.OVER else self._end(why, tell=why)

    def lose(self, leg: Leg) -> list[Event]:
        """The link to the first hop is gone."""
        leg.finish(None)
        return [] if self._state is State.OVER else self._end(Why.LOST, tell=None)

    def tick(self, now: float) -> list[Event]:
        """Do what is due at ``now``, seconds."""
        if self._state is State.BUILDING and now >= self._built_by:
            return self._end(Why.LOST, tell=Why.DONE)
        if self._state is State.OPEN and self._is_old():
            return self._end(Why.DONE, tell=Why.DONE)
        self._pace.tick(now)
        return []

    def deadline(self) -> float:
        """When ``tick`` is due, seconds; for an old circuit, whenever it is called (a session inside keeps waking)."""
        match self._state:
            case State.BUILDING:
                return min(self._built_by, self._pace.deadline)
            case State.OPEN:
                return self._pace.deadline
            case _:
                return _NEVER

    def _end(self, why: Why, *, tell: Why | None, hop: int | None = None) -> list[Event]:
        self._state = State.OVER
        self.leg.finish(tell)
        return [Ended(why, hop)]


class Place(enum.Enum):
    """What a relay is on a circuit."""

    END = "the last hop so far"
    EXTENDING = "waiting for the next hop"
    PASSING = "between two hops"
    BROKEN = "before a hop that is gone"
    OVER = "over"


@final
class Relay:
    """A place on somebody else's circuit, its far end perhaps: who asked for it, and behind whom it goes on."""

    def __init__(
        self,
        back: Leg,
        private_key: bytes,
        *,
        digest: bytes,
        memory: Memory,
        post_quantum: bool = True,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """``back``: where it comes from.  ``private_key``: X25519, 32 bytes.  Next comes ``create``."""
        self.back = back
        self.front: Leg | None = None
        self.pull: Pull | None = None
        """Where frames for the origin come from, if this is the far end."""
        self._sizes = back.sizes
        self._private_key = private_key
        self._digest = digest
        self._memory = memory
        self._post_quantum = post_quantum
        self._entropy = entropy
        self._layer: Layer | None = None
        self._place = Place.END
        self._pace = _Paced(None, 0.0)

    @property
    def place(self) -> Place:
        """What it is now."""
        return self._place

    @property
    def legs(self) -> tuple[Leg, ...]:
        """Its share of links."""
        return (self.back,) if self.front is None else (self.back, self.front)

    def create(self, cell: Cell) -> list[Event]:
        """Take CREATE.  Ended where it was not made for us, or not with this contract."""
        try:
            self.back.arrive(cell)
            message, self._layer = layer.answer(
                self._private_key,
                self._digest,
                bytes(cell.payload),
                post_quantum=self._post_quantum,
                entropy=self._entropy,
            )
        except (Damaged, PeerMisbehaved):
            return self._end(Why.DAMAGED)
        self.back.order(Kind.CREATED, message)
        return []

    def become_end(self, sizes: Sizes, now: float) -> None:
        """A session with the origin is open: from here on cells have these sizes, and go at this pace."""
        self._sizes = sizes
        self._pace = _Paced(sizes.cover, now)

    # --- cells --------------------------------------------------------------------------------------------------------

    def receive(self, leg: Leg, cell: Cell, now: float) -> list[Event]:
        """Take one cell from either side.  Whatever is wrong with it ends the circuit."""
        if self._place is Place.OVER or leg.over:
            return []
        if self._is_old():
            return self._end(Why.DONE)
        try:
            leg.arrive(cell)
            return self._from_back(cell) if leg is self.back else self._from_front(leg, cell)
        except Damaged:
            return self._end(Why.DAMAGED)
        except PeerMisbehaved:
            return self._end(Why.MISBEHAVED)

    def _from_back(self, cell: Cell) -> list[Event]:
        match cell.header.kind:
            case Kind.CELL:
                return self._open(cell)
            case Kind.CREDIT:
                return []
            case Kind.DESTROY:
                self.back.finish(None)
                return self._end(unpack_why(cell.header.lane))
            case kind:
                raise PeerMisbehaved(f"a second {kind.name}")

    def _open(self, cell: Cell) -> list[Event]:
        """Take our layer off a cell of the origin's."""
        assert self._layer is not None
        block = self._memory.take(cell.size)
        room = memoryview(block)[CELL_HEAD - 1 :]  # what is to be passed on then lies behind the head of its frame
        size = self._layer.opener.open_into(cell.payload, room, _bound(cell.size))
        command = _command(room[:size])
        if command is Command.PASS and self._place is Place.PASSING:
            assert self.front is not None
            self.front.wait(block, size - 1, cell.size, self.back)
            return []
        self._memory.give(block)  # what is in it is looked at before the next cell is
        if self._place is Place.BROKEN:
            return []
        data = unpack_meant(room[1:size])
        if self._place is Place.END:
            match command:
                case Command.EXTEND if KEY_SIZE < len(data) <= KEY_SIZE + _HANDSHAKE_MAX:
                    self._place = Place.EXTENDING
                    return [Extend(bytes(data[:KEY_SIZE]), bytes(data[KEY_SIZE:]))]
                case Command.DATA:
                    return [Data(data)]
                case Command.COVER:
                    return []
        raise PeerMisbehaved(f"{command.name} to who is {self._place.value}")

    def _from_front(self, front: Leg, cell: Cell) -> list[Event]:
        match cell.header.kind:
            case Kind.CREATED if self._place is Place.EXTENDING and len(cell.payload) <= _HANDSHAKE_MAX:
                self._place = Place.PASSING
                self._say(Command.EXTENDED, cell.payload)
            case Kind.CELL if self._place is Place.PASSING:
                self._wrap(front, cell)
            case Kind.CREDIT:
                pass
            case Kind.DESTROY:
                self._break(unpack_why(cell.header.lane))
            case kind:
                raise PeerMisbehaved(f"a {kind.name} to who is {self._place.value}")
        return []

    def _wrap(self, front: Leg, cell: Cell) -> None:
        """Put our layer around a cell on its way back."""
        assert self._layer is not None
        if len(cell.payload) + LAYER_COST > cell.size:
            raise PeerMisbehaved("a cell that leaves no room for a layer")
        plain = cell.room
        if plain.readonly:
            plain, _ = self._memory.scratch(cell.size)
            plain = plain[: len(cell.room)]
            plain[:] = cell.room
        plain[0] = Command.PASS
        block = self._memory.take(cell.size)
        count = self._layer.sealer.seal_into(plain, memoryview(block)[CELL_HEAD:], _bound(cell.size))
        self.back.wait(block, count, cell.size, front)

    def _say(self, command: Command, data: bytes | memoryview) -> None:
        """A word of our own to the origin."""
        meant = pack_meant(command, data)
        here, _ = self._memory.scratch(SMALL_CELL)
        here[: len(meant)] = meant
        self._seal(len(meant), SMALL_CELL)

    def _seal(self, used: int, size: int) -> None:
        """Seal what lies in the first scratch, for the origin."""
        assert self._layer is not None
        here, _ = self._memory.scratch(size)
        rest = size - CELL_ROOM
        here[used : 1 + rest] = _ZEROS[: 1 + rest - used]
        block = self._memory.take(size)
        count = self._layer.sealer.seal_into(here[: 1 + rest], memoryview(block)[CELL_HEAD:], _bound(size))
        self.back.wait(block, count, size, None)

    def next_cell(self, leg: Leg, lend: Lend) -> Outgoing | None:
        """The next cell for one side, or None.  Its frame lies in ``leg.block`` if that is not None, which is the
        caller's then, to be given back to ``Memory``.
        """
        order = leg.next_order(lend, self._entropy)
        if order is not None or leg.over:
            return order
        if not leg.waiting and leg is self.back and self.pull is not None and not self._is_old():
            content = _content(leg, self.pull, self._pace, self._sizes, self._memory)
            if content is not None:
                self._seal(*content)
        if not leg.waiting or not leg.may_send(leg.waiting[0][2]):
            return None
        block, used, size, came_by = leg.waiting.popleft()
        if came_by is not None:
            came_by.let_go(size)
        leg.sent += size
        leg.block = block
        frame = memoryview(block)[: CELL_HEAD + size]
        frame[CELL_HEAD + used :] = self._entropy(size - used)
        return leg.head(Kind.CELL, used), frame, b""

    def _is_old(self) -> bool:
        """Its key has sealed more than any honest origin has it seal."""
        return self._layer is not None and self._layer.sealer.counter >= COUNTER_LIMIT * 3 // 4

    # --- the next hop -------------------------------------------------------------------------------------------------

    def extend(self, front: Leg, message: bytes) -> None:
        """Go on over ``front``, a leg of a link to the next hop."""
        self.front = front
        front.order(Kind.CREATE, message)

    def refuse(self, why: Why) -> None:
        """There is no going on."""
        self._place = Place.BROKEN
        self._say(Command.FAILED, bytes([why]))

    def lose(self, leg: Leg) -> list[Event]:
        """A link is gone."""
        if self._place is Place.OVER or leg.over:
            return []
        leg.finish(None)
        if leg is self.back:
            return self._end(Why.LOST)
        self._break(Why.LOST)
        return []

    def _break(self, why: Why) -> None:
        """What is behind us is gone; the origin is told, in a cell that nobody else can make or read."""
        assert self.front is not None
        self.front.finish(None)
        self._place = Place.BROKEN
        self._say(Command.FAILED, bytes([why]))

    # --- time and end -------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Event]:
        """Do what is due at ``now``, seconds."""
        self._pace.tick(now)
        return []

    def deadline(self) -> float:
        """When ``tick`` is due, seconds."""
        return _NEVER if self._place is Place.OVER else self._pace.deadline

    def close(self, why: Why = Why.DONE) -> list[Event]:
        """End it from here."""
        return [] if self._place is Place.OVER else self._end(why)

    def _end(self, why: Why) -> list[Event]:
        self._place = Place.OVER
        for leg in self.legs:
            leg.finish(why)
        return [Ended(why)]


def _bound(size: int) -> bytes:
    """What every layer of a cell of ``size`` bytes is bound to: a size that a relay changes is a mark for another."""
    return size.to_bytes(CELL_LENGTH, "big")


def _command(opened: memoryview) -> Command:
    if not opened:
        raise PeerMisbehaved("a layer with nothing under it")
    try:
        return Command(opened[0])
    except ValueError:
        raise PeerMisbehaved(f"the unknown command {opened[0]} in a cell") from None


def _content(leg: Leg, pull: Pull, pace: _Paced, sizes: Sizes, memory: Memory) -> tuple[int, int] | None:
    """Put a frame for the other end into the first scratch: bytes that are meant, and size of the cell.

    None where there is nothing to send, no room for it at the next hop, or not yet time for it.
    """
    if not pace.take() or not leg.may_send(sizes.cell or sizes.largest):
        return None
    here, _ = memory.scratch(sizes.largest)
    pulled = pull(lambda size: here[_START : _START + size])
    if pulled is None:
        if not pace.covers:
            return None
        meant = pack_meant(Command.COVER, b"")
        here[: len(meant)] = meant
        return len(meant), sizes.of(0, message=True)
    frame, message = pulled
    size = sizes.of(len(frame), message=message)
    if len(frame) > size - CELL_ROOM - CELL_LENGTH:
        raise LocalProtocolError(f"a frame of {len(frame)} bytes does not fit a cell of {size}")
    here[0] = Command.DATA
    here[1:_START] = len(frame).to_bytes(CELL_LENGTH, "big")
    if isinstance(frame, bytes):
        here[_START : _START + len(frame)] = frame
    return _START + len(frame), size
