"""Label inference against the vertical and the U-shaped example, in one process: it finds what is there, and says so
when it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from splitsec.attacks.arena import Aim, Fought, Ground
from splitsec.attacks.attack import Judgement, Truth
from splitsec.attacks.labels import (
    LabelInference,
    LabelStrategy,
    agreement,
    auc,
    clusters,
    dominant_direction,
    naming,
)
from splitsec.attacks.strategy import Loot
from splitsec.plan import Edge
from tests.attacks.in_process import World, open_world, scene_of, train
from tests.conftest import SOURCE

EXAMPLES = SOURCE / "examples"


def infer(
    example: str,
    party: str,
    cut: str,
    change: Callable[[Edge, torch.Tensor], torch.Tensor] | None = None,
    batches: int | None = None,
    **given: object,
) -> tuple[World, Loot]:
    options = given.pop("options", {"classes": 2, "rarer": 1})
    world = open_world(EXAMPLES / example, **given)
    strategy = LabelStrategy(scene_of(world, party, cut, options=options))
    train(world, {party: strategy}, change=change, batches=batches)
    return world, strategy.loot()


def hospital(**given: object) -> tuple[World, Loot]:
    return infer("vertical", "hospital", "size -> diagnosis", **given)  # type: ignore[arg-type]


def truth_of(world: World, loot: Loot) -> torch.Tensor:
    places = loot.tensors["places"]
    streams = places[:, 1].unique().tolist()
    parts = [world.field_of("y", (0, s, 0), int((places[:, 1] == s).sum())) for s in streams]
    return torch.cat(parts).flatten().long()


@pytest.mark.threat("T125")
@pytest.mark.parametrize("seed", [7, 8, 9])
def test_direction_tells_every_label_of_a_table_and_norm_and_matching_less(seed: int) -> None:
    world, loot = hospital(epochs=1, seed=seed)
    malignant = truth_of(world, loot) == 1
    assert auc(loot.tensors["direction"], malignant) > 0.99
    assert auc(loot.tensors["matching"], malignant) > 0.95
    assert auc(loot.tensors["norm"], malignant) > 0.6
    assert loot.numbers["batches"] == 13


def test_the_attacker_trains_what_an_honest_party_would_train() -> None:
    attacked, _ = hospital(epochs=2)
    honest = train(open_world(EXAMPLES / "vertical", epochs=2), {})
    for party, segments in honest.segments.items():
        for name, segment in segments.items():
            for tensor, other in zip(
                segment.weights().values(), attacked.segments[party][name].weights().values(), strict=True
            ):
                assert torch.equal(tensor, other)


@pytest.mark.threat("T125")
def test_several_epochs_gradients_of_one_sample_are_put_together() -> None:
    generator = torch.Generator().manual_seed(3)

    def noisy(edge: Edge, gradient: torch.Tensor) -> torch.Tensor:
        size = gradient.norm(dim=1).mean() / gradient.shape[1] ** 0.5
        return gradient + 4 * size * torch.randn(gradient.shape, generator=generator)

    world, loot = hospital(epochs=6, change=noisy)
    malignant = truth_of(world, loot) == 1
    single = auc(loot.tensors["by_epoch"][0], malignant)
    together = auc(loot.tensors["direction"], malignant)
    assert len(loot.tensors["by_epoch"]) == 6
    assert together > single + 0.05, (together, single)
    assert together > 0.9


def test_gradients_that_hold_no_labels_give_none_away() -> None:
    generator = torch.Generator().manual_seed(3)

    def noise(edge: Edge, gradient: torch.Tensor) -> torch.Tensor:
        return torch.randn(gradient.shape, generator=generator)

    world, loot = hospital(epochs=2, change=noise)
    malignant = truth_of(world, loot) == 1
    for way in ("direction", "matching", "norm"):
        assert 0.4 < auc(loot.tensors[way], malignant) < 0.6


@pytest.mark.threat("T115")
def test_a_u_shapes_server_sorts_images_by_label_without_seeing_one() -> None:
    world, loot = infer("u-shaped", "server", "trunk -> head", options={"classes": 10}, epochs=1)
    digits = truth_of(world, loot)
    assert len(digits) == 2500
    assert agreement(loot.tensors["direction"], digits) > 0.95
    assert agreement(loot.tensors["matching"], digits) > 0.4  # guessing: 0.13


@pytest.mark.parametrize(
    ("example", "attacker", "cut"),
    [
        ("vertical", "hospital", "size -> diagnosis"),
        ("u-shaped", "server", "trunk -> head"),
        ("multi-hop", "institute", "third -> fourth"),
        ("extended-vanilla", "scanner-upper", "upper -> joined"),
    ],
)
def test_it_aims_at_a_party_that_gets_gradients_and_no_labels(example: str, attacker: str, cut: str) -> None:
    with Ground(EXAMPLES / example) as ground:
        aim = LabelInference().aim(ground)
        assert isinstance(aim, Aim)
        assert (aim.attacker, aim.cut) == (attacker, cut)
        assert attacker not in aim.victims


@pytest.mark.parametrize("example", ["vanilla", "multi-task", "private"])
def test_where_the_graph_hands_the_labels_over_there_is_nothing_to_infer(example: str) -> None:
    with Ground(EXAMPLES / example) as ground:
        why = LabelInference().aim(ground)
    assert isinstance(why, str)
    assert "nothing to infer" in why


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Ground(EXAMPLES / "vertical") as opened:
        yield opened


def judged(ground: Ground, loot: Loot) -> Judgement:
    attack = LabelInference()
    aim = attack.aim(ground)
    assert isinstance(aim, Aim)
    fought = Fought(ground.graph, {}, {}, {aim.attacker: loot}, Path(), {}, stalled=False, seconds=0.0)
    return attack.judge(ground, aim, fought, Truth(ground, aim, ground.graph))


def test_the_judge_compares_with_the_registrys_own_labels(ground: Ground) -> None:
    _, loot = hospital(epochs=1)
    said = judged(ground, loot)
    assert said.verdict == "recovered"
    assert said.figures["auc_direction"] > 0.99
    assert said.figures["accuracy_direction"] > 0.99
    assert said.figures["accuracy_direction, guessing"] == pytest.approx(0.64)
    assert "knowing only which label is the rarer one" in said.sentence


def test_the_judge_is_not_taken_in_by_scores_of_nothing(ground: Ground) -> None:
    _, loot = hospital(epochs=1)
    for place, way in enumerate(("direction", "matching", "norm")):
        loot.tensors[way] = torch.randn(400, generator=torch.Generator().manual_seed(place))
    said = judged(ground, loot)
    assert said.verdict == "nothing recovered"
    assert said.figures["auc_direction"] < 0.6
    assert "no" in said.sentence


def test_an_attacker_that_heard_nothing_is_no_success(ground: Ground) -> None:
    assert judged(ground, Loot()).verdict == "stopped"


def test_area_under_the_curve_counts_pairs() -> None:
    scores = torch.tensor([0.1, 0.4, 0.4, 0.8])
    positive = torch.tensor([False, False, True, True])
    assert auc(scores, positive) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert auc(-scores, positive) == pytest.approx(0.5 / 4)
    assert auc(scores, torch.zeros(4, dtype=torch.bool)) == 0.5


def test_clusters_are_named_one_to_one_for_most_agreement() -> None:
    found = torch.tensor([0, 0, 0, 1, 1, 2])
    labels = torch.tensor([5, 5, 7, 5, 5, 9])
    assert naming(found, labels)[2] == 9
    assert agreement(found, labels) == pytest.approx(4 / 6)  # 0 -> 7, 1 -> 5 or 0 -> 5, 1 -> 7 would be 1 + 2 or 2 + 0
    many = torch.arange(20)
    assert agreement(many, (many + 3) % 20) == 1.0


def test_directions_of_known_rays() -> None:
    generator = torch.Generator().manual_seed(1)
    rays = torch.nn.functional.normalize(torch.randn(4, 12, generator=generator), dim=1)
    which = torch.randint(4, (200,), generator=generator)
    x = rays[which] + 0.05 * torch.randn(200, 12, generator=generator)
    assert agreement(clusters(x, 4, seed=1), which) == 1.0
    signs = torch.randint(2, (200,), generator=generator) * 2 - 1
    line = signs[:, None] * rays[0] + 0.05 * torch.randn(200, 12, generator=generator)
    assert abs(float(dominant_direction(line) @ rays[0])) > 0.99
