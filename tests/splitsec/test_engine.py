"""One step at one party whose peer answers as it likes.  Honest steps: ``tests/topologies``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from splitsec.engine import Engine
from splitsec.errors import PeerMisbehaved
from splitsec.graph import parse_graph
from splitsec.guard import Guard
from splitsec.messages import Message, encode
from splitsec.plan import make_plan
from splitsec.schedule import TRAIN, MicroBatch, Step
from splitsec.segments import Segment
from splitsec.transports.iothread import Received
from tests.splitsec.test_guard import Thread

GRAPH = parse_graph(
    """
splitsec: 1
name: pair
parties: {clinic: {}, server: {listen: "tcp://h:1", address: "tcp://h:1"}}
segments: {stem: {at: clinic, data: x}, trunk: {at: server, loss: mse}}
cuts: [{from: stem, to: trunk, shape: [2], dtype: float32}]
labels: [{from: clinic, to: trunk, dtype: float32}]
training: {batch_size: 4}
"""
)
KEY = b"s" * 32


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Message("gradient", (0, 0)), "sent no gradient of stem -> trunk"),
        (Message("gradient", (1, 0), tensors={"": torch.ones(4, 2)}), r"for step, micro-batch \(1, 0\)"),
        (Message("gradient", (0, 0), tensors={"": torch.ones(3, 2)}), "sent 3 samples"),
        (Message("gradient", (0, 0), tensors={"": torch.full((4, 2), torch.nan)}), "NaN or infinite"),
    ],
)
def test_a_wrong_answer_changes_no_weight(answer: Message, words: str) -> None:
    thread = Thread()
    guard = Guard(make_plan(GRAPH, "clinic"), {"server": KEY}, thread, connect_timeout=1)
    module = nn.Linear(3, 2)
    stem = Segment("stem", module, torch.optim.SGD(module.parameters(), lr=1.0))
    before = stem.weights()
    header, body = encode(answer)
    lane = next(number for (_, number), lane in guard.plan.lanes_in.items() if lane.kind == "gradient")
    thread.events.append(Received(KEY, lane, header, memoryview(bytearray(b"".join(body)))))
    step = Step(0, TRAIN, 0, (MicroBatch(0, 0, 0, 4),))
    with pytest.raises(PeerMisbehaved, match=words):
        Engine(guard.plan, {"stem": stem}, guard).run_step(
            step, lambda micro, field: torch.ones(4, 3) if field == "x" else torch.ones(4), update=0
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in stem.weights().items())
