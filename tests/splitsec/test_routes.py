"""Routes, circuits and anonymous groups: what follows from a graph file, what is refused, and what each party sees.

As in test_graph.py, a mistake is a base graph with one passage replaced.
"""

from __future__ import annotations

import base64
import itertools
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from splitsec.errors import GraphError
from splitsec.graph import Circuit, Graph, Link, parse_graph
from splitsec.plan import CONTROL, Plan, cell_links, make_plan, relays_needed, taking_part

ONION = """\
splitsec: 1
name: onion
parties:
  clinic-a: {}
  clinic-b: {}
  clinic-c: {}
  relay-1: {listen: "tcp://r1.example.org:7400"}
  relay-2: {listen: "tcp://r2.example.org:7400"}
  relay-3: {listen: "tcp://r3.example.org:7400"}
  server: {listen: "tcp://server.example.org:7400"}
groups:
  clinics: {members: [clinic-a, clinic-b, clinic-c], schedule: round_robin}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [8], dtype: float32}
labels:
  - {from: clinics, to: trunk}
routes:
  - {from: clinics, to: server, via: [relay-1, relay-2, relay-3]}
  - {from: clinics, to: server, via: [relay-2, relay-3]}
"""


def changed(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


HIDDEN = changed(ONION, ("dtype: float32}", "dtype: float32, anonymous: true}"))
LAST = "  - {from: clinics, to: server, via: [relay-2, relay-3]}\n"
"""The last line of both: where more routes are added."""
BOTH_WAYS = (("relay-1", "relay-2", "relay-3"), ("relay-2", "relay-3"))

CHAIN = """\
splitsec: 1
name: chain
parties:
  lab: {}
  north: {}
  middle: {listen: "tcp://m.example.org:7400"}
  south: {listen: "tcp://s.example.org:7400"}
  end: {}
segments:
  one: {at: lab, data: x}
  two: {at: south}
  three: {at: end, loss: cross_entropy}
cuts:
  - {from: one, to: two, shape: [4], dtype: float32}
  - {from: two, to: three, shape: [3], dtype: float32}
labels:
  - {from: lab, to: three}
exchanges:
  - {name: sums, from: end, to: north, shape: [], dtype: float64}
routes:
  - {cut: [one, two], via: [middle]}
  - {from: end, to: lab, via: [south, middle]}
  - {from: end, to: north, via: [south, middle]}
"""


def refused(text: str) -> GraphError:
    with pytest.raises(GraphError) as caught:
        parse_graph(text)
    error = caught.value
    assert str(error).startswith("graph.yaml:")
    return error


# What follows


def test_routes_take_the_place_of_links_and_need_links_of_their_own() -> None:
    graph = parse_graph(ONION)
    assert graph.links() == (
        *(Link(f"clinic-{one}", "relay-1") for one in "a"),
        Link("relay-1", "relay-2"),  # both listen: the one that stands first in `parties` dials
        Link("relay-2", "relay-3"),
        Link("relay-3", "server"),
        Link("clinic-a", "relay-2"),
        Link("clinic-b", "relay-1"),
        Link("clinic-b", "relay-2"),
        Link("clinic-c", "relay-1"),
        Link("clinic-c", "relay-2"),
    )
    hidden_from_routes = tuple(
        Circuit(*pair, (("relay-1",),))  # neither listens: through the first that both are linked with
        for pair in (("clinic-a", "clinic-b"), ("clinic-b", "clinic-c"), ("clinic-a", "clinic-c"))
    )
    assert graph.circuits_between() == (
        *(Circuit(f"clinic-{one}", "server", BOTH_WAYS) for one in "abc"),
        *hidden_from_routes,
    )
    assert [graph.has_routes(one) for one in graph.circuits_between()] == [True] * 3 + [False] * 3
    assert graph.relays == {"relay-1", "relay-2", "relay-3"}
    assert graph.busiest == 6  # relay-1: to the server, and among the clinics
    assert (graph.anonymous, graph.far_ends) == (None, frozenset())
    assert (graph.circuits.padding, graph.circuits.cover) == ("fixed", None)


def test_without_routes_there_are_no_relays() -> None:
    graph = parse_graph(ONION[: ONION.index("routes:")].replace("schedule: round_robin", "schedule: parallel").replace(
        '  relay-1: {listen: "tcp://r1.example.org:7400"}\n', "").replace(
        '  relay-2: {listen: "tcp://r2.example.org:7400"}\n', "").replace(
        '  relay-3: {listen: "tcp://r3.example.org:7400"}\n', ""))  # fmt: skip
    assert (graph.relays, graph.busiest, graph.circuits_between()) == (frozenset(), 0, ())


def test_a_relay_that_also_trains_and_a_route_by_cut() -> None:
    graph = parse_graph(CHAIN)
    assert graph.circuits_between() == (
        Circuit("lab", "south", (("middle",),)),
        Circuit("end", "lab", (("south", "middle"),)),
        Circuit("end", "north", (("south", "middle"),)),
    )
    assert graph.links() == (
        Link("end", "south"),  # the cut
        Link("lab", "middle"),
        Link("middle", "south"),
        Link("north", "middle"),
    )
    assert taking_part(graph) == {"lab", "south", "end"}
    assert graph.relays == {"middle", "south"}
    assert relays_needed(graph) == {"middle"}


def test_among_the_members_of_a_group_the_earlier_in_parties_builds() -> None:
    text = ONION.replace("[clinic-a, clinic-b, clinic-c]", "[clinic-c, clinic-a, clinic-b]")
    graph = parse_graph(text + "  - {from: clinics, to: clinics, via: [relay-3]}\n")
    among = [one for one in graph.circuits_between() if one.second != "server"]
    assert {(one.first, one.second) for one in among} == {
        ("clinic-a", "clinic-b"),
        ("clinic-a", "clinic-c"),
        ("clinic-b", "clinic-c"),
    }
    assert {one.routes for one in among} == {(("relay-3",),)}


def test_a_group_s_route_is_for_those_of_its_members_that_talk() -> None:
    text = (
        ONION.replace("schedule: round_robin", "schedule: parallel")
        + """\
  - {from: clinics, to: relay-3, via: [relay-1]}
exchanges:
  - {name: sums, from: relay-3, to: clinic-b, shape: [], dtype: float64}
"""
    )
    circuits = parse_graph(text).circuits_between()
    assert [one for one in circuits if one.second == "relay-3"] == [Circuit("clinic-b", "relay-3", (("relay-1",),))]


def test_two_groups_take_a_route_stream_by_stream() -> None:
    graph = parse_graph("""\
splitsec: 1
name: pairs
parties:
  a1: {}
  a2: {}
  b1: {}
  b2: {}
  hub: {listen: "tcp://hub.example.org:7400"}
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
routes:
  - {cut: [low, high], via: [hub]}
""")
    assert graph.circuits_between() == (Circuit("a1", "b1", (("hub",),)), Circuit("a2", "b2", (("hub",),)))


def test_the_implied_relay_is_the_first_in_parties_that_both_are_linked_with() -> None:
    graph = parse_graph(changed(ONION, ("[relay-1, relay-2, relay-3]", "[relay-3, relay-2, relay-1]")))
    among = [one for one in graph.circuits_between() if one.second != "server"]
    assert {one.routes for one in among} == {(("relay-2",),)}


def test_a_hundred_clinics_that_all_talk_to_each_other_load_in_a_moment() -> None:
    names = [f"clinic-{number}" for number in range(100)]
    values = {
        "splitsec": 1,
        "name": "big",
        "parties": {name: {} for name in names}
        | {f"r{n}": {"listen": f"tcp://r{n}.example.org:7400"} for n in range(4)},
        "groups": {"clinics": {"members": names, "schedule": "round_robin"}},
        "segments": {"stem": {"at": "clinics", "data": "x"}, "trunk": {"at": "r3", "loss": "mse"}},
        "cuts": [{"from": "stem", "to": "trunk", "shape": [1], "dtype": "float32", "anonymous": True}],
        "labels": [{"from": "clinics", "to": "trunk", "dtype": "float32"}],
        "routes": [
            {"from": "clinics", "to": "r3", "via": ["r0", "r1", "r2"]},
            {"from": "clinics", "to": "clinics", "via": ["r0", "r1"]},
            {"from": "clinics", "to": "clinics", "via": ["r1", "r2"]},
        ],
    }
    before = time.process_time()
    graph = Graph.model_validate(values)
    assert time.process_time() - before < 1.0
    assert len(graph.circuits_between()) == 100 + 100 * 99 // 2
    assert graph.busiest == 100 + 100 * 99 // 2
    before = time.process_time()
    assert len(make_plan(graph, "clinic-7").peers) == 100
    assert make_plan(graph, "r3").peers == ("clinics",)
    assert time.process_time() - before < 1.0


# Anonymous groups


def test_an_anonymous_group() -> None:
    graph = parse_graph(HIDDEN)
    assert graph.anonymous == "clinics"
    assert graph.far_ends == {"server"}
    assert graph.groups["clinics"].pseudonym == "turn"
    assert set(graph.hand_ons("clinics")) == set(itertools.permutations(["clinic-a", "clinic-b", "clinic-c"], 2))
    assert len(parse_graph(ONION).hand_ons("clinics")) == 3
    assert (
        parse_graph(changed(HIDDEN, ("round_robin}", "round_robin, pseudonym: epoch}"))).groups["clinics"].pseudonym
        == "epoch"
    )


def test_far_ends_are_those_with_cuts_or_labels_and_not_those_behind_them() -> None:
    text = changed(
        HIDDEN,
        ("trunk: {at: server, loss: cross_entropy}", "trunk: {at: server}\n  deep: {at: store}\n"
         "  top: {at: judge, loss: cross_entropy}"),
        ("labels:\n", "  - {from: trunk, to: deep, shape: [8], dtype: float32}\n"
         "  - {from: deep, to: top, shape: [8], dtype: float32}\nlabels:\n"),
        ("{from: clinics, to: trunk}", "{from: clinics, to: top}"),
        ("groups:\n", '  store: {listen: "tcp://store.example.org:7400"}\n'
         '  judge: {listen: "tcp://judge.example.org:7400"}\ngroups:\n'),
    )  # fmt: skip
    assert "`clinic-a` has no route to `judge`" in refused(text).seen
    graph = parse_graph(text + "  - {from: clinics, to: judge, via: [relay-1, relay-3]}\n")
    assert graph.far_ends == {"server", "judge"}
    assert make_plan(graph, "store").peers == ("server", "judge")


def test_with_keys_gives_an_anonymous_group_its_key() -> None:
    graph = parse_graph(HIDDEN)
    key = "x25519:" + base64.b64encode(bytes([9] + [0] * 30 + [1])).decode()
    assert graph.with_keys({"clinics": key}, {}).groups["clinics"].key == key
    with pytest.raises(GraphError, match="`clinic-a` has the same key as `clinics`"):
        graph.with_keys({"clinics": key, "clinic-a": key}, {})
    with pytest.raises(GraphError, match="unknown party `clinics`"):
        graph.with_keys({}, {"clinics": ("tcp://127.0.0.1:1", None)})
    with pytest.raises(GraphError, match="has a `key`, but is not anonymous"):
        parse_graph(ONION).with_keys({"clinics": key}, {})


def test_members_may_be_linked_with_each_other() -> None:
    text = HIDDEN.replace("  clinic-a: {}", '  clinic-a: {listen: "tcp://a.example.org:7400"}')
    graph = parse_graph(text + "  - {from: clinic-b, to: clinic-c, via: [relay-2]}\n")
    assert Link("clinic-b", "clinic-a") in graph.links()
    assert Circuit("clinic-b", "clinic-c", (("relay-2",),)) in graph.circuits_between()


# Mistakes

MISTAKES = {
    "no end": (ONION, [("via: [relay-2, relay-3]", "via: []")], 22, "a route of 0 relays", "1 to 7", "name a relay"),
    "eight relays": (
        ONION,
        [("via: [relay-2, relay-3]", "via: [" + ", ".join(f"r{n}" for n in range(8)) + "]")],
        22, "a route of 8 relays", "1 to 7", "take some out",
    ),
    "no via": (ONION, [("server, via: [relay-2, relay-3]", "server")], 22, "`via` is missing", "", "add `via"),
    "unknown relay": (ONION, [("[relay-2, relay-3]", "[relay-2, relay-4]")], 22,
        "the relay `relay-4` is unknown", "`parties`", "did you mean"),
    "a group as a relay": (ONION, [("[relay-2, relay-3]", "[clinics, relay-3]")], 22,
        "the relay `clinics` is a group", "`parties`", ""),
    "a relay twice": (ONION, [("[relay-2, relay-3]", "[relay-2, relay-2]")], 22,
        "`relay-2` is in the route twice", "once", "remove"),
    "an end as a relay": (ONION, [("[relay-2, relay-3]", "[relay-2, clinic-b]")], 22,
        "`clinic-b` is a relay and an end", "other than", "one by one"),
    "the far end as a relay": (ONION, [("[relay-2, relay-3]", "[server, relay-3]")], 22,
        "`server` is a relay and an end", "", ""),
    "unknown end": (ONION, [("{from: clinics, to: server, via: [relay-2", "{from: clinic, to: server, via: [relay-2")],
        22, "unknown party or group `clinic`", "", "`clinics`"),
    "no from": (ONION, [("{from: clinics, to: server, via: [relay-2", "{to: server, via: [relay-2")], 22,
        "a route without `from`", "or `cut`", "add `from`"),
    "no to": (ONION, [("{from: clinics, to: server, via: [relay-2", "{from: clinics, via: [relay-2")], 22,
        "a route without `to`", "or `cut`", "far end"),
    "to itself": (ONION, [("{from: clinics, to: server, via: [relay-2", "{from: server, to: server, via: [relay-2")],
        22, "a route from `server` to itself", "two parties", ""),
    "cut and from": (ONION, [("{from: clinics, to: server, via: [relay-2", "{cut: [stem, trunk], to: server, via: [r")],
        22, "a route with `cut` and with `to`", "or", "remove"),
    "cut of three": (ONION, [("{from: clinics, to: server, via: [relay-2", "{cut: [stem, trunk, top], via: [r")],
        22, "`cut: [stem, trunk, top]`", "two segments", ""),
    "unknown segment": (ONION, [("{from: clinics, to: server, via: [relay-2", "{cut: [stm, trunk], via: [relay-2")],
        22, "unknown segment `stm`", "", "`stem`"),
    "a cut that is not there": (CHAIN, [("cut: [one, two]", "cut: [one, three]")], 21,
        "a route for the cut from `one` to `three`, which is not there", "", "`from` and `to`"),
    "a cut backwards": (CHAIN, [("cut: [one, two]", "cut: [two, one]")], 21,
        "a route for the cut from `two` to `one`", "its direction", "`cut: [one, two]`"),
    "who never talk": (CHAIN, [("from: end, to: north, via", "from: lab, to: north, via")], 23,
        "a route from `lab` to `north`, who never talk", "exchange", "remove the route"),
    "a group that never talks": (ONION, [("{from: clinics, to: server, via: [relay-2", "{from: clinics, to: relay-1, "
        "via: [relay-2")], 22, "a route from `clinics` to `relay-1`, but no two parties there talk", "", ""),
    "among members that never talk": (ONION, [("round_robin", "parallel"), (LAST, LAST +
        "  - {from: clinics, to: clinics, via: [relay-2]}\n")], 23, "a route among `clinics`, but no two", "", ""),
    "both directions": (ONION, [("{from: clinics, to: server, via: [relay-2", "{from: server, to: clinic-b, via: [re"
        "lay-2")], 22, "a route from `server` to `clinic-b`, and another from `clinic-b` to `server` "
        "(the first is on line 21)", "one of the two to build", "write it from `clinic-b`"),
    "the same twice": (ONION, [("{from: clinics, to: server, via: [relay-2", "{from: clinic-c, to: server, via: [rel"
        "ay-1, relay-2")], 22, "the route from `clinic-c` to `server` via `relay-1`, `relay-2`, `relay-3` is there "
        "twice (the first is on line 21)", "other relays", "remove"),
    "linked and routed": (CHAIN, [("to: north, via: [south, middle]", "to: north, via: [lab, middle]")], 23,
        "`end` and `lab` stand side by side here", "not both", "the route from `end` to `lab`"),
    "nobody at a side": (CHAIN, [('middle: {listen: "tcp://m.example.org:7400"}', "middle: {}")], 21,
        "`lab` and `middle` stand side by side in a route, but neither of them listens", "`listen` at one",
        "to the relay"),
    "a group's key": (ONION, [("round_robin}", 'round_robin, key: "x25519:CQEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA='
        '"}')], 12, "the group `clinics` has a `key`, but is not anonymous", "anonymous: true", "remove `key`"),
    "a group's pseudonym": (ONION, [("round_robin}", "round_robin, pseudonym: epoch}")], 12,
        "the group `clinics` has a `pseudonym`, but is not anonymous", "", "remove `pseudonym`"),
    "unknown pseudonym": (HIDDEN, [("round_robin}", "round_robin, pseudonym: step}")], 12,
        "is step", "`turn` or `epoch`", ""),
    "unknown padding": (ONION, [("routes:\n", "circuits: {padding: none}\nroutes:\n")], 20,
        "`circuits.padding` is none", "`fixed` or `padme`", ""),
    "cover at once": (ONION, [("routes:\n", "circuits: {cover: 0}\nroutes:\n")], 20, "`circuits.cover` is 0", "0.001",
        ""),
    "anonymous, no group": (CHAIN, [("shape: [4], dtype: float32", "shape: [4], dtype: float32, anonymous: true")], 14,
        "the cut from `one` to `two` is anonymous, but neither end is a group", "a group at one end", "remove"),
    "anonymous, inside": (
        HIDDEN,
        [("  trunk: {", "  head: {at: clinics, loss: mse}\n  trunk: {"),
         ("labels:\n", "  - {from: stem, to: head, shape: [8], dtype: float32, anonymous: true}\nlabels:\n"
          "  - {from: clinics, to: head, dtype: float32}\n")],
        19, "the cut from `stem` to `head` is anonymous, but stays inside `clinics`", "", "remove `anonymous`",
    ),
    "not all anonymous": (
        HIDDEN,
        [("shape: [8]", "output: main, shape: [8]"), ("labels:\n", "  - {from: stem, to: trunk, output: side, shape: [8"
          "], dtype: float32}\nlabels:\n")],
        18, "the cut from `stem` to `trunk` is not anonymous, but", "all cuts", "add `anonymous: true`",
    ),
    "anonymous beside another group": (
        HIDDEN,
        [("segments:\n", "  others: {members: [relay-1, relay-2, relay-3], schedule: round_robin}\nsegments:\n"),
         ("labels:\n", "  - {from: stem, to: side, shape: [8], dtype: float32, anonymous: true}\nlabels:\n"
          "  - {from: clinics, to: side}\n"),
         ("  trunk: {", "  side: {at: others, loss: cross_entropy}\n  trunk: {")],
        13, "the group `others` beside `clinics`, which is anonymous", "one group", "make `others` one party",
    ),
    "anonymous and parallel": (HIDDEN, [("round_robin", "parallel")], 12,
        "the group `clinics` is anonymous and `parallel`", "`round_robin`", ""),
    "anonymous and alone": (
        HIDDEN,
        [("[clinic-a, clinic-b, clinic-c]", "[clinic-a]"), ("  clinic-b: {}\n  clinic-c: {}\n", "")],
        10, "the anonymous group `clinics` has one member", "several", "add members",
    ),
    "anonymous and leaving": (HIDDEN, [("routes:\n", "privacy: {when_spent: leave}\nroutes:\n")], 20,
        "`when_spent: leave` with the anonymous group `clinics`", "`end`", "when_spent: end"),
    "samples elsewhere": (HIDDEN, [("trunk: {at: server,", "trunk: {at: server, data: z,")], 15,
        "`server` holds samples, too, but the group `clinics` is anonymous", "at its members", "place them"),
    "labels elsewhere": (HIDDEN, [("from: clinics, to: trunk}", "from: server, to: trunk}")], 19,
        "the labels for `trunk` are at `server`, but the group", "", ""),
    "an exchange with a far end": (HIDDEN, [("routes:\n", "exchanges:\n  - {name: sums, from: server, to: clinic-b, "
        "shape: [], dtype: float64}\nroutes:\n")], 21,
        "the exchange `sums` goes from `server` to `clinic-b`, where the group `clinics` is anonymous", "",
        "remove it"),
    "anonymous, no routes": (
        HIDDEN,
        [("routes:\n", ""), ("  - {from: clinics, to: server, via: [relay-1, relay-2, relay-3]}\n", ""), (LAST, ""),
         ('  relay-1: {listen: "tcp://r1.example.org:7400"}\n', ""),
         ('  relay-2: {listen: "tcp://r2.example.org:7400"}\n', ""),
         ('  relay-3: {listen: "tcp://r3.example.org:7400"}\n', "")],
        14, "`clinic-a` has no route to `server`, but the group `clinics` is anonymous there", "a link of its own",
        "add `{from: clinics, to: server, via: [...]}` under `routes`",
    ),
    "anonymous, one member without": (
        HIDDEN,
        [("clinics, to: server, via: [relay-1", "clinic-a, to: server, via: [relay-1"),
         ("clinics, to: server, via: [relay-2", "clinics, to: clinics, via: [relay-2")],
        17, "`clinic-b` has no route to `server`", "", "",
    ),
    "another last relay": (
        HIDDEN,
        [("clinics, to: server, via: [relay-2, relay-3]", "clinic-b, to: server, via: [relay-1]")],
        22, "`clinic-b` comes to `server` through `relay-3`, then `relay-1`, and `clinic-a` through `relay-3`",
        "the same last relays", "for all members alike",
    ),
    "the far end builds": (
        HIDDEN,
        [("clinics, to: server, via: [relay-1, relay-2, relay-3]", "server, to: clinics, via: [relay-3, relay-1]"),
         ("clinics, to: server, via: [relay-2, relay-3]", "clinics, to: clinics, via: [relay-2]")],
        21, "a route from `server` to `clinic-a`, whose group `clinics` is anonymous there", "", "`from: clinics",
    ),
    "a far end between members": (HIDDEN, [(LAST, LAST + "  - {from: clinics, to: clinics, via: [relay-1, server, "
        "relay-3]}\n")], 23,
        "`server` is a relay between `clinic-a` and `clinic-b`, and a far end of the anonymous group",
        "something passes", "another party"),
    "a member as a relay": (
        HIDDEN,
        [("clinics, to: server, via: [relay-2, relay-3]", "clinic-a, to: server, via: [relay-1, clinic-b, relay-3]")],
        22, "`clinic-b` is a relay between `clinic-a` and `server`, and a member", "", "",
    ),
    "a far end next to a member": (HIDDEN, [(LAST, LAST + "  - {from: clinics, to: clinics, via: [server]}\n")], 23,
        "`clinic-a` and `server` stand side by side here", "", "another relay"),
    "members that nobody links": (
        HIDDEN,
        [(LAST, LAST.replace("clinics", "clinic-b") + "  - {from: clinic-c, to: server, via: [relay-3, relay-1]}\n"),
         ("{from: clinics, to: server, via: [relay-1", "{from: clinic-a, to: server, via: [relay-1")],
        12, "`clinic-a` and `clinic-b` must talk (`clinic-a` hands the weights of the group `clinics` on)",
        "or a route", "`{from: clinic-a, to: clinic-b, via: [...]}`",
    ),
}  # fmt: skip


@pytest.mark.threat("T84", "T86")
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


# What each party sees


def end_to_end(graph: Graph, plans: dict[str, Plan]) -> None:
    """What one may send to another is what that one takes, and the two know each other as peers."""

    def called(name: str, by: str) -> str:
        hidden = graph.anonymous is not None and name in graph.members(graph.anonymous)
        return str(graph.anonymous) if hidden and by not in graph.members(str(graph.anonymous)) else name

    for name, plan in plans.items():
        assert {peer for peer, _ in (*plan.lanes_in, *plan.lanes_out)} <= set(plan.peers)
        assert len(set(plan.peers)) == len(plan.peers)
        for peer in plan.peers:
            for other in graph.members(peer):
                theirs = plans[other]
                assert called(name, other) in theirs.peers
                for number, lane in ((number, lane) for (to, number), lane in plan.lanes_out.items() if to == peer):
                    taken = theirs.lanes_in[called(name, other), number]
                    assert (lane.kind, lane.max_body, lane.shape) == (taken.kind, taken.max_body, taken.shape)
        assert {link for link in plan.links} <= set(graph.links())
        assert {link for link in plan.cell_links} <= set(graph.links())


@pytest.mark.parametrize(
    "text",
    [ONION, HIDDEN, CHAIN, ONION.replace("round_robin", "parallel"), ONION + "privacy: {when_spent: leave}\n"],
    ids=["onion", "hidden", "chain", "parallel", "leave"],
)
def test_two_plans_of_one_graph_fit(text: str) -> None:
    graph = parse_graph(text)
    end_to_end(graph, {name: make_plan(graph, name) for name in taking_part(graph)})
    plans = {name: make_plan(graph, name, exchanges=True) for name in graph.parties}
    end_to_end(graph, plans)
    assert {lane.kind for plan in plans.values() for lane in plan.lanes_out.values()} <= {"exchange"}


@pytest.mark.parametrize("text", [ONION, HIDDEN, CHAIN], ids=["onion", "hidden", "chain"])
def test_counts_reach_everybody_over_the_control_lanes(text: str) -> None:
    graph = parse_graph(text)
    working = taking_part(graph)
    reached, new = set(), {next(iter(sorted(working)))}
    while new:
        reached |= new
        near = {peer for name in new for peer in make_plan(graph, name).neighbours}
        new = {member for peer in near for member in graph.members(peer)} - reached
    assert reached == working


def test_circuits_and_links_of_each() -> None:
    graph = parse_graph(ONION)
    a = make_plan(graph, "clinic-a")
    assert a.links == ()
    assert a.cell_links == (Link("clinic-a", "relay-1"), Link("clinic-a", "relay-2"))
    assert a.peers == ("server", "clinic-b", "clinic-c")
    assert a.neighbours == a.peers  # nobody with a control lane stands between
    server = make_plan(graph, "server")
    assert server.cell_links == (Link("relay-3", "server"),)
    assert server.circuits == tuple(Circuit(f"clinic-{one}", "server", BOTH_WAYS) for one in "abc")
    assert cell_links(graph, "relay-2") == (
        Link("relay-1", "relay-2"),
        Link("relay-2", "relay-3"),
        *(Link(f"clinic-{one}", "relay-2") for one in "abc"),
    )
    assert relays_needed(graph) == {"relay-1", "relay-2", "relay-3"}


def test_who_is_led_by_a_third_that_trains_needs_no_control_lane() -> None:
    text = ONION[: ONION.index("routes:")]
    for name in ("relay-1", "relay-2", "relay-3"):
        text = text.replace(f'  {name}: {{listen: "tcp://r{name[-1]}.example.org:7400"}}\n', "")
    graph = parse_graph(text)
    plan = make_plan(graph, "clinic-b")
    assert plan.links == (Link("clinic-b", "server"),)
    assert plan.peers == ("server", "clinic-a", "clinic-c")
    assert plan.neighbours == ("server",)
    assert plan.cell_links == (Link("clinic-b", "server"),)
    assert make_plan(graph, "server").cell_links == tuple(Link(f"clinic-{one}", "server") for one in "abc")
    assert make_plan(graph, "server").circuits == ()
    assert relays_needed(graph) == frozenset()


def test_a_route_for_an_exchange_is_no_part_of_the_training() -> None:
    graph = parse_graph(CHAIN)
    assert make_plan(graph, "end").peers == ("south", "lab")
    line = make_plan(graph, "end", exchanges=True)
    assert line.circuits == (Circuit("end", "north", (("south", "middle"),)),)
    assert line.links == ()
    assert line.cell_links == (Link("end", "south"),)
    assert line.peers == ("north",)
    assert make_plan(graph, "south").cell_links == (Link("end", "south"), Link("middle", "south"))


def test_nor_where_both_ends_train() -> None:
    text = (
        ONION.replace("schedule: round_robin", "schedule: parallel")
        + """\
  - {from: clinic-a, to: clinic-b, via: [relay-3]}
exchanges:
  - {name: sums, from: clinic-a, to: clinic-b, shape: [], dtype: float64}
"""
    )
    graph = parse_graph(text)
    assert make_plan(graph, "clinic-a").peers == ("server",)
    assert make_plan(graph, "clinic-a", exchanges=True).peers == ("clinic-b",)


@pytest.mark.threat("T78")
def test_outside_an_anonymous_group_a_plan_knows_no_member() -> None:
    graph = parse_graph(HIDDEN)
    plan = make_plan(graph, "server")
    assert plan.peers == plan.neighbours == ("clinics",)
    assert plan.circuits == (Circuit("clinics", "server", BOTH_WAYS),)
    assert {peer for peer, _ in (*plan.lanes_in, *plan.lanes_out)} == {"clinics"}
    assert [len(stream.stages) for stream in plan.streams] == [1, 1, 1]
    named = {
        name
        for stream in plan.streams
        for stage in stream.stages
        for edge in (*stage.inputs, *stage.outputs, *([stage.labels] if stage.labels else []))
        for name in (edge.source_party, edge.target_party)
    }
    assert named == {"clinics", "server"}
    assert "clinic-" not in repr(plan)
    assert "clinic-" not in str(plan)


def test_a_member_of_an_anonymous_group_is_ready_for_every_place_in_the_order() -> None:
    graph = parse_graph(HIDDEN)
    plan = make_plan(graph, "clinic-b")
    assert [stream.stream for stream in plan.streams] == [0, 1, 2]
    for stream in plan.streams:
        (stage,) = stream.stages
        assert (stage.outputs[0].source_party, stage.outputs[0].target_party) == ("clinic-b", "server")
        assert [edge.target_party for edge in stream.gives_labels] == ["server"]
        assert not stream.idle
    assert plan.neighbours == plan.peers == ("server", "clinic-a", "clinic-c")
    assert {(lane.peer, lane.kind) for lane in plan.lanes_out.values()} == {
        ("server", "control"),
        ("server", "activation"),
        ("server", "labels"),
        *((f"clinic-{one}", kind) for one in "ac" for kind in ("control", "weights")),
    }
    plain = make_plan(parse_graph(ONION), "clinic-b")
    assert [stream.idle for stream in plain.streams] == [True, False, True]


def test_members_have_control_lanes_with_each_other_whatever_carries_them() -> None:
    """Also where a third leads them that has one with both."""
    text = HIDDEN.replace("  clinic-a: {}", '  clinic-a: {listen: "tcp://a.example.org:7400"}')
    graph = parse_graph(text + "  - {from: clinic-b, to: clinic-c, via: [clinic-a]}\n")
    assert ("clinic-c", CONTROL) in make_plan(graph, "clinic-b").lanes_out
    plain = parse_graph(
        ONION.replace("  clinic-a: {}", '  clinic-a: {listen: "tcp://a.example.org:7400"}')
        + "  - {from: clinic-b, to: clinic-c, via: [clinic-a]}\n"
    )
    assert ("clinic-c", CONTROL) not in make_plan(plain, "clinic-b").lanes_out


def test_a_member_s_exchange_with_a_third_party_is_no_part_of_the_training() -> None:
    text = changed(
        HIDDEN,
        ("trunk: {at: server, loss: cross_entropy}", "trunk: {at: server}\n  top: {at: store, loss: cross_entropy}"),
        ("labels:\n", "  - {from: trunk, to: tail, shape: [8], dtype: float32}\nlabels:\n"),
        ("stem: {at: clinics, data: x}", "stem: {at: clinics, data: x}\n  tail: {at: store}"),
        ("labels:\n", "  - {from: tail, to: top, shape: [8], dtype: float32}\nlabels:\n"),
        ("{from: clinics, to: trunk}", "{from: clinics, to: end}"),
        ("  top: {at: store, loss: cross_entropy}", "  top: {at: store}\n  end: {at: server, loss: cross_entropy}"),
        ("labels:\n", "  - {from: top, to: end, shape: [8], dtype: float32}\nlabels:\n"),
        ("groups:\n", '  store: {listen: "tcp://store.example.org:7400"}\ngroups:\n'),
        ("routes:\n", "exchanges: [{name: sums, from: clinic-a, to: store, shape: [], dtype: float64}]\nroutes:\n"),
    )
    graph = parse_graph(text)
    assert graph.far_ends == {"server"}
    assert Link("clinic-a", "store") in graph.links()
    assert "store" not in make_plan(graph, "clinic-a").peers
    assert make_plan(graph, "store").peers == ("server",)
    assert make_plan(graph, "clinic-a", exchanges=True).peers == ("store",)
    end_to_end(graph, {name: make_plan(graph, name) for name in taking_part(graph)})


ENDS = (
    ("clinics", "server"),
    ("clinics", "clinics"),
    ("clinic-b", "server"),
    ("clinic-a", "clinic-b"),
    ("clinic-c", "clinic-a"),
    ("server", "clinic-c"),
)
VIA = ("relay-1", "relay-2", "relay-3", "clinic-b", "server")


ANY_VIA = st.lists(st.sampled_from(VIA[:3]), min_size=1, unique=True) | st.lists(
    st.sampled_from(VIA), min_size=1, max_size=3, unique=True
)


@given(
    routes=st.lists(st.tuples(st.sampled_from(ENDS), ANY_VIA), max_size=4, unique_by=lambda one: one[0]),
    hidden=st.booleans(),
)
@example(routes=[(("clinics", "server"), ["relay-1"]), (("clinics", "clinics"), ["relay-2"])], hidden=True)
@example(routes=[(("clinics", "server"), ["relay-1"]), (("clinic-b", "server"), ["relay-2"])], hidden=True)
@example(routes=[(("clinics", "clinics"), ["relay-2", "server"])], hidden=False)
def test_any_routes_are_refused_or_fit(routes: list[tuple[tuple[str, str], list[str]]], hidden: bool) -> None:
    text = (HIDDEN if hidden else ONION).partition("routes:")[0]
    text += "exchanges:\n" + "".join(  # so that every relay has something to do
        f"  - {{name: e{n}, from: relay-{n}, to: relay-{n % 3 + 1}, shape: [], dtype: bool}}\n" for n in (1, 2, 3)
    )
    text += (
        "routes: [" + ", ".join(f"{{from: {a}, to: {b}, via: [{', '.join(via)}]}}" for (a, b), via in routes) + "]\n"
    )
    try:
        graph = parse_graph(text)
    except GraphError as error:
        assert error.expected
        assert error.fix
        return
    linked = {frozenset(link) for link in graph.links()}
    joined = [frozenset((one.first, one.second)) for one in graph.circuits_between()]
    assert len(set(joined)) == len(joined)
    assert not linked & set(joined)
    assert set(graph.talking()) <= linked | set(joined)
    for one in graph.circuits_between():
        for route in one.routes:
            hops = [frozenset(side) for side in itertools.pairwise((one.first, *route, one.second))]
            assert linked.issuperset(hops)
            if hidden:
                assert "server" not in route
    if hidden:
        assert not any("server" in pair and pair & {"clinic-a", "clinic-b", "clinic-c"} for pair in linked)
    end_to_end(graph, {name: make_plan(graph, name) for name in taking_part(graph)})
