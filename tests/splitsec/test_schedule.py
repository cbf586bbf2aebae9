"""Whose turn it is: every party works out the same run, no sample is forgotten, and weights never go stale."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitsec.graph import Graph, parse_graph
from splitsec.samples import micro_batch_rows
from splitsec.schedule import (
    EVALUATE,
    FIRST_REDO,
    PREDICT,
    TRAIN,
    HandOn,
    Step,
    Turn,
    last_turn,
    may_redo,
    prediction_schedule,
    run_schedule,
    steps_of,
)
from tests.conftest import replaced
from tests.topologies.test_anonymous import GRAPH as HIDDEN

SAMPLES_OF = {TRAIN: "train", EVALUATE: "test", PREDICT: "predict"}


def graph_of(
    members: int, schedule: str, *, batch_size: int = 8, micro_batches: int = 1, drop_last: bool = False
) -> Graph:
    """Vanilla split learning with a group of ``members``; 0: one clinic and no group."""
    names = [f"clinic-{k}" for k in range(members or 1)]
    return parse_graph(
        json.dumps(
            {
                "splitsec": 1,
                "name": "made",
                "parties": {**{name: {} for name in names}, "server": {"listen": "tcp://127.0.0.1:7400"}},
                "groups": {"clinics": {"members": names, "schedule": schedule}} if members else {},
                "segments": {
                    "stem": {"at": "clinics" if members else names[0], "data": "x"},
                    "trunk": {"at": "server", "loss": "cross_entropy"},
                },
                "cuts": [{"from": "stem", "to": "trunk", "shape": [4], "dtype": "float32"}],
                "labels": [{"from": "clinics" if members else names[0], "to": "trunk"}],
                "training": {"batch_size": batch_size, "micro_batches": micro_batches, "drop_last": drop_last},
            }
        )
    )


def counts_of(*train: int, test: int = 3, predict: int = 2) -> list[dict[str, int]]:
    return [{"train": count, "test": test, "predict": predict} for count in train]


def turns(graph: Graph, epochs: int) -> list[Turn]:
    return [entry for entry in run_schedule(graph, epochs=epochs) if isinstance(entry, Turn)]


# --- turns and hand-on


@settings(max_examples=60, deadline=None)
@given(members=st.integers(1, 9), epochs=st.integers(1, 5))
def test_round_robin_gives_every_member_its_turn_with_the_newest_weights(members: int, epochs: int) -> None:
    graph = graph_of(members, "round_robin")
    newest = 0
    version = [0] * members  # all begin with the same weights, drawn from the seed
    for entry in run_schedule(graph, epochs=epochs):
        if isinstance(entry, HandOn):
            assert version[entry.giver] == newest, "hands on weights that others have gone beyond"
            assert version[entry.taker] < newest, "hands on weights that the other has already"
            assert entry.taker == (entry.giver + 1) % members, "members not next to each other have no channel"
            version[entry.taker] = newest
            continue
        (stream,) = entry.streams
        assert version[stream] == newest
        if entry.phase == TRAIN:
            newest += 1
            version[stream] = newest
    assert version == [newest] * members, "in the end all hold the final weights"
    assert newest == epochs * members


@settings(max_examples=60, deadline=None)
@given(members=st.integers(1, 9), epochs=st.integers(1, 5))
def test_in_every_epoch_each_member_trains_once_in_order_then_each_evaluates_once(members: int, epochs: int) -> None:
    entries = iter(turns(graph_of(members, "round_robin"), epochs))
    for epoch in range(epochs):
        assert list(itertools.islice(entries, members)) == [Turn(TRAIN, epoch, (k,)) for k in range(members)]
        evaluated = list(itertools.islice(entries, members))
        assert {(turn.phase, turn.epoch) for turn in evaluated} == {(EVALUATE, epoch)}
        assert sorted(turn.streams for turn in evaluated) == [(k,) for k in range(members)]
    assert list(entries) == []


@pytest.mark.parametrize("members", [0, 1, 3])
def test_parallel_members_take_all_their_turns_together_and_hand_nothing_on(members: int) -> None:
    together = tuple(range(members or 1))
    assert list(run_schedule(graph_of(members, "parallel"), epochs=2)) == [
        Turn(TRAIN, 0, together),
        Turn(EVALUATE, 0, together),
        Turn(TRAIN, 1, together),
        Turn(EVALUATE, 1, together),
    ]


def test_a_round_robin_of_three_spelled_out() -> None:
    assert list(run_schedule(graph_of(3, "round_robin"), epochs=2)) == [
        Turn(TRAIN, 0, (0,)),
        HandOn(0, 1, 0),
        Turn(TRAIN, 0, (1,)),
        HandOn(1, 2, 0),
        Turn(TRAIN, 0, (2,)),
        Turn(EVALUATE, 0, (2,)),
        HandOn(2, 0, 0),
        Turn(EVALUATE, 0, (0,)),
        HandOn(0, 1, 0),
        Turn(EVALUATE, 0, (1,)),
        Turn(TRAIN, 1, (0,)),
        HandOn(0, 1, 1),
        Turn(TRAIN, 1, (1,)),
        HandOn(1, 2, 1),
        Turn(TRAIN, 1, (2,)),
        Turn(EVALUATE, 1, (2,)),
        HandOn(2, 0, 1),
        Turn(EVALUATE, 1, (0,)),
        HandOn(0, 1, 1),
        Turn(EVALUATE, 1, (1,)),
    ]


@settings(max_examples=60, deadline=None)
@given(members=st.integers(1, 9), epochs=st.integers(1, 5), schedule=st.sampled_from(["round_robin", "parallel"]))
def test_the_last_turn(members: int, epochs: int, schedule: str) -> None:
    graph = graph_of(members, schedule)
    assert last_turn(graph, epochs=epochs) == turns(graph, epochs)[-1]


@settings(max_examples=60, deadline=None)
@given(members=st.integers(1, 9), epochs=st.integers(1, 5))
def test_weights_change_hands_within_an_epoch_and_all_hold_them_where_one_begins(members: int, epochs: int) -> None:
    """So the members of an anonymous group may work other streams in the next."""
    holding = set(range(members))
    epoch = 0
    for entry in run_schedule(graph_of(members, "round_robin"), epochs=epochs):
        if entry.epoch != epoch:
            assert holding == set(range(members))
            epoch = entry.epoch
        if isinstance(entry, HandOn):
            holding.add(entry.taker)
        elif entry.phase == TRAIN:
            holding = set(entry.streams)
    assert holding == set(range(members))


@pytest.mark.parametrize("schedule", ["round_robin", "parallel"])
def test_prediction_goes_through_the_members_one_after_the_other(schedule: str) -> None:
    assert list(prediction_schedule(graph_of(3, schedule))) == [Turn(PREDICT, 0, (k,)) for k in range(3)]


# --- steps


@st.composite
def runs(draw: st.DrawFn) -> tuple[Graph, list[dict[str, int]], Turn]:
    members = draw(st.integers(1, 4))
    batch_size = draw(st.integers(1, 20))
    graph = graph_of(
        members,
        "parallel",
        batch_size=batch_size,
        micro_batches=draw(st.integers(1, min(6, batch_size))),
        drop_last=draw(st.booleans()),
    )
    counts = [{split: draw(st.integers(0, 70)) for split in ("train", "test", "predict")} for _ in range(graph.streams)]
    phase = draw(st.sampled_from([TRAIN, EVALUATE, PREDICT]))
    streams = draw(st.sampled_from([tuple(range(members)), *((k,) for k in range(members))]))
    return graph, counts, Turn(phase, 0, streams)


@settings(max_examples=60, deadline=None)
@given(run=runs(), first=st.integers(0, 1000))
def test_the_steps_of_a_turn_take_every_sample_once_in_order(
    run: tuple[Graph, list[dict[str, int]], Turn], first: int
) -> None:
    graph, counts, turn = run
    batch = graph.training.batch_size
    steps = list(steps_of(graph, turn, counts, first))
    assert [step.number for step in steps] == list(range(first, first + len(steps)))
    assert {(step.phase, step.epoch) for step in steps} <= {(turn.phase, turn.epoch)}
    for stream in turn.streams:
        taken = [
            row
            for step in steps
            for micro in step.micro_batches
            if micro.stream == stream
            for row in range(micro.start, micro.start + micro.rows)
        ]
        count = counts[stream][SAMPLES_OF[turn.phase]]
        dropped = count % batch if graph.training.drop_last and turn.phase == TRAIN else 0
        assert taken == list(range(count - dropped))


@settings(max_examples=60, deadline=None)
@given(run=runs())
def test_a_step_holds_one_batch_of_each_member_that_has_one_cut_as_torch_cuts_it(
    run: tuple[Graph, list[dict[str, int]], Turn],
) -> None:
    graph, counts, turn = run
    for place, step in enumerate(steps_of(graph, turn, counts, 0)):
        assert [micro.number for micro in step.micro_batches] == list(range(len(step.micro_batches)))
        assert step.rows == sum(micro.rows for micro in step.micro_batches) > 0
        by_stream = itertools.groupby(step.micro_batches, key=lambda micro: micro.stream)
        found = {stream: [micro.rows for micro in micros] for stream, micros in by_stream}
        assert list(found) == sorted(found), "members in order, the micro-batches of each together"
        for stream, sizes in found.items():
            rows = min(
                graph.training.batch_size, counts[stream][SAMPLES_OF[turn.phase]] - place * graph.training.batch_size
            )
            assert sizes == as_torch_splits(rows, graph.training.micro_batches)


def test_members_with_unequal_data_spelled_out() -> None:
    graph = graph_of(3, "parallel", batch_size=8, micro_batches=2)
    steps = list(steps_of(graph, Turn(TRAIN, 4, (0, 1, 2)), counts_of(21, 9, 14), 100))
    assert [[(m.stream, m.start, m.rows) for m in step.micro_batches] for step in steps] == [
        [(0, 0, 4), (0, 4, 4), (1, 0, 4), (1, 4, 4), (2, 0, 4), (2, 4, 4)],
        [(0, 8, 4), (0, 12, 4), (1, 8, 1), (2, 8, 3), (2, 11, 3)],
        [(0, 16, 3), (0, 19, 2)],
    ]
    assert [(step.number, step.phase, step.epoch) for step in steps] == [
        (100, TRAIN, 4),
        (101, TRAIN, 4),
        (102, TRAIN, 4),
    ]


def test_the_last_batch_is_left_out_of_training_alone() -> None:
    graph = graph_of(2, "parallel", batch_size=8, drop_last=True)
    counts = counts_of(21, 9, test=9)

    def rows(turn: Turn) -> list[int]:
        return [step.rows for step in steps_of(graph, turn, counts, 0)]

    assert rows(Turn(TRAIN, 0, (0, 1))) == [16, 8]
    assert rows(Turn(EVALUATE, 0, (0, 1))) == [16, 2]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 300), micro_batches=st.integers(1, 40))
def test_micro_batches_are_cut_as_torch_cuts_them_without_the_empty_ones(rows: int, micro_batches: int) -> None:
    assert micro_batch_rows(rows, micro_batches) == as_torch_splits(rows, micro_batches)


def as_torch_splits(rows: int, pieces: int) -> list[int]:
    return [len(piece) for piece in torch.arange(rows).tensor_split(pieces) if len(piece)]


# --- what may be redone


@settings(max_examples=60, deadline=None)
@given(members=st.integers(0, 4), epochs=st.integers(1, 12), train=st.integers(1, 90), micro_batches=st.integers(1, 3))
def test_steps_that_may_be_redone_are_training_steps_after_the_first_of_a_stream_and_never_the_last_of_a_turn(
    members: int, epochs: int, train: int, micro_batches: int
) -> None:
    graph = graph_of(members, "round_robin", batch_size=8, micro_batches=micro_batches)
    counts = counts_of(*(train + 8 * k for k in range(graph.streams)))
    trained = [0] * graph.streams
    for turn, steps in by_turn(graph, counts, epochs):
        for place, step in enumerate(steps):
            (stream,) = turn.streams
            early = trained[stream] < FIRST_REDO
            assert step.redo == (turn.phase == TRAIN and not early and place + 1 < len(steps))
            trained[stream] += turn.phase == TRAIN
    assert FIRST_REDO == 20, "docs/protocol.md says so"


def by_turn(graph: Graph, counts: Sequence[dict[str, int]], epochs: int) -> Iterator[tuple[Turn, list[Step]]]:
    number = 0
    for turn in turns(graph, epochs):
        steps = list(steps_of(graph, turn, counts, number))
        number += len(steps)
        yield turn, steps


SUMS = [
    {"name": name, "from": name, "to": "server", "shape": [1], "dtype": "float32"} for name in ("clinic-0", "clinic-1")
]


@pytest.mark.threat("T134")
@pytest.mark.parametrize(
    ("change", "may"),
    [
        ({}, True),
        ({"training": {"decoys": 1}}, True),
        ({"training": {"decoys": 0}}, False),
        ({"groups": {"clinics": {"members": ["clinic-0", "clinic-1"], "schedule": "parallel"}}}, False),
        ({"labels": [{"from": "server", "to": "trunk"}]}, False),
        ({"labels": [{"from": "clinics", "to": "trunk", "privacy": {"epsilon": 1.0, "classes": 3}}]}, False),
        ({"cut": {"privacy": {"forward": {"clip": 1.0}}}}, False),
        ({"cut": {"privacy": {"backward": {"clip": 1.0}}}}, False),
        ({"cut": {"dtype": "int64"}}, False),
        ({"segments": {"trunk": {"at": "clinics", "loss": "cross_entropy"}}, "exchanges": SUMS}, False),
        ({"segments": {"trunk": {"at": "server", "loss": "cross_entropy", "data": "x"}}}, False),
    ],
    ids=lambda value: None if isinstance(value, bool) else json.dumps(value)[:40],
)
def test_where_steps_may_be_redone(change: dict[str, Any], may: bool) -> None:
    """One party with all samples and labels, gradients from others, nobody else in the step, and no floors."""
    values = json.loads(graph_of(2, "round_robin").model_dump_json(by_alias=True))
    values["cuts"][0] |= change.pop("cut", {})
    for key in ("segments", "training"):
        values[key] |= change.pop(key, {})
    graph = parse_graph(json.dumps(values | change))
    assert [may_redo(graph, stream) for stream in (0, 1)] == [may, may]
    many = counts_of(400, 400, test=400, predict=400)
    for turn, steps in by_turn(graph, many, 1):
        assert any(step.redo for step in steps) == (may and turn.phase == TRAIN)
    for entry in prediction_schedule(graph):
        assert not any(step.redo for step in steps_of(graph, entry, many, 0))


def test_a_hidden_group_redoes_nothing() -> None:
    """Who tries how often, and when, would tell its members apart."""
    assert not any(may_redo(parse_graph(HIDDEN), stream) for stream in range(3))
    assert may_redo(parse_graph(replaced(HIDDEN, (", anonymous: true", ""), ("pseudonym: turn", "pseudonym: turn"))), 0)


def test_a_parallel_group_of_one_may_redo() -> None:
    assert may_redo(graph_of(1, "parallel"), 0) and not may_redo(graph_of(2, "parallel"), 0)


# --- alike at every party


def whole_run(graph: Graph, counts: Sequence[dict[str, int]], epochs: int) -> list[Turn | HandOn | Step]:
    """A run as a party goes through it: numbers of steps run on from turn to turn."""
    run: list[Turn | HandOn | Step] = []
    number = 0
    for entry in run_schedule(graph, epochs=epochs):
        run.append(entry)
        if isinstance(entry, Turn):
            steps = list(steps_of(graph, entry, counts, number))
            number += len(steps)
            run += steps
    return run


SAY_IT = """
import hashlib, sys
from splitsec.graph import load_graph
from splitsec.schedule import Turn, run_schedule, steps_of
graph, number, said = load_graph(sys.argv[1]), 0, []
for entry in run_schedule(graph, epochs=3):
    said.append(entry)
    if isinstance(entry, Turn):
        steps = list(steps_of(graph, entry, [{"train": 10 + k, "test": 3, "predict": 2} for k in range(5)], number))
        number += len(steps)
        said += steps
print(hashlib.sha256(repr(said).encode()).hexdigest())
"""


def test_two_processes_work_out_the_same_run(tmp_path: Path) -> None:
    """Python salts the hashes of strings in each, as at parties on two machines; nothing may hang on them."""
    graph = graph_of(5, "round_robin", batch_size=4, micro_batches=3)
    expected = hashlib.sha256(repr(whole_run(graph, counts_of(10, 11, 12, 13, 14), 3)).encode()).hexdigest()
    (tmp_path / "graph.yaml").write_text(graph.model_dump_json(by_alias=True))
    parties = [
        subprocess.Popen(
            [sys.executable, "-c", SAY_IT, str(tmp_path / "graph.yaml")],
            env={**os.environ, "PYTHONHASHSEED": salt},
            stdout=subprocess.PIPE,
            text=True,
        )
        for salt in ("1", "2")
    ]
    assert [party.communicate()[0].strip() for party in parties] == [expected, expected]
