"""Pictures of graphs: what the terminal shows, line by line; what the SVG holds, and that nothing covers anything."""

from __future__ import annotations

import re
from itertools import combinations
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitsec.drawing import draw, svg
from splitsec.graph import Graph, parse_graph

TIMES = "\N{MULTIPLICATION SIGN}"

U_SHAPED = """\
splitsec: 1
name: u-shaped
parties:
  clinic-a: {}
  clinic-b: {}
  server: {listen: "tcp://0.0.0.0:7400", address: "tcp://server.example.org:7400"}
groups:
  clinics: {members: [clinic-a, clinic-b], schedule: round_robin}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server}
  head: {at: clinics, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [16, 14, 14], dtype: float32}
  - {from: trunk, to: head, shape: [16, 14, 14], dtype: float32}
  - {from: stem, to: head, shape: [16, 14, 14], dtype: float32}
labels:
  - {from: clinics, to: head}
training: {epochs: 8, batch_size: 50, micro_batches: 2}
"""

VERTICAL = """\
splitsec: 1
name: vertical
parties:
  hospital: {}
  laboratory: {}
  registry: {listen: "tcp://registry.example.org:7400"}
  archive: {}
segments:
  size: {at: hospital, data: x}
  shape: {at: laboratory, data: x}
  diagnosis: {at: registry, loss: bce_with_logits, loss_weight: 0.5}
cuts:
  - {from: size, to: diagnosis, shape: [16], dtype: float32}
  - {from: shape, to: diagnosis, shape: [16], dtype: float32}
labels:
  - {from: archive, to: diagnosis, shape: [1], dtype: float32}
exchanges:
  - {name: sums, from: hospital, to: registry, shape: [null, 3], dtype: float64}
training: {batch_size: 32}
"""

FIVE = U_SHAPED.replace(
    "{members: [clinic-a, clinic-b]", "{members: [clinic-a, clinic-b, clinic-c, clinic-d, clinic-e]"
).replace("  clinic-b: {}\n", "  clinic-b: {}\n  clinic-c: {}\n  clinic-d: {}\n  clinic-e: {}\n")


def test_a_u_shape_in_the_terminal() -> None:
    assert (
        draw(parse_graph(U_SHAPED)).replace(TIMES, "*")
        == """\
u-shaped: 3 parties, 3 segments, 3 cuts, 8 epochs of batches of 50 in 2 micro-
    batches

┌─ clinics ────────────────────────────────────────────────────────────┐
│ clinic-a, clinic-b: taking turns, weights handed on                  │
│ stem               reads x                                           │
│   ──▶ trunk        float32 16*14*14  612 KiB a batch                 ├───┐
│   ──▶ head         float32 16*14*14  stays inside                    ├───│──┐
└──────────────────────────────────────────────────────────────────────┘   │  │
┌─ server ─────────────────────────────────────────────────────────────┐   │  │
│ trunk                                                                │◀──┘  │
│   ──▶ head         float32 16*14*14  612 KiB a batch                 ├───┐  │
└──────────────────────────────────────────────────────────────────────┘   │  │
┌─ clinics (again) ────────────────────────────────────────────────────┐   │  │
│ labels y ╌╌▷ head  int64             stays inside                    │   │  │
│ head               loss cross_entropy, joins by concat               │◀──┴──┘
└──────────────────────────────────────────────────────────────────────┘

──▶ activations forward, gradients back    ╌╌▷ labels

clinic-a, clinic-b dial server at tcp://server.example.org:7400
server forwards messages between clinic-a and clinic-b that it cannot read
"""
    )


def test_labels_from_elsewhere_and_an_exchange_in_the_terminal() -> None:
    assert (
        draw(parse_graph(VERTICAL), ascii_only=True)
        == """\
vertical: 4 parties, 3 segments, 2 cuts, 1 epoch of batches of 32

+- hospital --------------------------------------------------------+
| size                    reads x                                   |
|   --> diagnosis         float32 16  2.0 KiB a batch               +---------+
+-------------------------------------------------------------------+         |
+- laboratory ------------------------------------------------------+         |
| shape                   reads x                                   |         |
|   --> diagnosis         float32 16  2.0 KiB a batch               +------+  |
+-------------------------------------------------------------------+      |  |
+- archive ---------------------------------------------------------+      |  |
| labels y ..> diagnosis  float32 1   128 B a batch                 +...+  |  |
+-------------------------------------------------------------------+   :  |  |
+- registry --------------------------------------------------------+   :  |  |
| diagnosis               loss bce_with_logits x 0.5, joins by con~ |<..+--+--+
+-------------------------------------------------------------------+

--> activations forward, gradients back    ..> labels

exchange sums: hospital --> registry   float64 ?x3

hospital, laboratory, archive dial registry at tcp://registry.example.org:7400
registry forwards messages between hospital, laboratory and archive that it
    cannot read
"""
    )


def test_circuits_relays_and_what_a_far_end_learns() -> None:
    hidden = """\
splitsec: 1
name: hidden
parties:
  clinic-a: {}
  clinic-b: {}
  clinic-c: {}
  relay-1: {listen: "tcp://r1.example.org:7400"}
  relay-2: {listen: "tcp://r2.example.org:7400"}
  server: {listen: "tcp://server.example.org:7400"}
groups:
  clinics: {members: [clinic-a, clinic-b, clinic-c], schedule: round_robin, pseudonym: epoch}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [8], dtype: float32, anonymous: true}
labels:
  - {from: clinics, to: trunk}
routes:
  - {from: clinics, to: server, via: [relay-1, relay-2]}
  - {from: clinics, to: server, via: [relay-2]}
  - {from: clinics, to: clinics, via: [relay-1]}
circuits: {cover: 0.05}
"""
    text = draw(parse_graph(hidden), width=200)
    assert "clinic-a, clinic-b, clinic-c: taking turns in a secret order, weights handed on" in text
    assert text.endswith(
        """
clinic-a, clinic-b, clinic-c dial relay-1 at tcp://r1.example.org:7400
relay-1, clinic-a, clinic-b, clinic-c dial relay-2 at tcp://r2.example.org:7400
relay-2 dials server at tcp://server.example.org:7400
the members of clinics build circuits to server through relay-1, relay-2, or else through relay-2
the members of clinics build circuits to each other through relay-1
relays, which cannot read what they pass on: relay-1, relay-2
cells that carry messages are one size between any two ends, one each way every 0.05 s, needed or not
server learns that a member of clinics speaks, and not which: every member proves the group's key, and begins a new channel every epoch; what is sent, and when, it sees as ever
"""  # noqa: E501
    )
    assert "the members of clinics build circuits to server through relay-1, relay-2, or else through relay-2" in texts(
        parse_graph(hidden)
    )


def test_circuits_of_single_parties() -> None:
    text = """\
splitsec: 1
name: few
parties:
  ann: {}
  ben: {}
  hub: {listen: "tcp://hub.example.org:7400"}
  cas: {}
exchanges:
  - {name: one, from: ann, to: ben, shape: [], dtype: float64}
  - {name: two, from: ann, to: cas, shape: [], dtype: float64}
  - {name: three, from: cas, to: ben, shape: [], dtype: float64}
routes:
  - {from: ann, to: ben, via: [hub]}
  - {from: ann, to: cas, via: [hub]}
"""
    both = text + "  - {from: cas, to: ben, via: [hub]}\ncircuits: {padding: padme}\n"
    assert draw(parse_graph(both)).endswith(
        """
ann, ben, cas dial hub at tcp://hub.example.org:7400
ann, ben and cas build circuits to each other through hub
relay, which cannot read what it passes on: hub
cells that carry messages are padded to a few sizes
"""
    )
    two = text.replace("  - {name: three, from: cas, to: ben, shape: [], dtype: float64}\n", "")
    assert "ann builds circuits to ben and cas through hub\n" in draw(parse_graph(two))
    one = two.replace("to: cas, via: [hub]", "to: cas, via: [hub, dov]").replace(
        "  cas: {}\n", '  cas: {}\n  dov: {listen: "tcp://dov.example.org:7400"}\n'
    )
    assert "ann builds a circuit to ben through hub\nann builds a circuit to cas through hub, dov\n" in draw(
        parse_graph(one)
    )


@pytest.mark.parametrize("text", [U_SHAPED, VERTICAL, FIVE], ids=["u-shaped", "vertical", "five"])
def test_ascii_is_ascii_and_as_wide(text: str) -> None:
    graph = parse_graph(text)
    plain, ascii_only = draw(graph), draw(graph, ascii_only=True)
    assert ascii_only.isascii()
    assert [len(line) for line in plain.splitlines()] == [len(line) for line in ascii_only.splitlines()]


def chain(length: int, skips: list[tuple[int, int]], parties: int) -> Graph:
    pairs = sorted({*((one, one + 1) for one in range(length - 1)), *skips})
    return Graph.model_validate(
        {
            "splitsec": 1,
            "name": "chain",
            "parties": {f"party-{one}": {"listen": f"tcp://h{one}.example.org:7400"} for one in range(parties)},
            "segments": {
                f"segment-{one}-of-the-chain": {
                    "at": f"party-{one % parties}",
                    "data": "x" if one == 0 else None,
                    "loss": "mse" if one == length - 1 else None,
                }
                for one in range(length)
            },
            "cuts": [
                {
                    "from": f"segment-{a}-of-the-chain",
                    "to": f"segment-{b}-of-the-chain",
                    "shape": [8],
                    "dtype": "float32",
                }
                for a, b in pairs
            ],
            "labels": [{"from": "party-0", "to": f"segment-{length - 1}-of-the-chain", "dtype": "float32"}],
        }
    )


@st.composite
def graphs(draw_from: st.DrawFn) -> Graph:
    length = draw_from(st.integers(2, 12))
    ends = st.tuples(st.integers(0, length - 1), st.integers(0, length - 1)).filter(lambda pair: pair[0] < pair[1])
    return chain(length, draw_from(st.lists(ends, max_size=14)), draw_from(st.integers(1, min(length, 6))))


@given(graph=graphs(), width=st.integers(40, 120))
@settings(max_examples=60, deadline=None)
def test_any_graph_fits_the_terminal_and_names_every_edge(graph: Graph, width: int) -> None:
    text = draw(graph, width=width)
    assert max(len(line) for line in text.splitlines()) <= max(width, 60)
    assert text.count("──▶ s") == len(graph.cuts)  # names are cut short where there is no room
    for name in graph.segments:
        assert re.search(rf"│ {name[:3]}", text)


@given(graph=graphs())
@settings(max_examples=60, deadline=None)
def test_every_edge_ends_in_one_arrow_head_or_shares_one(graph: Graph) -> None:
    lines = draw(graph).splitlines()
    corners = sum(line.count("┐") for line in lines if "├" in line)
    begun = sum("├" in line for line in lines)
    ended = sum(line.count("┘") + line.count("┴") for line in lines if "◀" in line or "◁" in line)
    assert corners == begun == ended


@given(graph=graphs())
@settings(max_examples=40, deadline=None)
def test_any_graph_is_a_picture_in_which_no_node_covers_another(graph: Graph) -> None:
    root = ElementTree.fromstring(svg(graph))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes = []
    for one in root.iter("{http://www.w3.org/2000/svg}rect"):
        if one.attrib.get("stroke-width") == "1.6":
            x, y, w, h = (float(one.attrib[key]) for key in ("x", "y", "width", "height"))
            assert 0 <= x < x + w <= width
            assert 0 <= y < y + h <= height
            boxes.append((x, y, x + w, y + h))
    assert len(boxes) == len(graph.segments) + len(graph.labels)
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def texts(graph: Graph) -> list[str]:
    root = ElementTree.fromstring(svg(graph))
    return ["".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_says_what_the_graph_says() -> None:
    said = texts(parse_graph(VERTICAL))
    for words in ("vertical", "hospital", "laboratory", "registry", "archive", "size", "shape", "diagnosis", "reads x"):
        assert words in said
    assert said.count("float32 16") == 2
    assert said.count("2.0 KiB a batch") == 2
    assert f"loss bce_with_logits {TIMES} 0.5 · joins by concat" in said
    assert "labels y" in said
    assert f"float64 ?{TIMES}3" in said
    assert "hospital, laboratory, archive dial registry at tcp://registry.example.org:7400" in said
    assert "registry forwards messages between hospital, laboratory and archive that it cannot read" in said


def test_labels_edges_are_broken_and_inner_edges_are_faint() -> None:
    picture = svg(parse_graph(U_SHAPED))
    kinds = re.findall(r'<path class="edge (\w+)"', picture)
    assert sorted(kinds) == sorted(
        ["cut", "cut", "inside", "labels", "cut", "inside", "labels"]
    )  # the last three: legend
    assert re.search(r"\.labels \{ stroke-dasharray", picture)
    assert "stays inside" in texts(parse_graph(U_SHAPED))


def test_a_group_is_one_band_that_names_its_members() -> None:
    said = texts(parse_graph(FIVE))
    assert "clinicsclinic-a, clinic-b, clinic-c, clinic-d, clinic-e: taking turns, weights handed on" in said


def test_the_picture_needs_nothing_from_outside_and_escapes_all_text() -> None:
    text = VERTICAL.replace("tcp://registry.example.org:7400", "ipc:///run/<b>&\\u0022'x")
    picture = svg(parse_graph(text))
    assert "<b>" not in picture
    assert "&lt;b&gt;&amp;" in picture
    outside = re.findall(r'(?:href|src|url|@import)[^"\']*', picture)
    assert set(outside) <= {"url(#arrow)"}
    assert "<script" not in picture
    ElementTree.fromstring(picture)


def test_a_graph_of_exchanges_alone_has_pictures() -> None:
    graph = parse_graph(
        'splitsec: 1\nname: messages\nparties: {ann: {}, ben: {listen: "tcp://127.0.0.1:7400"}}\n'
        "exchanges: [{name: sums, from: ben, to: ann, shape: [], dtype: float64}]\n"
    )
    assert (
        draw(graph)
        == """\
messages: 2 parties

exchange sums: ben ──▶ ann   float64

ann dials ben at tcp://127.0.0.1:7400
"""
    )
    assert texts(graph).count("sums") == 2
