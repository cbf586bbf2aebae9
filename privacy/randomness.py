"""Noise as integers, drawn from a keystream: whole grid units, with the probability of every one of them known.

Here: the keystream (``KeystreamSource``), its seeded twin (``SeededSourceForTests``), and draws of round(X), where X is
Gaussian or Laplace noise of scale ``SCALE`` grid units.  Not here: what a grid unit is worth and what noise is added to
(``mechanism``).

Why integers: noise that was computed in floating point leaves holes between the values it can take, and the holes give
away what it was added to (Mironov, On significance of the least significant bits for differential privacy, CCS 2012).
A sum of integers has no holes.

How an integer k is drawn, exactly but for the error below.  Let f(k) be the probability of round(X) = k.  Cut the line
into bins of 2**16 integers.  A *stair* lies under f: bin b gets the share m_b / 2**16, with m_b the largest integer for
which the stair stays below f everywhere in the bin.  So 16 random bits choose a bin and 16 more a place in it, and that
is all for 98 of 100 draws.  The others, ``1 - sum(m_b) / 2**16`` of them, must follow what is left, r(k) = f(k) -
stair(k).  They are drawn by rejection: an alias table (Walker 1977; Vose 1991), built in whole numbers so that it has
exactly the weights it should, proposes a bin in proportion to W_b / 2**63 (W_b above the largest r in that bin), 16
bits a place, and 63 bits decide whether the proposal is accepted, with probability r(k) / (lambda W_b).

Error.  k is exact in float64, and so are k**2 and k / SCALE, since SCALE is a power of two.  So the computed f has a
relative error of at most 2**-50 (exp to a few units in the last place, three roundings; tested against mpmath).  The
subtraction, the division and the 63 bits add 2**-51 of f at most, where |X| <= REACH scales.  Hence the computed r has
an error e(k) of at most 2**-49 f(k).  Rejection divides by the sum of r + e, which is p + E with p = sum of r >= 1/70
and |E| <= 2**-49.  The result, stair + p (r + e) / (p + E), is f (1 + d) with |d| <= 2**-49 (1 + 1/p) / (1 - |E|/p)
< 2**-42: ``ATOM_ERROR``.  Beyond REACH (10 sigma, 52 Laplace scales) lies at most ``TAIL_MASS`` of f and of the draws.
The largest |k| is 16 sigma, or 64 Laplace scales.

Not claimed: the time a draw takes depends on the noise (never on what it is added to), and noise stays in freed memory.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Final, Protocol, final

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from torch import Tensor

from splitsec.privacy.errors import BadParameter

__all__ = [
    "ATOM_ERROR",
    "CHUNK",
    "SCALE",
    "TAIL_MASS",
    "IntegerNoise",
    "KeystreamSource",
    "NoiseSource",
    "SeededSourceForTests",
    "gaussian_integers",
    "gaussian_noise",
    "laplace_integers",
    "laplace_noise",
]

SCALE: Final = 2**21
"""Grid units in one standard deviation (Gaussian) or one scale (Laplace)."""

ATOM_ERROR: Final = 2.0**-42
"""Bound on the relative error of the probability of any one integer within 10 sigma, or 52 Laplace scales."""

TAIL_MASS: Final = 2.0**-75
"""Bound on the probability of all integers beyond these, of the ideal noise and of ours."""

CHUNK: Final = 2**15
"""Integers at a time: the buffers of a chunk stay in a core's cache."""

_KEY_BYTES: Final = 32
_BYTES_PER_KEY: Final = 2**30  # a block cipher's blocks never repeat: after 2**26 of them that tells by at most 2**-77
_ZEROS: Final = memoryview(bytes(4 * CHUNK))
_BIN: Final = 16  # bits of a place within a bin
_MASK_16: Final = 2**16 - 1
_MASK_63: Final = 2**63 - 1
_POOL: Final = 2**15  # most draws from the remainder to prepare at a time


# ---- where bits come from --------------------------------------------------------------------------------------------


class NoiseSource(Protocol):
    """Independent uniform bits."""

    def fill(self, out: Tensor) -> None:
        """Overwrite ``out`` (contiguous, on the CPU, of any integer dtype) with uniform bits."""

    def words(self, count: int) -> Tensor:
        """int64 [count], uniform over all 2**64 patterns."""


class _Keystream(ABC):
    """AES-256 in counter mode over zeros (NIST SP 800-38A, 6.5), a new key every GiB.  For one thread."""

    def __init__(self) -> None:
        self._left = 0  # bytes that the present key may still give
        self._process = os.getpid()
        self._cipher: CipherContext

    @abstractmethod
    def _next_key(self) -> bytes: ...

    def fill(self, out: Tensor) -> None:
        """Overwrite ``out`` (contiguous, on the CPU, of any integer dtype) with the next bytes of the keystream."""
        if self._process != os.getpid():  # a forked copy would go on with its parent's noise
            self._process, self._left = os.getpid(), 0
        rest = memoryview(out.numpy().reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        while rest:
            if not self._left:
                self._cipher = Cipher(algorithms.AES256(self._next_key()), modes.CTR(bytes(16))).encryptor()
                self._left = _BYTES_PER_KEY
            size = min(len(rest), len(_ZEROS), self._left)
            self._left -= size
            self._cipher.update_into(_ZEROS[:size], rest[:size])
            rest = rest[size:]

    def words(self, count: int) -> Tensor:
        """int64 [count], uniform over all 2**64 patterns."""
        out = torch.empty(count, dtype=torch.int64)
        self.fill(out)
        return out


@final
class KeystreamSource(_Keystream):
    """Bits from keys that the operating system's generator makes, and that nobody can set, see or guess."""

    def _next_key(self) -> bytes:
        return os.urandom(_KEY_BYTES)


@final
class SeededSourceForTests(_Keystream):
    """The same bits for the same ``seed``, so no secret at all: whoever knows the seed takes the noise away again.

    For tests only.  Nothing in splitsec makes one, and no file can ask for one.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._keys = 0

    def _next_key(self) -> bytes:
        self._keys += 1
        return hashlib.sha256(f"splitsec, noise for tests only: {self._seed} {self._keys}".encode()).digest()


# ---- what is drawn ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """A distribution of integers that falls away from 0 on both sides.

    ``atom``: int64 [n] to float64 [n], 2**32 times the probability of each integer.  ``bins``: a power of two; bin b
    holds the integers from ``(b - bins / 2) * 2**16`` on.
    """

    name: str
    bins: int
    atom: Callable[[Tensor], Tensor]


def _gaussian_atom(k: Tensor) -> Tensor:
    """2**32 P(round(X) = k), X normal with deviation SCALE.

    P is the integral of the density over [k - 1/2, k + 1/2]; with z = k / SCALE that is density(k) (1 + (z**2 - 1) /
    (24 SCALE**2) + ...), where the rest is below 2**-80.
    """
    square = k.to(torch.float64).div_(SCALE).square_()
    density = torch.exp(square * -0.5).mul_(2.0**32 / (SCALE * math.sqrt(2 * math.pi)))
    return density.mul_(square.sub_(1).div_(24.0 * SCALE**2).add_(1))


def _laplace_atom(k: Tensor) -> Tensor:
    """2**32 P(round(X) = k), X Laplace with scale SCALE: e**(-|k| / SCALE) sinh(1 / (2 SCALE)) but at k = 0."""
    beside = torch.exp(k.abs().to(torch.float64).div_(-SCALE)).mul_(2.0**32 * math.sinh(0.5 / SCALE))
    return beside.masked_fill_(k == 0, 2.0**32 * -math.expm1(-0.5 / SCALE))


_GAUSSIAN: Final = _Target("gaussian", 2**10, _gaussian_atom)
_LAPLACE: Final = _Target("laplace", 2**12, _laplace_atom)


@dataclass(frozen=True)
class _Tables:
    """A target, prepared.  Bin weights are whole numbers: ``stairs`` out of 2**16, ``weights`` out of 2**63."""

    target: _Target
    stairs: Tensor
    """float64 [bins], m_b: the bin's height under the stair, in units of 2**-32; whole numbers."""
    first: Tensor
    """int32 [2**16]: what 16 signed bits are added to, m_b entries for bin b, and then zeros."""
    plain: int
    """Sum of m_b: entries of ``first`` that name a bin."""
    weights: tuple[int, ...] = field(repr=False)
    """W_b, the proposals for the remainder."""
    ceilings: Tensor
    """float64 [bins], lambda W_b: what a bin's remainder never reaches, in units of 2**-32."""
    threshold: Tensor
    """int64 [bins]: a column's fraction below it stays, out of 2**63 / bins; any other goes to ``alias``."""
    alias: Tensor
    """int64 [bins]."""

    @property
    def remainder(self) -> float:
        """The share of draws that the stair does not serve."""
        return 1 - self.plain / 2**16


@cache
def _tables(target: _Target) -> _Tables:
    half = target.bins // 2
    left = (torch.arange(target.bins, dtype=torch.int64) - half) << _BIN
    ends = target.atom(left), target.atom(left + _MASK_16)
    least, most = torch.minimum(*ends), torch.maximum(*ends)
    stairs = torch.floor(least * (1 - 2.0**-40))
    counts = stairs.to(torch.int64)
    plain = int(counts.sum())
    first = torch.zeros(2**16, dtype=torch.int32)
    first[:plain] = (left + 2 ** (_BIN - 1)).repeat_interleave(counts).to(torch.int32)
    above = [Fraction(top * (1 + 2.0**-40)) - int(stair) for top, stair in zip(most.tolist(), counts, strict=True)]
    unit = sum(above) / (2**63 - target.bins)  # lambda
    weights = [math.ceil(one / unit) for one in above]
    weights[half] += 2**63 - sum(weights)
    threshold, alias = _alias_table(weights)
    return _Tables(
        target=target,
        stairs=stairs,
        first=first,
        plain=plain,
        weights=tuple(weights),
        ceilings=torch.tensor([float(unit * weight) for weight in weights], dtype=torch.float64),
        threshold=torch.tensor(threshold, dtype=torch.int64),
        alias=torch.tensor(alias, dtype=torch.int64),
    )


def _alias_table(weights: list[int]) -> tuple[list[int], list[int]]:
    """(threshold, alias) that give every bin exactly its weight: columns of one size, each shared by two bins at most.

    ``weights``: whole numbers whose sum is a multiple of their number.  Vose's method, which rounds in floating point,
    has nothing to round here.
    """
    size, left_over = divmod(sum(weights), len(weights))
    assert not left_over
    rest = list(weights)
    threshold, alias = [size] * len(weights), list(range(len(weights)))
    small = [number for number, weight in enumerate(rest) if weight < size]
    large = [number for number, weight in enumerate(rest) if weight >= size]
    while small:
        lower, upper = small.pop(), large[-1]
        threshold[lower], alias[lower] = rest[lower], upper
        rest[upper] -= size - rest[lower]
        if rest[upper] < size:
            small.append(large.pop())
    return threshold, alias


@final
class IntegerNoise:
    """A stream of independent draws from one target.  Made by ``gaussian_noise`` and ``laplace_noise``."""

    def __init__(self, target: _Target, source: NoiseSource, count: int) -> None:
        """``count``: how many will be drawn, more or less; it only decides how much is prepared at a time."""
        if count < 0:
            raise BadParameter(f"{count} draws, and there can be no fewer than 0")
        self._tables = _tables(target)
        self._source = source
        self._left = count
        self._pool = torch.empty(0, dtype=torch.int32)
        self._bits = torch.empty(min(count, CHUNK), dtype=torch.int32)
        self._chosen = torch.empty_like(self._bits)

    def fill(self, out: Tensor) -> None:
        """Overwrite ``out``, int32 [n] with n <= CHUNK and contiguous, with the next n draws."""
        bits, chosen = self._buffers(out.numel())
        self._source.fill(bits)
        torch.bitwise_and(bits, _MASK_16, out=chosen)
        torch.index_select(self._tables.first, 0, chosen, out=out)
        out += bits.bitwise_right_shift_(16)  # keeps the sign: -2**15 to 2**15 - 1 around the middle of the bin
        unserved = torch.from_numpy(np.flatnonzero(chosen.numpy() >= self._tables.plain))
        out[unserved] = self._from_remainder(unserved.numel())
        self._left -= out.numel()

    def _buffers(self, count: int) -> tuple[Tensor, Tensor]:
        if count > self._bits.numel():
            self._bits, self._chosen = (torch.empty(count, dtype=torch.int32) for _ in range(2))
        return self._bits[:count], self._chosen[:count]

    def _from_remainder(self, count: int) -> Tensor:
        """int32 [count] drawn from the remainder: prepared in large batches, handed out in small ones."""
        while self._pool.numel() < count:
            ahead = int(self._left * self._tables.remainder * 1.02)
            missing = max(count, min(ahead, _POOL)) - self._pool.numel()
            candidates = missing * 2 + 64
            accepted = _remainder(self._tables, self._source.words(3 * candidates).view(3, candidates))
            self._pool = torch.cat([self._pool, accepted])
        served, self._pool = self._pool[:count], self._pool[count:]
        return served


def _remainder(tables: _Tables, words: Tensor) -> Tensor:
    """int32 [m]: the accepted ones of n proposals for the remainder, each made of three words (int64 [3, n])."""
    bins = tables.target.bins
    words = words.bitwise_and_(_MASK_63)
    column, fraction = words[0] & (bins - 1), words[0] >> (bins.bit_length() - 1)
    stays = fraction < tables.threshold.index_select(0, column)
    chosen = torch.where(stays, column, tables.alias.index_select(0, column))
    k = ((chosen - bins // 2) << _BIN) + (words[1] & _MASK_16)
    return k.masked_select(words[2] < _acceptance(tables, chosen, k)).to(torch.int32)


def _acceptance(tables: _Tables, chosen: Tensor, k: Tensor) -> Tensor:
    """int64 [n], out of 2**63: the probability that integer ``k`` (int64 [n]) of bin ``chosen`` is accepted."""
    excess = tables.target.atom(k).sub_(tables.stairs.index_select(0, chosen))
    return excess.div_(tables.ceilings.index_select(0, chosen)).mul_(2.0**63).to(torch.int64)


# ---- the doors -------------------------------------------------------------------------------------------------------


def gaussian_noise(source: NoiseSource, count: int) -> IntegerNoise:
    """A stream of about ``count`` draws of round(X), X normal with mean 0 and standard deviation SCALE."""
    return IntegerNoise(_GAUSSIAN, source, count)


def laplace_noise(source: NoiseSource, count: int) -> IntegerNoise:
    """A stream of about ``count`` draws of round(X), X Laplace with mean 0 and scale SCALE."""
    return IntegerNoise(_LAPLACE, source, count)


def gaussian_integers(count: int, source: NoiseSource) -> Tensor:
    """int64 [count]: independent draws of round(X), X normal with mean 0 and standard deviation SCALE."""
    return _all_of(gaussian_noise(source, count), count)


def laplace_integers(count: int, source: NoiseSource) -> Tensor:
    """int64 [count]: independent draws of round(X), X Laplace with mean 0 and scale SCALE."""
    return _all_of(laplace_noise(source, count), count)


def _all_of(noise: IntegerNoise, count: int) -> Tensor:
    out = torch.empty(count, dtype=torch.int32)
    for start in range(0, count, CHUNK):
        noise.fill(out[start : start + CHUNK])
    return out.to(torch.int64)
