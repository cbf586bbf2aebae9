"""The graph file: what follows from a good one, and what is said about each kind of bad one.

A mistake is a base graph with one passage replaced; the test reads the line number, what was seen, what was expected
and what to do.
"""

from __future__ import annotations

import base64
import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitsec import graph as graphs
from splitsec import yamlfile
from splitsec.errors import GraphError
from splitsec.graph import Circuit, Graph, Link, load_graph, parse_graph

VANILLA = """\
splitsec: 1
name: vanilla
parties:
  clinic-a: {}
  clinic-b: {}
  clinic-c: {}
  server: {listen: "tcp://0.0.0.0:7400", address: "tcp://server.example.org:7400"}
groups:
  clinics: {members: [clinic-a, clinic-b, clinic-c], schedule: round_robin}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [32, 7, 7], dtype: float32}
labels:
  - {from: clinics, to: trunk}
training: {epochs: 5, batch_size: 64, micro_batches: 4, seed: 7}
"""

# two hospitals with columns of the same patients, labels at a third; a diamond behind them
VERTICAL = """\
splitsec: 1
name: vertical
parties:
  left: {}
  right: {listen: "tcp://right.example.org:7401"}
  hub: {listen: "tcp://hub.example.org:7400"}
  registry: {}
segments:
  bottom-left: {at: left, data: x}
  bottom-right: {at: right, data: x}
  wide: {at: hub}
  deep: {at: right}
  top: {at: hub, loss: bce_with_logits, join: sum}
cuts:
  - {from: bottom-left, to: wide, shape: [8], dtype: float32}
  - {from: bottom-right, to: wide, shape: [4], dtype: float32}
  - {from: wide, to: top, shape: [6], dtype: float32, output: main}
  - {from: wide, to: deep, shape: [5], dtype: float32, output: side}
  - {from: deep, to: top, shape: [6], dtype: float32}
labels:
  - {from: registry, to: top, dtype: float32}
exchanges:
  - {name: histogram, from: left, to: hub, shape: [null, 16], dtype: float32}
timeouts: {connect: 30, lost: 2.5}
"""


def key(number: int) -> str:
    return "x25519:" + base64.b64encode(bytes([9, number] + [0] * 30)).decode()


def changed(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def refused(text: str) -> GraphError:
    with pytest.raises(GraphError) as caught:
        parse_graph(text)
    error = caught.value
    assert error.exit_code == 2
    assert error.file == "graph.yaml"
    assert str(error).startswith("graph.yaml:")
    return error


# What follows from a graph


def test_a_round_robin_group_with_one_server() -> None:
    graph = parse_graph(VANILLA)
    assert graph.order == ("stem", "trunk")
    assert graph.streams == 3
    assert graph.schedule == "round_robin"
    assert graph.members("clinics") == ("clinic-a", "clinic-b", "clinic-c")
    assert graph.members("server") == ("server",)
    assert [graph.party_at("clinics", stream) for stream in range(3)] == ["clinic-a", "clinic-b", "clinic-c"]
    assert graph.party_at("server", 2) == "server"
    assert graph.edges_into("trunk") == (0,)
    assert graph.edges_out_of("trunk") == ()
    assert graph.data_parties(1) == ("clinic-b",)
    assert graph.links() == tuple(Link(f"clinic-{one}", "server") for one in "abc")
    assert graph.circuits_between() == (  # the ring: a to b, b to c, c to a
        Circuit("clinic-a", "clinic-b", (("server",),)),
        Circuit("clinic-b", "clinic-c", (("server",),)),
        Circuit("clinic-a", "clinic-c", (("server",),)),
    )
    assert graph.cuts[0].sample_bytes == 32 * 7 * 7 * 4
    assert graph.labels[0].sample_bytes == 8
    assert (graph.training.epochs, graph.training.micro_batches, graph.training.drop_last) == (5, 4, False)


def test_a_parallel_group_hands_nothing_on() -> None:
    graph = parse_graph(changed(VANILLA, ("round_robin", "parallel")))
    assert graph.schedule == "parallel"
    assert graph.circuits_between() == ()


def test_data_at_several_parties() -> None:
    graph = parse_graph(VERTICAL)
    assert graph.order == ("bottom-left", "bottom-right", "wide", "deep", "top")
    assert (graph.streams, graph.schedule) == (1, None)
    assert graph.data_parties(0) == ("left", "right", "registry")
    assert graph.edges_out_of("wide") == (2, 3)
    assert graph.edges_into("top") == (2, 4)
    assert graph.links() == (
        Link("left", "hub"),
        Link("right", "hub"),  # both listen: the one that stands first in `parties` dials
        Link("registry", "hub"),
        Link("left", "right"),  # they agree on the order of samples, and right listens
    )
    assert graph.circuits_between() == (Circuit("left", "registry", (("hub",),)),)
    assert graph.exchanges[0].shape == (None, 16)
    assert graph.timeouts.connect == 30.0


def test_order_is_topological_with_ties_as_in_the_file() -> None:
    text = changed(
        VERTICAL,
        ("  bottom-left: {at: left, data: x}\n", ""),
        ("  top: {at: hub,", "  top: {at: hub,"),
        ("segments:\n", "segments:\n  zero: {at: hub, data: z, loss: mse}\n"),
        ("  deep: {at: right}\n", "  deep: {at: right}\n  bottom-left: {at: left, data: x}\n"),
        ("labels:\n", "labels:\n  - {from: hub, to: zero, dtype: float32}\n"),
    )
    assert parse_graph(text).order == ("zero", "bottom-right", "bottom-left", "wide", "deep", "top")


def test_groups_work_together_stream_by_stream() -> None:
    text = """\
splitsec: 1
name: pairs
parties:
  a1: {}
  a2: {}
  b1: {listen: "tcp://b1.example.org:7400"}
  b2: {listen: "tcp://b2.example.org:7400"}
groups:
  as: {members: [a1, a2], schedule: parallel}
  bs: {members: [b1, b2], schedule: parallel}
segments:
  low: {at: as, data: x}
  high: {at: bs, loss: cross_entropy}
cuts:
  - {from: low, to: high, shape: [3], dtype: float32}
labels:
  - {from: as, to: high}
"""
    graph = parse_graph(text)
    assert graph.links() == (Link("a1", "b1"), Link("a2", "b2"))


def test_an_edge_inside_one_party_needs_no_link() -> None:
    text = """\
splitsec: 1
name: alone
parties: {one: {}}
segments:
  low: {at: one, data: x}
  high: {at: one, loss: mse}
cuts: [{from: low, to: high, shape: [3], dtype: float32}]
labels: [{from: one, to: high, dtype: float32, shape: [1]}]
"""
    graph = parse_graph(text)
    assert graph.links() == ()
    assert graph.circuits_between() == ()


def test_a_graph_of_exchanges_alone() -> None:
    text = """\
splitsec: 1
name: messages
parties: {ann: {}, ben: {listen: "tcp://127.0.0.1:7400"}}
exchanges: [{name: sums, from: ben, to: ann, shape: [], dtype: float64}]
"""
    graph = parse_graph(text)
    assert graph.links() == (Link("ann", "ben"),)
    assert graph.order == ()
    assert graph.data_parties(0) == ()


@pytest.mark.parametrize(
    ("line", "expected"), [("", True), ("post_quantum: true", True), ("post_quantum: false", False)]
)
def test_the_post_quantum_hybrid_is_on_unless_the_file_says_otherwise(line: str, expected: bool) -> None:
    assert parse_graph(f"{VANILLA}{line}\n").post_quantum is expected


def test_two_members_that_could_link_do_so() -> None:
    graph = parse_graph(changed(VANILLA, ("clinic-b: {}", 'clinic-b: {listen: "tcp://b.example.org:7400"}')))
    assert Link("clinic-a", "clinic-b") in graph.links()
    assert graph.circuits_between() == (Circuit("clinic-a", "clinic-c", (("clinic-b",),)),)


def test_everything_is_frozen() -> None:
    graph = parse_graph(VANILLA)
    with pytest.raises(ValueError, match="frozen"):
        graph.name = "other"
    with pytest.raises(TypeError, match="cannot be changed"):
        graph.parties["more"] = graph.parties["server"]
    with pytest.raises(TypeError, match="cannot be changed"):
        graph.segments.pop("stem")
    assert isinstance(graph.cuts, tuple)
    assert isinstance(graph.groups["clinics"].members, tuple)


def test_with_keys_replaces_keys_and_addresses_and_checks_again() -> None:
    graph = parse_graph(VANILLA)
    keys = {name: key(number) for number, name in enumerate(graph.parties)}
    loopback = "tcp://127.0.0.1:51234"
    mine = graph.with_keys(keys, {"server": (loopback, None)})
    assert {name: party.key for name, party in mine.parties.items()} == keys
    assert (mine.parties["server"].listen, mine.parties["server"].dialled) == (loopback, loopback)
    assert mine.segments == graph.segments
    assert graph.parties["server"].key is None
    assert mine.line_of("segments", "trunk") == 12
    with pytest.raises(GraphError, match="same key"):
        graph.with_keys({"clinic-a": key(1), "server": key(1)}, {})
    with pytest.raises(GraphError, match="unknown party `sever`"):
        graph.with_keys({"sever": key(1)}, {})
    with pytest.raises(GraphError, match="neither of them listens"):
        graph.with_keys({}, {"server": (None, None)})


def test_equality_is_of_values_and_not_of_layout() -> None:
    assert parse_graph(VANILLA) == parse_graph("# a comment\n" + VANILLA)
    assert parse_graph(VANILLA) != parse_graph(changed(VANILLA, ("seed: 7", "seed: 8")))


def test_lines_and_file_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "graph.yaml"
    file.write_text(VANILLA)
    graph = load_graph(file)
    assert graph.file == file
    assert graph.line_of("cuts", 0, "shape") == 14
    assert graph.line_of("segments", "trunk", "loss") == 12
    assert graph.line_of("segments", "trunk", "loss_weight") == 12  # not written: the segment's line
    assert graph.line_of("timeouts") == 1


# Mistakes of the graph as a whole

MISTAKES = {
    "version": (VANILLA, [("splitsec: 1", "splitsec: 2")], 1, "version 2", "version 1", "`splitsec: 1`"),
    "no version": (VANILLA, [("splitsec: 1\n", "")], 1,
        "`splitsec` is missing", "version of the file format", "add `splitsec"),
    "more micro-batches than samples": (VANILLA, [("size: 64, micro_batches: 4", "size: 8, micro_batches: 9")],
        17, "batches of 8 in 9 micro-batches", "at least one sample in each", "write 1"),
    "unknown key": (VANILLA, [("training:", "trainings:")], 17,
        "unknown key `trainings`", "`training`", "did you mean `training`"),
    "unknown key in a cut": (VANILLA, [("shape:", "shap:")], 14,
        "unknown key `shap` in `cuts[0]`", "`shape`", "did you mean `shape`"),
    "python name as a key": (VANILLA, [("{from: stem", "{source: stem")], 14,
        "unknown key `source` in `cuts[0]`", "`from`", "remove the line"),
    "missing key": (VANILLA, [(", dtype: float32", "")], 14,
        "`dtype` is missing in `cuts[0]`", "float32", "add `dtype"),
    "unknown party": (VANILLA, [("at: server", "at: sever")], 12,
        "unknown party or group `sever`", "`parties`", "did you mean `server`"),
    "unknown party in labels": (VANILLA, [("from: clinics", "from: clinic")], 16,
        "unknown party or group `clinic`", "", "`clinics`"),
    "unknown segment": (VANILLA, [("from: stem", "from: steam")], 14,
        "unknown segment `steam`", "`segments`", "did you mean `stem`"),
    "party as segment": (VANILLA, [("to: trunk, shape", "to: server, shape")], 14,
        "`server` is a party or group", "", "`trunk`"),
    "labels to unknown segment": (VANILLA, [("clinics, to: trunk", "clinics, to: trnk")], 16,
        "unknown segment `trnk`", "", "`trunk`"),
    "cycle": (
        VERTICAL,
        [("  - {from: deep", "  - {from: deep, to: wide, shape: [9], dtype: float32}\n  - {from: deep")],
        19,
        "the segments form a cycle: wide -> deep -> wide",
        "never back",
        "remove one",
    ),
    "cycle of one": (
        VANILLA,
        [("labels:", "  - {from: trunk, to: trunk, shape: [1], dtype: float32}\nlabels:")],
        15,
        "the segments form a cycle: trunk -> trunk",
        "",
        "",
    ),
    "not reached": (VANILLA, [(", data: x", "")], 11, "no edge reaches the segment `stem`", "`data`", "`data: x`"),
    "leads nowhere": (VANILLA, [("labels:\n  - {from: clinics, to: trunk}\n", ""), (", loss: cross_entropy", "")], 12,
        "leads nowhere", "", ""),
    "one key for two": (
        VANILLA,
        [("clinic-a: {}", f'clinic-a: {{key: "{key(1)}"}}'), ("clinic-c: {}", f'clinic-c: {{key: "{key(1)}"}}')],
        6,
        "`clinic-c` has the same key as `clinic-a`",
        "a key of its own",
        "splitsec keys new clinic-c",
    ),
    "key that is none": (VANILLA, [("clinic-a: {}", "clinic-a: {key: abc}")], 4,
        "does not begin with x25519:", "44", "keys new"),
    "key not base64": (VANILLA, [("clinic-a: {}", 'clinic-a: {key: "x25519:*"}')], 4, "not base64", "", ""),
    "key too short": (VANILLA, [("clinic-a: {}", 'clinic-a: {key: "x25519:AAAA"}')], 4, "3 bytes", "32 bytes", ""),
    "key of small order": (VANILLA, [("clinic-a: {}", f'clinic-a: {{key: "x25519:{"A" * 43}="}}')], 4,
        "small order", "", ""),
    "wildcard, no address": (
        VANILLA,
        [(', address: "tcp://server.example.org:7400"', "")],
        7,
        "`server` listens on tcp://0.0.0.0:7400, where nobody can dial it",
        "others can reach",
        'add `address: "tcp://HOST:7400"`',
    ),
    "wildcard address": (VANILLA, [("tcp://server.example.org:7400", "tcp://[::]:7400")], 7,
        "nobody can dial", "", "host name"),
    "star": (VANILLA, [("tcp://server.example.org:7400", "tcp://*:7400")], 7, "nobody can dial", "", ""),
    "address, no listen": (VANILLA, [('listen: "tcp://0.0.0.0:7400", ', "")], 7,
        "does not listen", "`listen` beside", "remove"),
    "schemes differ": (VANILLA, [("tcp://server.example.org:7400", "ipc:///run/s")], 7,
        "is dialled at ipc:///run/s", "same scheme", ""),
    "one address for two": (
        VERTICAL,
        [("tcp://hub.example.org:7400", "tcp://right.example.org:7401")],
        6,
        "`hub` is dialled at tcp://right.example.org:7401, and so is `right`",
        "of its own",
        "another port",
    ),
    "no scheme": (VANILLA, [("tcp://0.0.0.0:7400", "0.0.0.0:7400")], 7,
        "without a scheme", "tcp://", "tcp://0.0.0.0:7400"),
    "unknown scheme": (VANILLA, [("tcp://0.0.0.0:7400", "tpc://0.0.0.0:7400")], 7,
        "the scheme `tpc`", "ipc", "did you mean `tcp`"),
    "no port": (VANILLA, [("org:7400", "org")], 7, "without a port", "HOST:PORT", "tcp://server.example.org:7400"),
    "IPv6 without brackets": (VANILLA, [("server.example.org:7400", "fe80::1:7400")], 7,
        "without a port", "", "brackets"),
    "port out of range": (VANILLA, [("org:7400", "org:74000")], 7, "the port `74000`", "65535", ""),
    "port 0": (VANILLA, [("org:7400", "org:0")], 7, "the port `0`", "from 1", ""),
    "a path in tcp": (VANILLA, [("org:7400", "org/a:7400")], 7, "the host `server.example.org/a`", "", "HOST:PORT"),
    "long ipc path": (VANILLA, [("tcp://0.0.0.0:7400", "ipc:///" + "a" * 101)], 7,
        "an ipc path of 102 bytes", "100", ""),
    "nobody listens": (
        VANILLA,
        [('{listen: "tcp://0.0.0.0:7400", address: "tcp://server.example.org:7400"}', "{}")],
        14,
        "`clinic-a` and `server` must connect (the cut from `stem` to `trunk`), but neither of them listens",
        "`listen` at one",
        "add `listen",
    ),
    "nobody forwards": (
        VERTICAL,
        [("registry: {}", 'registry: {}\n  desk: {listen: "tcp://d.example.org:7400"}'),
         ("  top: {at: hub, loss", "  top: {at: desk, loss"),
         ('right: {listen: "tcp://right.example.org:7401"}', "right: {}")],
        7,
        "`left` and `registry` must talk (they agree on the order of sample ids)",
        "a party that both connect to",
        "add `listen`",
    ),
    "labels needed": (
        VANILLA,
        [("labels:\n  - {from: clinics, to: trunk}\n", "")],
        12,
        "`trunk` computes a loss, but no edge brings it labels",
        "a labels edge",
        "add `{from: server, to: trunk}`",
    ),
    "labels, no loss": (VANILLA, [(", loss: cross_entropy", "")], 16,
        "labels for `trunk`, which computes no loss", "`loss`", "add `loss`"),
    "two labels edges": (
        VANILLA,
        [("to: trunk}\n", "to: trunk}\n  - {from: server, to: trunk}\n")],
        17,
        "two labels edges to `trunk` (the first is on line 16)",
        "one labels edge",
        "remove one",
    ),
    "labels of the wrong dtype": (
        VERTICAL,
        [("to: top, dtype: float32}\nexch", "to: top}\nexch")],
        21,
        "labels of dtype int64 for the loss bce_with_logits",
        "float32",
        "`dtype: float32`",
    ),
    "group named as a party": (
        VANILLA,
        [("  clinics: {members", "  server: {members")],
        9,
        "`server` is the name of a group and of a party",
        "one name",
        "rename",
    ),
    "unknown member": (VANILLA, [("clinic-c], s", "clinic-d], s")], 9,
        "unknown party `clinic-d` in the group", "", "`clinic-"),
    "member twice": (VANILLA, [("clinic-c], s", "clinic-a], s")], 9,
        "`clinic-a` is in the group `clinics` twice", "once", ""),
    "party in two groups": (
        VANILLA,
        [("segments:", "  others: {members: [clinic-a], schedule: round_robin}\nsegments:")],
        10,
        "`clinic-a` is in the group `others` and in the group `clinics`",
        "one group only",
        "",
    ),
    "groups of two sizes": (
        VANILLA,
        [("segments:", "  others: {members: [server], schedule: round_robin}\nsegments:")],
        10,
        "`others` has 1 members and `clinics` has 3",
        "one size",
        "",
    ),
    "groups of two schedules": (
        VANILLA,
        [("members: [clinic-a, clinic-b, clinic-c]", "members: [clinic-a]"),
         ("segments:", "  others: {members: [server], schedule: parallel}\nsegments:")],
        10,
        "the group `others` is `parallel` and `clinics` is `round_robin`",
        "one schedule",
        "",
    ),
    "no members": (VANILLA, [("[clinic-a, clinic-b, clinic-c]", "[]")], 9, "has no members", "", ""),
    "unknown schedule": (VANILLA, [("round_robin", "roundrobin")], 9,
        "is roundrobin", "`round_robin` or `parallel`", "`round_robin`"),
    "idle group": (
        VANILLA,
        [("at: clinics", "at: clinic-a"), ("from: clinics", "from: clinic-a")],
        9,
        "nothing is placed at the group `clinics`",
        "",
        "remove the group",
    ),
    "idle party": (VANILLA, [("clinic-c], s", "], s")], 6,
        "the party `clinic-c` has nothing to do", "", "remove the party"),
    "nothing to do": ("splitsec: 1\nname: n\nparties: {a: {}}\n", [], 1,
        "neither segments nor exchanges", "something", "add"),
    "cut twice": (
        VANILLA,
        [("labels:", "  - {from: stem, to: trunk, shape: [1], dtype: float32}\nlabels:")],
        15,
        "the cut from `stem` to `trunk` is there twice (the first is on line 14)",
        "`output`",
        "remove",
    ),
    "some outputs named": (VERTICAL, [(", output: side", "")], 18, "some cuts from `wide` name an `output`", "", ""),
    "negative size": (VANILLA, [("[32, 7, 7]", "[-1, 7, 7]")], 14, "the size -1 in the shape [-1, 7, 7]", "from 1", ""),
    "null in a cut": (VANILLA, [("[32, 7, 7]", "[null, 7, 7]")], 14,
        "`cuts[0].shape[0]` is null", "a whole number", ""),
    "size that is text": (VANILLA, [("[32, 7, 7]", '["32", 7, 7]')], 14,
        "`cuts[0].shape[0]` is 32 (text)", "a whole number", ""),
    "shape that is no list": (VANILLA, [("[32, 7, 7]", "32")], 14, "`cuts[0].shape` is 32", "a list", ""),
    "too many dimensions": (VANILLA, [("[32, 7, 7]", "[1, 1, 1, 1, 1, 1, 1, 1, 1]")], 14,
        "9 dimensions", "at most 8", ""),
    "too large": (VANILLA, [("[32, 7, 7]", "[65536, 65536]")], 14, "17,179,869,184 bytes a sample", "1 GiB", ""),
    "unknown dtype": (VANILLA, [("float32", "float23")], 14,
        "`cuts[0].dtype` is float23", "`float32`", "did you mean `float32`"),
    "dtype for labels only": (VANILLA, [("float32", "uint8")], 14, "`cuts[0].dtype` is uint8", "`int64`", ""),
    "name in capitals": (VANILLA, [("name: vanilla", "name: Vanilla 1")], 2,
        "the name `Vanilla 1`", "a-z", "`vanilla-1`"),
    "name too long": (VANILLA, [("name: vanilla", "name: " + "a" * 41)], 2, "the name `aaa", "40", ""),
    "party name": (VANILLA, [("  server: {l", "  Server: {l")], 7, "the name `Server`", "", "`server`"),
    "unknown loss": (VANILLA, [("cross_entropy", "crossentropy")], 12,
        "unknown loss `crossentropy`", "`custom`", "`cross_entropy`"),
    "weight without loss": (VANILLA, [("data: x", "data: x, loss_weight: 2.0")], 11,
        "a `loss_weight` but no `loss`", "", "remove"),
    "weight zero": (VANILLA, [("cross_entropy}", "cross_entropy, loss_weight: 0}")], 12,
        "`segments.trunk.loss_weight` is 0", "greater than 0", ""),
    "weight infinite": (VANILLA, [("cross_entropy}", "cross_entropy, loss_weight: .inf}")], 12,
        "loss_weight` is inf", "finite", ""),
    "field called id": (VANILLA, [("data: x", "data: id")], 11, "the field `id`", "", "sample ids"),
    "field with a space": (VANILLA, [("data: x", "data: x y")], 11, "the field name `x y`", "letters", ""),
    "concat of ranks": (VERTICAL, [("shape: [8]", "shape: [8, 2]")], 16,
        "`wide` joins its inputs by `concat`", "[8, 2]", "arguments"),
    "concat of tails": (VERTICAL, [("shape: [8]", "shape: [8, 2]"), ("shape: [4]", "shape: [8, 3]")], 16,
        "sends [8, 3]", "", ""),
    "sum of shapes": (VERTICAL,
        [("to: top, shape: [6], dtype: float32}", "to: top, shape: [7], dtype: float32}")], 19,
        "by `sum`", "[6]", ""),
    "join of dtypes": (VERTICAL, [("shape: [4], dtype: float32", "shape: [4], dtype: float64")], 16,
        "sends float64", "float32", ""),
    "unknown party in an exchange": (VERTICAL, [("histogram, from: left", "histogram, from: lft")], 23,
        "names `lft`, which is unknown", "", "`left`"),
    "exchange with itself": (VERTICAL, [("from: left, to: hub", "from: hub, to: hub")], 23,
        "goes from `hub` to itself", "two parties", ""),
    "exchange twice": (
        VERTICAL,
        [("timeouts:", "  - {name: histogram, from: hub, to: left, shape: [], dtype: bool}\ntimeouts:")],
        24,
        "two exchanges are called `histogram`",
        "",
        "rename",
    ),
    "exchange too large": (VERTICAL, [("[null, 16]", "[null, 16], max_bytes: 63")], 23,
        "at least 64 bytes but allows 63", "", "64"),
    "no epochs": (VANILLA, [("epochs: 5", "epochs: 0")], 17,
        "`training.epochs` is 0", "greater than or equal to 1", ""),
    "epochs as text": (VANILLA, [("epochs: 5", 'epochs: "5"')], 17,
        "`training.epochs` is 5 (text)", "a whole number", ""),
    "epochs as a fraction": (VANILLA, [("epochs: 5", "epochs: 5.5")], 17,
        "`training.epochs` is 5.5", "a whole number", ""),
    "yes for true": (VANILLA, [("epochs: 5", "drop_last: yes")], 17,
        "`training.drop_last` is yes (text)", "true or false", ""),
    "off for false": (VANILLA, [("seed: 7}", "seed: 7}\npost_quantum: off")], 18,
        "`post_quantum` is off (text)", "true or false", ""),
    "0 for false": (VANILLA, [("seed: 7}", "seed: 7}\npost_quantum: 0")], 18,
        "`post_quantum` is 0", "true or false", ""),
    "post-quantum with a hyphen": (VANILLA, [("seed: 7}", "seed: 7}\npost-quantum: false")], 18,
        "unknown key `post-quantum`", "`post_quantum`", "did you mean `post_quantum`?"),
    "a list for a mapping": (VANILLA, [("  clinic-a: {}", "  clinic-a: []")], 4,
        "`parties.clinic-a` is []", "keys and values", ""),
    "nothing for a mapping": (VANILLA, [("  clinic-a: {}", "  clinic-a:")], 4,
        "`parties.clinic-a` is null", "keys and values", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_line_and_the_way_out(name: str) -> None:
    text, pairs, line, seen, expected, fix = MISTAKES[name]
    error = refused(changed(text, *pairs))
    assert seen in error.seen
    assert expected in error.expected
    assert fix in error.fix
    assert error.line == line
    assert error.expected
    assert error.fix


def test_every_name_of_a_mistake_is_about_a_different_error() -> None:
    said = [refused(changed(text, *pairs)).seen for text, pairs, *_ in MISTAKES.values()]
    assert len(said) - len(set(said)) <= 1  # a wildcard may be written in two ways


def test_other_mistakes_of_the_same_file_are_pointed_at() -> None:
    error = refused(
        changed(VANILLA, ("epochs: 5", "epochs: 0"), ("shape: [32, 7, 7]", "shape: x"), ("seed: 7", "sede: 7"))
    )
    assert error.line == 14
    assert "see line 17, too" in error.fix


def test_a_graph_made_in_code_has_no_file() -> None:
    with pytest.raises(GraphError, match="unknown party or group `b`") as caught:
        Graph.model_validate(
            {"splitsec": 1, "name": "n", "parties": {"a": {}}, "segments": {"s": {"at": "b", "data": "x"}}}
        )
    assert caught.value.where() == ""


def test_a_chain_of_a_thousand_segments_is_checked_in_a_moment() -> None:
    names = [f"s{number}" for number in range(1000)]
    values = {
        "splitsec": 1,
        "name": "chain",
        "parties": {"a": {}},
        "segments": {name: {"at": "a"} for name in names}
        | {"s0": {"at": "a", "data": "x"}, "s999": {"at": "a", "loss": "mse"}},
        "cuts": [{"from": a, "to": b, "shape": [1], "dtype": "float32"} for a, b in itertools.pairwise(names)],
        "labels": [{"from": "a", "to": "s999", "dtype": "float32"}],
    }
    assert Graph.model_validate(values).order == tuple(names)
    values["cuts"].append({"from": "s999", "to": "s0", "shape": [1], "dtype": "float32"})  # type: ignore[attr-defined]
    with pytest.raises(GraphError, match=r"s0 -> s1 -> .* -> s999 -> s0"):
        Graph.model_validate(values)


@given(edges=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=20, unique=True))
def test_a_cycle_is_found_if_and_only_if_there_is_one(edges: list[tuple[int, int]]) -> None:
    values = {
        "splitsec": 1,
        "name": "any",
        "parties": {"a": {}},
        "segments": {f"s{one}": {"at": "a", "data": "x", "loss": "mse"} for one in range(8)},
        "cuts": [{"from": f"s{a}", "to": f"s{b}", "shape": [1], "dtype": "float32"} for a, b in edges],
        "labels": [{"from": "a", "to": f"s{one}", "dtype": "float32"} for one in range(8)],
    }
    reach = {(a, b) for a, b in edges}
    for middle in range(8):  # Warshall's closure: another way to the same answer
        reach |= {(a, b) for a in range(8) for b in range(8) if (a, middle) in reach and (middle, b) in reach}
    if not any((one, one) in reach for one in range(8)):
        order = Graph.model_validate(values).order
        assert all(order.index(f"s{a}") < order.index(f"s{b}") for a, b in edges)
        return
    with pytest.raises(GraphError) as caught:
        Graph.model_validate(values)
    named = [int(one) for one in re.findall(r"s(\d)", caught.value.seen.partition("cycle:")[2])]
    assert len(named) > 1
    assert named[0] == named[-1]
    assert all(pair in edges for pair in itertools.pairwise(named))


def test_every_loss_is_a_class_of_torch() -> None:
    torch = pytest.importorskip("torch")
    for name, loss in graphs.LOSSES.items():
        assert issubclass(getattr(torch.nn, loss.torch_class), torch.nn.Module), name


# Mistakes of YAML


@pytest.mark.parametrize(
    ("text", "line", "seen"),
    [
        ("", 1, "the file is empty"),
        ("# nothing\n", 1, "the file is empty"),
        ("just text", 1, "one single value at the top"),
        ("- a\n- b\n", 1, "a list at the top"),
        ("splitsec: 1\nname: [a, b\nparties: {}\n", 3, "not YAML"),
        ("splitsec: 1\n\tname: a\n", 2, "not YAML"),
        ("splitsec: 1\n---\nname: a\n", 2, "not YAML"),
        ("splitsec: 1\nname: a\x00b\n", 2, "U+0000"),
        ("splitsec: 1\nname: &a b\n", 2, "&a, a YAML anchor"),
        ("splitsec: 1\nname: *a\n", 2, "*a, a YAML anchor or alias"),
        ("splitsec: 1\nname: !!python/object:os.system b\n", 2, "the YAML tag"),
        ("splitsec: 1\nname: !!str b\n", 2, "the YAML tag"),
        ("splitsec: 1\nparties: !!map {}\n", 2, "the YAML tag"),
        ("splitsec: 1\nname: a\nname: b\n", 3, "the key `name` is there twice (first on line 2)"),
        ("parties:\n  a: {}\n  'a': {}\n", 3, "the key `a` is there twice (first on line 2)"),
        ("splitsec: 1\n[a]: b\n", 2, "a list as a key"),
        ("splitsec: 1\n{a: b}: b\n", 2, "a mapping as a key"),
        ("splitsec: 1\n<<: {name: a}\n", 2, "unknown key `<<`"),
        ("splitsec: " + "9" * 5000, 1, "a number of 5000 digits"),
        ("a: " + "[" * 30 + "]" * 30, 1, "nesting deeper than"),
        ("a: " + "[" * 100_000, 1, "nesting deeper than"),
    ],
    ids=range(21),
)
def test_what_is_not_the_yaml_we_read(text: str, line: int, seen: str) -> None:
    error = refused(text)
    assert seen in error.seen
    assert (error.line or 1) == line
    assert error.expected


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    bomb = "a: &a [x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)
    )
    assert "anchor" in refused(bomb).seen


@pytest.mark.parametrize(
    ("raw", "seen"),
    [
        (b"splitsec: 1\nname: \xff\n", "not text in UTF-8 (byte 0xff)"),
        (b"\x89PNG\r\n\x1a\n", "not text in UTF-8"),
        (b"#" * (2**20 + 1), "larger than 1 MiB"),
    ],
)
def test_what_is_not_text(tmp_path: Path, raw: bytes, seen: str) -> None:
    file = tmp_path / "graph.yaml"
    file.write_bytes(raw)
    with pytest.raises(GraphError) as caught:
        load_graph(file)
    assert seen in caught.value.seen
    assert str(caught.value).startswith(str(file))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="there is no such file"):
        load_graph(tmp_path / "graph.yaml")
    with pytest.raises(GraphError, match="cannot be read: Is a directory"):
        load_graph(tmp_path)


def test_scalars_follow_yaml_1_2() -> None:
    text = (
        "{no: no, on: on, 1: 010, a: 0o17, b: 0x1F, c: 1e-3, d: 12:30, e: ~, f: '', g: 2020-01-01, h: 1_000, "
        "i: .5, j: TRUE, k: -7, l: .nan}"
    )
    value = yamlfile.parse(text, "f", GraphError).value
    assert value.pop("l") != 0
    assert value == {
        "no": "no",
        "on": "on",
        "1": 10,
        "a": 15,
        "b": 31,
        "c": 0.001,
        "d": "12:30",
        "e": None,
        "f": "",
        "g": "2020-01-01",
        "h": "1_000",
        "i": 0.5,
        "j": True,
        "k": -7,
    }


@given(st.text(alphabet=st.sampled_from("ab: -{}[],&*!|>'\"#%@\n\t?~0.\x00é"), max_size=60))
def test_any_text_is_read_or_refused_with_a_graph_error(text: str) -> None:
    try:
        document = yamlfile.parse(text, "f", GraphError)
    except GraphError:
        return
    assert isinstance(document.value, dict)


def test_a_party_may_be_called_no() -> None:
    text = changed(VERTICAL, ("  registry: {}", "  no: {}"), ("from: registry", "from: no"))
    assert "no" in parse_graph(text).parties
