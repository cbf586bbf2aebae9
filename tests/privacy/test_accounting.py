"""Accounting: against 50 digits, two independent accountants and exact sums; never under, and monotone.

Here: also the mistake that docs/privacy-accounting.md warns of, reproduced, and every figure of that page.
"""

from __future__ import annotations

import functools
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf

from splitsec.privacy import accounting, randomness
from splitsec.privacy.accounting import epsilon, passes_within
from splitsec.privacy.errors import BadParameter, Unsupported
from splitsec.privacy.release import Gaussian, InTheClear, Laplace, Mechanism, RandomisedResponse

PAGE: Final = Path(__file__).parents[2] / "docs" / "privacy-accounting.md"
DELTA: Final = 1e-5


@pytest.fixture(autouse=True)
def fifty_digits() -> Iterator[None]:
    with mpmath.workdps(50):
        yield


# --- the truth, in 50 digits


def exact_delta(mu: Any, eps: Any) -> Any:
    """Balle and Wang 2018, theorem 8; also where ``eps`` is below 0."""
    mu, eps = mpf(mu), mpf(eps)
    return mpmath.ncdf(mu / 2 - eps / mu) - mpmath.exp(eps) * mpmath.ncdf(-mu / 2 - eps / mu)


def inverted(delta_of: Callable[[Any], Any], delta: float, above: float) -> Any:
    low, high = mpf(0), mpf(above)
    assert delta_of(high) <= delta
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if delta_of(middle) <= delta else (middle, high)
    return high


def exact(mu: Any, delta: float) -> Any:
    return inverted(lambda eps: exact_delta(mu, eps), delta, float(mu) ** 2 / 2 + 40 * float(mu))


def response_losses(mechanism: RandomisedResponse, count: int) -> dict[int, Any]:
    """Probability of every total of ``count`` losses of +1, 0 and -1 times epsilon, by convolution."""
    e, k = mpf(mechanism.epsilon), mechanism.classes
    other = 1 / (mpmath.exp(e) + k - 1)
    found = {0: mpf(1)}
    for _ in range(count):
        after: dict[int, Any] = {}
        for total, share in found.items():
            for step, part in ((1, mpmath.exp(e) * other), (0, (k - 2) * other), (-1, other)):
                after[total + step] = after.get(total + step, 0) + share * part
        found = after
    return found


def exact_response(mechanism: RandomisedResponse, count: int, delta: float) -> Any:
    losses = [(total * mpf(mechanism.epsilon), share) for total, share in response_losses(mechanism, count).items()]

    def delta_of(eps: Any) -> Any:
        return sum(share * -mpmath.expm1(eps - loss) for loss, share in losses if loss > eps)

    return inverted(delta_of, delta, mechanism.epsilon * count)


# --- Gaussians


@pytest.mark.threat("T44")
@settings(max_examples=100, deadline=None)
@given(mu=st.floats(-3, math.log10(50)), delta=st.floats(-12, -0.05))
def test_never_below_fifty_digits_and_hardly_above(mu: float, delta: float) -> None:
    mu, delta = 10**mu, 10**delta
    count = max(1, math.ceil(4 * mu * mu))  # one Gaussian of multiplier at least 2, often enough
    one = Gaussian(math.sqrt(count) / mu, 1)
    mu = mpmath.sqrt(count) / mpf(one.noise_multiplier)
    truth = exact(mu, delta)
    found = epsilon({one: count}, delta)
    assert truth <= found <= truth * (1 + mpf(10) ** -6) + 3 * count * accounting.ATOM_ERROR


@settings(max_examples=200, deadline=None)
@given(mu=st.floats(-6, 3), part=st.floats(0, 1))
def test_log_delta_is_right_to_its_safety_margin(mu: float, part: float) -> None:
    """Up to where delta is about 1e-300."""
    mu = 10**mu
    eps = part * (mu * mu / 2 + 37 * mu)
    error = accounting._log_delta(eps, mu) - mpmath.log(exact_delta(mu, eps))
    assert -accounting._LOG_SAFETY / 4 <= error <= (accounting._LOG_SAFETY / 4 if mu >= accounting._NARROW else 2e-6)


@pytest.mark.parametrize("t", [0.9, 0.0, -1e-9, -1.0, -4.999, -5.0, -5.001, -8.0, -20.0, -38.0, -1e3])
def test_mills_ratio(t: float) -> None:
    truth = mpmath.ncdf(t) / mpmath.npdf(t)
    assert abs(accounting._mills(t) / truth - 1) < 2e-15


@pytest.mark.parametrize("coordinates", [1, 512, 8192, 10**6])
def test_ten_releases_at_multiplier_two(coordinates: int) -> None:
    found = epsilon({Gaussian(2.0, coordinates): 10}, DELTA)
    truth = exact(mpmath.sqrt(10) / 2, DELTA)
    assert 7.5112 < truth < 7.5113
    assert truth <= found <= 1.005 * truth
    assert 7.511 <= found <= 7.549


def test_two_cuts_with_the_same_sample_compose_and_do_not_double() -> None:
    two = epsilon({Gaussian(2.0, 512): 10, Gaussian(2.0, 64): 10}, DELTA)
    truth = exact(mpmath.sqrt(20) / 2, DELTA)
    assert truth <= two <= truth * (1 + mpf(10) ** -6)
    assert two == pytest.approx(11.480, abs=5e-4)
    assert two < 2 * epsilon({Gaussian(2.0, 512): 10}, DELTA) - 3


def test_different_multipliers_compose() -> None:
    found = epsilon({Gaussian(2.0, 8): 10, Gaussian(5.0, 8): 7, Gaussian(0.5, 8): 1}, 1e-6)
    assert found == pytest.approx(float(exact(mpmath.sqrt(mpf(10) / 4 + mpf(7) / 25 + 4), 1e-6)), rel=1e-6)


def test_where_delta_covers_everything_only_the_sampler_is_left() -> None:
    assert epsilon({Gaussian(1e6, 4): 1}, DELTA) == pytest.approx(8 * accounting.ATOM_ERROR, rel=1e-6)


# --- two independent accountants


@pytest.mark.parametrize("delta", [1e-5, 1e-8])
@pytest.mark.parametrize(("z", "count"), [(0.5, 1), (1.0, 10), (2.0, 10), (2.0, 200), (8.0, 50), (20.0, 3)])
def test_google_agrees(z: float, count: int, delta: float) -> None:
    theirs = googles(z, count).get_epsilon(delta)
    assert epsilon({Gaussian(z, 1): count}, delta) == pytest.approx(theirs, rel=1e-4)


@functools.cache
def googles(z: float, count: int) -> Any:
    """Their accountant of so many releases; to compose them takes seconds."""
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant().compose(GaussianDpEvent(z), count)


def opacus_epsilon(name: str, z: float, rate: float, steps: int) -> float:
    from opacus.accountants import PRVAccountant, RDPAccountant

    accountant = {"rdp": RDPAccountant, "prv": PRVAccountant}[name]()
    accountant.history = [(z, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta=DELTA))


@pytest.mark.parametrize(("z", "count"), [(1.0, 10), (2.0, 10), (4.0, 50), (2.0, 1)])
def test_opacus_agrees(z: float, count: int) -> None:
    from opacus.accountants.analysis import gdp

    ours = epsilon({Gaussian(z, 1): count}, DELTA)
    assert ours == pytest.approx(gdp.eps_from_mu(mu=math.sqrt(count) / z, delta=DELTA), rel=1e-6)
    assert ours <= opacus_epsilon("rdp", z, 1.0, count) <= 1.25 * ours
    assert ours == pytest.approx(opacus_epsilon("prv", z, 1.0, count), rel=0.01)


def test_the_mistake_not_to_make() -> None:
    """Noise of standard deviation 2C; ten epochs of 2,500 samples in batches of 64; delta 1e-5."""
    rate, steps = 64 / 2500, round(10 * 2500 / 64)
    wrong_sensitivity = 2.0  # 2C over C; over the true 2C the multiplier is 1
    mistaken = opacus_epsilon("rdp", wrong_sensitivity, rate, steps)
    right = epsilon({Gaussian(1.0, 512): 10}, DELTA)
    assert mistaken == pytest.approx(1.17, abs=0.005)
    assert right == pytest.approx(17.86, abs=0.005)
    # One mistake at a time: sampling left out, sensitivity still C; then a tight accountant for the sampling.
    assert epsilon({Gaussian(wrong_sensitivity, 512): 10}, DELTA) == pytest.approx(7.51, abs=0.005)
    assert opacus_epsilon("prv", wrong_sensitivity, rate, steps) == pytest.approx(1.07, abs=0.01)


# --- pure mechanisms and mixtures


@pytest.mark.parametrize(
    ("one", "count"),
    [
        (RandomisedResponse(1.0, 10), 1),
        (RandomisedResponse(1.0, 10), 10),
        (RandomisedResponse(0.3, 2), 60),
        (RandomisedResponse(3.0, 3), 20),
        (RandomisedResponse(0.05, 1000), 40),
    ],
)
def test_repeated_randomised_response(one: RandomisedResponse, count: int) -> None:
    truth = exact_response(one, count, DELTA)
    assert truth <= epsilon({one: count}, DELTA) <= min(1.005 * float(truth) + 1e-4, one.epsilon * count * (1 + 1e-8))


def test_a_label_sent_ten_times_is_not_one_label() -> None:
    """dp-accounting 0.6.0's PLDAccountant counts a repeated RandomizedResponseDpEvent once.  Ours counts each."""
    one = RandomisedResponse(1.0, 10)
    assert epsilon({one: 1}, DELTA) == pytest.approx(1.0, rel=1e-6)
    assert epsilon({one: 10}, DELTA) == pytest.approx(7.993, abs=1e-3)


def laplace_delta(shift: Any, eps: Any) -> Any:
    """One number: Lap(0, 1) against Lap(shift, 1)."""
    return -mpmath.expm1((eps - shift) / 2) if eps < shift else mpf(0)


def laplace_loss(shift: Any, of: Callable[[Any], Any]) -> Any:
    """Mean of ``of`` over the loss of Lap(0, 1) against Lap(shift, 1): shift - 2x, x clipped to [0, shift]."""
    middle = mpmath.quad(lambda x: mpmath.exp(-x) / 2 * of(shift - 2 * x), mpmath.linspace(0, shift, 9))
    return of(shift) / 2 + mpmath.exp(-shift) / 2 * of(-shift) + middle


def above(eps: Any) -> Callable[[Any], Any]:
    return lambda loss: -mpmath.expm1(eps - loss) if loss > eps else mpf(0)


@pytest.mark.parametrize("z", [0.5, 2.0])
def test_two_releases_with_laplace_noise(z: float) -> None:
    with mpmath.workdps(15):
        shift = 1 / mpf(z)

        def delta_of(eps: Any) -> Any:
            """The second release, given the first one's loss, in closed form; below -shift it is 1 - e**eps."""
            return laplace_loss(shift, lambda loss: tail(eps - loss))

        def tail(eps: Any) -> Any:
            return laplace_delta(shift, eps) if eps > -shift else -mpmath.expm1(eps)

        found = epsilon({Laplace(z, 4): 2}, 0.05)
        assert delta_of(mpf(found)) <= 0.05 * 1.001
        assert delta_of(mpf(found) * 0.99) > 0.05
    assert epsilon({Laplace(z, 4): 2}, 1e-9) == pytest.approx(2 / z, rel=1e-6)


@pytest.mark.parametrize("parts", [(0.5, 0.5), (2.0, 0.1), (0.1, 2.0), (5.0, 3.0)])
def test_a_divided_shift_is_never_told_apart_better_than_a_whole_one(parts: tuple[float, float]) -> None:
    """Why Laplace noise on a vector costs what it costs on one number."""
    with mpmath.workdps(15):
        a, b = (mpf(part) for part in parts)
        for share in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
            eps = share * (a + b)

            def tail(rest: Any) -> Any:
                return laplace_delta(b, rest) if rest > -b else -mpmath.expm1(rest)

            divided = laplace_loss(a, lambda loss, eps=eps, tail=tail: tail(eps - loss))
            assert divided <= laplace_delta(a + b, eps) * (1 + mpf(10) ** -9)


@pytest.mark.parametrize(
    ("z", "count", "one", "labels", "delta"),
    [
        (2.0, 10, RandomisedResponse(1.0, 10), 10, 1e-5),
        (1.0, 3, RandomisedResponse(0.2, 2), 30, 1e-5),
        (8.0, 40, RandomisedResponse(2.0, 5), 1, 1e-7),
        (2.0, 10, RandomisedResponse(1.0, 10), 10, 2e-9),
    ],
)
def test_gaussian_noise_and_randomised_response(
    z: float, count: int, one: RandomisedResponse, labels: int, delta: float
) -> None:
    mu, losses = mpmath.sqrt(count) / mpf(z), response_losses(one, labels)

    def delta_of(eps: Any) -> Any:
        return sum(share * exact_delta(mu, eps - total * mpf(one.epsilon)) for total, share in losses.items())

    found = epsilon({Gaussian(z, 16): count, one: labels}, delta)
    assert delta_of(found) <= delta
    assert delta_of(found * 0.995) > delta
    assert found < epsilon({Gaussian(z, 16): count}, delta) + labels * one.epsilon


def test_gaussian_noise_and_laplace_noise() -> None:
    with mpmath.workdps(15):
        mu, shift = mpmath.sqrt(10) / 2, 1 / mpf(3)
        found = epsilon({Gaussian(2.0, 16): 10, Laplace(3.0, 16): 1}, DELTA)

        def delta_of(eps: float) -> Any:
            return laplace_loss(shift, lambda loss: exact_delta(mu, eps - loss))

        assert delta_of(found) <= DELTA < delta_of(found * 0.999)


def test_all_three_in_any_order() -> None:
    releases: dict[Mechanism, int] = {Gaussian(2.0, 16): 10, Laplace(3.0, 16): 4, RandomisedResponse(0.5, 10): 10}
    found = epsilon(releases, DELTA)
    accounting._epsilon.cache_clear()
    assert epsilon(dict(reversed(releases.items())), DELTA) == found
    assert epsilon({Gaussian(2.0, 16): 10}, DELTA) < found < 7.5113 + 4 / 3 + 5


def test_below_the_least_delta_of_distributions_epsilons_add_up() -> None:
    both = epsilon({Gaussian(2.0, 16): 10, RandomisedResponse(1.0, 10): 10}, 1e-10)
    assert both == pytest.approx(epsilon({Gaussian(2.0, 16): 10}, 1e-10) + 10, rel=1e-6)


def test_numbers_too_large_for_distributions_are_answered_at_once() -> None:
    assert epsilon({RandomisedResponse(1.0, 10): 10**12}, DELTA) == pytest.approx(1e12)
    assert epsilon({RandomisedResponse(1e-6, 10): 1000, Gaussian(2.0, 8): 10}, DELTA) < 7.5123


@pytest.mark.parametrize("count", [1, 10, 50])
def test_a_budget_for_labels_holds_what_it_says(count: int) -> None:
    """A budget of ten times epsilon is enough for ten releases, to the last digit."""
    one = RandomisedResponse(0.1, 2)
    assert epsilon({one: count}, 1e-9) <= count / 10
    assert passes_within({RandomisedResponse(5.0, 10): 1}, {}, 5.0 * count, DELTA, 1000) == count


# --- without dp-accounting


@pytest.fixture
def without_dp_accounting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "dp_accounting.pld.privacy_loss_distribution", None)
    accounting._epsilon.cache_clear()
    yield
    accounting._epsilon.cache_clear()


@pytest.mark.usefixtures("without_dp_accounting")
def test_a_mixture_says_what_to_install() -> None:
    with pytest.raises(Unsupported, match=re.escape("pip install 'splitsec[privacy]'")):
        epsilon({Gaussian(2.0, 8): 10, RandomisedResponse(1.0, 10): 10}, DELTA)


@pytest.mark.usefixtures("without_dp_accounting")
def test_gaussians_and_pure_mechanisms_need_nothing() -> None:
    assert epsilon({Gaussian(2.0, 8): 10}, DELTA) == pytest.approx(7.5113, abs=1e-4)
    assert epsilon({RandomisedResponse(1.0, 10): 10, Laplace(4.0, 8): 2}, DELTA) == pytest.approx(10.5, rel=1e-6)


def test_torch_is_not_loaded() -> None:
    code = "import sys, splitsec.privacy.accounting, splitsec.privacy.policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PAGE.parents[1]).returncode == 0


# --- the sampler's share


def test_the_bounds_on_the_sampler_are_those_of_randomness() -> None:
    assert -math.log1p(-randomness.ATOM_ERROR) <= accounting.ATOM_ERROR
    beyond = randomness.TAIL_MASS + mpmath.ncdf(-accounting.GAUSSIAN_REACH)
    assert beyond + mpmath.ncdf(mpf(0.102) - accounting.GAUSSIAN_REACH) <= accounting.TAIL
    assert randomness.TAIL_MASS + mpmath.exp(-accounting.LAPLACE_REACH) <= accounting.TAIL
    assert mpmath.ncdf(-accounting.GAUSSIAN_REACH) <= randomness.TAIL_MASS  # randomness claims the same reach
    assert mpmath.exp(-accounting.LAPLACE_REACH) <= randomness.TAIL_MASS * (1 + mpf(10) ** -2)


@pytest.mark.parametrize("numbers", [1, 2**20, 2**34])
def test_what_the_sampler_adds(numbers: int) -> None:
    factor = numbers * mpf(accounting.ATOM_ERROR)
    truth = exact(mpf(1) / 2, (DELTA - numbers * accounting.TAIL) / mpmath.exp(factor)) + 2 * factor
    assert truth <= epsilon({Gaussian(2.0, numbers): 1}, DELTA) <= truth * (1 + mpf(10) ** -8)
    assert epsilon({Laplace(2.0, numbers): 1}, DELTA) == pytest.approx(float(0.5 + 2 * factor), rel=1e-8)


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_among_endless_numbers_one_lies_beyond_reach(kind: type[Gaussian] | type[Laplace]) -> None:
    assert epsilon({kind(2.0, 2**60): 1}, DELTA) == math.inf


@pytest.mark.parametrize("z", [0.12, 0.2, 0.5, 2.0, 40.0])
def test_no_shift_leaves_reach_more_often_than_is_accounted_for(z: float) -> None:
    """Shifts of many shapes, all of length 1/z: the tails of their coordinates, summed."""
    generator = torch.Generator().manual_seed(7)
    for kind, norm, reach in ((Gaussian, 2, accounting.GAUSSIAN_REACH), (Laplace, 1, accounting.LAPLACE_REACH)):
        _, beta = accounting._sampler(frozenset({(kind(z, 32), 1)}))
        for power in (0.0, 1.0, 4.0, 30.0):
            shift = torch.rand(32, generator=generator, dtype=torch.float64) ** power
            shift /= torch.linalg.vector_norm(shift, ord=norm) * z
            if kind is Gaussian:
                tails = [mpmath.ncdf(one - reach) + mpmath.ncdf(-reach) for one in shift.tolist()]
            else:
                tails = [(mpmath.exp(one - reach) + mpmath.exp(-one - reach)) / 2 for one in shift.tolist()]
            assert sum(tails) + 32 * randomness.TAIL_MASS <= beta


def test_where_the_sampler_promises_nothing_there_is_no_figure() -> None:
    assert epsilon({Gaussian(0.2, 512): 30}, DELTA) < 503
    assert epsilon({Gaussian(1 / 6, 512): 1}, DELTA) == math.inf
    assert epsilon({Gaussian(0.01, 512): 1}, DELTA) == epsilon({Laplace(0.01, 512): 1}, DELTA) == math.inf


# --- laws

MULTIPLIERS = st.floats(0.25, 200)
COUNTS = st.integers(0, 500)
DELTAS = st.floats(1e-10, 0.5)
SLIGHTLY = 1 + 1e-9


@given(MULTIPLIERS, COUNTS, COUNTS, DELTAS)
def test_more_releases_never_cost_less(z: float, few: int, more: int, delta: float) -> None:
    one = Gaussian(z, 512)
    assert epsilon({one: few}, delta) <= epsilon({one: few + more}, delta) * SLIGHTLY


@given(MULTIPLIERS, MULTIPLIERS, COUNTS, DELTAS)
def test_more_noise_never_costs_more(z: float, other: float, count: int, delta: float) -> None:
    less, more = sorted((z, other))
    assert epsilon({Gaussian(more, 512): count}, delta) <= epsilon({Gaussian(less, 512): count}, delta) * SLIGHTLY


@given(MULTIPLIERS, COUNTS, DELTAS, DELTAS)
def test_a_larger_delta_never_costs_more(z: float, count: int, delta: float, other: float) -> None:
    small, large = sorted((delta, other))
    releases = {Gaussian(z, 512): count}
    assert epsilon(releases, large) <= epsilon(releases, small) * SLIGHTLY


@given(st.lists(st.tuples(MULTIPLIERS, COUNTS), min_size=2, max_size=6, unique_by=lambda pair: pair[0]), DELTAS)
def test_the_order_of_releases_does_not_matter(parts: list[tuple[float, int]], delta: float) -> None:
    releases: dict[Mechanism, int] = {Gaussian(z, 8): count for z, count in parts}
    found = epsilon(releases, delta)
    accounting._epsilon.cache_clear()
    assert epsilon(dict(reversed(releases.items())), delta) == found


@pytest.mark.parametrize("kind", [lambda z: Laplace(z, 8), lambda z: RandomisedResponse(1 / z, 10)])
def test_pure_mechanisms_are_monotone_too(kind: Callable[[float], Mechanism]) -> None:
    by_count = [epsilon({kind(2.0): count}, DELTA) for count in (0, 1, 2, 5, 20, 100)]
    assert by_count == sorted(by_count) and by_count[0] == 0
    by_noise = [epsilon({kind(z): 10}, DELTA) for z in (0.5, 1.0, 2.0, 4.0)]
    assert by_noise == sorted(by_noise, reverse=True)


# --- edges


def test_nothing_released_costs_nothing() -> None:
    assert epsilon({}, DELTA) == 0.0
    assert epsilon({Gaussian(1.0, 8): 0, RandomisedResponse(1.0, 2): 0}, DELTA) == 0.0


def test_one_release_in_the_clear_costs_everything() -> None:
    assert epsilon({InTheClear(): 1}, DELTA) == math.inf
    assert epsilon({InTheClear(): 1, Gaussian(2.0, 8): 10, RandomisedResponse(1.0, 10): 10}, DELTA) == math.inf
    assert epsilon({InTheClear(): 0, Gaussian(2.0, 8): 10}, DELTA) == epsilon({Gaussian(2.0, 8): 10}, DELTA)
    assert passes_within({Gaussian(2.0, 8): 1}, {InTheClear(): 1}, 1e9, DELTA, 10) == 0


@pytest.mark.parametrize("delta", [0.0, -1e-5, 1.0, 2.0, math.nan, math.inf])
def test_a_delta_for_which_nothing_holds(delta: float) -> None:
    with pytest.raises(BadParameter, match="delta is"):
        epsilon({Gaussian(1.0, 8): 1}, delta)


@pytest.mark.parametrize("count", [-1, 1.5, math.nan, "ten", 2**63])
def test_counts_that_count_nothing(count: Any) -> None:
    with pytest.raises(BadParameter, match="releases"):
        epsilon({Gaussian(1.0, 8): count}, DELTA)


def test_something_that_is_no_mechanism() -> None:
    with pytest.raises(BadParameter, match="no mechanism"):
        epsilon({"gaussian": 1}, DELTA)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "one", [Gaussian(1e-300, 1), Gaussian(5e-324, 1), Laplace(1e-300, 1), RandomisedResponse(1e308, 2)]
)
def test_what_is_beyond_a_double_is_infinite(one: Mechanism) -> None:
    assert epsilon({one: 2**63 - 1}, DELTA) == math.inf


# --- passes


def test_as_many_passes_as_fit_and_not_one_more() -> None:
    each: dict[Mechanism, int] = {Gaussian(2.0, 512): 1, Gaussian(4.0, 64): 2}
    spent: dict[Mechanism, int] = {Gaussian(2.0, 512): 3, Gaussian(1.0, 9): 1}
    passes = passes_within(each, spent, 10.0, DELTA, 1000)

    def after(count: int) -> float:
        return epsilon({Gaussian(2.0, 512): 3 + count, Gaussian(4.0, 64): 2 * count, Gaussian(1.0, 9): 1}, DELTA)

    assert 0 < passes < 1000
    assert after(passes) <= 10.0 < after(passes + 1)


def test_ten_passes_fit_into_the_budget_of_ten_passes() -> None:
    one: dict[Mechanism, int] = {Gaussian(2.0, 512): 1}
    assert passes_within(one, {}, epsilon({Gaussian(2.0, 512): 10}, DELTA), DELTA, 10**18) == 10
    assert passes_within(one, {}, 3.0, DELTA, 10**18) == 2
    assert passes_within(one, {}, math.inf, DELTA, 7) == 7


def test_edges_of_passes() -> None:
    one: dict[Mechanism, int] = {Gaussian(2.0, 512): 1}
    assert passes_within(one, {}, 1.0, DELTA, 100) == 0
    assert passes_within(one, {Gaussian(2.0, 512): 100}, 1.0, DELTA, 100) == 0
    assert passes_within({}, {Gaussian(2.0, 512): 100}, 1.0, DELTA, 100) == 100
    assert passes_within(one, {}, 1e9, DELTA, 0) == 0
    for budget, most in ((math.nan, 1), (-1.0, 1), (1.0, -1)):
        with pytest.raises(BadParameter):
            passes_within(one, {}, budget, DELTA, most)


# --- the page


def rows(heading: str) -> list[list[str]]:
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index(heading) :].split("\n\n|", 1)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in ("|" + table).splitlines()]


def rounded_up(value: float) -> str:
    """To hundredths; a hundredth of one is the sampler's."""
    return f"{math.ceil(value * 100 - 0.01) / 100:.2f}"


@pytest.mark.parametrize(
    ("heading", "made"),
    [
        ("### Gaussian noise", lambda value: Gaussian(value, 4096)),
        ("### Laplace noise", lambda value: Laplace(value, 4096)),
        ("### Randomised response", lambda value: RandomisedResponse(value, 10)),
    ],
)
def test_the_tables_of_the_page_are_what_is_computed(heading: str, made: Callable[[float], Mechanism]) -> None:
    head, _, *body = rows(heading)
    counts = [int(re.findall(r"\d+", cell)[0]) for cell in head[1:]]
    assert counts == [1, 10, 50] and len(body) >= 4
    for first, *cells in body:
        assert cells == [rounded_up(epsilon({made(float(first)): count}, DELTA)) for count in counts], first


def test_the_two_figures_of_the_mistake_stand_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "1.17" in text and "17.86" in text
    assert [cells[-1] for cells in rows("## The mistake not to make")[2:]] == ["1.17", "7.52", "17.86"]


def test_the_other_figures_of_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    guessed = [100 * float(mpmath.ncdf(mpmath.sqrt(10) / z / 2)) for z in (2, 1)]  # equal errors of the best test
    ratios = [math.exp(1), math.exp(3), math.exp(7.5) / 100, math.exp(17.86) / 1e6, math.exp(1.17)]
    assert [round(ratio, 1) for ratio in ratios[:1] + ratios[4:]] == [2.7, 3.2] and "2.7 times at 1" in text
    assert [round(ratio) for ratio in ratios[1:4]] == [20, 18, 57] and "20 at 3, 1,800 at 7.5, 57 million" in text
    assert all(f"{math.ceil(10 * share) / 10:.1f} %" in text for share in guessed)
    assert f"{2 * 4096 * 10 * accounting.ATOM_ERROR:.0e}" == "3e-07" and "3e-7" in text
    assert accounting._PLD_RELEASES == 131_072 and accounting._PLD_DELTA == 1e-9 and accounting.ATOM_ERROR == 2**-38
    assert round(100 * math.exp(2) / (math.exp(2) + 9)) == 45 and "45 % of the labels stay" in text
    assert accounting._gaussian_epsilon(6.0, DELTA) == pytest.approx(43, abs=0.5) and "closed form says 43" in text
