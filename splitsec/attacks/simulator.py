"""Passive simulator: an honest server trains a segment that nobody can tell from the clients', and inverts that.

Zhu et al. 2025, "Passive Inference Attacks on Split Learning via Adversarial Regularization" (SDAR, NDSS): a
*simulator* of the clients' segment is trained on public samples so that the server's own segment classifies well
through it, while a *discriminator* that is trained beside it has to take its activations for received ones; a *decoder*
inverts the simulator, while a second discriminator has to take what it decodes from received activations for public
samples.  The discriminator of activations is given the label besides, where the server has labels.  Nothing that goes
back to the clients differs by a bit from an honest server's.

Here: that, after the run, on the activations of its last epoch (the paper trains along with the run).  The simulator is
made from shapes alone: this attack knows no architecture and no first weights.  Two terms of ``inversion`` are added,
without which the adversarial ones swing widely in the few hundred steps that there are (on the vanilla example: mean
squared errors between 0.08 and 0.23 from one hundred steps to another): moments, and the way back through the
simulator.  Not here: those (``inversion.imitate``), networks (``nets``).
"""

from __future__ import annotations

from typing import ClassVar, Final

import torch
from torch.nn import functional

from splitsec.attacks import nets
from splitsec.attacks.arena import Aim, Fought, Ground
from splitsec.attacks.attack import CutAttack, Judgement, Truth
from splitsec.attacks.inversion import (
    Eavesdropper,
    Overheard,
    Scale,
    compared,
    curve_of,
    imitate,
    kind_of,
    own_segment,
    steps_of,
    stolen_how,
)
from splitsec.attacks.strategy import Loot, Scene, Strategy

__all__ = ["Critic", "Simulator", "SimulatorStrategy"]

LIKE_RECEIVED: Final = 0.1
"""Weight of the discriminator of activations in the simulator's loss."""
LIKE_PUBLIC: Final = 0.005
"""Weight of the discriminator of samples in the decoder's loss."""
RATE: Final = 2e-4
"""Of both discriminators: slower than what they judge, or they win at once and teach nothing."""
MOST_CLASSES: Final = 100
"""Labels beyond are not told to the discriminator."""
LONGER: Final = 1.5
"""Steps, over those of a shadow that begins with the architecture."""


class Critic:
    """A discriminator and its training: the higher its score, the more likely ``real``.

    ``classes``: how many labels it is given besides, 0 for none.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, *, width: int) -> None:
        self.classes = classes
        self._places = len(shape) - 1 if len(shape) == 3 else 0
        self.module = nets.discriminator((shape[0] + classes, *shape[1:]) if shape else (1,), width=width)
        self.training = torch.optim.Adam(self.module.parameters(), lr=RATE, betas=(0.5, 0.999))

    def score(self, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """``[n]``."""
        if self.classes:
            assert labels is not None
            hot = functional.one_hot(labels, self.classes).to(x.dtype).reshape(len(x), -1, *[1] * (x.dim() - 2))
            x = torch.cat([x, hot.expand(-1, -1, *x.shape[2:])], 1)
        scores: torch.Tensor = self.module(x)
        return scores

    def taken_for_real(self, made: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The loss of whoever made ``made``."""
        return functional.softplus(-self.score(made, labels)).mean()

    def learn(
        self,
        real: torch.Tensor,
        real_labels: torch.Tensor | None,
        made: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> None:
        """One step."""
        loss = self.taken_for_real(real.detach(), real_labels)
        loss = loss + functional.softplus(self.score(made.detach(), labels)).mean()
        self.training.zero_grad()
        torch.autograd.backward(loss)
        self.training.step()


class SimulatorStrategy(Eavesdropper):
    """Listens, then trains simulator, decoder and both discriminators.

    Options: ``steps``.  Loot: as ``InversionStrategy``, of ``recovered``, ``places`` and ``watched`` alone.
    """

    def loot(self) -> Loot:
        scene, heard = self.scene, self.overheard()
        loot = Loot(numbers={"batches": self.listener.batches})
        if heard is None or "x" not in scene.public:
            return loot
        steps = int(steps_of(scene) * (1 if "steps" in scene.options else LONGER))
        simulator = own_segment(scene, heard)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(scene.seed + 3)
            game = _Game(heard, scene)
        done = imitate(
            simulator,
            heard,
            scene,
            classify=self.classifier(),
            steps=steps,
            adversarial=game.activations,
            natural=game.samples,
            told=lambda step: self.progress(step, steps, "trains a simulator and a decoder"),
        )
        loot.tensors |= {"recovered": done.recover(heard.activations), "places": heard.places, "watched": done.watched}
        loot.numbers |= {"steps": done.steps, "unexplained": done.unexplained}
        return loot


class _Game:
    """Both discriminators, as terms of what they judge; each learns one step whenever it is asked."""

    def __init__(self, heard: Overheard, scene: Scene) -> None:
        self._received = Scale(heard.activations)(heard.activations)
        self._heard_labels, self._public_labels, classes = _labels(heard, scene)
        self._public = scene.scaled(scene.public["x"].float())
        self._of_activations = Critic(scene.cut_shape, classes, width=32)
        self._of_samples = Critic(scene.shape, 0, width=16)

    def activations(self, rows: torch.Tensor, made: torch.Tensor, heard: torch.Tensor) -> torch.Tensor:
        """How well the simulator's ``made`` pass for received ones, given public ``rows``."""
        labels, theirs = _some(self._public_labels, rows), _some(self._heard_labels, heard)
        self._of_activations.learn(self._received[heard], theirs, made, labels)
        return LIKE_RECEIVED * _frozen(self._of_activations, made, labels)

    def samples(self, rows: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """How well ``decoded`` samples pass for public ones."""
        self._of_samples.learn(self._public[rows], None, decoded, None)
        return LIKE_PUBLIC * _frozen(self._of_samples, decoded, None)


def _frozen(critic: Critic, made: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    critic.module.requires_grad_(False)
    loss = critic.taken_for_real(made, labels)
    critic.module.requires_grad_(True)
    return loss


def _some(labels: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    return None if labels is None else labels[rows]


def _labels(heard: Overheard, scene: Scene) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """Labels of received and public samples as class numbers, and how many classes; none where they are no classes."""
    theirs, ours = heard.labels, scene.public.get("y")
    if theirs is None or ours is None or theirs[0].nelement() != 1 or ours[0].nelement() != 1:
        return None, None, 0
    both = torch.cat([theirs.flatten().double(), ours.flatten().double()])
    if not torch.equal(both, both.round()) or float(both.min()) < 0 or float(both.max()) >= MOST_CLASSES:
        return None, None, 0
    numbers = both.long()
    return numbers[: len(theirs)], numbers[len(theirs) :], int(numbers.max()) + 1


# --- the judge --------------------------------------------------------------------------------------------------------


class Simulator(CutAttack):
    """Samples from activations, by a simulator of the clients' segment that is trained against a discriminator."""

    name: ClassVar[str] = "simulator"
    batches: ClassVar[int] = 400
    strategy: ClassVar[type[Strategy]] = SimulatorStrategy

    def judge(self, ground: Ground, aim: Aim, fought: Fought, truth: Truth) -> Judgement:
        loot = fought.loots[aim.attacker]
        if "recovered" not in loot.tensors:
            return Judgement("nothing recovered", f"{aim.attacker} had received no training batch.")
        found = compared(ground, aim, truth, loot.tensors["places"], loot.tensors["recovered"])
        what = f"the training {kind_of(aim.shape)} of {' and '.join(aim.victims)}"
        return Judgement(
            found.verdict,
            stolen_how(found, aim.attacker, what) + " It knew nothing of their segment but the shapes.",
            reconstruction_mse=found.mse,
            baseline_mse=found.baseline,
            figures={"share of activations that the simulator does not explain": float(loot.numbers["unexplained"])},
            curves=curve_of(loot, found, "recovered"),
            pictures=found.pictures(),
        )
