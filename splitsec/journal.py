"""The journal: one line for every message that left this party, each chained to the one before it.

Here: the file that a run appends to, the same file read back, and a check that finds what was changed in it since.  One
JSON object a line: how a run began, then each message: when, to whom, on which cut, its place, shapes, size, how many
samples, which privacy was applied, and the digest of what was sent; and why the party stopped, where a detector raised
an alarm (``kind`` ``alarm``: its numbers).  Never a value, a sample id or a key.  Not here:
what may leave (``guard``, which writes a line before the channel gets the bytes); what lines look like on a screen
(``cli/journal``).

The chain.  A line ends in ``"prev":P,"hash":H}``: P is the hash of the line before (64 zeros in the first), and H is
SHA-256 over the 32 bytes of P and then the bytes of this line without its ``,"hash":H``.  So nothing can be changed,
taken out, put in or moved without either a break or every later hash being other than it was.

The head.  A chain alone does not show that its last lines were taken away, so a second file, FILE.head, holds number
and hash of two entries: the last one written, and the last one that the disk is known to hold (0 before the first).
An entry is one ``os.write`` of a whole line, then the head is overwritten in place, then the caller may send.  Killed
in between: the journal is one entry ahead of its head, which is as it should be.  Killed within the line: it has no
end, nothing left under it, and the next run cuts it off and says so.  Never the other way round: a journal that ends
before its head names has lost entries.  Between the two entries of the head, an end of the power may have lost them
(at most about a second's); the next run then says how many, in the journal, for good.  Before them, somebody took them
away, and no run goes on with such a journal.

What this proves.  Whoever can write both files can work the whole chain out anew, for there is no key in it.  Keep the
hash that a run ends with somewhere else, and ``verify`` tells whether the journal still leads to it.

The disk.  Bytes that ``os.write`` was given survive the death of the process.  ``fdatasync`` is called by whoever
appends next once a second is over, and at the end; a power loss may cost what was appended since.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, NamedTuple

from splitsec.errors import LedgerError

__all__ = ["HEAD_SUFFIX", "Entry", "Finding", "Journal", "Marks", "read", "verify"]

VERSION: Final = 1
HEAD_SUFFIX: Final = ".head"
"""What the head file's name has behind the journal's."""

START: Final = "0" * 64
"""What the first entry names as the one before it."""
BEGINNING: Final = b'{"number":1,'
HEAD_SIZE: Final = 256
"""Bytes of the head file, spaces at its end: overwritten by one write that fits any sector."""
LINE_MAX: Final = 1024 * 1024
"""Bytes; a line about all of a segment's weights names each tensor, which makes some ten kilobytes."""
SYNC_SECONDS: Final = 1.0

_TAIL = re.compile(rb',"hash":"([0-9a-f]{64})"\}\Z')
_PREV = re.compile(rb',"prev":"([0-9a-f]{64})"\}\Z')
_NUMBER = re.compile(rb'\{"number":([1-9][0-9]{0,17}),')


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry as it stands in the file; ``kind`` is ``opened`` where a run began, ``alarm`` where a detector stopped
    it, else that of the message.
    """

    line: int
    number: int
    time: str
    """UTC, ISO 8601."""
    kind: str
    hash: str
    values: dict[str, Any]
    """All of it."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with a journal: one sentence, and where; None where it is about no single entry or line."""

    number: int | None
    line: int | None
    what: str


class Marks(NamedTuple):
    """What a head file holds: number and hash of the last entry written, and of the last that is on the disk."""

    written: tuple[int, str]
    synced: tuple[int, str]


class Journal:
    """Appends to the journal in ``file``, which is made where there is none (mode 0600).  One process at a time.

    ``graph_digest``: hex of the graph's digest; ``version``: of this software.  Raises ``LedgerError`` where the file
    is something else, another party's, in use, or has lost entries.
    """

    def __init__(self, file: str | os.PathLike[str], *, party: str, graph_digest: str, version: str) -> None:
        self.file = Path(file)
        self._open = _opened(self.file)
        try:
            last, marks, torn = _continued(self._open, self.file, party)
            self._head = _opened_head(_head_of(self.file))
        except BaseException:
            os.close(self._open)
            self._open = -1
            raise
        self._size = os.fstat(self._open).st_size
        self._number, self._hash = last
        self._synced = marks.synced if marks is not None else (0, START)
        self._synced_at = time.monotonic()
        try:
            if marks is None:
                self._mark()  # before the first entry: where there are entries, there is a head
            self._write(
                {
                    "kind": "opened",
                    "journal": VERSION,
                    "party": party,
                    "graph": graph_digest,
                    "version": version,
                    "previous": {"number": last[0], "hash": last[1]} if last[0] else None,
                    "torn_bytes": torn,
                    "lost_entries": max(0, marks.written[0] - last[0]) if marks is not None else 0,
                }
            )
            self.sync()
            _sync_folder(self.file.parent)
        except BaseException:
            self._let_go()
            raise

    @property
    def number(self) -> int:
        """Of the last entry."""
        return self._number

    @property
    def head(self) -> str:
        """Hash of the last entry, hex: what to keep somewhere else when the run is over."""
        return self._hash

    def append(
        self,
        *,
        to: str,
        kind: str,
        cut: str,
        step: int | None,
        micro_batch: int | None,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[str],
        body: Iterable[bytes | bytearray | memoryview],
        records: int,
        privacy: str | dict[str, Any] | None,
    ) -> int:
        """Write down what is about to leave; only then hand it to the channel.  Returns the entry's number.

        ``body``: the buffers that will be sent, in order (C-contiguous; hashed where they lie).  ``records``: how many
        samples they are about.  ``privacy``: what was done to them, e.g. ``"clip 1, gaussian 2"``.
        Raises ``LedgerError``, with nothing written, where the disk takes no more.
        """
        digest, size = sha256(), 0
        for part in body:
            digest.update(part)
            size += part.nbytes if isinstance(part, memoryview) else len(part)
        self._write(
            {
                "kind": kind,
                "to": to,
                "cut": cut,
                "step": step,
                "micro_batch": micro_batch,
                "shapes": [[*shape] for shape in shapes],
                "dtypes": [*dtypes],
                "bytes": size,
                "records": records,
                "privacy": privacy,
                "digest": digest.hexdigest(),
            }
        )
        if time.monotonic() - self._synced_at >= SYNC_SECONDS:
            self.sync()
        return self._number

    def alarm(self, *, detector: str, cut: str, peer: str, batch: int, evidence: Mapping[str, float]) -> int:
        """Write down what ``detector`` found in what came from ``peer`` over ``cut``; the disk holds it on return.

        ``batch``: training steps of this party so far.  ``evidence``: what was measured, by name; of whole batches,
        never of a sample.  Returns the entry's number.  Raises ``LedgerError`` as ``append`` does.
        """
        self._write(
            {
                "kind": "alarm",
                "detector": detector,
                "cut": cut,
                "peer": peer,
                "batch": batch,
                "evidence": dict(evidence),
            }
        )
        self.sync()
        return self._number

    def _write(self, values: dict[str, Any]) -> None:
        if self._open < 0:
            raise _unwritable(self.file, "it is closed, or could not be written before")
        number = self._number + 1
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        body = json.dumps({"number": number, "time": now, **values, "prev": self._hash}, separators=(",", ":")).encode()
        digest = sha256(bytes.fromhex(self._hash) + body).hexdigest()
        line = b'%s,"hash":"%s"}\n' % (body[:-1], digest.encode())
        before = (self._number, self._hash)
        try:
            if len(line) > LINE_MAX:
                raise OSError(0, f"an entry of {len(line)} bytes")
            if (written := os.write(self._open, line)) != len(line):
                raise OSError(0, f"only {written} of {len(line)} bytes were taken")
            self._number, self._hash = number, digest
            self._mark()
            self._size += len(line)
        except BaseException as error:
            with suppress(OSError):  # no half line, and no entry of what does not leave
                os.ftruncate(self._open, self._size)
                self._number, self._hash = before
                self._mark()
            self._let_go()
            if isinstance(error, OSError):
                raise _unwritable(self.file, error.strerror or type(error).__name__) from error
            raise

    def _mark(self) -> None:
        (number, last), (synced, there) = (self._number, self._hash), self._synced
        text = f'{{"written":{{"number":{number},"hash":"{last}"}},"synced":{{"number":{synced},"hash":"{there}"}}}}'
        os.pwrite(self._head, text.encode().ljust(HEAD_SIZE - 1) + b"\n", 0)

    def sync(self) -> None:
        """Have the disk hold every entry so far; the head says so only afterwards."""
        if self._open < 0:
            return
        try:
            os.fdatasync(self._open)
            self._synced = (self._number, self._hash)
            self._mark()
            os.fdatasync(self._head)
        except OSError as error:  # what the kernel failed to write it may have forgotten: nothing more can be promised
            self._let_go()
            raise _unwritable(self.file, error.strerror or type(error).__name__) from error
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Sync, and let go of the files.  Again: nothing."""
        self.sync()
        self._let_go()

    def _let_go(self) -> None:
        for descriptor in (self._open, self._head):
            if descriptor >= 0:
                os.close(descriptor)
        self._open = self._head = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --- opening


def _opened(file: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(file, flags, 0o600)
    except OSError as error:
        raise _unwritable(file, error.strerror or type(error).__name__) from None
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise _unwritable(file, "it is no regular file")
        if about.st_mode & 0o077:
            os.fchmod(descriptor, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LedgerError(
            f"{file}: another run is writing its journal there",
            expected="one run of a party at a time",
            fix="wait until the other run is over, or stop it",
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise _unwritable(file, error.strerror or type(error).__name__) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _opened_head(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _unwritable(file, error.strerror or type(error).__name__) from None


def _continued(journal: int, file: Path, party: str) -> tuple[tuple[int, str], Marks | None, int]:
    """Where the chain goes on: the last entry, the head, and how many bytes of a torn line were cut off."""
    marks = _read_head(_head_of(file))
    size = os.fstat(journal).st_size
    beginning = os.pread(journal, len(BEGINNING), 0)
    if not BEGINNING.startswith(beginning):
        raise LedgerError(
            f"{file}: there is a file already, and it is no journal; nothing was written",
            expected="a free name, or this party's journal",
            fix="move it away",
        )
    whole = _whole(journal, size)
    if whole == 0:
        last = (0, START)
    else:
        first = _parsed(os.pread(journal, LINE_MAX, 0).split(b"\n", 1)[0])
        end = _parsed(_last_line(journal, whole))
        if first is None or end is None:
            raise _spoilt(file, f"its {'first' if first is None else 'last'} entry is not as it was written")
        if first.get("party") != party:
            raise LedgerError(
                f"{file}: the journal of {first.get('party')}, and this is {party}",
                expected="one journal for each party",
                fix="name another file, or run as that party",
            )
        last = (int(end["number"]), str(end["hash"]))
    if marks is not None and last[0] < marks.synced[0]:
        raise _spoilt(file, f"it ends with entry {last[0]}, and its head file knows entry {marks.synced[0]}")
    if marks is not None and any(number == last[0] and digest != last[1] for number, digest in marks):
        raise _spoilt(file, f"its entry {last[0]} is not the one that its head file knows")
    if marks is None and last[0] > 1:
        raise _spoilt(file, f"its head file {_head_of(file).name} is gone")
    if whole < size:
        os.ftruncate(journal, whole)
    return last, marks, size - whole


def _whole(journal: int, size: int) -> int:
    """Bytes up to the end of the last whole line."""
    end = size
    while end > 0:
        start = max(0, end - 65536)
        found = os.pread(journal, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _last_line(journal: int, whole: int) -> bytes:
    start = max(0, whole - LINE_MAX)
    return os.pread(journal, whole - start, start)[:-1].rsplit(b"\n", 1)[-1]


def _spoilt(file: Path, seen: str) -> LedgerError:
    return LedgerError(
        f"{file}: this journal cannot be continued: {seen}",
        expected="a journal that nobody has changed",
        fix=f"run `splitsec journal verify {file}`; then move it and its {HEAD_SUFFIX} file away, to keep, and begin a "
        "new one",
    )


def _unwritable(file: Path, why: str) -> LedgerError:
    return LedgerError(
        f"{file}: no journal can be written there: {why}; nothing was sent",
        expected="a file that you may write, and room on the disk",
        fix="make room, or give this party another folder for its state",
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading


def _head_of(file: Path) -> Path:
    return file.with_name(file.name + HEAD_SUFFIX)


def _read_head(file: Path) -> Marks | None:
    """What the head file says; None where there is none, or it is empty.  Raises ``LedgerError``."""
    try:
        contents = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(file, error.strerror or type(error).__name__) from None
    if not contents.strip(b" \n\0"):
        return None
    try:
        values = json.loads(contents)
        pairs = [(values[name]["number"], values[name]["hash"]) for name in ("written", "synced")]
        if all(isinstance(number, int) and isinstance(hash, str) for number, hash in pairs):
            return Marks(*pairs)
    except (ValueError, KeyError, TypeError):
        pass
    raise _unreadable(file, "it is no head file of a journal, or was changed")


def _unreadable(file: Path, why: str) -> LedgerError:
    return LedgerError(f"{file}: cannot be read: {why}", expected="a journal of splitsec", fix="check the path")


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The values of a line that is as it was written; None of any other."""
    found = _hashes(line)
    if found is None or not found[2]:
        return None
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("number"), int) else None


def _hashes(line: bytes) -> tuple[str, str, bool] | None:
    """``prev`` and ``hash`` as they stand at a line's end, and whether the hash is that of the rest."""
    tail = _TAIL.search(line)
    if tail is None:
        return None
    body = line[: tail.start()] + b"}"
    prev = _PREV.search(body)
    if prev is None:
        return None
    digest = sha256(bytes.fromhex(prev[1].decode()) + body).hexdigest()
    return prev[1].decode(), tail[1].decode(), digest == tail[1].decode()


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    """Number of a line from 1, its bytes without the end, and whether it has one.  Of overlong lines the beginning."""
    number = 0
    while line := stream.readline(LINE_MAX):
        number += 1
        whole = line.endswith(b"\n")
        while not whole and (rest := stream.readline(LINE_MAX)):
            whole = rest.endswith(b"\n")
        yield number, line.removesuffix(b"\n"), whole


def _readable(file: Path) -> BinaryIO:
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise _unreadable(file, "it is no regular file")
        return open(file, "rb")
    except OSError as error:
        raise _unreadable(file, error.strerror or type(error).__name__) from None


def read(file: str | os.PathLike[str]) -> Iterator[Entry]:
    """Every entry, in order, also while a run appends; a torn last line is left out.

    Raises ``LedgerError`` at a line that is not as it was written.  Whether the lines belong together: ``verify``.
    """
    place = Path(file)
    with _readable(place) as stream:
        for line, contents, whole in _lines(stream):
            if not whole:
                return
            values = _parsed(contents)
            if values is None or not isinstance(values.get("time"), str) or not isinstance(values.get("kind"), str):
                raise LedgerError(
                    f"{place}:{line}: not an entry as a run wrote it",
                    expected="a journal that nobody has changed",
                    fix=f"run `splitsec journal verify {place}`",
                )
            yield Entry(line, values["number"], values["time"], values["kind"], values["hash"], values)


# --- verifying


@dataclass(frozen=True, slots=True)
class _Line:
    line: int
    number: int
    """As it says; where it does not, as its place says."""
    prev: str | None
    hash: str | None
    """None where the line's end is not readable."""
    intact: bool
    lost: int
    """Entries that were missing before it, as the run says that began with it."""


def verify(file: str | os.PathLike[str], head: str | None = None) -> list[Finding]:
    """What was changed in a journal since it was written; nothing where it is as it was.

    ``head``: the hash (hex) of an entry, kept elsewhere, that the journal must lead to.  The head file beside the
    journal is always asked.  Raises ``LedgerError`` where there is no file, or one that cannot be read.
    """
    place = Path(file)
    findings: list[Finding] = []
    try:
        marks = _read_head(_head_of(place))
        if marks is None:
            findings.append(Finding(None, None, f"the head file {_head_of(place).name} is missing or empty"))
    except LedgerError as error:
        marks = None
        findings.append(Finding(None, None, f"the head file {_head_of(place).name} cannot be used: {error.seen}"))
    lines, torn = _read_lines(place)
    if marks is None and not lines and torn is None and head is None:
        return []  # killed as it was made: nothing had left
    findings[:0] = [*_damaged(lines), *_misplaced(lines), *_unlinked(lines), *_lost(lines)]
    hashes = {one.number: one.hash for one in reversed(lines) if one.intact}
    last = max((one.number for one in lines), default=0)
    if not lines and (marks is None or marks.written[0]):
        findings.append(Finding(1, 1, "the journal holds no whole entry"))
    if marks is not None:
        findings += _against_head(marks, last, hashes, torn)
    elif torn is not None:
        findings.append(Finding(None, torn, f"line {torn}: the last line has no end, and there is no head to ask why"))
    if head is not None and head.lower() not in set(hashes.values()):
        ends = "entries were removed at the end, or all written anew"
        findings.append(Finding(None, None, f"no entry has the hash {head[:16]}...: {ends}"))
    return findings


def _read_lines(file: Path) -> tuple[list[_Line], int | None]:
    """Every whole line, and the number of a last line without an end."""
    lines: list[_Line] = []
    with _readable(file) as stream:
        for line, contents, whole in _lines(stream):
            if not whole:
                return lines, line
            found = _hashes(contents)
            number = _NUMBER.match(contents)
            lines.append(
                _Line(
                    line,
                    int(number[1]) if number else (lines[-1].number if lines else 0) + 1,
                    None if found is None else found[0],
                    None if found is None else found[1],
                    found is not None and found[2] and number is not None,
                    _lost_before(contents),
                )
            )
    return lines, None


def _lost_before(line: bytes) -> int:
    if b'"kind":"opened"' not in line:
        return 0
    lost = (_parsed(line) or {}).get("lost_entries")
    return lost if isinstance(lost, int) else 0


def _lost(lines: Sequence[_Line]) -> Iterator[Finding]:
    for one in lines:
        if one.lost:
            yield Finding(
                one.number,
                one.line,
                f"line {one.line}: when the run that begins with entry {one.number} was started, {one.lost} entries "
                "before it were missing: lost to a power failure in their last second, or removed",
            )


def _damaged(lines: Sequence[_Line]) -> Iterator[Finding]:
    for one in lines:
        if not one.intact:
            yield Finding(one.number, one.line, f"line {one.line}: entry {one.number} was changed, or put in")


def _misplaced(lines: Sequence[_Line]) -> Iterator[Finding]:
    """Entries that stand twice, or behind a later one, or not at all."""
    seen: dict[int, _Line] = {}
    highest = 0
    for one in lines:
        first = seen.setdefault(one.number, one)
        if first is not one:
            same = one.intact and first.intact and one.hash == first.hash
            what = f"entry {one.number} stands there again (first in line {first.line})"
            how = "duplicated" if same else "one of the two was put in"
            yield Finding(one.number, one.line, f"line {one.line}: {what}: {how}")
        elif one.number < highest:
            yield Finding(
                one.number, one.line, f"line {one.line}: entry {one.number} stands behind entry {highest}: moved"
            )
        highest = max(highest, one.number)
    before = 0
    for number in sorted(seen):
        if number > before + 1:
            which = f"entry {number - 1} is" if number == before + 2 else f"entries {before + 1} to {number - 1} are"
            where = f"before line {seen[number].line}"
            yield Finding(before + 1, seen[number].line, f"{where}: {which} missing: removed")
        before = number


def _unlinked(lines: Sequence[_Line]) -> Iterator[Finding]:
    """Entries that are whole in themselves, and do not follow the one that has the number before."""
    by_number: dict[int, list[_Line]] = {}
    for one in lines:
        by_number.setdefault(one.number, []).append(one)
    for one in lines:
        if not one.intact:
            continue
        if one.number == 1:
            if one.prev != START:
                yield Finding(1, one.line, f"line {one.line}: entry 1 names one before it: written anew")
            continue
        known = [before.hash for before in by_number.get(one.number - 1, ())]
        if known and None not in known and one.prev not in known:
            yield Finding(
                one.number,
                one.line,
                f"line {one.line}: entry {one.number} does not follow entry {one.number - 1} "
                f"(line {by_number[one.number - 1][0].line}): one of them was written anew",
            )


def _against_head(marks: Marks, last: int, hashes: dict[int, str | None], torn: int | None) -> Iterator[Finding]:
    for (number, digest), name in ((marks.synced, "the disk held"), (marks.written, "was written last")):
        if number in hashes and hashes[number] != digest:
            yield Finding(
                number, None, f"entry {number} is not the one that the head file knows: everything was written anew"
            )
            return
        if number > last:
            which = f"entry {number} is" if number == last + 1 else f"entries {last + 1} to {number} are"
            power = "" if name.startswith("the") else ", or lost to a power failure in their last second"
            yield Finding(last + 1, torn, f"at the end: {which} missing: removed{power}")
            return
    known = marks.written[0]
    if last > known + 1:  # killed between an entry and its head it is one ahead, and no more
        which = f"entries {known + 2} to {last} stand" if last > known + 2 else f"entry {last} stands"
        yield Finding(known + 2, None, f"at the end: {which} behind what the head file knows: put in")
