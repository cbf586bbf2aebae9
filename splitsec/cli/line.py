"""The options that describe a line between parties: ``--bandwidth 100mbit --delay 25ms``.

Here: how they are read.  Not here: what a schedule makes of a line (``advice``), a slow line to try (``slowlink``).
"""

from __future__ import annotations

import argparse
import math
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from splitsec.advice import Line

__all__ = ["BANDWIDTH", "DELAY", "line_of"]

BANDWIDTH: Final = "1gbit"
DELAY: Final = "0.5ms"
"""Where nothing is said."""

_RATES: Final = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_TIMES: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def line_of(arguments: argparse.Namespace) -> Line:
    """What ``--bandwidth`` and ``--delay`` say; ``UserError`` where they are no rate and no time."""
    from splitsec.advice import Line
    from splitsec.errors import UserError

    bandwidth = _measure(arguments.bandwidth or BANDWIDTH, _RATES, "--bandwidth", "100mbit") / 8
    if bandwidth <= 0:
        raise UserError("--bandwidth 0", expected="a rate above 0", fix="write e.g. `--bandwidth 100mbit`")
    return Line(bandwidth, _measure(arguments.delay or DELAY, _TIMES, "--delay", "25ms"))


def _measure(text: str, units: dict[str, float], option: str, example: str) -> float:
    from splitsec.errors import UserError

    found = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?) ?({'|'.join(units)})", text.strip().lower())
    value = float(found[1]) * units[found[2]] if found else math.inf
    if found is None or not math.isfinite(value):
        raise UserError(
            f"{option} {text}",
            expected=f"a number with {', '.join(units)}, such as {example}",
            fix=f"write e.g. `{option} {example}`",
        )
    return value
