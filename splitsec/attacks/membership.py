"""Membership inference: a server that is shown a sample says whether it was trained on.

The question.  *Candidates* are raw samples with their labels: as many of the victims' training samples as of those
that they kept out of training, drawn at random; both come from one source, and the attacker is told nothing but sample
and label.  It is not asked of activations as received: those of training samples come in training turns and those of
test samples in evaluation turns, so that whoever receives one knows which it is, and no attack is needed.  What the
attacker uses is what it received in training turns alone; every candidate goes through the same modules in the same
mode (evaluation), so neither dropout nor order nor turn tells them apart.  Its scores are fixed before candidates are
shown: the loot holds the attacker's modules, the judge only feeds them.

Two attacks, reported beside each other.

*Match*: a shadow of the clients' segment (``inversion.imitate``, beginning with their first weights) makes a
candidate's activation; if some activation that was received in training lies much nearer to it than any other, the
candidate was among them (the ratio of the nearest distance to the second).  This needs no overfitting: a server that
can compute the segment recognises who was in the training set.

*Shadow models*: Shokri, Stronati, Song, Shmatikov 2017, "Membership Inference Attacks Against Machine Learning Models"
(S&P), section V: shadows of the whole network are trained on halves of the public samples, and a small classifier
learns from their answers to their own members and others how answers to members look; then it is put to the victims'
network: shadow of the segment, and the server's own trained segment.  This needs overfitting, and says little where
there is none.

Area under the ROC curve: 0.5 is guessing.  Advantage: rate of members found less rate of others taken for members, at a
threshold chosen on one half of the candidates and measured on the other, so that chance is not taken for skill.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

import torch
from torch import nn
from torch.nn import functional

from splitsec.attacks.arena import Aim, Fought, Ground
from splitsec.attacks.attack import CutAttack, Judgement, Truth, aim_at_cut
from splitsec.attacks.inversion import (
    Eavesdropper,
    Scale,
    drawn_afresh,
    first_weights,
    imitate,
    kind_of,
    segment_of,
    steps_of,
)
from splitsec.attacks.labels import auc
from splitsec.attacks.outcome import Curve, Verdict
from splitsec.attacks.strategy import Loot, Scene, Strategy

__all__ = ["Membership", "MembershipStrategy", "advantage", "features", "matched", "receiver_curve", "shadow_models"]

CANDIDATES: Final = 1000
"""At most, half of them members."""
SHADOWS: Final = 4
"""Shadow models, each trained on another half of the public samples."""
EPOCHS: Final = 8
"""Of the shadow models; the victims' own are not more than the run's."""
BATCH: Final = 50
FOUND: Final = 0.9
"""Area under the curve from which on members count as recovered."""
PARTLY: Final = 0.6
"""And as partly recovered."""


# --- scores -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def matched(made: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    """How much nearer to each of ``made [n, ...]`` its nearest of ``received [m, ...]`` is than the second, ``[n]`` in
    0..1: 1 less the ratio of distances, after scaling every channel.
    """
    scale = Scale(received)
    ours, theirs = scale(made).flatten(1), scale(received).flatten(1)
    near = torch.cat([torch.cdist(part, theirs).topk(2, largest=False).values for part in torch.split(ours, 256)])
    return 1 - near[:, 0] / near[:, 1].clamp_min(1e-12)


@torch.no_grad()
def features(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What a network's answer ``[n, classes]`` (or one logit ``[n, 1]``) says of its certainty, ``[n, 4]``: loss of the
    label, margin, entropy, and whether it is right.
    """
    if scores.dim() == 1 or scores.shape[1] == 1:
        logit = scores.flatten()
        scores = torch.stack([torch.zeros_like(logit), logit], 1)
    wanted = labels.flatten().round().long()
    logs = functional.log_softmax(scores, 1)
    own = logs.gather(1, wanted[:, None])[:, 0]
    others = logs.scatter(1, wanted[:, None], -torch.inf).amax(1)
    entropy = -(logs.exp() * logs).sum(1)
    return torch.stack([own, (own - others).clamp(-30, 30), entropy, (own > others).to(logs.dtype)], 1)


def shadow_models(
    scene: Scene,
    segment: nn.Module,
    rest: nn.Module,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    public: Mapping[str, torch.Tensor],
    *,
    shadows: int = SHADOWS,
    epochs: int = EPOCHS,
    told: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Weights ``[5]`` of a logistic regression on ``features`` (and 1) that tells members of shadow models from others.

    Each shadow model is ``segment`` and ``rest`` with weights drawn afresh, trained on one half of ``public``.
    """
    samples, labels = public["x"].float(), public["y"]
    seen, member = [], []
    chance = torch.Generator().manual_seed(scene.seed + 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(scene.seed + 5)
        for number in range(shadows):
            parts = drawn_afresh(segment, scene.seed + 2 * number), drawn_afresh(rest, scene.seed + 2 * number + 1)
            model = nn.Sequential(*parts)
            model.train().requires_grad_(True)
            training = torch.optim.Adam(model.parameters(), lr=1e-3)
            order = torch.randperm(len(samples), generator=chance)
            inside = order[: len(order) // 2]
            for _ in range(epochs):
                for rows in torch.split(inside[torch.randperm(len(inside), generator=chance)], BATCH):
                    error = loss(model(samples[rows]), labels[rows])
                    training.zero_grad()
                    torch.autograd.backward(error)
                    training.step()
            model.eval()
            with torch.no_grad():
                answers = torch.cat([model(part) for part in torch.split(samples, 256)])
            seen.append(features(answers, labels))
            member.append(torch.isin(torch.arange(len(samples)), inside))
            told(number + 1)
    return _regression(torch.cat(seen), torch.cat(member).float())


def _regression(seen: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """Logistic regression of ``member`` on scaled features, in terms of the features as they are."""
    middle, spread = seen.mean(0), seen.std(0) + 1e-6
    x = torch.cat([(seen - middle) / spread, torch.ones(len(seen), 1)], 1)
    weights = torch.zeros(x.shape[1], requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=50)

    def loss() -> torch.Tensor:
        search.zero_grad()
        error = functional.binary_cross_entropy_with_logits(x @ weights, member) + 1e-3 * weights.square().sum()
        torch.autograd.backward(error)
        return error

    search.step(loss)  # type: ignore[no-untyped-call]
    found = weights.detach()
    return torch.cat([found[:-1] / spread, (found[-1] - (found[:-1] * middle / spread).sum())[None]])


def advantage(scores: torch.Tensor, member: torch.Tensor) -> float:
    """Members found less others taken for members, at a threshold chosen on every second candidate, on the rest."""
    chosen, best = torch.inf, -1.0
    for threshold in sorted(set(scores[::2].tolist())):
        gained = _rates(scores[::2], member[::2], threshold)
        if gained > best:
            best, chosen = gained, threshold
    return _rates(scores[1::2], member[1::2], chosen)


def _rates(scores: torch.Tensor, member: torch.Tensor, threshold: float) -> float:
    taken = (scores >= threshold).double()
    return float(taken[member].mean() - taken[~member].mean())


def receiver_curve(scores: torch.Tensor, member: torch.Tensor, points: int = 50) -> tuple[tuple[float, float], ...]:
    """(others taken for members, members found), both rates, from strict to lenient."""
    thresholds = torch.quantile(scores.double(), torch.linspace(1, 0, points, dtype=torch.float64))
    taken = scores.double()[None] >= thresholds[:, None]
    others, found = taken[:, ~member].double().mean(1), taken[:, member].double().mean(1)
    return ((0.0, 0.0), *zip(others.tolist(), found.tolist(), strict=True))


# --- the attacker -----------------------------------------------------------------------------------------------------


class MembershipStrategy(Eavesdropper):
    """Listens, then makes what scores candidates.

    Options: ``steps``; ``spared``: every second public sample is not used, since candidates are drawn from those.
    Loot: ``received [n, *cut shape]`` in training turns; ``segment/...``: weights of the shadow of the clients'
    segment; ``rest/...``: of the server's own; ``answers [5]``: the classifier of shadow models, where there are any
    labels.
    """

    def loot(self) -> Loot:
        scene, heard = self.scene, self.overheard()
        loot = Loot(numbers={"batches": self.listener.batches})
        known = first_weights(scene)
        if heard is None or known is None or "x" not in scene.public:
            return loot
        step = 2 if scene.options.get("spared") else 1
        public = {name: tensor[::step] for name, tensor in scene.public.items()}
        steps = steps_of(scene)
        segment = copy.deepcopy(known)
        done = imitate(
            segment,
            heard,
            scene,
            classify=self.classifier(),
            steps=steps,
            public=public,
            told=lambda now: self.progress(now, 2 * steps, "trains a shadow of the clients' segment"),
        )
        loot.tensors["received"] = heard.activations
        loot.numbers["unexplained"] = done.unexplained
        own = self.listener.module.state_dict()
        loot.tensors |= {f"segment/{name}": one.clone() for name, one in segment.state_dict().items()}
        loot.tensors |= {f"rest/{name}": one.clone() for name, one in own.items()}
        loss = self.listener.loss
        if self.classifier() is not None and loss is not None and _classes(public["y"]):
            epochs = min(EPOCHS, scene.graph.training.epochs)
            loot.tensors["answers"] = shadow_models(
                scene,
                known,
                self.listener.module,
                loss,
                public,
                epochs=epochs,
                told=lambda now: self.progress(steps + steps * now // SHADOWS, 2 * steps, "trains shadow models"),
            )
        return loot


def _classes(labels: torch.Tensor) -> bool:
    whole = torch.equal(labels.double(), labels.double().round())
    return labels[0].nelement() == 1 and whole and float(labels.min()) >= 0


# --- the judge --------------------------------------------------------------------------------------------------------


class Membership(CutAttack):
    """Which samples were trained on."""

    name: ClassVar[str] = "membership"
    batches: ClassVar[int] = 400
    knows_architecture: ClassVar[bool] = True
    strategy: ClassVar[type[Strategy]] = MembershipStrategy

    def aim(self, ground: Ground) -> Aim | str:
        aim = aim_at_cut(ground)
        if not isinstance(aim, str) and not any("test" in ground.samples[victim] for victim in aim.victims):
            return "the victims keep no samples out of training, so there is nothing to tell members from"
        return aim

    def options(self, ground: Ground) -> Mapping[str, Any]:
        aim = self.aim(ground)
        return {"spared": not isinstance(aim, str) and _shared(ground, aim)}

    def judge(self, ground: Ground, aim: Aim, fought: Fought, truth: Truth) -> Judgement:
        loot = fought.loots[aim.attacker]
        if "received" not in loot.tensors:
            return Judgement("nothing recovered", f"{aim.attacker} had received no training batch.")
        samples, labels, member = candidates(ground, aim)
        source, _, target = aim.cut.partition(" -> ")
        segment = _loaded(segment_of(ground, fought, aim.victims[0], source), loot, "segment")
        with torch.no_grad():
            made = torch.cat([segment(part) for part in torch.split(samples, 256)])
        scores = {"match": matched(made, loot.tensors["received"])}
        if "answers" in loot.tensors and labels is not None:
            rest = _loaded(segment_of(ground, fought, aim.attacker, target), loot, "rest")
            with torch.no_grad():
                answers = torch.cat([rest(part) for part in torch.split(made, 256)])
            weights = loot.tensors["answers"]
            scores["shadow models"] = features(answers, labels) @ weights[:-1] + weights[-1]
        figures: dict[str, float] = {"candidates": float(len(member))}
        for name, found in scores.items():
            figures[f"area under the curve, {name}"] = auc(found, member)
            figures[f"advantage, {name}"] = advantage(found, member)
        areas = {name: figures[f"area under the curve, {name}"] for name in scores}
        return Judgement(
            _verdict(max(areas.values())),
            _sentence(aim, areas, figures),
            figures=figures,
            curves=tuple(
                Curve(name, receiver_curve(found, member), x="others taken for members", y="members found")
                for name, found in scores.items()
            ),
        )


def _verdict(area: float) -> Verdict:
    if area >= FOUND:
        return "recovered"
    return "partly recovered" if area >= PARTLY else "nothing recovered"


def _sentence(aim: Aim, areas: Mapping[str, float], figures: Mapping[str, float]) -> str:
    best = max(areas, key=lambda name: areas[name])
    what = f"the training {kind_of(aim.shape)} of {' and '.join(aim.victims)}"
    words = {
        "match": "by looking for it among the activations that it received",
        "shadow models": "by how sure the network is of it",
    }
    if _verdict(areas[best]) == "nothing recovered":
        sentence = f"Shown a sample, {aim.attacker} could hardly do better than guess whether it is one of {what}"
    else:
        sentence = f"Shown a sample, {aim.attacker} can tell {words[best]} whether it is one of {what}"
    sentence += f" (area under the curve {areas[best]:.2f}, where guessing gives 0.50)."
    for name in areas:
        if name != best:
            hardly = " (hardly more than guessing)" if areas[name] < PARTLY else ""
            sentence += f" {words[name].capitalize()}: {areas[name]:.2f}{hardly}."
    return sentence


def _loaded(module: nn.Module, loot: Loot, kind: str) -> nn.Module:
    module.load_state_dict({k.partition("/")[2]: v for k, v in loot.tensors.items() if k.startswith(f"{kind}/")})
    return module.eval()


def candidates(ground: Ground, aim: Aim) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Samples, labels (where the victims hold them) and whether each was trained on, in a random order."""
    chance = torch.Generator().manual_seed(ground.graph.training.seed)
    held = {split: _held(ground, aim, split) for split in ("train", "test")}
    if _shared(ground, aim):
        held["test"] = {name: tensor[1::2] for name, tensor in held["test"].items()}
    count = min(CANDIDATES // 2, *(len(one["x"]) for one in held.values()))
    chosen = {split: torch.randperm(len(one["x"]), generator=chance)[:count] for split, one in held.items()}
    order = torch.randperm(2 * count, generator=chance)
    samples = torch.cat([held[split]["x"][rows] for split, rows in chosen.items()])[order]
    labels = None
    if all("y" in one for one in held.values()):
        labels = torch.cat([held[split]["y"][rows] for split, rows in chosen.items()])[order]
    return samples.float(), labels, (torch.arange(2 * count) < count)[order]


def _held(ground: Ground, aim: Aim, split: str) -> dict[str, torch.Tensor]:
    parts = [ground.samples[victim][split].fields for victim in aim.victims if split in ground.samples[victim]]
    found = {"x": torch.cat([part[aim.field] for part in parts])}
    if aim.label_field is not None and all(aim.label_field in part for part in parts):
        found["y"] = torch.cat([part[aim.label_field] for part in parts])
    return found


def _shared(ground: Ground, aim: Aim) -> bool:
    """Whether the attacker's public samples are those that were kept out of training, in that order."""
    public, kept = ground.public(aim)["x"], _held(ground, aim, "test")["x"]
    return public.shape == kept.shape and torch.equal(public, kept)
