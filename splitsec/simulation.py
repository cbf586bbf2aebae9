"""All parties of a folder on this machine: one process each, throw-away keys, real sockets, the code of a pilot.

Here: starting, following and ending the processes, and the sums over what they report.  Not here: the party
(``party``), what a process does to be one (``process``, ``relay``), how many of them share memory (``nest``), how it
looks (``cli/simulate.py``).  Whatever happens, no process is left behind.
"""

from __future__ import annotations

import base64
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from splitsec.advice import Line
from splitsec.errors import PartyFailed, PeerLost, PeerUnreachable, UserError
from splitsec.graph import Graph
from splitsec.nest import Forked, Nest, open_nest
from splitsec.partyfile import Folder, load_folder
from splitsec.plan import relays_needed, taking_part
from splitsec.process import give_free_memory_back
from splitsec.schedule import TRAIN, Turn, run_schedule, step_count, turns_of
from splitsec.transports.slowlink import SlowLink

__all__ = ["Processes", "Result", "StandIn", "Watch", "predict", "simulate"]

Watch = Callable[[str, dict[str, Any]], None]
"""Called with a party's name and each event that it reports, for progress."""

SECONDS_TO_END: Final = 2.0
SECONDS_FOR_THE_CAUSE: Final = 1.0
"""After one party fails, how long to listen for another's error that explains it."""
RELAY_DEATHS: Final = 5
"""How often in a row a relay may die before it relays; then the run fails."""


@dataclass(frozen=True)
class Result:
    """What a simulation measured.  ``metrics``: lists by epoch; ``cuts``: what crossed, by edge and direction."""

    graph: str
    parties: tuple[str, ...]
    epochs: int
    steps: int
    wall_seconds: float
    startup_seconds: float
    metrics: Mapping[str, Any]
    cuts: tuple[Mapping[str, Any], ...]
    predicted: Mapping[str, int] = field(default_factory=dict)
    out: str | None = None
    short_of_budget: tuple[str, ...] = ()
    """Parties whose privacy budget does not last for all epochs."""
    epochs_wanted: int | None = None
    """How many the graph asked for, where a privacy budget did not last for them."""
    leakage: tuple[Mapping[str, Any], ...] = ()
    """What parties that measure it found: by party, cut and epoch."""

    def as_json(self) -> dict[str, Any]:
        """The document that ``--json`` prints."""
        return {
            "graph": self.graph,
            "parties": list(self.parties),
            "epochs": self.epochs,
            "steps": self.steps,
            "wall_seconds": round(self.wall_seconds, 3),
            "startup_seconds": round(self.startup_seconds, 3),
            "metrics": self.metrics,
            "cuts": list(self.cuts),
            **({"predicted": dict(self.predicted)} if self.predicted else {}),
            **({"out": self.out} if self.out else {}),
            **({"short_of_budget": list(self.short_of_budget)} if self.short_of_budget else {}),
            **({"ended_by_budget": {"epochs": self.epochs, "of": self.epochs_wanted}} if self.epochs_wanted else {}),
            **({"leakage": list(self.leakage)} if self.leakage else {}),
        }


def simulate(
    folder: str | Path,
    *,
    epochs: int | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    trace: str | Path | None = None,
    state: str | Path | None = None,
    watch: Watch = lambda party, event: None,
    before_turn: Callable[[dict[str, Any]], None] | None = None,
    line: Line | None = None,
) -> Result:
    """Train ``folder``'s graph with one process per party on this machine.

    ``epochs`` and ``seed`` replace the graph's; ``out``: folder for the trained segments, each in its party's own
    folder; ``trace``: folder for a trace of every party's traffic (docs/tracing.md); ``state``: folder for every
    party's ledger and journal, each in its party's own folder (without it, where the party file says, and a journal
    only where there is a privacy policy); ``line``: a slow line, as ``splitsec.advice`` describes one, before every
    party that listens.
    Raises ``SplitsecError``: nothing is started or written if the folder has a mistake.
    """
    began = time.monotonic()
    _checked_place(out)
    _checked_place(trace, "--trace")
    _checked_place(state, "--state")
    loaded = _loaded(folder, epochs=epochs, seed=seed)
    job = {
        "action": "train",
        "out": _absolute(out),
        "weights": None,
        "split": "train",
        "trace": _absolute(trace),
        "state": _absolute(state),
    }
    return _run(loaded, job, watch, before_turn, began, out, line)


def predict(
    folder: str | Path,
    *,
    weights: str | Path,
    out: str | Path,
    split: Literal["train", "test", "predict"] = "predict",
    state: str | Path | None = None,
    watch: Watch = lambda party, event: None,
) -> Result:
    """Send ``split`` of every party's data through the trained segments in ``weights`` and write predictions to
    ``out``.
    """
    if not Path(weights).is_dir():
        raise UserError(
            f"no folder {weights}", expected="the folder that `--out` of a training run wrote", fix="train first"
        )
    began = time.monotonic()
    _checked_place(out)
    loaded = _loaded(folder)
    job = {
        "action": "predict",
        "out": _absolute(out),
        "weights": _absolute(weights),
        "split": split,
        "trace": None,
        "state": _absolute(state),
    }
    return _run(loaded, job, watch, None, began, out)


def _run(
    folder: Folder,
    job: Mapping[str, Any],
    watch: Watch,
    before_turn: Callable[[dict[str, Any]], None] | None,
    began: float,
    out: str | Path | None,
    line: Line | None = None,
) -> Result:
    with open_nest(needed_by(folder)) as nest:  # it loads while the folder is checked
        _check(folder)
        give_free_memory_back()
        if (trace := job["trace"]) is not None:
            Path(trace).mkdir(mode=0o700, parents=True, exist_ok=True)
        with (
            _lines(line) as in_front,
            Processes(folder, job, watch, before_turn, in_front=in_front, nest=nest) as processes,
        ):
            processes.follow()
            return _summed(processes, began, out)


@contextmanager
def _lines(line: Line | None) -> Iterator[Callable[[str, str], str]]:
    """What stands in front of listening parties: to each a line like this, which all who dial it share."""
    with ExitStack() as lines:

        def in_front(party: str, address: str) -> str:
            if line is None:
                return address
            port = int(address.rpartition(":")[2])
            return lines.enter_context(SlowLink(port, rate=line.bandwidth, delay=line.delay)).address

        yield in_front


def needed_by(folder: Folder) -> tuple[str, ...]:
    """Modules that parties of ``folder`` load besides what all do, for a nest."""
    private = any(code.dp_sgd is not None for party in folder.parties.values() for code in party.segments.values())
    return ("opacus.grad_sample",) if private else ()


def _absolute(path: str | Path | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def _loaded(folder: str | Path, **training: int | None) -> Folder:
    loaded = load_folder(folder)
    if not loaded.graph.segments:
        raise loaded.graph.error(
            "the graph has no segments, so there is nothing to run",
            expected="at least one segment",
            fix="exchange tensors without training through `splitsec.open_line` (docs/api.md)",
        )
    if training.get("seed") is not None and not 0 <= training["seed"] < 2**63:  # type: ignore[operator]
        raise UserError(
            f"seed {training['seed']}", expected="a whole number from 0 to 2^63 - 1", fix="choose another --seed"
        )
    given = {name: value for name, value in training.items() if value is not None}
    if given:
        changed = loaded.graph.training.model_copy(update=given)
        loaded = Folder(loaded.path, loaded.graph.model_copy(update={"training": changed}), loaded.parties)
    return loaded


def _check(folder: Folder) -> None:
    from splitsec.probe import probe

    with _patience(folder.graph.timeouts.connect) as begin:
        probe(folder, begin)


@contextmanager
def _patience(seconds: float) -> Iterator[Callable[[str], None]]:
    """Bound how long each party's own code may take here; what it yields is called with the party that begins.

    Only in the main thread, which is the only one that Python lets be interrupted.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield lambda party: None
        return
    current = ""

    def begin(party: str) -> None:
        nonlocal current
        current = party
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, where user code swallows it

    def too_late(*_: object) -> None:
        raise _late(current, seconds)

    before = signal.signal(signal.SIGALRM, too_late)
    try:
        yield begin
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _late(party: str, seconds: float) -> PeerUnreachable:
    return PeerUnreachable(
        f"did not come up within {seconds:g} s: it is still starting, or in its own model or data functions",
        party=party,
        expected="every party ready to connect within `timeouts: {connect: ...}` of the graph file",
        fix="look at what its data function does, or raise that number",
    )


def _checked_place(out: str | Path | None, option: str = "--out") -> None:
    """Raise ``UserError`` unless ``out`` is, or can become, a folder that we may write to."""
    if out is None:
        return
    place = Path(out).resolve()
    nearest = next(parent for parent in (place, *place.parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(
            f"nothing can be written to {out}: {nearest} is {'not writable' if nearest.is_dir() else 'no folder'}",
            expected="a folder, or a place where one can be made",
            fix=f"choose another {option}",
        )


@dataclass
class _Running:
    name: str
    module: str
    """What the process runs."""
    assignment: str
    process: subprocess.Popen[bytes] | Forked = field(init=False)
    log: Path = field(init=False)
    unread: bytes = b""
    ready: bool = False
    done: bool = False
    failure: dict[str, Any] | None = None


@dataclass
class _Relay(_Running):
    """Nothing is lost with it: where it dies, it is started again."""

    deaths: int = 0
    """Since it last came up."""


@dataclass(frozen=True)
class StandIn:
    """Who runs in a party's place: another module, told ``more`` besides what a party is told."""

    module: str
    more: Mapping[str, Any] = field(default_factory=dict)


class Processes:
    """One process per party, from start to end.  Leaving the ``with`` block ends all of them.

    ``stand_ins``: by party.  ``in_front``: given a listening party's name and address, the address that the others
    dial in its place.  ``more``: what every party is told besides.  ``nest``: where processes are forked, relays apart;
    None: each is started anew.
    """

    def __init__(
        self,
        folder: Folder,
        job: Mapping[str, Any],
        watch: Watch,
        before_turn: Callable[[dict[str, Any]], None] | None = None,
        *,
        stand_ins: Mapping[str, StandIn] | None = None,
        in_front: Callable[[str, str], str] = lambda party, address: address,
        more: Mapping[str, Any] | None = None,
        nest: Nest | None = None,
    ) -> None:
        self._nest = nest
        self._stand_ins = dict(stand_ins or {})
        self._in_front = in_front
        self._more = dict(more or {})
        self.private: dict[str, X25519PrivateKey] = {}
        """The throw-away keys, by party and anonymous group."""
        self.folder = folder
        self.job = job
        self.watch = watch
        self.before_turn = before_turn
        self.events: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.started = time.monotonic()
        self.all_connected = self.started
        self._scratch = tempfile.TemporaryDirectory(prefix="splitsec-")
        self._held: list[socket.socket] = []
        self._running: dict[str, _Running] = {}
        self._selector = selectors.DefaultSelector()
        self.graph = folder.graph

    def __enter__(self) -> Processes:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _start(self) -> None:
        named = [*self.graph.parties, *([self.graph.anonymous] if self.graph.anonymous else [])]
        private = self.private = {name: X25519PrivateKey.generate() for name in named}
        public = {
            name: "x25519:" + base64.b64encode(key.public_key().public_bytes_raw()).decode()
            for name, key in private.items()
        }
        self._await_nest()
        addresses: dict[str, tuple[str | None, str | None]] = {}
        for name, party in self.graph.parties.items():
            address = self._loopback() if party.listen is not None else None
            addresses[name] = (address, None if address is None else self._in_front(name, address))
        self.graph = self.graph.with_keys(public, addresses)
        graph = {
            "graph": self.graph.model_dump(by_alias=True, mode="json"),
            "graph_file": str(self.graph.file or "graph.yaml"),
        }

        def text(key: X25519PrivateKey) -> str:
            return base64.b64encode(key.private_bytes_raw()).decode()

        for name in sorted(relays_needed(self.graph)):
            self._spawn(
                _Relay(name, "splitsec.relay", json.dumps({**graph, "party": name, "key": text(private[name])}))
            )
        taking = taking_part(self.graph)
        running = [name for name in self.graph.parties if name in taking and name in self.folder.parties]
        anonymous = self.graph.anonymous
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        shared = max(1, cores // max(1, len(running)))
        for name in running:
            party_file = self.folder.parties[name]
            threads = party_file.threads or shared
            group = anonymous if anonymous is not None and name in self.graph.members(anonymous) else None
            assignment = {
                **graph,
                "party_file": str(party_file.file),
                "key": text(private[name]),
                "group_key": None if group is None else text(private[group]),
                "threads": threads,
                "pause_at_turns": self.before_turn is not None,
                "job": dict(self.job),
                **self._more,
            }
            module = "splitsec.process"
            if (stand_in := self._stand_ins.get(name)) is not None:
                module, assignment = stand_in.module, {**assignment, **stand_in.more}
            self._spawn(_Running(name, module, json.dumps(assignment)), threads)

    def _await_nest(self) -> None:
        """Have a nest that can fork, or none."""
        if self._nest is None:
            return
        seconds = self.graph.timeouts.connect
        try:
            if not self._nest.wait(seconds):
                self._nest = None
        except TimeoutError:
            raise _late(next(iter(self.graph.parties)), seconds) from None

    def _spawn(self, party: _Running, threads: int = 1) -> None:
        """Start the process of ``party``.  Its assignment, with the keys, goes to its standard input alone."""
        party.log = Path(self._scratch.name) / f"{party.name}.log"
        run = [party.module, party.name]  # the name is for who looks at a list of processes
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with party.log.open("ab") as errors:
            if self._nest is not None and not isinstance(party, _Relay):  # those need no torch
                try:
                    party.process = self._nest.start(run, stderr=errors.fileno(), environment=environment)
                except OSError as error:
                    raise PeerLost(f"could not be started: {error}", party=party.name) from None
            else:
                party.process = subprocess.Popen(
                    [sys.executable, "-m", *run],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=environment,
                    start_new_session=True,
                )
        self._running[party.name] = party
        assert party.process.stdout is not None
        os.set_blocking(party.process.stdout.fileno(), False)
        self._selector.register(party.process.stdout, selectors.EVENT_READ, party)
        self._say(party, party.assignment)

    @property
    def _training(self) -> list[_Running]:
        """Those that a run is over with: all but the relays."""
        return [party for party in self._running.values() if not isinstance(party, _Relay)]

    def _loopback(self) -> str:
        """A free loopback address.  The port stays bound (not listening) here, so that nobody else is given it
        meanwhile.
        """
        holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        self._held.append(holder)
        return f"tcp://127.0.0.1:{holder.getsockname()[1]}"

    @staticmethod
    def _say(party: _Running, line: str) -> None:
        assert party.process.stdin is not None
        try:
            party.process.stdin.write(line.encode() + b"\n")
            party.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died: its exit status, read below, says so

    # --- following them

    def follow(self) -> None:
        """Read events until every party is done.  Raises the error of the party that failed first, or is to blame for
        it.
        """
        deadline = time.monotonic() + self.graph.timeouts.connect
        connected = standing = 0
        told_to_go = False
        while not all(party.done for party in self._training):
            if not told_to_go and all(party.ready for party in self._running.values()):
                told_to_go = True
                for party in self._training:
                    self._say(party, "go")
            waiting = [party.name for party in self._running.values() if not party.ready]
            if waiting and time.monotonic() > deadline:
                raise _late(waiting[0], self.graph.timeouts.connect)
            for party, event in self._events(0.2):
                if event["event"] == "ready":
                    deadline = time.monotonic() + self.graph.timeouts.connect
                if event["event"] == "connected":
                    connected += 1
                    if connected == len(self._training):
                        self.all_connected = time.monotonic()
                if event["event"] == "turn" and self.before_turn is not None:
                    standing += 1
                    if standing == len(self._training):
                        standing = 0
                        self.before_turn(event)
                        for running in self._training:
                            self._say(running, "go")
                self.watch(party.name, event)
            if any(party.failure for party in self._running.values()):
                self._fail()

    def outlast(self, seconds: float, *, quiet: float | None = None) -> bool:
        """Read events until every party is done or has failed, and raise for none of them (``failures``).

        False where that took longer than ``seconds``, or where nobody said anything for ``quiet`` seconds.
        """
        deadline = time.monotonic() + seconds
        heard = time.monotonic()
        told_to_go = False
        while not all(party.done or party.failure for party in self._training):
            if not told_to_go and all(party.ready or party.failure for party in self._running.values()):
                told_to_go = True
                for party in self._training:
                    self._say(party, "go")
            now = time.monotonic()
            if now > deadline or (quiet is not None and now > heard + quiet):
                return False
            for party, event in self._events(0.2):
                heard = time.monotonic()
                self.watch(party.name, event)
        return True

    @property
    def failures(self) -> dict[str, dict[str, Any]]:
        """How parties failed, by party: its last event, with ``code`` and ``text``."""
        return {party.name: party.failure for party in self._running.values() if party.failure is not None}

    def log_of(self, party: str, lines: int = 15) -> str:
        """The last lines that the process of ``party`` wrote."""
        return _tail(self._running[party].log, lines)

    def _events(self, timeout: float) -> list[tuple[_Running, dict[str, Any]]]:
        found: list[tuple[_Running, dict[str, Any]]] = []
        for key, _ in self._selector.select(timeout):
            party: _Running = key.data
            pipe = party.process.stdout
            assert pipe is not None
            data = pipe.read1(1 << 20) if hasattr(pipe, "read1") else pipe.read(1 << 20)
            if not data:
                self._selector.unregister(pipe)
                code = party.process.wait()
                lost = self._nest.lost if self._nest is not None and isinstance(party.process, Forked) else None
                if isinstance(party, _Relay) and party.failure is None and party.deaths < RELAY_DEATHS:
                    found.append((party, self._again(party, code)))
                elif not party.done and party.failure is None:
                    party.failure = {
                        "event": "died",
                        "code": "died",
                        "text": _death(code)
                        if lost is None
                        else f"died with the process it came of, which {_death(lost)}",
                        "exit_code": 4,
                        "peer": None,
                    }
                continue
            *lines, party.unread = (party.unread + data).split(b"\n")
            for line in lines:
                event = json.loads(line)
                self.events[party.name].append(event)
                party.ready = party.ready or event["event"] in ("ready", "relays")
                if isinstance(party, _Relay) and event["event"] == "relays":
                    party.deaths = 0
                party.done = party.done or event["event"] == "done"
                if event["event"] == "failed":
                    party.failure = event
                found.append((party, event))
        return found

    def _again(self, relay: _Relay, code: int) -> dict[str, Any]:
        """Start a relay anew, with its old key and address.  Returns what to tell of it."""
        for pipe in (relay.process.stdin, relay.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        relay.deaths += 1
        relay.unread = b""
        self._spawn(relay)
        return {"event": "relay ended", "why": _death(code)}

    def _fail(self) -> None:
        """Raise the error that explains the others: a party's own fault or death before errors about a peer."""
        until = time.monotonic() + SECONDS_FOR_THE_CAUSE
        while (left := until - time.monotonic()) > 0 and self._selector.get_map() and not self._own_faults():
            self._events(left)
        failed = [party for party in self._running.values() if party.failure is not None]
        to_blame = (self._own_faults() or failed)[0]
        failure = to_blame.failure
        assert failure is not None
        if failure["code"] == "died":
            tail = _tail(to_blame.log)
            raise PeerLost(
                f"{failure['text']}" + (f"; the last lines that it wrote:\n{tail}" if tail else ""),
                party=to_blame.name,
                expected="it to stay until the last step",
                fix="all other parties were ended too; nothing of this run was kept",
            )
        text = failure["text"]
        if failure["code"] == "InternalError" and (tail := _tail(to_blame.log)):
            text = f"{text}\n{tail}"
        raise PartyFailed(to_blame.name, text, exit_code=failure["exit_code"], kind=failure["code"])

    def _own_faults(self) -> list[_Running]:
        return [
            party for party in self._running.values() if party.failure is not None and party.failure["peer"] is None
        ]

    # --- ending them

    def _end(self) -> None:
        """End every process that still runs: ask, wait a little, kill; by process id, each of them ours.

        Relays last: the others' goodbyes go through them.
        """
        training = self._training
        finished = bool(training) and all(party.done for party in training)
        self._stop([party.process for party in training], ask=not finished)
        self._stop([party.process for party in self._running.values() if isinstance(party, _Relay)], ask=True)
        for party in self._running.values():
            for pipe in (party.process.stdin, party.process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
        self._selector.close()
        for holder in self._held:
            holder.close()
        self._scratch.cleanup()

    @staticmethod
    def _stop(processes: list[subprocess.Popen[bytes] | Forked], *, ask: bool) -> None:
        alive = [process for process in processes if process.poll() is None]
        if ask:
            for process in alive:
                process.send_signal(signal.SIGTERM)
        until = time.monotonic() + SECONDS_TO_END
        for process in alive:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _death(code: int) -> str:
    if code >= 0:
        return f"ended by itself with exit status {code}"
    try:
        return f"died: killed by signal {signal.Signals(-code).name}"
    except ValueError:
        return f"died: killed by signal {-code}"


def _tail(log: Path, lines: int = 15) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


# --- sums over what the parties reported


def _summed(processes: Processes, began: float, out: str | Path | None) -> Result:
    graph = processes.graph
    predicted: dict[str, int] = {}
    counts: list[dict[str, int]] = []
    scores: list[dict[str, Any]] = []
    cuts: list[dict[str, Any]] = []
    leakage: list[dict[str, Any]] = []
    epochs, wanted = graph.training.epochs, None
    for name, events in processes.events.items():
        for event in events:
            match event["event"]:
                case "leakage":
                    leakage.append({"party": name, **{key: value for key, value in event.items() if key != "event"}})
                case "budget spent":
                    epochs, wanted = event["epochs"], event["of"]
                case "score":
                    scores.append(event)
                case "traffic":
                    cuts.extend(_crossed(name, row) for row in event["lanes"] if row["kind"] != "control")
                case "agreed":
                    counts = event["counts"]
                case "saved":
                    for segment, count in event.get("predicted", {}).items():
                        predicted[segment] = predicted.get(segment, 0) + count
    training = processes.job["action"] == TRAIN
    graph = graph.model_copy(update={"training": graph.training.model_copy(update={"epochs": epochs})})
    return Result(
        graph=graph.name,
        parties=tuple(graph.parties),
        epochs=graph.training.epochs if training else 0,
        epochs_wanted=wanted,
        short_of_budget=tuple(
            name for name, told in processes.events.items() if any(e["event"] == "budget lasts" for e in told)
        ),
        leakage=tuple(leakage),
        steps=_updates(graph, counts) if training else 0,
        wall_seconds=time.monotonic() - began,
        startup_seconds=processes.all_connected - processes.started,
        metrics=_metrics(graph, scores) if training else {},
        cuts=tuple(sorted(cuts, key=lambda row: (row["from"], row["to"], row["direction"]))),
        predicted=predicted,
        out=_absolute(out),
    )


def _crossed(party: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """One lane as a row of the result: ``from`` and ``to`` as the edge stands in the graph, the parties beside them."""
    backward = row["kind"] in ("gradient", "taken", "answer")
    source, _, target = row["name"].partition(" -> ")
    if row["kind"] == "order":
        source, target = party, row["peer"]
    return {
        "from": source,
        "to": target or source,
        "direction": "backward" if backward else "forward",
        "kind": row["kind"],
        "sender": party,
        "receiver": row["peer"],
        "messages": row["messages"],
        "bytes": row["bytes"],
    }


def _updates(graph: Graph, counts: list[dict[str, int]]) -> int:
    limited = any(turns_of(count, TRAIN) is not None for count in counts)
    epochs = graph.training.epochs if limited else 1  # else every epoch is like the first
    turns = [turn for turn in run_schedule(graph, epochs=epochs) if isinstance(turn, Turn) and turn.phase == TRAIN]
    return graph.training.epochs // epochs * sum(step_count(graph, turn, counts) for turn in turns)


def _metrics(graph: Graph, scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss: the weighted sum over segments of the mean over samples.  Accuracy: the mean over the segments that
    classify.
    """
    by_segment: dict[str, dict[str, list[float | None]]] = {}
    totals: dict[str, list[float | None]] = {
        "train_loss": [],
        "eval_loss": [],
        "train_accuracy": [],
        "eval_accuracy": [],
    }
    lossy = [name for name, segment in graph.segments.items() if segment.loss is not None]
    for phase, short in (("train", "train"), ("evaluate", "eval")):
        for epoch in range(graph.training.epochs):
            losses: list[float] = []
            accuracies: list[float] = []
            for segment in lossy:
                rows = [s for s in scores if (s["segment"], s["phase"], s["epoch"]) == (segment, phase, epoch)]
                count = sum(row["rows"] for row in rows)
                loss = sum(row["loss"] for row in rows) / count if count else None
                classified = count and all(row["correct"] is not None for row in rows)
                accuracy = sum(row["correct"] for row in rows) / count if classified else None
                own = by_segment.setdefault(segment, {})
                own.setdefault(f"{short}_loss", []).append(loss)
                own.setdefault(f"{short}_accuracy", []).append(accuracy)
                if loss is not None:
                    losses.append(loss * graph.segments[segment].loss_weight)
                if accuracy is not None:
                    accuracies.append(accuracy)
            totals[f"{short}_loss"].append(sum(losses) if losses else None)
            totals[f"{short}_accuracy"].append(sum(accuracies) / len(accuracies) if accuracies else None)
    return {**totals, "by_segment": by_segment}
