"""What a party does to what leaves it: the graph's floors joined with its own policy, for every lane; and whose privacy
each lane costs.

Here: pure conclusions from graph, party file and plan, and the refusals that follow from them, before anything is
started.  Not here: doing it (``safeguards``).

A lane *carries* a party's own inputs or labels if they go into what leaves on it without leaving the party in between:
what comes back from others was computed from tensors that were released already.  An activation carries inputs if its
segment reads them, or a segment before it at this party does.  A gradient that is returned carries whatever the segment
it is taken at, or one after it at this party, has read: inputs, labels, or both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from splitsec.errors import BelowFloor
from splitsec.graph import EXACT, FLOATS, Graph, LabelPrivacy, Safeguard
from splitsec.partyfile import OwnCutPrivacy, OwnLabelPrivacy, PartyFile
from splitsec.plan import Edge, Lane, Plan, StreamPlan
from splitsec.privacy.policy import LabelPolicy, Policy
from splitsec.privacy.release import Mechanism
from splitsec.yamlfile import meant

__all__ = ["Demand", "Protects", "check_demands", "demands_of", "learnt_from"]

Protects = Literal["inputs", "labels"]


@dataclass(frozen=True)
class Demand:
    """What is done to one lane's tensors before they leave, and what of one's own they carry."""

    lane: Lane
    policy: Policy | LabelPolicy | None
    carries: frozenset[Protects]
    raw: bool = False
    """Whether the lane may carry samples as they are."""

    @property
    def mechanism(self) -> Mechanism | None:
        """The mechanism whose cost is accounted for; None where nothing random is done."""
        if isinstance(self.policy, Policy):
            return self.policy.mechanism(tuple(extent for extent in self.lane.shape if extent is not None))
        return None if self.policy is None else self.policy.mechanism()

    @property
    def clip(self) -> float | None:
        """The norm that one sample's tensor is clipped to."""
        return self.policy.clip if isinstance(self.policy, Policy) else None

    def __str__(self) -> str:
        return "as it is" if self.policy is None else str(self.policy)


def demands_of(graph: Graph, party_file: PartyFile, plan: Plan) -> dict[tuple[str, int], Demand]:
    """For every lane of ``plan`` that a step sends on: what is done to its tensors, and what it carries.

    Raises ``BelowFloor`` where the party's own policy would go under the graph's, ``PartyFileError`` where it speaks of
    cuts that are not this party's.
    """
    _check_named(party_file, plan)
    own = party_file.privacy
    cuts = {(one.source, one.target): (index, one) for index, one in enumerate(own.cuts if own else ())}
    labels = {one.target: (index, one) for index, one in enumerate(own.labels if own else ())}
    demands: dict[tuple[str, int], Demand] = {}
    carried = _carried(plan)
    for stream in plan.streams:
        sent = [(edge, False) for stage in stream.stages for edge in stage.outputs if not edge.local]
        sent += [(edge, True) for stage in stream.stages for edge in stage.inputs if not edge.local]
        for edge, back in sent:
            key = (edge.source_party, edge.back_lane) if back else (edge.target_party, edge.lane)
            floor = graph.cuts[edge.index].privacy
            wanted = cuts.get((edge.source, edge.target))
            policy = _joined(
                party_file,
                edge,
                None if floor is None else (floor.backward if back else floor.forward),
                wanted,
                back,
            )
            demands[key] = Demand(
                plan.lanes_out[key], policy, carried.get(key, frozenset()), back or graph.cuts[edge.index].raw
            )
        for edge in stream.gives_labels:
            key = (edge.target_party, edge.lane)
            floor_labels = graph.labels[edge.index - len(graph.cuts)].privacy
            policy_labels = _joined_labels(party_file, edge, floor_labels, labels.get(edge.target))
            demands[key] = Demand(plan.lanes_out[key], policy_labels, carried.get(key, frozenset()), raw=True)
    return demands


def check_demands(party_file: PartyFile, demands: Mapping[tuple[str, int], Demand]) -> None:
    """Raise ``PartyFileError`` where a budget is set, but something carries what it is for without noise."""
    own = party_file.privacy
    budgets: tuple[tuple[Protects, str, float | None], ...] = (
        ("inputs", "epsilon", own.epsilon if own else None),
        ("labels", "label_epsilon", own.label_epsilon if own else None),
    )
    for what, key, budget in budgets:
        for demand in demands.values():
            if budget is not None and what in demand.carries and demand.mechanism is None:
                lane = demand.lane
                raise party_file.error(
                    f"a budget for {what}, but the {lane.kind} of {lane.name} to {lane.peer} carries them without "
                    "noise",
                    "privacy",
                    key,
                    expected="a mechanism on everything that carries them, or no budget",
                    fix="let the graph's floor or this file's `privacy` add noise there"
                    + (" (`labels: [{to: ..., epsilon: ...}]` for labels)" if lane.kind == "labels" else "")
                    + f", or remove `{key}`",
                )


def learnt_from(plan: Plan) -> dict[str, frozenset[Protects]]:
    """What of this party's own goes into the gradients, and so the weights, of each of its segments."""
    found: dict[str, frozenset[Protects]] = {}
    for stream in plan.streams:
        for segment, own in _behind(stream, _reading(stream)).items():
            found[segment] = found.get(segment, frozenset()) | own
    return found


def _reading(stream: StreamPlan) -> set[str]:
    """Segments here whose output depends on this party's own inputs, not by way of another party."""
    read: set[str] = set()
    for stage in stream.stages:
        if stage.reads is not None or any(edge.local and edge.source in read for edge in stage.inputs):
            read.add(stage.segment)
    return read


def _behind(stream: StreamPlan, read: set[str]) -> dict[str, frozenset[Protects]]:
    """What of this party's own the gradient at each segment here depends on, not by way of another party."""
    behind: dict[str, frozenset[Protects]] = {}
    for stage in reversed(stream.stages):
        own: set[Protects] = {"inputs"} if stage.segment in read else set()
        if stage.labels is not None and stage.labels.local:
            own.add("labels")
        for edge in stage.outputs:
            own |= behind.get(edge.target, frozenset()) if edge.local else frozenset()
        behind[stage.segment] = frozenset(own)
    return behind


def _carried(plan: Plan) -> dict[tuple[str, int], frozenset[Protects]]:
    found: dict[tuple[str, int], set[Protects]] = {}
    for stream in plan.streams:
        read = _reading(stream)
        behind = _behind(stream, read)
        for stage in stream.stages:
            for edge in stage.outputs:
                if not edge.local and stage.segment in read:
                    found.setdefault((edge.target_party, edge.lane), set()).add("inputs")
            for edge in stage.inputs:
                if not edge.local:
                    found.setdefault((edge.source_party, edge.back_lane), set()).update(behind[stage.segment])
        for edge in stream.gives_labels:
            found.setdefault((edge.target_party, edge.lane), set()).add("labels")
    return {lane: frozenset(carried) for lane, carried in found.items()}


def _joined(
    party_file: PartyFile, edge: Edge, floor: Safeguard | None, wanted: tuple[int, OwnCutPrivacy] | None, back: bool
) -> Policy | None:
    least = None if floor is None else Policy(floor.clip, floor.noise, floor.noise_multiplier)
    own = None if wanted is None else (wanted[1].backward if back else wanted[1].forward)
    if own is None or wanted is None:
        return least
    if edge.dtype not in FLOATS:
        raise party_file.error(
            f"the cut from `{edge.source}` to `{edge.target}` carries {edge.dtype}, which can be neither clipped nor "
            "given noise",
            "privacy",
            "cuts",
            wanted[0],
            expected="a cut of floats: " + ", ".join(FLOATS),
            fix="remove it here, or let the cut carry floats in the graph",
        )
    if edge.codec == EXACT:
        raise party_file.error(
            f"the cut from `{edge.source}` to `{edge.target}` has the codec {EXACT} in the graph",
            "privacy",
            "cuts",
            wanted[0],
            expected="no noise nor clipping there: it leaves no zeros, and how many there are would tell uncounted",
            fix="remove it here, or have the graph name another codec for that cut, or none",
        )
    mine = Policy(own.clip, own.noise, own.noise_multiplier)
    complaint = None if least is None else mine.at_least(least)
    if complaint is not None:
        way = "backward" if back else "forward"
        raise _below(party_file, f"the cut {edge.source} -> {edge.target}, {way}", complaint, "cuts", wanted[0], way)
    return mine


def _joined_labels(
    party_file: PartyFile, edge: Edge, floor: LabelPrivacy | None, wanted: tuple[int, OwnLabelPrivacy] | None
) -> LabelPolicy | None:
    least = None if floor is None else LabelPolicy(floor.epsilon, floor.classes)
    if wanted is None:
        return least
    index, own = wanted
    if edge.dtype != "int64" or edge.shape:
        raise party_file.error(
            f"the labels for `{edge.target}` are {edge.dtype} {list(edge.shape)}, where randomised response needs "
            "class numbers",
            "privacy",
            "labels",
            index,
            expected="`shape: []` and `dtype: int64` in the graph, the number of a class",
            fix="remove it here, or send class numbers",
        )
    classes = own.classes if own.classes is not None else (least.classes if least is not None else None)
    if classes is None:
        raise party_file.error(
            f"`labels` to `{edge.target}` without `classes`",
            "privacy",
            "labels",
            index,
            expected="how many classes there are, where the graph does not say",
            fix="add `classes`, e.g. `classes: 10`",
        )
    mine = LabelPolicy(own.epsilon, classes)
    complaint = None if least is None else mine.at_least(least)
    if complaint is not None:
        raise _below(party_file, f"the labels for {edge.target}", complaint, "labels", index)
    return mine


def _below(party_file: PartyFile, what: str, complaint: str, *keys: str | int) -> BelowFloor:
    line = party_file.line_of("privacy", *keys)
    where = f"{party_file.file}:{line}: " if party_file.file is not None else ""
    return BelowFloor(
        f"{where}{what}: {complaint}",
        expected="a policy at least as strict as the graph's floor",
        fix="make it stricter, or remove it here: then the floor applies",
    )


def _check_named(party_file: PartyFile, plan: Plan) -> None:
    if party_file.privacy is None:
        return
    named = {
        "cuts": [f"{one.source} -> {one.target}" for one in party_file.privacy.cuts],
        "labels": [one.target for one in party_file.privacy.labels],
    }
    for key, names in named.items():
        for index, name in enumerate(names):
            if name in names[:index]:
                raise party_file.error(
                    f"`{name}` is there twice",
                    "privacy",
                    key,
                    index,
                    expected="each once" + (", with `forward` and `backward` side by side" if key == "cuts" else ""),
                    fix="put the two together",
                )
    stages = [stage for stream in plan.streams for stage in stream.stages]
    sends = {
        "forward": {(e.source, e.target) for stage in stages for e in stage.outputs if not e.local},
        "backward": {(e.source, e.target) for stage in stages for e in stage.inputs if not e.local},
    }
    cuts = sends["forward"] | sends["backward"]
    labels = {edge.target for stream in plan.streams for edge in stream.gives_labels}
    for index, cut in enumerate(party_file.privacy.cuts):
        if (cut.source, cut.target) not in cuts:
            names = [f"{source} -> {target}" for source, target in sorted(cuts)]
            raise party_file.error(
                f"`{cut.source} -> {cut.target}` is no cut that leaves or reaches this party",
                "privacy",
                "cuts",
                index,
                expected="one of " + ", ".join(names) if names else "no `cuts`: this party has none",
                fix=meant(f"{cut.source} -> {cut.target}", names) or "remove it",
            )
        for way, done in (("forward", cut.forward), ("backward", cut.backward)):
            if done is not None and (cut.source, cut.target) not in sends[way]:
                other = "forward" if way == "backward" else "backward"
                raise party_file.error(
                    f"`{way}` at `{cut.source} -> {cut.target}`, over which this party sends nothing {way}",
                    "privacy",
                    "cuts",
                    index,
                    way,
                    expected=f"`{other}` here: what this party itself sends",
                    fix="remove it; the party at the other end decides what it sends, and the graph sets the floor",
                )
    for index, one in enumerate(party_file.privacy.labels):
        if one.target not in labels:
            raise party_file.error(
                f"no labels leave this party for `{one.target}`",
                "privacy",
                "labels",
                index,
                expected="one of " + ", ".join(sorted(labels)) if labels else "no `labels`: none leave this party",
                fix=meant(one.target, labels) or "remove it",
            )
