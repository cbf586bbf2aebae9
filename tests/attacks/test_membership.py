"""Membership inference on a small folder: the question is fair, and its answers are those of an attacker."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from splitsec.attacks.arena import Ground
from splitsec.attacks.inversion import first_weights
from splitsec.attacks.labels import auc
from splitsec.attacks.membership import (
    Membership,
    MembershipStrategy,
    advantage,
    candidates,
    features,
    matched,
    receiver_curve,
    shadow_models,
)
from splitsec.attacks.strategy import Loot
from tests.attacks.bystander import DATA, Bout, attacked, weights, write
from tests.attacks.in_process import open_world, train

STEPS = 300


@pytest.fixture(scope="module")
def bout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bout]:
    folder = write(tmp_path_factory.mktemp("membership") / "blobs")
    with attacked(folder, Membership(), options={"steps": STEPS}) as one:
        yield one


@pytest.fixture(scope="module")
def loot(bout: Bout) -> Loot:
    return bout.strategy.loot()


def test_listening_changes_no_bit(bout: Bout) -> None:
    ours, theirs = weights(bout.world), weights(train(open_world(bout.ground.folder.path), {}))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_candidates_are_as_many_of_each_kind_in_no_order(bout: Bout) -> None:
    samples, labels, member = candidates(bout.ground, bout.aim)
    assert len(samples) == len(member) == 192 and int(member.sum()) == 96  # the clinics keep 96 out of training
    assert labels is not None and labels.shape == (192,)
    held = {split: bout.truth.all(split) for split in ("train", "test")}
    for sample, inside in zip(samples, member.tolist(), strict=True):
        assert (held["train"] == sample).flatten(1).all(1).any() == inside
        assert (held["test"] == sample).flatten(1).all(1).any() != inside
    assert 30 < int(member[:96].sum()) < 66


@pytest.mark.threat("T116")
def test_members_are_recognised_by_their_activations(bout: Bout, loot: Loot) -> None:
    judged = bout.judge(loot)
    assert judged.figures["area under the curve, match"] > 0.65
    assert judged.figures["advantage, match"] > 0.15
    assert judged.verdict in ("partly recovered", "recovered")
    # As little as a network of six epochs has learnt by heart, and no more, is claimed for shadow models.
    assert 0.4 < judged.figures["area under the curve, shadow models"] < 0.65
    assert "hardly more than guessing" in judged.sentence
    assert judged.reconstruction_mse is None


def test_it_is_the_received_activations_that_tell(bout: Bout, loot: Loot) -> None:
    samples, _, member = candidates(bout.ground, bout.aim)
    real = bout.world.segments["clinic-b"]["stem"].module.eval()
    with torch.no_grad():
        made = real(samples)
        others = real(bout.scene.public["x"])
    assert auc(matched(made, loot.tensors["received"]), member) > 0.7  # with the segment itself
    assert abs(auc(matched(made, others), member) - 0.5) < 0.1  # where none of them was received


@pytest.mark.threat("T116")
def test_a_network_that_learnt_by_heart_gives_its_members_away(bout: Bout) -> None:
    """Labels that mean nothing can only be learnt by heart: shadow models tell, on samples that none of them saw."""
    chance = torch.Generator().manual_seed(3)
    x, y = torch.randn(400, 16, generator=chance), torch.randint(3, (400,), generator=chance)
    torch.manual_seed(4)
    segment, rest = nn.Sequential(nn.Linear(16, 64), nn.ReLU()), nn.Linear(64, 3)
    loss = nn.CrossEntropyLoss()
    public = {"x": x[:200], "y": y[:200]}
    weights_ = shadow_models(bout.scene, segment, rest, loss, public, shadows=3, epochs=150)

    victim = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))
    training = torch.optim.Adam(victim.parameters(), lr=1e-3)
    for _ in range(600):
        training.zero_grad()
        torch.autograd.backward(loss(victim(x[200:300]), y[200:300]))
        training.step()
    with torch.no_grad():
        seen = features(victim(x[200:]), y[200:])
    scores, member = seen @ weights_[:-1] + weights_[-1], torch.arange(200) < 100
    assert auc(scores, member) > 0.75


def test_public_samples_that_are_the_held_out_ones_are_spared(tmp_path: Path) -> None:
    folder = write(tmp_path / "blobs", ("epochs: 6", "epochs: 1"))
    (folder / "parties" / "data.py").write_text(DATA.replace("def public", "def unused"))
    with attacked(folder, Membership(), options={"steps": 60}) as bout:
        assert bout.scene.options["spared"] is True
        samples, _, member = candidates(bout.ground, bout.aim)
        used = bout.scene.public["x"][::2]
        assert int((~member).sum()) == 48
        for sample in samples[~member]:
            assert not (used == sample).flatten(1).all(1).any()
        seen: list[torch.Tensor] = []
        before = bout.scene.public["x"].clone()
        bout.scene.public["x"][1::2] = torch.nan  # type: ignore[index]
        loot = bout.strategy.loot()
        seen += [one for one in loot.tensors.values() if one.is_floating_point()]
        bout.scene.public["x"].copy_(before)  # type: ignore[attr-defined]
        assert all(torch.isfinite(one).all() for one in seen)  # what is spared was not touched


def test_who_kept_nothing_out_of_training_asks_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "blobs")
    for clinic in ("clinic-a", "clinic-b"):
        file = folder / "parties" / f"{clinic}.yaml"
        file.write_text(file.read_text().replace('test: "data:test", ', ""))
    with Ground(folder) as ground:
        assert "keep no samples out of training" in str(Membership().aim(ground))


def test_scores_come_from_a_shadow_that_begins_with_the_first_weights(bout: Bout, loot: Loot) -> None:
    assert isinstance(bout.strategy, MembershipStrategy)
    known = first_weights(bout.scene)
    assert known is not None
    moved = loot.tensors["segment/0.weight"] - known.state_dict()["0.weight"]
    assert 0 < float(moved.abs().max()) < 1
    trunk = bout.world.segments["server"]["trunk"].weights()
    assert all(torch.equal(loot.tensors[f"rest/{name}"], tensor) for name, tensor in trunk.items())


def test_features_are_of_the_right_label() -> None:
    scores = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    found = features(scores, torch.tensor([0, 0]))
    sure = torch.log_softmax(scores[0], 0)
    assert found[:, 0].tolist() == pytest.approx([float(sure[0]), float(sure[1])])
    assert found[:, 1].tolist() == pytest.approx([4, -4])
    assert found[:, 3].tolist() == [1, 0]
    logit = features(torch.tensor([[2.0], [2.0]]), torch.tensor([[1.0], [0.0]]))
    assert logit[:, 1].tolist() == pytest.approx([2, -2])


def test_advantage_is_nothing_by_chance_and_one_where_all_is_known() -> None:
    chance = torch.Generator().manual_seed(1)
    member = torch.rand(4000, generator=chance) < 0.5
    assert abs(advantage(torch.rand(4000, generator=chance), member)) < 0.05
    assert advantage(member.float(), member) == 1
    assert advantage(member.float() + 2 * torch.randn(4000, generator=chance), member) == pytest.approx(0.2, abs=0.06)


def test_the_receiver_curve_rises_from_none_to_all() -> None:
    chance = torch.Generator().manual_seed(1)
    member = torch.rand(1000, generator=chance) < 0.5
    points = receiver_curve(member + torch.randn(1000, generator=chance), member)
    assert points[0] == (0, 0) and points[-1] == (1, 1)
    assert all(one[0] <= two[0] and one[1] <= two[1] for one, two in pairwise(points))
    assert max(found - others for others, found in points) == pytest.approx(0.38, abs=0.06)


def test_a_match_is_nearer_than_any_other() -> None:
    received = torch.eye(4) * 10
    made = torch.stack([received[2], (received[0] + received[1]) / 2])
    found = matched(made, received)
    assert found[0] == pytest.approx(1, abs=1e-3) and found[1] == pytest.approx(0, abs=1e-3)
