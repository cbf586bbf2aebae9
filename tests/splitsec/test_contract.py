"""The contract: the digest changes with every value of the graph file, and with nothing else."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import pytest
import yaml

from splitsec.contract import canonical_bytes, digest
from splitsec.errors import GraphError
from splitsec.graph import Graph, parse_graph

FULL = """\
splitsec: 1
name: full
parties:
  clinic-a: {key: "x25519:CQEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}
  clinic-b: {key: "x25519:CQIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}
  server:
    key: "x25519:CQMAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
    listen: "tcp://0.0.0.0:7400"
    address: "tcp://server.example.org:7400"
  relay-1: {key: "x25519:CQQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", listen: "tcp://relay-1.example.org:7400"}
  relay-2: {key: "x25519:CQUAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", listen: "tcp://relay-2.example.org:7400"}
groups:
  clinics: {members: [clinic-a, clinic-b], schedule: round_robin}
segments:
  stem: {at: clinics, data: x}
  side: {at: clinics, data: x2}
  trunk: {at: server, loss: cross_entropy, loss_weight: 0.5, join: arguments}
cuts:
  - {from: stem, to: trunk, shape: [32, 7, 7], dtype: float32, output: main}
  - {from: side, to: trunk, shape: [8, 7, 7], dtype: float32}
labels:
  - {from: clinics, to: trunk, field: y, shape: [], dtype: int64}
exchanges:
  - {name: histogram, from: clinic-a, to: server, shape: [null, 16], dtype: float32, max_bytes: 4096}
routes:
  - {from: clinics, to: server, via: [relay-1, relay-2]}
  - {cut: [side, trunk], via: [relay-2, relay-1]}
circuits: {padding: fixed, cover: 0.5}
training: {epochs: 5, batch_size: 64, micro_batches: 4, seed: 7, drop_last: true, decoys: 50}
timeouts: {connect: 60, lost: 20, gone: 90}
post_quantum: true
"""

Keys = tuple[str | int, ...]


def leaves(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(one, (*keys, key))
    else:
        yield keys, value


def variants(value: Any) -> Iterator[Any]:
    """``value`` with one character changed, added or removed, in ways of which some stay valid."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, value * 10)
        yield struct.unpack(">d", (struct.unpack(">Q", struct.pack(">d", value))[0] + 1).to_bytes(8, "big"))[0]
    elif value is None:
        yield 1
    else:
        text = str(value)
        for at in range(len(text)):
            yield text[:at] + text[at + 1 :]
            yield text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :]
        yield text + "x"
        yield text + "1"
        yield from {"float32": ["float64"], "float16": ["float32"], "int64": ["float32"], "arguments": ["concat"]}.get(
            text, []
        )
        yield from {"round_robin": ["parallel"], "cross_entropy": ["nll", "custom"], "fixed": ["padme"]}.get(text, [])


def test_the_bytes_are_those_that_the_documentation_spells() -> None:
    graph = parse_graph(
        'splitsec: 1\nname: two\nparties: {b: {}, a: {listen: "ipc:///run/é"}}\n'
        "exchanges: [{name: sums, from: b, to: a, shape: [null], dtype: bool}]\n"
    )
    assert canonical_bytes(graph).decode() == (
        '{"circuits":{"cover":null,"padding":"fixed"},"cuts":[],'
        '"exchanges":[{"dtype":"bool","from":"b","max_bytes":67108864,"name":"sums","shape":[null],"to":"a"}],'
        '"groups":[],"labels":[],"name":"two",'
        '"parties":[["b",{"address":null,"key":null,"listen":null}],'
        '["a",{"address":null,"key":null,"listen":"ipc:///run/é"}]],'
        '"post_quantum":true,"privacy":{"when_spent":"end"},"routes":[],"segments":[],"splitsec":1,'
        '"timeouts":{"answer":"408c200000000000","connect":"404e000000000000","gone":"404e000000000000","lost":"4034000000000000"},'
        '"training":{"batch_size":64,"decoys":100,"drop_last":false,"epochs":1,"micro_batches":1,"seed":0}}'
    )
    assert digest(graph) == sha256(canonical_bytes(graph)).digest()


@pytest.mark.threat("T41", "T92")
def test_every_value_that_a_character_changes_changes_the_digest() -> None:
    values = yaml.safe_load(FULL)
    seen = {digest(Graph.model_validate(values)): "the graph itself"}
    tried: dict[Keys, int] = {}
    for keys, value in leaves(values):
        for variant in variants(value):
            other = copy.deepcopy(values)
            at = other
            for key in keys[:-1]:
                at = at[key]
            at[keys[-1]] = variant
            try:
                graph = Graph.model_validate(other)
            except (GraphError, ValueError):
                continue  # not a graph at all: such a file is refused before anything is compared
            what = f"{keys}: {variant!r}"
            assert seen.setdefault(digest(graph), what) == what
            tried[keys] = tried.get(keys, 0) + 1
    places = {"at", "from", "to", "cut", "via", "members", "splitsec"}  # names: changed together, in the next test
    untried = [keys for keys, _ in leaves(values) if keys not in tried and not places & set(keys)]
    assert untried == []
    assert len(seen) > 150


@pytest.mark.parametrize("name", ["clinic-a", "server", "relay-1", "clinics", "stem", "trunk", "histogram", "full"])
def test_every_name_counts(name: str) -> None:
    renamed = FULL.replace(f"{name}:", f"{name}x:").replace(f"{name},", f"{name}x,").replace(f"{name}]", f"{name}x]")
    renamed = renamed.replace(f"name: {name}\n", f"name: {name}x\n")
    assert digest(parse_graph(renamed)) != digest(parse_graph(FULL))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("members: [clinic-a, clinic-b]", "members: [clinic-b, clinic-a]"),
        (
            "  stem: {at: clinics, data: x}\n  side: {at: clinics, data: x2}",
            "  side: {at: clinics, data: x2}\n  stem: {at: clinics, data: x}",
        ),
        ("shape: [32, 7, 7]", "shape: [7, 32, 7]"),
        (
            "{from: clinics, to: server, via: [relay-1, relay-2]}\n  - {cut: [side, trunk], via: [relay-2, relay-1]}",
            "{cut: [side, trunk], via: [relay-2, relay-1]}\n  - {from: clinics, to: server, via: [relay-1, relay-2]}",
        ),
        ("{cut: [side, trunk], via: [relay-2, relay-1]}", "{cut: [side, trunk], via: [relay-2]}"),
    ],
)
def test_order_counts_where_it_means_something(old: str, new: str) -> None:
    assert old in FULL
    assert digest(parse_graph(FULL.replace(old, new))) != digest(parse_graph(FULL))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: full", "name:   'full'   # a comment"),
        ("{at: clinics, data: x}", "{data: x, at: clinics}"),
        ("{at: clinics, data: x}", "{at: clinics, data: x, join: concat, loss_weight: 1.0}"),
        ("connect: 60", "connect: 60.0"),
        ("post_quantum: true\n", ""),
        ("post_quantum: true", "post_quantum: True"),
        ("epochs: 5", "epochs: 0x5"),
        ("schedule: round_robin", "schedule: round_robin, key: null, pseudonym: turn"),
        ("{cut: [side, trunk],", "{cut: [side, trunk], from: null, to: null,"),
        ("padding: fixed, ", ""),
        ("splitsec: 1\nname: full\n", "name: full\nsplitsec: 1\n"),
        ("\n", "\r\n"),
    ],
)
def test_layout_does_not_count(old: str, new: str) -> None:
    assert old in FULL
    assert digest(parse_graph(FULL.replace(old, new))) == digest(parse_graph(FULL))


HIDDEN = """\
splitsec: 1
name: hidden
parties:
  clinic-a: {}
  clinic-b: {}
  relay: {listen: "tcp://relay.example.org:7400"}
  server: {listen: "tcp://server.example.org:7400"}
groups:
  clinics: {members: [clinic-a, clinic-b], schedule: round_robin}
segments: {stem: {at: clinics, data: x}, trunk: {at: server, loss: mse}}
cuts: [{from: stem, to: trunk, shape: [4], dtype: float32, anonymous: true}]
labels: [{from: clinics, to: trunk, dtype: float32}]
routes: [{from: clinics, to: server, via: [relay]}]
"""


def test_all_that_makes_a_group_anonymous_counts() -> None:
    keyed = [
        HIDDEN.replace("round_robin", f'round_robin, key: "x25519:CQ{letter}AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="')
        for letter in "EI"
    ]
    variants = [
        HIDDEN,
        HIDDEN.replace(", anonymous: true", ""),
        HIDDEN.replace("round_robin", "round_robin, pseudonym: epoch"),
        *keyed,
    ]
    assert len({digest(parse_graph(one)) for one in variants}) == len(variants)
    said = canonical_bytes(parse_graph(HIDDEN)).decode()
    assert '"cuts":[{"anonymous":true,' in said
    assert '"groups":[["clinics",{"key":null,"members":["clinic-a","clinic-b"],"pseudonym":"turn","sch' in said
    assert '"routes":[{"cut":null,"from":"clinics","to":"server","via":["relay"]}]' in said


def test_who_goes_without_ml_kem_holds_another_contract() -> None:
    """Also where neither file speaks of it: the default is in the bytes."""
    without = parse_graph(FULL.replace("post_quantum: true\n", ""))
    off = parse_graph(FULL.replace("post_quantum: true", "post_quantum: false"))
    assert b'"post_quantum":true,' in canonical_bytes(without)
    assert b'"post_quantum":false,' in canonical_bytes(off)
    assert digest(off) != digest(without) == digest(parse_graph(FULL))


def test_the_bytes_say_everything_that_the_graph_says() -> None:
    graph = parse_graph(FULL)
    values = json.loads(canonical_bytes(graph))
    for name in ("parties", "groups", "segments"):
        values[name] = dict(values[name])
    values["timeouts"] = {key: struct.unpack(">d", bytes.fromhex(one))[0] for key, one in values["timeouts"].items()}
    values["circuits"]["cover"] = struct.unpack(">d", bytes.fromhex(values["circuits"]["cover"]))[0]
    for segment in values["segments"].values():
        segment["loss_weight"] = struct.unpack(">d", bytes.fromhex(segment["loss_weight"]))[0]
    assert Graph.model_validate(values) == graph
