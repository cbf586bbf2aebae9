"""A decoy costs no bit: steps that are tried with false labels first leave the weights that one process has.

Here: graphs of ``test_exactness`` with `decoys: 2`, in real processes and for so many epochs that several fall; that
they did stands in the traces of their traffic.  What a peer may do instead: ``tests/splitsec/test_engine.py``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitsec.graph import Graph, load_graph
from splitsec.journal import read as read_journal
from splitsec.partyfile import load_function
from splitsec.privacy.ledger import Ledger
from splitsec.privacy.ledger import read as read_ledger
from splitsec.schedule import FIRST_REDO, TRAIN, Turn, run_schedule, steps_of
from splitsec.simulation import predict, simulate
from splitsec.trace import SUFFIX
from tests.conftest import change
from tests.topologies import test_exactness as exactness
from tests.topologies.test_exactness import (
    MakeOptimizer,
    Plain,
    adam,
    assert_equal_weights,
    one_thread,
    prepared,
    sgd,
)

__all__ = ["one_thread"]


class Vanilla(exactness.Vanilla):
    epochs = 9


class UShaped(exactness.UShaped):
    epochs = 11


class MultiHop(exactness.MultiHop):
    epochs = 7


class SideBranch(exactness.SideBranch):
    epochs = 6


class FanOut(exactness.FanOut):
    epochs = 8


def deceiving(network: type[Plain], folder: Path, make_optimizer: MakeOptimizer, *, micro_batches: int = 1) -> Path:
    """The network's graph folder, for as many epochs, with a decoy in every other step that may be redone."""
    prepared(network, folder, make_optimizer)
    graph = folder / "graph.yaml"
    text = re.sub(r"epochs: \d+", f"epochs: {network.epochs}", graph.read_text())
    text = re.sub(r"micro_batches: \d+, ", "", text)
    graph.write_text(text.replace("training: {", f"training: {{decoys: 2, micro_batches: {micro_batches}, "))
    return folder


def sources(graph: Graph) -> tuple[str, ...]:
    """The parties with samples and labels, by stream."""
    return tuple(graph.data_parties(stream)[0] for stream in range(graph.streams))


def redoable(folder: Path) -> dict[int, set[int]]:
    """The numbers of the steps that may be redone, by stream."""
    graph = load_graph(folder / "graph.yaml")
    data = load_function("data:train", folder / "parties")
    tests = load_function("data:test", folder / "parties")
    sites = [{"site": stream} if graph.groups else {} for stream in range(graph.streams)]
    counts = [{"train": len(data(**one)["x"]), "test": len(tests(**one)["x"]), "predict": 0} for one in sites]
    found: dict[int, set[int]] = {stream: set() for stream in range(graph.streams)}
    number = 0
    for turn in run_schedule(graph, epochs=graph.training.epochs):
        if isinstance(turn, Turn):
            steps = list(steps_of(graph, turn, counts, number))
            number += len(steps)
            found[turn.streams[0]] |= {step.number for step in steps if step.redo}
            assert turn.phase == TRAIN or not any(step.redo for step in steps)
    return found


def passed(traces: Path, party: str) -> list[dict[str, Any]]:
    """What passed the door of ``party`` in its steps, line by line."""
    lines = [json.loads(line) for line in (traces / f"{party}{SUFFIX}").read_text().splitlines()]
    return [line for line in lines if line.get("kind") in ("activation", "gradient", "labels")]


def assert_redone(folder: Path, traces: Path, *, micro_batches: int) -> int:
    """What was sent a second time is some of the steps that may be redone, whole, at all parties alike; how many."""
    graph = load_graph(folder / "graph.yaml")
    allowed, decoys = redoable(folder), 0
    everywhere: set[int] = set()
    for stream, source in enumerate(sources(graph)):
        again: dict[tuple[str, str, str, str], Counter[int]] = {}
        for line in passed(traces, source):
            step, micro = line["key"]
            lane = again.setdefault((line["dir"], line["peer"], line["kind"], line["lane"]), Counter())
            if micro >= micro_batches:
                lane[step] += 1
        redone = [set(lane) for lane in again.values()]
        assert len(redone) >= 3 or not redone, "activations, gradients; labels, or the way down the U"
        assert all(one == redone[0] for one in redone), again
        assert redone[0] <= allowed[stream]
        counts = {count for lane in again.values() for count in lane.values()}
        assert counts <= {micro_batches, 2 * micro_batches}  # two cuts may join the same two segments
        decoys += len(redone[0])
        everywhere |= redone[0]
    for party in set(graph.parties) - set(sources(graph)):
        seen = {line["key"][0] for line in passed(traces, party) if line["key"][1] >= micro_batches}
        assert seen == everywhere, party
    return decoys


@pytest.mark.parametrize(
    ("network", "make_optimizer", "micro_batches"),
    [
        (Vanilla, adam, 1),
        (UShaped, adam, 1),
        (UShaped, sgd, 2),
        (MultiHop, sgd, 1),
        (MultiHop, adam, 2),
        (SideBranch, adam, 1),
        (FanOut, sgd, 1),
    ],
    ids=lambda value: getattr(value, "folder", getattr(value, "__name__", str(value))),
)
def test_weights_and_losses_are_those_of_one_process(
    network: type[Plain], make_optimizer: MakeOptimizer, micro_batches: int, tmp_path: Path
) -> None:
    """Dropout and BatchNorm stand before and behind the cuts; the head of the U is at the source itself."""
    folder = deceiving(network, tmp_path / "graph", make_optimizer, micro_batches=micro_batches)
    plain = network(micro_batches=micro_batches)
    train_loss, eval_loss = plain.fit(make_optimizer)
    result = simulate(folder, out=tmp_path / "out", trace=tmp_path / "traces")
    assert assert_redone(folder, tmp_path / "traces", micro_batches=micro_batches) >= 3
    assert_equal_weights(plain, tmp_path / "out")
    assert result.metrics["train_loss"] == pytest.approx(train_loss, rel=1e-12)
    assert result.metrics["eval_loss"] == pytest.approx(eval_loss, rel=1e-12)


def test_a_prediction_is_not_redone(tmp_path: Path) -> None:
    folder = deceiving(MultiHop, tmp_path / "graph", sgd)
    plain = MultiHop()
    plain.fit(sgd)
    simulate(folder, out=tmp_path / "out")
    change(folder / "graph.yaml", ("batch_size: 8", "batch_size: 2"))
    plain.batch = 2
    predict(folder, weights=tmp_path / "out", out=tmp_path / "predicted", split="train")
    expected = torch.cat([outputs["fourth"] for _, _, outputs in plain.look("train")])
    assert len(expected) > 2 * (FIRST_REDO + 1)
    found = load_file(tmp_path / "predicted" / "server" / "predictions.safetensors")
    assert torch.equal(found["fourth"], expected)


def test_the_journal_holds_both_attempts_and_the_ledger_counts_them(tmp_path: Path) -> None:
    """A ledger that is there counts what leaves in the clear; it needs no policy for that."""
    folder = deceiving(MultiHop, tmp_path / "graph", adam, micro_batches=2)
    books = tmp_path / "state" / "clinic"
    Ledger(books / "ledger.sqlite", party="clinic").close()
    simulate(folder, state=tmp_path / "state", trace=tmp_path / "traces")
    decoys = assert_redone(folder, tmp_path / "traces", micro_batches=2)
    assert decoys >= 3
    records: Counter[str] = Counter()
    written = [entry.values for entry in read_journal(books / "journal.jsonl")]
    for values in written:
        records[values.get("kind", "")] += values.get("records", 0)
    again = {values["step"] for values in written if values.get("micro_batch", None) in (2, 3)}
    assert len(again) == decoys
    book = read_ledger(books / "ledger.sqlite")
    released = {account.cut: int(book.releases(account).sum()) for account in book.accounts}
    assert released == {"first -> second": records["activation"], "labels: clinic -> fourth": records["labels"]}
    trained = MultiHop.epochs * 5 * 8
    assert records["labels"] == records["activation"] == trained + MultiHop.epochs * 15 + decoys * 8
