"""The keystream is AES in counter mode; the integers have exactly the probabilities that the docstring promises."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats
from torch import Tensor

from splitsec.privacy import randomness
from splitsec.privacy.errors import BadParameter
from splitsec.privacy.randomness import (
    ATOM_ERROR,
    CHUNK,
    SCALE,
    TAIL_MASS,
    KeystreamSource,
    SeededSourceForTests,
    gaussian_integers,
    gaussian_noise,
    laplace_integers,
)

REPOSITORY = Path(__file__).parents[2]
GAUSSIAN, LAPLACE = randomness._GAUSSIAN, randomness._LAPLACE
BOTH = pytest.mark.parametrize("target", [GAUSSIAN, LAPLACE], ids=lambda target: target.name)
REACH = {GAUSSIAN: 10, LAPLACE: 52}  # scales within which ATOM_ERROR holds


def beyond(target: randomness._Target, x: mpmath.mpf | float) -> mpmath.mpf:
    """P(X > x), x >= 0 in grid units, to 60 digits."""
    z = mpmath.mpf(x) / SCALE
    return mpmath.erfc(z / mpmath.sqrt(2)) / 2 if target is GAUSSIAN else mpmath.exp(-z) / 2


def probability(target: randomness._Target, k: int) -> mpmath.mpf:
    """P(round(X) = k), to 60 digits."""
    half = mpmath.mpf(1) / 2
    if k == 0:
        return 1 - 2 * beyond(target, half)
    return beyond(target, abs(k) - half) - beyond(target, abs(k) + half)


@pytest.fixture(autouse=True)
def _digits() -> Iterable[None]:
    with mpmath.workdps(60):
        yield


class Scripted:
    """A source that gives what it is told to: ``bits`` to every fill, ``numbers`` as the words."""

    def __init__(self, bits: int = 0, numbers: tuple[int, int, int] = (0, 0, 0)) -> None:
        self.bits, self.numbers = bits, numbers

    def fill(self, out: Tensor) -> None:
        out.fill_(self.bits)

    def words(self, count: int) -> Tensor:
        return torch.tensor(self.numbers).repeat_interleave(count // 3)


# ---- bits ------------------------------------------------------------------------------------------------------------


def test_the_keystream_is_aes_256_of_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda count: bytes(range(count)))
    counters = b"".join(number.to_bytes(16, "big") for number in range(20_000))
    expected = Cipher(algorithms.AES256(bytes(range(32))), modes.ECB()).encryptor().update(counters)
    source = KeystreamSource()
    pieces = [torch.empty(3, dtype=torch.int8), torch.empty(70_001, dtype=torch.int32), torch.empty(2, 5).long()]
    for piece in pieces:
        source.fill(piece)
    got = b"".join(piece.numpy().tobytes() for piece in pieces) + source.words(4).numpy().tobytes()
    assert len(got) == 3 + 4 * 70_001 + 80 + 32
    assert got == expected[: len(got)]


def test_a_key_is_left_before_it_has_given_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []

    def urandom(count: int) -> bytes:
        keys.append(bytes([len(keys)] * count))
        return keys[-1]

    monkeypatch.setattr(os, "urandom", urandom)
    monkeypatch.setattr(randomness, "_BYTES_PER_KEY", 64)
    words = KeystreamSource().words(20)
    assert len(keys) == 3
    assert words.unique().numel() == 20
    again = Cipher(algorithms.AES256(keys[1]), modes.ECB()).encryptor().update(bytes(16))
    assert words[8:10].numpy().tobytes() == again


def test_a_forked_copy_takes_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SeededSourceForTests(1)
    same = SeededSourceForTests(1)
    assert source.words(2).equal(same.words(2))
    monkeypatch.setattr(os, "getpid", lambda: -1)  # what a copy sees; the seeded one's next key can be compared
    theirs = source.words(2)
    monkeypatch.undo()
    assert not theirs.equal(same.words(2))


@pytest.mark.threat("T96")
def test_two_sources_have_nothing_in_common_and_no_block_comes_twice() -> None:
    source = KeystreamSource()
    words = torch.cat([source.words(2**16), source.words(2**16), KeystreamSource().words(2**16)])
    assert words.unique().numel() == 3 * 2**16


def test_words_use_all_64_bits_alike() -> None:
    words = SeededSourceForTests(5).words(200_000)
    ones = torch.stack([(words >> bit) & 1 for bit in range(64)]).sum(1)
    assert stats.chi2(64).sf(float(((ones - 100_000) ** 2 / 50_000).sum())) > 1e-4


@pytest.mark.threat("T96")
def test_a_source_does_not_show_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda count: b"K" * count)
    source = KeystreamSource()
    source.words(1)
    shown = repr(source) + str(source) + repr(vars(source))
    assert "KKKK" not in shown and b"K".hex() * 4 not in shown


def test_the_seeded_source_says_so_and_must_be_made_on_purpose() -> None:
    assert SeededSourceForTests(1).words(9).equal(SeededSourceForTests(1).words(9))
    assert not SeededSourceForTests(1).words(9).equal(SeededSourceForTests(2).words(9))
    with pytest.raises(TypeError):
        SeededSourceForTests()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        KeystreamSource(b"k" * 32)  # type: ignore[call-arg]  # nor can anybody choose the real one's key


@pytest.mark.threat("T96")
def test_no_file_that_is_installed_or_run_knows_the_seeded_source() -> None:
    named = [
        path.relative_to(REPOSITORY).as_posix()
        for folder in ("privacy", "splitsec", "transports", "examples")
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in {".py", ".yaml", ".toml"}
        and re.search("SeededSource|_Keystream|Keystream\\(", path.read_text())
    ]
    assert set(named) <= {"privacy/randomness.py", "splitsec/privacy/randomness.py"}
    assert named


# ---- tables ----------------------------------------------------------------------------------------------------------


def weights_of(threshold: list[int], alias: list[int], column: int) -> list[int]:
    """What each bin gets out of an alias table: its own columns' lower parts and the upper parts that name it."""
    weights = list(threshold)
    for lower, other in zip(threshold, alias, strict=True):
        weights[other] += column - lower
    return weights


@BOTH
def test_the_alias_table_is_exactly_its_weights(target: randomness._Target) -> None:
    tables = randomness._tables(target)
    threshold, column = tables.threshold.tolist(), 2**63 // target.bins
    assert sum(tables.weights) == 2**63
    assert all(0 <= lower <= column for lower in threshold)
    assert weights_of(threshold, tables.alias.tolist(), column) == list(tables.weights)
    assert min(tables.weights) >= 1


@pytest.mark.parametrize(
    "weights", [[4, 4], [8, 0], [0, 0, 0, 12], [1, 2, 3, 6], [2**63 - 7, 1, 1, 1, 1, 1, 1, 1], [5]]
)
def test_an_alias_table_of_any_weights(weights: list[int]) -> None:
    threshold, alias = randomness._alias_table(weights)
    assert weights_of(threshold, alias, sum(weights) // len(weights)) == weights


@BOTH
def test_the_stair_is_the_highest_below_the_target(target: randomness._Target) -> None:
    tables = randomness._tables(target)
    half = target.bins // 2
    for number, height in enumerate(tables.stairs.tolist()):
        left = (number - half) << 16
        least = min(probability(target, left), probability(target, left + 2**16 - 1)) * 2**32
        assert height <= least
        assert height + 1 > least * (1 - mpmath.mpf(2) ** -39)
    named = tables.first[: tables.plain].to(torch.int64) - 2**15
    assert (named & 0xFFFF == 0).all()
    assert (named >> 16).add(half).bincount(minlength=target.bins).tolist() == tables.stairs.to(torch.int64).tolist()


@BOTH
def test_a_ceiling_is_above_the_remainder_and_in_proportion_to_its_weight(target: randomness._Target) -> None:
    tables = randomness._tables(target)
    unit = Fraction(tables.ceilings[0].item()) / tables.weights[0]
    for number, (ceiling, weight) in enumerate(zip(tables.ceilings.tolist(), tables.weights, strict=True)):
        assert abs(Fraction(ceiling) / weight / unit - 1) < Fraction(1, 2**51)
        left = (number - target.bins // 2) << 16
        most = max(probability(target, left), probability(target, left + 2**16 - 1)) * 2**32
        assert ceiling > most - tables.stairs[number].item()


@BOTH
def test_the_computed_target_is_right_to_2_to_the_minus_50(target: randomness._Target) -> None:
    reach = REACH[target] * SCALE
    k = np.random.default_rng(1).integers(-reach, reach, 2000)
    k[:7] = 0, 1, -1, reach, -reach, SCALE, 2
    computed = target.atom(torch.from_numpy(k)).tolist()
    worst = max(abs(got / (probability(target, int(one)) * 2**32) - 1) for one, got in zip(k, computed, strict=True))
    assert worst < mpmath.mpf(2) ** -50


def proposals_accepted(target: randomness._Target) -> float:
    """Out of 2**63 * 2**63 * 2**16: the chance that a proposal is accepted, summed over every integer that matters."""
    tables = randomness._tables(target)
    half, places = target.bins // 2, torch.arange(2**16)
    reach = 32 * min(REACH[target], 36)  # 2**-52 of a Laplace lies beyond 36 scales
    chances = []
    for number in range(half - reach, half + reach):
        accepted = randomness._acceptance(tables, torch.full_like(places, number), places + ((number - half) << 16))
        chances.append(float(accepted.to(torch.float64).sum()) * float(tables.weights[number]))
    return math.fsum(chances)


@pytest.mark.threat("T95")
@BOTH
def test_every_integer_has_its_probability(target: randomness._Target) -> None:
    """The whole sampler as a sum, nothing drawn: stair plus remainder as rejection normalises it, against mpmath."""
    tables = randomness._tables(target)
    half, reach = target.bins // 2, REACH[target] * SCALE
    total = mpmath.mpf(proposals_accepted(target))
    some = np.random.default_rng(2).integers(-reach, reach, 500).tolist()
    for k in [*some, 0, 1, -1, 65535, 65536, -65536, -65537, 4 * SCALE, reach - 1, -reach]:
        number = (k >> 16) + half
        accepted = int(randomness._acceptance(tables, torch.tensor([number]), torch.tensor([k]))[0])
        left_over = tables.remainder * tables.weights[number] * accepted / total
        got = mpmath.mpf(int(tables.stairs[number])) / 2**32 + left_over
        assert abs(got / probability(target, k) - 1) < ATOM_ERROR, k


@BOTH
def test_little_lies_beyond_the_reach(target: randomness._Target) -> None:
    assert 2 * beyond(target, REACH[target] * SCALE) < TAIL_MASS


# ---- draws -----------------------------------------------------------------------------------------------------------

DRAWS = 4_000_000


@pytest.fixture(scope="module")
def gaussian_draws() -> np.ndarray:
    return gaussian_integers(DRAWS, SeededSourceForTests(11)).numpy()


@pytest.fixture(scope="module")
def laplace_draws() -> np.ndarray:
    return laplace_integers(DRAWS, SeededSourceForTests(12)).numpy()


def chi_square(draws: np.ndarray, width: float, cdf: stats.rv_continuous) -> float:
    """p-value of draws against the target, in cells of ``width`` scales that expect 20 draws at least."""
    edges = np.arange(-14, 14 + width, width)
    expected = np.diff(cdf.cdf(edges - 0.5 / SCALE)) * draws.size
    seen, _ = np.histogram(draws / SCALE, edges)
    thin = expected < 20
    seen = np.append(seen[~thin], draws.size - seen[~thin].sum())
    expected = np.append(expected[~thin], draws.size - expected[~thin].sum())
    return float(stats.chisquare(seen, expected).pvalue)


@pytest.mark.parametrize("width", [1 / 8, 1 / 32, 1 / 512])
def test_draws_fall_into_cells_as_they_should(
    gaussian_draws: np.ndarray, laplace_draws: np.ndarray, width: float
) -> None:
    assert chi_square(gaussian_draws, width, stats.norm) > 1e-4
    assert chi_square(laplace_draws, width, stats.laplace) > 1e-4


def test_draws_pass_kolmogorov_smirnov(gaussian_draws: np.ndarray, laplace_draws: np.ndarray) -> None:
    assert stats.kstest(gaussian_draws[:2_000_000] / SCALE, "norm").pvalue > 1e-4
    assert stats.kstest(laplace_draws[:2_000_000] / SCALE, "laplace").pvalue > 1e-4


def test_draws_have_their_moments(gaussian_draws: np.ndarray, laplace_draws: np.ndarray) -> None:
    z, w = gaussian_draws / SCALE, laplace_draws / SCALE
    root = math.sqrt(DRAWS)
    assert abs(z.mean()) < 4.5 / root
    assert abs((z**2).mean() - 1) < 4.5 * math.sqrt(2) / root
    assert abs((z**3).mean()) < 4.5 * math.sqrt(15) / root
    assert abs((z**4).mean() - 3) < 4.5 * math.sqrt(96) / root
    assert abs(w.mean()) < 4.5 * math.sqrt(2) / root
    assert abs(np.abs(w).mean() - 1) < 4.5 / root
    assert abs((w**2).mean() - 2) < 4.5 * math.sqrt(20) / root


def test_low_bits_are_uniform_over_all_draws_and_over_those_of_the_remainder(gaussian_draws: np.ndarray) -> None:
    def uniform(draws: np.ndarray) -> float:
        return float(stats.chisquare(np.bincount(draws & 0xFF, minlength=256)).pvalue)

    assert uniform(gaussian_draws) > 1e-4
    tables = randomness._tables(GAUSSIAN)
    words = SeededSourceForTests(13).words(3 * 500_000).view(3, -1)
    left_over = randomness._remainder(tables, words).numpy()
    assert left_over.size > 250_000
    assert uniform(left_over) > 1e-4


def test_no_draw_tells_of_another(gaussian_draws: np.ndarray) -> None:
    z = gaussian_draws / SCALE
    for lag in (1, 2, 7, CHUNK):
        assert abs(np.mean(z[lag:] * z[:-lag])) < 4.5 / math.sqrt(z.size - lag)
        assert abs(np.mean((z[lag:] ** 2 - 1) * (z[:-lag] ** 2 - 1))) < 4.5 * 2 / math.sqrt(z.size - lag)
    source = SeededSourceForTests(11)
    first, second = (gaussian_integers(100_000, source).numpy() / SCALE for _ in range(2))
    assert abs(np.mean(first * second)) < 4.5 / math.sqrt(100_000)


def test_the_first_bits_choose_bin_and_place() -> None:
    tables = randomness._tables(GAUSSIAN)
    lowest = int(tables.stairs.nonzero()[0, 0])
    out = torch.empty(3, dtype=torch.int32)
    for place in (0, 1, 65535):
        gaussian_noise(Scripted(bits=(place - 2**15) * 2**16), 3).fill(out)
        assert out.tolist() == [((lowest - 512) << 16) + place] * 3


@pytest.mark.parametrize("scales", [-15.9, -8.4, -5.8, 5.8, 9.99])
def test_the_tails_are_reached(scales: float) -> None:
    """torch.randn in float32 never passes 5.77; here every integer up to 16 sigma has words that give it."""
    tables = randomness._tables(GAUSSIAN)
    k = int(scales * SCALE)
    column = (k >> 16) + 512
    assert tables.threshold[column] > 0
    source = Scripted(bits=0xFFFF, numbers=(column, k & 0xFFFF, 0))
    accepted = int(randomness._acceptance(tables, torch.tensor([column]), torch.tensor([k]))[0])
    assert accepted == pytest.approx(
        float((probability(GAUSSIAN, k) * 2**32) / mpmath.mpf(tables.ceilings[column].item()) * 2**63),
        rel=1e-12,
        abs=1,
    )
    if accepted:
        out = torch.empty(5, dtype=torch.int32)
        gaussian_noise(source, 5).fill(out)
        assert out.tolist() == [k] * 5
    assert (accepted > 0) == (abs(scales) < 11)


def test_a_draw_is_an_int64_whatever_the_count() -> None:
    for count in (0, 1, CHUNK - 1, CHUNK + 1, 100_003):
        draws = gaussian_integers(count, KeystreamSource())
        assert draws.shape == (count,) and draws.dtype == torch.int64
        assert laplace_integers(count, KeystreamSource()).shape == (count,)
    with pytest.raises(BadParameter, match="-1 draws"):
        gaussian_integers(-1, KeystreamSource())


def test_a_stream_may_give_more_than_was_announced() -> None:
    noise = gaussian_noise(SeededSourceForTests(4), 10)
    out = torch.empty(CHUNK, dtype=torch.int32)
    draws = []
    for _ in range(8):
        noise.fill(out)
        draws.append(out.clone())
    assert stats.kstest(torch.cat(draws).numpy() / SCALE, "norm").pvalue > 1e-4
