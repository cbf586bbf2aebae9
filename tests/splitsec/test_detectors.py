"""Which detector applies to which cut, how steps are put together, what an alarm says, and where it is written.

Real graphs, plans and steps; gradients are made up so that what each rule says is known (tests/privacy/test_detection).
The engine that asks, over real channels, is in tests/processes/test_alarm.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from splitsec import journal
from splitsec.books import JOURNAL_FILE
from splitsec.cli import main
from splitsec.cli.progress import Followed
from splitsec.detectors import NAMES, Detectors, Heeded, heeded
from splitsec.errors import Refusal, SplitsecError, SuspectedAttack
from splitsec.graph import Graph, parse_graph
from splitsec.partyfile import NO_DETECTORS, OwnDetectors
from splitsec.plan import Edge, make_plan
from splitsec.privacy import detection
from splitsec.schedule import TRAIN, MicroBatch, Step


def graph_of(
    *,
    loss: str = "cross_entropy",
    shape: Sequence[int] = (),
    dtype: str = "int64",
    decoys: int = 10,
    more: Mapping[str, Any] | None = None,
) -> Graph:
    """A clinic with all samples, and a server with the loss."""
    values: dict[str, Any] = {
        "splitsec": 1,
        "name": "made",
        "parties": {"clinic": {}, "server": {"listen": "tcp://127.0.0.1:7400"}},
        "segments": {"stem": {"at": "clinic", "data": "x"}, "trunk": {"at": "server", "loss": loss}},
        "cuts": [{"from": "stem", "to": "trunk", "shape": [12], "dtype": "float32"}],
        "labels": [{"from": "clinic", "to": "trunk", "shape": list(shape), "dtype": dtype}],
        "training": {"batch_size": 32, "decoys": decoys},
    }
    for name, value in (more or {}).items():
        values[name] = value if isinstance(value, list) else {**values[name], **value}
    return parse_graph(json.dumps(values))


def edges_of(graph: Graph, party: str = "clinic") -> list[Edge]:
    return [edge for stream in make_plan(graph, party).streams for stage in stream.stages for edge in stage.outputs]


class Watched:
    """The detectors of one party, and what they said."""

    def __init__(
        self,
        graph: Graph | None = None,
        *,
        party: str = "clinic",
        wanted: OwnDetectors | None = None,
        chance: secrets.SystemRandom | None = None,
    ) -> None:
        self.graph = graph or graph_of()
        self.alarms: list[SuspectedAttack] = []
        self.warnings: list[str] = []
        self.detectors = Detectors(
            self.graph,
            make_plan(self.graph, party),
            wanted or OwnDetectors(),
            alarm=self.alarms.append,
            warn=self.warnings.append,
            chance=chance,
        )
        self.edge = next(edge for edge in edges_of(self.graph, party) if not edge.local)
        self.steps = 0

    def step(self, gradient: torch.Tensor, labels: Mapping[str, torch.Tensor], *, micro_batches: int = 1) -> None:
        """One training step, its gradient in so many parts."""
        parts = torch.tensor_split(torch.arange(len(gradient)), micro_batches)
        micros = tuple(MicroBatch(n, 0, int(rows[0]), len(rows)) for n, rows in enumerate(parts))
        step = Step(self.steps, TRAIN, 0, micros)
        self.steps += 1
        for micro, rows in zip(micros, parts, strict=True):
            part = {name: one[rows] for name, one in labels.items()}
            self.detectors.gradient(self.edge, step, micro, gradient[rows], part)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(rows: int, seed: int, classes: int = 4) -> torch.Tensor:
    return torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))


def honest(labels: torch.Tensor, seed: int, classes: int = 4) -> torch.Tensor:
    """As softmax and cross entropy give it through one linear layer."""
    chances = torch.softmax(draw(len(labels), classes, seed=seed), 1)
    return (chances - torch.nn.functional.one_hot(labels, classes)) @ draw(classes, 12, seed=99) / len(labels)


def hijacked(rows: int, seed: int) -> torch.Tensor:
    return (draw(1, 12, seed=7) + 0.3 * draw(rows, 12, seed=seed)) / rows


# --- which detector applies where


def heeded_in(graph: Graph, party: str = "clinic", cut: int = 0) -> tuple[Heeded, ...] | None:
    return heeded(graph, make_plan(graph, party), next(edge for edge in edges_of(graph, party) if edge.index == cut))


@pytest.mark.parametrize(
    ("loss", "shape", "dtype", "kind"),
    [
        ("cross_entropy", (), "int64", "classes"),
        ("nll", (), "int64", "classes"),
        ("custom", (), "int64", "classes"),
        ("cross_entropy", (10,), "float32", "probabilities"),
        ("bce_with_logits", (1,), "float32", "yes or no"),
        ("bce", (), "float64", "yes or no"),
        ("bce_with_logits", (5,), "float32", None),
        ("cross_entropy", (28, 28), "int64", None),
        ("cross_entropy", (10, 28), "float32", None),
        ("mse", (), "float32", None),
        ("custom", (), "float32", None),
        ("custom", (3,), "int64", None),
    ],
)
def test_label_agreement_applies_to_losses_that_compare_classes(
    loss: str, shape: tuple[int, ...], dtype: str, kind: str | None
) -> None:
    found = heeded_in(graph_of(loss=loss, shape=shape, dtype=dtype))
    assert found == (None if kind is None else (Heeded("y", kind, "trunk"),))  # type: ignore[arg-type]


def test_classes_are_read_out_of_labels() -> None:
    assert Heeded("y", "classes", "t").classes(torch.tensor([2, 0], dtype=torch.uint8)).tolist() == [2, 0]
    assert Heeded("y", "yes or no", "t").classes(torch.tensor([[0.05], [0.95]])).tolist() == [0, 1]
    assert Heeded("y", "probabilities", "t").classes(torch.tensor([[0.1, 0.9], [0.8, 0.2]])).tolist() == [1, 0]


U_SHAPE = {
    "segments": {
        "trunk": {"at": "server"},
        "head": {"at": "clinic", "loss": "cross_entropy"},
    },
    "cuts": [
        {"from": "stem", "to": "trunk", "shape": [12], "dtype": "float32"},
        {"from": "trunk", "to": "head", "shape": [4], "dtype": "float32"},
    ],
    "labels": [{"from": "clinic", "to": "head"}],
}


def test_labels_count_also_where_a_gradient_comes_through_a_middle_segment() -> None:
    assert heeded_in(graph_of(more=U_SHAPE)) == (Heeded("y", "classes", "head"),)


@pytest.mark.threat("T111")
def test_label_agreement_does_not_apply_without_the_labels_of_every_loss_that_a_cut_leads_to() -> None:
    two = {
        "parties": {"registry": {"listen": "tcp://127.0.0.1:7401"}},
        "segments": {"other": {"at": "server", "loss": "cross_entropy"}},
        "cuts": [
            {"from": "stem", "to": "trunk", "shape": [12], "dtype": "float32"},
            {"from": "stem", "to": "other", "shape": [12], "dtype": "float32"},
        ],
        "labels": [{"from": "clinic", "to": "trunk"}, {"from": "registry", "to": "other", "field": "z"}],
    }
    assert heeded_in(graph_of(more=two)) == (Heeded("y", "classes", "trunk"),)
    assert heeded_in(graph_of(more=two), cut=1) is None
    chain = {
        **two,
        "cuts": [
            {"from": "stem", "to": "trunk", "shape": [12], "dtype": "float32"},
            {"from": "trunk", "to": "other", "shape": [12], "dtype": "float32"},
        ],
    }
    assert heeded_in(graph_of(more=chain)) is None


# --- alarms


def test_a_step_of_many_micro_batches_is_judged_as_one() -> None:
    for micro_batches in (1, 4, 16):
        watched = Watched()
        with pytest.raises(SuspectedAttack) as caught:
            for number in range(10):
                watched.step(hijacked(32, number), {"y": labels_of(32, number)}, micro_batches=micro_batches)
        error = caught.value
        assert (error.detector, error.cut, error.party, error.batch) == (
            "label agreement",
            "stem -> trunk",
            "server",
            5,
        )
        assert watched.alarms == [error]
        assert error.evidence["other_label"] > 0.9 and abs(error.evidence["agreement"]) < 0.05
        assert error.evidence["pairs"] == 5 * 32 * 31 / 2


def test_honest_steps_pass() -> None:
    watched = Watched()
    for number in range(60):
        labels = labels_of(32, number)
        watched.step(honest(labels, number), {"y": labels}, micro_batches=1 + number % 3)
        watched.detectors.loss("trunk", Step(number, TRAIN, 0, ()), 2.0 * 0.99**number)
    assert (watched.alarms, watched.warnings, watched.detectors.batches) == ([], [], 60)


def test_an_alarm_is_ours_to_raise_and_no_verdict_on_a_peer() -> None:
    watched = Watched()
    with pytest.raises(SuspectedAttack) as caught:
        for number in range(10):
            watched.step(hijacked(32, number), {"y": labels_of(32, number)})
    error = caught.value
    assert isinstance(error, Refusal) and isinstance(error, SplitsecError)
    assert (error.exit_code, error.code) == (3, "SuspectedAttack")
    text = str(error)
    assert text.startswith("what server sends back over stem -> trunk does not heed our labels")
    assert "expected: " in text and "docs/detectors.md" in text
    assert error.detector in NAMES
    assert all(isinstance(value, float) for value in error.evidence.values())


def test_a_gradient_that_heeds_one_of_two_labels_is_honest() -> None:
    two = {
        "segments": {"trunk": {"at": "server", "loss": "cross_entropy"}, "other": {"at": "server", "loss": "bce"}},
        "cuts": [
            {"from": "stem", "to": "trunk", "shape": [12], "dtype": "float32"},
            {"from": "trunk", "to": "other", "shape": [12], "dtype": "float32"},
        ],
        "labels": [
            {"from": "clinic", "to": "trunk"},
            {"from": "clinic", "to": "other", "field": "z", "shape": [], "dtype": "float32"},
        ],
    }
    watched = Watched(graph_of(more=two))
    rare = [(labels_of(32, 200 + number, 10) == 0).float() for number in range(30)]
    for number in range(30):
        labels = labels_of(32, number)
        watched.step(honest(labels, number), {"y": labels, "z": rare[number]})
    one_of_two = Watched(graph_of(more=two))
    for number in range(30):  # nearly all labels y are one: samples of different z are pulled the same way for that
        few = (labels_of(32, 300 + number, 10) == 0).long()
        pulls = (1.0 - 2.0 * few)[:, None] * (draw(1, 12, seed=7) + 0.1 * draw(32, 12, seed=number))
        one_of_two.step(pulls / 32, {"y": few, "z": labels_of(32, number, 2).float()})
    only = Watched(graph_of(loss="bce", dtype="float32"))
    with pytest.raises(SuspectedAttack):
        for number in range(30):
            few = (labels_of(32, 300 + number, 10) == 0).long()
            pulls = (1.0 - 2.0 * few)[:, None] * (draw(1, 12, seed=7) + 0.1 * draw(32, 12, seed=number))
            only.step(pulls / 32, {"y": labels_of(32, number, 2).float()})
    with pytest.raises(SuspectedAttack):
        for number in range(10):
            watched.step(hijacked(32, number), {"y": labels_of(32, number), "z": labels_of(32, 50 + number, 2).float()})


@pytest.mark.threat("T119")
def test_huge_gradients_are_stopped_in_the_step_they_come_in() -> None:
    watched = Watched(party="clinic")
    labels = labels_of(32, 1)
    with pytest.raises(SuspectedAttack) as caught:
        watched.step(honest(labels, 1) * 1e12, {"y": labels})
    assert (caught.value.detector, caught.value.batch) == ("outliers", 1)
    alone = torch.zeros(32, 12)
    alone[0, 0] = 1e9  # of the batch's mean: the sample's own gradient is 32 times as long
    with pytest.raises(SuspectedAttack, match=r"of norm 3\.2e\+10"):
        Watched().step(alone, {"y": labels})
    watched = Watched()
    for number in range(25):
        labels = labels_of(32, number)
        watched.step(honest(labels, number), {"y": labels})
    with pytest.raises(SuspectedAttack) as caught:
        watched.step(honest(labels, 26) * 1e5, {"y": labels})
    assert caught.value.evidence["norm"] > 1e3 * caught.value.evidence["largest_before"]


@pytest.mark.threat("T119")
def test_gradients_played_back_are_stopped_where_labels_are_known_and_told_elsewhere() -> None:
    first = labels_of(32, 1)
    watched, blind = Watched(), Watched(graph_of(loss="mse", dtype="float32"))
    for one in (watched, blind):
        one.step(honest(first, 1), {"y": first})
        one.step(honest(labels_of(32, 2), 2), {"y": labels_of(32, 2)})
    with pytest.raises(SuspectedAttack) as caught:
        watched.step(honest(first, 1), {"y": labels_of(32, 3)})
    assert (caught.value.detector, caught.value.evidence) == ("outliers", {"same_as_batch": 1.0})
    for _ in range(3):
        blind.step(honest(first, 1), {"y": first.float()})
    assert len(blind.warnings) == 1 and "in step 1 of ours" in blind.warnings[0]


@pytest.mark.threat("T111")
def test_a_party_without_labels_is_warned_once_and_not_stopped() -> None:
    watched = Watched(graph_of(loss="mse", dtype="float32"))
    for number in range(60):
        watched.step(hijacked(32, number), {"y": draw(32, seed=number)})
    assert watched.alarms == []
    assert [text for text in watched.warnings if "one way" in text] == watched.warnings
    assert len(watched.warnings) == 1


def test_what_is_switched_off_says_nothing() -> None:
    watched = Watched(wanted=NO_DETECTORS)
    for number in range(300):
        watched.step(1e15 * hijacked(32, 1), {"y": labels_of(32, number)})
        watched.detectors.loss("trunk", Step(number, TRAIN, 0, ()), 2.0)
        assert not watched.detectors.decoy(Step(number, TRAIN, 0, ()))
    same, changed = hijacked(32, 1), torch.ones(32, dtype=torch.bool)
    watched.detectors.answered(watched.edge, Step(0, TRAIN, 0, ()), same, same, changed)
    assert (watched.alarms, watched.warnings) == ([], [])
    only = Watched(wanted=OwnDetectors(label_agreement=False))
    for number in range(30):
        only.step(hijacked(32, number), {"y": labels_of(32, number)})
    assert (only.alarms, len(only.warnings)) == ([], 1)


def test_streams_of_a_step_are_kept_apart() -> None:
    """A party in the middle of a parallel group has one gradient for each member and step."""
    watched = Watched()
    step = Step(0, TRAIN, 0, (MicroBatch(0, 0, 0, 8), MicroBatch(1, 1, 0, 16), MicroBatch(2, 0, 8, 8)))
    for micro in step.micro_batches:
        labels = labels_of(micro.rows, micro.number)
        watched.detectors.gradient(watched.edge, step, micro, honest(labels, micro.number), {"y": labels})
    assert watched.detectors._gathered == {}
    assert watched.detectors.batches == 1


# --- the loss


@pytest.mark.threat("T120")
def test_a_loss_that_does_not_follow_is_a_warning() -> None:
    watched = Watched()
    for number in range(400):
        watched.detectors.loss("head", Step(number, TRAIN, 0, ()), 2.3)
    assert len(watched.warnings) == 1 and "has not fallen in 200 training steps" in watched.warnings[0]
    for number in range(400, 500):
        watched.detectors.loss("head", Step(number, TRAIN, 0, ()), 23.0)
    assert len(watched.warnings) == 2 and "has grown from 2.3 to " in watched.warnings[1]
    assert watched.alarms == []


# --- decoys


class Chance(secrets.SystemRandom):
    """Draws the places that it is given."""

    def __init__(self, *places: int) -> None:
        self.places = list(places)

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        place = self.places.pop(0)
        assert place < start
        return place


def test_one_decoy_in_each_block_at_the_place_that_was_drawn() -> None:
    watched = Watched(chance=Chance(3, 9, 0))
    labels = {"y": labels_of(32, 1)}
    asked = []
    for number in range(30):
        if watched.detectors.decoy(Step(number, TRAIN, 0, ())):
            asked.append(number)
            assert watched.detectors.false_labels(labels) is not None
    assert asked == [3, 19, 20]


@pytest.mark.threat("T121")
def test_places_of_decoys_are_not_foreseeable() -> None:
    found = set()
    for _ in range(20):
        watched = Watched(graph_of(decoys=1000))
        for number in range(1000):
            if watched.detectors.decoy(Step(number, TRAIN, 0, ())):
                found.add(number)
                break
    assert len(found) > 10


def test_where_labels_cannot_be_made_false_the_next_step_is_tried() -> None:
    watched = Watched(chance=Chance(0, 0))
    one, many = {"y": torch.zeros(32).long()}, {"y": labels_of(32, 1)}
    assert watched.detectors.decoy(Step(0, TRAIN, 0, ()))
    assert watched.detectors.false_labels(one) is None
    assert watched.detectors.decoy(Step(1, TRAIN, 0, ()))
    assert watched.detectors.false_labels({}) is None
    assert watched.detectors.decoy(Step(2, TRAIN, 0, ()))
    assert watched.detectors.false_labels(many) is not None
    assert not watched.detectors.decoy(Step(3, TRAIN, 0, ()))


def test_false_labels_of_several_fields_are_those_of_one_other_sample() -> None:
    labels = {"y": torch.arange(32), "z": torch.arange(32).float().unsqueeze(1) / 2}
    false = Watched().detectors.false_labels(labels)
    assert false is not None
    assert {name: one.dtype for name, one in false.items()} == {"y": torch.int64, "z": torch.float32}
    assert torch.equal(false["z"][:, 0] * 2, false["y"].float())
    assert sorted(false["y"].tolist()) == list(range(32))
    assert 4 <= int((false["y"] != labels["y"]).sum()) <= 24


@pytest.mark.parametrize(("graph", "asked"), [(graph_of(decoys=0), 0), (graph_of(loss="l1", dtype="float32"), 0)])
def test_there_are_no_decoys_where_they_are_not_wanted_or_say_nothing(graph: Graph, asked: int) -> None:
    watched = Watched(graph)
    assert sum(watched.detectors.decoy(Step(number, TRAIN, 0, ())) for number in range(50)) == asked


def test_a_peer_that_answers_a_decoy_as_it_answers_the_truth_is_stopped() -> None:
    labels = labels_of(32, 1)
    false = labels_of(32, 2)
    changed = labels != false
    watched = Watched()
    watched.step(honest(labels, 1), {"y": labels})
    watched.detectors.answered(watched.edge, Step(1, TRAIN, 0, ()), honest(false, 1), honest(labels, 1), changed)
    assert watched.alarms == []
    with pytest.raises(SuspectedAttack) as caught:
        watched.detectors.answered(watched.edge, Step(1, TRAIN, 0, ()), hijacked(32, 1), hijacked(32, 1), changed)
    error = caught.value
    assert (error.detector, error.batch, watched.alarms) == ("decoys", 2, [error])
    assert error.evidence == {"changed": 0.0, "control": 0.0, "rows": float(changed.sum())}
    numbers = Watched(graph_of(loss="l1", dtype="float32"))
    numbers.detectors.answered(numbers.edge, Step(1, TRAIN, 0, ()), hijacked(32, 1), hijacked(32, 1), changed)
    assert numbers.alarms == [], "far from its target such a loss does the same"


# --- where an alarm is written


def suspected() -> SuspectedAttack:
    return SuspectedAttack(
        "what server sends back does not heed our labels",
        detector="label agreement",
        cut="stem -> trunk",
        party="server",
        batch=5,
        evidence={"agreement": 0.004, "pairs": 2480.0},
    )


def test_an_alarm_is_an_entry_of_the_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "clinic" / JOURNAL_FILE
    one = suspected()
    with journal.Journal(file, party="clinic", graph_digest="ab" * 32, version="test") as written:
        number = written.alarm(detector=one.detector, cut=one.cut, peer=one.party, batch=5, evidence=one.evidence)
        marks = json.loads(file.with_name(file.name + journal.HEAD_SUFFIX).read_text())
        assert marks["synced"]["number"] == number == 2, "on the disk before anybody is told"
    *_, entry = journal.read(file)
    assert (entry.kind, entry.values["detector"], entry.values["batch"]) == ("alarm", "label agreement", 5)
    assert entry.values["evidence"] == {"agreement": 0.004, "pairs": 2480.0}
    assert journal.verify(file) == []
    assert main(["journal", "show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "ALARM label agreement: stem -> trunk from server, training step 5: agreement 0.004, pairs 2480" in shown


@pytest.mark.parametrize("quiet", [False, True])
def test_the_operator_is_told_in_a_plain_sentence(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    one = suspected()
    with Followed(quiet=quiet) as watch:
        watch("clinic", {"event": "alarm", "batch": 5, "detector": one.detector, "text": one.seen})
    told = " ".join(capsys.readouterr().err.split())
    assert "clinic: ALARM in training step 5 (label agreement): what server sends back does not heed our labels" in told
    assert told.endswith("nothing more leaves")


def test_thresholds_leave_room_on_both_sides() -> None:
    """What the measurement said (docs/detectors.md); a threshold that is moved must be measured again."""
    assert (detection.COMMON, detection.SHARED, detection.HEEDED, detection.WINDOW) == (0.4, 0.6, 0.25, 5)
