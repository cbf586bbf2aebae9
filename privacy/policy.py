"""What is done to one cut's tensors in one direction, and when that is at least as strict as something else.

Here: two frozen values and their order.  Not here: where they are written (graph and party file), what does it
(``mechanism``), what it costs (``accounting``, by way of the ``release`` that they name).

*At least as strict* is an order on what may be done: the clip norm is no larger, and where noise is demanded, noise of
the same kind with no smaller multiplier is added.  A stricter policy never has a larger epsilon.  The two kinds of
noise stand beside each other, neither above; both stand above clipping only, since an L1 norm bounds the L2 norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from splitsec.privacy.errors import BadParameter
from splitsec.privacy.release import Gaussian, Laplace, Mechanism, RandomisedResponse

__all__ = ["LabelPolicy", "Policy"]


def _positive(value: float, name: str) -> float:
    if not 0 < value < math.inf:
        raise BadParameter(f"{name} is {value}, and must be a finite number above 0")
    return float(value)


def _shown(value: float) -> str:
    """With all digits, so that two values that differ look different."""
    return repr(value).removesuffix(".0")


@dataclass(frozen=True)
class Policy:
    """Clip every sample's tensor to norm ``clip``; add ``noise`` of ``noise_multiplier`` times 2 ``clip``, if any.

    That product is the standard deviation, with Laplace the scale.  The norm is L2, with Laplace L1.  Raises
    ``BadParameter`` for noise without ``clip`` or ``noise_multiplier``, and for numbers not finite and above 0.
    """

    clip: float | None = None
    noise: Literal["gaussian", "laplace"] | None = None
    noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        for name in ("clip", "noise_multiplier"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _positive(value, name))  # 1 and 1.0 are the same policy
        if self.noise not in (None, "gaussian", "laplace"):
            raise BadParameter(f"noise is {self.noise!r}, and must be 'gaussian', 'laplace' or None")
        if (self.noise is None) != (self.noise_multiplier is None):
            raise BadParameter("noise and noise_multiplier: one without the other")
        if self.noise is not None and self.clip is None:
            raise BadParameter("noise without clip: nothing bounds what the noise must hide")

    def mechanism(self, shape: Sequence[int]) -> Mechanism | None:
        """What one release of a sample's tensor of ``shape`` costs; None where nothing random is done."""
        if self.noise_multiplier is None:
            return None
        kind = Gaussian if self.noise == "gaussian" else Laplace
        return kind(self.noise_multiplier, max(1, math.prod(shape)))

    def at_least(self, floor: Policy) -> str | None:
        """None if this is at least as strict as ``floor``; else what is less strict, in a sentence."""
        if floor.clip is not None:
            if self.clip is None:
                return f"no clip, where at most {_shown(floor.clip)} is allowed"
            if self.clip > floor.clip:
                return f"clip {_shown(self.clip)}, where at most {_shown(floor.clip)} is allowed"
        if floor.noise_multiplier is None:
            return None
        if self.noise_multiplier is None:
            return f"no noise, where {floor.noise} noise is demanded"
        if self.noise != floor.noise:
            return f"{self.noise} noise, where {floor.noise} noise is demanded"
        if self.noise_multiplier < floor.noise_multiplier:
            least = _shown(floor.noise_multiplier)
            return f"noise multiplier {_shown(self.noise_multiplier)}, where at least {least} is demanded"
        return None

    def __str__(self) -> str:
        if self.clip is None:
            return "as it is"
        clip = f"{'L1 ' if self.noise == 'laplace' else ''}clip {_shown(self.clip)}"
        return clip if self.noise_multiplier is None else f"{clip}, {self.noise} {_shown(self.noise_multiplier)}"


@dataclass(frozen=True)
class LabelPolicy:
    """Randomised response on class numbers: each release of a label has this ``epsilon``."""

    epsilon: float
    classes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", _positive(self.epsilon, "epsilon"))
        self.mechanism()

    def mechanism(self) -> Mechanism:
        """What one release of one label costs."""
        return RandomisedResponse(self.epsilon, self.classes)

    def at_least(self, floor: LabelPolicy) -> str | None:
        """None if this is at least as strict as ``floor``; else what is less strict, in a sentence."""
        if self.classes != floor.classes:
            return f"{self.classes} classes, where the floor has {floor.classes}"
        if self.epsilon > floor.epsilon:
            return f"epsilon {_shown(self.epsilon)} a label, where at most {_shown(floor.epsilon)} is allowed"
        return None

    def __str__(self) -> str:
        return f"randomised response {_shown(self.epsilon)} of {self.classes} classes"
