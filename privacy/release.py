"""What was released, as frozen values: the mechanism that one sample's tensor went through before it left.

Here: the mechanisms whose cost can be accounted for, the absence of one, and nothing that computes with them.  A
release is one use of one of them on one sample; ``accounting`` turns numbers of releases into epsilon, ``ledger`` keeps
the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from splitsec.privacy.errors import BadParameter

__all__ = ["Gaussian", "InTheClear", "Laplace", "Mechanism", "RandomisedResponse", "as_json", "from_json"]


def _positive(value: float, name: str) -> None:
    if not 0 < value < float("inf"):
        raise BadParameter(f"{name} is {value}, and must be a finite number above 0")


@dataclass(frozen=True, order=True)
class _Noise:
    """Noise on each of ``coordinates`` numbers, of a scale that is ``noise_multiplier`` times the sensitivity."""

    noise_multiplier: float
    coordinates: int

    def __post_init__(self) -> None:
        _positive(self.noise_multiplier, "noise_multiplier")
        _positive(self.coordinates, "coordinates")


@dataclass(frozen=True, order=True)
class Gaussian(_Noise):
    """Gaussian noise; its scale is the standard deviation.

    The sensitivity is 2C in L2: any two values of one sample, each clipped to norm C.
    """


@dataclass(frozen=True, order=True)
class Laplace(_Noise):
    """Laplace noise; the sensitivity is 2C in L1."""


@dataclass(frozen=True, order=True)
class RandomisedResponse:
    """A label out of ``classes``, kept with probability e^epsilon / (e^epsilon + classes - 1), else any other."""

    epsilon: float
    classes: int

    def __post_init__(self) -> None:
        _positive(self.epsilon, "epsilon")
        if self.classes < 2:
            raise BadParameter(f"{self.classes} classes, and there must be at least 2")


@dataclass(frozen=True, order=True)
class InTheClear:
    """Nothing random was done: what left may tell everything.  No finite epsilon holds for such a release."""


Mechanism = Gaussian | Laplace | RandomisedResponse | InTheClear

_KINDS: Final[dict[str, type[Gaussian] | type[Laplace] | type[RandomisedResponse] | type[InTheClear]]] = {
    "gaussian": Gaussian,
    "laplace": Laplace,
    "randomised_response": RandomisedResponse,
    "in_the_clear": InTheClear,
}


def as_json(mechanism: Mechanism) -> dict[str, Any]:
    """Plain values, e.g. ``{"kind": "gaussian", "noise_multiplier": 2.0, "coordinates": 512}``."""
    kind = next(name for name, one in _KINDS.items() if type(mechanism) is one)
    return {"kind": kind, **asdict(mechanism)}


def from_json(values: Mapping[str, Any]) -> Mechanism:
    """The mechanism that ``as_json`` wrote down.  Raises ``BadParameter``."""
    rest = {name: value for name, value in values.items() if name != "kind"}
    try:
        return _KINDS[values["kind"]](**rest)
    except (KeyError, TypeError) as error:
        raise BadParameter(f"no mechanism that is known here: {dict(values)!r}") from error
