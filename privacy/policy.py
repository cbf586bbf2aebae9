"""What is done to one cut's tensors in one direction, and when that is at least as strict as something else.

Here: two frozen values and their order.  Not here: where they are written (graph and party file), what does it
(``mechanism``), what it costs (``accounting``, by way of the ``release`` that they name).

*At least as strict* is an order on what may be done: nobody's clip norm is larger, and where noise is demanded, noise of
the same kind with no smaller multiplier is added.  A stricter policy never has a larger epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from splitsec.privacy.errors import BadParameter
from splitsec.privacy.release import Gaussian, Laplace, Mechanism, RandomisedResponse

__all__ = ["LabelPolicy", "Policy"]


@dataclass(frozen=True)
class Policy:
    """Clip every sample's tensor to norm ``clip``; then add ``noise`` of ``noise_multiplier`` times 2 ``clip``, if any."""

    clip: float | None = None
    noise: Literal["gaussian", "laplace"] | None = None
    noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("clip", self.clip), ("noise_multiplier", self.noise_multiplier)):
            if value is not None and not 0 < value < math.inf:
                raise BadParameter(f"{name} is {value}, and must be a finite number above 0")
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
        if floor.clip is not None and (self.clip is None or self.clip > floor.clip):
            return f"clip {'none' if self.clip is None else f'{self.clip:g}'}, where at most {floor.clip:g} is allowed"
        if floor.noise is None or floor.noise_multiplier is None:
            return None
        if self.noise is None or self.noise_multiplier is None:
            return f"no noise, where {floor.noise} noise is demanded"
        if self.noise != floor.noise:
            return f"{self.noise} noise, where {floor.noise} noise is demanded"
        if self.noise_multiplier < floor.noise_multiplier:
            return (
                f"noise multiplier {self.noise_multiplier:g}, where at least {floor.noise_multiplier:g} is demanded"
            )
        return None

    def __str__(self) -> str:
        if self.clip is None:
            return "as it is"
        norm = "L1 " if self.noise == "laplace" else ""
        return f"{norm}clip {self.clip:g}" + (f", {self.noise} {self.noise_multiplier:g}" if self.noise else "")


@dataclass(frozen=True)
class LabelPolicy:
    """Randomised response on class numbers: each release of a label has this ``epsilon``."""

    epsilon: float
    classes: int

    def __post_init__(self) -> None:
        self.mechanism()

    def mechanism(self) -> Mechanism:
        """What one release of one label costs."""
        return RandomisedResponse(self.epsilon, self.classes)

    def at_least(self, floor: LabelPolicy) -> str | None:
        """None if this is at least as strict as ``floor``; else what is less strict, in a sentence."""
        if self.classes != floor.classes:
            return f"{self.classes} classes, where the floor has {floor.classes}"
        if self.epsilon > floor.epsilon:
            return f"epsilon {self.epsilon:g} a label, where at most {floor.epsilon:g} is allowed"
        return None

    def __str__(self) -> str:
        return f"randomised response {self.epsilon:g} of {self.classes} classes"
