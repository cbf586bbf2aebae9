"""A trace tells how much passed, when and between whom, and nothing else; and it never stands in the way of a run.

First the writer beside the real guard, with a clock that the test sets; then files that are not as they should be; then
the reader and ``splitsec listen``; then real parties, whose traces are compared with what they report themselves.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import stat
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import pytest
import torch

from splitsec import plan as plans
from splitsec.errors import UserError
from splitsec.graph import parse_graph
from splitsec.guard import Guard, Passed
from splitsec.messages import Message, encode
from splitsec.party import Job
from splitsec.plan import CONTROL, ORDER, Lane, make_plan
from splitsec.simulation import simulate
from splitsec.trace import KINDS, SUFFIX, Trace, TraceReader
from splitsec.transports.errors import Lost
from splitsec.transports.iothread import CloseCode, Closed, Event, Interrupted, Opened, Received, Resumed
from tests.conftest import SOURCE, Shell, free_port, keyed, write_folder

GRAPH = parse_graph("""\
splitsec: 1
name: door
parties:
  clinic: {}
  registry: {}
  server: {listen: "tcp://127.0.0.1:7400"}
segments:
  stem: {at: clinic, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [4, 2], dtype: float32}
labels:
  - {from: registry, to: trunk}
training: {batch_size: 6, micro_batches: 2, seed: 1}
""")
KEYS = {"clinic": b"c" * 32, "registry": b"r" * 32, "server": b"s" * 32}


class Clock:
    """Stands where the module ``time`` does."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Thread:
    """Stands where the I/O thread does: each event comes after so many seconds."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.events: deque[tuple[float, Event]] = deque()
        self.sizes: list[tuple[int, int]] = []

    def send(
        self, peer: bytes, lane: int, header: bytes, body: Sequence[memoryview] = (), *, wait: bool = True
    ) -> None:
        self.sizes.append((len(header), sum(part.nbytes for part in body)))

    def receive(self, timeout: float | None = None) -> Event | None:
        seconds, event = self.events.popleft()
        self.clock.now += seconds
        return event

    def close_peer(self, peer: bytes, reason: int, why: str) -> None: ...

    def close(self, reason: int = CloseCode.NORMAL, linger: float = 5.0) -> None: ...


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("splitsec.trace.time", clock)
    monkeypatch.setattr("splitsec.guard.time", clock)
    return clock


def lane(party: str, kind: str, *, into: bool) -> tuple[str, int]:
    plan = make_plan(GRAPH, party)
    (found,) = [key for key, one in (plan.lanes_in if into else plan.lanes_out).items() if one.kind == kind]
    return found


def arrived(sender: str, number: int, message: Message) -> Received:
    header, body = encode(message)
    return Received(KEYS[sender], number, header, memoryview(bytearray(b"".join(body))))


def trace_at(file: Path, party: str = "server", **more: Any) -> Trace:
    return Trace(file, party=party, graph="door", action="train", parties=tuple(GRAPH.parties), **more)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --- what a line says


def test_each_message_and_each_event_of_a_connection_is_a_line(tmp_path: Path, clock: Clock) -> None:
    """Every number of the file follows from what the thread was made to do."""
    thread = Thread(clock)
    keys = {name: key for name, key in KEYS.items() if name != "server"}
    guard = Guard(make_plan(GRAPH, "server"), keys, thread, connect_timeout=5)
    told: list[str] = []
    guard.on_opened = lambda party: told.append(f"opened {party}")
    guard.on_interrupted = lambda party, why, seconds: told.append(f"interrupted {party} {seconds}")
    guard.on_resumed = lambda party: told.append(f"resumed {party}")
    forward, back = lane("server", "activation", into=True), lane("server", "gradient", into=False)

    def activation(micro: int, rows: int) -> Received:
        return arrived("clinic", forward[1], Message("activation", (0, micro), tensors={"": torch.ones(rows, 4, 2)}))

    with trace_at(tmp_path / "t") as trace:
        trace.follow(guard)
        thread.events += [(0.5, Opened(KEYS["registry"])), (0.25, Opened(KEYS["clinic"]))]
        guard.open_all(["clinic", "registry"])
        clock.now += 1  # the server computes: nobody waits
        thread.events.append((0.125, first := activation(0, 3)))
        guard.take(forward)
        guard.release(back, Message("gradient", (0, 0), tensors={"": torch.ones(3, 4, 2)}))
        thread.events += [
            (2.0, Interrupted(KEYS["clinic"], Lost("no sign of life from 10.1.2.3"), 17.25)),
            (4.0, Resumed(KEYS["clinic"])),
            (0.5, second := activation(1, 1)),
        ]
        guard.take(forward)
        clock.now += 3
        guard.release(back, Message("gradient", (0, 1), tensors={"": torch.ones(1, 4, 2)}))
        thread.events.append((1.0, Closed(KEYS["registry"], None, CloseCode.NORMAL)))
        guard.wait()

    assert told == ["opened registry", "opened clinic", "interrupted clinic 17.25", "resumed clinic"]
    begun, *lines = lines_of(tmp_path / "t")
    clock_text = begun.pop("clock")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", clock_text)
    assert begun == {
        "trace": 1,
        "party": "server",
        "graph": "door",
        "action": "train",
        "parties": ["clinic", "registry", "server"],
    }
    into = {"dir": "in", "peer": "clinic", "kind": "activation", "lane": "stem -> trunk"}
    out = {"dir": "out", "peer": "clinic", "kind": "gradient", "lane": "stem -> trunk"}
    three, one = [["float32", [3, 4, 2]]], [["float32", [1, 4, 2]]]
    (h0, b0), (h1, b1) = thread.sizes
    assert (b0, b1) == (16, 16) or (b0, b1) == (96, 32)  # repeated numbers may travel once
    assert lines == [
        {"t": 0.5, "event": "opened", "peer": "registry"},
        {"t": 0.75, "event": "opened", "peer": "clinic"},
        {"t": 1.875, **into, "key": [0, 0], "header": len(first.header), "body": len(first.body), "tensors": three}
        | {"waited": 0.125},
        {"t": 1.875, **out, "key": [0, 0], "header": h0, "body": b0, "tensors": three},
        {"t": 3.875, "event": "interrupted", "peer": "clinic", "seconds": 17.2},
        {"t": 7.875, "event": "resumed", "peer": "clinic"},
        {"t": 8.375, **into, "key": [0, 1], "header": len(second.header), "body": len(second.body), "tensors": one}
        | {"gap": 6.5, "waited": 6.5},
        {"t": 11.375, **out, "key": [0, 1], "header": h1, "body": b1, "tensors": one, "gap": 9.5},
        {"t": 12.375, "event": "closed", "peer": "registry", "how": "normal"},
        {"t": 12.375, "event": "closed", "peer": "clinic", "how": "normal"},
        {"t": 12.375, "event": "over", "how": "normal", "messages": 4},
    ]


def test_gaps_are_those_of_one_lane(tmp_path: Path, clock: Clock) -> None:
    """Not of its way back, not of another peer's lane of the same number, not of another lane with that peer."""

    def passed(out: bool, peer: str, number: int) -> Passed:
        return Passed(out, Lane(number, peer, "control", "control", 0), (), 10, 0, ())

    with trace_at(tmp_path / "t") as trace:
        for out, peer, number in ((True, "a", 0), (False, "a", 0), (True, "b", 0), (True, "a", 1)):
            clock.now += 1
            trace.passed(passed(out, peer, number))
        clock.now += 1
        trace.passed(passed(True, "a", 0))
    assert [line.get("gap") for line in lines_of(tmp_path / "t")[1:-1]] == [None, None, None, None, 4.0]


@pytest.mark.parametrize(
    ("error", "how"), [(ValueError("a secret"), "error"), (KeyboardInterrupt(), "stopped"), (None, "normal")]
)
def test_the_last_line_says_how_the_run_ended(tmp_path: Path, error: BaseException | None, how: str) -> None:
    try:
        with trace_at(tmp_path / "t"):
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    last = lines_of(tmp_path / "t")[-1]
    assert (last["event"], last["how"], last["messages"]) == ("over", how, 0)
    assert "secret" not in (tmp_path / "t").read_text()


def test_the_kinds_of_a_trace_are_those_of_the_plan() -> None:
    assert set(KINDS) == set(get_args(plans.Kind))


def test_nobody_listens_unless_asked(clock: Clock) -> None:
    """Without a trace the guard does not even look at the clock."""

    class Broken:
        def monotonic(self) -> float:
            raise AssertionError("looked at the clock")

    thread = Thread(clock)
    keys = {name: key for name, key in KEYS.items() if name != "server"}
    guard = Guard(make_plan(GRAPH, "server"), keys, thread, connect_timeout=5)
    assert guard.on_passed is None and Job().trace is None
    forward = lane("server", "activation", into=True)
    message = Message("activation", (0, 0), tensors={"": torch.ones(1, 4, 2)})
    thread.events.append((0.0, arrived("clinic", forward[1], message)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("splitsec.guard.time", Broken())
        assert guard.take(forward).key == (0, 0)


# --- nothing of the content


SECRET: Final = 87654320.0
PATIENT: Final = "patient-4711"
WORDS: Final = frozenset(
    (
        *("in", "out", "server", "clinic", "registry", "door", "train"),
        *("activation", "gradient", "labels", "taken", "order", "control"),
        *("stem -> trunk", "registry -> trunk", "order of samples"),
        *("float32", "int64", "uint8", "opened", "closed", "over", "normal"),
    )
)
FIELDS: Final = {
    "message": {"t", "dir", "peer", "kind", "lane", "key", "header", "body", "tensors", "gap", "waited"},
    "event": {"t", "event", "peer", "how", "seconds", "messages"},
    "begun": {"trace", "party", "graph", "action", "parties", "clock"},
}


def assert_only_words(file: Path) -> int:
    """Every field of every line is one that we know, every string a word of the graph; returns the number of lines."""
    lines = lines_of(file)
    for line in lines:
        what = "begun" if "trace" in line else "event" if "event" in line else "message"
        assert set(line) <= FIELDS[what], line
        texts = [value for name, value in line.items() if isinstance(value, str) and name != "clock"]
        texts += line.get("parties", [])
        texts += [dtype for dtype, _ in line.get("tensors", [])]
        assert set(texts) <= WORDS, line
    text = file.read_text()
    assert str(int(SECRET)) not in text and PATIENT not in text
    return len(lines)


def test_values_facts_names_of_tensors_and_reasons_stay_outside(tmp_path: Path, clock: Clock) -> None:
    thread = Thread(clock)
    keys = {name: key for name, key in KEYS.items() if name != "clinic"}
    guard = Guard(make_plan(GRAPH, "clinic"), keys, thread, connect_timeout=5)
    with trace_at(tmp_path / "t", "clinic") as trace:
        trace.follow(guard)
        values = torch.full((3, 4, 2), SECRET)
        guard.release(
            lane("clinic", "activation", into=False), Message("activation", (0, 0), tensors={PATIENT: values})
        )
        guard.release(("registry", ORDER), Message("order", facts={PATIENT: int(SECRET), "key": b"k" * 32}))
        guard.release(("server", CONTROL), Message("control", facts={"say": PATIENT}))
        thread.events.append((0.1, Interrupted(KEYS["server"], Lost(PATIENT), 1.0)))
        guard.wait()
    assert thread.sizes[0][0] > len(PATIENT)
    text = (tmp_path / "t").read_text()
    assert [line.get("kind") for line in lines_of(tmp_path / "t")[1:4]] == ["activation", "order", "control"]
    assert PATIENT not in text and str(int(SECRET)) not in text and "kkkk" not in text


# --- files that are not as they should be


def test_a_new_trace_is_its_owners_alone(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        trace_at(tmp_path / "t").close("normal")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o600


def test_another_run_is_written_behind_the_first(tmp_path: Path) -> None:
    """And a file that others could read is closed to them."""
    file = tmp_path / "t"
    trace_at(file).close("normal")
    first = file.read_bytes()
    file.chmod(0o644)
    trace_at(file).close("error")
    assert file.read_bytes().startswith(first)
    assert [line.get("how") for line in lines_of(file)] == [None, "normal", None, "error"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_run_after_one_that_was_cut_off_begins_on_a_line_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "t"
    trace_at(file).close("normal")
    file.write_bytes(file.read_bytes()[:-9])
    trace_at(file).close("normal")
    reader = TraceReader(file, all_runs=True)
    assert [entry.event for entry in reader.entries()] == ["begun", "begun", "over"]
    assert reader.notes == [f"{file}:2: cut off; the run that wrote it ended there"]
    reader.close()


@pytest.mark.parametrize("content", [b"splitsec: 1\n", b'{"event": "turn"}\n', b"{", b"\n"])
def test_no_other_file_is_written_to(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "graph.yaml"
    file.write_bytes(content)
    file.chmod(0o644)
    with pytest.raises(UserError, match="there is a file already, and it is no trace; nothing was written"):
        trace_at(file)
    assert file.read_bytes() == content
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_two_runs_do_not_write_to_one_file_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitsec.trace.LOCK_PATIENCE", 0.05)
    with trace_at(tmp_path / "t"):
        with pytest.raises(UserError, match="another run is writing its trace there"):
            trace_at(tmp_path / "t", "clinic")
        assert [line["party"] for line in lines_of(tmp_path / "t")] == ["server"]
    trace_at(tmp_path / "t", "clinic").close("normal")


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    for place, why in ((tmp_path, "Is a directory"), (tmp_path / "no" / "t", "No such file or directory")):
        with pytest.raises(UserError, match=f"no trace can be written there: {why}") as error:
            trace_at(place)
        assert error.value.exit_code == 2


def test_a_full_disk_ends_the_tracing_with_one_warning() -> None:
    """/dev/full takes nothing: the run that calls ``passed`` learns nothing of it."""
    told: list[str] = []
    with trace_at(Path("/dev/full"), warn=told.append) as trace:
        for _ in range(3):
            trace.passed(Passed(True, Lane(0, "clinic", "control", "control", 0), (), 10, 0, ()))
    assert told == ["tracing has stopped, the run goes on: /dev/full: No space left on device"]


def test_a_reader_that_goes_away_ends_the_tracing_with_one_warning(tmp_path: Path) -> None:
    told: list[str] = []
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="nobody reads this pipe"):
        trace_at(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with trace_at(pipe, warn=told.append) as trace:
        assert json.loads(os.read(reading, 4096))["party"] == "server"
        os.close(reading)
        for _ in range(3):
            trace.passed(Passed(True, Lane(0, "clinic", "control", "control", 0), (), 10, 0, ()))
    assert told == [f"tracing has stopped, the run goes on: {pipe}: Broken pipe"]


def test_a_reader_that_is_too_slow_is_not_waited_for(tmp_path: Path) -> None:
    told: list[str] = []
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with trace_at(pipe, warn=told.append) as trace:
        for _ in range(2000):  # twice and more what a pipe holds
            trace.passed(Passed(True, Lane(0, "clinic", "control", "control", 0), (), 10, 0, ()))
    os.close(reading)
    assert told == [f"tracing has stopped, the run goes on: {pipe}: whoever reads it is too slow"]


# --- reading it back


HEAD: Final = (
    '{"trace":1,"party":"clinic","graph":"door","action":"train","parties":["clinic","server"],'
    '"clock":"2026-11-21T10:00:00.250000+00:00"}'
)
PEER: Final = HEAD.replace('"party":"clinic"', '"party":"server"').replace("00.25", "00.75")
SENT: Final = (
    '{"t":1.5,"dir":"out","peer":"server","kind":"activation","lane":"stem -> trunk","key":[7,1],"header":30,'
    '"body":2048,"tensors":[["float32",[32,16]]]}'
)
CAME: Final = (
    '{"t":1.75,"dir":"in","peer":"server","kind":"gradient","lane":"stem -> trunk","key":[7,1],"header":30,'
    '"body":3145728,"tensors":[["float32",[32,16]],["float32",[2]]],"gap":0.0305,"waited":1.25}'
)
OPENED: Final = '{"t":0.5,"event":"opened","peer":"server"}'
BROKE: Final = '{"t":1.6,"event":"interrupted","peer":"server","seconds":17.2}'
CLOSED: Final = '{"t":2.0,"event":"closed","peer":"server","how":"lost"}'
OVER: Final = '{"t":2.0,"event":"over","how":"normal","messages":2}'


def written(file: Path, *lines: str, end: str = "\n") -> Path:
    file.write_text("\n".join(lines) + end, encoding="utf-8")
    return file


BAD: Final = {
    "text": "hello",
    "nothing": "",
    "a list": "[]",
    "deep": "[" * 100_000,
    "no kind": SENT.replace('"kind":"activation",', ""),
    "another kind": SENT.replace("activation", "gossip"),
    "another direction": SENT.replace('"out"', '"up"'),
    "time that is none": SENT.replace("1.5", '"1.5"'),
    "time before the run": SENT.replace("1.5", "-1.5"),
    "no number": SENT.replace("1.5", "NaN"),
    "no end": SENT.replace("1.5", "1e400"),
    "many digits": SENT.replace("2048", "2" * 400),
    "half a byte": SENT.replace("2048", "2048.5"),
    "a shape that is none": SENT.replace("[32,16]", '"32"'),
    "a colour for the terminal": SENT.replace("stem -> trunk", r"stem\u001b[31m"),
    "a line of one's own": OPENED.replace("server", r"server\nhospital is over"),
    "text from right to left": OPENED.replace("server", "\u202eserver"),
    "an unknown event": OPENED.replace("opened", "exploded"),
    "an end that is none": OVER.replace('"normal"', "3"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_line_that_is_none_is_told_with_its_number(tmp_path: Path, name: str) -> None:
    reader = TraceReader(written(tmp_path / "t", HEAD, SENT, BAD[name], CAME))
    entries = reader.entries()
    assert [next(entries).event, next(entries).kind] == ["begun", "activation"]
    with pytest.raises(UserError) as error:
        next(entries)
    assert error.value.seen.startswith(f"{tmp_path / 't'}:3: not a line of a trace: ")
    assert error.value.expected and error.value.fix
    reader.close()


@pytest.mark.parametrize(
    "first", ["splitsec: 1", SENT, OPENED, HEAD.replace('"party":"clinic",', ""), HEAD.replace("2026-11", "x")]
)
def test_a_file_that_is_no_trace(tmp_path: Path, first: str) -> None:
    reader = TraceReader(written(tmp_path / "t", first, SENT))
    with pytest.raises(UserError) as error:
        list(reader.entries())
    assert error.value.seen.startswith(f"{tmp_path / 't'}:1: not a line of a trace: ")
    reader.close()


def test_the_lines_that_the_documentation_shows(tmp_path: Path) -> None:
    page = (SOURCE / "docs" / "tracing.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    reader = TraceReader(written(tmp_path / "t", shown, end=""))
    entries = list(reader.entries())
    assert [entry.event or entry.kind for entry in entries] == ["begun", "opened", "activation", "gradient", "over"]
    assert reader.over and entries[2].bytes == 2078 and entries[3].waited == 0.05364
    fields = {name for entry in entries for name in entry.line or {}} - FIELDS["begun"]
    told = page[page.index("| field |") : page.index("Only messages that passed")]
    assert [name for name in (fields | {"seconds", "gap", "waited"}) - {"messages"} if f"`{name}`" not in told] == []
    reader.close()


def test_a_trace_of_a_later_version(tmp_path: Path) -> None:
    reader = TraceReader(written(tmp_path / "t", HEAD.replace('"trace":1', '"trace":2')))
    with pytest.raises(UserError, match=":1: a trace of version 2\n  expected: version 1\n"):
        list(reader.entries())
    reader.close()


def test_a_file_is_read_as_it_grows(tmp_path: Path) -> None:
    """A line counts once its end is there."""
    file = written(tmp_path / "t", HEAD, SENT[:40], end="")
    reader = TraceReader(file)
    assert [entry.event for entry in reader.entries()] == ["begun"]
    assert reader.cut_off and not reader.over
    with file.open("a") as more:
        more.write(SENT[40:])
    assert list(reader.entries()) == []
    with file.open("a") as more:
        more.write("\n" + OVER + "\n")
    first, last = reader.entries()
    assert (first.kind, first.key, first.bytes, first.clock - last.clock) == ("activation", (7, 1), 2078, -0.5)
    assert reader.over and not reader.cut_off
    reader.close()


def test_whether_anybody_still_writes(tmp_path: Path) -> None:
    trace = trace_at(tmp_path / "t")
    reader = TraceReader(tmp_path / "t")
    assert not reader.abandoned()
    trace.close("normal")
    assert reader.abandoned()
    reader.close()


# --- splitsec listen


def test_lines_for_people(shell: Shell, tmp_path: Path) -> None:
    """To the letter; the two parties merged by their clocks, without colours in a pipe."""
    (tmp_path / "both").mkdir()
    written(tmp_path / "both" / f"clinic{SUFFIX}", HEAD, OPENED, SENT, BROKE, CAME, CLOSED, OVER)
    taken = SENT.replace('"out"', '"in"').replace('"server"', '"clinic"').replace("]]]}", ']]],"waited":0.0125}')
    written(tmp_path / "both" / f"server{SUFFIX}", PEER, taken, OVER.replace("2.0", "1.75"))
    end = shell.run("listen", "both")
    assert (end.code, end.stderr) == (0, "")
    assert (
        end.stdout
        == """\
  seconds                   kind         lane                    step  micro       size  shape                  gap    waited
    0.000  clinic begins to train: door, 2026-11-21 10:00:00 UTC
    0.500  clinic - server  opened
    0.500  server begins to train: door, 2026-11-21 10:00:00 UTC
    1.500  clinic → server  activation   stem -> trunk              7      1    2.0 KiB  float32 [32, 16]
    1.600  clinic - server  interrupted  tries again for 17.2 s
    1.750  clinic ← server  gradient     stem -> trunk              7      1    3.0 MiB  2 tensors          30.5 ms    1.25 s
    2.000  clinic - server  closed       lost
    2.000  clinic is over: normal
    2.000  server ← clinic  activation   stem -> trunk              7      1    2.0 KiB  float32 [32, 16]             12.5 ms
    2.250  server is over: normal
"""  # noqa: E501
    )


def test_only_what_was_asked_for(shell: Shell, tmp_path: Path) -> None:
    written(tmp_path / "t", HEAD, OPENED, SENT, BROKE, CAME, OVER)
    peer = SENT.replace('"server"', '"registry"')
    written(tmp_path / "u", PEER.replace('"clinic","server"', '"clinic","registry"'), peer, OVER)

    def chosen(*options: str) -> list[tuple[str, str]]:
        end = shell.run("listen", "t", "u", "--json", *options)
        assert end.code == 0, end.stderr
        lines = [json.loads(line) for line in end.stdout.splitlines()]
        return [(line["party"], line.get("kind", line.get("event", "begun"))) for line in lines]

    assert chosen("--kind", "gradient") == [("clinic", "gradient")]
    assert chosen("--kind", "gradient", "--kind", "interrupted") == [("clinic", "interrupted"), ("clinic", "gradient")]
    assert chosen("--peer", "registry") == [("server", "activation")]
    assert chosen("--peer", "registry", "--kind", "gradient") == []
    assert len(chosen()) == 9
    unknown = shell.run("listen", "t", "--peer", "nobody")
    assert (unknown.code, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith(
        "splitsec: --peer nobody: no trace here knows such a party\n  expected: one of clinic"
    )


def test_json_is_what_stands_in_the_file(shell: Shell, tmp_path: Path) -> None:
    written(tmp_path / "t", HEAD, SENT)
    first, second = map(json.loads, shell.run("listen", "t", "--json").stdout.splitlines())
    assert first == {"at": "2026-11-21T10:00:00.250000+00:00", **json.loads(HEAD)}
    assert second == {"party": "clinic", "at": "2026-11-21T10:00:01.750000+00:00", **json.loads(SENT)}


def test_only_the_last_run_unless_asked(shell: Shell, tmp_path: Path) -> None:
    written(tmp_path / "t", HEAD, SENT, OVER, HEAD.replace("10:00", "11:00"), CAME, OVER)
    end = shell.run("listen", "t", "--json")
    assert [json.loads(line).get("kind") for line in end.stdout.splitlines()] == [None, "gradient", None]
    assert end.stderr == "splitsec: t: also holds an earlier run: --all-runs shows all\n"
    end = shell.run("listen", "t", "--json", "--all-runs")
    kinds = [json.loads(line).get("kind") for line in end.stdout.splitlines()]
    assert (kinds, end.stderr) == ([None, "activation", None, None, "gradient", None], "")


def test_sums_by_lane(shell: Shell, tmp_path: Path) -> None:
    """Gaps of 1 to 20 s: the median is 10.5, and 19 of 20 are at most 19; the first message took nobody knows how
    long.
    """
    at, lines = 0.0, [SENT]
    for gap in range(1, 21):
        at += gap
        lines.append(SENT.replace("1.5", str(1.5 + at)).replace("}", f',"gap":{gap}}}'))
    file = written(
        tmp_path / "t", HEAD, OPENED, *lines, BROKE, CAME, '{"t":300,"event":"over","how":"normal","messages":22}'
    )
    end = shell.run("listen", file, "--summary", "--json")
    assert json.loads(end.stdout) == {
        "parties": {"clinic": {"runs": 1, "seconds": 300, "waited": 1.25, "interruptions": 1}},
        "lanes": [
            {"party": "clinic", "dir": "out", "peer": "server", "kind": "activation", "lane": "stem -> trunk"}
            | {"messages": 21, "bytes": 21 * 2078, "gap_median": 10.5, "gap_p95": 19.0}
            | {"mib_per_second": round(20 * 2078 / 210 / 2**20, 6), "waited": 0},
            {"party": "clinic", "dir": "in", "peer": "server", "kind": "gradient", "lane": "stem -> trunk"}
            | {"messages": 1, "bytes": 3145758, "gap_median": 0.0305, "gap_p95": 0.0305}
            | {"mib_per_second": round(3145758 / 0.0305 / 2**20, 6), "waited": 1.25},
        ],
    }
    table = shell.run("listen", file, "--summary").stdout
    assert re.search(
        r"clinic │ → │ server │ activation │ stem -> trunk │ +21 │ 42\.6 KiB │ +10\.50 s │ +19\.00 s", table
    )
    assert table.endswith("clinic: 300.0 s, 1.2 s of them waiting for messages; 1 interruption of a connection\n")


def test_what_listen_says_of_files_that_are_none(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    written(tmp_path / "folder" / "t.jsonl", HEAD)
    written(tmp_path / "cut", HEAD, SENT, CAME[:50], end="")
    (tmp_path / "empty").touch()
    end = shell.run("listen", "cut", "empty", "--json")
    assert (end.code, len(end.stdout.splitlines())) == (0, 2)
    assert end.stderr == (
        "splitsec: cut: the last line is cut off: the run goes on, was killed, or the disk was full\n"
        "splitsec: empty: empty\n"
    )
    end = shell.run("listen", "folder")
    assert (end.code, end.stdout) == (2, "")
    assert end.stderr.startswith(
        "splitsec: folder: no trace there\n  expected: files whose names end in .trace.jsonl\n"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_trace_of_somebody_else(shell: Shell, tmp_path: Path) -> None:
    written(tmp_path / "t", HEAD).chmod(0)
    end = shell.run("listen", "t")
    assert end.code == 2
    assert end.stderr.startswith("splitsec: t: cannot be read: Permission denied\n")


def test_following_to_the_last_line(shell: Shell, tmp_path: Path) -> None:
    """Half a line is waited for; the run's last one ends it."""
    file = written(tmp_path / "t", HEAD, SENT[:40], end="")
    with file.open("a") as running:
        fcntl.flock(running, fcntl.LOCK_EX)
        command = shell.start("listen", "-f", file)
        command.out.line_with("begins to train")
        assert "activation" not in command.out.text
        running.write(SENT[40:] + "\n")
        running.flush()
        command.out.line_with("activation")
        running.write(OVER + "\n")
        running.flush()
        end = command.end()
    assert (end.code, end.stderr) == (0, "")
    assert end.stdout.splitlines()[-1].endswith("clinic is over: normal")


def test_following_until_ctrl_c(shell: Shell, tmp_path: Path) -> None:
    """A folder where no trace is yet is waited for; the sums come at the end."""
    (tmp_path / "traces").mkdir()
    command = shell.start("listen", "--follow", "traces")
    command.err.line_with("no trace there yet; waiting for one")
    with trace_at(tmp_path / "traces" / f"server{SUFFIX}") as trace:
        command.out.line_with("server begins to train")
        trace.passed(Passed(True, Lane(0, "clinic", "control", "control", 0), (), 10, 0, ()))
        command.out.line_with("control")
        os.kill(command.pid, signal.SIGINT)
        end = command.end()
    assert end.code == 0
    assert end.stderr == "splitsec: no trace there yet; waiting for one\n"


def test_following_a_run_that_is_killed(shell: Shell, tmp_path: Path) -> None:
    """Nobody writes it any more: no need to wait for ever."""
    file = written(tmp_path / "t", HEAD, SENT, CAME[:40], end="")
    end = shell.run("listen", "-f", file, "--json")
    assert (end.code, len(end.stdout.splitlines())) == (0, 2)
    assert (
        end.stderr
        == f"splitsec: {file}: nobody writes it any more, and the run's last line is missing: it was killed?\n"
    )


def test_whoever_reads_may_stop_reading(shell: Shell, tmp_path: Path) -> None:
    """`splitsec listen ... | head` ends in peace."""
    file = written(tmp_path / "t", HEAD, *[SENT] * 20_000)
    command = shell.start("listen", file)
    assert command.process.stdout is not None
    command.out.line_with("activation")
    end = command.end()
    assert (end.code, end.stderr) == (0, "")
    assert len(end.stdout.splitlines()) == 20_002


# --- real parties


Totals = dict[tuple[str, str, str, str], tuple[int, int]]
"""(sender, receiver, kind, lane) to messages and bytes."""


def reported(events: list[tuple[str, dict[str, Any]]]) -> Totals:
    """What the parties say of their own traffic when they are done."""
    return {
        (party, row["peer"], row["kind"], row["name"]): (row["messages"], row["bytes"])
        for party, event in events
        if event["event"] == "traffic"
        for row in event["lanes"]
    }


def traced(files: Iterator[Path], direction: str) -> Totals:
    messages: Counter[tuple[str, str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str, str]] = Counter()
    for file in files:
        begun, *lines = lines_of(file)
        for line in lines:
            if line.get("dir") == direction:
                ends = (begun["party"], line["peer"])
                sender, receiver = ends if direction == "out" else ends[::-1]
                messages[lane := (sender, receiver, line["kind"], line["lane"])] += 1
                sizes[lane] += line["header"] + line["body"]
    return {lane: (messages[lane], sizes[lane]) for lane in messages}


def without_control(totals: Totals) -> Totals:
    """The last words on the control lane need not be taken in by a party that is done."""
    return {lane: total for lane, total in totals.items() if lane[2] != "control"}


def test_a_trace_agrees_with_what_the_parties_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lane by lane, messages and bytes, of a real run with three processes; what left one party came in at another."""
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    events: list[tuple[str, dict[str, Any]]] = []
    traces = tmp_path / "traces"
    result = simulate(
        SOURCE / "examples" / "vertical", epochs=1, trace=traces, watch=lambda *event: events.append(event)
    )
    files = sorted(traces.iterdir())
    assert [file.name for file in files] == [f"{name}{SUFFIX}" for name in ("hospital", "laboratory", "registry")]
    assert [stat.S_IMODE(place.stat().st_mode) for place in (traces, *files)] == [0o700, 0o600, 0o600, 0o600]

    told = reported(events)
    out = traced(iter(files), "out")
    assert out == told and len(out) >= 10
    assert without_control(traced(iter(files), "in")) == without_control(told)
    rows = {(row["sender"], row["receiver"], row["kind"]): (row["messages"], row["bytes"]) for row in result.cuts}
    assert {(*lane[:2], lane[2]): total for lane, total in without_control(out).items()} == rows

    for file in files:
        lines = lines_of(file)[1:]
        assert [line["event"] for line in lines[:2]] == ["opened", "opened"]
        said = [line["event"] for line in lines if "event" in line]  # one may leave while another still says goodbye
        assert said[-3:] == ["closed", "closed", "over"] and lines[-1]["event"] == "over"
        assert lines[-1]["messages"] == sum("dir" in line for line in lines)
        times = [line["t"] for line in lines]
        assert times == sorted(times) and times[-1] <= result.wall_seconds
        assert sum(line.get("waited", 0.0) for line in lines) <= times[-1]
    steps = [line["key"] for line in lines_of(files[0]) if line.get("kind") == "activation"]
    assert steps == [[step, 0] for step in range(len(steps))] and len(steps) > result.steps
    shapes = {str(line["tensors"]) for line in lines_of(files[0]) if line.get("kind") == "activation"}
    assert "[['float32', [32, 16]]]" in shapes


PLANTED: Final = """\
splitsec: 1
name: door
parties:
  clinic: {}
  registry: {}
  server: {listen: "tcp://127.0.0.1:PORT"}
segments:
  stem: {at: clinic, data: x}
  trunk: {at: server, loss: bce_with_logits}
cuts:
  - {from: stem, to: trunk, shape: [6], dtype: float32, raw: true}
labels:
  - {from: registry, to: trunk, field: y, shape: [1], dtype: float32}
training: {epochs: 2, batch_size: 4, micro_batches: 2, seed: 87654320}
timeouts: {connect: 60, lost: 5}
"""
MODELS: Final = """\
import torch
from torch import nn


def stem():
    layer = nn.Linear(6, 6)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(6))
        layer.bias.zero_()
    return layer


def trunk():
    return nn.Linear(6, 1)
"""
DATA: Final = """\
import torch


def train(field):
    width = 6 if field == "x" else 1
    return {field: torch.full((10, width), 87654320.0), "id": [f"patient-4711-{row}" for row in range(10)]}
"""


def planted(shell: Shell, tmp_path: Path) -> Path:
    """Three parties; every number of samples and labels is one that can be recognised, and every id."""
    folder = write_folder(tmp_path / "planted", PLANTED.replace("PORT", str(free_port())), clinics=["clinic"])
    parties = folder / "parties"
    (parties / "models.py").write_text(MODELS)
    (parties / "data.py").write_text(DATA)
    optimizer = "optimizer: {name: sgd, lr: 1.0e-30}"  # what is planted stays what it is
    (parties / "clinic.yaml").write_text(
        f'party: clinic\nsegments:\n  stem: {{model: "models:stem", {optimizer}}}\n'
        'data: {train: "data:train", args: {field: x}}\n'
    )
    (parties / "server.yaml").write_text(f'party: server\nsegments:\n  trunk: {{model: "models:trunk", {optimizer}}}\n')
    (parties / "registry.yaml").write_text('party: registry\ndata: {train: "data:train", args: {field: y}}\n')
    return keyed(shell, folder, "clinic", "registry", "server")


def test_parties_that_join_trace_nothing_of_what_they_send(shell: Shell, tmp_path: Path) -> None:
    """With sample values, labels, ids, fingerprints and keys at work: every word of every line is one of the graph's.
    One party writes to a full disk, and trains all the same; another is listened to as it runs.
    """
    folder = planted(shell, tmp_path)

    def join(party: str, *more: str | Path) -> Any:
        return shell.start("join", "--graph", folder / "graph.yaml", "--party", party, "--out", "out", *more)

    commands = {
        "server": join("server", "--trace", "server.jsonl"),
        "clinic": join("clinic", "--trace", "clinic.jsonl"),
        "registry": join("registry", "--quiet", "--trace", "/dev/full"),
    }
    ends = {name: command.end() for name, command in commands.items()}
    assert {name: end.code for name, end in ends.items()} == {"server": 0, "clinic": 0, "registry": 0}, ends
    warning = "registry: tracing has stopped, the run goes on: /dev/full: No space left on device\n"
    assert ends["registry"].stderr == warning
    assert "tracing" not in ends["server"].stderr + ends["clinic"].stderr

    # 10 samples in batches of 4, 4 and 2, each in two micro-batches, twice: 12 messages each way
    assert assert_only_words(tmp_path / "clinic.jsonl") > 20
    assert assert_only_words(tmp_path / "server.jsonl") > 40
    for file in ("clinic.jsonl", "server.jsonl"):
        kinds = Counter(line.get("kind") for line in lines_of(tmp_path / file))
        assert (kinds["activation"], kinds["gradient"]) == (12, 12)
    assert Counter(line.get("kind") for line in lines_of(tmp_path / "server.jsonl"))["labels"] == 12
    sent = [line for line in lines_of(tmp_path / "clinic.jsonl") if line.get("kind") == "activation"]
    assert [line["key"] for line in sent[:3]] == [[0, 0], [0, 1], [1, 0]]
    assert [line["tensors"][0][1] for line in sent[:3]] == [[2, 6], [2, 6], [2, 6]]

    followed = shell.run("listen", "-f", "clinic.jsonl", "--summary", "--json")
    lanes = {(row["dir"], row["kind"]): row for row in json.loads(followed.stdout)["lanes"]}
    assert lanes["out", "activation"]["messages"] == 12
    assert lanes["out", "activation"]["bytes"] == sum(line["header"] + line["body"] for line in sent)


def test_no_trace_is_left_unless_asked_for(shell: Shell, tmp_path: Path) -> None:
    folder = planted(shell, tmp_path)
    before = set(tmp_path.rglob("*"))
    end = shell.run("simulate", folder, "--epochs", "1", "--quiet")
    assert end.code == 0, end.stderr
    left = {file.name for file in set(tmp_path.rglob("*")) - before if not {"__pycache__", ".scratch"} & {*file.parts}}
    assert left == set()


def test_simulate_says_before_it_starts_that_it_cannot_trace(shell: Shell, folder: Path) -> None:
    (folder.parent / "occupied").write_text("")
    end = shell.run("simulate", "small", "--trace", "occupied")
    assert end.code == 2
    assert end.stderr.startswith("splitsec: nothing can be written to occupied: ")
    assert end.stderr.endswith("  to do: choose another --trace\n")


def test_join_does_not_write_over_what_is_no_trace(shell: Shell, tmp_path: Path) -> None:
    folder = planted(shell, tmp_path)
    graph = (folder / "graph.yaml").read_text()
    end = shell.run("join", "--graph", "planted/graph.yaml", "--party", "clinic", "--trace", "planted/graph.yaml")
    assert end.code == 2
    assert end.stderr.endswith(
        "splitsec: planted/graph.yaml: there is a file already, and it is no trace; nothing was written\n"
        "  expected: a free name, or a trace, to which another run is added\n"
        "  to do: choose another --trace\n"
    )
    assert (folder / "graph.yaml").read_text() == graph
