"""The resource plan of a folder: small modules counted by hand, and every way in which modules and data can be odd."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitsec.errors import GraphError, PartyFileError, UserError
from splitsec.measuring import Measured, measure_folder
from splitsec.partyfile import load_folder
from tests.conftest import replaced

GRAPH = """\
splitsec: 1
name: small
parties: {ann: {}, ben: {}, server: {listen: "tcp://127.0.0.1:7400"}}
groups: {both: {members: [ann, ben], schedule: round_robin}}
segments:
  low: {at: both, data: x}
  high: {at: server, loss: cross_entropy}
cuts: [{from: low, to: high, shape: [3], dtype: float32}]
labels: [{from: both, to: high}]
training: {epochs: 3, batch_size: 4, micro_batches: 2, decoys: 0}
"""
MEMBER = """\
party: NAME
segments: {low: {model: "models:low", optimizer: {name: adam, lr: 0.1}}}
data: {train: "models:rows", test: "models:rows", args: {count: COUNT}}
"""
SERVER = """\
party: server
segments: {high: {model: "models:high", optimizer: {name: sgd, lr: 0.1}}}
"""
MODELS = """\
import torch
from torch import nn
def low(): return nn.Sequential(nn.Linear(2, 3), nn.ReLU())
def high(): return nn.Sequential(nn.Dropout(), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
def rows(count): return {"x": torch.zeros(count, 2), "y": torch.zeros(count, dtype=torch.int64)}
"""
LOW = 4 * (2 * 3 + 3)
"""Bytes of the first segment's weights."""
HIGH = 4 * (3 * 5 + 5 + 5 * 2 + 2)


def make(place: Path, *models: tuple[str, str]) -> Path:
    """The folder, with passages of its modules changed; each at a place of its own, since modules are imported once."""
    (place / "parties").mkdir(parents=True)
    for name, text in (
        ("graph", GRAPH),
        ("parties/ann", MEMBER.replace("NAME", "ann").replace("COUNT", "10")),
        ("parties/ben", MEMBER.replace("NAME", "ben").replace("COUNT", "6")),
        ("parties/server", SERVER),
    ):
        (place / f"{name}.yaml").write_text(text)
    (place / "parties" / "models.py").write_text(replaced(MODELS, *models))
    return place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "as it is")


def plan(folder: Path, *graph: tuple[str, str]) -> Measured:
    file = folder / "graph.yaml"
    file.write_text(replaced(file.read_text(), *graph))
    return measure_folder(load_folder(folder), tell=lambda text: None)


def test_parties_by_hand(folder: Path) -> None:
    """A linear layer of m to n numbers is 2 m n FLOPs forward, as many for its weights, and for its input."""
    report = plan(folder).report
    ann, ben, server = report.parties
    forward, high = 2 * 2 * 3, 2 * (3 * 5 + 5 * 2)
    assert [one.party for one in report.parties] == ["ann", "ben", "server"]
    assert (ann.parameters, server.parameters) == (9, 32)
    assert (ann.flop_step, ann.flop_epoch, ann.flop_evaluation) == (4 * 2 * forward, 10 * 2 * forward, 10 * forward)
    assert (ben.flop_epoch, server.flop_epoch) == (6 * 2 * forward, 16 * 3 * high)
    assert server.flop_step == 4 * 3 * high
    assert (ann.published_epoch, server.published_epoch) == (10 * 3 * 2 * 3, 16 * 3 * 25)


def test_bytes_by_hand(folder: Path) -> None:
    """10 samples in steps of 4, 4 and 2, each of two micro-batches; Adam's state goes with the weights."""
    report = plan(folder).report
    flows = {(one.kind, one.sender, one.receiver): one for one in report.flows}
    forward, back = flows["activation", "ann", "server"], flows["gradient", "server", "ann"]
    assert (forward.step, forward.epoch, forward.evaluation, forward.messages) == (48, 120, 120, 12)
    assert (back.step, back.epoch, back.evaluation, back.messages) == (48, 120, 0, 12)
    labels = flows["labels", "ben", "server"]
    assert (labels.step, labels.epoch, labels.evaluation, labels.messages) == (32, 48, 48, 8)
    handed = 3 * LOW + 4 * 2  # Adam counts its steps, for each of two tensors
    assert (flows["weights", "ann", "ben"].epoch, flows["weights", "ann", "ben"].messages) == (handed, 1)
    assert flows["weights", "ben", "ann"].epoch == handed
    ann = report.parties[0]
    assert (ann.sent, ann.received) == (120 + 80 + handed, 120 + handed)


def test_memory_by_hand(folder: Path) -> None:
    """State, gradients, Adam's two numbers for each; of a batch input, ReLU's output and two tensors of a cut."""
    ann, _, server = plan(folder).report.parties
    assert ann.memory == 4 * LOW + 8 + 4 * (4 * 2 + 4 * 3) + 2 * 4 * 12
    assert server.memory >= 2 * HIGH + 4 * (4 * 3 + 4 * 5) + 2 * 4 * 12


def test_methods_and_candidates(folder: Path) -> None:
    report = plan(folder).report
    split, federated, sgd = report.methods
    assert split.bytes_epoch == sum(one.sent + one.received for one in report.parties[:2]) / 2
    assert federated.bytes_epoch == 2 * (LOW + HIGH)
    assert sgd.bytes_epoch == 2 * (LOW + HIGH) * 2  # 8 samples each, in batches of 4
    assert [(one.after, one.shape, one.chosen) for one in report.candidates] == [
        ("low.1 ReLU", (3,), True),
        ("high.2 Tanh", (5,), False),
    ]
    assert report.candidates[0].bytes_epoch == pytest.approx(split.bytes_epoch)
    assert report.candidates[1].client_parameters == 9 + 20


LINEAR = "def low(): return nn.Sequential(nn.Linear(2, 3), nn.ReLU())\n"


def test_modules_that_need_real_numbers_are_counted_too(folder: Path, tmp_path: Path) -> None:
    """A module that looks at its numbers has none on the meta device; it runs on two real samples then."""
    before = plan(folder).report
    looking = """\
class Looking(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    def forward(self, x):
        if float(x.sum()) > 1e9:
            raise ValueError
        return self.inside(x)
def low(): return Looking()
"""
    after = plan(make(tmp_path / "looking", (LINEAR, looking))).report
    assert after.parties == before.parties
    assert after.flows == before.flows
    assert after.candidates[0].after == "low"  # no Sequential: one piece


def test_functions_count_as_much_as_modules(folder: Path, tmp_path: Path) -> None:
    before = plan(folder).report
    bare = """\
class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3))
    def forward(self, x):
        return (x @ self.w + self.b).relu_()
def low(): return Bare()
"""
    after = plan(make(tmp_path / "bare", (LINEAR, bare))).report
    assert [one.flop_epoch for one in after.parties] == [one.flop_epoch for one in before.parties]


def test_an_input_that_is_changed_in_place(folder: Path, tmp_path: Path) -> None:
    before = plan(folder).report
    changed = make(tmp_path / "in place", ("nn.Sequential(nn.Dropout(), ", "nn.Sequential(nn.ReLU(inplace=True), "))
    after = plan(changed)
    assert after.report.parties[2].flop_epoch == before.parties[2].flop_epoch
    assert after.time(lambda text: None).keys() == {"low", "high"}


def test_a_shape_that_is_not_so_is_the_error_of_check(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="declares shape") as caught:
        plan(folder, ("shape: [3]", "shape: [4]"))
    assert caught.value.line == 8
    with pytest.raises(PartyFileError, match="failed: ZeroDivisionError"):
        plan(make(tmp_path / "broken", ("def low(): return", "def low(): 1 / 0; return")))


def test_no_samples_and_no_segments_are_errors(tmp_path: Path) -> None:
    folder = make(tmp_path / "empty", ('return {"x"', 'count = 0; return {"x"'))
    with pytest.raises(PartyFileError, match="returned no samples"):
        plan(folder)
    (folder / "graph.yaml").write_text(
        'splitsec: 1\nname: talk\nparties: {ann: {}, server: {listen: "tcp://127.0.0.1:7400"}}\n'
        "exchanges: [{name: a, from: ann, to: server, shape: [1], dtype: float32}]\n"
    )
    for file in ("ann", "ben", "server"):
        (folder / "parties" / f"{file}.yaml").unlink()
    with pytest.raises(GraphError, match="no segments"):
        plan(folder)


def test_batch_statistics_are_seen(tmp_path: Path) -> None:
    folder = make(tmp_path / "norm", ("nn.Linear(2, 3), nn.ReLU()", "nn.Linear(2, 3), nn.BatchNorm1d(3)"))
    with pytest.raises(PartyFileError, match="has BatchNorm1d at 1, and the graph has `micro_batches: 2`"):
        plan(folder)
    costs = plan(folder, ("micro_batches: 2, ", "")).costs
    assert (costs["low"].batch_statistics, costs["high"].batch_statistics) == ("BatchNorm1d", None)


def test_a_codec_is_counted_as_it_travels(folder: Path) -> None:
    report = plan(folder, ("dtype: float32}]", "dtype: float32, codec: bfloat16}]")).report
    flows = {(one.kind, one.sender): one for one in report.flows}
    assert flows["activation", "ann"].epoch == 60
    assert report.candidates[0].sample_bytes == 6


def test_members_at_once_share_a_step(folder: Path) -> None:
    measured = plan(folder, ("schedule: round_robin", "schedule: parallel"))
    server = measured.report.parties[2]
    assert server.flop_step == 8 * 3 * 2 * 25
    assert {one.kind for one in measured.report.flows} == {"activation", "gradient", "labels"}
    pipe = measured.pipeline(measured.time(lambda text: None))
    assert (pipe.streams, pipe.parties) == (2, (("ann", "ben"), ("server", "server")))
    assert pipe.crossings[0].forward == pipe.crossings[0].back == 12


def test_samples_that_are_spread_out_have_no_federated_learning(folder: Path) -> None:
    (folder / "graph.yaml").write_text(
        """\
splitsec: 1
name: apart
parties: {ann: {}, server: {listen: "tcp://127.0.0.1:7400"}}
segments:
  low: {at: ann, data: x}
  high: {at: server, loss: cross_entropy}
cuts: [{from: low, to: high, shape: [3], dtype: float32}]
labels: [{from: server, to: high}]
training: {batch_size: 4}
"""
    )
    (folder / "parties" / "ben.yaml").unlink()
    for name in ("ann", "server"):
        file = folder / "parties" / f"{name}.yaml"
        text = file.read_text() + ('data: {train: "models:named", args: {}}\n' if name == "server" else "")
        file.write_text(text.replace('"models:rows", test: "models:rows", args: {count: 10}', '"models:named"'))
    with (folder / "parties" / "models.py").open("a") as models:
        models.write("def named(): return {'id': ['a', 'b', 'c'], **rows(3)}\n")
    report = plan(folder).report
    assert [one.name for one in report.methods] == ["split learning"]
    assert report.why.endswith("here they are spread over ann and server")
    assert report.candidates == ()


def test_times_are_those_of_the_modules(tmp_path: Path) -> None:
    """A segment that is ten thousand times as large takes longer; a first segment has no gradient to hand back."""
    large = "nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 900), nn.Linear(900, 900), nn.Linear(900, 2))"
    old = "nn.Sequential(nn.Dropout(), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))"
    told: list[str] = []
    times = plan(make(tmp_path / "large", (old, large))).time(told.append)
    assert told == ["times low", "times high"]
    seconds = {name: [act.of(4) for act in one.acts] for name, one in times.items()}
    assert times["high"].optimizer > 0
    assert sum(seconds["high"]) > sum(seconds["low"]) > 0
    assert seconds["low"][1] < seconds["high"][1]


def test_an_unknown_party_has_no_speed() -> None:
    from splitsec.cli.plan import _speeds

    assert _speeds(["50", "server=5000"], ["ann", "server"], None) == {"ann": 50e9, "server": 5000e9}
    assert _speeds(None, ["ann"], None) is None
    with pytest.raises(UserError, match="no party `sever`") as caught:
        _speeds(["sever=3"], ["ann", "server"], None)
    assert caught.value.fix == "did you mean `server`?"
    with pytest.raises(UserError, match="says nothing of ann"):
        _speeds(["server=3"], ["ann", "server"], None)
    for wrong in ("fast", "0", "-1", "nan", "server="):
        with pytest.raises(UserError, match="--gflops"):
            _speeds([wrong], ["ann", "server"], None)
