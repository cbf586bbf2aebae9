"""UnSplit on a small folder: samples and a clone of the segment from activations alone, with and without the seed."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from splitsec.attacks.inversion import apart, first_weights
from splitsec.attacks.strategy import Loot
from splitsec.attacks.unsplit import UnSplit, UnSplitStrategy, explain, implausible, stolen
from tests.attacks.bystander import Bout, attacked, weights, write
from tests.attacks.in_process import open_world, train

COUNT, ROUNDS = 32, 80


@pytest.fixture(scope="module")
def bout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bout]:
    folder = write(tmp_path_factory.mktemp("unsplit") / "blobs")
    with attacked(folder, UnSplit(), options={"samples": COUNT, "rounds": ROUNDS}) as one:
        yield one


@pytest.fixture(scope="module")
def loot(bout: Bout) -> Loot:
    return bout.strategy.loot()


def test_listening_changes_no_bit(bout: Bout) -> None:
    ours, theirs = weights(bout.world), weights(train(open_world(bout.ground.folder.path), {}))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.threat("T113")
def test_samples_are_recovered_without_any(bout: Bout, loot: Loot) -> None:
    judged = bout.judge(loot)
    assert judged.verdict == "recovered"
    assert judged.reconstruction_mse is not None and judged.baseline_mse is not None
    assert judged.reconstruction_mse < 0.4 * judged.baseline_mse
    assert judged.figures["error of the first batch of the run, nothing to learn"] < 0.3 * judged.baseline_mse
    assert loot.tensors["places"].shape == (COUNT, 3)
    truth = bout.scene.scaled(bout.truth.samples(loot.tensors["places"]))
    assert apart(loot.tensors["recovered"].roll(1, 0), truth) > 2 * apart(loot.tensors["recovered"], truth)


@pytest.mark.threat("T113")
def test_the_segment_is_stolen(bout: Bout, loot: Loot) -> None:
    figures = bout.judge(loot).figures
    assert figures["share of held-out samples answered alike with the stolen segment"] > 0.9
    explained = "variance of activations that the stolen segment does not explain"
    assert figures[explained] < 0.2
    assert figures[explained] < 0.5 * figures["the same, first weights and nothing learnt"]
    assert loot.tensors.keys() >= {"clone/0.weight", "clone/0.bias", "other/0.weight"}


def test_public_samples_are_not_looked_at(bout: Bout, loot: Loot) -> None:
    public = dict(bout.scene.public)
    try:
        bout.scene.public.clear()  # type: ignore[attr-defined]
        again = bout.strategy.loot()
    finally:
        bout.scene.public.update(public)  # type: ignore[attr-defined]
    assert torch.equal(again.tensors["recovered"], loot.tensors["recovered"])


def test_a_segment_that_does_not_learn_explains_less(bout: Bout) -> None:
    assert isinstance(bout.strategy, UnSplitStrategy)
    heard, known = bout.strategy.overheard(), first_weights(bout.scene)
    assert heard is not None and known is not None
    activations = heard.activations[-COUNT:]
    before = copy.deepcopy(known.state_dict())
    fixed = explain(known, activations, bout.scene, rounds=20, learn=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in known.state_dict().items())
    learnt = explain(known, activations, bout.scene, rounds=20)
    assert not torch.equal(before["0.weight"], known.state_dict()["0.weight"])
    assert learnt.unexplained < 0.6 * fixed.unexplained


def test_what_makes_a_sample_implausible() -> None:
    step = torch.zeros(1, 1, 4, 4)
    step[..., 2:] = 1
    assert float(implausible(step)) == pytest.approx(4 / 12)  # of 12 pairs beside each other, 4 differ by 1
    assert float(implausible(torch.full((2, 3), 2.0))) == 4


def test_a_copy_is_compared_by_answers_and_by_activations() -> None:
    real, same, other = (nn.Linear(4, 3) for _ in range(3))
    same.load_state_dict(real.state_dict())
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    exact = stolen(same, real, nn.Identity(), x)
    assert exact.agreement == 1 and exact.unexplained == 0
    with torch.no_grad():
        other.weight.copy_(-real.weight)
        other.bias.copy_(real.bias)
    wrong = stolen(other, real, None, x)
    assert wrong.agreement is None and wrong.unexplained > 1
