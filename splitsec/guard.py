"""The only door: every tensor that leaves a party passes ``release``, every one that enters passes ``admit``.

Here: what the graph declares against what is offered, in both directions; counts of what passed.  On the way out the
party's safeguards act before the channel sees anything: budget, clipping, noise, journal (``safeguards``).  Not here:
what the tensors are for (``engine``).  Next: ``messages`` turns a message to bytes, ``splitsec.transports`` carries
them.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from splitsec.codecs import BadWire, Codecs, Unfit
from splitsec.errors import EgressRefused, PeerError, PeerLost, PeerMisbehaved, PeerRefusedUs, PeerUnreachable
from splitsec.messages import NAMES, BadMessage, Message, decode, encode, finite
from splitsec.plan import Lane, Plan
from splitsec.privacy.dpsgd import PrivateTraining
from splitsec.safeguards import Carried, Safeguards
from splitsec.transports import errors as below
from splitsec.transports.iothread import CloseCode, Closed, Event, Interrupted, Opened, Received, Resumed

__all__ = ["Guard", "MessageThread", "Passed", "Traffic"]

_log = logging.getLogger("splitsec")

LaneKey = tuple[str, int]

KEY_LENGTHS: Final = {"control": 0, "order": 0, "weights": 1, "exchange": 1}
"""How many numbers place a message of each kind; (step, micro-batch) for all others."""

SMALL_HEADER: Final = 4096
"""Bytes; what a message needs that describes one tensor or a few counts.  Weights and orders describe more."""


class MessageThread(Protocol):
    """What the guard needs of ``splitsec.transports.iothread.IOThread``."""

    def send(self, peer: bytes, lane: int, header: bytes, body: Any = (), *, wait: bool = True) -> None: ...
    def receive(self, timeout: float | None = None) -> Event | None: ...
    def open_peer(self, peer: bytes) -> None: ...
    def leave_peer(self, peer: bytes) -> None: ...
    def close_peer(self, peer: bytes, reason: int, why: str) -> None: ...
    def close(self, reason: int = CloseCode.NORMAL, linger: float = 5.0) -> None: ...


@dataclass(frozen=True)
class Passed:
    """One message that passed the door, as far as may be told of it: never what is in it."""

    out: bool
    lane: Lane
    key: tuple[int, ...]
    header_bytes: int
    body_bytes: int
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    """Dtype and shape of each."""
    waited: float = 0.0
    """Seconds for which the computing thread stood still until it came in."""


@dataclass
class Traffic:
    """What passed one lane: messages, and bytes of header and body before encryption."""

    messages: int = 0
    bytes: int = 0


class Guard:
    """One party's door.  ``keys``: party name to X25519 public key for every peer in the plan.

    ``together``: nobody can go on once one party has gone (a run); otherwise only who waits for that party is told.
    ``on_call``: peers to whom there is a channel only between ``call`` and ``part``, and who shall not learn which
    member of a group we are.  ``crowds``: such groups as the parties outside see them, one peer in place of many.
    """

    def __init__(
        self,
        plan: Plan,
        keys: Mapping[str, bytes],
        thread: MessageThread,
        *,
        connect_timeout: float,
        answer_timeout: float | None = None,
        together: bool = True,
        safeguards: Safeguards | None = None,
        on_call: Collection[str] = (),
        crowds: Collection[str] = (),
    ) -> None:
        self.plan = plan
        self.on_call = tuple(name for name in keys if name in on_call)
        self._crowds = frozenset(crowds)
        self.safeguards = safeguards
        self._together = together
        self.traffic: dict[LaneKey, Traffic] = defaultdict(Traffic)
        self._codecs = Codecs()
        self._thread = thread
        self._keys = dict(keys)
        self._names = {key: name for name, key in keys.items()}
        self._last_out: dict[LaneKey, tuple[int, ...]] = {}
        self._last_in: dict[LaneKey, tuple[int, ...]] = {}
        self._waiting: dict[LaneKey, deque[Message]] = defaultdict(deque)
        self._opened: set[str] = set()
        self._leaving: set[str] = set()
        self._gone: dict[str, PeerError] = {}
        self._connect_timeout = connect_timeout
        self._answer_timeout = answer_timeout
        self.on_opened: Callable[[str], None] = lambda party: None
        self.on_interrupted: Callable[[str, str, float], None] = lambda party, why, seconds: None
        """``(party, why, seconds)``: its connection broke, and is tried again for so long."""
        self.on_resumed: Callable[[str], None] = lambda party: None
        self.on_closed: Callable[[str, str], None] = lambda party, how: None
        """``(party, how)``: its channel is over, with the ``CloseCode`` of this name."""
        self.on_passed: Callable[[Passed], None] | None = None
        """Told of every message, for whoever traces."""
        self._waited = 0.0
        """Seconds since the last message came in, or a channel opened; measured only for ``on_passed``."""

    # --- out

    def release(self, lane: LaneKey, message: Message, carried: Carried | None = None) -> None:
        """Let ``message`` out on ``lane`` (peer, number), if the graph declares it so, as the safeguards leave it.

        ``carried``: whose samples went into it, where they are this party's.  Tensors are lent to the channel until
        they are sent: do not change them in place afterwards.  Raises ``EgressRefused``, ``UnsafeSegment``,
        ``BudgetSpent``.
        """
        declared = self.plan.lanes_out.get(lane)
        if declared is None:
            raise EgressRefused(
                f"{message.kind} message for {lane[0]} on lane {lane[1]}", expected="a cut that the graph declares"
            )
        complaint = _complaint(declared, message, self._last_out.get(lane))
        if complaint is not None:
            raise EgressRefused(
                f"{declared.kind} of {declared.name} to {declared.peer}: {complaint}",
                expected=_declaration(declared),
                fix="nothing was sent; " + _advice(complaint),
            )
        if lane[0] in self._gone:
            raise self._gone[lane[0]]
        if lane[0] in self.on_call and lane[0] not in self._opened:
            raise EgressRefused(
                f"{declared.kind} of {declared.name} to {declared.peer}, with which there is no channel now",
                expected="a turn of ours",
                fix="nothing was sent; this is a fault of whoever called the guard",
            )
        if message.key:
            self._last_out[lane] = message.key
        if self.safeguards is not None:
            message = self.safeguards.treat(lane, message, carried)
        if lane[0] in self.on_call:
            message = _row_by_row(message)
        try:
            header, body = encode(self._codecs.encode(declared, message))
        except Unfit as error:
            raise EgressRefused(
                f"{declared.kind} of {declared.name} to {declared.peer}: {error}",
                expected=_declaration(declared),
                fix="nothing was sent; look at what the segment makes, or remove `codec` from that cut in the graph",
            ) from error
        if self.safeguards is not None:
            self.safeguards.record(declared, message, (header, *body), carried)
        try:
            # A step's messages are bounded by its micro-batches and must not wait for each other; exchanges are not.
            waits = declared.kind == "exchange"
            self._thread.send(self._keys[declared.peer], declared.number, header, body, wait=waits)
        except below.TransportsError as error:
            while self.wait(timeout=0):  # what the peer said when it left may still wait to be read
                pass
            raise self._gone.get(declared.peer) or self._peer_error(declared.peer, error) from error
        passed = self.traffic[lane]
        size = sum(part.nbytes for part in body)
        passed.messages += 1
        passed.bytes += len(header) + size
        if self.on_passed is not None:
            self.on_passed(_passed(True, declared, message, len(header), size))

    def account_for(self, segment: str, private: PrivateTraining, carried: Carried | None) -> None:
        """Spend what one training use of ``carried`` costs where ``segment``'s weights will leave: DP-SGD."""
        if self.safeguards is not None and carried is not None:
            self.safeguards.spend_on_weights(segment, private, carried)

    # --- in

    def admit(self, arrived: Received) -> None:
        """Check one message against its lane's declaration and let it wait there.

        Raises ``PeerMisbehaved``, and closes the channel with the sender.
        """
        try:
            self._admit(arrived)
        except PeerMisbehaved as error:
            self._gone[self._names[arrived.peer]] = error
            self._thread.close_peer(arrived.peer, CloseCode.MISBEHAVED, error.seen)
            raise

    def _admit(self, arrived: Received) -> None:
        party = self._names[arrived.peer]
        key = (party, arrived.lane)
        declared = self.plan.lanes_in.get(key)
        if declared is None:
            raise PeerMisbehaved(
                f"sent a message on lane {arrived.lane}", party=party, expected="only what the graph declares"
            )
        if declared.kind not in ("order", "weights") and len(arrived.header) > SMALL_HEADER:
            raise PeerMisbehaved(f"sent a header of {len(arrived.header)} bytes for {declared.name}", party=party)
        try:
            message = decode(arrived.header, arrived.body)
        except BadMessage as error:
            raise PeerMisbehaved(f"sent an unreadable message for {declared.name}: {error}", party=party) from error
        complaint = _misplaced(declared, message, self._last_in.get(key))
        if complaint is None and len(self._waiting[key]) >= declared.most_waiting:
            complaint = f"more than {declared.most_waiting} messages ahead of us"
        if complaint is None:
            try:
                message = self._codecs.decode(declared, message)
            except BadWire as error:
                complaint = str(error)
            else:
                complaint = _complaint(declared, message, self._last_in.get(key))
        if complaint is None and declared.kind in ("gradient", "taken"):
            asked = self._last_out.get((party, arrived.lane - 1))  # a way back is numbered after its way there
            if asked is None or message.key > asked:
                complaint = f"message {message.key}, an answer to what we have not sent"
        if complaint is not None:
            raise PeerMisbehaved(
                f"{declared.kind} of {declared.name}: {complaint}", party=party, expected=_declaration(declared)
            )
        if message.key:
            self._last_in[key] = message.key
        self._waiting[key].append(message)
        if self.on_passed is not None:
            waited, self._waited = self._waited, 0.0
            self.on_passed(_passed(False, declared, message, len(arrived.header), len(arrived.body), waited))

    def peek(self, lane: LaneKey) -> Message | None:
        """The oldest message waiting on ``lane``, or None."""
        queue = self._waiting.get(lane)
        return queue[0] if queue else None

    def take(self, lane: LaneKey) -> Message:
        """Take the oldest message waiting on ``lane``, waiting for it if there is none."""
        while not self._waiting[lane]:
            self.wait(on=(lane[0],))
        return self._waiting[lane].popleft()

    def wait_for_answer(self, on: Iterable[str]) -> None:
        """Wait for the next event in the middle of a step, which needs something of the parties ``on``.

        Raises ``PeerLost`` where nobody says anything for as long as the graph allows, though connections are alive.
        """
        on = sorted(on)
        if not self.wait(on=on, timeout=self._answer_timeout):
            raise PeerLost(
                f"is connected, but has sent nothing that the step needs for {self._answer_timeout:g} s",
                party=on[0] if on else self.plan.party,
                expected=f"what it owes us ({', '.join(on)})" if on[1:] else "the answer to what we sent, or its share",
                fix="look at that party's log, whether it computes, or waits for a third; if its steps take so long, "
                "raise `timeouts: {answer: ...}` in the graph file",
            )

    def wait(self, *, on: Iterable[str] = (), timeout: float | None = None) -> bool:
        """Wait for the next event and deal with it; False if ``timeout`` seconds pass without one.

        ``on``: parties without whose messages there is no going on; raises their error if one of them has gone.
        """
        self._raise_if_gone(on)
        if self.on_passed is None:
            event = self._thread.receive(timeout)
        else:
            asked = time.monotonic()
            event = self._thread.receive(timeout)
            self._waited += time.monotonic() - asked
        if event is None:
            return False
        try:
            self._deal_with(event)
        except PeerError as error:
            if self._together:
                raise
            _log.warning("%s", error)  # whoever waits for this party, or sends to it, is told then
        return True

    def _deal_with(self, event: Event) -> None:
        party = self._names[event.peer]
        match event:
            case Received() if party not in self._gone:
                self.admit(event)
            case Opened():
                self._opened.add(party)
                self._waited = 0.0
                self.on_opened(party)
            case Interrupted(error=error, seconds=seconds):
                self.on_interrupted(party, str(error), seconds)
            case Resumed():
                self.on_resumed(party)
            case Closed(error=None) if party in self._leaving:
                self._leaving.discard(party)
                self._opened.discard(party)
                self.on_closed(party, CloseCode.NORMAL.name.lower())
            case Closed(error=error, code=code) if party not in self._gone:
                self.on_closed(party, code.name.lower())
                self._close_event(party, error, code)

    def open_all(self, parties: Iterable[str]) -> None:
        """Wait until every one of ``parties`` is connected and authenticated, but those on call and crowds, who come
        when there is something to say.  Raises ``PeerUnreachable`` and its like.
        """
        self._until_opened(set(parties) - set(self.on_call) - self._crowds)

    def call(self, parties: Iterable[str]) -> None:
        """Open a channel to each of ``parties``, who are on call, under a new pseudonym; where one is open, it stays.

        Raises ``PeerUnreachable`` and its like.
        """
        parties = set(parties)
        self._raise_if_gone(parties)
        for party in sorted(parties - self._opened):
            self._thread.open_peer(self._keys[party])
        self._until_opened(parties)

    def part(self, parties: Iterable[str]) -> None:
        """Close the channels that ``call`` opened, once all that was sent has arrived, and wait until that is done."""
        parties = set(parties)
        self._raise_if_gone(parties)
        for party in sorted(parties & self._opened):
            self._leaving.add(party)
            self._thread.leave_peer(self._keys[party])
        while self._leaving & parties:
            self.wait(on=parties)

    def _raise_if_gone(self, parties: Iterable[str]) -> None:
        for party in parties:
            if party in self._gone:
                raise self._gone[party]

    def _until_opened(self, wanted: set[str]) -> None:
        deadline = time.monotonic() + self._connect_timeout
        while not wanted <= self._opened:
            self._raise_if_gone(wanted)
            left = deadline - time.monotonic()
            if left <= 0 or not self.wait(timeout=left):
                missing = sorted(wanted - self._opened)
                raise PeerUnreachable(
                    f"did not come up within {self._connect_timeout:g} s"
                    + (f" (nor did {', '.join(missing[1:])})" if missing[1:] else ""),
                    party=missing[0],
                    expected="every party of the graph running, and reachable at the address the graph gives",
                    fix="start that party, check its log, or raise `timeouts: {connect: ...}` in the graph file",
                )

    def _close_event(self, party: str, error: below.TransportsError | None, code: int) -> None:
        said = error is None or (isinstance(error, below.Lost) and code != CloseCode.LOST)
        if error is not None and not said:
            self._gone[party] = self._peer_error(party, error)
            raise self._gone[party]
        seen, fix = _GOODBYES.get(code, _GOODBYES[CloseCode.ERROR])
        self._gone[party] = PeerLost(seen, party=party, expected="it to stay until the last step", fix=fix)
        if code != CloseCode.NORMAL:
            raise self._gone[party]

    def _peer_error(self, party: str, error: below.TransportsError) -> PeerError:
        if isinstance(error, below.Refused):
            return PeerRefusedUs(f"no session: {error}", party=party, **_REFUSALS[error.reason])
        if isinstance(error, below.PeerMisbehaved):
            return PeerMisbehaved(
                f"{error}", party=party, expected="only frames of this session, each once, unaltered and in order"
            )
        if isinstance(error, below.Restarted):
            return PeerLost(
                f"cannot go on: {error}",
                party=party,
                expected="every party to stay up for the whole run, and one process for each key",
                fix="look whether one of the two was restarted, or runs twice; then start all parties again",
            )
        if isinstance(error, below.Lost):
            if party in self._opened:
                return PeerLost(
                    f"was lost: {error}",
                    party=party,
                    fix=f"look whether {party} still runs and is connected" + self._relays_to(party),
                )
            return PeerUnreachable(
                str(error).removeprefix("the peer ")
                if "did not come up" in str(error)
                else f"did not come up: {error}",
                party=party,
                fix="start that party, check its log"
                + self._relays_to(party)
                + ", or raise `timeouts: {connect: ...}` in the graph file",
            )
        return PeerLost(f"cannot be sent to: {error}", party=party)

    def _relays_to(self, party: str) -> str:
        """Who else may be at fault."""
        relays = {name for one in self.plan.circuits if party in one[:2] for route in one.routes for name in route}
        return f"; look at the relays on the way, too ({', '.join(sorted(relays))})" if relays else ""

    def close(self, reason: int = CloseCode.NORMAL, linger: float = 5.0) -> None:
        """Send what is queued, say goodbye with ``reason``, and give the sockets back.

        Those on call hear of one reason only that a run fails: another might tell whose it was.
        """
        if reason not in (CloseCode.NORMAL, CloseCode.ERROR):
            for party in self.on_call:
                if party in self._opened and party not in self._gone:
                    self._thread.close_peer(self._keys[party], CloseCode.ERROR, "this party stops")
        self._thread.close(reason, linger)


_GOODBYES: Final[dict[int, tuple[str, str]]] = {
    CloseCode.NORMAL: ("left before the run was over", "look whether it runs the same graph file"),
    CloseCode.ERROR: (
        "stopped: it failed, or lost another party that it needs",
        "its operator can read which in its log",
    ),
    CloseCode.MISBEHAVED: ("closed the channel: it says that we sent what the graph does not allow", "read its log"),
    CloseCode.LOST: ("closed the channel: it had not heard from us for too long", "look at the connection"),
    CloseCode.STOPPED: ("was stopped by its operator", "ask there"),
    CloseCode.RESTARTED: ("was started anew", "start all parties again"),
}

_REFUSALS: Final[dict[below.RefusalReason, dict[str, str]]] = {
    below.RefusalReason.VERSION: {
        "expected": "the same protocol version on both sides",
        "fix": "install the same splitsec release at both parties",
    },
    below.RefusalReason.DIGEST_DIFFERS: {
        "expected": "the same values in the graph file at every party",
        "fix": "compare both graph files (`splitsec check graph.yaml` prints the digest)",
    },
    below.RefusalReason.WRONG_KEY: {
        "expected": "the party at that address to hold the key that the graph file gives it",
        "fix": "compare its key in the graph file with `splitsec keys show` at that party",
    },
    below.RefusalReason.UNKNOWN_KEY: {
        "expected": "our key to stand in the peer's graph file",
        "fix": "check that our key file belongs to the key that the graph file gives us",
    },
    below.RefusalReason.BUSY: {"expected": "a free place", "fix": "look whether this party is running twice"},
}


def _row_by_row(message: Message) -> Message:
    """``message`` with its tensors laid out as torch does by default: how one lies in memory may be its maker's own."""
    tensors = {name: one.clone(memory_format=torch.contiguous_format) for name, one in message.tensors.items()}
    return Message(message.kind, message.key, message.facts, tensors) if tensors else message


def _passed(out: bool, lane: Lane, message: Message, header_bytes: int, body_bytes: int, waited: float = 0.0) -> Passed:
    tensors = tuple((NAMES[tensor.dtype], tuple(tensor.shape)) for tensor in message.tensors.values())
    return Passed(out, lane, message.key, header_bytes, body_bytes, tensors, waited)


def _declaration(lane: Lane) -> str:
    if not lane.dtype:
        return f"{lane.kind} messages"
    shape = ", ".join("any" if extent is None else str(extent) for extent in lane.shape)
    rows = "" if lane.rows is None else f"up to {lane.rows} samples of "
    coded = "" if lane.codec is None else f" as {lane.codec} has it"
    return f"{rows}shape [{shape}], {lane.dtype}{coded}, finite, each once and in order"


def _advice(complaint: str) -> str:
    if "NaN" in complaint:
        return "look for NaN in what you send; while training, also try a smaller learning rate"
    return "make what is sent and the graph file agree"


def _misplaced(lane: Lane, message: Message, last: tuple[int, ...] | None) -> str | None:
    """What is wrong with the kind and the place of ``message`` on ``lane``, or None."""
    if message.kind != lane.kind:
        return f"a {message.kind[:40]!r} message"
    if len(message.key) != (due := KEY_LENGTHS.get(lane.kind, 2)):
        return "no step and micro-batch" if due == 2 else f"{len(message.key)} numbers to place it"
    if message.key and last is not None and message.key <= last:
        return f"message {message.key} after {last}"
    return None


def _complaint(lane: Lane, message: Message, last: tuple[int, ...] | None) -> str | None:
    """What is wrong with ``message`` on ``lane``, or None: of tensors before a codec or after it.  The same rules in
    both directions.
    """
    if (misplaced := _misplaced(lane, message, last)) is not None:
        return misplaced
    if message.facts and lane.kind not in ("control", "order", "weights"):
        return "facts beside the tensor"
    tensors = message.tensors
    if lane.kind == "gradient" and not tensors:
        return None  # the empty answer of a step without training; ``engine`` refuses it while training
    if lane.kind in ("activation", "gradient", "labels", "exchange"):
        if len(tensors) != 1:
            return f"{len(tensors)} tensors"
    elif lane.kind in ("control", "taken"):
        return f"{len(tensors)} tensors" if tensors else None
    for tensor in tensors.values():
        if lane.dtype:
            shape = tuple(tensor.shape)
            if lane.rows is not None:
                if not shape or not 0 < shape[0] <= lane.rows:
                    return f"shape {list(shape)}"
                shape = shape[1:]
            if len(shape) != len(lane.shape) or any(
                want is not None and want != got for want, got in zip(lane.shape, shape, strict=True)
            ):
                return f"shape {list(tensor.shape)}"
            if NAMES.get(tensor.dtype) != lane.dtype:
                return f"dtype {str(tensor.dtype).removeprefix('torch.')}"
    size = sum(tensor.nbytes for tensor in tensors.values())  # as they unfold: repeated numbers travel once
    if size > lane.max_body and lane.codec is None:  # with one, rows and shape are the bound
        return f"{size} bytes, where {lane.max_body} are the most"
    return None if all(map(finite, tensors.values())) else "NaN or infinite values"
