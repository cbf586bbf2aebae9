"""What one party has to do, worked out from the graph alone: pure, printable, no torch, no network.

Here: for each stream the stages a party runs in order, the edges that reach and leave them, and the lanes on which
their messages travel.  Not here: when a stage runs (``engine``), what a turn is (``schedule``).  Next: ``engine``.

A *stream* is one line of samples through the graph: with groups, member ``k`` of every group works in stream ``k``;
without groups there is one stream.  A *lane* is one cut and direction between two parties, a number that both derive.

Outside an anonymous group its members are not told apart: there, a plan speaks of the group where it would speak of a
member.  And a stream is a place in an order of turns that only the members know, so that each is ready for every one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

from splitsec.errors import InternalError
from splitsec.graph import Circuit, Graph, Link, wire_bytes

__all__ = [
    "CONTROL",
    "ORDER",
    "Edge",
    "Lane",
    "Plan",
    "Stage",
    "StreamPlan",
    "cell_links",
    "exchange_lane",
    "largest_bodies",
    "make_plan",
    "relays_needed",
    "taking_part",
    "weights_lane",
]

Kind = Literal["control", "order", "weights", "activation", "gradient", "labels", "taken", "exchange"]

CONTROL: Final = 0
"""Lane of counts and of the last word; between parties that are not led through a third which has it with both."""
ORDER: Final = 1
"""Lane of sample-id fingerprints; end to end between parties that hold samples of one stream."""
FIRST_CUT_LANE: Final = 16

CONTROL_BODY: Final = 0
ORDER_BODY: Final = 256 * 1024 * 1024
WEIGHTS_BODY: Final = 2 * 1024 * 1024 * 1024


@dataclass(frozen=True)
class Lane:
    """One kind of message between this party and one peer.

    ``shape`` is without the batch dimension; None in it means any size.  ``max_body`` bounds a message, in bytes, as it
    is on the way.
    """

    number: int
    peer: str
    kind: Kind
    name: str
    max_body: int
    shape: tuple[int | None, ...] = ()
    dtype: str = ""
    rows: int | None = None
    """Most samples (first dimension) in one message; None where there is no batch dimension."""
    most_waiting: int = 1024
    """Messages that may wait here; an honest peer is never further ahead."""
    codec: str | None = None
    """How tensors are written here (``codecs``); ``shape`` and ``dtype`` are what they are before and after."""


@dataclass(frozen=True)
class Edge:
    """One cut or label edge as it stands in one stream.  ``source`` is a segment, or the place of labels."""

    index: int
    source: str
    target: str
    source_party: str
    target_party: str
    shape: tuple[int, ...]
    dtype: str
    lane: int
    back_lane: int
    output: str | None = None
    field: str | None = None
    answered: bool = True
    """Whether something comes back for every message: a gradient, or an empty ``taken`` where there is none to send."""
    codec: str | None = None

    @property
    def local(self) -> bool:
        """Both ends at one party: nothing crosses a line."""
        return self.source_party == self.target_party


@dataclass(frozen=True)
class Stage:
    """One segment at this party in one stream: inputs in file order, outputs in topological order of their targets."""

    segment: str
    inputs: tuple[Edge, ...]
    outputs: tuple[Edge, ...]
    labels: Edge | None
    reads: str | None
    join: str
    loss_weight: float


@dataclass(frozen=True)
class StreamPlan:
    """What this party does for the samples of one stream.  ``stages`` stand in topological order."""

    stream: int
    stages: tuple[Stage, ...]
    gives_labels: tuple[Edge, ...]

    @property
    def own_labels(self) -> tuple[Edge, ...]:
        """Label edges that begin here, whether they leave or not."""
        stays = (stage.labels for stage in self.stages if stage.labels is not None and stage.labels.local)
        return (*self.gives_labels, *stays)

    @property
    def idle(self) -> bool:
        """This party has no part in the stream."""
        return not self.stages and not self.gives_labels

    def fields(self, *, labels: bool) -> frozenset[str]:
        """Names of the sample fields that this party must have; with ``labels`` those of its label edges too."""
        names = {stage.reads for stage in self.stages if stage.reads is not None}
        if labels:
            names |= {edge.field for edge in self.own_labels if edge.field is not None}
        return frozenset(names)


@dataclass(frozen=True)
class Plan:
    """Everything one party needs to know before data, models or sockets exist."""

    party: str
    streams: tuple[StreamPlan, ...]
    lanes_in: dict[tuple[str, int], Lane]
    """What may arrive, by (peer, lane number)."""
    lanes_out: dict[tuple[str, int], Lane]
    """What may leave, by (peer, lane number)."""
    links: tuple[Link, ...]
    """The links with lanes that this party is an end of."""
    circuits: tuple[Circuit, ...]
    """The circuits that this party is an end of."""
    cell_links: tuple[Link, ...]
    """The links over which cells reach and leave this party, its own and others'."""

    @property
    def neighbours(self) -> tuple[str, ...]:
        """The peers that counts and the last word are told to, and heard from."""
        return tuple(peer for peer in self.peers if (peer, CONTROL) in self.lanes_out)

    @property
    def peers(self) -> tuple[str, ...]:
        """Everybody that this party has a channel with: over a link, or through relays."""
        pairs = [*self.links, *((circuit.first, circuit.second) for circuit in self.circuits)]
        return tuple(other if one == self.party else one for one, other in pairs)

    def __str__(self) -> str:
        lines = [f"{self.party}:"]
        for stream in self.streams:
            for edge in stream.gives_labels:
                lines.append(f"  stream {stream.stream}: labels {edge.field} -> {edge.target} at {edge.target_party}")
            for stage in stream.stages:
                sources = [f"{e.source}@{e.source_party}" for e in stage.inputs] + (
                    [f"data {stage.reads}"] if stage.reads else []
                )
                targets = [f"{e.target}@{e.target_party}" for e in stage.outputs] + (["loss"] if stage.labels else [])
                lines.append(
                    f"  stream {stream.stream}: {', '.join(sources)} -> [{stage.segment}] -> {', '.join(targets)}"
                )
        return "\n".join(lines)


def _edges(
    graph: Graph, stream: int, party_at: Callable[[str, int], str]
) -> Iterator[tuple[Literal["cut", "labels"], Edge]]:
    for index, cut in enumerate(graph.cuts):
        yield (
            "cut",
            Edge(
                index=index,
                source=cut.source,
                target=cut.target,
                source_party=party_at(graph.segments[cut.source].at, stream),
                target_party=party_at(graph.segments[cut.target].at, stream),
                shape=tuple(cut.shape),
                dtype=cut.dtype,
                lane=FIRST_CUT_LANE + 2 * index,
                back_lane=FIRST_CUT_LANE + 2 * index + 1,
                output=cut.output,
                codec=cut.codec,
            ),
        )
    for index, labels in enumerate(graph.labels):
        number = len(graph.cuts) + index
        giver = party_at(labels.source, stream)
        holds_segment = any(party_at(segment.at, stream) == giver for segment in graph.segments.values())
        yield (
            "labels",
            Edge(
                index=number,
                source=labels.source,
                target=labels.target,
                source_party=giver,
                target_party=party_at(graph.segments[labels.target].at, stream),
                shape=tuple(labels.shape),
                dtype=labels.dtype,
                lane=FIRST_CUT_LANE + 2 * number,
                back_lane=FIRST_CUT_LANE + 2 * number + 1,
                field=labels.field,
                answered=not holds_segment,
            ),
        )


def largest_bodies(graph: Graph, *, exchanges: bool = False) -> Iterator[tuple[frozenset[str], int]]:
    """Two parties and the bytes of the largest body that passes between them, for every cut and labels edge of every
    stream; with ``exchanges``, for every exchange instead.  Weights and orders have no size that a graph knows.
    """
    if exchanges:
        for one in graph.exchanges:
            yield frozenset((one.source, one.target)), one.max_bytes
        return
    rows = _rows(graph)
    for stream in range(graph.streams):
        for _, edge in _edges(graph, stream, graph.party_at):
            yield (
                frozenset((edge.source_party, edge.target_party)),
                wire_bytes(edge.codec, edge.shape, edge.dtype, rows),
            )


def _rows(graph: Graph) -> int:
    return -(-graph.training.batch_size // graph.training.micro_batches)


def taking_part(graph: Graph) -> frozenset[str]:
    """The parties that a training or prediction needs: they hold segments, data or labels."""
    places = [segment.at for segment in graph.segments.values()] + [labels.source for labels in graph.labels]
    return frozenset(member for place in places for member in graph.members(place))


def relays_needed(graph: Graph) -> frozenset[str]:
    """The parties that it needs besides, as relays alone."""
    working = taking_part(graph)
    circuits = _training(graph, working)[1]
    return frozenset(relay for one in circuits for route in one.routes for relay in route) - working


def cell_links(graph: Graph, party: str, circuits: Iterable[Circuit] | None = None) -> tuple[Link, ...]:
    """The links of ``party`` over which the cells of ``circuits`` pass; without these, of all that the graph has."""
    passed: set[frozenset[str]] = set()
    for one in graph.circuits_between() if circuits is None else circuits:
        for route in one.routes:
            if party in (one.first, one.second) or party in route:
                passed |= {frozenset(side) for side in pairwise((one.first, *route, one.second)) if party in side}
    return tuple(link for link in graph.links() if frozenset(link) in passed)


def _training(graph: Graph, working: frozenset[str]) -> tuple[list[Link], list[Circuit]]:
    """The links and circuits between parties that take part and talk."""
    members = set(graph.groups[graph.anonymous].members) if graph.anonymous is not None else set()
    near = members | graph.far_ends

    def wanted(one: str, other: str) -> bool:
        # A member of an anonymous group talks to other members and to far ends, and to nobody else under its own name.
        return {one, other} <= working and (not {one, other} & members or {one, other} <= near)

    talking, training = set(graph.talking()), set(graph.talking(exchanges=False))
    return (
        [link for link in graph.links() if frozenset(link) in talking and wanted(*link)],
        [
            one
            for one in graph.circuits_between()
            if {one.first, one.second} in training and wanted(one.first, one.second)
        ],
    )


def _speaking(graph: Graph, links: Iterable[Link], circuits: Iterable[Circuit]) -> Iterator[tuple[str, str]]:
    """The pairs that have a control lane: all, but for those that a third leads, who has one with both of them.

    Members of an anonymous group all have one with each other.
    """
    members = set(graph.groups[graph.anonymous].members) if graph.anonymous is not None else set()
    linked = {frozenset(link) for link in links}
    yield from links
    for first, second, routes in circuits:
        led = len(routes) == len(routes[0]) == 1 and all(
            frozenset((end, routes[0][0])) in linked for end in (first, second)
        )
        if not led or {first, second} <= members:
            yield first, second


def weights_lane(graph: Graph, segment: str) -> int:
    """Lane on which ``segment``'s weights are handed from one member of its group to the next."""
    return (
        FIRST_CUT_LANE
        + 2 * (len(graph.cuts) + len(graph.labels))
        + len(graph.exchanges)
        + list(graph.segments).index(segment)
    )


def exchange_lane(graph: Graph, name: str) -> int:
    """Lane of the named tensor exchange."""
    return FIRST_CUT_LANE + 2 * (len(graph.cuts) + len(graph.labels)) + [e.name for e in graph.exchanges].index(name)


def make_plan(graph: Graph, party: str, *, exchanges: bool = False) -> Plan:
    """The plan of ``party``: its stages for every stream, and the lanes that may carry its messages.

    A run connects the parties that take part in it; with ``exchanges``, the pairs that exchange tensors are connected.
    """
    if party not in graph.parties:
        raise InternalError(f"no plan for unknown party {party!r}")
    lanes_in: dict[tuple[str, int], Lane] = {}
    lanes_out: dict[tuple[str, int], Lane] = {}

    def both(source: str, target: str, number: int, kind: Kind, name: str, max_body: int, **more: object) -> None:
        if source == target or party not in (source, target):
            return
        peer, lanes = (target, lanes_out) if party == source else (source, lanes_in)
        lanes[peer, number] = Lane(number, peer, kind, name, max_body, **more)  # type: ignore[arg-type]

    hidden = graph.anonymous
    inside = hidden is not None and party in graph.groups[hidden].members

    def seen(name: str) -> str:
        return hidden if hidden is not None and not inside and name in graph.groups[hidden].members else name

    def party_at(place: str, stream: int) -> str:
        if place != hidden:
            return graph.party_at(place, stream)
        return party if inside else place

    if exchanges:
        return _exchanging(graph, party)
    links, circuits = _training(graph, taking_part(graph))
    for one, other in _speaking(graph, links, circuits):
        both(seen(one), seen(other), CONTROL, "control", "control", CONTROL_BODY)
        both(seen(other), seen(one), CONTROL, "control", "control", CONTROL_BODY)

    rows = _rows(graph)
    # Neighbours are at most one step apart, so two parties are at most as many apart as there are parties.
    ahead = graph.training.micro_batches * graph.streams * (len(graph.parties) + 1)
    streams = []
    for stream in range(graph.streams):
        edges = list(_edges(graph, stream, party_at))
        cuts = {edge.index: edge for kind, edge in edges if kind == "cut"}
        labels = {edge.target: edge for kind, edge in edges if kind == "labels"}
        for kind, edge in edges:
            name = f"{edge.source} -> {edge.target}"
            size = wire_bytes(edge.codec, edge.shape, edge.dtype, rows)
            declared: dict[str, object] = {
                "shape": edge.shape,
                "dtype": edge.dtype,
                "rows": rows,
                "most_waiting": ahead,
                "codec": edge.codec,
            }
            if kind == "cut":
                both(edge.source_party, edge.target_party, edge.lane, "activation", name, size, **declared)
                both(edge.target_party, edge.source_party, edge.back_lane, "gradient", name, size, **declared)
            else:
                both(edge.source_party, edge.target_party, edge.lane, "labels", name, size, **declared)
                both(edge.target_party, edge.source_party, edge.back_lane, "taken", name, 0, **declared)
        stages = tuple(
            Stage(
                segment=name,
                inputs=tuple(cuts[i] for i in graph.edges_into(name)),
                outputs=tuple(
                    sorted((cuts[i] for i in graph.edges_out_of(name)), key=lambda e: graph.order.index(e.target))
                ),
                labels=labels.get(name),
                reads=graph.segments[name].data,
                join=graph.segments[name].join,
                loss_weight=graph.segments[name].loss_weight,
            )
            for name in graph.order
            if party_at(graph.segments[name].at, stream) == party
        )
        gives = tuple(e for k, e in edges if k == "labels" and e.source_party == party and not e.local)
        streams.append(StreamPlan(stream, stages, gives))

        holders = graph.data_parties(stream)
        for holder in holders[1:]:
            both(holders[0], holder, ORDER, "order", "order of samples", ORDER_BODY, most_waiting=8)
            both(holder, holders[0], ORDER, "order", "order of samples", ORDER_BODY, most_waiting=8)

    if graph.schedule == "round_robin":
        for name, segment in graph.segments.items():
            if segment.at in graph.groups:
                for giver, taker in graph.hand_ons(segment.at):
                    both(giver, taker, weights_lane(graph, name), "weights", name, WEIGHTS_BODY, most_waiting=2)

    return Plan(
        party,
        tuple(streams),
        lanes_in,
        lanes_out,
        tuple(link for link in links if party in link),
        _seen_circuits(party, circuits, seen),
        cell_links(graph, party, circuits),
    )


def _seen_circuits(party: str, circuits: Iterable[Circuit], seen: Callable[[str], str]) -> tuple[Circuit, ...]:
    """The circuits that ``party`` is an end of, as it sees them: those of a group that hides its members as one."""
    routes: dict[tuple[str, str], dict[tuple[str, ...], None]] = {}
    for circuit in circuits:
        if party in (circuit.first, circuit.second):
            routes.setdefault((seen(circuit.first), seen(circuit.second)), {}).update(dict.fromkeys(circuit.routes))
    return tuple(Circuit(first, second, tuple(found)) for (first, second), found in routes.items())


def _exchanging(graph: Graph, party: str) -> Plan:
    """The plan of ``party`` for its exchanges alone."""
    lanes_in: dict[tuple[str, int], Lane] = {}
    lanes_out: dict[tuple[str, int], Lane] = {}
    for one in graph.exchanges:
        if party in (one.source, one.target):
            peer, lanes = (one.target, lanes_out) if party == one.source else (one.source, lanes_in)
            number = exchange_lane(graph, one.name)
            shape = tuple(one.shape)
            lanes[peer, number] = Lane(number, peer, "exchange", one.name, one.max_bytes, shape=shape, dtype=one.dtype)
    wanted = {frozenset((one.source, one.target)) for one in graph.exchanges}
    circuits = [one for one in graph.circuits_between() if frozenset((one.first, one.second)) in wanted]
    return Plan(
        party,
        (),
        lanes_in,
        lanes_out,
        tuple(link for link in graph.links() if party in link and frozenset(link) in wanted),
        tuple(one for one in circuits if party in (one.first, one.second)),
        cell_links(graph, party, circuits),
    )
