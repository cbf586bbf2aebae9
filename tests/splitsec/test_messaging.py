"""Named tensors between two parties with no training at all: real channels over TCP, real keys, one thread a party."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from splitsec.errors import EgressRefused, PeerLost, PeerMisbehaved, PeerRefusedUs, PeerUnreachable, UserError
from splitsec.graph import Graph, parse_graph
from splitsec.identity import public_of, public_text
from splitsec.journal import read, verify
from splitsec.messages import Message
from splitsec.messaging import Line, open_line
from tests.conftest import PATIENCE, free_port

GRAPH = """\
splitsec: 1
name: exchanges
parties:
  clinic: {key: "CLINIC"}
  server: {key: "SERVER", listen: "tcp://127.0.0.1:PORT"}
exchanges:
  - {name: histogram, from: clinic, to: server, shape: [null, 16], dtype: float32}
  - {name: answer, from: server, to: clinic, shape: [3], dtype: int64}
  - {name: volume, from: clinic, to: server, shape: [null], dtype: uint8, max_bytes: 20000000}
timeouts: {connect: CONNECT, lost: 10}
"""


class Two:
    """A graph of two parties, and their private keys."""

    def __init__(self, connect: float = 30) -> None:
        self.keys = {"clinic": os.urandom(32), "server": os.urandom(32)}
        text = GRAPH.replace("PORT", str(free_port())).replace("CONNECT", str(connect))
        for name, key in self.keys.items():
            text = text.replace(name.upper(), public_text(public_of(key)))
        self.text = text

    @property
    def graph(self) -> Graph:
        return parse_graph(self.text)

    def open(self, party: str, **other: bytes) -> Line:
        return open_line(self.graph, party, private_key=other.get("key", self.keys[party]))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def both(
    pool: ThreadPoolExecutor, two: Two, clinic: Callable[[Line], object], server: Callable[[Line], object]
) -> None:
    """Open both ends and let each do its part; raises what either raised."""

    def run(party: str, work: Callable[[Line], object]) -> None:
        with two.open(party) as line:
            work(line)

    ends: list[Future[None]] = [pool.submit(run, "clinic", clinic), pool.submit(run, "server", server)]
    for end in ends:
        end.result(PATIENCE)


def test_tensors_arrive_unaltered_and_in_order(pool: ThreadPoolExecutor) -> None:
    torch.manual_seed(3)
    sent = [torch.randn(rows, 16) for rows in (1, 7, 0, 200)]
    received: list[torch.Tensor] = []
    answers: list[torch.Tensor] = []

    def clinic(line: Line) -> None:
        for tensor in sent:
            line.send("histogram", tensor)
        answers.append(line.receive("answer"))

    def server(line: Line) -> None:
        received.extend(line.receive("histogram") for _ in sent)
        line.send("answer", torch.tensor([1, 2, 3]))

    both(pool, Two(), clinic, server)
    assert all(torch.equal(a, b) for a, b in zip(sent, received, strict=True))
    assert torch.equal(answers[0], torch.tensor([1, 2, 3]))


def test_a_tensor_of_many_chunks(pool: ThreadPoolExecutor) -> None:
    """19 MB: more chunks than may be on the way at once."""
    volume = torch.randint(0, 256, (19_000_000,), dtype=torch.uint8)
    received: list[torch.Tensor] = []
    both(pool, Two(), lambda line: line.send("volume", volume), lambda line: received.append(line.receive("volume")))
    assert torch.equal(received[0], volume)


def test_what_is_not_declared_is_not_sent(pool: ThreadPoolExecutor) -> None:
    """Refused at the sender's own door; the channel stays as it was, and the next good tensor arrives."""
    refused: list[str] = []

    def clinic(line: Line) -> None:
        wrong = {
            "histogram": [torch.ones(2, 15), torch.ones(16), torch.ones(2, 16, dtype=torch.float64)],
            "answer": [torch.tensor([1, 2, 3])],
            "nothing": [torch.ones(1)],
        }
        for name, tensors in wrong.items():
            for tensor in tensors:
                with pytest.raises(EgressRefused) as error:
                    line.send(name, tensor)
                refused.append(error.value.seen)
        with pytest.raises(EgressRefused, match="NaN"):
            line.send("histogram", torch.full((1, 16), float("nan")))
        line.send("histogram", torch.ones(2, 16))

    def server(line: Line) -> None:
        assert torch.equal(line.receive("histogram"), torch.ones(2, 16))

    both(pool, Two(), clinic, server)
    assert refused == [
        "exchange of histogram to server: shape [2, 15]",
        "exchange of histogram to server: shape [16]",
        "exchange of histogram to server: dtype float64",
        "exchange 'answer' goes from 'server'",
        "no exchange 'nothing'",
    ]


def test_the_receiver_checks_too(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender without a door of its own."""
    monkeypatch.setattr("splitsec.guard._complaint", _only_in(monkeypatch))

    def clinic(line: Line) -> None:
        line.send("histogram", torch.ones(2, 15))
        with pytest.raises(PeerLost, match="server"):
            line.receive("answer")

    def server(line: Line) -> None:
        with pytest.raises(PeerMisbehaved, match=r"clinic: exchange of histogram: shape \[2, 15\]") as error:
            line.receive("histogram")
        raise error.value

    with pytest.raises(PeerMisbehaved):
        both(pool, Two(), clinic, server)


def _only_in(patch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    import splitsec.guard

    real = splitsec.guard._complaint

    def complaint(lane: object, message: Message, last: object) -> str | None:
        name = threading.current_thread().name
        _doors.setdefault(name, 0)
        return None if getattr(lane, "peer", "") == "server" else real(lane, message, last)  # type: ignore[arg-type]

    return complaint


_doors: dict[str, int] = {}


def test_asking_for_what_one_sends(pool: ThreadPoolExecutor) -> None:
    def clinic(line: Line) -> None:
        with pytest.raises(UserError, match="exchange 'histogram' goes to 'server'"):
            line.receive("histogram")
        with pytest.raises(EgressRefused, match="no exchange 'histogramm'") as error:
            line.receive("histogramm")
        assert error.value.expected == "one of 'histogram', 'answer', 'volume'"

    both(pool, Two(), clinic, lambda line: None)


def test_a_sender_that_leaves_without_sending(pool: ThreadPoolExecutor) -> None:
    def server(line: Line) -> None:
        assert line.receive("histogram").shape == (1, 16)  # sent before it left
        with pytest.raises(PeerLost, match="clinic: left before the run was over"):
            line.receive("histogram")

    both(pool, Two(), lambda line: line.send("histogram", torch.ones(1, 16)), server)


def test_nobody_comes() -> None:
    two = Two(connect=0.5)
    with pytest.raises(PeerUnreachable, match=r"server: did not come up.* within 0\.5 s"):
        two.open("clinic")
    with pytest.raises(PeerUnreachable, match=r"clinic: did not come up.* within 0\.5 s"):
        two.open("server")


def test_another_key(pool: ThreadPoolExecutor) -> None:
    two = Two(connect=2)
    listening = pool.submit(two.open, "server")
    with pytest.raises(
        PeerRefusedUs, match="server: no session: handshake refused by the peer: its graph does not name"
    ):
        two.open("clinic", key=os.urandom(32))
    with pytest.raises(PeerUnreachable, match="clinic"):
        listening.result(PATIENCE)


def test_a_name_that_is_no_party() -> None:
    two = Two()
    with pytest.raises(UserError, match="no party 'clinc' in the graph") as error:
        open_line(two.graph, "clinc", private_key=two.keys["clinic"])
    assert error.value.expected == "one of 'clinic', 'server'"


def test_two_processes() -> None:
    """The same between this process and another one."""
    import subprocess
    import sys

    from tests.conftest import SOURCE

    two = Two(connect=90)
    program = (
        "import sys, torch\n"
        "from splitsec.graph import parse_graph\n"
        "from splitsec.messaging import open_line\n"
        "graph, key = parse_graph(sys.argv[1]), bytes.fromhex(sys.stdin.readline())\n"
        "with open_line(graph, 'server', private_key=key) as line:\n"
        "    line.send('answer', line.receive('histogram').sum(0)[:3].long())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, two.text],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        text=True,
    ) as other:
        assert other.stdin is not None
        other.stdin.write(two.keys["server"].hex() + "\n")
        other.stdin.flush()
        try:
            with two.open("clinic") as line:
                line.send("histogram", torch.arange(32.0).view(2, 16))
                assert line.receive("answer").tolist() == [16, 18, 20]
            assert other.wait(PATIENCE) == 0
        finally:
            other.kill()


def test_what_is_sent_is_in_the_journal_where_one_is_kept(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    two = Two()

    def send() -> None:
        with open_line(two.graph, "clinic", private_key=two.keys["clinic"], state=tmp_path / "clinic") as line:
            line.send("histogram", torch.ones(2, 16))

    sent = pool.submit(send)
    with two.open("server") as line:
        assert torch.equal(line.receive("histogram"), torch.ones(2, 16))
    sent.result(PATIENCE)
    journal = tmp_path / "clinic" / "journal.jsonl"
    _, entry = read(journal)
    assert (entry.values["cut"], entry.values["to"], entry.values["shapes"]) == ("histogram", "server", [[2, 16]])
    assert verify(journal) == []
