"""A folder's training in this process: the real segments, stages and orders of all its parties, and no network.

Here: ``train``, which a test hands the strategies of those parties that attack.  What crosses a cut goes straight from
one segment to the next, so that a test takes seconds; what a channel adds is tested elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from splitsec.attacks.strategy import Scene, Strategy
from splitsec.partyfile import Folder, load_folder
from splitsec.plan import Edge, Plan, Stage, make_plan
from splitsec.samples import Samples, epoch_order, read_own
from splitsec.schedule import EVALUATE, TRAIN, HandOn, Turn, run_schedule, steps_of
from splitsec.segments import Score, Segment, build_segments

torch.set_num_threads(1)

Change = Callable[[Edge, torch.Tensor], torch.Tensor]


@dataclass
class World:
    """All parties of a folder, what they hold, and what became of them."""

    folder: Folder
    plans: dict[str, Plan]
    segments: dict[str, dict[str, Segment]]
    own: dict[str, dict[str, Samples]]
    order: dict[str, dict[int, dict[str, torch.Tensor]]]
    """By party, stream and split: the party's rows in the order that all agree on."""
    scores: list[tuple[str, int, str, Score]] = field(default_factory=list)
    """Phase, epoch, segment, score."""

    def field_of(self, name: str, place: tuple[int, int, int], rows: int, split: str = "train") -> torch.Tensor:
        """The truth: ``rows`` values of the field ``name`` from ``place`` (epoch, stream, position) on."""
        epoch, stream, position = place
        for party, own in self.own.items():
            if stream in self.order[party] and name in own[split].fields:
                order = self.order[party][stream][split]
                order = order[epoch_order(self.folder.graph.training.seed, epoch, stream, len(order))]
                return own[split].fields[name][order[position : position + rows]]
        raise KeyError(name)

    def accuracy(self, epoch: int = -1) -> float:
        """Share of the test samples that the last evaluation, of all streams, got right."""
        last = max(at for phase, at, _, _ in self.scores if phase == EVALUATE) if epoch < 0 else epoch
        right = [score for phase, at, _, score in self.scores if phase == EVALUATE and at == last]
        return sum(score.correct or 0 for score in right) / sum(score.rows for score in right)


def open_world(path: str | Path, **training: Any) -> World:
    """The parties of the folder at ``path``; ``training`` replaces the graph's."""
    folder = load_folder(path)
    graph = folder.graph.model_copy(update={"training": folder.graph.training.model_copy(update=training)})
    folder = Folder(folder.path, graph, folder.parties)
    plans = {name: make_plan(graph, name) for name in folder.parties}
    segments = {name: build_segments(graph, file) for name, file in folder.parties.items()}
    own = {name: read_own(file, plans[name], ("train", "test"), labels=True) for name, file in folder.parties.items()}
    order: dict[str, dict[int, dict[str, torch.Tensor]]] = {name: {} for name in folder.parties}
    for stream in range(graph.streams):
        leader, *others = graph.data_parties(stream, labels=True)
        for split in ("train", "test"):
            rows = torch.arange(own[leader][split].count)
            order[leader].setdefault(stream, {})[split] = rows
            for other in others:
                places = {one: row for row, one in enumerate(own[other][split].ids or ())}
                there = [places[one] for one in own[leader][split].ids or ()]
                order[other].setdefault(stream, {})[split] = torch.tensor(there)
    return World(folder, plans, segments, own, order)


def scene_of(world: World, party: str, cut: str, **more: Any) -> Scene:
    """What an attacker at ``party`` knows."""
    edge = next(
        e
        for stream in world.plans[party].streams
        for stage in stream.stages
        for e in (*stage.inputs, *stage.outputs)
        if f"{e.source} -> {e.target}" == cut
    )
    given: dict[str, Any] = {
        "graph": world.folder.graph,
        "plan": world.plans[party],
        "cut": cut,
        "shape": edge.shape,
        "cut_shape": edge.shape,
        "public": {},
        "low": torch.zeros(()),
        "high": torch.ones(()),
        "architecture": None,
        "options": {},
        "seed": 1,
        "report": lambda event: None,
    }
    return Scene(**{**given, **more})


def train(
    world: World, strategies: Mapping[str, Strategy], *, batches: int | None = None, change: Change | None = None
) -> World:
    """Train all parties, ``strategies`` in place of the honest ones; ``change``: of a gradient between two parties."""
    graph = world.folder.graph
    for party, strategy in strategies.items():
        world.segments[party] = strategy.take_over(world.segments[party])
    used = {
        party: {
            split: Samples(strategies[party].samples(split, one.fields), one.ids, one.count)
            if party in strategies
            else one
            for split, one in own.items()
        }
        for party, own in world.own.items()
    }
    counts = [
        {split: len(rows) for split, rows in world.order[graph.data_parties(s, labels=True)[0]][s].items()}
        for s in range(graph.streams)
    ]
    number = update = 0
    for turn in run_schedule(graph, epochs=graph.training.epochs):
        if isinstance(turn, HandOn):
            for name, entry in graph.segments.items():
                if len(graph.members(entry.at)) > 1:
                    giver, taker = (graph.party_at(entry.at, s) for s in (turn.giver, turn.taker))
                    world.segments[taker][name].take_over(*world.segments[giver][name].hand_on())
            continue
        for strategy in strategies.values():
            strategy.turn(turn)
        for step in steps_of(graph, turn, counts, number):
            _step(world, used, turn, step, update, change)
            number += 1
            update += turn.phase == TRAIN
            if batches is not None and update >= batches:
                return world
        for of in world.segments.values():
            for segment in of.values():
                if (score := segment.take_score()).rows:
                    world.scores.append((turn.phase, turn.epoch, segment.name, score))
    return world


def _step(
    world: World,
    used: Mapping[str, Mapping[str, Samples]],
    turn: Turn,
    step: Any,
    update: int,
    change: Change | None,
) -> None:
    graph, training = world.folder.graph, turn.phase == TRAIN
    split = "train" if training else "test"
    busy: list[Segment] = []
    for micro in step.micro_batches:

        def rows(party: str, name: str, micro: Any = micro) -> torch.Tensor:
            order = world.order[party][micro.stream][split]
            if training:
                order = order[epoch_order(graph.training.seed, turn.epoch, micro.stream, len(order))]
            fields = used[party][split].fields
            return fields[name][order[micro.start : micro.start + micro.rows]]

        stages: list[tuple[str, Stage]] = []
        left = [(party, stage) for party, plan in world.plans.items() for stage in plan.streams[micro.stream].stages]
        while left:
            waiting = {stage.segment for _, stage in left}
            party, stage = next(one for one in left if not waiting & {edge.source for edge in one[1].inputs})
            left.remove((party, stage))
            stages.append((party, stage))
        made: dict[int, torch.Tensor] = {}
        for party, stage in stages:
            inputs = [made[edge.index] for edge in stage.inputs]
            if stage.reads is not None:
                inputs.append(rows(party, stage.reads))
            labels = None
            if stage.labels is not None:
                labels = rows(stage.labels.source_party, stage.labels.field or "")
            segment = world.segments[party][stage.segment]
            outputs, _ = segment.forward(
                stage,
                inputs,
                labels,
                micro=micro.number,
                update=update if training else None,
                share=micro.rows / step.rows,
            )
            made |= {edge.index: output for edge, output in outputs.items()}
            busy += [segment] if segment not in busy else []
        if not training:
            continue
        returned: dict[int, torch.Tensor | None] = {}
        for party, stage in reversed(stages):
            gradients = {edge: returned[edge.index] for edge in stage.outputs}
            back = world.segments[party][stage.segment].backward(stage, gradients, micro=micro.number)
            for edge, gradient in zip(stage.inputs, back, strict=True):
                if change is not None and gradient is not None and not edge.local:
                    gradient = change(edge, gradient)
                returned[edge.index] = gradient
    if training:
        for segment in busy:
            segment.step()
