"""What every attack is to the command that runs it: whom it aims at, what it takes along, and how well it went.

Here: the judge's half, in the process that holds the folder and so knows the truth.  The attacker's half is a
``Strategy`` in a process of its own.  One file for each attack holds both.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Final

import torch

from splitsec.attacks.arena import Aim, Fought, Ground
from splitsec.attacks.catalogue import ATTACKS
from splitsec.attacks.outcome import Case, Curve, Outcome, Picture, Pictures, Verdict
from splitsec.attacks.strategy import Strategy, bounds
from splitsec.graph import Graph
from splitsec.samples import Samples, epoch_order

__all__ = ["Attack", "CutAttack", "Judgement", "Truth", "aim_at_cut", "images", "mean_error", "verdict_of"]

SHOWN: Final = 12
"""Pictures in a row."""

RECOVERED: Final = 0.5
"""Of the mean sample's error: below it, a sample is recovered rather than guessed."""

PARTLY: Final = 0.85


@dataclass(frozen=True)
class Judgement:
    """How well an attack went, as its judge sees it; ``Outcome`` has the same fields and says what they mean."""

    verdict: Verdict
    sentence: str
    reconstruction_mse: float | None = None
    baseline_mse: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()
    pictures: tuple[Pictures, ...] = ()
    cases: tuple[Case, ...] = ()


class Truth:
    """Whose sample stood where in a run: places, int64 ``[n, 3]`` rows of (epoch, stream, position), to samples."""

    def __init__(self, ground: Ground, aim: Aim, graph: Graph) -> None:
        self.ground = ground
        self.aim = aim
        self.graph = graph

    def samples(self, places: torch.Tensor) -> torch.Tensor:
        """The victims' samples that stood at ``places``: ``[n, *shape]``, as their data functions scale them."""
        return self._at(places, self.aim.field)

    def labels(self, places: torch.Tensor) -> torch.Tensor:
        """Their true labels ``[n, ...]``, whichever party holds them."""
        assert self.aim.label_field is not None, "an attack that asks for labels aims where there are any"
        return self._at(places, self.aim.label_field)

    def all(self, split: str = "train") -> torch.Tensor:
        """Every victim's samples of ``split``, ``[n, *shape]``."""
        held = [self.ground.samples[victim].get(split) for victim in self.aim.victims]
        return torch.cat([one.fields[self.aim.field] for one in held if one is not None])

    @cached_property
    def mean_image_error(self) -> float:
        """The error of predicting the mean public sample for every one of the victims', scaled to [-1, 1]."""
        public = self.ground.public(self.aim)["x"]
        return mean_error(public.mean(0).expand_as(self.all()), self.all(), public)

    def _at(self, places: torch.Tensor, wanted: str) -> torch.Tensor:
        found: list[torch.Tensor] = []
        orders: dict[tuple[int, int], torch.Tensor] = {}
        for epoch, stream, position in places.tolist():
            if (epoch, stream) not in orders:
                orders[epoch, stream] = self._order(epoch, stream)
            found.append(orders[epoch, stream][position])
        rows = torch.stack(found) if found else torch.empty(0, dtype=torch.int64)
        values = []
        for (_, stream, _), row in zip(places.tolist(), rows.tolist(), strict=True):
            samples, own = self._holder(stream, wanted)
            values.append(samples.fields[wanted][own[row]])
        return torch.stack(values)

    def _order(self, epoch: int, stream: int) -> torch.Tensor:
        leader = self.ground.samples[self.graph.data_parties(stream)[0]]["train"]
        return epoch_order(self.graph.training.seed, epoch, stream, leader.count)

    def _holder(self, stream: int, wanted: str) -> tuple[Samples, Sequence[int]]:
        """The samples of ``stream`` that have the field ``wanted``, and their row for each of the leader's."""
        if (stream, wanted) not in self._holders:
            holders = self.graph.data_parties(stream)
            preferred = [name for name in holders if name in self.aim.victims] if wanted == self.aim.field else []
            for name in (*preferred, *holders):
                if (samples := self.ground.samples[name].get("train")) is not None and wanted in samples.fields:
                    leader = self.ground.samples[holders[0]]["train"]
                    self._holders[stream, wanted] = samples, _rows_of(leader, samples)
                    break
        return self._holders[stream, wanted]

    @cached_property
    def _holders(self) -> dict[tuple[int, str], tuple[Samples, Sequence[int]]]:
        return {}


def _rows_of(leader: Samples, holder: Samples) -> Sequence[int]:
    if leader is holder or leader.ids is None or holder.ids is None:
        return range(leader.count)
    own = {one: row for row, one in enumerate(holder.ids)}
    return [own[one] for one in leader.ids]


class Attack:
    """Base of every attack's judging half."""

    name: ClassVar[str]
    """In the catalogue, which has all that is told of it before it is loaded."""

    def run(self, ground: Ground) -> Outcome:
        """Carry the attack out on ``ground`` and judge it."""
        raise NotImplementedError

    def outcome(self, ground: Ground, judged: Judgement, *, fought: Fought | None = None, **more: Any) -> Outcome:
        """``judged`` with what is true of every attack."""
        alarm = None if fought is None else fought.alarm
        entry = ATTACKS[self.name]
        return Outcome(
            attack=self.name,
            title=entry.title,
            adversary=entry.adversary,
            source=entry.source,
            defences=ground.defences(),
            stopped_at_batch=None if alarm is None else alarm.batch,
            stopped_by=None if alarm is None else alarm.detector,
            **{**vars(judged), **more},
        )


class CutAttack(Attack):
    """An attack of one party on what crosses a cut to it, or comes back over one."""

    batches: ClassVar[int] = 500
    """Training batches that it asks for; the run has at least as many, and whole epochs."""
    knows_architecture: ClassVar[bool] = False
    has_public: ClassVar[bool] = True
    """Whether the attacker is granted samples like the victims'."""
    strategy: ClassVar[type[Strategy]]

    def strategy_of(self, party: str) -> type[Strategy]:
        """What ``party`` does, which is one of those that this attack stands in for."""
        return self.strategy

    def aim(self, ground: Ground) -> Aim | str:
        """Whom to attack; or, in a sentence, why this attack does not apply here."""
        return aim_at_cut(ground)

    def options(self, ground: Ground) -> Mapping[str, Any]:
        """The attack's settings on this ground."""
        return {}

    def judge(self, ground: Ground, aim: Aim, fought: Fought, truth: Truth) -> Judgement:
        """How well it went."""
        raise NotImplementedError

    def run(self, ground: Ground) -> Outcome:
        began = time.monotonic()
        aim = self.aim(ground)
        if isinstance(aim, str):
            return self.outcome(ground, Judgement("does not apply", aim))
        fought = self.fight(ground, aim)
        judged = self.judge(ground, aim, fought, Truth(ground, aim, fought.graph))
        heard = int(fought.loots[aim.attacker].numbers.get("batches", 0))
        return self.outcome(ground, judged, fought=fought, batches=heard, seconds=time.monotonic() - began)

    def fight(self, ground: Ground, aim: Aim) -> Fought:
        """The run that this attack is about."""
        return ground.fight(
            self.name,
            aim,
            [aim.attacker],
            batches=self.batches,
            knows_architecture=self.knows_architecture,
            has_public=self.has_public,
            options=self.options(ground),
        )


def aim_at_cut(ground: Ground) -> Aim | str:
    """The first cut by which something computed from samples alone reaches another party; that party attacks."""
    graph = ground.graph
    if graph.anonymous is not None:
        return "members of an anonymous group are not told apart, so nobody here could judge what was recovered"
    for cut in graph.cuts:
        source, target = graph.segments[cut.source], graph.segments[cut.target]
        if source.data is None or source.at == target.at:
            continue
        attacker = graph.members(target.at)[0]
        if ground.attacker not in (None, attacker):
            continue
        labels = next((edge for edge in graph.labels), None)
        victims = tuple(name for name in graph.members(source.at) if name != attacker)
        held = ground.samples[victims[0]]["train"].fields[source.data]
        return Aim(
            attacker=attacker,
            victims=victims,
            cut=f"{cut.source} -> {cut.target}",
            shape=tuple(held.shape[1:]),
            cut_shape=tuple(cut.shape),
            field=source.data,
            label_field=None if labels is None else labels.field,
        )
    return (
        "nothing that was computed from samples reaches another party directly"
        if ground.attacker is None
        else f"{ground.attacker} receives nothing that was computed from samples directly"
    )


def mean_error(recovered: torch.Tensor, truth: torch.Tensor, public: torch.Tensor) -> float:
    """Mean squared error with both scaled to [-1, 1] by ``public``."""
    low, high = bounds(public)
    return float((((recovered - truth) / (high - low) * 2).double() ** 2).mean())


def verdict_of(mse: float, baseline: float) -> Verdict:
    """What an error is worth beside that of the mean sample."""
    if mse <= RECOVERED * baseline:
        return "recovered"
    return "partly recovered" if mse <= PARTLY * baseline else "nothing recovered"


def images(name: str, x: torch.Tensor, most: int = SHOWN) -> tuple[Pictures, ...]:
    """Samples ``x [n, channels, height, width]`` in [-1, 1] as a row of pictures; nothing where they are no images."""
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        return ()
    bytes_ = ((x[:most].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    _, height, width, channels = bytes_.shape
    return (Pictures(name, tuple(Picture(width, height, channels, one.numpy().tobytes()) for one in bytes_)),)
