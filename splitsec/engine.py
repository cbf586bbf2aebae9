"""One step at one party: forward, cut, backward, step; the same for every graph.

Here: what to run next.  A stage can run as soon as its inputs for its next micro-batch lie ready; where nothing can
run, the party waits for its peers.  Forwards go first, so that parties downstream have work; a stage that holds the
loss goes backward at once.  Each segment takes its micro-batches in order, forward and backward, so that the result
does not depend on when messages arrive.  Not here: turns and hand-on (``party``), modules (``segments``), what may
cross the line (``guard``).

In a step without training the way back carries empty messages: the step ends at the same point for all of its
parties, and none runs ahead of those behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from splitsec.errors import PeerMisbehaved
from splitsec.guard import Guard
from splitsec.messages import DTYPES, Message
from splitsec.plan import Edge, Plan, Stage
from splitsec.safeguards import Carried
from splitsec.schedule import PREDICT, TRAIN, MicroBatch, Step
from splitsec.segments import Segment

__all__ = ["Engine", "Rows", "WhoseData"]

Rows = Callable[[MicroBatch, str], torch.Tensor]
"""This party's own samples of a micro-batch: field name to tensor ``[rows, ...]``."""

WhoseData = Callable[[MicroBatch], Carried | None]
"""Which of this party's own samples a micro-batch is made of, for the guard; None where it holds none of them."""


class Engine:
    """Runs the steps of one party."""

    def __init__(self, plan: Plan, segments: Mapping[str, Segment], guard: Guard) -> None:
        self.plan = plan
        self.segments = segments
        self.guard = guard

    def run_step(
        self, step: Step, rows: Rows, *, update: int, whose: WhoseData = lambda micro: None
    ) -> dict[str, list[torch.Tensor]]:
        """Run ``step`` to its end at this party.

        ``rows`` gives this party's own samples, ``whose`` says to the guard which they are; ``update`` numbers the
        optimiser update that a training step makes.  Returns the outputs of the segments with a loss here, one tensor
        for each micro-batch (only for a step that predicts).
        """
        run = _StepRun(self, step, rows, update, whose)
        run.give_labels()
        while not run.over:
            if not (run.forward_next() or run.backward_next()):
                self.guard.wait(on=run.waits_for())
        return run.predictions


class _Work(NamedTuple):
    micro: MicroBatch
    stage: Stage


class _Line:
    """The micro-batches that one segment has to go through in a step, and how far it has come."""

    def __init__(self, segment: Segment, work: list[_Work]) -> None:
        self.segment = segment
        self.work = work
        self.forwarded = 0
        self.returned = 0

    @property
    def next_forward(self) -> _Work | None:
        return self.work[self.forwarded] if self.forwarded < len(self.work) else None

    @property
    def next_backward(self) -> _Work | None:
        return self.work[self.returned] if self.returned < self.forwarded else None


class _StepRun:
    """One step under way: what has come, what was made, what is still to do."""

    def __init__(self, engine: Engine, step: Step, rows: Rows, update: int, whose: WhoseData) -> None:
        self.guard = engine.guard
        self.step = step
        self.rows = rows
        self.whose = whose
        self.update = update if step.phase == TRAIN else None
        self.predictions: dict[str, list[torch.Tensor]] = {}
        self._made: dict[tuple[int, int], torch.Tensor] = {}
        self._returned: dict[tuple[int, int], torch.Tensor | None] = {}
        self._streams = {micro.stream: engine.plan.streams[micro.stream] for micro in step.micro_batches}
        works: dict[str, list[_Work]] = {}
        for micro in step.micro_batches:
            for stage in self._streams[micro.stream].stages:
                works.setdefault(stage.segment, []).append(_Work(micro, stage))
        self._lines = [_Line(engine.segments[name], work) for name, work in works.items()]
        self._untaken: list[tuple[Edge, MicroBatch]] = []

    @property
    def over(self) -> bool:
        """Every micro-batch went forward and back, and every label given was taken."""
        while self._untaken and self._came(*self._untaken[0], back=True):
            edge, _ = self._untaken.pop(0)
            self.guard.take((edge.target_party, edge.back_lane))
        return not self._untaken and all(line.returned == len(line.work) for line in self._lines)

    # --- what can run now

    def forward_next(self) -> bool:
        """Run the first forward whose inputs are there: lowest micro-batch, then topological order."""
        ready = [
            (work.micro.number, place, line, work)
            for place, line in enumerate(self._lines)
            if (work := line.next_forward) is not None and not any(self._awaited_forward(work))
        ]
        if not ready:
            return False
        _, _, line, work = min(ready, key=lambda item: item[:2])
        self._forward(line, work)
        if work.stage.labels is not None and line.next_backward is work and not any(self._awaited_backward(work)):
            self._backward(line, work)
        return True

    def backward_next(self) -> bool:
        """Run the first backward whose gradients are there: lowest micro-batch, then reverse topological order."""
        ready = [
            (work.micro.number, -place, line, work)
            for place, line in enumerate(self._lines)
            if (work := line.next_backward) is not None and not any(self._awaited_backward(work))
        ]
        if not ready:
            return False
        _, _, line, work = min(ready, key=lambda item: item[:2])
        self._backward(line, work)
        return True

    def waits_for(self) -> set[str]:
        """The parties whose messages the next work needs."""
        parties = {edge.target_party for edge, _ in self._untaken[:1]}
        for line in self._lines:
            if (work := line.next_forward) is not None:
                parties |= {edge.source_party for edge in self._awaited_forward(work) if not edge.local}
            if (work := line.next_backward) is not None:
                parties |= {edge.target_party for edge in self._awaited_backward(work) if not edge.local}
        return parties

    def _awaited_forward(self, work: _Work) -> Iterator[Edge]:
        labels = work.stage.labels if self.step.phase != PREDICT else None
        for edge in (*work.stage.inputs, labels):
            if edge is not None and not self._came(edge, work.micro, back=False):
                yield edge

    def _awaited_backward(self, work: _Work) -> Iterator[Edge]:
        return (edge for edge in work.stage.outputs if not self._came(edge, work.micro, back=True))

    def _came(self, edge: Edge, micro: MicroBatch, *, back: bool) -> bool:
        if edge.local:
            if edge.field is not None:
                return True
            return (edge.index, micro.number) in (self._returned if back else self._made)
        party, lane = (edge.target_party, edge.back_lane) if back else (edge.source_party, edge.lane)
        message = self.guard.peek((party, lane))
        if message is None:
            return False
        if message.key != (self.step.number, micro.number):
            raise PeerMisbehaved(
                f"sent {message.kind} of {edge.source} -> {edge.target} for step, micro-batch {message.key}",
                party=party,
                expected=f"{(self.step.number, micro.number)}",
            )
        for tensor in message.tensors.values():
            if len(tensor) != micro.rows:
                raise PeerMisbehaved(
                    f"sent {len(tensor)} samples in {message.kind} of {edge.source} -> {edge.target}",
                    party=party,
                    expected=f"{micro.rows}",
                )
        return True

    # --- running it

    def give_labels(self) -> None:
        """Send the labels that other parties' losses need, where the graph says that they come from here."""
        if self.step.phase == PREDICT:
            return
        for micro in self.step.micro_batches:
            for edge in self._streams[micro.stream].gives_labels:
                assert edge.field is not None
                self._send(edge, micro, "labels", self.rows(micro, edge.field), back=False)
                if edge.answered:
                    self._untaken.append((edge, micro))

    def _forward(self, line: _Line, work: _Work) -> None:
        micro, stage = work
        inputs = [self._take(edge, micro) for edge in stage.inputs]
        if stage.reads is not None:
            inputs.append(self.rows(micro, stage.reads))
        labels = None
        if stage.labels is not None and self.step.phase != PREDICT:
            labels = self._take(stage.labels, micro)
            if stage.labels.answered and not stage.labels.local:
                self._send(stage.labels, micro, "taken", None, back=True)
        if self.update is not None and line.segment.private is not None:
            self.guard.account_for(stage.segment, line.segment.private, self.whose(micro))
        outputs, prediction = line.segment.forward(
            stage, inputs, labels, micro=micro.number, update=self.update, share=micro.rows / self.step.rows
        )
        line.forwarded += 1
        for edge, output in outputs.items():
            if edge.local:
                self._made[edge.index, micro.number] = output
            else:
                self._send(edge, micro, "activation", output, back=False)
        if prediction is not None and self.step.phase == PREDICT:
            self.predictions.setdefault(stage.segment, []).append(prediction)

    def _backward(self, line: _Line, work: _Work) -> None:
        micro, stage = work
        gradients = {edge: self._take_back(edge, micro) for edge in stage.outputs}
        back: list[torch.Tensor | None] = [None] * len(stage.inputs)
        if self.update is not None:
            back = line.segment.backward(stage, gradients, micro=micro.number)
        line.returned += 1
        for edge, gradient in zip(stage.inputs, back, strict=True):
            if edge.local:
                self._returned[edge.index, micro.number] = gradient
            else:
                if gradient is None and self.update is not None and _has_gradient(edge):
                    gradient = torch.zeros(micro.rows, *edge.shape, dtype=DTYPES[edge.dtype])  # no way to a loss
                self._send(edge, micro, "gradient", gradient, back=True)
        if self.update is not None and line.returned == len(line.work):
            line.segment.step()

    def _take(self, edge: Edge, micro: MicroBatch) -> torch.Tensor:
        if not edge.local:
            return next(iter(self.guard.take((edge.source_party, edge.lane)).tensors.values()))
        if edge.field is not None:
            return self.rows(micro, edge.field)
        return self._made.pop((edge.index, micro.number))

    def _take_back(self, edge: Edge, micro: MicroBatch) -> torch.Tensor | None:
        if edge.local:
            return self._returned.pop((edge.index, micro.number))
        gradient = next(iter(self.guard.take((edge.target_party, edge.back_lane)).tensors.values()), None)
        if gradient is None and self.update is not None and _has_gradient(edge):
            raise PeerMisbehaved(
                f"sent no gradient of {edge.source} -> {edge.target}",
                party=edge.target_party,
                expected="one while training",
            )
        return gradient

    def _send(self, edge: Edge, micro: MicroBatch, kind: str, tensor: torch.Tensor | None, *, back: bool) -> None:
        lane = (edge.source_party, edge.back_lane) if back else (edge.target_party, edge.lane)
        self.guard.release(
            lane,
            Message(kind, (self.step.number, micro.number), tensors={} if tensor is None else {"": tensor}),
            self.whose(micro),
        )


def _has_gradient(edge: Edge) -> bool:
    return DTYPES[edge.dtype].is_floating_point
