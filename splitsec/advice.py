"""Which schedule, and how many micro-batches: a step played through, event by event, for each; the fastest is chosen.

Here: a small model of parties that compute and lines that carry, and the choice with its reason in a sentence.  Pure:
no torch, no files, no clock.  Not here: how long an act takes (``measuring``), the engine it stands for (``engine``).

The model: a party does one act at a time, and of those that are ready takes forwards first (lowest micro-batch, then
the order of segments), but goes back at once where it has the loss; then the way back; then, with the early cut
gradient, gradients of weights, which nobody waits for.  A line carries one message after the other at its bandwidth,
each way by itself, and every message arrives a delay later.  A party begins its next step when it has nothing left of
this one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final

__all__ = ["Act", "Advice", "Crossing", "Line", "Pipeline", "Try", "advise", "lock_step", "step_seconds"]

LEAST_ROWS: Final = 16
"""Samples that a micro-batch keeps: below, kernels lose more than waiting costs (measured, docs/resource-plan.md)."""
MOST: Final = 16
"""Micro-batches that are tried."""
WORTH: Final = 0.98
"""A schedule with more parts is chosen only where it takes less than this share of the simpler one's time."""
DOMINATES: Final = 0.5
"""Of a step's time: where a line is busy for longer than this share, it is said."""
STEPS: Final = 4
"""Played through one after another; the first is not counted."""


@dataclass(frozen=True)
class Act:
    """Seconds of an act: ``once``, and for ``each`` sample."""

    once: float
    each: float

    def of(self, rows: float) -> float:
        """Seconds for ``rows`` samples."""
        return self.once + self.each * rows


@dataclass(frozen=True)
class Crossing:
    """An edge from segment to segment, by their places in ``Pipeline.names``.  ``forward`` and ``back``: bytes of one
    sample; ``back`` None where no gradient returns.
    """

    source: int
    target: int
    forward: float
    back: float | None


@dataclass(frozen=True)
class Line:
    """``bandwidth``: bytes a second, each way; ``delay``: seconds one way."""

    bandwidth: float
    delay: float


@dataclass(frozen=True)
class Pipeline:
    """A graph as far as time goes.  ``acts``: forward, input gradient and weight gradient of each segment;
    ``parties``: who runs it, in each of ``streams`` streams that share a step; ``losses``: segments with a loss;
    ``optimizers``: seconds in which each segment's weights are changed at the end of a step, none where it is empty.
    """

    names: tuple[str, ...]
    acts: tuple[tuple[Act, Act, Act], ...]
    parties: tuple[tuple[str, ...], ...]
    crossings: tuple[Crossing, ...]
    losses: frozenset[int]
    streams: int = 1
    optimizers: tuple[float, ...] = ()

    def optimizer_of(self, party: str) -> float:
        """Seconds at the end of a step of ``party``."""
        own = zip(self.parties, self.optimizers, strict=False)
        return sum(seconds for names, seconds in own if party in names)


@dataclass(frozen=True)
class Try:
    """One schedule and its seconds a step."""

    micro_batches: int
    early: bool
    seconds: float

    @property
    def name(self) -> str:
        """In words."""
        if self.micro_batches == 1:
            return "whole batches, early cut gradient" if self.early else "lock-step"
        return f"{self.micro_batches} micro-batches" + (", early cut gradient" if self.early else "")


@dataclass(frozen=True)
class Advice:
    """``chosen`` of all that were ``tried``, lock-step first; ``reasons``: sentences."""

    chosen: Try
    tried: tuple[Try, ...]
    reasons: tuple[str, ...]


def lock_step(compute: float, link: float, delay: float) -> float:
    """Seconds of a step over one cut in lock-step: compute, the cut's bytes forward and back, and one round trip.

    ``compute``: of both parties together; ``link``: seconds that the cut's tensor takes at the line's bandwidth, once.
    """
    return compute + 2 * link + 2 * delay


FORWARD, BACK, WEIGHTS = 0, 1, 2


class _Play:
    """Some steps of one schedule, from the first event to the last."""

    def __init__(self, pipeline: Pipeline, line: Line, batch: int, micro_batches: int, early: bool) -> None:
        self.pipe, self.line, self.early = pipeline, line, early
        small, larger = divmod(batch, micro_batches)
        sizes = [small + (i < larger) for i in range(micro_batches)]
        self.rows = [(stream, size) for stream in range(pipeline.streams) for size in sizes if size]
        """By micro-batch number: stream and samples."""
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.order = count()
        self.parties = sorted({name for names in pipeline.parties for name in names})
        self.touched: set[str] = set()
        self.busy = dict.fromkeys(self.parties, False)
        self.step_of = dict.fromkeys(self.parties, 0)
        self.ready: dict[tuple[str, int], list[tuple[tuple[int, int, int], int, int, int]]] = {}
        self.left: dict[tuple[str, int], int] = {}
        self.lines: dict[tuple[str, str], float] = {}
        self.missing: dict[tuple[int, int, int, int], int] = {}
        self.ended: list[float] = [0.0] * STEPS

    def run(self) -> float:
        """Seconds a step, after the first."""
        pipe = self.pipe
        for step in range(STEPS):
            for place in range(len(pipe.names)):
                into = [one for one in pipe.crossings if one.target == place]
                out = [one for one in pipe.crossings if one.source == place and one.back is not None]
                for micro, (stream, _) in enumerate(self.rows):
                    party = pipe.parties[place][stream]
                    acts = 3 if self.splits(place) else 2
                    self.left[party, step] = self.left.get((party, step), 0) + acts
                    self.missing[step, FORWARD, place, micro] = len(into)
                    self.missing[step, BACK, place, micro] = len(out) + 1
                    if not into:
                        self.come(step, FORWARD, place, micro)
        now = 0.0
        while True:
            for party in sorted(self.touched):
                self.turn(party, now)
            self.touched.clear()
            if not self.events:
                break
            now = self.events[0][0]
            while self.events and self.events[0][0] == now:
                heapq.heappop(self.events)[2](now)
        return (self.ended[-1] - self.ended[0]) / (STEPS - 1)

    def splits(self, place: int) -> bool:
        """Whether the way back of a segment has two acts: somebody waits for the first."""
        return self.early and any(one.target == place and one.back is not None for one in self.pipe.crossings)

    def come(self, step: int, kind: int, place: int, micro: int) -> None:
        """An act has all that it needs."""
        party = self.pipe.parties[place][self.rows[micro][0]]
        if kind == BACK and place in self.pipe.losses:
            rank = (-1, micro, -place)
        else:
            rank = (kind, micro, place if kind == FORWARD else -place)
        self.touched.add(party)
        heapq.heappush(self.ready.setdefault((party, step), []), (rank, kind, place, micro))

    def arrived(self, step: int, kind: int, place: int, micro: int) -> None:
        """One of the things that an act needs is there."""
        key = (step, kind, place, micro)
        if self.missing.get(key, 0) > 0:
            self.missing[key] -= 1
            if not self.missing[key]:
                self.come(*key)

    def turn(self, party: str, now: float) -> None:
        """Let a party begin what it can, if it stands still."""
        step = self.step_of[party]
        if self.busy[party] or step >= STEPS or not self.ready.get((party, step)):
            return
        _, kind, place, micro = heapq.heappop(self.ready[party, step])
        forward, inputs, weights = self.pipe.acts[place]
        rows = self.rows[micro][1]
        seconds = (
            forward.of(rows)
            if kind == FORWARD
            else weights.of(rows)
            if kind == WEIGHTS
            else inputs.of(rows) + (0.0 if self.splits(place) else weights.of(rows))
        )
        self.busy[party] = True
        self.at(now + seconds, lambda then: self.done(party, step, kind, place, micro, then))

    def at(self, when: float, what: Callable[[float], None]) -> None:
        """Do ``what`` at ``when``."""
        heapq.heappush(self.events, (when, next(self.order), what))

    def done(self, party: str, step: int, kind: int, place: int, micro: int, now: float) -> None:
        """An act is over: its results go where they are needed."""
        self.busy[party] = False
        self.touched.add(party)
        stream, rows = self.rows[micro]
        if kind == FORWARD:
            for one in self.pipe.crossings:
                if one.source == place:
                    self.send(party, one.target, stream, rows * one.forward, now, (step, FORWARD, one.target, micro))
            self.arrived(step, BACK, place, micro)
        elif kind == BACK:
            for one in self.pipe.crossings:
                if one.target == place and one.back is not None:
                    self.send(party, one.source, stream, rows * one.back, now, (step, BACK, one.source, micro))
            if self.splits(place):
                self.come(step, WEIGHTS, place, micro)
        self.left[party, step] -= 1
        if not self.left[party, step]:
            self.busy[party] = True
            self.at(now + self.pipe.optimizer_of(party), lambda then: self.end(party, step, then))

    def end(self, party: str, step: int, now: float) -> None:
        """A party has changed its weights."""
        self.busy[party] = False
        self.touched.add(party)
        self.ended[step] = max(self.ended[step], now)
        self.step_of[party] += 1

    def send(
        self, party: str, place: int, stream: int, size: float, now: float, what: tuple[int, int, int, int]
    ) -> None:
        """Put a message on the line to whoever runs ``place``."""
        other = self.pipe.parties[place][stream]
        if other == party:
            self.arrived(*what)
            return
        begins = max(now, self.lines.get((party, other), 0.0))
        over = begins + size / self.line.bandwidth
        self.lines[party, other] = over
        self.at(over + self.line.delay, lambda then: self.arrived(*what))


def step_seconds(pipeline: Pipeline, line: Line, batch: int, *, micro_batches: int = 1, early: bool = False) -> float:
    """Seconds of a training step of ``batch`` samples (of each stream), once steps follow one another."""
    return _Play(pipeline, line, batch, micro_batches, early).run()


def advise(
    pipeline: Pipeline,
    line: Line,
    batch: int,
    *,
    whole_batches: str = "",
    may_be_early: bool = True,
    now: int = 1,
) -> Advice:
    """The fastest schedule whose micro-batches keep ``LEAST_ROWS`` samples; of two nearly alike, the simpler.

    ``whole_batches``: why a batch must stay whole, where it must; ``may_be_early``: False where a party has switched
    the early cut gradient off; ``now``: micro-batches that the graph has.
    """
    most = 1 if whole_batches else max(1, min(MOST, batch // LEAST_ROWS))
    tried = [Try(1, False, step_seconds(pipeline, line, batch))]
    for parts in range(1, most + 1):
        for early in (False, True) if may_be_early else (False,):
            if (parts, early) != (1, False):
                seconds = step_seconds(pipeline, line, batch, micro_batches=parts, early=early)
                tried.append(Try(parts, early, seconds))
    chosen = tried[0]
    for one in tried[1:]:
        simpler = one.micro_batches == chosen.micro_batches  # the early gradient asks nothing of anybody
        if one.seconds < chosen.seconds * (1.0 if simpler else WORTH):
            chosen = one
    return Advice(chosen, tuple(tried), tuple(_reasons(pipeline, line, batch, tried, chosen, whole_batches, now, most)))


def _reasons(
    pipeline: Pipeline,
    line: Line,
    batch: int,
    tried: Sequence[Try],
    chosen: Try,
    whole_batches: str,
    now: int,
    most: int,
) -> list[str]:
    slow = tried[0].seconds
    compute = sum(act.of(batch) for acts in pipeline.acts for act in acts) + sum(pipeline.optimizers)
    waits = max(0.0, slow - compute)
    share = f"{chosen.seconds / slow:.2f}" if slow else "1.00"
    said = []
    if chosen is tried[0]:
        said.append(f"Nothing that was tried is faster than lock-step, {_ms(slow)} a step.")
    else:
        said.append(f"It takes {_ms(chosen.seconds)} a step, {share} of the {_ms(slow)} of lock-step.")
    if pipeline.streams > 1:
        busy: dict[str, float] = {}
        for acts, parties in zip(pipeline.acts, pipeline.parties, strict=True):
            for name in parties:
                busy[name] = busy.get(name, pipeline.optimizer_of(name)) + sum(act.of(batch) for act in acts)
        most_of = max(busy, key=lambda name: busy[name])
        said.append(
            f"{pipeline.streams} members of the group work at once; {most_of} computes longest, {_ms(busy[most_of])}."
        )
    elif not _is_chain(pipeline):
        said.append(f"All parties together compute for {_ms(compute)} a step.")
    elif len({name for names in pipeline.parties for name in names}) > 1:
        part = f"{waits / slow:.0%}" if slow else "none"
        said.append(
            f"In lock-step one party computes while the others wait: {_ms(compute)} of computing"
            + (f", and the line takes {_ms(waits)} ({part} of the step)." if waits > 0.005 * slow else ".")
        )
    sender, receiver, carries = _busiest_line(pipeline, line, batch)
    if carries >= DOMINATES * chosen.seconds:
        said.append(
            f"The line from {sender} to {receiver} is busy for {_ms(carries)} of it, which no schedule shortens: only a"
            " cut that less crosses would, or a codec (docs/codecs.md)."
        )
    if whole_batches:
        said.append(f"Batches stay whole: {whole_batches}.")
    elif most == 1:
        said.append(f"A batch of {batch} cannot be cut into micro-batches of at least {LEAST_ROWS} samples.")
    elif chosen.micro_batches == most and most < MOST:
        said.append(
            f"More than {most} micro-batches would leave fewer than {LEAST_ROWS} samples in each, at which kernels slow"
            " down; a larger batch would allow more."
        )
    elif chosen.micro_batches > 1:
        said.append(f"More micro-batches would gain less than {1 - WORTH:.0%}.")
    else:
        said.append(f"Micro-batches would gain less than {1 - WORTH:.0%}.")
    if chosen.micro_batches != now:
        if chosen.micro_batches > 1:
            said.append("Micro-batches train like gradient accumulation: dropout, say, is drawn for each of them.")
        said.append(f"In the graph file: `training: {{micro_batches: {chosen.micro_batches}}}`; now it is {now}.")
    return said


def _busiest_line(pipeline: Pipeline, line: Line, batch: int) -> tuple[str, str, float]:
    """From whom to whom most bytes go in a step, and the seconds that they take."""
    seconds: dict[tuple[str, str], float] = {("", ""): 0.0}
    for one in pipeline.crossings:
        for source, target in zip(pipeline.parties[one.source], pipeline.parties[one.target], strict=True):
            for pair, size in (((source, target), one.forward), ((target, source), one.back or 0.0)):
                if source != target:
                    seconds[pair] = seconds.get(pair, 0.0) + batch * size / line.bandwidth
    pair = max(seconds, key=lambda one: seconds[one])
    return *pair, seconds[pair]


def _is_chain(pipeline: Pipeline) -> bool:
    """Whether only one segment can compute at a time in lock-step."""
    ends = [[one.source for one in pipeline.crossings], [one.target for one in pipeline.crossings]]
    return all(len(set(places)) == len(places) for places in ends)


def _ms(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def as_json(advice: Advice) -> Mapping[str, object]:
    """For ``--json``."""

    def one(this: Try) -> dict[str, object]:
        return {
            "schedule": this.name,
            "micro_batches": this.micro_batches,
            "early_gradient": this.early,
            "seconds": this.seconds,
            "of_lock_step": this.seconds / advice.tried[0].seconds if advice.tried[0].seconds else 1.0,
        }

    assert math.isfinite(advice.chosen.seconds)
    return {**one(advice.chosen), "why": list(advice.reasons), "tried": [one(each) for each in advice.tried]}
