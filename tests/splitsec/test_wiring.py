"""Wiring: what the I/O thread of each party of a graph is told, and that it loads neither torch nor numpy."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from splitsec.errors import GraphError, InternalError
from splitsec.graph import Graph, parse_graph
from splitsec.identity import parse_public, public_of, public_text
from splitsec.plan import make_plan
from splitsec.transports import limits
from splitsec.transports.iothread import Peer
from splitsec.wiring import cell_limit_of, cell_of, keys_of, passages_of, peers_of

GRAPH = """\
splitsec: 1
name: onion
parties:
  clinic-a: {}
  clinic-b: {}
  clinic-c: {listen: "tcp://c.example.org:7400"}
  relay-1: {listen: "tcp://0.0.0.0:7400", address: "tcp://r1.example.org:7400"}
  relay-2: {listen: "tcp://r2.example.org:7400"}
  server: {listen: "tcp://server.example.org:7400"}
  store: {}
groups:
  clinics: {members: [clinic-a, clinic-b, clinic-c], schedule: round_robin}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server}
  deep: {at: store}
  top: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [64], dtype: float32, anonymous: true}
  - {from: trunk, to: deep, shape: [8], dtype: float32}
  - {from: deep, to: top, shape: [4], dtype: float32}
labels:
  - {from: clinics, to: top, shape: [64]}
exchanges:
  - {name: sums, from: clinic-a, to: store, shape: [1024], dtype: float64}
routes:
  - {from: clinics, to: server, via: [relay-1, relay-2]}
  - {from: clinics, to: server, via: [relay-2, relay-1]}
  - {from: clinic-a, to: clinic-b, via: [relay-2]}
  - {from: clinic-a, to: store, via: [relay-1, relay-2]}
training: {batch_size: 32, micro_batches: 2}
"""

PRIVATE = {
    name: bytes([number + 1] * 32)
    for number, name in enumerate(
        ["clinic-a", "clinic-b", "clinic-c", "relay-1", "relay-2", "server", "store", "clinics"]
    )
}
PUBLIC = {name: public_of(key) for name, key in PRIVATE.items()}


def graph_of(text: str = GRAPH) -> Graph:
    graph = parse_graph(text)
    names = [*graph.parties, *([graph.anonymous] if graph.anonymous else [])]
    return graph.with_keys({name: public_text(PUBLIC[name]) for name in names}, {})


def plain(text: str = GRAPH) -> str:
    return text.replace(", anonymous: true", "")


def wired(graph: Graph, party: str, *, relay: bool = False, exchanges: bool = False) -> dict[str, Peer]:
    """What ``party`` is told, by name."""
    names = {key: name for name, key in PUBLIC.items()}
    plan = None if relay else make_plan(graph, party, exchanges=exchanges)
    member = graph.anonymous is not None and party in graph.members(graph.anonymous)
    peers = peers_of(graph, party, plan, group_key=PRIVATE["clinics"] if member else None)
    found = {names[one.key]: one for one in peers}
    assert len(found) == len(peers)
    return found


def keys(*names: str) -> tuple[bytes, ...]:
    return tuple(PUBLIC[name] for name in names)


@pytest.mark.threat("T74")
def test_a_relay_has_links_for_cells_alone() -> None:
    assert wired(graph_of(), "relay-1", relay=True) == {
        **{f"clinic-{one}": Peer(PUBLIC[f"clinic-{one}"], cells_only=True) for one in "abc"},
        "relay-2": Peer(PUBLIC["relay-2"], dial="tcp://r2.example.org:7400", cells_only=True),
        "server": Peer(PUBLIC["server"], dial="tcp://server.example.org:7400", cells_only=True),
    }
    last = wired(graph_of(), "relay-2", relay=True)
    assert set(last) == {"clinic-a", "clinic-b", "clinic-c", "relay-1", "server", "store"}
    assert last["store"] == Peer(PUBLIC["store"], cells_only=True)


@pytest.mark.threat("T31")
def test_circuits_go_on_as_the_routes_lead_and_nowhere_else() -> None:
    graph = graph_of()
    names = {key: name for name, key in PUBLIC.items()}
    clinics = [f"clinic-{one}" for one in "abc"]

    def passages(party: str) -> set[tuple[str, str]]:
        return {(names[before], names[after]) for before, after in passages_of(graph, party)}

    assert passages("relay-1") == {*((one, "relay-2") for one in clinics), ("relay-2", "server")}
    assert passages("relay-2") == {
        *((one, "relay-1") for one in clinics),
        ("relay-1", "server"),
        ("relay-1", "store"),
        ("clinic-a", "clinic-b"),
    }
    assert passages("server") == passages("clinic-a") == set()


@pytest.mark.threat("T91")
def test_a_member_calls_the_far_end_with_the_group_s_key() -> None:
    graph = graph_of()
    peers = wired(graph, "clinic-a")
    assert set(peers) == {"relay-1", "relay-2", "server", "clinic-b", "clinic-c"}
    assert peers["relay-1"] == Peer(PUBLIC["relay-1"], dial="tcp://r1.example.org:7400", cells_only=True)
    plan = make_plan(graph, "clinic-a")
    assert peers["server"] == Peer(
        PUBLIC["server"],
        lanes={number: lane.max_body for (peer, number), lane in plan.lanes_in.items() if peer == "server"},
        routes=(keys("relay-1", "relay-2"), keys("relay-2", "relay-1")),
        initiator=True,
        cell=peers["server"].cell,
        proves=PRIVATE["clinics"],
        on_call=True,
    )
    assert {lane.kind for (peer, _), lane in plan.lanes_in.items() if peer == "server"} == {"control", "gradient"} | {
        "taken"
    }
    # To other members each speaks for itself, over a circuit or a link.
    to_b = peers["clinic-b"]
    assert (to_b.routes, to_b.initiator, to_b.proves, to_b.on_call) == ((keys("relay-2"),), True, None, False)
    assert to_b.lanes
    assert peers["clinic-c"].dial == "tcp://c.example.org:7400"
    assert peers["clinic-c"].lanes
    assert not peers["clinic-c"].routes
    assert not wired(graph, "clinic-b")["clinic-a"].initiator


@pytest.mark.threat("T78")
def test_the_far_end_sees_a_crowd_at_the_end_of_its_routes() -> None:
    graph = graph_of()
    peers = wired(graph, "server")
    assert set(peers) == {"relay-1", "relay-2", "clinics", "store"}
    crowd = peers["clinics"]
    assert crowd.crowd
    assert crowd.routes == (keys("relay-1", "relay-2"), keys("relay-2", "relay-1"))  # in the order they are built
    assert (crowd.initiator, crowd.proves, crowd.on_call, crowd.dial) == (False, None, False, None)
    assert set(crowd.lanes) == {number for (peer, number) in make_plan(graph, "server").lanes_in if peer == "clinics"}
    assert crowd.cell == wired(graph, "clinic-a")["server"].cell == wired(graph, "clinic-b")["server"].cell
    assert not peers["store"].crowd
    assert not {PUBLIC[f"clinic-{one}"] for one in "abc"} & {one.key for one in peers.values()}


def test_without_anonymity_everybody_is_who_it_is() -> None:
    peers = wired(graph_of(plain()), "server")
    assert set(peers) == {"relay-1", "relay-2", "clinic-a", "clinic-b", "clinic-c", "store"}
    assert not any(one.crowd or one.on_call or one.proves for one in peers.values())
    mine = wired(graph_of(plain()), "clinic-a")["server"]
    assert (mine.initiator, mine.on_call, mine.proves) == (True, False, None)
    assert peers["clinic-a"].cell == mine.cell


def test_a_link_that_carries_lanes_and_cells_is_one_peer() -> None:
    text = """\
splitsec: 1
name: chain
parties:
  lab: {}
  middle: {listen: "tcp://m.example.org:7400"}
  end: {}
segments: {one: {at: lab, data: x}, two: {at: middle}, three: {at: end, loss: mse}}
cuts:
  - {from: one, to: two, shape: [4], dtype: float32}
  - {from: two, to: three, shape: [3], dtype: float32}
labels: [{from: lab, to: three, dtype: float32}]
routes: [{from: lab, to: end, via: [middle]}]
"""
    for name, stands_in in (("lab", "clinic-a"), ("middle", "relay-1"), ("end", "server")):
        text = re.sub(rf"\b{name}\b", stands_in, text)
    graph = graph_of(text)
    peers = peers_of(graph, "clinic-a", make_plan(graph, "clinic-a"))
    assert [one.key for one in peers] == list(keys("relay-1", "server"))
    assert peers[0].lanes
    assert not peers[0].routes
    assert not peers[0].cells_only
    assert peers[1].routes == (keys("relay-1"),)
    assert [one.key for one in peers_of(graph, "relay-1", make_plan(graph, "relay-1"))] == list(
        keys("clinic-a", "server")
    )


def test_exchanges_are_wired_on_their_own() -> None:
    graph = graph_of()
    peers = wired(graph, "store", exchanges=True)
    assert set(peers) == {"relay-2", "clinic-a"}
    assert (peers["clinic-a"].initiator, peers["clinic-a"].routes) == (False, (keys("relay-1", "relay-2"),))
    assert list(peers["clinic-a"].lanes.values()) == [graph.exchanges[0].max_bytes]
    assert wired(graph, "clinic-a", exchanges=True)["store"].proves is None


def test_cells_are_made_for_the_largest_message_of_a_step() -> None:
    graph = graph_of()
    limit = limits.cell_limit(graph.busiest)
    assert graph.busiest == 5  # clinic-a to b, each of three to the server, clinic-a to the store
    assert cell_limit_of(graph) == limit
    rows = 16  # half a batch
    labels = limits.fixed_cell(rows * 64 * 8, limit)  # the largest, though they only go one way
    assert cell_of(graph) == labels
    for party in ("clinic-a", "server"):  # the same between all ends, those that hand weights on, too
        assert {one.cell for one in wired(graph, party).values() if one.routes} == {labels}
    exchange = limits.fixed_cell(graph.exchanges[0].max_bytes, limit)
    assert {one.cell for one in wired(graph, "store", exchanges=True).values() if one.routes} == {exchange} != {labels}
    padme = graph_of(GRAPH + "circuits: {padding: padme}\n")
    assert {one.cell for one in wired(padme, "clinic-a").values()} == {None}


def test_a_key_that_is_missing_is_told_with_its_line() -> None:
    graph = parse_graph(GRAPH)
    with pytest.raises(GraphError, match="party 'clinic-a' has no key") as caught:
        keys_of(graph)
    assert caught.value.line == 4
    graph = graph.with_keys({name: public_text(PUBLIC[name]) for name in graph.parties}, {})
    with pytest.raises(GraphError, match="the anonymous group 'clinics' has no key") as caught:
        peers_of(graph, "relay-1")
    assert caught.value.line == 12
    assert "splitsec keys new clinics" in caught.value.fix
    assert keys_of(graph_of()) == {**{name: PUBLIC[name] for name in graph.parties}, "clinics": PUBLIC["clinics"]}
    assert set(keys_of(graph_of(plain()))) == set(graph.parties)
    assert parse_public(graph.parties["server"].key or "") == PUBLIC["server"]


def test_a_member_without_its_group_s_key_is_not_wired() -> None:
    graph = graph_of()
    with pytest.raises(InternalError, match="clinic-b must speak for its group clinics"):
        peers_of(graph, "clinic-b", make_plan(graph, "clinic-b"))
    assert peers_of(graph, "server", make_plan(graph, "server"))


def test_wiring_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, splitsec.wiring; print(sorted({'torch', 'numpy', 'zmq'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
