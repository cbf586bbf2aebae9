"""What parties agree on before the first step and after the last: the order of samples, their number, and that all
are done.

Here: three short conversations through the guard.  Not here: fingerprints and rows (``samples``), steps (``engine``).

Order: for each stream the first party that holds samples (the leader) sends keyed fingerprints of its ids to every
other holder, end to end; the answer says whether they fit.  Numbers: the leader says how many samples each split has,
and every party passes that on to its neighbours, so that all can work out the same schedule.  The last word: every
party says that it is done, and stays (it may be forwarding) until it has heard so from all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

from splitsec.errors import PeerLost, PeerMisbehaved, SamplesError
from splitsec.graph import Graph
from splitsec.guard import Guard
from splitsec.messages import Message
from splitsec.plan import CONTROL, ORDER
from splitsec.samples import FINGERPRINT, Mismatch, Samples, fingerprints, match

__all__ = ["agree_on_counts", "agree_on_order", "stay_until_all_are_done"]

SPLITS = ("train", "test", "predict")
Owned = Mapping[str, Samples]
"""A party's own samples by split."""


def agree_on_order(graph: Graph, party: str, guard: Guard, stream: int, owned: Owned) -> dict[str, torch.Tensor]:
    """For each split, this party's row for each sample of ``stream`` in the leader's order: int64 ``[n]``.

    Raises ``SamplesError`` at both ends if one holder has ids that the other has not.
    """
    holders = graph.data_parties(stream)
    if len(holders) == 1:
        return {split: torch.arange(samples.count) for split, samples in owned.items()}
    if party == holders[0]:
        return _lead(guard, stream, holders[1:], owned)
    return _follow(graph, party, guard, stream, holders[0], owned)


def _lead(guard: Guard, stream: int, others: tuple[str, ...], owned: Owned) -> dict[str, torch.Tensor]:
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
                case {"split": said, "missing": list() as missing, "extra": int() as extra} if said == split:
                    pass
                case _:
                    raise PeerMisbehaved("gave no answer about the order of samples", party=other)
            rows = [row for row in missing if type(row) is int and 0 <= row < samples.count]
            if rows or extra:
                trouble.append(_both_ways(other, split, [_ids(samples, split)[row] for row in rows], extra))
    if trouble:
        raise SamplesError(
            "; ".join(trouble),
            expected="the same sample ids, each once, at every party",
            fix="nothing was trained; " + _FIX,
        )
    return {split: torch.arange(samples.count) for split, samples in owned.items()}


def _follow(graph: Graph, party: str, guard: Guard, stream: int, leader: str, owned: Owned) -> dict[str, torch.Tensor]:
    # A party outside the groups serves every member, so it may well hold samples that this member has not.
    serves_several = graph.streams > 1 and not any(party in group.members for group in graph.groups.values())
    order: dict[str, torch.Tensor] = {}
    trouble = []
    while True:
        offer = guard.take((leader, ORDER))
        split = offer.facts.get("split")
        if offer.facts.get("stream") != stream or not isinstance(split, str):
            raise PeerMisbehaved("spoke of the order of another stream", party=leader)
        if not split:
            break
        key, prints = offer.facts.get("key"), offer.tensors.get("prints")
        if not isinstance(key, bytes) or prints is None or prints.dtype != torch.uint8 or prints.numel() % FINGERPRINT:
            raise PeerMisbehaved("sent no fingerprints of sample ids", party=leader)
        raw = prints.numpy().tobytes()
        theirs = [raw[i : i + FINGERPRINT] for i in range(0, len(raw), FINGERPRINT)]
        own = owned.get(split, Samples({}, (), 0))
        ids = _ids(own, split)
        matched = match(ids, key, theirs, extra_allowed=serves_several)
        missing, extra = ([], ()) if isinstance(matched, list) else (list(matched.missing), matched.extra)
        guard.release(
            (leader, ORDER), Message("order", facts={"split": split, "missing": missing, "extra": len(extra)})
        )
        if isinstance(matched, Mismatch):
            trouble.append(_both_ways(leader, split, [ids[row] for row in matched.extra], len(matched.missing)))
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


def _both_ways(other: str, split: str, only_here: list[str], only_there: int) -> str:
    parts = []
    if only_here:
        shown = ", ".join(only_here[:5]) + (", ..." if len(only_here) > 5 else "")
        parts.append(f"{len(only_here)} of our ids are missing at {other} ({shown})")
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


def agree_on_counts(
    graph: Graph, party: str, guard: Guard, neighbours: tuple[str, ...], own: Mapping[int, Mapping[str, int]]
) -> list[dict[str, int]]:
    """How many samples every stream has in each split.  ``own``: what this party, as their leader, knows already."""
    known: dict[int, dict[str, int]] = {}

    def learn(stream: int, counts: Mapping[str, int], said_by: str) -> None:
        if stream in known:
            if known[stream] != counts:
                raise PeerMisbehaved(
                    f"says that stream {stream} has {counts}, others say {known[stream]}", party=said_by
                )
            return
        known[stream] = dict(counts)
        for neighbour in neighbours:
            if neighbour != said_by:
                guard.release(
                    (neighbour, CONTROL), Message("control", facts={"say": "counts", "stream": stream, **counts})
                )

    for stream, counts in own.items():
        learn(stream, counts, party)

    def hear(facts: Mapping[str, Any], said_by: str) -> None:
        stream, counts = facts.get("stream"), {split: facts.get(split) for split in SPLITS}
        if facts.get("say") != "counts" or type(stream) is not int or not 0 <= stream < graph.streams:
            raise PeerMisbehaved("said something other than the number of samples", party=said_by)
        numbers = {split: count for split, count in counts.items() if type(count) is int and 0 <= count < 2**40}
        if len(numbers) != len(SPLITS):
            raise PeerMisbehaved("gave no usable number of samples", party=said_by)
        learn(stream, numbers, said_by)

    _listen(guard, neighbours, hear, lambda: len(known) == graph.streams)
    return [known[stream] for stream in range(graph.streams)]


def stay_until_all_are_done(graph: Graph, party: str, guard: Guard, neighbours: tuple[str, ...]) -> None:
    """Say that this party is done, pass on who else is, and return when every party has said so."""
    done: set[str] = set()
    everyone = _taking_part(graph)

    def learn(name: str, said_by: str) -> None:
        if name in done:
            return
        done.add(name)
        for neighbour in neighbours:
            if neighbour != said_by:
                with suppress(
                    PeerLost
                ):  # it left, so it knew already that everybody is done; or else the next wait says why
                    guard.release((neighbour, CONTROL), Message("control", facts={"say": "done", "party": name}))

    def hear(facts: Mapping[str, Any], said_by: str) -> None:
        name = facts.get("party")
        if facts.get("say") != "done" or name not in everyone:
            raise PeerMisbehaved("said something other than who is done", party=said_by)
        learn(str(name), said_by)

    learn(party, party)
    _listen(guard, neighbours, hear, lambda: done >= everyone)


def _listen(
    guard: Guard,
    neighbours: tuple[str, ...],
    hear: Callable[[Mapping[str, Any], str], None],
    enough: Callable[[], bool],
) -> None:
    while not enough():
        heard = False
        for neighbour in neighbours:
            if not enough() and guard.peek((neighbour, CONTROL)) is not None:
                hear(guard.take((neighbour, CONTROL)).facts, neighbour)
                heard = True
        if not heard and not enough():
            guard.wait(on=neighbours)


def _taking_part(graph: Graph) -> set[str]:
    """Parties that run: they hold segments, data or labels, or link two that do."""
    return {end for link in graph.links() for end in link} or set(graph.parties)
