"""The ledger: what is spent is on the disk before anything leaves, follows each sample, and never shrinks by itself.

Epsilon is a stand-in (a square root of a sum, monotone, and exact to write down), so that every figure here can be
worked out by hand; ``test_statement_with_the_accountant`` asks the real one.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import splitsec
from splitsec.privacy import ledger as subject
from splitsec.privacy.errors import BadParameter, BudgetSpent, LedgerError
from splitsec.privacy.ledger import Account, Ledger, Meter, read
from splitsec.privacy.release import Gaussian, Laplace, Mechanism, RandomisedResponse

TREE = Path(splitsec.__file__).parents[1]
TWO = Gaussian(2.0, 8)
ONE = Gaussian(1.0, 8)
DELTA = 1e-5


def cost(releases: Mapping[Mechanism, int], delta: float) -> float:
    """Stands in for ``accounting.epsilon``: 1 for four releases at noise multiplier 2."""
    if any(isinstance(one, Laplace) for one in releases):
        return math.inf
    return math.sqrt(sum(n / getattr(one, "noise_multiplier", 1.0) ** 2 for one, n in releases.items()))


def opened(file: Path, party: str = "clinic") -> Ledger:
    return Ledger(file, party=party, epsilon=cost)


def ids(*numbers: int) -> list[bytes]:
    return [b"patient-%d" % number for number in numbers]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "clinic" / "ledger.sqlite"


@pytest.fixture
def ledger(file: Path) -> Iterator[Ledger]:
    with opened(file) as ledger:
        yield ledger


def stem(ledger: Ledger) -> Account:
    return ledger.account("stem -> trunk", "inputs", TWO, 1.0)


# --- counts are kept for each sample


def test_counts_follow_a_sample_into_a_reordered_extended_and_shortened_data_set(file: Path) -> None:
    with opened(file) as ledger:
        rows = ledger.dataset("train", ids(1, 2, 3, 4)).slots
        ledger.reserve(stem(ledger), rows[[0, 2]], budget=None, delta=DELTA)
        ledger.reserve(stem(ledger), rows[[2]], budget=None, delta=DELTA)
    with opened(file) as ledger:
        again = ledger.dataset("train", ids(9, 3, 8, 1)).slots  # 2 and 4 are gone, 8 and 9 are new
        assert ledger.releases(stem(ledger))[again].tolist() == [0, 2, 0, 1]
        assert ledger.samples == 6
        ledger.reserve(stem(ledger), again, budget=None, delta=DELTA)
    with opened(file) as ledger:
        assert ledger.releases(stem(ledger))[ledger.dataset("other", ids(1, 2, 3, 4, 8, 9)).slots].tolist() == [
            2,
            0,
            3,
            0,
            1,
            1,
        ]


def test_a_sample_that_left_the_data_set_still_counts_in_its_statement(ledger: Ledger) -> None:
    rows = ledger.dataset("train", ids(1, 2)).slots
    for _ in range(4):
        ledger.reserve(stem(ledger), rows[:1], budget=None, delta=DELTA)
    ledger.dataset("train", ids(2, 3))
    (entry,) = ledger.statement(DELTA)
    assert (entry.releases, entry.samples, entry.epsilon) == (4, 3, 1.0)


def test_equal_rows_share_a_slot_and_every_release_counts_for_both(ledger: Ledger) -> None:
    rows = ledger.dataset("train", [b"same", b"other", b"same"], known_by="content").slots
    assert rows[0] == rows[2] != rows[1]
    ledger.reserve(stem(ledger), rows, budget=None, delta=DELTA)
    assert ledger.releases(stem(ledger))[rows].tolist() == [2, 1, 2]


def test_what_is_known_by_another_thing_than_before_is_refused(ledger: Ledger) -> None:
    ledger.dataset("train", ids(1, 2))
    with pytest.raises(LedgerError, match="known by id here, and now come by content"):
        ledger.dataset("train", [b"...", b"---"], known_by="content")
    with pytest.raises(LedgerError, match="known by id here, and now come by content"):
        ledger.dataset("test", [b"...", b"---"], known_by="content")  # nor under another name: counts would be lost


def test_fingerprints_need_the_key_and_differ_from_ledger_to_ledger(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        with opened(tmp_path / name) as ledger:
            ledger.dataset("train", ids(1))
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            contents.append(connection.execute("SELECT fingerprints FROM samples").fetchall())
        assert b"patient-1" not in (tmp_path / name).read_bytes()
    assert contents[0] != contents[1]
    assert len(contents[0][0][0]) == 16


def test_slots_of_many_samples_agree_with_a_dictionary(ledger: Ledger) -> None:
    rng = random.Random(3)
    known: dict[bytes, int] = {}
    for _ in range(5):
        keys = ids(*(rng.randrange(400) for _ in range(300)))
        expected = [known.setdefault(key, len(known)) for key in keys]
        assert ledger.dataset("train", keys).slots.tolist() == expected
    assert ledger.samples == len(known)


# --- the budget


def test_the_release_that_would_pass_the_budget_is_refused_and_nothing_is_written(file: Path) -> None:
    with opened(file) as ledger:
        rows = ledger.dataset("train", ids(1, 2, 3)).slots
        for _ in range(4):
            ledger.reserve(stem(ledger), rows[:2], budget=1.0, delta=DELTA)
        before = ledger.releases(stem(ledger)).tolist()
        with pytest.raises(BudgetSpent, match=r"from 1 to 1\.118 at delta 1e-05, and the budget for inputs is 1"):
            ledger.reserve(stem(ledger), rows, budget=1.0, delta=DELTA)
        assert ledger.releases(stem(ledger)).tolist() == before == [4, 4, 0]
        assert ledger.affordable(stem(ledger), rows, budget=1.0, delta=DELTA).tolist() == [False, False, True]
        ledger.reserve(stem(ledger), rows[2:], budget=1.0, delta=DELTA)
    with opened(file) as ledger:
        assert ledger.releases(stem(ledger)).tolist() == [4, 4, 1]


def test_one_call_that_counts_a_sample_twice_is_held_to_both(ledger: Ledger) -> None:
    slot = ledger.dataset("train", ids(1)).slots
    for _ in range(3):
        ledger.reserve(stem(ledger), slot, budget=1.0, delta=DELTA)
    with pytest.raises(BudgetSpent):
        ledger.reserve(stem(ledger), np.repeat(slot, 2), budget=1.0, delta=DELTA)
    ledger.reserve(stem(ledger), slot, budget=1.0, delta=DELTA)


def test_cuts_that_carry_the_same_sample_share_its_budget_and_labels_have_their_own(ledger: Ledger) -> None:
    slot = ledger.dataset("train", ids(1)).slots
    other = ledger.account("side -> trunk", "inputs", TWO, 2.0)
    labels = ledger.account("answers", "labels", TWO, None)
    for account in (stem(ledger), other, stem(ledger), other):
        ledger.reserve(account, slot, budget=1.0, delta=DELTA)
    with pytest.raises(BudgetSpent):
        ledger.reserve(other, slot, budget=1.0, delta=DELTA)
    for _ in range(4):
        ledger.reserve(labels, slot, budget=1.0, delta=DELTA)
    with pytest.raises(BudgetSpent, match="for labels"):
        ledger.reserve(labels, slot, budget=1.0, delta=DELTA)


@pytest.mark.parametrize("unbounded", [math.nan, math.inf])
def test_a_cost_that_is_no_number_is_over_every_budget(file: Path, unbounded: float) -> None:
    with Ledger(file, party="clinic", epsilon=lambda releases, delta: unbounded) as ledger:
        slot = ledger.dataset("train", ids(1)).slots
        with pytest.raises(BudgetSpent):
            ledger.reserve(stem(ledger), slot, budget=1e9, delta=DELTA)


def test_budget_of_samples_with_unequal_pasts_agrees_with_one_at_a_time(ledger: Ledger) -> None:
    rng = np.random.default_rng(5)
    rows = ledger.dataset("train", ids(*range(60))).slots
    accounts = [ledger.account(f"cut {n}", "inputs", Gaussian(3.0 - n, 8), 1.0) for n in range(3)]
    for account in accounts:
        for _ in range(6):
            ledger.reserve(account, rng.choice(rows, 30, replace=False), budget=None, delta=DELTA)
    counts = np.stack([ledger.releases(account)[rows].astype(int) for account in accounts])
    after = counts + np.array([[1], [0], [0]])
    exact = np.sqrt((after / np.array([[9.0], [4.0], [1.0]])).sum(axis=0))
    budget = float(np.median(exact))
    assert (ledger.affordable(accounts[0], rows, budget=budget, delta=DELTA) == (exact <= budget)).all()
    assert 0 < (exact <= budget).sum() < 60
    with pytest.raises(BudgetSpent):
        ledger.reserve(accounts[0], rows, budget=float(np.nextafter(exact.max(), 0)), delta=DELTA)
    ledger.reserve(accounts[0], rows, budget=float(exact.max()), delta=DELTA)


def test_passes_left(ledger: Ledger) -> None:
    rows = ledger.dataset("train", ids(1, 2, 3)).slots
    side = ledger.account("side -> trunk", "inputs", TWO, 1.0)
    assert ledger.passes_left(rows, [stem(ledger)], 3.0, DELTA, 100) == 36
    assert ledger.passes_left(rows, [stem(ledger), side], 3.0, DELTA, 100) == 18
    assert ledger.passes_left(rows, [stem(ledger)], 3.0, DELTA, 10) == 10
    assert ledger.passes_left(rows, [stem(ledger)], None, DELTA, 10) == 10
    for _ in range(6):
        ledger.reserve(stem(ledger), rows[:1], budget=None, delta=DELTA)
    assert ledger.passes_left(rows, [stem(ledger)], 3.0, DELTA, 100) == 30
    assert ledger.passes_left(rows[1:], [stem(ledger)], 3.0, DELTA, 100) == 36
    assert ledger.passes_left(rows[[1, 1, 2]], [stem(ledger)], 3.0, DELTA, 100) == 18
    assert ledger.passes_left(rows, [stem(ledger)], 0.1, DELTA, 100) == 0


def test_slots_and_accounts_of_elsewhere_are_refused(ledger: Ledger, tmp_path: Path) -> None:
    ledger.dataset("train", ids(1))
    for wrong in ([1], [-1], [[0]]):
        with pytest.raises(LedgerError, match="did not give out"):
            ledger.reserve(stem(ledger), wrong, budget=None, delta=DELTA)
    with opened(tmp_path / "other") as other:
        strange = other.account("elsewhere", "inputs", TWO, 1.0)
    with pytest.raises(LedgerError, match="another ledger"):
        ledger.reserve(strange, [0], budget=None, delta=DELTA)
    with pytest.raises(BadParameter):
        ledger.account("cut", "everything", TWO, 1.0)  # type: ignore[arg-type]


# --- giving back


def test_what_was_reserved_here_can_be_given_back_once(file: Path) -> None:
    with opened(file) as ledger:
        rows = ledger.dataset("train", ids(1, 2, 3)).slots
        ledger.reserve(stem(ledger), rows, budget=None, delta=DELTA)
        ledger.give_back(stem(ledger), rows[1:])
        with pytest.raises(LedgerError, match="than was reserved since"):
            ledger.give_back(stem(ledger), rows[1:])
    with opened(file) as ledger:
        assert ledger.releases(stem(ledger)).tolist() == [1, 0, 0]
        with pytest.raises(LedgerError, match="than was reserved since"):  # an earlier process may have released it
            ledger.give_back(stem(ledger), [0])
        assert ledger.releases(stem(ledger)).tolist() == [1, 0, 0]


# --- the meter


def counted(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many slots each reservation took."""
    sizes: list[int] = []
    reserve = ledger.reserve

    def counting(account: Account, slots: np.ndarray, **limits: float) -> None:
        reserve(account, slots, **limits)
        sizes.append(len(slots))

    monkeypatch.setattr(ledger, "reserve", counting)
    return sizes


def test_a_meter_reserves_a_block_of_what_comes_next(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ledger.dataset("train", ids(*range(5000))).slots
    sizes = counted(ledger, monkeypatch)
    meter = Meter(ledger, delta=DELTA, budget=None)
    for epoch in range(2):
        order = np.random.default_rng(epoch).permutation(rows)
        meter.expect(order)
        for start in range(0, 5000, 64):
            batch = order[start : start + 64]
            meter.spend(stem(ledger), batch)
            assert (ledger.releases(stem(ledger))[order[: start + 64]] == epoch + 1).all()  # never behind
    assert sizes == [2048, 2048, 904] * 2
    meter.close(True)
    assert (ledger.releases(stem(ledger)) == 2).all()


def test_one_more_release_of_what_has_just_left_keeps_the_order_of_the_rest(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ledger.dataset("train", ids(*range(100))).slots
    sizes = counted(ledger, monkeypatch)
    meter = Meter(ledger, delta=DELTA, budget=None, block=50)
    meter.expect(rows)
    for start in range(0, 100, 10):
        meter.spend(stem(ledger), rows[start : start + 10])
        if start == 20:
            for again in (20, 25):  # in two micro-batches
                meter.spend(stem(ledger), rows[again : again + 5], again=True)
            assert (ledger.releases(stem(ledger))[20:30] == 2).all()
    assert sizes == [50, 5, 5, 50]
    meter.close(True)
    assert ledger.releases(stem(ledger)).tolist() == [1] * 20 + [2] * 10 + [1] * 70


def test_what_a_short_turn_left_serves_the_next_and_the_rest_is_given_back(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ledger.dataset("train", ids(*range(100))).slots
    sizes = counted(ledger, monkeypatch)
    meter = Meter(ledger, delta=DELTA, budget=None, block=50)
    meter.expect(rows)
    meter.spend(stem(ledger), rows[:10])
    turned = np.roll(rows, -30)
    meter.expect(turned)
    for start in range(0, 80, 10):
        meter.spend(stem(ledger), turned[start : start + 10])
    assert sizes == [50, 50, 10]  # rows 0 to 49; 50 to 99; then 0 to 9 again, for 10 to 29 are still there
    meter.close(True)
    assert ledger.releases(stem(ledger)).tolist() == [2] * 10 + [0] * 20 + [1] * 70
    with pytest.raises(LedgerError, match="nothing is spent any more"):
        meter.spend(stem(ledger), rows[:1])


def test_nothing_is_given_back_where_the_end_was_not_orderly(ledger: Ledger) -> None:
    rows = ledger.dataset("train", ids(*range(100))).slots
    meter = Meter(ledger, delta=DELTA, budget=None, block=50)
    meter.expect(rows)
    meter.spend(stem(ledger), rows[:10])
    meter.close(False)
    meter.close(True)
    assert ledger.releases(stem(ledger)).sum() == 50


def test_a_meter_keeps_count_of_several_accounts_repeats_and_other_orders(ledger: Ledger) -> None:
    rng = random.Random(7)
    rows = ledger.dataset("train", ids(*range(40))).slots
    accounts = [stem(ledger), ledger.account("side -> trunk", "inputs", TWO, 1.0)]
    asked = {account: np.zeros(40, dtype=int) for account in accounts}
    meter = Meter(ledger, delta=DELTA, budget=None, block=16)
    for _ in range(150):
        if rng.random() < 0.2:
            meter.expect(rng.sample(rows.tolist(), 30))
        account, batch = rng.choice(accounts), rng.choices(rows.tolist(), k=rng.randrange(9))
        meter.spend(account, batch)
        np.add.at(asked[account], batch, 1)
        for one in accounts:
            assert (ledger.releases(one) >= asked[one]).all()
    meter.close(True)
    for one in accounts:
        assert ledger.releases(one).tolist() == asked[one].tolist()


def test_blocks_shrink_before_the_budget_is_called_spent(ledger: Ledger) -> None:
    rows = ledger.dataset("train", ids(*range(20))).slots
    for _ in range(4):
        ledger.reserve(stem(ledger), rows[12:13], budget=None, delta=DELTA)
    meter = Meter(ledger, delta=DELTA, budget=1.0, block=20)
    meter.expect(rows)
    for start in (0, 5):
        meter.spend(stem(ledger), rows[start : start + 5])
    assert ledger.releases(stem(ledger)).tolist() == [1] * 12 + [4] + [0] * 7
    with pytest.raises(BudgetSpent):
        meter.spend(stem(ledger), rows[10:15])
    meter.spend(stem(ledger), rows[10:12])  # what was refused is not spent
    meter.close(True)
    assert ledger.releases(stem(ledger)).tolist() == [1] * 12 + [4] + [0] * 7


def test_a_meter_holds_labels_to_their_own_budget(ledger: Ledger) -> None:
    rows = ledger.dataset("train", ids(1)).slots
    labels = ledger.account("answers", "labels", RandomisedResponse(1.0, 3), None)
    meter = Meter(ledger, delta=DELTA, budget=None, label_budget=1.0)
    meter.spend(labels, rows)
    with pytest.raises(BudgetSpent):
        meter.spend(labels, rows)
    meter.spend(stem(ledger), rows)


# --- the statement


def test_statement_composes_two_cuts_and_does_not_double(ledger: Ledger) -> None:
    train = ledger.dataset("train", ids(1, 2)).slots
    test = ledger.dataset("test", ids(3)).slots
    stem(ledger)
    other = ledger.account("side -> trunk", "inputs", ONE, 0.5)
    labels = ledger.account("answers", "labels", RandomisedResponse(1.0, 3), None)
    for _ in range(8):
        ledger.reserve(stem(ledger), train, budget=None, delta=DELTA)
    ledger.reserve(other, train[:1], budget=None, delta=DELTA)
    ledger.reserve(other, train[:1], budget=None, delta=DELTA)
    ledger.reserve(labels, train[1:], budget=None, delta=DELTA)
    ledger.reserve(stem(ledger), test, budget=None, delta=DELTA)
    ledger.set_policy(delta=DELTA, budget=3.0, label_budget=2.0)
    found = [
        (one.dataset, one.cut, one.releases, one.samples, one.epsilon, one.epsilon_alone, one.epsilon_budget)
        for one in ledger.statement()
    ]
    assert found == [
        ("test", "stem -> trunk", 1, 1, 0.5, 0.5, 3.0),
        ("train", "stem -> trunk", 8, 2, 2.0, math.sqrt(2), 3.0),
        ("train", "side -> trunk", 2, 2, 2.0, math.sqrt(2), 3.0),
        ("train", "answers", 1, 2, 1.0, 1.0, 2.0),
    ]
    one, *_, last = ledger.statement()
    assert (one.party, one.mechanism, one.noise_multiplier, one.clip, one.delta) == (
        "clinic",
        "gaussian",
        2.0,
        1.0,
        DELTA,
    )
    assert (last.mechanism, last.noise_multiplier, last.clip, last.protects) == (
        "randomised_response",
        None,
        None,
        "labels",
    )


def test_statement_with_the_accountant(file: Path) -> None:
    accounting = pytest.importorskip("splitsec.privacy.accounting")
    with Ledger(file, party="clinic") as ledger:
        rows = ledger.dataset("train", ids(*range(3))).slots
        for _ in range(10):
            ledger.reserve(stem(ledger), rows, budget=8.0, delta=DELTA)
        side = ledger.account("side -> trunk", "inputs", TWO, 1.0)
        (entry,) = ledger.statement(DELTA)
        assert 7.511 <= entry.epsilon <= 7.549
        with pytest.raises(BudgetSpent):
            for _ in range(10):
                ledger.reserve(side, rows, budget=8.0, delta=DELTA)
        for _ in range(10 - int(ledger.releases(side).max())):
            ledger.reserve(side, rows, budget=None, delta=DELTA)
        composed = accounting.epsilon({TWO: 20}, DELTA)
        assert [one.epsilon for one in ledger.statement(DELTA)] == [composed, composed]
        assert composed < 1.7 * entry.epsilon


def test_the_policy_of_the_last_run_is_found_by_a_reader(file: Path) -> None:
    with opened(file) as ledger:
        ledger.reserve(stem(ledger), ledger.dataset("train", ids(1)).slots, budget=None, delta=DELTA)
        with pytest.raises(LedgerError, match="which delta"):
            read(file, epsilon=cost).statement()
        ledger.set_policy(delta=1e-6, budget=None)
        ledger.set_policy(delta=1e-5, budget=2.5)
        (entry,) = read(file, epsilon=cost).statement()  # while it is open here
        assert (entry.delta, entry.epsilon_budget, entry.releases) == (1e-5, 2.5, 1)
        with pytest.raises(BadParameter):
            ledger.set_policy(delta=1.0, budget=None)


# --- the file


def test_the_file_is_its_owners_alone(file: Path) -> None:
    before = os.umask(0)
    try:
        with opened(file) as ledger:
            ledger.dataset("train", ids(1))
            for one in file.parent.iterdir():
                assert stat.S_IMODE(one.stat().st_mode) == 0o600, one
    finally:
        os.umask(before)
    file.chmod(0o640)
    with pytest.raises(LedgerError, match="others may use it"):
        opened(file)


def test_a_transaction_waits_for_the_disk(ledger: Ledger) -> None:
    asked = [ledger._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")]
    assert asked == [2, "wal"]  # 2: FULL


def test_a_second_process_is_refused_until_the_first_is_killed(file: Path) -> None:
    code = "import sys; from splitsec.privacy.ledger import Ledger; Ledger(sys.argv[1], party='clinic')\n"
    code += "print('open', flush=True); sys.stdin.read()"
    with Child(code, str(file)) as child:
        assert child.stdout is not None and child.stdout.readline() == b"open\n"
        with pytest.raises(LedgerError, match="in use"):
            opened(file)
        read(file, epsilon=cost)  # readers need no lock
        child.send_signal(signal.SIGKILL)
        child.wait()
    opened(file).close()
    with opened(file), pytest.raises(LedgerError, match="in use"):
        opened(file)


@pytest.mark.parametrize("contents", [b"", b"party: clinic\n", b"SQLite format 3\0" + bytes(200)])
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path: Path, contents: bytes) -> None:
    file = tmp_path / "ledger.sqlite"
    file.write_bytes(contents)
    file.chmod(0o600)
    for look in (opened, read):
        with pytest.raises(LedgerError, match="no ledger"):
            look(file)
    assert file.read_bytes() == contents


def test_another_data_base_a_newer_version_and_another_party_are_refused(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE t (x)")
    other.chmod(0o600)
    with pytest.raises(LedgerError, match="this is no ledger"):
        opened(other)
    opened(file).close()
    with pytest.raises(LedgerError, match="the ledger of clinic, and not of server"):
        opened(file, "server")
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA user_version = 2")
    with pytest.raises(LedgerError, match=r"newer splitsec wrote it \(version 2"):
        opened(file)


def test_a_log_without_its_ledger_and_counts_of_no_sample_are_refused(file: Path) -> None:
    with opened(file) as ledger:
        ledger.dataset("train", ids(1, 2))
        account = stem(ledger)
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("INSERT INTO entry VALUES (1, ?, -1, ?)", (account.number, bytes(4)))
        connection.commit()
    with pytest.raises(LedgerError, match="more was given back"):
        opened(file)
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("UPDATE entry SET slots = ?", (bytes([9, 0, 0, 0]),))
        connection.commit()
    with pytest.raises(LedgerError, match="a sample that it does not have"):
        opened(file)
    file.rename(file.with_name("ledger.sqlite-wal"))
    with pytest.raises(LedgerError, match="the ledger is gone"):
        opened(file)


def test_folding_keeps_every_count(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "FOLD_BYTES", 400)
    rng = np.random.default_rng(1)
    expected = np.zeros(8, dtype=int)
    for _ in range(4):
        with opened(file) as ledger:
            rows = ledger.dataset("train", ids(*range(8))).slots
            for _ in range(40):
                batch = rng.choice(rows, 5)
                ledger.reserve(stem(ledger), batch, budget=None, delta=DELTA)
                np.add.at(expected, batch, 1)
            ledger.give_back(stem(ledger), batch)
            np.subtract.at(expected, batch, 1)
            assert read(file, epsilon=cost).releases(stem(ledger)).tolist() == expected.tolist()
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT count(*) FROM entry").fetchone()[0] < 40


def test_after_a_failed_write_nothing_more_is_reserved(ledger: Ledger) -> None:
    rows = ledger.dataset("train", ids(1)).slots
    account = stem(ledger)
    ledger._connection.set_authorizer(
        lambda action, *_: sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_INSERT else sqlite3.SQLITE_OK
    )
    with pytest.raises(LedgerError, match="cannot be written any more"):
        ledger.reserve(account, rows, budget=None, delta=DELTA)
    ledger._connection.set_authorizer(None)
    with pytest.raises(LedgerError, match="cannot be written any more"):
        ledger.reserve(account, rows, budget=None, delta=DELTA)


# --- killed


class Child(subprocess.Popen[bytes]):
    """A Python process that is killed at the end of the block, if it still runs."""

    def __init__(self, code: str, *arguments: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1"}
        super().__init__(
            [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
        )

    def __exit__(self, *_: object) -> None:
        self.kill()
        super().__exit__(*_)  # type: ignore[arg-type]


SPENDER = """
import json, sys
import numpy as np
from splitsec.journal import Journal
from splitsec.privacy.ledger import Ledger, Meter
from splitsec.privacy.release import Gaussian

ledger = Ledger(sys.argv[1], party="clinic", epsilon=lambda releases, delta: 0.0)
journal = Journal(sys.argv[2], party="clinic", graph_digest="ab" * 32, version="1")
rows = ledger.dataset("train", [b"%d" % n for n in range(200)]).slots
accounts = [ledger.account(cut, "inputs", Gaussian(2.0, 8), 1.0) for cut in ("one", "two")]
meter = Meter(ledger, delta=1e-5, budget=1.0, block=int(sys.argv[4]))
rng = np.random.default_rng(int(sys.argv[3]))
while True:
    order = rng.permutation(rows)
    meter.expect(order)
    for start in range(0, 200, 8):
        batch = order[start : start + 8]
        for account in accounts:
            meter.spend(account, batch)
            journal.append(to="server", kind="activation", cut=account.cut, step=start, micro_batch=0,
                           shapes=[(8, 4)], dtypes=["float32"], body=[batch.tobytes()], records=8, privacy=None)
            print(json.dumps([account.number, batch.tolist()]), flush=True)
"""


def test_killed_at_any_moment_the_ledger_never_holds_less_than_was_announced(tmp_path: Path) -> None:
    from splitsec.journal import read as read_journal
    from splitsec.journal import verify

    file, journal = tmp_path / "ledger.sqlite", tmp_path / "journal.jsonl"
    rng = random.Random(11)
    announced = [np.zeros(200, dtype=int), np.zeros(200, dtype=int)]
    lines = 0
    for kill in range(8):
        block = rng.choice([8, 24, 2048])
        with Child(SPENDER, str(file), str(journal), str(kill), str(block)) as child:
            assert child.stdout is not None
            heard = [child.stdout.readline() for _ in range(rng.randrange(1, 120))]
            child.kill()
            heard += child.stdout.readlines()
            child.wait()
        for line in heard:
            if line.endswith(b"\n"):
                account, slots = json.loads(line)
                np.add.at(announced[account], slots, 1)
                lines += 1
        book = read(file, epsilon=cost)
        for account, counts in zip(book.accounts, announced, strict=True):
            held = book.releases(account)
            assert (held >= counts).all()
            assert held.sum() - counts.sum() <= (kill + 1) * 208  # a block is no longer than the turn
        assert verify(journal) == []
        assert sum(one.kind == "activation" for one in read_journal(journal)) >= lines
    assert lines > 100
    with opened(file, "clinic") as ledger:  # and it can go on
        assert ledger.samples == 200
