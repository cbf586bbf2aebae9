"""Every example runs as its README says, over real processes and sockets, and equals its one-process twin bit by bit.

Here: one short run of each folder, and the two numbers that README.md promises.  Not here: graphs that are no example
(``tests/topologies``).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitsec.graph import load_graph

EXAMPLES = Path(__file__).parents[2] / "examples"
OneEpoch = Callable[[str], tuple[dict[str, Any], Path]]
NAMES = ("extended-vanilla", "multi-hop", "multi-task", "u-shaped", "vanilla", "vertical")
ROUTED = {"onion": "vanilla", "relayed-chain": "multi-hop"}
"""Examples that are another one, but for the way that its messages take."""


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


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory: pytest.TempPathFactory) -> OneEpoch:
    """Simulate one epoch of an example, once for all tests: the document, and the folder of trained segments."""

    @functools.cache
    def run(name: str) -> tuple[dict[str, Any], Path]:
        out = tmp_path_factory.mktemp(name)
        return splitsec("simulate", EXAMPLES / name, "--epochs", "1", "--out", out), out

    return run


def accuracy_by_segment(document: dict[str, Any]) -> dict[str, float]:
    return {name: lists["eval_accuracy"][-1] for name, lists in document["metrics"]["by_segment"].items()}


def test_every_folder_is_listed() -> None:
    assert sorted(file.parent.name for file in EXAMPLES.glob("*/graph.yaml")) == sorted([*NAMES, *ROUTED, "private"])


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_trains_with_the_numbers_of_the_graph_file(name: str) -> None:
    twin, training = one_process(name), load_graph(EXAMPLES / name / "graph.yaml").training
    assert (training.epochs, training.batch_size, training.seed) == (twin.EPOCHS, twin.BATCH, twin.SEED)


@pytest.mark.parametrize("name", NAMES)
def test_one_epoch_equals_one_process_to_the_last_bit(name: str, one_epoch: OneEpoch) -> None:
    document, out = one_epoch(name)
    twin = one_process(name)
    expected = twin.train(epochs=1)

    graph = load_graph(EXAMPLES / name / "graph.yaml")
    for segment, place in graph.segments.items():
        for party in graph.members(place.at):
            trained = load_file(out / party / f"{segment}.safetensors")
            want = expected.get(f"{party}/{segment}", expected.get(segment))
            assert trained.keys() == want.keys()
            for tensor in want:
                assert torch.equal(trained[tensor], want[tensor]), f"{party}/{segment}: {tensor}"
    assert accuracy_by_segment(document) == pytest.approx(twin.accuracy(expected))
    assert document["graph"] == name and document["parties"] == list(graph.parties)
    assert all(len(document["metrics"][kind]) == 1 for kind in ("train_loss", "eval_loss", "eval_accuracy"))


@pytest.mark.threat("T39")
def test_the_u_shape_sends_no_labels_and_keeps_its_skip_inside(one_epoch: OneEpoch) -> None:
    document, _ = one_epoch("u-shaped")
    crossed = {(cut["from"], cut["to"], cut["kind"]) for cut in document["cuts"]}
    assert {kind for _, _, kind in crossed} == {"activation", "gradient", "weights"}
    assert ("stem", "head", "activation") not in crossed
    assert {("stem", "trunk", "activation"), ("trunk", "head", "activation")} <= crossed


def test_the_multi_hop_clinic_gives_its_labels_to_the_server_alone(one_epoch: OneEpoch) -> None:
    document, _ = one_epoch("multi-hop")
    labels = [(cut["sender"], cut["receiver"]) for cut in document["cuts"] if cut["kind"] == "labels"]
    assert labels == [("clinic", "server")]


def test_each_multi_task_server_gets_the_labels_of_its_own_question(one_epoch: OneEpoch) -> None:
    document, _ = one_epoch("multi-task")
    labels = {(cut["to"], cut["receiver"]) for cut in document["cuts"] if cut["kind"] == "labels"}
    assert labels == {("digit", "digit-server"), ("parity", "parity-server")}


@pytest.mark.parametrize(("routed", "plain"), ROUTED.items())
def test_relays_change_nothing_to_the_last_bit(routed: str, plain: str, one_epoch: OneEpoch) -> None:
    """Both runs are real ones, with and without routes; and with routes no two parties that train are linked.  What the
    plain one is equal to, the routed one is, too: training in one process, for the same number of epochs.
    """
    (document, through), (direct_document, direct) = one_epoch(routed), one_epoch(plain)
    files = sorted(file.relative_to(direct) for file in direct.glob("*/*.safetensors"))
    assert files == sorted(file.relative_to(through) for file in through.glob("*/*.safetensors"))
    assert len(files) == 4
    for file in files:
        ours, theirs = load_file(through / file), load_file(direct / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs), file
    graph = load_graph(EXAMPLES / routed / "graph.yaml")
    assert graph.training == load_graph(EXAMPLES / plain / "graph.yaml").training
    assert document["metrics"] == direct_document["metrics"]
    assert document["graph"] == routed and document["parties"] == list(graph.parties)  # relays, too
    assert graph.relays == {party for party in graph.parties if party.startswith("relay-")}
    assert all(graph.relays & set(link[:2]) for link in graph.links())


def test_the_clinics_of_the_onion_become_anonymous_as_its_readme_says(tmp_path: Path) -> None:
    readme = (EXAMPLES / "onion" / "README.md").read_text()
    text = (EXAMPLES / "onion" / "graph.yaml").read_text()
    (marked,) = [line for line in readme.splitlines() if "anonymous: true}" in line]
    plain = marked.replace(", anonymous: true", "")
    assert text.count(f"{plain}\n") == 1
    (tmp_path / "graph.yaml").write_text(text.replace(plain, marked))
    assert load_graph(tmp_path / "graph.yaml").anonymous == "clinics"
    assert load_graph(EXAMPLES / "onion" / "graph.yaml").anonymous is None


def test_vanilla_reaches_94_percent_from_2500_images_and_so_does_one_process(tmp_path: Path) -> None:
    document = splitsec("simulate", EXAMPLES / "vanilla", "--out", tmp_path)
    assert document["metrics"]["eval_accuracy"][-1] >= 0.94

    compared = subprocess.run(
        [sys.executable, EXAMPLES / "compare.py", EXAMPLES / "vanilla", tmp_path],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    shares = [line.split()[-1] for line in compared.stdout.splitlines()[1:3]]
    assert shares == [f"{document['metrics']['eval_accuracy'][-1]:.2%}"] * 2
    assert compared.stdout.splitlines()[-1] == "all 18 trained tensors are equal to the last bit"


def test_vertical_reaches_95_percent_on_patients_held_out_and_predicts_them(tmp_path: Path) -> None:
    document = splitsec("simulate", EXAMPLES / "vertical", "--out", tmp_path / "trained")
    accuracy = document["metrics"]["eval_accuracy"][-1]
    assert accuracy >= 0.95
    assert document["wall_seconds"] < 60

    predicted = splitsec("predict", EXAMPLES / "vertical", "--weights", tmp_path / "trained", "--out", tmp_path / "new")
    assert predicted["predicted"] == {"diagnosis": 169}
    logits = load_file(tmp_path / "new" / "registry" / "predictions.safetensors")["diagnosis"].flatten().tolist()
    ids = json.loads((tmp_path / "new" / "hospital" / "predicted_ids.json").read_text())
    known = one_process("vertical").data.test("registry")
    malignant = dict(zip(known["id"], known["y"].flatten().tolist(), strict=True))
    right = [(logit > 0) == (malignant[patient] > 0.5) for patient, logit in zip(ids, logits, strict=True)]
    assert sum(right) / len(right) == pytest.approx(accuracy)


def test_the_private_example_spends_what_its_readme_says(tmp_path: Path) -> None:
    """Noise makes it differ from one process, so it has no twin; its ledger and journal are what it shows."""
    state = tmp_path / "state"
    run = splitsec("simulate", EXAMPLES / "private", "--state", state)
    assert run["epochs"] == 10 and run["steps"] == 400
    entries = splitsec_alone("ledger", state)["entries"]
    assert {entry["dataset"].split("-")[0]: entry["releases"] for entry in entries} == {"train": 10, "test": 10}
    for entry in entries:
        assert (entry["party"], entry["cut"]) == ("clinic", "stem -> trunk")
        assert (entry["noise_multiplier"], entry["clip"], entry["delta"]) == (2.0, 1.0, 1e-5)
        assert 7.511 <= entry["epsilon"] <= 7.549 < entry["epsilon_budget"]
    verified = splitsec_alone("journal", "verify", state)
    assert not any(one["findings"] for one in verified["journals"])
    again = subprocess.run(
        [sys.executable, "-m", "splitsec", "simulate", EXAMPLES / "private", "--state", state, "--quiet"],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert again.returncode == 3
    assert "the privacy budget of clinic is spent" in again.stderr


def splitsec_alone(*arguments: str | Path) -> dict[str, Any]:
    """A command that shows no progress, with ``--json``."""
    command = [sys.executable, "-m", "splitsec", *map(str, arguments), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert isinstance(document, dict)
    return document
