"""One step at one party: forward, cut, backward, step; the same for every graph.

Here: what to run next.  A stage can run as soon as its inputs for its next micro-batch lie ready.  Where none can, the
party computes gradients of weights that it still owes (``backward``), piece by piece; where it owes none, it waits for
its peers.  Forwards go first, so that parties downstream have work; a stage that holds the loss goes backward at once,
as far as the gradients that go back over its cuts.  Gradients of weights are added in the order of micro-batches, so
that the result does not depend on when messages arrive.  Not here: turns and hand-on (``party``), modules
(``segments``), what may cross the line (``guard``).

In a step without training the way back carries empty messages: the step ends at the same point for all of its
parties, and none runs ahead of those behind it.

A training step that may be redone (``schedule.may_redo``) has a *source*, the party with all its samples and labels.
What the source asks for may be a decoy: the step with false labels, all the way forward and back; then both are
forgotten, here and at all others, and the same step is made with true labels, as attempt 1, whose micro-batches are
numbered on from those of attempt 0.  The protocol tells the others so only after they have answered.  So they hold a
step: their optimisers wait for the first message of what comes next, which says whether the step stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from splitsec.detectors import Detectors
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
    """Runs the steps of one party.  ``detectors`` look at what comes in while training, and ask for decoys."""

    def __init__(
        self, plan: Plan, segments: Mapping[str, Segment], guard: Guard, detectors: Detectors | None = None
    ) -> None:
        self.plan = plan
        self.segments = segments
        self.guard = guard
        self.detectors = detectors
        self._held: _StepRun | None = None

    def run_step(
        self, step: Step, rows: Rows, *, update: int, whose: WhoseData = lambda micro: None
    ) -> dict[str, list[torch.Tensor]]:
        """Run ``step`` to its end at this party; where it may still be redone, its weights change with the next one.

        ``rows`` gives this party's own samples, ``whose`` says to the guard which they are; ``update`` numbers the
        optimiser update that a training step makes.  Returns the outputs of the segments with a loss here, one tensor
        for each micro-batch (only for a step that predicts).
        """
        self._settle()
        run = _StepRun(self, step, rows, update, whose)
        if step.redo and not self._source_of(step):
            run.hold()
            self._held = run
        elif step.redo and (decoy := self._decoy(run)) is not None:
            decoy.hold()
            decoy.run()
            decoy.forget()
            run = _StepRun(self, step, rows, update, whose, after=decoy)
        run.run()
        return run.predictions

    def _settle(self) -> None:
        """End the step that is held: as the first message of what comes next says, it stands or is redone."""
        held, self._held = self._held, None
        if held is None:
            return
        if held.wait_for_the_next() != held.step.number:
            held.stand()
            return
        held.forget()
        _StepRun(self, held.step, held.rows, held.update_number, held.whose, after=held).run()

    def _source_of(self, step: Step) -> bool:
        """Whether the samples of ``step``, which may be redone, are this party's."""
        streams = {micro.stream for micro in step.micro_batches}
        return any(stage.reads is not None for stream in streams for stage in self.plan.streams[stream].stages)

    def _decoy(self, run: _StepRun) -> _StepRun | None:
        """A first attempt at the step of ``run`` with false labels, where there shall be one.

        Never where a sample's second release in a step would cost privacy that somebody counts on.
        """
        if self.detectors is None or any(segment.private is not None for segment in self.segments.values()):
            return None
        if self.guard.safeguards is not None and not self.guard.safeguards.may_repeat:
            return None
        if not self.detectors.decoy(run.step):
            return None
        true = run.all_labels()
        false = self.detectors.false_labels(true)
        if false is None:
            return None
        return _StepRun(self, run.step, run.rows, run.update_number, run.whose, false=false, true=true)


class _Work(NamedTuple):
    micro: MicroBatch
    stage: Stage
    place: int
    """Among all that the segment goes through in the step."""


class _Line:
    """The micro-batches that one segment has to go through in a step, and how far it has come.

    In order; where ``segment.any_order`` and every stream has other peers, the next of each stream, whichever is
    there: so nobody waits for a slow member of a group but with what is that member's own.  A lane's own messages keep
    their order.
    """

    def __init__(self, segment: Segment, work: list[_Work], *, training: bool) -> None:
        self.segment = segment
        self._free = training and _apart(work)
        self._to_forward = list(work)
        self._to_return = list(work)
        self._forwarded: set[int] = set()

    @property
    def all_forwarded(self) -> bool:
        return not self._to_forward

    @property
    def all_returned(self) -> bool:
        return not self._to_return

    def next_forwards(self) -> list[_Work]:
        """What may go forward next, if its inputs are there."""
        return self._heads(self._to_forward)

    def next_backwards(self) -> list[_Work]:
        """What may go backward next, if its gradients are there."""
        return [work for work in self._heads(self._to_return) if work.place in self._forwarded]

    def went_forward(self, work: _Work) -> None:
        self._to_forward.remove(work)
        self._forwarded.add(work.place)

    def went_back(self, work: _Work) -> None:
        self._to_return.remove(work)

    def _heads(self, left: list[_Work]) -> list[_Work]:
        if len(left) > 1 and self._free and self.segment.any_order:
            return list({work.micro.stream: work for work in reversed(left)}.values())[::-1]
        return left[:1]


def _apart(work: list[_Work]) -> bool:
    """Whether no peer has messages of two streams with this segment, whose order it could not tell."""
    met: set[str] = set()
    for stage in {one.micro.stream: one.stage for one in work}.values():
        edges = [edge for edge in (*stage.inputs, stage.labels) if edge is not None and not edge.local]
        peers = {edge.source_party for edge in edges}
        peers |= {edge.target_party for edge in stage.outputs if not edge.local}
        if met & peers:
            return False
        met |= peers
    return True


class _StepRun:
    """One attempt at a step: what has come, what was made, what is still to do.

    ``after``: the attempt before this one, which does not stand.  ``false``: the labels of a decoy by field, over all
    rows of the step; ``true``: those that they stand in for.
    """

    def __init__(
        self,
        engine: Engine,
        step: Step,
        rows: Rows,
        update: int,
        whose: WhoseData,
        *,
        after: _StepRun | None = None,
        false: Mapping[str, torch.Tensor] | None = None,
        true: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.guard = engine.guard
        self.step = step
        self.rows = rows
        self.whose = whose
        self.update_number = update
        self.update = update if step.phase == TRAIN else None
        self.predictions: dict[str, list[torch.Tensor]] = {}
        self.false, self.true = false, true
        self.gradients: dict[Edge, list[torch.Tensor]] = {}
        """What came back over the cuts of a source, micro-batch by micro-batch, where a decoy is compared."""
        self._after = after
        self._first_key = 0 if after is None else len(step.micro_batches)
        self._detectors = engine.detectors if step.phase == TRAIN else None
        self._holds = False
        self._to_look_at: list[Callable[[], None]] = []
        self._made: dict[tuple[int, int], torch.Tensor] = {}
        self._returned: dict[tuple[int, int], torch.Tensor | None] = {}
        self._streams = {micro.stream: engine.plan.streams[micro.stream] for micro in step.micro_batches}
        works: dict[str, list[_Work]] = {}
        for micro in step.micro_batches:
            for stage in self._streams[micro.stream].stages:
                line = works.setdefault(stage.segment, [])
                line.append(_Work(micro, stage, len(line)))
        training = step.phase == TRAIN
        self._lines = [_Line(engine.segments[name], work, training=training) for name, work in works.items()]
        self._untaken: list[tuple[Edge, MicroBatch]] = []

    def run(self) -> None:
        """From the first message to the last."""
        self.give_labels()
        while not self.over:
            if self.forward_next() or self.backward_next():
                continue
            owing = [line for line in self._lines if line.segment.way_back.owes]
            if not owing:
                self.guard.wait_for_answer(self.waits_for())
            elif not self.guard.wait(on=self.waits_for(), timeout=0):
                self._catch_up(owing[-1])

    # --- what may come to nothing

    def hold(self) -> None:
        """Before ``run``: let no segment step at its end, but in ``stand``; or never, in ``forget``."""
        self._holds = True
        for line in self._lines:
            line.segment.hold()

    def stand(self) -> None:
        """The attempt that was held is the step: look at what came, and step."""
        for look in self._to_look_at:
            look()
        for line in self._lines:
            line.segment.step()

    def forget(self) -> None:
        """The attempt that was held does not count, nor does what came back for it."""
        for line in self._lines:
            line.segment.forget()

    def wait_for_the_next(self) -> int:
        """Wait for whoever sends us activations or labels, and return for which step the first of it is."""
        stages = [stage for stream in self._streams.values() for stage in stream.stages]
        edges = [edge for stage in stages for edge in (*stage.inputs, stage.labels) if edge is not None]
        lanes = {(edge.source_party, edge.lane) for edge in edges if not edge.local}
        while True:
            for lane in sorted(lanes):
                if (message := self.guard.peek(lane)) is not None:
                    return message.key[0]
            self.guard.wait_for_answer({party for party, _ in lanes})

    def all_labels(self) -> dict[str, torch.Tensor]:
        """This party's labels by field, over all rows of the step."""
        return {
            field: torch.cat([self.rows(micro, field) for micro in self.step.micro_batches])
            for field in self._label_fields
        }

    @property
    def _label_fields(self) -> list[str]:
        edges = [edge for stream in self._streams.values() for edge in stream.own_labels]
        return list(dict.fromkeys(edge.field for edge in edges if edge.field is not None))

    def _labels(self, micro: MicroBatch, field: str) -> torch.Tensor:
        """What this attempt gives out as labels."""
        if self.false is None:
            return self.rows(micro, field)
        first = sum(one.rows for one in self.step.micro_batches[: micro.number])
        return self.false[field][first : first + micro.rows]

    @property
    def over(self) -> bool:
        """Every micro-batch went forward and back, and every label given was taken."""
        while self._untaken and self._came(*self._untaken[0], back=True):
            edge, _ = self._untaken.pop(0)
            self.guard.take((edge.target_party, edge.back_lane))
        return not self._untaken and all(line.all_returned and not line.segment.way_back.owes for line in self._lines)

    # --- what can run now

    def forward_next(self) -> bool:
        """Run the first forward whose inputs are there: lowest micro-batch, then topological order."""
        ready = [
            (work.micro.number, place, line, work)
            for place, line in enumerate(self._lines)
            for work in line.next_forwards()
            if not any(self._awaited_forward(work))
        ]
        if not ready:
            return False
        _, _, line, work = min(ready, key=lambda item: item[:2])
        self._forward(line, work)
        if work.stage.labels is not None and work in line.next_backwards() and not any(self._awaited_backward(work)):
            self._backward(line, work)
        return True

    def backward_next(self) -> bool:
        """Run the first backward whose gradients are there: lowest micro-batch, then reverse topological order."""
        ready = [
            (work.micro.number, -place, line, work)
            for place, line in enumerate(self._lines)
            for work in line.next_backwards()
            if not any(self._awaited_backward(work))
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
            for work in line.next_forwards():
                parties |= {edge.source_party for edge in self._awaited_forward(work) if not edge.local}
            for work in line.next_backwards():
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
        if message.key != (due := (self.step.number, self._first_key + micro.number)):
            raise PeerMisbehaved(
                f"sent {message.kind} of {edge.source} -> {edge.target} for step, micro-batch {message.key}",
                party=party,
                expected=f"{due}",
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
                self._send(edge, micro, "labels", self._labels(micro, edge.field), back=False)
                if edge.answered:
                    self._untaken.append((edge, micro))

    def _forward(self, line: _Line, work: _Work) -> None:
        micro, stage, _ = work
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
        line.went_forward(work)
        loss, detectors = line.segment.step_loss, self._detectors
        if loss is not None and detectors is not None and line.all_forwarded:
            self._look(lambda: detectors.loss(stage.segment, self.step, loss))
        for edge, output in outputs.items():
            if edge.local:
                self._made[edge.index, micro.number] = output
            else:
                self._send(edge, micro, "activation", output, back=False)
        if prediction is not None and self.step.phase == PREDICT:
            self.predictions.setdefault(stage.segment, []).append(prediction)

    def _backward(self, line: _Line, work: _Work) -> None:
        micro, stage, place = work
        gradients = {edge: self._take_back(edge, micro) for edge in stage.outputs}
        for edge, gradient in gradients.items():
            if self.update is not None and gradient is not None and not edge.local:
                self._notice(edge, micro, gradient)
        back: list[torch.Tensor | None] = [None] * len(stage.inputs)
        if self.update is not None:
            back = line.segment.backward(stage, gradients, micro=micro.number, place=place)
        line.went_back(work)
        for edge, gradient in zip(stage.inputs, back, strict=True):
            if edge.local:
                self._returned[edge.index, micro.number] = gradient
            else:
                if gradient is None and self.update is not None and _has_gradient(edge):
                    gradient = torch.zeros(micro.rows, *edge.shape, dtype=DTYPES[edge.dtype])  # no way to a loss
                self._send(edge, micro, "gradient", gradient, back=True)
        self._step_at_the_end(line)

    def _catch_up(self, line: _Line) -> None:
        """Compute gradients of weights while there is nothing to do that others wait for."""
        line.segment.way_back.some_weights()
        self._step_at_the_end(line)

    def _step_at_the_end(self, line: _Line) -> None:
        done = line.all_returned and not line.segment.way_back.owes
        if done and self.update is not None and not self._holds:
            line.segment.step()

    def _notice(self, edge: Edge, micro: MicroBatch, gradient: torch.Tensor) -> None:
        """Let the detectors look at ``gradient``, which came in, before anything is done with it."""
        detectors = self._detectors
        if detectors is None:
            return
        if self.false is not None or (self._after is not None and self._after.false is not None):
            self.gradients.setdefault(edge, []).append(gradient)
        labels = {
            one.field: self.rows(micro, one.field)
            for one in self._streams[micro.stream].own_labels
            if one.field is not None
        }
        self._look(lambda: detectors.gradient(edge, self.step, micro, gradient, labels))
        decoy = self._after
        if decoy is None or decoy.false is None or len(self.gradients[edge]) < len(self.step.micro_batches):
            return
        detectors.answered(
            edge, self.step, torch.cat(decoy.gradients[edge]), torch.cat(self.gradients[edge]), decoy.changed
        )

    def _look(self, look: Callable[[], None]) -> None:
        """``look`` now; where the attempt is held, only once it stands: answers to false labels are not judged so."""
        if self._holds:
            self._to_look_at.append(look)
        else:
            look()

    @property
    def changed(self) -> torch.Tensor:
        """Of a decoy: whose label was false, bool ``[rows]``."""
        assert self.false is not None and self.true is not None
        different = [(self.true[name] != self.false[name]).reshape(self.step.rows, -1).any(1) for name in self.true]
        return torch.stack(different).any(0)

    def _take(self, edge: Edge, micro: MicroBatch) -> torch.Tensor:
        if not edge.local:
            return next(iter(self.guard.take((edge.source_party, edge.lane)).tensors.values()))
        if edge.field is not None:
            return self._labels(micro, edge.field)
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
        carried = self.whose(micro)
        if carried is not None and self._after is not None:
            carried = replace(carried, again=True)
        key = (self.step.number, self._first_key + micro.number)
        self.guard.release(lane, Message(kind, key, tensors={} if tensor is None else {"": tensor}), carried)


def _has_gradient(edge: Edge) -> bool:
    return DTYPES[edge.dtype].is_floating_point
