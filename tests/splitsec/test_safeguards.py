"""What happens to a tensor at the door: budget, then clip and noise, then the journal, then the channel; nothing after
what failed.

The real guard, safeguards, ledger and journal; only the I/O thread is one that remembers what it was given to send.
What is demanded of a lane is worked out in test_demands, and the parts are tested each by itself in tests/privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch

from splitsec import journal
from splitsec.books import JOURNAL_FILE, LEDGER_FILE, open_books
from splitsec.demands import demands_of, learnt_from
from splitsec.errors import BudgetSpent, EgressRefused, LedgerError, UnsafeSegment, UserError
from splitsec.graph import Graph, parse_graph
from splitsec.guard import Guard
from splitsec.journal import Journal
from splitsec.messages import Message, decode
from splitsec.party import Job
from splitsec.partyfile import Leakage, OwnPrivacy, PartyFile
from splitsec.plan import make_plan
from splitsec.privacy import ledger as books
from splitsec.privacy.dpsgd import PrivateTraining
from splitsec.privacy.leakage import measure
from splitsec.privacy.ledger import Ledger
from splitsec.privacy.mechanism import clip_rows, gaussian, laplace, randomise_labels
from splitsec.privacy.randomness import SeededSourceForTests
from splitsec.safeguards import Carried, Safeguards
from splitsec.samples import Samples, sample_keys
from splitsec.schedule import (
    EVALUATE,
    TRAIN,
    Count,
    HandOn,
    Turn,
    affordable_epochs,
    run_schedule,
    step_count,
    steps_of,
)

GAUSSIAN = "{clip: 1.0, noise: gaussian, noise_multiplier: 2.0}"
HEAD = """\
splitsec: 1
name: safe
parties:
  clinic: {}
  server: {listen: "tcp://127.0.0.1:7400"}
"""
VANILLA = HEAD + """\
segments:
  stem: {at: clinic, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [4], dtype: float32, privacy: {forward: FORWARD}}
labels:
  - {from: clinic, to: trunk, LABELS}
training: {batch_size: 16, micro_batches: 2}
"""  # fmt: skip
BENT = HEAD + """\
segments:
  stem: {at: clinic, data: x}
  trunk: {at: server}
  head: {at: clinic, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [4], dtype: float32, privacy: {forward: {clip: 1.0}}}
  - {from: trunk, to: head, shape: [4], dtype: float32, privacy: {backward: FORWARD}}
  - {from: stem, to: head, shape: [4], dtype: float32}
labels:
  - {from: clinic, to: head}
training: {batch_size: 16}
"""  # fmt: skip
SPLITS = {"train": 24, "test": 8, "predict": 8}
KEYS = {"clinic": b"c" * 32, "server": b"s" * 32}
DELTA = 1e-5


def vanilla(forward: str = GAUSSIAN, labels: str = "field: y") -> Graph:
    return parse_graph(VANILLA.replace("FORWARD", forward).replace("LABELS", labels))


def exact(releases: int, noise_multiplier: float = 2.0) -> float:
    """Epsilon at ``DELTA`` of so many releases (Balle and Wang 2018, theorem 8; Dong, Roth and Su 2022), bisected."""
    mu = math.sqrt(releases) / noise_multiplier
    low, high = 0.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2
        cdf = NormalDist().cdf
        delta = cdf(mu / 2 - middle / mu) - math.exp(middle) * cdf(-mu / 2 - middle / mu)
        low, high = (middle, high) if delta > DELTA else (low, middle)
    return high


class Thread:
    """Stands where the I/O thread does."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.tensors: list[torch.Tensor | None] = []
        self.before_sending: Callable[[], None] = lambda: None

    def send(
        self, peer: bytes, lane: int, header: bytes, body: Sequence[memoryview] = (), *, wait: bool = True
    ) -> None:
        self.before_sending()
        whole = b"".join(bytes(part) for part in body)
        self.sent.append(header + whole)
        self.tensors.append(next(iter(decode(header, memoryview(bytearray(whole))).tensors.values()), None))

    def receive(self, timeout: float | None = None) -> None:
        return None

    def close_peer(self, peer: bytes, reason: int, why: str) -> None:
        raise AssertionError("nobody misbehaves here")

    def close(self, reason: int = 0, linger: float = 0) -> None:
        pass


class Watched:
    """Noise for tests that says when it is drawn."""

    def __init__(self, seed: int, drawn: Callable[[], None]) -> None:
        self._source = SeededSourceForTests(seed)
        self._drawn = drawn

    def fill(self, out: torch.Tensor) -> None:
        self._drawn()
        self._source.fill(out)

    def words(self, count: int) -> torch.Tensor:
        self._drawn()
        return self._source.words(count)


class Door:
    """A party's guard with its books; ``look`` reads what is on the disk, as another process would."""

    def __init__(
        self,
        state: Path,
        graph: Graph,
        own: OwnPrivacy | None = None,
        *,
        seed: int = 5,
        drawn: Callable[[], None] = lambda: None,
        private: Mapping[str, PrivateTraining] | None = None,
        inputs: torch.Tensor | None = None,
    ) -> None:
        state.mkdir(exist_ok=True)
        self.state, self.graph = state, graph
        self.plan = make_plan(graph, "clinic")
        self.ledger = Ledger(state / LEDGER_FILE, party="clinic")
        self.journal = Journal(state / JOURNAL_FILE, party="clinic", graph_digest="ab" * 32, version="0")
        self.datasets = {
            split: self.ledger.dataset(split, [f"{split}/{row}".encode() for row in range(count)])
            for split, count in SPLITS.items()
        }
        own = own or OwnPrivacy()
        self.ledger.set_policy(delta=own.delta, budget=own.epsilon, label_budget=own.label_epsilon)
        self.warnings: list[str] = []
        self.safeguards = Safeguards(
            demands_of(graph, PartyFile(party="clinic", privacy=own), self.plan),
            own=own,
            private=private,
            learnt_from=learnt_from(self.plan),
            ledger=self.ledger,
            datasets=self.datasets,
            journal=self.journal,
            source=Watched(seed, drawn),
            warn=self.warnings.append,
        )
        self.thread = Thread()
        self.guard = Guard(self.plan, {"server": KEYS["server"]}, self.thread, connect_timeout=5,
                           safeguards=self.safeguards)  # fmt: skip
        self.inputs = torch.zeros(24, 4) if inputs is None else inputs

    def lane(self, kind: str) -> tuple[str, int]:
        (key,) = [key for key, lane in self.plan.lanes_out.items() if lane.kind == kind]
        return key

    def carried(self, rows: Sequence[int], split: str = "train") -> Carried:
        return Carried(split, torch.tensor(rows), {"x": self.inputs}, split == "train")

    def release(
        self,
        kind: str,
        tensor: torch.Tensor | None,
        rows: Sequence[int],
        *,
        key: tuple[int, int] = (0, 0),
        split: str = "train",
        lane: tuple[str, int] | None = None,
    ) -> None:
        message = Message(kind, key, tensors={} if tensor is None else {"": tensor})
        self.guard.release(lane or self.lane(kind), message, self.carried(rows, split))

    def counts(self) -> dict[str, list[int]]:
        """Releases on the disk of every sample of the training split, by account; only accounts with any."""
        book = books.read(self.state / LEDGER_FILE)
        slots = self.datasets["train"].slots
        found = {f"{one.cut} / {one.protects}": book.releases(one)[slots].tolist() for one in book.accounts}
        return {name: counts for name, counts in found.items() if any(counts)}

    def written(self) -> list[dict[str, Any]]:
        """Messages in the journal."""
        return [one.values for one in journal.read(self.state / JOURNAL_FILE) if one.kind != "opened"]


@pytest.fixture
def doors(tmp_path: Path) -> Iterator[Callable[..., Door]]:
    made: list[Door] = []

    def make(graph: Graph, own: OwnPrivacy | None = None, **more: Any) -> Door:
        made.append(Door(tmp_path / f"state-{len(made)}", graph, own, **more))
        return made[-1]

    yield make
    for one in made:
        one.safeguards.close()


def activation(rows: int = 4, scale: float = 10.0) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows)) * scale


ROWS = [3, 0, 7, 20]
ONCE = [1 if row in ROWS else 0 for row in range(SPLITS["train"])]


# --- the order of acts


def test_spent_then_noised_then_written_down_then_sent(doors: Callable[..., Door]) -> None:
    """At each act what came before is on the disk, and what comes after has not begun."""
    seen: list[str] = []

    def drawn() -> None:
        if seen:
            return
        seen.append("noise")
        assert [int(count > 0) for count in door.counts()["stem -> trunk / inputs"]] == ONCE
        assert door.written() == []

    def sending() -> None:
        seen.append("sending")
        (entry,) = door.written()
        assert (entry["kind"], entry["records"], entry["privacy"]) == ("activation", 4, "clip 1, gaussian 2")

    door = doors(vanilla(), drawn=drawn)
    door.thread.before_sending = sending
    door.release("activation", activation(), ROWS)
    assert seen == ["noise", "sending"]
    assert len(door.thread.sent) == 1


def test_where_nothing_can_be_spent_nothing_is_drawn_written_or_sent(doors: Callable[..., Door]) -> None:
    drawn: list[int] = []
    door = doors(vanilla(), drawn=lambda: drawn.append(1))
    door.release("activation", activation(), [1, 2, 4, 5])
    before, entries = len(drawn), door.written()
    door.ledger.close()  # as a full disk would
    with pytest.raises(LedgerError, match="the ledger cannot be written") as refused:
        door.release("activation", activation(), ROWS, key=(1, 0))
    assert "nothing was sent" in refused.value.fix
    assert (len(drawn), door.written(), len(door.thread.sent)) == (before, entries, 1)


class NoNoise(Exception):
    pass


def test_where_noise_fails_the_budget_is_spent_and_nothing_is_written_or_sent(doors: Callable[..., Door]) -> None:
    def fail() -> None:
        raise NoNoise

    door = doors(vanilla(), drawn=fail)
    with pytest.raises(NoNoise):
        door.release("activation", activation(), ROWS)
    assert door.counts() == {"stem -> trunk / inputs": ONCE}
    assert (door.written(), door.thread.sent) == ([], [])


def test_where_the_journal_fails_nothing_is_sent(doors: Callable[..., Door]) -> None:
    door = doors(vanilla())
    door.journal.close()
    with pytest.raises(UserError):
        door.release("activation", activation(), ROWS)
    assert door.counts() == {"stem -> trunk / inputs": ONCE}
    assert door.thread.sent == []


def test_what_the_graph_does_not_declare_costs_nothing(doors: Callable[..., Door]) -> None:
    door = doors(vanilla())
    with pytest.raises(EgressRefused):
        door.release("activation", torch.full((4, 4), math.nan), ROWS)
    assert (door.counts(), door.written(), door.thread.sent) == ({}, [], [])


def test_a_release_that_would_pass_the_budget(doors: Callable[..., Door]) -> None:
    """Two fit; the third is refused, also where only one sample of the batch has no budget left."""
    drawn: list[int] = []
    door = doors(vanilla(), OwnPrivacy(epsilon=exact(2) + 0.01, delta=DELTA), drawn=lambda: drawn.append(1))
    door.release("activation", activation(), ROWS)
    door.release("activation", activation(), ROWS, key=(1, 0))
    before, spent = len(drawn), door.counts()
    with pytest.raises(BudgetSpent, match="and the budget for inputs is") as refused:
        door.release("activation", activation(), [8, 9, 10, 3], key=(2, 0))
    assert refused.value.exit_code == 3
    assert "nothing was sent" in refused.value.fix
    assert (door.counts(), len(drawn), len(door.written()), len(door.thread.sent)) == (spent, before, 2, 2)
    door.release("activation", activation(), [8, 9, 10, 11], key=(3, 0))
    assert len(door.thread.sent) == 3


# --- what leaves


MECHANISMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    GAUSSIAN: lambda x: gaussian(x, clip=1.0, noise_multiplier=2.0, source=SeededSourceForTests(5)),
    "{clip: 3.0, noise: laplace, noise_multiplier: 0.5}": lambda x: laplace(
        x, clip=3.0, noise_multiplier=0.5, source=SeededSourceForTests(5)
    ),
    "{clip: 2.0}": lambda x: clip_rows(x, 2.0),
}


@pytest.mark.parametrize("forward", MECHANISMS)
def test_what_is_sent_is_clipped_and_noised_and_what_was_given_stays(forward: str, doors: Callable[..., Door]) -> None:
    door = doors(vanilla(forward))
    given = activation()
    kept = given.clone()
    door.release("activation", given, ROWS)
    (sent,) = door.thread.tensors
    assert sent is not None and torch.equal(sent, MECHANISMS[forward](kept))
    assert not torch.allclose(sent, kept, atol=0.1)
    assert torch.equal(given, kept)


def test_each_message_has_noise_of_its_own(doors: Callable[..., Door]) -> None:
    door = doors(vanilla())
    door.release("activation", activation(), ROWS)
    door.release("activation", activation(), ROWS, key=(1, 0))
    one, other = door.thread.tensors
    assert one is not None and other is not None and not (one == other).any()


def test_a_tensor_that_no_noise_can_be_given_is_refused(doors: Callable[..., Door]) -> None:
    """Half precision cannot hold noise of this size: it would arrive as infinity."""
    graph = parse_graph(
        VANILLA.replace("FORWARD", "{clip: 10000.0, noise: gaussian, noise_multiplier: 2.0}")
        .replace("LABELS", "field: y")
        .replace("float32", "float16")
    )
    door = doors(graph)
    with pytest.raises(EgressRefused, match="activation of stem -> trunk to server: noise of scale 40000 does not fit"):
        door.release("activation", activation().half(), ROWS)
    assert door.thread.sent == []


def test_gradients_that_go_back_are_clipped_and_noised(doors: Callable[..., Door]) -> None:
    door = doors(parse_graph(BENT.replace("FORWARD", GAUSSIAN)))
    given = activation()
    kept = given.clone()
    door.release("gradient", given, ROWS)
    (sent,) = door.thread.tensors
    assert sent is not None and torch.equal(sent, MECHANISMS[GAUSSIAN](kept))
    assert torch.equal(given, kept)
    assert door.counts() == {f"trunk -> head (gradient) / {what}": ONCE for what in ("inputs", "labels")}
    assert door.written()[0]["privacy"] == "clip 1, gaussian 2"


def test_labels_are_randomised(doors: Callable[..., Door]) -> None:
    door = doors(vanilla("{clip: 1.0}", "privacy: {epsilon: 0.5, classes: 3}"))
    given = torch.tensor([0, 1, 2, 0, 1, 2, 2, 2])
    kept, rows = given.clone(), [3, 0, 7, 20, 5, 6, 8, 9]
    door.release("labels", given, rows)
    (sent,) = door.thread.tensors
    expected = randomise_labels(kept, classes=3, epsilon=0.5, source=SeededSourceForTests(5))
    assert sent is not None and torch.equal(sent, expected)
    assert not torch.equal(sent, kept) and torch.equal(given, kept)
    once = [1 if row in rows else 0 for row in range(24)]
    assert door.counts() == {"labels: clinic -> trunk / labels": once}
    door.release("activation", activation(), ROWS)  # clipped, no noise: on record, with no epsilon
    assert sorted(door.counts()) == ["labels: clinic -> trunk / labels", "stem -> trunk / inputs"]


def test_a_label_outside_the_classes_does_not_leave(doors: Callable[..., Door]) -> None:
    door = doors(vanilla("{clip: 1.0}", "privacy: {epsilon: 0.5, classes: 3}"))
    with pytest.raises(EgressRefused, match="labels run from 0 to 3, with 3 classes"):
        door.release("labels", torch.tensor([0, 1, 2, 3]), ROWS)
    assert door.thread.sent == []


def test_samples_as_they_are_do_not_leave_in_another_shape_or_precision_either(doors: Callable[..., Door]) -> None:
    inputs = torch.randn(24, 1, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    door = doors(vanilla(), inputs=inputs)
    with pytest.raises(UnsafeSegment, match="equals the samples themselves"):
        door.release("activation", inputs[ROWS].reshape(4, 4).float(), ROWS)
    assert (door.counts(), door.written(), door.thread.sent) == ({}, [], [])
    door.release("activation", inputs[ROWS].reshape(4, 4).float() + 1e-3, ROWS, key=(1, 0))
    assert len(door.thread.sent) == 1


def test_a_sample_leaves_once_a_step(doors: Callable[..., Door]) -> None:
    door = doors(vanilla())
    door.release("activation", activation(), ROWS)
    with pytest.raises(EgressRefused, match="a sample twice in step 0"):
        door.release("activation", activation(), [1, 2, 4, 20], key=(0, 1))
    with pytest.raises(EgressRefused, match="a sample twice in step 1"):
        door.release("activation", activation(), [1, 2, 4, 1], key=(1, 0))
    assert door.counts() == {"stem -> trunk / inputs": ONCE}
    door.release("labels", torch.tensor([0, 1, 2, 0]), ROWS)  # another lane
    door.release("activation", activation(), ROWS, key=(2, 0))  # another step
    assert len(door.thread.sent) == 3


# --- what counts


def test_evaluation_and_prediction_count(doors: Callable[..., Door]) -> None:
    door = doors(vanilla())
    for step, (split, times) in enumerate({"train": 1, "test": 2, "predict": 3}.items()):
        for again in range(times):
            door.release("activation", activation(), [1, 2, 3, 4], key=(10 * step + again, 0), split=split)
    entries = {entry.dataset: entry for entry in door.ledger.statement()}
    assert {name: entry.releases for name, entry in entries.items()} == {"train": 1, "test": 2, "predict": 3}
    for name, times in (("train", 1), ("test", 2), ("predict", 3)):
        assert exact(times) <= entries[name].epsilon <= exact(times) * 1.005


def test_an_empty_answer_is_not_counted(doors: Callable[..., Door]) -> None:
    """In a step without training the way back is empty."""
    door = doors(parse_graph(BENT.replace("FORWARD", GAUSSIAN)))
    door.release("gradient", None, ROWS, split="test")
    assert door.counts() == {}
    (entry,) = door.written()
    assert (entry["records"], entry["privacy"], entry["shapes"]) == (0, None, [])
    assert len(door.thread.sent) == 1


def test_what_leaves_in_the_clear_beside_noise_has_no_bound(doors: Callable[..., Door]) -> None:
    """The gradient at the head has noise, the activation is clipped only: both carry the same inputs."""
    door = doors(parse_graph(BENT.replace("FORWARD", GAUSSIAN)))
    door.release("gradient", activation(), ROWS)
    alone = {entry.protects: entry.epsilon for entry in door.ledger.statement()}
    assert alone["inputs"] == alone["labels"] == pytest.approx(exact(1), rel=1e-4)
    door.release("activation", activation(), ROWS)
    together = {(entry.cut, entry.protects): entry.epsilon for entry in door.ledger.statement()}
    assert together == {
        ("stem -> trunk", "inputs"): math.inf,
        ("trunk -> head (gradient)", "inputs"): math.inf,
        ("trunk -> head (gradient)", "labels"): alone["labels"],  # no label leaves with the activation
    }


def open_of(graph: Graph, state: Path, **privacy: Any) -> tuple[Safeguards, list[str]]:
    events: list[dict[str, Any]] = []
    party = PartyFile(party="clinic", privacy=OwnPrivacy(**privacy) if privacy else None)
    demands = demands_of(graph, party, make_plan(graph, "clinic"))
    samples = {"train": Samples({"x": torch.arange(8.0).reshape(8, 1), "y": torch.zeros(8)}, None, 8)}
    opened = open_books(graph, party, demands, samples, {}, Job(state=state), events.append)
    return opened, [event["text"] for event in events if event["event"] == "warning"]


def test_books_are_opened_where_they_are_needed_and_say_what_they_cannot_bound(tmp_path: Path) -> None:
    plain = parse_graph(VANILLA.replace(", privacy: {forward: FORWARD}", "").replace("LABELS", "field: y"))
    for name, graph, privacy, files, warned in (
        ("nothing", plain, {}, [], 0),
        ("journal", vanilla("{clip: 1.0}"), {}, [JOURNAL_FILE], 0),
        ("policy", plain, {"delta": 1e-6}, [JOURNAL_FILE], 0),
        ("noise", vanilla(), {}, [JOURNAL_FILE, LEDGER_FILE], 0),
        ("clear", parse_graph(BENT.replace("FORWARD", GAUSSIAN)), {}, [JOURNAL_FILE, LEDGER_FILE], 1),
    ):
        safeguards, warnings = open_of(graph, tmp_path / name, **privacy)
        safeguards.close()
        found = sorted(file.name for file in (tmp_path / name).glob("*"))
        assert [file for file in found if file in (JOURNAL_FILE, LEDGER_FILE)] == files, name
        assert len(warnings) == warned, name
    assert warnings == [
        "the activation of stem -> trunk to server carries inputs without noise, while other noise is accounted for: "
        "together no finite epsilon holds, and the ledger will say so"
    ]


def test_books_warn_of_weights_that_are_handed_on_beside_noise(tmp_path: Path) -> None:
    noised = group("round_robin", "end").model_dump(by_alias=True)
    floor = {"forward": {"clip": 1.0, "noise": "gaussian", "noise_multiplier": 2.0}}
    noised["cuts"] = [{**noised["cuts"][0], "privacy": floor}]
    for name, graph, private, warned in (
        ("clear", group("round_robin", "end"), {}, 0),
        ("noised", Graph.model_validate(noised), {}, 1),
        ("private", Graph.model_validate(noised), {"stem": private_stem()}, 0),
    ):
        party = PartyFile(party="a")
        told: list[dict[str, Any]] = []
        demands = demands_of(graph, party, make_plan(graph, "a"))
        own = {"train": samples(torch.randn(4, 2), torch.zeros(4))}
        open_books(graph, party, demands, own, private, Job(state=tmp_path / name), told.append).close()
        assert len(told) == warned, name
        assert all("the weights of stem are handed on to b without noise" in event["text"] for event in told)


def private_stem() -> PrivateTraining:
    return PrivateTraining(torch.nn.Linear(4, 4), clip=2.0, noise_multiplier=4.0, source=SeededSourceForTests(1))


def test_weights_are_accounted_for_beside_what_leaves(doors: Callable[..., Door]) -> None:
    private = private_stem()
    door = doors(vanilla(), private={"stem": private})
    door.guard.account_for("stem", private, door.carried(ROWS))
    assert door.counts() == {"weights of stem / inputs": ONCE}
    door.release("activation", activation(), ROWS)
    by_cut = {entry.cut: entry for entry in door.ledger.statement()}
    assert set(by_cut) == {"stem -> trunk", "weights of stem"}
    # multipliers 2 and 4 compose to 1 / sqrt(1/4 + 1/16)
    composed = exact(1, 1 / math.sqrt(1 / 4 + 1 / 16))
    for entry in by_cut.values():
        assert entry.epsilon == pytest.approx(composed, rel=1e-4)
    assert (by_cut["weights of stem"].clip, by_cut["weights of stem"].noise_multiplier) == (2.0, 4.0)
    with pytest.raises(BudgetSpent, match="weights of stem"):
        spent = doors(vanilla(), OwnPrivacy(epsilon=0.01), private={"stem": private})
        spent.guard.account_for("stem", private, spent.carried(ROWS))


def test_what_was_reserved_and_not_released_is_given_back_at_an_orderly_end(tmp_path: Path) -> None:
    door = Door(tmp_path / "state", vanilla())
    batches = [torch.arange(start, start + 8) for start in (0, 8, 16)]
    door.safeguards.expect("train", batches)
    door.release("activation", activation(8), batches[0].tolist())
    assert door.counts() == {"stem -> trunk / inputs": [1] * 24}  # one write for the whole turn
    door.safeguards.close()
    assert door.counts() == {"stem -> trunk / inputs": [1] * 8 + [0] * 16}


# --- before a run


def test_how_many_passes_are_left(doors: Callable[..., Door]) -> None:
    door = doors(vanilla(), OwnPrivacy(epsilon=exact(5) + 0.01, delta=DELTA))

    def left(split: str = "train", *, most: int = 100, training: bool = True) -> int:
        return door.safeguards.passes_left(split, training=training, labels=True, most=most)

    assert (left(), left(most=3), left("test", training=False), left("no such split")) == (5, 3, 5, 100)
    door.release("activation", activation(), ROWS)
    door.release("activation", activation(), ROWS, key=(1, 0))
    assert (left(), left("test", training=False)) == (3, 5)  # the sample that has least left decides
    assert doors(vanilla()).safeguards.passes_left("train", training=True, labels=True, most=9) == 9  # no budget


def test_passes_with_gradients_labels_and_weights(doors: Callable[..., Door]) -> None:
    """Answers go back in training only; labels have a budget of their own and do not leave in a prediction."""
    text = BENT.replace("{forward: {clip: 1.0}}", "{forward: FORWARD}")
    bent = parse_graph(text.replace("FORWARD", GAUSSIAN))
    door = doors(bent, OwnPrivacy(epsilon=exact(6) + 0.01, delta=DELTA, label_epsilon=exact(1) + 0.01))
    passes = door.safeguards.passes_left
    assert passes("train", training=True, labels=True, most=100) == 1  # one gradient tells about a label
    assert passes("test", training=False, labels=True, most=100) == 6
    door = doors(bent, OwnPrivacy(epsilon=exact(6) + 0.01, delta=DELTA))
    assert door.safeguards.passes_left("train", training=True, labels=True, most=100) == 3  # two releases a pass
    spoken = vanilla(GAUSSIAN, "privacy: {epsilon: 1.0, classes: 3}")
    door = doors(spoken, OwnPrivacy(label_epsilon=2.01, delta=DELTA))
    passes = door.safeguards.passes_left
    assert passes("train", training=True, labels=True, most=100) == 2
    assert passes("predict", training=False, labels=False, most=100) == 100
    private = private_stem()
    door = doors(vanilla(), OwnPrivacy(epsilon=exact(5) + 0.01, delta=DELTA), private={"stem": private})
    passes = door.safeguards.passes_left
    assert passes("train", training=True, labels=True, most=100) == 4  # 4 (1/4 + 1/16) = 5/4
    assert passes("test", training=False, labels=True, most=100) == 5


def test_two_outputs_over_one_cut_cost_two_releases_a_pass(doors: Callable[..., Door]) -> None:
    text = VANILLA.replace("FORWARD", GAUSSIAN).replace("LABELS", "field: y")
    (cut,) = [line for line in text.splitlines() if "from: stem" in line]
    both = "\n".join(cut.replace("to: trunk", f"to: trunk, output: {name}") for name in ("one", "two"))
    graph = parse_graph(text.replace(cut, both))
    door = doors(graph, OwnPrivacy(epsilon=exact(6) + 0.01, delta=DELTA))
    assert door.safeguards.passes_left("train", training=True, labels=True, most=100) == 3
    lanes = [key for key, lane in door.plan.lanes_out.items() if lane.kind == "activation"]
    for step, lane in product(range(3), lanes):
        door.release("activation", activation(), ROWS, key=(step, 0), lane=lane)
    assert door.counts() == {"stem -> trunk / inputs": [6 * one for one in ONCE]}
    with pytest.raises(BudgetSpent):
        door.release("activation", activation(), ROWS, key=(3, 0), lane=lanes[0])


GROUP = """\
splitsec: 1
name: registered
parties:
  a: {}
  b: {}
  c: {}
  clinic: {listen: "tcp://127.0.0.1:7401"}
  server: {listen: "tcp://127.0.0.1:7400"}
groups: {clinics: {members: [a, b, c], schedule: parallel}}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server}
  head: {at: clinics, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [4], dtype: float32}
  - {from: trunk, to: head, shape: [4], dtype: float32}
labels:
  - {from: clinic, to: head, privacy: {epsilon: 1.0, classes: 3}}
"""


def test_labels_for_the_members_of_a_group_cost_one_release_a_pass(doors: Callable[..., Door]) -> None:
    """Three lanes, one for each member; a sample is with one of them."""
    door = doors(parse_graph(GROUP), OwnPrivacy(label_epsilon=2.01, delta=DELTA))
    assert len([lane for lane in door.plan.lanes_out.values() if lane.kind == "labels"]) == 3
    assert door.safeguards.passes_left("train", training=True, labels=True, most=100) == 2


# --- leakage


def looked_at(doors: Callable[..., Door], **leakage: Any) -> Door:
    inputs = torch.randn(24, 4, generator=torch.Generator().manual_seed(3))
    return doors(vanilla("{clip: 1.0}"), OwnPrivacy(leakage=Leakage(**leakage)), inputs=inputs)


def test_leakage_is_measured_on_what_left_at_every_nth_step(doors: Callable[..., Door]) -> None:
    door = looked_at(doors, every=2)
    rows = [list(range(start, start + 8)) for start in (0, 8, 16)]
    given = [door.inputs[chosen] * 5 + index for index, chosen in enumerate(rows)]
    for step in range(3):
        door.release("activation", given[step], rows[step], key=(step, 0))
    sent = [clip_rows(one, 1.0) for one in given]
    found = [measure(door.inputs[rows[step]], sent[step]) for step in (0, 2)]
    leaked = door.safeguards.take_leakage()
    assert set(leaked) == {"stem -> trunk"}
    assert leaked["stem -> trunk"] == {name: pytest.approx((found[0][name] + found[1][name]) / 2) for name in found[0]}
    assert door.safeguards.take_leakage() == {}


def test_leakage_is_not_measured_on_a_handful_nor_in_evaluation(doors: Callable[..., Door]) -> None:
    door = looked_at(doors, every=1)
    door.release("activation", door.inputs[:7] * 2, range(7))
    door.release("activation", door.inputs[:8] * 2, range(8), key=(1, 0), split="test")
    assert door.safeguards.take_leakage() == {}
    door.release("activation", door.inputs[:8] * 2, range(8), key=(2, 0))
    assert list(door.safeguards.take_leakage()) == ["stem -> trunk"]
    silent = doors(vanilla("{clip: 1.0}"))
    silent.release("activation", activation(8), range(8))
    assert silent.safeguards.take_leakage() == {}


def test_leakage_above_the_limit_is_told_once(doors: Callable[..., Door]) -> None:
    door = looked_at(doors, every=1, limit=0.5)
    noise = torch.randn(8, 4, generator=torch.Generator().manual_seed(4))
    for step, sent in enumerate([noise, door.inputs[:8] * 0.1, door.inputs[:8] * 0.2]):
        door.release("activation", sent, range(8), key=(step, 0))
        leaked = door.safeguards.take_leakage()["stem -> trunk"]["distance_correlation_corrected"]
        assert (leaked > 0.5) == (step > 0)
        assert len(door.warnings) == min(step, 1)
    assert "what leaves over stem -> trunk tells more about the samples than this party wants" in door.warnings[0]
    assert "(bias-corrected), limit 0.5" in door.warnings[0]


# --- whose turn it is, where budgets limit it

STREAMS = """\
splitsec: 1
name: turns
parties:
  a: {}
  b: {}
  c: {}
  server: {listen: "tcp://127.0.0.1:7400"}
groups: {clinics: {members: [a, b, c], schedule: SCHEDULE}}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts: [{from: stem, to: trunk, shape: [4], dtype: float32}]
labels: [{from: clinics, to: trunk}]
training: {epochs: 3, batch_size: 4, micro_batches: 2, drop_last: DROP}
privacy: {when_spent: SPENT}
"""


def group(schedule: str, spent: str = "leave", *, drop: bool = False) -> Graph:
    return parse_graph(
        STREAMS.replace("SCHEDULE", schedule).replace("SPENT", spent).replace("DROP", "true" if drop else "false")
    )


def count(train: int = 10, test: int = 5, **turns: int) -> Count:
    return {"train": train, "test": test, "predict": 0, **turns}


def test_when_a_budget_ends_the_run_for_all_it_is_as_long_as_the_shortest() -> None:
    end, leave = group("round_robin", "end"), group("round_robin", "leave")
    short = [count(), count(train_turns=4), count(train_turns=6, test_turns=2)]
    assert affordable_epochs(end, short, 9) == 2
    assert affordable_epochs(end, short[:2], 9) == 4
    assert affordable_epochs(end, short, 1) == 1
    assert affordable_epochs(end, [count()], 9) == 9
    assert affordable_epochs(end, [count(test=0, test_turns=0), count(train_turns=5)], 9) == 5  # it has no test samples
    assert affordable_epochs(leave, short, 9) == 9


def test_a_member_whose_budget_is_spent_is_passed_over() -> None:
    counts = [count(), count(train_turns=1), count()]
    train, evaluate = ([Turn(phase, epoch, (k,)) for k in range(3)] for phase, epoch in ((TRAIN, 0), (EVALUATE, 0)))
    assert list(run_schedule(group("round_robin"), epochs=2, counts=counts)) == [
        train[0],
        HandOn(0, 1, 0),
        train[1],
        HandOn(1, 2, 0),
        train[2],
        evaluate[2],
        HandOn(2, 0, 0),
        evaluate[0],
        HandOn(0, 1, 0),
        evaluate[1],
        Turn(TRAIN, 1, (0,)),
        HandOn(0, 2, 1),
        Turn(TRAIN, 1, (2,)),
        Turn(EVALUATE, 1, (2,)),
        HandOn(2, 0, 1),
        Turn(EVALUATE, 1, (0,)),
        HandOn(0, 1, 1),
        Turn(EVALUATE, 1, (1,)),  # its test samples may still be used
    ]


TURNS: list[dict[str, int]] = [{}, {"train_turns": 0}, {"train_turns": 1, "test_turns": 1}, {"test_turns": 2}]


@pytest.mark.parametrize("limits", list(product(TURNS, repeat=3)), ids=str)
def test_whoever_has_a_turn_has_the_newest_weights(limits: tuple[dict[str, int], ...]) -> None:
    """For all mixtures of budgets: along hand-ons that the graph allows, and no turn more or less than they allow."""
    graph = group("round_robin")
    counts = [count(**one) for one in limits]
    version, newest, taken = [0, 0, 0], 0, []
    for place, event in enumerate(run_schedule(graph, epochs=3, counts=counts)):
        if isinstance(event, HandOn):
            assert version[event.giver] == newest > version[event.taker]
            assert ("abc"[event.giver], "abc"[event.taker]) in graph.hand_ons("clinics")
            version[event.taker] = newest
            continue
        (stream,) = event.streams
        assert version[stream] == newest
        taken.append((event.phase, event.epoch, stream))
        if event.phase == TRAIN:
            version[stream] = newest = place + 1
    allowed = [
        (phase, epoch, stream)
        for phase, key in ((TRAIN, "train_turns"), (EVALUATE, "test_turns"))
        for epoch in range(3)
        for stream in range(3)
        if epoch < limits[stream].get(key, 3)
    ]
    assert sorted(taken) == sorted(allowed)


def test_in_parallel_the_samples_of_a_spent_budget_are_left_out() -> None:
    graph = group("parallel")
    counts = [count(6), count(10, train_turns=1), count(3)]

    def rows(turn: Turn) -> list[list[tuple[int, int, int, int]]]:
        steps = list(steps_of(graph, turn, counts, 7))
        assert [step.number for step in steps] == list(range(7, 7 + len(steps)))
        assert step_count(graph, turn, counts) == len(steps)
        return [[(one.number, one.stream, one.start, one.rows) for one in step.micro_batches] for step in steps]

    assert list(run_schedule(graph, epochs=1, counts=counts)) == [
        Turn(TRAIN, 0, (0, 1, 2)),
        Turn(EVALUATE, 0, (0, 1, 2)),
    ]
    first, later = rows(Turn(TRAIN, 0, (0, 1, 2))), rows(Turn(TRAIN, 1, (0, 1, 2)))
    assert first == [
        [(0, 0, 0, 2), (1, 0, 2, 2), (2, 1, 0, 2), (3, 1, 2, 2), (4, 2, 0, 2), (5, 2, 2, 1)],
        [(0, 0, 4, 1), (1, 0, 5, 1), (2, 1, 4, 2), (3, 1, 6, 2)],
        [(0, 1, 8, 1), (1, 1, 9, 1)],
    ]
    assert later == [[(0, 0, 0, 2), (1, 0, 2, 2), (2, 2, 0, 2), (3, 2, 2, 1)], [(0, 0, 4, 1), (1, 0, 5, 1)]]
    assert {micro[1] for step in rows(Turn(EVALUATE, 1, (0, 1, 2))) for micro in step} == {0, 1, 2}
    counts = [count(6, train_turns=1)] * 3
    assert rows(Turn(TRAIN, 1, (0, 1, 2))) == []


@pytest.mark.parametrize("drop", [False, True])
def test_steps_are_as_many_as_are_counted(drop: bool) -> None:
    for schedule, turns in product(("round_robin", "parallel"), TURNS):
        graph = group(schedule, drop=drop)
        counts = [count(9, 7, **turns), count(4, 0), count(3, 2, train_turns=2)]
        for phase, epoch, streams in product((TRAIN, EVALUATE), range(3), ((0,), (2,), (0, 1, 2))):
            turn = Turn(phase, epoch, streams)
            assert len(list(steps_of(graph, turn, counts, 0))) == step_count(graph, turn, counts)


# --- which sample is which


def samples(x: torch.Tensor, y: torch.Tensor | None = None, ids: Sequence[str] | None = None) -> Samples:
    fields = {"x": x} if y is None else {"x": x, "y": y}
    return Samples(fields, None if ids is None else tuple(ids), len(x))


@pytest.mark.threat("T62")
def test_a_sample_with_an_id_is_known_by_it_alone() -> None:
    x = torch.randn(3, 2)
    keys = sample_keys(samples(x, ids=["p", "q", "r"]))
    assert len(set(keys)) == 3 and {len(key) for key in keys} == {32}
    assert sample_keys(samples(x + 1, ids=["r", "p", "s"]))[:2] == [keys[2], keys[0]]
    assert sample_keys(samples(x))[0] not in keys


@pytest.mark.threat("T62")
def test_a_sample_without_an_id_is_known_by_its_input_in_any_order() -> None:
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 0, 1])
    keys = sample_keys(samples(x, y), ["x"])
    assert len(set(keys)) == 4
    order = torch.tensor([2, 0, 3, 1])
    assert sample_keys(samples(x[order], y[order]), ["x"]) == [keys[row] for row in order]
    assert sample_keys(samples(x, 1 - y), ["x"]) == keys  # a corrected label is the same person still
    assert sample_keys(samples(x, 1 - y)) != sample_keys(samples(x, y))
    assert sample_keys(samples(x.transpose(1, 2).contiguous().transpose(1, 2), y), ["x"]) == keys
    altered = x.clone()
    altered[1, 0, 0] += 1e-6
    assert [one == other for one, other in zip(sample_keys(samples(altered, y), ["x"]), keys, strict=True)] == [
        True,
        False,
        True,
        True,
    ]


def test_equal_rows_are_one_sample_and_other_shapes_or_types_another() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
    keys = sample_keys(samples(x))
    assert keys[0] == keys[2] != keys[1]
    assert sample_keys(samples(x[:, None]))[0] != keys[0]
    assert sample_keys(samples(x.view(torch.int32)))[0] != keys[0]
    assert sample_keys(samples(x[:0])) == []
    named = Samples({"z": x}, None, 3)
    assert sample_keys(named)[0] != keys[0]
    flags = samples(torch.tensor([[True], [False]]), torch.ones(2, dtype=torch.bfloat16))
    assert len(set(sample_keys(flags))) == 2


def test_labels_alone_make_a_sample_where_there_is_nothing_else() -> None:
    registry = Samples({"y": torch.tensor([0, 1, 1])}, None, 3)
    keys = sample_keys(registry, frozenset())
    assert keys[1] == keys[2] != keys[0]


def test_what_carries_samples_that_are_not_named_does_not_leave(doors: Callable[..., Door]) -> None:
    """It could not be counted."""
    door = doors(vanilla())
    lane = next(key for key, lane in door.plan.lanes_out.items() if lane.kind == "activation")
    nobodys = Carried("elsewhere", torch.tensor(ROWS), {}, training=True)
    for step, carried in enumerate((None, nobodys)):
        message = Message("activation", (step, 0), tensors={"": activation()})
        with pytest.raises(EgressRefused, match="of samples that are not known"):
            door.guard.release(lane, message, carried)
    assert (door.counts(), door.thread.sent) == ({}, [])
