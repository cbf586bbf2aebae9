"""Who may tell which member of an anonymous group speaks, and what passes a relay: nobody, by what ``bench linking``
learns from all that they see.

Real processes and sockets.  Keys, and so the order of turns, are drawn anew in every run: a guess at chance is
accepted within 99.9 %, so one run in some thousand fails for no reason.  The same recorder, features and classifier
must succeed where the group is not anonymous, or sizes are not padded to one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from splitsec.bench.linking import (
    CLINICS,
    Run,
    Score,
    Setting,
    Turn,
    auc,
    circuits_seen,
    guess,
    guess_circuit,
    guess_with_first_relay,
    record,
    turns_seen,
    wilson,
)

SURE = 3.2905
"""Standard deviations on either side: 99.9 %."""


def near(score: Score) -> tuple[float, float]:
    return wilson(score.right, score.tries, SURE)


@pytest.fixture(scope="module")
def hidden() -> Iterator[Run]:
    yield record(Setting(epochs=16, cover=0.01, batch=20))


@pytest.fixture(scope="module")
def turns(hidden: Run) -> Iterator[list[Turn]]:
    yield turns_seen([hidden])


# --- the far end


@pytest.mark.threat("T102")
def test_a_far_end_cannot_tell_who_speaks(turns: list[Turn], capsys: pytest.CaptureFixture[str]) -> None:
    assert len(turns) == 16 * len(CLINICS)
    for epoch in range(16):
        assert sorted(turn.clinic for turn in turns if turn.epoch == epoch) == list(CLINICS)
    score = guess("anonymous", turns)
    with capsys.disabled():
        print(f"\nanonymous: {score}")
    low, high = near(score)
    assert low <= score.chance <= high < 0.7  # 0.6 would be crossed by chance, once in forty runs
    assert score.tries == 40


@pytest.mark.threat("T102")
def test_no_sort_of_feature_tells_who_speaks(turns: list[Turn]) -> None:
    for group in ("place", "key", "size", "time"):
        score = guess(group, turns, only=group)
        low, _ = near(score)
        assert low <= score.chance, f"{group}: {score}"


def test_what_the_recorder_sees(hidden: Run, turns: list[Turn]) -> None:
    """That nothing was told apart is worth something only if everything was looked at."""
    kinds = {note["what"] for note in hidden.notes["server"]}
    assert kinds >= {
        *("frame in", "frame out", "cell CREATE", "cell CELL", "own CELL", "inside", "keys", "opened", "ready"),
        *("header READY", "header CHUNK", "header CLOSE", "message activation", "message labels", "message control"),
        *("answer gradient", "turn", "turn over"),
    }
    opened = [note for note in hidden.notes["server"] if note["what"] == "opened" and note["circuit"] is not None]
    assert len({note["run"] for note in opened}) >= len(turns)  # one channel each, and one peer
    assert len({note["peer"] for note in opened}) == 1
    said = [note for note in hidden.notes["server"] if note["what"].startswith("message")]
    assert not any(name.encode().hex() in note["header"] for note in said for name in CLINICS)
    assert all(len(turn.features) > 400 for turn in turns)


@pytest.mark.threat("T50", "T67", "T77", "T82", "T85", "T129")
def test_data_and_a_first_relay_that_colludes_tell_still(hidden: Run, turns: list[Turn]) -> None:
    """Documented, and the classifier can learn something of this very run."""
    assert near(guess_with_first_relay(hidden, turns))[0] > 0.5
    data = guess("data", turns, only="data")
    assert near(data)[0] > 0.2, str(data)


@pytest.mark.threat("T102")
def test_a_group_that_is_not_anonymous_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    named = turns_seen([record(Setting(epochs=6, cover=0.01, batch=20, anonymous=False))])
    score = guess("not anonymous", named)
    with capsys.disabled():
        print(f"\nnot anonymous: {score}")
    assert near(score)[0] > 0.4
    assert score.accuracy > 0.9


# --- a relay


@pytest.mark.parametrize("padding", ["fixed", "padme"])
def test_sizes_at_a_relay(padding: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The middle of three, and two clinics of which one sends thirteen times as much in each message."""
    apart = Setting(
        anonymous=False, cover=None, epochs=160, samples=(3, 40), batch=40, width=512, relays=3, padding=padding
    )
    seen = circuits_seen(record(apart), 1)
    assert set(seen) == {("clinic-1", "server"), ("clinic-2", "server")}
    small, large = seen["clinic-1", "server"], seen["clinic-2", "server"]
    score = guess_circuit(padding, (small, large), whole=True)
    area, low, high = auc(*([float(size) for _, _, size in cells if size > 2048] for cells in (large, small)))
    with capsys.disabled():
        print(f"\n{padding}: one cell {area:.3f} [{low:.3f}, {high:.3f}], several in a row {score}")
    if padding == "fixed":
        assert {size for _, _, size in small} == {size for _, _, size in large}
        assert low <= 0.5 <= high
        assert near(score)[0] <= 0.5
    else:
        assert low > 0.9
        assert near(score)[0] > 0.5


# --- the measure itself


def test_intervals() -> None:
    assert wilson(10, 50) == pytest.approx((0.1124, 0.3304), abs=1e-4)
    assert (wilson(0, 10)[0], wilson(10, 10)[1]) == pytest.approx((0, 1))
    assert wilson(10, 50, SURE)[0] < wilson(10, 50)[0]
    assert auc([3.0, 4.0], [1.0, 2.0])[0] == 1.0
    assert auc([1.0, 2.0], [3.0, 4.0])[0] == 0.0
    assert auc([2.0] * 5, [2.0] * 7) == (0.5, 0.5, 0.5)
    area, low, high = auc([1.0, 3.0] * 50, [2.0] * 100)
    assert area == 0.5 and 0.4 < low < 0.5 < high < 0.6


def made(tells: bool) -> list[Turn]:
    """Turns with three hundred features of chance, of which one tells who it was."""
    chance = random.Random(1)
    turns = []
    for epoch in range(20):
        order = chance.sample(CLINICS, len(CLINICS))
        for stream, clinic in enumerate(order):
            features = {f"size {number}": chance.random() for number in range(300)}
            if tells:
                features["time 7"] = chance.gauss(CLINICS.index(clinic), 0.2)
            turns.append(Turn(0, epoch, stream, clinic, 0.0, features))
    return turns


def test_the_classifier_finds_the_one_feature_that_tells() -> None:
    assert guess("", made(True)).accuracy > 0.9
    low, high = near(guess("", made(False)))
    assert low <= 0.2 <= high
