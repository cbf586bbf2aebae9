"""What one party has to do, worked out from the graph alone: pure, printable, no torch, no network.

Here: for each stream the stages a party runs in order, the edges that reach and leave them, and the lanes on which
their messages travel.  Not here: when a stage runs (``engine``), what a turn is (``schedule``).  Next: ``engine``.

A *stream* is one line of samples through the graph: with groups, member ``k`` of every group works in stream ``k``;
without groups there is one stream.  A *lane* is one cut and direction between two parties, a number that both derive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from splitsec.errors import InternalError
from splitsec.graph import DTYPE_BYTES, Forwarded, Graph, Link

__all__ = ["CONTROL", "ORDER", "Edge", "Lane", "Plan", "Stage", "StreamPlan", "make_plan", "taking_part"]

Kind = Literal["control", "order", "weights", "activation", "gradient", "labels", "taken", "exchange"]

CONTROL: Final = 0
"""Lane of counts and of the last word; between parties with a link."""
ORDER: Final = 1
"""Lane of sample-id fingerprints; end to end between parties that hold samples of one stream."""
FIRST_CUT_LANE: Final = 16

CONTROL_BODY: Final = 0
ORDER_BODY: Final = 256 * 1024 * 1024
WEIGHTS_BODY: Final = 2 * 1024 * 1024 * 1024


@dataclass(frozen=True)
class Lane:
    """One kind of message between this party and one peer.

    ``shape`` is without the batch dimension; None in it means any size.  ``max_body`` bounds a message, in bytes.
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
    """The links that this party is an end of."""
    forwarded: tuple[Forwarded, ...]
    """The pairs without a link that this party belongs to, or forwards for."""

    @property
    def neighbours(self) -> tuple[str, ...]:
        """Parties that this one has a link with."""
        return tuple(link.dialer if link.listener == self.party else link.listener for link in self.links)

    @property
    def peers(self) -> tuple[str, ...]:
        """Parties that this one has a channel with: over a link, or forwarded by a third."""
        pairs = [(pair.first, pair.second) for pair in self.forwarded if pair.via != self.party]
        return (*self.neighbours, *(b if a == self.party else a for a, b in pairs))

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


def _edges(graph: Graph, stream: int) -> Iterator[tuple[Literal["cut", "labels"], Edge]]:
    for index, cut in enumerate(graph.cuts):
        yield (
            "cut",
            Edge(
                index=index,
                source=cut.source,
                target=cut.target,
                source_party=graph.party_at(graph.segments[cut.source].at, stream),
                target_party=graph.party_at(graph.segments[cut.target].at, stream),
                shape=tuple(cut.shape),
                dtype=cut.dtype,
                lane=FIRST_CUT_LANE + 2 * index,
                back_lane=FIRST_CUT_LANE + 2 * index + 1,
                output=cut.output,
            ),
        )
    for index, labels in enumerate(graph.labels):
        number = len(graph.cuts) + index
        giver = graph.party_at(labels.source, stream)
        holds_segment = any(graph.party_at(segment.at, stream) == giver for segment in graph.segments.values())
        yield (
            "labels",
            Edge(
                index=number,
                source=labels.source,
                target=labels.target,
                source_party=giver,
                target_party=graph.party_at(graph.segments[labels.target].at, stream),
                shape=tuple(labels.shape),
                dtype=labels.dtype,
                lane=FIRST_CUT_LANE + 2 * number,
                back_lane=FIRST_CUT_LANE + 2 * number + 1,
                field=labels.field,
                answered=not holds_segment,
            ),
        )


def taking_part(graph: Graph) -> frozenset[str]:
    """The parties that a training or prediction needs: they hold segments, data or labels, or forward for such."""
    places = [segment.at for segment in graph.segments.values()] + [labels.source for labels in graph.labels]
    working = {member for place in places for member in graph.members(place)}
    return frozenset(working | {pair.via for pair in graph.forwarded() if {pair.first, pair.second} <= working})


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


def _size(shape: tuple[int, ...], dtype: str) -> int:
    size = DTYPE_BYTES[dtype]
    for extent in shape:
        size *= extent
    return size


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

    for link in graph.links():
        both(link.dialer, link.listener, CONTROL, "control", "control", CONTROL_BODY)
        both(link.listener, link.dialer, CONTROL, "control", "control", CONTROL_BODY)

    rows = -(-graph.training.batch_size // graph.training.micro_batches)
    # Neighbours are at most one step apart, so two parties are at most as many apart as there are parties.
    ahead = graph.training.micro_batches * graph.streams * (len(graph.parties) + 1)
    streams = []
    for stream in range(graph.streams):
        edges = list(_edges(graph, stream))
        cuts = {edge.index: edge for kind, edge in edges if kind == "cut"}
        labels = {edge.target: edge for kind, edge in edges if kind == "labels"}
        for kind, edge in edges:
            name = f"{edge.source} -> {edge.target}"
            size = rows * _size(edge.shape, edge.dtype)
            declared = {"shape": edge.shape, "dtype": edge.dtype, "rows": rows, "most_waiting": ahead}
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
            if graph.party_at(graph.segments[name].at, stream) == party
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

    for exchange in graph.exchanges if exchanges else ():
        both(
            exchange.source,
            exchange.target,
            exchange_lane(graph, exchange.name),
            "exchange",
            exchange.name,
            exchange.max_bytes,
            shape=tuple(exchange.shape),
            dtype=exchange.dtype,
        )
    if exchanges:
        wanted = {frozenset((exchange.source, exchange.target)) for exchange in graph.exchanges}
        links = tuple(link for link in graph.links() if party in link and frozenset(link) in wanted)
        lanes_in = {key: lane for key, lane in lanes_in.items() if lane.kind == "exchange"}
        lanes_out = {key: lane for key, lane in lanes_out.items() if lane.kind == "exchange"}
        return Plan(party, (), lanes_in, lanes_out, links, ())
    working = taking_part(graph)
    links = tuple(link for link in graph.links() if party in link and working.issuperset(link))
    forwarded = tuple(pair for pair in graph.forwarded() if party in pair and working.issuperset(pair))
    return Plan(party, tuple(streams), lanes_in, lanes_out, links, forwarded)
