"""Feature-space hijacking against a small clinic with scikit-learn's 8 by 8 digits: it works, and what it must not do.

The sizes of the issue (MNIST-5k, 1,500 batches) are measured by ``examples/attacks``; here are seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from splitsec.attacks.arena import Aim, Fought, Ground
from splitsec.attacks.attack import Judgement, Truth
from splitsec.attacks.hijacking import (
    HONEST_BATCHES,
    MARGIN,
    AdaptiveHijacking,
    AdaptiveStrategy,
    Hijacking,
    HijackingStrategy,
    resized,
)
from splitsec.attacks.strategy import Loot, Scene, bounds
from splitsec.plan import Edge
from splitsec.privacy.detection import COMMON, SHARED, Gradients, LabelRule, answer, false_order, likeness
from splitsec.schedule import TRAIN, Turn
from tests.attacks.in_process import World, open_world, scene_of, train

GRAPH = """
splitsec: 1
name: digits
parties: {clinic: {}, server: {listen: "tcp://0.0.0.0:7400", address: "tcp://server.example.org:7400"}}
segments:
  stem: {at: clinic, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts: [{from: stem, to: trunk, shape: [16, 4, 4], dtype: float32}]
labels: [{from: clinic, to: trunk, field: y, shape: [], dtype: int64}]
training: {epochs: 1, batch_size: 50, seed: 7}
"""
CLINIC = """
party: clinic
segments: {stem: {model: "code:stem", optimizer: {name: adam, lr: 0.003}}}
data: {train: "code:train", test: "code:test"}
threads: 1
"""
SERVER = """
party: server
segments: {trunk: {model: "code:trunk", optimizer: {name: adam, lr: 0.003}}}
threads: 1
"""
CODE = """
import torch
from sklearn.datasets import load_digits
from torch import nn

def stem():
    return nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1))

def trunk():
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))

def digits(part):
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(5))[part]
    x = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    return {"x": x, "y": torch.tensor(found.target)[order].long()}

def train():
    return digits(slice(0, 800))

def test():
    return digits(slice(800, 900))

def public():
    return digits(slice(900, 1700))
"""
CUT = "stem -> trunk"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("digits")
    (path / "parties").mkdir()
    (path / "graph.yaml").write_text(GRAPH)
    (path / "parties" / "clinic.yaml").write_text(CLINIC)
    (path / "parties" / "server.yaml").write_text(SERVER)
    (path / "parties" / "code.py").write_text(CODE)
    return path


def public_samples() -> dict[str, torch.Tensor]:
    names: dict[str, Any] = {}
    exec(CODE, names)
    found: dict[str, torch.Tensor] = names["public"]()
    return found


def a_scene(world: World, **more: Any) -> Scene:
    public = public_samples()
    low, high = bounds(public["x"])
    given = {"shape": (1, 8, 8), "public": public, "low": low, "high": high, "options": {"decoder_rounds": 150}}
    return scene_of(world, "server", CUT, **{**given, **more})


class Wire:
    """What crosses the cut backwards, and what a clinic's detector makes of it."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def __call__(self, edge: Edge, gradient: torch.Tensor) -> torch.Tensor:
        self.gradients.append(gradient)
        return gradient


def labels_of(world: World, batch: int) -> torch.Tensor:
    steps = 800 // 50
    return world.field_of("y", (batch // steps, 0, batch % steps * 50), 50)


def alarm(world: World, wire: Wire) -> int | None:
    """The first batch at which label agreement goes off."""
    rule = LabelRule()
    for batch, gradient in enumerate(wire.gradients):
        seen = rule.add(likeness(Gradients(gradient), labels_of(world, batch)))
        if seen is not None and LabelRule.suspicious(seen):
            return batch + 1
    return None


def errors(world: World, scene: Scene, loot: Loot) -> tuple[float, float]:
    """Of what was recovered, and of the mean public sample in its place."""
    places = loot.tensors["places"].tolist()
    truth = torch.cat([world.field_of("x", (epoch, stream, position), 1) for epoch, stream, position in places])
    truth = scene.scaled(truth)
    mean = scene.scaled(scene.public["x"]).mean(0, keepdim=True).expand_as(truth)
    return float(functional.mse_loss(loot.tensors["recovered"], truth)), float(functional.mse_loss(mean, truth))


def fresh(folder: Path, kind: type[HijackingStrategy], batches: int, **options: Any) -> tuple[World, Scene, Loot, Wire]:
    world = open_world(folder, epochs=-(-batches // 16))
    scene = a_scene(world, options={"decoder_rounds": 150, **options})
    strategy, wire = kind(scene), Wire()
    train(world, {"server": strategy}, change=wire, batches=batches)
    return world, scene, strategy.loot(), wire


hijack = cache(fresh)
"""The same run for several tests; they change nothing of it."""


# --- the attack -------------------------------------------------------------------------------------------------------


@pytest.mark.threat("T111")
def test_it_redraws_the_clinics_images(folder: Path) -> None:
    world, scene, loot, wire = hijack(folder, HijackingStrategy, 300)
    mse, baseline = errors(world, scene, loot)
    assert len(loot.tensors["recovered"]) == 12 * 50 and loot.numbers["batches"] == 300
    assert mse < 0.4 * baseline
    assert loot.tensors["recovered"].abs().max() <= 1
    watched = loot.tensors["watched_batches"]
    assert sorted(set(watched.tolist())) == [1, 2, 5, 10, 20, 50, 100, 200, 300]
    by_batch = {}
    for batch in (1, 300):
        chosen = {name: loot.tensors[f"watched{name}"][watched == batch] for name in ("", "_places")}
        by_batch[batch] = errors(world, scene, Loot({"recovered": chosen[""], "places": chosen["_places"]}))[0]
    assert by_batch[300] < 0.5 * by_batch[1]
    assert [batch for batch, _ in loot.curves["distance"]] == [float(n) for n in range(1, 301)]
    assert (at := alarm(world, wire)) is not None and at <= 10


def test_a_learned_space_does_too(folder: Path) -> None:
    world, scene, loot, _ = hijack(folder, HijackingStrategy, 160, space="learned", decoder_rounds=250)
    mse, baseline = errors(world, scene, loot)
    assert mse < 0.75 * baseline


def test_what_it_sends_is_as_long_as_the_honest_gradient_and_seeded(folder: Path) -> None:
    honest = Wire()
    train(open_world(folder), {}, change=honest, batches=1)
    sent = [fresh(folder, HijackingStrategy, 3)[3].gradients for _ in range(2)]
    lengths = [float(one.flatten(1).norm(dim=1).mean()) for one in (honest.gradients[0], sent[0][0])]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)
    assert all(torch.equal(one, other) for one, other in zip(*sent, strict=True))
    assert not torch.allclose(honest.gradients[0], sent[0][0])


def test_lengths_where_there_is_no_honest_gradient() -> None:
    sent = resized(torch.ones(10, 4), torch.zeros(10, 4))
    assert float(sent.norm(dim=1).mean()) == pytest.approx(1 / 10)


@pytest.mark.threat("T110")
def test_who_leaves_early_leaves_little(folder: Path) -> None:
    world, scene, loot, _ = hijack(folder, HijackingStrategy, 3)
    mse, baseline = errors(world, scene, loot)
    assert len(loot.tensors["recovered"]) == 150 and mse > baseline
    nobody = HijackingStrategy(a_scene(world))
    nobody.take_over(open_world(folder).segments["server"])
    assert nobody.loot().tensors == {} and nobody.loot().numbers["batches"] == 0


def test_steps_without_training_are_answered_honestly(folder: Path) -> None:
    """An epoch's evaluation gives a score, from a segment that was trained on what came."""
    world, _, _, _ = hijack(folder, HijackingStrategy, 300)
    assert {phase for phase, _, _, _ in world.scores} == {"train", "evaluate"}
    assert world.accuracy() > 0.5


@pytest.mark.parametrize(
    ("shape", "cut"), [((30,), (16,)), ((1, 28, 28), (64,)), ((3, 16, 16), (8, 4, 4)), ((4, 9), (5, 6))], ids=str
)
def test_every_shape_gets_a_gradient(folder: Path, shape: tuple[int, ...], cut: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    world = open_world(folder)
    x = torch.rand(100, *shape)
    low, high = bounds(x)
    strategy = HijackingStrategy(a_scene(world, shape=shape, cut_shape=cut, public={"x": x}, low=low, high=high))
    for rows in (20, 20, 1):
        pulled = strategy.pull(torch.randn(rows, *cut))
        assert pulled.shape == (rows, *cut) and pulled.isfinite().all()
        assert float(pulled.flatten(1).norm(dim=1).mean()) == pytest.approx(1, rel=1e-4)


# --- one that knows the detectors -------------------------------------------------------------------------------------


@pytest.mark.threat("T112")
def test_it_begins_honestly_and_is_not_seen(folder: Path) -> None:
    honest = Wire()
    train(open_world(folder, epochs=8), {}, change=honest, batches=HONEST_BATCHES)
    world, scene, loot, wire = hijack(folder, AdaptiveStrategy, 300)
    for one, other in zip(honest.gradients, wire.gradients, strict=False):
        assert torch.equal(one, other)
    assert loot.numbers["began"] > HONEST_BATCHES
    assert alarm(world, wire) is None
    mse, baseline = errors(world, scene, loot)
    assert mse < 0.6 * baseline


@pytest.mark.threat("T46", "T112")
@pytest.mark.parametrize("way", ["mix", "centre"])
def test_every_way_stays_below_the_threshold(folder: Path, way: str) -> None:
    world, _, loot, wire = hijack(folder, AdaptiveStrategy, 120, evade=way)
    assert loot.numbers["began"] < 110
    for batch in range(loot.numbers["began"], 120):
        seen = likeness(Gradients(wire.gradients[batch]), labels_of(world, batch))
        assert seen is not None and (seen.common <= MARGIN * COMMON + 1e-3 or seen.share <= MARGIN * SHARED + 1e-3)
    assert alarm(world, wire) is None


@pytest.mark.parametrize(("way", "weight"), [("mix", 0.1), ("part", 0.4)])
def test_too_little_given_up_is_seen(folder: Path, way: str, weight: float) -> None:
    world, _, loot, wire = hijack(folder, AdaptiveStrategy, 120, evade=way, weight=weight)
    assert loot.numbers["weight"] == pytest.approx(weight)
    assert (at := alarm(world, wire)) is not None and loot.numbers["began"] <= at <= loot.numbers["began"] + 10


@pytest.mark.threat("T112")
def test_decoys_are_answered_honestly(folder: Path) -> None:
    """It tells false labels by its loss; and to the same rows with true ones it is honest too."""
    world = open_world(folder, epochs=10)
    strategy = AdaptiveStrategy(a_scene(world, options={"evade": "part", "weight": 0.3, "decoder_rounds": 20}))
    train(world, {"server": strategy}, batches=160)
    stem, trunk = world.segments["clinic"]["stem"].module, world.segments["server"]["trunk"]
    stage = world.plans["server"].streams[0].stages[0]
    x, y = (world.field_of(name, (0, 0, 0), 50) for name in ("x", "y"))
    sent = stem(x).detach()
    strategy.turn(Turn(TRAIN, 10, (0,)))

    def ask(labels: torch.Tensor, update: int, micro: int) -> torch.Tensor:
        trunk.forward(stage, [sent], labels, micro=micro, update=update, share=1.0)
        (back,) = trunk.backward(stage, {}, micro=micro)
        assert back is not None
        return back

    hijacked = ask(y, 161, 0)
    trunk.step()
    evaded = strategy.evaded
    order = false_order(y, torch.Generator().manual_seed(1))
    assert order is not None
    decoy = ask(y[order], 162, 0)
    trunk.hold()
    trunk.forget()
    again = ask(y, 162, 1)
    trunk.step()
    seen = answer(decoy, again, y[order] != y)
    assert seen is not None and seen.changed > 0.8
    assert strategy.evaded == evaded + 2
    other = ask(y, 163, 0)
    assert functional.cosine_similarity(again.flatten(), hijacked.flatten(), dim=0) < 0.5
    assert functional.cosine_similarity(other.flatten(), hijacked.flatten(), dim=0) > 0.5
    assert len(strategy.loot().tensors["places"]) == 150


# --- the judge --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ground(folder: Path) -> Iterator[Ground]:
    with Ground(folder) as made:
        yield made


def judged(ground: Ground, attack: Hijacking, loot: Loot, tmp_path: Path, **more: Any) -> Judgement:
    aim = attack.aim(ground)
    assert isinstance(aim, Aim)
    given: dict[str, Any] = {"events": {}, "failures": {}, "logs": {}, "stalled": False, "seconds": 1.0}
    fought = Fought(graph=ground.graph, loots={"server": loot}, place=tmp_path, **{**given, **more})
    return attack.judge(ground, aim, fought, Truth(ground, aim, ground.graph))


def test_the_judge_says_what_was_got(ground: Ground, folder: Path, tmp_path: Path) -> None:
    world, scene, loot, _ = hijack(folder, HijackingStrategy, 300)
    said = judged(ground, Hijacking(), loot, tmp_path)
    mse, baseline = errors(world, scene, loot)
    assert said.reconstruction_mse == pytest.approx(mse, rel=1e-4)
    assert said.baseline_mse == pytest.approx(baseline, rel=1e-2)
    assert said.verdict == "recovered"
    assert said.sentence.startswith("server redrew 600 images of clinic, with ")
    assert said.figures["accuracy of a reader"] > 3 * said.figures["accuracy of a reader, guessing"]
    assert said.figures["accuracy of the reader on originals"] > 0.8
    assert [len(row.row) for row in said.pictures] == [12, 12]
    (errors_seen, distances) = said.curves
    assert errors_seen.points[-1][1] < 0.5 * errors_seen.points[0][1] and len(distances.points) == 300


@pytest.mark.threat("T110")
def test_the_judge_says_when_it_is_nothing(ground: Ground, folder: Path, tmp_path: Path) -> None:
    _, _, loot, _ = hijack(folder, HijackingStrategy, 3)
    event = {"event": "alarm", "detector": "label agreement", "batch": 3, "text": "..."}
    said = judged(ground, Hijacking(), loot, tmp_path, events={"clinic": [event]})
    assert said.verdict == "nothing recovered"
    assert said.sentence == (
        "clinic left after 3 batches (label agreement); what server holds is no better than the average of the images "
        "that it had before."
    )
    nothing = judged(ground, Hijacking(), Loot(numbers={"batches": 0}), tmp_path)
    assert nothing.verdict == "nothing recovered" and nothing.reconstruction_mse is None
    assert nothing.sentence == "clinic left before server held anything."


def test_the_judge_of_the_adaptive_one_counts_what_it_did(ground: Ground, folder: Path, tmp_path: Path) -> None:
    _, _, loot, _ = hijack(folder, AdaptiveStrategy, 300)
    said = judged(ground, AdaptiveHijacking(), loot, tmp_path)
    assert said.figures["first hijacked batch"] == loot.numbers["began"]
    assert 0 < said.figures["given up to look honest"] < 1
