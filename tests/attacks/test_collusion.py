"""The server with a clinic against the other clinics, in one process: they see what neither sees alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from splitsec.attacks import collusion
from splitsec.attacks.arena import Aim, Fought, Ground
from splitsec.attacks.attack import Truth, mean_error
from splitsec.attacks.collusion import Collusion, CollusionStrategy, put_together, stem_at
from splitsec.attacks.strategy import Loot
from splitsec.segments import build_segments
from tests.attacks.in_process import World, open_world, scene_of, train
from tests.conftest import SOURCE

EXAMPLES = SOURCE / "examples"
CUT = "stem -> trunk"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much work as it takes to tell right from wrong."""
    monkeypatch.setattr(collusion, "ROWS", 50)
    monkeypatch.setattr(collusion, "DECODER_STEPS", 200)
    monkeypatch.setattr(collusion, "SEARCH_STEPS", 100)


@cache
def colluded() -> tuple[World, Loot, Loot]:
    world = open_world(EXAMPLES / "vanilla", epochs=2)
    server, clinic = (CollusionStrategy(scene_of(world, name, CUT)) for name in ("server", "clinic-a"))
    train(world, {"server": server, "clinic-a": clinic})
    return world, server.loot(), clinic.loot()


def errors(server: Loot, clinic: Loot, **more: Any) -> tuple[float, float, float]:
    """Of the search, of the decoder alone, and of the mean sample."""
    world, _, _ = colluded()
    stem = build_segments(world.folder.graph, world.folder.parties["clinic-a"])["stem"].module
    got = put_together(server, clinic, stem, stream=0, batch=50, seed=1, **more)
    assert set(got.places[:, 1].tolist()) <= {1, 2}  # other clinics' alone
    truth = torch.cat([world.field_of("x", (epoch, s, row), 1) for epoch, s, row in got.places.tolist()])
    own = clinic.tensors["own"]
    return (
        mean_error(got.samples, truth, own),
        mean_error(got.decoded, truth, own),
        mean_error(own.mean(0).expand_as(truth), truth, own),
    )


@pytest.mark.threat("T128")
def test_a_clinics_stem_opens_what_the_others_sent() -> None:
    _, server, clinic = colluded()
    searched, decoded, mean = errors(server, clinic)
    assert searched < 0.01
    assert searched < decoded < 0.06
    assert mean > 0.2


@pytest.mark.threat("T128")
def test_a_stem_of_first_weights_opens_nothing() -> None:
    world, server, clinic = colluded()
    fresh = build_segments(world.folder.graph, world.folder.parties["clinic-a"])["stem"].weights()
    wrong = Loot({"own": clinic.tensors["own"]})
    wrong.tensors |= {f"{when}/{name}": one for when in ("before", "after", "final") for name, one in fresh.items()}
    searched, _, mean = errors(server, wrong)
    assert searched > mean


def test_the_clinic_knows_the_stem_at_both_ends_of_what_it_does_not_see() -> None:
    world, server, clinic = colluded()
    places = server.tensors["places"]
    assert set(places[:, 0].tolist()) == {1}  # the last epoch
    stem = world.segments["clinic-c"]["stem"].weights()
    at_the_end = stem_at(clinic, len(places), (0, 834), len(places))
    for name, tensor in stem.items():
        assert torch.equal(at_the_end[name], tensor)
    first = build_segments(world.folder.graph, world.folder.parties["clinic-a"])["stem"].weights()
    began = stem_at(clinic, 0, (834, 1667), len(places))
    assert not any(torch.equal(began[name], tensor) for name, tensor in first.items())  # an epoch later than those
    between = stem_at(clinic, 1667, (0, 834), 2500)
    for name in stem:
        after, last = clinic.tensors[f"after/{name}"], clinic.tensors[f"final/{name}"]
        assert torch.allclose(between[name], (after + last) / 2, atol=1e-6)
        assert not torch.equal(after, last)


def test_a_linear_stem_is_opened_exactly() -> None:
    stem = nn.Linear(6, 12)
    generator = torch.Generator().manual_seed(1)
    own, theirs = torch.rand(80, 6, generator=generator), 0.1 + 0.8 * torch.rand(40, 6, generator=generator)
    tensors = {
        f"{when}/{name}": one for when in ("before", "after", "final") for name, one in stem.state_dict().items()
    }
    places = torch.tensor([(0, stream, row) for stream in (0, 1) for row in range(40)])
    sent = torch.cat([own[:40], theirs])
    server = Loot({"activations": stem(sent).detach(), "places": places})
    got = put_together(server, Loot({**tensors, "own": own}), nn.Linear(6, 12), stream=0, batch=20, seed=1)
    where = got.places[:, 2]
    assert sorted(where.tolist()) == list(range(40))
    assert float((got.samples - theirs[where]).abs().max()) < 0.02


@pytest.mark.parametrize(
    ("example", "attacker", "clinic", "victims"),
    [
        ("vanilla", "server", "clinic-a", ("clinic-b", "clinic-c")),
        ("u-shaped", "server", "clinic-a", ("clinic-b",)),
        ("onion", "server", "clinic-a", ("clinic-b", "clinic-c")),
    ],
)
def test_it_aims_at_the_clinics_that_stay_honest(
    example: str, attacker: str, clinic: str, victims: tuple[str, ...]
) -> None:
    attack = Collusion()
    with Ground(EXAMPLES / example) as ground:
        aim = attack.aim(ground)
        assert isinstance(aim, Aim)
        assert (aim.attacker, aim.victims, attack._clinic(ground, aim)) == (attacker, victims, clinic)
    with Ground(EXAMPLES / example, attacker="clinic-b") as ground:
        aim = attack.aim(ground)
        assert isinstance(aim, Aim)
        assert "clinic-b" not in aim.victims
        assert attack._clinic(ground, aim) == "clinic-b"


@pytest.mark.parametrize("example", ["vertical", "multi-hop", "private"])
def test_where_nobody_shares_a_segment_there_is_nothing_to_put_together(example: str) -> None:
    with Ground(EXAMPLES / example) as ground:
        why = Collusion().aim(ground)
    assert isinstance(why, str)
    assert "nobody here has the same segment" in why


def test_the_judge_compares_with_the_others_own_samples() -> None:
    _, server, clinic = colluded()
    attack = Collusion()
    with Ground(EXAMPLES / "onion") as ground:  # the network of vanilla, with relays
        aim = attack.aim(ground)
        assert isinstance(aim, Aim)
        fought = Fought(
            ground.graph, {}, {}, {"server": server, "clinic-a": clinic}, EXAMPLES, {}, stalled=False, seconds=0.0
        )
        said = attack.judge(ground, aim, fought, Truth(ground, aim, ground.graph))
        assert said.verdict == "recovered"
        assert said.reconstruction_mse is not None and said.reconstruction_mse < 0.02
        assert "A relay that joins them adds nothing" in said.sentence
        assert [len(one.row) for one in said.pictures] == [12, 12]
        nothing = replace(fought, loots={"server": Loot(), "clinic-a": Loot()})
        assert attack.judge(ground, aim, nothing, Truth(ground, aim, ground.graph)).verdict == "stopped"
