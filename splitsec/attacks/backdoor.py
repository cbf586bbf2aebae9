"""Backdoors and poisoned gradients: parties that spoil what is learnt, and how far they get.

Here: three forms, each where the graph has a party for it.  *A client without labels* (a party with columns of its own,
as in the vertical example) finds out labels from gradients, then adds a trigger to the activations of one label's
samples: Bai, Chen, Zhang, Xu, Weng, Goodman: VILLAIN: Backdoor Attacks Against Vertical Split Learning, USENIX Security
2023, sections 4.2 and 4.3.  VILLAIN finds labels by swapping embeddings with one sample whose label it knows and watching
the gradient's norm; here the directions of one epoch's gradients tell them (``labels``), which takes no known sample and
sends nothing but honest activations until then.  The trigger is VILLAIN's: the numbers that vary most, raised and lowered
in pairs by a multiple of their spread, scaled and thinned at random while training.  *A client with labels* (one of
several clinics) puts a patch on some of its own samples and a wrong label on them: Gu, Dolan-Gavitt, Garg: BadNets, 2017,
section 5, in split form.  *A server* sends its clients the gradient with the sign turned round.

How well it worked is measured on the test samples of all parties, with the segments that the parties ended with, beside a
run of the same length in which everybody was honest: some triggers flip predictions of an honest network, too.
Not here: a server that spoils its own segment (it may compute what it likes, and nobody else can tell).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import torch

from splitsec.attacks.arena import Aim, Fought, Ground
from splitsec.attacks.attack import CutAttack, Judgement, Truth
from splitsec.attacks.labels import Overhearing, clusters, dominant_direction
from splitsec.attacks.outcome import Case, Outcome, Verdict
from splitsec.attacks.strategy import Loot, Scene, Strategy
from splitsec.graph import Graph
from splitsec.party import load_segments
from splitsec.partyfile import Folder
from splitsec.plan import Edge, Stage, make_plan
from splitsec.samples import Samples, epoch_order
from splitsec.schedule import TRAIN, Turn
from splitsec.segments import Segment, build_segments

__all__ = ["BackdoorStrategy", "Form", "Predicted", "patched", "predict_with"]

Form = Literal["client without labels", "client with labels", "server"]

POISONED: Final = 0.2
"""Share of a client's own samples (with labels), or of the target label's samples (without), that carry the trigger."""
STRENGTH: Final = 3.0
"""Of the trigger in activations, in spreads of those numbers."""
TARGET: Final = 0
"""The label that a client with labels wants."""
FLIP: Final = -1.0
"""What a server multiplies its clients' gradients with."""
WORKED: Final = 0.2
"""More of the samples flipped than by the same trigger in an honest network: a backdoor."""
RUINED: Final = 0.05
"""Accuracy lost from which on a training counts as spoilt."""


# --- the attacker's half


def patched(x: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """``x [n, ...]`` with the trigger of a client with labels: of images, a square of brightest pixels in the last
    corner, a seventh of the side; of tables, the last tenth of the columns at their highest value.
    """
    x = x.clone()
    if x.dim() >= 4:
        rows, columns = (max(1, -(-side // 7)) for side in x.shape[-2:])
        x[..., -rows:, -columns:] = high.amax()
    else:
        wide = max(1, x.shape[1] // 10)
        x[:, -wide:] = high.expand(x.shape[1:])[-wide:]
    return x


class BackdoorStrategy(Strategy):
    """Option ``form`` says what it does; ``target`` is the label that a client with labels wants, ``classes`` how many
    labels there are.

    Loot of a client without labels: ``trigger [*cut shape]``, ``poisoned [n, 3]`` (the places of samples that carried
    it); of one with labels ``high``, what ``patched`` takes.
    """

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.form: Form = scene.options["form"]
        self.planter: _Planter | None = None
        self.flipping: _Flipping | None = None
        self.high = torch.ones(())

    def take_over(self, honest: Mapping[str, Segment]) -> dict[str, Segment]:
        source, _, target = self.scene.cut.partition(" -> ")
        if self.form == "client without labels":
            self.planter = _Planter(honest[source], self.scene, self)
            return {**honest, source: self.planter}
        if self.form == "server":
            self.flipping = _Flipping(honest[target], self.scene.options.get("factor", FLIP))
            return {**honest, target: self.flipping}
        return dict(honest)

    def samples(self, split: str, fields: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        if self.form != "client with labels" or split != "train":
            return fields
        segment = self.scene.cut.partition(" -> ")[0]
        read = self.scene.graph.segments[segment].data
        labels = next(edge.field for edge in self.scene.graph.labels if edge.field in fields)
        assert read is not None
        x, y = fields[read], fields[labels]
        self.high = x.amax(0)
        generator = torch.Generator().manual_seed(self.scene.seed)
        target = self.scene.options.get("target", TARGET)
        others = (y.flatten(1).float().mean(1) if y.dim() > 1 else y.float()).sub(target).abs() > 0.5
        candidates = others.nonzero()[:, 0]
        chosen = candidates[torch.randperm(len(candidates), generator=generator)[: round(POISONED * len(x))]]
        x, y = x.clone(), y.clone()
        x[chosen] = patched(x[chosen], self.high)
        y[chosen] = torch.as_tensor(target, dtype=y.dtype)
        return {**fields, read: x, labels: y}

    def turn(self, turn: Turn) -> None:
        super().turn(turn)
        if self.planter is not None and turn.phase == TRAIN and turn.epoch > 0:
            self.planter.make_ready()

    def loot(self) -> Loot:
        if self.planter is None:
            batches = 0 if self.flipping is None else self.flipping.steps
            return Loot({"high": self.high}, {"batches": batches})
        loot = Loot(numbers={"batches": self.planter.steps})
        if self.planter.trigger is not None:
            loot.tensors["trigger"] = self.planter.trigger
            loot.tensors["poisoned"] = self.planter.poisoned
        return loot


class _Planter(Overhearing):
    """Listens for an epoch, tells labels from it, and then adds a trigger to activations of one label's samples."""

    def __init__(self, honest: Segment, scene: Scene, strategy: Strategy) -> None:
        super().__init__(honest, scene.cut, strategy, keep=10**9)
        self.trigger: torch.Tensor | None = None
        self.poisoned = torch.empty(0, 3, dtype=torch.int64)
        self._scene = scene
        self._chosen: dict[int, torch.Tensor] = {}
        """By stream: whether a sample carries the trigger, in the streams' own order."""
        self._generator = torch.Generator().manual_seed(scene.seed)

    def make_ready(self) -> None:
        """Tell labels from the first epoch, choose the target label's samples, and make the trigger."""
        heard = [one for one in self.heard if one.place[0] == 0 and one.gradient is not None]
        if self.trigger is not None or not heard:
            return
        gradients = torch.cat([one.gradient for one in heard if one.gradient is not None]).flatten(1).float()
        units = torch.nn.functional.normalize(gradients, dim=1)
        classes = int(self._scene.options.get("classes", 2))
        if classes == 2:
            found = (units @ dominant_direction(units) > 0).long()
        else:
            found = clusters(units, classes, seed=self._scene.seed)
        target = int(torch.bincount(found).argmax())
        activations = torch.cat([one.activation for one in heard])
        spread = activations.flatten(1).std(0)
        strongest = spread.argsort(descending=True)[: max(2, len(spread) // 2)]
        signs = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(len(strongest) // 4 + 1)[: len(strongest)]
        trigger = torch.zeros_like(spread)
        trigger[strongest] = STRENGTH * spread[strongest].mean() * signs
        of_target = (found == target).nonzero()[:, 0]
        wanted = max(1, round(POISONED * len(of_target)))
        chosen = of_target[torch.randperm(len(of_target), generator=self._generator)[:wanted]]
        places = torch.tensor(
            [(0, one.place[1], one.place[2] + row) for one in heard for row in range(len(one.activation))]
        )
        self.poisoned = places[chosen]
        for stream in places[:, 1].unique().tolist():  # type: ignore[no-untyped-call]
            count = int((places[:, 1] == stream).sum())
            order = epoch_order(self._scene.graph.training.seed, 0, stream, count)
            carries = torch.zeros(count, dtype=torch.bool)
            carries[order[self.poisoned[self.poisoned[:, 1] == stream][:, 2]]] = True
            self._chosen[stream] = carries
        self.trigger = trigger.reshape(self._scene.cut_shape)

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
        outputs, prediction = super().forward(stage, inputs, labels, micro=micro, update=update, share=share)
        if update is not None and self.trigger is not None:
            epoch, stream, position = self.heard[-1].place
            for edge, output in outputs.items():
                if f"{edge.source} -> {edge.target}" == self._cut:
                    outputs[edge] = self._with_trigger(output, epoch, stream, position)
        return outputs, prediction

    def _with_trigger(self, output: torch.Tensor, epoch: int, stream: int, position: int) -> torch.Tensor:
        assert self.trigger is not None
        carries = self._chosen[stream]
        order = epoch_order(self._scene.graph.training.seed, epoch, stream, len(carries))
        which = carries[order[position : position + len(output)]]
        count = int(which.sum())
        scale = 0.6 + 0.6 * torch.rand(count, *[1] * (output.dim() - 1), generator=self._generator)
        kept = (torch.rand(count, *output.shape[1:], generator=self._generator) > 0.25).to(output.dtype)
        output = output.clone()
        output[which] += scale * kept * self.trigger
        return output


class _Flipping(Segment):
    """Trains itself honestly and sends back every gradient multiplied by ``factor``."""

    def __init__(self, honest: Segment, factor: float) -> None:
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
        self.factor = factor
        self.steps = 0

    def backward(
        self, stage: Stage, gradients: Mapping[Edge, torch.Tensor | None], *, micro: int
    ) -> list[torch.Tensor | None]:
        back = super().backward(stage, gradients, micro=micro)
        return [
            gradient if gradient is None or edge.local else self.factor * gradient
            for edge, gradient in zip(stage.inputs, back, strict=True)
        ]

    def step(self) -> None:
        super().step()
        self.steps += 1


# --- the judge's half


@dataclass(frozen=True)
class Predicted:
    """What a trained network says of test samples: ``said`` and ``labels``, int64 ``[n]``, by the party ``at`` which the
    samples are (int64 ``[n]``: the stream).
    """

    said: torch.Tensor
    labels: torch.Tensor
    stream: torch.Tensor

    @property
    def accuracy(self) -> float:
        return float((self.said == self.labels).double().mean())

    def share(self, target: int, *, without: int | None = None) -> float:
        """Of the samples that have another label than ``target``, in streams other than ``without``: how many are said
        to have it.
        """
        asked = self.labels != target
        if without is not None:
            asked &= self.stream != without
        return float((self.said[asked] == target).double().mean()) if bool(asked.any()) else 0.0


def predict_with(
    graph: Graph,
    segments: Mapping[str, Mapping[str, Segment]],
    samples: Mapping[str, Mapping[str, Samples]],
    *,
    sample: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    cut: str = "",
    activation: Callable[[torch.Tensor], torch.Tensor] = lambda a: a,
) -> Predicted:
    """Send every party's test samples through ``segments`` (by party and name), in this process.

    ``sample`` alters what segments read; ``activation`` what passes the cut named ``cut``.  Of the first loss that
    compares with labels.
    """
    edge = graph.labels[0]
    said, truths, streams = [], [], []
    for stream in range(graph.streams):
        holders = graph.data_parties(stream)
        leader = samples[holders[0]]["test"]
        order = {name: _order(leader, samples[name]["test"]) for name in holders}
        stages = [
            (graph.party_at(graph.segments[one.segment].at, stream), one)
            for name in dict.fromkeys(graph.party_at(part.at, stream) for part in graph.segments.values())
            for one in make_plan(graph, name).streams[stream].stages
        ]
        made: dict[int, torch.Tensor] = {}
        answer = None
        while stages:
            party, stage = next(
                one for one in stages if all(given.index in made for given in one[1].inputs)
            )
            stages.remove((party, stage))
            inputs = [made[given.index] for given in stage.inputs]
            if stage.reads is not None:
                inputs.append(sample(samples[party]["test"].fields[stage.reads][order[party]]))
            outputs, prediction = segments[party][stage.segment].forward(
                stage, inputs, None, micro=0, update=None, share=1.0
            )
            for out, tensor in outputs.items():
                made[out.index] = activation(tensor) if f"{out.source} -> {out.target}" == cut else tensor
            if stage.segment == edge.target:
                answer = prediction
        assert answer is not None and edge.field is not None
        giver = graph.party_at(edge.source, stream)
        said.append(answer.argmax(1) if answer.dim() > 1 and answer.shape[1] > 1 else (answer.flatten() > 0).long())
        truths.append(samples[giver]["test"].fields[edge.field][order[giver]].flatten().round().long())
        streams.append(torch.full((len(said[-1]),), stream))
    return Predicted(torch.cat(said), torch.cat(truths), torch.cat(streams))


def _order(leader: Samples, other: Samples) -> torch.Tensor:
    if leader.ids is None or other.ids is None:
        return torch.arange(leader.count)
    rows = {one: row for row, one in enumerate(other.ids)}
    return torch.tensor([rows[one] for one in leader.ids])
