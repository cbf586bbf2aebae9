"""The way back in two acts: the same gradients, to the last bit, as in one; and one where that cannot be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from splitsec.backward import TRIALS, Pass, WayBack
from splitsec.bench.networks import NETWORKS
from splitsec.plan import Edge, Stage
from splitsec.segments import Segment


class Caught(torch.autograd.Function):
    """Catches the gradient of a leaf on its way, as segments do."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, kept: list[torch.Tensor | None], place: int) -> torch.Tensor:
        ctx.kept, ctx.place = kept, place
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.kept[ctx.place] = gradient
        return None, None, None


class Residual(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm_one, self.norm_two = norm(8), norm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm_two(self.two(torch.relu(self.norm_one(self.one(x))))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(4, 3)
        self.own = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.first(x).flatten(1) * self.own.repeat(7)
        return self.last(torch.nn.functional.gelu(wide[:, :4]) + wide[:, 4:8])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.layer(x)))


class TransposedTwice(nn.Module):
    """The weight itself has one edge; what was made of it has two."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = self.weight.t().contiguous()
        return torch.relu(x @ turned) @ turned


class AllInOne(torch.autograd.Function):
    """A user's own function, which computes the gradients of input and weight in one go."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0)


class WithAllInOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = AllInOne.apply(x, self.weight)
        return result


def image(channels: int = 8) -> torch.Tensor:
    return torch.randn(6, channels, 9, 9)


CHAINS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3)), image),
    "batch norm": (lambda: nn.Sequential(Residual(nn.BatchNorm2d), Residual(nn.BatchNorm2d)), image),
    "group norm": (lambda: nn.Sequential(Residual(lambda n: nn.GroupNorm(2, n)), nn.MaxPool2d(2)), image),
    "layer norm": (lambda: nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9), nn.Linear(9, 2, bias=False)), image),
    "strides": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=2, stride=2), nn.ConvTranspose2d(8, 3, 3)), image),
    "embedded": (Recurrent, lambda: torch.randn(6, 7, 5)),
    "lstm": (lambda: First(nn.LSTM(5, 6, batch_first=True)), lambda: torch.randn(6, 7, 5)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        lambda: torch.randn(6, 7, 8),
    ),
    "small cnn": (NETWORKS["cnn-small"].server, lambda: torch.randn(6, 32, 16, 16)),
    "weight norm": (
        lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(9, 3)),
        image,
    ),
    "no weights": (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), image),
}
IN_TWO = [name for name in CHAINS if name not in ("lstm",)]


class First(nn.Module):
    """The first of what a module returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.module(x)[0]
        return result


def passes(
    module: nn.Module, batches: list[torch.Tensor], way: WayBack | None, *, late: bool = True
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Gradients of the inputs and of the weights after going back through ``batches``, by ``way`` or plainly."""
    module.zero_grad()
    inputs: list[torch.Tensor | None] = []
    for place, batch in enumerate(batches):
        caught: list[torch.Tensor | None] = [None]
        leaf = batch.clone().requires_grad_()
        loss = (module(Caught.apply(leaf, caught, 0)) ** 2).mean()  # type: ignore[no-untyped-call]
        if way is None:
            loss.backward()
        else:
            way.go([loss], [leaf], caught, place=place)
        inputs += caught
    if way is not None and late:
        way.finish()
    return inputs, [None if weight.grad is None else weight.grad.clone() for weight in module.parameters()]


def same(one: list[torch.Tensor | None], other: list[torch.Tensor | None]) -> bool:
    return len(one) == len(other) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", CHAINS)
def test_two_acts_give_what_one_pass_gives(name: str) -> None:
    torch.manual_seed(1)
    build, sample = CHAINS[name]
    module, batches = build(), [sample() for _ in range(4)]
    expected = passes(module, batches, None)
    way = WayBack(name, module, two_acts=True)
    for _ in range(2):  # the first batch of the first goes both ways
        found = passes(module, batches, way)
        assert same(expected[0], found[0])
        assert same(expected[1], found[1])


@pytest.mark.parametrize("name", IN_TWO)
def test_the_first_act_leaves_the_weights_alone_and_the_second_does_the_rest(name: str) -> None:
    torch.manual_seed(2)
    build, sample = CHAINS[name]
    module, batch = build(), sample()
    way = WayBack(name, module, two_acts=True)
    passes(module, [batch], way)
    inputs, weights = passes(module, [batch], way, late=False)
    assert inputs[0] is not None
    assert weights == [None] * len(weights)
    assert way.owes
    way.finish()
    assert not way.owes
    assert all(weight.grad is not None for weight in module.parameters())


@pytest.mark.parametrize("build", [Twice, TransposedTwice, WithAllInOne])
def test_where_a_weight_has_several_edges_or_a_function_is_the_users_it_goes_at_once(build: type[nn.Module]) -> None:
    torch.manual_seed(3)
    module = build()
    leaf = torch.randn(5, 4).requires_grad_()
    caught: list[torch.Tensor | None] = [None]
    one = Pass([module(Caught.apply(leaf, caught, 0)).sum()], [leaf])  # type: ignore[no-untyped-call]
    assert not one.splits()
    way = WayBack("x", module, two_acts=True)
    batches = [torch.randn(5, 4) for _ in range(3)]
    expected = passes(module, batches, None)
    found = passes(module, batches, way, late=False)
    assert not way.owes
    assert same(expected[0], found[0])
    assert same(expected[1], found[1])


def test_a_pass_at_once_comes_after_what_is_owed() -> None:
    """Terms are added in the order of micro-batches, whichever way each of them goes."""
    torch.manual_seed(4)

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.twice = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.twice = not self.twice
            once: torch.Tensor = self.layer(x)
            return self.layer(torch.relu(once)) if self.twice else once

    module = Sometimes()
    batches = [torch.randn(5, 4) for _ in range(6)]
    way = WayBack("x", module, two_acts=True)
    passes(module, batches, way)
    expected, found = passes(module, batches, None), passes(module, batches, way)
    assert same(expected[1], found[1])


def test_a_segment_that_gives_other_numbers_in_two_acts_says_so_once_and_goes_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(5)
    build, sample = CHAINS["convolutions"]
    module, batches = build(), [sample() for _ in range(3)]
    expected = passes(module, batches, None)
    plain = Pass.all_weights

    def wrong(self: Pass, *, keep_graph: bool = False) -> None:
        plain(self, keep_graph=keep_graph)
        for weight in module.parameters():
            assert weight.grad is not None
            weight.grad += 1e-7

    monkeypatch.setattr(Pass, "all_weights", wrong)
    way = WayBack("trunk", module, two_acts=True)
    with caplog.at_level(logging.WARNING, "splitsec"):
        found = passes(module, batches, way, late=False)
    assert not way.owes
    assert same(expected[0], found[0])
    assert same(expected[1], found[1])
    assert [record.getMessage()[:47] for record in caplog.records] == [
        "segment 'trunk' goes back in one pass: in two i"
    ]


def test_where_nothing_is_asked_for_short_passes_go_at_once_and_long_ones_in_two_acts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(6)
    build, sample = CHAINS["convolutions"]
    for worth_it, owes in ((0.0, True), (60.0, False)):
        monkeypatch.setattr("splitsec.backward.WORTH_IT", worth_it)
        module = build()
        way = WayBack("x", module)
        batches = [sample() for _ in range(TRIALS + 2)]
        expected = passes(module, batches, None)
        found = passes(module, batches, way, late=False)
        assert way.owes is owes
        way.finish()
        assert same(expected[0], found[0])
        assert same(expected[1], [weight.grad for weight in module.parameters()])


@pytest.mark.parametrize("name", ["convolutions", "group norm", "small cnn", "twice"])
def test_passes_in_any_order_add_their_terms_in_one(name: str) -> None:
    """Also a pass that cannot go in two acts, and comes too early: it goes as far as its inputs, and again later."""
    torch.manual_seed(8)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(8, 8, 1)
            self.count = -1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1  # the first is proven in two acts, and each is taken twice
            once: torch.Tensor = self.layer(x)
            return once if self.count % 2 else self.layer(torch.relu(once))

    build, sample = CHAINS.get(name, (Whole, image))
    module, batches = build(), [sample() for _ in range(5)]
    way = WayBack(name, module, two_acts=True)
    passes(module, batches[:2], way)
    assert way.any_order
    caught: list[list[torch.Tensor | None]] = [[None] for _ in batches]
    leaves = [batch.clone().requires_grad_() for batch in batches]
    if isinstance(module, Whole):
        module.count = -1
    losses = [(module(Caught.apply(leaf, one, 0)) ** 2).mean() for leaf, one in zip(leaves, caught, strict=True)]  # type: ignore[no-untyped-call]
    module.zero_grad()
    for place in (3, 0, 4, 2, 1):
        way.go([losses[place]], [leaves[place]], caught[place], place=place)
        assert caught[place][0] is not None
        if way.owes:
            way.some_weights()
    way.finish()
    found = [weight.grad for weight in module.parameters()]
    if isinstance(module, Whole):
        module.count = -1
    expected = passes(module, batches, None)
    assert same(expected[0], [one[0] for one in caught])
    assert same(expected[1], [None if one is None else one for one in found])


def test_what_is_owed_can_be_forgotten() -> None:
    torch.manual_seed(7)
    build, sample = CHAINS["small cnn"]
    module, batch = build(), sample()
    way = WayBack("x", module, two_acts=True)
    passes(module, [batch], way)
    passes(module, [batch], way, late=False)
    way.forget()
    assert not way.owes
    assert all(weight.grad is None for weight in module.parameters())


class Scaled(nn.Module):
    """A buffer that each forward writes into is saved on the way to a weight."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.scale.mul_(0.9).add_(0.1 * x.abs().mean())
        return nn.functional.linear(x, self.weight * self.scale)


def test_a_forward_that_writes_into_a_buffer_comes_after_what_is_owed() -> None:
    torch.manual_seed(9)
    found = []
    for early in (False, True):
        torch.manual_seed(10)
        module = Scaled()
        segment = Segment("stem", module, torch.optim.SGD(module.parameters(), lr=0.1), early_gradient=early)
        edges = [Edge(n, "a", "b", "here", "there", (4,), "float32", 16, 17) for n in range(2)]
        work = Stage("stem", (edges[0],), (edges[1],), None, None, "concat", 1.0)
        for update in range(3):
            batches = [torch.randn(5, 4, generator=torch.Generator().manual_seed(5 * update + n)) for n in range(3)]
            segment.forward(work, [batches[0]], None, micro=0, update=update, share=0.5)
            segment.backward(work, {edges[1]: batches[2]}, micro=0, place=0)
            segment.forward(work, [batches[1]], None, micro=1, update=update, share=0.5)
            segment.backward(work, {edges[1]: batches[2]}, micro=1, place=1)
            segment.step()
        assert segment.way_back.any_order is early
        assert not segment.any_order
        found.append(segment.weights())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_module_that_goes_forward_again_on_the_way_back_goes_at_once() -> None:
    """Its buffers would change with every act."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = torch.utils.checkpoint.checkpoint(self.layers, x, use_reentrant=False)
            return made

    found = []
    for two_acts in (None, True):
        torch.manual_seed(11)
        module = Checkpointed()
        way = None if two_acts is None else WayBack("x", module, two_acts=True)
        for step in range(3):
            passes(module, [torch.randn(5, 4, generator=torch.Generator().manual_seed(step))], way)
        assert way is None or not way.any_order
        found.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_hooks_of_weights_are_called_as_often_as_in_one_pass() -> None:
    torch.manual_seed(12)
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    called: list[int] = []
    module[0].weight.register_hook(lambda gradient: called.append(1))
    passes(module, [torch.randn(5, 4) for _ in range(3)], WayBack("x", module, two_acts=True))
    assert len(called) == 3


@pytest.mark.parametrize("factor", [0.0, torch.inf])
def test_gradients_that_are_all_zero_or_not_finite_prove_nothing(factor: float) -> None:
    torch.manual_seed(13)
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    way = WayBack("x", module, two_acts=True)
    leaf, caught = torch.randn(5, 4).requires_grad_(), [None]
    ends = [module(Caught.apply(leaf, caught, 0)).sum() * factor]  # type: ignore[no-untyped-call]
    way.go(ends, [leaf], caught)  # type: ignore[arg-type]
    way.finish()
    assert not way.any_order
    passes(module, [torch.randn(5, 4)], way)
    assert way.any_order
