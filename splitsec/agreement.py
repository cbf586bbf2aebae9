"""What parties agree on before the first step and after the last: the order of samples, their number, and that all
are done.

Here: three short conversations through the guard.  Not here: fingerprints and rows (``samples``), steps (``engine``).

Order: for each stream the first party that holds samples (the leader) sends keyed fingerprints of its ids to every
other holder, end to end; the answer says whether they fit.  Numbers: the leader says how many samples each split has,
and every party passes that on to its neighbours, so that all can work out the same schedule.  The last word: every
party says that it is done, and stays until it has heard so from all.

An anonymous group does the same among its members first: each says what it holds, and all use what all have.  One of
them then says the numbers outside, one says the last word, and what parties outside say comes to the others by way of
that one.  Where the word goes from one to another and no weights go with it, the one tells the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from splitsec.errors import PeerLost, PeerMisbehaved, SamplesError
from splitsec.graph import Graph
from splitsec.guard import Guard
from splitsec.messages import Message
from splitsec.plan import CONTROL, ORDER, taking_part
from splitsec.samples import FINGERPRINT, Mismatch, Samples, fingerprints, match
from splitsec.turns import DRAWN

__all__ = ["SPLITS", "Gossip", "agree_on_order", "in_common"]

SPLITS = ("train", "test", "predict")
TURNS = ("train_turns", "test_turns")
"""In how many turns the samples can be used, where a privacy budget limits them."""
SHOWN = 5
"""Ids that an error names."""
Owned = Mapping[str, Samples]
"""A party's own samples by split."""


def agree_on_order(
    graph: Graph,
    party: str,
    guard: Guard,
    stream: int,
    owned: Owned,
    holders: tuple[str, ...],
    turns: dict[str, int],
) -> dict[str, torch.Tensor]:
    """For each split, this party's row for each sample of ``stream`` in the leader's order: int64 ``[n]``.

    ``holders``: the parties that hold samples of the stream, the leader first.  ``turns``: in how many turns this
    party's budget allows its samples of a split to be used, where it limits them; at the leader it becomes the least
    that any holder says.  Raises ``SamplesError`` at both ends if one holder has ids that the other has not.
    """
    if len(holders) == 1:
        return {split: torch.arange(samples.count) for split, samples in owned.items()}
    if party == holders[0]:
        return _lead(guard, stream, holders[1:], owned, turns)
    return _follow(graph, party, guard, stream, holders[0], owned, turns)


def _lead(
    guard: Guard, stream: int, others: tuple[str, ...], owned: Owned, turns: dict[str, int]
) -> dict[str, torch.Tensor]:
    for other in others:
        key = os.urandom(32)
        for split, samples in owned.items():
            prints = fingerprints(_ids(samples, split), key)
            body = (
                torch.frombuffer(bytearray(b"".join(prints)), dtype=torch.uint8)
                if prints
                else torch.empty(0, dtype=torch.uint8)
            )
            facts = {"stream": stream, "split": split, "key": key}
            guard.release((other, ORDER), Message("order", facts=facts, tensors={"prints": body}))
        guard.release((other, ORDER), Message("order", facts={"stream": stream, "split": ""}))
    trouble = []
    for other in others:
        for split, samples in owned.items():
            answer = guard.take((other, ORDER))
            match dict(answer.facts):
                case {
                    "split": said,
                    "missing": int() as lacking,
                    "first": list() as first,
                    "extra": int() as extra,
                    **limits,
                } if said == split:
                    if type(allowed := limits.get("turns")) is int and 0 <= allowed < 2**31:
                        turns[split] = min(allowed, turns.get(split, allowed))
                case _:
                    raise PeerMisbehaved("gave no answer about the order of samples", party=other)
            rows = [row for row in first[:SHOWN] if type(row) is int and 0 <= row < samples.count]
            if lacking or extra:
                named = [_ids(samples, split)[row] for row in rows]
                trouble.append(_both_ways(other, split, lacking, named, extra))
    if trouble:
        raise SamplesError(
            "; ".join(trouble),
            expected="the same sample ids, each once, at every party",
            fix="nothing was trained; " + _FIX,
        )
    return {split: torch.arange(samples.count) for split, samples in owned.items()}


def _follow(
    graph: Graph,
    party: str,
    guard: Guard,
    stream: int,
    leader: str,
    owned: Owned,
    turns: Mapping[str, int],
) -> dict[str, torch.Tensor]:
    # A party outside the groups serves every member, so it may well hold samples that this member has not.
    serves_several = graph.streams > 1 and not any(party in group.members for group in graph.groups.values())
    order: dict[str, torch.Tensor] = {}
    seen: set[str] = set()
    trouble = []
    while True:
        offer = guard.take((leader, ORDER))
        split = offer.facts.get("split")
        if offer.facts.get("stream") != stream or not isinstance(split, str):
            raise PeerMisbehaved("spoke of the order of another stream", party=leader)
        if not split:
            break
        if split not in SPLITS or split in seen:
            raise PeerMisbehaved("spoke of a split that there is not, or twice of one", party=leader)
        seen.add(split)
        key, prints = offer.facts.get("key"), offer.tensors.get("prints")
        if not isinstance(key, bytes) or prints is None or not _is_bytes(prints):
            raise PeerMisbehaved("sent no fingerprints of sample ids", party=leader)
        raw = prints.numpy().tobytes()
        theirs = [raw[i : i + FINGERPRINT] for i in range(0, len(raw), FINGERPRINT)]
        if len(set(theirs)) != len(theirs):
            raise PeerMisbehaved("named a sample twice", party=leader, expected="every sample once in an order")
        own = owned.get(split, Samples({}, (), 0))
        ids = _ids(own, split)
        matched = match(ids, key, theirs, extra_allowed=serves_several)
        missing, extra = ([], ()) if isinstance(matched, list) else (list(matched.missing), matched.extra)
        answer = {"split": split, "missing": len(missing), "first": missing[:SHOWN], "extra": len(extra)}
        if split in turns:
            answer["turns"] = turns[split]
        guard.release((leader, ORDER), Message("order", facts=answer))
        if isinstance(matched, Mismatch):
            named = [ids[row] for row in matched.extra[:SHOWN]]
            trouble.append(_both_ways(leader, split, len(matched.extra), named, len(matched.missing)))
        else:
            order[split] = torch.tensor(matched, dtype=torch.int64)
    if trouble:
        raise SamplesError(
            "; ".join(trouble),
            expected="the same sample ids, each once, at every party",
            fix="nothing was trained; " + _FIX,
        )
    return order


_FIX = "make the data functions return the samples that all parties have"


def _is_bytes(prints: torch.Tensor) -> bool:
    """Whole fingerprints, as many bytes as travelled: a tensor that only repeats some would unfold to more."""
    return (
        prints.dtype == torch.uint8
        and prints.dim() == 1
        and prints.is_contiguous()
        and not prints.numel() % FINGERPRINT
    )


def _both_ways(other: str, split: str, only_here: int, named: list[str], only_there: int) -> str:
    parts = []
    if only_here:
        shown = ", ".join(named) + (", ..." if only_here > len(named) else "")
        parts.append(f"{only_here} of our ids are missing at {other} ({shown})")
    if only_there:
        parts.append(f"{only_there} ids of {other} are missing here")
    return f"{split} samples do not match: " + " and ".join(parts)


def _ids(samples: Samples, split: str) -> tuple[str, ...]:
    if samples.ids is None:
        raise SamplesError(
            f"the {split} samples have no ids, but several parties hold parts of them",
            expected="an 'id' field beside the others, by which parties agree on the order",
            fix="return 'id': one text or whole number for each sample",
        )
    return samples.ids


def in_common(holdings: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """What each member of an anonymous group uses, that none may be known by its number: the least of all."""
    least = {split: min(one[split] for one in holdings) for split in SPLITS}
    for turns, split in zip(TURNS, SPLITS, strict=False):
        limits = [one[turns] for one in holdings if turns in one]
        if limits and least[split]:
            least[turns] = min(limits)
    return least


class Gossip:
    """What every party says to its neighbours, who pass it on: how many samples there are, and who is done.

    Members of an anonymous group and the parties outside it are neighbours only once a member has said the last word
    of all members there, in the group's name: so nothing that names a member leaves the group, and what is said to the
    group reaches who speaks for it.
    """

    def __init__(self, graph: Graph, party: str, guard: Guard, neighbours: tuple[str, ...]) -> None:
        """``neighbours``: with whom there is a control lane."""
        group = graph.anonymous
        members = frozenset() if group is None else frozenset(graph.members(group))
        self._guard = guard
        self._party = party
        self._heard = neighbours
        self._group = group
        self._inside = members if party in members else frozenset()
        self._crowd = group if group in neighbours else None
        self._neighbours = {one for one in neighbours if one != group and (one in members or not self._inside)}
        self._streams = graph.streams
        self._everyone = set(taking_part(graph))
        if group is not None and not self._inside:
            self._everyone = self._everyone - members | {group}
        self._counts: dict[int, dict[str, Any]] = {}
        self._begun = -1
        self._given: set[tuple[str, int]] = set()
        self._done: set[str] = set()

    def agree_on_counts(self, own: Mapping[int, Mapping[str, Any]]) -> list[dict[str, int]]:
        """How many samples each stream has in each split.  ``own``: what this party, as their leader, knows already."""
        for stream, counts in own.items():
            self._learn_counts(stream, dict(counts), self._party)
        self._listen(lambda: len(self._counts) == self._streams)
        return [self._counts[stream] for stream in range(self._streams)]

    def agree_inside(
        self, member: int, own: Mapping[str, int], drawn: bytes
    ) -> tuple[list[dict[str, int]], list[bytes]]:
        """What each member of our anonymous group holds, and what it drew at random.  ``own``, ``drawn``: ours, as
        member number ``member``.
        """
        told: list[dict[str, Any]] = [*map(dict, self.agree_on_counts({member: {**own, "drawn": drawn}}))]
        all_drawn = [one.pop("drawn") for one in told]
        return told, all_drawn

    def tell(self, counts: Sequence[Mapping[str, int]], outside: Iterable[str]) -> None:
        """Say to each of ``outside`` how many samples the streams of our anonymous group have."""
        for party in sorted(outside):
            for stream, numbers in enumerate(counts):
                self._say(party, {"say": "counts", "stream": stream, **numbers})

    def begin_turn(self, step: int, outside: Iterable[str]) -> None:
        """Tell each of ``outside`` that a turn of our anonymous group begins, with ``step``: what they answer comes to
        whoever spoke last.
        """
        for party in sorted(outside):
            self._say(party, {"say": "turn", "step": step})

    def hear_the_group(self, step: int) -> None:
        """Wait until the anonymous group, if we talk to one, begins the turn whose first step is ``step``."""
        if self._crowd is not None:
            self._listen(lambda: self._begun >= step)
            if self._begun != step:
                raise PeerMisbehaved(
                    f"began a turn with step {self._begun}", party=self._crowd, expected=f"step {step}"
                )

    def give_the_word(self, member: str, epoch: int) -> None:
        """Tell ``member`` of our anonymous group, who speaks first in ``epoch``, that the epoch before is over."""
        self._say(member, {"say": "your turn", "epoch": epoch})

    def take_the_word(self, member: str, epoch: int) -> None:
        """Wait until ``member`` has said so to us."""
        self._listen(lambda: (member, epoch) in self._given)

    def say_done(self) -> None:
        """Say that this party has made its last step."""
        self._learn_done(self._party, self._party)

    def stay_until_all_are_done(self, outside: Collection[str] = (), *, patience: float | None = None) -> None:
        """Return when every party has said that it is done, as this one has.

        ``outside``: the parties to whom this one says the last word of its anonymous group.  ``patience``: seconds for
        which the others may still be at it, where nothing is left for them to do; raises ``PeerLost`` after it.
        """
        until = None if patience is None else time.monotonic() + patience
        if outside:
            self._listen(lambda: self._done >= self._inside)
            for party in sorted(outside):
                self._say(party, {"say": "done", "party": self._group})
            self._neighbours.update(outside)
        self._listen(lambda: self._done >= self._everyone, until)

    def _listen(self, enough: Callable[[], bool], until: float | None = None) -> None:
        while not enough():
            waiting = [n for n in self._heard if self._guard.peek((n, CONTROL)) is not None]
            for neighbour in waiting:
                self._hear(self._guard.take((neighbour, CONTROL)).facts, neighbour)
            if waiting:
                continue
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                missing = sorted(self._everyone - self._done)
                raise PeerLost(
                    f"is connected, but has not said that it is done ({', '.join(missing)}), though no step is left",
                    party=next((one for one in missing if one in self._heard), missing[0]),
                    expected="every party's last word once the last step is over",
                    fix="what was trained here is kept; look at that party's log",
                )
            self._guard.wait(on=self._needed(), timeout=left)

    def _needed(self) -> tuple[str, ...]:
        """Without whom there is no going on: once only the group's own last word is missing, whoever else knows it
        has nothing to wait for, and may leave before it comes to us.
        """
        return (self._crowd,) if self._crowd and self._everyone - self._done == {self._crowd} else self._heard

    def _hear(self, facts: Mapping[str, Any], said_by: str) -> None:
        from_outside = bool(self._inside) and said_by not in self._inside
        match dict(facts):
            case {"say": "counts", "stream": int() as stream, **counts} if (
                type(stream) is int and 0 <= stream < self._streams and not from_outside
            ):
                drawn = counts.pop("drawn", None)
                numbers = {
                    name: n
                    for name, n in counts.items()
                    if name in (*SPLITS, *TURNS) and type(n) is int and 0 <= n < 2**31
                }
                if len(numbers) == len(counts) and numbers.keys() >= set(SPLITS):
                    if not self._inside and drawn is None:
                        return self._learn_counts(stream, numbers, said_by)
                    if self._inside and isinstance(drawn, bytes) and len(drawn) == DRAWN:
                        return self._learn_counts(stream, {**numbers, "drawn": drawn}, said_by)
            case {"say": "turn", "step": int() as step} if said_by == self._crowd:
                self._begun = step
                return None
            case {"say": "your turn", "epoch": int() as epoch} if said_by in self._inside:
                return self._given.add((said_by, epoch))
            case {"say": "done", "party": str() as name} if name in self._everyone and not (
                from_outside and name in self._inside
            ):
                if name == self._crowd:
                    if said_by != self._crowd:
                        return None  # it says so to us, too: then there is somebody to answer
                    for one in sorted(self._done - {name}):
                        self._say(name, {"say": "done", "party": one})
                    self._neighbours.add(name)
                return self._learn_done(name, said_by)
        raise PeerMisbehaved(
            "said something unknown on the control lane", party=said_by, expected="numbers of samples, or who is done"
        )

    def _learn_counts(self, stream: int, counts: dict[str, Any], said_by: str) -> None:
        if stream not in self._counts:
            self._counts[stream] = counts
            self._pass_on({"say": "counts", "stream": stream, **counts}, said_by)
        elif self._counts[stream] != counts:
            raise PeerMisbehaved(
                f"says that stream {stream} has {counts}",
                party=said_by,
                expected=f"{self._counts[stream]}, as others say",
            )

    def _learn_done(self, name: str, said_by: str) -> None:
        if name not in self._done:
            self._done.add(name)
            # A neighbour that has left knew already that everybody is done; if not, the next wait says what happened.
            self._pass_on({"say": "done", "party": name}, said_by, left=(PeerLost,))

    def _pass_on(self, facts: Mapping[str, Any], said_by: str, left: tuple[type[PeerLost], ...] = ()) -> None:
        for neighbour in sorted(self._neighbours):
            if neighbour != said_by:
                with suppress(*left):
                    self._say(neighbour, facts)

    def _say(self, party: str, facts: Mapping[str, Any]) -> None:
        self._guard.release((party, CONTROL), Message("control", facts=facts))
