"""What a party notices in what it receives while training, and that it then stops before anything more leaves.

Here: which detector applies to which of this party's cuts, what each has seen so far, and the alarm.  Not here: the
statistics and their thresholds (``splitsec.privacy.detection``), when each is asked (``engine``), where an alarm is
written down and told (``party``).  docs/detectors.md says what each sees, and when it is blind.

Label agreement: at a cut whose gradient comes from losses that all compare classes with labels of this party.  Decoys:
at the cuts of a party with all samples and labels of a stream; which steps may be redone is ``schedule``'s.  Outliers:
at every cut.  The loss: where this party computes it.  NaN and infinity never come this far (``guard``).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import torch

from splitsec.errors import SuspectedAttack
from splitsec.graph import CUSTOM, Graph
from splitsec.partyfile import OwnDetectors
from splitsec.plan import Edge, Plan
from splitsec.privacy import detection
from splitsec.privacy.detection import (
    DecoyRule,
    Gradients,
    LabelRule,
    LossRule,
    OneWayRule,
    ReplayRule,
    SizeRule,
)
from splitsec.schedule import MicroBatch, Step

__all__ = ["NAMES", "Detectors", "Heeded", "heeded"]

NAMES: Final = ("label agreement", "decoys", "outliers")
"""The detectors that can raise an alarm, as it names them."""

Kind = Literal["classes", "probabilities", "yes or no"]

_ROWS: Final = 4096
"""Rows of a step that are looked at, at most: the first ones."""


@dataclass(frozen=True)
class Heeded:
    """A label that the gradient of a cut should heed: its field, and how to read a class out of it."""

    field: str
    kind: Kind
    loss: str

    def classes(self, labels: torch.Tensor) -> torch.Tensor:
        """Int64 ``[rows]`` from this party's ``labels``, ``[rows, ...]`` as the graph declares them."""
        if self.kind == "probabilities":
            return labels.argmax(1)
        flat = labels.reshape(len(labels))
        return (flat > 0.5).long() if self.kind == "yes or no" else flat.long()


def heeded(graph: Graph, plan: Plan, edge: Edge) -> tuple[Heeded, ...] | None:
    """The labels that the gradient of ``edge`` should heed; None where label agreement does not apply to it.

    It applies where every loss that the cut leads to compares classes with labels that this party holds.
    """
    losses = {name for name in _led_to(graph, edge.target) if graph.segments[name].loss is not None}
    labels = {one.target: one for one in graph.labels}
    found = []
    for name in sorted(losses):
        one = labels[name]
        if plan.party not in graph.members(one.source):
            return None
        kind = _kind(graph.segments[name].loss or "", tuple(one.shape), one.dtype)
        if kind is None:
            return None
        found.append(Heeded(one.field, kind, name))
    return tuple(found) or None


def _led_to(graph: Graph, segment: str) -> set[str]:
    """``segment`` and all segments that its output reaches."""
    found, todo = {segment}, [segment]
    while todo:
        for index in graph.edges_out_of(todo.pop()):
            if (target := graph.cuts[index].target) not in found:
                found.add(target)
                todo.append(target)
    return found


def _kind(loss: str, shape: tuple[int, ...], dtype: str) -> Kind | None:
    whole = not dtype.startswith(("float", "bfloat"))
    if loss in ("cross_entropy", "nll", CUSTOM) and whole and shape == ():
        return "classes"
    if loss == "cross_entropy" and not whole and len(shape) == 1:
        return "probabilities"
    if loss in ("bce", "bce_with_logits") and shape in ((), (1,)):
        return "yes or no"
    return None


_NO_DECOYS: Final = ("l1", "smooth_l1", "huber")
"""Losses whose gradient does not depend on the label while the output is far from it."""


@dataclass
class _Gathered:
    """The micro-batches of a step that came so far, at one cut and in one stream."""

    step: int
    rows: int = 0
    gradients: list[torch.Tensor] = field(default_factory=list)
    labels: list[Mapping[str, torch.Tensor]] = field(default_factory=list)


@dataclass
class _Watch:
    """One cut under watch, over all streams of this party."""

    heeded: tuple[Heeded, ...] | None
    labels: dict[str, LabelRule] = field(default_factory=dict)
    decoys: DecoyRule | None = None
    size: SizeRule = field(default_factory=SizeRule)
    one_way: OneWayRule = field(default_factory=OneWayRule)
    replay: ReplayRule = field(default_factory=ReplayRule)


class Detectors:
    """One party's.  ``gradient`` and ``answered`` raise ``SuspectedAttack`` where they suspect one.

    ``wanted``: what the party file switches on.  ``alarm``: is told before the error is raised.  ``warn``: takes a
    sentence for the operator; each warning is given once.  ``chance``: of decoys, in place of the system's own.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        wanted: OwnDetectors,
        *,
        alarm: Callable[[SuspectedAttack], None] = lambda suspected: None,
        warn: Callable[[str], None] = lambda text: None,
        chance: secrets.SystemRandom | None = None,
    ) -> None:
        self.batches = 0
        """Training steps of this party so far; 1 in the first."""
        self._graph, self._plan, self._wanted = graph, plan, wanted
        self._alarm, self._warn = alarm, warn
        self._chance = chance or secrets.SystemRandom()
        self._step: int | None = None
        self._watched: dict[int, _Watch] = {}
        self._gathered: dict[tuple[int, int], _Gathered] = {}
        self._losses: dict[str, LossRule] = {}
        self._warned: set[tuple[str, str]] = set()
        self._asked = 0
        self._place = 0
        self._due = False

    # --- asked by the engine

    def gradient(
        self,
        edge: Edge,
        step: Step,
        micro: MicroBatch,
        gradient: torch.Tensor,
        labels: Mapping[str, torch.Tensor],
    ) -> None:
        """Look at a gradient ``[rows, ...]`` that came in from another party while training, before it is used.

        ``labels``: this party's own label fields for these rows, by name; empty where it holds none.
        """
        self._begin(step)
        if not (self._wanted.label_agreement or self._wanted.outliers):
            return
        key = (edge.index, micro.stream)
        so_far = self._gathered.get(key)
        if so_far is None or so_far.step != step.number or so_far.rows >= self._due_rows(step, micro):
            so_far = self._gathered[key] = _Gathered(step.number)
        so_far.rows += micro.rows
        so_far.gradients.append(gradient)
        so_far.labels.append(labels)
        if so_far.rows < self._due_rows(step, micro):
            return
        del self._gathered[key]
        whole = so_far.gradients[0] if len(so_far.gradients) == 1 else torch.cat(so_far.gradients)
        watch = self._watch(edge)
        seen = Gradients(whole[:_ROWS])
        if self._wanted.outliers:
            self._size(edge, step, watch, seen)
            self._replay(edge, step, watch, seen)
        if self._wanted.label_agreement and watch.heeded is not None:
            together = {name: torch.cat([one[name] for one in so_far.labels])[:_ROWS] for name in so_far.labels[0]}
            self._labels(edge, watch, seen, together)
        elif self._wanted.outliers:
            self._one_way(edge, watch, seen)

    def loss(self, segment: str, step: Step, loss: float) -> None:
        """Look at the mean loss of a training step at a segment whose loss this party computes."""
        self._begin(step)
        if not self._wanted.loss or not math.isfinite(loss):
            return
        rule = self._losses.setdefault(segment, LossRule())
        said = rule.add(loss)
        if said == "never fell":
            self._say_once(
                segment,
                said,
                f"the loss of {segment} has not fallen in {self.batches} training steps: {rule.first:.4g} at first, "
                f"{rule.lowest:.4g} at best; either nothing can be learnt here, or another party does not train",
            )
        elif said == "exploded":
            self._say_once(
                segment,
                said,
                f"the loss of {segment} has grown from {rule.first:.4g} to {rule.last:.4g}; either the training "
                "diverges, or another party works against it",
            )

    def decoy(self, step: Step) -> bool:
        """Whether the first attempt at ``step``, which may be redone, shall be a decoy.

        One in about ``training: {decoys: ...}`` of the steps that it is asked of, at a secret place in each block.
        """
        every = self._graph.training.decoys
        if not self._wanted.decoys or not every or not self._decoys_tell():
            return False
        place = self._asked % every
        if place == 0:
            self._place = self._chance.randrange(every)
        self._asked += 1
        self._due = self._due or place == self._place
        return self._due

    def false_labels(self, labels: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor] | None:
        """``labels`` of a step's rows, by field, most of them put before other rows; None where that changes too few.

        After None, the next step that may be redone is tried.
        """
        if not labels:
            return None
        columns = [one.reshape(len(one), -1).double() for one in labels.values()]
        generator = torch.Generator().manual_seed(self._chance.getrandbits(63))
        order = detection.false_order(torch.cat(columns, 1), generator)
        if order is None:
            return None
        self._due = False
        return {name: one[order] for name, one in labels.items()}

    def answered(self, edge: Edge, step: Step, decoy: torch.Tensor, real: torch.Tensor, changed: torch.Tensor) -> None:
        """Compare the gradients of one cut for a decoy and for the same rows and weights with their true labels.

        ``changed``: bool ``[rows]``, whose label was false.
        """
        self._begin(step)
        losses = self._losses_of(edge)
        if not self._wanted.decoys or losses & {*_NO_DECOYS}:
            return
        seen = detection.answer(decoy, real, changed)
        if seen is None:
            return
        watch = self._watch(edge)
        watch.decoys = watch.decoys or DecoyRule(classes=not losses & {"mse", CUSTOM})
        if not watch.decoys.suspicious(seen):
            return
        self._raise(
            "decoys",
            edge,
            f"{edge.target_party} answers false labels as it answers true ones: over {_cut(edge)} gradients changed "
            f"by {seen.changed:.0%} where {seen.rows} of {len(changed)} labels were false, and by {seen.control:.0%} "
            "where they were not",
            expected=f"at least {detection.HEEDED:.0%} under a false label, as honest trainings gave",
            evidence={"changed": seen.changed, "control": seen.control, "rows": seen.rows},
        )

    # --- its parts

    def _begin(self, step: Step) -> None:
        if self._step != step.number:
            self._step = step.number
            self.batches += 1

    @staticmethod
    def _due_rows(step: Step, micro: MicroBatch) -> int:
        return sum(one.rows for one in step.micro_batches if one.stream == micro.stream)

    def _watch(self, edge: Edge) -> _Watch:
        found = self._watched.get(edge.index)
        if found is None:
            found = self._watched[edge.index] = _Watch(heeded(self._graph, self._plan, edge))
        return found

    def _losses_of(self, edge: Edge) -> set[str]:
        names = (self._graph.segments[name].loss for name in _led_to(self._graph, edge.target))
        return {loss for loss in names if loss is not None}

    def _decoys_tell(self) -> bool:
        """Whether there is any cut of this party where an answer to a decoy would say something."""
        outputs = (edge for stream in self._plan.streams for stage in stream.stages for edge in stage.outputs)
        return any(not edge.local and not self._losses_of(edge) & {*_NO_DECOYS} for edge in outputs)

    def _labels(self, edge: Edge, watch: _Watch, gradients: Gradients, labels: Mapping[str, torch.Tensor]) -> None:
        assert watch.heeded is not None
        suspected = []
        for one in watch.heeded:
            if one.field not in labels:
                return
            step = detection.likeness(gradients, one.classes(labels[one.field]))
            seen = watch.labels.setdefault(one.loss, LabelRule()).add(step)
            if seen is None or not LabelRule.suspicious(seen):
                continue
            suspected.append(seen)
        if len(suspected) < len(watch.heeded):  # a gradient that heeds one of several labels is honest
            return
        seen = min(suspected, key=lambda one: one.common)
        self._raise(
            "label agreement",
            edge,
            f"what {edge.target_party} sends back over {_cut(edge)} does not heed our labels: it pulls samples of "
            f"different labels the same way (mean cosine {seen.common:.2f} over the last batches)",
            expected=f"at most about 0, and never above {detection.COMMON:g} in honest trainings",
            evidence={
                "same_label": seen.same_mean if not math.isnan(seen.same_mean) else 0.0,
                "other_label": seen.other_mean,
                "agreement": seen.agreement if not math.isnan(seen.agreement) else 0.0,
                "common": seen.common,
                "pairs": seen.same_pairs + seen.other_pairs,
            },
        )

    def _size(self, edge: Edge, step: Step, watch: _Watch, gradients: Gradients) -> None:
        norm = float(gradients.norms.max()) * step.rows if len(gradients.rows) else 0.0
        if not watch.size.suspicious(norm):
            return
        self._raise(
            "outliers",
            edge,
            f"{edge.target_party} sends back a gradient over {_cut(edge)} of norm {norm:.3g}, and the largest before "
            f"was {watch.size.largest:.3g}",
            expected=f"at most {detection.JUMP:g} times as much, and never {detection.HUGE:g}",
            evidence={"norm": norm, "largest_before": watch.size.largest},
        )

    def _replay(self, edge: Edge, step: Step, watch: _Watch, gradients: Gradients) -> None:
        before = watch.replay.add(self.batches, gradients)
        if before is None:
            return
        seen = (
            f"{edge.target_party} sends back over {_cut(edge)} the very gradients that it sent in step {before} of ours"
        )
        if watch.heeded is None:  # a loss that is far from its target may have one and the same gradient for all
            self._say_once(_cut(edge), "replay", f"{seen}; a peer that trains does so rarely, one that plays back does")
            return
        self._raise(
            "outliers",
            edge,
            seen,
            expected="gradients of this step's samples",
            evidence={"same_as_batch": before},
        )

    def _one_way(self, edge: Edge, watch: _Watch, gradients: Gradients) -> None:
        mean = watch.one_way.add(gradients)
        if mean is not None and OneWayRule.suspicious(mean):
            self._say_once(
                _cut(edge),
                "one way",
                f"what {edge.target_party} sends back over {_cut(edge)} pulls all samples one way (length of the sum "
                f"over sum of the lengths {mean:.2f} in the last {detection.ONE_WAY_STEPS} steps): so do hijacking "
                "and honest training where nearly all labels are the same; this party holds no labels to tell which",
            )

    def _say_once(self, where: str, what: str, text: str) -> None:
        if (where, what) not in self._warned:
            self._warned.add((where, what))
            self._warn(text)

    def _raise(self, detector: str, edge: Edge, seen: str, *, expected: str, evidence: Mapping[str, float]) -> None:
        suspected = SuspectedAttack(
            seen,
            detector=detector,
            cut=_cut(edge),
            party=edge.target_party,
            batch=self.batches,
            evidence={name: float(f"{value:.6g}") for name, value in evidence.items()},
            expected=expected,
            fix="we stopped before anything more left, and told the others only that; talk to whoever runs "
            f"{edge.target_party} before you train on. docs/detectors.md says what else can look like this, and how to "
            "switch a detector off",
        )
        self._alarm(suspected)
        raise suspected


def _cut(edge: Edge) -> str:
    return f"{edge.source} -> {edge.target}"
