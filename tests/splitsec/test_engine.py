"""One step at one party whose peer answers as it likes, and steps that are redone.

Here: the real engine and guard of a party; in the place of its I/O thread stands one that hands out the events it was
given, or one that brings messages to another party's guard.  Honest runs: ``tests/topologies``.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from splitsec.demands import demands_of
from splitsec.detectors import Detectors
from splitsec.engine import Engine, _apart, _Work
from splitsec.errors import EgressRefused, PeerLost, PeerMisbehaved, SplitsecError, SuspectedAttack
from splitsec.graph import parse_graph
from splitsec.guard import Guard
from splitsec.messages import Message, decode, encode
from splitsec.partyfile import OwnCutPrivacy, OwnPrivacy, PartyFile
from splitsec.plan import Edge, make_plan
from splitsec.privacy.dpsgd import PrivateTraining
from splitsec.privacy.randomness import KeystreamSource
from splitsec.safeguards import Carried, Safeguards
from splitsec.schedule import EVALUATE, TRAIN, MicroBatch, Step
from splitsec.segments import Segment
from splitsec.transports.iothread import CloseCode, Closed, Event, Received
from tests.conftest import PATIENCE
from tests.splitsec.test_guard import Thread

GRAPH = parse_graph(
    """
splitsec: 1
name: pair
parties: {clinic: {}, server: {listen: "tcp://h:1", address: "tcp://h:1"}}
segments: {stem: {at: clinic, data: x}, trunk: {at: server, loss: mse}}
cuts: [{from: stem, to: trunk, shape: [2], dtype: float32}]
labels: [{from: clinic, to: trunk, dtype: float32}]
training: {batch_size: 4}
"""
)
BENT = parse_graph(
    """
splitsec: 1
name: bent
parties: {clinic: {}, server: {listen: "tcp://h:1", address: "tcp://h:1"}}
segments: {stem: {at: clinic, data: x}, trunk: {at: server}, head: {at: clinic, loss: mse, loss_weight: 0.5}}
cuts: [{from: stem, to: trunk, shape: [2], dtype: float32}, {from: trunk, to: head, shape: [], dtype: float32}]
labels: [{from: clinic, to: head, dtype: float32}]
training: {batch_size: 4}
"""
)
KEY = b"s" * 32
KEYS = {"clinic": b"c" * 32, "server": KEY}


def one_step(number: int, *, redo: bool = False, micro_batches: int = 1) -> Step:
    micros = tuple(MicroBatch(k, 0, 4 * k, 4) for k in range(micro_batches))
    return Step(number, TRAIN, 0, micros, redo)


@pytest.mark.threat("T40")
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Message("gradient", (0, 0)), "sent no gradient of stem -> trunk"),
        (Message("gradient", (1, 0), tensors={"": torch.ones(4, 2)}), r"message \(1, 0\), an answer to what we have"),
        (Message("gradient", (0, 0), tensors={"": torch.ones(3, 2)}), "sent 3 samples"),
        (Message("gradient", (0, 0), tensors={"": torch.full((4, 2), torch.nan)}), "NaN or infinite"),
    ],
)
def test_a_wrong_answer_changes_no_weight(answer: Message, words: str) -> None:
    thread = Thread()
    guard = Guard(make_plan(GRAPH, "clinic"), {"server": KEY}, thread, connect_timeout=1)
    module = nn.Linear(3, 2)
    stem = Segment("stem", module, torch.optim.SGD(module.parameters(), lr=1.0))
    before = stem.weights()
    lane = next(number for (_, number), lane in guard.plan.lanes_in.items() if lane.kind == "gradient")
    thread.events.append(arrived(KEY, lane, answer))
    with pytest.raises(PeerMisbehaved, match=words):
        Engine(guard.plan, {"stem": stem}, guard).run_step(
            one_step(0), lambda micro, field: torch.ones(4, 3) if field == "x" else torch.ones(4), update=0
        )
    assert_unchanged(stem, before)


def arrived(key: bytes, lane: int, message: Message) -> Received:
    header, body = encode(message)
    return Received(key, lane, header, memoryview(bytearray(b"".join(body))))


def assert_unchanged(segment: Segment, before: Mapping[str, Tensor]) -> None:
    now = segment.weights()
    assert {name for name, tensor in now.items() if not torch.equal(tensor, before[name])} == set()


# --- a party that answers, and holds what may be redone


class Counting(nn.Module):
    """Buffers that a forward changes: in place, by another in its place, and from none."""

    seen: Tensor
    mean: Tensor
    last: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            self.mean = 0.9 * self.mean + x.detach().mean(0)
            self.last = x.detach().sum(0) if self.last is None else self.last + 1
        moved: Tensor = x + self.mean * 0.01
        return moved


def trunk(*, dropout: float = 0.3) -> Segment:
    torch.manual_seed(3)
    module = nn.Sequential(
        Counting(), nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Dropout(dropout), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)
    )
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    return Segment("trunk", module, optimizer, loss=nn.MSELoss(), loss_name="mse", seed=1)


class Server:
    """The server of the graph, to which a clinic says what the test makes it say."""

    def __init__(self, segment: Segment, detectors: Detectors | None = None) -> None:
        self.thread = Thread()
        self.guard = Guard(make_plan(GRAPH, "server"), {"clinic": KEYS["clinic"]}, self.thread, connect_timeout=1)
        self.segment = segment
        self.engine = Engine(self.guard.plan, {"trunk": segment}, self.guard, detectors)

    def hear(self, kind: str, key: tuple[int, int], tensor: Tensor) -> None:
        lane = next(number for (_, number), lane in self.guard.plan.lanes_in.items() if lane.kind == kind)
        self.thread.events.append(arrived(KEYS["clinic"], lane, Message(kind, key, tensors={"": tensor})))

    def ask(self, step: int, micro: int, *, false: bool = False, rows: int = 4) -> None:
        """Labels and activation of one micro-batch, drawn by the step and its place there."""
        place = micro % 2 if micro > 1 else 0
        random = torch.Generator().manual_seed(10 * step + place)
        x = torch.randn(rows, 2, generator=random)
        self.hear("labels", (step, micro), x.sum(1) * (-1 if false else 1))
        self.hear("activation", (step, micro), x)

    def run(self, step: Step) -> None:
        def nothing(micro: MicroBatch, field: str) -> Tensor:
            raise AssertionError("the server holds no samples")

        self.engine.run_step(step, nothing, update=step.number)


def plainly(steps: Iterable[int]) -> Segment:
    """The trunk after ``steps`` that nobody redoes."""
    server = Server(trunk())
    for number in steps:
        server.ask(number, 0)
        server.run(one_step(number))
    return server.segment


def test_a_step_that_may_be_redone_is_held_until_the_next_begins() -> None:
    server, before = Server(trunk()), trunk()
    server.ask(5, 0)
    server.run(one_step(5, redo=True))
    assert len(server.thread.sent) == 1, "it is answered"
    parameters = dict(server.segment.module.named_parameters())
    assert all(torch.equal(one, parameters[name]) for name, one in before.module.named_parameters())
    server.hear("labels", (6, 0), torch.zeros(4))
    with pytest.raises(AssertionError, match="it waits for what does not come"):
        server.run(one_step(6))
    assert_unchanged(server.segment, plainly([5]).weights())


def test_a_step_that_may_not_be_redone_is_made_at_once() -> None:
    server = Server(trunk())
    server.ask(5, 0)
    server.run(one_step(5))
    assert_unchanged(server.segment, plainly([5]).weights())


@pytest.mark.threat("T131")
def test_what_is_redone_leaves_nothing_of_the_first_attempt() -> None:
    """Neither in weights and state of the optimiser, nor in buffers of any kind, nor in the score."""
    server, plain = Server(trunk()), plainly([5, 6, 7])
    server.ask(5, 0, false=True)
    server.ask(5, 1)
    server.ask(6, 0)
    server.ask(7, 0, false=True)
    server.ask(7, 1)
    server.ask(8, 0)
    for number in (5, 6, 7):
        server.run(one_step(number, redo=True))
    server.run(one_step(8))
    plain = plainly([5, 6, 7, 8])
    assert_unchanged(server.segment, plain.weights())
    found, expected = (dict(one.module.named_buffers()) for one in (server.segment, plain))
    assert {name for name in expected if not torch.equal(found[name], expected[name])} == set()
    assert found["0.seen"] == 4
    assert server.segment.take_score() == plain.take_score()
    keys = [key for _, _, key in sent(server.thread)]
    assert keys == [(5, 0), (5, 1), (6, 0), (7, 0), (7, 1), (8, 0)]


def sent(thread: Thread) -> list[tuple[bytes, int, tuple[int, ...]]]:
    """To whom, on which lane, for which step and micro-batch."""
    import msgpack

    return [(peer, lane, tuple(msgpack.unpackb(header)[1])) for peer, lane, header, _ in thread.sent]


Ask = Callable[[Server], None]


def again(server: Server) -> None:
    server.ask(5, 1)


def again_and_again(server: Server) -> None:
    server.ask(5, 1)
    server.ask(5, 2)


def out_of_order(server: Server) -> None:
    server.ask(5, 2)


def other_rows(server: Server) -> None:
    server.ask(5, 1, rows=3)


def labels_again_and_then_the_next(server: Server) -> None:
    server.hear("labels", (5, 1), torch.ones(4))
    server.hear("activation", (6, 0), torch.ones(4, 2))


def the_next_and_then_again(server: Server) -> None:
    server.hear("labels", (6, 0), torch.ones(4))
    server.hear("activation", (5, 1), torch.ones(4, 2))


@pytest.mark.threat("T131")
@pytest.mark.parametrize(
    ("says", "redo", "words", "standing"),
    [
        (again, False, r"sent labels of clinic -> trunk for step, micro-batch \(5, 1\)", [5]),
        (again_and_again, True, r"for step, micro-batch \(5, 2\)", [5]),
        (out_of_order, True, r"for step, micro-batch \(5, 2\)", []),
        (other_rows, True, "sent 3 samples in labels", []),
        (labels_again_and_then_the_next, True, r"sent activation .* for step, micro-batch \(6, 0\)", []),
        (the_next_and_then_again, True, r"sent activation .* for step, micro-batch \(5, 1\)", [5]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_who_redoes_otherwise_misbehaves(says: Ask, redo: bool, words: str, standing: list[int]) -> None:
    server = Server(trunk())
    server.ask(5, 0)
    server.run(one_step(5, redo=redo))
    says(server)
    with pytest.raises(PeerMisbehaved, match=words) as caught:
        server.run(one_step(6, redo=True))
    assert caught.value.party == "clinic"
    parameters = dict(plainly(standing).module.named_parameters())
    assert all(torch.equal(one, parameters[name]) for name, one in server.segment.module.named_parameters())


def test_a_held_step_whose_asker_leaves_is_never_made() -> None:
    server, before = Server(trunk()), dict(trunk().module.named_parameters())
    server.ask(5, 0)
    server.run(one_step(5, redo=True))
    server.thread.events.append(Closed(KEYS["clinic"], None, CloseCode.ERROR))
    with pytest.raises(PeerLost, match="stopped: it failed"):
        server.run(one_step(6, redo=True))
    assert all(torch.equal(one, before[name]) for name, one in server.segment.module.named_parameters())


def test_a_segment_with_dp_sgd_forgets_what_each_sample_added() -> None:
    def private() -> Segment:
        torch.manual_seed(3)
        module = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
        training = PrivateTraining(module, clip=1e3, noise_multiplier=1e-6, source=KeystreamSource())
        return Segment(
            "trunk", module, torch.optim.SGD(module.parameters(), lr=0.1), loss=nn.MSELoss(), private=training
        )

    servers = Server(private()), Server(private())
    for server, redone in zip(servers, (True, False), strict=True):
        server.ask(5, 0, false=redone)
        if redone:
            server.ask(5, 1)
        server.ask(6, 0)
        server.run(one_step(5, redo=True))
        server.run(one_step(6))
    one, other = (server.segment.weights() for server in servers)
    for name in one:  # noise there is, but hardly any
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-2)


# --- a party that asks


class Wire:
    """Stands where the I/O thread does, and brings what is sent to the party at the other end."""

    def __init__(self, party: str) -> None:
        self.key = KEYS[party]
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.other: Wire | None = None
        self.labels: list[Tensor] = []

    def send(self, peer: bytes, lane: int, header: bytes, body: Any = (), *, wait: bool = True) -> None:
        assert self.other is not None
        whole = memoryview(bytearray(b"".join(map(bytes, body))))
        self.other.events.put(Received(self.key, lane, header, whole))
        if (message := decode(header, whole)).kind == "labels":
            self.labels += message.tensors.values()

    def receive(self, timeout: float | None = None) -> Event | None:
        return self.events.get(timeout=PATIENCE)

    def leave(self, code: CloseCode) -> None:
        assert self.other is not None
        self.other.events.put(Closed(self.key, None, code))

    def open_peer(self, peer: bytes) -> None: ...
    def leave_peer(self, peer: bytes) -> None: ...
    def close_peer(self, peer: bytes, reason: int, why: str) -> None: ...
    def close(self, reason: int = CloseCode.NORMAL, linger: float = 5.0) -> None: ...


@dataclass(frozen=True)
class Look:
    """A gradient, or two of them, as detectors saw them."""

    cut: str
    step: int
    gradient: Tensor
    labels: Tensor
    decoy: Tensor | None = None


class Watching(Detectors):
    """Notes what it is shown, and wants a decoy at each of ``decoys``, a suspicion at ``suspects``."""

    def __init__(self, decoys: Iterable[int] = (), *, suspects: int | None = None) -> None:
        self.decoys, self.suspects = set(decoys), suspects
        self.asked: list[int] = []
        self.gradients: list[Look] = []
        self.losses: list[tuple[str, int, float]] = []
        self.answers: list[Look] = []

    def gradient(
        self, edge: Edge, step: Step, micro: MicroBatch, gradient: Tensor, labels: Mapping[str, Tensor]
    ) -> None:
        self.gradients.append(Look(edge.source, step.number, gradient.clone(), labels.get("y", torch.empty(0))))

    def loss(self, segment: str, step: Step, loss: float) -> None:
        self.losses.append((segment, step.number, loss))

    def decoy(self, step: Step) -> bool:
        self.asked.append(step.number)
        return step.number in self.decoys

    def false_labels(self, labels: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        return {name: one.roll(1, 0) for name, one in labels.items()}

    def answered(self, edge: Edge, step: Step, decoy: Tensor, real: Tensor, changed: Tensor) -> None:
        self.answers.append(Look(edge.source, step.number, real.clone(), changed, decoy.clone()))
        if step.number == self.suspects:
            raise SuspectedAttack("nonsense", detector="decoys", cut="", party="server", batch=1, evidence={})


X = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))
Y = torch.tensor([0.0, 1.0, 1.0, 3.0, 0.0, 2.0, 2.0, 5.0])


def own_rows(micro: MicroBatch, field: str) -> Tensor:
    return (X if field == "x" else Y)[micro.start : micro.start + micro.rows]


def carried(micro: MicroBatch) -> Carried:
    return Carried("train", torch.arange(micro.start, micro.start + micro.rows), {"x": X}, training=True)


def stem(*, private: bool = False) -> Segment:
    torch.manual_seed(4)
    module = nn.Sequential(nn.Linear(3, 2), *([] if private else [nn.BatchNorm1d(2)]))
    training = PrivateTraining(module, clip=1.0, noise_multiplier=1e-6, source=KeystreamSource()) if private else None
    return Segment("stem", module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), private=training)


def head() -> Segment:
    torch.manual_seed(6)
    module = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1), nn.Flatten(0))
    return Segment("head", module, torch.optim.Adam(module.parameters()), loss=nn.MSELoss(), loss_name="mse")


class Clinic:
    """The clinic of the graph, and a server in another thread, where random numbers would be the same ones."""

    def __init__(
        self,
        detectors: Watching | None,
        *,
        segment: Segment | None = None,
        safeguards: Safeguards | None = None,
        bent: bool = False,
    ) -> None:
        self.wire, theirs = Wire("clinic"), Wire("server")
        self.wire.other, theirs.other = theirs, self.wire
        graph = BENT if bent else GRAPH
        plan = make_plan(graph, "clinic")
        self.guard = Guard(plan, {"server": KEY}, self.wire, connect_timeout=1, safeguards=safeguards)
        self.passed: list[tuple[str, tuple[int, ...]]] = []
        self.guard.on_passed = lambda one: self.passed.append((one.lane.kind, one.key)) if one.out else None
        self.segment = segment or stem()
        self.head = head()
        self.engine = Engine(plan, {"stem": self.segment, "head": self.head}, self.guard, detectors)
        self.theirs = theirs
        self.their_detectors = Watching()
        guard = Guard(make_plan(graph, "server"), {"clinic": KEYS["clinic"]}, theirs, connect_timeout=1)
        self.trunk = trunk(dropout=0.0)
        self.trunk.loss = None if bent else self.trunk.loss
        self.server = Engine(guard.plan, {"trunk": self.trunk}, guard, self.their_detectors)

    def run(self, steps: list[Step], *, server_leaves_after: int | None = None) -> None:
        def serve() -> None:
            for step in steps:
                self.server.run_step(step, own_rows, update=step.number)
                if step.number == server_leaves_after:
                    return self.theirs.leave(CloseCode.STOPPED)

        with ThreadPoolExecutor(1) as pool:
            served = pool.submit(serve)
            try:
                for step in steps:
                    self.engine.run_step(step, own_rows, update=step.number, whose=carried)
            except SplitsecError:
                self.wire.leave(CloseCode.ERROR)
                with suppress(PeerLost):
                    served.result(PATIENCE)
                raise
            served.result(PATIENCE)


def steps_to(last: int, *, micro_batches: int = 1) -> list[Step]:
    """Steps from 20 on; the last may not be redone."""
    return [one_step(number, redo=number < last, micro_batches=micro_batches) for number in range(20, last + 1)]


@pytest.mark.threat("T121")
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_decoy_is_compared_with_the_step_and_changes_nothing(micro_batches: int) -> None:
    steps = steps_to(25, micro_batches=micro_batches)
    plain, clinic = Clinic(Watching()), Clinic(watching := Watching([21, 24, 25]))
    plain.run(steps)
    clinic.run(steps)
    for segment, expected_segment in ((clinic.segment, plain.segment), (clinic.trunk, plain.trunk)):
        assert_unchanged(segment, expected_segment.weights())
        assert segment.take_score() == expected_segment.take_score()
    assert watching.asked == [20, 21, 22, 23, 24], "25 may not be redone"
    assert [(one.cut, one.step) for one in watching.answers] == [("stem", 21), ("stem", 24)]
    rows = 4 * micro_batches
    quiet = plain.engine.detectors
    assert isinstance(quiet, Watching)
    for one in watching.answers:
        real = torch.cat([look.gradient for look in quiet.gradients if look.step == one.step])
        assert torch.equal(one.gradient, real)
        assert one.decoy is not None and one.decoy.shape == real.shape and not torch.equal(one.decoy, real)
        assert one.labels.tolist() == (Y[:rows] != Y[:rows].roll(1)).tolist()
    expected = []
    for step in steps:
        numbers = range(micro_batches * (2 if step.number in (21, 24) else 1))
        expected += [(step.number, number) for number in numbers]
    assert torch.equal(
        torch.cat(clinic.wire.labels),
        torch.cat(
            [
                labels
                for step in steps
                for labels in ([Y[:rows].roll(1)] if step.number in (21, 24) else []) + [Y[:rows]]
            ]
        ),
    )
    for kind in ("labels", "activation"):
        assert [key for passed, key in clinic.passed if passed == kind] == expected


def test_a_decoy_where_the_labels_stay_at_the_source() -> None:
    """The head there gets false ones as well, and forgets them."""
    steps = steps_to(24, micro_batches=2)
    plain, clinic = Clinic(quiet := Watching(), bent=True), Clinic(watching := Watching([21, 23]), bent=True)
    plain.run(steps)
    clinic.run(steps)
    for segment, expected in ((clinic.segment, plain.segment), (clinic.trunk, plain.trunk), (clinic.head, plain.head)):
        assert_unchanged(segment, expected.weights())
    assert [(one.cut, one.step) for one in watching.answers] == [("stem", 21), ("stem", 23)]
    for one in watching.answers:
        assert one.decoy is not None and (one.decoy - one.gradient).abs().max() > 1e-6
    assert watching.losses == quiet.losses
    score = clinic.head.take_score()
    assert [(name, number) for name, number, _ in watching.losses] == [("head", number) for number in range(20, 25)]
    assert sum(loss for _, _, loss in watching.losses) / 5 == pytest.approx(score.loss / score.rows)
    assert len(clinic.their_detectors.gradients) == 10, "the server hears gradients of steps that stand"


def test_detectors_see_steps_that_stand_and_no_answers_to_false_labels() -> None:
    """At the source as they come; at who answers once the step stands."""
    steps = steps_to(24, micro_batches=2)
    plain, clinic = Clinic(quiet := Watching()), Clinic(watching := Watching([21, 23]))
    plain.run(steps)
    clinic.run(steps)
    assert [(one.step, one.labels.tolist()) for one in watching.gradients] == [
        (number, Y[first : first + 4].tolist()) for number in range(20, 25) for first in (0, 4)
    ]
    assert all(
        torch.equal(one.gradient, other.gradient)
        for one, other in zip(watching.gradients, quiet.gradients, strict=True)
    )
    losses = clinic.their_detectors.losses
    assert [(name, number) for name, number, _ in losses] == [("trunk", number) for number in range(20, 25)]
    assert losses == plain.their_detectors.losses
    score = plain.trunk.take_score()
    assert sum(loss for _, _, loss in losses) / 5 == pytest.approx(score.loss / score.rows)
    assert watching.losses == [] and clinic.their_detectors.gradients == []


def test_without_training_nobody_looks() -> None:
    clinic = Clinic(watching := Watching([20]))
    clinic.run([Step(20, EVALUATE, 0, one_step(20).micro_batches)])
    assert (watching.asked, watching.gradients, clinic.their_detectors.losses) == ([], [], [])


@pytest.mark.threat("T110")
def test_an_alarm_over_a_decoy_stops_before_anything_more_leaves() -> None:
    clinic = Clinic(Watching([21], suspects=21))
    reference = Clinic(Watching())
    reference.run([one_step(20)])
    with pytest.raises(SuspectedAttack):
        clinic.run(steps_to(23))
    assert clinic.passed[-1] == ("activation", (21, 1))
    parameters = dict(reference.segment.module.named_parameters())
    assert all(torch.equal(one, parameters[name]) for name, one in clinic.segment.module.named_parameters())


def test_a_peer_that_leaves_in_the_middle_of_a_decoy_leaves_the_source_as_it_was() -> None:
    clinic, before = Clinic(Watching([20])), stem().weights()
    with pytest.raises(PeerLost, match="was stopped by its operator"):
        clinic.run(steps_to(22), server_leaves_after=20)
    assert_unchanged(clinic.segment, {**before, **buffers_after_one_forward()})
    assert clinic.passed[-1] == ("activation", (20, 1))


def buffers_after_one_forward() -> dict[str, Tensor]:
    """The second attempt went forward, and no further."""
    once = stem()
    once.module.train()
    with torch.no_grad():
        once.module(X[:4])
    return {name: one for name, one in once.weights().items() if "running" in name or "num_batches" in name}


def test_labels_that_nothing_false_can_be_made_of_make_no_decoy() -> None:
    class Alike(Watching):
        def false_labels(self, labels: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
            assert {name: one.tolist() for name, one in labels.items()} == {"y": Y.tolist()}
            return None

    clinic = Clinic(watching := Alike([20]))
    clinic.run(steps_to(21, micro_batches=2))
    assert watching.asked == [20] and watching.answers == []
    assert max(micro for _, (_, micro) in clinic.passed) == 1


CLIPPING = OwnCutPrivacy.model_validate({"from": "stem", "to": "trunk", "forward": {"clip": 9.0}})
LIMITS = [OwnPrivacy(epsilon=1.0), OwnPrivacy(label_epsilon=1.0), OwnPrivacy(cuts=(CLIPPING,))]


@pytest.mark.threat("T134")
@pytest.mark.parametrize("own", LIMITS, ids=["budget", "label budget", "clipping"])
def test_where_a_release_is_limited_there_are_no_decoys(own: OwnPrivacy) -> None:
    demands = demands_of(GRAPH, PartyFile(party="clinic", privacy=own), make_plan(GRAPH, "clinic"))
    clinic = Clinic(watching := Watching([20]), safeguards=Safeguards(demands, own=own))
    clinic.run(steps_to(22))
    assert watching.asked == [] and max(micro for _, (_, micro) in clinic.passed) == 0
    lane = next(key for key, lane in clinic.guard.plan.lanes_out.items() if lane.kind == "activation")
    second = Carried("train", torch.arange(4), {"x": X}, training=True, again=True)
    with pytest.raises(EgressRefused, match="step 23 again"):
        clinic.guard.release(lane, Message("activation", (23, 1), tensors={"": torch.ones(4, 2)}), second)


def test_a_source_without_detectors_has_no_decoys() -> None:
    clinic = Clinic(None)
    clinic.run(steps_to(22))
    assert max(micro for _, (_, micro) in clinic.passed) == 0


def test_a_source_with_dp_sgd_has_no_decoys() -> None:
    clinic = Clinic(watching := Watching([20]), segment=stem(private=True))
    clinic.run(steps_to(22))
    assert watching.asked == []


def test_safeguards_without_limits_let_a_sample_leave_in_both_attempts() -> None:
    demands = demands_of(GRAPH, PartyFile(party="clinic"), make_plan(GRAPH, "clinic"))
    clinic = Clinic(watching := Watching([20]), safeguards=Safeguards(demands))
    clinic.run(steps_to(22))
    assert [one.step for one in watching.answers] == [20]


# --- several clinics in a step

TOGETHER = parse_graph(
    """
splitsec: 1
name: together
parties: {one: {}, two: {}, three: {}, server: {listen: "tcp://h:1", address: "tcp://h:1"}}
groups: {clinics: {members: [one, two, three], schedule: parallel}}
segments: {stem: {at: clinics, data: x}, trunk: {at: server, loss: mse}}
cuts: [{from: stem, to: trunk, shape: [2], dtype: float32}]
labels: [{from: clinics, to: trunk, dtype: float32}]
training: {batch_size: 4}
"""
)
MEMBERS = {name: name.encode().ljust(32) for name in ("one", "two", "three")}


class Crossroads:
    """The server of three clinics, whose messages come in the order of the test."""

    def __init__(self, *, early: bool | None, buffers: bool = False) -> None:
        torch.manual_seed(5)
        layers = [nn.Linear(2, 5), nn.BatchNorm1d(5) if buffers else nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)]
        module = nn.Sequential(*layers)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        self.thread = Thread()
        self.guard = Guard(
            make_plan(TOGETHER, "server"), MEMBERS, self.thread, connect_timeout=1, answer_timeout=PATIENCE
        )
        self.segment = Segment("trunk", module, optimizer, loss=nn.MSELoss(), loss_name="mse", early_gradient=early)
        self.engine = Engine(self.guard.plan, {"trunk": self.segment}, self.guard)

    def hear(self, step: int, *members: str) -> None:
        for member in members:
            place = list(MEMBERS).index(member)
            x = torch.randn(4, 2, generator=torch.Generator().manual_seed(3 * step + place))
            for kind, tensor in (("labels", x.sum(1)), ("activation", x)):
                lane = next(
                    n for (peer, n), one in self.guard.plan.lanes_in.items() if (peer, one.kind) == (member, kind)
                )
                self.thread.events.append(
                    arrived(MEMBERS[member], lane, Message(kind, (step, place), tensors={"": tensor}))
                )

    def run(self, step: int) -> None:
        micros = tuple(MicroBatch(number, number, 0, 4) for number in range(3))
        self.engine.run_step(Step(step, TRAIN, 0, micros), lambda micro, field: torch.ones(0), update=step)

    def answered(self) -> list[str]:
        names = {key: name for name, key in MEMBERS.items()}
        return [names[sent[0]] for sent in self.thread.sent]


def test_who_is_there_is_answered_without_waiting_for_a_slow_member_of_the_group() -> None:
    server = Crossroads(early=True)
    server.hear(0, *MEMBERS)
    server.run(0)
    server.hear(1, "three", "two")
    with pytest.raises(PeerLost, match=r"one: is connected, but has sent nothing"):
        server.run(1)
    assert server.answered()[3:] == ["two", "three"] or server.answered()[3:] == ["three", "two"]


@pytest.mark.parametrize("buffers", [False, True])
def test_the_order_in_which_members_come_changes_no_bit(buffers: bool) -> None:
    """With buffers, which each forward changes, members are taken in order."""
    plain, server = Crossroads(early=False, buffers=buffers), Crossroads(early=True, buffers=buffers)
    for step, order in enumerate((("one", "two", "three"), ("three", "one", "two"), ("two", "three", "one"))):
        plain.hear(step, *MEMBERS)
        plain.run(step)
        server.hear(step, *order)
        server.run(step)
    assert_unchanged(server.segment, plain.segment.weights())
    assert server.segment.take_score() == plain.segment.take_score()
    assert plain.answered() == ["one", "two", "three"] * 3


def test_without_early_gradients_members_are_taken_in_order() -> None:
    server = Crossroads(early=False)
    server.hear(0, "three", "two")
    with pytest.raises(PeerLost, match="one: is connected"):
        server.run(0)
    assert server.answered() == []


def test_members_whose_messages_share_a_lane_are_taken_in_order() -> None:
    """Behind a server through which they all come, their micro-batches cannot overtake each other."""
    chain = parse_graph(
        """
splitsec: 1
name: chain
parties:
  one: {}
  two: {}
  server: {listen: "tcp://h:1", address: "tcp://h:1"}
  far: {listen: "tcp://f:1", address: "tcp://f:1"}
groups: {clinics: {members: [one, two], schedule: parallel}}
segments: {stem: {at: clinics, data: x}, trunk: {at: server}, head: {at: far, loss: mse}}
cuts: [{from: stem, to: trunk, shape: [2], dtype: float32}, {from: trunk, to: head, shape: [], dtype: float32}]
labels: [{from: clinics, to: head, dtype: float32}]
"""
    )

    def apart(party: str) -> bool:
        streams = make_plan(chain, party).streams
        return _apart([_Work(MicroBatch(k, k, 0, 4), streams[k].stages[0], k) for k in range(2)])

    assert not apart("server")
    assert not apart("far")
    streams = make_plan(TOGETHER, "server").streams
    assert _apart([_Work(MicroBatch(k, k, 0, 4), streams[k].stages[0], k) for k in range(3)])
