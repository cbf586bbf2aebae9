"""Pictures of a graph: one for the terminal, one as SVG.

Here: layout and drawing, from a checked graph alone.  Not here: what the words mean (docs/concepts.md).  Both
pictures show places (a party, or a group as one), their segments in the order of the work, cuts as arrows, labels
edges as broken ones, who dials whom, and who reaches whom through relays.

``draw`` stacks the places and leads every edge around them on a rail at the right, so that any graph fits; ``svg``
gives every place a band, and every segment the column of its depth.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import combinations, pairwise
from typing import Final, Literal, NamedTuple

from splitsec.graph import EXACT, Cut, Graph

__all__ = ["draw", "svg"]

Kind = Literal["cut", "inside", "labels", "exchange"]


_TIMES: Final = "\N{MULTIPLICATION SIGN}"


class _Edge(NamedTuple):
    """An edge as both pictures show it.  ``source`` and ``target`` are ids of lines or nodes."""

    source: str
    target: str
    kind: Kind
    shape: str
    size: str


def _shape(shape: Sequence[int | None], dtype: str) -> str:
    return f"{dtype} " + _TIMES.join("?" if size is None else str(size) for size in shape) if shape else dtype


def _size(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    amount = float(count)
    units = iter(("KiB", "MiB", "GiB", "TiB"))
    unit = "B"
    while amount >= 1024:
        amount, unit = amount / 1024, next(units)
    return f"{amount:.1f} {unit}" if amount < 100 else f"{amount:.0f} {unit}"


def _about_group(graph: Graph, place: str) -> str:
    """Who is in a group, and how they work; empty for a party."""
    if place not in graph.groups:
        return ""
    group = graph.groups[place]
    how = "taking turns, weights handed on" if group.schedule == "round_robin" else "all at once, each with own weights"
    how = "taking turns in a secret order, weights handed on" if place == graph.anonymous else how
    return ", ".join(group.members) + f": {how}"


def _facts(graph: Graph, segment: str) -> list[str]:
    """What a segment reads, which loss it computes, how it joins its inputs."""
    one = graph.segments[segment]
    facts = [f"reads {one.data}"] if one.data else []
    if one.loss is not None:
        weight = "" if one.loss_weight == 1.0 else f" {_TIMES} {one.loss_weight:g}"
        facts.append(f"loss {one.loss}{weight}")
    if len(graph.edges_into(segment)) + (one.data is not None) > 1:
        facts.append("takes its inputs as arguments" if one.join == "arguments" else f"joins by {one.join}")
    return facts


def _summary(graph: Graph) -> str:
    def counted(count: int, word: str) -> str:
        return f"{count} {word}" + ("" if count == 1 else "s")

    parts = [counted(len(graph.parties), "party").replace("partys", "parties")]
    parts += [counted(len(one), word) for one, word in ((graph.segments, "segment"), (graph.cuts, "cut")) if one]
    if graph.segments:
        training = graph.training
        parts.append(f"{counted(training.epochs, 'epoch')} of batches of {training.batch_size}")
        if training.micro_batches > 1:
            parts[-1] += f" in {training.micro_batches} micro-batches"
    return ", ".join(parts)


def _connections(graph: Graph) -> Iterator[str]:
    """Who dials whom, who forwards between whom, and what circuits there are, one sentence a line."""
    dialers: dict[str, list[str]] = {}
    for link in graph.links():
        dialers.setdefault(link.listener, []).append(link.dialer)
    for listener, names in dialers.items():
        verb = "dials" if len(names) == 1 else "dial"
        yield f"{', '.join(names)} {verb} {listener} at {graph.parties[listener].dialled}"
    pairs: dict[str, list[tuple[str, str]]] = {}
    for one in graph.circuits_between():
        if not graph.has_routes(one):
            pairs.setdefault(one.routes[0][0], []).append((one.first, one.second))
    for via, ends in pairs.items():
        yield f"{via} forwards messages between {_listed(_in_order(graph, ends))} that it cannot read"
    if graph.routes:
        yield from _circuits(graph)


def _circuits(graph: Graph) -> Iterator[str]:
    """Who builds circuits to whom and through whom, what of them can be seen, and what an anonymous group hides."""
    pairs: dict[tuple[tuple[str, ...], ...], list[tuple[str, str]]] = {}
    for one in graph.circuits_between():
        if graph.has_routes(one):
            pairs.setdefault(one.routes, []).append((one.first, one.second))
    relays = {relay for routes in pairs for route in routes for relay in route}
    for routes, ends in pairs.items():
        ways = ", or else ".join(f"through {', '.join(route)}" for route in routes)
        names = _in_order(graph, ends)
        if len(ends) > 1 and set(map(frozenset, ends)) == set(map(frozenset, combinations(names, 2))):
            yield f"{_who(graph, names)} build circuits to each other {ways}"
            continue
        builders: dict[str, list[str]] = {}
        for first, second in ends:
            builders.setdefault(second, []).append(first)
        reached: dict[tuple[str, ...], list[str]] = {}
        for second, firsts in builders.items():
            reached.setdefault(tuple(firsts), []).append(second)
        for firsts_, seconds in reached.items():
            verb = "builds a circuit" if len(firsts_) == len(seconds) == 1 else "builds circuits"
            verb = verb if len(firsts_) == 1 else "build circuits"
            yield f"{_who(graph, firsts_)} {verb} to {_who(graph, seconds)} {ways}"
    what = (
        "relay, which cannot read what it passes on"
        if len(relays) == 1
        else "relays, which cannot read what they pass on"
    )
    yield f"{what}: {', '.join(name for name in graph.parties if name in relays)}"
    size = "one size between any two ends" if graph.circuits.padding == "fixed" else "padded to a few sizes"
    pace = "" if graph.circuits.cover is None else f", one each way every {graph.circuits.cover:g} s, needed or not"
    yield f"cells that carry messages are {size}{pace}"
    if graph.anonymous is not None:
        far = [name for name in graph.parties if name in graph.far_ends]
        verb, it = ("learns", "it sees") if len(far) == 1 else ("learn", "they see")
        yield (
            f"{_listed(far)} {verb} that a member of {graph.anonymous} speaks, and not which: every member proves the "
            f"group's key, and begins a new channel every {graph.groups[graph.anonymous].pseudonym}; what is sent, and "
            f"when, {it} as ever"
        )


def _in_order(graph: Graph, pairs: Iterable[tuple[str, str]]) -> list[str]:
    named = {name for pair in pairs for name in pair}
    return [name for name in graph.parties if name in named]


def _listed(names: Sequence[str]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


def _who(graph: Graph, names: Sequence[str]) -> str:
    """Names, or the group that they all make."""
    for group, one in graph.groups.items():
        if len(names) > 1 and set(names) == set(one.members):
            return f"the members of {group}"
    return _listed(names)


# The terminal.  A box is a list of rows; a row may begin an edge, or be where edges end.


@dataclass
class _Row:
    text: str
    id: str = ""  # of the edge that begins here, or of the segment that edges reach here
    begins: bool = False


@dataclass
class _Box:
    place: str
    rows: list[_Row] = field(default_factory=list)


_ASCII = str.maketrans(
    {
        "┌": "+", "┐": "+", "└": "+", "┘": "+", "├": "+", "┴": "+", "─": "-", "│": "|", "╌": ".", "┆": ":",
        "▶": ">", "◀": "<", "▷": ">", "◁": "<", _TIMES: "x", "…": "~",
    }
)  # fmt: skip

MIN_WIDTH: Final = 60
RAIL: Final = 3  # columns of one rail
MAX_RAILS: Final = 7


def draw(graph: Graph, *, width: int = 80, ascii_only: bool = False) -> str:
    """The graph as text of at most ``width`` columns (at least 60), each line ending in a newline."""
    width = max(width, MIN_WIDTH)
    boxes, edges = _boxes(graph)
    lines = [*textwrap.wrap(f"{graph.name}: {_summary(graph)}", width, subsequent_indent="    "), ""]
    if boxes:
        lines += _stacked(graph, boxes, edges, width)
        lines += ["──▶ activations forward, gradients back    ╌╌▷ labels", ""]
    for one in graph.exchanges:
        lines.append(f"exchange {one.name}: {one.source} ──▶ {one.target}   {_shape(one.shape, one.dtype)}")
    if graph.exchanges:
        lines.append("")
    for sentence in _connections(graph):
        lines += textwrap.wrap(
            sentence, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
    text = "\n".join(_cut(line.rstrip(), width) for line in lines).rstrip() + "\n"
    return text.translate(_ASCII) if ascii_only else text


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _carried(cut: Cut) -> str:
    """What crosses a cut for each sample, and how it travels."""
    return _shape(cut.shape, cut.dtype) + ("" if cut.codec is None else f" as {cut.codec}")


def _size_of(cut: Cut, batch: int) -> str:
    """How much that is for a batch, in one direction; where zeros are left out, the most it can be."""
    return ("up to " if cut.codec == EXACT else "") + _size(cut.message_bytes(batch))


def _boxes(graph: Graph) -> tuple[list[_Box], list[_Edge]]:
    """Boxes from top to bottom, in the order of the work, and the edges between their rows."""
    boxes: list[_Box] = []
    edges: list[_Edge] = []
    for segment in graph.order:
        place = graph.segments[segment].at
        for index, labels in enumerate(graph.labels):
            if labels.target == segment:
                box = next((one for one in reversed(boxes) if one.place == labels.source), None)
                if box is None or place == labels.source:
                    if not boxes or boxes[-1].place != labels.source:
                        boxes.append(_Box(labels.source))
                    box = boxes[-1]
                id_ = f"labels {index}"
                what, size = _shape(labels.shape, labels.dtype), _size(labels.sample_bytes * graph.training.batch_size)
                where = "stays inside" if place == labels.source else f"{size} a batch"
                box.rows.append(_Row(f"labels {labels.field} ╌╌▷ {segment}\t{what}\t{where}", id_, True))
                edges.append(_Edge(id_, segment, "labels", what, size))
        if not boxes or boxes[-1].place != place:
            boxes.append(_Box(place))
        boxes[-1].rows.append(_Row(f"{segment}\t{', '.join(_facts(graph, segment))}", segment))
        for index in graph.edges_out_of(segment):
            cut = graph.cuts[index]
            inside = graph.segments[cut.target].at == place
            what, size = _carried(cut), _size_of(cut, graph.training.batch_size)
            name = f" {cut.output}" if cut.output else ""
            where = "stays inside" if inside else f"{size} a batch"
            boxes[-1].rows.append(_Row(f"  ──▶ {cut.target}{name}\t{what}\t{where}", f"cut {index}", True))
            edges.append(_Edge(f"cut {index}", cut.target, "inside" if inside else "cut", what, size))
    return boxes, edges


def _stacked(graph: Graph, boxes: Sequence[_Box], edges: Sequence[_Edge], width: int) -> list[str]:
    rails = _rails(boxes, edges)
    inner = _inner(rails, width)
    for place in graph.groups:  # a group's first box says who is in it
        box = next((one for one in boxes if one.place == place), None)
        if box is not None:
            about = textwrap.wrap(_about_group(graph, place), inner, break_on_hyphens=False)
            box.rows[:0] = [_Row(one) for one in about]
    rails = _rails(boxes, edges)
    lines: list[str] = []
    shown: set[str] = set()
    columns = _columns(boxes, inner)
    for box in boxes:
        title = _cut(f" {box.place}" + (" (again)" if box.place in shown else "") + " ", inner)
        shown.add(box.place)
        lines.append("┌─" + title + "─" * (inner + 1 - len(title)) + "┐")
        for row in box.rows:
            text = _aligned(row.text, columns, inner)
            lines.append("│ " + text + " │")
        lines.append("└─" + "─" * (inner + 1) + "┘")
    _draw_rails(lines, rails, width)
    return [*lines, ""]


def _columns(boxes: Sequence[_Box], inner: int) -> list[int]:
    """Widths of the first two of the three columns of rows."""
    cells = [row.text.split("\t") for box in boxes for row in box.rows]
    first = max((len(one[0]) for one in cells if len(one) > 1), default=0)
    second = max((len(one[1]) for one in cells if len(one) > 2), default=0)
    third = max((len(one[2]) for one in cells if len(one) > 2), default=0)
    first = min(first, max(8, inner - second - third - 4))
    return [first, second]


def _aligned(text: str, columns: Sequence[int], inner: int) -> str:
    cells = text.split("\t")
    if len(cells) == 1:
        return _cut(text, inner).ljust(inner)
    line = _cut(cells[0], columns[0]).ljust(columns[0]) + "  "
    if len(cells) == 2:
        line += cells[1]
    elif len(cells) == 3:
        line += cells[1].ljust(columns[1]) + "  " + cells[2]
    return _cut(line.rstrip(), inner).ljust(inner)


def _inner(rails: Sequence[tuple[int, int, int, _Edge]], width: int) -> int:
    """How many columns the rails leave for what stands in the boxes."""
    count = max((rail + 1 for rail, *_ in rails), default=0)
    return width - 4 - (count * RAIL + 2 if count else 0)


def _rails(boxes: Sequence[_Box], edges: Iterable[_Edge]) -> list[tuple[int, int, int, _Edge]]:
    """A rail, counted from the boxes, with first and last line for every edge that leaves its box.

    Short edges come inside, and no two share a rail at one height.  None at all where they would be too many to follow
    with the eye; every row still names what it leads to.
    """
    start_of: dict[str, int] = {}
    box_of: dict[str, int] = {}
    line = 0
    for index, box in enumerate(boxes):
        for count, row in enumerate(box.rows, 1):
            start_of[row.id], box_of[row.id] = line + count, index
        line += len(box.rows) + 2
    spans = [
        (start_of[one.source], start_of[one.target], one) for one in edges if box_of[one.source] != box_of[one.target]
    ]
    taken: list[list[tuple[int, int]]] = []
    result = []
    for first, last, edge in sorted(spans, key=lambda one: (one[1] - one[0], one[0])):
        rail = 0
        while rail < len(taken) and any(first <= b and a <= last for a, b in taken[rail]):
            rail += 1
        if rail == len(taken):
            taken.append([])
        taken[rail].append((first, last))
        result.append((rail, first, last, edge))
    return result if len(taken) <= MAX_RAILS else []


def _draw_rails(lines: list[str], rails: Sequence[tuple[int, int, int, _Edge]], width: int) -> None:
    if not rails:
        return
    right = len(lines[0])
    grid = [list(line.ljust(width)) for line in lines]

    def column(rail: int) -> int:
        return right + 1 + (rail + 1) * RAIL - 1

    for rail, first, last, edge in rails:  # across
        flat = "╌" if edge.kind == "labels" else "─"
        for line in (first, last):
            for x in range(right, column(rail)):
                if grid[line][x] == " ":
                    grid[line][x] = flat
    for rail, first, last, edge in rails:  # down: what goes down hides what goes across
        for line in range(first + 1, last):
            grid[line][column(rail)] = "┆" if edge.kind == "labels" else "│"
    for rail, first, last, edge in rails:
        across = any(one > rail and last == other for one, _, other, _ in rails)
        grid[first][column(rail)] = "┐"
        grid[last][column(rail)] = "┴" if across else "┘"
        grid[first][right - 1] = "├"
        grid[last][right] = "◁" if edge.kind == "labels" and grid[last][right] != "◀" else "◀"
    for index, one in enumerate(grid):
        lines[index] = "".join(one).rstrip()


# The picture.  A place is a band across the whole width; a segment stands in its band, in the column of its depth.

_COLOURS: Final = (  # of a band: line and text, fill; dark enough to read on the fill, told apart by the colour-blind
    ("#1d4ed8", "#eff4ff"),
    ("#b45309", "#fff7ea"),
    ("#047857", "#ecfaf4"),
    ("#9d174d", "#fdf1f6"),
    ("#6d28d9", "#f5f1ff"),
    ("#0e7490", "#ebf8fb"),
    ("#4d7c0f", "#f4faea"),
    ("#475569", "#f4f6f8"),
)
_INK: Final = "#1f2937"
_FAINT: Final = "#6b7280"
_FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
_STYLE: Final = f"""
text {{ font-family: {_FONT}; fill: {_INK}; }}
.title {{ font-size: 20px; font-weight: 700; }}
.place {{ font-size: 13px; font-weight: 700; }}
.name {{ font-size: 14px; font-weight: 600; text-anchor: middle; }}
.pill {{ font-size: 12px; text-anchor: middle; }}
.fact, .facts {{ font-size: 11px; fill: {_FAINT}; }}
.facts {{ text-anchor: middle; }}
.on {{ font-size: 11px; text-anchor: middle; }}
.tag {{ fill: #ffffff; fill-opacity: 0.9; }}
.edge {{ fill: none; stroke: {_INK}; stroke-width: 1.8; }}
.inside {{ stroke: {_FAINT}; stroke-width: 1.3; }}
.labels {{ stroke-dasharray: 5 4; }}
.exchange {{ stroke-dasharray: 1.5 4; stroke-linecap: round; }}
"""

_MARGIN: Final = 28
_TOP: Final = 86  # title and summary
_CAPTION: Final = 34  # of a band
_ROW: Final = 74  # height of a node and the room around it
_NODE: Final = 50  # height of a node
_PILL: Final = 26
_BAND_GAP: Final = 14
_LINE: Final = 17


@dataclass
class _Node:
    """A segment, or the pill of labels or of an exchange; ``x`` and ``y`` are its middle, once laid out."""

    id: str
    place: str
    column: int
    name: str
    facts: str
    pill: bool = False
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0

    @property
    def height(self) -> float:
        return _PILL if self.pill else _NODE


def _width(text: str, size: float, *, bold: bool = False) -> float:
    """About how wide ``text`` is at font size ``size``, in pixels; no font is at hand, so rather too much."""
    narrow = sum(one in "iljtfrI.,:;'|()[] -" for one in text)
    return (len(text) * 0.62 - narrow * 0.24) * size * (1.06 if bold else 1.0)


def _nodes(graph: Graph) -> tuple[dict[str, _Node], list[_Edge]]:
    """Every node with its place and column, and the edges between them."""
    depth: dict[str, int] = {}
    for segment in graph.order:
        before = [depth[graph.cuts[index].source] + 1 for index in graph.edges_into(segment)]
        depth[segment] = max(before, default=1 if any(one.target == segment for one in graph.labels) else 0)
    nodes: dict[str, _Node] = {}
    edges: list[_Edge] = []
    batch = graph.training.batch_size
    for segment in graph.order:
        facts = " · ".join(_facts(graph, segment))
        nodes[segment] = _Node(segment, graph.segments[segment].at, depth[segment], segment, facts)
    for cut in graph.cuts:
        kind: Kind = "inside" if graph.segments[cut.source].at == graph.segments[cut.target].at else "cut"
        what = _carried(cut) + (f" ({cut.output})" if cut.output else "")
        size = "stays inside" if kind == "inside" else f"{_size_of(cut, batch)} a batch"
        edges.append(_Edge(cut.source, cut.target, kind, what, size))
    for index, labels in enumerate(graph.labels):
        id_ = f"labels {index}"
        nodes[id_] = _Node(id_, labels.source, max(depth[labels.target] - 1, 0), f"labels {labels.field}", "", True)
        what = _shape(labels.shape, labels.dtype)
        local = labels.source == graph.segments[labels.target].at
        size = "stays inside" if local else f"{_size(labels.sample_bytes * batch)} a batch"
        edges.append(_Edge(id_, labels.target, "labels", what, size))
    for index, one in enumerate(graph.exchanges):
        for column, place in enumerate((one.source, one.target)):
            id_ = f"exchange {index} {column}"
            nodes[id_] = _Node(id_, place, column, one.name, "", True)
        what = _shape(one.shape, one.dtype)
        edges.append(_Edge(f"exchange {index} 0", f"exchange {index} 1", "exchange", what, ""))
    for node in nodes.values():
        node.width = max(
            _width(node.name, 14, bold=not node.pill) + 30, _width(node.facts, 11) + 28, 60 if node.pill else 104
        )
    return nodes, edges


def svg(graph: Graph) -> str:
    """The graph as one self-contained SVG document, ending in a newline."""
    nodes, edges = _nodes(graph)
    places = list(dict.fromkeys(node.place for node in sorted(nodes.values(), key=lambda one: one.column)))
    places = [one for one in (*graph.groups, *graph.parties) if one in places] if not graph.segments else places
    bands, width = _laid_out(graph, nodes, edges, places)
    notes = [*_connections(graph)]
    wrapped = [
        line for note in notes for line in textwrap.wrap(note, max(40, int(width / 6.2)), subsequent_indent="    ")
    ]
    below = max((top + height for top, height in bands.values()), default=_TOP)
    legend_y = below + 30
    height = legend_y + 18 + len(wrapped) * _LINE + 14
    title, summary = graph.name, _summary(graph)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-labelledby="title summary">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="summary">{escape("; ".join((summary, *notes)))}</desc>',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0.8 L10 5 L0 9.2 L2.2 5 z" fill="{_INK}"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        f'<text class="title" x="{_MARGIN}" y="42">{escape(title)}</text>',
        f'<text class="fact" x="{_MARGIN}" y="64">{escape(summary)}</text>',
    ]
    colours = {place: _COLOURS[index % len(_COLOURS)] for index, place in enumerate(places)}
    for place, (top, tall) in bands.items():
        out += _band(graph, place, colours[place], top, tall, width)
    boxes: list[_Area] = [
        (one.x - one.width / 2, one.y - one.height / 2, one.x + one.width / 2, one.y + one.height / 2)
        for one in nodes.values()
    ]
    for place, (top, _) in bands.items():
        words = _width(f"{place}   {_about_group(graph, place)}", 12.5)
        boxes.append((_MARGIN, top, _MARGIN + 24 + words, top + 30))
    routes = list(_routes(nodes, edges))
    sampled = [[_point(piece, t / 24) for piece in pairwise(points) for t in range(25)] for _, points in routes]
    tags: list[str] = []
    for index, (edge, points) in enumerate(routes):
        out.append(f'<path class="edge {edge.kind}" d="{_curve(points)}" marker-end="url(#arrow)"/>')
        others = [point for other, one in enumerate(sampled) if other != index for point in one]
        tags += _tag(edge, points, boxes, others, sampled[index])
    for node in nodes.values():
        out += _drawn(node, colours[node.place], node.place in graph.groups)
    out += [*tags, *_legend(edges, legend_y)]
    out += [
        f'<text class="fact" x="{_MARGIN}" y="{legend_y + 26 + index * _LINE:.0f}">{escape(line)}</text>'
        for index, line in enumerate(wrapped)
    ]
    return "\n".join((*out, "</svg>")) + "\n"


def _laid_out(
    graph: Graph, nodes: dict[str, _Node], edges: Sequence[_Edge], places: Sequence[str]
) -> tuple[dict[str, tuple[float, float]], float]:
    """Set every node's middle; returns top and height of each band, and the width of the picture."""
    top = float(_TOP)
    bands: dict[str, tuple[float, float]] = {}
    for place in places:
        rows: dict[int, int] = {}
        for node in sorted((one for one in nodes.values() if one.place == place), key=lambda one: one.pill):
            node.y = top + _CAPTION + rows.setdefault(node.column, 0) * _ROW + _ROW / 2 - 4
            rows[node.column] += 1
        bands[place] = (top, _CAPTION + max(rows.values()) * _ROW)
        top += bands[place][1] + _BAND_GAP
    columns = max((node.column for node in nodes.values()), default=0) + 1
    wide = [max((node.width for node in nodes.values() if node.column == one), default=60) for one in range(columns)]
    left = _MARGIN + 22.0
    for column in range(columns):
        for node in nodes.values():
            if node.column == column:
                node.x = left + wide[column] / 2
        left += wide[column] + max((_room(one, nodes) for one in edges if _passes(one, nodes, column)), default=60)
    captions = [_width(f"{place}  {_about_group(graph, place)}", 12.5) + 2 * _MARGIN + 40 for place in places]
    right = max((node.x + node.width / 2 for node in nodes.values()), default=0) + _MARGIN + 22
    return bands, max([right, 560, *captions])


def _passes(edge: _Edge, nodes: dict[str, _Node], column: int) -> bool:
    """Whether ``edge`` crosses the gap to the right of ``column``."""
    return nodes[edge.source].column <= column < nodes[edge.target].column


def _room(edge: _Edge, nodes: dict[str, _Node]) -> float:
    """How wide a gap must be for ``edge``: its words fit, and it is not too steep to follow."""
    source, target = nodes[edge.source], nodes[edge.target]
    slope = abs(target.y - source.y) / (target.column - source.column)
    return max(max(_width(edge.shape, 11), _width(edge.size, 11)) + 64, 0.45 * slope)


def _rect(x: float, y: float, width: float, height: float, radius: float, attributes: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:g}"'
    return f"<rect {place} {attributes}/>"


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _band(graph: Graph, place: str, colour: tuple[str, str], top: float, tall: float, width: float) -> list[str]:
    line, fill = colour
    about = _about_group(graph, place)
    more = f'<tspan class="fact" dx="10" font-weight="400">{escape(about)}</tspan>' if about else ""
    look = f'fill="{fill}" stroke="{line}" stroke-opacity="0.35"'
    return [
        _rect(_MARGIN, top, width - 2 * _MARGIN, tall, 10, look),
        f'<text class="place" x="{_MARGIN + 14}" y="{top + 23:.1f}" style="fill: {line}">{escape(place)}{more}</text>',
    ]


def _drawn(node: _Node, colour: tuple[str, str], several: bool) -> list[str]:
    line, fill = colour
    x, y, radius = node.x - node.width / 2, node.y - node.height / 2, _PILL / 2 if node.pill else 8
    out = []
    for shift in ((3,) if node.pill else (6, 3)) if several else ():
        behind = f'fill="{fill}" stroke="{line}" stroke-opacity="0.55"'
        out.append(_rect(x + shift, y + shift, node.width, node.height, radius, behind))
    look = f'fill="#ffffff" stroke="{line}" stroke-width="1.6"' + (' stroke-dasharray="4 3"' if node.pill else "")
    out.append(_rect(x, y, node.width, node.height, radius, look))
    if node.pill:
        return [*out, _text("pill", node.x, node.y + 4, node.name)]
    out.append(_text("name", node.x, node.y + (-3 if node.facts else 5), node.name))
    return [*out, _text("facts", node.x, node.y + 15, node.facts)] if node.facts else out


Point = tuple[float, float]
_Area = tuple[float, float, float, float]  # left, top, right, bottom


def _routes(nodes: dict[str, _Node], edges: Sequence[_Edge]) -> Iterator[tuple[_Edge, list[Point]]]:
    """For every edge the points it goes through, around the nodes that stand between its ends."""
    columns: dict[int, list[_Node]] = {}
    for node in nodes.values():
        columns.setdefault(node.column, []).append(node)
    for edge in edges:
        source, target = nodes[edge.source], nodes[edge.target]
        out = sorted((e for e in edges if e.source == edge.source), key=lambda e: nodes[e.target].y)
        into = sorted((e for e in edges if e.target == edge.target), key=lambda e: nodes[e.source].y)
        start = (source.x + source.width / 2, source.y + _port(out.index(edge), len(out), source))
        end = (target.x - target.width / 2 - 1, target.y + _port(into.index(edge), len(into), target))
        points = [start]
        if source.column == target.column:  # an exchange or labels beside each other
            points = [start, (start[0] + 30, start[1])]
        for column in range(source.column + 1, target.column):
            here = columns[column]
            middle, half = here[0].x, max(node.width for node in here) / 2 + 12
            share = (middle - start[0]) / (end[0] - start[0])
            y = _free(start[1] + (end[1] - start[1]) * share, here)
            points += [(middle - half, y), (middle + half, y)]
        yield edge, [*points, end]


def _port(index: int, count: int, node: _Node) -> float:
    """Where, above or below the middle of a side, the edge ``index`` of ``count`` meets it."""
    step = min(14.0, (node.height - 12) / max(count - 1, 1))
    return (index - (count - 1) / 2) * step


def _free(y: float, nodes: Sequence[_Node]) -> float:
    """The height nearest to ``y`` at which no node of a column is in the way."""
    room = 22
    blocked = sorted((node.y - node.height / 2 - room, node.y + node.height / 2 + room) for node in nodes)
    candidates = [y, *(edge for pair in blocked for edge in pair)]
    free = [one for one in candidates if not any(low < one < high for low, high in blocked)]
    return min(free, key=lambda one: abs(one - y))


def _curve(points: Sequence[Point]) -> str:
    """A path that is level at every point."""
    x, y = points[0]
    parts = [f"M{x:.1f} {y:.1f}"]
    for (x1, y1), (x2, y2) in pairwise(points):
        middle = (x1 + x2) / 2
        parts.append(
            f"L{x2:.1f} {y2:.1f}" if y1 == y2 else f"C{middle:.1f} {y1:.1f} {middle:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
        )
    return " ".join(parts)


def _point(piece: tuple[Point, Point], share: float) -> Point:
    """A point of the curve that is level at both ends of ``piece``: a cubic with its control points in the middle."""
    (x1, y1), (x2, y2) = piece
    near, far = share * share * (3 - 2 * share), 1.5 * share * (1 - share)
    return x1 * (1 - share) ** 3 + x2 * share**3 + (x1 + x2) * far, y1 + (y2 - y1) * near


def _tag(
    edge: _Edge, points: Sequence[Point], boxes: list[_Area], others: Sequence[Point], own: Sequence[Point]
) -> list[str]:
    """Shape and size on the edge, where they cover least of anything else; their area is added to ``boxes``."""
    lines = [one for one in (edge.shape, edge.size) if one]
    half, tall = max(_width(one, 11) for one in lines) / 2 + 4, 14.0 * len(lines) + 4
    longest = max(b[0] - a[0] for a, b in pairwise(points))
    best: tuple[float, Point, bool] | None = None
    for piece in pairwise(points):
        length, rise = piece[1][0] - piece[0][0], abs(piece[1][1] - piece[0][1])
        covered = min(2 * half / length, tall / max(rise, 0.1))
        hidden = 40.0 if covered > 0.5 else 0.0  # on a short edge, words would leave little of it
        slant = 6.0 if rise and len(points) > 2 else 0.0
        for step in range(-7, 8):
            on_x, on_y = _point(piece, 0.5 + step / 20)
            beside = half + 6, tall / 2 + 3
            for dx, dy, extra in ((0, 0, hidden), (-1, 0, 8), (1, 0, 8), (0, -1, 8), (0, 1, 8)):
                x, y = on_x + dx * beside[0], on_y + dy * beside[1]
                area = (x - half, y - tall / 2, x + half, y + tall / 2)
                cost = (
                    sum(_overlap(area, one) for one in boxes) + extra + slant + abs(step) + 10 * (1 - length / longest)
                )
                cost += 30.0 * sum(area[0] < px < area[2] and area[1] < py < area[3] for px, py in others)
                if dx or dy:
                    cost += 30.0 * sum(area[0] < px < area[2] and area[1] < py < area[3] for px, py in own)
                if best is None or cost < best[0]:
                    best = cost, (x, y), not (dx or dy)
    assert best is not None
    (x, y), covers = best[1:]
    boxes.append((x - half, y - tall / 2, x + half, y + tall / 2))
    text = [
        f'<text class="on" x="{x:.1f}" y="{y - tall / 2 + 12.5 + 14 * index:.1f}">{escape(line)}</text>'
        for index, line in enumerate(lines)
    ]
    place = f'x="{x - half:.1f}" y="{y - tall / 2:.1f}" width="{2 * half:.1f}" height="{tall:.1f}"'
    return [f'<rect class="tag" {place} rx="4"/>', *text] if covers else text


def _overlap(a: _Area, b: _Area) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


_MEANING: Final = {
    "cut": "activations forward, gradients back, encrypted",
    "inside": "stays inside its party",
    "labels": "labels",
    "exchange": "exchange, outside training",
}


def _legend(edges: Sequence[_Edge], y: float) -> list[str]:
    out, x = [], float(_MARGIN)
    for kind, meaning in _MEANING.items():
        if any(edge.kind == kind for edge in edges):
            out.append(f'<path class="edge {kind}" d="M{x:.1f} {y - 4:.1f} h34" marker-end="url(#arrow)"/>')
            out.append(f'<text class="fact" x="{x + 42:.1f}" y="{y:.1f}">{meaning}</text>')
            x += 42 + _width(meaning, 11) + 26
    return out
