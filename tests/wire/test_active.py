"""Who alters the wire stops the training, and that is all: nothing altered reaches an engine, nothing is written.

Each attack strikes once, on one frame after the handshake, early or in the middle of training, in either direction.
Two parties run in threads here, with real sockets between them, so that many attacks take seconds and everything that
passes their guards can be compared; two attacks on real processes stand at the end.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from splitsec.errors import PeerError, PeerLost, PeerMisbehaved, PeerUnreachable, SplitsecError
from splitsec.graph import load_graph
from splitsec.guard import Guard
from splitsec.identity import public_of, public_text
from splitsec.messages import Message, encode
from splitsec.party import Job, run_party
from splitsec.partyfile import load_party
from splitsec.transports.iothread import Received
from tests.conftest import PATIENCE, Shell, free_port, keyed, replaced, write_folder
from tests.wire.conftest import MORE, Attack, Attacker, Direction, Frame, Strike, Tap

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
timeouts: {connect: 8, lost: 4}
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
    strike.onwards(Frame(strike.before[0][:-1] + bytes([strike.before[0][-1] ^ 1])).packed() + frame.packed())
    return True


def join_with_the_next(frame: Frame, strike: Strike) -> bool:
    """Tell ZeroMQ that this frame goes on in the next one."""
    strike.onwards(frame.packed(MORE))
    return True


def cut_the_cable(frame: Frame, strike: Strike) -> bool:
    """In the middle of the frame."""
    strike.onwards(frame.packed()[: len(frame) // 2])
    raise OSError


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

PLACES: list[tuple[Direction, int]] = [
    ("to the listener", 1),  # READY: the dialer's first sealed frame
    ("to the listener", 2),
    ("to the listener", 15),
    ("to the dialer", 1),  # the listener's first sealed frame
    ("to the dialer", 7),
]

# --- two parties in threads

RUN_SECONDS = 30.0
"""Within which a run must end; it takes at most 8: so long the listener waits for a dialer to prove itself."""


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


class _Run(threading.local):
    number = -1


_run = _Run()
"""Which of the runs side by side a thread belongs to."""


@dataclass(frozen=True)
class Run:
    """How a run of both parties ended: whether in time, with which errors, after which attack, and what was written."""

    ended: bool
    failed: dict[str, SplitsecError]
    struck: bool
    written: list[str]


def train(folder: Path, number: int, attack: Attack, direction: Direction, place: int) -> Run:
    """Run both parties to their ends, with an attacker between them."""
    here = free_port()
    tap = Attacker(here, attack, direction, place)
    keys = {"clinic": os.urandom(32), "server": os.urandom(32)}
    text = PAIR.replace("HERE", str(here)).replace("TAP", str(tap.port))
    text = text.replace("clinic: {}", f'clinic: {{key: "{public_text(public_of(keys["clinic"]))}"}}')
    text = text.replace("server: {", f'server: {{key: "{public_text(public_of(keys["server"]))}", ')
    graph_file, out = folder / f"{number}.yaml", folder / f"out-{number}"
    graph_file.write_text(text)
    graph = load_graph(graph_file)
    failed: dict[str, SplitsecError] = {}

    def run(party: str) -> None:
        _run.number = number
        file = load_party(folder / "parties" / f"{party}.yaml")
        try:
            run_party(graph, file, private_key=keys[party], job=Job(out=out))
        except SplitsecError as error:
            failed[party] = error

    threads = [threading.Thread(target=run, args=(party,), daemon=True) for party in keys]
    for thread in threads:
        thread.start()
    until = time.monotonic() + RUN_SECONDS
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    ended = not any(thread.is_alive() for thread in threads)
    tap.close()
    for thread in threads:
        thread.join(PATIENCE)
    written = sorted(file.name for file in out.rglob("*.*")) if out.exists() else []
    return Run(ended, failed, tap.struck.is_set(), written)


CASES = [(name, direction, place) for direction, place in PLACES for name in ATTACKS]
"""Those that take longest first: where the dialer never proves itself, the listener waits for it to the end."""


@pytest.fixture(scope="module")
def passed() -> Iterator[Passed]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        yield Passed(patch)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(passed: Passed, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Direction, int], Run]:
    """Every case once, many side by side: most of their time they wait for somebody who will not come."""
    folder = write_folder(tmp_path_factory.mktemp("attacks") / "pair", PAIR, clinics=["clinic"])
    assert train(folder, -1, ATTACKS["drop"], "to the dialer", 10**6).failed == {}  # so that all is imported and warm
    with ThreadPoolExecutor(32) as pool:
        ends = pool.map(lambda n: train(folder, n, ATTACKS[CASES[n][0]], *CASES[n][1:]), range(len(CASES)))
        return dict(zip(CASES, ends, strict=True))


@pytest.mark.parametrize("number", [0, 1])
def test_without_an_attack_all_is_well(number: int, tmp_path: Path, passed: Passed) -> None:
    """Here the attacker only looks.  So many frames pass that every attack below finds its own."""
    folder = write_folder(tmp_path / "pair", PAIR, clinics=["clinic"])
    direction: Direction = ("to the listener", "to the dialer")[number]
    seen: list[Frame] = []

    def look(frame: Frame, strike: Strike) -> bool:
        seen.append(frame)
        strike.onwards(frame.packed())
        return False

    run = train(folder, 1000 + number, look, direction, 0)
    assert run.ended and run.failed == {}
    assert run.written == ["stem.safetensors", "trunk.safetensors"]
    assert len(seen) > 2 * max(place for where, place in PLACES if where == direction)
    lanes = [lane for lane in passed.out if lane[0] == 1000 + number]
    assert len(lanes) >= 5  # both ways of the control lane and of the cut, and the labels
    assert all(passed.into[lane] == passed.out[lane] for lane in lanes)


@pytest.mark.parametrize(("name", "direction", "place"), CASES)
def test_an_attack_ends_the_training(
    name: str, direction: Direction, place: int, runs: dict[tuple[str, Direction, int], Run], passed: Passed
) -> None:
    run = runs[name, direction, place]
    assert run.struck
    assert run.ended, "both went on as if nothing had happened"
    assert run.written == []
    assert sorted(run.failed) == ["clinic", "server"]
    for party, error in run.failed.items():
        assert isinstance(error, PeerError) and error.exit_code == 4
        assert error.party == {"clinic": "server", "server": "clinic"}[party]
    victim = run.failed["server" if direction == "to the listener" else "clinic"]
    if name == "cut the cable":
        assert all(isinstance(error, PeerLost | PeerUnreachable) for error in run.failed.values())
    elif name == "reflect":
        assert any(isinstance(error, PeerMisbehaved) for error in run.failed.values())
    elif (direction, place) == ("to the listener", 1):
        # Before the dialer proved itself, the rubbish came from a stranger, and the listener waits for the clinic.
        assert isinstance(victim, PeerMisbehaved | PeerUnreachable)
    else:
        assert isinstance(victim, PeerMisbehaved)
    number = CASES.index((name, direction, place))
    for lane in [lane for lane in passed.into if lane[0] == number]:
        assert passed.into[lane] == passed.out[lane][: len(passed.into[lane])], f"altered on the way: {lane}"


# --- two parties in processes


@pytest.mark.parametrize("name", ["flip the last bit", "drop"])
def test_an_attack_on_processes(name: str, shell: Shell, tmp_path: Path, taps: list[Tap]) -> None:
    here = free_port()
    tap = Attacker(here, ATTACKS[name], "to the listener", 15)
    taps.append(tap)
    graph = PAIR.replace("HERE", str(here)).replace("TAP", str(tap.port))
    graph = replaced(graph, ("connect: 8", "connect: 90"), ("epochs: 4", "epochs: 1000000"))
    folder = keyed(shell, write_folder(tmp_path / "pair", graph, clinics=["clinic"]), "clinic", "server")
    out = tmp_path / "out"
    server, clinic = (
        shell.start("join", "--graph", folder / "graph.yaml", "--party", party, "--out", out)
        for party in ("server", "clinic")
    )
    assert tap.struck.wait(PATIENCE)
    for command in (server, clinic):
        end = command.end()
        assert end.seconds < 15  # `lost` is 4
        assert end.code == 4
        assert "Traceback" not in end.stderr
    assert "\nsplitsec: clinic: a record that is altered, or not the next one\n" in server.err.text
    assert "\nsplitsec: server: " in clinic.err.text
    key = load_graph(folder / "graph.yaml").parties["clinic"].key
    assert f"closed the channel with {key}: a record that is altered" in server.err.text
    assert not out.exists()
