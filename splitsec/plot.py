"""The picture of a resource plan: every place where a chain could be cut, as one SVG document.

Here: drawing alone, from a ``Report``.  Above, what one client sends and receives in an epoch for each cut, on a
logarithmic scale, beside federated learning and large-batch SGD; below, the client's share of the computing.  Not here:
the numbers (``resources``), pictures of graphs (``drawing``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Final

from splitsec.resources import Report

__all__ = ["svg"]

_INK: Final = "#1f2937"
_FAINT: Final = "#6b7280"
_BAR: Final = "#93b4e8"
_CHOSEN: Final = "#1d4ed8"
_LINES: Final = ("#b45309", "#047857")  # federated learning, large-batch SGD
_FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
_STYLE: Final = f"""
text {{ font-family: {_FONT}; fill: {_INK}; font-size: 11px; }}
.title {{ font-size: 18px; font-weight: 700; }}
.panel {{ font-size: 13px; font-weight: 700; }}
.fact {{ fill: {_FAINT}; }}
.tick {{ fill: {_FAINT}; text-anchor: end; }}
.grid {{ stroke: #e5e7eb; stroke-width: 1; }}
.line {{ stroke-width: 1.8; stroke-dasharray: 6 4; }}
.known {{ text-anchor: end; font-weight: 600; stroke: #ffffff; stroke-width: 3; paint-order: stroke; }}
"""

_MARGIN: Final = 28
_LEFT: Final = 86
_RIGHT: Final = 28
_TOP: Final = 118
_BYTES: Final = 220  # height of the upper panel
_GAP: Final = 52
_SHARE: Final = 120
_BAR_ROOM: Final = 38  # width of a bar and the room around it, at least


def _size(count: float) -> str:
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"


def svg(report: Report) -> str:
    """The candidates of ``report`` as one self-contained SVG document, ending in a newline."""
    found = report.candidates
    width = max(640, _LEFT + _BAR_ROOM * len(found) + _RIGHT)
    room = (width - _LEFT - _RIGHT) / max(1, len(found))
    names = max((len(one.after) for one in found), default=0)
    base = _TOP + _BYTES + _GAP + _SHARE
    height = base + 24 + 5.6 * names + 14
    known = [(one.name, one.bytes_epoch) for one in report.methods[1:]]
    amounts = [one.bytes_epoch for one in found] + [amount for _, amount in known]
    powers = [math.log2(amount) for amount in amounts if amount > 0] or [0.0, 1.0]
    low, high = math.floor(min(powers)) - 1, math.ceil(max(powers))
    setting = report.setting
    about = (
        f"{setting.clients:,} client{'' if setting.clients == 1 else 's'}, {setting.each:,.6g} samples each, "
        f"batches of {setting.batch:,}"
    )
    said = "; ".join(
        f"after {one.after}: {_size(one.bytes_epoch)}, {one.client_share:.1%} of the computing" for one in found
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-labelledby="title summary">',
        f'<title id="title">{escape(report.title)}: where to cut</title>',
        f'<desc id="summary">{escape(about)}. {escape(said)}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        f'<text class="title" x="{_MARGIN}" y="42">{escape(report.title)}: where to cut</text>',
        f'<text class="fact" x="{_MARGIN}" y="64">{escape(about)}; dark: the cut of this plan</text>',
    ]

    def place(amount: float) -> float:
        return _TOP + _BYTES * (1 - (math.log2(amount) - low) / (high - low))

    out.append(f'<text class="panel" x="{_MARGIN}" y="{_TOP - 18}">what one client sends and receives, an epoch</text>')
    every = max(1, round((high - low) / 6))
    for power in range(low, high + 1, every):
        out += _grid(place(2.0**power), _size(2.0**power), width)
    out += _bars(
        [place(one.bytes_epoch) if one.bytes_epoch else _TOP + _BYTES for one in found], _TOP + _BYTES, report, room
    )
    levels: list[float] = []
    for (name, amount), colour in zip(known, _LINES, strict=False):
        if amount <= 0:
            continue
        y = place(amount)
        out.append(f'<path class="line" d="M{_LEFT} {y:.1f} H{width - _RIGHT}" stroke="{colour}"/>')
        label = y - 5 if all(abs(y - other) > 14 for other in levels) else y + 14
        levels.append(y)
        text = escape(f"{name}: {_size(amount)}")
        out.append(f'<text class="known" x="{width - _RIGHT}" y="{label:.1f}" style="fill: {colour}">{text}</text>')
    top = _TOP + _BYTES + _GAP
    out.append(f'<text class="panel" x="{_MARGIN}" y="{top - 18}">the client\'s share of the computing</text>')
    for percent in (0, 50, 100):
        out += _grid(top + _SHARE * (1 - percent / 100), f"{percent} %", width)
    out += _bars([top + _SHARE * (1 - one.client_share) for one in found], base, report, room)
    for index, one in enumerate(found):
        x = _LEFT + room * (index + 0.5) + 4
        weight = ' font-weight="700"' if one.chosen else ""
        turned = f'transform="rotate(-60 {x:.1f} {base + 14})" text-anchor="end"'
        out.append(f'<text x="{x:.1f}" y="{base + 14}" {turned}{weight}>{escape(one.after)}</text>')
    return "\n".join((*out, "</svg>")) + "\n"


def _grid(y: float, text: str, width: float) -> list[str]:
    return [
        f'<path class="grid" d="M{_LEFT} {y:.1f} H{width - _RIGHT:.0f}"/>',
        f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}">{text}</text>',
    ]


def _bars(tops: Sequence[float], base: float, report: Report, room: float) -> list[str]:
    out = []
    for index, (top, one) in enumerate(zip(tops, report.candidates, strict=True)):
        x, wide = _LEFT + room * index + 6, room - 12
        colour = _CHOSEN if one.chosen else _BAR
        tall = max(0.0, base - top)
        place = f'x="{x:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
        out.append(f'<rect {place} rx="2" fill="{colour}"/>')
    return out
