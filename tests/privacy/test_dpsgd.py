"""DP-SGD for a segment: what the optimiser sees, what it may never see, and which modules are refused and why.

The other implementation to agree with is a loop over samples through plain autograd, each with its row of the cut
gradient.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from splitsec.privacy import dpsgd
from splitsec.privacy.dpsgd import PrivateTraining, refuse_unfit
from splitsec.privacy.errors import BadParameter, Unsupported
from splitsec.privacy.randomness import SCALE, KeystreamSource, SeededSourceForTests
from splitsec.privacy.release import Gaussian

opacus = pytest.importorskip("opacus")


@pytest.fixture(autouse=True)
def _same_chance() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        yield


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, stride=2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )


class Codes(nn.Module):
    """Codes of a patient, embedded, normalised, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 5)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.norm(self.embed(codes)).mean(1))
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.over_time = opacus.layers.DPLSTM(3, 4, batch_first=True)
        self.out = nn.Linear(4, 5)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.over_time(series)[0][:, -1])
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = opacus.layers.DPMultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 5)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.attend(series, series, series)[0].mean(1))
        return out


def one_dimension() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 4, 4, padding="same", groups=2), nn.InstanceNorm1d(4, affine=True), nn.Flatten(), nn.Linear(36, 5)
    )


def images(rows: int) -> torch.Tensor:
    return torch.randn(rows, 1, 8, 8)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "convolutions": (convolutions, images),
    "codes": (Codes, lambda rows: torch.randint(0, 11, (rows, 4))),
    "one dimension": (one_dimension, lambda rows: torch.randn(rows, 2, 9)),
    "recurrent": (Recurrent, lambda rows: torch.randn(rows, 5, 3)),
    "attention": (Attention, lambda rows: torch.randn(rows, 5, 4)),
}


def private(module: nn.Module, *, clip: float = 1.0, noise: float = 1.0, **settings: Any) -> PrivateTraining:
    source = settings.pop("source", None) or SeededSourceForTests(3)
    return PrivateTraining(module, clip=clip, noise_multiplier=noise, source=source, **settings)


def one_by_one(module: nn.Module, inputs: torch.Tensor, cut: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Gradient of each sample alone, by plain autograd: a dict for each row."""
    found = []
    names, parameters = zip(*((name, p) for name, p in module.named_parameters() if p.requires_grad), strict=True)
    for row in range(len(inputs)):
        output = module(inputs[row : row + 1])
        found.append(
            dict(
                zip(names, torch.autograd.grad(output, parameters, cut[row : row + 1], allow_unused=True), strict=True)
            )
        )
    return found


def norm_of(gradients: Mapping[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def step(training: PrivateTraining, inputs: torch.Tensor, cut: torch.Tensor, rows: int | None = None) -> None:
    training.module.train()
    training.module(inputs).backward(cut)
    training.privatise(rows or len(inputs))


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def traces(module: nn.Module) -> list[str]:
    """What a step may have left in the module."""
    left = []
    for name, layer in module.named_modules():
        left += [f"{name}.{kept}" for kept in ("activations", "max_batch_len") if hasattr(layer, kept)]
    for name, p in module.named_parameters():
        for kept in ("grad", "grad_sample", "_current_grad_sample"):
            if getattr(p, kept, None) is not None:
                left.append(f"{name}.{kept}")
        if getattr(p, "_forward_counter", 0):
            left.append(f"{name}._forward_counter")
    return left


# --- what the optimiser sees


@pytest.mark.parametrize("name", NETWORKS)
def test_without_clipping_and_noise_the_gradient_is_the_ordinary_one(name: str) -> None:
    make, draw = NETWORKS[name]
    module = make()
    twin = copy.deepcopy(module)
    training = private(module, clip=100, noise=1e-9)
    inputs, cut = draw(6), torch.randn(6, 5) / 6  # gradient of a mean over 6 rows
    step(training, inputs, cut)
    twin(inputs).backward(cut)
    for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.allclose(p.grad, q.grad, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NETWORKS)
def test_each_samples_own_gradient_is_clipped_over_all_parameters(name: str, reduction: Any) -> None:
    make, draw = NETWORKS[name]
    module = make()
    twin = copy.deepcopy(module)
    inputs, cut = draw(6), torch.randn(6, 5)  # of the losses one by one
    alone = one_by_one(twin, inputs, cut)
    norms = [norm_of(gradients) for gradients in alone]
    clip = sorted(norms)[2]  # three are over it, two under
    factors = [min(1.0, clip / norm) for norm in norms]
    rows = 8 if reduction == "mean" else 1  # of the step: two more are elsewhere
    step(private(module, clip=clip, noise=1e-8, loss_reduction=reduction), inputs, cut / rows, rows=8)
    for name, gradient in gradients_of(module).items():
        expected = sum((g[name] * f for g, f in zip(alone, factors, strict=True)), torch.zeros(())) / rows
        assert torch.allclose(gradient, expected, rtol=2e-5, atol=2e-6), name


@pytest.mark.threat("T35")
def test_the_noise_has_the_scale_that_is_accounted_for() -> None:
    module = nn.Linear(100, 100)
    training = private(module, clip=0.5, noise=3.0, source=KeystreamSource())
    step(training, torch.randn(4, 100), torch.zeros(4, 100), rows=16)
    drawn = torch.cat([gradient.flatten() for gradient in gradients_of(module).values()]).double()
    assert training.sigma == 3.0 * 2 * 0.5
    assert drawn.numel() == training.coordinates == 10100
    assert training.release == Gaussian(3.0, 10100)
    assert abs(float(drawn.std()) / (training.sigma / 16) - 1) < 6 / math.sqrt(2 * 10100)  # six standard errors
    assert abs(float(drawn.mean())) < 6 * training.sigma / 16 / math.sqrt(10100)


def test_noise_never_repeats_and_lands_on_the_grid() -> None:
    module = nn.Linear(5, 5).double()
    training = private(module, source=KeystreamSource())
    inputs, cut = torch.randn(4, 5).double(), torch.randn(4, 5).double() / 4
    seen = []
    for _ in range(2):
        step(training, inputs, cut)
        integers = torch.cat([g.flatten() for g in gradients_of(module).values()]) / (training.sigma / SCALE / 4)
        assert torch.equal(integers, integers.round())
        seen.append(integers)
    assert (seen[0] != seen[1]).all()


def test_parameters_that_no_gradient_reached_get_noise_all_the_same() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unused(x)
            out: torch.Tensor = self.used(x)
            return out

    module = Choosing()
    step(private(module), torch.randn(4, 3), torch.randn(4, 2))
    assert all(bool(p.grad is not None and (p.grad != 0).all()) for p in module.parameters())
    assert not [trace for trace in traces(module) if not trace.endswith(".grad")]


def test_frozen_parameters_stay_untouched() -> None:
    module = convolutions()
    module[0].requires_grad_(False)
    module[4].bias.requires_grad_(False)
    training = private(module)
    step(training, images(4), torch.randn(4, 5))
    assert training.coordinates == 4 + 4 + 5 * 64
    assert set(gradients_of(module)) == {"1.weight", "1.bias", "4.weight"}


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.optim.Adam])
def test_optimisers_step_and_learn(optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    module = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    training = private(module, clip=1.0, noise=0.02)
    steps = optimizer(module.parameters())
    losses = []
    for _ in range(150):
        inputs = torch.randn(64, 2)
        output = module.train()(inputs)
        loss = (output - inputs[:, :1]).square().mean()
        (cut,) = torch.autograd.grad(loss, output, retain_graph=True)
        output.backward(cut)
        training.privatise(64)
        steps.step()
        steps.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


def test_the_gradient_goes_on_to_the_input_as_ever() -> None:
    module = convolutions()
    twin = copy.deepcopy(module)
    private(module)
    inputs, cut = images(3), torch.randn(3, 5)
    one, other = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    module(one).backward(cut)
    twin(other).backward(cut)
    assert one.grad is not None and other.grad is not None
    assert torch.allclose(one.grad, other.grad, atol=1e-6)


# --- sensitivity


@pytest.mark.threat("T35")
@pytest.mark.parametrize("noise", [0.7, 1.0, 30.0])
def test_one_sample_moves_the_sum_by_at_most_2c_in_exact_arithmetic(
    noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpsgd, "gaussian_integers", lambda count, source: torch.zeros(count, dtype=torch.int64))
    module = convolutions().double()
    training = private(module, clip=0.3, noise=noise)
    grid = training.sigma / SCALE
    limit = Fraction(SCALE) / Fraction(noise)  # 2C / g

    def integers(inputs: torch.Tensor, cut: torch.Tensor) -> list[int]:
        step(training, inputs, cut)
        gradients = torch.cat([g.flatten() for g in gradients_of(module).values()]) / (grid / len(inputs))
        assert float((gradients - gradients.round()).abs().max()) < 1e-3
        return [int(value) for value in gradients.round()]

    def apart(one: Sequence[int], other: Sequence[int]) -> Fraction:
        return Fraction(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)))

    inputs, cut = images(5).double(), torch.randn(5, 5).double()
    base = integers(inputs, cut)
    for scale in (1e-9, 1.0, 1e9):
        changed, returned = inputs.clone(), cut.clone()
        changed[2], returned[2] = images(1)[0].double(), torch.randn(5).double() * scale
        assert 0 <= apart(base, integers(changed, returned)) <= limit**2
    opposite = cut.clone()
    opposite[2] *= -1e6  # the worst case: as long as allowed, and the other way
    long = cut.clone()
    long[2] *= 1e6
    assert (limit * Fraction(99, 100)) ** 2 < apart(integers(inputs, long), integers(inputs, opposite)) <= limit**2


@pytest.mark.parametrize("noise", [1.0, 2.0**-20])
@pytest.mark.parametrize("inputs, outputs", [(300, 40), (1, 1)])  # truncation shrinks many coordinates, and hardly one
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_a_clipped_sample_is_within_c_in_exact_arithmetic(
    scale: float, inputs: int, outputs: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpsgd, "gaussian_integers", lambda count, source: torch.zeros(count, dtype=torch.int64))
    module = nn.Linear(inputs, outputs, bias=False)
    training = private(module, clip=1.7, noise=noise)
    module.train()(torch.randn(1, inputs)).backward(torch.randn(1, outputs) * scale)
    squares = sum(int(n) ** 2 for n in training._noised_sum(1))
    limit = (SCALE // 2) ** 2 / Fraction(noise) ** 2
    assert squares <= limit
    assert squares > limit * Fraction(99, 100) or scale <= 1


# --- accounting


@pytest.mark.parametrize("noise, epochs", [(1.0, 1), (2.0, 10), (4.0, 100)])
def test_opacus_accountant_is_not_below_the_exact_value(noise: float, epochs: int) -> None:
    """opacus' noise_multiplier is sigma / C for adding or removing a sample, which moves the sum by C.

    Replacing one moves it by 2C, so what opacus has to be told is sigma / 2C: our noise_multiplier.  With sample_rate
    1 it claims no subsampling; a sample is in one batch an epoch, so that an epoch is one of its steps.
    """
    from opacus.accountants import RDPAccountant  # type: ignore[import-not-found,import-untyped,unused-ignore]

    delta = 1e-5
    accountant = RDPAccountant()
    for _ in range(epochs):
        accountant.step(noise_multiplier=noise, sample_rate=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        upper = accountant.get_epsilon(delta=delta, alphas=[1 + x / 50 for x in range(1, 3000)])

    def delta_of(epsilon: float) -> float:
        """Balle and Wang 2018, theorem 8, with mu = sqrt(epochs) / noise."""
        mu = math.sqrt(epochs) / noise
        phi = torch.special.ndtr(torch.tensor([mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu], dtype=torch.float64))
        return float(phi[0]) - math.exp(epsilon) * float(phi[1])

    low, high = 0.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    assert high <= upper <= high * 1.3

    accounting = pytest.importorskip("splitsec.privacy.accounting")
    training = private(nn.Linear(4, 4), noise=noise)
    ours = accounting.epsilon({training.release: epochs}, delta)
    assert high <= ours <= high * 1.005
    assert ours <= upper


# --- what may never be seen


def test_a_step_out_of_order_changes_nothing() -> None:
    module = convolutions()
    before = copy.deepcopy(module.state_dict())
    private(module)
    steps = torch.optim.SGD(module.parameters(), lr=1.0)
    module.train()(images(4)).backward(torch.randn(4, 5))
    steps.step()  # privatise was forgotten
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_two_forwards_in_flight_are_refused_because_opacus_mixes_their_samples() -> None:
    first, second, cut = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 2)

    plain = nn.Linear(4, 2)
    wrapped = opacus.GradSampleModule(plain, loss_reduction="sum")
    flights = [wrapped(first), wrapped(second)]
    for output in flights:  # in the order in which the micro-batches went out, as the engine does
        output.backward(cut)
    shown = plain.weight.grad_sample
    shown = shown[0] if isinstance(shown, list) else shown
    truth = torch.stack([g["weight"] for g in one_by_one(nn.Linear(4, 2), first, cut)])
    assert not torch.allclose(shown, truth)  # as long as this holds, refusing is not over-careful

    module = nn.Linear(4, 2)
    training = private(module, clip=100, noise=1e-9)
    module.train()(first)
    with pytest.raises(Unsupported, match="second forward before the gradients of the first came back"):
        module(second)
    with pytest.raises(Unsupported, match="second forward before the gradients of the first came back"):
        module.eval()(second)
    training.forget()
    assert traces(module) == []
    step(training, second, cut)
    expected = sum(g["weight"] for g in one_by_one(nn.Linear(4, 2), second, cut))
    assert torch.allclose(gradients_of(module)["weight"], torch.as_tensor(expected), atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_a_lost_batch_leaves_nothing_behind(backward: bool) -> None:
    module = convolutions()
    training = private(module, clip=100, noise=1e-9)
    output = module.train()(images(4))
    if backward:
        output.backward(torch.randn(4, 5))
    assert traces(module)
    training.forget()
    assert traces(module) == []
    with pytest.raises(Unsupported, match="no gradients to make private"):
        training.privatise(4)
    inputs, cut = images(6), torch.randn(6, 5) / 6
    twin = copy.deepcopy(module).eval()
    step(training, inputs, cut)
    twin(inputs).backward(cut)
    for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name


def test_evaluation_counts_for_nothing() -> None:
    module = convolutions()
    training = private(module)
    module.eval()(images(9)).backward(torch.randn(9, 5))
    assert traces(module) == []
    module.train()(images(4)).backward(torch.randn(4, 5))
    with torch.no_grad():
        module.eval()(images(9))
        module.train()(images(9))
    training.privatise(4)
    assert len(gradients_of(module)) == 6


def test_gradients_are_private_once() -> None:
    module = convolutions()
    training = private(module)
    step(training, images(4), torch.randn(4, 5))
    with pytest.raises(Unsupported, match="no gradients to make private"):
        training.privatise(4)
    assert traces(module) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["input", "cut"])
def test_what_is_not_finite_is_refused_before_it_reaches_a_weight(value: float, where: str) -> None:
    module = convolutions()
    before = copy.deepcopy(module.state_dict())
    training = private(module)
    inputs, cut = images(4), torch.randn(4, 5)
    (inputs if where == "input" else cut)[2].view(-1)[3] = value
    module.train()(inputs).backward(cut)
    with pytest.raises(BadParameter) as caught:
        training.privatise(4)
    assert "not finite" in str(caught.value)
    assert not any(character.isdigit() for character in str(caught.value))  # no value, no row, no layer
    assert traces(module) == []
    step(training, images(4), torch.randn(4, 5))
    assert all(torch.isfinite(gradient).all() for gradient in gradients_of(module).values())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_fewer_rows_than_samples_are_refused() -> None:
    module = convolutions()
    training = private(module)
    module.train()(images(4)).backward(torch.randn(4, 5))
    with pytest.raises(BadParameter, match="a step of 3 samples, of which 4 went through here"):
        training.privatise(3)
    assert traces(module) == []


# --- the module stays what it was


def test_the_module_and_its_names_stay_what_they_were() -> None:
    module = convolutions()
    ones = torch.ones(2, 1, 8, 8)
    names, output = list(module.state_dict()), module.eval()(ones)
    training = private(module)
    assert training.module is module
    assert list(training.state_dict()) == list(module.state_dict()) == names
    assert torch.equal(module.eval()(ones), output)
    fresh = convolutions()
    fresh.load_state_dict(training.state_dict())
    assert torch.equal(fresh.eval()(ones), output)


def test_forward_draws_the_same_random_numbers_as_without() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
    twin = copy.deepcopy(module)
    private(module)
    inputs = torch.randn(6, 4)
    torch.manual_seed(1)
    mine = module.train()(inputs)
    torch.manual_seed(1)
    assert torch.equal(mine, twin.train()(inputs))


def test_a_copy_evaluates_and_does_not_train() -> None:
    module = convolutions()
    training = private(module, source=KeystreamSource())
    step(training, images(4), torch.randn(4, 5))
    twin, steps = copy.deepcopy((module, torch.optim.Adam(module.parameters())))
    steps.step()
    ones = torch.ones(2, 1, 8, 8)
    assert torch.equal(twin.eval()(ones), module.eval()(ones))
    with pytest.raises(Unsupported, match="a copy of a module under private training"):
        twin.train()(ones)


def test_thawed_or_replaced_parameters_are_noticed() -> None:
    module = convolutions()
    module[0].requires_grad_(False)
    private(module)
    module[0].requires_grad_(True)
    with pytest.raises(Unsupported, match="other parameters are trainable"):
        module.train()(images(4))


# --- modules that are refused


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class OwnLinear(nn.Linear):
    pass


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    return module


def twice() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


def overlapping() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = nn.Parameter(module[0].weight.detach()[:2])
    return module


def frozen_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).requires_grad_(False))


UNFIT: dict[str, tuple[Callable[[], nn.Module], Sequence[str]]] = {
    "BatchNorm": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
        ["'1' (BatchNorm2d)", "depends on all the others", "use GroupNorm"],
    ),
    "BatchNorm without weights": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)),
        ["use GroupNorm"],
    ),
    "BatchNorm, frozen": (frozen_norm, ["use GroupNorm, also where it is frozen"]),
    "SyncBatchNorm": (lambda: nn.Sequential(nn.Linear(3, 3), nn.SyncBatchNorm(3)), ["use GroupNorm"]),
    "running statistics": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, track_running_stats=True)),
        ["'1' (InstanceNorm2d)", "use track_running_stats=False"],
    ),
    "LSTM": (lambda: nn.LSTM(3, 3), ["opacus.layers.DPLSTM"]),
    "GRU": (lambda: nn.GRU(3, 3), ["opacus.layers.DPGRU"]),
    "RNN": (lambda: nn.RNN(3, 3), ["opacus.layers.DPRNN"]),
    "attention": (lambda: nn.MultiheadAttention(4, 2), ["opacus.layers.DPMultiheadAttention"]),
    "a layer of one's own": (
        lambda: nn.Sequential(Own(), nn.Linear(3, 3)),
        ["'0' (Own)", "holds weights (scale)", "Conv2d", "register_grad_sampler"],
    ),
    "a kind of Linear": (lambda: nn.Sequential(OwnLinear(3, 3)), ["'0' (OwnLinear)", "of exactly these kinds"]),
    "PReLU": (lambda: nn.Sequential(nn.Linear(3, 3), nn.PReLU()), ["'1' (PReLU)", "no per-sample gradient"]),
    "a parameter list": (lambda: nn.ParameterList([torch.ones(3)]), ["the module itself (ParameterList)"]),
    "tied weights": (tied, ["'0.weight' and '1.weight' share weights"]),
    "a layer in two places": (twice, ["'0.weight' and '2.weight', '0.bias' and '2.bias' share weights"]),
    "overlapping weights": (overlapping, ["'0.weight' and '1.weight' share weights"]),
    "in place": (lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), ["use inplace=False"]),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), ["the layer that is not lazy"]),
    "padding_idx": (lambda: nn.Embedding(3, 2, padding_idx=0), ["padding_idx"]),
    "scale_grad_by_freq": (lambda: nn.Embedding(3, 2, scale_grad_by_freq=True), ["scale_grad_by_freq"]),
    "max_norm": (lambda: nn.Embedding(3, 2, max_norm=1.0), ["max_norm=None"]),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(3, 2), ["use Embedding"]),
    "padding_mode": (lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), ["padding_mode='zeros'"]),
    "LayerNorm without bias": (lambda: nn.LayerNorm(3, bias=False), ["use bias=True"]),
    "parametrised": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), ["no per-sample gradient"]),
    "nothing to train": (lambda: nn.Linear(3, 3).requires_grad_(False), ["it has nothing to train"]),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_modules_are_refused_with_reason_and_fix(name: str) -> None:
    make, words = UNFIT[name]
    with pytest.raises(Unsupported) as caught:
        refuse_unfit(make())
    for word in ("not fit for dp_sgd", *words):
        assert word in str(caught.value)
    with pytest.raises(Unsupported):
        private(make())


def test_all_reasons_are_given_at_once() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.BatchNorm1d(3))
    with pytest.raises(Unsupported) as caught:
        refuse_unfit(module)
    assert "'1' (BatchNorm1d), '3' (BatchNorm1d) normalises" in str(caught.value)
    assert "'2' (ReLU) changes" in str(caught.value)


def test_opacus_validator_has_a_say_about_layers_that_are_not_known_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus.validators import ModuleValidator  # type: ignore[import-not-found,import-untyped,unused-ignore]

    monkeypatch.setitem(ModuleValidator.VALIDATORS, nn.Linear, lambda layer: [ValueError("too straight\nand more")])
    with pytest.raises(Unsupported, match=r"'0' \(Linear\) is refused by opacus: too straight$"):
        refuse_unfit(nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize("name", NETWORKS)
def test_fit_modules_pass(name: str) -> None:
    refuse_unfit(NETWORKS[name][0]())


def test_frozen_layers_need_no_gradients_by_sample() -> None:
    refuse_unfit(nn.Sequential(nn.LSTM(3, 3).requires_grad_(False), Own().requires_grad_(False), nn.Linear(3, 3)))


def test_without_opacus_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
        monkeypatch.delitem(sys.modules, name)

    class Nowhere:
        def find_spec(self, name: str, *_: Any) -> None:
            if name.partition(".")[0] == "opacus":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Nowhere(), *sys.meta_path])
    with pytest.raises(Unsupported, match=r"pip install 'splitsec\[privacy\]'"):
        private(nn.Linear(3, 3))


def test_opacus_does_not_set_up_everybodys_log(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    dpsgd._opacus("grad_sample")
    assert logging.getLogger().handlers == []


# --- modules that are refused when they run


class Functional(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self, *, also: bool) -> None:
        super().__init__()
        self.first, self.layer, self.also = nn.Linear(3, 3), nn.Linear(3, 3), also

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        past = nn.functional.linear(x, self.layer.weight, self.layer.bias)
        out: torch.Tensor = past + self.layer(x) if self.also else past
        return out


@pytest.mark.parametrize("also, words", [(False, "not by calling its layer"), (True, "do not add up")])
def test_a_use_that_opacus_does_not_see_is_refused(also: bool, words: str) -> None:
    module = Functional(also=also)
    training = private(module)
    module.train()(torch.randn(4, 3)).backward(torch.randn(4, 3))
    with pytest.raises(Unsupported, match=words):
        training.privatise(4)
    assert traces(module) == []


def test_per_sample_gradients_that_are_wrong_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    samplers = opacus.GradSampleModule.GRAD_SAMPLERS
    right = samplers[nn.Linear]

    def wrong(layer: Any, activations: Any, backprops: torch.Tensor) -> Any:
        return {p: gradients.roll(1, -1) for p, gradients in right(layer, activations, backprops).items()}

    monkeypatch.setitem(samplers, nn.Linear, wrong)
    training = private(nn.Sequential(nn.Linear(3, 3)))
    training.module.train()(torch.randn(4, 3)).backward(torch.randn(4, 3))
    with pytest.raises(Unsupported, match="do not add up"):
        training.privatise(4)


class Again(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(self.layer(x).tanh())
        return out


def test_a_layer_that_is_used_twice_is_refused() -> None:
    module = Again()
    private(module)
    with pytest.raises(Unsupported, match=r"'layer.weight' was used more than once"):
        module.train()(torch.randn(4, 3))
    assert traces(module) == []


class Mixing(nn.Module):
    def __init__(self, mix: Callable[[torch.Tensor], torch.Tensor], *, last: bool) -> None:
        super().__init__()
        self.layer, self.mix, self.last = nn.Linear(3, 3), mix, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.layer(x)) if self.last else self.layer(self.mix(x))


@pytest.mark.parametrize("rows", [2, 5, 64])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x - x.mean(0),
        lambda x: nn.functional.batch_norm(x, None, None, training=True),
        lambda x: x.roll(1, 0) + x,
        lambda x: x + x[-1:],
    ],
)
def test_samples_that_mix_are_refused(mix: Callable[[torch.Tensor], torch.Tensor], last: bool, rows: int) -> None:
    module = Mixing(mix, last=last)
    private(module)
    with pytest.raises(Unsupported, match="changes with the other samples in the batch"):
        module.train()(torch.randn(rows, 3))


@pytest.mark.parametrize("rows", [3, 4])
def test_a_batch_that_is_not_dimension_0_inside_is_refused(rows: int) -> None:
    module = Mixing(lambda x: x.transpose(0, 1), last=False)
    private(module)
    with pytest.raises(Unsupported, match=r"dimension 0 must hold the samples|changes with the other samples"):
        module.train()(torch.randn(rows, 3, 3))


def test_a_batch_that_cannot_tell_is_no_answer() -> None:
    module = Mixing(lambda x: x - x.mean(0), last=True)
    training = private(module)
    for rows in (1, 4):
        module.train()(torch.ones(rows, 3))
        training.forget()
    with pytest.raises(Unsupported, match="changes with the other samples in the batch"):
        module.train()(torch.randn(4, 3))


class Running(nn.Module):
    def __init__(self, *, replace: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.layer, self.replace = nn.Linear(3, 3), replace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.replace:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        elif self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        out: torch.Tensor = self.layer(x)
        return out


@pytest.mark.parametrize("rows, replace", list(itertools.product((1, 4), (False, True))))
def test_buffers_that_learn_from_samples_are_refused(rows: int, replace: bool) -> None:
    module = Running(replace=replace)
    private(module)
    with pytest.raises(Unsupported, match="forward changes the buffers 'mean'"):
        module.train()(torch.randn(rows, 3))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"clip": 0.0}, "clip"),
        ({"clip": -1.0}, "clip"),
        ({"clip": math.nan}, "clip"),
        ({"clip": math.inf}, "clip"),
        ({"noise": 0.0}, "noise_multiplier"),
        ({"noise": math.nan}, "noise_multiplier"),
        ({"noise": 2.0**-33}, "noise_multiplier"),
        ({"noise": 2000.0}, "noise_multiplier"),
        ({"loss_reduction": "none"}, "loss_reduction"),
    ],
)
def test_parameters_without_a_promise_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadParameter, match=words):
        private(nn.Linear(3, 3), **settings)
