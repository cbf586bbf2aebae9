"""A party's books, opened before any connection: ledger and journal in its state folder, and the safeguards that
write in them.

Here: whether a party needs which, and how mistakes there are told.  Not here: what stands in them (``splitsec.privacy.
ledger``, ``journal``), when they are written (``safeguards``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from splitsec import __version__
from splitsec.contract import digest
from splitsec.demands import Demand, learnt_from
from splitsec.errors import LedgerError
from splitsec.graph import Graph
from splitsec.journal import Journal
from splitsec.partyfile import OwnPrivacy, PartyFile
from splitsec.plan import make_plan
from splitsec.privacy import errors as below
from splitsec.privacy.dpsgd import PrivateTraining
from splitsec.privacy.ledger import Dataset, KnownBy, Ledger
from splitsec.safeguards import Safeguards, accounted
from splitsec.samples import Samples, sample_keys

__all__ = ["JOURNAL_FILE", "LEDGER_FILE", "open_books", "open_journal"]

LEDGER_FILE = "ledger.sqlite"
JOURNAL_FILE = "journal.jsonl"


class Wanted(Protocol):
    """What a job says about books."""

    @property
    def state(self) -> Path | None: ...
    @property
    def journal(self) -> bool: ...
    @property
    def split(self) -> str: ...


def open_books(
    graph: Graph,
    party_file: PartyFile,
    demands: Mapping[tuple[str, int], Demand],
    own: Mapping[str, Samples],
    private: Mapping[str, PrivateTraining],
    wanted: Wanted,
    report: Callable[[dict[str, Any]], None],
) -> Safeguards:
    """The safeguards of a party, with its ledger where anything is accounted for, and its journal where one is kept.

    A journal is kept where the job asks for one (``splitsec join`` does) and where any policy applies.  Raises
    ``LedgerError``.
    """
    policy = party_file.privacy
    plan = make_plan(graph, party_file.party)
    learns = learnt_from(plan)
    counted = accounted(demands, private, learns)
    for demand in demands.values():
        if demand.mechanism is None and demand.carries & counted:
            what = " and ".join(sorted(demand.carries & counted))
            text = (
                f"the {demand.lane.kind} of {demand.lane.name} to {demand.lane.peer} carries {what} without noise, "
                "while other noise is accounted for: together no finite epsilon holds, and the ledger will say so"
            )
            report({"event": "warning", "text": text})
    for lane in plan.lanes_out.values():
        if lane.kind == "weights" and learns.get(lane.name, frozenset()) & counted and lane.name not in private:
            text = (
                f"the weights of {lane.name} are handed on to {lane.peer} without noise: no epsilon in the ledger "
                "covers what they tell about the samples that trained them (docs/dp-sgd.md)"
            )
            report({"event": "warning", "text": text})
    folder = wanted.state or party_file.state_folder
    # A ledger that is there counts what leaves in the clear, too: it is about all that left, in all runs.
    counting = bool(counted) or wanted.journal or (folder / LEDGER_FILE).exists()
    kept = counting or policy is not None or any(one.policy for one in demands.values())
    ledger, journal, datasets = None, None, {}
    try:
        if kept:
            journal = open_journal(folder, graph, party_file.party)
        if counting:
            ledger = Ledger(folder / LEDGER_FILE, party=party_file.party)
            limits = policy or OwnPrivacy()
            ledger.set_policy(delta=limits.delta, budget=limits.epsilon, label_budget=limits.label_epsilon)
            if (limits.epsilon or limits.label_epsilon) and any(one.ids is None and one.count for one in own.values()):
                text = (
                    "a budget, and samples without ids: they are known by their content, and whatever changes it "
                    "(scaling, another dtype) makes them samples that were never seen; return an `id` that stays with "
                    "the person"
                )
                report({"event": "warning", "text": text})
            inputs = frozenset[str]().union(*(stream.fields(labels=False) for stream in plan.streams))
            datasets = {split: _registered(ledger, split, wanted, samples, inputs) for split, samples in own.items()}
    except (below.PrivacyError, OSError) as error:
        if journal is not None:
            journal.close()
        if ledger is not None:
            ledger.close()
        raise LedgerError(
            f"{folder}: {error.strerror if isinstance(error, OSError) and error.strerror else error}",
            expected="a folder for this party's ledger and journal, which one running party uses at a time",
            fix="look whether this party runs twice, whether its disk is full, and who may write there",
        ) from error
    return Safeguards(
        demands,
        own=policy,
        private=private,
        learnt_from=learns,
        ledger=ledger,
        datasets=datasets,
        journal=journal,
        warn=lambda text: report({"event": "warning", "text": text}),
    )


def open_journal(folder: Path, graph: Graph, party: str) -> Journal:
    """The journal of ``party`` in its state folder, which is made where there is none.  Raises ``LedgerError``."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Journal(folder / JOURNAL_FILE, party=party, graph_digest=digest(graph).hex(), version=__version__)


def _registered(ledger: Ledger, split: str, wanted: Wanted, samples: Samples, inputs: frozenset[str]) -> Dataset:
    """The data set under a name that its own samples give it: the split, and eight digits of their keyed digest."""
    keys = sample_keys(samples, inputs)
    mark = ledger.mark(keys)
    known_by: KnownBy = "content" if samples.ids is None else "id"
    return ledger.dataset(f"{wanted.split if split == 'predict' else split}-{mark}", keys, known_by=known_by)
