"""Rows keep their bound in exact arithmetic, noise is what it says, and nothing tells which input it was."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from splitsec.privacy import mechanism, randomness
from splitsec.privacy.errors import BadParameter
from splitsec.privacy.mechanism import clip_rows, gaussian, laplace, randomise_labels
from splitsec.privacy.randomness import CHUNK, SCALE, KeystreamSource, SeededSourceForTests, gaussian_integers

NOISES = pytest.mark.parametrize("noise", [gaussian, laplace])
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
NORMS = pytest.mark.parametrize("norm", [1, 2])


class NoNoise:
    """A source whose every draw is 0, so that a release shows the integers that noise is added to."""

    def __init__(self, target: randomness._Target = randomness._GAUSSIAN) -> None:
        tables = randomness._tables(target)
        entry = int(tables.stairs[: target.bins // 2].sum())  # the first that names the bin of 0
        self.bits = -(2**31) | entry

    def fill(self, out: Tensor) -> None:
        out.fill_(self.bits)

    def words(self, count: int) -> Tensor:
        raise AssertionError("no draw is left to the remainder")


def exact_norm(row: Tensor, norm: int) -> Fraction:
    """The L1 norm, or the square of the L2 norm, in whole numbers of the smallest float64."""
    whole = 0
    for x in row.flatten().tolist():
        over, under = abs(x).as_integer_ratio()
        whole += (over << 1074 + 1 - under.bit_length()) ** norm
    return Fraction(whole, 1 << 1074 * norm)


def adversarial(dtype: torch.dtype, bound: float) -> Iterator[Tensor]:
    """Rows that would pass ``bound`` if a rounding went the wrong way anywhere."""
    info, random = torch.finfo(dtype), np.random.default_rng(7)
    for size in (1, 3, 200):
        constants = 1.0, 1 / 3, 0.7, math.pi, info.tiny, info.smallest_normal * 3, info.eps, info.max**0.25
        yield torch.tensor(constants, dtype=torch.float64)[:, None].expand(-1, size).to(dtype)
        near = torch.from_numpy(random.standard_normal((4, size)))
        near = near / near.norm(dim=1, keepdim=True) * bound
        for factor in (1 - 2**-19, 1 - 2**-20, 1.0, 1 + 2**-20, 1.01, 1000.0):
            yield (near * factor).clamp(info.min, info.max).to(dtype)
        spread = torch.from_numpy(np.exp(random.uniform(math.log(info.tiny), math.log(info.max) / 2, (8, size))))
        yield spread.to(dtype)
        yield torch.full((1, size), info.max if dtype != torch.float64 else 1e150, dtype=dtype)


# ---- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.threat("T95")
@DTYPES
@NORMS
@pytest.mark.parametrize("bound", [1.0, 0.3, 7e-5, 1e9])
def test_no_clipped_row_passes_the_bound_in_exact_arithmetic(dtype: torch.dtype, norm: int, bound: float) -> None:
    limit = (Fraction(bound) * (1 - Fraction(1, 2**20))) ** norm
    clipped = 0
    for rows in adversarial(dtype, bound):
        result = clip_rows(rows, bound, norm)  # type: ignore[arg-type]
        for before, after in zip(rows, result, strict=True):
            assert exact_norm(after, norm) <= limit
            if not before.equal(after):
                clipped += 1
                assert exact_norm(before, norm) > (Fraction(bound) * (1 - Fraction(1, 2**18))) ** norm
                tiny = dtype == torch.float16 and bound < 1e-3  # subnormal, rounded down by much
                ordinary = not tiny and exact_norm(before, norm) < (2000 * Fraction(bound)) ** norm
                assert exact_norm(after, norm) >= limit * Fraction(97, 100) or not ordinary
    assert clipped or bound > 1e6


@DTYPES
@NORMS
def test_a_row_below_the_bound_comes_back_bit_by_bit(dtype: torch.dtype, norm: int) -> None:
    rows = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows[2] = 0
    rows[3, 0, 0] = -0.0
    assert clip_rows(rows, 100.0, norm).equal(rows)  # type: ignore[arg-type]
    assert clip_rows(torch.zeros(3, 4, dtype=dtype), 2.0**-60, norm).equal(torch.zeros(3, 4, dtype=dtype))  # type: ignore[arg-type]


def test_clipping_keeps_the_direction_and_looks_at_each_row_alone() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [-30.0, 40.0]])
    assert torch.allclose(clip_rows(rows, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [-0.6, 0.8]]), rtol=3e-6)
    assert torch.allclose(
        clip_rows(rows, 1.0, 1), torch.tensor([[3 / 7, 4 / 7], [0.3, 0.4], [-3 / 7, 4 / 7]]), rtol=3e-6
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@DTYPES
def test_what_has_no_norm_is_refused(bad: float, dtype: torch.dtype) -> None:
    rows = torch.ones(4, 2, 3, dtype=dtype)
    rows[2, 1, 0] = bad
    source = KeystreamSource()
    for act in (
        lambda: clip_rows(rows, 1.0),
        lambda: clip_rows(rows, 1.0, 1),
        lambda: gaussian(rows, clip=1.0, noise_multiplier=1.0, source=source),
        lambda: laplace(rows, clip=1.0, noise_multiplier=1.0, source=source),
    ):
        with pytest.raises(BadParameter, match="row 2 has NaN, infinity"):
            act()


def test_a_float64_row_beyond_float64_is_refused_too() -> None:
    with pytest.raises(BadParameter, match="too large to have a norm"):
        clip_rows(torch.full((1, 2), 1e200, dtype=torch.float64), 1.0)


# ---- the integers that noise is added to -----------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("noise_multiplier", [2.0**-10, 0.25, 0.7, 1.0, 2.0**20])
@pytest.mark.parametrize(("noise", "norm"), [(gaussian, 2), (laplace, 1)])
def test_the_integer_vector_never_passes_the_sensitivity(
    noise: Callable[..., Tensor], norm: int, dtype: torch.dtype, noise_multiplier: float
) -> None:
    target = randomness._GAUSSIAN if noise is gaussian else randomness._LAPLACE
    clip = 0.3
    radius = Fraction(SCALE) / (2 * Fraction(noise_multiplier))
    largest = Fraction(0)
    for rows in adversarial(dtype, clip):
        norms = mechanism._norms(rows, norm)  # type: ignore[arg-type]
        work = torch.promote_types(dtype, torch.float32)
        factors = mechanism._factors(norms, clip, float(radius), work)
        whole = (rows * factors).to(torch.int32)
        for row in whole:
            size = exact_norm(row, norm)
            largest = max(largest, size)
            assert size <= (radius * (1 - Fraction(1, 2**20))) ** norm
        if noise_multiplier < 2**10 and dtype in (torch.float32, torch.float64):
            released = noise(rows, clip=clip, noise_multiplier=noise_multiplier, source=NoNoise(target))
            grid = noise_multiplier * 2 * clip / SCALE
            assert torch.allclose(released, (whole.to(work) * grid).to(dtype), rtol=3e-7, atol=0)
    if noise_multiplier < 2**10:
        assert largest > (radius * Fraction(99, 100)) ** norm


def test_a_release_is_the_truncated_row_plus_the_drawn_integers_on_the_grid() -> None:
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    grid = 2.0**-20  # clip 1 and noise multiplier 1: sigma is 2, and the arithmetic below exact
    bare = gaussian(rows, clip=1.0, noise_multiplier=1.0, source=NoNoise())
    clipped = clip_rows(rows, 1.0)
    whole = bare / grid
    assert whole.equal(whole.round())
    assert (bare.abs() <= clipped.abs() * (1 + 1e-6)).all() and ((clipped - bare).abs() < grid * 1.01).all()
    drawn = gaussian_integers(300, SeededSourceForTests(8)).view(6, 50)
    release = gaussian(rows, clip=1.0, noise_multiplier=1.0, source=SeededSourceForTests(8))
    assert release.equal(((whole.to(torch.int64) + drawn).to(torch.float32)) * grid)


# ---- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clip", "noise_multiplier"), [(1.0, 2.0), (0.01, 0.5), (37.0, 1.3)])
@NOISES
def test_noise_has_the_scale_it_should(noise: Callable[..., Tensor], clip: float, noise_multiplier: float) -> None:
    rows = torch.zeros(200, 5000)
    released = noise(rows, clip=clip, noise_multiplier=noise_multiplier, source=SeededSourceForTests(1))
    unit = released.flatten().double().numpy() / (noise_multiplier * 2 * clip)
    law = "norm" if noise is gaussian else "laplace"
    assert stats.kstest(unit, law).pvalue > 1e-4
    assert np.std(unit) == pytest.approx(1 if noise is gaussian else math.sqrt(2), rel=0.005)


@NOISES
def test_noise_is_centred_on_the_clipped_row(noise: Callable[..., Tensor]) -> None:
    row = torch.linspace(-1, 1, 20)
    rows = row.expand(50_000, 20)
    released = noise(rows, clip=0.5, noise_multiplier=1.0, source=SeededSourceForTests(2))
    expected = clip_rows(row[None], 0.5, 2 if noise is gaussian else 1)[0]
    assert torch.allclose(released.mean(0), expected, atol=4.5 * math.sqrt(2) / math.sqrt(50_000))
    assert not torch.allclose(expected, row)


@NOISES
def test_every_release_is_new(noise: Callable[..., Tensor]) -> None:
    rows = torch.randn(8, 3, 40_000)  # a row is longer than what is drawn at a time
    before = rows.clone()
    source = KeystreamSource()
    first, second = (noise(rows, clip=1.0, noise_multiplier=1.0, source=source) for _ in range(2))
    assert rows.equal(before)
    assert (first == second).float().mean() < 1e-3
    pieces = (first / 2).flatten().split(CHUNK)[:20]
    for lower, upper in itertools.pairwise(pieces):
        assert abs(float((lower * upper).mean())) < 4.5 * 2 / math.sqrt(CHUNK)


@NOISES
def test_every_value_could_come_from_every_input(noise: Callable[..., Tensor]) -> None:
    """What noise in floating point lacks: each released number lies on one grid that does not depend on the input."""
    rows = torch.randn(4, 1000, dtype=torch.float64) * 10
    grid = 0.75 * 2 * 0.5 / SCALE
    for dtype in (torch.float64, torch.float32):
        released = noise(rows.to(dtype), clip=0.5, noise_multiplier=0.75, source=KeystreamSource())
        whole = (released.double() / grid).round()
        exact = whole.abs() < 2**22  # float32 holds no finer numbers than the grid's below 2**24, and y / g is rounded
        assert exact.float().mean() > 0.8
        assert released[exact].equal(whole.to(dtype)[exact] * grid)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda t: t,
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.permute(0, 3, 1, 2),
        lambda t: t.transpose(0, 1),
        lambda t: t[:, :, ::2],
        lambda t: t[1:4, 1:],
        lambda t: t[:1].expand(3, -1, -1, -1),
        lambda t: t.flatten(),
        lambda t: t[:, :1, :1, :1],
        lambda t: t[:0],
        lambda t: t[:, :0],
    ],
)
@NOISES
def test_shape_layout_and_values_stay_in_place(
    noise: Callable[..., Tensor], arrange: Callable[[Tensor], Tensor]
) -> None:
    given = arrange(torch.randn(6, 4, 8, 10, generator=torch.Generator().manual_seed(3)))
    target = randomness._GAUSSIAN if noise is gaussian else randomness._LAPLACE
    for act in (
        lambda t: clip_rows(t, 0.7, 2 if noise is gaussian else 1),
        lambda t: noise(t, clip=0.7, noise_multiplier=0.5, source=NoNoise(target)),
    ):
        result = act(given)
        assert result.shape == given.shape
        assert result.stride() == torch.empty_like(given).stride()
        assert torch.allclose(result, act(given.contiguous()), rtol=1e-5)


@DTYPES
@NOISES
def test_every_dtype_comes_back_as_it_was(noise: Callable[..., Tensor], dtype: torch.dtype) -> None:
    rows = torch.randn(100, 2000).to(dtype).requires_grad_()
    released = noise(rows, clip=3.0, noise_multiplier=1.5, source=SeededSourceForTests(5))
    assert released.dtype == dtype and not released.requires_grad
    assert float(released.double().std()) == pytest.approx(9 if noise is gaussian else 9 * math.sqrt(2), rel=0.02)


@pytest.mark.parametrize(
    ("clip", "noise_multiplier", "dtype"),
    [
        (1.0, 2.0**-10 * 0.999, torch.float32),
        (1.0, 2.0**20 * 1.001, torch.float32),
        (2.0**-61, 1.0, torch.float32),
        (2.0**61, 1.0, torch.float32),
        (0.0, 1.0, torch.float32),
        (-1.0, 1.0, torch.float32),
        (math.nan, 1.0, torch.float32),
        (1.0, math.nan, torch.float32),
        (1.0, math.inf, torch.float32),
        (1.0, 0.0, torch.float32),
        (1.0, 3000.0, torch.float16),
        (60_000.0, 1.0, torch.float16),
        (1.0, 1.0, torch.int64),
        (1.0, 1.0, torch.complex64),
    ],
)
@NOISES
def test_where_no_promise_holds_nothing_is_released(
    noise: Callable[..., Tensor], clip: float, noise_multiplier: float, dtype: torch.dtype
) -> None:
    with pytest.raises(BadParameter):
        noise(torch.ones(2, 3, dtype=dtype), clip=clip, noise_multiplier=noise_multiplier, source=KeystreamSource())


def test_clipping_says_what_it_cannot_do() -> None:
    for bound in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(BadParameter, match="the clip norm is"):
            clip_rows(torch.ones(2, 3), bound)
    with pytest.raises(BadParameter, match="clipping knows 1 and 2"):
        clip_rows(torch.ones(2, 3), 1.0, 3)  # type: ignore[arg-type]
    for tensor in (torch.tensor(1.0), torch.ones(2, 3).to_sparse(), torch.ones(2, device="meta")):
        with pytest.raises(BadParameter, match="lies densely on the CPU"):
            clip_rows(tensor, 1.0)


def test_the_extremes_that_are_allowed_work() -> None:
    rows = torch.randn(3, 100)
    for clip in mechanism.CLIP_RANGE:
        for noise_multiplier in mechanism.NOISE_MULTIPLIER_RANGE:
            for noise in (gaussian, laplace):
                for dtype in (torch.float32, torch.bfloat16, torch.float64):
                    given = (rows * clip).to(dtype)
                    released = noise(given, clip=clip, noise_multiplier=noise_multiplier, source=KeystreamSource())
                    size = float((released.double() / (2 * clip * noise_multiplier)).abs().max())
                    assert 1 < size < 2**10
    gaussian(torch.full((2, 9), 3e38), clip=2.0**-60, noise_multiplier=2.0**20, source=KeystreamSource())


@pytest.mark.parametrize("function", [gaussian, laplace, randomise_labels])
def test_randomness_has_no_default(function: Callable[..., Tensor]) -> None:
    parameter = inspect.signature(function).parameters["source"]
    assert parameter.default is inspect.Parameter.empty
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


# ---- the attack that this construction is there for ------------------------------------------------------------------


def impossible(release: Tensor, candidate: Tensor, sigma: float) -> Tensor:
    """[n]: numbers of a row that no float32 noise turns ``candidate`` into (Mironov 2012, section 4)."""
    near = ((release.double() - candidate.double()) / sigma).float().view(torch.int32)
    possible = torch.zeros_like(release, dtype=torch.bool)
    for step in (0, -1, 1, -2, 2):
        possible |= candidate + sigma * (near + step).view(torch.float32) == release
    return (~possible).sum(1)


def share_told_apart(release: Callable[[Tensor], Tensor], sigma: float, trials: int, seed: int) -> float:
    """How often who knows two candidates says rightly from one release which it was: by what is impossible where
    exactly one of them is possible, else by which is nearer, the best there is against ideal noise.
    """
    generator = torch.Generator().manual_seed(seed)
    right = 0
    for _ in range(trials // 50):
        one, other = (torch.randn(50, 512, generator=generator) for _ in range(2))
        one, other = (rows / rows.norm(dim=1, keepdim=True) for rows in (one, other))
        released = release(one)
        against_one, against_other = impossible(released, one, sigma), impossible(released, other, sigma)
        nearer = (released - one).double().norm(dim=1) < (released - other).double().norm(dim=1)
        proof = (against_one == 0) != (against_other == 0)
        right += int(torch.where(proof, against_one == 0, nearer).sum())
    return right / trials


@pytest.mark.threat("T95")
@pytest.mark.parametrize("sigma", [1.0, 4.0, 20.0])
def test_one_release_does_not_tell_which_of_two_it_was(sigma: float) -> None:
    trials = 2000
    allowed = stats.norm.cdf(math.sqrt(2) / (2 * sigma))  # the candidates are sqrt(2) apart
    source, generator = SeededSourceForTests(21), torch.Generator().manual_seed(22)
    naive = share_told_apart(lambda x: x + sigma * torch.randn(x.shape, generator=generator), sigma, trials, 1)
    ours = share_told_apart(
        lambda x: gaussian(x, clip=1.0, noise_multiplier=sigma / 2, source=source), sigma, trials, 1
    )
    assert naive > 0.99 > allowed + 0.2
    assert abs(ours - allowed) < 4 * math.sqrt(allowed * (1 - allowed) / trials) + 0.02


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "epsilon"), [(2, 1.0), (10, 0.5), (10, 3.0), (257, 4.0)])
def test_labels_are_kept_as_often_as_they_should_and_others_are_alike(classes: int, epsilon: float) -> None:
    count = 400_000
    label = classes // 3
    labels = torch.full((count,), label)
    result = randomise_labels(labels, classes=classes, epsilon=epsilon, source=SeededSourceForTests(6))
    assert labels.eq(label).all() and result.dtype == torch.int64 and result.shape == (count,)
    seen = torch.bincount(result, minlength=classes).numpy()
    keep = math.exp(epsilon) / (math.exp(epsilon) + classes - 1)
    expected = np.full(classes, (1 - keep) / (classes - 1) * count)
    expected[label] = keep * count
    assert stats.chisquare(seen, expected).pvalue > 1e-4


@pytest.mark.threat("T45")
@pytest.mark.parametrize("classes", [2, 3, 10, 1000, 2**20])
@pytest.mark.parametrize("epsilon", [2.0**-20, 0.1, 1.0, 8.0, 30.0, 40.0])
def test_no_label_speaks_louder_than_epsilon(classes: int, epsilon: float) -> None:
    other = mechanism._share_of_another(classes, epsilon)
    keep = 2**63 - (classes - 1) * other
    with mpmath.workdps(60):
        assert 1 <= keep / mpmath.mpf(other) <= mpmath.exp(epsilon)
        assert mpmath.log(keep / mpmath.mpf(other)) > epsilon * 0.9


def test_each_outcome_belongs_to_its_label() -> None:
    share = mechanism._share_of_another(4, 1.0)
    outcomes = [0, share - 1, share, 2 * share, 3 * share - 1, 3 * share, 2**63 - 1, -1, -(2**63)]

    class Told:
        def words(self, count: int) -> Tensor:
            return torch.tensor(outcomes)

        def fill(self, out: Tensor) -> None: ...

    def act(label: int) -> list[int]:
        labels = torch.full((len(outcomes),), label)
        return randomise_labels(labels, classes=4, epsilon=1.0, source=Told()).tolist()

    assert act(0) == [1, 1, 2, 3, 3, 0, 0, 0, 1]
    assert act(2) == [0, 0, 1, 3, 3, 2, 2, 2, 0]
    assert act(3) == [0, 0, 1, 2, 2, 3, 3, 3, 0]


@pytest.mark.parametrize(
    ("labels", "classes", "epsilon", "says"),
    [
        (torch.tensor([0, 3]), 3, 1.0, "labels run from 0 to 3, with 3 classes"),
        (torch.tensor([-1, 2]), 3, 1.0, "labels run from -1 to 2"),
        (torch.tensor([0.0, 1.0]), 3, 1.0, "must be int64"),
        (torch.tensor([0, 1], dtype=torch.int32), 3, 1.0, "must be int64"),
        (torch.tensor([[0, 1]]), 3, 1.0, r"shape \[1, 2\]"),
        (torch.tensor([0]), 1, 1.0, "the number of classes is 1"),
        (torch.tensor([0]), 3, 0.0, "epsilon is 0.0"),
        (torch.tensor([0]), 3, math.inf, "epsilon is inf"),
        (torch.tensor([0]), 3, math.nan, "epsilon is nan"),
    ],
)
def test_labels_that_no_promise_covers_are_refused(labels: Tensor, classes: int, epsilon: float, says: str) -> None:
    with pytest.raises(BadParameter, match=says):
        randomise_labels(labels, classes=classes, epsilon=epsilon, source=KeystreamSource())


def test_no_labels_are_no_trouble_and_each_call_differs() -> None:
    source = KeystreamSource()
    assert randomise_labels(torch.zeros(0, dtype=torch.int64), classes=3, epsilon=1.0, source=source).shape == (0,)
    labels = torch.zeros(200, dtype=torch.int64)
    first, second = (randomise_labels(labels, classes=10, epsilon=0.1, source=source) for _ in range(2))
    assert not first.equal(second)
