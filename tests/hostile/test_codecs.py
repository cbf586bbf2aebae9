"""A peer with the right key that lies about what its codec made: it is put out, and told no more than that.

The victim is a party's real door over tcp, at both ends of a cut; the offender writes on the wire whatever a test says.
Every lie on its own, without sockets: ``tests/splitsec/test_codecs.py``.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from splitsec.contract import digest
from splitsec.errors import PeerMisbehaved
from splitsec.graph import parse_graph
from splitsec.identity import public_of, public_text
from splitsec.messages import Message, encode
from splitsec.party import open_guard
from splitsec.plan import make_plan
from splitsec.transports.iothread import CloseCode
from splitsec.transports.wire import Kind
from tests.conftest import free_port

from .conftest import PATIENCE, BadPeer

GRAPH = """\
splitsec: 1
name: lies
parties:
  clinic: {key: "CLINIC"}
  server: {key: "SERVER", listen: "tcp://127.0.0.1:PORT"}
segments:
  stem: {at: clinic, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [64], dtype: float32, codec: CODEC}
labels:
  - {from: clinic, to: trunk}
training: {batch_size: 8}
timeouts: {connect: 60, lost: 20}
"""

ONES = torch.ones(16)
LIES: dict[str, tuple[str, dict[str, torch.Tensor], dict[str, Any], str]] = {
    "a mask for numbers that are not there": (
        "nonzero",
        {"values": ONES, "mask": torch.full((8,), 0xFF, dtype=torch.uint8)},
        {"rows": 1},
        "[16] values, where 64 are due",
    ),
    "rows without end": (
        "nonzero",
        {"values": ONES, "mask": torch.full((8,), 1, dtype=torch.uint8)},
        {"rows": 2**62},
        "no number of samples that its cut has",
    ),
    "one number that unfolds": ("bfloat16", {"": ONES[:1].bfloat16().expand(2**16, 64)}, {}, "shape [65536, 64]"),
    "a scale that is no number": (
        "int8",
        {"": torch.ones(2, 64, dtype=torch.int8), "scales": torch.tensor([1.0, float("nan")])},
        {},
        "scales that are zero, negative, too large or no numbers",
    ),
    "an exponent out of this world": ("float16", {"": torch.ones(2, 64).half()}, {"exponent": 2**40}, "no exponent"),
}


@pytest.mark.threat("T138")
@pytest.mark.parametrize("name", LIES)
def test_a_lie_about_a_codec_ends_the_liars_channel(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    codec, tensors, facts, complaint = LIES[name]
    keys = {party: os.urandom(32) for party in ("clinic", "server")}
    text = GRAPH.replace("PORT", str(free_port())).replace("CODEC", codec)
    for party, key in keys.items():
        text = text.replace(party.upper(), public_text(public_of(key)))
    graph = parse_graph(text)
    guard = open_guard(graph, make_plan(graph, "server"), keys["server"], together=False)
    try:
        with ThreadPoolExecutor(1) as pool:
            address = graph.parties["server"].listen or ""
            opened = pool.submit(guard.open_all, ["clinic"])
            with BadPeer(address, keys["clinic"], public_of(keys["server"]), digest(graph)).comes_in() as liar:
                opened.result(PATIENCE)
                header, body = encode(Message("activation", (0, 0), facts, tensors))
                liar.message(16, header, b"".join(body))
                with pytest.raises(PeerMisbehaved) as told:
                    guard.take(("clinic", 16))
                assert told.value.party == "clinic"
                assert complaint in told.value.seen
                *_, last = [frame for frame in liar.hear_out() if frame.header.kind is not Kind.PING]
                assert last.header.kind is Kind.CLOSE
                assert CloseCode(last.header.number) is CloseCode.MISBEHAVED
                assert last.payload == b""
    finally:
        guard.close(linger=0.2)
    assert not any("Traceback" in record.getMessage() for record in caplog.records)
