"""Inversion without data, and model stealing: samples and a copy of a segment that explain what was received.

Erdogan, Kupcu, Cicek 2022, "UnSplit: Data-Oblivious Model Inversion, Model Stealing, and Label Inference Attacks
Against Split Learning" (WPES), section 3.2: an honest server that knows the segment's architecture, and has no sample,
searches samples x and weights of a clone for which clone(x) is what it received, a few steps on x and a few on the
clone in turn; for images, total variation of x counts too (here, for records: how far from 0 they are).  Here: that,
three times over (below).  Not here: label
inference of the same paper (``labels``), attacks with public samples (``inversion``).

The paper draws the clone's weights at random.  Here a clone also begins with the victims' own first weights, which
follow from the seed in the graph and the segment's name: the run's first batch is then inverted with no clone to be
learnt at all, and at the end of training the clone has only to follow what training changed.  All three are reported.
On the vanilla example (two convolutions, two poolings) the known ones give a mean squared error near 0.05, where the
mean image has 0.27; drawn at random, it is a matter of luck: 0.14 with one draw, 0.43 after twice as long with another.
On records it fails: on the vertical example fifteen columns go into twelve numbers that are ever above 0, and nothing
says which of the many records that explain them is a likely one (0.10 to 0.14, where the mean record has 0.11; 0.06 if
the clone were right).

What the attacker knows of samples is their range: pixels, or columns, between the scene's ``low`` and ``high``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from splitsec.attacks.arena import Aim, Fought, Ground
from splitsec.attacks.attack import CutAttack, Judgement, Truth
from splitsec.attacks.inversion import (
    Eavesdropper,
    Overheard,
    Scale,
    apart,
    compared,
    curve_of,
    drawn_afresh,
    first_weights,
    kind_of,
    raw,
    segment_of,
    stolen_how,
)
from splitsec.attacks.strategy import Loot, Scene, Strategy

__all__ = ["Explained", "UnSplit", "UnSplitStrategy", "explain", "implausible", "stolen"]

SAMPLES: Final = 64
ROUNDS: Final = 150
INNER: Final = 8
"""Steps on samples in a round."""
CLONE: Final = 2
"""Steps on the clone in a round."""
PRIOR: Final = 0.2
"""Weight of total variation, beside the mean squared error of activations scaled to deviation 1."""


@dataclass
class Explained:
    """What ``explain`` ends with."""

    samples: torch.Tensor
    """In [-1, 1], ``[n, *shape]``."""
    watched: torch.Tensor
    """The same by and by, ``[times, n, *shape]``."""
    steps: list[int]
    """After so many steps on samples."""
    unexplained: float
    """Share of the variance of the received activations that the clone does not give for ``samples``."""


def implausible(x: torch.Tensor) -> torch.Tensor:
    """Of images ``[n, c, h, w]`` total variation per pixel; of anything else the mean square, since a network's inputs
    lie around 0 as a rule.
    """
    if x.dim() != 4 or min(x.shape[2:]) < 2:
        return x.square().mean()
    down, across = x[:, :, 1:] - x[:, :, :-1], x[..., 1:] - x[..., :-1]
    return down.abs().mean() + across.abs().mean()


def explain(
    clone: nn.Module,
    activations: torch.Tensor,
    scene: Scene,
    *,
    rounds: int = ROUNDS,
    learn: bool = True,
    prior: float = PRIOR,
    told: Callable[[int], None] = lambda round_: None,
) -> Explained:
    """Samples for which ``clone`` gives ``activations``; with ``learn``, the clone is trained (in place) as well."""
    scale = Scale(activations)
    wanted = scale(activations)
    # Between low and high by a sigmoid, from the middle on, as the paper begins.
    inside = torch.zeros(len(activations), *scene.shape, requires_grad=True)
    search = torch.optim.Adam([inside], lr=0.5)
    follow = torch.optim.Adam([p for p in clone.parameters() if p.requires_grad], lr=1e-3)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(search, rounds, eta_min=0.05)
    watched: list[torch.Tensor] = []
    at: list[int] = []
    clone.train()

    def drawn() -> torch.Tensor:
        return torch.sigmoid(inside) * 2 - 1

    for round_ in range(1, rounds + 1):
        for _ in range(INNER if learn else INNER + CLONE):
            x = drawn()
            given = raw(scene, x)
            unlikely = implausible(x if x.dim() == 4 else given)
            loss = functional.mse_loss(scale(clone(given)), wanted) + prior * unlikely
            search.zero_grad()
            torch.autograd.backward(loss)
            search.step()
        fixed = raw(scene, drawn().detach())
        for _ in range(CLONE if learn else 0):
            loss = functional.mse_loss(scale(clone(fixed)), wanted)
            follow.zero_grad()
            torch.autograd.backward(loss)
            follow.step()
        slower.step()
        if round_ % max(1, rounds // 10) == 0 or round_ == rounds:
            watched.append(drawn().detach())
            at.append(round_ * INNER)
            told(round_)
    with torch.no_grad():
        unexplained = float(functional.mse_loss(scale(clone(raw(scene, drawn()))), wanted) / wanted.var())
    return Explained(drawn().detach(), torch.stack(watched), at, unexplained)


class UnSplitStrategy(Eavesdropper):
    """Listens, then searches.

    Options: ``samples``, ``rounds``.  Loot, samples in [-1, 1]: ``recovered [n, *shape]`` and ``places``, of the last
    epoch, by a clone that began with the first weights; ``clone/...``: its weights; ``watched`` at ``steps``;
    ``afresh``: the same samples by a clone that began at random, whose weights are ``other/...``; ``beginning`` and
    ``beginning_places``: of the first batch of the run, by the first weights as they are.
    """

    def loot(self) -> Loot:
        scene, heard, beginning = self.scene, self.overheard(), self.beginning()
        loot = Loot(numbers={"batches": self.listener.batches})
        known = first_weights(scene)
        if heard is None or beginning is None or known is None:
            return loot
        count, rounds = int(scene.options.get("samples", SAMPLES)), int(scene.options.get("rounds", ROUNDS))
        loot.numbers["samples"] = count
        heard, beginning = _latest(heard, count), beginning.first(count)
        other = drawn_afresh(known, scene.seed + 1)
        clone = copy.deepcopy(known)
        early = explain(
            known, beginning.activations, scene, rounds=rounds // 2, learn=False, told=self._teller(0, rounds)
        )
        done = explain(clone, heard.activations, scene, rounds=rounds, told=self._teller(rounds // 2, rounds))
        afresh = explain(other, heard.activations, scene, rounds=rounds, told=self._teller(rounds * 3 // 2, rounds))
        loot.tensors |= {
            "recovered": done.samples,
            "places": heard.places,
            "watched": done.watched,
            "afresh": afresh.samples,
            "beginning": early.samples,
            "beginning_places": beginning.places,
        }
        loot.tensors |= {f"clone/{name}": tensor.clone() for name, tensor in clone.state_dict().items()}
        loot.tensors |= {f"other/{name}": tensor.clone() for name, tensor in other.state_dict().items()}
        loot.numbers |= {"steps": done.steps, "unexplained": done.unexplained}
        return loot

    def _teller(self, before: int, rounds: int) -> Callable[[int], None]:
        return lambda round_: self.progress(before + round_, rounds * 5 // 2, "searches samples and weights")


def _latest(heard: Overheard, count: int) -> Overheard:
    labels = None if heard.labels is None else heard.labels[-count:]
    return Overheard(heard.activations[-count:], heard.places[-count:], labels)


# --- the judge --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stolen:
    """How well a copy of the victims' segment stands in for it, on samples that were kept out of training."""

    agreement: float | None
    """Share of samples for which the rest of the network answers the same; None where other inputs are joined."""
    unexplained: float
    """Mean squared error of its activations over their variance."""


@torch.no_grad()
def stolen(copy_: nn.Module, real: nn.Module, rest: nn.Module | None, samples: torch.Tensor) -> Stolen:
    """``copy_`` beside ``real``; ``rest``: what makes scores ``[n, classes]``, or one logit, of activations."""
    copy_.eval(), real.eval()
    theirs, ours = real(samples), copy_(samples)
    agreement = None
    if rest is not None:
        rest.eval()
        scores = [rest(one) for one in (theirs, ours)]
        answers = [one.argmax(1) if one.dim() > 1 and one.shape[1] > 1 else (one > 0).flatten() for one in scores]
        agreement = float((answers[0] == answers[1]).double().mean())
    return Stolen(agreement, apart(ours, theirs) / float(theirs.double().var()))


class UnSplit(CutAttack):
    """Samples and the clients' segment from activations alone."""

    name: ClassVar[str] = "unsplit"
    batches: ClassVar[int] = 400
    knows_architecture: ClassVar[bool] = True
    strategy: ClassVar[type[Strategy]] = UnSplitStrategy

    def judge(self, ground: Ground, aim: Aim, fought: Fought, truth: Truth) -> Judgement:
        loot = fought.loots[aim.attacker]
        if "recovered" not in loot.tensors:
            return Judgement("nothing recovered", f"{aim.attacker} had received no training batch.")
        found = compared(ground, aim, truth, loot.tensors["places"], loot.tensors["recovered"])
        early = compared(ground, aim, truth, loot.tensors["beginning_places"], loot.tensors["beginning"])
        what = f"training {kind_of(aim.shape)} of {' and '.join(aim.victims)}, without ever having seen one,"
        afresh = apart(loot.tensors["afresh"], found.truth)
        figures = {
            "error of the first batch of the run, nothing to learn": early.mse,
            "error where the first weights are not known": afresh,
        }
        sentence = stolen_how(found, aim.attacker, what)
        sentence += f" It knew the first weights, which follow from the seed in the graph; without them, {afresh:.3f}."
        kept = _functionality(ground, aim, fought, truth)
        if kept is not None:
            clone, other, none = kept
            figures["variance of activations that the stolen segment does not explain"] = clone.unexplained
            figures["the same, first weights not known"] = other.unexplained
            figures["the same, first weights and nothing learnt"] = none.unexplained
            if clone.agreement is not None and other.agreement is not None and none.agreement is not None:
                figures["share of held-out samples answered alike with the stolen segment"] = clone.agreement
                figures["share answered alike, first weights not known"] = other.agreement
                figures["share answered alike, first weights and nothing learnt"] = none.agreement
                sentence += (
                    f" With its copy of the clients' segment, {clone.agreement:.0%} of samples it never received are "
                    "answered as with the real one."
                )
        pictures = (
            *found.pictures("recovered"),
            *found.beside("recovered where the first weights are not known", loot.tensors["afresh"]),
            *early.beside("originals of the first batch", early.truth),
            *early.beside("recovered of the first batch", early.recovered),
        )
        return Judgement(
            found.verdict,
            sentence,
            reconstruction_mse=found.mse,
            baseline_mse=found.baseline,
            figures=figures,
            curves=curve_of(loot, found, "recovered"),
            pictures=pictures,
        )


def _functionality(ground: Ground, aim: Aim, fought: Fought, truth: Truth) -> tuple[Stolen, Stolen, Stolen] | None:
    """Of the clone, of the one that began at random, and of the first weights; None where the run was cut short, or no
    sample is kept out of training.
    """
    source, _, target = aim.cut.partition(" -> ")
    last = [
        fought.out / party / f"{name}.safetensors"
        for party, name in ((aim.victims[-1], source), (aim.attacker, target))
    ]
    held = [ground.samples[victim].get("test") for victim in aim.victims]
    if not all(file.is_file() for file in last) or not any(one is not None and one.count for one in held):
        return None
    samples = truth.all("test")
    modules = segment_of(ground, fought, aim.victims[-1], source), segment_of(ground, fought, aim.attacker, target)
    for module, file in zip(modules, last, strict=True):
        module.load_state_dict(load_file(file))
    real, rest = modules
    joins = sum(cut.target == target for cut in fought.graph.cuts) > 1 or fought.graph.segments[target].loss is None
    found = []
    for kind in ("clone", "other", None):
        copied = segment_of(ground, fought, aim.victims[-1], source)
        if kind is not None:
            tensors = fought.loots[aim.attacker].tensors
            own = {name.partition("/")[2]: one for name, one in tensors.items() if name.startswith(f"{kind}/")}
            copied.load_state_dict(own)
        found.append(stolen(copied, real, None if joins else rest, samples))
    return found[0], found[1], found[2]
