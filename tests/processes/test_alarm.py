"""A server that turns on a clinic, over the real channel: the clinic stops, says why to its operator alone, and nothing
more leaves.

The server is an ordinary party whose model is not what it agreed to: its way back answers with what it likes.  Attacks
that recover something are in ``splitsec.attacks``; here they only have to be what a detector is for.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitsec import journal
from splitsec.simulation import simulate
from tests.conftest import Shell, change, free_port, keyed, write_folder

PAIR = """\
splitsec: 1
name: pair
parties:
  clinic: {}
  server: {listen: "tcp://127.0.0.1:PORT"}
segments:
  stem: {at: clinic, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [8], dtype: float32}
labels:
  - {from: clinic, to: trunk}
training: {epochs: 20, batch_size: 8, seed: 11, decoys: 5}
timeouts: {connect: 60, lost: 5, gone: 60}
"""

TURNED = """

class Answers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, how):
        ctx.how = how
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        drawn = torch.randn_like(gradient)  # alike in both attempts at a step, as dropout is
        if ctx.how == "one way":  # what a discriminator's gradients come to
            gradient = (torch.ones_like(gradient) + 0.1 * drawn) / len(gradient)
        if ctx.how == "any way":
            gradient = drawn
        if ctx.how == "huge":
            gradient = gradient * 1e15
        return gradient, None


class Turned(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return Answers.apply(x, self.how)


def turned(how, **args):
    return nn.Sequential(Turned(how), nn.ReLU(), nn.Linear(8, 3))
"""


def turned(place: Path, how: str, *, detectors: str = "") -> Path:
    """A folder whose server answers as ``how`` says, and whose clinic looks for what ``detectors`` says."""
    folder = write_folder(place, PAIR.replace("PORT", str(free_port())), clinics=["clinic"])
    models = folder / "parties" / "models.py"
    models.write_text(models.read_text() + TURNED)
    change(
        folder / "parties" / "server.yaml",
        ("models:trunk", "models:turned"),
        ("args: {party: server}", f'args: {{party: server, how: "{how}"}}'),
    )
    if detectors:
        file = folder / "parties" / "clinic.yaml"
        file.write_text(file.read_text() + f"detectors: {detectors}\n")
    return folder


@pytest.mark.threat("T110")
def test_a_clinic_leaves_a_server_that_ignores_labels_and_tells_only_its_operator(shell: Shell, tmp_path: Path) -> None:
    folder = keyed(shell, turned(tmp_path / "pair", "one way"), "clinic", "server")
    graph, parties = folder / "graph.yaml", folder / "parties"
    out = tmp_path / "out"
    commands = {
        name: shell.start("join", "--graph", graph, "--party", parties / f"{name}.yaml", "--out", out)
        for name in ("server", "clinic")
    }
    ends = {name: command.end() for name, command in commands.items()}
    clinic, server = ends["clinic"], ends["server"]

    assert clinic.code == 3
    told = " ".join(clinic.stderr.split())
    assert "clinic: ALARM in training step 5 (label agreement): what server sends back over stem -> trunk does" in told
    assert "splitsec: what server sends back over stem -> trunk does not heed our labels" in told
    assert server.code == 4
    assert "clinic" in server.stderr
    for word in ("alarm", "detector", "label", "heed", "suspect", "attack"):
        assert word not in server.stderr.lower(), "its peer learns that it left, and no more"
    assert not out.exists(), "nothing of such a training is kept"

    kept = folder / "state" / "clinic" / "journal.jsonl"
    entries = list(journal.read(kept))
    assert entries[-1].kind == "alarm"
    assert entries[-1].values["detector"] == "label agreement"
    assert entries[-1].values["evidence"]["other_label"] > 0.9
    sent = [entry.kind for entry in entries[:-1]]
    evaluated = 1  # after the first epoch
    assert (sent.count("activation"), sent.count("labels")) == (5 + evaluated,) * 2, "nothing left after the alarm"
    assert journal.verify(kept) == []


@pytest.mark.threat("T110")
@pytest.mark.parametrize(
    ("how", "detectors", "detector", "batches"),
    [
        ("one way", "", "label agreement", range(5, 6)),
        ("one way", "{label_agreement: false}", "decoys", range(21, 61)),
        ("any way", "", "decoys", range(21, 61)),
        ("huge", "", "outliers", range(1, 2)),
    ],
)
def test_each_detector_stops_a_simulation_with_the_reason(
    how: str, detectors: str, detector: str, batches: range, shell: Shell, tmp_path: Path
) -> None:
    folder = turned(tmp_path / "pair", how, detectors=detectors)
    end = shell.run("simulate", folder, "--out", tmp_path / "out")
    assert end.code == 3, end.stderr
    told = " ".join(end.stderr.split())
    assert f"({detector}):" in told and "party clinic failed (SuspectedAttack)" in told
    (entry,) = [one for one in journal.read(folder / "state" / "clinic" / "journal.jsonl") if one.kind == "alarm"]
    assert entry.values["detector"] == detector
    assert entry.values["batch"] in batches
    assert not (tmp_path / "out").exists()


@pytest.mark.threat("T111")
def test_a_party_that_switched_its_detectors_off_trains_on(shell: Shell, tmp_path: Path) -> None:
    folder = turned(tmp_path / "pair", "one way", detectors="false")
    assert shell.run("simulate", folder, "--quiet").code == 0
    assert not (folder / "state").exists()


def test_an_alarm_is_an_event_with_its_evidence(tmp_path: Path) -> None:
    folder = turned(tmp_path / "pair", "one way")
    seen = []
    with pytest.raises(Exception, match="does not heed our labels"):
        simulate(folder, watch=lambda party, event: seen.append((party, event)), state=tmp_path / "elsewhere")
    ((party, event),) = [(party, event) for party, event in seen if event["event"] == "alarm"]
    assert party == "clinic"
    assert {name: event[name] for name in ("detector", "cut", "peer", "batch")} == {
        "detector": "label agreement",
        "cut": "stem -> trunk",
        "peer": "server",
        "batch": 5,
    }
    assert event["evidence"]["pairs"] == 5 * 28
    assert event["text"].startswith("what server sends back")
    assert (
        json.loads((tmp_path / "elsewhere" / "clinic" / "journal.jsonl").read_text().splitlines()[-1])["kind"]
        == "alarm"
    )
