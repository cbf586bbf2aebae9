"""Privacy end to end: what was spent is never less than what left, and nothing leaves once the budget is spent.

Parties that join as processes, with a relay between them that counts activations on the wire; where no wire is needed,
parties in threads of this process, whose I/O threads tell what they were handed.  Not here: each part by itself
(``tests/privacy``, ``tests/splitsec``), and the long version of the kills (``make kills``).
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter as Tally
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch

from splitsec import journal
from splitsec.errors import BelowFloor, PartyFileError, SplitsecError, UnsafeSegment
from splitsec.graph import load_graph
from splitsec.identity import read_key
from splitsec.messages import Message, decode
from splitsec.party import Job, run_party
from splitsec.partyfile import load_folder, load_party
from splitsec.privacy import ledger
from splitsec.probe import probe
from splitsec.transports.iothread import IOThread
from tests.conftest import Command, Shell, change, free_port
from tests.kills import Counter, Kills, Nursery, write_private

FLOOR = "privacy: {forward: {clip: 1.0, noise: gaussian, noise_multiplier: 2.0}}"
DELTA = 1e-5

PAIR = """\
splitsec: 1
name: private
parties:
  clinic: {{}}
  server: {{listen: "tcp://127.0.0.1:{here}", address: "tcp://127.0.0.1:{there}"}}
segments:
  stem: {{at: clinic, data: x}}
  trunk: {{at: server, loss: cross_entropy}}
cuts:
  - {{from: stem, to: trunk, shape: [64], dtype: float32, {privacy}}}
labels:
  - {{from: clinic, to: trunk}}
training: {{epochs: {epochs}, batch_size: {batch}, seed: 3}}
timeouts: {{connect: 60, lost: 20, gone: 20}}
"""

MODELS = """\
from torch import nn


def stem(inputs=40):
    return nn.Linear(inputs, 64)


def identity():
    return nn.Identity()


def averaged():
    return nn.Sequential(nn.Linear(40, 64), nn.BatchNorm1d(64))


def trunk():
    return nn.Linear(64, 4)
"""

DATA = """\
import torch


def samples(split, count, site=0, width=40, order=None, first=0):
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(100 * site + count))
    rows = range(count)
    if order is not None:
        rows = torch.randperm(count, generator=torch.Generator().manual_seed(order)).tolist()
    return {"id": [f"{site}-{split}-{first + row}" for row in rows], "x": x[list(rows)], "y": torch.zeros(count).long()}


def train(counts, **args):
    return samples("train", counts[0], **args)


def test(counts, **args):
    return samples("test", counts[1], **args)
"""

SERVER = """\
party: server
key_file: server.key
segments: {trunk: {model: "models:trunk", optimizer: {name: sgd, lr: 0.05}}}
threads: 1
"""


def clinic(
    name: str = "clinic",
    *,
    counts: tuple[int, int] = (20, 8),
    args: str = "",
    stem: str = 'model: "models:stem"',
    lr: float = 0.05,
    privacy: str = "",
) -> str:
    """A clinic's file: so many samples to train on and to test with, and what it says about ``privacy``."""
    return f"""\
party: {name}
key_file: {name}.key
segments: {{stem: {{{stem}, optimizer: {{name: sgd, lr: {lr}}}}}}}
data: {{train: "data:train", test: "data:test", args: {{counts: [{counts[0]}, {counts[1]}]{args}}}}}
threads: 1
privacy: {{delta: 1.0e-5{privacy}}}
"""


def pair(
    folder: Path, file: str, *, privacy: str = FLOOR, epochs: int = 2, batch: int = 8, ports: tuple[int, int] = (0, 0)
) -> Path:
    """A folder with a clinic, whose party file is ``file``, and a server."""
    here = ports[0] or free_port()
    graph = PAIR.format(here=here, there=ports[1] or here, privacy=privacy, epochs=epochs, batch=batch)
    files = {"models.py": MODELS, "data.py": DATA, "clinic.yaml": file, "server.yaml": SERVER}
    return write_private(folder, graph, files, ["clinic", "server"])


def exact(mu: float) -> float:
    """Epsilon at ``DELTA`` of a Gaussian mechanism with this mu (Dong, Roth and Su 2022, corollary 1), by bisection."""
    cdf = NormalDist().cdf
    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        delta = cdf(mu / 2 - middle / mu) - math.exp(middle) * cdf(-mu / 2 - middle / mu)
        low, high = (middle, high) if delta > DELTA else (low, middle)
    return high


def entries(shell: Shell, place: Path) -> list[dict[str, Any]]:
    """What ``splitsec ledger --json`` says."""
    end = shell.run("ledger", place, "--json")
    assert end.code == 0, end.stderr
    found: list[dict[str, Any]] = json.loads(end.stdout)["entries"]
    return found


def words(text: str) -> str:
    """What a terminal has broken into lines, in one."""
    return " ".join(text.split())


# --- in one process


@dataclass
class Run:
    """One run of all parties in threads: what each reported and was handed to its I/O thread, and how each ended."""

    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sent: dict[str, list[tuple[bytes, bytes]]] = field(default_factory=dict)
    """Header and body of each message, in order."""
    errors: dict[str, BaseException] = field(default_factory=dict)

    def messages(self, party: str, kind: str) -> list[Message]:
        """What ``party`` handed to its I/O thread, of one kind."""
        made = [decode(header, memoryview(bytearray(body))) for header, body in self.sent[party]]
        return [message for message in made if message.kind == kind]

    def warnings(self, party: str) -> list[str]:
        return [event["text"] for event in self.events[party] if event["event"] == "warning"]


Together = Callable[[Path], Run]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Together:
    """Runs a folder, as ``join`` would at each party."""
    runs: list[Run] = []

    send = IOThread.send

    def recording(thread: IOThread, peer: bytes, lane: int, header: bytes, body: Any = (), **more: Any) -> None:
        mine = runs[-1].sent[threading.current_thread().name]
        mine.append((header, b"".join(bytes(part) for part in body)))
        send(thread, peer, lane, header, body, **more)

    monkeypatch.setattr(IOThread, "send", recording)

    def run(folder: Path) -> Run:
        graph = load_graph(folder / "graph.yaml")
        runs.append(Run())
        threads = []
        for name in graph.parties:
            party = load_party(folder / "parties" / f"{name}.yaml")
            assert party.key_path is not None
            threads.append(_Party(runs[-1], graph, party, read_key(party.key_path)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        return runs[-1]

    return run


class _Party(threading.Thread):
    def __init__(self, run: Run, graph: Any, party: Any, key: bytes) -> None:
        super().__init__(name=party.party, daemon=True)
        self._run, self._graph, self._party, self._key = run, graph, party, key
        run.events[self.name] = []
        run.sent[self.name] = []

    def run(self) -> None:
        report = self._run.events[self.name].append
        try:
            run_party(self._graph, self._party, private_key=self._key, job=Job(journal=True), report=report)
        except SplitsecError as error:
            self._run.errors[self.name] = error


# --- killed


def test_killed_at_random_moments(shell: Shell, tmp_path: Path) -> None:
    """Four of the fifty of ``make kills``; then the training runs to its end."""
    kills = Kills(shell, tmp_path / "killed", seed=4)
    try:
        kills.at_random(4)
        kills.to_the_end()
    finally:
        kills.close()


@pytest.mark.threat("T97")
def test_killed_between_any_two_steps_of_a_release(shell: Shell, tmp_path: Path) -> None:
    """Before and after the budget is written, the journal is written, and the channel is given the tensor; in the
    middle of an entry; and where ledger and journal are made.
    """
    kills = Kills(shell, tmp_path / "killed", epochs=1)
    nursery = Nursery(kills)
    try:
        nursery.every_step((0, 1, 2, 4, 6, 7, 9))
        nursery.run()
        events = nursery.run()
        writes = [place for place, two in enumerate(pairwise(events)) if two == ("begin", "commit")]
        first = events.index("journal write activation")
        sent = events.index("sent activation")
        folded, spent = writes[0], max(place for place in writes if place < first)
        again = min(place for place in writes if place > sent)
        release = ["journal write activation", "journal pwrite", "send activation", "sent activation"]
        assert events[first : sent + 1] == release
        assert spent + 1 < first < sent < again
        nursery.every_step((spent, spent + 1, *range(first, sent + 1), sent + 1, again, again + 1, again + 2))
        nursery.every_step((folded, folded + 1, folded + 2, len(events) - 1))
        kills.to_the_end()
        assert kills.kills >= 20
    finally:
        nursery.close()
        kills.close()


# --- a budget


def relayed(place: Path, rows: Sequence[int], make: Callable[[int, int], Path]) -> tuple[Counter, Path]:
    """A relay that counts activations, and the folder that ``make`` writes for parties that talk through it."""
    here = free_port()
    wire = Counter(here, rows, large=5000)
    return wire, make(here, wire.port)


def join(shell: Shell, folder: Path, party: str) -> Command:
    """One party that joins."""
    return shell.start("join", "--graph", folder / "graph.yaml", "--party", party, OMP_NUM_THREADS="1")


@pytest.mark.threat("T97")
def test_nothing_leaves_once_the_budget_is_spent(shell: Shell, tmp_path: Path) -> None:
    """A budget of epsilon 3 lasts for two passes (2.94; a third would cost 3.71): the run ends for both, and the next
    one does not begin.
    """
    file = clinic(privacy=", epsilon: 3.0")
    wire, folder = relayed(
        tmp_path, (8, 4), lambda here, there: pair(tmp_path / "spent", file, epochs=5, ports=(here, there))
    )
    try:
        commands = {name: join(shell, folder, name) for name in ("server", "clinic")}
        for name, command in commands.items():
            end = command.end()
            assert end.code == 0, end.stderr
            said = words(end.stderr)
            assert f"{name}: the run ends after epoch 2 of 5: a privacy budget is spent" in said
            if name == "clinic":
                assert "the privacy budget lasts for 2 of 5 passes over the train samples and 2 of 5" in said
        wire.drained()
        assert wire.unknown == []
        assert wire.releases == [8, 8, 4, 8] * 2
        found = entries(shell, folder)
        assert sorted((one["dataset"].split("-")[0], one["releases"]) for one in found) == [("test", 2), ("train", 2)]
        assert all(one["epsilon"] <= one["epsilon_budget"] == 3.0 for one in found)

        calls = wire.connections
        server = join(shell, folder, "server")
        end = join(shell, folder, "clinic").end()
        assert end.code == 3
        assert "the privacy budget of clinic is spent: its train samples cannot be used once more" in end.stderr
        server.close()
        wire.drained()
        assert wire.connections == calls
        assert entries(shell, folder) == found
    finally:
        wire.close()


GROUP = """\
splitsec: 1
name: leaving
parties:
  large: {{}}
  small: {{}}
  server: {{listen: "tcp://127.0.0.1:{here}", address: "tcp://127.0.0.1:{there}"}}
groups:
  clinics: {{members: [large, small], schedule: {schedule}}}
segments:
  stem: {{at: clinics, data: x}}
  trunk: {{at: server, loss: cross_entropy}}
cuts:
  - {{from: stem, to: trunk, shape: [64], dtype: float32, {floor}}}
labels:
  - {{from: clinics, to: trunk}}
training: {{epochs: 4, batch_size: 8, seed: 3}}
privacy: {{when_spent: leave}}
timeouts: {{connect: 60, lost: 20, gone: 20}}
"""


def leaving(folder: Path, schedule: str, here: int, there: int) -> Path:
    """Two clinics; the small one's samples come in sixes and twos, and have a budget for two passes."""
    files = {
        "models.py": MODELS,
        "data.py": DATA,
        "server.yaml": SERVER,
        "large.yaml": clinic("large", counts=(16, 8)),
        "small.yaml": clinic("small", counts=(6, 2), args=", site: 1", privacy=", epsilon: 3.0"),
    }
    graph = GROUP.format(here=here, there=there, schedule=schedule, floor=FLOOR)
    return write_private(folder, graph, files, ["large", "small", "server"])


@pytest.mark.parametrize("schedule", ["round_robin", "parallel"])
def test_a_party_whose_budget_is_spent_leaves_and_the_others_go_on(shell: Shell, tmp_path: Path, schedule: str) -> None:
    wire, folder = relayed(
        tmp_path, (8, 6, 2), lambda here, there: leaving(tmp_path / "leaving", schedule, here, there)
    )
    try:
        commands = {name: join(shell, folder, name) for name in ("server", "large", "small")}
        for name, command in commands.items():
            end = command.end()
            assert end.code == 0, f"{name}: {end.stderr}"
            if name == "small":
                assert "then the run goes on without them" in words(end.stderr)
        wire.drained()
        assert all(1100 < size < 1500 for size in wire.unknown)  # the clinics' handshake, which the server forwards
        assert Tally(wire.releases) == {8: 4 * 3, 6: 2, 2: 2}
        assert wire.releases[-5:] == [8] * 5  # in parallel the large one may be a step ahead of the small one's last
        if schedule == "round_robin":
            assert wire.releases == [8, 8, 6, 2, 8] * 2 + [8, 8, 8] * 2
        spent = {(one["party"], one["dataset"].split("-")[0]): one["releases"] for one in entries(shell, folder)}
        assert spent == {("large", "train"): 4, ("large", "test"): 4, ("small", "train"): 2, ("small", "test"): 2}
    finally:
        wire.close()


# --- the figures


def in_threads(folder: Path, together: Together) -> Run:
    """A run of ``folder`` that must end well."""
    run = together(folder)
    assert run.errors == {}
    return run


@pytest.mark.parametrize("batch", [16, 64, 250])
def test_ten_epochs_cost_the_same_for_any_batch_size(
    shell: Shell, tmp_path: Path, together: Together, batch: int
) -> None:
    file = clinic(counts=(300, 20))
    folder = pair(tmp_path / "ten", file, epochs=10, batch=batch)
    in_threads(folder, together)
    found = entries(shell, folder)
    assert len(found) == 2
    for one in found:
        assert (one["party"], one["cut"], one["releases"]) == ("clinic", "stem -> trunk", 10)
        assert (one["noise_multiplier"], one["clip"], one["delta"]) == (2.0, 1.0, DELTA)
        assert one["epsilon_budget"] is None
        assert 7.511 <= one["epsilon"] <= 7.549
        assert exact(math.sqrt(10) / 2) <= one["epsilon"] <= 1.005 * exact(math.sqrt(10) / 2)


@pytest.mark.threat("T97")
def test_two_cuts_that_carry_the_same_record_add_up(shell: Shell, tmp_path: Path, together: Together) -> None:
    """Composed as twenty releases are, and not twice the cost of ten."""
    folder = pair(tmp_path / "two", clinic(counts=(300, 20)), epochs=10, batch=64)
    graph = folder / "graph.yaml"
    cut = f"  - {{from: stem, to: trunk, shape: [64], dtype: float32, {FLOOR}}}\n"
    change(
        graph,
        (cut, cut + cut.replace("trunk", "other")),
        ("segments:\n", "segments:\n  other: {at: server, loss: cross_entropy}\n"),
        ("labels:\n", "labels:\n  - {from: clinic, to: other}\n"),
    )
    trunk = '{model: "models:trunk", optimizer: {name: sgd, lr: 0.05}}'
    change(folder / "parties" / "server.yaml", (f"trunk: {trunk}", f"trunk: {trunk}, other: {trunk}"))
    in_threads(folder, together)
    found = entries(shell, folder)
    kept = sorted((one["cut"], one["dataset"].split("-")[0], one["releases"]) for one in found)
    assert kept == [(f"stem -> {to}", split, 10) for to in ("other", "trunk") for split in ("test", "train")]
    for one in found:
        assert exact(math.sqrt(20) / 2) <= one["epsilon"] <= 1.005 * exact(math.sqrt(20) / 2)
        assert one["epsilon"] < 12 < 2 * 7.511
        assert 7.511 <= one["epsilon_alone"] <= 7.549


@pytest.mark.threat("T97")
def test_what_was_spent_carries_over_from_run_to_run(shell: Shell, tmp_path: Path, together: Together) -> None:
    """Five epochs, and five more over the same samples in another order, cost what ten do; a third time half of them
    are others, and each is counted by its own id.
    """
    folder = pair(tmp_path / "twice", clinic(counts=(300, 20)), epochs=5, batch=64)
    in_threads(folder, together)
    before = entries(shell, folder)
    assert {one["releases"] for one in before} == {5}
    change(folder / "parties" / "clinic.yaml", ("[300, 20]}", "[300, 20], order: 9}"))
    in_threads(folder, together)
    found = entries(shell, folder)
    assert {one["dataset"] for one in found} == {one["dataset"] for one in before}
    for one in found:
        assert one["releases"] == 10
        assert one["samples"] == (300 if one["dataset"].startswith("train") else 20)
        assert 7.511 <= one["epsilon"] <= 7.549
    book = ledger.read(folder / "state" / "clinic" / "ledger.sqlite")
    (account,) = (one for one in book.accounts if one.protects == "inputs")  # labels left in the clear, on record too
    assert book.releases(account).tolist() == [10] * 320
    change(folder / "parties" / "clinic.yaml", ("order: 9}", "first: 150}"))
    in_threads(folder, together)
    book = ledger.read(folder / "state" / "clinic" / "ledger.sqlite")
    assert Tally(book.releases(account).tolist()) == {15: 150, 10: 150 + 20, 5: 150 + 20}


# --- the guard


@pytest.mark.threat("T98")
@pytest.mark.parametrize("privacy", [FLOOR, "raw: false"])
def test_a_segment_that_only_passes_its_input_on_is_refused(tmp_path: Path, together: Together, privacy: str) -> None:
    file = clinic(args=", width: 64", stem='model: "models:identity"')
    run = together(pair(tmp_path / "same", file, privacy=privacy))
    error = run.errors["clinic"]
    assert isinstance(error, UnsafeSegment) and error.exit_code == 3
    assert "the activation of stem -> trunk to server equals the samples themselves" in str(error)
    assert "raw: true" in error.fix
    assert run.messages("clinic", "activation") == []
    state = tmp_path / "same" / "state" / "clinic"
    assert [one.kind for one in journal.read(state / "journal.jsonl") if one.kind == "activation"] == []


def test_raw_lets_it(tmp_path: Path, together: Together) -> None:
    file = clinic(args=", width: 64", stem='model: "models:identity"')
    run = in_threads(pair(tmp_path / "raw", file, privacy="raw: true"), together)
    assert len(run.messages("clinic", "activation")) == 2 * (3 + 1)


def test_a_simulation_tells_of_a_segment_that_only_passes_its_input_on(shell: Shell, tmp_path: Path) -> None:
    folder = pair(tmp_path / "same", clinic(args=", width: 64", stem='model: "models:identity"'))
    end = shell.run("simulate", folder, "--quiet", OMP_NUM_THREADS="1")
    assert end.code == 3
    assert "equals the samples themselves" in end.stderr and "raw: true" in end.stderr


def test_batch_statistics_in_a_private_segment_are_refused(tmp_path: Path, together: Together) -> None:
    folder = pair(tmp_path / "norm", clinic(stem='model: "models:averaged"'))
    with pytest.raises(UnsafeSegment, match="BatchNorm1d at 1") as refused:
        probe(load_folder(folder))
    assert refused.value.exit_code == 3
    assert "one person's sample changes what leaves for all others" in refused.value.expected
    assert "nn.GroupNorm" in refused.value.fix
    change(folder / "graph.yaml", (f", {FLOOR}", ""))
    probe(load_folder(folder))


UNDER = """
privacy:
  cuts:
    - from: stem
      to: trunk
      forward: {clip: 1.0, noise: gaussian, noise_multiplier: 1.9}
"""


@pytest.mark.threat("T100")
@pytest.mark.parametrize("command", ["check", "simulate", "join"])
def test_a_party_file_under_the_floor(shell: Shell, tmp_path: Path, command: str) -> None:
    """Every command that would use it refuses, and names file and line."""
    file = clinic()
    folder = pair(tmp_path / "under", file.replace("privacy: {delta: 1.0e-5}\n", UNDER.lstrip()))
    place = folder / "parties" / "clinic.yaml"
    line = next(n for n, text in enumerate(place.read_text().splitlines(), 1) if "noise_multiplier: 1.9" in text)
    arguments: dict[str, list[str | Path]] = {
        "check": ["check", folder],
        "simulate": ["simulate", folder, "--quiet"],
        "join": ["join", "--graph", folder / "graph.yaml", "--party", "clinic", "--quiet"],
    }
    end = shell.run(*arguments[command])
    assert end.code == 3, end.stderr
    assert f"clinic.yaml:{line}: " in end.stderr
    assert "noise multiplier 1.9, where at least 2 is demanded" in words(end.stderr)
    assert not (folder / "state").exists() or not list((folder / "state").rglob("ledger.sqlite"))


def test_under_the_floor_in_other_ways(tmp_path: Path) -> None:
    """No noise, a larger norm, another kind of noise."""
    folder = pair(tmp_path / "under", clinic().replace("privacy: {delta: 1.0e-5}\n", UNDER.lstrip()))
    file = folder / "parties" / "clinic.yaml"
    safe = "clip: 1.0, noise: gaussian, noise_multiplier: 1.9"
    for other, complaint in (
        ("clip: 1.0", "no noise, where gaussian noise is demanded"),
        ("clip: 1.5, noise: gaussian, noise_multiplier: 2.0", "clip 1.5, where at most 1 is allowed"),
        ("clip: 1.0, noise: laplace, noise_multiplier: 2.0", "laplace noise, where gaussian noise is demanded"),
    ):
        change(file, (safe, other))
        with pytest.raises(BelowFloor, match=re.escape(complaint)):
            probe(load_folder(folder))
        safe = other
    change(file, (safe, "clip: 0.5, noise: gaussian, noise_multiplier: 3.0"))
    probe(load_folder(folder))


def test_a_budget_for_what_leaves_without_noise(shell: Shell, tmp_path: Path) -> None:
    folder = pair(tmp_path / "bare", clinic(privacy=", epsilon: 3.0"), privacy="raw: false")
    with pytest.raises(PartyFileError, match="carries them without noise") as refused:
        probe(load_folder(folder))
    assert refused.value.exit_code == 2
    end = shell.run("join", "--graph", folder / "graph.yaml", "--party", "clinic", "--quiet")
    assert end.code == 2
    assert "a budget for inputs, but the activation of stem -> trunk to server carries them without noise" in end.stderr


def test_leakage_above_the_limit_of_a_party(tmp_path: Path, together: Together) -> None:
    """Without noise a linear segment tells nearly all; with it nearly nothing."""
    limit = ", leakage: {every: 1, limit: 0.3}"
    bare = in_threads(
        pair(tmp_path / "bare", clinic(counts=(64, 8), privacy=limit), privacy="raw: false", batch=32), together
    )
    (warning,) = bare.warnings("clinic")
    assert "what leaves over stem -> trunk tells more about the samples than this party wants" in warning
    assert "limit 0.3" in warning
    noisy = in_threads(pair(tmp_path / "noisy", clinic(counts=(64, 8), privacy=limit), batch=32), together)
    assert noisy.warnings("clinic") == []
    seen = [
        [event["distance_correlation_corrected"] for event in run.events["clinic"] if event["event"] == "leakage"]
        for run in (bare, noisy)
    ]
    assert [len(values) for values in seen] == [2, 2]
    assert min(seen[0]) > 0.5 > 0.3 > max(seen[1])


@pytest.mark.threat("T45")
def test_labels_by_randomised_response(shell: Shell, tmp_path: Path, together: Together) -> None:
    """The server takes 1,280 labels that were all 0; so many are another class as epsilon 1 of four classes says."""
    folder = pair(tmp_path / "labels", clinic(counts=(300, 20), privacy=", label_epsilon: 5.0"), epochs=4, batch=64)
    labels = "  - {from: clinic, to: trunk}\n"
    change(folder / "graph.yaml", (labels, labels.replace("trunk", "trunk, privacy: {epsilon: 1.0, classes: 4}")))
    watched = 'loss: "watched:Watched", loss_args: {file: "%s"}' % (tmp_path / "labels.txt")
    change(folder / "graph.yaml", ("loss: cross_entropy", "loss: custom"))
    change(folder / "parties" / "server.yaml", ('"models:trunk",', f'"models:trunk", {watched},'))
    (folder / "parties" / "watched.py").write_text(WATCHED)
    in_threads(folder, together)
    taken = Tally(map(int, (tmp_path / "labels.txt").read_text().split()))
    taken.subtract({0: 2})  # of the check before the run
    count = 4 * (300 + 20)
    assert sum(taken.values()) == count
    share = 3 / (math.e + 3)
    assert abs(1 - taken[0] / count - share) < 5 * math.sqrt(share * (1 - share) / count)
    for label in (1, 2, 3):
        assert abs(taken[label] / count - share / 3) < 5 * math.sqrt(share / 3 * (1 - share / 3) / count)
    found = [one for one in entries(shell, folder) if one["protects"] == "labels"]
    assert sorted((one["dataset"].split("-")[0], one["releases"]) for one in found) == [("test", 4), ("train", 4)]
    for one in found:
        assert one["mechanism"] == "randomised_response" and one["noise_multiplier"] is None
        assert 3.5 < one["epsilon"] <= 4.0 + 1e-9 and one["epsilon_budget"] == 5.0
    assert {one["epsilon_budget"] for one in entries(shell, folder) if one["protects"] == "inputs"} == {None}


WATCHED = """\
from torch.nn import functional


class Watched:
    def __init__(self, file):
        self.file = file

    def __call__(self, scores, labels):
        with open(self.file, "a") as file:
            print(*labels.tolist(), file=file)
        return functional.cross_entropy(scores, labels)
"""


# --- what left


@pytest.fixture
def still(tmp_path: Path, together: Together) -> tuple[Run, Path]:
    """Six epochs in which the clinic's segment learns nothing: every evaluation has the same 40 inputs and outputs."""
    folder = pair(tmp_path / "still", clinic(counts=(30, 40), lr=0.0), epochs=6, batch=40)
    return in_threads(folder, together), folder


@pytest.mark.threat("T60")
def test_the_journal_says_what_left_to_the_last_byte(still: tuple[Run, Path]) -> None:
    run, folder = still
    for party in ("clinic", "server"):
        file = folder / "state" / party / "journal.jsonl"
        assert journal.verify(file) == []
        opened, *kept = list(journal.read(file))
        assert opened.kind == "opened"
        assert len(kept) == len(run.sent[party]) > 12
        for one, (header, body) in zip(kept, run.sent[party], strict=True):
            assert one.values["digest"] == sha256(header + body).hexdigest()
            assert one.values["bytes"] == len(header) + len(body)
            message = decode(header, memoryview(bytearray(body)))
            assert one.kind == message.kind
            assert one.values["shapes"] == [list(tensor.shape) for tensor in message.tensors.values()]
    activations = [
        one.values for one in journal.read(folder / "state" / "clinic" / "journal.jsonl") if one.kind == "activation"
    ]
    assert [one["records"] for one in activations] == [30, 40] * 6
    assert {one["privacy"] for one in activations} == {"clip 1, gaussian 2"}


@pytest.mark.threat("T44")
def test_noise_is_on_what_leaves(still: tuple[Run, Path]) -> None:
    """The same inputs leave as other numbers each time; the differences have the standard deviation of two noises."""
    sent = [message.tensors[""] for message in still[0].messages("clinic", "activation")]
    evaluated = [tensor for tensor in sent if len(tensor) == 40]
    assert len(evaluated) == 6
    sigma = 2.0 * 2.0 * 1.0  # noise multiplier, times the sensitivity: twice the clip norm
    for one, other in ((0, 1), (2, 3), (4, 5)):
        difference = (evaluated[one] - evaluated[other]).double()
        assert not (difference == 0).any()
        assert abs(float(difference.mean())) < 5 * sigma * math.sqrt(2 / difference.numel())
        assert float(difference.std()) == pytest.approx(sigma * math.sqrt(2), rel=5 / math.sqrt(2 * difference.numel()))
    mean = torch.stack(evaluated).mean(0)
    assert float(mean.norm(dim=1).mean()) < 1 + 1.5 * sigma * math.sqrt(64 / 6)  # a row's norm is at most 1 beneath
