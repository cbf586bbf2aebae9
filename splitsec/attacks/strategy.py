"""What an attacking party does in place of its honest work: segments of its own, and what it carries off.

Here: the interface between an attack and the party that runs it (``adversary``), and the eavesdropping segment that
most attacks begin with.  An attacker sees what its place in the graph gives it, and the ``Scene``: what its adversary
model grants it besides.  Not here: who attacks whom (``aim``), how well it went (each attack's own judgement).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from splitsec.graph import Graph
from splitsec.plan import Edge, Plan, Stage
from splitsec.schedule import TRAIN, Turn
from splitsec.segments import Segment

__all__ = ["Heard", "Imposter", "Listener", "Loot", "Scene", "Strategy", "bounds"]


@dataclass(frozen=True)
class Scene:
    """What an attacking party knows."""

    graph: Graph
    plan: Plan
    """The attacker's own."""
    cut: str
    """The edge under attack, ``source -> target`` as ``Lane.name`` and ``Edge`` have it."""
    shape: tuple[int, ...]
    """Of one sample at the victims, without the batch dimension."""
    cut_shape: tuple[int, ...]
    """Of one activation there."""
    public: Mapping[str, torch.Tensor]
    """Samples of the same kind as the victims' that belong to nobody: ``x`` float32 ``[n, *shape]`` as the victims'
    functions scale them, ``y`` their labels where there are any.  Empty where the adversary has none."""
    low: torch.Tensor
    high: torch.Tensor
    """What scales a sample to [-1, 1], broadcast over ``x``: ``(x - low) / (high - low) * 2 - 1``; of ``public``."""
    architecture: Callable[[], nn.Module] | None
    """Makes the victims' segment afresh, where the adversary model grants its architecture; its first weights are the
    victims' own first weights (they follow from the seed in the graph and the segment's name: docs/threat-model.md)."""
    options: Mapping[str, Any]
    """The attack's settings."""
    seed: int
    report: Callable[[dict[str, Any]], None]
    """Tells the judge how it goes: plain JSON values with an ``event``, e.g. ``progress`` with ``done`` and ``of``."""

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` with every feature in [-1, 1]."""
        return (x - self.low) / (self.high - self.low) * 2 - 1


def bounds(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What scales samples ``x [n, ...]`` to [-1, 1]: the least and the greatest value, of all where a sample has
    several dimensions (pixels have one scale), of each column of a table.
    """
    if x.dim() > 2:
        low, high = x.min(), x.max()
    else:
        low, high = x.amin(0), x.amax(0)
    return low, torch.where(high > low, high, low + 1)


@dataclass
class Loot:
    """What the attacker carries off, for the judge.

    ``tensors``: by name.  A recovered sample's place is where it stood in the victims' order: int64 ``[n, 3]`` rows of
    (epoch, stream, position), under ``places``; the judge knows whose sample that was, the attacker does not.
    ``numbers``: plain values.  ``curves``: name to points ``[(x, y), ...]``.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


class Strategy:
    """Base of every attack's party half.  Made once, in the attacker's process, before it connects."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.now: Turn | None = None

    def take_over(self, honest: Mapping[str, Segment]) -> dict[str, Segment]:
        """The segments that run in place of ``honest``: the same names, the same cuts."""
        return dict(honest)

    def samples(self, split: str, fields: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The attacker's own samples of ``split`` (train, test) as it will use them: a poisoning client alters them
        here, their number and shapes stay.
        """
        return fields

    def turn(self, turn: Turn) -> None:
        """A turn begins."""
        self.now = turn

    def loot(self) -> Loot:
        """After the last step, or after a victim left: what was recovered.  May compute for minutes."""
        return Loot()


@dataclass(eq=False)
class Heard:
    """One training micro-batch as it passed a listening segment.  All tensors detached."""

    place: tuple[int, int, int]
    """Epoch, stream, position of its first row in the order of that turn."""
    activation: torch.Tensor
    """``[rows, *cut shape]``."""
    labels: torch.Tensor | None
    gradient: torch.Tensor | None = None
    """What was sent back, ``[rows, *cut shape]``."""


class Imposter(Segment):
    """A segment in the place of an honest one, with its module, optimiser and loss."""

    def __init__(self, honest: Segment) -> None:
        super().__init__(
            honest.name,
            honest.module,
            honest.optimizer,
            loss=honest.loss,
            loss_name=honest.loss_name,
            seed=honest.seed,
            nopeek=honest.nopeek,
            private=honest.private,
        )


class Listener(Imposter):
    """An honest segment that remembers: it computes and answers as the segment it stands for, to the last bit.

    ``cut``: the input edge to listen at.  ``heard``: one entry for each training micro-batch, of the last ``keep``
    epochs' worth, oldest first; a batch that is sent again (docs/detectors.md: decoys) replaces itself, and the false
    one goes to ``decoys``.
    """

    def __init__(self, honest: Segment, cut: str, strategy: Strategy, *, keep: int = 1) -> None:
        super().__init__(honest)
        self.heard: list[Heard] = []
        self.decoys: list[Heard] = []
        self.batches = 0
        """Training micro-batches heard, decoys not counted."""
        self._cut = cut
        self._keep = keep
        self._strategy = strategy
        self._place: dict[int, tuple[int, int]] = {}
        self._open: list[Heard] = []
        self._streams = {id(stage): s.stream for s in strategy.scene.plan.streams for stage in s.stages}

    def forward(
        self,
        stage: Stage,
        inputs: Sequence[torch.Tensor],
        labels: torch.Tensor | None,
        *,
        micro: int,
        update: int | None,
        share: float,
    ) -> tuple[dict[Edge, torch.Tensor], torch.Tensor | None]:
        if update is not None and (which := self._listens(stage)) is not None:
            self._hear(stage, inputs[which], labels)
        return super().forward(stage, inputs, labels, micro=micro, update=update, share=share)

    def backward(
        self, stage: Stage, gradients: Mapping[Edge, torch.Tensor | None], *, micro: int, place: int = 0
    ) -> list[torch.Tensor | None]:
        back = super().backward(stage, gradients, micro=micro, place=place)
        if (which := self._listens(stage)) is not None:
            self._answered(back[which])
        return back

    def step(self) -> None:
        """The step stands: what was heard in it is the victim's."""
        super().step()
        self._open = []

    def forget(self) -> None:
        """The step does not stand: it was a decoy."""
        super().forget()
        for one in self._open:
            self.heard.remove(one)
            self.decoys.append(one)
            epoch, stream, start = one.place
            self._place[stream] = (epoch, min(start, self._place[stream][1]))
            self.batches -= 1
        self._open = []

    def _listens(self, stage: Stage) -> int | None:
        for place, edge in enumerate(stage.inputs):
            if f"{edge.source} -> {edge.target}" == self._cut:
                return place
        return None

    def _hear(self, stage: Stage, activation: torch.Tensor, labels: torch.Tensor | None) -> None:
        turn = self._strategy.now
        assert turn is not None and turn.phase == TRAIN
        stream = self._streams[id(stage)]
        epoch, position = self._place.get(stream, (turn.epoch, 0))
        if epoch != turn.epoch:
            epoch, position = turn.epoch, 0
        self._place[stream] = (epoch, position + len(activation))
        self.batches += 1
        if self.heard and self.heard[0].place[0] <= turn.epoch - self._keep:
            self.heard = [one for one in self.heard if one.place[0] > turn.epoch - self._keep]
        one = Heard(
            (epoch, stream, position), activation.detach().clone(), None if labels is None else labels.detach().clone()
        )
        self.heard.append(one)
        self._open.append(one)

    def _answered(self, gradient: torch.Tensor | None) -> None:
        for one in self._open:
            if one.gradient is None:
                one.gradient = None if gradient is None else gradient.detach().clone()
                return
