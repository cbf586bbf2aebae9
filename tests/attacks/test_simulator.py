"""The passive simulator on a small folder: honest answers, samples recovered with no architecture, and its critics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from splitsec.attacks.inversion import apart
from splitsec.attacks.simulator import Critic, Simulator, SimulatorStrategy, _Game, _labels
from splitsec.attacks.strategy import Loot
from tests.attacks.bystander import Bout, attacked, weights, write
from tests.attacks.in_process import open_world, train


@pytest.fixture(scope="module")
def bout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bout]:
    folder = write(tmp_path_factory.mktemp("simulator") / "blobs")
    with attacked(folder, Simulator(), options={"steps": 400}) as one:
        yield one


@pytest.fixture(scope="module")
def loot(bout: Bout) -> Loot:
    return bout.strategy.loot()


@pytest.mark.threat("T114")
def test_nobody_could_tell_it_from_an_honest_server(bout: Bout) -> None:
    ours, theirs = weights(bout.world), weights(train(open_world(bout.ground.folder.path), {}))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [score.loss for *_, score in bout.world.scores]


@pytest.mark.threat("T114")
def test_samples_are_recovered_with_shapes_alone(bout: Bout, loot: Loot) -> None:
    assert bout.scene.architecture is None
    judged = bout.judge(loot)
    assert judged.verdict == "recovered"
    assert judged.reconstruction_mse is not None and judged.baseline_mse is not None
    assert judged.reconstruction_mse < 0.4 * judged.baseline_mse
    assert [pictures.name for pictures in judged.pictures] == ["originals", "recovered"]
    (curve,) = judged.curves
    assert curve.points[-1][0] == 400 and curve.points[-1][1] < 0.5 * curve.points[0][1]
    truth = bout.scene.scaled(bout.truth.samples(loot.tensors["places"]))
    assert apart(loot.tensors["recovered"].roll(1, 0), truth) > 2 * apart(loot.tensors["recovered"], truth)


def test_a_critic_learns_what_is_real_and_teaches_whoever_imitates() -> None:
    torch.manual_seed(1)
    critic = Critic((2, 4, 4), 3, width=8)
    labels = torch.arange(30) % 3
    # Real ones carry their label in the brightness of the second channel: without labels both kinds look alike.
    bright = torch.rand(30, 2, 4, 4)
    real, false = bright.clone(), bright.clone()
    real[:, 1], false[:, 1] = labels.float().reshape(-1, 1, 1), ((labels + 1) % 3).float().reshape(-1, 1, 1)
    for _ in range(300):
        critic.learn(real, labels, false, labels)
    with torch.no_grad():
        taken = [float(critic.taken_for_real(one, labels)) for one in (real, false)]
    assert taken[0] < 0.1 < 2 < taken[1]


def test_who_is_judged_does_not_train_the_critic(bout: Bout) -> None:
    assert isinstance(bout.strategy, SimulatorStrategy)
    heard = bout.strategy.overheard()
    assert heard is not None
    torch.manual_seed(1)
    game = _Game(heard, bout.scene)
    rows = torch.arange(8)
    made = nn.Parameter(torch.randn(8, *bout.scene.cut_shape))
    loss = game.activations(rows, made, rows)
    critic = game._of_activations.module
    for parameter in critic.parameters():
        parameter.grad = None
    torch.autograd.backward(loss)
    assert made.grad is not None and float(made.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_labels_are_given_to_the_critic_where_they_are_classes(bout: Bout) -> None:
    assert isinstance(bout.strategy, SimulatorStrategy)
    heard = bout.strategy.overheard()
    assert heard is not None and heard.labels is not None
    theirs, ours, classes = _labels(heard, bout.scene)
    assert classes == 3 and theirs is not None and ours is not None
    assert torch.equal(theirs, heard.labels) and torch.equal(ours, bout.scene.public["y"])
    fractions = dataclasses.replace(heard, labels=heard.labels + 0.5)
    assert _labels(fractions, bout.scene) == (None, None, 0)
    assert _labels(dataclasses.replace(heard, labels=None), bout.scene) == (None, None, 0)
