"""``splitsec bench linking``: what the far end of an anonymous group can tell about who speaks, and what a relay can.

Here: real trainings whose server (and relays) write down everything that their processes see, and classifiers that
learn from that which clinic had which turn.  Not here: what is done about it (``splitsec.turns``, ``party``,
``transports``).  docs/protocol.md, section 7, says what should hold.

The server is an attacker who keeps to the protocol: it records, and it is told afterwards who had the earlier turns.
Of every turn it keeps all frames, cells, headers, keys and messages with their times; all of it but the tensors' own
numbers becomes features, without asking what may be of use.  So a leak that nobody thought of is found as well, if it
is one that a forest of decision trees can see.

A recorded process is the ordinary one with notes taken at the places where frames, cells, sessions and messages pass.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import random
import sys
import tempfile
import time
import warnings
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from splitsec.partyfile import load_folder
from splitsec.simulation import Processes, Watch, _Running
from splitsec.transports import base, iothread, session, sockets, wire
from splitsec.transports.circuit import Leg, Relay
from splitsec.transports.limits import SMALL_CELL

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Report",
    "Run",
    "Score",
    "Setting",
    "Turn",
    "add_arguments",
    "auc",
    "bench_linking",
    "circuits_seen",
    "guess",
    "guess_circuit",
    "guess_with_first_relay",
    "main",
    "record",
    "run",
    "turns_seen",
    "wilson",
]

CLINICS: Final = tuple(f"clinic-{number}" for number in range(1, 6))
SAMPLES: Final = (40, 44, 48, 52, 56)
"""Of each clinic, all of one distribution."""
COVER: Final = 0.02
"""Seconds between two cells."""
LAG: Final = 0.01
"""Seconds by which each clinic's way to the first relay is longer than the one's before it, where distance is tried,
and a fifth of it: cover can hide distance only where it is longer than the longest way there and back and a step."""
SEED: Final = 5

FOLDER: Final = "SPLITSEC_LINKING"
"""Environment variable of recorded processes: the folder for what they see."""
LAGS: Final = "SPLITSEC_LINKING_LAGS"
"""Environment variable of lagging processes: JSON, name to seconds."""


# --- what is run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One training.  ``cover``: seconds.  ``apart``: how far the clinics' distributions lie from each other.  ``lag``:
    seconds by which each clinic is farther away than the one before.  ``width``: of what leaves the clinics.
    ``samples``: of each clinic, who are as many.  ``relays``: in a circuit.  ``hand_on``: weights go through relays.
    """

    anonymous: bool = True
    cover: float | None = COVER
    epochs: int = 24
    apart: float = 0.0
    lag: float = 0.0
    width: int = 4
    samples: tuple[int, ...] = SAMPLES
    batch: int = 10
    relays: int = 2
    padding: str = "fixed"
    hand_on: bool = False

    @property
    def clinics(self) -> tuple[str, ...]:
        return CLINICS[: len(self.samples)]

    @property
    def via(self) -> tuple[str, ...]:
        return tuple(f"relay-{number}" for number in range(1, self.relays + 1))

    def graph(self) -> str:
        """The graph file."""
        names = ", ".join(self.clinics)
        via = ", ".join(self.via)
        listening = (*(() if self.hand_on else self.clinics), *self.via)
        parties = [
            f'  {name}: {{listen: "tcp://127.0.0.1:{7400 + place}"}}' for place, name in enumerate(listening)
        ]  # a simulation takes free ports in place of these
        parties += [f"  {name}: {{}}" for name in (*self.clinics, "server") if name not in listening]
        cover = "" if self.cover is None else f", cover: {self.cover}"
        hand_on = f"  - {{from: clinics, to: clinics, via: [{via}]}}\n" if self.hand_on else ""
        return (
            "splitsec: 1\nname: linking\nparties:\n" + "\n".join(parties) + "\n"
            f"groups:\n  clinics: {{members: [{names}], schedule: round_robin}}\n"
            "segments:\n  stem: {at: clinics, data: x}\n  trunk: {at: server, loss: cross_entropy}\n"
            f"cuts:\n  - {{from: stem, to: trunk, shape: [{self.width}], dtype: float32"
            + (", anonymous: true" if self.anonymous else "")
            + "}\nlabels:\n  - {from: clinics, to: trunk}\n"
            f"routes:\n  - {{from: clinics, to: server, via: [{via}]}}\n{hand_on}"
            f"circuits: {{padding: {self.padding}{cover}}}\n"
            f"training: {{epochs: {self.epochs}, batch_size: {self.batch}, seed: {SEED}}}\n"
            "timeouts: {connect: 120, lost: 20, gone: 60}\n"
        )

    def write(self, folder: Path) -> Path:
        """The folder that is simulated: graph, party files, and the code that they name."""
        parties = folder / "parties"
        parties.mkdir(parents=True)
        (folder / "graph.yaml").write_text(self.graph())
        (parties / "models.py").write_text(_MODELS.replace("WIDTH", str(self.width)))
        (parties / "data.py").write_text(_DATA.replace("APART", str(self.apart)))
        (parties / "server.yaml").write_text(_PARTY.format(name="server", segment="trunk"))
        for site, count in enumerate(self.samples):
            text = _PARTY.format(name=self.clinics[site], segment="stem")
            text += f'data: {{train: "data:train", args: {{site: {site}, count: {count}}}}}\n'
            (parties / f"{self.clinics[site]}.yaml").write_text(text)
        return folder


_MODELS: Final = """\
from torch import nn


def stem():
    return nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh())


def trunk():
    return nn.Linear(WIDTH, 2)
"""

_DATA: Final = """\
import torch


def train(site, count):
    generator = torch.Generator().manual_seed(1000 + site)
    x = torch.randn(count, 8, generator=generator) + APART * site
    return {"x": x, "y": (x[:, 0] + 0.5 * torch.randn(count, generator=generator) > APART * site).long()}
"""

_PARTY: Final = """\
party: {name}
segments:
  {segment}:
    model: "models:{segment}"
    optimizer: {{name: sgd, lr: 0.05}}
threads: 1
"""


@dataclass(frozen=True)
class Run:
    """What was recorded of one training: notes by process, in order; who had which turn; names by public key."""

    setting: Setting
    notes: Mapping[str, list[dict[str, Any]]]
    truth: Mapping[tuple[int, int], str]
    """Epoch and stream to the clinic, as the clinics tell."""
    names: Mapping[str, str]
    seconds: float


class _Recorded(Processes):
    """A simulation in which some processes take notes."""

    recorded: tuple[str, ...] = ()

    def _spawn(self, party: _Running, threads: int = 1) -> None:
        if party.name in self.recorded:
            party.module = "splitsec.bench.linking"
        super()._spawn(party, threads)


def record(setting: Setting) -> Run:
    """Train once, with notes of the server and of all relays."""
    truth: dict[tuple[int, int], str] = {}

    def watch(party: str, event: dict[str, Any]) -> None:
        if event["event"] == "turn" and party in setting.clinics and event["phase"] == "train":
            (stream,) = event["streams"]
            if setting.anonymous or CLINICS.index(party) == stream:
                truth[event["epoch"], stream] = party

    job = {"action": "train", "out": None, "weights": None, "split": "train", "trace": None, "state": None}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="splitsec-linking-") as scratch:
        folder = load_folder(setting.write(Path(scratch) / "linking"))
        seen = Path(scratch) / "seen"
        seen.mkdir()
        lags = {name: setting.lag * place for place, name in enumerate(setting.clinics)} if setting.lag else {}
        given = {FOLDER: str(seen), LAGS: json.dumps(lags)}
        before = {name: os.environ.get(name) for name in given}
        os.environ.update(given)
        try:
            processes = _recorded(folder, job, watch, ("server", *setting.via, *lags))
            with processes:
                processes.follow()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        notes = {
            file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in seen.glob("*.jsonl")
        }
    keys = {name: party.key for name, party in processes.graph.parties.items()}
    names = {base64.b64decode(key.removeprefix("x25519:")).hex(): name for name, key in keys.items() if key}
    return Run(setting, notes, truth, names, time.monotonic() - began)


def _recorded(folder: Any, job: Mapping[str, Any], watch: Watch, who: tuple[str, ...]) -> _Recorded:
    processes = _Recorded(folder, job, watch)
    processes.recorded = who
    return processes


# --- what is written down ---------------------------------------------------------------------------------------------


class _Notes:
    """The notes of one process: a JSON object a line, each with its time."""

    def __init__(self, file: Path, *, at_once: bool) -> None:
        self._out = file.open("w", encoding="utf-8", buffering=1 if at_once else 1 << 20)
        self._sessions: dict[int, tuple[object, int]] = {}
        self.at: tuple[int, int | None] = (-1, None)
        """Session and circuit that the I/O thread is busy with."""
        self.told: deque[tuple[int, int | None]] = deque()
        """Where the messages came from that the computing side has not looked at yet."""

    def take(self, what: str, at: tuple[int, int | None] | None = None, /, **facts: Any) -> None:
        where, circuit = self.at if at is None else at
        entry = {"t": time.monotonic(), "what": what, "session": where, "circuit": circuit, **facts}
        self._out.write(json.dumps(entry) + "\n")
        if what == "turn over":
            self._out.flush()  # who is done may be killed

    def of(self, line: Any) -> tuple[int, int | None]:
        """A line's session, counted, and the number of its circuit on our link."""
        _, number = self._sessions.setdefault(id(line.session), (line.session, len(self._sessions)))
        return number, line.circuit.back.number if isinstance(line.circuit, Relay) else None

    def close(self) -> None:
        self._out.close()


def _note_links(notes: _Notes) -> None:
    """Frames at the sockets, cells, circuits: what a relay sees, and every other party, too."""
    receive, send = sockets._SocketPort.receive, sockets._SocketPort.send
    cell_, extend_, head = iothread._Driver._cell, iothread._Driver._extend, Leg.head

    def noted_receive(self: Any) -> base.Event | None:
        event = receive(self)
        if isinstance(event, base.Arrival):
            notes.take("frame in", (-1, None), size=len(event.frame), type=event.frame[0])
        return event

    def noted_send(self: Any, connection: Hashable, frame: Any) -> bool:
        size, first = len(frame), memoryview(frame)[0]
        taken = send(self, connection, frame)
        if taken:
            notes.take("frame out", (-1, None), size=size, type=first)
        return taken

    def noted_cell(self: Any, line: Any, cell: Any) -> None:
        kind, lane, _, value, used, number, _ = cell.header
        link = None if line.known is None else line.known.peer.key.hex()
        facts = {"number": number, "size": cell.size, "value": value, "used": used, "lane": lane}
        notes.take(f"cell {kind.name}", (-1, number), link=link, **facts)
        cell_(self, line, cell)

    def noted_extend(self: Any, relay: Any, key: bytes, message: bytes) -> None:
        place = self._legs.get(relay.back)
        extend_(self, relay, key, message)
        if relay.front is not None and place is not None:
            came = place.link.peer.key.hex()
            notes.take("extend", (-1, relay.back.number), came=came, to=key.hex(), front=relay.front.number)

    def noted_head(self: Any, kind: Any, used: int = 0, *why: Any) -> Any:
        header = head(self, kind, used, *why)
        notes.take(f"own {kind.name}", (-1, self.number), value=header.value, used=used)
        return header

    for owner, name, noted in (
        (sockets._SocketPort, "receive", noted_receive),
        (sockets._SocketPort, "send", noted_send),
        (iothread._Driver, "_cell", noted_cell),
        (iothread._Driver, "_extend", noted_extend),
        (Leg, "head", noted_head),
    ):
        setattr(owner, name, noted)


def _note_sessions(notes: _Notes) -> None:
    """What comes out of circuits: sessions, their keys and headers, and messages in the order in which they come."""
    arrived, inside, opened = iothread._Driver._arrived, iothread._Driver._inside, iothread._Driver._opened
    tell, unpack_header, unpack_ready = iothread.IOThread._tell, wire.unpack_chunk_header, wire.unpack_ready

    def noted_arrived(self: Any, line: Any, frame: memoryview) -> None:
        before, notes.at = notes.at, notes.of(line)
        try:
            if line.circuit is not None:
                clear = line.session.handshake_hash is None
                notes.take("inside", size=len(frame), type=frame[0], bytes=bytes(frame).hex() if clear else "")
            arrived(self, line, frame)
            if line.circuit is not None and clear and line.session.handshake_hash is not None:
                peer = line.session.peer
                notes.take("keys", peer=peer.hex() if peer else "", hash=line.session.handshake_hash.hex())
        finally:
            notes.at = before

    def noted_inside(self: Any, end: Any, frame: memoryview) -> None:
        notes.take("inside any", (-1, end.back.number if isinstance(end, Relay) else None), size=len(frame))
        inside(self, end, frame)

    def noted_opened(self: Any, line: Any, peer: bytes, ready: Any) -> None:
        notes.take("opened", notes.of(line), peer=peer.hex(), run=ready.run.hex(), known=ready.known.hex())
        opened(self, line, peer, ready)

    def noted_tell(self: Any, event: Any) -> None:
        if isinstance(event, iothread.Received):
            notes.told.append(notes.at)
        else:
            notes.take(f"event {type(event).__name__}")
        tell(self, event)

    def noted_header(head: Any) -> Any:
        header = unpack_header(head)
        kind, lane, header_size, value, payload_size, number, received = header
        if notes.at[1] is not None:
            facts = {"lane": lane, "header_size": header_size, "value": value, "payload_size": payload_size}
            notes.take(f"header {kind.name}", **facts, number=number, received=received)
        return header

    def noted_ready(*given: Any) -> Any:
        ready = unpack_ready(*given)
        if notes.at[1] is not None:
            facts = {"run": ready.run.hex(), "known": ready.known.hex()}
            notes.take("ready", **facts, received=ready.received, granted=ready.granted)
        return ready

    for owner, name, noted in (
        (iothread._Driver, "_arrived", noted_arrived),
        (iothread._Driver, "_inside", noted_inside),
        (iothread._Driver, "_opened", noted_opened),
        (iothread.IOThread, "_tell", noted_tell),
        (session, "unpack_chunk_header", noted_header),
        (session, "unpack_ready", noted_ready),
    ):
        setattr(owner, name, noted)


def _note_messages(notes: _Notes) -> None:
    """Messages as the party has them: key, facts, layout, and a few sums of their numbers, which stand apart."""
    from splitsec.guard import Guard
    from splitsec.messages import decode
    from splitsec.party import Party

    admit, release, take_turn = Guard._admit, Guard.release, Party._take_turn

    def noted_admit(self: Any, arrived: Any) -> None:
        declared = self.plan.lanes_in.get((self._names[arrived.peer], arrived.lane))
        message = decode(arrived.header, arrived.body)
        tensors = [
            [name, str(one.dtype), list(one.shape), list(one.stride()), one.storage_offset()]
            for name, one in message.tensors.items()
        ]
        data: list[float] = []
        for one in message.tensors.values():
            flat = one.double()
            data += [float(flat.mean()), float(flat.std()) if flat.numel() > 1 else 0.0]
            if flat.dim() == 2:
                data += [*flat.mean(0).tolist()[:8], *flat.std(0).tolist()[:8]]
        facts = {"lane": arrived.lane, "header": arrived.header.hex(), "header_size": len(arrived.header)}
        notes.take(
            f"message {'?' if declared is None else declared.kind}",
            notes.told.popleft(),
            **facts,
            body_size=len(arrived.body),
            key=list(message.key),
            facts=repr(dict(message.facts)),
            tensors=json.dumps(tensors),
            data=data,
        )
        admit(self, arrived)

    def noted_release(self: Any, lane: Any, message: Any, *rest: Any) -> None:
        notes.take(f"answer {message.kind}", (-1, None), key=list(message.key))
        release(self, lane, message, *rest)

    def noted_turn(self: Any, engine: Any, turn: Any, number: int, update: int) -> tuple[int, int]:
        facts = {"phase": turn.phase, "epoch": turn.epoch, "streams": list(turn.streams)}
        notes.take("turn", (-1, None), **facts, step=number)
        result: tuple[int, int] = take_turn(self, engine, turn, number, update)
        notes.take("turn over", (-1, None), **facts, step=result[0])
        return result

    for owner, name, noted in (
        (Guard, "_admit", noted_admit),
        (Guard, "release", noted_release),
        (Party, "_take_turn", noted_turn),
    ):
        setattr(owner, name, noted)


class _Far(base.Port):
    """A port at the end of a longer way: everything comes and goes ``lag`` seconds later."""

    def __init__(self, port: base.Port, lag: float) -> None:
        self.endpoint = port.endpoint
        self._port = port
        self._lag = lag
        self._coming: deque[tuple[float, base.Event]] = deque()
        self._going: deque[tuple[float, Hashable, bytes]] = deque()

    def descriptors(self) -> Sequence[int]:
        return self._port.descriptors()

    def receive(self) -> base.Event | None:
        now = time.monotonic()
        self._pass_on(now)
        while (event := self._port.receive()) is not None:
            if isinstance(event, base.Arrival):
                event = base.Arrival(event.connection, memoryview(bytearray(event.frame)))
            self._coming.append((now + self._lag, event))
        return self._coming.popleft()[1] if self._coming and self._coming[0][0] <= now else None

    def send(self, connection: Hashable, frame: bytes | bytearray | memoryview) -> bool:
        self._going.append((time.monotonic() + self._lag, connection, bytes(frame)))
        return True

    def _pass_on(self, now: float) -> None:
        while self._going and self._going[0][0] <= now and self._port.send(*self._going[0][1:]):
            self._going.popleft()

    def trust(self, connection: Hashable) -> None:
        self._port.trust(connection)

    def hang_up(self, connection: Hashable) -> None:
        self._pass_on(math.inf)
        self._port.hang_up(connection)

    def deadline(self) -> float | None:
        below = self._port.deadline()
        due = [] if below is None else [below]
        due += [self._coming[0][0]] if self._coming else []
        due += [self._going[0][0]] if self._going else []
        return min(due, default=None)

    def tick(self, now: float) -> None:
        self._port.tick(now)
        self._pass_on(now)

    def close(self, linger: float) -> None:
        self._pass_on(math.inf)
        self._port.close(linger)


def _lag(seconds: float) -> None:
    dial = sockets.SocketTransport.dial
    sockets.SocketTransport.dial = lambda self, address: _Far(dial(self, address), seconds)  # type: ignore[method-assign]


def _be_recorded(name: str) -> int:
    """The ordinary process of the party ``name``, with notes."""
    lag = json.loads(os.environ.get(LAGS, "{}")).get(name, 0.0)
    if lag:
        _lag(lag)
    if name in CLINICS:
        from splitsec import process

        return process.main()
    notes = _Notes(Path(os.environ[FOLDER]) / f"{name}.jsonl", at_once=name != "server")
    _note_links(notes)
    if name != "server":
        from splitsec import relay

        return relay.main()
    _note_sessions(notes)
    _note_messages(notes)
    from splitsec import process

    try:
        return process.main()
    finally:
        notes.close()


# --- what is made of it -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One turn as the server saw it.  ``data``: of the tensors' numbers, apart from all other features."""

    run: int
    epoch: int
    stream: int
    clinic: str
    began: float
    features: Mapping[str, float]
    data: Mapping[str, float] = field(default_factory=dict)


def turns_seen(runs: Sequence[Run]) -> list[Turn]:
    """All turns of all runs, as the server saw them."""
    return [turn for number, run in enumerate(runs) for turn in _turns_of(run, number)]


def _turns_of(run: Run, number: int) -> list[Turn]:
    notes = run.notes["server"]
    begins = [note for note in notes if note["what"] == "turn" and note["phase"] == "train"]
    ends = [note for note in notes if note["what"] == "turn over" and note["phase"] == "train"]
    first_step = [note["step"] for note in begins]
    spoken: dict[int, tuple[int, int]] = {}  # turn to session and circuit
    for note in notes:
        if note["what"] == "message activation":
            place = sum(step <= note["key"][0] for step in first_step) - 1
            spoken[place] = (note["session"], note["circuit"])
    by_session: dict[int, list[int]] = defaultdict(list)
    for place, (where, _) in sorted(spoken.items()):
        by_session[where].append(place)
    answers = [note for note in notes if note["what"].startswith("answer")]
    found = []
    for place, (where, circuit) in sorted(spoken.items()):
        same = by_session[where]
        since = -math.inf if place == same[0] else begins[place]["t"]
        until = math.inf if place == same[-1] else begins[same[same.index(place) + 1]]["t"]
        mine = [
            note
            for note in notes
            if since <= note["t"] < until and (note["session"] == where or note["circuit"] == circuit)
        ]
        first, last = mine[0]["t"], mine[-1]["t"]
        links = [note for note in notes if note["what"].startswith("frame") and first <= note["t"] <= last]
        told = [note for note in answers if begins[place]["t"] <= note["t"] <= ends[place]["t"]]
        epoch, stream = begins[place]["epoch"], begins[place]["streams"][0]
        features = _features([*mine, *links, *told], first)
        features |= _waits(mine, told)
        features |= {"place epoch": epoch, "place stream": stream, "time begin": first - begins[0]["t"]}
        features["time of turn"] = ends[place]["t"] - begins[place]["t"]
        features["time since the last"] = first - ends[place - 1]["t"] if place else 0.0
        before = run.truth.get((epoch - 1, stream)), run.truth.get((epoch - 1, len(run.setting.samples) - 1))
        for what, whose in zip(("same place", "last before" if not stream else "none"), before, strict=True):
            for clinic in run.setting.clinics:
                features[f"place {what} {clinic}"] = float(whose == clinic)
        data = _data([note for note in mine if note["what"].startswith("message")])
        found.append(Turn(number, epoch, stream, run.truth[epoch, stream], first, features, data))
    return found


def _features(notes: Iterable[Mapping[str, Any]], first: float) -> dict[str, float]:
    """Of notes of every sort: number, times, and everything that stands in them."""
    by_sort: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for note in notes:
        by_sort[note["what"]].append(note)
    made: dict[str, float] = {}
    for sort, ones in by_sort.items():
        times = sorted(note["t"] for note in ones)
        gaps = sorted(later - earlier for earlier, later in pairwise(times))
        made[f"size {sort} count"] = len(ones)
        made[f"time {sort} first"] = times[0] - first
        made[f"time {sort} last"] = times[-1] - first
        for name, value in _spread(gaps).items():
            made[f"time {sort} gap {name}"] = value
        for fact in ones[0].keys() - {"t", "what", "data", "session", "circuit"}:
            values = [number for note in ones for number in _numbers(note[fact])]
            group = "key" if isinstance(ones[0][fact], str) or fact == "number" else "size"
            if values:
                made[f"{group} {sort} {fact} first"], made[f"{group} {sort} {fact} last"] = values[0], values[-1]
                for name, value in _spread(sorted(values)).items():
                    made[f"{group} {sort} {fact} {name}"] = value
        made[f"key {sort} circuit"] = _numbers(ones[0]["circuit"])[0]
        made[f"key {sort} session"] = ones[0]["session"]
    return made


def _numbers(value: Any) -> list[float]:
    """A value as numbers: text by its checksum and its first bytes."""
    if value is None:
        return [-1.0]
    if isinstance(value, str):
        return [float(zlib.crc32(value.encode())), *map(float, value.encode()[:2])]
    if isinstance(value, list):
        return [number for one in value for number in _numbers(one)]
    return [float(value)]


def _spread(ordered: Sequence[float]) -> dict[str, float]:
    if not ordered:
        return {}
    last = len(ordered) - 1
    return {
        "least": ordered[0],
        "tenth": ordered[last // 10],
        "middle": ordered[last // 2],
        "ninetieth": ordered[(9 * last) // 10],
        "most": ordered[-1],
        "mean": sum(ordered) / len(ordered),
    }


def _waits(mine: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How long the other side took to answer: from a message of ours to the next of theirs."""
    came = [note["t"] for note in mine if note["what"] == "message activation"]
    waits = [min((t for t in came if t > one["t"]), default=math.inf) - one["t"] for one in answers]
    return {f"time to answer {name}": value for name, value in _spread(sorted(w for w in waits if w < 1e9)).items()}


def _data(messages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the tensors' numbers: each sum that was noted, over all messages of a turn."""
    made: dict[str, float] = {}
    by_sort: dict[str, list[list[float]]] = defaultdict(list)
    for note in messages:
        if note["data"]:
            by_sort[note["what"]].append(note["data"])
    for sort, rows in by_sort.items():
        for place, column in enumerate(zip(*rows, strict=False)):
            made[f"data {sort} {place} mean"] = sum(column) / len(column)
            made[f"data {sort} {place} most"] = max(column)
    return made


@dataclass(frozen=True)
class Score:
    """``right`` guesses of ``tries``, where ``chance`` of them would be by chance.  ``low``, ``high``: Wilson, 95 %."""

    what: str
    right: int
    tries: int
    chance: float

    @property
    def accuracy(self) -> float:
        return self.right / self.tries

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.tries)

    @property
    def at_chance(self) -> bool:
        return self.interval[0] <= self.chance <= self.interval[1]

    def as_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {**asdict(self), "accuracy": self.accuracy, "low": low, "high": high, "at_chance": self.at_chance}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.3f} [{low:.3f}, {high:.3f}]  {self.right} of {self.tries}; chance {self.chance:.2f}"


def wilson(right: int, tries: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a share that was ``right`` in so many ``tries``; 95 % where nothing else is said."""
    share, over = right / tries, z * z / tries
    middle = (share + over / 2) / (1 + over)
    half = z * math.sqrt(share * (1 - share) / tries + over / (4 * tries)) / (1 + over)
    return max(0.0, middle - half), min(1.0, middle + half)


def guess(what: str, turns: Sequence[Turn], *, data: bool = False, only: str = "", seed: int = SEED) -> Score:
    """How many of the turns in the later half of each run are guessed, by who knows all turns of the other runs and
    those of the first half of this one.  ``data``: from the tensors' numbers, too.  ``only``: features of one group.
    """
    right = tries = 0
    for run in sorted({turn.run for turn in turns}):
        middle = (1 + max(turn.epoch for turn in turns if turn.run == run)) // 2
        known = [turn for turn in turns if turn.run != run or turn.epoch < middle]
        asked = [turn for turn in turns if turn.run == run and turn.epoch >= middle]
        said = _learn([_given(turn, data, only) for turn in known], [turn.clinic for turn in known], seed)(
            [_given(turn, data, only) for turn in asked]
        )
        right += sum(turn.clinic == one for turn, one in zip(asked, said, strict=True))
        tries += len(asked)
    return Score(what, right, tries, 1 / len({turn.clinic for turn in turns}))


def _given(turn: Turn, data: bool, only: str) -> Mapping[str, float]:
    chosen = {name: value for name, value in turn.features.items() if name.startswith(only)} if only != "data" else {}
    return {**chosen, **(turn.data if data or only == "data" else {})}


def _learn(
    rows: Sequence[Mapping[str, float]], whose: Sequence[str], seed: int
) -> Callable[[Sequence[Mapping[str, float]]], list[str]]:
    """A forest over the features that tell most apart in what is known."""
    import numpy as np
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.feature_selection import f_classif

    columns = sorted({name for row in rows for name in row})

    def table(of: Sequence[Mapping[str, float]]) -> NDArray[Any]:
        return np.array([[row.get(name, -1.0) for name in columns] for row in of], dtype=np.float64)

    known = table(rows)
    varies = np.ptp(known, axis=0) > 0
    if not varies.any():
        return lambda of: [max(set(whose), key=list(whose).count)] * len(of)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about those that tell everything: nothing varies within a clinic
        told = np.zeros(len(columns))
        told[varies] = np.nan_to_num(f_classif(known[:, varies], list(whose))[0], nan=0.0, posinf=1e30)
    best = np.argsort(-told)[:60]
    forest = RandomForestClassifier(200, min_samples_leaf=2, max_features=0.3, random_state=seed)
    forest.fit(known[:, best], list(whose))
    return lambda of: [str(one) for one in forest.predict(table(of)[:, best])]


def guess_with_first_relay(run: Run, turns: Sequence[Turn]) -> Score:
    """The server asks the first relay whose circuit was begun last before the turn's came to it."""
    begun = [
        (note["t"], run.names[note["link"]]) for note in run.notes[run.setting.via[0]] if note["what"] == "cell CREATE"
    ]
    right = 0
    for turn in turns:
        before = [name for t, name in begun if t < turn.began]
        right += bool(before) and before[-1] == turn.clinic
    return Score("first relay colludes", right, len(turns), 1 / len(run.setting.samples))


# --- what a relay sees ------------------------------------------------------------------------------------------------


def circuits_seen(run: Run, relay: int) -> dict[tuple[str, str], list[tuple[float, bool, int]]]:
    """The cells at the relay of this number (from 0) by the true ends of their circuits: when, on the way there, size.

    Which ends they are is put together from all relays, which nobody could but us.
    """
    via = run.setting.via
    ends: dict[tuple[str, int], tuple[str, str]] = {}  # neighbour and number at the relay to both ends
    tail: dict[tuple[int, str, int], str] = {}
    steps: list[list[dict[str, Any]]] = [[n for n in run.notes[name] if n["what"] == "extend"] for name in via]
    for note in steps[-1]:
        tail[len(via) - 1, note["came"], note["circuit"]] = run.names[note["to"]]
    for place in range(len(via) - 2, -1, -1):
        here = next(key for key, name in run.names.items() if name == via[place])
        for note in steps[place]:
            tail[place, note["came"], note["circuit"]] = tail.get((place + 1, here, note["front"]), "?")
    heads: dict[tuple[str, int], str] = {(n["came"], n["circuit"]): run.names[n["came"]] for n in steps[0]}
    for place in range(1, relay + 1):
        here = next(key for key, name in run.names.items() if name == via[place - 1])
        heads = {
            (here, n["front"]): heads[n["came"], n["circuit"]]
            for n in steps[place - 1]
            if (n["came"], n["circuit"]) in heads
        }
    for note in steps[relay]:
        both = heads.get((note["came"], note["circuit"]), "?"), tail[relay, note["came"], note["circuit"]]
        ends[note["came"], note["circuit"]] = ends[note["to"], note["front"]] = both
    there = {(n["came"], n["circuit"]) for n in steps[relay]}
    cells: dict[tuple[str, str], list[tuple[float, bool, int]]] = defaultdict(list)
    for note in run.notes[via[relay]]:
        if note["what"] == "cell CELL" and (whose := ends.get((note["link"], note["circuit"]))):
            cells[whose].append((note["t"], (note["link"], note["circuit"]) in there, note["size"]))
    return cells


def auc(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """How often a number of ``one`` is above a number of ``other`` (ties count half), and its 95 % interval (Hanley and
    McNeil).
    """
    import numpy as np

    a, b = np.sort(np.asarray(one, dtype=np.float64)), np.asarray(other, dtype=np.float64)
    below, upto = np.searchsorted(np.sort(b), a, "left"), np.searchsorted(np.sort(b), a, "right")
    area = float((below + upto).mean() / (2 * len(b)))
    q1, q2 = area / (2 - area), 2 * area * area / (1 + area)
    spread = area * (1 - area) + (len(a) - 1) * (q1 - area**2) + (len(b) - 1) * (q2 - area**2)
    half = 1.959964 * math.sqrt(max(0.0, spread) / (len(a) * len(b)))
    if len(set(one) | set(other)) == 1:
        half = 0.0  # every cell has one size: there is nothing to tell
    return area, max(0.0, area - half), min(1.0, area + half)


WINDOW: Final = 12
"""Cells in a row from which a relay guesses whose they are."""


def guess_circuit(what: str, cells: Sequence[Sequence[tuple[float, bool, int]]], *, whole: bool) -> Score:
    """Which of two circuits ``WINDOW`` cells in a row are of, from their sizes (``whole``: and directions); learnt from
    every other row of each, tried with the others.
    """
    known: list[tuple[Mapping[str, float], str]] = []
    asked: list[tuple[Mapping[str, float], str]] = []
    chance = random.Random(SEED)
    for name, those in zip("ab", cells, strict=True):
        windows = []
        start = 0
        while True:
            start += chance.randrange(WINDOW)  # what passes again and again is cut elsewhere each time
            some = those[start : start + WINDOW]
            if len(some) < WINDOW:
                break
            start += WINDOW
            row = {f"size {place}": float(one[2]) for place, one in enumerate(some)}
            if whole:
                row |= {f"way {place}": float(one[1]) for place, one in enumerate(some)}
                row |= {"sum there": float(sum(one[2] for one in some if one[1]))}
            sizes = sorted(one[2] for one in some)
            row |= {"sum": float(sum(sizes)), "least": float(sizes[0]), "most": float(sizes[-1])}
            row |= {"sizes": float(len(set(sizes))), "middle": float(sizes[len(sizes) // 2])}
            windows.append((row, name))
        known += windows[::2]
        asked += windows[1::2]
    some_of_each = min(sum(name == one for _, name in asked) for one in "ab")
    asked = [one for name in "ab" for one in [it for it in asked if it[1] == name][:some_of_each]]
    said = _learn([row for row, _ in known], [name for _, name in known], SEED)([row for row, _ in asked])
    right = sum(one == name for one, (_, name) in zip(said, asked, strict=True))
    return Score(what, right, len(asked), 0.5)


# --- the measurement --------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What was measured.  ``far``: by the server; ``relay``: of two circuits at the middle relay."""

    runs: int
    far: dict[str, Score] = field(default_factory=dict)
    sizes: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """AUC of one cell's size, with its interval."""
    relay: dict[str, Score] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verdicts(self) -> dict[str, bool]:
        """What must hold."""
        return {
            "anonymous: at chance": self.far["anonymous"].at_chance,
            "not anonymous: told apart": self.far["not anonymous"].interval[0] > 0.5,
            "fixed: a cell's size tells nothing": self.sizes["fixed"][1] <= 0.5 <= self.sizes["fixed"][2],
            "fixed, cover: sizes in a row tell nothing": self.relay["fixed, cover: sizes"].at_chance,
        }

    def as_json(self) -> dict[str, Any]:
        """The document that ``--json`` prints."""
        return {
            "runs": self.runs,
            "far_end": {name: score.as_json() for name, score in self.far.items()},
            "cell_size_auc": {
                name: {"auc": area, "low": low, "high": high} for name, (area, low, high) in self.sizes.items()
            },
            "relay": {name: score.as_json() for name, score in self.relay.items()},
            "verdicts": self.verdicts,
            "seconds": round(self.seconds, 1),
        }


_APART: Final = {"padding": "fixed", "samples": (3, 40), "batch": 40, "width": 512, "relays": 3, "epochs": 300}
"""Two clinics through three relays: the messages of one are thirteen times as large as the other's."""


def bench_linking(*, runs: int, epochs: int, tell: Callable[[str], None]) -> Report:
    """Measure everything; ``runs`` of the anonymous group, all others once."""
    began = time.monotonic()
    report = Report(runs)

    def recorded(what: str, **setting: Any) -> Run:
        run = record(Setting(**setting))
        tell(f"{what}: {run.seconds:.0f} s, {sum(map(len, run.notes.values()))} notes")
        return run

    def score(name: str, turns: Sequence[Turn], **how: Any) -> None:
        report.far[name] = guess(name, turns, **how)

    hidden = [recorded(f"anonymous, run {number + 1}", epochs=epochs) for number in range(runs)]
    turns = turns_seen(hidden)
    score("anonymous", turns)
    for group in ("place", "key", "size", "time"):
        score(f"anonymous, {group} alone", turns, only=group)
    named = turns_seen([recorded("not anonymous", anonymous=False, epochs=max(4, epochs // 3))])
    score("not anonymous", named)
    for group in ("key", "size", "time"):
        score(f"not anonymous, {group} alone", named, only=group)
    score("anonymous, and the tensors' numbers", turns, data=True)
    apart = turns_seen([recorded("other distributions", apart=0.5, epochs=max(6, epochs // 2))])
    score("the tensors' numbers, other distributions", apart, data=True)
    score("no cover", turns_seen([recorded("no cover", cover=None, epochs=epochs)]))
    for lag, cover in ((LAG / 5, None), (LAG / 5, 2 * COVER), (LAG / 5, 3 * COVER), (LAG, None), (LAG, COVER)):
        paced = "no cover" if cover is None else f"cover {1000 * cover:g} ms"
        what = f"{paced}, each {1000 * lag:g} ms farther away"
        score(what, turns_seen([recorded(what, cover=cover, lag=lag, epochs=epochs)]))
    asked = [guess_with_first_relay(run, [turn for turn in turns if turn.run == n]) for n, run in enumerate(hidden)]
    report.far["the first relay colludes"] = Score(
        "the first relay colludes", sum(one.right for one in asked), sum(one.tries for one in asked), 1 / len(CLINICS)
    )
    _measure_relay(report, recorded)
    report.seconds = time.monotonic() - began
    return report


def _measure_relay(report: Report, recorded: Callable[..., Run]) -> None:
    for name, more in (
        ("fixed", {}),
        ("fixed, cover", {"cover": COVER, "epochs": 60}),
        ("padme", {"padding": "padme"}),
    ):
        given = {**_APART, "anonymous": False, "cover": None, **more}
        seen = circuits_seen(recorded(f"three relays, {name}", **given), 1)
        small, large = (seen[clinic, "server"] for clinic in CLINICS[:2])
        both = [[float(size) for _, _, size in cells] for cells in (large, small)]
        report.sizes[name] = auc(*both)
        report.sizes[f"{name}, without the smallest"] = auc(
            *([size for size in of if size > SMALL_CELL] for of in both)
        )
        report.relay[f"{name}: sizes"] = guess_circuit(name, (small, large), whole=False)
        report.relay[f"{name}: sizes and directions"] = guess_circuit(name, (small, large), whole=True)
    given = {**_APART, "anonymous": False, "cover": None, "hand_on": True, "epochs": 20}
    seen = circuits_seen(recorded("three relays, weights handed on through them", **given), 1)
    training = [float(size) for ends, cells in seen.items() if "server" in ends for _, _, size in cells]
    handed = [float(size) for ends, cells in seen.items() if "server" not in ends for _, _, size in cells]
    report.sizes["fixed, training against weights handed on"] = auc(
        *([size for size in of if size > SMALL_CELL] for of in (training, handed))
    )


def _lines(report: Report) -> list[str]:
    """For people."""
    wide = max(map(len, (*report.far, *report.relay, *report.sizes))) + 2
    lines = [f"what the far end guesses: which of {len(CLINICS)} clinics had a turn; accuracy [95 %]"]
    lines += [f"  {name:{wide}}{score}" for name, score in report.far.items()]
    lines += ["", "what the middle of three relays tells apart: two circuits, by the size of one cell; AUC [95 %]"]
    lines += [f"  {name:{wide}}{a:.3f} [{low:.3f}, {high:.3f}]" for name, (a, low, high) in report.sizes.items()]
    lines += ["", f"the same, {WINDOW} cells in a row; accuracy [95 %]"]
    lines += [f"  {name:{wide}}{score}" for name, score in report.relay.items()]
    lines += ["", *(f"{'held' if held else 'NOT HELD'}: {what}" for what, held in report.verdicts.items())]
    return [*lines, f"{report.runs} runs of the anonymous group, {report.seconds:.0f} s in all"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``splitsec bench linking``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, nothing else, on standard output")
    parser.add_argument(
        "--runs", type=_counted, default=2, metavar="N", help="of the anonymous group (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=_counted, default=24, metavar="N", help="of a run (default: %(default)s)")


def _counted(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 10000")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 0 where all is as it should be."""
    report = bench_linking(
        runs=arguments.runs,
        epochs=arguments.epochs,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(report.as_json(), indent=2) if arguments.json else "\n".join(_lines(report)))
    return 0 if all(report.verdicts.values()) else 1


def main() -> int:
    """``python -m splitsec.bench.linking``: the measurement, or, for its own use, a recorded process."""
    if FOLDER in os.environ and len(sys.argv) == 2:
        code = _be_recorded(sys.argv[1])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    parser = argparse.ArgumentParser(prog="splitsec bench linking", description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
