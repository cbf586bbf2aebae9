"""What happens to a tensor at the door, between the check against the graph and the channel: refuse a copy of the
input, spend budget, clip, add noise, write down what left.

Here: one party's safeguards at work, in that order.  Not here: what is demanded (``demands``), the mathematics and the
ledger's file (``splitsec.privacy``), the journal's file (``journal``), the door itself (``guard``, where the story goes
next).  A party without any policy and without a journal has no safeguards, and pays nothing for them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from splitsec.demands import Demand, Protects
from splitsec.errors import BudgetSpent, EgressRefused, LedgerError, SuspectedAttack, UnsafeSegment
from splitsec.journal import Journal
from splitsec.messages import Message
from splitsec.partyfile import OwnPrivacy
from splitsec.plan import Lane
from splitsec.privacy import errors as below
from splitsec.privacy.dpsgd import PrivateTraining
from splitsec.privacy.leakage import measure
from splitsec.privacy.ledger import Account, Dataset, Ledger, Meter
from splitsec.privacy.mechanism import clip_rows, gaussian, laplace, randomise_labels
from splitsec.privacy.policy import LabelPolicy, Policy
from splitsec.privacy.randomness import KeystreamSource, NoiseSource
from splitsec.privacy.release import InTheClear, Mechanism

__all__ = ["Carried", "Safeguards", "accounted", "write_alarm"]

LEAST_ROWS: Final = 8
"""Samples below which leakage is not measured: the estimators say nothing there."""


@dataclass(frozen=True)
class Carried:
    """Whose data a message carries: this party's samples ``rows`` (int64 ``[n]``) of ``split``, in the message's order.

    ``inputs``: the input fields of the whole split, ``[samples, ...]`` each.  ``again``: in the second attempt at a
    step, whose first was a decoy; they left before in this step, and both count.
    """

    split: str
    rows: torch.Tensor
    inputs: Mapping[str, torch.Tensor]
    training: bool
    stream: int = 0
    again: bool = False


class Safeguards:
    """One party's: ``demands`` by lane (peer, number).

    ``private``: segments trained with DP-SGD, and what of this party's own each learns from.  ``ledger`` and
    ``datasets`` (by split): where privacy is accounted for, or None where nothing is.  ``source``: of
    the noise; the operating system's own by default.
    """

    def __init__(
        self,
        demands: Mapping[tuple[str, int], Demand],
        *,
        own: OwnPrivacy | None = None,
        private: Mapping[str, PrivateTraining] | None = None,
        learnt_from: Mapping[str, frozenset[Protects]] | None = None,
        ledger: Ledger | None = None,
        datasets: Mapping[str, Dataset] | None = None,
        journal: Journal | None = None,
        source: NoiseSource | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._demands = demands
        self._own = own or OwnPrivacy()
        self._private = dict(private or {})
        self._learnt_from = dict(learnt_from or {})
        self._ledger = ledger
        self._datasets = dict(datasets or {})
        self._journal = journal
        self._source = source or KeystreamSource()
        self._warn = warn
        self._meter = None
        if ledger is not None:
            limits = self._own.epsilon, self._own.label_epsilon
            self._meter = Meter(ledger, delta=self._own.delta, budget=limits[0], label_budget=limits[1])
        self._accounted: frozenset[Protects] = frozenset() if ledger is None else frozenset(("inputs", "labels"))
        self._looked: dict[tuple[str, int], int] = defaultdict(int)
        self._gone: dict[tuple[str, int, int], tuple[tuple[int, bool], set[int]]] = {}
        self._sums: dict[str, dict[str, list[float]]] = {}
        self._warned: set[str] = set()

    @property
    def may_repeat(self) -> bool:
        """Whether a sample may leave twice in a step, in a decoy: not where anybody limits or noises what leaves."""
        return not (
            self._private
            or self._own.epsilon is not None
            or self._own.label_epsilon is not None
            or any(demand.policy is not None for demand in self._demands.values())
        )

    # --- before a run

    def accounts(self, *, training: bool, labels: bool) -> list[tuple[Account, float | None]]:
        """What one pass over the samples of a split costs: the accounts it spends once each, and their budgets."""
        # By lane number: an edge to several members of a group has one, and a sample is in the stream of one of them.
        found: dict[tuple[int, Account], float | None] = {}
        if training:
            for segment, private in self._private.items():
                costs = self._accounts_of_weights(segment, private.release, private.clip)
                found.update({(-1, account): budget for account, budget in costs.items()})
        for demand in self._demands.values():
            kind = demand.lane.kind
            if (kind == "gradient" and not training) or (kind == "labels" and not labels):
                continue
            costs = self._accounts_of(demand)
            found.update({(demand.lane.number, account): budget for account, budget in costs.items()})
        return [(account, budget) for (_, account), budget in found.items()]

    def passes_left(self, split: str, *, training: bool, labels: bool, most: int, also: str | None = None) -> int:
        """How many more complete passes over ``split`` the budgets allow, at most ``most``.

        ``also``: another split that is looked at once a pass; where it holds some of the same samples, both cost them.
        """
        if self._ledger is None or split not in self._datasets:
            return most
        slots = self._datasets[split].slots
        accounts = self.accounts(training=training, labels=labels)
        if also in self._datasets and np.intersect1d(slots, self._datasets[also].slots).size:
            accounts += self.accounts(training=not training, labels=labels)
        by_budget: dict[tuple[str, float], list[Account]] = defaultdict(list)
        for account, budget in accounts:
            if budget is not None:
                by_budget[account.protects, budget].append(account)
        for (_, budget), ours in by_budget.items():
            try:
                most = self._ledger.passes_left(slots, ours, budget=budget, delta=self._own.delta, most=most)
            except below.PrivacyError as error:
                raise LedgerError(
                    f"what a pass over the {split} samples costs cannot be told: {error}",
                    expected="mechanisms whose costs can be added up",
                    fix="follow the message; nothing was sent",
                ) from error
        return most

    def expect(self, split: str, batches: Sequence[torch.Tensor]) -> None:
        """Say which samples the coming turn will release, in order: the ledger then writes once for many steps."""
        if self._meter is not None and split in self._datasets and batches:
            self._meter.expect(self._datasets[split].slots[torch.cat(list(batches)).numpy()])

    # --- at the door

    def treat(self, key: tuple[str, int], message: Message, carried: Carried | None) -> Message:
        """What may leave in place of ``message``; its budget is spent.  The tensors given are not changed.

        Raises ``UnsafeSegment`` for a copy of the input, ``BudgetSpent``, ``EgressRefused``.
        """
        demand = self._demands.get(key)
        if demand is None or not message.tensors:
            return message
        ((name, tensor),) = message.tensors.items()
        if self._ledger is not None and demand.carries & self._accounted and not self._knows(carried):
            raise EgressRefused(
                f"{demand.lane.kind} of {demand.lane.name} to {demand.lane.peer}: of samples that are not known",
                expected="samples that the ledger knows",
                fix="nothing was sent; this is a fault of whoever called the guard",
            )
        if carried is not None and not demand.raw and "inputs" in demand.carries:
            _refuse_copies(demand.lane, tensor, carried)
        if carried is not None:
            self._once(key, demand, message, carried)
            self._spend(demand, carried)
        treated = self._applied(demand, tensor)
        if carried is not None and carried.training and demand.lane.kind == "activation":
            self._look(key, demand, treated, carried)
        return message if treated is tensor else Message(message.kind, message.key, message.facts, {name: treated})

    def spend_on_weights(self, segment: str, private: PrivateTraining, carried: Carried) -> None:
        """Account for one use of ``carried``'s samples in the weights of ``segment``.  Raises ``BudgetSpent``."""
        if self._ledger is None or not self._knows(carried):
            return
        slots = self._datasets[carried.split].slots[carried.rows.numpy()]
        for account in self._accounts_of_weights(segment, private.release, private.clip):
            self._pay(account, slots, again=carried.again)

    def record(
        self, lane: Lane, message: Message, parts: Sequence[bytes | memoryview], carried: Carried | None
    ) -> None:
        """Write down what is about to leave: ``parts`` are its header and body.  Raises ``LedgerError``."""
        if self._journal is None:
            return
        demand = self._demands.get((lane.peer, lane.number))
        step, micro = message.key if len(message.key) == 2 else (None, None)
        self._journal.append(
            to=lane.peer,
            kind=lane.kind,
            cut=lane.name,
            step=step,
            micro_batch=micro,
            shapes=[list(tensor.shape) for tensor in message.tensors.values()],
            dtypes=[_dtype(lane, tensor) for tensor in message.tensors.values()],
            records=0 if carried is None or not message.tensors else len(carried.rows),
            privacy=self._told(lane, demand) if message.tensors else None,
            body=parts,
        )

    def note(self, alarm: SuspectedAttack) -> bool:
        """Write an alarm into the journal; False where this party keeps none.  Raises ``LedgerError``."""
        if self._journal is None:
            return False
        write_alarm(self._journal, alarm)
        return True

    # --- after a turn, after a run

    def take_leakage(self) -> dict[str, dict[str, float]]:
        """Means over what was measured since the last call, by cut: between raw inputs and what left."""
        sums, self._sums = self._sums, {}
        means = {cut: {name: sum(values) / len(values) for name, values in one.items()} for cut, one in sums.items()}
        limit = self._own.leakage.limit if self._own.leakage else None
        for cut, values in means.items():
            found = values[LIMITED]
            if limit is not None and found > limit and cut not in self._warned:
                self._warned.add(cut)
                self._warn(
                    f"what leaves over {cut} tells more about the samples than this party wants: distance correlation "
                    f"{found:.2f} (bias-corrected), limit {limit:g}; cut deeper, add noise, or use `nopeek`"
                )
        return means

    def close(self) -> None:
        """Give back what was reserved and never released, and close ledger and journal.  The door is closed already."""
        with ExitStack() as closing:
            if self._journal is not None:
                closing.callback(self._journal.close)
            if self._ledger is not None:
                closing.callback(self._ledger.close)
            if self._meter is not None:
                with suppress(below.PrivacyError):  # then it stays spent
                    self._meter.close(orderly=True)

    # --- its parts

    def _told(self, lane: Lane, demand: Demand | None) -> str | None:
        """What was done to a message's tensors, in words."""
        if lane.kind == "weights" and lane.name in self._private:
            private = self._private[lane.name]
            return f"dp_sgd: clip {private.clip:g}, gaussian {private.noise_multiplier:g}"
        return None if demand is None or demand.policy is None else str(demand)

    def _knows(self, carried: Carried | None) -> bool:
        return carried is not None and carried.split in self._datasets

    def _once(self, key: tuple[str, int], demand: Demand, message: Message, carried: Carried) -> None:
        """Raise ``EgressRefused`` if one of the samples left on this lane in this attempt at this step already, or the
        attempt is a second one where there may be none.
        """
        step, rows = (message.key[0], carried.again), carried.rows.tolist()
        place = (*key, carried.stream)  # another stream may hold the same sample: that is another release
        before, gone = self._gone.get(place, (step, set()))
        if before != step:
            gone = set()
        if carried.again and not self.may_repeat:
            raise EgressRefused(
                f"{demand.lane.kind} of {demand.lane.name} to {demand.lane.peer}: step {step[0]} again",
                expected="no decoys where there is noise, clipping or a budget",
                fix="nothing was sent; this is a fault of whoever called the guard",
            )
        if len(gone) + len(rows) != len(gone := gone.union(rows)):
            raise EgressRefused(
                f"{demand.lane.kind} of {demand.lane.name} to {demand.lane.peer}: a sample twice in step {step[0]}",
                expected="every sample at most once in an attempt at a step",
                fix="nothing was sent; this is a fault of whoever called the guard",
            )
        self._gone[place] = step, gone

    def _accounts_of(self, demand: Demand) -> dict[Account, float | None]:
        """What one release on this lane is counted in: for inputs, for labels, as far as such are accounted for."""
        if self._ledger is None:
            return {}
        lane = demand.lane
        name = {"gradient": f"{lane.name} (gradient)", "labels": f"labels: {lane.name}"}.get(lane.kind, lane.name)
        budgets = {"inputs": self._own.epsilon, "labels": self._own.label_epsilon}
        mechanism = demand.mechanism or InTheClear()
        return {
            self._ledger.account(name, what, mechanism, demand.clip): budgets[what]
            for what in sorted(demand.carries & self._accounted)
        }

    def _accounts_of_weights(self, segment: str, release: Mechanism, clip: float) -> dict[Account, float | None]:
        assert self._ledger is not None
        budgets = {"inputs": self._own.epsilon, "labels": self._own.label_epsilon}
        name = f"weights of {segment}"
        return {
            self._ledger.account(name, what, release, clip): budgets[what]
            for what in sorted(self._learnt_from.get(segment, ()))
        }

    def _spend(self, demand: Demand, carried: Carried) -> None:
        if self._meter is None or not self._knows(carried):
            return
        slots = self._datasets[carried.split].slots[carried.rows.numpy()]
        for account in self._accounts_of(demand):
            self._pay(account, slots, again=carried.again)

    def _pay(self, account: Account, slots: Any, *, again: bool) -> None:
        assert self._meter is not None
        try:
            self._meter.spend(account, slots, again=again)
        except below.BudgetSpent as error:
            raise BudgetSpent(
                f"{error}",
                expected="a budget that lasts for the run",
                fix="nothing was sent; `splitsec ledger` shows what was spent. Stop here, or train with more noise or "
                "fewer epochs on data that has budget left; a larger budget is a decision, not a repair",
            ) from error
        except below.PrivacyError as error:
            raise LedgerError(
                f"the ledger cannot be written: {error}",
                expected="budget spent, durably, before anything leaves",
                fix="nothing was sent; make room on the disk, or give this user the right to write there",
            ) from error

    def _applied(self, demand: Demand, tensor: torch.Tensor) -> torch.Tensor:
        if demand.policy is None:
            return tensor
        try:
            match demand.policy:
                case LabelPolicy(epsilon=epsilon, classes=classes):
                    return randomise_labels(tensor, classes=classes, epsilon=epsilon, source=self._source)
                case Policy(clip=float() as clip, noise="gaussian", noise_multiplier=float() as scale):
                    return gaussian(tensor, clip=clip, noise_multiplier=scale, source=self._source)
                case Policy(clip=float() as clip, noise="laplace", noise_multiplier=float() as scale):
                    return laplace(tensor, clip=clip, noise_multiplier=scale, source=self._source)
                case Policy(clip=float() as clip, noise=None):
                    return clip_rows(tensor, clip)
                case policy:  # never as it is because nothing fits
                    raise below.Unsupported(f"nothing here does what {policy!r} demands")
        except below.PrivacyError as error:
            lane = demand.lane
            raise EgressRefused(
                f"{lane.kind} of {lane.name} to {lane.peer}: {error}",
                expected=f"what can be given {demand}",
                fix="nothing was sent; look at what the segment makes, and at `privacy` of that cut",
            ) from error

    def _look(self, key: tuple[str, int], demand: Demand, sent: torch.Tensor, carried: Carried) -> None:
        if self._own.leakage is None or "inputs" not in demand.carries or len(carried.rows) < LEAST_ROWS:
            return
        self._looked[key] += 1
        if (self._looked[key] - 1) % self._own.leakage.every:
            return
        raw = [field[carried.rows].flatten(1).to(torch.float64) for field in carried.inputs.values()]
        if not raw:
            return
        try:
            values = measure(torch.cat(raw, 1), sent)
        except below.PrivacyError as error:
            if demand.lane.name not in self._warned:
                self._warned.add(demand.lane.name)
                self._warn(f"the leakage of {demand.lane.name} cannot be measured: {error}")
            return
        kept = self._sums.setdefault(demand.lane.name, defaultdict(list))
        for name, value in values.items():
            kept[name].append(value)


def _dtype(lane: Lane, tensor: torch.Tensor) -> str:
    """The dtype of ``tensor``, and how it travels where that is another thing."""
    name = str(tensor.dtype).removeprefix("torch.")
    return name if lane.codec is None else f"{name} as {lane.codec}"


def write_alarm(journal: Journal, alarm: SuspectedAttack) -> None:
    """The entry of ``alarm``.  Raises ``LedgerError``."""
    journal.alarm(detector=alarm.detector, cut=alarm.cut, peer=alarm.party, batch=alarm.batch, evidence=alarm.evidence)


LIMITED: Final = "distance_correlation_corrected"
"""The measure that a party's limit is about."""


def accounted(
    demands: Mapping[tuple[str, int], Demand],
    private: Collection[str],
    learnt_from: Mapping[str, frozenset[Protects]],
) -> frozenset[Protects]:
    """For what there is any noise at all, so that an epsilon would be expected: all that carries it is then counted,
    also what leaves in the clear, which makes the sum infinite.
    """
    noised = (demand.carries for demand in demands.values() if demand.mechanism is not None)
    return frozenset().union(*noised, *(learnt_from.get(segment, frozenset()) for segment in private))


def _refuse_copies(lane: Lane, tensor: torch.Tensor, carried: Carried) -> None:
    """Raise ``UnsafeSegment`` if ``tensor`` holds, for every sample, the very numbers of an input field."""
    rows = carried.rows
    for field in carried.inputs.values():
        if field.numel() * len(tensor) != tensor.numel() * len(field) or not len(tensor):
            continue
        raw, sent = field[rows].reshape(len(rows), -1).to(tensor.dtype), tensor.reshape(len(tensor), -1)
        if raw.any() and torch.equal(raw, sent):
            raise UnsafeSegment(
                f"the {lane.kind} of {lane.name} to {lane.peer} equals the samples themselves",
                expected="what a segment made of them; raw data stays here",
                fix="nothing was sent; look at the segment's module (an nn.Identity?), or write `raw: true` at that "
                "cut in the graph file if all parties agree that it carries samples as they are",
            )
