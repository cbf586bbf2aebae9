"""An anonymous group trains over real circuits to what it would train to if it were known, and nobody outside meets a
name of it.

Here: three clinics, two relays and a server, one process each, with a key of the group that the test holds: so it can
say which clinic worked when.  A run in which nobody is hidden, its group in that order, is the reference.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import pytest
import torch
from safetensors.torch import load_file

from splitsec.errors import GraphError, PartyFileError
from splitsec.graph import Graph
from splitsec.identity import public_of, public_text
from splitsec.nest import Forked, Nest
from splitsec.party import Job, Party
from splitsec.partyfile import load_folder, load_party
from splitsec.samples import epoch_order
from splitsec.schedule import EVALUATE, TRAIN, Turn
from splitsec.simulation import simulate
from splitsec.trace import SUFFIX
from splitsec.transports.iothread import CloseCode
from splitsec.turns import Secret
from tests.conftest import PATIENCE, free_port, replaced

CLINICS: Final = ("clinic-a", "clinic-b", "clinic-c")
RELAYS: Final = ("relay-1", "relay-2")

GRAPH: Final = """\
splitsec: 1
name: hidden
parties:
  clinic-a: {}
  clinic-b: {}
  clinic-c: {}
  relay-1: {listen: "tcp://0.0.0.0:7401", address: "tcp://relay-1.example.org:7401"}
  relay-2: {listen: "tcp://0.0.0.0:7402", address: "tcp://relay-2.example.org:7402"}
  server: {listen: "tcp://0.0.0.0:7400", address: "tcp://server.example.org:7400"}
groups:
  clinics: {members: [clinic-a, clinic-b, clinic-c], schedule: round_robin, pseudonym: turn}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [8], dtype: float32, anonymous: true}
labels:
  - {from: clinics, to: trunk}
routes:
  - {from: clinics, to: server, via: [relay-1, relay-2]}
  - {from: clinics, to: clinics, via: [relay-1]}
training: {epochs: 1, batch_size: 8, micro_batches: 2, seed: 7}
timeouts: {connect: 60, lost: 10}
"""
TRUNK: Final = "trunk: {at: server}\n  middle: {at: auditor}\n  head: {at: clinics, loss: cross_entropy}"
CUTS: Final = """cuts:
  - {from: trunk, to: middle, shape: [3], dtype: float32}
  - {from: middle, to: head, shape: [5], dtype: float32ANONYMOUS}"""
KNOWN: Final = """\
splitsec: 1
name: known
parties:
  clinic-a: {}
  clinic-b: {}
  clinic-c: {}
  server: {listen: "tcp://0.0.0.0:7400", address: "tcp://server.example.org:7400"}
groups:
  clinics: {members: [MEMBERS], schedule: round_robin}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [8], dtype: float32}
labels:
  - {from: clinics, to: trunk}
training: {epochs: 1, batch_size: 8, micro_batches: 2, seed: 7}
"""
AUDITOR: Final = (
    (
        "  server: {",
        '  auditor: {listen: "tcp://0.0.0.0:7403", address: "tcp://auditor.example.org:7403"}\n  server: {',
    ),
    ("trunk: {at: server, loss: cross_entropy}", TRUNK),
    ("cuts:", CUTS),
    ("{from: clinics, to: trunk}", "{from: clinics, to: head}"),
)
"""Around by way of two far ends, of whom one hears from the group only what it answers to."""
MODELS: Final = """\
from torch import nn


def middle():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh())


def head():
    return nn.Linear(5, 3)


def stem():
    return nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(1, 8), nn.ReLU(), nn.Dropout(0.2))


def trunk():
    return nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 3))
"""
DATA: Final = """\
import torch


def samples(site, count):
    generator = torch.Generator().manual_seed(site)
    x = torch.randn(count, 6, generator=generator)
    return {"x": x, "y": x[:, :3].argmax(1)}


def train(site, rows=None):
    every = samples(site, 21 + 4 * site)
    return every if rows is None else {name: tensor[rows] for name, tensor in every.items()}


def test(site, rows=None):
    return samples(100 + site, 9 + site)
"""
TRAINED, TESTED = 21, 9
"""Samples that the first clinic has; the others have more."""
PARTY: Final = """\
party: {}
threads: 1
segments:
"""
SEGMENT: Final = """\
  {0}: {{model: "models:{0}", optimizer: {{name: adam, lr: 0.01}}}}
"""


def write(folder: Path, graph: str, rows: Mapping[str, list[int]] | None = None) -> Path:
    """A folder to train.  ``rows``: those of its training samples that a clinic uses, in this order."""
    parties = folder / "parties"
    parties.mkdir(parents=True)
    (folder / "graph.yaml").write_text(graph)
    (parties / "models.py").write_text(MODELS)
    (parties / "data.py").write_text(DATA)
    for name, segments in held(graph).items():
        text = PARTY.format(name) + "".join(SEGMENT.format(segment) for segment in segments)
        if name in CLINICS:
            site = CLINICS.index(name)
            chosen = "" if rows is None else f", rows: {rows[name]}"
            text += f'data: {{train: "data:train", test: "data:test", args: {{site: {site}{chosen}}}}}\n'
        (parties / f"{name}.yaml").write_text(text)
    return folder


def held(graph: str) -> dict[str, tuple[str, ...]]:
    """The segments of each party that trains."""
    if "auditor" not in graph:
        return {**dict.fromkeys(CLINICS, ("stem",)), "server": ("trunk",)}
    return {**dict.fromkeys(CLINICS, ("stem", "head")), "server": ("trunk",), "auditor": ("middle",)}


# --- processes


@dataclass(frozen=True)
class Ran:
    """What came of a training."""

    graph: Graph
    group_key: bytes
    events: Mapping[str, list[dict[str, Any]]]
    traces: Path

    @property
    def secret(self) -> Secret:
        """What the clinics shared."""
        (run,) = {event["run"] for name in CLINICS for event in self.events[name] if event["event"] == "agreed"}
        return Secret(self.group_key, bytes.fromhex(run), len(CLINICS))

    def turns(self, clinic: str) -> list[tuple[str, int, int]]:
        """Phase, epoch and stream of each turn of ``clinic``."""
        found = [event for event in self.events[clinic] if event["event"] == "turn"]
        return [(one["phase"], one["epoch"], one["streams"][0]) for one in found]

    def trace(self, party: str) -> list[dict[str, Any]]:
        """What passed the door of ``party``, line by line."""
        return [json.loads(line) for line in (self.traces / f"{party}{SUFFIX}").read_text().splitlines()]


def text(key: bytes) -> str:
    return base64.b64encode(key).decode()


def train(folder: Path, out: Path, nest: Nest) -> Ran:
    """Train ``folder``, a process each, with keys made here, and wait for the end."""
    assert nest.wait(PATIENCE)
    loaded = load_folder(folder)
    keys = {name: os.urandom(32) for name in (*loaded.graph.parties, "clinics")}
    listening = [name for name, party in loaded.graph.parties.items() if party.listen is not None]
    addresses = {name: f"tcp://127.0.0.1:{free_port()}" for name in listening}
    graph = loaded.graph.with_keys(
        {name: public_text(public_of(key)) for name, key in keys.items()},
        {name: (address, address) for name, address in addresses.items()},
    )
    traces = out.with_name(f"{out.name}-traces")
    traces.mkdir(parents=True)
    shared = {"graph": graph.model_dump(by_alias=True, mode="json"), "graph_file": str(folder / "graph.yaml")}
    job = {"action": "train", "out": str(out), "weights": None, "split": "train", "trace": str(traces), "state": None}
    processes: list[Forked] = []
    said: queue.SimpleQueue[tuple[str, dict[str, Any] | None]] = queue.SimpleQueue()

    def start(module: str, name: str, **more: Any) -> Forked:
        process = nest.start([module, name], stderr=2, environment=os.environ)
        processes.append(process)
        process.stdin.write(json.dumps({**shared, "party": name, "key": text(keys[name]), **more}).encode() + b"\n")
        process.stdin.flush()
        threading.Thread(target=listen, args=(name, process.stdout), daemon=True).start()
        return process

    def listen(name: str, lines: IO[bytes]) -> None:
        for line in lines:
            said.put((name, json.loads(line)))
        said.put((name, None))

    def follow(names: set[str], last: str) -> None:
        """Take events until each of ``names`` has said ``last``."""
        while names:
            name, event = said.get(timeout=PATIENCE)
            if event is None and name not in names:
                continue  # it said its last word, and ended
            assert event is not None and event["event"] != "failed", (name, event, dict(events))
            events[name].append(event)
            if event["event"] == last:
                names = names - {name}

    events: dict[str, list[dict[str, Any]]] = defaultdict(list)
    try:
        for name in RELAYS:
            start("splitsec.relay", name)
        follow(set(RELAYS), "relays")
        parties = {}
        for name, party_file in loaded.parties.items():
            group_key = text(keys["clinics"]) if name in CLINICS else None
            more = {"party_file": str(party_file.file), "threads": 1, "pause_at_turns": False, "job": job}
            parties[name] = start("splitsec.process", name, group_key=group_key, **more)
        follow(set(parties), "ready")
        for process in parties.values():
            process.stdin.write(b"go\n")
            process.stdin.flush()
        follow(set(parties), "done")
        for process in parties.values():
            assert process.wait(PATIENCE) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
    return Ran(graph, keys["clinics"], events, traces)


def assert_equal(one: Path, other: Path) -> None:
    """Two trained segments hold the same tensors, to the last bit."""
    mine, theirs = load_file(one), load_file(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


# --- what is trained, and who sees what


@pytest.mark.parametrize("around", [False, True], ids=["one far end", "around by way of two"])
def test_what_a_hidden_group_trains_is_what_it_would_train_if_it_were_known(
    around: bool, nest: Nest, tmp_path: Path
) -> None:
    """The reference has clinics in the secret order of the epoch, and at each the samples that it took, so laid that
    the order of a known group, which follows from the seed, takes them alike.
    """
    graph, known = GRAPH, KNOWN
    if around:
        route = "  - {from: clinics, to: auditor, via: [relay-2, relay-1]}\n"
        graph = replaced(graph, *AUDITOR, ("ANONYMOUS", ", anonymous: true"), ("routes:\n", f"routes:\n{route}"))
        graph = replaced(graph, ("pseudonym: turn", "pseudonym: epoch"))
        known = replaced(known, *AUDITOR, ("ANONYMOUS", ""))
    ran = train(write(tmp_path / "hidden", graph), tmp_path / "out", nest)
    order = ran.secret.order(0)
    taken: dict[str, list[int]] = {}
    for stream, member in enumerate(order):
        mine = ran.secret.rows("train", 0, stream, 21 + 4 * member)[:TRAINED]
        place = epoch_order(7, 0, stream, TRAINED).tolist()
        taken[CLINICS[member]] = [row for _, row in sorted(zip(place, mine, strict=True))]
    known = known.replace("MEMBERS", ", ".join(CLINICS[member] for member in order))
    simulate(write(tmp_path / "known", known, taken), out=tmp_path / "reference")
    for party, segments in held(graph).items():
        for segment in segments:
            file = f"{party}/{segment}.safetensors"
            assert_equal(tmp_path / "out" / file, tmp_path / "reference" / file)

    for member, clinic in enumerate(CLINICS):
        stream = order.index(member)
        assert ran.turns(clinic) == [("train", 0, stream), ("evaluate", 0, stream)]
        warned = [event["text"] for event in ran.events[clinic] if event["event"] == "warning"]
        assert any(f"{4 * member} of {21 + 4 * member} train" in one for one in warned) == (member > 0)
    (counts,) = [event["counts"] for event in ran.events["server"] if event["event"] == "agreed"]
    assert counts == [{"train": TRAINED, "test": TESTED, "predict": 0}] * 3


@pytest.mark.threat("T78", "T79", "T81")
@pytest.mark.parametrize("pseudonym", ["turn", "epoch"])
def test_the_server_meets_the_group_and_nobody_of_it(pseudonym: str, nest: Nest, tmp_path: Path) -> None:
    """Two epochs: turns change, every turn (or epoch) has channels of its own, and all streams look alike."""
    graph = replaced(GRAPH, ("pseudonym: turn", f"pseudonym: {pseudonym}"), ("epochs: 1", "epochs: 2"))
    ran = train(write(tmp_path / "hidden", graph), tmp_path / "out", nest)
    for clinic in CLINICS[1:]:
        assert_equal(tmp_path / "out" / "clinic-a" / "stem.safetensors", tmp_path / "out" / clinic / "stem.safetensors")

    lines = ran.trace("server")
    met = [line for line in lines if "peer" in line]
    assert {line["peer"] for line in met} == {"clinics"}
    assert not any(clinic in json.dumps(line) for line in lines[1:] for clinic in CLINICS)
    (agreed,) = [event for event in ran.events["server"] if event["event"] == "agreed"]
    told = [event for event in ran.events["server"] if event["event"] != "saved"]
    assert not any(clinic in json.dumps(told) for clinic in CLINICS)
    assert "run" not in agreed

    # The first turn of an epoch and the last are one clinic's; evaluation begins with whoever trained last.
    opened = sum(line.get("event") == "opened" for line in lines)
    assert opened == (12 if pseudonym == "turn" else 6)
    looks: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    for line in met:
        if line.get("kind") not in (None, "control"):
            epoch, step = divmod(line["key"][0], 15)  # three turns of 3 steps, then three of 2
            turn = step // 3 if step < 9 else 3 + (step - 9) // 2
            looks[epoch, turn][str([line[name] for name in ("dir", "kind", "header", "body", "tensors")])] += 1
    assert len(looks) == 12
    for phase in (range(3), range(3, 6)):
        first, *others = [looks[epoch, turn] for epoch in range(2) for turn in phase]
        assert all(one == first for one in others)
    for clinic in CLINICS:
        stream = {epoch: ran.secret.order(epoch).index(CLINICS.index(clinic)) for epoch in range(2)}
        assert ran.turns(clinic) == [
            (phase, epoch, stream[epoch]) for epoch in range(2) for phase in ("train", "evaluate")
        ]


# --- before anything is opened


def made(
    folder: Path, party: str, *, job: Job | None = None, group_key: bytes | None = None
) -> tuple[Party, list[dict[str, Any]]]:
    """``party`` before it connects, and what it told; the group's key is made of g."""
    loaded = load_folder(folder).graph
    keys = {**{name: os.urandom(32) for name in loaded.parties}, "clinics": b"g" * 32}
    graph = loaded.with_keys({name: public_text(public_of(key)) for name, key in keys.items()}, {})
    file = load_party(folder / "parties" / f"{party}.yaml")
    told: list[dict[str, Any]] = []
    one = Party(graph, file, private_key=keys[party], job=job or Job(), report=told.append, group_key=group_key)
    one.close(CloseCode.NORMAL)
    return one, told


def test_no_two_turns_have_their_samples_in_one_order(tmp_path: Path) -> None:
    """Nor in one that the seed gives, nor as they lie there: the labels of a turn would show where they came before."""
    party, _ = made(write(tmp_path / "hidden", GRAPH), "clinic-c", group_key=b"g" * 32)
    party.secret = Secret(b"g" * 32, b"r" * 32, 3)
    rows = {split: torch.arange(one.count) for split, one in party.own.items()}
    party.rows = {stream: rows for stream in range(3)}
    party.counts = [{"train": TRAINED, "test": TESTED, "predict": 0}] * 3
    for phase, split, used in ((TRAIN, "train", TRAINED), (EVALUATE, "test", TESTED)):
        held = party.own[split].count
        assert held > used
        orders = {tuple(range(used))}
        for epoch in range(20):
            for stream in range(3):
                order = party._order_of(Turn(phase, epoch, (stream,)), stream).tolist()
                assert len(set(order)) == used and set(order) <= set(range(held))
                assert order != epoch_order(7, epoch, stream, held).tolist()[:used]
                orders.add(tuple(order))
        assert len(orders) == 61
        assert set().union(*orders) == set(range(held)), "over the epochs all have their turn"


@pytest.mark.threat("T87")
def test_a_prediction_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "hidden", GRAPH)
    for party in ("clinic-a", "server"):
        with pytest.raises(GraphError, match="a prediction, where the group `clinics` is anonymous"):
            made(folder, party, job=Job(action="predict", split="test"), group_key=b"g" * 32)


def test_a_member_without_the_key_of_its_group_or_with_another(tmp_path: Path) -> None:
    folder = write(tmp_path / "hidden", GRAPH)
    with pytest.raises(PartyFileError, match="whose private key it was not given"):
        made(folder, "clinic-b")
    with pytest.raises(GraphError, match="the private key of the group `clinics` that 'clinic-b' holds is not that of"):
        made(folder, "clinic-b", group_key=b"h" * 32)


@pytest.mark.threat("T86")
def test_a_policy_of_ones_own_is_warned_of(tmp_path: Path) -> None:
    folder = write(tmp_path / "hidden", GRAPH)
    own = "privacy: {cuts: [{from: stem, to: trunk, forward: {clip: 1.0}}]}\n"
    file = folder / "parties" / "clinic-b.yaml"
    file.write_text(file.read_text() + own)
    for party, warned in (("clinic-a", False), ("clinic-b", True)):
        _, told = made(folder, party, group_key=b"g" * 32)
        assert any("may tell which of them we are" in event.get("text", "") for event in told) == warned
