"""Who alters the wire costs the parties a connection, and that is all: nothing altered reaches an engine, what was
missing comes again over the next connection, and the weights are those of a training in peace, to the last bit.

Each attack strikes one frame, sealed or of a handshake, early or in the middle of training, in either direction; then
all of them come one after another; then one that never ends, which ends the run with an error that names the party.
Parties run in threads here, with real sockets between them, so that many attacks take seconds and everything that
passes their guards can be compared; two attacks on real processes stand at the end.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from splitsec.errors import PeerError, PeerLost, PeerMisbehaved, PeerRefusedUs, PeerUnreachable, SplitsecError
from splitsec.graph import load_graph
from splitsec.guard import Guard
from splitsec.identity import public_of, public_text
from splitsec.messages import Message, encode
from splitsec.party import Job, run_party
from splitsec.partyfile import load_party
from splitsec.transports.iothread import Received
from splitsec.transports.trouble import Trouble, TroubledProxy
from tests.conftest import PATIENCE, Shell, free_port, keyed, replaced, write_folder
from tests.wire.conftest import MORE, Attack, Attacker, Direction, Frame, Order, Strike, Tap

PAIR = """\
splitsec: 1
name: pair
parties:
  clinic: {}
  server: {listen: "tcp://127.0.0.1:HERE", address: "tcp://127.0.0.1:TAP"}
segments:
  stem: {at: clinic, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [8], dtype: float32}
labels:
  - {from: clinic, to: trunk}
training: {epochs: 4, batch_size: 6, seed: 11}
timeouts: {connect: 20, lost: 4, gone: 20}
"""

RING = """\
splitsec: 1
name: ring
parties:
  clinic-a: {}
  clinic-b: {}
  server: {listen: "tcp://127.0.0.1:HERE", address: "tcp://127.0.0.1:TAP"}
groups:
  clinics: {members: [clinic-a, clinic-b], schedule: round_robin}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [8], dtype: float32}
labels:
  - {from: clinics, to: trunk}
training: {epochs: 8, batch_size: 6, micro_batches: 2, seed: 11}
timeouts: {connect: 20, lost: 4, gone: 20}
"""


# --- attacks


def flip(bit: int) -> Attack:
    """Flip one bit: number ``bit`` of the frame, from its end if negative."""

    def attack(frame: Frame, strike: Strike) -> bool:
        altered = bytearray(frame)
        altered[bit // 8] ^= 1 << bit % 8
        strike.onwards(Frame(altered).packed())
        return True

    return attack


def drop(frame: Frame, strike: Strike) -> bool:
    return True


def repeat(frame: Frame, strike: Strike) -> bool:
    strike.onwards(frame.packed() + frame.packed())
    return True


def repeat_an_older_one(frame: Frame, strike: Strike) -> bool:
    """The one before, if that was sealed: to repeat the handshake's does no harm, and is allowed."""
    strike.onwards(frame.packed())
    if len(strike.before) < 2:
        return False
    strike.onwards(strike.before[-1].packed())
    return True


def swap(frame: Frame, strike: Strike) -> bool:
    """With the next one."""
    if not strike.held:
        strike.held.append(frame)
        return False
    strike.onwards(frame.packed() + strike.held.pop().packed())
    return True


def truncate(left_out: int) -> Attack:
    """Leave out the last ``left_out`` bytes of a frame that is well-formed for ZeroMQ."""

    def attack(frame: Frame, strike: Strike) -> bool:
        strike.onwards(Frame(frame[:-left_out]).packed())
        return True

    return attack


def empty(frame: Frame, strike: Strike) -> bool:
    strike.onwards(Frame().packed())
    return True


def lengthen(frame: Frame, strike: Strike) -> bool:
    strike.onwards(Frame(frame + b"\0").packed())
    return True


def invent(frame: Frame, strike: Strike) -> bool:
    """A frame of the right form, type and size, made up, and then the real one."""
    strike.onwards(Frame(frame[:1] + bytes(len(frame) - 1)).packed() + frame.packed())
    return True


def reflect(frame: Frame, strike: Strike) -> bool:
    """Give it back to whoever sent it, beside passing it on."""
    strike.back(frame.packed())
    strike.onwards(frame.packed())
    return True


def begin_anew(frame: Frame, strike: Strike) -> bool:
    """The first frame of the handshake once more, with one bit flipped."""
    first = (strike.before or [frame])[0]
    strike.onwards(Frame(first[:-1] + bytes([first[-1] ^ 1])).packed() + frame.packed())
    return True


def join_with_the_next(frame: Frame, strike: Strike) -> bool:
    """Tell ZeroMQ that this frame goes on in the next one."""
    strike.onwards(frame.packed(MORE))
    return True


def refuse(reason: int, digest: bytes = bytes(8)) -> Attack:
    """Forge a refusal in place of the answer; nobody can tell by its form."""

    def attack(frame: Frame, strike: Strike) -> bool:
        strike.onwards(Frame(bytes([2, reason]) + digest).packed())
        return True

    return attack


def cut_the_cable(frame: Frame, strike: Strike) -> bool:
    """In the middle of the frame."""
    strike.onwards(frame.packed()[: len(frame) // 2])
    raise ConnectionAbortedError


ATTACKS: dict[str, Attack] = {
    "flip a bit of the type": flip(1),
    "flip a bit of the sealed header": flip(8 * 9 + 3),
    "flip the last bit": flip(-1),
    "drop": drop,
    "repeat": repeat,
    "repeat an older one": repeat_an_older_one,
    "swap": swap,
    "truncate by a byte": truncate(1),
    "truncate by a tag": truncate(16),
    "empty": empty,
    "lengthen": lengthen,
    "invent": invent,
    "reflect": reflect,
    "begin anew": begin_anew,
    "join with the next": join_with_the_next,
    "cut the cable": cut_the_cable,
}

# --- parties in threads

RUN_SECONDS = 90.0
"""Within which a run must end, on a busy machine; the longest wait in it is 20: for a party that was told to go away."""


class Passed:
    """All messages that guards let out, and all that they let in, by (run, from, to, lane), as bytes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.out: dict[tuple[int, str, str, int], list[bytes]] = defaultdict(list)
        self.into: dict[tuple[int, str, str, int], list[bytes]] = defaultdict(list)
        release, admit = Guard.release, Guard.admit

        def seen_out(guard: Guard, lane: tuple[str, int], message: Message) -> None:
            header, body = encode(message)
            self.out[_run.number, guard.plan.party, *lane].append(header + b"".join(body))
            release(guard, lane, message)

        def seen_in(guard: Guard, arrived: Received) -> None:
            whole = arrived.header + bytes(arrived.body)
            admit(guard, arrived)
            self.into[_run.number, guard._names[arrived.peer], guard.plan.party, arrived.lane].append(whole)

        patch.setattr(Guard, "release", seen_out)
        patch.setattr(Guard, "admit", seen_in)

    def all_arrived_once(self, number: int) -> bool:
        """In a run that was not cut short."""
        lanes = [lane for lane in self.out if lane[0] == number]
        return len(lanes) >= 5 and all(self.into[lane] == self.out[lane] for lane in lanes)

    def all_that_arrived_was_sent(self, number: int) -> bool:
        """In any run."""
        lanes = [lane for lane in self.into if lane[0] == number]
        return all(self.into[lane] == self.out[lane][: len(self.into[lane])] for lane in lanes)


class _Run(threading.local):
    number = -1


_run = _Run()
"""Which of the runs side by side a thread belongs to."""


class Lines(logging.Handler):
    """What all runs log; a line that says whose connection it is about names a key, and no two runs share one."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append(record.getMessage())


_lines = Lines()


@dataclass(frozen=True)
class Run:
    """How a run of all parties ended."""

    ended: bool
    """In time."""
    failed: dict[str, SplitsecError]
    ends: dict[str, float]
    """When each party was done, monotonic seconds."""
    written: dict[str, bytes]
    """Content of each file."""
    said: dict[str, list[dict[str, Any]]]
    """What each party reported."""
    logged: list[str]
    """Lines about a connection of this run."""

    def broke(self, party: str) -> list[str]:
        """Why, each time that this party was told of an open connection that broke."""
        return [event["why"] for event in self.said[party] if event["event"] == "interrupted"]


def run_all(folder: Path, number: int, text: str, begin: Path | None = None) -> Run:
    """Run all parties of the graph ``text`` to their ends, each in a thread.  ``begin``: folder of weights to begin with:
    threads that run side by side would disturb each other where they draw some.
    """
    parties = [party for party in ("clinic", "clinic-a", "clinic-b", "server") if f"  {party}: {{" in text]
    keys = {party: os.urandom(32) for party in parties}
    public = {party: public_text(public_of(key)) for party, key in keys.items()}
    for party in parties:
        text = replaced(text, (f"  {party}: {{", f'  {party}: {{key: "{public[party]}", ')).replace(", }", "}")
    graph_file, out = folder / f"{number}.yaml", folder / f"out-{number}"
    graph_file.write_text(text)
    graph = load_graph(graph_file)
    failed: dict[str, SplitsecError] = {}
    said: dict[str, list[dict[str, Any]]] = {party: [] for party in parties}
    ends: dict[str, float] = {}

    def run(party: str) -> None:
        _run.number = number
        file = load_party(folder / "parties" / f"{party}.yaml")
        job = Job(out=out, weights=begin)
        try:
            run_party(graph, file, private_key=keys[party], job=job, report=said[party].append)
        except SplitsecError as error:
            failed[party] = error
        ends[party] = time.monotonic()

    threads = [threading.Thread(target=run, args=(party,), daemon=True) for party in parties]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, began + RUN_SECONDS - time.monotonic()))
    ended = not any(thread.is_alive() for thread in threads)
    written = {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*.*"))}
    logged = [line for line in _lines.all if any(key in line for key in public.values())]
    return Run(ended, failed, ends, written, said, logged)


def attacked(folder: Path, number: int, text: str, begin: Path | None, *orders: Order) -> tuple[Run, Attacker]:
    """Run all parties with an attacker between those who dial and the one that listens."""
    here = free_port()
    tap = Attacker(here, *orders)
    try:
        text = text.replace("HERE", str(here)).replace("TAP", str(tap.port))
        return run_all(folder, number, text, begin), tap
    finally:
        tap.close()


@pytest.fixture(scope="module")
def passed() -> Iterator[Passed]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logger = logging.getLogger("splitsec.transports")
    logger.addHandler(_lines)
    with pytest.MonkeyPatch.context() as patch:
        yield Passed(patch)
    logger.removeHandler(_lines)
    torch.set_num_threads(threads)


class Peace:
    """A folder, weights to begin with, and how a training ends that nobody disturbs."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder = folder
        self.text = text
        self.begin = folder / "out--2"
        """The first run imports and warms up everything, and makes weights to begin with."""
        first, _ = attacked(folder, -2, text, None)
        assert first.failed == {}
        self.run, self.tap = attacked(folder, -1, text, self.begin)
        assert self.run.failed == {}

    def attacked(self, number: int, *orders: Order, changes: Sequence[tuple[str, str]] = ()) -> tuple[Run, Attacker]:
        """The same with an attacker."""
        return attacked(self.folder, number, replaced(self.text, *changes), self.begin, *orders)


@pytest.fixture(scope="module")
def pair(passed: Passed, tmp_path_factory: pytest.TempPathFactory) -> Peace:
    return Peace(write_folder(tmp_path_factory.mktemp("pair") / "pair", PAIR, clinics=["clinic"]), PAIR)


def frames_of(recorded: bytes) -> list[Frame]:
    """Messages of one direction of a connection."""
    return []
