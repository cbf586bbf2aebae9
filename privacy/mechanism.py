"""Clip and noise: tensors in, tensors out, each row (one sample's tensor) made safe to release on its own.

Here: clipping per row, Gaussian and Laplace noise, randomised response for labels; pure functions that leave their
input alone.  Not here: where the noise's bits come from (``randomness``), what a release costs (``accounting``), who
decides that a tensor goes through one of these (the guard in ``splitsec/``).

The construction, and why.  Adding ``randn`` in floating point is not the Gaussian mechanism.  The sum can only take
values that depend on what was hidden, so who knows two candidate activations tells from *one* release which of them it
was, nearly always, whatever epsilon the closed form says (Mironov, On significance of the least significant bits for
differential privacy, CCS 2012; a test here runs that attack on both).  So noise is added to integers:

1. A row x is scaled to norm at most C (1 - 2**-20), divided by the grid g = scale / 2**21 and rounded towards zero to
   an integer vector n.  Rounding towards zero only shrinks, so ||n|| <= C / g is exact, whatever else was rounded.
2. k = round(X) is drawn for every coordinate, X Gaussian or Laplace noise of scale 2**21 (``randomness``: each integer
   has its probability to within a stated error, which the accounting adds).
3. (n + k) g is released, rounded to the tensor's dtype.

n is an integer vector, so n + round(X) = round(n + X): rounding of what the ideal mechanism would release on n.  The
conversion to a float sees nothing but the integer.  Both are post-processing, so the closed form for sensitivity 2C
applies as it stands.  Neighbours: the discrete Gaussian of Canonne, Kamath and Steinke (NeurIPS 2020) is sampled
exactly but has another closed form; Holohan and Braghin (Secure random sampling in differential privacy, ESORICS 2021)
sum several floating-point draws, which makes the attack dear and does not end it.

``scale`` is ``noise_multiplier * 2 * clip``: the sensitivity is local, between *any* two values of one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Final, Literal

import torch
from torch import Tensor

from splitsec.privacy.errors import BadParameter
from splitsec.privacy.randomness import (
    CHUNK,
    SCALE,
    IntegerNoise,
    NoiseSource,
    gaussian_noise,
    laplace_noise,
)

__all__ = [
    "CLASSES_RANGE",
    "CLIP_RANGE",
    "EPSILON_RANGE",
    "NOISE_MULTIPLIER_RANGE",
    "clip_rows",
    "gaussian",
    "laplace",
    "randomise_labels",
]

CLIP_RANGE: Final = (2.0**-60, 2.0**60)
"""Clip norms for which no intermediate value overflows or loses digits in float32."""

NOISE_MULTIPLIER_RANGE: Final = (2.0**-10, 2.0**20)
"""Below, a row may leave the 2**30 grid units that fit 32 bits; above, every row would be rounded to nothing."""

EPSILON_RANGE: Final = (2.0**-20, 40.0)
"""Epsilons of randomised response that whole numbers out of 2**63 can keep."""

CLASSES_RANGE: Final = (2, 2**20)

_FARTHEST: Final = {2: 16, 1: 64}  # the largest draw, in scales: Gaussian beside L2, Laplace beside L1
_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROW: Final = 2**30  # numbers in a row: a float64 sum of so many squares is right to 2**-23
_SHY: Final = 1 - 2.0**-19  # rows are scaled to this much of the bound, so that roundings stay below 1 - 2**-20

Norm = Literal[1, 2]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def clip_rows(tensor: Tensor, bound: float, norm: Norm = 2) -> Tensor:
    """Scale down each row whose norm passes ``bound`` (1 - 2**-19); the others come back as they are.

    ``tensor``: floating point [n, ...], on the CPU; a row is everything under one index of the first dimension.  The
    result has its shape, dtype and memory layout, and every row of it, as rational numbers, a norm of at most ``bound``
    (1 - 2**-20): L2 for ``norm`` 2, L1 for 1.

    Raises BadParameter: NaN or infinity anywhere (or a float64 row whose norm is beyond float64), ``bound`` outside
    CLIP_RANGE, a ``norm`` other than 1 and 2.
    """
    _check_tensor(tensor)
    _within("the clip norm", bound, CLIP_RANGE)
    result = torch.empty_like(tensor, requires_grad=False)
    with torch.no_grad(), _Rows(tensor, result) as rows:
        factors = _factors(_norms(rows.given, norm), bound, bound, rows.work)
        for given, factor, out in rows.pieces(factors):
            out.copy_(_towards_zero(given * factor, tensor.dtype))
    return result


def gaussian(tensor: Tensor, *, clip: float, noise_multiplier: float, source: NoiseSource) -> Tensor:
    """Clip each row in L2 to ``clip`` and add Gaussian noise of standard deviation ``noise_multiplier * 2 * clip``.

    ``tensor``: floating point [n, ...], on the CPU.  The result has its shape, dtype and memory layout, and no gradient
    history; ``tensor`` is not changed.  One call is one release of every row: ``release.Gaussian(noise_multiplier,
    coordinates)`` with ``coordinates`` the numbers in a row.

    Raises BadParameter: NaN or infinity anywhere, ``clip`` outside CLIP_RANGE, ``noise_multiplier`` outside
    NOISE_MULTIPLIER_RANGE, noise that the dtype cannot hold.
    """
    return _noised(tensor, clip, noise_multiplier, source, 2, gaussian_noise)


def laplace(tensor: Tensor, *, clip: float, noise_multiplier: float, source: NoiseSource) -> Tensor:
    """Clip each row in L1 to ``clip`` and add Laplace noise of scale ``noise_multiplier * 2 * clip``.

    Everything else as for ``gaussian``; the release is ``release.Laplace``.
    """
    return _noised(tensor, clip, noise_multiplier, source, 1, laplace_noise)


def _noised(
    tensor: Tensor,
    clip: float,
    noise_multiplier: float,
    source: NoiseSource,
    norm: Norm,
    stream: Callable[[NoiseSource, int], IntegerNoise],
) -> Tensor:
    _check_tensor(tensor)
    _within("the clip norm", clip, CLIP_RANGE)
    _within("the noise multiplier", noise_multiplier, NOISE_MULTIPLIER_RANGE)
    scale = noise_multiplier * 2 * clip
    if clip + _FARTHEST[norm] * scale > torch.finfo(tensor.dtype).max:
        raise BadParameter(
            f"noise of scale {scale:g} does not fit {tensor.dtype}: take another dtype or a smaller clip"
        )
    result = torch.empty_like(tensor, requires_grad=False)
    with torch.no_grad(), _Rows(tensor, result) as rows:
        noise = stream(source, tensor.numel())
        radius = SCALE / (2 * noise_multiplier)  # C / g
        factors = _factors(_norms(rows.given, norm), clip, radius, rows.work)
        size = min(CHUNK, tensor.numel())
        scaled, whole, drawn = (torch.empty(size, dtype=dtype) for dtype in (rows.work, torch.int32, torch.int32))
        for given, factor, out in rows.pieces(factors):
            x, n, k = (buffer[: given.numel()] for buffer in (scaled, whole, drawn))
            torch.mul(given, factor, out=x.view(given.shape))
            n.copy_(x)  # towards zero
            noise.fill(k)
            n += k
            x.copy_(n)
            torch.mul(x.view(out.shape), scale / SCALE, out=out)
    return result


def _factors(norms: Tensor, bound: float, radius: float, work: torch.dtype) -> Tensor:
    """[n, 1] in ``work``: what takes each row, clipped to ``bound``, to a norm of at most ``radius`` (1 - 2**-20), the
    rounding of the products included.  Exactly 1 for a row within the bound, if ``radius`` is the bound.
    """
    return _towards_zero(torch.full_like(norms, radius * _SHY).div_(norms.clamp(min=bound * _SHY)), work)


def _norms(rows: Tensor, norm: Norm) -> Tensor:
    """float64 [n, 1], each within 2**-23 of the truth."""
    if norm not in (1, 2):
        raise BadParameter(f"norm {norm!r}, and clipping knows 1 and 2")
    norms: Tensor = torch.linalg.vector_norm(rows, ord=norm, dim=1, keepdim=True, dtype=torch.float64)
    if not torch.isfinite(norms).all():
        row = int(torch.isfinite(norms).logical_not().nonzero()[0, 0])
        raise BadParameter(f"row {row} has NaN, infinity or numbers too large to have a norm; nothing was released")
    return norms


def _towards_zero(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` in ``dtype``, each rounded towards zero: one off the bits where the nearest lay farther out."""
    if values.dtype == dtype:
        return values
    nearest = values.to(dtype)
    bits = nearest.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits -= (nearest.to(values.dtype).abs() > values.abs()).to(bits.dtype)  # in place: the bits are those of nearest
    return nearest


class _Rows:
    """A tensor and the result for it as [n, d], in the order in which they lie in memory.  On exit the result is whole.

    ``work``: the dtype to compute in.
    """

    def __init__(self, tensor: Tensor, result: Tensor) -> None:
        rest = sorted(range(1, tensor.dim()), key=result.stride, reverse=True)
        shape = (tensor.shape[0], math.prod(tensor.shape[1:]))
        self.given = tensor.detach().permute(0, *rest).reshape(shape)
        self._ordered = result.permute(0, *rest)
        self._result = self._ordered.reshape(shape)  # a copy where the rows do not lie one after the other
        self.work = torch.promote_types(tensor.dtype, torch.float32)

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *error: object) -> None:
        if self._result.data_ptr() != self._ordered.data_ptr():
            self._ordered.copy_(self._result.view(self._ordered.shape))

    def pieces(self, factors: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(given [r, c], its rows' factors [r, 1], where the result goes [r, c]), CHUNK numbers at most at a time."""
        count, size = self.given.shape
        if not size:
            return
        rows, columns = max(1, CHUNK // size), min(CHUNK, size)
        for top in range(0, count, rows):
            for left in range(0, size, columns):
                block = slice(top, top + rows), slice(left, left + columns)
                yield self.given[block], factors[block[0]], self._result[block]


def _check_tensor(tensor: Tensor) -> None:
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if tensor.dtype not in _DTYPES or not dense or not tensor.dim():
        raise BadParameter(
            f"a {tensor.dim()}-dimensional {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, and what is "
            "clipped has at least one dimension, a floating-point dtype, and lies densely on the CPU"
        )
    if math.prod(tensor.shape[1:]) > _ROW:
        raise BadParameter(f"a row has {math.prod(tensor.shape[1:])} numbers, and {_ROW} is the most")


def _within(name: str, value: float, bounds: tuple[float, float]) -> None:
    if not bounds[0] <= value <= bounds[1]:
        raise BadParameter(f"{name} is {value}, and must lie between {bounds[0]:g} and {bounds[1]:g}")


# ---- labels ----------------------------------------------------------------------------------------------------------


def randomise_labels(labels: Tensor, *, classes: int, epsilon: float, source: NoiseSource) -> Tensor:
    """Keep each label with probability e^epsilon / (e^epsilon + classes - 1), else put any other, all alike.

    ``labels``: int64 [n], each from 0 to ``classes`` - 1.  The result has the same shape; ``labels`` is not changed.
    Randomised response for more than two answers (Kairouz, Bonawitz and Ramage, ICML 2016): epsilon-differentially
    private for each label, exactly, since probabilities are whole numbers out of 2**63 whose ratio is rounded down.

    Raises BadParameter: a label outside the classes, another dtype or shape, ``classes`` outside CLASSES_RANGE,
    ``epsilon`` outside EPSILON_RANGE.
    """
    _within("the number of classes", classes, CLASSES_RANGE)
    _within("epsilon", epsilon, EPSILON_RANGE)
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise BadParameter(f"labels of shape {list(labels.shape)} and {labels.dtype}, and they must be int64 [n]")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise BadParameter(f"labels run from {int(labels.min())} to {int(labels.max())}, with {classes} classes")
    share = _share_of_another(classes, epsilon)
    number = (source.words(labels.numel()) & (2**63 - 1)) // share  # 0 to classes - 2 is one of the others, in order
    other = number + (number >= labels)
    return torch.where(number < classes - 1, other, labels)


def _share_of_another(classes: int, epsilon: float) -> int:
    """Of 2**63 outcomes, those that put one given other label: rounded up, so that the ratio stays below e^epsilon."""
    ratio = Fraction(math.exp(epsilon) * (1 - 2.0**-50))
    return math.ceil(2**63 / (ratio + classes - 1))
