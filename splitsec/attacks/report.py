"""The report of a run of attacks: one HTML page that needs nothing else, for a person who is not a researcher.

Here: what an outcome's numbers mean, said in words and beside a reference, for the page and for the terminal; the page,
its curves as SVG and its pictures as PNG; writing it so that no half of it is ever there.  Not here: the numbers
themselves (``outcome``), running anything (``arena``).  No torch.

The page loads nothing, runs nothing and says so to the browser (Content-Security-Policy); whatever comes from a graph,
a log or a peer is escaped.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import math
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from splitsec.attacks.outcome import Case, Curve, Outcome, Picture, Pictures, Verdict

__all__ = [
    "GOT_SOMETHING",
    "Failed",
    "Number",
    "clean",
    "numbers",
    "page",
    "png",
    "save",
    "sentence",
    "short",
    "summary",
]

GOT_SOMETHING: Final = ("recovered", "partly recovered")
"""The verdicts that say: something was got, whether or not the run was stopped in the end."""

NOT_HELD: Final[Verdict] = "not all held"

GUESSING: Final = ", guessing"
"""A figure whose name is another's with this at its end is what guessing gets, and stands beside that other."""

MEANINGS: Final[Mapping[Verdict, str]] = {
    "recovered": "The attacker got what it was after.",
    "partly recovered": "The attacker got some of what it was after: more than a guess, less than all.",
    "nothing recovered": "The attack ran to its end, and what it came away with is about as good as a guess.",
    "stopped": "A detector at a party ended the run, and what the attacker held by then is about as good as a guess.",
    "refused": "Everything that was tried was turned away.",
    "not all held": "Some of what was tried was not turned away; it stands first among the cases.",
    "does not apply": "This graph gives the attack no place to stand.",
}


@dataclass(frozen=True)
class Failed:
    """An attack that did not run to its end through no merit of a defence: nothing is known of it."""

    attack: str
    title: str
    why: str


@dataclass(frozen=True)
class Number:
    """One number of an outcome, and what it is to be held against."""

    name: str
    shown: str
    reading: str = ""
    """What it means, in words; empty where the name says all."""
    gauge: tuple[float, float, float | None] | None = None
    """(value, end of the scale, reference on it): what a bar shows; the scale begins at 0."""


# --- in words


def clean(text: str) -> str:
    """``text`` without what a page or a terminal would obey: control and direction characters become U+FFFD."""
    spaces = "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}"
    return "".join(one if one.isprintable() or one in spaces else " " if one in "\n\t\r" else "\ufffd" for one in text)


def summary(outcomes: Sequence[Outcome], *, undefended: bool, failed: Sequence[Failed] = ()) -> str:
    """The verdict over a whole folder, in plain sentences."""
    return " ".join(_summed(outcomes, undefended, failed))


def _summed(outcomes: Sequence[Outcome], undefended: bool, failed: Sequence[Failed]) -> list[str]:
    """Sentence by sentence, the verdict first."""
    applied = [one for one in outcomes if one.verdict != "does not apply"]
    got = [one for one in applied if one.verdict in GOT_SOMETHING]
    count = len(applied)
    if not count:
        parts = ["No attack came to its end." if failed else "No attack was run."]
    elif count == 1:
        came = "not all of it was turned away" if applied[0].verdict == NOT_HELD else "it got nothing"
        parts = [f"One attack was run ({applied[0].title}), and {'it got something' if got else came}."]
    else:
        which = ": " + _listed([one.title for one in got]) if got else ""
        parts = [f"Of {count} attacks, {len(got) or 'none'} got {'something' if got else 'anything'}{which}."]
        for verdict, text in _REST.items():
            parts.append(_counted(text, sum(one.verdict == verdict for one in applied)))
    parts.append(_counted("{} {do} not apply to this graph.", len(outcomes) - count))
    parts.append(_counted("{} failed to run, so that nothing is known of {them}.", len(failed)))
    if undefended:
        parts[0] = "With the folder's own and the default defences switched off: " + parts[0][0].lower() + parts[0][1:]
    return [part for part in parts if part]


_REST: Final[Mapping[Verdict, str]] = {
    "stopped": "{} {were} stopped by a detector before what the attacker held was worth anything.",
    "refused": "{} {were} turned away in everything that {they} tried.",
    "nothing recovered": "{} ran to the end and came away with nothing better than a guess.",
    "not all held": "{} {were} not turned away in everything that {they} tried.",
}


def _counted(text: str, count: int) -> str:
    if not count:
        return ""
    word = _COUNTS[count - 1] if count <= len(_COUNTS) else str(count)
    if count == 1:
        return text.format(word, were="was", they="it", do="does", them="it")
    return text.format(word, were="were", they="they", do="do", them="them")


_COUNTS: Final = ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else "; ".join(names[:-1]) + "; and " + names[-1]


def sentence(outcome: Outcome) -> str:
    """An outcome's sentence, with an end."""
    said = clean(outcome.sentence).strip()
    if outcome.verdict == "does not apply" and said:
        said = f"It was not run: {said}"
    return said + ("" if said.endswith((".", "!", "?")) or not said else ".")


def numbers(outcome: Outcome) -> list[Number]:
    """What is measured, the most telling first, each with its reference."""
    found = []
    thing = "image" if outcome.pictures else "sample"
    mse, baseline = outcome.reconstruction_mse, outcome.baseline_mse
    if mse is not None:
        found.append(_error(mse, baseline, thing))
    for name, value in outcome.figures.items():
        if outcome.cases and name in ("cases", "held"):
            continue  # counted below
        if name.removesuffix(GUESSING) not in outcome.figures or not name.endswith(GUESSING):
            found.append(_figure(name, value, outcome.figures.get(name + GUESSING)))
    if outcome.cases:
        held = sum(case.held for case in outcome.cases)
        found.append(Number("cases held", f"{held} of {len(outcome.cases)}"))
    if outcome.batches:
        found.append(Number("training batches the attacker took part in", f"{outcome.batches:,}"))
    if outcome.stopped_at_batch is not None:
        by = f"by {outcome.stopped_by}" if outcome.stopped_by else ""
        found.append(Number("stopped in batch", f"{outcome.stopped_at_batch:,}", by))
    return found


def _error(mse: float, baseline: float | None, thing: str) -> Number:
    name = "error of the reconstruction"
    if baseline is None or not baseline > 0 or not math.isfinite(mse):
        return Number(name, short(mse), "0 is a perfect copy")
    ratio = mse / baseline
    average = f"showing the average {thing} every time has {short(baseline)}"
    if ratio < 0.95:
        reading = f"0 is a perfect copy; {average}, so {ratio:.0%} of that error is left"
    else:
        reading = f"0 is a perfect copy; {average}: {'this is no better' if ratio < 1.05 else 'this is worse'}"
    return Number(name, short(mse), reading, (mse, max(mse, baseline), baseline))


def _figure(name: str, value: float, guessing: float | None) -> Number:
    name = re.sub(r"\bauc\b", "area under the curve", name.replace("_", " "), flags=re.IGNORECASE)
    lower = name.lower()
    if guessing is not None:
        end = max(1.0, value, guessing)
        return Number(name, short(value), f"{short(guessing)} is guessing", (value, end, guessing))
    if "area under" in lower:
        return Number(name, short(value), "0.5 is guessing, 1 is always right", (value, 1.0, 0.5))
    if 0 <= value <= 1 and _is_rate(name):
        return Number(name, short(value), "", (value, 1.0, None))
    return Number(name, short(value))


def _is_rate(name: str) -> bool:
    """Whether what is called so lies between 0 and 1."""
    return any(word in name.lower() for word in ("accuracy", "area under", "rate", "share", "success"))


def short(value: float) -> str:
    """A number as a reader wants it: three digits that count."""
    if not math.isfinite(value):
        return "no number"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if abs(value) >= 1 else f"{value:.3g}"
    return f"{value:.2e}"


# --- the page


def page(
    folder_name: str,
    outcomes: Sequence[Outcome],
    *,
    undefended: bool,
    failed: Sequence[Failed] = (),
    waiting: Sequence[str] = (),
    about: Mapping[str, str] | None = None,
    tries: Mapping[str, str] | None = None,
) -> str:
    """The whole report as one HTML document.

    ``failed``: what could not be run.  ``waiting``: titles of attacks still to come, for a page written on the way.
    ``about``: facts on the run (date, version, seed), as they shall stand under the title.  ``tries``: what each attack
    tries, by its name, one clause.
    """
    name = _e(folder_name)
    facts = " \N{MIDDLE DOT} ".join(f"{_e(key)} {_e(value)}" for key, value in (about or {}).items())
    sections = "".join(_section(place, one, (tries or {}).get(one.attack, "")) for place, one in enumerate(outcomes))
    style = hashlib.sha256(_CSS.encode()).digest()
    policy = (
        f"default-src 'none'; style-src 'sha256-{base64.b64encode(style).decode()}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>Attacks on {name}</title>
<style>{_CSS}</style>
</head>
<body>
<main>
<header>
<p class="kicker">Report of attacks</p>
<h1>What attackers got out of <span class="name">{name}</span></h1>
{f'<p class="facts">{facts}</p>' if facts else ""}
</header>
{_verdict(outcomes, undefended, failed, waiting)}
{_table(outcomes, failed, waiting)}
{sections}
{_failures(failed)}
{_HOW_TO_READ}
</main>
</body>
</html>
"""


def _verdict(outcomes: Sequence[Outcome], undefended: bool, failed: Sequence[Failed], waiting: Sequence[str]) -> str:
    verdicts = {one.verdict for one in outcomes}
    level = "bad" if "recovered" in verdicts else "some" if verdicts & {*GOT_SOMETHING, NOT_HELD} or failed else "good"
    if not verdicts - {"does not apply"}:
        level = "none"
    notes = []
    if waiting:
        done = len(outcomes) + len(failed)
        notes.append(f"This page was written on the way: {done} of {done + len(waiting)} attacks are done.")
    if undefended:
        notes.append(
            "A run without defences shows what the attacks can do, not what this folder lets them do. Read it beside a "
            "run with its defences on."
        )
    elif level in ("good", "none"):
        notes.append("That is no proof that nothing can be got: see what this page does not say, at its end.")
    if any(one.pictures for one in outcomes):
        notes.append("Below are pictures of samples as they are. Keep this page where the data may be kept.")
    lead, *rest = _summed(outcomes, undefended, failed)
    more = "".join(f"<p>{_e(note)}</p>" for note in (" ".join(rest), *notes) if note)
    return f'<section class="verdict {level}"><p class="lead">{_e(lead)}</p>{more}</section>'


def _table(outcomes: Sequence[Outcome], failed: Sequence[Failed], waiting: Sequence[str]) -> str:
    rows = [
        f'<tr><th scope="row"><a href="#attack-{place}">{_e(one.title)}</a></th>'
        f'<td data-column="who">{_e(one.adversary)}</td>'
        f'<td data-column="what it got">{_badge(one.verdict)}{_brief(one)}</td>'
        f'<td data-column="stopped by">{_stopped(one)}</td></tr>'
        for place, one in enumerate(outcomes)
    ]
    rows += [
        f'<tr><th scope="row"><a href="#failed">{_e(one.title)}</a></th><td data-column="who"></td>'
        f'<td data-column="what it got">not known: it failed to run</td><td data-column="stopped by"></td></tr>'
        for one in failed
    ]
    rows += [
        f'<tr><th scope="row">{_e(title)}</th><td data-column="who"></td>'
        f'<td data-column="what it got">not run yet</td><td data-column="stopped by"></td></tr>'
        for title in waiting
    ]
    return (
        '<table class="all"><thead><tr><th scope="col">Attack</th><th scope="col">Who</th>'
        '<th scope="col">What it got</th><th scope="col">Stopped by</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _brief(outcome: Outcome) -> str:
    """The most telling number, short enough for a table."""
    if outcome.verdict == "does not apply":
        return ""
    if outcome.reconstruction_mse is not None and outcome.baseline_mse is not None:
        text = f"error {short(outcome.reconstruction_mse)}, average {short(outcome.baseline_mse)}"
    elif outcome.cases:
        text = f"{sum(case.held for case in outcome.cases)} of {len(outcome.cases)} cases held"
    else:
        found = [one for one in numbers(outcome) if one.gauge is not None]
        text = f"{found[0].name} {found[0].shown}" if found else ""
    return f'<span class="brief">{_e(text)}</span>' if text else ""


def _stopped(outcome: Outcome) -> str:
    if outcome.stopped_by is not None or outcome.stopped_at_batch is not None:
        where = "" if outcome.stopped_at_batch is None else f", in batch {outcome.stopped_at_batch:,}"
        return _e(f"{outcome.stopped_by or 'a detector'}{where}")
    return {"refused": "the rules of the protocol", NOT_HELD: "not always", "does not apply": ""}.get(
        outcome.verdict, "not stopped"
    )


def _section(place: int, outcome: Outcome, tries: str) -> str:
    facts = [("Who attacks", outcome.adversary), ("What it tries", tries)]
    if outcome.verdict != "does not apply":
        facts.append(("Defences on", "; ".join(outcome.defences) or "none"))
    said = "".join(f"<div><dt>{_e(key)}</dt><dd>{_e(value)}</dd></div>" for key, value in facts if value)
    return (
        f'<section class="attack" id="attack-{place}"><h2>{_e(outcome.title)}</h2>'
        f'<p class="sentence">{_badge(outcome.verdict)}{_e(sentence(outcome))}</p>'
        f'<dl class="facts">{said}</dl>'
        f"{_numbers(numbers(outcome))}{_curves(outcome)}{_pictures(outcome.pictures)}{_cases(outcome.cases)}"
        f'<p class="source">Source: {_e(outcome.source)}. Name for the command line: <code>{_e(outcome.attack)}</code>'
        f"{f'. It took {outcome.seconds:,.0f} s' if outcome.seconds else ''}.</p></section>"
    )


def _numbers(found: Sequence[Number]) -> str:
    if not found:
        return ""
    rows = "".join(
        f'<div><dt>{_e(one.name)}</dt><dd class="value">{_e(one.shown)}</dd>'
        f'<dd class="reading">{_gauge(one)}{_e(one.reading)}</dd></div>'
        for one in found
    )
    return f'<dl class="numbers">{rows}</dl>'


def _gauge(number: Number) -> str:
    if number.gauge is None or not math.isfinite(number.gauge[0]):
        return ""
    value, end, reference = number.gauge
    fill = 200 * min(max(value / end, 0.0), 1.0)
    at = None if reference is None else 200 * reference / end
    mark = (
        ""
        if at is None
        else f'<rect class="reference" x="{min(max(at - 1, 0), 198):.1f}" y="0" width="2" height="14"/>'
    )
    return (
        '<svg class="gauge" viewBox="0 0 200 14" aria-hidden="true"><rect class="track" x="0" y="4" width="200" '
        f'height="6" rx="3"/><rect class="fill" x="0" y="4" width="{fill:.1f}" height="6" rx="3"/>{mark}</svg>'
    )


def _cases(cases: Sequence[Case]) -> str:
    if not cases:
        return ""
    rows = "".join(
        f'<li class="{"held" if one.held else "broke"}"><p>{_mark("refused" if one.held else "recovered")}'
        f"<strong>{_e(one.name)}: {'held' if one.held else 'not held'}</strong></p>"
        f'<p>{_e(one.tried)}</p><p class="seen">{_e(one.seen)}</p></li>'
        for one in sorted(cases, key=lambda one: one.held)
    )
    return f'<h3>Case by case</h3><ul class="cases">{rows}</ul>'


def _failures(failed: Sequence[Failed]) -> str:
    if not failed:
        return ""
    rows = "".join(f"<li><strong>{_e(one.title)}</strong><pre>{_lines(one.why)}</pre></li>" for one in failed)
    return (
        '<section class="attack" id="failed"><h2>What could not be run</h2><p>These attacks ended by an error of their '
        f"own. Nothing is known of what they would have got.</p><ul>{rows}</ul></section>"
    )


def _badge(verdict: Verdict) -> str:
    level = {"recovered": "bad", "partly recovered": "some", NOT_HELD: "some", "does not apply": "none"}.get(
        verdict, "good"
    )
    return f'<span class="badge {level}">{_mark(verdict)}{_e(verdict)}</span> '


_MARKS: Final[Mapping[str, str]] = {
    "recovered": '<circle class="solid" cx="8" cy="8" r="6"/>',
    "partly recovered": '<circle cx="8" cy="8" r="6"/><path class="solid" d="M8 2a6 6 0 0 1 0 12z"/>',
    "nothing recovered": '<circle cx="8" cy="8" r="6"/>',
    "stopped": '<path class="solid" d="M5 2h6l3 3v6l-3 3H5l-3-3V5z"/>',
    "refused": '<path d="M2.5 8.5l4 4 7-9"/>',
    "not all held": '<path d="M3 3l10 10M13 3l-10 10"/>',
    "does not apply": '<path d="M3 8h10"/>',
}
"""A shape for each verdict: colour alone tells nothing to many."""


def _mark(verdict: str) -> str:
    return f'<svg class="mark" viewBox="0 0 16 16" aria-hidden="true">{_MARKS[verdict]}</svg>'


def _e(text: str) -> str:
    return html.escape(clean(text))


def _lines(text: str) -> str:
    return "\n".join(_e(line) for line in text.splitlines())


# --- pictures

_ACROSS: Final = 6
"""Pictures beside each other before the rows begin anew: as many as stay legible on a phone."""


def png(picture: Picture) -> bytes:
    """``picture`` as a PNG file: 8 bits a channel, no filter (PNG specification, third edition, sections 5 and 7)."""
    colour = {1: 0, 3: 2}.get(picture.channels)
    stride = picture.width * picture.channels
    if colour is None or picture.width < 1 or picture.height < 1 or len(picture.pixels) != stride * picture.height:
        raise ValueError(
            f"{len(picture.pixels)} bytes are no picture of {picture.width} by {picture.height} "
            f"in {picture.channels} channels"
        )
    rows = (picture.pixels[start : start + stride] for start in range(0, len(picture.pixels), stride))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (
            (b"IHDR", struct.pack(">IIBBBBB", picture.width, picture.height, 8, colour, 0, 0, 0)),
            (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows), 9)),
            (b"IEND", b""),
        )
    )


def _pictures(rows: Sequence[Pictures]) -> str:
    """Rows below each other, so that a sample and what was made of it stand in one column."""
    rows = [row for row in rows if row.row]
    if not rows:
        return ""
    longest = max(len(row.row) for row in rows)
    across = min(longest, _ACROSS)
    blocks = []
    for start in range(0, longest, across):
        parts = []
        for row in rows:
            shown = row.row[start : start + across]
            if shown:
                images = "".join(_image(one, row.name, start + place) for place, one in enumerate(shown))
                parts.append(f'<p class="label">{_e(row.name)}</p><div class="row">{images}</div>')
        blocks.append(f'<div class="block">{"".join(parts)}</div>')
    caption = "<figcaption>Each column is one sample.</figcaption>" if len(rows) > 1 else ""
    return f'<figure class="pictures">{"".join(blocks)}{caption}</figure>'


def _image(picture: Picture, name: str, place: int) -> str:
    return (
        f'<img src="data:image/png;base64,{base64.b64encode(png(picture)).decode()}" '
        f'width="{picture.width}" height="{picture.height}" alt="{_e(name)}, {place + 1}">'
    )


# --- curves

_WIDTH, _HEIGHT = 420, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 408, 22, 192
_STYLES = 6
_POINTS = 300


def _curves(outcome: Outcome) -> str:
    """One plot for all curves that share both axes."""
    plots: dict[tuple[str, str], list[Curve]] = {}
    for curve in outcome.curves:
        points = tuple((x, y) for x, y in curve.points if math.isfinite(x) and math.isfinite(y))
        if points:
            plots.setdefault((curve.x, curve.y), []).append(Curve(curve.name, points, curve.x, curve.y))
    return "".join(_plot(x, y, curves, outcome) for (x, y), curves in plots.items())


def _plot(x: str, y: str, curves: Sequence[Curve], outcome: Outcome) -> str:
    across = [point[0] for curve in curves for point in curve.points]
    up = [point[1] for curve in curves for point in curve.points]
    levels = _levels(y, curves, outcome)
    up += levels.values()
    if _is_rate(y) and 0 <= min(up) <= max(up) <= 1:
        up += [0.0, 1.0]
    elif min(up) >= 0 and not 0.7 * max(up) < min(up) < max(up):
        up.append(0.0)
    xs, ys = _ticks(min(across), max(across)), _ticks(min(up), max(up))
    left, right = min(across), max(across)
    if left == right:
        left, right = left - 0.5, right + 0.5
    bottom, top = min(ys[0], *up), max(ys[-1], *up)

    def at(value: float) -> float:
        return _LEFT + (value - left) / (right - left) * (_RIGHT - _LEFT)

    def over(value: float) -> float:
        return _BOTTOM - (value - bottom) / (top - bottom) * (_BOTTOM - _TOP)

    parts = []
    for value in ys:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{over(value):.1f}" y2="{over(value):.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{over(value) + 4:.1f}">{_tick(value, ys)}</text>')
    for value in xs:
        if left <= value <= right:
            parts.append(f'<text class="tick middle" x="{at(value):.1f}" y="{_BOTTOM + 16}">{_tick(value, xs)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{_BOTTOM}" y2="{_BOTTOM}"/>')
    for value in levels.values():
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{_RIGHT}" y1="{over(value):.1f}" y2="{over(value):.1f}"/>')
    stop = outcome.stopped_at_batch
    if stop is not None and "batch" in x.lower() and left <= stop <= right:
        parts.append(f'<line class="stop" x1="{at(stop):.1f}" x2="{at(stop):.1f}" y1="{_TOP}" y2="{_BOTTOM}"/>')
        side = "end" if at(stop) > _RIGHT - 30 else "start" if at(stop) < _LEFT + 30 else "middle"
        parts.append(f'<text class="note {side}" x="{at(stop):.1f}" y="{_TOP - 6}">stopped</text>')
    for place, curve in enumerate(curves):
        points = [(at(a), over(b)) for a, b in _thinned(curve.points)]
        style = place % _STYLES
        if len(points) > 1:
            drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(f'<polyline class="curve s{style}" points="{drawn}"/>')
        parts.append(_dot(style, *points[-1]))
    label = _e(y or "value")
    parts.append(f'<text class="label middle" x="{(_LEFT + _RIGHT) / 2:.0f}" y="{_HEIGHT - 8}">{_e(x)}</text>')
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 34 12" aria-hidden="true">'
        f'<line class="curve s{place % _STYLES}" x1="1" x2="27" y1="6" y2="6"/>{_dot(place % _STYLES, 28, 6)}</svg>'
        f"{_e(curve.name)}: {short(curve.points[0][1])} at first, {short(curve.points[-1][1])} at last</li>"
        for place, curve in enumerate(curves)
    )
    legend += "".join(
        '<li><svg class="key" viewBox="0 0 34 12" aria-hidden="true"><line class="level" x1="1" x2="33" y1="6" y2="6"/>'
        f"</svg>{_e(words)}</li>"
        for words in levels
    )
    spoken = _e(f"{y or 'value'} over {x}: " + ", ".join(curve.name for curve in curves))
    return (
        f'<figure class="plot"><p class="label">{label}</p>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{spoken}">{"".join(parts)}</svg>'
        f"<figcaption><ul>{legend}</ul></figcaption></figure>"
    )


def _levels(y: str, curves: Sequence[Curve], outcome: Outcome) -> dict[str, float]:
    """What a plot's values are to be held against, by the name of its axis."""
    lower = y.lower()
    if outcome.baseline_mse is not None and ("mse" in lower.split() or "error" in lower):
        return {
            f"average {'image' if outcome.pictures else 'sample'}: {short(outcome.baseline_mse)}": outcome.baseline_mse
        }
    if "area under" in lower or "auc" in lower.split():
        return {"guessing: 0.5": 0.5}
    return {}


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``, some four of them."""
    span = high - low
    if not span > 1e-12 * max(abs(low), abs(high), 1e-300):
        span = abs(low) or 1.0
        low, high = low - span / 2, high + span / 2
    rough = span / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(size for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12 - math.floor(math.log10(step))) for place in range(first, last + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    """All ticks of an axis with the same decimals."""
    step = ticks[1] - ticks[0]
    if not 1e-4 < step < 1e6:
        return f"{value:.3g}"
    places = next(places for places in range(8) if abs(step * 10**places - round(step * 10**places)) < 1e-6)
    return f"{value:,.{places}f}"


def _thinned(points: Sequence[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    """At most some 300 points: of each stretch its lowest and its highest, so that no peak is lost."""
    if len(points) <= _POINTS:
        return points
    size = -(-2 * len(points) // _POINTS)
    kept = [points[0]]
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        pair = {min(stretch, key=lambda one: one[1]), max(stretch, key=lambda one: one[1])}
        kept += sorted(pair, key=stretch.index)
    return [*kept, points[-1]]


def _dot(style: int, x: float, y: float) -> str:
    match style % 3:
        case 0:
            return f'<circle class="dot s{style}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        case 1:
            return f'<rect class="dot s{style}" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
        case _:
            return f'<path class="dot s{style}" d="M{x:.1f} {y - 5:.1f}l5 8.5h-10z"/>'


# --- the file


def save(file: str | Path, text: str) -> None:
    """Write ``text`` to ``file`` all at once: whoever opens it sees the old page or the new one.  Mode 0600: it may
    show samples.  Raises ``OSError``.
    """
    file = Path(file)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name[:80]}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


# --- words and looks that are the same on every page

_HOW_TO_READ: Final = (
    '<section class="attack"><h2>How to read this page</h2><dl class="words">'
    + "".join(f"<div><dt>{_badge(verdict)}</dt><dd>{text}</dd></div>" for verdict, text in MEANINGS.items())
    + """</dl>
<p><strong>Error of a reconstruction.</strong> The attacker shows a copy of each sample; the error is the mean square of
what is wrong with it, every value scaled to lie between &minus;1 and 1. 0 is a perfect copy. Who knows nothing but
the average sample can show that every time: its error is the mark on the bar, and a reconstruction near it is worth
nothing. Here half of that error or less counts as recovered, up to 85 % of it as partly recovered.</p>
<p><strong>Area under the curve.</strong> The attacker says yes or no about each sample (is it in the data? which label
has it?). 0.5 is what guessing gets, 1 is always right.</p>
<p><strong>Cases.</strong> An attack may try several things, one after the other. A case is held if the victim did not
give way: it refused, or went on unharmed, and sent nothing that it should not have sent.</p>
<p><strong>Stopped in batch.</strong> Training goes in small batches of samples. A detector that stops the run in
batch 5 has let the attacker see those five, and nothing of later ones.</p>
<h2>What this page does not say</h2>
<ul>
<li>It shows what <em>these</em> attacks got with this data, these network parts and the time they were given. A better
attack, or the same with more time or more data of the same kind, may get more.</li>
<li>&ldquo;Nothing recovered&rdquo; is a measurement, not a promise. Only noise with a stated epsilon promises something
about attacks that nobody has thought of yet, and it promises what its accounting says, no more.</li>
<li>What a detector stops, it stops after it has seen something. An attacker that knows the detectors and has patience
may pass them.</li>
<li>Defences that were switched on here protect a real run only if they are switched on there.</li>
</ul></section>"""
)

_CSS: Final = """
:root{--paper:#fdfcf9;--ink:#1d1f23;--soft:#5b6069;--line:#d9d6cd;--raised:#f4f2ec;--bad:#a3260f;--some:#855600;
--good:#15623f;--none:#5b6069;--fill:#31557f;--s0:#1f5fa8;--s1:#b64a00;--s2:#00755a;--s3:#8c3b7c;--s4:#6b5b00;--s5:#444;
--serif:Charter,"Bitstream Charter","Iowan Old Style","Source Serif 4",Cambria,Georgia,serif;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--paper:#16181c;--ink:#e9e7e1;--soft:#a3a8b1;--line:#383c44;--raised:#1f2228;
--bad:#ff9078;--some:#f0bd5c;--good:#7fd3a7;--none:#a3a8b1;--fill:#8fb4e3;--s0:#7db2f0;--s1:#ff9d5c;--s2:#57cfae;
--s3:#dd94cd;--s4:#d6c35a;--s5:#c9c9c9}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:1.0625rem/1.55 var(--serif);overflow-wrap:break-word}
main{max-width:46rem;margin:0 auto;padding:3rem 1.25rem 4rem}
h1,h2,h3,table,dl,.kicker,.facts,.badge,.source,figure,.label,.seen,code,pre{font-family:var(--sans)}
h1{font-size:clamp(1.5rem,1.15rem + 1.9vw,2.15rem);line-height:1.18;letter-spacing:-.015em;margin:.2rem 0 .6rem;
text-wrap:balance}
h2{font-size:1.3rem;line-height:1.25;letter-spacing:-.01em;margin:0 0 .5rem;text-wrap:balance}
h3{font-size:.95rem;margin:1.8rem 0 .5rem}
p{margin:.6rem 0;text-wrap:pretty}
a{color:inherit;text-decoration-color:var(--soft);text-underline-offset:.15em}
a:focus-visible{outline:2px solid var(--fill);outline-offset:2px}
.name{overflow-wrap:anywhere}
.kicker{margin:0;font-size:.8rem;letter-spacing:.06em;text-transform:uppercase;color:var(--soft)}
p.facts{font-size:.85rem;color:var(--soft);margin:0}
.verdict{margin:1.6rem 0 2.2rem;padding:1rem 1.25rem;background:var(--raised);border-left:.4rem solid var(--none)}
.verdict.bad{border-color:var(--bad)}.verdict.some{border-color:var(--some)}.verdict.good{border-color:var(--good)}
.verdict p{margin:.5rem 0 0;font-size:1rem}
.verdict p.lead{margin:0;font-size:1.22rem;line-height:1.42}
table{width:100%;border-collapse:collapse;font-size:.875rem;line-height:1.4}
th,td{text-align:left;vertical-align:top;padding:.55rem .8rem .55rem 0;border-bottom:1px solid var(--line)}
thead th{font-weight:600;color:var(--soft);font-size:.8rem;border-bottom:2px solid var(--ink)}
tbody th{font-weight:600;width:27%}
td:nth-child(3){min-width:10.5rem}
td:nth-child(4){min-width:6rem}
td:last-child,th:last-child{padding-right:0}
.brief{display:block;color:var(--soft);font-variant-numeric:tabular-nums}
.badge{display:inline-flex;align-items:center;gap:.35em;font-size:.875rem;font-weight:650;white-space:nowrap;
color:var(--none);margin-right:.25em}
.bad.badge{color:var(--bad)}.some.badge{color:var(--some)}.good.badge{color:var(--good)}
.mark{width:.85em;height:.85em;flex:none;fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round;
stroke-linecap:round}
.mark .solid{fill:currentColor}
.attack{margin-top:3rem;padding-top:1.6rem;border-top:1px solid var(--line)}
.sentence{font-size:1.13rem;line-height:1.45}
.sentence .badge{font-size:.95rem}
dl{margin:1rem 0;font-size:.875rem;line-height:1.45}
dd{margin:0}
dl.facts>div,dl.words>div{display:grid;grid-template-columns:8rem 1fr;gap:0 1rem;padding:.2rem 0}
dl.words>div{grid-template-columns:10rem 1fr}
dl.facts dt{color:var(--soft)}
dl.numbers{margin:1.3rem 0;border-top:1px solid var(--line)}
dl.numbers>div{display:grid;grid-template-columns:minmax(9rem,14rem) 6rem 1fr;gap:0 1rem;padding:.5rem 0;
border-bottom:1px solid var(--line)}
dl.numbers .value{font-weight:650;font-variant-numeric:tabular-nums;text-align:right}
.reading{color:var(--soft)}
.gauge{display:block;width:100%;max-width:15rem;height:auto;margin:.2rem 0 .25rem}
.track{fill:var(--line)}.fill{fill:var(--fill)}.reference{fill:var(--ink)}
figure{margin:1.6rem 0}
figcaption{font-size:.875rem;color:var(--soft);line-height:1.45}
figure .label{margin:0 0 .25rem;font-size:.85rem;font-weight:600}
.plot svg:not(.key){display:block;width:100%;max-width:36rem;height:auto}
.plot text{font:11px var(--sans);fill:var(--soft);font-variant-numeric:tabular-nums}
.plot text.note{fill:var(--ink)}
.plot .start{text-anchor:start}.plot .middle{text-anchor:middle}.plot .end{text-anchor:end}
.grid{stroke:var(--line)}.axis{stroke:var(--ink)}
.level{stroke:var(--ink);stroke-dasharray:2 4}.stop{stroke:var(--good);stroke-width:2}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}
.s0{stroke:var(--s0)}.s1{stroke:var(--s1);stroke-dasharray:7 4}.s2{stroke:var(--s2);stroke-dasharray:2 3}
.s3{stroke:var(--s3);stroke-dasharray:10 3 2 3}.s4{stroke:var(--s4);stroke-dasharray:4 2}
.s5{stroke:var(--s5);stroke-dasharray:12 5}
.dot{stroke:var(--paper);stroke-width:1;stroke-dasharray:none}
.dot.s0{fill:var(--s0)}.dot.s1{fill:var(--s1)}.dot.s2{fill:var(--s2)}.dot.s3{fill:var(--s3)}.dot.s4{fill:var(--s4)}
.dot.s5{fill:var(--s5)}
.plot ul{list-style:none;margin:.4rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.15rem 1.4rem}
.key{width:34px;height:12px;margin-right:.5rem;vertical-align:-1px}
.pictures .row{display:grid;grid-template-columns:repeat(6,minmax(0,6rem));gap:.3rem;margin:0 0 .7rem}
.pictures img{display:block;width:100%;height:auto;image-rendering:pixelated;background:var(--raised)}
.cases{list-style:none;margin:0;padding:0;font-size:.95rem}
.cases li{padding:.6rem 0;border-bottom:1px solid var(--line)}
.cases p{margin:.1rem 0}
.cases strong{font-family:var(--sans);font-size:.9rem}
.held .mark{color:var(--good)}.broke .mark,.broke strong{color:var(--bad)}
.cases .mark{margin-right:.5em;vertical-align:-.05em}
.seen{font-size:.82rem;color:var(--soft);overflow-wrap:anywhere}
.source{font-size:.82rem;color:var(--soft);margin-top:1.4rem;break-before:avoid}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.95em}
pre{white-space:pre-wrap;font:.82rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:.3rem 0}
li{margin:.3rem 0}
@media (max-width:36rem){
main{padding:1.6rem 1rem 3rem}
table,tbody,tr,th,td{display:block}
thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
tbody tr{padding:.7rem 0;border-bottom:1px solid var(--line)}
tbody th,tbody td{border:0;padding:.05rem 0;width:auto;min-width:0}
td:empty{display:none}
td[data-column]::before{content:attr(data-column) ": ";color:var(--soft)}
td .badge{white-space:normal}
.brief{display:inline}
dl.facts>div,dl.words>div{grid-template-columns:1fr;padding:.35rem 0}
dl.numbers>div{grid-template-columns:1fr auto}
dl.numbers .reading{grid-column:1/-1}
.plot text{font-size:13px}
}
@media print{
:root{--paper:#fff;--ink:#000;--soft:#444;--line:#bbb;--raised:#fff;--bad:#8d1d08;--some:#6b4400;--good:#0d5033;
--none:#444;--fill:#274a72;--s0:#1f5fa8;--s1:#b64a00;--s2:#00755a;--s3:#8c3b7c;--s4:#6b5b00;--s5:#333;
color-scheme:light}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
body{font-size:10.5pt}
main{max-width:none;padding:0}
.verdict{border:1px solid var(--line);border-left-width:.4rem}
h2,h3,.label{break-after:avoid}
figure.plot,.block,tr,.cases li,dl>div,.verdict,.sentence{break-inside:avoid}
.attack{margin-top:1.8rem;padding-top:1rem}
.plot svg:not(.key){max-width:26rem}
a{text-decoration:none}
@page{margin:18mm}
}
"""
