"""A segment at work: what it keeps of its inputs and outputs, and that optimisers go on elsewhere as if nothing was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from splitsec.errors import PartyFileError, PeerMisbehaved
from splitsec.messages import Message, decode, encode
from splitsec.partyfile import load_folder
from splitsec.plan import Edge, Stage
from splitsec.segments import Segment, build_segments
from tests.conftest import write_folder


def edge(index: int, *, local: bool = False) -> Edge:
    return Edge(index, "stem", f"next-{index}", "here", "here" if local else "there", (4,), "float32", 16, 17)


def stage(inputs: int, *outputs: Edge) -> Stage:
    incoming = tuple(Edge(n, "before", "stem", "there", "here", (4,), "float32", 16, 17) for n in range(inputs))
    return Stage("stem", incoming, outputs, None, None, "concat", 1.0)


# --- inputs and outputs


def test_the_first_layer_may_change_its_input_in_place() -> None:
    segment = Segment("stem", nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), None)
    work, arrived = stage(1, edge(9)), torch.tensor([[-1.0, 2.0, -3.0, 4.0]])
    segment.forward(work, [arrived], None, micro=0, update=0, share=1.0)
    (gradient,) = segment.backward(work, {work.outputs[0]: torch.ones(1, 4)}, micro=0)
    weight = segment.module.get_parameter("1.weight")
    assert gradient is not None
    assert torch.equal(gradient, weight.sum(0, keepdim=True) * torch.tensor([[0.0, 1.0, 0.0, 1.0]]))


def test_a_gradient_goes_back_as_autograd_laid_it_out() -> None:
    """A leaf's ``.grad`` would be laid out like the leaf."""

    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(1, keepdim=True)

    segment, work = Segment("stem", Sum(), None), stage(1, edge(9))
    segment.forward(work, [torch.ones(3, 4)], None, micro=0, update=0, share=1.0)
    (gradient,) = segment.backward(work, {work.outputs[0]: torch.arange(3.0).unsqueeze(1)}, micro=0)
    assert gradient is not None
    assert (tuple(gradient.shape), gradient.stride()) == ((3, 4), (1, 0))


@pytest.mark.threat("T133")
@pytest.mark.parametrize("label", [-1, 3, 1 << 40])
def test_labels_that_are_no_class_are_the_senders_fault(label: int) -> None:
    segment = Segment("stem", nn.Linear(4, 3), None, loss=nn.CrossEntropyLoss(), loss_name="cross_entropy")
    labels = Edge(1, "clinic", "stem", "clinic", "here", (), "int64", 18, 19, field="y")
    work = replace(stage(1), labels=labels)
    with pytest.raises(PeerMisbehaved, match=f"clinic: sent the label {label} for 'stem'"):
        segment.forward(work, [torch.ones(2, 4)], torch.tensor([0, label]), micro=0, update=0, share=1.0)
    segment.forward(work, [torch.ones(2, 4)], torch.tensor([2, -100]), micro=0, update=0, share=1.0)


@pytest.mark.parametrize("update", [0, None], ids=["training", "evaluating"])
def test_what_goes_elsewhere_too_may_be_changed_here(update: int | None) -> None:
    """It is lent until it is sent; a neighbour in this process must not get the same memory."""
    near, far = edge(8, local=True), edge(9)
    outputs, _ = Segment("stem", nn.Linear(4, 4), None).forward(
        stage(1, near, far), [torch.ones(2, 4)], None, micro=0, update=update, share=1.0
    )
    assert torch.equal(outputs[near], outputs[far])
    before = outputs[far].clone()
    outputs[near].zero_()
    assert torch.equal(outputs[far], before)


# --- handing on


OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam")  # one wants a closure, one sparse gradients
}


class Keeper(torch.optim.Optimizer):
    """Keeps a number, a whole number, nothing and a double-precision tensor, and changes a setting."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["lr"] *= 0.9
            group["steps"] += 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(count=0, scale=1.0, nothing=None, sum=torch.zeros_like(parameter).double())
                state["count"] += 1
                state["scale"] *= 0.7
                state["sum"] += parameter.grad / 3
                rate = group["lr"] * state["scale"] / state["count"] / group["steps"]
                parameter -= (rate * state["sum"]).to(parameter.dtype)


def member(kind: type[torch.optim.Optimizer], **settings: Any) -> Segment:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(9, 6, bias=False), nn.Tanh(), nn.Linear(6, 2, bias=False))
    return Segment("stem", module, kind(module.parameters(), **settings))


def train(segment: Segment, first: int, last: int) -> None:
    for number in range(first, last):
        x = torch.randn(8, 9, generator=torch.Generator().manual_seed(number))
        torch.autograd.backward(segment.module(x).square().mean())
        segment.step()


def hand(giver: Segment, taker: Segment) -> None:
    tensors, plain = giver.hand_on()
    header, body = encode(Message("weights", (0,), plain, tensors))
    message = decode(header, memoryview(bytearray(b"".join(body))))
    taker.take_over(message.tensors, message.facts)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {}) for kind in OPTIMIZERS.values()),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
        (Keeper, {}),
    ],
)
def test_an_optimizer_goes_on_at_the_next_member_to_the_last_bit(
    kind: type[torch.optim.Optimizer], settings: Mapping[str, Any]
) -> None:
    alone, first, second = (member(kind, **settings) for _ in range(3))
    train(alone, 0, 6)
    train(first, 0, 2)
    hand(first, second)
    train(second, 2, 4)
    hand(second, first)
    train(first, 4, 6)
    expected = alone.weights()
    assert expected.keys() == first.weights().keys()
    for name, tensor in first.weights().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_rate_of_its_own_stays_where_the_optimizer_does_not_change_it() -> None:
    giver, taker = member(torch.optim.SGD, lr=0.1), member(torch.optim.SGD, lr=0.3)
    hand(giver, taker)
    assert taker.optimizer is not None
    assert taker.optimizer.param_groups[0]["lr"] == 0.3


@pytest.mark.threat("T132")
@pytest.mark.parametrize(
    ("tensors", "plain"),
    [
        ({"optimizer/2/momentum_buffer": torch.ones(2)}, {}),
        ({"optimizer/x/momentum_buffer": torch.ones(2)}, {}),
        ({"optimizer/0/momentum_buffer": torch.ones(55)}, {}),
        ({}, {"7/step": 1}),
        ({}, {"group/1/lr": 0.5}),
        ({}, {"group/0/lr": "high"}),
        ({}, {"group/0/nesterov": 1}),
        ({}, {"group/0/unknown": 1}),
    ],
)
def test_state_that_does_not_fit_is_refused(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    segment = member(torch.optim.SGD, momentum=0.9)
    weights, _ = segment.hand_on()
    with pytest.raises(ValueError, match="optimizer"):
        segment.take_over({**weights, **tensors}, plain)


@pytest.mark.threat("T132")
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tensors, plain: plain.update({"0/momentum_buffer": "text"}), "no number"),
        (lambda tensors, plain: plain.update({"group/0/lr": float("nan")}), "no number"),
        (lambda tensors, plain: tensors.update({"optimizer/0/momentum_buffer": torch.ones(2)}), "cannot step"),
        (lambda tensors, plain: tensors.update({"optimizer/9/momentum_buffer": torch.ones(2)}), "parameter 9 of 2"),
        (lambda tensors, plain: tensors.update({"smuggled": torch.ones(2)}), "neither weights nor optimizer state"),
        (lambda tensors, plain: tensors.pop("weights/weight"), "without weight of its own"),
    ],
)
def test_hostile_state_is_refused_and_changes_nothing(spoil: Callable[[Any, Any], Any], words: str) -> None:
    """What another member hands on is tried on a copy: an optimizer would believe anything, and fail a step later."""

    def segment() -> Segment:
        module = nn.Linear(3, 2)
        return Segment("stem", module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))

    giver, taker = segment(), segment()
    giver.module(torch.ones(1, 3)).sum().backward()
    giver.step()
    tensors, plain = giver.hand_on()
    spoil(tensors, plain)
    before = taker.weights()
    with pytest.raises(ValueError, match=words):
        taker.take_over(tensors, plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in taker.weights().items())
    assert taker.optimizer is not None and not taker.optimizer.state
    taker.take_over(*giver.hand_on())
    assert torch.equal(taker.weights()["weight"], giver.weights()["weight"])


# --- modules that look at the whole batch


def test_micro_batches_are_refused_where_a_segment_has_batch_statistics(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "graph")
    (folder / "parties" / "models.py").write_text(
        "from torch import nn\n\n\ndef stem(**given):\n    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))\n"
    )
    graph = folder / "graph.yaml"
    loaded = load_folder(folder)
    (party,) = [one for one in loaded.parties.values() if "stem" in one.segments][:1]
    assert list(build_segments(loaded.graph, party)) == ["stem"]
    graph.write_text(graph.read_text().replace("training: {", "training: {micro_batches: 4, "))
    with pytest.raises(PartyFileError) as refused:
        build_segments(load_folder(folder).graph, party)
    assert "segment 'stem' has BatchNorm1d at 1, and the graph has `micro_batches: 4`" in str(refused.value)
    assert f"{party.file}:{party.line_of('segments', 'stem', 'model')}" in str(refused.value)
    assert "GroupNorm" in str(refused.value)
