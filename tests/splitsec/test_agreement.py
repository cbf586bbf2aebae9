"""What a leader may say about the order of samples; how an anonymous group agrees, and what others hear of it.

Honest agreement of other parties: ``tests/topologies``.
"""

from __future__ import annotations

import hashlib
import hmac
import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from splitsec.agreement import Gossip, agree_on_order, in_common
from splitsec.errors import PeerLost, PeerMisbehaved
from splitsec.graph import Graph, parse_graph
from splitsec.guard import Guard
from splitsec.messages import Message, decode, encode
from splitsec.plan import CONTROL, ORDER, make_plan
from splitsec.samples import Samples
from splitsec.transports.iothread import CloseCode, Closed, Event, Opened, Received
from splitsec.turns import DRAWN
from tests.conftest import PATIENCE, replaced
from tests.splitsec.test_guard import Thread

GRAPH = parse_graph(
    """
splitsec: 1
name: vertical
parties: {clinic: {}, registry: {}, server: {listen: "tcp://h:1", address: "tcp://h:1"}}
segments: {stem: {at: clinic, data: x}, trunk: {at: server, loss: mse}}
cuts: [{from: stem, to: trunk, shape: [2], dtype: float32}]
labels: [{from: registry, to: trunk, dtype: float32}]
training: {batch_size: 4}
"""
)
KEYS = {"clinic": b"c" * 32, "server": b"s" * 32}
IDS = ("a", "b", "c")


def follow(*named: str) -> dict[str, torch.Tensor]:
    """What the registry makes of a leader's order of its training samples."""
    thread = Thread()
    guard = Guard(make_plan(GRAPH, "registry"), KEYS, thread, connect_timeout=1)
    key = b"k" * 32
    prints = b"".join(hmac.digest(key, one.encode(), hashlib.sha256)[:16] for one in named)
    offer = Message(
        "order",
        facts={"stream": 0, "split": "train", "key": key},
        tensors={"prints": torch.frombuffer(bytearray(prints), dtype=torch.uint8)},
    )
    for message in (offer, Message("order", facts={"stream": 0, "split": ""})):
        header, body = encode(message)
        thread.events.append(Received(KEYS["clinic"], ORDER, header, memoryview(bytearray(b"".join(body)))))
    own = {"train": Samples({"y": torch.zeros(3)}, IDS, 3)}
    return agree_on_order(GRAPH, "registry", guard, 0, own, ("clinic", "registry"), {})


def test_an_order_is_followed() -> None:
    assert follow("c", "a", "b")["train"].tolist() == [2, 0, 1]


@pytest.mark.threat("T99")
def test_an_order_that_names_a_sample_twice_is_refused() -> None:
    """Or one sample would be released as often as the leader likes, in one epoch."""
    with pytest.raises(PeerMisbehaved, match="named a sample twice"):
        follow("a", "b", "c", "a")


# --- an anonymous group: what its members say to each other, and to others

HIDDEN = """
splitsec: 1
name: hidden
parties:
  clinic-a: {}
  clinic-b: {}
  clinic-c: {}
  relay-1: {listen: "tcp://127.0.0.1:7401"}
  relay-2: {listen: "tcp://127.0.0.1:7402"}
  server: {listen: "tcp://127.0.0.1:7400"}
  auditor: {listen: "tcp://127.0.0.1:7403"}
groups:
  clinics: {members: [clinic-a, clinic-b, clinic-c], schedule: round_robin}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server, loss: cross_entropy}
  look: {at: auditor, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [4], dtype: float32, anonymous: true}
  - {from: stem, to: look, shape: [4], dtype: float32, anonymous: true}
labels:
  - {from: clinics, to: trunk}
  - {from: clinics, to: look}
routes:
  - {from: clinics, to: server, via: [relay-1, relay-2]}
  - {from: clinics, to: auditor, via: [relay-1, relay-2]}
  - {from: clinics, to: clinics, via: [relay-1]}
training: {batch_size: 4}
"""
LINKED = replaced(HIDDEN, ("labels:", "  - {from: trunk, to: look, shape: [4], dtype: float32}\nlabels:"))
"""The far ends talk to each other, too."""
BEHIND = replaced(
    HIDDEN,
    ("  look: {at: auditor, loss: cross_entropy}", "  look: {at: auditor}\n  end: {at: server, loss: cross_entropy}"),
    ("loss: cross_entropy}\n  look", "}\n  look"),
    (
        "{from: stem, to: look, shape: [4], dtype: float32, anonymous: true}",
        "{from: trunk, to: look, shape: [4], dtype: float32}\n  - {from: look, to: end, shape: [4], dtype: float32}",
    ),
    ("  - {from: clinics, to: trunk}\n", "  - {from: clinics, to: end}\n"),
    ("  - {from: clinics, to: look}\n", ""),
    ("  - {from: clinics, to: auditor, via: [relay-1, relay-2]}\n", ""),
)
"""The auditor talks to the server alone."""
MEMBERS, GROUP = ("clinic-a", "clinic-b", "clinic-c"), "clinics"
HELD = {
    "clinic-a": {"train": 9, "test": 4, "predict": 0, "train_turns": 5},
    "clinic-b": {"train": 7, "test": 5, "predict": 0, "train_turns": 4, "test_turns": 3},
    "clinic-c": {"train": 8, "test": 4, "predict": 0},
}
USED = {"train": 7, "test": 4, "predict": 0, "train_turns": 4, "test_turns": 3}


def key_of(name: str) -> bytes:
    return name.encode().ljust(32)


class Net:
    """Carries messages between the guards of one process, and hides who of the group speaks, as the channels do."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.events: dict[str, queue.SimpleQueue[Event]] = {name: queue.SimpleQueue() for name in graph.parties}
        self.speaker: dict[str, str] = {}
        self.outward: list[tuple[str, dict[str, Any]]] = []
        """What far ends were sent, and by whom."""
        self.inward: list[tuple[str, str, dict[str, Any]]] = []

    def guard(self, name: str) -> Guard:
        plan = make_plan(self.graph, name)
        inside = name in MEMBERS
        return Guard(
            plan,
            {peer: key_of(peer) for peer in plan.peers},
            _Ends(self, name),
            connect_timeout=PATIENCE,
            on_call=self.graph.far_ends if inside else (),
            crowds=() if inside else (GROUP,),
        )


class _Ends:
    """One party's end of the net."""

    def __init__(self, net: Net, name: str) -> None:
        self.net, self.name = net, name
        self.open: set[str] = set()

    def _seen_as(self, other: str) -> bytes:
        return key_of(GROUP if self.name in MEMBERS and other not in MEMBERS else self.name)

    def send(self, peer: bytes, lane: int, header: bytes, body: Any = (), *, wait: bool = True) -> None:
        other = peer.decode().strip()
        facts = dict(decode(header, memoryview(b"")).facts)
        if other == GROUP:
            other = self.net.speaker[self.name]
            self.net.inward.append((self.name, other, facts))
        elif self.name in MEMBERS and other not in MEMBERS:
            assert other in self.open, "a member speaks where it has no channel"
            self.net.speaker[other] = self.name
            self.net.outward.append((self.name, facts))
        self.net.events[other].put(Received(self._seen_as(other), lane, header, memoryview(bytearray())))

    def receive(self, timeout: float | None = None) -> Event | None:
        try:
            return self.net.events[self.name].get(timeout=0 if timeout == 0 else PATIENCE)
        except queue.Empty:
            assert timeout == 0, f"{self.name} waits in vain"
            return None

    def open_peer(self, peer: bytes) -> None:
        self.open.add(other := peer.decode().strip())
        self.net.events[other].put(Opened(key_of(GROUP)))
        self.net.events[self.name].put(Opened(peer))

    def leave_peer(self, peer: bytes) -> None:
        self.open.discard(peer.decode().strip())
        self.net.events[self.name].put(Closed(peer, None, CloseCode.NORMAL))

    def close_peer(self, peer: bytes, reason: int, why: str) -> None:
        raise AssertionError(why)

    def close(self, reason: int = CloseCode.NORMAL, linger: float = 5.0) -> None:
        for other in make_plan(self.net.graph, self.name).peers:
            if other in MEMBERS or other == GROUP:
                to = [other] if other != GROUP else [self.net.speaker[self.name]]
            else:
                to = [] if self.name in MEMBERS else [other]  # a crowd says nothing when one of it leaves
            for one in to:
                self.net.events[one].put(Closed(self._seen_as(one), None, CloseCode.NORMAL))


def talk(net: Net, name: str, *, first: str, last: str) -> tuple[list[dict[str, int]], list[bytes]]:
    """All that ``name`` agrees on, as ``party`` does it: ``first`` and ``last`` speak for the group."""
    guard = net.guard(name)
    gossip = Gossip(net.graph, name, guard, guard.plan.neighbours)
    drawn: list[bytes] = []
    if name in MEMBERS:
        held, drawn = gossip.agree_inside(MEMBERS.index(name), HELD[name], name[-1].encode() * DRAWN)
        assert held == [HELD[member] for member in MEMBERS]
        counts = [in_common(held)] * 3
        if name == first:
            guard.call(guard.on_call)
            gossip.tell(counts, guard.on_call)
    else:
        counts = gossip.agree_on_counts({})
    for epoch, member in enumerate((first, last)):
        if epoch and first != last and name in (first, last):
            gossip.give_the_word(last, 1) if name == first else gossip.take_the_word(first, 1)
        if name == member:
            guard.call(guard.on_call)
            gossip.begin_turn(10 * epoch, guard.on_call)
            guard.part(guard.on_call if epoch == 0 else ())
        gossip.hear_the_group(10 * epoch)
    gossip.say_done()
    gossip.stay_until_all_are_done(guard.on_call if name == last else ())
    guard.close()
    return counts, drawn


@pytest.mark.threat("T78", "T89")
@pytest.mark.parametrize("text", [HIDDEN, LINKED, BEHIND], ids=["two far ends", "linked far ends", "one behind"])
@pytest.mark.parametrize(("first", "last"), [("clinic-b", "clinic-c"), ("clinic-a", "clinic-a")])
def test_a_group_agrees_among_its_members_and_speaks_with_one_voice(text: str, first: str, last: str) -> None:
    graph = parse_graph(text)
    for _ in range(20):  # threads take turns as they like
        net = Net(graph)
        names = [*MEMBERS, "server", "auditor"]
        with ThreadPoolExecutor(len(names)) as pool:
            ends = {name: pool.submit(talk, net, name, first=first, last=last) for name in names}
            agreed = {name: end.result(PATIENCE) for name, end in ends.items()}
        drawn = [name[-1].encode() * DRAWN for name in MEMBERS]
        assert agreed == {name: ([USED] * 3, drawn if name in MEMBERS else []) for name in names}
        far = len(graph.far_ends)
        assert [who for who, facts in net.outward if facts["say"] == "counts"] == [first] * 3 * far
        turns = [who for who, facts in net.outward if facts["say"] == "turn"]
        assert turns == [first] * far + [last] * far
        assert {who for who, facts in net.outward if facts["say"] == "done"} == {last}
        assert not any(member in str(facts) for _, facts in net.outward for member in MEMBERS)
        assert not any("drawn" in facts for _, facts in net.outward)
        assert {to for _, to, _ in net.inward} == {last}
        assert {facts["say"] for _, _, facts in net.inward} == {"done"}


def test_a_group_that_begins_another_turn_than_is_due() -> None:
    net = Net(parse_graph(HIDDEN))
    guard = net.guard("server")
    gossip = Gossip(net.graph, "server", guard, guard.plan.neighbours)
    for step in (4, 9):
        header, _ = encode(Message("control", facts={"say": "turn", "step": step}))
        net.events["server"].put(Received(key_of(GROUP), CONTROL, header, memoryview(bytearray())))
    gossip.hear_the_group(4)
    with pytest.raises(PeerMisbehaved, match="clinics: began a turn with step 9"):
        gossip.hear_the_group(8)


@pytest.mark.threat("T79")
def test_a_group_uses_what_all_of_its_members_have() -> None:
    assert in_common(list(HELD.values())) == USED
    assert in_common(
        [{"train": 3, "test": 0, "predict": 0, "test_turns": 0}, {"train": 2, "test": 9, "predict": 1}]
    ) == {
        "train": 2,
        "test": 0,
        "predict": 0,
    }, "a limit on samples that nobody uses would end the run for nothing"


def test_a_group_is_answered_once_it_has_spoken_itself() -> None:
    """What others say that it said may be ahead of it: then nobody may be there to be answered."""
    net = Net(parse_graph(LINKED))
    net.speaker["auditor"] = "clinic-c"
    guard = net.guard("auditor")

    def says(speaker: str, party: str) -> None:
        header, _ = encode(Message("control", facts={"say": "done", "party": party}))
        net.events["auditor"].put(Received(key_of(speaker), CONTROL, header, memoryview(bytearray())))

    gossip = Gossip(net.graph, "auditor", guard, guard.plan.neighbours)
    says("server", "clinics")
    says("server", "server")
    net.events["auditor"].put(Closed(key_of("nobody"), None, CloseCode.NORMAL))
    gossip.say_done()
    with pytest.raises(KeyError, match="nobody"):
        gossip.stay_until_all_are_done()
    assert net.inward == []

    says("clinics", "clinics")
    gossip.stay_until_all_are_done()
    answers = [facts["party"] for _, _, facts in net.inward]
    assert answers == ["auditor", "server"]


def test_whoever_heard_the_group_first_may_leave_before_the_others_hear_it() -> None:
    """Its last word travels to each far end by a way of its own, and the ends tell each other faster."""
    net = Net(parse_graph(LINKED))
    net.speaker["server"] = "clinic-c"
    guard = net.guard("server")

    def says(speaker: str, party: str) -> None:
        header, _ = encode(Message("control", facts={"say": "done", "party": party}))
        net.events["server"].put(Received(key_of(speaker), CONTROL, header, memoryview(bytearray())))

    gossip = Gossip(net.graph, "server", guard, guard.plan.neighbours)
    gossip.say_done()
    says("auditor", "auditor")
    says("auditor", "clinics")
    net.events["server"].put(Closed(key_of("auditor"), None, CloseCode.NORMAL))
    says("clinics", "clinics")
    gossip.stay_until_all_are_done()
    assert [facts["party"] for _, _, facts in net.inward] == ["auditor", "server"]


def test_whoever_leaves_before_it_has_said_its_last_word_is_named() -> None:
    net = Net(parse_graph(LINKED))
    guard = net.guard("server")
    gossip = Gossip(net.graph, "server", guard, guard.plan.neighbours)
    gossip.say_done()
    net.events["server"].put(Closed(key_of("auditor"), None, CloseCode.NORMAL))
    with pytest.raises(PeerLost, match=r"^auditor: left before the run was over"):
        gossip.stay_until_all_are_done()


COUNTS = {"say": "counts", "stream": 1, "train": 7, "test": 4, "predict": 0}


@pytest.mark.parametrize(
    ("listener", "speaker", "facts"),
    [
        ("clinic-a", "server", COUNTS),
        ("clinic-a", "server", {**COUNTS, "drawn": b"d" * DRAWN}),
        ("clinic-a", "clinic-b", COUNTS),  # without what it drew
        ("clinic-a", "clinic-b", {**COUNTS, "drawn": b"short"}),
        ("clinic-a", "server", {"say": "done", "party": "clinic-b"}),
        ("clinic-a", "clinic-b", {"say": "done", "party": "clinics"}),
        ("server", "clinics", {**COUNTS, "drawn": b"d" * DRAWN}),
        ("server", "clinics", {"say": "done", "party": "clinic-b"}),
        ("server", "clinics", {"say": "done", "party": "relay-1"}),
        ("server", "clinics", {"say": "turn", "step": "first"}),
        ("clinic-a", "server", {"say": "turn", "step": 0}),
        ("clinic-a", "server", {"say": "your turn", "epoch": 1}),
    ],
)
def test_what_neither_a_group_nor_those_outside_may_say(listener: str, speaker: str, facts: dict[str, Any]) -> None:
    net = Net(parse_graph(HIDDEN))
    guard = net.guard(listener)
    gossip = Gossip(net.graph, listener, guard, guard.plan.neighbours)
    header, _ = encode(Message("control", facts=facts))
    net.events[listener].put(Received(key_of(speaker), CONTROL, header, memoryview(bytearray())))
    with pytest.raises(PeerMisbehaved, match=f"{speaker}: said something unknown on the control lane"):
        gossip.agree_on_counts({})


@pytest.mark.threat("T122")
def test_who_has_made_the_last_step_does_not_wait_for_ever_for_a_last_word() -> None:
    net = Net(parse_graph(LINKED))
    net.speaker["auditor"] = "clinic-c"
    guard = net.guard("auditor")
    gossip = Gossip(net.graph, "auditor", guard, guard.plan.neighbours)
    gossip.say_done()
    with pytest.raises(
        PeerLost, match=r"^(clinics|server): is connected, but has not said that it is done \(clinics, server\)"
    ):
        gossip.stay_until_all_are_done(patience=0.0)
