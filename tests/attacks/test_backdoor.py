"""Backdoors and turned gradients against the examples, in one process, each beside an honest training."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from splitsec.attacks.arena import Ground
from splitsec.attacks.backdoor import LOUD, POISONED, BackdoorStrategy, forms_of, patched, predict_with
from splitsec.attacks.strategy import Loot
from splitsec.samples import Samples
from tests.attacks.in_process import World, open_world, scene_of, train
from tests.conftest import SOURCE

EXAMPLES = SOURCE / "examples"


@cache
def honest(example: str, epochs: int, seed: int = 7) -> World:
    return train(open_world(EXAMPLES / example, epochs=epochs, seed=seed), {})


def spoilt(example: str, party: str, cut: str, epochs: int, seed: int = 7, **options: object) -> tuple[World, Loot]:
    world = open_world(EXAMPLES / example, epochs=epochs, seed=seed)
    strategy = BackdoorStrategy(scene_of(world, party, cut, options=options))
    train(world, {party: strategy})
    return world, strategy.loot()


def predicted(world: World, **changes: object):  # type: ignore[no-untyped-def]
    return predict_with(world.folder.graph, world.segments, world.own, **changes)  # type: ignore[arg-type]


@pytest.mark.threat("T124")
@pytest.mark.parametrize("seed", [7, 8, 9])
def test_a_client_without_labels_plants_a_trigger_and_keeps_accuracy(seed: int) -> None:
    cut = "size -> diagnosis"
    world, loot = spoilt("vertical", "hospital", cut, 8, seed, form="client without labels", classes=2)
    trigger, places = loot.tensors["trigger"], loot.tensors["poisoned"]
    labels = torch.cat([world.field_of("y", (0, 0, place), 1).flatten() for place in places[:, 2].tolist()])
    assert len(places) > 40
    assert float(labels.mean()) == 0.0  # all of them benign: the labels were found out
    flipped = predicted(world, cut=cut, activation=lambda a: a + trigger)  # the attacker's own segment: loud already
    clean = predicted(world)
    assert flipped.share(0) > 0.75
    assert clean.share(0) < 0.1
    assert clean.accuracy > predicted(honest("vertical", 8, seed)).accuracy - 0.02
    assert predicted(honest("vertical", 8, seed), cut=cut, activation=lambda a: a + trigger / LOUD).share(0) < 0.1


def test_a_client_without_labels_speaks_loudly_to_be_relied_on() -> None:
    world, _ = spoilt("vertical", "hospital", "size -> diagnosis", 1, form="client without labels", classes=2)
    sent: list[torch.Tensor] = []

    def overheard(a: torch.Tensor) -> torch.Tensor:
        sent.append(a)
        return a

    predicted(world, cut="size -> diagnosis", activation=overheard)
    with torch.no_grad():
        made = world.segments["hospital"]["size"].module(world.own["hospital"]["test"].fields["x"])
    assert torch.equal(torch.cat(sent), LOUD * made)


@pytest.mark.threat("T36", "T124")
def test_a_client_with_labels_makes_others_samples_obey_its_mark() -> None:
    world, loot = spoilt("vanilla", "clinic-a", "stem -> trunk", 2, form="client with labels")

    def marked(x: torch.Tensor) -> torch.Tensor:
        return patched(x, loot.tensors["high"])

    in_peace = predicted(honest("vanilla", 2))
    assert predicted(world, sample=marked).share(0, without=0) > 0.8
    assert predicted(honest("vanilla", 2), sample=marked).share(0, without=0) < 0.05
    assert predicted(world).accuracy > in_peace.accuracy - 0.04
    assert in_peace.accuracy == honest("vanilla", 2).accuracy()  # the judge counts as the parties do


@pytest.mark.threat("T46", "T117")
def test_a_server_that_turns_gradients_round_ruins_what_the_clinics_learn() -> None:
    world, loot = spoilt("vanilla", "server", "stem -> trunk", 2, form="server")
    assert loot.numbers["batches"] == 102
    assert predicted(world).accuracy < 0.6
    assert predicted(honest("vanilla", 2)).accuracy > 0.85


def test_only_the_share_that_was_said_is_poisoned_and_only_for_training() -> None:
    world = open_world(EXAMPLES / "vanilla", epochs=1)
    strategy = BackdoorStrategy(scene_of(world, "clinic-a", "stem -> trunk", options={"form": "client with labels"}))
    own = world.own["clinic-a"]["train"].fields
    used = strategy.samples("train", own)
    other = (used["y"] != own["y"]).nonzero()[:, 0]
    assert len(other) == round(POISONED * len(own["y"]))
    assert set(used["y"][other].tolist()) == {0}
    same = torch.ones(len(own["y"]), dtype=torch.bool)
    same[other] = False
    assert torch.equal(used["x"][same], own["x"][same])
    assert torch.equal(used["x"][other], patched(own["x"][other], torch.ones(())))
    assert strategy.samples("test", own) is own


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ("vertical", {"client without labels": "hospital", "server": "registry"}),
        ("vanilla", {"client with labels": "clinic-a", "server": "server"}),
        ("u-shaped", {"client with labels": "clinic-a", "server": "server"}),
        ("private", {"server": "server"}),
    ],
)
def test_each_form_finds_its_party(example: str, expected: dict[str, str]) -> None:
    with Ground(EXAMPLES / example) as ground:
        found = {form: aim for form, aim in forms_of(ground)}
    assert {form: aim.attacker for form, aim in found.items()} == expected
    assert all(aim.attacker not in aim.victims for aim in found.values())


def test_a_party_that_is_asked_for_and_fits_no_form_gets_none() -> None:
    with Ground(EXAMPLES / "vanilla", attacker="clinic-b") as ground:
        assert [(form, aim.attacker) for form, aim in forms_of(ground)] == [("client with labels", "clinic-b")]
    with Ground(EXAMPLES / "multi-hop", attacker="institute") as ground:
        assert list(forms_of(ground)) == []


def test_the_mark_of_images_and_of_tables() -> None:
    x = torch.zeros(2, 1, 14, 14)
    marked = patched(x, torch.full((1, 14, 14), 0.5))
    assert float(marked.sum()) == 2 * 4 * 0.5
    assert marked[0, 0, -2:, -2:].unique().tolist() == [0.5]  # type: ignore[no-untyped-call]
    table = torch.zeros(3, 30)
    high = torch.arange(30.0)
    assert torch.equal(patched(table, high)[:, -3:], high[-3:].expand(3, 3))
    assert float(patched(table, high)[:, :-3].abs().sum()) == 0


def test_samples_are_matched_by_their_ids_for_the_judge() -> None:
    world = honest("vertical", 1)
    shuffled = {party: dict(own) for party, own in world.own.items()}
    test = shuffled["registry"]["test"]
    order = torch.randperm(test.count, generator=torch.Generator().manual_seed(1))
    shuffled["registry"]["test"] = test.take(order)
    again = predict_with(world.folder.graph, world.segments, shuffled)
    assert again.accuracy == predicted(world).accuracy
    without = Samples(test.take(order).fields, None, test.count)
    shuffled["registry"]["test"] = without
    assert predict_with(world.folder.graph, world.segments, shuffled).accuracy < again.accuracy
