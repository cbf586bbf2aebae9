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
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import pytest
import torch
from safetensors.torch import load_file

from splitsec.contract import digest
from splitsec.errors import GraphError, PartyFileError
from splitsec.graph import Graph
from splitsec.identity import public_of, public_text
from splitsec.party import Job, run_party
from splitsec.partyfile import load_folder, load_party
from splitsec.plan import make_plan
from splitsec.samples import epoch_order
from splitsec.simulation import simulate
from splitsec.trace import SUFFIX
from splitsec.turns import Secret
from tests.conftest import PATIENCE, SOURCE, free_port, replaced

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
MODELS: Final = """\
from torch import nn


def stem():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))


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
party: NAME
threads: 1
segments:
  SEGMENT: {model: "models:SEGMENT", optimizer: {name: adam, lr: 0.01}}
"""


def write(folder: Path, graph: str, rows: Mapping[str, list[int]] | None = None) -> Path:
    """A folder to train.  ``rows``: those of its training samples that a clinic uses, in this order."""
    parties = folder / "parties"
    parties.mkdir(parents=True)
    (folder / "graph.yaml").write_text(graph)
    (parties / "models.py").write_text(MODELS)
    (parties / "data.py").write_text(DATA)
    (parties / "server.yaml").write_text(PARTY.replace("NAME", "server").replace("SEGMENT", "trunk"))
    for site, name in enumerate(CLINICS):
        chosen = "" if rows is None else f", rows: {rows[name]}"
        data = f'data: {{train: "data:train", test: "data:test", args: {{site: {site}{chosen}}}}}\n'
        (parties / f"{name}.yaml").write_text(PARTY.replace("NAME", name).replace("SEGMENT", "stem") + data)
    return folder


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


def train(folder: Path, out: Path) -> Ran:
    """Train ``folder``, a process each, with keys made here, and wait for the end."""
    loaded = load_folder(folder)
    keys = {name: os.urandom(32) for name in (*loaded.graph.parties, "clinics")}
    addresses = {name: f"tcp://127.0.0.1:{free_port()}" for name in (*RELAYS, "server")}
    graph = loaded.graph.with_keys(
        {name: public_text(public_of(key)) for name, key in keys.items()},
        {name: (address, address) for name, address in addresses.items()},
    )
    traces = out.with_name(f"{out.name}-traces")
    traces.mkdir(parents=True)
    shared = {"graph": graph.model_dump(by_alias=True, mode="json"), "graph_file": str(folder / "graph.yaml")}
    job = {"action": "train", "out": str(out), "weights": None, "split": "train", "trace": str(traces), "state": None}
    processes: list[subprocess.Popen[str]] = []
    said: queue.SimpleQueue[tuple[str, dict[str, Any] | None]] = queue.SimpleQueue()

    def start(module: str, name: str, **more: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)},
        )
        processes.append(process)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({**shared, "party": name, "key": text(keys[name]), **more}) + "\n")
        process.stdin.flush()
        threading.Thread(target=listen, args=(name, process.stdout), daemon=True).start()
        return process

    def listen(name: str, lines: IO[str]) -> None:
        for line in lines:
            said.put((name, json.loads(line)))
        said.put((name, None))

    def follow(names: set[str], last: str) -> None:
        """Take events until each of ``names`` has said ``last``."""
        while names:
            name, event = said.get(timeout=PATIENCE)
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
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        follow(set(parties), "done")
        for process in parties.values():
            assert process.wait(PATIENCE) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
    return Ran(graph, keys["clinics"], events, traces)


def assert_equal(one: Path, other: Path) -> None:
    """Two trained segments hold the same tensors, to the last bit."""
    mine, theirs = load_file(one), load_file(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


# --- what is trained, and who sees what


def test_what_a_hidden_group_trains_is_what_it_would_train_if_it_were_known(tmp_path: Path) -> None:
    """The reference has clinics in the secret order of the epoch, and at each the samples that it took, so laid that
    the order of a known group, which follows from the seed, takes them alike.
    """
    ran = train(write(tmp_path / "hidden", GRAPH), tmp_path / "out")
    order = ran.secret.order(0)
    taken: dict[str, list[int]] = {}
    for stream, member in enumerate(order):
        mine = ran.secret.rows("train", 0, stream, 21 + 4 * member)[:TRAINED]
        place = epoch_order(7, 0, stream, TRAINED).tolist()
        taken[CLINICS[member]] = [row for _, row in sorted(zip(place, mine, strict=True))]
    known = KNOWN.replace("MEMBERS", ", ".join(CLINICS[member] for member in order))
    simulate(write(tmp_path / "known", known, taken), out=tmp_path / "reference")
    for place in (*(f"{name}/stem" for name in CLINICS), "server/trunk"):
        file = f"{place}.safetensors"
        assert_equal(tmp_path / "out" / file, tmp_path / "reference" / file)

    for member, clinic in enumerate(CLINICS):
        stream = order.index(member)
        assert ran.turns(clinic) == [("train", 0, stream), ("evaluate", 0, stream)]
        warned = [event["text"] for event in ran.events[clinic] if event["event"] == "warning"]
        assert any(f"{4 * member} of {21 + 4 * member} train" in one for one in warned) == (member > 0)
    (counts,) = [event["counts"] for event in ran.events["server"] if event["event"] == "agreed"]
    assert counts == [{"train": TRAINED, "test": TESTED, "predict": 0}] * 3


@pytest.mark.parametrize("pseudonym", ["turn", "epoch"])
def test_the_server_meets_the_group_and_nobody_of_it(pseudonym: str, tmp_path: Path) -> None:
    """Two epochs: turns change, every turn (or epoch) has channels of its own, and all streams look alike."""
    graph = replaced(GRAPH, ("pseudonym: turn", f"pseudonym: {pseudonym}"), ("epochs: 1", "epochs: 2"))
    ran = train(write(tmp_path / "hidden", graph), tmp_path / "out")
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
    sizes: dict[tuple[int, int], Counter[tuple[Any, ...]]] = defaultdict(Counter)
    for line in met:
        if line.get("kind") not in (None, "control"):
            step = line["key"][0]
            turn = step // 3 if step % 15 < 9 else step // 2  # two epochs of three turns of 3 steps, and three of 2
            sizes[step // 15, turn][line["kind"], line["body"], json.dumps(line["tensors"]), line["dir"]] += 1
    for epoch in range(2):
        seen = [found for (where, _), found in sorted(sizes.items()) if where == epoch]
        assert seen, "a test that looks at nothing"
    for clinic in CLINICS:
        stream = {epoch: ran.secret.order(epoch).index(CLINICS.index(clinic)) for epoch in range(2)}
        assert ran.turns(clinic) == [
            (phase, epoch, stream[epoch]) for epoch in range(2) for phase in ("train", "evaluate")
        ]


# --- what is refused before anything is opened


def made(folder: Path, party: str, **more: Any) -> None:
    graph = load_folder(folder).graph.with_keys({"clinics": public_text(public_of(b"g" * 32))}, {})
    run_party(graph, load_party(folder / "parties" / f"{party}.yaml"), private_key=b"p" * 32, **more)


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


def test_a_policy_of_ones_own_is_warned_of(tmp_path: Path) -> None:
    folder = write(tmp_path / "hidden", GRAPH)
    own = "privacy: {cuts: [{from: stem, to: trunk, forward: {clip: 1.0}}]}\n"
    file = folder / "parties" / "clinic-b.yaml"
    file.write_text(file.read_text() + own)
    told: list[dict[str, Any]] = []
    with pytest.raises(GraphError, match="has no key"):
        made(folder, "clinic-b", group_key=b"g" * 32, report=told.append)
    assert any("may tell which of them we are" in event.get("text", "") for event in told)
