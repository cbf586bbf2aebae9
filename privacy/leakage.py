"""How much an activation says about the input it came from: statistics of one batch, and the one that NoPeek minimises.

Here: pure functions of two tensors whose first dimension counts the same samples; whatever follows is flattened.
Inside all is float64, and what comes back is a scalar tensor, float64, on the tensors' device, differentiable (once)
in both unless the function says otherwise.  Time and memory grow with the square of the number of rows.

Not here: who measures when, on which data and against which limit (``splitsec/``), nor any promise: a small figure says
that *this statistic* found little in *this batch*, not that nobody can find more.  docs/leakage.md says what each one
means, and what an attacker found where it was small.

The story goes on in ``dpsgd``.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from splitsec.privacy.errors import BadParameter, Unsupported

__all__ = [
    "constrained_covariance",
    "distance_correlation",
    "hsic",
    "kernel_target_alignment",
    "measure",
    "mmd",
    "mutual_information",
    "nopeek_term",
]

FEWEST_ROWS: Final = 4
"""Fewer rows have no bias-corrected statistic: its normalisation is n (n - 3)."""

_SAME: Final = 1e-13
"""Two rows whose squared distance is below this share of their squared norms (about the batch's mean) count as equal:
float64 rounding of the distance is below, and the distance has no gradient at zero."""

_FLAT: Final = 1e-24
"""A centred matrix whose mean square is below this share of the uncentred one's holds rounding errors and no more."""


# --- distance correlation ---------------------------------------------------------------------------------------------


def distance_correlation(x: torch.Tensor, a: torch.Tensor, *, corrected: bool = False) -> torch.Tensor:
    """Distance correlation of ``x`` ``[n, ...]`` and ``a`` ``[n, ...]``: 0, for unlimited n, if they are independent.

    Plain: R in 0..1 (Székely, Rizzo, Bakirov 2007, "Measuring and testing dependence by correlation of distances",
    definition 4, exponent 1), not its square.  It is biased upwards, towards 1 in many dimensions: 0.89 for 64 images
    of digits against noise of as many numbers that knows nothing of them.

    ``corrected``: the bias-corrected R* (Székely, Rizzo 2013, "The distance correlation t-test of independence in high
    dimension"; U-centred as in their 2014 "Partial distance correlation", equation 3.2).  It estimates the *square* of
    distance correlation; under independence its mean is about 0 whatever the dimensions, so it is often below 0 then.

    Either is 0 where one tensor has no variation.  Raises ``BadParameter``: other than two tensors of the same n, fewer
    than 2 rows, or 4 where corrected.
    """
    rows_x, rows_a = _pair(x, a, at_least=FEWEST_ROWS if corrected else 2)
    return _correlation_of_distances(_distances(rows_x), _distances(rows_a), corrected=corrected)


def nopeek_term(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """What NoPeek minimises, before it is multiplied by alpha: the bias-corrected distance correlation R* of ``x``
    ``[n, ...]`` (raw inputs; no gradient flows into them) and ``a`` ``[n, ...]`` (what leaves).

    After Vepakomma, Singh, Gupta, Raskar 2020, "NoPeek: Information leakage reduction to share activations in
    distributed deep learning", who take the plain estimator.  At the batch sizes of training that is mostly bias, which
    an activation of fewer dimensions makes smaller, whatever it says of the input, and what an alpha does then hangs on
    the batch size.  The mean of R* over batches is about the squared distance correlation of all data at any batch
    size.  It may be negative; the optimum is at independence, not below, since no network stays there on average.

    Gradients are finite everywhere; rows that are equal get none from each other.  With fewer than 4 rows, as in an
    epoch's last batch, nothing can be said, and the term is 0 with a gradient of 0.
    """
    rows_x, rows_a = _pair(x.detach(), a, at_least=0)
    if len(rows_a) < FEWEST_ROWS:
        return rows_a.sum() * 0.0
    return _correlation_of_distances(_distances(rows_x), _distances(rows_a), corrected=True)


def _correlation_of_distances(of_x: torch.Tensor, of_a: torch.Tensor, *, corrected: bool) -> torch.Tensor:
    centre = _u_centred if corrected else _centred
    centred_x, centred_a = centre(of_x), centre(of_a)
    ratio = _cosine(centred_x, centred_a, _is_flat(centred_x, of_x) | _is_flat(centred_a, of_a))
    return ratio if corrected else _root(ratio)


# --- kernels ----------------------------------------------------------------------------------------------------------


def hsic(
    x: torch.Tensor,
    a: torch.Tensor,
    *,
    unbiased: bool = False,
    x_bandwidth: float | None = None,
    a_bandwidth: float | None = None,
) -> torch.Tensor:
    """Hilbert-Schmidt independence criterion of ``x`` ``[n, ...]`` and ``a`` ``[n, ...]``, with Gaussian kernels.

    Biased: tr(K H L H) / (n - 1)^2 (Gretton, Bousquet, Smola, Schölkopf 2005, "Measuring statistical dependence with
    Hilbert-Schmidt norms", definition 2), never below 0.  ``unbiased``: Song, Smola, Gretton, Bedo, Borgwardt 2012,
    "Feature selection via dependence maximization", equation 4; its mean is 0 under independence.

    Kernels are exp(-d^2 / (2 b^2)).  A bandwidth b that is not given is the (lower) median of the positive distances in
    the batch; the gradient goes through it.  The value has no scale of its own: compare it with the same kernels only.
    Raises ``BadParameter``: tensors that do not fit, fewer than 2 rows (4 where unbiased), a bandwidth of 0 or less.
    """
    rows_x, rows_a = _pair(x, a, at_least=FEWEST_ROWS if unbiased else 2)
    return _hsic(_kernel(_squares(rows_x), x_bandwidth), _kernel(_squares(rows_a), a_bandwidth), unbiased=unbiased)


def _hsic(kernel_x: torch.Tensor, kernel_a: torch.Tensor, *, unbiased: bool) -> torch.Tensor:
    n = len(kernel_x)
    if not unbiased:
        return (_centred(kernel_x) * kernel_a).sum() / (n - 1) ** 2
    return (_u_centred(kernel_x) * _u_centred(kernel_a)).sum() / (n * (n - 3))


def kernel_target_alignment(
    x: torch.Tensor,
    a: torch.Tensor,
    *,
    centred: bool = True,
    labels: bool = False,
    x_bandwidth: float | None = None,
    a_bandwidth: float | None = None,
) -> torch.Tensor:
    """The cosine between the kernel matrices of ``x`` ``[n, ...]``, the target, and ``a`` ``[n, ...]``: at most 1.

    Plain: Cristianini, Shawe-Taylor, Elisseeff, Kandola 2001, "On kernel-target alignment", definition 1.  It is far
    above 0 for anything, since Gaussian kernels have no negative entries.  ``centred``: Cortes, Mohri, Rostamizadeh
    2012, "Algorithms for learning kernels based on centered alignment", definition 4; 0 to 1 for two Gaussian kernels,
    0 where one tensor has no variation.  It is biased like the plain distance correlation.

    Kernels as in ``hsic``.  ``labels``: ``x`` holds one class for each sample, ``[n]``, and the target is 1 where two
    are the same and -1 where not, for two classes the y y' of the paper.  Raises ``BadParameter`` like ``hsic``.
    """
    if labels and x.dim() != 1:
        raise BadParameter(f"labels of shape {list(x.shape)}, and there must be one for each sample: [n]")
    rows_x, rows_a = _pair(x, a, at_least=2)
    target = torch.where(rows_x == rows_x.T, 1.0, -1.0).double() if labels else _kernel(_squares(rows_x), x_bandwidth)
    return _alignment(target, _kernel(_squares(rows_a), a_bandwidth), centred=centred)


def _alignment(target: torch.Tensor, kernel: torch.Tensor, *, centred: bool) -> torch.Tensor:
    if not centred:
        return _cosine(target, kernel, torch.zeros((), dtype=torch.bool, device=kernel.device))
    centred_target, centred_kernel = _centred(target), _centred(kernel)
    flat = _is_flat(centred_target, target) | _is_flat(centred_kernel, kernel)
    return _cosine(centred_target, centred_kernel, flat)


def constrained_covariance(
    x: torch.Tensor, a: torch.Tensor, *, x_bandwidth: float | None = None, a_bandwidth: float | None = None
) -> torch.Tensor:
    """COCO: the largest covariance over the batch of f(x) and g(a), f and g in the unit balls of the kernels' spaces.

    Gretton, Smola, Bousquet, Herbrich, Belitski, Augath, Murayama, Pauls, Schölkopf, Logothetis 2005, "Kernel
    constrained covariance for dependence measurement".  Computed as sqrt(largest eigenvalue of K~ L~) / n with centred
    K~ and L~, which is that supremum; the largest *singular* value of K~ L~, which one also finds written, is larger
    where the two do not commute.  Kernels and errors as in ``hsic``; never below 0, biased upwards.

    Time grows with the cube of n.  The gradient is right where the largest eigenvalue is simple, and finite elsewhere.
    """
    rows_x, rows_a = _pair(x, a, at_least=2)
    kernel_x = _centred(_kernel(_squares(rows_x), x_bandwidth))
    kernel_a = _centred(_kernel(_squares(rows_a), a_bandwidth))
    with torch.no_grad():  # right eigenvector v of K~ L~; L~ v is the left one
        values, vectors = torch.linalg.eigh(kernel_x)
        half = vectors * values.clamp(min=0).sqrt()
        values, vectors = torch.linalg.eigh(half.T @ kernel_a @ half)
        largest, right = values[-1], half @ vectors[:, -1]
        left = kernel_a @ right
        nothing = largest <= _FLAT * kernel_x.abs().amax() * kernel_a.abs().amax()
    moved = (
        left @ (kernel_x @ (kernel_a @ right)) / torch.where(nothing, 1.0, largest)
    )  # d lambda = w' d(K~ L~) v / w'v
    return _root(torch.where(nothing, torch.zeros_like(moved), moved)) / len(rows_x)


def mmd(x: torch.Tensor, y: torch.Tensor, *, bandwidth: float | None = None) -> torch.Tensor:
    """The squared maximum mean discrepancy between two samples, ``x`` ``[n, ...]`` and ``y`` ``[m, ...]``, unbiased.

    How differently two groups' rows are distributed, e.g. the activations of two classes, or of two institutions: not
    how much one tensor says about the other.  Gretton, Borgwardt, Rasch, Schölkopf, Smola 2012, "A kernel two-sample
    test", equation 3; its mean is 0 for equal distributions, so it may be negative.  Gaussian kernel as in ``hsic``,
    the bandwidth from the distances within and between both.  Raises ``BadParameter``: fewer than 2 rows in either, or
    rows of different lengths.
    """
    rows_x, rows_y = _rows(x), _rows(y)
    if min(len(rows_x), len(rows_y)) < 2:
        raise BadParameter(f"samples of {len(rows_x)} and {len(rows_y)} rows, and each must have at least 2")
    if rows_x.shape[1] != rows_y.shape[1]:
        raise BadParameter(f"rows of {rows_x.shape[1]} and {rows_y.shape[1]} numbers, and they must have as many")
    n, m = len(rows_x), len(rows_y)
    kernel = _kernel(_squares(torch.cat([rows_x, rows_y])), bandwidth)
    within_x = (kernel[:n, :n].sum() - n) / (n * (n - 1))
    within_y = (kernel[n:, n:].sum() - m) / (m * (m - 1))
    return within_x + within_y - 2 * kernel[:n, n:].mean()


# --- mutual information -----------------------------------------------------------------------------------------------


def mutual_information(x: torch.Tensor, a: torch.Tensor, *, neighbours: int = 3, seed: int = 0) -> float:
    """Mutual information in nats of two *numbers* per sample, ``x`` ``[n]`` and ``a`` ``[n]``: scikit-learn's estimate.

    From nearest neighbours (Kraskov, Stögbauer, Grassberger 2004, "Estimating mutual information"), never below 0, not
    differentiable.  ``seed``: of the tiny noise that breaks ties.  For single numbers alone: the brightness of an image
    against one coordinate of its activation, say.  In many dimensions the estimate needs more samples than anyone has,
    so wider tensors are refused.  Raises ``BadParameter`` for those, and for no more rows than neighbours;
    ``Unsupported`` where scikit-learn is not installed.
    """
    try:
        from sklearn.feature_selection import mutual_info_regression
    except ImportError as error:
        raise Unsupported(
            "mutual information is scikit-learn's, which is not installed: pip install 'splitsec[examples]'"
        ) from error
    if x.dim() != 1 or a.dim() != 1:
        raise BadParameter(
            f"tensors of shape {list(x.shape)} and {list(a.shape)}: mutual information is for one number a sample, [n]"
        )
    rows_x, rows_a = _pair(x.detach(), a.detach(), at_least=neighbours + 1)
    estimate = mutual_info_regression(
        rows_x.cpu().numpy(),
        rows_a[:, 0].cpu().numpy(),
        discrete_features=False,
        n_neighbors=neighbours,
        random_state=seed,
    )
    return float(estimate[0])


# --- the report -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(x: torch.Tensor, a: torch.Tensor) -> dict[str, float]:
    """What is shown for an epoch: inputs ``x`` ``[n, ...]`` against activations ``a`` ``[n, ...]``.

    ``distance_correlation`` (plain R; much of it is bias below some thousand rows), ``distance_correlation_corrected``
    (R*, the square of R without the bias: the one to set a limit on), ``hsic`` (unbiased), ``kernel_alignment``
    (centred).  A few hundred rows are enough: between digits and independent noise R* has a standard deviation of 0.02
    at 64 rows and of 0.002 at 512.

    Raises ``BadParameter``: fewer than 4 rows, tensors of different n, or a value that is not finite, of which nothing
    can be computed, and which no limit would stop.
    """
    rows_x, rows_a = _pair(x, a, at_least=FEWEST_ROWS)
    for name, rows in (("input", rows_x), ("activation", rows_a)):
        if not bool(torch.isfinite(rows).all()):
            raise BadParameter(f"the {name} holds NaN or infinity, so its leakage cannot be measured")
    squares_x, squares_a = _squares(rows_x), _squares(rows_a)
    distances_x, distances_a = squares_x.sqrt(), squares_a.sqrt()
    kernel_x, kernel_a = _kernel(squares_x, None), _kernel(squares_a, None)
    return {
        "distance_correlation": float(_correlation_of_distances(distances_x, distances_a, corrected=False)),
        "distance_correlation_corrected": float(_correlation_of_distances(distances_x, distances_a, corrected=True)),
        "hsic": float(_hsic(kernel_x, kernel_a, unbiased=True)),
        "kernel_alignment": float(_alignment(kernel_x, kernel_a, centred=True)),
    }


# --- what they share --------------------------------------------------------------------------------------------------


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """``[n, ...]`` as float64 ``[n, d]``."""
    if tensor.dim() == 0:
        raise BadParameter("a single number, and there must be a row for each sample")
    if tensor.is_complex():
        raise BadParameter(f"a tensor of {tensor.dtype}, and it must hold real numbers")
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:])).double()


def _pair(x: torch.Tensor, a: torch.Tensor, *, at_least: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows_x, rows_a = _rows(x), _rows(a)
    if len(rows_x) != len(rows_a):
        raise BadParameter(f"{len(rows_x)} inputs and {len(rows_a)} activations, and there must be one for each")
    if len(rows_a) < at_least:
        raise BadParameter(f"{len(rows_a)} rows, and this measure needs at least {at_least}")
    return rows_x, rows_a


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances ``[n, n]`` of ``rows`` ``[n, d]``: 0, exactly, between equal rows; NaN stays NaN."""
    rows = rows - rows.detach().mean(0)  # moves no distance, and makes what cancels below small
    products = rows @ rows.T
    norms = products.diagonal()
    scale = norms[:, None] + norms[None, :]
    squares = scale - 2 * products
    return squares.masked_fill(squares.detach() <= _SAME * scale.detach(), 0.0)


def _distances(rows: torch.Tensor) -> torch.Tensor:
    return _root(_squares(rows))


def _root(values: torch.Tensor) -> torch.Tensor:
    """Square roots whose gradient at 0 (and, for rounding errors, below) is 0 instead of infinite."""
    zero = values <= 0  # false for NaN, which stays
    return values.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def _kernel(squares: torch.Tensor, bandwidth: float | None) -> torch.Tensor:
    """exp(-d^2 / (2 b^2)), ``[n, n]``, of squared distances."""
    if bandwidth is not None:
        if not 0 < bandwidth < math.inf:
            raise BadParameter(f"a bandwidth of {bandwidth}, and it must be a finite number above 0")
        return torch.exp(squares / (-2 * bandwidth**2))
    positive = squares[~(squares <= 0)]
    if not positive.numel():  # all rows are equal
        return torch.exp(-squares)
    return torch.exp(squares / (-2 * positive.median()))  # of both halves of a symmetric matrix: the same lower median


def _centred(matrix: torch.Tensor) -> torch.Tensor:
    """H M H for a symmetric matrix: each row and column has mean 0."""
    means = matrix.mean(0)
    return matrix - means[:, None] - means[None, :] + means.mean()


def _u_centred(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric ``matrix`` U-centred (Székely, Rizzo 2014): its diagonal does not count, all rows sum to 0."""
    n = len(matrix)
    matrix = matrix - torch.diag(matrix.diagonal())
    sums = matrix.sum(0)
    centred = matrix - (sums[:, None] + sums[None, :]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    return centred - torch.diag(centred.diagonal())


def _is_flat(centred: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Whether nothing but rounding errors is left after centring: a boolean scalar tensor."""
    return centred.detach().square().mean() <= _FLAT * matrix.detach().square().mean()


def _cosine(one: torch.Tensor, other: torch.Tensor, undefined: torch.Tensor) -> torch.Tensor:
    """<one, other> / (|one| |other|); 0, with a gradient of 0, where ``undefined`` (a boolean scalar) says so."""
    product = (one * other).sum()
    squares = torch.stack([one.square().sum(), other.square().sum()]).masked_fill(undefined, 1.0)
    first, second = squares.sqrt().unbind()
    return torch.where(undefined, torch.zeros_like(product), product / first / second)
