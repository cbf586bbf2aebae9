"""What ``splitsec plan`` says that will be sent, against what every party's guard counted in a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitsec.measuring import measure_folder
from splitsec.partyfile import load_folder
from splitsec.simulation import simulate
from tests.conftest import GRAPH, replaced, write_folder

EPOCHS = 3
HEADER = 48
"""Bytes; more than the header of a message with one tensor, or none, takes."""
HEADER_OF_WEIGHTS = 1024

CLINICS = ("clinic-a", "clinic-b", "clinic-c")
THREE = (
    ("  clinic-b: {}\n", "  clinic-b: {}\n  clinic-c: {}\n"),
    ("members: [clinic-a, clinic-b]", "members: [clinic-a, clinic-b, clinic-c]"),
)
CHANGES = {
    "three in turn": THREE,
    "in parts, the last batch left out": (("batch_size: 8", "batch_size: 7, micro_batches: 3, drop_last: true"),),
    "at once, rounded": (("round_robin", "parallel"), ("float32", "float32, codec: bfloat16")),
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_bytes_are_those_that_a_run_counts(tmp_path: Path, changes: tuple[tuple[str, str], ...]) -> None:
    """Every lane, to the byte but for the headers, and to the message."""
    graph = replaced(GRAPH, ("seed: 7", f"seed: 7, decoys: 0, epochs: {EPOCHS}"), ("epochs: 2, ", ""), *changes)
    folder = write_folder(tmp_path / "small", graph, clinics=CLINICS if "clinic-c" in graph else CLINICS[:2])
    report = measure_folder(load_folder(folder), tell=lambda text: None).report
    counted = {(row["kind"], row["sender"], row["receiver"]): row for row in simulate(folder).cuts}
    counted = {key: row for key, row in counted.items() if row["kind"] != "order"}
    assert {(one.kind, one.sender, one.receiver) for one in report.flows} == counted.keys()
    for one in report.flows:
        row = counted[one.kind, one.sender, one.receiver]
        assert row["messages"] == EPOCHS * one.messages
        planned = EPOCHS * (one.epoch + one.evaluation)
        header = HEADER_OF_WEIGHTS if one.kind == "weights" else HEADER
        assert planned < row["bytes"] < planned + header * row["messages"]
        assert planned > 0
