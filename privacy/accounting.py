"""From releases to epsilon: what all releases of one sample, together, tell whoever received them.  Never under.

Here: one pure function of numbers of releases and delta, and its use to see how many passes still fit.  Not here: what
a release is (``release``), where numbers of releases are kept (``ledger``), the claim in words, its adversary and its
limits (docs/privacy-accounting.md).

The relation is local: any two values of one sample, everything else equal.  No sampling is taken into account, since
the receiver of a batch sees who is in it.  Releases compose, adaptively.

*Gaussians alone* have a closed form.  A release with noise multiplier z is 1/z-GDP; releases with mu_1, mu_2, ... are
together sqrt(mu_1**2 + mu_2**2 + ...)-GDP (Dong, Roth and Su, Gaussian differential privacy, arXiv:1905.02383,
corollary 3.3), and mu-GDP is (epsilon, delta)-DP exactly where delta is at least (corollary 2.13)

    delta(epsilon) = Phi(-epsilon / mu + mu / 2) - e**epsilon Phi(-epsilon / mu - mu / 2)

(for one release: Balle and Wang, Improving the Gaussian mechanism for differential privacy, ICML 2018, theorem 8).

*Laplace noise and randomised response* are pure: their epsilons add up, at any delta.  Laplace noise on a vector costs
what it costs on one number that moves by the whole L1 sensitivity: of all ways to divide a shift over coordinates,
putting it on one is told apart best.  (Two coordinates: the ratio of the two densities has mean 1 either way, and its
distribution functions for the divided and for the whole shift cross once, so that E(ratio - c)+ of the whole one is the
larger for every c.  More coordinates follow one by one.)

*Mixtures* go through the privacy loss distributions of Google's dp-accounting, rounded up to a grid (pessimistic
estimates; Doroshenko et al., Connect the dots, PETS 2022).  Every other bound that holds is also
computed, and the least of them is the answer.  Its distributions are composed here, not by its ``PLDAccountant``, which
in 0.6.0 counts a repeated ``RandomizedResponseDpEvent`` once.

*The sampler's share.*  Noise is drawn from a finite number of bits (``randomness``).  Let ``ATOM_ERROR`` bound the
relative error of the probability of any integer within REACH scales, and ``TAIL`` the mass beyond.  Let N be the
numbers released.  While every number lies within REACH of what either of two values of the sample would centre it on,
the real probability of all that was released and the ideal one differ by a factor of e**(N ATOM_ERROR) at most, once
for each of the two values.  With beta bounding the probability that some number does not,

    epsilon' = epsilon + 2 N ATOM_ERROR,    delta' = e**(N ATOM_ERROR) delta + beta.

The other value's centre is away by a vector of norm 1/z at most (L2 for Gaussian, L1 for Laplace), in scales.  The
tail beyond REACH less a shift is convex in the shift squared (Laplace: in the shift) up to what TAIL covers, so the
worst vector has one coordinate, and one release of d numbers adds ``d TAIL + P(X > REACH - 1/z)`` to beta.  That costs
nothing at sensible multipliers.  At delta 1e-5 a Gaussian multiplier of 1/5 still has an answer for 30 releases; 1/6
has none but infinity, where the closed form would say 43 for a single one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from operator import index
from typing import Any, Final

from splitsec.privacy.errors import BadParameter, Unsupported
from splitsec.privacy.release import Gaussian, InTheClear, Laplace, Mechanism, RandomisedResponse

__all__ = ["ATOM_ERROR", "GAUSSIAN_REACH", "LAPLACE_REACH", "TAIL", "epsilon", "passes_within"]

ATOM_ERROR: Final = 2.0**-38
"""At least the relative error of the probability of any integer within reach, and its logarithm.
``randomness.ATOM_ERROR``, where it is derived, is 16 times smaller."""

TAIL: Final = 2.0**-73
"""At least the probability that one number lies beyond REACH: ``randomness.TAIL_MASS`` (2**-75) of the sampler's own,
and the ideal mass beyond 10 standard deviations on one side and 9.89 on the other, or beyond 52 Laplace scales."""

GAUSSIAN_REACH: Final = 10.0
"""Standard deviations within which ``ATOM_ERROR`` holds."""

LAPLACE_REACH: Final = 52.0
"""Laplace scales within which ``ATOM_ERROR`` holds."""

_MOST_RELEASES: Final = 2**63 - 1  # what the ledger's file can hold
_SAFETY: Final = 1 + 1e-9  # a factor; roundings of what is computed here are below 1e-13
_LOG_SAFETY: Final = 1e-10  # of log delta: tested against 50 digits to be right to 2e-11
_NARROW: Final = 1e-3  # mu below which a difference of Mills ratios is bounded by its slope
_CONTINUED: Final = -5.0  # below it Mills' ratio is a continued fraction
_TERMS: Final = 60

_PLD_DELTA: Final = 1e-9  # least delta for which distributions are used
_PLD_RELEASES: Final = 2**17  # most pure releases for which they are used: time and memory are bounded
_FFT_ERROR: Final = 1e-10  # of delta: sums over 2**20 cells, each right to 2**-53 of the largest
_FINE, _COARSE = 2**16, 2**13  # cells in the whole range of the loss, at most and at least
_CELLS_PER_LOSS: Final = 16


# ---- the doors -------------------------------------------------------------------------------------------------------


def epsilon(releases: Mapping[Mechanism, int], delta: float) -> float:
    """Least epsilon known, never below the truth, at which ``releases`` of one sample are (epsilon, ``delta``)-DP.

    ``releases``: how often each mechanism was used on the sample.  The relation is local: any two values of the sample.
    Right to 1e-8 for Gaussians alone, apart from the sampler's share.  ``math.inf`` where nothing can be promised, as
    after a release in the clear; 0.0 for no releases.

    Raises ``BadParameter`` for a delta outside (0, 1) or a number that counts nothing, ``Unsupported`` where Gaussian
    noise is mixed with something else and dp-accounting is not installed.
    """
    return _epsilon(_counted(releases), _delta(delta))


def passes_within(
    releases_per_pass: Mapping[Mechanism, int],
    spent: Mapping[Mechanism, int],
    budget: float,
    delta: float,
    most: int,
) -> int:
    """How many passes, each with ``releases_per_pass`` of a sample, fit into ``budget`` on top of ``spent``.

    ``budget``: epsilon, at ``delta``.  The answer is 0 to ``most``, and ``most`` where passes release nothing.  Raises
    what ``epsilon`` raises, and ``BadParameter`` for a budget that is no number or below 0.
    """
    if not budget >= 0:
        raise BadParameter(f"the budget is {budget}, and must be a number from 0 up")
    if most < 0:
        raise BadParameter(f"at most {most} passes, and there can be no fewer than 0")
    each, before, delta = dict(_counted(releases_per_pass)), dict(_counted(spent)), _delta(delta)

    def fits(passes: int) -> bool:
        total = {one: before.get(one, 0) + passes * each.get(one, 0) for one in before | each}
        return max(total.values()) <= _MOST_RELEASES and _epsilon(_counted(total), delta) <= budget

    if not each or not most or fits(most):
        return most
    low, high = 0, most  # low passes fit, or are none; high do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _delta(delta: float) -> float:
    if not 0 < delta < 1:
        raise BadParameter(f"delta is {delta}, and must lie between 0 and 1")
    return float(delta)


_Counted = frozenset[tuple[Mechanism, int]]


def _counted(releases: Mapping[Mechanism, int]) -> _Counted:
    found = set()
    for mechanism, count in releases.items():
        if not isinstance(mechanism, Mechanism):
            raise BadParameter(f"{mechanism!r} is no mechanism that is known here")
        try:
            number = index(count)
        except TypeError:
            raise BadParameter(f"{count!r} releases, and they are counted in whole numbers") from None
        if not 0 <= number <= _MOST_RELEASES:
            raise BadParameter(f"{number} releases, and there can be 0 to {_MOST_RELEASES}")
        if number:
            found.add((mechanism, number))
    return frozenset(found)


# ---- composition -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pure:
    """``count`` releases of a mechanism that is ``epsilon``-DP on its own, at delta 0."""

    mechanism: Laplace | RandomisedResponse
    epsilon: float
    count: int


@lru_cache(maxsize=4096)
def _epsilon(releases: _Counted, delta: float) -> float:
    if any(isinstance(one, InTheClear) for one, _ in releases):
        return math.inf
    factor, beta = _sampler(releases)
    left = (delta - beta) * math.exp(-factor)
    if not left > 0:  # no number, where beta is infinite and the factor underflows
        return math.inf
    shifts = [(1 / one.noise_multiplier, count) for one, count in releases if isinstance(one, Gaussian)]
    mu = math.sqrt(math.fsum(shift * shift * count for shift, count in shifts))  # exact, so in any order
    pure = _pure(releases)
    number = sum(one.count for one in pure)
    bounds = [_gaussian_epsilon(mu, left) * _SAFETY + sum(one.count * one.epsilon for one in pure)]
    if pure and (mu or number > 1) and number <= _PLD_RELEASES and left >= _PLD_DELTA and math.isfinite(bounds[0]):
        distributions = _dp_accounting(needed=mu > 0)
        if distributions is not None:
            bounds.append(_composed(distributions, mu, pure, bounds[0], left) * _SAFETY)
    return min(bounds) + 2 * factor * _SAFETY


def _pure(releases: _Counted) -> list[_Pure]:
    """In an order of their own, so that the same releases always give the same result.

    Epsilons of randomised response stay what they are: its probabilities are rounded to the safe side, and ten releases
    at epsilon 1 fit a budget of 10.
    """
    found = []
    for one, count in releases:
        if isinstance(one, Laplace):
            found.append(_Pure(one, 1 / one.noise_multiplier * _SAFETY, count))
        elif isinstance(one, RandomisedResponse):
            found.append(_Pure(one, one.epsilon, count))
    return sorted(found, key=repr)


def _sampler(releases: _Counted) -> tuple[float, float]:
    """(N ATOM_ERROR, beta): what the sampler adds; see the module's text.  beta is infinite where shifts pass REACH."""
    numbers, beyond = 0, []
    for one, count in releases:
        if not isinstance(one, Gaussian | Laplace):
            continue  # probabilities of randomised response are whole numbers, rounded to the safe side
        shift = 1 / one.noise_multiplier
        if isinstance(one, Gaussian):
            # The tail is convex in the squared shift where shift * (REACH - shift) >= 1; TAIL covers smaller shifts.
            far = 1.001 * _normal(shift - GAUSSIAN_REACH) if shift <= GAUSSIAN_REACH - 0.11 else math.inf
        else:
            far = 1.001 * math.exp(shift - LAPLACE_REACH) if shift <= LAPLACE_REACH else math.inf
        numbers += count * one.coordinates
        beyond.append(count * (one.coordinates * TAIL + far))
    return numbers * ATOM_ERROR, math.fsum(beyond)


# ---- Gaussians -------------------------------------------------------------------------------------------------------


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of mu-GDP at ``delta``, rounded up."""
    if mu == 0:
        return 0.0
    target = math.log(delta) - _LOG_SAFETY
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta))  # there Phi(-t) <= e**(-t**2 / 2) / 2
    if _log_delta(low, mu) <= target:
        return 0.0
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if _log_delta(middle, mu) <= target else (middle, high)
    return high


def _log_delta(eps: float, mu: float) -> float:
    """Log of delta(eps) of mu-GDP, for ``eps`` from 0 to where it is about e**-745.

    With a = mu / 2 - eps / mu, b = a - mu, and Mills' ratio M(t) = Phi(t) / phi(t): e**eps phi(b) = phi(a), so that
    delta = Phi(a) - phi(a) M(b) = phi(a) (M(a) - M(b)).  Nothing overflows, and what is subtracted is never much larger
    than what is left.
    """
    a = mu / 2 - eps / mu
    b = a - mu
    log_density = -a * a / 2 - math.log(2 * math.pi) / 2
    if mu < _NARROW:
        # M and all its derivatives are positive, so the chord's slope is at most the mean of the slopes at its ends.
        return log_density + math.log(mu * (_slope(a) + _slope(b)) / 2)
    if a <= 0:
        return log_density + math.log(_mills(a) - _mills(b))
    return math.log(_normal(a) - math.exp(log_density) * _mills(b))


def _normal(t: float) -> float:
    """Phi(t)."""
    return math.erfc(-t / math.sqrt(2)) / 2


def _mills(t: float) -> float:
    """Phi(t) / phi(t) for t below 1, to a few units in the last place of a double."""
    if t > _CONTINUED:
        return _normal(t) * math.sqrt(2 * math.pi) * math.exp(t * t / 2)
    fraction = -t  # 1 / (x + 1 / (x + 2 / (x + 3 / ...))), x = -t: Abramowitz and Stegun, 26.2.14
    for term in range(_TERMS, 0, -1):
        fraction = -t + term / fraction
    return 1 / fraction


def _slope(t: float) -> float:
    """The derivative of Mills' ratio."""
    return 1 + t * _mills(t)


# ---- mixtures --------------------------------------------------------------------------------------------------------


def _dp_accounting(*, needed: bool) -> Any:
    """dp-accounting's module of privacy loss distributions; None where it is not installed and not ``needed``."""
    try:
        return import_module("dp_accounting.pld.privacy_loss_distribution")
    except ImportError as error:
        if not needed:
            return None
        raise Unsupported(
            "Gaussian noise and other mechanisms on the same samples are accounted for by dp-accounting, which is not "
            "installed: pip install 'splitsec[privacy]'"
        ) from error


def _composed(distributions: Any, mu: float, pure: list[_Pure], bound: float, delta: float) -> float:
    """Epsilon by privacy loss distributions, rounded up to a grid, whose width follows from ``bound``."""
    cell = _cell(mu, pure, bound)
    composed = None
    if mu:
        composed = distributions.from_gaussian_mechanism(1 / mu, value_discretization_interval=cell)
    for one in pure:
        if isinstance(one.mechanism, Laplace):
            alone = distributions.from_laplace_mechanism(
                one.mechanism.noise_multiplier, value_discretization_interval=cell
            )
        else:
            stays, becomes = _response(one.mechanism)
            others = one.mechanism.classes - 2
            upper = {0: stays, 1: becomes} | ({2: math.log(others) + becomes} if others else {})
            alone = distributions.from_two_probability_mass_functions(
                upper | {0: becomes, 1: stays}, upper, value_discretization_interval=cell, symmetric=True
            )
        alone = alone.self_compose(one.count)
        composed = alone if composed is None else composed.compose(alone)
    assert composed is not None
    error = _FFT_ERROR + sum(one.count for one in pure) * 2.0**-50
    return float(composed.get_epsilon_for_delta(delta - error))


def _response(mechanism: RandomisedResponse) -> tuple[float, float]:
    """Log of the probability that a label stays, and that it becomes one given other."""
    stays = -math.log1p((mechanism.classes - 1) * math.exp(-mechanism.epsilon))
    return stays, stays - mechanism.epsilon


def _cell(mu: float, pure: list[_Pure], bound: float) -> float:
    """Width of the grid's cells: fine beside every single loss, but not too many in all.

    The loss of randomised response is rounded up to the grid, so the smallest is put on it.
    """
    wanted = min([one.epsilon for one in pure] + ([mu] if mu else [])) / _CELLS_PER_LOSS
    wanted = min(max(wanted, bound / _FINE), bound / _COARSE)
    responses = [_response(one.mechanism) for one in pure if isinstance(one.mechanism, RandomisedResponse)]
    if not responses:
        return wanted
    loss = min(stays - becomes for stays, becomes in responses)
    return loss / 2.0 ** math.ceil(math.log2(loss / wanted)) if loss > wanted else wanted
