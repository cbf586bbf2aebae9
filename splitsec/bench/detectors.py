"""``splitsec bench detectors``: how often detectors are wrong about honest trainings, and how soon they see an attack.

Here: real trainings of small networks on MNIST images and on the breast-cancer table, cut in two in one process, with
what would come back over the cut shown to the rules of ``splitsec.privacy.detection``; the same with a server that
hijacks (Pasquini, Ateniese, Bernaschi 2021, "Unleashing the tiger", section 3: an encoder and decoder on public
samples, a discriminator, and its gradient in place of the loss's).  This is how the thresholds were set: ``--picture``
draws, for every threshold, how many honest runs it would stop and how many attacks it would miss.  Not here: attacks
over the real channel, and what they recover (``splitsec attack``).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from splitsec.partyfile import load_function
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

__all__ = ["add_arguments", "measured", "run"]

BATCHES: Final = 1000
SEEDS: Final = 20
SOON: Final = 10
"""Batches within which an attack shall be seen."""
DECOY_EVERY: Final = 50
STEP_MS: Final = 30.0
"""A client's training step that the time of a detector is set against."""

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--examples", type=Path, default=Path("examples"), metavar="DIR", help="folder of the examples (for their data)"
    )
    parser.add_argument("--quick", action="store_true", help="a few short runs of each: a minute, rough figures")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"runs of each attack (default: {SEEDS}; quick: 3)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the curves (.svg or .png; needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


# --- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Samples of one data set: ``x`` ``[n, ...]``, ``y`` as the loss wants it, and what an attacker has: ``public``."""

    x: torch.Tensor
    y: torch.Tensor
    public: torch.Tensor

    def skewed(self, share: float = 0.9) -> Data:
        """So many that ``share`` of the labels are one and the same."""
        labels = self.y.flatten()
        most = (labels == 0).nonzero().flatten()
        rest = (labels != 0).nonzero().flatten()
        chosen = torch.cat([most, rest[: round(len(most) * (1 - share) / share)]])
        return Data(self.x[chosen], self.y[chosen], self.public)

    def mislabelled(self, share: float) -> Data:
        """With ``share`` of the labels drawn at random."""
        chance = torch.Generator().manual_seed(0)
        random = torch.randint(0, int(self.y.max()) + 1, self.y.shape, generator=chance)
        return Data(
            self.x, torch.where(torch.rand(self.y.shape, generator=chance) < share, random, self.y), self.public
        )


def _conv_client() -> nn.Module:  # as examples/vanilla has it
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    )


def _conv_server() -> nn.Module:  # as examples/vanilla has it
    return nn.Sequential(
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3)),
        *(nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)),
    )


def _dense_client() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU())


def _dense_server() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)),
    )


def _plain_server() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def _long_server() -> nn.Module:
    layers = [layer for _ in range(6) for layer in (nn.Linear(128, 128), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def _table_client() -> nn.Module:  # as examples/vertical has it, for all columns
    return nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())


def _table_server() -> nn.Module:  # as examples/vertical has it
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))


def _deep_table_server() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1)),
    )


@dataclass(frozen=True)
class Task:
    """A network cut in two, its data and its loss."""

    data: str
    client: Callable[[], nn.Module]
    server: Callable[[], nn.Module]
    loss: Loss = functional.cross_entropy
    cut: tuple[int, ...] = ()


CONV: Final = Task("mnist", _conv_client, _conv_server, cut=(32, 7, 7))
DENSE: Final = Task("mnist", _dense_client, _dense_server, cut=(128,))
PLAIN: Final = Task("mnist", _dense_client, _plain_server, cut=(128,))
LONG: Final = Task("mnist", _dense_client, _long_server, cut=(128,))
TABLE: Final = Task("cancer", _table_client, _table_server, functional.binary_cross_entropy_with_logits, (16,))
DEEP_TABLE: Final = Task(
    "cancer", _table_client, _deep_table_server, functional.binary_cross_entropy_with_logits, (16,)
)


@dataclass(frozen=True)
class Honest:
    """One honest training."""

    name: str
    task: Task
    batch: int
    optimizer: str = "adam"
    rate: float = 1e-3
    skewed: bool = False
    one_label: bool = False
    """Every batch holds samples of one label only."""
    before: int = 0
    """Batches before the detectors look: a network that has converged."""
    u_shape: bool = False
    """The last layer is the client's again: the gradient comes through a middle segment."""
    mislabelled: float = 0.0
    classes: bool = True
    """The loss compares classes."""


HONEST: Final = (
    Honest("images, convolutions", CONV, 16),
    Honest("images, convolutions", CONV, 64),
    Honest("images, convolutions", CONV, 32, "sgd", 0.02),
    Honest("images, convolutions, skewed", CONV, 32, skewed=True),
    Honest("images, convolutions, one label a batch", CONV, 32, one_label=True),
    Honest("images, convolutions, U shape", CONV, 50, u_shape=True),
    Honest("images, dense and batch norm", DENSE, 16),
    Honest("images, dense and batch norm", DENSE, 64),
    Honest("images, dense and batch norm", DENSE, 32, "sgd", 0.05),
    Honest("images, dense and batch norm, skewed", DENSE, 16, skewed=True),
    Honest("images, dense, converged", PLAIN, 32, before=4000),
    Honest("images, dense, U shape", PLAIN, 32, "sgd", 0.05, u_shape=True),
    Honest("table", TABLE, 16, rate=5e-3),
    Honest("table", TABLE, 64, "sgd", 0.1),
    Honest("table, skewed", TABLE, 32, rate=5e-3, skewed=True),
    Honest("table, converged", TABLE, 32, rate=5e-3, before=6000),
    Honest("table, one label a batch", TABLE, 16, rate=5e-3, one_label=True),
    Honest("table, deep and batch norm", DEEP_TABLE, 16, rate=5e-3),
    Honest("table, deep and batch norm", DEEP_TABLE, 64, "sgd", 0.1),
    Honest("table, deep and batch norm, skewed, converged", DEEP_TABLE, 16, rate=5e-3, skewed=True, before=3000),
)
"""The twenty that thresholds must let pass."""


def _smoothed(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(scores, labels, label_smoothing=0.2)


def _focal(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logs = functional.log_softmax(scores, 1).gather(1, labels[:, None])
    return (-((1 - logs.exp()) ** 2) * logs).mean()


def _contrastive(made: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Supervised contrastive loss, Khosla et al. 2020, equation 2, temperature 0.1."""
    unit = functional.normalize(made, dim=1)
    logits = unit @ unit.T / 0.1 - 1e9 * torch.eye(len(unit))
    alike = (labels[:, None] == labels[None]).float() - torch.eye(len(unit))
    return -((logits.log_softmax(1) * alike).sum(1) / alike.sum(1).clamp_min(1)).mean()


def _triplet(made: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Batch-hard triplet loss, Hermans et al. 2017, equation 5, margin 0.5."""
    distance = torch.cdist(made, made)
    alike = labels[:, None] == labels[None]
    farthest, nearest = (distance * alike).amax(1), (distance + 1e6 * alike).amin(1)
    return functional.relu(farthest - nearest + 0.5).mean()


def _counts(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.poisson_nll_loss(scores[:, 0], labels.float())


def _squares(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(scores[:, 0], labels.float())


def _with(task: Task, loss: Loss) -> Task:
    return Task(task.data, task.client, task.server, loss, task.cut)


HARDER: Final = (
    Honest("label smoothing 0.2", _with(PLAIN, _smoothed), 32),
    Honest("label smoothing 0.2, seven layers", _with(LONG, _smoothed), 32),
    Honest("two of five labels random", PLAIN, 32, mislabelled=0.4),
    Honest("all labels random, seven layers", LONG, 32, mislabelled=1.0),
    Honest("rate far too high", PLAIN, 64, "sgd", 0.3),
    Honest("seven layers, rate too high", LONG, 32, "sgd", 0.15),
    Honest("focal loss", _with(PLAIN, _focal), 32),
    Honest("hinge loss", _with(PLAIN, functional.multi_margin_loss), 32),
    Honest("supervised contrastive loss", _with(PLAIN, _contrastive), 32, classes=False),
    Honest("triplet loss", _with(PLAIN, _triplet), 32, classes=False),
)
"""Trainings that are further from the ordinary."""

OUTSIDE: Final = (
    Honest("counts, Poisson loss", _with(PLAIN, _counts), 32, classes=False),
    Honest("numbers, squared error", _with(PLAIN, _squares), 32, classes=False),
)
"""Label agreement does not apply here: what it would say if it were asked."""


@dataclass(frozen=True)
class Attack:
    """One kind of hijacking.  ``critic``: Wasserstein with gradient penalty in place of cross entropy."""

    name: str
    task: Task
    batch: int
    critic: bool = False
    after: int = 0
    """Honest batches before."""
    skewed: bool = False
    noise: float = 0.0
    """Fresh noise on every answer, times the length of its rows."""
    length: int = SOON
    """Batches under attack."""
    mixed: float = 0.0
    """Share of the honest gradient in the answer, both scaled to length 1."""


ATTACKS: Final = (
    Attack("images, convolutions", CONV, 50),
    Attack("images, convolutions, critic", CONV, 16, critic=True),
    Attack("images, dense", DENSE, 64),
    Attack("images, dense, critic", DENSE, 16, critic=True),
    Attack("images, dense, skewed", DENSE, 32, skewed=True),
    Attack("table", TABLE, 32),
    Attack("table, critic", TABLE, 16, critic=True),
    Attack("images, dense, after 100 honest batches", PLAIN, 32, after=100),
    Attack("table, after 100 honest batches", TABLE, 32, critic=True, after=100),
    Attack("table, after 1,000 honest batches", TABLE, 32, after=1000),
)
"""What must be seen within ``SOON`` batches."""

ADAPTIVE: Final = (
    Attack("images, dense, noise as long as the gradient", DENSE, 32, noise=1.0),
    Attack("images, dense, noise twice as long", DENSE, 32, noise=2.0),
    Attack("images, dense, a quarter honest", PLAIN, 32, mixed=0.25),
    Attack("images, dense, half honest", PLAIN, 32, mixed=0.5),
    Attack("table, a quarter honest", TABLE, 32, mixed=0.25),
    Attack("table, half honest", TABLE, 32, mixed=0.5),
)
LASTING: Final = (
    Attack("images, dense, 60 batches", DENSE, 32, length=60),
    Attack("table, 60 batches", TABLE, 32, critic=True, length=60),
    Attack("table, 60 batches after 100 honest ones", TABLE, 32, after=100, length=60),
)
"""Whether a party without labels is warned."""
"""What an attacker that knows the detectors may try first; told, not promised."""


# --- trainings --------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What came back in one batch."""

    gradient: torch.Tensor
    labels: torch.Tensor
    loss: float
    decoy: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    """Gradients under false and true labels, and whose label was false."""


def _batches(data: Data, size: int, chance: torch.Generator, *, one_label: bool = False) -> Iterator[torch.Tensor]:
    labels = data.y.flatten()
    while True:
        order = torch.randperm(len(data.x), generator=chance)
        if one_label:
            order = order[labels[order].argsort(stable=True)]
        parts = [one for one in torch.split(order, size) if len(one) == size]
        if one_label:
            parts = [one for one in parts if bool((labels[one] == labels[one[0]]).all())]
            parts = [parts[place] for place in torch.randperm(len(parts), generator=chance)]
        yield from parts


def _optimizer(name: str, parameters: Any, rate: float) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(parameters, lr=rate)
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def _honest(case: Honest, data: Data, batches: int, seed: int) -> Iterator[Seen]:
    torch.manual_seed(seed)
    chance = torch.Generator().manual_seed(seed)
    if case.mislabelled:
        data = data.mislabelled(case.mislabelled)
    data = data.skewed() if case.skewed else data
    client, server = case.task.client(), case.task.server()
    optimizers = [_optimizer(case.optimizer, one.parameters(), case.rate) for one in (client, server)]
    for number, chosen in enumerate(_batches(data, case.batch, chance, one_label=case.one_label)):
        if number == case.before + batches:
            return
        x, y = data.x[chosen], data.y[chosen]
        made = client(x)
        watched = number >= case.before
        decoy = None
        if watched and number % DECOY_EVERY == DECOY_EVERY - 1:
            decoy = _decoyed(server, case, made.detach(), y, chance)
        arrived = made.detach().requires_grad_()
        loss = _through(server, case, arrived, y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(loss)
        assert arrived.grad is not None
        torch.autograd.backward(made, arrived.grad)
        for optimizer in optimizers:
            optimizer.step()
        if watched:
            yield Seen(arrived.grad, y, float(loss.detach()), decoy)


def _through(server: nn.Module, case: Honest, arrived: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if not case.u_shape:
        return case.task.loss(server(arrived), y)
    assert isinstance(server, nn.Sequential)  # all but its last layer is the middle's, the last is the client's
    middle = server[:-1](arrived)
    returned = middle.detach().requires_grad_()
    loss = case.task.loss(server[-1](returned), y)
    torch.autograd.backward(loss)
    assert returned.grad is not None
    passed_on: torch.Tensor = (middle * returned.grad).sum()
    return torch.add(passed_on, (loss - passed_on).detach())


def _decoyed(
    server: nn.Module, case: Honest, arrived: torch.Tensor, y: torch.Tensor, chance: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """As the engine does it: the same rows, weights, dropout and running statistics, first with false labels."""
    order = detection.false_order(y, chance)
    if order is None:
        return None
    state = torch.get_rng_state()
    answers = []
    for labels in (y[order], y):
        torch.manual_seed(int(chance.initial_seed()))
        leaf = arrived.clone().requires_grad_()
        loss = case.task.loss(copy.deepcopy(server)(leaf), labels)
        answers.append(torch.autograd.grad(loss, leaf)[0])
    torch.set_rng_state(state)
    return answers[0], answers[1], (y[order] != y).reshape(len(y), -1).any(1)


class Hijacker:
    """A server that ignores labels: encoder and decoder on public samples, and a discriminator of activations."""

    def __init__(self, case: Attack, public: torch.Tensor, chance: torch.Generator) -> None:
        self._case, self._public, self._chance = case, public, chance
        shape, cut = tuple(public.shape[1:]), case.task.cut
        self.encoder, self.decoder = _pair(shape, cut)
        self._judge = _judge(cut)
        self._codes = torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], lr=1e-3)
        self._judging = torch.optim.Adam(self._judge.parameters(), lr=1e-3)

    def answer(self, activation: torch.Tensor) -> torch.Tensor:
        """One step of the attack; what goes back in place of a gradient."""
        chosen = torch.randint(0, len(self._public), (len(activation),), generator=self._chance)
        public = self._public[chosen]
        code = self.encoder(public)
        self._codes.zero_grad()
        torch.autograd.backward(functional.mse_loss(self.decoder(code), public))
        self._codes.step()
        code, leaf = code.detach(), activation.detach().requires_grad_()
        score = self._judge(leaf)
        wanted = -score.mean() if self._case.critic else functional.softplus(-score).mean()
        gradient = torch.autograd.grad(wanted, leaf)[0]
        false = activation.detach()
        if self._case.critic:
            loss = self._judge(false).mean() - self._judge(code).mean() + 10 * self._penalty(false, code)
        else:
            loss = (functional.softplus(-self._judge(code)) + functional.softplus(self._judge(false))).mean()
        self._judging.zero_grad()
        torch.autograd.backward(loss)
        self._judging.step()
        if self._case.noise:
            noise = torch.randn(gradient.shape, generator=self._chance)
            length = gradient.flatten(1).norm(dim=1).mean() / noise[0].numel() ** 0.5
            gradient = gradient + self._case.noise * length * noise
        return gradient

    def _penalty(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        share = torch.rand(len(one), *[1] * (one.dim() - 1), generator=self._chance)
        between = (share * one + (1 - share) * other).requires_grad_()
        slope = torch.autograd.grad(self._judge(between).sum(), between, create_graph=True)[0]
        lengths: torch.Tensor = torch.linalg.vector_norm(slope.flatten(1), dim=1)
        return torch.sub(lengths, 1).square().mean()


def _pair(shape: tuple[int, ...], cut: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    if len(cut) == 3:
        encoder = nn.Sequential(
            nn.Conv2d(shape[0], 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, cut[0], 3, stride=2, padding=1)
        )
        decoder = nn.Sequential(
            *(nn.ConvTranspose2d(cut[0], 32, 4, stride=2, padding=1), nn.ReLU()),
            *(nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, shape[0], 3, padding=1)),
        )
        return encoder, decoder
    numbers = math.prod(shape)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(numbers, 64), nn.ReLU(), nn.Linear(64, cut[0]))
    return encoder, nn.Sequential(nn.Linear(cut[0], 64), nn.ReLU(), nn.Linear(64, numbers), nn.Unflatten(1, shape))


def _judge(cut: tuple[int, ...]) -> nn.Module:
    if len(cut) == 3:
        return nn.Sequential(
            *(nn.Conv2d(cut[0], 64, 3, padding=1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64 * 16, 1)),
        )
    return nn.Sequential(
        *(nn.Linear(cut[0], 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
    )


def _attacked(case: Attack, data: Data, seed: int) -> Iterator[Seen]:
    torch.manual_seed(seed)
    chance = torch.Generator().manual_seed(seed)
    data = data.skewed() if case.skewed else data
    client, server = case.task.client(), case.task.server()
    hijacker = Hijacker(case, data.public, chance)
    optimizers = [_optimizer("adam", one.parameters(), 1e-3) for one in (client, server)]
    for number, chosen in enumerate(_batches(data, case.batch, chance)):
        if number == case.after + case.length:
            return
        x, y = data.x[chosen], data.y[chosen]
        made = client(x)
        decoy, loss = None, math.nan
        arrived = made.detach().requires_grad_()
        for optimizer in optimizers:
            optimizer.zero_grad()
        if number < case.after or case.mixed:
            honest = case.task.loss(server(arrived), y)
            loss = float(honest.detach())
            torch.autograd.backward(honest)
            assert arrived.grad is not None
            gradient = arrived.grad
        if number >= case.after:
            heeded = gradient if case.mixed else None
            order = detection.false_order(y, chance) if number == case.after + SOON - 1 else None
            first = hijacker.answer(made) if order is not None else None
            gradient = hijacker.answer(made)
            if first is not None and order is not None and heeded is None:
                decoy = (first, gradient, (y[order] != y).reshape(len(y), -1).any(1))
            if heeded is not None:
                gradient = (1 - case.mixed) * gradient / gradient.norm() + case.mixed * heeded / heeded.norm()
        torch.autograd.backward(made, gradient)
        for optimizer in optimizers:
            optimizer.step()
        yield Seen(gradient, y, loss, decoy)


# --- what the rules say -----------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What the rules said of one run.  ``NaN`` where nothing could be said."""

    name: str
    batch: int
    batches: int = 0
    stopped: int | None = None
    """Batch of the first alarm of label agreement, from 1; of attacks counted from its first batch."""
    highest: float = math.nan
    """Highest mean cosine of different labels (the smaller of the two weightings) of all windows."""
    common: float = math.nan
    """Highest mean cosine of different labels, where it is above ``SHARED`` of the same label's: what the threshold is
    on; of attacks until batch ``SOON``."""
    agreement: float = math.nan
    """Mean cosine of the same label less different labels: the lowest over windows; of attacks, the highest at
    ``SOON``."""
    changed: list[float] = field(default_factory=list)
    control: list[float] = field(default_factory=list)
    decoy_alarms: int = 0
    jump: float = 0.0
    """Largest norm over the largest before, after ``SETTLED`` steps."""
    norm: float = 0.0
    one_way: float = math.nan
    size_alarms: int = 0
    replays: int = 0
    loss_warning: str = ""
    seconds: float = 0.0


def _watched(name: str, batch: int, seen: Iterator[Seen], *, after: int = 0, classes: bool = True) -> Record:
    began = time.perf_counter()
    record = Record(name, batch)
    labels, decoys, size, one_way, replay, loss = (
        LabelRule(),
        DecoyRule(classes=classes),
        SizeRule(),
        OneWayRule(),
        ReplayRule(),
        LossRule(),
    )
    for number, one in enumerate(seen, 1):
        record.batches = number
        gradients = Gradients(one.gradient)
        norm = float(gradients.norms.max()) * len(one.gradient)
        record.size_alarms += size.suspicious(norm)
        record.norm = max(record.norm, norm)
        if number > detection.SETTLED and size.largest:
            record.jump = max(record.jump, norm / size.largest)
        record.replays += replay.add(number, gradients) is not None
        if (mean := one_way.add(gradients)) is not None and number > after:
            record.one_way = max(mean, 0.0 if math.isnan(record.one_way) else record.one_way)
        if one.loss == one.loss and (said := loss.add(one.loss)):
            record.loss_warning = record.loss_warning or said
        if one.decoy is not None and (answer := detection.answer(*one.decoy)) is not None:
            record.changed.append(answer.changed)
            record.control.append(answer.control)
            record.decoy_alarms += decoys.suspicious(answer)
        step = detection.likeness(gradients, one.labels.flatten().long())
        window = labels.add(step)
        if window is None or number <= after:
            continue
        if record.stopped is None and LabelRule.suspicious(window):
            record.stopped = number - after
        record.highest = window.common if math.isnan(record.highest) else max(record.highest, window.common)
        value = window.common if window.share > detection.SHARED else -1.0
        record.common = value if math.isnan(record.common) else max(record.common, value)
        if after or name.startswith("attack"):
            record.agreement = window.agreement
        elif not math.isnan(window.agreement):
            record.agreement = min(window.agreement, 9.0 if math.isnan(record.agreement) else record.agreement)
    record.seconds = round(time.perf_counter() - began, 1)
    return record


# --- the measurement --------------------------------------------------------------------------------------------------


def data_sets(examples: Path) -> dict[str, Data]:
    """The images of examples/vanilla and the table of examples/vertical."""
    digits = load_function("data:digits", examples / "vanilla" / "parties")
    private, public = digits(slice(0, 2500)), digits(slice(3750, 5000))
    measurements, malignant = load_function("data:records", examples / "vertical" / "parties")()
    order = torch.randperm(len(malignant), generator=torch.Generator().manual_seed(569))
    x = torch.from_numpy(measurements)[order]
    x = (x - x.mean(0)) / x.std(0)
    y = torch.from_numpy(malignant)[order].unsqueeze(1)
    return {
        "mnist": Data(private["x"], private["y"], public["x"]),
        "cancer": Data(x[:400], y[:400], x[400:]),
    }


def measured(
    examples: Path, *, quick: bool = False, seeds: int | None = None, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Every figure, as ``--json`` prints it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(data_sets(examples), quick, seeds or (3 if quick else SEEDS), tell)
    finally:
        torch.set_num_threads(before)


def _measured(data: dict[str, Data], quick: bool, seeds: int, tell: Callable[[str], None]) -> dict[str, Any]:
    began = time.monotonic()
    found: dict[str, list[Record]] = {}
    groups: tuple[tuple[str, Sequence[Honest], int], ...] = (
        ("honest", HONEST[::5] if quick else HONEST, 150 if quick else BATCHES),
        ("harder", HARDER[::4] if quick else HARDER, 150 if quick else BATCHES),
        ("outside", () if quick else OUTSIDE, 200),
    )
    for group, cases, batches in groups:
        for number, case in enumerate(cases):
            if quick and case.before:
                continue
            name = f"{case.name}, {case.optimizer}"
            record = _watched(
                name, case.batch, _honest(case, data[case.task.data], batches, 100 + number), classes=case.classes
            )
            found.setdefault(group, []).append(record)
            tell(f"{group}: {_line(record)}")
    for group, attacks in (("attacks", ATTACKS), ("adaptive", ADAPTIVE), ("lasting", LASTING)):
        for attack in attacks[::4] if quick else attacks:
            for seed in range(seeds):
                record = _watched(
                    f"attack: {attack.name}",
                    attack.batch,
                    _attacked(attack, data[attack.task.data], seed),
                    after=attack.after,
                )
                found.setdefault(group, []).append(record)
            tell(f"{group}: {attack.name}: {_caught([r for r in found[group] if r.name.endswith(attack.name)])}")
    return {
        "quick": quick,
        "seeds": seeds,
        "thresholds": {
            "common": detection.COMMON,
            "shared": detection.SHARED,
            "heeded": detection.HEEDED,
            "window": detection.WINDOW,
        },
        "curves": curves(found),
        "cost": cost(9 if quick else 101),
        "runs": {group: [asdict(record) for record in records] for group, records in found.items()},
        "seconds": round(time.monotonic() - began, 1),
    }


def curves(found: dict[str, list[Record]]) -> dict[str, list[tuple[float, float, float]]]:
    """For each statistic, (threshold, share of honest runs stopped, share of attacks seen within ``SOON`` batches)."""

    def shares(values: Sequence[float], threshold: float, *, above: bool) -> float:
        hits = [(value > threshold if above else value < threshold) for value in values]  # NaN: never
        return sum(hits) / max(1, len(hits))

    honest = [*found.get("honest", []), *found.get("harder", [])]
    attacks = found.get("attacks", [])
    grid = [round(0.01 * step, 2) for step in range(-20, 101)]
    return {
        "common": [
            (
                t,
                shares([r.highest for r in honest], t, above=True),
                shares([r.common for r in attacks], t, above=True),
            )
            for t in grid
        ],
        "agreement": [
            (
                t,
                shares([r.agreement for r in honest], t, above=False),
                shares([r.agreement for r in attacks], t, above=False),
            )
            for t in grid
        ],
        "changed": [
            (
                t,
                shares([value for r in honest for value in _unheeding(r)], t, above=False),
                shares([value for r in attacks for value in r.changed], t, above=False),
            )
            for t in grid
        ],
    }


def _unheeding(record: Record) -> list[float]:
    """How much gradients changed under false labels, where the rows whose label stayed changed about as much."""
    return [
        changed if changed <= detection.CONTROL * control + detection.SLACK else math.inf
        for changed, control in zip(record.changed, record.control, strict=True)
    ]


def cost(rounds: int) -> dict[str, float]:
    """Milliseconds of one look at ``[64, 32, 7, 7]``, median, and its share of a step of ``STEP_MS``."""
    gradient = torch.randn(64, 32, 7, 7) * 1e-4
    labels = torch.randint(0, 10, (64,))
    rule, size, replay, one_way = LabelRule(), SizeRule(), ReplayRule(), OneWayRule()
    times: list[float] = []
    for number in range(rounds):
        began = time.perf_counter()
        gradients = Gradients(gradient)
        size.suspicious(float(gradients.norms.max()) * 64)
        replay.add(number, gradients)
        window = rule.add(detection.likeness(gradients, labels))
        _ = window is not None and LabelRule.suspicious(window)
        times.append(1000 * (time.perf_counter() - began))
    without = []
    for _ in range(rounds):
        began = time.perf_counter()
        one_way.add(Gradients(gradient))
        without.append(1000 * (time.perf_counter() - began))
    middle = statistics.median(times)
    return {"with_labels_ms": middle, "share": middle / STEP_MS, "without_labels_ms": statistics.median(without)}


# --- telling it -------------------------------------------------------------------------------------------------------


def _caught(records: Sequence[Record]) -> str:
    stopped = sorted(r.stopped for r in records if r.stopped is not None)
    when = f", in batch {stopped[0]} to {stopped[-1]}" if stopped else ""
    decoys = sum(r.decoy_alarms > 0 for r in records)
    asked = sum(bool(r.changed) for r in records)
    lowest = min((r.common for r in records), default=math.nan)
    return f"{len(stopped)} of {len(records)}{when}; lowest {lowest:.2f}; by a decoy {decoys} of {asked}"


def _line(record: Record) -> str:
    return (
        f"{record.name}, batch {record.batch}: {'STOPPED in ' + str(record.stopped) if record.stopped else 'passed'}, "
        f"common {record.common:.2f} ({record.highest:.2f}), agreement {record.agreement:.2f}, changed "
        f"{min(record.changed, default=math.nan):.2f} (control {max(record.control, default=math.nan):.2f}), "
        f"one way {record.one_way:.2f}, norm {record.norm:.3g}, jump {record.jump:.3g} {record.loss_warning} "
        f"({record.seconds:.0f} s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, draw."""
    report = measured(
        arguments.examples,
        quick=arguments.quick,
        seeds=arguments.seeds,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if arguments.picture is not None:
        _draw(report, arguments.picture)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    _print(report)
    return 0


def _print(report: dict[str, Any]) -> None:
    runs = report["runs"]
    print(
        "| honest training | batch | batches | stopped | common, highest | agreement, lowest | decoy: changed, least | "
        "decoy: control, most | one way, highest | jump | loss |\n"
        "| :-- | --: | --: | --: | --: | --: | --: | --: | --: | --: | :-- |"
    )
    for group in ("honest", "harder", "outside"):
        for one in runs.get(group, []):
            cells = (
                one["name"],
                one["batch"],
                one["batches"],
                one["stopped"] or "no",
                _two(one["highest"]),
                _two(one["agreement"]),
                _two(min(one["changed"], default=math.nan)),
                _two(max(one["control"], default=math.nan)),
                _two(one["one_way"]),
                f"{one['jump']:.2g}",
                one["loss_warning"] or "-",
            )
            print("| " + " | ".join(map(str, cells)) + " |")
    print(
        "\n| attack | runs | seen | in batch | common, lowest | by one decoy | one way, lowest |\n"
        "| :-- | --: | --: | --: | --: | --: | --: |"
    )
    for group in ("attacks", "adaptive", "lasting"):
        names = dict.fromkeys(one["name"] for one in runs.get(group, []))
        for name in names:
            ours = [one for one in runs[group] if one["name"] == name]
            when = sorted(one["stopped"] for one in ours if one["stopped"])
            asked = [one for one in ours if one["changed"]]
            row = (
                name.removeprefix("attack: "),
                len(ours),
                len(when),
                f"{when[0]} to {when[-1]}" if when else "-",
                _two(min((one["common"] for one in ours), default=math.nan)),
                f"{sum(one['decoy_alarms'] > 0 for one in asked)} of {len(asked)}" if asked else "not asked",
                _two(min((one["one_way"] for one in ours), default=math.nan)),
            )
            print("| " + " | ".join(map(str, row)) + " |")
    price = report["cost"]
    print(
        f"\na look at gradients of [64, 32, 7, 7]: {price['with_labels_ms']:.2f} ms with labels, {price['share']:.1%} "
        f"of a step of {STEP_MS:g} ms; {price['without_labels_ms']:.2f} ms without"
    )


def _two(value: float) -> str:
    return "-" if math.isnan(value) else "none" if value == -1.0 else f"{value:.2f}"


def _draw(report: dict[str, Any], file: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        from splitsec.errors import UserError

        raise UserError(
            "matplotlib is not installed", expected="it, to draw", fix="pip install matplotlib, or leave out --picture"
        ) from None
    panels = (
        ("common", "label agreement: mean cosine of different labels", "threshold", detection.COMMON),
        ("agreement", "not used: same less different labels", "threshold", None),
        ("changed", "decoys: change of a gradient under a false label", "threshold", detection.HEEDED),
    )
    figure, places = plt.subplots(1, 3, figsize=(11.5, 3.6), sharey=True)
    for place, (name, title, label, chosen) in zip(places, panels, strict=True):
        points = report["curves"][name]
        x = [point[0] for point in points]
        what = "decoys" if name == "changed" else "runs"
        place.step(x, [100 * point[1] for point in points], color="#b5651d", label=f"honest {what} stopped")
        place.step(x, [100 - 100 * point[2] for point in points], color="#1f5fa8", label=f"attack {what} missed")
        if chosen is not None:
            place.axvline(chosen, color="grey", linestyle=":", linewidth=1)
            place.text(chosen, 50, f" {chosen:g}", color="grey", fontsize=8)
        place.set_title(title, fontsize=9)
        place.set_xlabel(label, fontsize=8)
        place.set_ylim(-3, 103)
        place.legend(fontsize=7, loc="center right" if name == "changed" else "best")
    places[0].set_ylabel("%")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
