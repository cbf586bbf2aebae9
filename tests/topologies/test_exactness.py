"""Training across processes equals training in one process, to the last bit, whatever the graph.

Here: each folder of graphs/ run as a user would (one process per party, real sockets), and beside it the same network
in plain PyTorch: one ``nn.Module``, one backward pass through all of it, one optimizer.  The plain half uses nothing of
splitsec; it shares with the graph only the institutions' own models.py and data.py, and derives seeds, the order of
samples and micro-batches again from the rules of docs/protocol.md.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from splitsec.simulation import predict, simulate

GRAPHS = Path(__file__).parent / "graphs"


# --- the rules of docs/protocol.md, written out again


def seed_of(*names: object) -> int:
    text = "/".join(["splitsec", *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def order_of(count: int, seed: int, epoch: int, member: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of("order", seed, epoch, member)))


# --- one process


Fields = Mapping[str, Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def load(folder: str, name: str) -> ModuleType:
    """The institutions' own module ``name``."""
    spec = importlib.util.spec_from_file_location(f"plain_{folder}_{name}", GRAPHS / folder / "parties" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Loss(NamedTuple):
    criterion: Callable[[Tensor, Tensor], Tensor]
    labels: str
    weight: float = 1.0


class Plain(nn.Module):
    """A network in one process.  A subclass says what it is made of and composes it in ``forward``."""

    folder: ClassVar[str]
    epochs = 2
    batch = 8
    seed: int
    drop_last = False
    rounds: ClassVar[tuple[tuple[int, ...], ...]] = ((0,),)
    """The turns of an epoch: the members whose batches make up its steps."""
    places: ClassVar[Mapping[str, tuple[str, ...]]]
    """Each part of the network, and as which PARTY/SEGMENT the graph has it; several of them end with equal weights."""
    losses: ClassVar[Mapping[str, Loss]]
    """The loss on each output; the output is called after the part that makes it."""

    def __init__(self, *, seed: int | None = None, micro_batches: int = 1) -> None:
        super().__init__()
        self.seed = seed if seed is not None else self.seed
        self.micro_batches = micro_batches
        self.now = (0, 0)
        self.models, self.data = load(self.folder, "models"), load(self.folder, "data")
        self.parts = nn.ModuleDict({name: self.grow(held[0].split("/")[1]) for name, held in self.places.items()})

    def grow(self, segment: str) -> nn.Module:
        """A module whose weights, and what its dropout drops, are drawn by the name of its segment."""
        torch.manual_seed(seed_of("weights", self.seed, segment))
        module: nn.Module = getattr(self.models, segment.replace("-", "_"))()

        def draw(module: nn.Module, inputs: object) -> None:
            if module.training:
                torch.default_generator.manual_seed(seed_of("forward", self.seed, segment, *self.now))

        module.register_forward_pre_hook(draw)
        return module

    def samples(self, split: str) -> list[Fields]:
        """Each member's samples: the fields of all who hold some of them, in the order of the party that leads."""
        return [getattr(self.data, split)()]

    def ids(self, split: str) -> list[list[str]]:
        """Each member's sample ids, in the same order; numbers of rows where it gives none."""
        return [[str(row) for row in range(size(one))] for one in self.samples(split)]

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        raise NotImplementedError

    def loss(self, name: str, outputs: Mapping[str, Tensor], fields: Fields) -> Tensor:
        return self.losses[name].criterion(outputs[name], fields[self.losses[name].labels])

    def fit(self, make_optimizer: MakeOptimizer) -> tuple[list[float], list[float]]:
        """Train; returns the mean loss of each epoch over training samples and, after it, over test samples."""
        train_loss, eval_loss = [], []
        samples = self.samples("train")
        optimizer = make_optimizer(self.parameters())
        step = 0
        for epoch in range(self.epochs):
            self.train()
            mean = Mean(self.losses)
            orders = [order_of(size(one), self.seed, epoch, member) for member, one in enumerate(samples)]
            for members in self.rounds:
                for micro_batches in self.steps(orders, members, drop_last=self.drop_last):
                    rows = sum(len(chosen) for _, chosen in micro_batches)
                    for number, (member, chosen) in enumerate(micro_batches):
                        self.now = (step, number)
                        fields = {name: field[chosen] for name, field in samples[member].items()}
                        outputs = self(member, fields)
                        losses = {name: self.loss(name, outputs, fields) for name in self.losses}
                        share = len(chosen) / rows
                        total = sum(loss * (self.losses[name].weight * share) for name, loss in losses.items())
                        assert isinstance(total, Tensor)
                        total.backward()  # type: ignore[no-untyped-call]
                        mean.add(losses, len(chosen))
                    optimizer.step()
                    optimizer.zero_grad()
                    step += 1
            train_loss.append(mean.value)
            looked_at = type(self)(
                seed=self.seed, micro_batches=self.micro_batches
            )  # what is trained is never evaluated
            looked_at.load_state_dict(self.state_dict())
            eval_loss.append(looked_at.evaluate())
        return train_loss, eval_loss

    def steps(
        self, orders: list[Tensor], members: tuple[int, ...], *, drop_last: bool
    ) -> Iterator[list[tuple[int, Tensor]]]:
        """The micro-batches of each step: whose samples, and which."""
        batches = {k: [rows for rows in torch.split(orders[k], self.batch) if len(rows)] for k in members}
        if drop_last:
            batches = {k: [rows for rows in found if len(rows) == self.batch] for k, found in batches.items()}
        for place in range(max(map(len, batches.values()))):
            yield [
                (k, part)
                for k in members
                if place < len(batches[k])
                for part in batches[k][place].tensor_split(self.micro_batches)
                if len(part)
            ]

    @torch.no_grad()
    def look(self, split: str) -> Iterator[tuple[int, Fields, dict[str, Tensor]]]:
        """Without training: each member's samples of ``split``, micro-batch by micro-batch, and what comes out."""
        self.eval()
        samples = self.samples(split)
        orders = [torch.arange(size(one)) for one in samples]
        for member, one in enumerate(samples):
            for micro_batches in self.steps(orders, (member,), drop_last=False):
                for _, chosen in micro_batches:
                    fields = {name: field[chosen] for name, field in one.items()}
                    yield member, fields, self(member, fields)

    def evaluate(self) -> float:
        mean = Mean(self.losses)
        for _, fields, outputs in self.look("test"):
            mean.add({name: self.loss(name, outputs, fields) for name in self.losses}, size(fields))
        return mean.value


def size(fields: Fields) -> int:
    return len(next(iter(fields.values())))


class Mean:
    """The weighted sum of several losses' means over samples."""

    def __init__(self, losses: Mapping[str, Loss]) -> None:
        self.weights = {name: loss.weight for name, loss in losses.items()}
        self.totals = dict.fromkeys(losses, 0.0)
        self.rows = 0

    def add(self, losses: Mapping[str, Tensor], rows: int) -> None:
        self.rows += rows
        for name, loss in losses.items():
            self.totals[name] += float(loss.detach()) * rows

    @property
    def value(self) -> float:
        return sum(self.weights[name] * total / self.rows for name, total in self.totals.items())


def joined(leader: Mapping[str, Any], **others: Mapping[str, Any]) -> dict[str, Tensor]:
    """The fields of the leader and (called HOLDER.FIELD) of all others, in the order of the leader's ids."""
    fields = {name: field for name, field in leader.items() if name != "id"}
    for holder, other in others.items():
        row_of = {name: row for row, name in enumerate(ids_of(other))}
        rows = torch.tensor([row_of[name] for name in ids_of(leader)])
        fields |= {f"{holder}.{name}": field[rows] for name, field in other.items() if name != "id"}
    return fields


def ids_of(samples: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in (samples["id"].tolist() if isinstance(samples["id"], Tensor) else samples["id"])]


# --- the six configurations


class Vanilla(Plain):
    """Round robin over five clinics is training on their batches in that order."""

    folder = "vanilla"
    seed = 7
    rounds = ((0,), (1,), (2,), (3,), (4,))
    places: ClassVar = {"stem": tuple(f"clinic-{k}/stem" for k in "abcde"), "trunk": ("server/trunk",)}
    losses: ClassVar = {"trunk": Loss(functional.cross_entropy, "y")}

    def samples(self, split: str) -> list[Fields]:
        return [getattr(self.data, split)(site=site) for site in range(5)]

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        return {"trunk": self.parts["trunk"](self.parts["stem"](fields["x"]))}


class UShaped(Plain):
    folder = "u-shaped"
    seed = 11
    rounds = ((0,), (1,))
    places: ClassVar = {
        "stem": ("clinic-a/stem", "clinic-b/stem"),
        "trunk": ("server/trunk",),
        "head": ("clinic-a/head", "clinic-b/head"),
    }
    losses: ClassVar = {"head": Loss(functional.cross_entropy, "mask")}

    def samples(self, split: str) -> list[Fields]:
        return [getattr(self.data, split)(site=site) for site in range(2)]

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        down = self.parts["stem"](fields["x"])
        across = self.parts["trunk"](down)
        return {"head": self.parts["head"](torch.cat([across, down], 1))}


class Vertical(Plain):
    """The clinic leads: of those whose samples a segment reads it stands first.  The registry has only labels."""

    folder = "vertical"
    batch = 32
    seed = 3
    places: ClassVar = {"shapes": ("clinic/shapes",), "textures": ("laboratory/textures",), "trunk": ("server/trunk",)}
    losses: ClassVar = {"trunk": Loss(functional.binary_cross_entropy_with_logits, "registry.malignant")}

    def samples(self, split: str) -> list[Fields]:
        draw = getattr(self.data, split)
        return [joined(draw("clinic"), laboratory=draw("laboratory"), registry=draw("registry"))]

    def ids(self, split: str) -> list[list[str]]:
        return [ids_of(getattr(self.data, split)("clinic"))]

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        shapes, textures = self.parts["shapes"](fields["x"]), self.parts["textures"](fields["laboratory.x"])
        return {"trunk": self.parts["trunk"](torch.cat([textures, shapes], 1))}


class ExtendedVanilla(Plain):
    folder = "extended-vanilla"
    batch = 12
    seed = 5
    places: ClassVar = {
        "image": ("scanner/image",),
        "genes": ("genome/genes",),
        "fusion": ("ward/fusion",),
        "trunk": ("server/trunk",),
    }
    losses: ClassVar = {"trunk": Loss(functional.cross_entropy, "ward.y")}

    def samples(self, split: str) -> list[Fields]:
        draw = getattr(self.data, split)
        return [joined(draw("scanner"), genome=draw("genome"), ward=draw("ward"))]

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        image, genes = self.parts["image"](fields["x"]), self.parts["genes"](fields["genome.x"])
        fused = self.parts["fusion"](torch.cat([image, genes, fields["ward.vitals"]], 1))
        return {"trunk": self.parts["trunk"](fused)}


class MultiTask(Plain):
    folder = "multi-task"
    batch = 10
    seed = 13
    places: ClassVar = {"stem": ("hospital/stem",), "urgency": ("triage/urgency",), "amount": ("dosage/amount",)}
    losses: ClassVar = {
        "urgency": Loss(functional.cross_entropy, "y", 0.7),
        "amount": Loss(functional.mse_loss, "dose", 0.3),
    }

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        hidden = self.parts["stem"](fields["x"])
        return {"urgency": self.parts["urgency"](hidden), "amount": self.parts["amount"](hidden)}


class MultiHop(Plain):
    folder = "multi-hop"
    epochs = 3
    seed = 17
    drop_last = True
    places: ClassVar = {
        "first": ("clinic/first",),
        "second": ("hospital/second",),
        "third": ("institute/third",),
        "fourth": ("server/fourth",),
    }
    losses: ClassVar = {"fourth": Loss(functional.nll_loss, "y")}

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        value = fields["x"]
        for name in ("first", "second", "third", "fourth"):
            value = self.parts[name](value)
        return {"fourth": value}


# --- three that are none of the six


class Diamond(Plain):
    folder = "diamond"
    batch = 12
    seed = 19
    places: ClassVar = {
        "stem": ("clinic/stem",),
        "coarse": ("left/coarse",),
        "fine": ("right/fine",),
        "trunk": ("server/trunk",),
    }
    losses: ClassVar = {"trunk": Loss(functional.cross_entropy, "y")}

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        hidden = self.parts["stem"](fields["x"])
        coarse, fine = self.parts["coarse"](hidden), self.parts["fine"](hidden)
        return {"trunk": self.parts["trunk"](fine + coarse)}


class TwoU(Plain):
    folder = "two-u"
    batch = 16
    seed = 29
    places: ClassVar = {
        "north-stem": ("north/north-stem",),
        "south-stem": ("south/south-stem",),
        "trunk": ("server/trunk",),
        "north-head": ("north/north-head",),
        "south-head": ("south/south-head",),
    }
    losses: ClassVar = {
        "north-head": Loss(functional.cross_entropy, "y"),
        "south-head": Loss(functional.huber_loss, "south.score", 0.5),
    }

    def samples(self, split: str) -> list[Fields]:
        draw = getattr(self.data, split)
        return [joined(draw("north"), south=draw("south"))]

    def ids(self, split: str) -> list[list[str]]:
        return [ids_of(getattr(self.data, split)("north"))]

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        north, south = self.parts["north-stem"](fields["x"]), self.parts["south-stem"](fields["south.x"])
        across = self.parts["trunk"](north, south)
        return {
            "north-head": self.parts["north-head"](torch.cat([across["north"], north], 1)),
            "south-head": self.parts["south-head"](torch.cat([across["south"], south], 1)),
        }


class SideBranch(Plain):
    folder = "side-branch"
    batch = 10
    seed = 31
    places: ClassVar = {
        "first": ("clinic/first",),
        "second": ("hospital/second",),
        "third": ("institute/third",),
        "fourth": ("server/fourth",),
        "side": ("clinic/side",),
    }
    losses: ClassVar = {
        "third": Loss(functional.cross_entropy, "y", 0.2),
        "fourth": Loss(functional.cross_entropy, "y"),
        "side": Loss(functional.binary_cross_entropy_with_logits, "bright", 0.4),
    }

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        branching = self.parts["second"](self.parts["first"](fields["x"]))
        third = self.parts["third"](branching)
        return {"third": third, "fourth": self.parts["fourth"](third), "side": self.parts["side"](branching)}


# --- what else can go wrong


class Parallel(Plain):
    """Three stems that begin alike; a clinic that has no batch left sits a step out."""

    folder = "parallel"
    seed = 37
    rounds = ((0, 1, 2),)
    places: ClassVar = {
        "stem-0": ("clinic-a/stem",),
        "stem-1": ("clinic-b/stem",),
        "stem-2": ("clinic-c/stem",),
        "trunk": ("server/trunk",),
    }
    losses: ClassVar = {"trunk": Loss(functional.cross_entropy, "y")}

    def samples(self, split: str) -> list[Fields]:
        return [getattr(self.data, split)(site=site) for site in range(3)]

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        return {"trunk": self.parts["trunk"](self.parts[f"stem-{member}"](fields["x"]))}


class FanOut(Plain):
    """Three gradients for one output, which floating point does not add alike in every order; and whole numbers."""

    folder = "fan-out"
    batch = 16
    seed = 41
    places: ClassVar = {
        "stem": ("clinic/stem",),
        "left": ("one/left",),
        "middle": ("two/middle",),
        "right": ("three/right",),
        "mixed": ("clinic/mixed",),
        "head": ("clinic/head",),
    }
    losses: ClassVar = {"head": Loss(functional.cross_entropy, "y")}

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        hidden, signs = self.parts["stem"](fields["x"]).values()
        left = self.parts["left"](hidden)
        middle = self.parts["middle"](hidden, signs)
        right = self.parts["right"](hidden)
        mixed = self.parts["mixed"]((left + middle + right) / 3)
        return {"head": self.parts["head"](mixed, signs)}


class Precision(Plain):
    """Cuts in bfloat16, float16 and float64."""

    folder = "precision"
    batch = 10
    seed = 43
    places: ClassVar = {"stem": ("clinic/stem",), "middle": ("hospital/middle",), "trunk": ("server/trunk",)}
    losses: ClassVar = {"trunk": Loss(functional.mse_loss, "dose")}

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        made = self.parts["stem"](fields["x"])
        return {"trunk": self.parts["trunk"](made["fine"], self.parts["middle"](made["coarse"]))}


class Layout(Plain):
    """Activations and gradients that do not lie in memory row by row, which decides how kernels add them up."""

    folder = "layout"
    batch = 16
    seed = 53
    places: ClassVar = {"stem": ("clinic/stem",), "middle": ("hospital/middle",), "trunk": ("server/trunk",)}
    losses: ClassVar = {"trunk": Loss(functional.cross_entropy, "y")}

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        return {"trunk": self.parts["trunk"](self.parts["middle"](self.parts["stem"](fields["x"])))}


class Custom(Plain):
    """A loss and an optimizer of the parties' own."""

    folder = "custom"
    batch = 16
    seed = 47
    rounds = ((0,), (1,))
    places: ClassVar = {"stem": ("clinic-a/stem", "clinic-b/stem"), "trunk": ("server/trunk",)}
    losses: ClassVar = {"trunk": Loss(functools.partial(load("custom", "losses").focal, gamma=1.5), "y")}

    def samples(self, split: str) -> list[Fields]:
        return [getattr(self.data, split)(site=site) for site in range(2)]

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        return {"trunk": self.parts["trunk"](self.parts["stem"](fields["x"]))}


# --- both


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.003)


def careful(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = load("custom", "optimizers").Careful(parameters, lr=0.02, decay=0.9)
    return optimizer


IN_PARTY_FILES: dict[MakeOptimizer, str] = {
    sgd: "{name: sgd, lr: 0.05, momentum: 0.9}",
    adam: "{name: adam, lr: 0.003}",
    careful: '{name: "optimizers:Careful", lr: 0.02, decay: 0.9}',
}
NETWORKS = (
    Vanilla,
    UShaped,
    Vertical,
    ExtendedVanilla,
    MultiTask,
    MultiHop,
    Diamond,
    TwoU,
    SideBranch,
    Parallel,
    FanOut,
    Precision,
    Layout,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prepared(
    network: type[Plain], folder: Path, make_optimizer: MakeOptimizer, *, micro_batches: int = 1, early: bool = True
) -> Path:
    """A copy of the network's graph folder with another optimizer and number of micro-batches.

    ``early``: whether every party sends the gradients of its cuts before it computes those of its weights.
    """
    shutil.copytree(GRAPHS / network.folder, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (folder / "parties").glob("*.yaml"):
        text = file.read_text()
        text = re.sub(r"optimizer: \{.*?\}", f"optimizer: {IN_PARTY_FILES[make_optimizer]}", text)
        file.write_text(f"{text}\nearly_gradient: {str(early).lower()}\n")
    graph = folder / "graph.yaml"
    text = re.sub(r"micro_batches: \d+", f"micro_batches: {micro_batches}", graph.read_text())
    assert micro_batches == 1 or f"micro_batches: {micro_batches}" in text
    graph.write_text(text)
    return folder


def assert_equal_weights(plain: Plain, out: Path) -> None:
    """``out`` holds every part of ``plain``, bit for bit, at the parties that the graph says and nowhere else."""
    written = {str(file.relative_to(out).with_suffix("")) for file in out.rglob("*.*")}
    assert written == {place for held in plain.places.values() for place in held}
    differing = []
    for name, held in plain.places.items():
        state = plain.parts[name].state_dict()
        for place in held:
            found = load_file(out / f"{place}.safetensors")
            assert {key: tensor.dtype for key, tensor in found.items()} == {
                key: tensor.dtype for key, tensor in state.items()
            }
            differing += [f"{place}: {key}" for key, tensor in state.items() if not torch.equal(tensor, found[key])]
    assert differing == []


def assert_same_training(
    folder: Path, out: Path, plain: Plain, make_optimizer: MakeOptimizer, *, seed: int | None = None
) -> None:
    train_loss, eval_loss = plain.fit(make_optimizer)
    result = simulate(folder, out=out, seed=seed)
    assert_equal_weights(plain, out)
    # the losses are equal too; that their sums are taken in another order may show in the last digits of a mean
    assert result.metrics["train_loss"] == pytest.approx(train_loss, rel=1e-12)
    assert result.metrics["eval_loss"] == pytest.approx(eval_loss, rel=1e-12)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.folder)
def test_sgd_across_processes_equals_one_process(network: type[Plain], tmp_path: Path) -> None:
    folder = prepared(network, tmp_path / "graph", sgd)
    assert_same_training(folder, tmp_path / "out", network(), sgd)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.folder)
def test_adam_across_processes_equals_one_process_with_another_seed(network: type[Plain], tmp_path: Path) -> None:
    folder = prepared(network, tmp_path / "graph", adam, early=False)
    assert_same_training(folder, tmp_path / "out", network(seed=2024), adam, seed=2024)


@pytest.mark.parametrize(
    ("network", "make_optimizer", "micro_batches"),
    [(UShaped, adam, 4), (MultiTask, sgd, 4), (Diamond, adam, 4), (Parallel, sgd, 3)],
    ids=["u-shaped", "multi-task", "diamond", "parallel"],
)
def test_micro_batches_in_flight_equal_gradient_accumulation(
    network: type[Plain], make_optimizer: MakeOptimizer, micro_batches: int, tmp_path: Path
) -> None:
    """Every network here ends its epoch with a batch of fewer rows than micro-batches."""
    folder = prepared(network, tmp_path / "graph", make_optimizer, micro_batches=micro_batches)
    assert_same_training(folder, tmp_path / "out", network(micro_batches=micro_batches), make_optimizer)


def test_a_loss_and_an_optimizer_of_their_own(tmp_path: Path) -> None:
    folder = prepared(Custom, tmp_path / "graph", careful)
    assert_same_training(folder, tmp_path / "out", Custom(), careful)


def test_without_evaluation_the_weights_are_the_same(tmp_path: Path) -> None:
    folder = prepared(UShaped, tmp_path / "graph", adam)
    for file in (folder / "parties").glob("clinic-*.yaml"):
        text = file.read_text()
        assert ', test: "data:test"' in text
        file.write_text(text.replace(', test: "data:test"', ""))
    plain = UShaped()
    plain.fit(adam)
    result = simulate(folder, out=tmp_path / "out")
    assert result.metrics["eval_loss"] == [None, None]
    assert_equal_weights(plain, tmp_path / "out")


@pytest.mark.parametrize(
    ("network", "leaders"),
    [
        (UShaped, ["clinic-a", "clinic-b"]),
        (Vertical, ["clinic"]),
        (TwoU, ["north"]),
        (Parallel, ["clinic-a", "clinic-b", "clinic-c"]),
        (Precision, ["clinic"]),
    ],
    ids=["u-shaped", "vertical", "two-u", "parallel", "precision"],
)
def test_prediction_across_processes_equals_one_process(
    network: type[Plain], leaders: list[str], tmp_path: Path
) -> None:
    plain = network()
    plain.fit(adam)
    for name, held in plain.places.items():
        for place in held:
            file = tmp_path / "weights" / f"{place}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(plain.parts[name].state_dict(), file)
    expected: dict[str, list[Tensor]] = {}
    for member, _, outputs in plain.look("predict"):
        for name, output in outputs.items():
            held = plain.places[name]  # where every member has its own, its predictions stay with it
            expected.setdefault(held[member if len(held) > 1 else 0], []).append(output)

    folder = prepared(network, tmp_path / "graph", adam)
    result = predict(folder, weights=tmp_path / "weights", out=tmp_path / "out")

    found = {
        f"{file.parent.name}/{segment}": tensor
        for file in (tmp_path / "out").glob("*/predictions.safetensors")
        for segment, tensor in load_file(file).items()
    }
    assert set(found) == set(expected)
    for place, parts in expected.items():
        assert torch.equal(found[place], torch.cat(parts)), place
    assert sum(result.predicted.values()) == sum(len(tensor) for tensor in found.values())
    for leader, ids in zip(leaders, plain.ids("predict"), strict=True):
        assert json.loads((tmp_path / "out" / leader / "predicted_ids.json").read_text()) == ids
