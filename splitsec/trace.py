"""A trace: what one party's traffic looked like, line by line, and never what was in it.

Here: the file that a run writes when it is asked to (``--trace``), and the same file read back, checked.  One JSON
object a line: how the run began, then each message that passed the guard and each connection that opened, broke, came
back or closed, then how it ended.  No line holds a value, a sample id, a key, an address or anybody's free text.
Not here: what may pass (``guard``, which tells of it), how a trace is shown.  Next: ``cli/listen.py``, docs/tracing.md.

Writing never stands in the way of the run: nothing is open unless somebody asked, a full disk or a reader that went
away ends the tracing with one warning, and a reader that is too slow is not waited for.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from splitsec.errors import UserError

if TYPE_CHECKING:
    from splitsec.guard import Guard, Passed

__all__ = ["CONNECTION", "KINDS", "SUFFIX", "Begun", "Entry", "Trace", "TraceReader"]

VERSION: Final = 1
SUFFIX: Final = ".trace.jsonl"
"""How files end that are found in a folder; a file that is named may be called anything."""

KINDS: Final = ("activation", "gradient", "labels", "taken", "weights", "order", "control", "exchange")
"""Kinds of messages, as ``plan`` has them."""
CONNECTION: Final = ("opened", "interrupted", "resumed", "closed")

HEAD: Final = b'{"trace":'
"""What the first line of every run begins with, and no other."""
LINE_MAX: Final = 16 * 1024 * 1024
"""Bytes; a line about weights names every tensor, which makes some hundred kilobytes."""
LOCK_PATIENCE: Final = 1.0
"""Seconds; a reader that looks whether anybody still writes holds the lock for an instant."""

_log = logging.getLogger("splitsec")


class Trace:
    """Writes one party's trace to ``file``, behind what is there.  Use it in a ``with`` block.

    ``warn`` is told once, in one sentence, if tracing has to stop before the run does.
    Raises ``UserError`` where ``file`` cannot be written, is something else, or is being written by another run.
    """

    def __init__(
        self,
        file: Path,
        *,
        party: str,
        graph: str,
        action: str,
        parties: tuple[str, ...],
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        self._file = file
        self._warn = warn
        self._messages = 0
        self._last: dict[tuple[bool, str, int], float] = {}
        self._connected: set[str] = set()
        self._open: int | None = _opened(file)
        self._began = time.monotonic()
        clock = datetime.now(UTC).isoformat(timespec="microseconds")
        self._write(
            {
                "trace": VERSION,
                "party": party,
                "graph": graph,
                "action": action,
                "parties": list(parties),
                "clock": clock,
            }
        )

    def follow(self, guard: Guard) -> None:
        """Write a line for whatever ``guard`` lets pass from now on, and for what becomes of its connections.

        Whoever was told of connections before still is.
        """
        opened, interrupted, resumed, closed = (
            guard.on_opened,
            guard.on_interrupted,
            guard.on_resumed,
            guard.on_closed,
        )

        def on_opened(party: str) -> None:
            self._connection("opened", party)
            opened(party)

        def on_interrupted(party: str, why: str, seconds: float) -> None:
            self._connection("interrupted", party, seconds=round(seconds, 1))
            interrupted(party, why, seconds)

        def on_resumed(party: str) -> None:
            self._connection("resumed", party)
            resumed(party)

        def on_closed(party: str, how: str) -> None:
            self._connection("closed", party, how=how)
            closed(party, how)

        guard.on_opened, guard.on_interrupted = on_opened, on_interrupted
        guard.on_resumed, guard.on_closed = on_resumed, on_closed
        guard.on_passed = self.passed

    def passed(self, passed: Passed) -> None:
        """Write the line of one message."""
        if self._open is None:
            return
        lane = passed.lane
        now = time.monotonic() - self._began
        before = self._last.get(place := (passed.out, lane.peer, lane.number))
        self._last[place] = now
        self._messages += 1
        line: dict[str, Any] = {
            "t": round(now, 6),
            "dir": "out" if passed.out else "in",
            "peer": lane.peer,
            "kind": lane.kind,
            "lane": lane.name,
            "key": passed.key,
            "header": passed.header_bytes,
            "body": passed.body_bytes,
            "tensors": passed.tensors,
        }
        if before is not None:
            line["gap"] = round(now - before, 6)
        if not passed.out:
            line["waited"] = round(passed.waited, 6)
        self._write(line)

    def _connection(self, event: str, peer: str, **more: object) -> None:
        (self._connected.discard if event == "closed" else self._connected.add)(peer)
        self._write({"t": self._now(), "event": event, "peer": peer, **more})

    def close(self, how: str) -> None:
        """Write the last lines: what was still connected is closed, and the run is over.  Again: nothing."""
        for peer in sorted(self._connected):
            self._connection("closed", peer, how=how)
        self._write({"t": self._now(), "event": "over", "how": how, "messages": self._messages})
        if self._open is not None:
            os.close(self._open)
            self._open = None

    def _now(self) -> float:
        return round(time.monotonic() - self._began, 6)

    def _write(self, line: dict[str, Any]) -> None:
        if self._open is None:
            return
        left = memoryview(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        try:
            while left:
                left = left[os.write(self._open, left) :]
        except OSError as error:
            os.close(self._open)
            self._open = None
            slow = isinstance(error, BlockingIOError)
            why = "whoever reads it is too slow" if slow else error.strerror or type(error).__name__
            self._warn(f"tracing has stopped, the run goes on: {self._file}: {why}")

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("normal" if error is None else "stopped" if isinstance(error, KeyboardInterrupt) else "error")


def _opened(file: Path) -> int:
    """A descriptor to append to; it never blocks, so that nobody who reads a pipe can hold the run up."""
    flags = os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        pipe = stat.S_ISFIFO(os.stat(file).st_mode)
    except OSError:
        pipe = False
    try:
        descriptor = os.open(file, flags | (os.O_WRONLY if pipe else os.O_RDWR | os.O_CREAT), 0o600)
    except OSError as error:
        raise UserError(
            f"{file}: no trace can be written there: " + ("nobody reads this pipe" if pipe else f"{error.strerror}"),
            expected="a pipe that somebody reads already" if pipe else "a file that you may write, or a free name",
            fix="start the reader first" if pipe else "choose another --trace",
        ) from None
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            _prepared(descriptor, file)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _prepared(descriptor: int, file: Path) -> None:
    """See that a regular file is ours to write behind, and that nobody else may read it."""
    _locked(descriptor, file)
    about = os.fstat(descriptor)
    if about.st_size:
        if os.pread(descriptor, len(HEAD), 0) != HEAD:
            raise UserError(
                f"{file}: there is a file already, and it is no trace; nothing was written",
                expected="a free name, or a trace, to which another run is added",
                fix="choose another --trace",
            )
        if os.pread(descriptor, 1, about.st_size - 1) != b"\n":
            with suppress(OSError):  # a full disk ends the tracing with a warning, at the first line
                os.write(descriptor, b"\n")  # the run before was cut off in the middle of a line
    if about.st_uid == os.geteuid() and about.st_mode & 0o077:
        with suppress(OSError):  # a file system without modes
            os.fchmod(descriptor, 0o600)


def _locked(descriptor: int, file: Path) -> None:
    until = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise UserError(
                    f"{file}: another run is writing its trace there",
                    expected="one file for each run",
                    fix="choose another --trace",
                ) from None
            time.sleep(0.02)
        except OSError:
            return  # a file system without locks


# --- reading it back


@dataclass(frozen=True)
class Begun:
    """The first line of a run."""

    party: str
    graph: str
    action: str
    parties: tuple[str, ...]
    clock: float
    """When it began, as seconds since 1970 by that machine's clock."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a trace, checked.  ``event`` is empty for a message."""

    begun: Begun
    seconds: float
    """Since the run began."""
    event: str
    peer: str = ""
    out: bool = False
    kind: str = ""
    lane: str = ""
    key: tuple[int, ...] = ()
    header: int = 0
    body: int = 0
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()
    gap: float | None = None
    """Seconds since the message before it on this lane; None for the first."""
    waited: float = 0.0
    """Seconds for which the computing thread stood still until it came."""
    how: str = ""
    patience: float = 0.0
    """Seconds for which a connection that broke is tried again."""
    line: dict[str, Any] | None = None
    """As it stands in the file."""

    @property
    def clock(self) -> float:
        """When it was, by that machine's clock, as seconds since 1970."""
        return self.begun.clock + self.seconds

    @property
    def bytes(self) -> int:
        """Header and body, before encryption."""
        return self.header + self.body


class TraceReader:
    """Reads ``file``, also while it grows.  Only its last run, unless ``all_runs``.

    Raises ``UserError``, with file and line, at anything but a trace.
    """

    def __init__(self, file: Path, *, all_runs: bool = False) -> None:
        self.file = file
        self.begun: Begun | None = None
        self.over = False
        """The last line that was read ended a run."""
        self.notes: list[str] = []
        """What a person should know who reads it."""
        self.earlier = 0
        """Runs before the one that is read."""
        self._rest = b""
        self._number = 0
        try:
            self._stream: BinaryIO = open(file, "rb")  # noqa: SIM115 (closed in `close`)
            if not all_runs and self._stream.seekable():
                self._skip_to_the_last_run()
        except OSError as error:
            raise _unreadable(file, error) from None

    def close(self) -> None:
        """Give the file back."""
        self._stream.close()

    @property
    def cut_off(self) -> bool:
        """What was read last is no whole line (yet)."""
        return bool(self._rest)

    def abandoned(self) -> bool:
        """Nobody writes to it any more: look once more, then it ends as it stands."""
        try:
            fcntl.flock(self._stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        fcntl.flock(self._stream, fcntl.LOCK_UN)
        return True

    def entries(self) -> Iterator[Entry]:
        """Every line that is there and was not read before."""
        broken: UserError | None = None
        while line := self._next_line():
            try:
                entry = self._parsed(line)
            except UserError as error:
                if broken is not None or self.begun is None:
                    raise broken or error from None
                broken = error
                continue
            if broken is not None:
                if entry.event != "begun":
                    raise broken
                self.notes.append(f"{self.file}:{self._number - 1}: cut off; the run that wrote it ended there")
                broken = None
            self.over = entry.event == "over"
            yield entry
        if broken is not None:
            raise broken

    def _next_line(self) -> bytes:
        try:
            line = self._rest + self._stream.readline(LINE_MAX - len(self._rest))
        except OSError as error:
            raise _unreadable(self.file, error) from None
        if line.endswith(b"\n"):
            self._rest = b""
            self._number += 1
            return line
        if len(line) >= LINE_MAX:
            self._number += 1
            raise self._no_trace(f"a line of more than {LINE_MAX >> 20} MiB")
        self._rest = line
        return b""

    def _skip_to_the_last_run(self) -> None:
        place = number = position = lines = runs = 0
        while piece := self._stream.readline(LINE_MAX):
            if piece.startswith(HEAD):
                place, number = position, lines
                runs += 1
            position += len(piece)
            lines += piece.endswith(b"\n")
            if not runs:
                break  # it does not begin as a trace does: `entries` says so
        self.earlier = max(0, runs - 1)
        self._number = number
        self._stream.seek(place)

    def _parsed(self, text: bytes) -> Entry:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict):
            raise self._no_trace("no JSON object")
        if "trace" in line:
            self.begun = self._parsed_first(line)
            return Entry(self.begun, 0.0, "begun", line=line)
        if self.begun is None:
            raise self._no_trace("does not say how a run began")
        entry = _parsed(self.begun, line)
        if entry is None:
            raise self._no_trace("no message, and no event of a connection")
        return entry

    def _parsed_first(self, line: dict[str, Any]) -> Begun:
        match line:
            case {
                "trace": int(version),
                "party": str(party),
                "graph": str(graph),
                "action": str(action),
                "parties": list(parties),
                "clock": str(clock),
            } if all(_is_word(word) for word in (party, graph, action, *parties)):
                pass
            case _:
                raise self._no_trace("does not say how a run began")
        if version != VERSION:
            raise UserError(
                f"{self.file}:{self._number}: a trace of version {version}",
                expected=f"version {VERSION}",
                fix="read it with the splitsec release that wrote it",
            )
        try:
            began = datetime.fromisoformat(clock)
        except ValueError:
            began = None
        if began is None or began.tzinfo is None:
            raise self._no_trace("no time at which the run began")
        return Begun(party, graph, action, tuple(parties), began.timestamp())

    def _no_trace(self, seen: str) -> UserError:
        return UserError(
            f"{self.file}:{self._number}: not a line of a trace: {seen}",
            expected="a file that `--trace` of `splitsec join` or `splitsec simulate` wrote",
            fix="look whether it is the right file, and whether somebody has edited it",
        )


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(
        f"{file}: cannot be read: {error.strerror}",
        expected="a trace, or a folder of traces",
        fix="check the path, and who may read it (a trace is its owner's alone)",
    )


def _parsed(begun: Begun, line: dict[str, Any]) -> Entry | None:
    """None for whatever is not as we write it: it came from a file, and goes to a terminal."""
    match line:
        case {"t": t, "event": "over", "how": str(how)} if _is_time(t) and _is_word(how):
            return Entry(begun, t, "over", how=how, line=line)
        case {"t": t, "event": str(event), "peer": str(peer)} if event in CONNECTION and _is_time(t) and _is_word(peer):
            how, patience = line.get("how", ""), line.get("seconds", 0.0)
            if not _is_word(how) or not _is_time(patience):
                return None
            return Entry(begun, t, event, peer, how=how, patience=patience, line=line)
        case {
            "t": t,
            "dir": "in" | "out" as direction,
            "peer": str(peer),
            "kind": str(kind),
            "lane": str(lane),
            "key": list(key),
            "header": header,
            "body": body,
            "tensors": list(tensors),
        }:
            gap, waited = line.get("gap"), line.get("waited", 0.0)
            known = kind in KINDS and _is_word(peer) and _is_word(lane)
            counts = all(map(_is_count, (header, body, *key)))
            times = _is_time(t) and _is_time(waited) and (gap is None or _is_time(gap))
            if not (known and counts and times and all(map(_is_description, tensors))):
                return None
            return Entry(
                begun,
                t,
                "",
                peer,
                out=direction == "out",
                kind=kind,
                lane=lane,
                key=tuple(key),
                header=header,
                body=body,
                tensors=tuple((dtype, tuple(shape)) for dtype, shape in tensors),
                gap=gap,
                waited=waited,
                line=line,
            )
    return None


def _is_description(tensor: object) -> bool:
    match tensor:
        case [str(dtype), list(shape)]:
            return _is_word(dtype) and all(map(_is_count, shape))
    return False


def _is_word(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 1000 and value.isprintable()


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1e12
