"""What a malicious peer's gradients look like to whoever receives them: statistics of a batch, and rules that decide.

Here: pure functions of tensors, small classes that remember the last batches, and the thresholds, each a named constant
with the measurement that set it.  ``splitsec bench detectors`` measures them again; docs/detectors.md shows the curves
and says when each rule is blind.  Tensors are ``[rows, ...]`` with one gradient a row, float of any width; what comes
back is Python floats.  No rule keeps a value of a sample beyond its call.

Not here: which rule applies to which cut, and what an alarm does (``splitsec/detectors.py``).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

__all__ = [
    "Answer",
    "DecoyRule",
    "Gradients",
    "LabelRule",
    "Likeness",
    "LossRule",
    "OneWayRule",
    "ReplayRule",
    "SizeRule",
    "answer",
    "false_order",
    "likeness",
]

Floats = np.ndarray[Any, np.dtype[np.float64]]

# --- thresholds -------------------------------------------------------------------------------------------------------

COMMON: Final = 0.4
"""Mean cosine of gradients of rows with *different* labels, over ``WINDOW`` steps, above which something else rules.
Where labels matter they are about 0 or below: a class pulls away from the others.  Measured: at most 0.33 in 29 honest
trainings, 0.63 or more in 200 hijackings within ten batches; 0.66 in one training that had diverged."""

SHARED: Final = 0.6
"""And above this share of the mean cosine of rows with the *same* label.  If a network wrongly says one class for all,
a loss on labels gives one half: (e_k - e_a) . (e_k - e_b) over |e_k - e_a| |e_k - e_b|."""

WINDOW: Final = 5
"""Steps that are looked at together: one alone is noise at batch 16, and an attack shall be seen within ten."""

MOST_STEPS: Final = 40
"""Steps that are remembered, where batches are so small or so one-sided that ``WINDOW`` of them say too little."""

LEAST_OUTSIDE: Final = 8
"""Rows outside the largest class, over the steps looked at: fewer pairs hang on one sample each."""

LEAST_PAIRS: Final = 20
"""Pairs of rows with the same label for their mean to count; with fewer it is taken for 1, which spares the peer."""

HEEDED: Final = 0.25
"""Relative change of a gradient under a false label, mean over rows, below which a decoy is suspicious.  Hijackers that
train between the two attempts change theirs by 0.04 to 0.18 (20 runs of each); an honest network with BatchNorm behind
the cut and 8 to 10 rows by 0.30 or more (2,216 decoys)."""

CONTROL: Final = 2.0
"""And below this many times the change of rows in the same batch whose label stayed (and ``SLACK`` more)."""

SLACK: Final = 0.02

LEAST_CHANGED: Final = 4
"""Rows with a false label, below which a decoy says too little."""

HUGE: Final = 1e10
"""Norm of one sample's gradient (of its own loss, not of the batch's mean) that no training survives.  Measured: at
most 95 in 29 honest trainings."""

JUMP: Final = 1e3
"""Times the largest norm before, after ``SETTLED`` steps, above which a gradient is no outlier of training's own.
Measured: at most 5.8 in 29 honest trainings."""

LARGE: Final = 1e3
"""And above this, whatever came before: a network that has converged makes gradients as small as float32 has them, and
its next hard sample one of ordinary size."""

SETTLED: Final = 20
"""Steps with any gradient at all before ``JUMP`` is asked for."""

ONE_WAY: Final = 0.95
"""Length of the sum of a step's gradients over the sum of their lengths, as they are and each scaled to length 1,
whichever is less; mean of ``ONE_WAY_STEPS`` steps.  For a warning: 0.99 or more under hijacking, and up to 0.96 in
honest trainings on a table, 0.99 where a batch has one label."""

ONE_WAY_STEPS: Final = 20
ONE_WAY_ROWS: Final = 8
REPLAYS: Final = 50
"""Steps whose gradients are known again."""

REPLAYED_ROWS: Final = 4
"""Rows with a gradient, below which equal norms may be chance."""

LOSS_STEPS: Final = 200
"""Training steps after which a loss should have fallen."""

LOSS_MEAN: Final = 20
"""Steps whose mean counts as one measurement of the loss."""

NEVER_FELL: Final = 0.98
"""Share of the first measurement above which all later ones lie, where a loss follows nothing."""

EXPLODED: Final = 5.0
"""Times the largest loss of the first ``LOSS_MEAN`` steps, for the median of as many: one hard sample is no growth."""


_NOTHING: Final = 1e-15
"""Norm (of rows that were scaled) below which float32 knows no direction."""


# --- one step's gradients ---------------------------------------------------------------------------------------------


class Gradients:
    """The gradients of one step: ``tensor`` ``[rows, ...]``, flattened to ``rows``, with their norms.

    Numbers so small or large that their squares may leave float32 are divided by the largest, ``scale``, first.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        rows = tensor.detach().flatten(1) if tensor.dim() > 1 else tensor.detach().reshape(-1, 1)
        if rows.dtype not in (torch.float32, torch.float64):
            rows = rows.float()
        self.scaled_norms = _norms(rows)
        """Float64 ``[rows]``, of ``rows``."""
        self.scale = 1.0
        largest = float(self.scaled_norms.max(initial=0.0))
        if rows.numel() and not 1e-3 < largest < 1e15:
            most = float(rows.abs().max())
            if most > 0:
                self.scale = most
                rows = rows / most
                self.scaled_norms = _norms(rows)
        self.rows = rows

    @property
    def norms(self) -> Floats:
        """Float64 ``[rows]``, as they came."""
        return self.scaled_norms * self.scale


def _norms(rows: torch.Tensor) -> Floats:
    norms: Floats = torch.linalg.vector_norm(rows, dim=1).cpu().numpy().astype(np.float64)
    return norms


# --- label agreement --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Likeness:
    """How alike a step's gradients are, summed over pairs of rows: with the same label, and with others.

    ``same`` over ``same_weight`` is the mean cosine, every pair counted alike; ``heavy_*``: every pair counted by the
    product of its norms; ``half_*``: by the root of that.  Weights of a step add up to 1, so that every step counts
    alike in a sum of several.
    """

    same: float = 0.0
    same_weight: float = 0.0
    other: float = 0.0
    other_weight: float = 0.0
    half_same: float = 0.0
    half_same_weight: float = 0.0
    half_other: float = 0.0
    half_other_weight: float = 0.0
    heavy_same: float = 0.0
    heavy_same_weight: float = 0.0
    heavy_other: float = 0.0
    heavy_other_weight: float = 0.0
    same_pairs: int = 0
    other_pairs: int = 0
    outside: int = 0
    """Rows that do not have the most frequent label."""

    def __add__(self, more: Likeness) -> Likeness:
        return Likeness(  # written out: it runs in every step
            self.same + more.same,
            self.same_weight + more.same_weight,
            self.other + more.other,
            self.other_weight + more.other_weight,
            self.half_same + more.half_same,
            self.half_same_weight + more.half_same_weight,
            self.half_other + more.half_other,
            self.half_other_weight + more.half_other_weight,
            self.heavy_same + more.heavy_same,
            self.heavy_same_weight + more.heavy_same_weight,
            self.heavy_other + more.heavy_other,
            self.heavy_other_weight + more.heavy_other_weight,
            self.same_pairs + more.same_pairs,
            self.other_pairs + more.other_pairs,
            self.outside + more.outside,
        )

    @property
    def same_mean(self) -> float:
        """Mean cosine of rows with the same label, every pair counted alike."""
        return _mean(self.same, self.same_weight)

    @property
    def other_mean(self) -> float:
        """Mean cosine of rows with different labels, every pair counted alike."""
        return _mean(self.other, self.other_weight)

    @property
    def agreement(self) -> float:
        """The first less the second."""
        return self.same_mean - self.other_mean

    @property
    def common(self) -> float:
        """What rows of different labels have in common at least, counted by norms and by their roots.

        Both, since each alone is led astray in honest trainings: by the few rows that a network which has converged
        still gets wrong, or by the many that it has right.  Counting every pair alike is not asked: a peer would only
        have to answer some rows with next to nothing.
        """
        return _least(_mean(self.half_other, self.half_other_weight), _mean(self.heavy_other, self.heavy_other_weight))

    @property
    def share(self) -> float:
        """And what share that is of what rows with the same label have in common: the smaller of the two."""
        enough = self.same_pairs >= LEAST_PAIRS
        pairs = (
            (_mean(self.half_other, self.half_other_weight), _mean(self.half_same, self.half_same_weight)),
            (_mean(self.heavy_other, self.heavy_other_weight), _mean(self.heavy_same, self.heavy_same_weight)),
        )
        return _least(*(other / (same if enough and same > _NOTHING else 1.0) for other, same in pairs))


def _mean(total: float, weight: float) -> float:
    return total / weight if weight > 0 else math.nan


def _least(*values: float) -> float:
    """The least of ``values``; NaN, which is above no threshold, where one of them is."""
    return math.nan if any(map(math.isnan, values)) else min(values)


def likeness(gradients: Gradients, labels: torch.Tensor) -> Likeness | None:
    """Mean cosines by label of one step's gradients; ``labels``: int ``[rows]``.

    After Fu et al. 2023, "Focusing on Pinocchio's Nose: a gradients scrutinizer to thwart split-learning hijacking
    attacks using intrinsic attributes" (NDSS), section IV, who compare gradients of the same and of other labels.
    From sums by class, not pair by pair: |sum of unit rows|^2 is the sum of all cosines.  Rows without a gradient are
    left out.  None where no two rows with different labels are left.
    """
    rows, norms, known = gradients.rows, gradients.scaled_norms, labels.cpu().numpy()
    there = norms > _NOTHING
    if not there.all():
        rows, norms, known = rows[torch.from_numpy(there)], norms[there], known[there]
    n = len(norms)
    if n < 2:
        return None
    which = np.unique(known, return_inverse=True)[1]
    sizes = np.bincount(which)
    outside = n - int(sizes.max())
    if not outside:
        return None
    members = np.zeros((len(sizes), n))
    members[which, np.arange(n)] = 1.0
    by_norm = norms / norms.max()
    counted = (np.ones(n), np.sqrt(by_norm), by_norm)
    sums = torch.from_numpy(np.concatenate([members * (one / norms) for one in counted])).to(rows) @ rows
    products = (sums @ sums.T).double().cpu().numpy()
    light, half, heavy = (
        _pairs(products[at : at + len(sizes), at : at + len(sizes)], members @ one, float(one @ one))
        for at, one in zip(range(0, 3 * len(sizes), len(sizes)), counted, strict=True)
    )
    same_pairs = int(sizes @ (sizes - 1)) // 2
    return Likeness(*light, *half, *heavy, same_pairs, n * (n - 1) // 2 - same_pairs, outside)


def _pairs(products: Floats, weights: Floats, squares: float) -> tuple[float, float, float, float]:
    """Weighted sums of cosines over pairs of one class and of two, and the weights; all over the weight of both.

    ``products`` ``[classes, classes]``: of the sums of weighted unit rows; ``weights`` ``[classes]``: sums of theirs;
    ``squares``: sum of all squared weights, which are pairs of a row with itself.
    """
    inside, inside_weight = float(products.trace()), float(weights @ weights)
    same, same_weight = inside - squares, max(0.0, inside_weight - squares)
    other, other_weight = float(products.sum()) - inside, float(weights.sum()) ** 2 - inside_weight
    whole = same_weight + other_weight
    if not whole > 1e-12:  # one row is all there is
        return 0.0, 0.0, 0.0, 0.0
    return same / whole, same_weight / whole, other / whole, other_weight / whole


class LabelRule:
    """Do gradients heed labels?  Asked of every step; the last ``WINDOW`` of them are judged together."""

    def __init__(self) -> None:
        self._steps: deque[Likeness] = deque(maxlen=MOST_STEPS)

    def add(self, step: Likeness | None) -> Likeness | None:
        """Take one step; what the last ones together say, or None where that is too little."""
        if step is None:
            return None
        self._steps.append(step)
        total = Likeness()
        for count, one in enumerate(reversed(self._steps), 1):
            total = total + one
            if count >= WINDOW and total.outside >= LEAST_OUTSIDE:
                return total
        return None

    @staticmethod
    def suspicious(seen: Likeness) -> bool:
        """Whether rows of different labels are pulled the same way, as by a loss that no label enters."""
        return seen.common > COMMON and seen.share > SHARED


# --- decoys -----------------------------------------------------------------------------------------------------------


def false_order(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
    """An order of rows that gives most of them another row's label: int64 ``[rows]``; None where it changes too few.

    ``labels`` ``[rows, ...]``.  A quarter of the rows, at least one, keeps its place: the control that a decoy is
    compared with.  Of eight random orders, the one that makes most labels false.
    """
    rows = len(labels)
    flat = labels.reshape(rows, -1)
    best, most = None, LEAST_CHANGED - 1
    for _ in range(8):
        moved = torch.randperm(rows, generator=generator)[max(1, rows // 4) :]
        order = torch.arange(rows)
        order[moved] = moved[torch.randperm(len(moved), generator=generator)]
        changed = int((flat[order] != flat).any(1).sum())
        if changed > most:
            best, most = order, changed
    return best


@dataclass(frozen=True, slots=True)
class Answer:
    """How much gradients changed between a decoy and the truth: |a - b| over |a| + |b|, means over rows."""

    changed: float
    """Of rows whose label was false."""
    control: float
    """Of rows whose label stayed; 0 where the peer computes every row by itself."""
    rows: int


def answer(decoy: torch.Tensor, real: torch.Tensor, changed: torch.Tensor) -> Answer | None:
    """Compare the gradients ``[rows, ...]`` of one cut for the same rows with some false labels and with true ones.

    After Erdogan, Küpçü, Çiçek 2022, "SplitGuard: detecting and mitigating training-hijacking attacks in split
    learning" (WPES), section 3, which compares batches with false labels and other batches with true ones; here they
    are the same rows at the same weights, so that nothing but the label can differ.  ``changed``: bool ``[rows]``.
    None where fewer than ``LEAST_CHANGED`` of them have any gradient.
    """
    one, other = decoy.detach().flatten(1).double(), real.detach().flatten(1).double()
    most = max(float(one.abs().max()), float(other.abs().max())) if one.numel() else 0.0
    if not most > 0:
        return None
    one, other = one / most, other / most
    lengths = one.norm(dim=1) + other.norm(dim=1)
    there = lengths > 0
    change = (one - other).norm(dim=1)[there] / lengths[there]
    changed = changed[there]
    if int(changed.sum()) < LEAST_CHANGED:
        return None
    stayed = change[~changed]
    return Answer(float(change[changed].mean()), float(stayed.mean()) if len(stayed) else 0.0, int(changed.sum()))


class DecoyRule:
    """Does a false label change the answer?

    ``classes``: whether the loss compares classes; then one decoy decides.  Any other loss may be far from its target,
    where a label moves it little, and two in a row must say the same.
    """

    def __init__(self, *, classes: bool) -> None:
        self._classes = classes
        self._in_a_row = 0

    def suspicious(self, seen: Answer) -> bool:
        """Whether what is answered to a decoy is what is answered to the truth."""
        slack = SLACK if self._classes else 0.0
        same = seen.changed < HEEDED and seen.changed <= CONTROL * seen.control + slack
        self._in_a_row = self._in_a_row + 1 if same else 0
        return self._in_a_row >= (1 if self._classes else 2)


# --- without labels ---------------------------------------------------------------------------------------------------


class SizeRule:
    """Are gradients of a size that training makes?  Norms are of one sample's own loss: times the rows of the step."""

    def __init__(self) -> None:
        self.largest = 0.0
        """Before the step that was added last."""
        self._next = 0.0
        self._steps = 0

    def suspicious(self, norm: float) -> bool:
        """Take the largest norm of a step; whether it is too large."""
        self.largest = max(self.largest, self._next)
        self._next = norm
        if norm > HUGE:
            return True
        settled = self._steps >= SETTLED
        self._steps += norm > 0
        return settled and norm > LARGE and norm > JUMP * self.largest


class OneWayRule:
    """Do all gradients of a step point one way, step after step?  Enough for a warning, and no more."""

    def __init__(self) -> None:
        self._lengths: deque[float] = deque(maxlen=ONE_WAY_STEPS)

    def add(self, gradients: Gradients) -> float | None:
        """Take one step; the mean over the last ones, or None where they are too few."""
        norms = gradients.scaled_norms
        there = norms > _NOTHING
        rows = int(there.sum())
        if rows >= ONE_WAY_ROWS:
            weights = np.stack([there / np.maximum(norms, _NOTHING) / rows, there / norms.sum()])
            sums = torch.from_numpy(weights).to(gradients.rows) @ gradients.rows
            self._lengths.append(float(_norms(sums).min()))
        return sum(self._lengths) / ONE_WAY_STEPS if len(self._lengths) == ONE_WAY_STEPS else None

    @staticmethod
    def suspicious(mean: float) -> bool:
        """Whether rows hardly differ in where they are pulled."""
        return mean > ONE_WAY


class ReplayRule:
    """Have these very gradients come before?  Known again by the norms of their rows, to the last bit."""

    def __init__(self) -> None:
        self._known: deque[tuple[int, bytes]] = deque(maxlen=REPLAYS)

    def add(self, step: int, gradients: Gradients) -> int | None:
        """Take the gradients of ``step``; the step that had the same, or None."""
        if int((gradients.scaled_norms > 0).sum()) < REPLAYED_ROWS:
            return None
        mark = gradients.norms.tobytes()
        before = next((number for number, known in self._known if known == mark), None)
        self._known.append((step, mark))
        return before


# --- the loss ---------------------------------------------------------------------------------------------------------


class LossRule:
    """Does a loss follow the training?  A hard task looks the same as a peer that does not train: enough to warn."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=LOSS_MEAN)
        self._steps = 0
        self._largest = math.inf
        self.first = math.nan
        """Mean of the first ``LOSS_MEAN`` steps."""
        self.lowest = math.inf
        """The lowest mean of as many since."""
        self.last = math.nan
        """Median of the last ones."""

    def add(self, loss: float) -> str | None:
        """Take one step's mean loss; ``never fell``, ``exploded``, or None."""
        self._recent.append(loss)
        self._steps += 1
        if len(self._recent) < LOSS_MEAN:
            return None
        mean, self.last = statistics.fmean(self._recent), statistics.median(self._recent)
        if math.isnan(self.first):
            self.first, self._largest = mean, max(self._recent)
            return None
        self.lowest = min(self.lowest, mean)
        if self._largest > 0 and self.last > EXPLODED * self._largest:
            return "exploded"
        never = self._steps >= LOSS_STEPS and self.first > 0 and self.lowest > NEVER_FELL * self.first
        return "never fell" if never else None
