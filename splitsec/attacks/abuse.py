"""Protocol abuse: a party with a right key, on a right channel, that says what the graph does not allow.

Here: the cases (``CASES``), the process of the party that abuses (``main``), and the judge.  The abuser is an ordinary
party to the last line but one: its own guard, which would refuse all this, has a liar between itself and the I/O
thread, and the liar puts other messages in place of single ones.  Each case is a run of its own, of real processes; a
case is held where somebody refused, nothing left that does not leave in peace, and nobody's weights are others than
those of a run in peace.  Not here: what is done to bytes on the line, and by whom without a key (``network``).

Source: ours; docs/threat-model.md has what each case belongs to.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple

import torch

from splitsec.attacks.adversary import follow_parent
from splitsec.attacks.arena import Fought, Ground
from splitsec.attacks.attack import Attack, Judgement
from splitsec.attacks.outcome import Case, Outcome
from splitsec.books import JOURNAL_FILE
from splitsec.demands import demands_of
from splitsec.engine import Engine
from splitsec.errors import LedgerError, PartyFailed, SplitsecError
from splitsec.graph import Graph, Timeouts, parse_graph
from splitsec.journal import read, verify
from splitsec.messages import DTYPES, Message, decode, encode
from splitsec.nest import Nest, open_nest
from splitsec.party import Job, Party
from splitsec.partyfile import load_party
from splitsec.plan import FIRST_CUT_LANE, Lane, make_plan, taking_part, weights_lane
from splitsec.process import prepare, serve
from splitsec.schedule import TRAIN, Turn
from splitsec.transports.circuit import Leg
from splitsec.transports.iothread import CloseCode
from splitsec.transports.limits import CELL_HEAD, SMALL_CELL

__all__ = ["CASES", "Abuse", "Peace", "ProtocolAbuse", "main"]

ABUSER: Final = "splitsec.attacks.abuse"
"""What the abuser's process runs: this file."""
TIMEOUTS: Final = {"connect": 15.0, "lost": 2.0, "gone": 3.0}
"""Seconds, in place of the graph's, that a case ends soon."""
ANSWER: Final = 2.0
"""The same for ``timeouts.answer``, at least: longer where a run in peace is silent for as long."""
MORE: Final = 6.0
"""Seconds; how much longer nobody must say a word until a run is held to stand still.  So it does not for a peer that
is gone."""
LATER: Final = 25
"""The training message to one party at which a case strikes that shall find its detectors settled."""
PATIENCE: Final = 3600.0
"""Seconds for which an abuser waits for an answer."""
STRUCK: Final = {"event": "struck"}
"""What the abuser reports once it has done what it came for."""
AHEAD: Final = 1000
"""Steps."""


# --- the abuser's half: what it says in place of what it should


class Said(NamedTuple):
    """One message to ``peer`` on lane number ``lane``; ``raw``: header and body in place of ``message``'s."""

    peer: str
    lane: int
    message: Message
    raw: tuple[bytes, bytes] | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """The only one."""
        (tensor,) = self.message.tensors.values()
        return tensor

    def with_tensor(self, tensor: torch.Tensor) -> Said:
        """The same, with another tensor."""
        (name,) = self.message.tensors or ("",)
        return self._replace(message=Message(self.message.kind, self.message.key, self.message.facts, {name: tensor}))

    def with_key(self, *key: int) -> Said:
        """The same, for another place."""
        return self._replace(message=Message(self.message.kind, key, self.message.facts, self.message.tensors))


Trick = Callable[["Liar", Said], Iterable[Said]]
"""Given the message that a case strikes at: what is said in its place."""


class Liar:
    """Stands between a party's guard and its I/O thread; ``splitsec.guard.MessageThread`` to the one."""

    def __init__(self, party: Party, abuse: Abuse, at: int) -> None:
        self.party = party
        self.graph = party.graph
        self.plan = party.plan
        self.training = False
        """A training turn is under way."""
        self.before: list[Said] = []
        """The messages of the kind that the case strikes at, as they were said."""
        self.silent = False
        """It says nothing any more, and goes on answering pings."""
        self._abuse = abuse
        self._at = at
        self._thread = party.guard._thread
        self._names = party.guard._names
        if abuse.cells is not None:
            self._at = -1
            _meddle(abuse.cells, lambda: party.report(STRUCK))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._thread, name)

    def send(self, peer: bytes, lane: int, header: bytes, body: Sequence[Any] = (), *, wait: bool = True) -> None:
        """Say it, or what the case says in its place."""
        said = Said(self._names[peer], lane, decode(header, memoryview(bytearray(b"".join(body)))))
        for one in self._said_instead(said):
            if self.silent:
                return
            raw = one.raw or (lambda parts: (parts[0], b"".join(parts[1])))(encode(one.message))
            self._thread.send(self.key_of(one.peer), one.lane, raw[0], [raw[1]], wait=wait)

    def _said_instead(self, said: Said) -> Iterable[Said]:
        kind = said.message.kind
        if kind != self._abuse.strikes or (kind in ("gradient", "activation", "labels") and not self.training):
            return [said]
        if kind == "control" and not self._abuse.word(self, said.message.facts):
            return [said]
        number = sum(one.peer == said.peer for one in self.before)
        self.before.append(said)
        if number == self._at:
            self._at = -1  # once
            self.party.report(STRUCK)
            return self._abuse.does(self, said)
        return [said]

    # --- what a trick may ask

    def key_of(self, peer: str) -> bytes:
        """Public, of a peer."""
        return self.party.guard._keys[peer]

    def others(self, said: Said) -> list[str]:
        """The other peers that the plan lets say something on the same lane."""
        return [peer for peer, lane in self.plan.lanes_out if lane == said.lane and peer != said.peer]

    def be_silent(self) -> None:
        """Say nothing more, to anybody."""
        self.silent = True


class Abuser(Party):
    """A party with a liar at its door."""

    abuse: Abuse
    at = 0
    liar: Liar

    def connect(self, trace: Any = None) -> None:
        super().connect(trace)
        self.liar = Liar(self, self.abuse, self.at)
        self.guard._thread = self.liar
        self.guard._answer_timeout = PATIENCE  # whoever stalls outwaits the others

    def _take_turn(self, engine: Engine, turn: Turn, number: int, update: int) -> tuple[int, int]:
        self.liar.training = turn.phase == TRAIN
        return super()._take_turn(engine, turn, number, update)


# --- the tricks


def _honest(liar: Liar, said: Said) -> Iterable[Said]:
    return [said]


def _instead(change: Callable[[Said], Said]) -> Trick:
    return lambda liar, said: [change(said)]


def _beside(change: Callable[[Liar, Said], Said]) -> Trick:
    """The honest message, and behind it another one."""
    return lambda liar, said: [said, change(liar, said)]


def _other_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """No larger than it was, so that its size alone gives nothing away."""
    wanted = "float16" if tensor.dtype is not torch.float16 else "bfloat16"
    return tensor.to(DTYPES[wanted])


def _with_one(value: float) -> Callable[[Said], Said]:
    def change(said: Said) -> Said:
        tensor = said.tensor.clone().contiguous()
        tensor.view(-1)[0] = value
        return said.with_tensor(tensor)

    return change


def _times(factor: float) -> Callable[[Said], Said]:
    return lambda said: said.with_tensor(said.tensor * factor)


def _filled(value: float) -> Callable[[Said], Said]:
    return lambda said: said.with_tensor(torch.full_like(said.tensor, value))


def _empty(said: Said) -> Said:
    return said._replace(message=Message(said.message.kind, said.message.key))


def _step_on(said: Said, steps: int) -> Said:
    step, *micro = said.message.key
    return said.with_key(step + steps, *micro)


def _undeclared_lane(graph: Graph) -> int:
    """Behind the last one that the graph has."""
    cuts = len(graph.cuts) + len(graph.labels)
    return FIRST_CUT_LANE + 2 * cuts + len(graph.exchanges) + len(graph.segments) + 2


def _redo_number(said: Said, attempt: int, liar: Liar) -> Said:
    """For attempt ``attempt`` at the same step, which may have two."""
    step, micro = said.message.key
    return said.with_key(step, micro + attempt * liar.graph.training.micro_batches)


def _to_others(liar: Liar, said: Said) -> Iterable[Said]:
    return [said, *(said._replace(peer=peer) for peer in liar.others(said))]


def _flood(liar: Liar, said: Said) -> Iterable[Said]:
    most = max(lane.most_waiting for lane in liar.plan.lanes_out.values())
    return [*(_step_on(said, ahead) for ahead in range(1, most + 3)), said]


def _silence(liar: Liar, said: Said) -> Iterable[Said]:
    liar.be_silent()
    return []


def _old_values(liar: Liar, said: Said) -> Iterable[Said]:
    """What was said ten messages ago, in place of this."""
    old = next((one for one in reversed(liar.before[:-10]) if one.tensor.shape == said.tensor.shape), liar.before[0])
    return [said.with_tensor(old.tensor.clone())]


def _old_message(liar: Liar, said: Said) -> Iterable[Said]:
    return [said, next(one for one in liar.before if one.peer == said.peer)]


def _after_the_last_step(liar: Liar, said: Said) -> Iterable[Said]:
    """Before the word that says that we are done: one more gradient."""
    lane = next((lane for lane in liar.plan.lanes_out.values() if lane.kind == "gradient"), None)
    if lane is None:
        return [said]
    gradient = torch.zeros(1, *(extent or 1 for extent in lane.shape), dtype=DTYPES[lane.dtype or "float32"])
    return [Said(lane.peer, lane.number, Message("gradient", (1 << 30, 0), {}, {"": gradient})), said]


def _more_samples(liar: Liar, said: Said) -> Iterable[Said]:
    """Of whoever hears it, ten times as many as it has said itself."""
    facts = {**said.message.facts, "train": 10 * int(said.message.facts["train"])}
    lie = Message("control", (), facts)
    return [said, *(said._replace(peer=peer, message=lie) for peer in liar.plan.neighbours)]


def _weights_of_others(liar: Liar, said: Said) -> Iterable[Said]:
    """Weights, made up, for whoever we talk to, on the lane of a segment that is not ours to hand on."""
    ours = {number for (peer, number), lane in liar.plan.lanes_out.items() if lane.kind == "weights"}
    numbers = [weights_lane(liar.graph, name) for name in liar.graph.segments]
    number = next((one for one in numbers if one not in ours), numbers[0])
    return [said, said._replace(lane=number, message=Message("weights", (0,), {}, {"weights/0": torch.zeros(4)}))]


def _weights_at(change: Callable[[Message], Message]) -> Trick:
    return lambda liar, said: [said._replace(message=change(said.message))]


def _weights_now(liar: Liar, said: Said) -> Iterable[Said]:
    """On a lane that is ours, long before it is our turn to hand on."""
    lanes = [lane for lane in liar.plan.lanes_out.values() if lane.kind == "weights"]
    zeros = Message("weights", (1 << 20,), {}, {"weights/0": torch.zeros(4)})
    return [said, *(Said(lane.peer, lane.number, zeros) for lane in lanes[:1])]


def _poisoned(message: Message, value: float) -> Message:
    tensors = {
        name: torch.full_like(one, value) if one.is_floating_point() else one for name, one in message.tensors.items()
    }
    return Message(message.kind, message.key, message.facts, tensors)


def _cut_short(message: Message) -> Message:
    tensors = {name: one.flatten()[:-1] if one.numel() > 1 else one for name, one in message.tensors.items()}
    return Message(message.kind, message.key, message.facts, tensors)


def _meddle(
    how: Callable[[bytearray, int, Callable[[bytearray, int], None]], None], struck: Callable[[], None]
) -> None:
    """Treat the first large cell that this process passes on for others so: its frame, how many bytes of it are meant,
    and the way on.
    """
    real, done = Leg.wait, False

    def wait(leg: Leg, block: bytearray, used: int, size: int, came_by: Leg | None) -> None:
        nonlocal done
        if came_by is None or size <= SMALL_CELL or done:
            real(leg, block, used, size, came_by)
            return
        done = True
        struck()
        how(block, used, lambda other, meant: real(leg, other, meant, size, came_by))

    Leg.wait = wait  # type: ignore[method-assign, assignment]


def _altered(block: bytearray, used: int, onwards: Callable[[bytearray, int], None]) -> None:
    block[CELL_HEAD + used - 1] ^= 1
    onwards(block, used)


def _twice(block: bytearray, used: int, onwards: Callable[[bytearray, int], None]) -> None:
    onwards(bytearray(block), used)
    onwards(block, used)


# --- the cases

Side = Literal["server", "client"]
Server: Final[Side] = "server"
Client: Final[Side] = "client"
"""Who abuses: the first party that receives a cut's activations from another one, or the first that sends any."""


def _counts(liar: Liar, facts: Mapping[str, Any]) -> bool:
    return facts.get("say") == "counts" and bool(facts.get("train"))


def _done(liar: Liar, facts: Mapping[str, Any]) -> bool:
    return facts.get("say") == "done" and facts.get("party") == liar.party.name


@dataclass(frozen=True)
class Abuse:
    """One case.  ``strikes``: at which kind of message, while training; ``at``: the how manieth to a party, from 0,
    earlier where a turn has fewer; with ``later``, of a run that is long enough.
    """

    name: str
    tried: str
    by: Side
    does: Trick
    strikes: str = "gradient"
    at: int = 0
    later: bool = False
    word: Callable[[Liar, Mapping[str, Any]], bool] = _counts
    """Of ``control`` messages: those that are meant."""
    graph: Callable[[Graph], Graph] = lambda graph: graph
    """The graph that the abuser goes by."""
    needs: Callable[[Graph], bool] = lambda graph: True
    """Whether there is such a thing in a graph."""
    cells: Callable[[bytearray, int, Callable[[bytearray, int], None]], None] | None = None
    """What becomes of a cell that the abuser passes on for others."""


def _one_more_epoch(graph: Graph) -> Graph:
    training = graph.training.model_copy(update={"epochs": graph.training.epochs + 1})
    timeouts = graph.timeouts.model_copy(update={"connect": 4.0})
    return graph.model_copy(update={"training": training, "timeouts": timeouts})


def _several_micro_batches(graph: Graph) -> bool:
    return graph.training.micro_batches > 1


def _hands_on(graph: Graph) -> bool:
    return graph.schedule == "round_robin" and any(
        segment.at in graph.groups and len(graph.members(segment.at)) > 1 for segment in graph.segments.values()
    )


def _passes_on(graph: Graph) -> bool:
    """Whether the abusing server is the relay between two others who have weights to hand on."""
    server = abuser_of(graph, Server)
    circuits = [one for one in graph.circuits_between() if all(route == (server,) for route in one.routes)]
    return _hands_on(graph) and bool(circuits)


def _whole_classes(graph: Graph) -> bool:
    return any(edge.dtype == "int64" and graph.segments[edge.target].loss is not None for edge in graph.labels)


CASES: Final = (
    # a server, or whoever else receives activations
    Abuse(
        "more epochs: another graph",
        "comes with a graph that has one more epoch",
        Server,
        _honest,
        graph=_one_more_epoch,
    ),
    Abuse(
        "more epochs: a gradient after the last step",
        "sends one more gradient when the run is over",
        Server,
        _after_the_last_step,
        strikes="control",
        word=_done,
    ),
    Abuse(
        "more epochs: never done",
        "never says that the run is over for it, and waits for more",
        Server,
        _silence,
        strikes="control",
        word=_done,
    ),
    Abuse(
        "more samples",
        "says that the clients' streams have ten times as many samples as they said themselves",
        Server,
        _more_samples,
        strikes="control",
    ),
    Abuse(
        "another shape",
        "answers with a gradient that has one dimension more",
        Server,
        _instead(lambda said: said.with_tensor(said.tensor.unsqueeze(-1))),
    ),
    Abuse(
        "another dtype",
        "answers in half precision",
        Server,
        _instead(lambda said: said.with_tensor(_other_dtype(said.tensor))),
    ),
    Abuse(
        "more rows",
        "answers for twice as many samples as it was asked about",
        Server,
        _instead(lambda said: said.with_tensor(torch.cat([said.tensor, said.tensor]))),
    ),
    Abuse(
        "fewer rows",
        "answers for one sample fewer",
        Server,
        _instead(lambda said: said.with_tensor(said.tensor[:-1].contiguous())),
    ),
    Abuse(
        "an undeclared cut",
        "sends a gradient on a lane that no cut of the graph has",
        Server,
        _beside(lambda liar, said: said._replace(lane=_undeclared_lane(liar.graph))),
    ),
    Abuse(
        "the wrong direction",
        "sends an activation back to the party that sends them",
        Server,
        _beside(
            lambda liar, said: said._replace(
                lane=said.lane - 1, message=Message("activation", said.message.key, {}, said.message.tensors)
            )
        ),
    ),
    Abuse(
        "another kind",
        "calls a message on the gradient's lane weights",
        Server,
        _instead(
            lambda said: said._replace(message=Message("weights", said.message.key, {}, said.message.tensors)),
        ),
    ),
    Abuse(
        "words beside the gradient",
        "puts a request into the gradient's header",
        Server,
        _instead(
            lambda said: said._replace(
                message=Message("gradient", said.message.key, {"send": "labels"}, said.message.tensors)
            )
        ),
    ),
    Abuse(
        "bytes that mean nothing",
        "sends a header that is no message",
        Server,
        _instead(lambda said: said._replace(raw=(b"\xc1" * 20, b""))),
    ),
    Abuse(
        "an empty answer",
        "answers a training batch with no gradient at all",
        Server,
        _instead(_empty),
    ),
    Abuse(
        "a gradient once more",
        "sends the same gradient twice",
        Server,
        _beside(lambda liar, said: said),
    ),
    Abuse(
        "an old gradient",
        "sends the first gradient once more, some steps later",
        Server,
        _old_message,
        at=3,
    ),
    Abuse(
        "an old gradient under a new name",
        "sends the numbers of a gradient of some steps ago as this step's",
        Server,
        _old_values,
        at=12,
    ),
    Abuse(
        "a gradient of a later step",
        f"answers for {AHEAD} steps ahead",
        Server,
        _instead(partial(_step_on, steps=AHEAD)),
    ),
    Abuse(
        "the next gradient, too",
        "sends the next step's gradient before it has the activation",
        Server,
        lambda liar, said: [_step_on(said, 1), said],
    ),
    Abuse(
        "gradients of many steps",
        "floods with gradients of steps ahead",
        Server,
        _flood,
    ),
    Abuse(
        "another micro-batch",
        "answers for a micro-batch that there is not",
        Server,
        _instead(lambda said: said.with_key(said.message.key[0], said.message.key[1] + (1 << 10))),
    ),
    Abuse(
        "a redo that nobody asked for",
        "answers a step a second time, as if it were redone",
        Server,
        _beside(lambda liar, said: _redo_number(said, 1, liar)),
    ),
    Abuse(
        "swapped micro-batches",
        "answers the second micro-batch before the first",
        Server,
        lambda liar, said: [said.with_key(said.message.key[0], said.message.key[1] + 1)],
        needs=_several_micro_batches,
    ),
    Abuse(
        "not a number",
        "answers with a gradient that has a NaN in it",
        Server,
        _instead(_with_one(float("nan"))),
    ),
    Abuse(
        "infinity",
        "answers with a gradient that has an infinity in it",
        Server,
        _instead(_with_one(float("inf"))),
    ),
    Abuse(
        "huge values at once",
        "answers the first batch with a gradient of 1e30 everywhere",
        Server,
        _instead(_filled(1e30)),
    ),
    Abuse(
        "large values at once",
        "answers the first batch with a gradient that is 10,000 times as large as it should be",
        Server,
        _instead(_times(1e4)),
    ),
    Abuse(
        "large values later",
        f"does the same after {LATER} honest answers to the same party",
        Server,
        _instead(_times(1e4)),
        at=LATER,
        later=True,
    ),
    Abuse(
        "another party's gradient",
        "sends one party's gradient to the others of its group as well",
        Server,
        _to_others,
        needs=lambda graph: any(len(group.members) > 1 for group in graph.groups.values()),
    ),
    Abuse(
        "weights",
        "hands weights to a party, as another member of its group would",
        Server,
        _weights_of_others,
    ),
    Abuse(
        "a stall",
        "stays connected and answers nothing any more",
        Server,
        _silence,
    ),
    Abuse(
        "a relay that alters what it passes on",
        "flips a bit in the weights that one client hands on to another through it",
        Server,
        _honest,
        cells=_altered,
        needs=_passes_on,
    ),
    Abuse(
        "a relay that drops what it passes on",
        "keeps a part of the weights that one client hands on to another through it",
        Server,
        _honest,
        cells=lambda block, used, onwards: None,
        needs=_passes_on,
    ),
    Abuse(
        "a relay that repeats what it passes on",
        "sends a part of the weights that one client hands on to another through it twice",
        Server,
        _honest,
        cells=_twice,
        needs=_passes_on,
    ),
    # a client, or whoever else sends activations
    Abuse(
        "client: not a number",
        "sends an activation that has a NaN in it",
        Client,
        _instead(_with_one(float("nan"))),
        strikes="activation",
    ),
    Abuse(
        "client: more rows",
        "sends an activation of twice as many samples as a batch has",
        Client,
        _instead(lambda said: said.with_tensor(torch.cat([said.tensor, said.tensor]))),
        strikes="activation",
    ),
    Abuse(
        "client: another shape",
        "sends an activation that has one dimension more",
        Client,
        _instead(lambda said: said.with_tensor(said.tensor.unsqueeze(-1))),
        strikes="activation",
    ),
    Abuse(
        "client: nothing",
        "sends an empty activation",
        Client,
        _instead(_empty),
        strikes="activation",
    ),
    Abuse(
        "client: a later step",
        f"sends an activation for {AHEAD} steps ahead",
        Client,
        _instead(partial(_step_on, steps=AHEAD)),
        strikes="activation",
    ),
    Abuse(
        "client: the wrong direction",
        "sends a gradient to the party that makes them",
        Client,
        _beside(
            lambda liar, said: said._replace(
                lane=said.lane + 1, message=Message("gradient", said.message.key, {}, said.message.tensors)
            )
        ),
        strikes="activation",
    ),
    Abuse(
        "client: a third attempt",
        "redoes a step more often than a step may be redone",
        Client,
        _beside(lambda liar, said: _redo_number(said, 2, liar)),
        strikes="activation",
    ),
    Abuse(
        "client: an earlier step again",
        "redoes a step that is over",
        Client,
        lambda liar, said: [_redo_number(liar.before[0], 1, liar), said],
        strikes="activation",
        at=3,
    ),
    Abuse(
        "client: classes that there are not",
        "sends labels far above the number of classes",
        Client,
        _instead(_filled(1 << 20)),
        strikes="labels",
        needs=_whole_classes,
    ),
    Abuse(
        "client: more samples",
        "says that streams have ten times as many samples as their parties said",
        Client,
        _more_samples,
        strikes="control",
    ),
    Abuse(
        "client: weights before its turn",
        "hands weights to the next member in the middle of its own turn",
        Client,
        _weights_now,
        strikes="activation",
        needs=_hands_on,
    ),
    Abuse(
        "client: weights that are not numbers",
        "hands on weights of NaN",
        Client,
        _weights_at(partial(_poisoned, value=float("nan"))),
        strikes="weights",
        needs=_hands_on,
    ),
    Abuse(
        "client: weights of another shape",
        "hands on weights that do not fit",
        Client,
        _weights_at(_cut_short),
        strikes="weights",
        needs=_hands_on,
    ),
    Abuse(
        "client: a stall",
        "stays connected and sends nothing any more",
        Client,
        _silence,
        strikes="activation",
    ),
)
"""Every case, in the order of the report."""

BY_NAME: Final = {case.name: case for case in CASES}


# --- the abuser's process


def main() -> int:
    """Be the abusing party that standard input describes."""
    return serve(_abuse)


def _abuse(assignment: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    prepare(assignment["threads"])
    abuse = BY_NAME[assignment["options"]["case"]]
    graph = abuse.graph(parse_graph(json.dumps(assignment["graph"]), assignment["graph_file"]))
    party_file = load_party(assignment["party_file"]).model_copy(update={"listen": None}).undefended()
    group_key = assignment["group_key"]
    tell = follow_parent(lambda event: None if event["event"] == "done" else report(event))
    party = Abuser(
        graph,
        party_file,
        private_key=base64.b64decode(assignment["key"]),
        group_key=None if group_key is None else base64.b64decode(group_key),
        job=Job(state=Path(assignment["job"]["state"]) / party_file.party),
        report=tell,
    )
    if graph != parse_graph(json.dumps(assignment["graph"]), assignment["graph_file"]):
        report(STRUCK)
    party.abuse = abuse
    party.at = assignment["options"]["at"]
    try:
        with suppress(SplitsecError):  # whoever refused it is gone, and all the others with it
            party.connect()
            party.agree()
            party.run()
            party.gossip.say_done()
            party.stay()
            while party.liar.silent:  # alive, until the parent has seen enough
                party.guard.wait()
    finally:
        party.close(CloseCode.ERROR)
    report({"event": "done"})


# --- the judge's half


@dataclass
class Peace:
    """What a run of the same graph is like when nobody harms it: what leaves, and the weights that come of it."""

    fought: Fought
    exact: bool
    """Whether another run gives the same weights: nobody draws noise, or hides in a group."""
    graph: Graph
    steps: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    """For which steps something leaves, by kind and cut, all parties together."""
    words: int = 0
    """Messages about counts and the last word, of the party that says most."""
    weights: int = 0
    """Messages of weights, all parties together."""
    silence: float = 0.0
    """Seconds; the longest time for which nobody said anything."""

    @property
    def _answer(self) -> float:
        return round(max(ANSWER, 2 * self.silence), 1)

    @property
    def timeouts(self) -> dict[str, float]:
        """In place of the graph's, where somebody harms a run."""
        return {**TIMEOUTS, **({"answer": self._answer} if "answer" in Timeouts.model_fields else {})}

    @property
    def quiet(self) -> float:
        """Seconds without a word from anybody after which a run stands still."""
        return self._answer + MORE

    @classmethod
    def on(cls, ground: Ground, attack: str, nest: Nest | None, batches: int = 1) -> Peace:
        """Run it, for ``batches`` at least.  Raises ``PartyFailed`` where a folder does not even train in peace."""
        last, silence = time.monotonic(), 0.0

        def when(party: str, event: Mapping[str, Any], processes: object) -> None:
            nonlocal last, silence
            silence, last = max(silence, time.monotonic() - last), time.monotonic()

        fought = ground.fight(attack, None, batches=batches, when=when, nest=nest)
        for party, failure in fought.failures.items():
            raise PartyFailed(party, failure["text"], exit_code=failure["exit_code"], kind=failure["code"])
        peace = cls(fought, _is_exact(ground), ground.graph, silence=silence)
        for party in taking_part(ground.graph):
            words = 0
            for entry in _journal(fought, party):
                if entry["kind"] == "control":
                    words += 1
                elif entry["kind"] == "weights":
                    peace.weights += 1
                elif entry["step"] is not None:
                    peace.steps.setdefault((entry["kind"], entry["cut"]), set()).add(entry["step"])
            peace.words = max(peace.words, words)
        return peace

    def leaves_more(self, fought: Fought, honest: Iterable[str]) -> str | None:
        """What left an honest party in ``fought`` that the graph does not declare, or that does not leave in peace."""
        weights = 0
        for party in honest:
            lanes = make_plan(self.graph, party).lanes_out
            declared = {(lane.peer, lane.kind, lane.name): lane for lane in lanes.values()}
            seen: set[tuple[Any, ...]] = set()
            words = 0
            for entry in _journal(fought, party):
                kind, cut = entry["kind"], entry["cut"]
                lane = declared.get((entry["to"], kind, cut))
                if lane is None:
                    return f"{party} sent {kind} of {cut} to {entry['to']}, which the graph does not declare"
                words += kind == "control"
                weights += kind == "weights"
                if entry["step"] is None:
                    continue
                place = (entry["to"], kind, cut, entry["step"], entry["micro_batch"])
                if place in seen:
                    return f"{party} sent {kind} of {cut} for step {entry['step']} twice"
                seen.add(place)
                if entry["step"] not in self.steps.get((kind, cut), ()):
                    return f"{party} sent {kind} of {cut} for step {entry['step']}, which no run in peace has"
                if not _fits(entry, lane):
                    return f"{party} sent {kind} of {cut} as {entry['shapes']} {entry['dtypes']}"
            if words > self.words:
                return f"{party} sent {words} control messages, where {self.words} are the most in peace"
        if weights > self.weights:
            return f"weights left {weights} times, in peace {self.weights} times"
        return None

    def weights_moved(self, fought: Fought, honest: Iterable[str]) -> str | None:
        """Whose weights, as an honest party wrote them, are not those of the run in peace."""
        for party in honest:
            for file in sorted((fought.out / party).glob("*.safetensors")):
                own = self.fought.out / party / file.name
                if not self.exact:
                    continue
                if not own.is_file() or own.read_bytes() != file.read_bytes():
                    return f"the weights of {file.stem} that {party} wrote are not those of a run in peace"
        return None


def _fits(entry: Mapping[str, Any], lane: Lane) -> bool:
    if lane.rows is None or not entry["shapes"]:
        return True
    ((rows, *shape),) = entry["shapes"]
    return 0 < rows <= lane.rows and tuple(shape) == tuple(lane.shape) and entry["dtypes"] == [lane.dtype]


def _journal(fought: Fought, party: str) -> Iterator[Mapping[str, Any]]:
    """What left ``party``, as its own journal has it, which must be whole."""
    file = fought.place / "state" / party / JOURNAL_FILE
    if not file.is_file():
        return
    if findings := verify(file):
        raise LedgerError(f"{file}: {findings[0].what}", expected="a journal that verifies")
    yield from (entry.values for entry in read(file) if "to" in entry.values)


def _is_exact(ground: Ground) -> bool:
    """Whether two runs on this ground give the same weights, as far as its graph and its files say."""
    if ground.graph.anonymous is not None:
        return False
    for name, one in ground.folder.parties.items():
        demands = demands_of(ground.graph, one, make_plan(ground.graph, name)).values()
        if any(demand.policy is not None for demand in demands):
            return False
        if any(code.dp_sgd is not None for code in one.segments.values()):
            return False
    return True


REFUSALS: Final = ("PeerMisbehaved", "PeerRefusedUs", "PeerUnreachable", "SuspectedAttack")
"""Errors with which a party turns a peer away or never lets it in, and says which."""
STALLED: Final = "is connected, but has "
"""How ``PeerLost`` says that a peer owes an answer or a word; otherwise it tells of one that went by itself."""


def line_of(failure: Mapping[str, Any]) -> str:
    """The first line of what a party's operator reads."""
    return str(failure["text"]).splitlines()[0]


def refusal(fought: Fought, honest: Iterable[str], offender: str | None) -> tuple[str, str] | None:
    """Who turned ``offender`` away, and in what words."""
    for party in honest:
        failure = fought.failures.get(party)
        if failure is None or (failure["code"] not in REFUSALS and STALLED not in failure["text"]):
            continue
        if failure["code"] == "SuspectedAttack" or offender in (None, failure["peer"]):
            return party, line_of(failure)
    return None


def judge(case: str, tried: str, fought: Fought, peace: Peace, honest: Sequence[str], offender: str) -> Case:
    """Whether the honest parties held."""
    told = refusal(fought, honest, offender)
    more = peace.leaves_more(fought, honest)
    moved = peace.weights_moved(fought, honest)
    wrote = [party for party in honest if any((fought.out / party).glob("*.safetensors"))]
    if more is not None:
        return Case(case, tried, False, more)
    if moved is not None:
        return Case(case, tried, False, moved + ("" if told is None else f"; {told[0]} said: {told[1]}"))
    if told is not None:
        return Case(case, tried, True, f"{told[0]}: {told[1]}")
    if fought.stalled:
        waiting = [party for party in honest if party not in fought.failures and party not in wrote]
        return Case(
            case,
            tried,
            False,
            f"{', '.join(waiting)} waited without a word for as long as we looked (nothing left, nothing was written)",
        )
    crashed = [(party, fought.failures[party]) for party in honest if party in fought.failures]
    own = [(party, failure) for party, failure in crashed if failure["peer"] is None]
    if own:
        party, failure = own[0]
        return Case(case, tried, False, f"{party} stopped and took it for a fault of its own: {line_of(failure)}")
    if crashed:
        party, failure = crashed[0]
        return Case(case, tried, False, f"{party} stopped, but not because of it: {line_of(failure)}")
    return survived(case, tried, fought, peace, honest)


def survived(case: str, tried: str, fought: Fought, peace: Peace, honest: Iterable[str]) -> Case:
    """Of a run that came to its end, with nobody's weights moved: held, where somebody noticed."""
    end = "weights equal to the last bit" if peace.exact else "its end (no two runs give the same weights here)"
    noticed = noticed_by(fought, honest)
    if noticed is None:
        return Case(case, tried, False, f"the run went on to {end}, but no log says a word of it")
    return Case(case, tried, True, f"{noticed}; the run went on to {end}")


def noticed_by(fought: Fought, honest: Iterable[str]) -> str | None:
    """A line in somebody's log, of a run that went on."""
    broke = [
        (party, event["peer"], event["why"])
        for party in honest
        for event in fought.events[party]
        if event["event"] == "interrupted"
    ]
    broke.sort(key=lambda one: any(words in one[2] for words in ("has closed", "connection broke", "circuit", "relay")))
    logged = [(party, line) for party in honest for line in fought.logs.get(party, "").splitlines() if line.strip()]
    if broke:
        party, peer, why = broke[0]
        return f"{party}: the connection with {peer} broke ({why}) and was made again"
    return f"{logged[0][0]}: {logged[0][1]}" if logged else None


class ProtocolAbuse(Attack):
    """Every case that applies to the graph, one after the other.

    ``cases``: only these, by name.  ``nest``: where party processes come from; else one of its own.
    """

    name: ClassVar[str] = "protocol-abuse"

    def __init__(self, cases: Sequence[str] | None = None, nest: Nest | None = None) -> None:
        self._nest = nest
        self.cases = [BY_NAME[name] for name in cases] if cases is not None else list(CASES)

    def run(self, ground: Ground) -> Outcome:
        began = time.monotonic()
        places: dict[Side, str | None] = {by: abuser_of(ground.graph, by) for by in (Server, Client)}
        wanted = [
            (case, party)
            for case in self.cases
            if (party := places[case.by]) is not None and ground.attacker in (None, party) and case.needs(ground.graph)
        ]
        if not wanted:
            judged = Judgement("does not apply", "no activation leaves a party here, so there is nobody to abuse")
            return self.outcome(ground, judged, seconds=time.monotonic() - began)
        with open_nest([ABUSER]) if self._nest is None else nullcontext(self._nest) as nest:
            peace: dict[bool, Peace | None] = {False: None, True: None}
            found = []
            for tried, (case, party) in enumerate(wanted, 1):
                if (calm := peace[case.later]) is None:
                    calm = peace[case.later] = Peace.on(ground, self.name, nest, _batches(ground, case))
                if (one := self._one(ground, case, party, calm, nest)) is not None:
                    found.append(one)
                ground.report({"event": "progress", "done": tried, "of": len(wanted)})
        return self.outcome(ground, judgement(found, len(wanted)), seconds=time.monotonic() - began)

    def _one(self, ground: Ground, case: Abuse, party: str, peace: Peace, nest: Nest | None) -> Case | None:
        """None: the run gave no occasion for it."""
        a_turn = ground.steps_an_epoch() // (1 if ground.graph.schedule == "parallel" else ground.graph.streams)
        fought = ground.fight(
            self.name,
            None,
            [party],
            batches=_batches(ground, case),
            module=ABUSER,
            options={"case": case.name, "at": case.at if case.later else min(case.at, max(0, a_turn - 2))},
            timeouts=peace.timeouts,
            quiet=peace.quiet,
            nest=nest,
        )
        if (failure := fought.failures.get(party)) is not None:
            told = f"{failure['text']}\n{fought.logs.get(party, '')}"
            raise PartyFailed(party, told, exit_code=failure["exit_code"], kind=failure["code"])
        if STRUCK not in fought.events[party]:
            return None
        honest = [name for name in ground.graph.parties if name in taking_part(ground.graph) and name != party]
        return judge(case.name, case.tried, fought, peace, honest, party)


def _batches(ground: Ground, case: Abuse) -> int:
    """Of a run in which there is an occasion for ``case``."""
    return (case.at + 2) * ground.graph.streams if case.later else 1


def judgement(found: Sequence[Case], tried: int) -> Judgement:
    """All cases in one sentence; ``tried``: with those for which there was no occasion."""
    broken = [case.name for case in found if not case.held]
    figures = {"cases": float(len(found)), "held": float(len(found) - len(broken))}
    rest = f" For {tried - len(found)} more a run of this graph gives no occasion." if tried > len(found) else ""
    if not found:
        return Judgement("does not apply", "a run of this graph gives no occasion for any of the cases")
    if not broken:
        return Judgement("refused", f"All {len(found)} cases were refused.{rest}", figures=figures, cases=tuple(found))
    return Judgement(
        "not all held",
        f"{len(found) - len(broken)} of {len(found)} cases were held; not: {', '.join(broken)}.{rest}",
        figures=figures,
        cases=tuple(found),
    )


def abuser_of(graph: Graph, by: Side) -> str | None:
    """The party that abuses: over the first cut between two parties, the one that receives, or the one that sends."""
    for cut in graph.cuts:
        source, target = graph.segments[cut.source].at, graph.segments[cut.target].at
        if graph.party_at(source, 0) != graph.party_at(target, 0):
            return graph.party_at(target if by == Server else source, 0)
    return None


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
