"""Every example runs as its README says, over real processes and sockets, and equals its one-process twin bit by bit.

Here: one short run of each folder, and the two numbers that README.md promises.  Not here: graphs that are no example
(``tests/topologies``).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitsec.graph import load_graph

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("extended-vanilla", "multi-hop", "multi-task", "u-shaped", "vanilla", "vertical")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are equal to the last bit only if added in the same order, so: one thread, as in the party files."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def one_process(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"one_process_{name}", EXAMPLES / name / "one_process.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def splitsec(*arguments: str | Path) -> dict[str, Any]:
    """Run the command with ``--json`` and return the document that it printed, and nothing else, on standard output."""
    command = [sys.executable, "-m", "splitsec", *map(str, arguments), "--json", "--quiet"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert isinstance(document, dict)
    return document


def accuracy_by_segment(document: dict[str, Any]) -> dict[str, float]:
    return {name: lists["eval_accuracy"][-1] for name, lists in document["metrics"]["by_segment"].items()}


def test_every_folder_is_listed() -> None:
    assert sorted(file.parent.name for file in EXAMPLES.glob("*/graph.yaml")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_one_epoch_equals_one_process_to_the_last_bit(name: str, tmp_path: Path) -> None:
    document = splitsec("simulate", EXAMPLES / name, "--epochs", "1", "--out", tmp_path)
    twin = one_process(name)
    expected = twin.train(epochs=1)

    graph = load_graph(EXAMPLES / name / "graph.yaml")
    for segment, place in graph.segments.items():
        for party in graph.members(place.at):
            trained = load_file(tmp_path / party / f"{segment}.safetensors")
            want = expected.get(f"{party}/{segment}", expected.get(segment))
            assert trained.keys() == want.keys()
            for tensor in want:
                assert torch.equal(trained[tensor], want[tensor]), f"{party}/{segment}: {tensor}"
    assert accuracy_by_segment(document) == pytest.approx(twin.accuracy(expected))
    assert document["graph"] == name and document["parties"] == list(graph.parties)
    assert all(len(document["metrics"][kind]) == 1 for kind in ("train_loss", "eval_loss", "eval_accuracy"))


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_trains_with_the_numbers_of_the_graph_file(name: str) -> None:
    twin, training = one_process(name), load_graph(EXAMPLES / name / "graph.yaml").training
    assert (training.epochs, training.batch_size, training.seed) == (twin.EPOCHS, twin.BATCH, twin.SEED)


def test_the_u_shape_sends_no_labels_and_keeps_its_skip_inside() -> None:
    document = splitsec("simulate", EXAMPLES / "u-shaped", "--epochs", "1")
    crossed = {(cut["from"], cut["to"], cut["kind"]) for cut in document["cuts"]}
    assert {kind for _, _, kind in crossed} == {"activation", "gradient", "weights"}
    assert ("stem", "head", "activation") not in crossed
    assert {("stem", "trunk", "activation"), ("trunk", "head", "activation")} <= crossed


def test_vanilla_reaches_94_percent_from_2500_images() -> None:
    document = splitsec("simulate", EXAMPLES / "vanilla")
    assert document["metrics"]["eval_accuracy"][-1] >= 0.94


def test_vertical_reaches_95_percent_on_patients_held_out_within_60_s(tmp_path: Path) -> None:
    document = splitsec("simulate", EXAMPLES / "vertical", "--out", tmp_path / "trained")
    assert document["metrics"]["eval_accuracy"][-1] >= 0.95
    assert document["wall_seconds"] < 60

    predicted = splitsec("predict", EXAMPLES / "vertical", "--weights", tmp_path / "trained", "--out", tmp_path / "new")
    assert predicted["predicted"] == {"diagnosis": 169}
    logits = load_file(tmp_path / "new" / "registry" / "predictions.safetensors")["diagnosis"]
    ids = json.loads((tmp_path / "new" / "hospital" / "predicted_ids.json").read_text())
    twin = one_process("vertical")
    known = twin.data.test("registry")
    truth = dict(zip(known["id"], known["y"].flatten().tolist(), strict=True))
    right = sum(
        (logit > 0) == (truth[patient] > 0.5) for patient, logit in zip(ids, logits.flatten().tolist(), strict=True)
    )
    assert right / len(ids) == pytest.approx(document["metrics"]["eval_accuracy"][-1])
