"""What a leader may say about the order of samples.  Honest agreement: ``tests/topologies``."""

from __future__ import annotations

import hashlib
import hmac

import pytest
import torch

from splitsec.agreement import agree_on_order
from splitsec.errors import PeerMisbehaved
from splitsec.graph import parse_graph
from splitsec.guard import Guard
from splitsec.messages import Message, encode
from splitsec.plan import ORDER, make_plan
from splitsec.samples import Samples
from splitsec.transports.iothread import Received
from tests.splitsec.test_guard import Thread

GRAPH = parse_graph(
    """
splitsec: 1
name: vertical
parties: {clinic: {}, registry: {}, server: {listen: "tcp://h:1", address: "tcp://h:1"}}
segments: {stem: {at: clinic, data: x}, trunk: {at: server, loss: mse}}
cuts: [{from: stem, to: trunk, shape: [2], dtype: float32}]
labels: [{from: registry, to: trunk, dtype: float32}]
training: {batch_size: 4}
"""
)
KEYS = {"clinic": b"c" * 32, "server": b"s" * 32}
IDS = ("a", "b", "c")


def follow(*named: str) -> dict[str, torch.Tensor]:
    """What the registry makes of a leader's order of its training samples."""
    thread = Thread()
    guard = Guard(make_plan(GRAPH, "registry"), KEYS, thread, connect_timeout=1)
    key = b"k" * 32
    prints = b"".join(hmac.digest(key, one.encode(), hashlib.sha256)[:16] for one in named)
    offer = Message(
        "order",
        facts={"stream": 0, "split": "train", "key": key},
        tensors={"prints": torch.frombuffer(bytearray(prints), dtype=torch.uint8)},
    )
    for message in (offer, Message("order", facts={"stream": 0, "split": ""})):
        header, body = encode(message)
        thread.events.append(Received(KEYS["clinic"], ORDER, header, memoryview(bytearray(b"".join(body)))))
    own = {"train": Samples({"y": torch.zeros(3)}, IDS, 3)}
    return agree_on_order(GRAPH, "registry", guard, 0, own, ("clinic", "registry"), {})


def test_an_order_is_followed() -> None:
    assert follow("c", "a", "b")["train"].tolist() == [2, 0, 1]


def test_an_order_that_names_a_sample_twice_is_refused() -> None:
    """Or one sample would be released as often as the leader likes, in one epoch."""
    with pytest.raises(PeerMisbehaved, match="named a sample twice"):
        follow("a", "b", "c", "a")
