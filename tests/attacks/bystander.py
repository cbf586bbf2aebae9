"""A small folder of images, and an attack of an honest server on it: trained in this process, judged by its own judge.

Here: ``write``, ``attacked``.  Images are 8 by 8, one blob each; its class is which way it is long.  Two clinics take
turns.  Not here: the training (``in_process``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from splitsec.attacks.arena import Aim, Fought, Ground
from splitsec.attacks.attack import CutAttack, Judgement, Truth
from splitsec.attacks.strategy import Loot, Scene, Strategy, bounds
from splitsec.samples import seed_of
from tests.attacks.in_process import World, open_world, scene_of, train

GRAPH = """\
splitsec: 1
name: blobs
parties:
  clinic-a: {}
  clinic-b: {}
  server: {listen: "tcp://0.0.0.0:7400", address: "tcp://server.example.org:7400"}
groups:
  clinics: {members: [clinic-a, clinic-b], schedule: round_robin}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [8, 4, 4], dtype: float32}
labels:
  - {from: clinics, to: trunk, field: y, shape: [], dtype: int64}
training: {epochs: 6, batch_size: 16, seed: 7}
"""

MODELS = """\
from torch import nn

def stem():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))

def trunk():
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
"""

DATA = """\
import torch

def blobs(count, seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (count,), generator=g)
    middle = 2 + 3 * torch.rand(count, 2, generator=g)
    wide = torch.tensor([[0.8, 2.2], [2.2, 0.8], [1.2, 1.2]])[y]
    at = torch.arange(8.0)
    far = lambda k: ((at[None] - middle[:, k : k + 1]) / wide[:, k : k + 1]) ** 2
    x = torch.exp(-(far(0)[:, :, None] + far(1)[:, None, :]) / 2)
    return {"x": x[:, None], "y": y}

def train(site):
    return blobs(128, site)

def test(site):
    return blobs(48, 10 + site)

def public():
    return blobs(256, 20)
"""

SERVER = """\
party: server
segments:
  trunk: {model: "models:trunk", optimizer: {name: adam, lr: 0.005}}
"""

CLINIC = """\
party: NAME
segments:
  stem: {model: "models:stem", optimizer: {name: adam, lr: 0.001}}
data: {train: "data:train", test: "data:test", args: {site: SITE}}
"""


def write(folder: Path, *changes: tuple[str, str]) -> Path:
    """The folder, with ``changes`` (old, new) made to its graph."""
    parties = folder / "parties"
    parties.mkdir(parents=True)
    graph = GRAPH
    for old, new in changes:
        assert old in graph
        graph = graph.replace(old, new)
    (folder / "graph.yaml").write_text(graph)
    (parties / "models.py").write_text(MODELS)
    (parties / "data.py").write_text(DATA)
    (parties / "server.yaml").write_text(SERVER)
    for site, name in enumerate(("clinic-a", "clinic-b")):
        (parties / f"{name}.yaml").write_text(CLINIC.replace("NAME", name).replace("SITE", str(site)))
    return folder


@dataclass
class Bout:
    """One attack before its loot, with all that its judge needs."""

    ground: Ground
    attack: CutAttack
    aim: Aim
    world: World
    scene: Scene
    strategy: Strategy
    place: Path

    @property
    def truth(self) -> Truth:
        return Truth(self.ground, self.aim, self.world.folder.graph)

    def judge(self, loot: Loot) -> Judgement:
        for party, segments in self.world.segments.items():
            (self.place / "out" / party).mkdir(parents=True, exist_ok=True)
            for name, segment in segments.items():
                save_file(segment.weights(), self.place / "out" / party / f"{name}.safetensors")
        loots = {self.aim.attacker: loot}
        fought = Fought(self.world.folder.graph, {}, {}, loots, self.place, {}, False, 0.0)
        return self.attack.judge(self.ground, self.aim, fought, self.truth)


@contextmanager
def attacked(
    folder: Path, attack: CutAttack, *, options: Mapping[str, Any] | None = None, trained: bool = True, **more: Any
) -> Iterator[Bout]:
    """``attack`` on ``folder``, after the training; ``more`` replaces what the scene has."""
    with Ground(folder) as ground:
        aim = attack.aim(ground)
        assert not isinstance(aim, str), aim
        world = open_world(folder)
        public = ground.public(aim)
        low, high = bounds(public["x"])
        given: dict[str, Any] = {
            "shape": aim.shape,
            "cut_shape": aim.cut_shape,
            "public": public,
            "low": low,
            "high": high,
            "architecture": architecture(world, aim) if attack.knows_architecture else None,
            "options": {**attack.options(ground), **(options or {})},
        }
        scene = scene_of(world, aim.attacker, aim.cut, **{**given, **more})
        strategy = attack.strategy_of(aim.attacker)(scene)
        if trained:
            train(world, {aim.attacker: strategy})
        yield Bout(ground, attack, aim, world, scene, strategy, ground.scratch / "place")


def architecture(world: World, aim: Aim) -> Any:
    """As the adversary's process gets it."""
    segment = aim.cut.partition(" -> ")[0]
    party = world.folder.parties[aim.victims[0]]
    code = party.segments[segment]

    def make() -> nn.Module:
        torch.manual_seed(seed_of("weights", world.folder.graph.training.seed, segment))
        made: nn.Module = party.function(code.model, "segments", segment, "model")(**code.args)
        return made

    return make


def weights(world: World) -> dict[str, torch.Tensor]:
    """Of all segments of all parties."""
    return {
        f"{party}/{segment.name}/{name}": copy.deepcopy(tensor)
        for party, segments in world.segments.items()
        for segment in segments.values()
        for name, tensor in segment.weights().items()
    }
