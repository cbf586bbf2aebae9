"""Label inference: what the gradients that a party gets back say about labels that nobody showed it.

Here: norm, direction and gradient matching, by a party that does its work honestly and remembers.  Not here: parties
that are given the labels (a server in the vanilla form has nothing to infer), planting anything (``backdoor``).

Sources.  *Norm* and *direction*: Li, Sun, Yang, Gao, Zhang, Smith, Li: Label Leakage and Protection in Two-party Split
Learning, ICLR 2022, section 3.  With a sigmoid or softmax at the end, the gradient of sample i is (p_i - y_i) times
something: its norm is large where the network is surprised, and its sign is the label.  The paper takes the direction
of one positive sample, which somebody must have told the attacker; here the direction is the dominant one (first
singular vector of all gradients, each scaled to norm 1, section 3's picture without its reference sample), which takes
nothing.  What is left open then is which side is which.  For two labels of unequal frequency the smaller side is the
rarer label: that one bit is all the attacker is told.  For more labels, directions are clustered (spherical k-means),
and the clusters stay without names: somebody who knows one sample of each label names them.
*Matching*: Kariyappa, Qureshi: ExPLoit: Extracting Private Labels in Split Learning, SaTML 2023; Erdogan, Kupcu,
Cicek: UnSplit, WPES 2022, section 3.3.  Labels and a stand-in for the rest of the network are searched that would have
given the gradients that came.  The stand-in is one linear layer: nobody told the attacker the architecture, and on the
examples two layers did worse.

Samples are told apart by the order of each epoch, which follows from the seed in the graph, so that several epochs'
gradients of one sample are put together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final

import torch
from torch.nn import functional

from splitsec.attacks.arena import Aim, Fought, Ground
from splitsec.attacks.attack import CutAttack, Judgement, Truth
from splitsec.attacks.outcome import Curve, Verdict
from splitsec.attacks.strategy import Heard, Listener, Loot, Scene, Strategy
from splitsec.graph import Graph, Labels
from splitsec.messages import DTYPES
from splitsec.plan import Edge, Stage
from splitsec.samples import epoch_order
from splitsec.segments import Segment

__all__ = [
    "LabelInference",
    "LabelStrategy",
    "Overhearing",
    "agreement",
    "auc",
    "classifies",
    "clusters",
    "dominant_direction",
    "match_gradients",
    "naming",
]

BYTES_KEPT: Final = 256 * 2**20
"""Of activations and gradients, before the oldest epoch is let go."""
WIDE: Final = 256
"""Numbers at a cut beyond which matching works on averages of neighbours, and clustering on principal components."""
COMPONENTS: Final = 64
NEARLY_EVEN: Final = 0.45
"""Share of the rarer of two labels from which on the attacker is not told which one it is: counting would not tell."""


class Overhearing(Listener):
    """An honest segment that remembers the gradients which come back over ``cut``, one of its own outputs.

    ``steps``: training steps that stand.
    """

    steps = 0

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
        outputs, prediction = Segment.forward(self, stage, inputs, labels, micro=micro, update=update, share=share)
        for edge, output in outputs.items():
            if update is not None and f"{edge.source} -> {edge.target}" == self._cut:
                self._hear(stage, output, None)
                self._let_go()
        return outputs, prediction

    def backward(
        self, stage: Stage, gradients: Mapping[Edge, torch.Tensor | None], *, micro: int, place: int = 0
    ) -> list[torch.Tensor | None]:
        for edge, gradient in gradients.items():
            if f"{edge.source} -> {edge.target}" == self._cut:
                self._answered(gradient)
        return Segment.backward(self, stage, gradients, micro=micro, place=place)

    def step(self) -> None:
        super().step()
        self.steps += 1

    def _let_go(self) -> None:
        size = sum(2 * one.activation.nelement() * one.activation.element_size() for one in self.heard)
        oldest = self.heard[0].place[0]
        if size > BYTES_KEPT and self.heard[-1].place[0] > oldest:
            self.heard = [one for one in self.heard if one.place[0] > oldest]


class LabelStrategy(Strategy):
    """Works honestly, and infers labels afterwards.

    Options: ``classes`` (how many labels there are), ``rarer`` (which of two is the rarer one; None: not told).
    Loot: ``places [n, 3]``, ``norm [n]``; for two labels ``direction [n]`` and ``matching [n]``, the larger the more
    the attacker believes in label 1; for more, ``direction [n]`` and ``matching [n]``, int64, clusters without names;
    ``by_epoch [epochs, n]``: direction from one epoch's gradients alone.
    """

    listener: Overhearing

    def take_over(self, honest: Mapping[str, Segment]) -> dict[str, Segment]:
        source = self.scene.cut.partition(" -> ")[0]
        self.listener = Overhearing(honest[source], self.scene.cut, self, keep=10**9)
        return {**honest, source: self.listener}

    def loot(self) -> Loot:
        heard = [one for one in self.listener.heard if one.gradient is not None]
        numbers: dict[str, Any] = {"batches": self.listener.steps, "classes": self._classes}
        if not heard:
            return Loot(numbers=numbers)
        places, activations, gradients = _by_sample(heard, self.scene)
        self.scene.report({"event": "progress", "done": 1, "of": 3})
        tensors = {"places": places, "norm": gradients[0].norm(dim=1)}
        epochs = [self._direction([one]) for one in gradients]
        tensors["by_epoch"] = torch.stack(epochs)
        tensors["direction"] = self._direction(gradients)
        self.scene.report({"event": "progress", "done": 2, "of": 3})
        shape = self.scene.cut_shape
        believed, misfit = match_gradients(
            _narrow(activations[0], shape), _narrow(gradients[0], shape), self._classes, seed=self.scene.seed
        )
        two = self._classes == 2
        tensors["matching"] = self._named(believed[:, 1] - 0.5) if two else believed.argmax(1)
        numbers["misfit"] = misfit
        self.scene.report({"event": "progress", "done": 3, "of": 3})
        return Loot(tensors=tensors, numbers=numbers)

    @property
    def _classes(self) -> int:
        return int(self.scene.options.get("classes", 2))

    def _direction(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        units = torch.cat([functional.normalize(one, dim=1) for one in gradients], 1)
        if units.shape[1] > WIDE:
            units = _principal(units, self.scene.seed)
        if self._classes == 2:
            return self._named(units @ dominant_direction(units))
        return clusters(units, self._classes, seed=self.scene.seed)

    def _named(self, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` with the rarer label's side up, where the attacker is told which label that is."""
        rarer = self.scene.options.get("rarer")
        if rarer is None:
            return scores
        fewer_are_up = int((scores > 0).sum()) * 2 < len(scores)
        return scores if fewer_are_up == (rarer == 1) else -scores


def _by_sample(heard: Sequence[Heard], scene: Scene) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Places ``[n, 3]`` and, for each epoch, activations and gradients ``[n, numbers]``, of the same n samples.

    Epochs that were heard in full are put together; where there is none, what was heard of one.
    """
    parts: dict[tuple[int, int], list[Heard]] = defaultdict(list)
    for one in heard:
        parts[one.place[0], one.place[1]].append(one)
    first = min(epoch for epoch, _ in parts)
    streams = sorted({stream for epoch, stream in parts if epoch == first})
    rows = {stream: sum(len(one.activation) for one in parts[first, stream]) for stream in streams}
    whole = [first]
    if not scene.graph.training.drop_last and scene.graph.anonymous is None:
        whole += [
            epoch
            for epoch in sorted({epoch for epoch, _ in parts} - {first})
            if all(sum(len(one.activation) for one in parts[epoch, stream]) == rows[stream] for stream in streams)
        ]
    activations, gradients = [], []
    for epoch in whole:
        taken: list[list[torch.Tensor]] = [[], []]
        for stream in streams:
            back = torch.arange(rows[stream])
            if len(whole) > 1:  # to the order of the first epoch
                order = epoch_order(scene.graph.training.seed, epoch, stream, rows[stream])
                back = order.argsort()[epoch_order(scene.graph.training.seed, first, stream, rows[stream])]
            taken[0].append(torch.cat([one.activation for one in parts[epoch, stream]]).flatten(1).float()[back])
            taken[1].append(torch.cat([_gradient(one) for one in parts[epoch, stream]]).flatten(1).float()[back])
        activations.append(torch.cat(taken[0]))
        gradients.append(torch.cat(taken[1]))
    places = [(first, stream, place) for stream in streams for place in range(rows[stream])]
    return torch.tensor(places), activations, gradients


def _gradient(one: Heard) -> torch.Tensor:
    assert one.gradient is not None
    return one.gradient


def _narrow(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``x [n, numbers]`` with squares of neighbours averaged until a row is no wider than ``WIDE``."""
    if len(shape) != 3:
        return x
    x = x.reshape(len(x), *shape)
    while x[0].nelement() > WIDE and min(x.shape[2:]) > 1:
        x = functional.avg_pool2d(x, 2)
    return x.flatten(1)


def _principal(x: torch.Tensor, seed: int) -> torch.Tensor:
    """``x [n, numbers]`` on its first principal components, not centred: angles between rows nearly stay."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, values, _ = torch.svd_lowrank(x, q=min(COMPONENTS, *x.shape))
    return left * values


def dominant_direction(units: torch.Tensor) -> torch.Tensor:
    """The direction ``[numbers]`` along which the rows of ``units [n, numbers]``, or their opposites, mostly point."""
    direction: torch.Tensor = torch.linalg.svd(units, full_matrices=False)[2][0]
    return direction


def clusters(units: torch.Tensor, number: int, *, seed: int, runs: int = 8, rounds: int = 50) -> torch.Tensor:
    """Rows of ``units [n, numbers]`` in ``number`` clusters by direction, int64 ``[n]``: spherical k-means with
    k-means++ seeding, the best of ``runs``.
    """
    units = functional.normalize(units, dim=1)
    generator = torch.Generator().manual_seed(seed)
    best, chosen = -1.0, torch.zeros(len(units), dtype=torch.int64)
    for _ in range(runs):
        centres = units[torch.randint(len(units), (1,), generator=generator)]
        for _ in range(min(number, len(units)) - 1):
            far = (1 - (units @ centres.T).amax(1)).clamp_min(1e-9)
            centres = torch.cat([centres, units[torch.multinomial(far, 1, generator=generator)]])
        for _ in range(rounds):
            nearest = (units @ centres.T).argmax(1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, units)
            held = torch.bincount(nearest, minlength=len(centres)) > 0
            moved = torch.where(held[:, None], functional.normalize(sums, dim=1), centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        closeness, nearest = (units @ centres.T).max(1)
        if float(closeness.mean()) > best:
            best, chosen = float(closeness.mean()), nearest
    return chosen


def match_gradients(
    activations: torch.Tensor,
    gradients: torch.Tensor,
    classes: int,
    *,
    seed: int,
    steps: int = 150,
    runs: int = 4,
    rate: float = 0.02,
) -> tuple[torch.Tensor, float]:
    """Labels that explain ``gradients [n, numbers]`` of ``activations [n, numbers]``, as beliefs ``[n, classes]``.

    A linear top z = W a + b and beliefs p are searched for which W^T (softmax(z) - p), the gradient of its
    cross-entropy, is what came back, up to one factor; entropy of beliefs and their distance from an even mix count a
    little, as in ExPLoit.  Also returns the misfit of the better of ``runs``: mean squared error over mean square.
    """
    x = activations / activations.square().mean().sqrt().clamp_min(1e-12)
    wanted = gradients / gradients.norm(dim=1).mean().clamp_min(1e-30)
    power = wanted.square().sum(1).mean().clamp_min(1e-30)
    best = float("inf")
    believed = torch.full((len(x), classes), 1 / classes)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(runs):
        weight = torch.randn(classes, x.shape[1], generator=generator) / x.shape[1] ** 0.5
        bias, size = torch.zeros(classes), torch.zeros(())
        belief = 0.1 * torch.randn(len(x), classes, generator=generator)
        searched = [one.requires_grad_() for one in (weight, bias, belief, size)]
        optimizer = torch.optim.Adam(
            [
                {"params": searched[:2], "lr": 0.3 * rate},
                {"params": searched[2:3], "lr": 5 * rate},
                {"params": searched[3:], "lr": rate},
            ]
        )
        misfit = torch.tensor(best)
        for step in range(steps):
            p = belief.softmax(1)
            answer = ((x @ weight.T + bias).softmax(1) - p) @ weight * size.exp()
            misfit = (answer - wanted).square().sum(1).mean() / power
            entropy = -(p * p.clamp_min(1e-9).log()).sum(1).mean()
            unevenness = -p.mean(0).clamp_min(1e-9).log().mean()
            optimizer.zero_grad()
            (misfit + 0.05 * step / steps * entropy + 0.1 * unevenness).backward()
            optimizer.step()
        if float(misfit.detach()) < best:
            best, believed = float(misfit.detach()), belief.detach().softmax(1)
    return believed, best


# --- the judge --------------------------------------------------------------------------------------------------------


def auc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Area under the ROC curve of ``scores [n]`` for ``positive`` (bool ``[n]``), ties counted half; 0.5 where one of
    the two sides is empty.
    """
    ones = int(positive.sum())
    if ones in (0, len(positive)):
        return 0.5
    _, ties, sizes = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    ranks = (sizes.cumsum(0).double() - (sizes.double() - 1) / 2)[ties]
    area = (ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * (len(positive) - ones))
    return float(area)


def naming(found: torch.Tensor, labels: torch.Tensor) -> dict[int, int]:
    """The one-to-one naming of clusters that agrees with most ``labels``; both int64 ``[n]``."""
    names, clustered = sorted(set(labels.tolist())), sorted(set(found.tolist()))
    counts = {(c, k): int(((found == c) & (labels == k)).sum()) for c in clustered for k in names}
    if len(names) > 12:  # greedy: 2 to the power of the names is too much to go through
        taken: dict[int, int] = {}
        for (c, k), _ in sorted(counts.items(), key=lambda item: -item[1]):
            if c not in taken and k not in taken.values():
                taken[c] = k
        return taken
    best: dict[int, tuple[int, dict[int, int]]] = {0: (0, {})}  # by the names used, as bits
    for c in clustered:
        more = dict(best)
        for used, (right, chosen) in best.items():
            for bit, k in enumerate(names):
                key = used | 1 << bit
                if not used >> bit & 1 and right + counts[c, k] > more.get(key, (-1, {}))[0]:
                    more[key] = right + counts[c, k], {**chosen, c: k}
        best = more
    return max(best.values(), key=lambda one: one[0])[1]


def agreement(found: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of ``labels`` that clusters get right under their best naming."""
    names = naming(found, labels)
    right = sum(int(names.get(c) == k) for c, k in zip(found.tolist(), labels.tolist(), strict=True))
    return right / len(labels)


class LabelInference(CutAttack):
    """Labels from gradients, by a party that nobody gave any labels."""

    name: ClassVar[str] = "label-inference"
    batches: ClassVar[int] = 100
    has_public: ClassVar[bool] = False
    strategy: ClassVar[type[Strategy]] = LabelStrategy

    def aim(self, ground: Ground) -> Aim | str:
        graph = ground.graph
        if graph.anonymous is not None:
            return "members of an anonymous group are not told apart, so nobody here could judge what was inferred"
        seen = {name for edge in graph.labels for name in _see(graph, edge)}
        for attacker, cut, labels in _gradients_to(graph):
            if attacker in seen or ground.attacker not in (None, attacker):
                continue
            victims = graph.members(labels.source)
            field = next(
                (one.data for one in graph.segments.values() if one.data and graph.members(one.at) == victims),
                labels.field,
            )
            held = ground.samples[victims[0]]["train"].fields
            return Aim(
                attacker=attacker,
                victims=victims,
                cut=f"{cut.source} -> {cut.target}",
                shape=tuple(held[field].shape[1:]),
                cut_shape=tuple(cut.shape),
                field=field,
                label_field=labels.field,
            )
        if not any(classifies(graph, labels) for labels in graph.labels):
            return "no loss here compares with one of several labels, so there is no label to infer"
        if ground.attacker is not None:
            return f"{ground.attacker} receives no gradients, or the graph gives it the labels: nothing to infer"
        return "every party that receives gradients holds the labels or is given them by the graph: nothing to infer"

    def options(self, ground: Ground) -> Mapping[str, Any]:
        aim = self.aim(ground)
        assert not isinstance(aim, str) and aim.label_field is not None
        labels = torch.cat([ground.samples[name]["train"].fields[aim.label_field] for name in aim.victims])
        classes = max(2, int(labels.max()) + 1)
        share = float((labels > 0.5).double().mean())
        told = None if classes > 2 or NEARLY_EVEN < share < 1 - NEARLY_EVEN else int(share < 0.5)
        return {"classes": classes, "rarer": told}

    def judge(self, ground: Ground, aim: Aim, fought: Fought, truth: Truth) -> Judgement:
        loot = fought.loots[aim.attacker]
        if "places" not in loot.tensors:
            return Judgement("stopped", f"The run ended before {aim.attacker} had received a gradient.")
        labels = truth.labels(loot.tensors["places"]).flatten().round().long()
        if loot.numbers["classes"] == 2:
            judged = _judge_two(ground, aim, loot, labels, told=self.options(ground)["rarer"] is not None)
        else:
            judged = _judge_several(ground, aim, loot, labels)
        if fought.alarm is not None and judged.verdict == "nothing recovered":
            judged = replace(judged, verdict="stopped")
        return judged


def _judge_two(ground: Ground, aim: Aim, loot: Loot, labels: torch.Tensor, *, told: bool) -> Judgement:
    """Areas are never below 0.5: one known sample turns a score that points the wrong way round."""
    positive = labels == 1

    def area(scores: torch.Tensor) -> float:
        return max(auc(scores, positive), auc(scores, ~positive))

    def right(scores: torch.Tensor) -> float:
        share = float(((scores > 0) == positive).double().mean())
        return share if told else max(share, 1 - share)

    norm = loot.tensors["norm"]
    named = told and auc(loot.tensors["direction"], positive) > 0.5
    commoner = max(float(positive.double().mean()), float((~positive).double().mean()))
    figures = {
        "auc_norm": area(norm),
        "auc_direction": area(loot.tensors["direction"]),
        "auc_matching": area(loot.tensors["matching"]),
        "accuracy_direction": right(loot.tensors["direction"]),
        "accuracy_matching": right(loot.tensors["matching"]),
        **dict.fromkeys(("accuracy_direction, guessing", "accuracy_matching, guessing"), commoner),
    }
    best = max(figures["auc_direction"], figures["auc_matching"], figures["auc_norm"])
    verdict: Verdict = "recovered" if best >= 0.95 else "partly recovered" if best >= 0.65 else "nothing recovered"
    accuracy = max(figures["accuracy_direction"], figures["accuracy_matching"])
    who = aim.attacker
    sentence = {
        "recovered": f"From the gradients alone, {who} can tell nearly every training sample's label, though it was "
        f"never shown one: {accuracy:.0%} right"
        + (
            ", knowing only which label is the rarer one."
            if named
            else ", up to which of the two is which: one known sample tells."
        ),
        "partly recovered": f"From the gradients alone, {who} learns something about the labels, not all: of two "
        f"samples with different labels it tells which is which in {best:.0%} of the cases (50% is guessing).",
    }.get(verdict, f"From the gradients, {who} could not tell labels any better than by guessing.")
    curve = _curve(ground, loot, "area under the curve", area)
    return Judgement(verdict, sentence, figures=figures, curves=(curve,))


def _judge_several(ground: Ground, aim: Aim, loot: Loot, labels: torch.Tensor) -> Judgement:
    generator = torch.Generator().manual_seed(ground.graph.training.seed)
    chance = agreement(torch.randint(loot.numbers["classes"], (len(labels),), generator=generator), labels)
    figures = {}
    for way in ("direction", "matching"):
        figures[f"accuracy_{way}"] = agreement(loot.tensors[way], labels)
        figures[f"accuracy_{way}, guessing"] = chance
    best = max(figures["accuracy_direction"], figures["accuracy_matching"])
    gained = (best - chance) / (1 - chance)
    verdict: Verdict = "recovered" if gained >= 0.8 else "partly recovered" if gained >= 0.2 else "nothing recovered"
    sentence = (
        f"From the gradients alone, {aim.attacker} sorts the training samples into groups of one label each; "
        f"{best:.0%} are in the right group (guessing: {chance:.0%}). One known sample of a group names all of it."
        if verdict != "nothing recovered"
        else f"From the gradients, {aim.attacker} could not sort samples by label any better than by guessing."
    )
    curve = _curve(ground, loot, "share right", lambda one: agreement(one, labels))
    return Judgement(verdict, sentence, figures=figures, curves=(curve,))


def _curve(ground: Ground, loot: Loot, what: str, measure: Callable[[torch.Tensor], float]) -> Curve:
    steps = ground.steps_an_epoch()
    points = tuple(((place + 1.0) * steps, measure(one)) for place, one in enumerate(loot.tensors["by_epoch"]))
    return Curve("direction, from one epoch", points, y=what)


def _see(graph: Graph, edge: Labels) -> set[str]:
    return {*graph.members(edge.source), *graph.members(graph.segments[edge.target].at)}


def classifies(graph: Graph, edge: Labels) -> bool:
    """Whether the loss compares with one of several labels, rather than with a measurement."""
    loss = graph.segments[edge.target].loss
    if loss in ("cross_entropy", "nll"):
        return not DTYPES[edge.dtype].is_floating_point
    return loss in ("bce", "bce_with_logits") and tuple(edge.shape) in ((), (1,))


def _gradients_to(graph: Graph) -> Iterator[tuple[str, Any, Labels]]:
    """Every party to which gradients come back over a cut from another party, and the labels that they depend on.

    The cut nearest to the loss first: less stands between label and gradient.
    """
    for labels in graph.labels:
        if not classifies(graph, labels):
            continue
        reached = {labels.target}
        waiting = [labels.target]
        while waiting:
            target = waiting.pop(0)
            for cut in graph.cuts:
                if cut.target != target or not DTYPES[cut.dtype].is_floating_point:
                    continue
                source = graph.segments[cut.source].at
                if source != graph.segments[target].at:
                    for member in graph.members(source):
                        yield member, cut, labels
                if cut.source not in reached:
                    reached.add(cut.source)
                    waiting.append(cut.source)
