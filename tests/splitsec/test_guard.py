"""The one door: what the graph does not declare goes neither out nor in, and nothing is sent when it is refused.

The real guard over the plans of a real graph; in the place of the I/O thread stands one that remembers what it was
given to send, and hands out the events it was given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from splitsec.errors import EgressRefused, PeerError, PeerLost, PeerMisbehaved, PeerRefusedUs, PeerUnreachable
from splitsec.graph import parse_graph
from splitsec.guard import Guard
from splitsec.messages import Message, encode
from splitsec.plan import CONTROL, ORDER, Lane, make_plan
from splitsec.transports import errors as below
from splitsec.transports.errors import Lost, RefusalReason, Refused
from splitsec.transports.iothread import CloseCode, Closed, Event, Opened, Received

GRAPH = parse_graph("""\
splitsec: 1
name: door
parties:
  clinic: {}
  registry: {}
  server: {listen: "tcp://127.0.0.1:7400"}
segments:
  stem: {at: clinic, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [4, 2], dtype: float32}
labels:
  - {from: registry, to: trunk}
exchanges:
  - {name: histogram, from: clinic, to: server, shape: [null, 16], dtype: float64, max_bytes: 1280}
training: {batch_size: 6, micro_batches: 2, seed: 1}
""")

KEYS = {"clinic": b"c" * 32, "registry": b"r" * 32, "server": b"s" * 32}


class Thread:
    """Stands where the I/O thread does."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, int, bytes, bytes]] = []
        self.events: deque[Event] = deque()
        self.opened_peers: list[bytes] = []
        self.left_peers: list[bytes] = []
        self.closed_peers: list[tuple[bytes, int, str]] = []
        self.error: below.TransportsError | None = None
        self.closed: list[int] = []

    def send(
        self, peer: bytes, lane: int, header: bytes, body: Sequence[memoryview] = (), *, wait: bool = True
    ) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append((peer, lane, header, b"".join(body)))

    def receive(self, timeout: float | None = None) -> Event | None:
        assert self.events or timeout is not None, "it waits for what does not come"
        return self.events.popleft() if self.events else None

    def open_peer(self, peer: bytes) -> None:
        self.opened_peers.append(peer)

    def leave_peer(self, peer: bytes) -> None:
        self.left_peers.append(peer)

    def close_peer(self, peer: bytes, reason: int, why: str) -> None:
        self.closed_peers.append((peer, reason, why))

    def close(self, reason: int = CloseCode.NORMAL, linger: float = 5.0) -> None:
        self.closed.append(reason)


def door(party: str, *, exchanges: bool = False) -> tuple[Guard, Thread]:
    thread = Thread()
    keys = {name: key for name, key in KEYS.items() if name != party}
    return Guard(make_plan(GRAPH, party, exchanges=exchanges), keys, thread, connect_timeout=5), thread


def lane_of(party: str, kind: str, *, into: bool) -> Lane:
    plan = make_plan(GRAPH, party, exchanges=kind == "exchange")
    (lane,) = [lane for lane in (plan.lanes_in if into else plan.lanes_out).values() if lane.kind == kind]
    return lane


def to_server(kind: str) -> tuple[str, int]:
    return "server", lane_of("clinic", kind, into=False).number


def arrival(lane: int, message: Message, sender: str = "clinic") -> Received:
    header, body = encode(message)
    return Received(KEYS[sender], lane, header, memoryview(bytearray(b"".join(body))))


def activation(*shape: int, key: tuple[int, ...] = (0, 0), dtype: torch.dtype = torch.float32) -> Message:
    return Message("activation", key, tensors={"": torch.ones(shape, dtype=dtype)})


NAN = Message("activation", (0, 0), tensors={"": torch.tensor([[[1.0, 2], [3, 4], [5, float("nan")], [7, 8]]])})
INFINITE = Message("activation", (0, 0), tensors={"": torch.full((1, 4, 2), float("inf"))})

WRONG: dict[str, tuple[Message, str]] = {
    "another shape": (activation(3, 2, 4), "shape [3, 2, 4]"),
    "a dimension too few": (activation(3, 4), "shape [3, 4]"),
    "a dimension too many": (activation(3, 4, 2, 1), "shape [3, 4, 2, 1]"),
    "no dimension at all": (activation(), "shape []"),
    "no samples": (activation(0, 4, 2), "shape [0, 4, 2]"),
    "more samples than a micro-batch has": (activation(4, 4, 2), "shape [4, 4, 2]"),
    "another dtype": (activation(3, 4, 2, dtype=torch.float64), "dtype float64"),
    "another kind": (Message("labels", (0, 0), tensors={"": torch.ones(3, 4, 2)}), "a 'labels' message"),
    "no tensor": (Message("activation", (0, 0)), "0 tensors"),
    "two tensors": (Message("activation", (0, 0), tensors={"a": torch.ones(1, 4, 2), "b": torch.ones(1, 4, 2)}), "2 t"),
    "no place": (activation(3, 4, 2, key=()), "no step and micro-batch"),
    "half a place": (activation(3, 4, 2, key=(1,)), "no step and micro-batch"),
    "NaN": (NAN, "NaN or infinite values"),
    "infinity": (INFINITE, "NaN or infinite values"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_declared_so_does_not_leave(name: str) -> None:
    message, complaint = WRONG[name]
    guard, thread = door("clinic")
    with pytest.raises(EgressRefused, match="activation of stem -> trunk to server: ") as refused:
        guard.release(to_server("activation"), message)
    assert complaint in refused.value.seen
    assert refused.value.exit_code == 3
    assert "up to 3 samples of shape [4, 2], float32, finite, each once and in order" in str(refused.value)
    assert "nothing was sent" in str(refused.value)
    assert thread.sent == []
    assert dict(guard.traffic) == {}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_declared_so_does_not_enter(name: str) -> None:
    message, complaint = WRONG[name]
    guard, _ = door("server")
    lane = lane_of("server", "activation", into=True)
    with pytest.raises(PeerMisbehaved, match="clinic: activation of stem -> trunk: ") as misbehaved:
        guard.admit(arrival(lane.number, message))
    assert complaint in misbehaved.value.seen
    assert (misbehaved.value.party, misbehaved.value.exit_code) == ("clinic", 4)
    assert guard.peek(("clinic", lane.number)) is None


def test_what_is_declared_goes_out_and_in_unaltered() -> None:
    torch.manual_seed(2)
    sender, out = door("clinic")
    taker, _ = door("server")
    lane = to_server("activation")
    messages = [
        Message("activation", (0, 0), tensors={"": torch.randn(3, 4, 2)}),
        Message("activation", (0, 1), tensors={"": torch.randn(1, 4, 2)}),
        Message("activation", (1, 0), tensors={"": torch.randn(2, 4, 2)}),
    ]
    for message in messages:
        sender.release(lane, message)
    for peer, number, header, body in out.sent:
        assert (peer, number) == (KEYS["server"], lane[1])
        taker.admit(Received(KEYS["clinic"], number, header, memoryview(bytearray(body))))
    for message in messages:
        taken = taker.take(("clinic", lane[1]))
        assert taken.key == message.key
        assert torch.equal(taken.tensors[""], message.tensors[""])
    assert taker.peek(("clinic", lane[1])) is None
    passed = sender.traffic[lane]
    assert passed.messages == 3
    assert passed.bytes == sum(len(header) + len(body) for _, _, header, body in out.sent)


@pytest.mark.parametrize("key", [(1, 1), (1, 0), (0, 7)])
def test_a_message_repeated_or_older(key: tuple[int, int]) -> None:
    guard, thread = door("clinic")
    guard.release(to_server("activation"), activation(3, 4, 2, key=(1, 1)))
    with pytest.raises(EgressRefused, match=r"message \(\d, \d\) after \(1, 1\)"):
        guard.release(to_server("activation"), activation(3, 4, 2, key=key))
    assert len(thread.sent) == 1

    guard, _ = door("server")
    lane = lane_of("server", "activation", into=True).number
    guard.admit(arrival(lane, activation(3, 4, 2, key=(1, 1))))
    guard.take(("clinic", lane))
    with pytest.raises(PeerMisbehaved, match=r"clinic: .*message \(\d, \d\) after \(1, 1\)"):
        guard.admit(arrival(lane, activation(3, 4, 2, key=key)))
    assert guard.peek(("clinic", lane)) is None


def test_a_refused_message_does_not_use_up_its_place() -> None:
    guard, thread = door("clinic")
    with pytest.raises(EgressRefused):
        guard.release(to_server("activation"), activation(3, 2, 4, key=(5, 0)))
    guard.release(to_server("activation"), activation(3, 4, 2, key=(0, 0)))
    assert len(thread.sent) == 1


@pytest.mark.parametrize(
    "lane",
    [
        ("server", 999),  # no such lane
        ("registry", lane_of("clinic", "activation", into=False).number),  # not that peer's
        ("server", lane_of("clinic", "gradient", into=True).number),  # comes in, does not go out
        ("nobody", CONTROL),
    ],
)
def test_a_lane_that_is_not_declared(lane: tuple[str, int]) -> None:
    guard, thread = door("clinic")
    with pytest.raises(EgressRefused, match=f"activation message for {lane[0]} on lane {lane[1]}"):
        guard.release(lane, activation(3, 4, 2))
    assert thread.sent == []


def test_a_lane_that_is_not_declared_in() -> None:
    guard, _ = door("server")
    for sender, lane in (("clinic", 999), ("registry", lane_of("server", "activation", into=True).number)):
        with pytest.raises(PeerMisbehaved, match=f"{sender}: sent a message on lane {lane}"):
            guard.admit(arrival(lane, activation(3, 4, 2), sender))


def test_bytes_that_are_no_message() -> None:
    guard, _ = door("server")
    lane = lane_of("server", "activation", into=True).number
    with pytest.raises(PeerMisbehaved, match="clinic: sent an unreadable message for stem -> trunk: "):
        guard.admit(Received(KEYS["clinic"], lane, b"\xc1", memoryview(bytearray(4))))


def test_a_gradient_may_be_empty_and_an_activation_may_not() -> None:
    """In a step without training nothing comes back; an empty message says that the step is over."""
    guard, thread = door("server")
    back = "clinic", lane_of("server", "gradient", into=False).number
    guard.release(back, Message("gradient", (0, 0)))
    assert len(thread.sent) == 1
    with pytest.raises(EgressRefused, match="shape"):
        guard.release(back, Message("gradient", (0, 1), tensors={"": torch.ones(1, 2, 4)}))
    with pytest.raises(EgressRefused, match="no step and micro-batch"):
        guard.release(back, Message("gradient"))


def test_an_answer_comes_after_its_question() -> None:
    """A gradient for what was not sent yet is refused, however well-formed; later ones wait for their activations."""
    lane = lane_of("clinic", "gradient", into=True)

    def gradient(*key: int) -> Received:
        message = Message("gradient", key, tensors={"": torch.ones(3, 4, 2)})
        return arrival(lane.number, message, sender="server")

    for early in ((0, 0), (0, 1), (1000, 0)):
        guard, thread = door("clinic")
        with pytest.raises(PeerMisbehaved, match="an answer to what we have not sent"):
            guard.admit(gradient(*early))
        assert [peer for peer, *_ in thread.closed_peers] == [KEYS["server"]]
    guard, _ = door("clinic")
    guard.release(to_server("activation"), activation(3, 4, 2, key=(0, 0)))
    guard.admit(gradient(0, 0))
    with pytest.raises(PeerMisbehaved, match="an answer to what we have not sent"):
        guard.admit(gradient(0, 1))
    guard, _ = door("clinic")
    for key in ((0, 0), (0, 1)):
        guard.release(to_server("activation"), activation(3, 4, 2, key=key))
    for key in ((0, 0), (0, 1)):
        guard.admit(gradient(*key))


def test_that_labels_were_taken_comes_after_the_labels() -> None:
    guard, _ = door("registry")
    taken = lane_of("registry", "taken", into=True)
    labels = lane_of("registry", "labels", into=False)
    with pytest.raises(PeerMisbehaved, match="an answer to what we have not sent"):
        guard.admit(arrival(taken.number, Message("taken", (0, 0)), sender="server"))
    guard, _ = door("registry")
    guard.release(("server", labels.number), Message("labels", (0, 0), tensors={"": torch.zeros(3, dtype=torch.int64)}))
    guard.admit(arrival(taken.number, Message("taken", (0, 0)), sender="server"))


@pytest.mark.parametrize("kind", ["control", "taken"])
def test_lanes_that_carry_no_tensor(kind: str) -> None:
    guard, thread = door("server")
    lane = next(key for key, lane in guard.plan.lanes_out.items() if lane.kind == kind)
    key = (0, 0) if kind == "taken" else ()
    guard.release(lane, Message(kind, key))
    with pytest.raises(EgressRefused, match="1 tensors"):
        guard.release(lane, Message(kind, (0, 1) if key else (), tensors={"": torch.ones(1)}))
    assert len(thread.sent) == 1


def test_an_exchange() -> None:
    """Any number of rows of 16; no more bytes than the graph allows are accepted, and that is the lane's own limit."""
    guard, thread = door("clinic", exchanges=True)
    lane = to_server("exchange")
    guard.release(lane, Message("exchange", (1,), tensors={"histogram": torch.ones(10, 16, dtype=torch.float64)}))
    for wrong in (torch.ones(10, 15, dtype=torch.float64), torch.ones(10, 16), torch.ones(16, dtype=torch.float64)):
        with pytest.raises(EgressRefused, match="exchange of histogram to server"):
            guard.release(lane, Message("exchange", (2,), tensors={"histogram": wrong}))
    assert len(thread.sent) == 1
    assert lane_of("server", "exchange", into=True).max_body == 1280


def test_a_run_has_no_lane_for_exchanges_and_an_exchange_none_for_a_run() -> None:
    """Who sends on a lane that nobody takes from would fill memory."""
    run, alone = make_plan(GRAPH, "server"), make_plan(GRAPH, "server", exchanges=True)
    assert "exchange" not in {lane.kind for lane in run.lanes_in.values()}
    assert {lane.kind for lane in alone.lanes_in.values()} == {"exchange"}


def test_facts_beside_a_tensor_are_refused() -> None:
    guard, _ = door("server")
    lane = lane_of("server", "activation", into=True)
    message = activation(0, 0, 2)
    stuffed = Message(message.kind, message.key, {"more": "than a tensor"}, message.tensors)
    with pytest.raises(PeerMisbehaved, match="facts beside the tensor"):
        guard.admit(arrival(lane.number, stuffed))


def test_a_long_header_is_refused_before_it_is_read() -> None:
    guard, _ = door("server")
    with pytest.raises(PeerMisbehaved, match="sent a header of 5000 bytes"):
        guard.admit(Received(KEYS["clinic"], 0, b"\x00" * 5000, memoryview(bytearray())))


def test_an_exchange_of_more_bytes_than_the_graph_allows_does_not_leave() -> None:
    guard, thread = door("clinic", exchanges=True)
    with pytest.raises(EgressRefused, match="exchange of histogram to server: 1408 bytes"):
        guard.release(
            to_server("exchange"),
            Message("exchange", (1,), tensors={"histogram": torch.ones(11, 16, dtype=torch.float64)}),
        )
    assert thread.sent == []


# --- peers that come and go


def test_waiting_for_all_to_come() -> None:
    guard, thread = door("server")
    opened: list[str] = []
    guard.on_opened = opened.append
    thread.events += [Opened(KEYS["registry"]), Opened(KEYS["clinic"])]
    guard.open_all(["clinic", "registry"])
    assert opened == ["registry", "clinic"]


def test_who_does_not_come() -> None:
    guard, thread = door("server")
    thread.events.append(Opened(KEYS["registry"]))
    with pytest.raises(PeerUnreachable, match="clinic: did not come up within 5 s"):
        guard.open_all(["clinic", "registry"])


ENDS: list[tuple[below.TransportsError, type[PeerError], str]] = [
    (Refused(RefusalReason.DIGEST_DIFFERS, b"1" * 8, b"2" * 8), PeerRefusedUs, "the graphs differ"),
    (Refused(RefusalReason.WRONG_KEY), PeerRefusedUs, "the key that we expect there"),
    (Refused(RefusalReason.UNKNOWN_KEY), PeerRefusedUs, "does not name our key"),
    (Refused(RefusalReason.VERSION), PeerRefusedUs, "different versions"),
    (Refused(RefusalReason.BUSY), PeerRefusedUs, "no session is taken now"),
    (below.PeerMisbehaved("a record that is altered"), PeerMisbehaved, "a record that is altered"),
    (Lost("the connection broke"), PeerUnreachable, "did not come up"),
]


@pytest.mark.parametrize(("error", "kind", "words"), ENDS)
def test_each_error_from_below_names_the_party(error: below.TransportsError, kind: type[PeerError], words: str) -> None:
    guard, thread = door("server")
    code = CloseCode.LOST if isinstance(error, Lost) else CloseCode.ERROR
    thread.events.append(Closed(KEYS["clinic"], error, code))
    with pytest.raises(kind, match=words) as raised:
        guard.wait()
    assert raised.value.party == "clinic"
    assert str(raised.value).startswith("clinic: ")


def test_every_reason_to_refuse_has_advice() -> None:
    for reason in RefusalReason:
        guard, thread = door("server")
        thread.events.append(Closed(KEYS["clinic"], Refused(reason), CloseCode.ERROR))
        with pytest.raises(PeerRefusedUs) as raised:
            guard.wait()
        assert raised.value.expected and raised.value.fix


def test_a_peer_that_was_there_is_lost() -> None:
    guard, thread = door("server")
    thread.events += [Opened(KEYS["clinic"]), Closed(KEYS["clinic"], Lost("the connection broke"), CloseCode.LOST)]
    guard.wait()
    with pytest.raises(PeerLost, match="clinic: was lost: the connection broke"):
        guard.wait()
    with pytest.raises(PeerLost, match="was lost"):
        guard.release(("clinic", lane_of("server", "gradient", into=False).number), Message("gradient", (0, 0)))
    assert thread.sent == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (CloseCode.ERROR, "stopped: it failed, or lost another party that it needs"),
        (CloseCode.MISBEHAVED, "it says that we sent what the graph does not allow"),
        (CloseCode.STOPPED, "was stopped by its operator"),
    ],
)
def test_a_goodbye_says_why(code: CloseCode, words: str) -> None:
    """As the session below gives it: an error of kind Lost, beside the code that the peer sent."""
    guard, thread = door("server")
    left = Lost(f"the peer closed the channel ({code.name.lower()})")
    thread.events += [Opened(KEYS["clinic"]), Closed(KEYS["clinic"], left, code)]
    guard.wait()
    with pytest.raises(PeerLost, match=words):
        guard.wait()


def test_a_normal_goodbye_is_an_error_only_for_who_still_needs_the_peer() -> None:
    guard, thread = door("server")
    lane = lane_of("server", "activation", into=True).number
    thread.events += [
        Opened(KEYS["clinic"]),
        arrival(lane, activation(3, 4, 2)),
        Closed(KEYS["clinic"], None, CloseCode.NORMAL),
    ]
    for _ in range(3):
        assert guard.wait()
    assert guard.take(("clinic", lane)).key == (0, 0)  # what came before the goodbye is still there
    with pytest.raises(PeerLost, match="clinic: left before the run was over"):
        guard.take(("clinic", lane))


@pytest.mark.threat("T122")
def test_a_peer_that_is_connected_and_answers_nothing_is_given_up() -> None:
    thread = Thread()
    plan = make_plan(GRAPH, "clinic")
    guard = Guard(plan, {"server": KEYS["server"]}, thread, connect_timeout=5, answer_timeout=7.0)
    asked: list[float | None] = []
    receive = thread.receive

    def noted(timeout: float | None = None) -> Event | None:
        asked.append(timeout)
        return receive(timeout)

    thread.receive = noted  # type: ignore[method-assign]
    thread.events.append(Opened(KEYS["server"]))
    guard.wait_for_answer({"server"})
    with pytest.raises(PeerLost, match=r"server: is connected, but has sent nothing that the step needs for 7 s"):
        guard.wait_for_answer({"server"})
    assert asked == [7.0, 7.0]


def test_an_error_of_the_channel_while_sending() -> None:
    guard, thread = door("clinic")
    thread.events.append(Opened(KEYS["server"]))
    guard.wait()
    thread.error = Lost("nothing was heard for 20 s")
    with pytest.raises(PeerLost, match="server: was lost: nothing was heard for 20 s"):
        guard.release(to_server("activation"), activation(3, 4, 2))


def test_closing_passes_the_reason_on() -> None:
    guard, thread = door("clinic")
    guard.close(CloseCode.STOPPED)
    assert thread.closed == [CloseCode.STOPPED]


def test_every_lane_that_goes_out_comes_in_with_the_same_declaration() -> None:
    """Both ends of every lane, worked out by each party alone, agree in all but the name of the peer."""

    def seen(lane: Lane) -> dict[str, Any]:
        return {name: value for name, value in vars(lane).items() if name != "peer"}

    plans = {name: make_plan(GRAPH, name) for name in GRAPH.parties}
    count = 0
    for name, plan in plans.items():
        for (peer, number), lane in plan.lanes_out.items():
            assert seen(plans[peer].lanes_in[name, number]) == seen(lane)
            count += 1
    assert count == sum(len(plan.lanes_in) for plan in plans.values()) > 8
    assert ("registry", ORDER) in plans["clinic"].lanes_out


# --- a member of an anonymous group, and those outside it


def member() -> tuple[Guard, Thread]:
    """The clinic, as if it were one of several: the server is on call."""
    thread = Thread()
    keys = {name: key for name, key in KEYS.items() if name != "clinic"}
    return Guard(make_plan(GRAPH, "clinic"), keys, thread, connect_timeout=5, on_call=["server"]), thread


def called() -> tuple[Guard, Thread]:
    guard, thread = member()
    thread.events.append(Opened(KEYS["server"]))
    guard.call(guard.on_call)
    return guard, thread


def test_nobody_waits_for_those_on_call_nor_for_a_crowd() -> None:
    guard, thread = member()
    thread.events.append(Opened(KEYS["registry"]))
    guard.open_all(["registry", "server"])
    assert thread.opened_peers == []

    thread = Thread()
    keys = {name: key for name, key in KEYS.items() if name != "server"}
    guard = Guard(make_plan(GRAPH, "server"), keys, thread, connect_timeout=5, crowds=["clinic"])
    thread.events.append(Opened(KEYS["registry"]))
    guard.open_all(["registry", "clinic"])


@pytest.mark.threat("T79")
def test_a_channel_for_each_turn() -> None:
    guard, thread = called()
    lane = to_server("activation")
    guard.release(lane, activation(1, 4, 2, key=(0, 0)))
    guard.call(guard.on_call)  # it is there
    assert thread.opened_peers == [KEYS["server"]]

    closed: list[tuple[str, str]] = []
    guard.on_closed = lambda party, how: closed.append((party, how))
    thread.events.append(Closed(KEYS["server"], None, CloseCode.NORMAL))
    guard.part(guard.on_call)
    guard.part(guard.on_call)  # it is closed
    assert (thread.left_peers, closed) == ([KEYS["server"]], [("server", "normal")])

    thread.events.append(Opened(KEYS["server"]))
    guard.call(guard.on_call)
    assert thread.opened_peers == [KEYS["server"]] * 2
    with pytest.raises(EgressRefused, match=r"message \(0, 0\) after \(0, 0\)"):  # whoever it was before
        guard.release(lane, activation(1, 4, 2, key=(0, 0)))
    guard.release(lane, activation(1, 4, 2, key=(1, 0)))
    assert len(thread.sent) == 2


def test_between_turns_nothing_is_sent_to_those_on_call() -> None:
    guard, thread = member()
    words = "activation of stem -> trunk to server, with which there is no channel now"
    with pytest.raises(EgressRefused, match=words):
        guard.release(to_server("activation"), activation(1, 4, 2))
    guard, thread = called()
    thread.events.append(Closed(KEYS["server"], None, CloseCode.NORMAL))
    guard.part(guard.on_call)
    with pytest.raises(EgressRefused, match=words):
        guard.release(to_server("activation"), activation(1, 4, 2))
    assert thread.sent == []


def test_one_on_call_that_does_not_come_or_does_not_stay() -> None:
    guard, thread = member()
    with pytest.raises(PeerUnreachable, match="server: did not come up within 5 s"):
        guard.call(guard.on_call)

    guard, thread = member()
    thread.events.append(Closed(KEYS["server"], Refused(RefusalReason.UNKNOWN_KEY), CloseCode.ERROR))
    with pytest.raises(PeerRefusedUs, match="does not name our key"):
        guard.call(guard.on_call)

    guard, thread = called()
    thread.events.append(Closed(KEYS["server"], None, CloseCode.NORMAL))
    guard.wait()
    with pytest.raises(PeerLost, match="left before the run was over"):  # it said goodbye, and not we
        guard.part(guard.on_call)

    guard, thread = called()
    thread.events.append(Closed(KEYS["server"], Lost("nothing was heard for 20 s"), CloseCode.LOST))
    with pytest.raises(PeerLost, match="was lost"):
        guard.part(guard.on_call)


@pytest.mark.threat("T79")
def test_how_a_tensor_lies_in_memory_does_not_tell_whose_it_is() -> None:
    """Numbers are the same; headers and lengths, too, however the module made them."""
    plain = torch.arange(24.0).view(3, 4, 2)
    layouts = {
        "row by row": plain,
        "columns first": plain.transpose(1, 2).contiguous().transpose(1, 2),
        "with gaps": torch.zeros(3, 4, 5)[:, :, :2].copy_(plain),
        "backwards": plain.flip(0).permute(2, 1, 0).contiguous().permute(2, 1, 0).flip(0),
    }
    sent: set[tuple[bytes, bytes]] = set()
    for tensor in layouts.values():
        guard, thread = called()
        guard.release(to_server("activation"), Message("activation", (0, 0), tensors={"": tensor}))
        ((_, _, header, body),) = thread.sent
        sent.add((header, body))
    assert len(sent) == 1

    sent.clear()
    for tensor in (
        torch.ones(1, 4, 2),
        torch.ones(1, 1, 1).expand(1, 4, 2),
        torch.ones(1, 8).as_strided((1, 4, 2), (5, 2, 1)),
    ):
        guard, thread = called()
        guard.release(to_server("activation"), Message("activation", (0, 0), tensors={"": tensor}))
        ((_, _, header, body),) = thread.sent
        sent.add((header, body))
    assert len(sent) == 1, "what is repeated, or of one row, too"


@pytest.mark.threat("T79")
@pytest.mark.parametrize("code", [CloseCode.STOPPED, CloseCode.MISBEHAVED, CloseCode.LOST])
def test_those_on_call_hear_of_one_reason_only_why_a_member_leaves(code: CloseCode) -> None:
    guard, thread = called()
    guard.close(code)
    assert [(peer, said) for peer, said, _ in thread.closed_peers] == [(KEYS["server"], CloseCode.ERROR)]
    assert thread.closed == [code]

    for quiet in (CloseCode.NORMAL, CloseCode.ERROR):
        guard, thread = called()
        guard.close(quiet)
        assert (thread.closed_peers, thread.closed) == ([], [quiet])
