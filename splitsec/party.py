"""One institution's process: read files, open channels, run turns, close.

Here: the whole life of a party, top to bottom, the same in a simulation and in a pilot.  Not here: one step
(``engine``), whose turn it is (``schedule``), what may cross the line (``guard``).  Next: ``plan``, then ``engine``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from splitsec.agreement import SPLITS, Gossip, agree_on_order, in_common
from splitsec.books import open_books, open_journal
from splitsec.contract import digest
from splitsec.demands import demands_of
from splitsec.detectors import Detectors
from splitsec.engine import Engine
from splitsec.errors import BudgetSpent, LedgerError, PartyFileError, PeerMisbehaved, SuspectedAttack, UserError
from splitsec.graph import Graph
from splitsec.guard import Guard
from splitsec.identity import public_of
from splitsec.messages import Message
from splitsec.partyfile import PartyFile
from splitsec.plan import ORDER, Plan, make_plan, weights_lane
from splitsec.probe import check_private, check_shapes
from splitsec.safeguards import Carried, Safeguards, write_alarm
from splitsec.samples import Samples, epoch_order, read_own
from splitsec.schedule import (
    SPLIT,
    TRAIN,
    HandOn,
    MicroBatch,
    Turn,
    affordable_epochs,
    last_turn,
    prediction_schedule,
    run_schedule,
    step_count,
    steps_of,
)
from splitsec.segments import Segment, build_segments
from splitsec.trace import Trace
from splitsec.transports.iothread import CloseCode
from splitsec.turns import DRAWN, Secret, run_of
from splitsec.wiring import keys_of, open_thread, peers_of

__all__ = ["Job", "Party", "Report", "run_party"]

Report = Callable[[dict[str, Any]], None]
"""Takes what happens, as plain JSON values with an ``event``: ready, connected, interrupted, resumed, turn, step, turn
over, score, warning, alarm, saved, done.
"""

STEP_REPORT_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """What to run.  ``out``: folder for trained segments and predictions; ``weights``: folder of trained segments to
    load; ``trace``: file to which the outside of every message is written (docs/tracing.md); ``state``: folder of
    ledger and journal in place of the party file's; ``journal``: keep a journal also where no policy asks for one.
    """

    action: Literal["train", "predict"] = "train"
    out: Path | None = None
    weights: Path | None = None
    split: Literal["train", "test", "predict"] = "predict"
    trace: Path | None = None
    state: Path | None = None
    journal: bool = False


def run_party(
    graph: Graph,
    party_file: PartyFile,
    *,
    private_key: bytes,
    job: Job | None = None,
    report: Report = lambda event: None,
    group_key: bytes | None = None,
) -> None:
    """Run one party of ``graph`` from connecting to the last step.

    ``graph`` must give every party a key.  ``group_key``: the private key of the anonymous group that the party is a
    member of.  Raises ``SplitsecError``; the other parties are then told that this one has left.
    """
    job = job or Job()
    with ExitStack() as closing:
        trace = None
        if job.trace is not None:
            trace = closing.enter_context(_trace(job.trace, graph, party_file, job, report))
        party = Party(graph, party_file, private_key=private_key, job=job, report=report, group_key=group_key)
        reason = CloseCode.ERROR
        try:
            party.connect(trace)
            party.agree()
            party.run()
            party.gossip.say_done()  # before it writes anything: nobody's disk keeps the others waiting
            party.save()
            party.stay()
            party.sum_up()
            reason = CloseCode.NORMAL
        except KeyboardInterrupt:
            reason = CloseCode.STOPPED
            raise
        finally:
            if trace is not None:
                trace.close(reason.name.lower())  # before the goodbyes: a simulation does not wait long for them
            party.close(reason)


def _trace(file: Path, graph: Graph, party_file: PartyFile, job: Job, report: Report) -> Trace:
    def warn(text: str) -> None:
        report({"event": "warning", "text": text})

    return Trace(
        file,
        party=party_file.party,
        graph=graph.name,
        action=job.action,
        parties=(*graph.parties, *((graph.anonymous,) if graph.anonymous else ())),
        warn=warn,
    )


def open_guard(
    graph: Graph,
    plan: Plan,
    private_key: bytes,
    *,
    listen: str | None = None,
    options: Mapping[str, Mapping[str, str]] | None = None,
    together: bool = True,
    safeguards: Safeguards | None = None,
    group_key: bytes | None = None,
) -> Guard:
    """The door of ``plan.party`` with its I/O thread started: it listens, dials, and passes cells on for others.

    ``options``: this party's own for a transport, by scheme.  ``together``, ``safeguards``: as ``Guard`` takes them.
    ``group_key``: private, of the anonymous group that the party is a member of.  Raises ``GraphError`` where a party
    has no key, ``UserError`` where the address to listen at is taken.
    """
    name = plan.party
    peers = peers_of(graph, name, plan, group_key=group_key)
    thread = open_thread(graph, name, private_key, peers, listen=listen, options=options)
    keys = keys_of(graph)
    names = {keys[party]: party for party in plan.peers}
    return Guard(
        plan,
        {party: key for key, party in names.items()},
        thread,
        connect_timeout=graph.timeouts.connect,
        answer_timeout=graph.timeouts.answer,
        together=together,
        safeguards=safeguards,
        on_call=[names[peer.key] for peer in peers if peer.on_call],
        crowds=[names[peer.key] for peer in peers if peer.crowd],
    )


class Party:
    """The state of one party during a run; ``run_party`` calls its methods in order."""

    def __init__(
        self,
        graph: Graph,
        party_file: PartyFile,
        *,
        private_key: bytes,
        job: Job,
        report: Report,
        group_key: bytes | None = None,
    ) -> None:
        """Build the segments and read the samples; nothing is opened and nothing leaves."""
        self.graph = graph
        self.file = party_file
        self.name = party_file.party
        self.job = job
        self.report = report
        self.group_key = self._key_of_the_group(group_key)
        self.secret: Secret | None = None  # of a member of an anonymous group, once it is agreed on
        self._pseudonym = None if self.group_key is None else graph.groups[graph.anonymous or ""].pseudonym
        self._last: Turn | None = None
        self._in_last_step = False  # of all parties together, as far as the run has come
        self.plan = make_plan(graph, self.name)
        self.segments = build_segments(graph, party_file)
        if job.weights is not None:
            load_segments(self.segments, job.weights, self.name)
        self.own = self._read_samples()
        check_shapes(graph, party_file, self.plan, self.segments, self.own)
        demands = demands_of(graph, party_file, self.plan)
        check_private(party_file, self.plan, demands, self.segments)
        self.rows: dict[int, dict[str, torch.Tensor]] = {}
        self.counts: list[dict[str, int]] = []
        self.predictions: dict[str, list[torch.Tensor]] = {}
        self._guard: Guard | None = None
        self._private_key = private_key
        private = {name: one.private for name, one in self.segments.items() if one.private is not None}
        self.safeguards = open_books(graph, party_file, demands, self.own, private, job, report)
        self.turns = self._affordable()
        report({"event": "ready", "samples": {split: samples.count for split, samples in self.own.items()}})

    @property
    def guard(self) -> Guard:
        assert self._guard is not None, "connect first"
        return self._guard

    # --- before the first step

    def _key_of_the_group(self, given: bytes | None) -> bytes | None:
        """The private key of the anonymous group that this party is a member of; None where it is of none."""
        group = self.graph.anonymous
        if group is None:
            return None
        if self.job.action == "predict":
            raise self.graph.error(
                f"a prediction, where the group `{group}` is anonymous",
                "groups",
                group,
                expected="a graph in which no cut is `anonymous`: who is not told apart gets no answer of its own",
                fix="predict with a graph of the same segments without `anonymous`, at parties that may know it",
            )
        if self.name not in self.graph.members(group):
            return None
        if given is None:
            raise self.file.error(
                f"{self.name!r} is a member of the anonymous group `{group}`, whose private key it was not given",
                expected="the key that all members of the group hold",
                fix="add `group_key_file`, the file that `splitsec keys new --group` made for it",
            )
        if keys_of(self.graph)[group] != public_of(given):
            raise self.graph.error(
                f"the private key of the group `{group}` that {self.name!r} holds is not that of the graph",
                "groups",
                group,
                expected="one key file at all members, and its public half in the graph",
                fix="compare with `splitsec keys show` of that file",
            )
        own = self.file.privacy
        if own is not None and (own.cuts or own.labels):
            self._warn(
                f"a policy of our own in the anonymous group `{group}`: noise and clipping that differ from the other "
                "members' may tell which of them we are; write it into the graph, for all"
            )
        return given

    def _alarm(self, suspected: SuspectedAttack) -> None:
        """Write the alarm down and tell the operator; it stands also where no journal can be written."""
        try:
            if not self.safeguards.note(suspected):
                with open_journal(self.job.state or self.file.state_folder, self.graph, self.name) as journal:
                    write_alarm(journal, suspected)
        except (LedgerError, OSError) as error:
            self._warn(f"the alarm could not be written to the journal: {error}")
        self.report(
            {
                "event": "alarm",
                "detector": suspected.detector,
                "cut": suspected.cut,
                "peer": suspected.party,
                "batch": suspected.batch,
                "evidence": suspected.evidence,
                "text": suspected.seen,
            }
        )

    def _warn(self, text: str) -> None:
        self.report({"event": "warning", "text": text})

    def _affordable(self) -> dict[str, int]:
        """In how many turns the samples of each split can be used, where this party's budget limits them.

        Raises ``BudgetSpent`` where there is nothing left to begin with.
        """
        epochs = self.graph.training.epochs
        splits = {"train": True, "test": False} if self.job.action == "train" else {"predict": False}
        wanted = epochs if self.job.action == "train" else 1
        turns = {}
        for split, training in splits.items():
            labels = self.job.action == "train"
            other = {"train": "test", "test": "train"}.get(split)
            left = self.safeguards.passes_left(split, training=training, labels=labels, most=wanted, also=other)
            if left < wanted:
                turns[split] = left
            if left == 0 and (self.job.action == "predict" or self.graph.privacy.when_spent == "end"):
                self.safeguards.close()
                raise BudgetSpent(
                    f"the privacy budget of {self.name} is spent: its {split} samples cannot be used once more",
                    expected=f"budget for {wanted} more uses of each sample",
                    fix=f"`splitsec ledger {self.job.state or self.file.state_folder}` shows what was spent on what. "
                    "Stop here, or go on with more noise or with other data; a larger budget is a decision for your "
                    "data-protection officer, not a repair",
                )
        if turns:
            self.report({"event": "budget lasts", "turns": turns})
            self.report(
                {
                    "event": "warning",
                    "text": "the privacy budget lasts for "
                    + " and ".join(f"{n} of {wanted} passes over the {split} samples" for split, n in turns.items())
                    + (
                        "; then the run ends for all parties"
                        if self.graph.privacy.when_spent == "end"
                        else "; then the run goes on without them"
                    ),
                }
            )
        return turns

    def _read_samples(self) -> dict[str, Samples]:
        if self.job.action == "train":
            return read_own(self.file, self.plan, ("train", "test"), labels=True)
        own = read_own(self.file, self.plan, (self.job.split,), labels=False)
        if not own and any(stream.fields(labels=False) for stream in self.plan.streams):
            raise self.file.error(
                f"no samples to predict: `data` has no `{self.job.split}`",
                "data",
                fix=f'add `{self.job.split}: "data:{self.job.split}"`, or choose other samples with --data',
            )
        return {"predict": own[self.job.split]} if own else {}

    def _holders(self, stream: int) -> tuple[str, ...]:
        """The parties whose samples make up ``stream``, the leader first; to predict, nobody needs labels."""
        return self.graph.data_parties(stream, labels=self.job.action == "train")

    def connect(self, trace: Trace | None = None) -> None:
        """Open a channel to every peer; ``trace`` follows what passes there.

        Raises ``PeerUnreachable``, ``PeerRefusedUs``.
        """
        options = self.file.transport_options()
        self._guard = open_guard(
            self.graph,
            self.plan,
            self._private_key,
            listen=self.file.listen,
            options=options,
            safeguards=self.safeguards,
            group_key=self.group_key,
        )
        self._guard.on_opened = lambda party: self.report({"event": "opened", "peer": party})
        self._guard.on_interrupted = lambda party, why, seconds: self.report(
            {"event": "interrupted", "peer": party, "why": why, "seconds": round(seconds, 1)}
        )
        self._guard.on_resumed = lambda party: self.report({"event": "resumed", "peer": party})
        if trace is not None:
            trace.follow(self._guard)
        self._guard.open_all(self.plan.peers)
        self.report({"event": "connected"})

    def agree(self) -> None:
        """Agree on the order of samples and their number."""
        self.gossip = Gossip(self.graph, self.name, self.guard, self.plan.neighbours)
        if self.group_key is not None:
            self.counts = self._agree_inside(self.group_key)
        else:
            self.counts = self._agree_with_all()
        run = {} if self.secret is None else {"run": self.secret.run.hex()}
        self.report({"event": "agreed", "counts": self.counts, **run})
        if self.job.action == "train" and not any(counts["train"] for counts in self.counts):
            raise UserError("no party has a sample to train on", expected="at least one batch of training samples")

    def _agree_with_all(self) -> list[dict[str, int]]:
        led: dict[int, dict[str, int]] = {}
        for stream in self.plan.streams:
            holders = self._holders(stream.stream)
            if self.name not in holders:
                continue
            if any((holder, ORDER) not in self.plan.lanes_out for holder in holders[1:] if self.name == holders[0]):
                raise UserError(
                    f"{', '.join(holders)} hold samples to predict, but only agree on their order through a party that "
                    "holds labels",
                    expected="the first holder of samples in a group to hold data, not labels alone",
                )
            turns = dict(self.turns)
            self.rows[stream.stream] = agree_on_order(
                self.graph, self.name, self.guard, stream.stream, self.own, holders, turns
            )
            if self.name == holders[0]:
                led[stream.stream] = {split: len(self.rows[stream.stream].get(split, ())) for split in SPLITS}
                led[stream.stream] |= {f"{split}_turns": n for split, n in turns.items() if split != "predict"}
        agreed = self.gossip.agree_on_counts(led)
        for number, rows in self.rows.items():
            counts = {split: agreed[number][split] for split in SPLITS}
            if any(count != len(rows.get(split, ())) for split, count in counts.items()):
                raise PeerMisbehaved(
                    f"says that stream {number} has {agreed[number]}",
                    party=self._holders(number)[0],
                    expected=f"{ {split: len(order) for split, order in rows.items()} }, as we hold ourselves",
                )
            for split, allowed in self.turns.items():
                if agreed[number].get(f"{split}_turns", allowed) > allowed:
                    raise PeerMisbehaved(
                        f"says that our {split} samples may be used in more turns than our budget allows",
                        party=self._holders(number)[0],
                        expected=f"at most {allowed}",
                    )
        return agreed

    def _agree_inside(self, group_key: bytes) -> list[dict[str, int]]:
        """What an anonymous group agrees on before it speaks: as many samples for each, and whose turn it is when."""
        members = self.graph.members(self.graph.anonymous or "")
        rows = {split: torch.arange(samples.count) for split, samples in self.own.items()}
        held = {split: len(rows.get(split, ())) for split in SPLITS}
        limits = {f"{split}_turns": n for split, n in self.turns.items()}
        all_held, drawn = self.gossip.agree_inside(members.index(self.name), {**held, **limits}, os.urandom(DRAWN))
        self.secret = Secret(group_key, run_of(digest(self.graph), drawn), len(members))
        used = in_common(all_held)
        left_out = [
            f"{held[split] - used[split]} of {held[split]} {split}" for split in SPLITS if held[split] > used[split]
        ]
        if left_out:
            self._warn(
                f"{' and '.join(left_out)} samples are left out of every turn, others each time: all members of the "
                "anonymous group use as many as the one that has fewest"
            )
        self.rows = dict.fromkeys(range(self.graph.streams), rows)  # ours are those of whatever stream we work
        counts = [used] * self.graph.streams
        if self._works(0, 0):
            self.guard.call(self.guard.on_call)
            self.gossip.tell(counts, self.guard.on_call)
        return counts

    def _works(self, epoch: int, stream: int) -> bool:
        """Whether this party has a part in ``stream`` of ``epoch``."""
        if self.secret is None:
            return not self.plan.streams[stream].idle
        return self._member(epoch, stream, self.graph.anonymous or "") == self.name

    def _member(self, epoch: int, stream: int, group: str) -> str:
        """The member of ``group`` that works ``stream`` in ``epoch``."""
        return self.graph.members(group)[stream if self.secret is None else self.secret.order(epoch)[stream]]

    # --- the run

    def run(self) -> None:
        """Every turn of the run, in the order that all parties work out alike."""
        detectors = None
        if self.job.action == "train":
            detectors = Detectors(self.graph, self.plan, self.file.detectors, alarm=self._alarm, warn=self._warn)
        engine = Engine(self.plan, self.segments, self.guard, detectors)
        if self.job.action == "train":
            epochs = self._epochs()
            schedule = run_schedule(self.graph, epochs=epochs, counts=self.counts)
            self._last = last_turn(self.graph, epochs=epochs)
        else:
            schedule = prediction_schedule(self.graph)
        number = update = 0
        for place, turn in enumerate(schedule):
            if isinstance(turn, HandOn):
                self._hand_on(turn, place)
                continue
            if self.secret is not None and turn.phase == TRAIN and turn.streams == (0,) and turn.epoch:
                self._hand_the_word_on(turn.epoch)
            number, update = self._take_turn(engine, turn, number, update)

    def _hand_the_word_on(self, epoch: int) -> None:
        """Before ``epoch``, all members of the group hold the weights, but one of them may still speak."""
        group = self.graph.anonymous or ""
        giver = self._member(epoch - 1, last_turn(self.graph, epochs=epoch).streams[0], group)
        taker = self._member(epoch, 0, group)
        if giver == taker:
            return
        if self.name == giver:
            self.gossip.give_the_word(taker, epoch)
        elif self.name == taker:
            self.gossip.take_the_word(giver, epoch)

    def _epochs(self) -> int:
        wanted = self.graph.training.epochs
        epochs = affordable_epochs(self.graph, self.counts, wanted)
        if not epochs:
            raise BudgetSpent(
                "another party has no privacy budget left for any of its samples",
                expected="budget for at least one epoch",
                fix="nothing was trained; ask the others, or write `privacy: {when_spent: leave}` in the graph file",
            )
        if epochs < wanted:
            self.report({"event": "budget spent", "epochs": epochs, "of": wanted})
        return epochs

    def _take_turn(self, engine: Engine, turn: Turn, number: int, update: int) -> tuple[int, int]:
        steps = step_count(self.graph, turn, self.counts)
        if not any(self._works(turn.epoch, stream) for stream in turn.streams):
            self._in_last_step = self._in_last_step and not steps
            return number + steps, update + (steps if turn.phase == TRAIN else 0)
        orders = {stream: self._order_of(turn, stream) for stream in turn.streams if stream in self.rows}

        def rows(micro: MicroBatch, field: str) -> torch.Tensor:
            chosen = orders[micro.stream][micro.start : micro.start + micro.rows]
            return self.own[SPLIT[turn.phase]].fields[field][chosen]

        def whose(micro: MicroBatch) -> Carried | None:
            if micro.stream not in orders:
                return None
            chosen = orders[micro.stream][micro.start : micro.start + micro.rows]
            return Carried(SPLIT[turn.phase], chosen, inputs[micro.stream], turn.phase == TRAIN, micro.stream)

        inputs = {stream: self._inputs(turn, stream) for stream in orders}
        if steps:
            self.guard.call(self.guard.on_call)
            self.gossip.begin_turn(number, self.guard.on_call)
            self.gossip.hear_the_group(number)
        self.report(
            {
                "event": "turn",
                "phase": turn.phase,
                "epoch": turn.epoch,
                "streams": list(turn.streams),
                "steps": steps,
            }
        )
        self.safeguards.expect(
            SPLIT[turn.phase],
            list(orders.values())
            if len(orders) < 2
            else [
                orders[micro.stream][micro.start : micro.start + micro.rows]
                for step in steps_of(self.graph, turn, self.counts, number)
                for micro in step.micro_batches
                if micro.stream in orders
            ],
        )
        said = began = time.monotonic()
        for place, step in enumerate(steps_of(self.graph, turn, self.counts, number)):
            made = engine.run_step(step, rows, update=update, whose=whose)
            self._in_last_step = any(self._works(turn.epoch, micro.stream) for micro in step.micro_batches)
            update += turn.phase == TRAIN
            for name, outputs in made.items():
                self.predictions.setdefault(name, []).extend(outputs)
            if (now := time.monotonic()) - said >= STEP_REPORT_SECONDS or place + 1 == steps:
                said = now
                self.report({"event": "step", "phase": turn.phase, "epoch": turn.epoch, "done": place + 1, "of": steps})
        self.report(
            {"event": "turn over", "phase": turn.phase, "epoch": turn.epoch, "seconds": time.monotonic() - began}
        )
        for cut, leaked in self.safeguards.take_leakage().items():
            self.report({"event": "leakage", "epoch": turn.epoch, "cut": cut, **leaked})
        for segment in self.segments.values():
            score = segment.take_score()
            if score.rows:
                self.report(
                    {
                        "event": "score",
                        "phase": turn.phase,
                        "epoch": turn.epoch,
                        "segment": segment.name,
                        "loss": score.loss,
                        "correct": score.correct,
                        "rows": score.rows,
                        "weight": self.graph.segments[segment.name].loss_weight,
                    }
                )
        if turn != self._last and (turn.phase != TRAIN or self._pseudonym != "epoch"):
            self.guard.part(self.guard.on_call)
        return number + steps, update

    def _inputs(self, turn: Turn, stream: int) -> dict[str, torch.Tensor]:
        names = self.plan.streams[stream].fields(labels=False)
        samples = self.own.get(SPLIT[turn.phase])
        return {} if samples is None else {name: samples.fields[name] for name in sorted(names)}

    def _order_of(self, turn: Turn, stream: int) -> torch.Tensor:
        rows = self.rows[stream].get(SPLIT[turn.phase], torch.empty(0, dtype=torch.int64))
        if self.secret is not None:  # one that others could work out would show, in labels, what came before
            order = self.secret.rows(SPLIT[turn.phase], turn.epoch, stream, len(rows))
            return rows[torch.tensor(order, dtype=torch.int64)][: self.counts[stream][SPLIT[turn.phase]]]
        if turn.phase != TRAIN:
            return rows
        return rows[epoch_order(self.graph.training.seed, turn.epoch, stream, len(rows))]

    def _hand_on(self, turn: HandOn, place: int) -> None:
        for name, entry in self.graph.segments.items():
            if len(self.graph.members(entry.at)) == 1:
                continue
            giver, taker = (self._member(turn.epoch, stream, entry.at) for stream in (turn.giver, turn.taker))
            lane = weights_lane(self.graph, name)
            if self.name == giver:
                tensors, plain = self.segments[name].hand_on()
                self.guard.release((taker, lane), Message("weights", (place,), plain, tensors))
            elif self.name == taker:
                message = self.guard.take((giver, lane))
                if message.key != (place,):
                    raise PeerMisbehaved(f"handed weights of {name!r} on out of turn", party=giver)
                try:
                    self.segments[name].take_over(message.tensors, message.facts)
                except (ValueError, RuntimeError, KeyError) as error:
                    said = repr(str(error))[1:-1][:300]  # it may hold the peer's own words: no control characters
                    raise PeerMisbehaved(
                        f"handed on weights of {name!r} that do not fit: {said}",
                        party=giver,
                        expected="the same module and optimizer at every member of the group",
                    ) from error

    # --- after the last step

    def save(self) -> None:
        """Write what this party ends with to its own folder: trained segments, or predictions."""
        if self.job.out is not None:
            folder = self.job.out / self.name
            if self.job.action == "train" and self.segments:
                save_segments(self.segments, folder)
                self.report({"event": "saved", "folder": str(folder)})
            elif self.job.action == "predict":
                self._save_predictions(folder)

    def stay(self) -> None:
        """Wait until all are done; of an anonymous group, whoever has the last turn says so outside.

        Whoever takes part in the last step knows when it is over that nobody has anything left to do, and does not
        wait for ever for parties that never say so.
        """
        outside: tuple[str, ...] = ()
        if self._last is not None and self.secret and self._works(self._last.epoch, self._last.streams[0]):
            outside = self.guard.on_call
            self.guard.call(outside)
        patience = self.graph.timeouts.answer if self._in_last_step else None
        self.gossip.stay_until_all_are_done(outside, patience=patience)

    def sum_up(self) -> None:
        """Say what passed the door, and that this party is done."""
        self.report({"event": "traffic", "lanes": traffic_of(self.guard, training=self.job.action == "train")})
        self.report({"event": "done"})

    def _save_predictions(self, folder: Path) -> None:
        """Predictions where the last segment is, ids where the samples are; rows of both stand in the same order."""
        outputs = {segment: torch.cat(parts).contiguous() for segment, parts in self.predictions.items()}
        mine = [stream for stream in self.rows if self.name == self._holders(stream)[0]]
        samples = self.own.get("predict")
        if not outputs and (not mine or samples is None):
            return
        folder.mkdir(parents=True, exist_ok=True)
        if outputs:
            save_file(outputs, folder / "predictions.safetensors")
        if mine and samples is not None:
            ids = [
                sample_id
                for stream in mine
                for sample_id in (samples.ids or [str(row) for row in range(samples.count)])
            ]
            file = os.open(folder / "predicted_ids.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(file, "w", encoding="utf-8") as text:
                text.write(json.dumps(ids) + "\n")
        self.report(
            {
                "event": "saved",
                "folder": str(folder),
                "predicted": {name: len(tensor) for name, tensor in outputs.items()},
            }
        )

    def close(self, reason: int) -> None:
        """Leave: say goodbye to every peer and give the sockets back."""
        if self._guard is not None:
            self._guard.close(reason)
        self.safeguards.close()


def traffic_of(guard: Guard, *, training: bool) -> list[dict[str, Any]]:
    """What left through ``guard``, by lane, as plain values.  Without training the way back holds empty answers."""
    rows = []
    for lane, passed in guard.traffic.items():
        declared = guard.plan.lanes_out[lane]
        rows.append(
            {
                "kind": "answer" if declared.kind == "gradient" and not training else declared.kind,
                "name": declared.name,
                "peer": declared.peer,
                "messages": passed.messages,
                "bytes": passed.bytes,
            }
        )
    return rows


def save_segments(segments: Mapping[str, Segment], folder: Path) -> None:
    """Write ``folder/<segment>.safetensors`` for every segment."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, segment in segments.items():
        partial = folder / f".{name}.safetensors.partial"
        save_file(segment.weights(), partial)
        partial.replace(folder / f"{name}.safetensors")


def load_segments(segments: Mapping[str, Segment], weights: Path, party: str) -> None:
    """Load ``weights/<party>/<segment>.safetensors`` into every segment.  Raises ``PartyFileError``."""
    for name, segment in segments.items():
        file = weights / party / f"{name}.safetensors"
        if not file.is_file():
            raise PartyFileError(
                "no trained segment there",
                file=file,
                expected="a folder that `--out` of a training run wrote",
                fix="train first, or name the folder",
            )
        try:
            segment.load_weights(load_file(file))
        except Exception as error:  # safetensors raises its own class for broken files
            raise PartyFileError(
                f"does not fit segment {name!r}: {error}", file=file, expected="weights of the same module"
            ) from error
