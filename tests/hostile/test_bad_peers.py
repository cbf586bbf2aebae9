"""A peer with the right key that breaks the rules harms its own channel and nothing else.

The victim is a real party over tcp: door, channel, I/O thread.  The offender holds the key that the graph names, and
writes on the wire whatever a test says (``BadPeer``).  For each misdeed: whoever waits for the offender is told; the
operator's log has the reason, with its name or key; the offender hears a code and nothing else; and a third party goes
on exchanging tensors with the victim.
"""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import pytest
import torch

from splitsec.contract import digest
from splitsec.errors import PeerMisbehaved
from splitsec.graph import Graph, parse_graph
from splitsec.identity import public_of, public_text
from splitsec.messages import Message, encode
from splitsec.messaging import Line, open_line
from splitsec.plan import exchange_lane
from splitsec.transports import iothread
from splitsec.transports.circuit import Built, Ended, Memory, Origin, Sizes
from splitsec.transports.errors import Lost
from splitsec.transports.errors import PeerMisbehaved as TransportsMisbehaved
from splitsec.transports.iothread import CloseCode, Closed, IOThread, Opened, Peer, Received
from splitsec.transports.layer import Asking
from splitsec.transports.limits import CELL_HEAD, HEADER_MAX, SMALL_CELL
from splitsec.transports.session import Cell
from splitsec.transports.testing import lend
from splitsec.transports.wire import CELL_KINDS, NO_RUN, ChunkHeader, Kind, Ready, Why, pack_chunk_header, pack_ready
from tests.conftest import free_port

from .conftest import DIGEST, LANE, PATIENCE, BadPeer, Heard, Victim

GRAPH: Final = """\
splitsec: 1
name: three
parties:
  offender: {key: "OFFENDER"}
  honest: {key: "HONEST"}
  server: {key: "SERVER", listen: "tcp://127.0.0.1:PORT"}
exchanges:
  - {name: histogram, from: offender, to: server, shape: [null, 16], dtype: float32, max_bytes: 6400}
  - {name: counts, from: offender, to: server, shape: [4], dtype: int64}
  - {name: volume, from: offender, to: server, shape: [null], dtype: uint8, max_bytes: 4000000}
  - {name: notice, from: server, to: offender, shape: [3], dtype: int64}
  - {name: report, from: honest, to: server, shape: [3], dtype: int64}
  - {name: answer, from: server, to: honest, shape: [3], dtype: int64}
timeouts: {connect: 60, lost: 20}
"""

WINDOW: Final = 1 << 20
"""Bytes, in place of the channel's 64 MiB."""

SECRETS: Final = ("histogram", "counts", "notice", "lane", "shape", "float32", "honest", "window", "declared")
"""What the offender might like to read in what it is told."""


@dataclass
class Scene:
    """Three parties, all connected."""

    graph: Graph
    keys: Mapping[str, bytes]
    server: Line
    honest: Line
    offender: BadPeer

    def lane(self, name: str) -> int:
        return exchange_lane(self.graph, name)

    def say(self, exchange: str, tensor: torch.Tensor, *, number: int = 0, place: tuple[int, ...] = (1,)) -> None:
        """A well-formed message, from the offender, whatever the graph says about the tensor."""
        header, body = encode(Message("exchange", place, tensors={exchange: tensor}))
        self.offender.message(self.lane(exchange), header, b"".join(body), number)

    @property
    def number(self) -> int:
        """Of a circuit that is the offender's to name."""
        return 2 | (public_of(self.keys["offender"]) > public_of(self.keys["server"]))

    def key_of(self, party: str) -> str:
        return base64.b64encode(public_of(self.keys[party])).decode()

    def the_others_go_on(self) -> None:
        """Both ways, several times."""
        for number in range(5):
            self.honest.send("report", torch.tensor([number, 2, 3]))
            assert self.server.receive("report").tolist() == [number, 2, 3]
            self.server.send("answer", torch.tensor([4, 5, number]))
            assert self.honest.receive("answer").tolist() == [4, 5, number]


def drawn() -> tuple[Graph, dict[str, bytes]]:
    """The graph, and private keys."""
    keys = {party: os.urandom(32) for party in ("offender", "honest", "server")}
    text = GRAPH.replace("PORT", str(free_port()))
    for party, key in keys.items():
        text = text.replace(party.upper(), public_text(public_of(key)))
    return parse_graph(text), keys


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Scene]:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(iothread, "LINK_WINDOW", WINDOW)
    monkeypatch.setattr(iothread, "BUSY_RETRY_SECONDS", 0.05)  # what a goodbye is given to leave
    graph, keys = drawn()
    address = graph.parties["server"].listen or ""

    def open_(party: str) -> Line:
        return open_line(graph, party, private_key=keys[party])

    with ThreadPoolExecutor(2) as pool:
        lines = [pool.submit(open_, party) for party in ("server", "honest")]
        honest = lines[1].result(PATIENCE)  # so the server listens
        offender = BadPeer(address, keys["offender"], public_of(keys["server"]), digest(graph)).comes_in()
        server = lines[0].result(PATIENCE)
    with offender, honest, server:
        yield Scene(graph, keys, server, honest, offender)


# --- misdeeds


def lane_of_nobody(scene: Scene) -> None:
    scene.offender.message(999, *encoded("histogram", torch.ones(1, 16)))


def lane_of_somebody_else(scene: Scene) -> None:
    scene.offender.message(scene.lane("report"), *encoded("report", torch.tensor([1, 2, 3])))


def lane_of_the_other_direction(scene: Scene) -> None:
    scene.offender.message(scene.lane("notice"), *encoded("notice", torch.tensor([1, 2, 3])))


def wrong_shape(scene: Scene) -> None:
    scene.say("histogram", torch.ones(2, 15))


def wrong_number_of_dimensions(scene: Scene) -> None:
    scene.say("histogram", torch.ones(16))


def wrong_dtype(scene: Scene) -> None:
    scene.say("histogram", torch.ones(2, 16, dtype=torch.float64))


def too_many_bytes(scene: Scene) -> None:
    """Claimed only: not one of them is sent."""
    scene.offender.say(ChunkHeader(Kind.CHUNK, scene.lane("histogram"), 10, 6401, 10, 0), b"x" * 10)


def too_many_bytes_once_unfolded(scene: Scene) -> None:
    """One number, said to stand for a million."""
    scene.say("histogram", torch.ones(1, 1).expand(65_536, 16))


def nan(scene: Scene) -> None:
    scene.say("histogram", torch.tensor([[float("nan")] + 15 * [1.0]]))


def infinity(scene: Scene) -> None:
    scene.say("histogram", torch.full((1, 16), -float("inf")))


def the_same_place_twice(scene: Scene) -> None:
    scene.say("counts", torch.arange(4))
    scene.say("counts", torch.arange(4), number=1)


def no_place(scene: Scene) -> None:
    scene.say("counts", torch.arange(4), place=())


def another_kind(scene: Scene) -> None:
    header, body = encode(Message("labels", (1,), tensors={"": torch.arange(4)}))
    scene.offender.message(scene.lane("counts"), header, b"".join(body))


def another_kind_with_a_terminals_commands(scene: Scene) -> None:
    header, body = encode(Message("\x1b[2J\n\r", (1,), tensors={"": torch.arange(4)}))
    scene.offender.message(scene.lane("counts"), header, b"".join(body))


def facts_beside_the_tensor(scene: Scene) -> None:
    header, body = encode(Message("exchange", (1,), {"patient": "0001"}, {"": torch.arange(4)}))
    scene.offender.message(scene.lane("counts"), header, b"".join(body))


def a_header_that_is_no_msgpack(scene: Scene) -> None:
    scene.offender.message(scene.lane("counts"), b"\xc1" * 20, bytes(32))


def a_header_nested_deeply(scene: Scene) -> None:
    scene.offender.message(scene.lane("counts"), b"\x91" * 4000, bytes(32))


def a_header_that_claims_a_large_list(scene: Scene) -> None:
    scene.offender.message(scene.lane("counts"), b"\x94\xa8exchange\x91\x01\x80\xdd\xff\xff\xff\xff", bytes(32))


def a_tensor_larger_than_its_body(scene: Scene) -> None:
    header, _ = encoded("counts", torch.arange(4))
    scene.offender.message(scene.lane("counts"), header, bytes(31))


def a_body_longer_than_its_tensor(scene: Scene) -> None:
    header, _ = encoded("counts", torch.arange(4))
    scene.offender.message(scene.lane("counts"), header, bytes(33))


def a_header_too_long_for_one_tensor(scene: Scene) -> None:
    scene.offender.message(scene.lane("counts"), bytes(5000))


def a_header_too_long_for_any_message(scene: Scene) -> None:
    scene.offender.say(ChunkHeader(Kind.CHUNK, scene.lane("counts"), HEADER_MAX + 1, 0, 10, 0), b"x" * 10)


def a_message_out_of_turn(scene: Scene) -> None:
    scene.say("counts", torch.arange(4), number=1)


def a_chunk_of_another_message(scene: Scene) -> None:
    lane = scene.lane("histogram")
    scene.offender.say(ChunkHeader(Kind.CHUNK, lane, 10, 100, 10, 0), b"x" * 10)
    scene.offender.say(ChunkHeader(Kind.CHUNK, lane, 10, 200, 10, 0), b"x" * 10)


def an_empty_chunk_of_a_message(scene: Scene) -> None:
    scene.offender.say(ChunkHeader(Kind.CHUNK, scene.lane("histogram"), 10, 100, 0, 0))


def a_flood_over_the_window(scene: Scene) -> None:
    """Nobody has taken anything yet."""
    for number in range(3):
        scene.say("volume", torch.zeros(WINDOW // 2, dtype=torch.uint8), number=number, place=(number,))


def more_messages_than_may_wait(scene: Scene) -> None:
    for number in range(1026):
        scene.say("counts", torch.arange(4), number=number, place=(number,))


def a_circuit_by_a_number_that_is_ours_to_give(scene: Scene) -> None:
    scene.offender.say_cell(ChunkHeader(Kind.CREATE, number=scene.number ^ 1), b"a handshake")


def a_circuit_by_a_number_that_is_taken(scene: Scene) -> None:
    asking = Asking(public_of(scene.keys["server"]), digest(scene.graph))
    for _ in range(2):
        scene.offender.say_cell(ChunkHeader(Kind.CREATE, value=1 << 20, number=scene.number), asking.message)


def a_cell_in_a_frame_that_is_none(scene: Scene) -> None:
    scene.offender.say(ChunkHeader(Kind.CELL, payload_size=100, number=scene.number), bytes(100))


def a_frame_in_place_of_a_cell(scene: Scene) -> None:
    scene.offender.say_cell(ChunkHeader(Kind.PING))


def an_unknown_kind_of_frame(scene: Scene) -> None:
    scene.offender.say(b"\x63" + pack_chunk_header(ChunkHeader(Kind.PING))[1:])


def fields_that_are_not_the_kinds_own(scene: Scene) -> None:
    scene.offender.say(ChunkHeader(Kind.PING, lane=3))


def ready_once_more(scene: Scene) -> None:
    header, payload = pack_ready(Ready(os.urandom(16), NO_RUN, 0, 1 << 40))
    scene.offender.say(header, payload)


def having_received_what_was_never_sent(scene: Scene) -> None:
    scene.offender.received = 1000
    scene.offender.say(ChunkHeader(Kind.PING))


def a_goodbye_of_unknown_meaning(scene: Scene) -> None:
    scene.offender.say(ChunkHeader(Kind.CLOSE, number=99))


def encoded(name: str, tensor: torch.Tensor) -> tuple[bytes, bytes]:
    header, body = encode(Message("exchange", (1,), tensors={name: tensor}))
    return header, b"".join(body)


MISDEEDS: Final[dict[Callable[[Scene], None], str]] = {
    lane_of_nobody: "a message on lane 999, which is not declared",
    lane_of_somebody_else: "a message on lane 20, which is not declared",
    lane_of_the_other_direction: "a message on lane 19, which is not declared",
    wrong_shape: "exchange of histogram: shape [2, 15]",
    wrong_number_of_dimensions: "exchange of histogram: shape [16]",
    wrong_dtype: "exchange of histogram: dtype float64",
    too_many_bytes: "a message of 6401 bytes on lane 16, which takes at most 6400",
    too_many_bytes_once_unfolded: "exchange of histogram: 4194304 bytes, where 6400 are the most",
    nan: "exchange of histogram: NaN or infinite values",
    infinity: "exchange of histogram: NaN or infinite values",
    the_same_place_twice: "exchange of counts: message (1,) after (1,)",
    no_place: "exchange of counts: 0 numbers to place it",
    another_kind: "exchange of counts: a 'labels' message",
    another_kind_with_a_terminals_commands: r"exchange of counts: a '\x1b[2J\n\r' message",
    facts_beside_the_tensor: "exchange of counts: facts beside the tensor",
    a_header_that_is_no_msgpack: "sent an unreadable message for counts: the header is not msgpack",
    a_header_nested_deeply: "sent an unreadable message for counts: the header is not msgpack",
    a_header_that_claims_a_large_list: "sent an unreadable message for counts: the header is not msgpack",
    a_tensor_larger_than_its_body: "sent an unreadable message for counts: the body is shorter than its tensors",
    a_body_longer_than_its_tensor: "sent an unreadable message for counts: the body is longer than its tensors",
    a_header_too_long_for_one_tensor: "sent a header of 5000 bytes for counts",
    a_header_too_long_for_any_message: "a message with a header of 1048577 bytes; at most 1048576 are allowed",
    a_message_out_of_turn: "message 1 on lane 17 out of order",
    a_chunk_of_another_message: "a chunk on lane 16 that does not belong to the message begun there",
    an_empty_chunk_of_a_message: "a chunk of 0 bytes where at most 110 are due, and at least one",
    a_flood_over_the_window: "more bytes than the window allows",
    more_messages_than_may_wait: "exchange of counts: more than 1024 messages ahead of us",
    a_circuit_by_a_number_that_is_ours_to_give: "a circuit by a number that is taken, or not the peer's to give",
    a_circuit_by_a_number_that_is_taken: "a circuit by a number that is taken, or not the peer's to give",
    a_cell_in_a_frame_that_is_none: "a CELL frame in an open session",
    a_frame_in_place_of_a_cell: "a PING in the frame of a cell",
    an_unknown_kind_of_frame: "a frame of unknown kind 99",
    fields_that_are_not_the_kinds_own: "a PING frame that uses fields which are not its own",
    ready_once_more: "a READY frame to a session that is open",
    having_received_what_was_never_sent: "it says that it has 1000 chunks; between 0 and 0 can be",
    a_goodbye_of_unknown_meaning: "a goodbye with unknown code 99",
}
"""What the offender does, and what the operator reads."""


@pytest.mark.threat("T28")
@pytest.mark.parametrize("misdeed", MISDEEDS, ids=lambda misdeed: misdeed.__name__)
def test_it_closes_its_own_channel_and_no_other(
    misdeed: Callable[[Scene], None], scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    reason = MISDEEDS[misdeed]
    scene.the_others_go_on()
    misdeed(scene)
    with pytest.raises(PeerMisbehaved) as told:
        scene.server.receive("histogram")
    assert told.value.party == "offender"
    assert reason in told.value.seen
    assert only_a_code(scene.offender.hear_out()) is CloseCode.MISBEHAVED
    with pytest.raises(PeerMisbehaved):
        scene.server.send("notice", torch.tensor([1, 2, 3]))
    scene.the_others_go_on()
    logged = [record.getMessage() for record in caplog.records]
    (closed,) = [line for line in logged if line.startswith("closed the channel with")]
    assert closed == f"closed the channel with offender: {told.value.seen}"
    assert any(line.startswith("offender: ") and reason in line for line in logged)
    assert len(logged) == 2
    assert not any(character < " " for line in logged for character in line.replace("\n", ""))


def only_a_code(heard: list[Heard]) -> CloseCode:
    """The code of the one goodbye, after which nothing came.  Before it, nothing but the channel's own bookkeeping."""
    *before, last = [frame for frame in heard if frame.header.kind is not Kind.CREATED]
    assert {frame.header.kind for frame in before} <= {Kind.GRANT, Kind.PING, Kind.PONG}
    assert all(frame.payload == b"" for frame in (*before, last))
    code = CloseCode(last.header.number)
    assert last.header == ChunkHeader(Kind.CLOSE, number=code, received=last.header.received)
    return code


def test_a_flood_of_nan_is_one_line_in_the_log(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """What came in behind the first is not even looked at."""
    for number in range(200):
        scene.say("histogram", torch.full((1, 16), float("nan")), number=number, place=(number,))
    with pytest.raises(PeerMisbehaved, match="NaN"):
        scene.server.receive("histogram")
    scene.the_others_go_on()
    assert len(caplog.records) == 2


def test_who_was_put_out_does_not_come_back(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """It still has its key, and may try as often as it likes: it hears a code each time, and the log stays short."""
    nan(scene)
    with pytest.raises(PeerMisbehaved):
        scene.server.receive("histogram")
    scene.offender.hear_out()
    address, victim = scene.graph.parties["server"].listen or "", public_of(scene.keys["server"])
    for _ in range(20):
        with BadPeer(address, scene.keys["offender"], victim, digest(scene.graph)) as again:
            header, payload = pack_ready(Ready(os.urandom(16), NO_RUN, 0, 1 << 40))
            again.say(header, payload)
            assert only_a_code(again.hear_out()) is CloseCode.RESTARTED
    scene.the_others_go_on()
    with pytest.raises(PeerMisbehaved):
        scene.server.receive("histogram")
    assert len(caplog.records) <= 15


def test_an_offender_of_our_own_make_is_told_no_more() -> None:
    """The same, as ``IOThread`` tells it: an error without a reason."""
    graph, keys = drawn()
    lane = exchange_lane(graph, "histogram")
    notice = {exchange_lane(graph, "notice"): 100}
    peer = Peer(public_of(keys["server"]), dial=graph.parties["server"].listen, lanes=notice)
    offender = IOThread(private_key=keys["offender"], digest=digest(graph), peers=[peer], connect_timeout=PATIENCE)
    with ThreadPoolExecutor(2) as pool, offender:
        opening = [pool.submit(open_line, graph, party, private_key=keys[party]) for party in ("server", "honest")]
        assert offender.receive(PATIENCE) == Opened(peer.key)
        with opening[0].result(PATIENCE) as server, opening[1].result(PATIENCE):
            header, body = encode(Message("exchange", (1,), tensors={"histogram": torch.full((1, 16), float("nan"))}))
            offender.send(peer.key, lane, header, body)
            with pytest.raises(PeerMisbehaved):
                server.receive("histogram")
            closed = offender.receive(PATIENCE)
            assert isinstance(closed, Closed)
            assert (closed.peer, closed.code) == (peer.key, CloseCode.MISBEHAVED)
            assert isinstance(closed.error, Lost)
            assert not any(word in str(closed.error).lower() for word in (*SECRETS, "nan"))
            with pytest.raises(Lost):
                offender.send(peer.key, lane, header, body)


# --- where the victim is a relay


class Building:
    """A circuit of the offender's own, by our machine, over the one line that it has."""

    def __init__(self, offender: BadPeer, private_key: bytes, hops: list[bytes], place: int = 1) -> None:
        self.offender = offender
        number = 2 * place | (public_of(private_key) > hops[0])
        sizes = Sizes(None, SMALL_CELL * 4, SMALL_CELL * 16)
        self.origin = Origin(number, hops, digest=DIGEST, sizes=sizes, memory=Memory(), now=0.0)
        self.happened: list[object] = []

    def outcome(self) -> Ended | Built:
        """Speak and hear until the circuit is over, or stands."""
        while not self.happened:
            self.say()
            heard = self.offender.hear()
            if heard.header.kind in CELL_KINDS:
                self.hear(heard)
        self.say()
        (event,) = self.happened
        assert isinstance(event, Ended | Built)
        return event

    def say(self) -> None:
        """All that is due."""
        while (cell := self.origin.next_cell(self.origin.leg, lend)) is not None:
            self.offender.say_cell(cell[0], cell[2] or bytes(cell[1][CELL_HEAD:]), len(cell[1]) - CELL_HEAD)

    def hear(self, heard: Heard) -> None:
        """A cell of the victim's."""
        room = memoryview(bytearray(b"\0" + heard.payload))
        self.happened += self.origin.receive(self.origin.leg, Cell(heard.header, room, SMALL_CELL), 0.0)


def test_who_asks_to_be_passed_on_to_a_stranger_loses_its_circuit_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The victim passes circuits on between each of two and a fourth party, and between them alone."""
    caplog.set_level(logging.WARNING)
    private = {number: bytes([number]) * 32 for number in (1, 2, 3, 4)}
    key = {number: public_of(value) for number, value in private.items()}
    lanes = {LANE: 1000}
    with IOThread(
        private_key=private[1],
        digest=DIGEST,
        peers=[Peer(key[number], lanes=lanes) for number in (2, 3, 4)],
        listen="tcp://127.0.0.1:*",
        passages=[(key[2], key[4]), (key[3], key[4])],
    ) as victim:
        address = victim.endpoint or ""
        with (
            IOThread(private_key=private[2], digest=DIGEST, peers=[Peer(key[1], dial=address, lanes=lanes)]) as honest,
            BadPeer(address, private[3], key[1], DIGEST).comes_in() as offender,
        ):
            assert {victim.receive(PATIENCE), victim.receive(PATIENCE)} == {Opened(key[2]), Opened(key[3])}
            assert honest.receive(PATIENCE) == Opened(key[1])
            # The second is there, and not for it; to the fourth it may go, though nobody is there; the last is unknown.
            for whom in (key[2], key[4], os.urandom(32)):
                assert Building(offender, private[3], [key[1], whom]).outcome() == Ended(Why.UNREACHABLE, 0)
            offender.message(LANE, b"still here")
            assert victim.receive(PATIENCE) == Received(key[3], LANE, b"still here", memoryview(b""))
            honest.send(key[1], LANE, b"here")
            assert victim.receive(PATIENCE) == Received(key[2], LANE, b"here", memoryview(b""))
            victim.send(key[2], LANE, b"there")
            assert honest.receive(PATIENCE) == Received(key[1], LANE, b"there", memoryview(b""))
            assert not victim._driver._states[key[2]].legs
            assert caplog.records == []


def test_who_builds_more_circuits_than_the_contract_has_is_told_that_we_are_busy() -> None:
    """Twice as many as there may be, since an old one may not be over yet; others have their own."""
    private = {number: bytes([number]) * 32 for number in (1, 2, 3, 4)}
    key = {number: public_of(value) for number, value in private.items()}
    peers = [Peer(key[number], cells_only=True) for number in (2, 3, 4)]
    passages = [(key[2], key[4]), (key[3], key[4])]
    with IOThread(
        private_key=private[1], digest=DIGEST, peers=peers, listen="tcp://127.0.0.1:*", passages=passages
    ) as io:
        address = io.endpoint or ""
        to_relay = Peer(key[1], dial=address, cells_only=True)
        fourth = [to_relay, *(Peer(key[number], routes=((key[1],),), lanes={LANE: 1000}) for number in (2, 3))]
        honest = [to_relay, Peer(key[4], routes=((key[1],),), initiator=True, lanes={LANE: 1000})]
        with (
            IOThread(private_key=private[4], digest=DIGEST, peers=fourth) as far,
            BadPeer(address, private[3], key[1], DIGEST).comes_in() as offender,
        ):
            while not io._driver._states[key[4]].is_open:
                assert far.receive(0.02) is None
            outcomes = [Building(offender, private[3], [key[1], key[4]], place).outcome() for place in range(1, 6)]
            assert outcomes == [Built(), Built()] + [Ended(Why.BUSY, 0)] * 3
            with IOThread(private_key=private[2], digest=DIGEST, peers=honest) as near:
                assert near.receive(PATIENCE) == Opened(key[4])
                assert far.receive(PATIENCE) == Opened(key[2])


# --- while the victim computes, and takes nothing


@pytest.mark.threat("T30")
def test_a_flood_of_empty_messages_is_bounded_like_any_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They have no bytes for the window to count, but each takes memory until somebody takes it."""
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(iothread, "LINK_WINDOW", WINDOW)
    victim = Victim()
    try:
        with victim.dialer() as friend, BadPeer(victim.address, bytes([3]) * 32, victim.key, DIGEST) as offender:
            friend.comes_in()
            assert victim.next() == Opened(friend.key)
            offender.comes_in()
            with suppress(ConnectionError):
                for number in range(WINDOW // 100):
                    offender.message(LANE, b"", number=number)
            taken = []
            while not isinstance(event := victim.next(), Closed):
                taken.append(event)
            assert taken[0] == Opened(event.peer) and len(taken) < WINDOW // 100
            assert isinstance(event.error, TransportsMisbehaved) and "window" in str(event.error)
            assert event.code is CloseCode.MISBEHAVED
            assert len(caplog.records) == 1
            victim.exchanges_with(friend)
    finally:
        victim.close()


# --- before READY


@pytest.mark.parametrize("kind", [Kind.CHUNK, Kind.PING, Kind.GRANT, Kind.CREATE, Kind.REKEY])
def test_who_begins_before_ready_gets_nothing_and_may_start_over(kind: Kind, victim: Victim) -> None:
    """Nothing has been promised to it yet: the attempt ends, and the channel can still come to be."""
    payload = b"too soon" if kind in (Kind.CHUNK, Kind.CREATE) else b""
    header = ChunkHeader(kind, payload_size=len(payload))
    if kind is Kind.CHUNK:
        header = header._replace(lane=LANE, value=len(payload))
    with victim.dialer() as friend:
        friend.comes_in()
        assert victim.next() == Opened(friend.key)
        with BadPeer(victim.address, bytes([3]) * 32, victim.key, DIGEST) as offender:
            if kind is Kind.CREATE:
                offender.say_cell(header, payload)
            else:
                offender.say(header, payload)
            assert offender.hear_out() == []
        victim.exchanges_with(friend)
        with BadPeer(victim.address, bytes([3]) * 32, victim.key, DIGEST).comes_in():
            assert victim.next() == Opened(public_of(bytes([3]) * 32))
