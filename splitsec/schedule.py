"""Whose turn it is: the whole run as a sequence that every party computes alike, with nothing left to negotiate.

Here: turns of a group, the steps of a turn, the micro-batches of a step, and when segment weights are handed on.
Not here: what a party does in a step (``engine``).  Pure: counts in, values out.

``round_robin``: a turn is one member's pass over its own batches; weights go to the next member before its turn.
After the training turns of an epoch the members evaluate, beginning with the one that holds the newest weights, so
that handing them round for evaluation also brings them back to the first.  (So all hold them when an epoch begins, and
the members of an anonymous group may change streams there.)  ``parallel`` (and no group): every step
holds one batch of each stream that still has one, in order of members.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from splitsec.graph import FLOATS, Graph
from splitsec.samples import micro_batch_rows

__all__ = [
    "EVALUATE",
    "FIRST_REDO",
    "PREDICT",
    "SPLIT",
    "TRAIN",
    "Count",
    "HandOn",
    "MicroBatch",
    "Step",
    "Turn",
    "affordable_epochs",
    "last_turn",
    "may_redo",
    "prediction_schedule",
    "run_schedule",
    "step_count",
    "steps_of",
    "turns_of",
]

Phase = Literal["train", "evaluate", "predict"]
TRAIN: Final[Phase] = "train"
EVALUATE: Final[Phase] = "evaluate"
PREDICT: Final[Phase] = "predict"

Count = Mapping[str, int]
"""Samples of one stream: ``{"train": n, "test": n, "predict": n}``; where a privacy budget limits them, also how many
turns they can be used in: ``"train_turns"``, ``"test_turns"``.
"""

FIRST_REDO: Final = 20
"""Training steps of a stream before the first that may be redoable."""

SPLIT: Final[dict[Phase, str]] = {TRAIN: "train", EVALUATE: "test", PREDICT: "predict"}


@dataclass(frozen=True)
class MicroBatch:
    """A slice of a step: ``rows`` samples of ``stream`` from position ``start`` of its order; ``number`` within the
    step.
    """

    number: int
    stream: int
    start: int
    rows: int


@dataclass(frozen=True)
class Step:
    """One optimiser update (or one batch looked at).  ``number`` counts over the whole run.

    ``redo``: the party whose samples these are may do it again, so that only the second attempt stands: a decoy.
    """

    number: int
    phase: Phase
    epoch: int
    micro_batches: tuple[MicroBatch, ...]
    redo: bool = False

    @property
    def rows(self) -> int:
        """Samples in the step, over all streams."""
        return sum(micro.rows for micro in self.micro_batches)


@dataclass(frozen=True)
class Turn:
    """Consecutive steps of one phase over the same streams."""

    phase: Phase
    epoch: int
    streams: tuple[int, ...]


@dataclass(frozen=True)
class HandOn:
    """Segment weights go from the group members of stream ``giver`` to those of stream ``taker``.

    In an anonymous group it depends on the epoch who that is (``turns``).
    """

    giver: int
    taker: int
    epoch: int


def turns_of(counts: Count, phase: Phase) -> int | None:
    """How many turns of ``phase`` the samples of a stream may still take part in; None: in all of them."""
    return counts.get(f"{SPLIT[phase]}_turns")


def affordable_epochs(graph: Graph, counts: Sequence[Count], epochs: int) -> int:
    """How many of ``epochs`` the run has: fewer where a privacy budget does not last, unless its party leaves."""
    if graph.privacy.when_spent == "leave":
        return epochs
    limits = [
        turns
        for count in counts
        for phase in (TRAIN, EVALUATE)
        if (turns := turns_of(count, phase)) is not None and count[SPLIT[phase]]
    ]
    return min([epochs, *limits])


def run_schedule(graph: Graph, *, epochs: int, counts: Sequence[Count] = ()) -> Iterator[Turn | HandOn]:
    """Every turn and hand-on of a training run, in order.  At the end every member holds the final weights.

    ``counts``: where they are known, a stream whose budget is spent has no turn any more, and gets no weights.
    """

    def left(stream: int, phase: Phase, epoch: int) -> bool:
        turns = turns_of(counts[stream], phase) if counts else None
        return turns is not None and epoch >= turns

    streams = graph.streams
    together = tuple(range(streams))
    if graph.schedule != "round_robin":
        for epoch in range(epochs):
            yield Turn(TRAIN, epoch, together)
            yield Turn(EVALUATE, epoch, together)
        return
    newest = set(together)
    holder = 0
    for epoch in range(epochs):
        for phase, order in ((TRAIN, together), (EVALUATE, (*together[-1:], *together[:-1]))):
            for stream in order:
                if left(stream, phase, epoch):
                    continue
                if stream not in newest:
                    yield HandOn(holder, stream, epoch)
                    newest.add(stream)
                yield Turn(phase, epoch, (stream,))
                holder = stream
                if phase == TRAIN:
                    newest = {stream}


def last_turn(graph: Graph, *, epochs: int) -> Turn:
    """The last turn of a training run."""
    *_, last = (turn for turn in run_schedule(graph, epochs=1) if isinstance(turn, Turn))
    return replace(last, epoch=epochs - 1)


def prediction_schedule(graph: Graph) -> Iterator[Turn]:
    """Every stream's samples once, one stream after the other, each with the weights that its parties have loaded."""
    for stream in range(graph.streams):
        yield Turn(PREDICT, 0, (stream,))


def _sizes(turn: Turn, counts: Sequence[Count]) -> dict[int, int]:
    """Samples of each stream of a turn; none where its budget for such turns is spent."""
    sizes = {}
    for stream in turn.streams:
        turns = turns_of(counts[stream], turn.phase)
        spent = turns is not None and turn.epoch >= turns
        sizes[stream] = 0 if spent else counts[stream][SPLIT[turn.phase]]
    return sizes


def step_count(graph: Graph, turn: Turn, counts: Sequence[Count]) -> int:
    """How many steps ``turn`` has: as many as its longest stream has batches."""
    batch = graph.training.batch_size
    drop_last = graph.training.drop_last and turn.phase == TRAIN
    sizes = _sizes(turn, counts).values()
    return max((size // batch if drop_last else -(-size // batch) for size in sizes), default=0)


def may_redo(graph: Graph, stream: int) -> bool:
    """Whether training steps of ``stream`` may be redoable, with false labels in the first attempt.

    Where one party holds all samples and labels of the stream, gradients come to it from others, a step has no other
    party's batch, and nobody demands noise or hides among others: each release of a sample would be one more.
    """
    if not graph.training.decoys or graph.anonymous is not None or (graph.schedule == "parallel" and graph.streams > 1):
        return False
    if any(cut.privacy for cut in graph.cuts) or any(labels.privacy for labels in graph.labels):
        return False
    source, *others = graph.data_parties(stream)

    def here(segment: str) -> bool:
        return graph.party_at(graph.segments[segment].at, stream) == source

    return not others and any(cut.dtype in FLOATS and here(cut.source) and not here(cut.target) for cut in graph.cuts)


def steps_of(graph: Graph, turn: Turn, counts: Sequence[Count], first: int) -> Iterator[Step]:
    """The steps of ``turn``, numbered from ``first``.

    The last of a turn is never redoable: who answers would otherwise wait for another turn to know whether it stands.
    """
    batch, micro_batches = graph.training.batch_size, graph.training.micro_batches
    sizes = _sizes(turn, counts)
    drop_last = graph.training.drop_last and turn.phase == TRAIN
    start = 0
    number = first
    redoable = range(0)
    if turn.phase == TRAIN and len(turn.streams) == 1 and may_redo(graph, turn.streams[0]):
        steps = step_count(graph, turn, counts)
        redoable = range(first + max(0, FIRST_REDO - turn.epoch * steps), first + steps - 1)
    while True:
        micros: list[MicroBatch] = []
        for stream in turn.streams:
            rows = min(batch, sizes[stream] - start)
            if rows <= 0 or (drop_last and rows < batch):
                continue
            offset = start
            for size in micro_batch_rows(rows, micro_batches):
                micros.append(MicroBatch(len(micros), stream, offset, size))
                offset += size
        if not micros:
            return
        yield Step(number, turn.phase, turn.epoch, tuple(micros), number in redoable)
        number += 1
        start += batch
