"""A party's durable account of what it released about each of its samples: spent first, released afterwards.

Here: one SQLite file for each party; samples, accounts (one for each cut and mechanism) and a count for every sample in
every account; the budget, checked before anything is written; ``Meter``, which reserves ahead so that a step seldom
waits for the disk.  Not here: what a number of releases costs (``accounting``), when to ask (the guard in splitsec/).

Why it never says less than what left.  ``reserve`` returns only after its transaction is on the disk (write-ahead log,
``synchronous=FULL``), and a tensor is handed on only after that: whatever instant the process or the power ends at,
what left had been counted.  A reservation that was never used counts as spent, unless ``give_back`` takes it back at an
orderly end.  In memory the same order holds: counts go up before a transaction and down after it, so that no exception
in between leaves them below the disk.

Which sample is which.  A sample is known by HMAC-SHA-256, cut to 16 bytes, of its id, or of its content where it has
none, under a random key of this ledger.  So its count goes with it from run to run, from data set to data set, in any
order; and fingerprints of one ledger say nothing about another's.  The key lies in the same file: who reads the whole
file can test guesses of ids, so the file is its owner's alone (mode 0600).  Equal rows share one count: known by
content, every copy's release counts for all of them.  That is too much and never too little; numbering the copies
would be too little once a later run meets them in another order.  Where copies are common, give ids.  What is known by
content becomes another sample when its content changes: ids are the better choice wherever there are any.

What it cannot see: that its file was deleted, or put back from an older copy.
"""

from __future__ import annotations

import fcntl
import hmac
import json
import os
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from splitsec.privacy.errors import BadParameter, BudgetSpent, LedgerError
from splitsec.privacy.release import Mechanism, as_json, from_json

__all__ = ["Account", "Book", "Dataset", "Entry", "Ledger", "Meter", "Policy", "Protects", "read"]

Protects = Literal["inputs", "labels", "weights"]
"""What a release tells something about.  Releases add up within one of them: what a cut's activations say about an
input does not add to what an answer says about a label.
"""
KnownBy = Literal["id", "content"]
Epsilon = Callable[[Mapping[Mechanism, int], float], float]
Slots = npt.NDArray[np.int64]

APPLICATION: Final = 0x53504C47
"""SQLite's ``application_id`` of a ledger: "SPLG"."""
VERSION: Final = 1
FINGERPRINT: Final = 16
"""Bytes; two different samples among 2**32 are taken for one with probability about 2**-65, and then over-counted."""
FOLD_BYTES: Final = 2**20
"""Reservations are folded into one count for each sample when they outgrow this, and four times what they fold into."""
BLOCK_SPENDS: Final = 32
BLOCK_LEAST: Final = 2048
"""Samples; a ``Meter`` reserves for this many, or for ``BLOCK_SPENDS`` times what it was asked for if that is more."""
SNAPSHOTS: Final = 100
"""How often a reader tries to copy a ledger that is being written before it gives up."""

_SCHEMA: Final = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE policy (number INTEGER PRIMARY KEY, time TEXT NOT NULL, delta REAL NOT NULL,"
    " budget REAL, label_budget REAL)",
    # fingerprints of slots first, first + 1, ..., 16 bytes each
    "CREATE TABLE samples (first INTEGER PRIMARY KEY, fingerprints BLOB NOT NULL)",
    # slots (int32) of all samples that the data set ever held
    "CREATE TABLE dataset (name TEXT PRIMARY KEY, known_by TEXT NOT NULL, slots BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE account (number INTEGER PRIMARY KEY, cut TEXT NOT NULL, protects TEXT NOT NULL,"
    " mechanism TEXT NOT NULL, clip REAL)",
    # releases of each slot (uint32) as far as they are folded, and those that are not: change (+1, -1) of slots (int32)
    "CREATE TABLE base (account INTEGER PRIMARY KEY, counts BLOB NOT NULL)",
    "CREATE TABLE entry (number INTEGER PRIMARY KEY, account INTEGER NOT NULL, change INTEGER NOT NULL,"
    " slots BLOB NOT NULL)",
)


@dataclass(frozen=True, eq=False)
class Dataset:
    """``slots``: int64 ``[n]``, the place of each row's sample in this ledger, in order of rows."""

    name: str
    slots: Slots


@dataclass(frozen=True)
class Account:
    """Releases of one kind: through one cut, by one mechanism.  Made by ``Ledger.account``."""

    number: int
    cut: str
    protects: Protects
    mechanism: Mechanism
    clip: float | None


@dataclass(frozen=True)
class Policy:
    """What a run was held to.  ``label_budget`` is for what protects labels, ``budget`` for all else."""

    delta: float
    budget: float | None
    label_budget: float | None

    def budget_of(self, protects: Protects) -> float | None:
        """The budget (an epsilon) that holds for what ``protects``; None where there is none."""
        return self.label_budget if protects == "labels" else self.budget


@dataclass(frozen=True)
class Entry:
    """One line of a statement: what went through one cut by one mechanism, for the samples of one data set."""

    party: str
    cut: str
    dataset: str
    protects: Protects
    releases: int
    """The most of any sample."""
    samples: int
    """That the data set ever held."""
    mechanism: str
    """Its kind, e.g. ``gaussian``."""
    noise_multiplier: float | None
    """None where the mechanism has none."""
    clip: float | None
    delta: float
    epsilon: float
    """Of the data set's worst sample, composed over everything that carried it and protects the same."""
    epsilon_alone: float
    """Of the ``releases`` of this line, were they all."""
    epsilon_budget: float | None


def _epsilon(releases: Mapping[Mechanism, int], delta: float) -> float:
    from splitsec.privacy.accounting import epsilon

    return epsilon(releases, delta)


class Book:
    """What a ledger holds, in memory: counts, and what they cost.  Made by ``read``, and kept by ``Ledger``."""

    def __init__(self, connection: sqlite3.Connection, epsilon: Epsilon | None = None) -> None:
        self._epsilon = _epsilon if epsilon is None else epsilon
        self._costs: dict[tuple[float, tuple[tuple[Mechanism, int], ...]], float] = {}
        meta = dict(connection.execute("SELECT name, value FROM meta"))
        self.party: str = meta["party"]
        self.policies = [
            Policy(*row) for row in connection.execute("SELECT delta, budget, label_budget FROM policy ORDER BY number")
        ]
        self.samples = 0
        """Slots that are taken: 0, 1, ... up to here."""
        for first, size in connection.execute("SELECT first, length(fingerprints) FROM samples ORDER BY first"):
            if first != self.samples or size % FINGERPRINT:
                raise LedgerError("its samples are not numbered one after the other")
            self.samples += size // FINGERPRINT
        self.datasets: dict[str, tuple[KnownBy, npt.NDArray[np.int32]]] = {
            name: (known_by, self._slots(blob))
            for name, known_by, blob in connection.execute("SELECT name, known_by, slots FROM dataset ORDER BY name")
        }
        self.accounts: list[Account] = []
        self.counts: list[npt.NDArray[np.uint32]] = []
        for number, cut, protects, mechanism, clip in connection.execute(
            "SELECT number, cut, protects, mechanism, clip FROM account ORDER BY number"
        ):
            if number != len(self.accounts) or protects not in get_args(Protects):
                raise LedgerError("its accounts are not what they should be")
            self.accounts.append(Account(number, cut, protects, from_json(json.loads(mechanism)), clip))
            self.counts.append(self._counted(connection, number))

    def _slots(self, blob: bytes) -> npt.NDArray[np.int32]:
        slots = np.frombuffer(blob, dtype="<i4").astype(np.int32)
        if len(slots) and (slots.min() < 0 or slots.max() >= self.samples):
            raise LedgerError("it counts a sample that it does not have")
        return slots

    def _counted(self, connection: sqlite3.Connection, account: int) -> npt.NDArray[np.uint32]:
        total = np.zeros(self.samples, dtype=np.int64)
        for (blob,) in connection.execute("SELECT counts FROM base WHERE account = ?", (account,)):
            base = np.frombuffer(blob, dtype="<u4")
            if len(base) > self.samples:
                raise LedgerError("it counts a sample that it does not have")
            total[: len(base)] += base
        changes: dict[int, list[bytes]] = {1: [], -1: []}
        for change, blob in connection.execute("SELECT change, slots FROM entry WHERE account = ?", (account,)):
            changes[change].append(blob)
        for change, blobs in changes.items():
            total += change * np.bincount(self._slots(b"".join(blobs)), minlength=self.samples)
        if len(total) and (total.min() < 0 or total.max() >= 2**32):
            raise LedgerError("more was given back than was ever reserved")
        return total.astype(np.uint32)

    @property
    def policy(self) -> Policy | None:
        """The last run's; None before the first."""
        return self.policies[-1] if self.policies else None

    def releases(self, account: Account) -> npt.NDArray[np.uint32]:
        """How often each slot was released in ``account``: a copy, uint32 ``[samples]``."""
        return self.counts[account.number].copy()

    def columns(self, protects: Protects, slots: npt.NDArray[Any]) -> dict[Mechanism, Slots]:
        """Releases of each of ``slots`` so far, by mechanism, over every account with the same ``protects``."""
        columns: dict[Mechanism, Slots] = {}
        for account, counts in zip(self.accounts, self.counts, strict=True):
            if account.protects == protects:
                taken = counts[slots].astype(np.int64)
                before = columns.get(account.mechanism)
                columns[account.mechanism] = taken if before is None else before + taken
        return columns

    def cost(self, mechanisms: Sequence[Mechanism], counts: Sequence[int], delta: float) -> float:
        """Epsilon of so many releases of each mechanism, from memory where it was asked before."""
        key = (delta, tuple((one, int(n)) for one, n in zip(mechanisms, counts, strict=True) if n))
        if not key[1]:
            return 0.0
        if key not in self._costs:
            self._costs[key] = float(self._epsilon(dict(key[1]), delta))
        return self._costs[key]

    def worst(self, columns: Mapping[Mechanism, Slots], delta: float) -> float:
        """The largest epsilon of any sample.  Who was released no more often than another cannot have a larger one."""
        vectors, _ = _distinct(list(columns.values()))
        return max((self.cost(tuple(columns), vector, delta) for vector in _highest(vectors)), default=0.0)

    def statement(
        self, delta: float | None = None, *, budget: float | None = None, label_budget: float | None = None
    ) -> list[Entry]:
        """What was spent, line by line.  Without ``delta``, by the last run's policy.  Raises ``LedgerError``."""
        policy = self.policy if delta is None else Policy(delta, budget, label_budget)
        entries: list[Entry] = []
        if policy is None:
            if any(counts.any() for counts in self.counts):
                raise LedgerError("no run has written its delta down: say which delta to account for")
            return entries
        for name, (_, slots) in self.datasets.items():
            composed: dict[Protects, float] = {}
            for account, counts in zip(self.accounts, self.counts, strict=True):
                releases = int(counts[slots].max(initial=0))
                if not releases:
                    continue
                protects, mechanism = account.protects, account.mechanism
                if protects not in composed:
                    composed[protects] = self.worst(self.columns(protects, slots), policy.delta)
                entries.append(
                    Entry(
                        party=self.party,
                        cut=account.cut,
                        dataset=name,
                        protects=protects,
                        releases=releases,
                        samples=len(slots),
                        mechanism=as_json(mechanism)["kind"],
                        noise_multiplier=getattr(mechanism, "noise_multiplier", None),
                        clip=account.clip,
                        delta=policy.delta,
                        epsilon=composed[protects],
                        epsilon_alone=self.cost((mechanism,), (releases,), policy.delta),
                        epsilon_budget=policy.budget_of(protects),
                    )
                )
        return entries


class Ledger:
    """The ledger in ``file``, which is made where there is none.  One process at a time; use it in one thread.

    ``epsilon``: in place of ``accounting.epsilon``.  Raises ``LedgerError`` where the file is no ledger, another
    party's, a newer version's, damaged, readable by others, or in use.
    """

    def __init__(self, file: str | os.PathLike[str], *, party: str, epsilon: Epsilon | None = None) -> None:
        self.file = Path(file)
        self._broken = ""
        self._lock = _locked(self.file)
        try:
            if not self.file.exists():
                _create(self.file, party)
            self._connection = _connected(self.file)
        except BaseException:
            os.close(self._lock)
            raise
        try:
            with _named(self.file):
                _check(self._connection)
                self._book = Book(self._connection, epsilon)
                if self._book.party != party:
                    raise LedgerError(f"it is the ledger of {self._book.party}, and not of {party}")
                meta = dict(self._connection.execute("SELECT name, value FROM meta"))
                self._key: bytes = meta["key"]
            self._own = [np.zeros(self._book.samples, dtype=np.int64) for _ in self._book.accounts]
            self._unfolded = 0
            (entries,) = self._connection.execute("SELECT count(*) FROM entry").fetchone()
            if entries:
                self._fold()
        except BaseException:
            self._connection.close()
            os.close(self._lock)
            raise

    @property
    def party(self) -> str:
        """Whose ledger it is."""
        return self._book.party

    @property
    def policy(self) -> Policy | None:
        """The last one that ``set_policy`` was given, in this run or an earlier one."""
        return self._book.policy

    @property
    def samples(self) -> int:
        """How many samples it knows; slots are 0, 1, ... up to there."""
        return self._book.samples

    def releases(self, account: Account) -> npt.NDArray[np.uint32]:
        """How often each slot was released in ``account``, reservations included: a copy, uint32 ``[samples]``."""
        return self._book.releases(account)

    # --- what is counted

    def set_policy(self, *, delta: float, budget: float | None, label_budget: float | None = None) -> None:
        """Write down what this run is held to, for whoever reads the ledger alone."""
        if not 0 < delta < 1:
            raise BadParameter(f"delta is {delta}, and must be between 0 and 1")
        policy = Policy(float(delta), budget, label_budget)
        if policy == self._book.policy:
            return
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO policy (time, delta, budget, label_budget) VALUES (?, ?, ?, ?)",
                (datetime.now(UTC).isoformat(timespec="seconds"), policy.delta, budget, label_budget),
            )
        self._book.policies.append(policy)

    def dataset(self, name: str, keys: Sequence[bytes], *, known_by: KnownBy = "id") -> Dataset:
        """The slots of a data set's samples.  ``keys``: one for each row, its id or, ``known_by="content"``, its bytes.

        A sample that the ledger has met before, under any name, keeps its slot and its counts; equal keys share one.
        Raises ``LedgerError`` where samples were known by the other thing before, in whatever data set: their counts
        would be lost.
        """
        before, members = self._book.datasets.get(name, (known_by, np.zeros(0, np.int32)))
        before = next((other for other, _ in self._book.datasets.values() if other != known_by), before)
        if before != known_by:
            raise LedgerError(
                f"{self.file}: the samples of {name!r} are known by {before} here, and now come by {known_by}: what was"
                f" released about them could not be found again; give them by {before} as before"
            )
        mark = known_by.encode() + b"\0"
        digests = b"".join(hmac.digest(self._key, mark + key, "sha256")[:FINGERPRINT] for key in keys)
        known = b"".join(row[0] for row in self._connection.execute("SELECT fingerprints FROM samples ORDER BY first"))
        slots, new = _matched(known, digests)
        union = np.union1d(members, slots).astype(np.int32)
        if new or len(union) > len(members) or name not in self._book.datasets:
            with self._transaction() as connection:
                if new:
                    connection.execute("INSERT INTO samples VALUES (?, ?)", (self._book.samples, new))
                connection.execute(
                    "INSERT OR REPLACE INTO dataset VALUES (?, ?, ?)", (name, known_by, union.astype("<i4").tobytes())
                )
            self._book.samples += len(new) // FINGERPRINT
            self._book.counts = [_longer(one, self._book.samples) for one in self._book.counts]
            self._own = [_longer(one, self._book.samples) for one in self._own]
            self._book.datasets[name] = (known_by, union)
            self._book.datasets = dict(sorted(self._book.datasets.items()))
        return Dataset(name, slots)

    def mark(self, keys: Sequence[bytes]) -> str:
        """Eight hexadecimal digits that tell one set of samples from another, and nothing to who lacks this ledger."""
        return hmac.digest(self._key, b"set\0" + b"".join(sorted(keys)), "sha256")[:4].hex()

    def account(self, cut: str, protects: Protects, mechanism: Mechanism, clip: float | None) -> Account:
        """The account of what goes through ``cut`` by ``mechanism``; the same one as ever for the same arguments."""
        if protects not in get_args(Protects):
            raise BadParameter(f"protects is {protects!r}, and must be one of {', '.join(get_args(Protects))}")
        clip = None if clip is None else float(clip)
        for one in self._book.accounts:
            if (one.cut, one.protects, one.mechanism, one.clip) == (cut, protects, mechanism, clip):
                return one
        account = Account(len(self._book.accounts), cut, protects, mechanism, clip)
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO account VALUES (?, ?, ?, ?, ?)",
                (account.number, cut, protects, json.dumps(as_json(mechanism), sort_keys=True), clip),
            )
        self._book.accounts.append(account)
        self._book.counts.append(np.zeros(self._book.samples, dtype=np.uint32))
        self._own.append(np.zeros(self._book.samples, dtype=np.int64))
        return account

    # --- spending

    def reserve(self, account: Account, slots: npt.ArrayLike, *, budget: float | None, delta: float) -> None:
        """Count one release of each of ``slots`` (int ``[n]``; one that stands twice counts twice) in ``account``.

        Returns once that is on the disk.  Raises ``BudgetSpent``, with nothing written, if for any of them epsilon over
        all accounts with the same ``protects`` would pass ``budget``.
        """
        taken = self._checked(account, slots)
        if not len(taken):
            return
        unique, times = np.unique(taken, return_counts=True)
        if budget is not None:
            self._check_budget(account, unique, times, budget, delta)
        counts = self._book.counts[account.number]
        if int(counts[unique].max()) + int(times.max()) >= 2**32:
            raise LedgerError(f"{self.file}: more releases of one sample than can be counted")
        counts[unique] += times.astype(np.uint32)
        self._append(account, +1, taken)
        self._own[account.number][unique] += times
        self._fold_if_due()

    def give_back(self, account: Account, slots: npt.ArrayLike) -> None:
        """Take reservations back whose release never happened, one for each of ``slots``.

        Safe only where the caller knows that: it reserved them itself, in this process, and has offered nothing for
        them to anybody since.  ``Meter`` knows, for it strikes a reservation off its list *before* a tensor is handed
        on; what is still on the list at an orderly end can't have left.  What an earlier process reserved cannot be
        given back at all: nobody is left who knows.  If this is interrupted, either all or nothing was given back.
        """
        taken = self._checked(account, slots)
        if not len(taken):
            return
        unique, times = np.unique(taken, return_counts=True)
        own = self._own[account.number]
        if (own[unique] < times).any():
            raise LedgerError(f"{self.file}: more is to be given back than was reserved since this ledger was opened")
        own[unique] -= times
        self._append(account, -1, taken)
        self._book.counts[account.number][unique] -= times.astype(np.uint32)
        self._fold_if_due()

    def affordable(
        self, account: Account, slots: npt.ArrayLike, *, budget: float | None, delta: float
    ) -> npt.NDArray[np.bool_]:
        """Which of ``slots`` could be released once more (as often as they stand there) within ``budget``."""
        taken = self._checked(account, slots)
        if budget is None or not len(taken):
            return np.ones(len(taken), dtype=np.bool_)
        unique, back, times = np.unique(taken, return_inverse=True, return_counts=True)
        columns = self._book.columns(account.protects, unique)
        columns[account.mechanism] = columns[account.mechanism] + times
        vectors, which = _distinct(list(columns.values()))
        fits = np.ones(len(vectors), dtype=np.bool_)
        for index in np.argsort(vectors.sum(axis=1), kind="stable"):
            if fits[index] and not self._book.cost(tuple(columns), vectors[index], delta) <= budget:
                fits[(vectors >= vectors[index]).all(axis=1)] = False
        return np.asarray(fits[which][back])

    def passes_left(
        self, slots: npt.ArrayLike, accounts: Sequence[Account], budget: float | None, delta: float, most: int
    ) -> int:
        """How many more passes over ``slots``, each with one release in each of ``accounts``, stay within ``budget``.

        No more than ``most`` are looked for.
        """
        if budget is None or not accounts:
            return most
        fewest = most
        for protects in sorted({account.protects for account in accounts}):
            ours = [account for account in accounts if account.protects == protects]
            unique, times = np.unique(self._checked(ours[0], slots), return_counts=True)
            columns = self._book.columns(protects, unique)
            added = [sum(account.mechanism == one for account in ours) for one in columns]
            vectors, _ = _distinct([*columns.values(), times])
            for *counts, time in _highest(vectors):
                passes = _Passes(self._book, tuple(columns), counts, [time * one for one in added], budget, delta)
                fewest = _most(passes.fit, fewest)
        return fewest

    def statement(
        self, delta: float | None = None, *, budget: float | None = None, label_budget: float | None = None
    ) -> list[Entry]:
        """What was spent, reservations included.  Without ``delta``, by the last policy that was set."""
        return self._book.statement(delta, budget=budget, label_budget=label_budget)

    def _checked(self, account: Account, slots: npt.ArrayLike) -> Slots:
        if account.number >= len(self._book.accounts) or self._book.accounts[account.number] != account:
            raise LedgerError(f"{self.file}: an account of another ledger")
        taken = np.asarray(slots, dtype=np.int64)
        if taken.ndim != 1 or (len(taken) and (taken.min() < 0 or taken.max() >= self._book.samples)):
            raise LedgerError(f"{self.file}: slots that this ledger did not give out")
        return taken

    def _check_budget(self, account: Account, unique: Slots, times: Slots, budget: float, delta: float) -> None:
        columns = self._book.columns(account.protects, unique)
        columns[account.mechanism] = columns[account.mechanism] + times
        epsilon = self._book.worst(columns, delta)
        if not epsilon <= budget:
            spent = self._book.worst(self._book.columns(account.protects, unique), delta)
            raise BudgetSpent(
                f"one more release through {account.cut} would bring a sample's epsilon from {spent:.4g} to "
                f"{epsilon:.4g} at delta {delta:g}, and the budget for {account.protects} is {budget:g}"
            )

    # --- the file

    def _append(self, account: Account, change: int, slots: Slots) -> None:
        blob = slots.astype("<i4").tobytes()
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO entry (account, change, slots) VALUES (?, ?, ?)", (account.number, change, blob)
            )
        self._unfolded += len(blob)

    def _fold_if_due(self) -> None:
        if self._unfolded > max(FOLD_BYTES, 16 * self._book.samples * len(self._book.accounts)):
            self._fold()

    def _fold(self) -> None:
        """Put every account's counts in one blob in place of its reservations, in one transaction."""
        with self._transaction() as connection:
            for account, counts in zip(self._book.accounts, self._book.counts, strict=True):
                connection.execute(
                    "INSERT OR REPLACE INTO base VALUES (?, ?)", (account.number, counts.astype("<u4").tobytes())
                )
            connection.execute("DELETE FROM entry")
        self._unfolded = 0

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it on the disk, or nothing and an exception; after an error of the disk nothing more is written."""
        if self._broken:
            raise LedgerError(f"{self.file}: {self._broken}")
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException as error:
            with suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                self._broken = f"cannot be written any more: {error}"
                raise LedgerError(f"{self.file}: {self._broken}") from error
            raise

    def close(self) -> None:
        """Let go of the file, which then holds everything (no ``-wal`` beside it).  Again: nothing."""
        if self._lock < 0:
            return
        self._broken = self._broken or "is closed"
        try:
            self._connection.close()
        finally:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Meter:
    """Spends for the steps of a run, and seldom waits for the disk: it reserves a block of what will be released next.

    ``budget``, ``label_budget``: epsilon at ``delta``, as in ``Policy``.  ``block``: samples to reserve at a time;
    without it, 32 times what is being spent and at least 2,048.  A crash costs at most one block in each account.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        delta: float,
        budget: float | None,
        label_budget: float | None = None,
        block: int | None = None,
    ) -> None:
        self._ledger = ledger
        self._policy = Policy(delta, budget, label_budget)
        self._block = block
        self._expected: Slots = np.zeros(0, dtype=np.int64)
        self._place: dict[Account, int] = {}
        """How many of the expected slots each account has spent; -1 once it did not keep to the order."""
        self._ahead: dict[Account, Slots] = {}
        """Releases of each slot that are reserved and have not been asked for."""
        self._closed = False

    def expect(self, slots_in_order: npt.ArrayLike) -> None:
        """Say which slots the coming turn will release, in order, once in each account.

        Only speed depends on it.  What was reserved for a turn that ended early serves the next one.
        """
        self._expected = np.array(slots_in_order, dtype=np.int64)
        self._place.clear()

    def spend(self, account: Account, slots: npt.ArrayLike, *, again: bool = False) -> None:
        """Count one release of each of ``slots`` in ``account``.  Call it before the tensor is handed to anybody.

        ``again``: one more of slots that were released just now, beside those that were expected.

        Raises ``BudgetSpent``, with nothing spent: not one of them may be released.
        """
        if self._closed:
            raise LedgerError("nothing is spent any more: this run's reservations were closed")
        taken = np.asarray(slots, dtype=np.int64)
        self._ledger._checked(account, taken)
        ahead = self._ahead.get(account)
        if ahead is None or len(ahead) < self._ledger.samples:
            ahead = _longer(np.zeros(0, np.int64) if ahead is None else ahead, self._ledger.samples)
            self._ahead[account] = ahead
        place = self._place.get(account, 0)
        keeps_order = place >= 0 and np.array_equal(self._expected[place : place + len(taken)], taken)
        np.subtract.at(ahead, taken, 1)
        try:
            if len(taken) and int(ahead[taken].min()) < 0:
                lacking = np.unique(taken[ahead[taken] < 0])
                needed = np.repeat(lacking, -ahead[lacking])
                coming = self._coming(ahead, place, taken) if keeps_order else needed[:0]
                reserved = self._reserve(account, needed, coming)
                np.add.at(ahead, reserved, 1)
        except BaseException:
            np.add.at(ahead, taken, 1)  # not spent: whoever asked must not release
            raise
        if not again:
            self._place[account] = place + len(taken) if keeps_order else -1

    def _coming(self, ahead: Slots, place: int, taken: Slots) -> Slots:
        """What will be asked for after ``taken``, as far as a block goes and nothing is reserved for it."""
        block = max(BLOCK_LEAST, BLOCK_SPENDS * len(taken)) if self._block is None else self._block
        window = self._expected[place + len(taken) : place + max(block, len(taken))]
        return window[ahead[window] <= 0]

    def _reserve(self, account: Account, needed: Slots, coming: Slots) -> Slots:
        """Reserve ``needed``, and of ``coming`` as much as the budget allows; returns what was reserved."""
        limits: dict[str, Any] = {"budget": self._policy.budget_of(account.protects), "delta": self._policy.delta}
        everything = np.concatenate([needed, coming])
        try:
            self._ledger.reserve(account, everything, **limits)
            return everything
        except BudgetSpent:
            if not len(coming):
                raise
        fits = self._ledger.affordable(account, everything, **limits)
        stop = len(everything) if fits.all() else int(np.argmin(fits))
        some = everything[: max(stop, len(needed))]
        self._ledger.reserve(account, some, **limits)
        return some

    def close(self, orderly: bool) -> None:
        """End.  ``orderly``: give back what was reserved and never asked for; otherwise it stays spent.

        Nothing can be spent afterwards.  Again: nothing.
        """
        if self._closed:
            return
        self._closed = True
        if orderly:
            for account, ahead in self._ahead.items():
                left = np.flatnonzero(ahead > 0)
                self._ledger.give_back(account, np.repeat(left, ahead[left]))


def read(file: str | os.PathLike[str], *, epsilon: Epsilon | None = None) -> Book:
    """What the ledger in ``file`` holds by now, also while a party has it open.  Takes no lock, writes nothing there.

    Raises ``LedgerError``.
    """
    source = Path(file)
    with tempfile.TemporaryDirectory(prefix="splitsec-") as place:
        copy = Path(place) / "ledger.sqlite"
        with _named(source):
            _check_header(source)
            _copy(source, copy)
            with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
                _check(connection)
                return Book(connection, epsilon)


# --- counts


@dataclass(frozen=True)
class _Passes:
    """So many releases by each mechanism, and so many more with each pass."""

    book: Book
    mechanisms: tuple[Mechanism, ...]
    counts: list[int]
    added: list[int]
    budget: float
    delta: float

    def fit(self, passes: int) -> bool:
        after = [count + passes * more for count, more in zip(self.counts, self.added, strict=True)]
        return self.book.cost(self.mechanisms, after, self.delta) <= self.budget


def _distinct(columns: Sequence[Slots]) -> tuple[Slots, npt.NDArray[np.intp]]:
    """The different rows of ``columns`` (each ``[n]``, no negatives) as ``[m, columns]``, and which of them each is."""
    rows = len(columns[0]) if columns else 0
    if not rows:
        return np.zeros((0, len(columns)), dtype=np.int64), np.zeros(0, dtype=np.intp)
    codes = np.zeros(rows, dtype=np.int64)
    for column in columns:
        base = int(column.max()) + 1
        if (int(codes.max()) + 1) * base >= 2**62:
            codes = np.unique(codes, return_inverse=True)[1].astype(np.int64)
        codes = codes * base + column
    if int(codes.max()) < 4 * rows + 1024:
        one = np.full(int(codes.max()) + 1, -1, dtype=np.int64)
        one[codes] = np.arange(rows)
        present = np.flatnonzero(one >= 0)
        one_of_each = one[present]
        one[present] = np.arange(len(present))
        which = one[codes]
    else:
        _, one_of_each, which = np.unique(codes, return_index=True, return_inverse=True)
    return np.stack([column[one_of_each] for column in columns], axis=1), which.astype(np.intp)


def _highest(vectors: Slots) -> list[list[int]]:
    """Those of ``vectors`` (``[m, k]``) that no other one equals or exceeds in every place."""
    rest = vectors[np.argsort(-vectors.sum(axis=1), kind="stable")]
    highest = []
    while len(rest):
        highest.append(rest[0].tolist())
        rest = rest[(rest > rest[0]).any(axis=1)]
    return highest


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to ``limit`` that ``fits``, which holds up to some number and not above it; 0 if none."""
    low, high, step = 0, limit, 1
    while low < high:  # small numbers first, in doubling steps: large ones are slow to account for
        middle = min(low + step, (low + high + 1) // 2)
        if fits(middle):
            low, step = middle, step * 2
        else:
            high = middle - 1
    return low


def _matched(known: bytes, digests: bytes) -> tuple[Slots, bytes]:
    """The slot of each of ``digests`` (16 bytes each), behind those of ``known``; and those that are new, in order."""
    both = np.frombuffer(known + digests, dtype=">u8").reshape(-1, 2).astype(np.uint64)
    count = len(known) // FINGERPRINT
    order = np.lexsort((both[:, 1], both[:, 0]))  # stable: of equal ones the first in the file comes first
    ranked = both[order]
    starts = np.ones(len(order), dtype=np.bool_)
    starts[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]
    new = np.flatnonzero(first[count:] == np.arange(count, len(first))) + count
    place = np.arange(len(first), dtype=np.int64)
    place[new] = count + np.arange(len(new))
    rows = np.frombuffer(digests, dtype=f"V{FINGERPRINT}")
    return place[first[count:]], rows[new - count].tobytes()


def _longer(counts: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    return np.concatenate([counts, np.zeros(length - len(counts), dtype=counts.dtype)])


# --- files


def _locked(file: Path) -> int:
    """A descriptor that holds the lock; the kernel lets go of it when the process ends, however it ends."""
    try:
        _make_folder(file.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.open(file.with_name(file.name + ".lock"), flags, 0o600)
    except OSError as error:
        raise LedgerError(f"{file}: no ledger can be kept there: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise LedgerError(f"{file}: it is in use: another process (or this one) has it open") from None
        raise LedgerError(f"{file}: no lock can be had on this file system: {error.strerror}") from None
    return lock


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(file: Path, ending: str) -> Path:
    return file.with_name(file.name + ending)


def _create(file: Path, party: str) -> None:
    """Make a whole ledger under another name, then give it its own: nobody ever meets half of one."""
    for ending in ("-wal", "-journal"):
        if _beside(file, ending).exists():
            raise LedgerError(
                f"{file}: the ledger is gone, but {_beside(file, ending).name} is there: what was spent is in the "
                "ledger that is missing; put it back"
            )
    fresh = _beside(file, ".new")
    try:
        for ending in ("", "-journal", "-wal", "-shm"):
            _beside(fresh, ending).unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.fchmod(descriptor, 0o600)
        os.close(descriptor)
        with closing(sqlite3.connect(fresh, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
            made = datetime.now(UTC).isoformat(timespec="seconds")
            connection.executemany(
                "INSERT INTO meta VALUES (?, ?)", [("party", party), ("key", os.urandom(32)), ("made", made)]
            )
            connection.execute("COMMIT")
            connection.execute("PRAGMA journal_mode = WAL").fetchone()
        descriptor = os.open(fresh, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        fresh.rename(file)
        _sync_folder(file.parent)
    except (OSError, sqlite3.Error) as error:
        raise LedgerError(f"{file}: no ledger can be kept there: {error}") from error


def _connected(file: Path) -> sqlite3.Connection:
    with _named(file):
        _check_header(file)
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode & 0o077:
            raise LedgerError(f"others may use it (mode {mode:04o}); run `chmod 600` on it")
        connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=0)
        try:
            # Exclusive: the log's index stays in memory, and no other tool can write in between.
            for pragma in ("locking_mode = EXCLUSIVE", "synchronous = FULL", "fullfsync = 1", "trusted_schema = OFF"):
                connection.execute(f"PRAGMA {pragma}").fetchall()
            if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                raise LedgerError("this file system allows no write-ahead log")
            return connection
        except BaseException:
            connection.close()
            raise


def _check_header(file: Path) -> None:
    """Refuse what is no ledger before SQLite, which would begin anew in an empty file, looks at it."""
    with open(file, "rb") as stream:
        header = stream.read(100)
    if len(header) < 100 or header[:16] != b"SQLite format 3\0" or header[68:72] != APPLICATION.to_bytes(4, "big"):
        raise LedgerError("this is no ledger")
    version = int.from_bytes(header[60:64], "big")
    if version > VERSION:
        raise LedgerError(f"a newer splitsec wrote it (version {version}; this one reads {VERSION}): update splitsec")
    if version < VERSION:
        raise LedgerError(f"this is no ledger (version {version})")


def _check(connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
        raise LedgerError("it is damaged: put back a copy that is not older, or account for what is lost")


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors that say which ledger they are about."""
    try:
        yield
    except LedgerError as error:
        raise LedgerError(f"{file}: {error}") from error.__cause__
    except (sqlite3.Error, BadParameter, ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{file}: it is damaged or no ledger: {error}") from error
    except OSError as error:
        raise LedgerError(f"{file}: it cannot be read: {error.strerror}") from None


def _copy(source: Path, copy: Path) -> None:
    """Copy a ledger and its write-ahead log as they stood at one instant.

    In the file itself only what stands in the log is ever written (SQLite's file format, section 4), and a log
    that begins anew begins with another header.  So a file that was being written while it was copied is made whole by
    the log that is copied after it, if that log still begins as it did before.
    """
    log = _beside(source, "-wal")
    for _ in range(SNAPSHOTS):
        header, before = _contents(log, 32), _about(source)
        main = source.read_bytes()
        written = _contents(log)
        if written[:32] == header and (header or before == _about(source)):
            copy.write_bytes(main)
            _beside(copy, "-wal").write_bytes(written)
            return
    raise LedgerError("it is being written all the time; try again")


def _contents(file: Path, size: int = -1) -> bytes:
    try:
        with open(file, "rb") as stream:
            return stream.read(size)
    except FileNotFoundError:
        return b""


def _about(file: Path) -> tuple[int, int, int]:
    about = file.stat()
    return about.st_ino, about.st_size, about.st_mtime_ns
