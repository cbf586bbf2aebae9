"""``splitsec check``: exit codes and what stands where, run in this process."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from splitsec.cli import check
from splitsec.contract import digest
from splitsec.errors import GraphError, PartyFileError, UserError
from splitsec.graph import load_graph

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*/graph.yaml"))

GRAPH = """\
splitsec: 1
name: small
parties: {ann: {}, ben: {listen: "tcp://127.0.0.1:7400"}}
segments:
  low: {at: ann, data: x}
  high: {at: ben, loss: cross_entropy}
cuts: [{from: low, to: high, shape: [3], dtype: float32}]
labels: [{from: ann, to: high}]
"""
ANN = """\
party: ann
segments: {low: {model: "models:low", optimizer: {name: sgd, lr: 0.1}}}
data: {train: "models:rows"}
"""
BEN = """\
party: ben
segments: {high: {model: "models:high", optimizer: {name: sgd, lr: 0.1}}}
"""
MODELS = """\
import torch
def low(): return torch.nn.Linear(2, 3)
def high(): return torch.nn.Linear(3, 2)
def rows(): return {"x": torch.zeros(4, 2), "y": torch.zeros(4, dtype=torch.int64)}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "parties").mkdir()
    for name, text in (
        ("graph.yaml", GRAPH),
        ("parties/ann.yaml", ANN),
        ("parties/ben.yaml", BEN),
        ("parties/models.py", MODELS),
    ):
        (tmp_path / name).write_text(text)
    return tmp_path


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    check.add_parser(parser.add_subparsers())
    return check.run(parser.parse_args(["check", *arguments]))


def test_a_good_folder_is_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(folder)) == 0
    out, err = capsys.readouterr()
    assert out.startswith("small: 2 parties, 2 segments, 1 cut")
    assert "──▶ high" in out
    assert err == ""


def test_a_terminal_without_boxes_gets_ascii(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    assert run(str(folder), "--no-models") == 0
    sys.stdout.flush()
    assert b"--> high" in raw.getvalue()


def test_json_is_one_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(folder), "--json", "--no-models") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["graph"] == "small"
    assert said["digest"] == digest(load_graph(folder / "graph.yaml")).hex()
    assert said["links"] == [{"dialer": "ann", "listener": "ben"}]
    assert (said["circuits"], said["relays"], said["anonymous"], said["warnings"]) == ([], [], None, [])
    assert said["cuts"] == [{"from": "low", "to": "high", "shape": [3], "dtype": "float32", "codec": None}]


def test_the_picture_goes_to_a_file_or_to_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "small.svg"
    assert run(str(folder), "--no-models", "--svg", str(file)) == 0
    assert ElementTree.parse(file).getroot().tag.endswith("svg")
    capsys.readouterr()
    assert run(str(folder), "--no-models", "--svg", "-") == 0
    assert capsys.readouterr().out == file.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        run(str(folder), "--no-models", "--svg", str(folder / "no" / "small.svg"))


def test_a_mistake_is_raised_before_anything_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "parties" / "ben.yaml").unlink()
    with pytest.raises(PartyFileError, match="`ben` has no party file"):
        run(str(folder), "--svg", str(folder / "small.svg"))
    assert not (folder / "small.svg").exists()
    assert capsys.readouterr().out == ""


def test_the_shape_that_a_segment_really_produces_is_compared(folder: Path) -> None:
    (folder / "graph.yaml").write_text(GRAPH.replace("shape: [3]", "shape: [4]"))
    assert run(str(folder), "--no-models") == 0
    with pytest.raises(GraphError) as caught:
        run(str(folder))
    assert caught.value.line == 7


def test_without_models_no_user_code_runs(folder: Path) -> None:
    (folder / "parties" / "models.py").write_text("raise SystemExit('ran')\n")
    assert run(str(folder), "--no-models") == 0


HIDDEN = """\
splitsec: 1
name: hidden
parties:
  ann: {}
  ben: {}
  relay: {listen: "tcp://127.0.0.1:7401"}
  server: {listen: "tcp://127.0.0.1:7400"}
groups: {clinics: {members: [ann, ben], schedule: round_robin}}
segments:
  low: {at: clinics, data: x}
  high: {at: server, loss: cross_entropy}
cuts: [{from: low, to: high, shape: [3], dtype: float32, anonymous: true}]
labels: [{from: clinics, to: high}]
routes: [{from: clinics, to: server, via: [relay]}]
"""


def test_circuits_are_told_and_a_relay_that_stands_alone_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "graph.yaml"
    file.write_text(HIDDEN)
    assert run(str(file), "--no-models") == 0
    out = capsys.readouterr().out
    assert "the members of clinics build circuits to server through relay\n" in out
    assert "server learns that a member of clinics speaks, and not which" in out
    assert (
        "\nwarning: relay alone stands between clinics and server: it knows both ends, and so which member speaks to "
        "server. Two relays of two institutions know it only together\n"
    ) in out
    assert run(str(file), "--no-models", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["circuits"] == [
        {"from": "ann", "to": "server", "routes": [["relay"]]},
        {"from": "ben", "to": "server", "routes": [["relay"]]},
        {"from": "ann", "to": "ben", "routes": [["relay"]]},
    ]
    assert said["relays"] == said["relays_only"] == ["relay"]
    assert said["anonymous"] == {"group": "clinics", "far_ends": ["server"], "pseudonym": "turn"}
    assert len(said["warnings"]) == 1


def test_two_relays_need_no_warning_and_cover_with_cells_of_many_sizes_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = HIDDEN.replace("via: [relay]", "via: [relay, other]").replace(
        "  server:", '  other: {listen: "tcp://127.0.0.1:7402"}\n  server:'
    )
    file = tmp_path / "graph.yaml"
    file.write_text(two)
    assert run(str(file), "--no-models") == 0
    assert "warning" not in capsys.readouterr().out
    file.write_text(HIDDEN.replace(", anonymous: true", ""))
    assert run(str(file), "--no-models") == 0
    assert "warning" not in capsys.readouterr().out
    file.write_text(two + "circuits: {cover: 0.1, padding: padme}\n")
    assert run(str(file), "--no-models") == 0
    assert "\nwarning: `cover` with `padding: padme`: cells go at a constant pace" in capsys.readouterr().out


@pytest.mark.parametrize("graph", EXAMPLES, ids=lambda file: file.parent.name)
def test_the_examples_are_right(graph: Path) -> None:
    assert run(str(graph.parent), "--no-models") == 0
