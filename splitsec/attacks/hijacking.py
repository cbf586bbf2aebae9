"""Feature-space hijacking: a server trains the clients' segment into an encoder that it can invert.

Pasquini, Ateniese, Bernaschi 2021, "Unleashing the Tiger: Inference Attacks on Split Learning" (CCS), section 3: the
attacker has an encoder and a decoder of its own, and a critic that tells the encoder's outputs on public samples from
what the victims send; the gradient that it returns makes the victims' segment harder to tell from the encoder, until
the decoder inverts it too.  Here: that attack, and one that knows the detectors (docs/detectors.md).  Not here:
networks (``nets``), the run (``arena``).

What differs from the paper, because it works better or costs the attacker less.  The encoder is fixed before the first
batch: by default a mere rearrangement of pixels (``nets.folding``), which any convolutional segment learns sooner than
another network's features (``space: learned`` trains one with the decoder instead).  So the decoder can be trained
after the run.  Beside the critic (Wasserstein, with gradient penalty: Gulrajani et al. 2017) stands a discrepancy of
moments up to the third (Gretton et al. 2012, polynomial kernel), which tells at once what a critic has yet to learn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Final

import torch
from torch.nn import functional

from splitsec.attacks import nets
from splitsec.attacks.arena import Aim, Fought, Ground
from splitsec.attacks.attack import CutAttack, Judgement, Truth, images, verdict_of
from splitsec.attacks.outcome import Curve, Pictures
from splitsec.attacks.strategy import Heard, Listener, Loot, Scene, Strategy, bounds
from splitsec.plan import Edge, Stage
from splitsec.privacy.detection import COMMON, SHARED, Gradients, Likeness, likeness
from splitsec.segments import Segment

__all__ = ["AdaptiveHijacking", "AdaptiveStrategy", "Hijacking", "HijackingStrategy"]

PUBLIC: Final = 4096
"""Public samples that are used, at most."""
CRITIC_RATE: Final = 1e-3
PENALTY: Final = 10.0
BANK: Final = 256
"""Public samples that the moments are taken of, on each batch."""
ROUNDS: Final = 500
"""Batches of public samples that the decoder is trained on."""
BATCH: Final = 64
BLUR: Final = 0.6
"""Most noise that the decoder learns to see through, in standard deviations: the victims come near the encoder, and
never there."""
WATCHED: Final = (1, 2, 5, 10, 20, 50)
"""Batches that the curve shows, and every hundredth."""

HONEST_BATCHES: Final = 60
"""Of the adaptive attacker, at least, before the first hijacked one."""
CERTAIN: Final = 0.35
"""Of the loss of guessing: below it, a false label shows in the loss of a batch."""
MARGIN: Final = 0.8
"""Of the detector's threshold, that is not passed."""
EVADE: Final = "mix"
FAINT: Final = 1e-3
"""Size of the answer to rows that are not hijacked, where others are."""

READING: Final = 400
"""Batches of public samples that the judge's reader is trained on."""


class HijackingStrategy(Strategy):
    """The attacking server's half.

    Options: ``space`` (folded, learned), ``decoder_rounds``.
    """

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.hijacker: _Hijacker | None = None
        self.curve: list[tuple[float, float]] = []
        self.watched: list[tuple[int, Heard]] = []
        self._chance = torch.Generator().manual_seed(scene.seed)
        self._public = scene.scaled(scene.public["x"].float())[:PUBLIC]
        self._ready = False

    def take_over(self, honest: Mapping[str, Segment]) -> dict[str, Segment]:
        target = self.scene.cut.partition(" -> ")[2]
        self.hijacker = _Hijacker(honest[target], self.scene.cut, self)
        return {**honest, target: self.hijacker}

    # --- one batch

    def answer(self, heard: Heard, honest: torch.Tensor, loss: float | None) -> torch.Tensor:
        """What goes back for ``heard`` in place of the ``honest`` gradient: its size, another direction.

        ``loss``: the honest one of this batch, mean over rows, where this party computes it.
        """
        return resized(self.pull(heard.activation), honest)

    def forgotten(self, count: int) -> None:
        """The last ``count`` batches that were answered do not stand; they come again."""

    def pull(self, received: torch.Tensor) -> torch.Tensor:
        """The gradient ``[rows, *cut shape]`` that draws ``received`` towards the attacker's space, of length 1 a row
        in the mean.  Trains the critic on the way.
        """
        if not self._ready:
            self._prepare(received)
        received = self._standard(received.detach())
        distance = self._train_critic(received)
        mine = received.clone().requires_grad_()
        (by_critic,) = torch.autograd.grad(-self._critic(mine).sum(), mine)
        (by_moments,) = torch.autograd.grad(self._discrepancy(mine), mine)
        # Both are known up to their size only: half and half.
        gradient = (unit(by_critic) + unit(by_moments)) / self._spread
        batch = 0 if self.hijacker is None else self.hijacker.batches
        self.curve.append((float(batch), distance))
        return unit(gradient)

    def _prepare(self, received: torch.Tensor) -> None:
        """Choose the space, once it is known whether activations are ever below 0."""
        self._ready = True
        scene = self.scene
        positive = bool((received >= 0).all())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(scene.seed)
            self._decoder = nets.decoder(scene.cut_shape, scene.shape)
            self._critic = nets.discriminator(scene.cut_shape)
            self._encoder = nets.folding(scene.shape, scene.cut_shape, positive=positive, seed=scene.seed)
            if scene.options.get("space") == "learned":
                self._encoder = nets.encoder(scene.shape, scene.cut_shape, width=16, positive=positive)
                self._train_decoder(together=True)
        with torch.no_grad():
            self._space = torch.cat([self._encoder(part) for part in torch.split(self._public, 256)])
        places = [0, *range(2, self._space.dim())]
        self._middle = self._space.mean(places, keepdim=True)[0]
        self._spread = self._space.std(places, keepdim=True)[0] + 1e-2 * float(self._space.std()) + 1e-6
        self._training = torch.optim.Adam(self._critic.parameters(), lr=CRITIC_RATE, betas=(0.5, 0.9))

    def _standard(self, activations: torch.Tensor) -> torch.Tensor:
        """With every channel of the attacker's space at mean 0 and deviation 1."""
        return (activations - self._middle) / self._spread

    def _some(self, count: int) -> torch.Tensor:
        return torch.randint(len(self._public), (count,), generator=self._chance)

    def _train_critic(self, received: torch.Tensor) -> float:
        """One step; how far apart the critic holds both kinds."""
        wanted = self._standard(self._space[self._some(len(received))])
        between = torch.rand(len(received), *[1] * (received.dim() - 1), generator=self._chance)
        mixed = (between * wanted + (1 - between) * received).requires_grad_()
        (slope,) = torch.autograd.grad(self._critic(mixed).sum(), mixed, create_graph=True)
        distance = self._critic(wanted).mean() - self._critic(received).mean()
        loss = PENALTY * ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean() - distance
        self._training.zero_grad()
        torch.autograd.backward(loss)
        self._training.step()
        return float(distance.detach())

    def _discrepancy(self, mine: torch.Tensor) -> torch.Tensor:
        """Squared maximum mean discrepancy of ``mine`` and public samples, kernel (x.y/d + 1)^3, up to a constant."""
        flat, wanted = mine.flatten(1), self._standard(self._space[self._some(BANK)]).flatten(1)
        own = (flat @ flat.T / flat.shape[1] + 1) ** 3
        cross = (flat @ wanted.T / flat.shape[1] + 1) ** 3
        pairs = max(1, len(flat) * (len(flat) - 1))
        return (own.sum() - own.diagonal().sum()) / pairs - 2 * cross.mean()

    # --- afterwards

    def loot(self) -> Loot:
        assert self.hijacker is not None
        loot = Loot(numbers={"batches": self.hijacker.batches}, curves={"distance": self.curve})
        heard = self.hijacker.heard
        if not self._ready or not heard:
            return loot
        torch.set_num_threads(1)  # more would wait for each other, over tensors as small as these
        if self.scene.options.get("space") != "learned":
            self._train_decoder(together=False)
        loot.tensors["recovered"] = self._redraw([one.activation for one in heard])
        loot.tensors["places"] = _places(heard)
        if self.watched:
            loot.tensors["watched"] = self._redraw([one.activation for _, one in self.watched])
            loot.tensors["watched_places"] = _places(one for _, one in self.watched)
            numbers = [torch.full((len(one.activation),), batch) for batch, one in self.watched]
            loot.tensors["watched_batches"] = torch.cat(numbers)
        return loot

    def _redraw(self, activations: list[torch.Tensor]) -> torch.Tensor:
        self._decoder.eval()
        with torch.no_grad():
            return torch.cat([self._decoder(part) for part in activations])

    def _train_decoder(self, *, together: bool) -> None:
        """Train the decoder, and with ``together`` the encoder too, to return public samples."""
        rounds = int(self.scene.options.get("decoder_rounds", ROUNDS))
        parameters = [*self._decoder.parameters(), *(self._encoder.parameters() if together else ())]
        optimizer = torch.optim.Adam(parameters, lr=1e-3)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds, eta_min=1e-5)
        for done in range(rounds):
            if done % 100 == 0:
                self.scene.report({"event": "progress", "done": done, "of": rounds, "text": "trains its decoder"})
            samples = self._public[self._some(BATCH)]
            features = self._encoder(samples)
            strength = BLUR * torch.rand(len(samples), *[1] * (features.dim() - 1), generator=self._chance)
            noise = torch.randn(features.shape, generator=self._chance) * strength * features.detach().std()
            loss = functional.mse_loss(self._decoder(features + noise), samples)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            rates.step()


class _Hijacker(Listener):
    """Computes and trains as the honest segment does, and answers the cut under attack as its strategy wants."""

    def __init__(self, honest: Segment, cut: str, strategy: HijackingStrategy) -> None:
        super().__init__(honest, cut, strategy)
        self._losses: dict[int, float] = {}
        self._hijacking = strategy

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
        made = super().forward(stage, inputs, labels, micro=micro, update=update, share=share)
        if update is not None and labels is not None and self._listens(stage) is not None:
            self._losses[micro] = self.loss_of(micro)
        return made

    def backward(
        self, stage: Stage, gradients: Mapping[Edge, torch.Tensor | None], *, micro: int, place: int = 0
    ) -> list[torch.Tensor | None]:
        unanswered = [one for one in self._open if one.gradient is None]
        back = super().backward(stage, gradients, micro=micro, place=place)
        which = self._listens(stage)
        if which is None or not unanswered:
            return back
        heard, honest = unanswered[0], back[which]
        if honest is None:
            honest = torch.zeros_like(heard.activation)
        heard.gradient = back[which] = self._hijacking.answer(heard, honest, self._losses.pop(micro, None))
        if self.batches in WATCHED or self.batches % 100 == 0:
            self._hijacking.watched.append((self.batches, heard))
        return back

    def forget(self) -> None:
        gone = self._open
        super().forget()
        self._hijacking.watched = [one for one in self._hijacking.watched if one[1] not in gone]
        self._hijacking.forgotten(len(gone))


def unit(gradient: torch.Tensor) -> torch.Tensor:
    """``gradient`` with rows of length 1 in the mean."""
    scaled: torch.Tensor = gradient / (gradient.flatten(1).norm(dim=1).mean() + 1e-12)
    return scaled


def resized(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``gradient`` with the mean length of the rows of ``like``; where those are 0, of a batch's mean loss."""
    length = like.flatten(1).norm(dim=1).mean()
    answer: torch.Tensor = unit(gradient) * (length if float(length) > 0 else 1.0 / len(gradient))
    return answer


def _places(heard: Iterable[Heard]) -> torch.Tensor:
    return torch.cat(
        [
            torch.stack(
                [
                    torch.full((len(one.activation),), one.place[0]),
                    torch.full((len(one.activation),), one.place[1]),
                    torch.arange(len(one.activation)) + one.place[2],
                ],
                1,
            )
            for one in heard
        ]
    )


class AdaptiveStrategy(HijackingStrategy):
    """A server that knows the detectors: nothing it sends looks like what they look for, as far as it can tell.

    Decoys: it is honest until its classifier knows a false label by its loss, and whenever a batch's loss says so; and
    to the batch that comes again after a decoy, whose gradient is compared.  Label agreement: it measures its answer as
    the detector does (``likeness``), and keeps what rows of different labels have in common below ``MARGIN`` of the
    threshold, by one of three ways of ``evade``:

    - ``mix``: the honest gradient mixed in with the least weight that suffices, or with ``weight``;
    - ``centre``: what all rows have in common taken out as far as needed;
    - ``part``: only part of the rows hijacked, the others answered with next to nothing (for a fixed ``weight``, the
      share of those; the detector counts rows by their size, and sees it).

    Options besides: ``honest_batches``, the least number of honest ones before the first hijacked one.
    """

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.began: int | None = None
        """The first hijacked batch."""
        self.evaded = 0
        """Batches that were taken for decoys, or came again after one, and were answered honestly."""
        self.weights: list[float] = []
        self.seen: list[Likeness] = []
        """What the detector sees, by hijacked batch."""
        self._loss: float | None = None
        self._again = 0

    def answer(self, heard: Heard, honest: torch.Tensor, loss: float | None) -> torch.Tensor:
        assert self.hijacker is not None
        again, self._again = self._again > 0, max(0, self._again - 1)
        if again or self._false(heard, loss) or not self._may_begin(heard, loss):
            self.evaded += self.began is not None
            self.pull(heard.activation)  # the critic learns from it all the same
            return honest
        if self.began is None:
            self.began = self.hijacker.batches
        answer, weight = self._hidden(self.pull(heard.activation), unit(honest), _classes(heard))
        self.weights.append(weight)
        if (seen := likeness(Gradients(answer), _classes(heard))) is not None:
            self.seen.append(seen)
        return resized(answer, honest)

    def forgotten(self, count: int) -> None:
        self._again = count

    def _false(self, heard: Heard, loss: float | None) -> bool:
        """Whether the labels are false, as far as the loss says; follows the loss of true ones."""
        if loss is None:
            return False
        if self.began is not None and self._loss is not None and loss > (self._loss + _chance_loss(heard)) / 2:
            return True
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        return False

    def _may_begin(self, heard: Heard, loss: float | None) -> bool:
        assert self.hijacker is not None
        if self.began is not None:
            return True
        if self.hijacker.batches <= float(self.scene.options.get("honest_batches", HONEST_BATCHES)):
            return False
        return loss is None or (self._loss is not None and self._loss < CERTAIN * _chance_loss(heard))

    def _hidden(self, pull: torch.Tensor, honest: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, float]:
        """``pull`` made to look honest, and how much of it was given up for that, 0..1."""
        options = self.scene.options
        way = options.get("evade", EVADE)
        if "weight" in options:
            weight = float(options["weight"])
            return _changed(way, pull, honest, weight), weight
        low, high = 0.0, 1.0
        for _ in range(6):
            weight = (low + high) / 2
            low, high = (low, weight) if _unseen(_changed(way, pull, honest, weight), classes) else (weight, high)
        return _changed(way, pull, honest, high), high

    def loot(self) -> Loot:
        loot = super().loot()
        total = Likeness()
        for one in self.seen:
            total = total + one
        loot.numbers |= {"began": self.began, "evaded": self.evaded}
        if self.seen:
            loot.numbers |= {"agreement": total.agreement, "common": total.common}
            loot.numbers["weight"] = sum(self.weights) / len(self.weights)
        return loot


def _changed(way: str, pull: torch.Tensor, honest: torch.Tensor, weight: float) -> torch.Tensor:
    if way == "mix":
        mixed: torch.Tensor = (1 - weight) * _rows_of_one(pull) + weight * _rows_of_one(honest)
        return mixed
    if way == "centre":
        centred: torch.Tensor = pull - weight * pull.mean(0, keepdim=True)
        return centred
    kept = torch.linspace(0, 1, len(pull)) >= weight  # the order of rows is a random one already
    kept = kept.view(-1, *[1] * (pull.dim() - 1))
    return torch.where(kept, pull, FAINT * honest)


def _rows_of_one(gradient: torch.Tensor) -> torch.Tensor:
    lengths = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.dim() - 1))
    rows: torch.Tensor = gradient / (lengths + 1e-12)
    return rows


def _unseen(answer: torch.Tensor, classes: torch.Tensor) -> bool:
    """Whether label agreement would let ``answer`` pass, with room to spare."""
    seen = likeness(Gradients(answer), classes)
    if seen is None:
        return True
    return seen.common <= MARGIN * COMMON or seen.share <= MARGIN * SHARED


def _classes(heard: Heard) -> torch.Tensor:
    """The labels of a batch as classes; where there are none, as if all rows had different ones."""
    labels = heard.labels
    if labels is None or labels.is_floating_point() or labels.dim() > 1:
        return torch.arange(len(heard.activation))
    return labels


def _chance_loss(heard: Heard) -> float:
    """Cross-entropy of guessing, in nats."""
    return math.log(max(2, len(torch.unique(_classes(heard)))))


# --- the judge's half -------------------------------------------------------------------------------------------------


class Hijacking(CutAttack):
    """Feature-space hijacking by the party that a cut leads to."""

    name = "hijacking"
    batches: ClassVar[int] = 1500
    strategy: ClassVar[type[Strategy]] = HijackingStrategy

    def judge(self, ground: Ground, aim: Aim, fought: Fought, truth: Truth) -> Judgement:
        loot = fought.loots[aim.attacker]
        public = ground.public(aim)
        low, high = bounds(public["x"])
        baseline = truth.mean_image_error
        sampled = [Curve("the critic's distance", tuple(loot.curves.get("distance", ())), y="distance")]
        if "recovered" not in loot.tensors:
            sentence = f"{_victims(aim)} left before {aim.attacker} held anything."
            return Judgement("nothing recovered", sentence, baseline_mse=baseline, curves=tuple(sampled))

        def scaled(places: torch.Tensor) -> torch.Tensor:
            return (truth.samples(places).float() - low) / (high - low) * 2 - 1

        recovered, places = loot.tensors["recovered"], loot.tensors["places"]
        true = scaled(places)
        mse = _error(recovered, true)
        verdict = verdict_of(mse, baseline)
        figures = self.figures(loot)
        if len(aim.shape) == 3:
            grey = (public["x"].float().mean() - low) / (high - low) * 2 - 1
            figures["error of one grey for all"] = _error(grey, true)
        read = self._read(ground, aim, recovered, true, truth.labels(places), public) if _named(aim, public) else {}
        figures |= read
        points = []
        if "watched" in loot.tensors:
            batches = loot.tensors["watched_batches"]
            for batch in sorted(set(batches.tolist())):
                these = batches == batch
                there = scaled(loot.tensors["watched_places"][these])
                points.append((float(batch), _error(loot.tensors["watched"][these], there)))
        curves = (Curve("of the batch just received", tuple(points), y="mean squared error"), *sampled)
        pictures: tuple[Pictures, ...] = (*images("originals", true), *images("what the server redrew", recovered))
        return Judgement(
            verdict,
            self._sentence(aim, fought, verdict, mse, baseline, len(recovered), read),
            reconstruction_mse=mse,
            baseline_mse=baseline,
            figures=figures,
            curves=curves,
            pictures=pictures,
        )

    def figures(self, loot: Loot) -> dict[str, float]:
        """What else the attacker counted."""
        return {}

    def _read(
        self,
        ground: Ground,
        aim: Aim,
        recovered: torch.Tensor,
        true: torch.Tensor,
        labels: torch.Tensor,
        public: Mapping[str, torch.Tensor],
    ) -> dict[str, float]:
        """How much of what was redrawn is taken for what it is, by a reader that knows public samples alone."""
        low, high = bounds(public["x"])
        known = (public["x"].float() - low) / (high - low) * 2 - 1
        classes = int(max(public["y"].max(), labels.max())) + 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ground.graph.training.seed)
            reader = nets.classifier(aim.shape, classes, width=32, dropout=0.3)
            optimizer = torch.optim.Adam(reader.parameters(), lr=1e-3)
            for _ in range(READING):
                some = torch.randint(len(known), (BATCH,))
                loss = functional.cross_entropy(reader(known[some]), public["y"][some])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
        reader.eval()

        def right(x: torch.Tensor) -> float:
            with torch.no_grad():
                said = torch.cat([reader(x[start : start + 256]).argmax(1) for start in range(0, len(x), 256)])
            return float((said == labels).float().mean())

        return {
            "accuracy of a reader": right(recovered),
            "accuracy of a reader, guessing": float(torch.bincount(labels).max()) / len(labels),
            "accuracy of the reader on originals": right(true),
        }

    def _sentence(
        self,
        aim: Aim,
        fought: Fought,
        verdict: str,
        mse: float,
        baseline: float,
        count: int,
        read: Mapping[str, float],
    ) -> str:
        things = "images" if len(aim.shape) == 3 else "samples"
        left = ""
        if (alarm := fought.alarm) is not None:
            left = f"{alarm.party} left after {_batches(alarm.batch)} ({alarm.detector}); "
        if verdict == "nothing recovered":
            return f"{left}what {aim.attacker} holds is no better than the average of the {things} that it had before."
        what = f"{left}{aim.attacker} redrew {count:,} {things} of {_victims(aim)}"
        what += ", in outlines at best" if verdict == "partly recovered" else ""
        what += f", with {mse / baseline:.0%} of the error that the average one has"
        if read:
            share, able = read["accuracy of a reader"], read["accuracy of the reader on originals"]
            what += (
                f"; a program that learnt to read from other {things} reads {share:.0%} of what was redrawn rightly, "
                f"and {able:.0%} of the originals"
            )
        return f"{what}."


class AdaptiveHijacking(Hijacking):
    """The same by a party that knows the detectors."""

    name = "hijacking-adaptive"
    strategy: ClassVar[type[Strategy]] = AdaptiveStrategy

    def figures(self, loot: Loot) -> dict[str, float]:
        wanted = {
            "agreement": "label agreement of what was sent",
            "common": "likeness across labels of what was sent",
            "weight": "given up to look honest",
            "began": "first hijacked batch",
            "evaded": "batches answered honestly for fear of a decoy",
        }
        numbers = loot.numbers
        return {text: float(numbers[name]) for name, text in wanted.items() if numbers.get(name) is not None}


def _error(recovered: torch.Tensor, true: torch.Tensor) -> float:
    return float(((recovered - true).double() ** 2).mean())


def _named(aim: Aim, public: Mapping[str, torch.Tensor]) -> bool:
    """Whether there are labels that name classes, for the victims' samples and for public ones."""
    labels = public.get("y")
    return aim.label_field is not None and labels is not None and labels.dtype == torch.int64 and labels.dim() == 1


def _victims(aim: Aim) -> str:
    *others, last = aim.victims
    return f"{', '.join(others)} and {last}" if others else last


def _batches(count: int) -> str:
    return "1 batch" if count == 1 else f"{count} batches"
