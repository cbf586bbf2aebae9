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
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from splitsec.errors import PeerLost, PeerRefusedUs, PeerUnreachable, SplitsecError
from splitsec.graph import load_graph
from splitsec.guard import Guard
from splitsec.identity import public_of, public_text
from splitsec.messages import Message, encode
from splitsec.party import Job, run_party
from splitsec.partyfile import load_party
from splitsec.transports.circuit import Leg
from splitsec.transports.iothread import Received
from splitsec.transports.limits import CELL_HEAD, SMALL_CELL
from splitsec.transports.trouble import Trouble, TroubledProxy
from tests.conftest import Shell, change, free_port, keyed, replaced, write_folder
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
timeouts: {connect: 40, lost: 4, gone: 30}
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
timeouts: {connect: 40, lost: 4, gone: 30}
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


def flip_in_payload(frame: Frame, strike: Strike) -> bool:
    """Of the first frame that has a payload: in its ciphertext, where the tag alone can tell."""
    if len(frame) <= EMPTY:
        strike.onwards(frame.packed())
        return False
    return flip(8 * EMPTY + 5)(frame, strike)


EMPTY = 1 + 32 + 16
"""Bytes of a sealed frame without payload: type, chunk header, tag."""


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
    "flip a bit of the payload": flip_in_payload,
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
"""Within which a run must end, on a busy machine; the longest that it waits by itself is 10, for an answer."""


class Passed:
    """All messages that guards let out, and all that they let in, by (run, from, to, lane), as bytes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.out: dict[tuple[int, str, str, int], list[bytes]] = defaultdict(list)
        self.into: dict[tuple[int, str, str, int], list[bytes]] = defaultdict(list)
        release, admit = Guard.release, Guard.admit

        def seen_out(guard: Guard, lane: tuple[str, int], message: Message, *carried: Any) -> None:
            header, body = encode(message)
            self.out[_run.number, guard.plan.party, *lane].append(header + b"".join(body))
            release(guard, lane, message, *carried)

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
    logged: dict[str, str]
    """What the others logged about their connection with each party."""

    def broke(self, party: str) -> list[str]:
        """Why, each time that this party was told of an open connection that broke."""
        return [event["why"] for event in self.said[party] if event["event"] == "interrupted"]


def run_all(folder: Path, number: int, text: str, begin: Path | None = None) -> Run:
    """Run all parties of the graph ``text`` to their ends, each in a thread.

    ``begin``: folder of weights to begin with: threads side by side would disturb each other where they draw some.
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
    logged = {party: "\n".join(line for line in _lines.all if key in line) for party, key in public.items()}
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
    """A folder, weights to begin with, and how a training ends that nobody disturbs: with numbers -2 and -1."""

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


# --- one attack

PARTS_OF_A_HELLO: dict[str, Attack] = {
    "flip a bit of the magic": flip(3),
    "flip a bit of the version": flip(8 * 8),
    "flip a bit of the digest": flip(8 * 9 + 5),
    "flip a bit of the ephemeral key": flip(8 * 20),
}

REFUSALS: dict[str, Attack] = {f"refuse for reason {reason}": refuse(reason) for reason in range(1, 6)}
"""1 to 4 say that it makes no sense to go on; 5 that there is no room just now."""

PLACES: list[tuple[Direction, int]] = [
    ("to the listener", 1),  # READY: the dialer's first sealed frame
    ("to the listener", 2),
    ("to the listener", 15),
    ("to the dialer", 1),  # READY, the listener's first sealed frame
    ("to the dialer", 7),
]

Case = tuple[str, Direction, int]

SEALED: dict[Case, list[Order]] = {
    (name, direction, place): [Order(attack, direction, place)]
    for direction, place in PLACES
    for name, attack in ATTACKS.items()
}

HANDSHAKE: dict[Case, list[Order]] = {
    (name, direction, 0): [Order(attack, direction, 0)]
    for direction, attacks in (
        ("to the listener", {**ATTACKS, **PARTS_OF_A_HELLO}),
        ("to the dialer", {**ATTACKS, **REFUSALS}),
    )
    for name, attack in attacks.items()
    if attack is not repeat_an_older_one
}

NOBODY_CAN_KNOW: set[Case] = {
    ("flip a bit of the payload", "to the listener", 0),
    ("flip the last bit", "to the listener", 0),
    ("flip a bit of the version", "to the listener", 0),
    ("flip a bit of the ephemeral key", "to the listener", 0),
    ("begin anew", "to the listener", 0),
    *((f"refuse for reason {reason}", "to the dialer", 0) for reason in range(1, 5)),
}
"""There are no keys yet, and the first answer of all is a refusal, or what the listener says to a hello that was
altered: the dialer believes it.
"""


def and_cut(attack: Attack, frames: int = 4) -> Attack:
    """The same, and the cable is cut so many frames later, if nobody has hung up by then."""
    passed: list[Frame] = []
    done = False

    def both(frame: Frame, strike: Strike) -> bool:
        nonlocal done
        if not done:
            done = attack(frame, strike)
            return False
        strike.onwards(frame.packed())
        passed.append(frame)
        if len(passed) == frames:
            raise ConnectionAbortedError
        return False

    return both


LATER: dict[Case, Attack] = {
    (name, direction, place): attack
    for direction, place, attacks in (
        ("to the listener", 0, {**ATTACKS, **PARTS_OF_A_HELLO}),
        ("to the dialer", 0, {**ATTACKS, **REFUSALS}),
        ("to the listener", 1, ATTACKS),
        ("to the dialer", 1, ATTACKS),
        ("to the listener", 2, ATTACKS),
        ("to the dialer", 2, ATTACKS),
    )
    for name, attack in attacks.items()
    if (place, attack) != (0, repeat_an_older_one) and (place == 2 or attack not in (drop, swap))
}
"""All of them but for those that have a side wait for ten seconds; of handshakes, too, now that the channel has been
open before: and so no refusal is believed.
"""


LONGER = 20
"""Epochs of a training on which one attack follows another."""

CHAINS: list[list[Case]] = [random.Random(7).sample(list(LATER), len(LATER))[number::6] for number in range(6)]
"""Mixed, for a dialer waits longer with each try that fails."""


class Attacked(NamedTuple):
    """A run, its number, and who attacked it."""

    number: int
    run: Run
    tap: Attacker


Runs = dict[Case | int, Attacked]


@pytest.fixture(scope="module")
def runs(pair: Peace) -> Runs:
    """Every case, and every chain of them, once; several side by side: most of their time they wait for each other."""
    cut = Order(cut_the_cable, "to the listener", 15)
    chains = {
        number: [cut, *(Order(and_cut(LATER[case]), *case[1:]) for case in links)]
        for number, links in enumerate(CHAINS)
    }
    cases = HANDSHAKE | SEALED
    slow = [case for case in cases if case in NOBODY_CAN_KNOW or (case[0] in ("drop", "swap") and case[2] < 2)]
    orders: dict[Case | int, list[Order]] = {case: cases[case] for case in slow} | chains | cases
    patient = len(slow) + len(chains)
    changes = {case: [("connect: 40", "connect: 10")] for case in NOBODY_CAN_KNOW}

    def attacked(number: int, case: Case | int) -> Attacked:
        longer = [("epochs: 4", f"epochs: {LONGER}")] if isinstance(case, int) else []
        return Attacked(number, *pair.attacked(number, *orders[case], changes=changes.get(case, longer)))

    with ThreadPoolExecutor(patient) as waiting, ThreadPoolExecutor(4) as working:
        numbered = list(enumerate(orders))
        ends = [waiting.map(attacked, *zip(*numbered[:patient], strict=True))]
        ends += [working.map(attacked, *zip(*numbered[patient:], strict=True))]
        return dict(zip(orders, chain.from_iterable(ends), strict=True))


def test_without_an_attack_all_is_well(pair: Peace, passed: Passed) -> None:
    """So many frames pass, over one connection, that every attack below finds its own."""
    assert pair.run.ended
    assert sorted(pair.run.written) == ["clinic/stem.safetensors", "server/trunk.safetensors"]
    assert passed.all_arrived_once(-1)
    assert pair.tap.connections == 1
    for direction, place in PLACES:
        assert len(pair.tap.frames[1, direction]) > 2 * place
    assert pair.run.broke("clinic") == pair.run.broke("server") == []
    assert pair.run.logged == {"clinic": "", "server": ""}


def went_on(number: int, run: Run, peace: Peace, passed: Passed) -> None:
    """The training ended as if nothing had happened."""
    assert run.ended
    assert run.failed == {}
    assert run.written == peace.run.written
    assert passed.all_arrived_once(number)


@pytest.mark.threat("T10")
@pytest.mark.parametrize(("name", "direction", "place"), SEALED)
def test_an_attack_costs_a_connection_and_no_more(
    name: str,
    direction: Direction,
    place: int,
    runs: Runs,
    pair: Peace,
    passed: Passed,
) -> None:
    number, run, tap = runs[name, direction, place]
    assert tap.done == 1
    went_on(number, run, pair, passed)
    assert tap.connections >= 2
    told = {party: run.broke(party) for party in ("clinic", "server")}
    if place > 1:
        assert all(told.values())
    for party in ("clinic", "server"):
        assert len(told[party]) == sum(event["event"] == "resumed" for event in run.said[party])
    victim = "server" if (direction == "to the listener") != (name == "reflect") else "clinic"
    if name not in ("cut the cable", "join with the next") and place > 1:
        assert not set(told[victim]) <= {"the connection broke", "the peer has closed the channel (damaged)"}


@pytest.mark.parametrize(("name", "direction", "place"), [case for case in HANDSHAKE if case not in NOBODY_CAN_KNOW])
def test_an_attack_on_the_first_handshake_costs_a_try(
    name: str,
    direction: Direction,
    place: int,
    runs: Runs,
    pair: Peace,
    passed: Passed,
) -> None:
    number, run, tap = runs[name, direction, place]
    assert tap.done == 1
    went_on(number, run, pair, passed)


@pytest.mark.threat("T19")
@pytest.mark.parametrize(("name", "direction", "place"), sorted(NOBODY_CAN_KNOW))
def test_a_forged_refusal_before_the_first_session_is_believed(
    name: str,
    direction: Direction,
    place: int,
    runs: Runs,
    pair: Peace,
    passed: Passed,
) -> None:
    """The dialer gives up at once, the listener waits for it as long as the graph says; nothing has been exchanged."""
    number, run, tap = runs[name, direction, place]
    assert tap.done == 1
    assert run.ended
    assert run.written == {}
    assert sorted(run.failed) == ["clinic", "server"]
    assert isinstance(run.failed["clinic"], PeerRefusedUs) and run.failed["clinic"].party == "server"
    assert isinstance(run.failed["server"], PeerUnreachable) and run.failed["server"].party == "clinic"
    assert run.ends["clinic"] < tap.struck_at + 5
    assert not any(lane[0] == number for lane in passed.into)


# --- one attack after another


@pytest.fixture(scope="module")
def longer(pair: Peace) -> Run:
    """The longer training of a chain, in peace."""
    return pair.attacked(2000, changes=[("epochs: 4", f"epochs: {LONGER}")])[0]


@pytest.mark.threat("T10")
@pytest.mark.parametrize("number", range(len(CHAINS)))
def test_one_attack_after_another_on_one_training(
    number: int, runs: Runs, longer: Run, pair: Peace, passed: Passed
) -> None:
    """Every connection but the last is damaged, many of them while they are made."""
    chained = CHAINS[number]
    number, run, tap = runs[number]
    assert tap.done == len(chained) + 1, f"it ended after {chained[tap.done - 2]}"
    assert run.ended and run.failed == {}
    assert run.written == longer.written != pair.run.written
    assert passed.all_arrived_once(number)
    assert tap.connections > len(chained) + 1
    for party in ("clinic", "server"):
        assert len(run.broke(party)) > sum(place == 2 for _, _, place in chained)


# --- an attack that never ends

GONE = ("lost: 4, gone: 30", "lost: 1, gone: 2")

AT_ONCE = 15.0
"""Seconds that a busy machine may take for what is due at once."""


def from_frame(place: int, attack: Attack) -> Attack:
    """Nothing before this place of the first connection; everything after it."""
    begun = threading.Event()

    def later(frame: Frame, strike: Strike) -> bool:
        if len(strike.before) >= place:
            begun.set()
        if begun.is_set():
            return attack(frame, strike)
        strike.onwards(frame.packed())
        return False

    return later


ENDLESS: dict[str, list[Order]] = {
    "every chunk": [Order(flip(-1), None, 2, for_ever=True)],
    "every chunk to the listener": [Order(flip(-1), "to the listener", 2, for_ever=True)],
    "every chunk to the dialer": [Order(flip(-1), "to the dialer", 2, for_ever=True)],
    "every READY": [Order(drop, None, 1, for_ever=True)],
    "every hello": [Order(flip(-1), "to the listener", 0, for_ever=True)],
    "every answer": [Order(REFUSALS["refuse for reason 4"], "to the dialer", 0, for_ever=True)],
    "every connection": [Order(cut_the_cable, None, 0, for_ever=True)],
}
"""After a cut in the middle of training."""


@pytest.fixture(scope="module")
def endless(pair: Peace) -> dict[str, Attacked]:
    """Every one of them, side by side."""
    cut = Order(cut_the_cable, "to the listener", 15)
    orders = {name: [cut, *orders] for name, orders in ENDLESS.items()}
    orders["everything"] = [Order(from_frame(15, drop), "to the listener", 0, for_ever=True)]

    def attacked(number: int, name: str) -> Attacked:
        return Attacked(number, *pair.attacked(number, *orders[name], changes=[GONE]))

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(orders, pool.map(attacked, range(3000, 3000 + len(orders)), orders), strict=True))


@pytest.mark.threat("T19")
@pytest.mark.parametrize("name", [*ENDLESS, "everything"])
def test_an_attack_without_end_ends_the_run_in_the_time_that_the_graph_gives(
    name: str, endless: dict[str, Attacked], passed: Passed
) -> None:
    """Integrity is kept, availability cannot be; each party says which other one is not there any more."""
    number, run, tap = endless[name]
    assert run.ended
    assert run.written == {}
    assert passed.all_that_arrived_was_sent(number)
    assert sorted(run.failed) == ["clinic", "server"]
    for party, other in (("clinic", "server"), ("server", "clinic")):
        error = run.failed[party]
        assert isinstance(error, PeerLost) and error.exit_code == 4
        assert error.party == other
        assert run.broke(party)
        assert run.ends[party] - tap.struck_at < 2 * 2 + 1 + AT_ONCE  # twice where one direction got on first
    assert any(
        "was lost: the peer is gone: no connection that lasted for 2 s" in error.seen for error in run.failed.values()
    )


@pytest.mark.parametrize("direction", ["to the listener", "to the dialer"])
def test_a_training_that_is_cut_short_is_never_taken_for_whole(
    direction: Direction, pair: Peace, passed: Passed
) -> None:
    """The cable is cut for good before one of the last frames.  Who has made its last step keeps its weights, and they
    are right; who has not heard that all are done says whom it missed.
    """

    def attacked(number: int) -> Attacked:
        place = len(pair.tap.frames[1, direction]) - number % 100
        orders = [Order(cut_the_cable, direction, place), Order(cut_the_cable, None, 0, for_ever=True)]
        return Attacked(number, *pair.attacked(number, *orders, changes=[GONE]))

    first = 4000 if direction == "to the listener" else 4100
    with ThreadPoolExecutor(8) as pool:
        ends = list(pool.map(attacked, range(first + 1, first + 9)))
    cut = [end for end in ends if end.tap.done]
    assert len(cut) >= 4  # how many frames there are differs by a few: acknowledgements are sent where there is time
    for number, run, _ in cut:
        assert run.ended
        assert passed.all_that_arrived_was_sent(number)
        for party, file in (("clinic", "clinic/stem.safetensors"), ("server", "server/trunk.safetensors")):
            if party in run.failed:
                error = run.failed[party]
                assert isinstance(error, PeerLost) and error.party != party
                assert run.written.get(file) in (None, pair.run.written[file])
            else:
                assert run.written[file] == pair.run.written[file]
    assert any(run.failed for _, run, _ in cut)


# --- three parties, on a bad line


@pytest.fixture(scope="module")
def ring(passed: Passed, tmp_path_factory: pytest.TempPathFactory) -> Peace:
    """Two clinics that take turns, and hand the weights on through the server."""
    folder = write_folder(tmp_path_factory.mktemp("ring") / "ring", RING)
    for clinic in ("clinic-a", "clinic-b"):  # what is handed on is weights and the optimizer's memory
        change(folder / "parties" / f"{clinic}.yaml", ("lr: 0.1", "lr: 0.1, momentum: 0.9"))
    return Peace(folder, RING)


DROPS = Trouble(every=20_000, drop=1, delay=0, split=0)
EVERYTHING = Trouble(every=12_000, drop=1, delay=1, split=1, repeat=1, alter=1)
LINES = [(DROPS, 1), (DROPS, 2), (EVERYTHING, 3)]
"""What goes wrong, and the seed that says where: in handshakes as well, and in what the server passes on."""


@pytest.fixture(scope="module")
def bad_lines(ring: Peace) -> list[tuple[Run, TroubledProxy]]:
    """A run over each, side by side."""

    def run(line: Trouble, seed: int) -> tuple[Run, TroubledProxy]:
        here = free_port()
        with TroubledProxy(here, line, seed) as proxy:
            text = ring.text.replace("HERE", str(here)).replace("TAP", str(proxy.port))
            text += "circuits: {padding: padme}\n"  # a cell comes whole or not at all, and these lines break soon
            return run_all(ring.folder, 6000 + seed, text, ring.begin), proxy

    with ThreadPoolExecutor(len(LINES)) as pool:
        return list(pool.map(run, *zip(*LINES, strict=True)))


@pytest.mark.parametrize("line", range(len(LINES)))
def test_a_line_that_breaks_again_and_again_changes_no_bit(
    line: int, bad_lines: list[tuple[Run, TroubledProxy]], ring: Peace, passed: Passed
) -> None:
    (run, proxy), number = bad_lines[line], 6000 + LINES[line][1]
    assert len(ring.run.written) == 3
    went_on(number, run, ring, passed)
    handed_on = [lane for lane in passed.into if lane[:3] == (number, "clinic-a", "clinic-b")]
    assert any(len(passed.into[lane]) > 5 for lane in handed_on)
    assert proxy.connections >= 2 + 4
    assert sum(proxy.mishaps[kind] for kind in ("drop", "repeat", "alter")) >= 4
    assert sum(len(run.broke(party)) for party in run.said) >= 2 * 4


# --- who passes circuits on

Onwards = Callable[[bytearray, int], None]
"""``onwards(block, used)``: the cell goes on; ``block`` is its frame, ``used`` what is meant of it."""


def passing(patch: pytest.MonkeyPatch, meddle: Callable[[bytearray, int, int, Onwards], None]) -> None:
    """Have the server treat cells that it passes on so: their frames, and bytes of what is meant, and of the cell."""
    real = Leg.wait

    def wait(leg: Leg, block: bytearray, used: int, size: int, came_by: Leg | None) -> None:
        if came_by is None:  # its own word
            real(leg, block, used, size, came_by)
            return
        meddle(block, used, size, lambda other, meant: real(leg, other, meant, size, came_by))

    patch.setattr(Leg, "wait", wait)


def altered(block: bytearray, at: int) -> bytearray:
    block[at] ^= 1
    return block


MEDDLE: dict[str, Callable[[bytearray, int, Onwards], object]] = {
    "drop": lambda block, used, onwards: None,
    "alter": lambda block, used, onwards: onwards(altered(block, CELL_HEAD + used - 1), used),
    "repeat": lambda block, used, onwards: (onwards(bytearray(block), used), onwards(block, used)),
    "truncate": lambda block, used, onwards: onwards(block, used - 1),
}


@pytest.mark.parametrize("how", MEDDLE)
def test_a_relay_that_meddles_changes_no_bit(
    how: str, ring: Peace, passed: Passed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so with the weights themselves, each sixth time that it has some in hand."""
    number = 7000 + list(MEDDLE).index(how)
    seen: list[int] = []

    def meddle(block: bytearray, used: int, size: int, onwards: Onwards) -> None:
        if size > SMALL_CELL:  # a part of a message
            seen.append(size)
            if len(seen) % 6 == 1:
                MEDDLE[how](block, used, onwards)
                return
        onwards(block, used)

    passing(monkeypatch, meddle)
    run, tap = ring.attacked(number)
    went_on(number, run, ring, passed)
    assert len(seen) > 15  # weights are handed on after each turn, and again where they did not arrive
    assert tap.connections == 2  # its own connections are as they were
    for party, other in (("clinic-a", "clinic-b"), ("clinic-b", "clinic-a")):
        assert any(event["event"] == "interrupted" and event["peer"] == other for event in run.said[party])


def test_a_relay_that_stops_ends_the_run(ring: Peace, passed: Passed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own connections are alive all the while."""
    stopped: list[float] = []
    seen: list[int] = []

    def meddle(block: bytearray, used: int, size: int, onwards: Onwards) -> None:
        seen.append(size)
        if len(seen) < 15:
            onwards(block, used)
        else:
            stopped.append(time.monotonic())

    passing(monkeypatch, meddle)
    run, _ = ring.attacked(7100, changes=[GONE])
    assert run.ended
    assert run.written == {}
    assert passed.all_that_arrived_was_sent(7100)
    assert sorted(run.failed) == ["clinic-a", "clinic-b", "server"]
    for party, error in run.failed.items():
        assert isinstance(error, PeerLost) and error.exit_code == 4
        assert run.ends[party] - stopped[0] < 1 + 2 + AT_ONCE
    gone = [
        error for error in run.failed.values() if "the peer is gone: no connection that lasted for 2 s" in error.seen
    ]
    assert gone and all(error.party in ("clinic-a", "clinic-b") for error in gone)


# --- two parties in processes


def test_attacks_on_processes(shell: Shell, tmp_path: Path, pair: Peace, taps: list[Tap]) -> None:
    """Both operators read that the connection broke and was made again; the weights are those of a run in peace."""
    here = free_port()
    tap = Attacker(here, *(Order(attack, "to the listener", 15) for attack in (flip(-1), drop)))
    taps.append(tap)
    graph = replaced(PAIR.replace("HERE", str(here)).replace("TAP", str(tap.port)), ("connect: 40", "connect: 90"))
    folder = keyed(shell, write_folder(tmp_path / "pair", graph, clinics=["clinic"]), "clinic", "server")
    out = tmp_path / "out"
    commands = {
        party: shell.start(
            "join",
            "--graph",
            folder / "graph.yaml",
            "--party",
            party,
            "--weights",
            pair.begin,
            "--out",
            out,
            OMP_NUM_THREADS="1",
        )
        for party in ("server", "clinic")
    }
    for command in commands.values():
        end = command.end()
        assert end.code == 0, end.stderr
        assert "Traceback" not in end.stderr
    assert tap.done == 2
    assert tap.connections == 3
    server, clinic = (" ".join(commands[party].err.text.split()) for party in ("server", "clinic"))
    damaged = "a record that is altered, or not the next one"
    assert f"server: the connection with clinic broke ({damaged}); nothing is lost, trying again for 30 s" in server
    assert server.count("server: connected with clinic again") == 2
    assert "clinic: the connection with server broke (" in clinic
    assert clinic.count("clinic: connected with server again") == 2
    assert {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*.*")} == pair.run.written
