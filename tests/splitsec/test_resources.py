"""The resource plan of built-in networks: against published numbers, torch's own counter, and counting by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from splitsec.architectures import ARCHITECTURES, Layer, build, find_cut
from splitsec.cli.plan import COMPUTED, EPOCHS, chain_report
from splitsec.errors import UserError
from splitsec.graph import parse_graph
from splitsec.measuring import chain_costs, segment_cost, weight_uses
from splitsec.resources import Cost, Setting, baselines, fewest_clients, hand_ons, join
from splitsec.schedule import HandOn, run_schedule

CIFAR = (3, 32, 32)
PAPER = Setting(clients=100, samples=50_000, batch=64, epochs=EPOCHS)


# --- the networks


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("vgg16", 138_357_544), ("resnet18", 11_689_512), ("resnet50", 25_557_032), ("alexnet", 62_378_344)],
)
def test_the_networks_are_the_published_ones(name: str, parameters: int) -> None:
    with torch.device("meta"):
        layers = build(name)
    assert sum(one.numel() for layer in layers for one in layer.module.parameters()) == parameters


def test_a_network_gives_one_number_for_each_class() -> None:
    for name in ("vgg16", "resnet18"):
        made = torch.zeros(1, *CIFAR)
        for layer in build(name, CIFAR, 10):
            made = layer.module.eval()(made)
        assert made.shape == (1, 10)


@pytest.mark.parametrize(
    ("cut", "words"),
    [("cnv1", "no layer `cnv1` to cut after"), ("fc3", "the last layer, leaves nothing"), ("", "no layer ``")],
)
def test_an_unknown_layer_is_answered_with_the_candidates(cut: str, words: str) -> None:
    with torch.device("meta"):
        names = [layer.name for layer in build("vgg16", CIFAR)]
    with pytest.raises(UserError, match=words) as caught:
        find_cut(names, cut)
    assert caught.value.expected.startswith("one of conv1, conv2, pool1, ")
    assert caught.value.expected.endswith(", fc1, fc2")


def test_a_stage_is_cut_after_its_last_block() -> None:
    with torch.device("meta"):
        names = [layer.name for layer in build("resnet18", CIFAR)]
    assert names[find_cut(names, "layer1") - 1] == "layer1.1"
    assert names[find_cut(names, "layer1.0") - 1] == "layer1.0"


def test_what_is_too_small_or_unknown_is_refused() -> None:
    with pytest.raises(UserError, match="the pools leave 0 x 0 pixels"):
        build("alexnet", CIFAR)
    with pytest.raises(UserError, match="no network `vgg19`") as caught:
        build("vgg19")
    assert caught.value.fix == "did you mean `vgg16`?"


# --- FLOPs


def test_vepakomma_2018_by_formula() -> None:
    """29.40 and 0.1548 TFLOP of one client at 100 clients: three multiply-accumulates for every use of a weight."""
    report, _ = chain_report("vgg16", CIFAR, 1000, ["conv1"], PAPER)
    split, federated, sgd = report.methods
    assert split.published == 1_769_472 * 3 * 500 * 58.3
    assert federated.published == sgd.published == 336_166_912 * 3 * 500 * 58.3
    for method in report.methods:
        assert method.published / 1e12 == pytest.approx(COMPUTED[method.name][100], rel=0.005)
    assert round(federated.published / 1e12, 2) == 29.40
    assert split.published / 1e12 == pytest.approx(0.1548, rel=0.0005)


def test_vepakomma_2018_by_a_run() -> None:
    """The same counted while the network really runs.  The published count has a gradient of the input, too."""
    layers = build("vgg16", CIFAR, 1000)
    whole = nn.Sequential(*(layer.module for layer in layers))
    for module, printed in ((whole, 29.40), (layers[0].module, 0.1548)):
        x = torch.rand(2, *CIFAR, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        macs_of_a_sample = counter.get_total_flops() / 2 / 2
        assert macs_of_a_sample * 500 * 58.3 / 1e12 == pytest.approx(printed, rel=0.005)


def counted(module: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Forward and backward of one sample, by torch."""
    with FlopCounterMode(display=False) as forward:
        made = module(x)
    with FlopCounterMode(display=False) as backward:
        made.backward(torch.ones_like(made))
    return forward.get_total_flops() / len(x), backward.get_total_flops() / len(x)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flops_are_those_of_torchs_counter_at_every_cut(name: str) -> None:
    image = CIFAR if name in ("vgg16", "resnet18") else ARCHITECTURES[name].image
    with torch.device("meta"):
        layers = build(name, image)
        costs = chain_costs(layers, image)
        parts = []  # torch's numbers, layer by layer
        for place, (layer, (_, before, _)) in enumerate(zip(layers, [("", image, costs[0][2]), *costs], strict=False)):
            parts.append(counted(layer.module, torch.zeros(2, *before, requires_grad=place > 0)))
        for place in range(1, len(layers)):
            for of, ours in ((slice(place), costs[:place]), (slice(place, None), costs[place:])):
                cost = join([cost for *_, cost in ours])
                assert cost.forward == sum(forward for forward, _ in parts[of])
                assert cost.input_gradient + cost.weight_gradient == sum(backward for _, backward in parts[of])
        # A segment as a whole, at one cut: no more than its layers one by one.
        place = len(layers) // 2
        server = nn.Sequential(*(layer.module for layer in layers[place:]))
        forward, backward = counted(server, torch.zeros(2, *costs[place - 1][1], requires_grad=True))
        cost = join([cost for *_, cost in costs[place:]])
        assert (cost.forward, cost.step) == (forward, forward + backward)


def test_the_uses_of_a_weight() -> None:
    with torch.device("meta"):
        assert weight_uses(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 8, 8)) == (
            6 * 4 * 4 * (4 // 2) * 9,
            (6, 4, 4),
        )
        assert weight_uses(nn.Linear(5, 7), (3, 5)) == (3 * 7 * 5, (3, 7))


# --- memory


def test_what_is_kept_for_the_way_back() -> None:
    """Of a convolution its input, of a ReLU its output, which is the next one's input and kept once."""
    with torch.device("meta"):
        layers = build("vgg16", CIFAR, 1000)
        costs = chain_costs(layers, CIFAR, optimizer="adam")
        one = segment_cost(layers[:1], CIFAR, [cost for *_, cost in costs[:1]])
        two = segment_cost(layers[:2], CIFAR, [cost for *_, cost in costs[:2]])
    assert one.saved == 4 * (3 * 32 * 32 + 64 * 32 * 32)
    assert two.saved == 4 * (3 * 32 * 32 + 2 * 64 * 32 * 32)
    weights = 4 * (3 * 9 * 64 + 64)
    assert (one.state, one.trained, one.optimizer, one.handed_on) == (weights, weights, 2 * weights, 3 * weights)
    assert one.memory(64) == 4 * weights + 64 * one.saved


def test_what_is_kept_is_what_a_real_run_keeps() -> None:
    layers = build("resnet18", CIFAR, 10)
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    part = nn.Sequential(*(layer.module for layer in layers[:3])).train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        part(torch.rand(2, *CIFAR))
    own = {one.untyped_storage().data_ptr() for one in (*part.parameters(), *part.buffers())}
    with torch.device("meta"):
        meta = build("resnet18", CIFAR, 10)
        costs = chain_costs(meta, CIFAR)
        cost = segment_cost(meta[:3], CIFAR, [cost for *_, cost in costs[:3]])
    assert 2 * cost.saved == sum(size for place, size in kept.items() if place not in own)


# --- bytes


def test_federated_learning_and_large_batch_sgd() -> None:
    """The state both ways once a round; gradients up and their mean down in every step."""
    setting = Setting(clients=4, samples=1000, batch=100, epochs=2)
    whole = Cost(10, 48, 40, 0, 48, 6.0, 4.0, 6.0, 8.0)
    federated, sgd = baselines(setting, whole)
    assert (federated.bytes_epoch, federated.bytes_epoch_all, federated.bytes) == (96, 384, 192)
    assert setting.steps == 3  # 250 samples in batches of 100
    assert (sgd.bytes_epoch, sgd.bytes_epoch_all) == (3 * 80, 4 * 3 * 80)
    assert federated.flop == 250 * 16 * 2
    assert federated.published == 250 * 9 * 2
    assert federated.memory == 48 + 40 + 100 * 8
    assert baselines(setting, whole, rounds=0.5)[0].bytes_epoch == 48


@pytest.mark.parametrize("clients", [2, 3, 7])
def test_weights_are_handed_on_as_often_as_the_schedule_says(clients: int) -> None:
    names = [f"c{place}" for place in range(clients)]
    graph = parse_graph(
        f"""
splitsec: 1
name: group
parties: {{{", ".join(f"{name}: {{}}" for name in names)}, s: {{listen: "tcp://h:1", address: "tcp://h:1"}}}}
groups: {{all: {{members: [{", ".join(names)}], schedule: round_robin}}}}
segments: {{low: {{at: all, data: x}}, high: {{at: s, loss: mse}}}}
cuts: [{{from: low, to: high, shape: [2], dtype: float32}}]
labels: [{{from: all, to: high, dtype: float32}}]
"""
    )
    for epoch in (0, 1):
        told = [turn for turn in run_schedule(graph, epochs=2) if isinstance(turn, HandOn) and turn.epoch == epoch]
        assert len(told) == hand_ons(clients)


@pytest.mark.parametrize("schedule", ["round_robin", "parallel"])
@pytest.mark.parametrize(("sample", "handed", "state"), [(1000, 50, 4000), (8, 1, 100_000), (500, 0, 90), (90, 30, 70)])
def test_the_number_of_clients_from_which_split_learning_sends_less(
    schedule: str, sample: int, handed: int, state: int
) -> None:
    """Against trying one number after the other, by the very numbers that the methods show."""
    from splitsec.resources import split_method

    def fewer(clients: int) -> bool:
        setting = Setting(clients, 3000, 10, 1, schedule=schedule)  # type: ignore[arg-type]
        client = Cost(1, handed, handed, 0, handed, 1.0, 0.0, 1.0, 0.0)
        split = split_method(setting, client, sample, 0)
        return split.bytes_epoch < baselines(setting, replace(client, state=state))[0].bytes_epoch

    setting = Setting(1, 3000, 10, 1, schedule=schedule)  # type: ignore[arg-type]
    found = fewest_clients(setting, sample, handed, state)
    assert found == next((clients for clients in range(1, 100_000) if fewer(clients)), None)


def test_a_plan_of_one_cut() -> None:
    report, _ = chain_report("vgg16", CIFAR, 1000, ["conv1"], PAPER)
    flows = {(one.kind, one.sender): one for one in report.flows}
    assert flows["activation", "client"].step == 64 * 4 * 64 * 32 * 32
    assert flows["activation", "client"].epoch == flows["gradient", "server"].epoch == 500 * 4 * 64 * 32 * 32
    assert flows["labels", "client"].epoch == 500 * 8
    assert flows["weights", "client"].epoch == 2 * 99 / 100 * 1792 * 4
    client, server = report.parties
    assert (client.parameters, server.parameters) == (1792, 37_694_248 - 1792)
    assert client.sent + client.received == report.methods[0].bytes_epoch
    assert server.sent == 100 * 500 * 4 * 64 * 32 * 32
    assert report.methods[1].bytes_epoch == 2 * 4 * 37_694_248
    assert report.methods[2].bytes_epoch == 2 * 4 * 37_694_248 * 8
    assert report.fewer_from == 87
    chosen = [one for one in report.candidates if one.chosen]
    assert [(one.after, one.fewer_from, one.client_parameters) for one in chosen] == [("conv1", 87, 1792)]
    assert chosen[0].bytes_epoch == report.methods[0].bytes_epoch
    assert len(report.candidates) == 20


def test_a_u_shape_keeps_its_labels() -> None:
    report, segments = chain_report("vgg16", CIFAR, 1000, ["pool2", "fc2"], PAPER)
    assert {one.kind for one in report.flows} == {"activation", "gradient", "weights"}
    assert [one.segments for one in report.parties] == [("conv1 to pool2", "fc3"), ("conv5 to fc2",)]
    assert report.parties[0].parameters == segments[0].parameters + segments[2].parameters == 260_160 + 4_097_000
    there = [(one.sender, one.receiver) for one in report.flows if one.kind == "activation"]
    assert there == [("client", "server"), ("server", "client")]
    with pytest.raises(UserError, match="--cut fc2 --cut pool2"):
        chain_report("vgg16", CIFAR, 1000, ["fc2", "pool2"], PAPER)


def test_clients_at_once_hand_nothing_on_and_fill_the_server() -> None:
    one_by_one, segments = chain_report("resnet18", CIFAR, 10, ["layer1"], replace(PAPER, clients=5))
    at_once, _ = chain_report("resnet18", CIFAR, 10, ["layer1"], replace(PAPER, clients=5, schedule="parallel"))
    assert "weights" not in {one.kind for one in at_once.flows}
    assert at_once.parties[1].flop_step == 5 * one_by_one.parties[1].flop_step
    assert at_once.parties[1].flop_epoch == one_by_one.parties[1].flop_epoch
    more = at_once.parties[1].memory - one_by_one.parties[1].memory
    assert more == 4 * 64 * (segments[1].saved + 2 * 4 * 64 * 32 * 32)


def test_segments_add_up_to_the_whole() -> None:
    with torch.device("meta"):
        layers: list[Layer] = build("resnet50", CIFAR, 100)
        costs = [cost for *_, cost in chain_costs(layers, CIFAR)]
    whole = join(costs)
    for start, end in pairwise((0, 4, 9, len(layers))):
        assert join(costs[start:end]).parameters == sum(cost.parameters for cost in costs[start:end])
    assert whole.batch_statistics == "BatchNorm2d"
    assert whole.parameters == 23_705_252
    assert whole.state == 4 * 23_705_252 + sum(one.nbytes for layer in layers for one in layer.module.buffers())
