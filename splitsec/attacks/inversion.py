"""Decoder inversion with public samples: an honest server redraws what it receives.

He, Zhang, Lee 2019, "Model inversion attacks against collaborative inference" (ACSAC): *black-box* (a decoder is
trained on samples and their activations) and *query-free* (without a query to the victim's segment, a *shadow* of it
takes its place).  Here: the query-free form, since a server cannot query: nobody gives it activations of samples of
its choice.  Also what all attacks of an honest server share: listening, shadows, and comparing with the truth.  Not
here: networks (``nets``), attacks without public samples (``unsplit``), with a discriminator and no architecture
(``simulator``).

What differs from the paper.  Its shadow is trained so that the server's own segment classifies public samples well
through it; on the vanilla example that alone fails (mean squared error 0.34 to 0.63, where the mean image has 0.27):
many shadows classify well.  So two terms are added which a server can compute as well: activations of public samples
have the moments of received ones, and a received activation, decoded, goes back through the shadow to where it was.

First weights.  A segment's first weights follow from the graph's seed and the segment's name (``samples.seed_of``), so
a server that knows the architecture begins with the victims' own.  Then a shadow has only to follow what training
changed, and the first batches of a run need no shadow at all.  The loot has both, and the same with weights drawn
afresh, to show what the seed gives away.

A graph's floor on the cut (clipping, noise) is known to the server, so a shadow's activations are treated likewise.
One release of each sample is inverted: whoever averages a sample's noisy releases over epochs does better than this.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import nn
from torch.nn import functional

from splitsec.attacks import nets
from splitsec.attacks.arena import Aim, Fought, Ground
from splitsec.attacks.attack import CutAttack, Judgement, Truth, images, verdict_of
from splitsec.attacks.outcome import Curve, Pictures, Verdict
from splitsec.attacks.strategy import Heard, Listener, Loot, Scene, Strategy, bounds
from splitsec.graph import Graph, Safeguard
from splitsec.plan import Stage
from splitsec.segments import Segment, build_segments

__all__ = [
    "Comparison",
    "Eavesdropper",
    "Inversion",
    "InversionStrategy",
    "Overheard",
    "Scale",
    "Shadowing",
    "compared",
    "comparison",
    "curve_of",
    "drawn_afresh",
    "first_weights",
    "imitate",
    "sent_as",
]

MOST: Final = 3000
"""Received activations that an attack works on: the latest."""
BYTES: Final = 2**28
"""And their bytes."""
FIRST: Final = 4
"""Batches of the run's beginning that are kept."""
WATCHED: Final = 48
"""Samples that are recovered again and again, for the curve."""
STEPS: Final = {True: 700, False: 2400}
"""Of shadow and decoder, for images and for anything else, whose networks are small."""
WARM: Final = 6
"""In the first of so many parts of them the decoder learns alone, before the shadow follows what it decodes."""
BATCH: Final = 32
WIDTH: Final = 16


# --- what a server hears ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overheard:
    """Training activations as they were received, the latest ones of one segment."""

    activations: torch.Tensor
    """float32 ``[n, *cut shape]``."""
    places: torch.Tensor
    """int64 ``[n, 3]``, as in ``Loot``."""
    labels: torch.Tensor | None
    """``[n, ...]`` where the listening segment gets any."""

    def first(self, count: int) -> Overheard:
        """The first ``count`` of them."""
        return Overheard(
            self.activations[:count], self.places[:count], None if self.labels is None else self.labels[:count]
        )


class _Ear(Listener):
    """Listens, and keeps the first batches of the run besides."""

    def __init__(self, honest: Segment, cut: str, strategy: Strategy) -> None:
        super().__init__(honest, cut, strategy, keep=1)
        self.beginning: list[Heard] = []

    def step(self) -> None:
        super().step()
        if len(self.beginning) < FIRST and self.heard and self.heard[0].place[0] == 0:
            self.beginning = self.heard[:FIRST]


class Eavesdropper(Strategy):
    """Base of an honest server's attacks: does its work to the last bit, and remembers what it receives."""

    listener: _Ear

    def take_over(self, honest: Mapping[str, Segment]) -> dict[str, Segment]:
        target = self.scene.cut.partition(" -> ")[2]
        self.listener = _Ear(honest[target], self.scene.cut, self)
        return {**honest, target: self.listener}

    def overheard(self) -> Overheard | None:
        """Of the last epoch that was heard; None where nothing was.

        Where the members of a group keep a segment each (``schedule: parallel``): one member's.
        """
        heard = self.listener.heard
        if heard and self.scene.graph.schedule != "round_robin":
            heard = [one for one in heard if one.place[1] == heard[0].place[1]]
        return _together(heard)

    def beginning(self) -> Overheard | None:
        """The first batches of the run, of the one member that began; None where nothing was heard."""
        heard = self.listener.beginning
        return _together([one for one in heard if one.place[:2] == heard[0].place[:2]])

    def classifier(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
        """The loss of public labels through the server's own segment, as trained: activations and labels to a number.

        None where the listening segment has no labels, or joins several inputs, or public samples have no labels.
        """
        stage = self._stage()
        loss, labels = self.listener.loss, self.scene.public.get("y")
        if stage is None or stage.labels is None or len(stage.inputs) != 1 or loss is None or labels is None:
            return None
        module = copy.deepcopy(self.listener.module).eval().requires_grad_(False)
        return lambda activations, wanted: loss(module(activations), wanted)

    def _stage(self) -> Stage | None:
        for stream in self.scene.plan.streams:
            for stage in stream.stages:
                if any(f"{edge.source} -> {edge.target}" == self.scene.cut for edge in stage.inputs):
                    return stage
        return None

    def progress(self, done: int, of: int, text: str) -> None:
        """Tell the judge."""
        self.scene.report({"event": "progress", "done": done, "of": of, "text": text})


def _together(heard: list[Heard]) -> Overheard | None:
    if not heard:
        return None
    chosen: list[Heard] = []
    rows = 0
    for one in reversed(heard):
        rows += len(one.activation)
        if chosen and (rows > MOST or rows * one.activation[0].nelement() * 4 > BYTES):
            break
        chosen.insert(0, one)
    places = [(*one.place[:2], one.place[2] + row) for one in chosen for row in range(len(one.activation))]
    labels = [one.labels for one in chosen if one.labels is not None]
    return Overheard(
        torch.cat([one.activation for one in chosen]).float(),
        torch.tensor(places),
        torch.cat(labels) if len(labels) == len(chosen) else None,
    )


# --- shadows ----------------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """Activations with every channel (of a flat cut: every number) at mean 0 and deviation 1 over ``like``."""

    middle: torch.Tensor
    spread: torch.Tensor

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        places = [0, *range(2, like.dim())]
        middle = like.mean(places, keepdim=True)
        deviation = (like - middle).square().mean(places, keepdim=True).sqrt()
        self.register_buffer("middle", middle)
        self.register_buffer("spread", deviation + 1e-2 * like.std() + 1e-12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.middle) / self.spread


def sent_as(graph: Graph, cut: str, generator: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the graph's floor does to activations of ``cut``, with a gradient, and with noise of its own."""
    floor: Safeguard | None = None
    for one in graph.cuts:
        if f"{one.source} -> {one.target}" == cut and one.privacy is not None:
            floor = one.privacy.forward
    if floor is None or floor.clip is None:
        return lambda x: x
    clip, multiplier = floor.clip, floor.noise_multiplier or 0.0
    order = 1 if floor.noise == "laplace" else 2

    def treated(x: torch.Tensor) -> torch.Tensor:
        norms = x.flatten(1).norm(p=order, dim=1).clamp_min(1e-12)
        x = x * (clip / norms).clamp(max=1.0).reshape(-1, *[1] * (x.dim() - 1))
        if floor.noise == "gaussian":
            x = x + 2 * clip * multiplier * torch.randn(x.shape, generator=generator)
        elif floor.noise == "laplace":
            u = torch.rand(x.shape, generator=generator) - 0.5
            x = x - 2 * clip * multiplier * u.sign() * (-2 * u.abs()).clamp_min(-1 + 1e-7).log1p()
        return x

    return treated


def first_weights(scene: Scene) -> nn.Module | None:
    """The victims' segment with its first weights, where the architecture is known."""
    if scene.architecture is None:
        return None
    with torch.random.fork_rng(devices=[]):
        return scene.architecture()


def drawn_afresh(module: nn.Module, seed: int) -> nn.Module:
    """A copy of ``module`` with other first weights, where its layers can draw them (``reset_parameters``)."""
    other = copy.deepcopy(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in other.modules():
            draw = getattr(layer, "reset_parameters", None)
            if callable(draw):
                draw()
    return other


def batches(rows: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches of row numbers, int64 ``[size]`` (or fewer, where there are no more rows)."""
    while True:
        for part in torch.split(torch.randperm(rows, generator=generator), size):
            if len(part) == min(size, rows):
                yield part


def steps_of(scene: Scene) -> int:
    """How long to train, unless the option ``steps`` says so."""
    return int(scene.options.get("steps", STEPS[len(scene.shape) == 3]))


def raw(scene: Scene, scaled: torch.Tensor) -> torch.Tensor:
    """Samples in [-1, 1] as the victims' functions scale them."""
    return (scaled + 1) / 2 * (scene.high - scene.low) + scene.low


@dataclass
class Shadowing:
    """What ``imitate`` ends with."""

    shadow: nn.Module
    decoder: nn.Module
    """Activations ``[n, *cut shape]`` to samples in [-1, 1], ``[n, *shape]``."""
    watched: torch.Tensor
    """Of the first ``WATCHED`` activations, what was recovered by and by: ``[times, n, *shape]``."""
    steps: list[int]
    """After so many steps."""
    unexplained: float
    """Share of the variance of received activations that the shadow does not give when it is fed what was decoded."""

    @torch.no_grad()
    def recover(self, activations: torch.Tensor) -> torch.Tensor:
        """Samples in [-1, 1]."""
        self.decoder.eval()
        return torch.cat([self.decoder(part) for part in torch.split(activations, 256)])


def imitate(
    shadow: nn.Module,
    overheard: Overheard,
    scene: Scene,
    *,
    classify: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    steps: int,
    seed: int = 0,
    public: Mapping[str, torch.Tensor] | None = None,
    warm: int | None = None,
    told: Callable[[int], None] = lambda step: None,
    adversarial: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    natural: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    cycle: float = 1.0,
    moments: float = 1.0,
) -> Shadowing:
    """Train ``shadow`` (in place) to be the victims' segment, and a decoder of what it gives.

    ``classify``: the loss of labels through what the server trained, weighed 0.3.  ``cycle``, ``moments``: weights of
    the two terms of the module's docstring.  ``adversarial``: a further term of the shadow's loss, of the rows of
    public samples, their scaled activations, and the rows of received ones.  ``natural``: a further term of the
    decoder's loss, of what it decodes from received activations.  ``public``: in place of the scene's.  ``warm``:
    steps before the shadow begins to learn; with as many as ``steps`` it stays as it is.
    """
    public = scene.public if public is None else public
    warm = steps // WARM if warm is None else warm
    samples, labels = public["x"].float(), public.get("y")
    wanted = scene.scaled(samples)
    scale = Scale(overheard.activations)
    received = scale(overheard.activations)
    middle, spread = received.mean(0), received.std(0)
    chance = torch.Generator().manual_seed(seed)
    treated = sent_as(scene.graph, scene.cut, chance)
    watched: list[torch.Tensor] = []
    at: list[int] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        decoder = nn.Sequential(scale, nets.decoder(scene.cut_shape, scene.shape, width=WIDTH))
        learns = torch.optim.Adam(decoder.parameters(), lr=1e-3)
        follows = torch.optim.Adam([p for p in shadow.parameters() if p.requires_grad], lr=1e-3)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(learns, steps, eta_min=1e-4)
        later = torch.optim.lr_scheduler.CosineAnnealingLR(follows, max(1, steps - warm), eta_min=1e-4)
        shadow.train()
        own, theirs = batches(len(samples), BATCH, chance), batches(len(received), BATCH, chance)
        for step in range(1, steps + 1):
            rows, heard = next(own), next(theirs)
            made = treated(shadow(samples[rows]))
            error = functional.mse_loss(decoder(made.detach()), wanted[rows])
            if natural is not None and step > warm:
                error = error + natural(rows, decoder(overheard.activations[heard]))
            learns.zero_grad()
            torch.autograd.backward(error)
            learns.step()
            if step > warm:
                scaled = scale(made)
                loss = scaled.new_zeros(())
                if cycle:
                    with torch.no_grad():
                        seen = raw(scene, decoder(overheard.activations[heard]))
                    loss = loss + cycle * functional.mse_loss(scale(shadow(seen)), received[heard])
                if moments:
                    means = functional.mse_loss(scaled.mean(0), middle)
                    loss = loss + moments * (means + functional.mse_loss(scaled.std(0), spread))
                if adversarial is not None:
                    loss = loss + adversarial(rows, scaled, heard)
                if classify is not None and labels is not None:
                    loss = loss + 0.3 * classify(made, labels[rows])
                follows.zero_grad()
                torch.autograd.backward(loss)
                follows.step()
                later.step()
            slower.step()
            if step % max(1, steps // 10) == 0 or step == steps:
                with torch.no_grad():
                    watched.append(decoder.eval()(overheard.activations[:WATCHED]))
                decoder.train()
                at.append(step)
                told(step)
        with torch.no_grad():
            part = overheard.activations[: 4 * WATCHED]
            again = scale(shadow(raw(scene, decoder(part))))
            unexplained = float(functional.mse_loss(again, scale(part)) / scale(part).var())
    return Shadowing(shadow, decoder.eval(), torch.stack(watched), at, unexplained)


# --- the attacker -----------------------------------------------------------------------------------------------------


class InversionStrategy(Eavesdropper):
    """Listens, then trains shadows and decoders.

    Options: ``steps``.  Loot, samples in [-1, 1]: ``recovered [n, *shape]`` and ``places [n, 3]``; ``watched [times, m,
    *shape]`` of the first m of them, at ``steps``; ``afresh [m, *shape]``: by a shadow that does not begin with the
    victims' first weights; ``beginning`` and ``beginning_places``: the run's first batches, by a decoder for the first
    weights as they are.  Without architecture, ``recovered`` is by a segment of our own, and the last two are missing.
    """

    def loot(self) -> Loot:
        scene, heard, beginning = self.scene, self.overheard(), self.beginning()
        loot = Loot(numbers={"batches": self.listener.batches})
        if heard is None or "x" not in scene.public:
            return loot
        steps = steps_of(scene)
        known = first_weights(scene)
        shadow = known if known is not None else own_segment(scene, heard)
        whole = 2 * steps if known is not None else steps
        done = imitate(
            copy.deepcopy(shadow),
            heard,
            scene,
            classify=self.classifier(),
            steps=steps,
            told=lambda step: self.progress(step, whole, "trains a shadow and a decoder"),
        )
        loot.tensors |= {"recovered": done.recover(heard.activations), "places": heard.places, "watched": done.watched}
        loot.numbers |= {"steps": done.steps, "unexplained": done.unexplained}
        if known is None:
            return loot
        afresh = imitate(
            drawn_afresh(known, scene.seed + 1),
            heard,
            scene,
            classify=self.classifier(),
            steps=steps,
            told=lambda step: self.progress(steps + step, whole, "the same from other first weights"),
        )
        loot.tensors["afresh"] = afresh.recover(heard.activations)
        if beginning is not None:
            count = steps // 2
            early = imitate(known, beginning, scene, steps=count, warm=count)
            loot.tensors["beginning"] = early.recover(beginning.activations)
            loot.tensors["beginning_places"] = beginning.places
        return loot


def own_segment(scene: Scene, heard: Overheard) -> nn.Module:
    """A stand-in for a segment of which the attacker knows the shapes alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(scene.seed + 2)
        positive = bool((heard.activations >= 0).all())
        return nets.encoder(scene.shape, scene.cut_shape, width=WIDTH, positive=positive)


# --- the judge --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What was recovered beside what it was, in [-1, 1]."""

    truth: torch.Tensor
    recovered: torch.Tensor
    mse: float
    baseline: float
    """Of the mean public sample, on the same samples."""

    @property
    def verdict(self) -> Verdict:
        return verdict_of(self.mse, self.baseline)

    def pictures(self, name: str = "recovered") -> tuple[Pictures, ...]:
        """Originals and what was recovered, where they are images: evenly out of all."""
        return (*self.beside("originals", self.truth), *self.beside(name, self.recovered))

    def beside(self, name: str, samples: torch.Tensor) -> tuple[Pictures, ...]:
        """The same of ``samples``, which are as many."""
        return images(name, samples[torch.linspace(0, len(samples) - 1, min(12, len(samples))).long()])


def compared(ground: Ground, aim: Aim, truth: Truth, places: torch.Tensor, recovered: torch.Tensor) -> Comparison:
    """``recovered``, in [-1, 1], beside the samples that stood at ``places``."""
    return comparison(truth.samples(places), recovered, ground.public(aim)["x"])


def comparison(samples: torch.Tensor, recovered: torch.Tensor, public: torch.Tensor) -> Comparison:
    """``recovered [n, *shape]`` in [-1, 1] beside ``samples``; ``public``: what scales them, and gives the mean."""
    low, high = bounds(public)
    scaled = (samples.float() - low) / (high - low) * 2 - 1
    mean = ((public.float() - low) / (high - low) * 2 - 1).mean(0)
    return Comparison(scaled, recovered, apart(recovered, scaled), apart(mean.expand_as(scaled), scaled))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean squared error."""
    return float((one.double() - other.double()).square().mean())


def curve_of(loot: Loot, against: Comparison, name: str) -> tuple[Curve, ...]:
    """The error of the watched samples as the attack went on."""
    watched = loot.tensors["watched"]
    truth = against.truth[: watched.shape[1]]
    points = tuple((float(step), apart(one, truth)) for step, one in zip(loot.numbers["steps"], watched, strict=True))
    return (Curve(name, points, x="attack steps", y="mean squared error"),)


def stolen_how(found: Comparison, attacker: str, what: str) -> str:
    """The verdict in a sentence."""
    numbers = f"mean squared error {found.mse:.3f}, where guessing the average gives {found.baseline:.3f}"
    if found.verdict == "recovered":
        return f"{attacker} broke no rule and redrew {what} from what it received ({numbers})."
    if found.verdict == "partly recovered":
        return f"{attacker} redrew {what} in part from what it received ({numbers})."
    return f"{attacker} tried to redraw {what} and did not do better than guessing the average ({numbers})."


def kind_of(shape: tuple[int, ...]) -> str:
    """What samples of ``shape`` are called in a sentence."""
    return "images" if len(shape) == 3 and shape[0] in (1, 3) else "records"


def segment_of(ground: Ground, fought: Fought, party: str, segment: str) -> nn.Module:
    """``party``'s segment as its own files make it, with its first weights."""
    with torch.random.fork_rng(devices=[]):
        return build_segments(fought.graph, ground.folder.parties[party].undefended())[segment].module


class Inversion(CutAttack):
    """Samples from activations, by a decoder trained on public samples."""

    name: ClassVar[str] = "inversion"
    batches: ClassVar[int] = 400
    knows_architecture: ClassVar[bool] = True
    strategy: ClassVar[type[Strategy]] = InversionStrategy

    def judge(self, ground: Ground, aim: Aim, fought: Fought, truth: Truth) -> Judgement:
        loot = fought.loots[aim.attacker]
        if "recovered" not in loot.tensors:
            return Judgement("nothing recovered", f"{aim.attacker} had received no training batch.")
        found = compared(ground, aim, truth, loot.tensors["places"], loot.tensors["recovered"])
        what = f"the training {kind_of(aim.shape)} of {' and '.join(aim.victims)}"
        sentence = stolen_how(found, aim.attacker, what)
        figures = {"share of activations that the shadow does not explain": float(loot.numbers["unexplained"])}
        pictures = found.pictures("recovered")
        if "afresh" in loot.tensors:
            afresh = apart(loot.tensors["afresh"], found.truth)
            figures["error where the first weights are not known"] = afresh
            pictures += found.beside("recovered where the first weights are not known", loot.tensors["afresh"])
        if "beginning" in loot.tensors:
            early = compared(ground, aim, truth, loot.tensors["beginning_places"], loot.tensors["beginning"])
            figures[f"error of the first {FIRST} batches of the run, without a shadow"] = early.mse
            sentence += (
                f" It knew the first weights, which follow from the seed in the graph; without them, {afresh:.3f}."
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
