"""What came of one attack: numbers, a plain sentence, curves and pictures, for the command line and the report.

Here: values only, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Case", "Curve", "Outcome", "Picture", "Pictures", "Verdict"]

Verdict = Literal[
    "recovered", "partly recovered", "nothing recovered", "stopped", "refused", "not all held", "does not apply"
]
"""``stopped``: a detector ended the run and what the attacker held by then is worth nothing; ``refused``: every case of
abuse was turned away, ``not all held``: not every one was; the first three: how much the attacker got, whether or not
it was stopped."""


@dataclass(frozen=True)
class Curve:
    """One line of a plot: ``points`` are (x, y)."""

    name: str
    points: tuple[tuple[float, float], ...]
    x: str = "batches"
    y: str = ""


@dataclass(frozen=True)
class Picture:
    """Pixels 0..255 row by row, grey (``channels`` 1) or RGB (3)."""

    width: int
    height: int
    channels: int
    pixels: bytes


@dataclass(frozen=True)
class Pictures:
    """A row of pictures under one name, e.g. the originals, or what was recovered of them."""

    name: str
    row: tuple[Picture, ...]


@dataclass(frozen=True)
class Case:
    """One case of an attack that has several (each kind of abuse, each alteration on the line)."""

    name: str
    tried: str
    """What was tried, one plain clause."""
    held: bool
    """True where the victim kept its promise."""
    seen: str
    """What happened: the line in the log, or what got through."""


@dataclass(frozen=True)
class Outcome:
    """One attack on one folder.

    Errors are mean squared errors of samples scaled to [-1, 1]; ``baseline_mse``: of predicting the mean sample.
    ``figures``: further numbers by plain name (areas under curves, accuracies), 0..1 where they are rates.
    """

    attack: str
    title: str
    adversary: str
    source: str
    verdict: Verdict
    sentence: str
    """For a person who is not a researcher: what an attacker got, in one or two sentences."""
    defences: tuple[str, ...] = ()
    """What was switched on, e.g. ``detectors: label agreement``, ``gaussian noise on stem -> trunk``."""
    batches: int = 0
    """Training batches that the attacker took part in."""
    stopped_at_batch: int | None = None
    stopped_by: str | None = None
    """The detector's name."""
    reconstruction_mse: float | None = None
    baseline_mse: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()
    pictures: tuple[Pictures, ...] = ()
    cases: tuple[Case, ...] = ()
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The document that ``--json`` prints: all but curves and pictures."""
        return {
            "attack": self.attack,
            "title": self.title,
            "adversary": self.adversary,
            "source": self.source,
            "defences": list(self.defences),
            "batches": self.batches,
            "stopped_at_batch": self.stopped_at_batch,
            "stopped_by": self.stopped_by,
            "reconstruction_mse": self.reconstruction_mse,
            "baseline_mse": self.baseline_mse,
            "figures": dict(self.figures),
            "cases": [{"name": c.name, "tried": c.tried, "held": c.held, "seen": c.seen} for c in self.cases],
            "verdict": self.verdict,
            "sentence": self.sentence,
            "seconds": round(self.seconds, 1),
        }
