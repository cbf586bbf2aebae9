"""The journal: one line before each message, chained; whatever is done to the file afterwards is found and named.

Here too: `splitsec journal` and `splitsec ledger`, which read what a party keeps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import splitsec
from splitsec import journal as subject
from splitsec.cli import journal as cli_journal
from splitsec.cli import ledger as cli_ledger
from splitsec.errors import UserError
from splitsec.journal import Journal, read, verify

TREE = Path(splitsec.__file__).parents[1]


def opened(file: Path, party: str = "clinic") -> Journal:
    return Journal(file, party=party, graph_digest="ab" * 32, version="0.1.0")


def put(journal: Journal, step: int = 0, **changed: Any) -> int:
    values: dict[str, Any] = {
        "to": "server",
        "kind": "activation",
        "cut": "stem -> trunk",
        "step": step,
        "micro_batch": 0,
        "shapes": [(64, 32)],
        "dtypes": ["float32"],
        "body": [b"abc", memoryview(b"def")],
        "records": 64,
        "privacy": "clip 1, gaussian 2",
    }
    return journal.append(**{**values, **changed})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "clinic" / "journal.jsonl"


@pytest.fixture
def written(file: Path) -> Path:
    """Entry 1 opens the run, entries 2 to 8 are messages."""
    with opened(file) as journal:
        for step in range(7):
            put(journal, step)
    return file


def head_file(file: Path) -> Path:
    return file.with_name("journal.jsonl.head")


def sentences(file: Path, head: str | None = None) -> list[str]:
    return [one.what for one in verify(file, head)]


# --- what stands in it


@pytest.mark.threat("T63")
def test_an_entry_says_what_left_and_never_a_value(file: Path) -> None:
    with opened(file) as journal:
        assert put(journal, 3, body=[b"abc", memoryview(bytearray(8)).cast("B", (2, 4))], privacy={"clip": 1.0}) == 2
        head = journal.head
    first, entry = read(file)
    assert (first.kind, first.values["party"], first.values["graph"], first.values["version"]) == (
        "opened",
        "clinic",
        "ab" * 32,
        "0.1.0",
    )
    assert first.values["previous"] is None and first.values["prev"] == "0" * 64
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", entry.time)
    values = {name: value for name, value in entry.values.items() if name not in ("time", "prev", "hash")}
    assert values == {
        "number": 2,
        "kind": "activation",
        "to": "server",
        "cut": "stem -> trunk",
        "step": 3,
        "micro_batch": 0,
        "shapes": [[64, 32]],
        "dtypes": ["float32"],
        "bytes": 11,
        "records": 64,
        "privacy": {"clip": 1.0},
        "digest": hashlib.sha256(b"abc" + bytes(8)).hexdigest(),
    }
    assert entry.hash == head and entry.values["prev"] == first.hash


def test_the_hash_is_over_the_hash_before_and_the_entrys_bytes(written: Path) -> None:
    before = bytes(32)
    for line in written.read_bytes().splitlines():
        body, digest = re.fullmatch(rb'(.*),"hash":"([0-9a-f]{64})"\}', line).groups()  # type: ignore[union-attr]
        before = hashlib.sha256(before + body + b"}").digest()
        assert before.hex() == digest.decode()
    assert verify(written) == []
    assert verify(written, before.hex().upper()) == []


def test_an_entry_is_in_the_file_when_append_returns_and_the_head_follows(file: Path) -> None:
    with opened(file) as journal:
        for step in range(3):
            put(journal, step)
            assert [one.number for one in read(file)] == list(range(1, step + 3))
            assert json.loads(head_file(file).read_bytes())["written"] == {"number": step + 2, "hash": journal.head}
            assert verify(file) == []
        assert json.loads(head_file(file).read_bytes())["synced"]["number"] == 1
    assert json.loads(head_file(file).read_bytes())["synced"]["number"] == 4


def test_the_disk_is_asked_once_a_second(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(subject.time, "monotonic", lambda: now)
    journal = opened(file)
    synced: list[int] = []
    monkeypatch.setattr(subject.os, "fdatasync", lambda descriptor: synced.append(journal.number))
    for step in range(30):
        now += 0.11
        put(journal, step)
    assert synced == [11, 11, 21, 21, 31, 31]  # the journal, then its head
    journal.close()


def test_opening_again_goes_on_with_the_chain(written: Path) -> None:
    with opened(written) as journal:
        assert journal.number == 9
        put(journal)
    entries = list(read(written))
    assert [one.kind for one in entries].count("opened") == 2
    assert entries[8].values["previous"] == {"number": 8, "hash": entries[7].hash}
    assert (entries[8].values["torn_bytes"], entries[8].values["lost_entries"]) == (0, 0)
    assert verify(written, entries[7].hash) == []


@pytest.mark.parametrize("kept", [1, 80, 300])
def test_a_torn_last_line_is_cut_off_and_the_next_run_says_so(written: Path, kept: int) -> None:
    torn = written.read_bytes().splitlines(keepends=True)[-1][:kept]
    with open(written, "ab") as stream:
        stream.write(torn)
    assert len(list(read(written))) == 8
    assert verify(written) == []  # nothing left under it: the head was never told of it
    with opened(written) as journal:
        put(journal)
    assert [one.values["torn_bytes"] for one in read(written) if one.kind == "opened"] == [0, kept]
    assert verify(written) == []


def test_a_journal_that_began_with_a_torn_line_begins_anew(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(b'{"number":1,"time":"2026')
    opened(file).close()
    assert [one.values["torn_bytes"] for one in read(file)] == [24]


def test_what_the_power_took_is_written_down_for_good(file: Path) -> None:
    journal = opened(file)
    for step in range(4):
        put(journal, step)
    head = head_file(file).read_bytes()
    journal.close()
    head_file(file).write_bytes(head)  # as it stood before the last sync: entry 5 written, entry 1 on the disk
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]))
    assert sentences(file) == [
        "at the end: entries 4 to 5 are missing: removed, or lost to a power failure in their last second"
    ]
    opened(file).close()
    assert list(read(file))[-1].values["lost_entries"] == 2
    (finding,) = verify(file)  # whoever takes entries of the last second out leaves the same trace
    assert (finding.number, "2 entries before it were missing" in finding.what) == (4, True)


def test_where_the_disk_takes_no_more_nothing_is_sent_and_no_half_line_stays(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = opened(written)
    contents = written.read_bytes()
    monkeypatch.setattr(subject.os, "write", lambda descriptor, line, write=os.write: write(descriptor, line[:100]))
    with pytest.raises(UserError, match=r"only 100 of \d+ bytes were taken; nothing was sent"):
        put(journal)
    monkeypatch.undo()
    assert written.read_bytes() == contents
    with pytest.raises(UserError, match="could not be written before"):
        put(journal)
    assert verify(written) == []
    opened(written).close()


# --- which file


def test_the_files_are_their_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        opened(tmp_path / "journal.jsonl").close()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(one.stat().st_mode) for one in tmp_path.iterdir()} == {0o600}
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "journal.jsonl").chmod(0o644)
    opened(tmp_path / "journal.jsonl").close()
    assert stat.S_IMODE((tmp_path / "journal.jsonl").stat().st_mode) == 0o600


def test_one_run_at_a_time_until_it_is_killed(file: Path) -> None:
    code = "import sys; from splitsec.journal import Journal\n"
    code += "j = Journal(sys.argv[1], party='clinic', graph_digest='', version='1'); print('open', flush=True)\n"
    code += "sys.stdin.read()"
    env = {**os.environ, "PYTHONPATH": str(TREE)}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, str(file)], stdin=pipe, stdout=pipe, env=env) as child:
        assert child.stdout is not None and child.stdout.readline() == b"open\n"
        with pytest.raises(UserError, match="another run is writing"):
            opened(file)
        assert [one.kind for one in read(file)] == ["opened"]
        child.send_signal(signal.SIGKILL)
    opened(file).close()
    assert verify(file) == []


@pytest.mark.parametrize("contents", [b"party: clinic\n", b"\n", b'{"number":2,"time":""}\n', b"\0" * 100])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, contents: bytes) -> None:
    file = tmp_path / "journal.jsonl"
    file.write_bytes(contents)
    with pytest.raises(UserError, match="it is no journal"):
        opened(file)
    assert file.read_bytes() == contents
    assert verify(file) != []


def test_another_partys_journal_is_refused(written: Path) -> None:
    with pytest.raises(UserError, match="the journal of clinic, and this is server"):
        opened(written, "server")


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "journal.jsonl"
    {
        "folder": place.mkdir,
        "pipe": lambda: os.mkfifo(place),
        "link": lambda: place.symlink_to("elsewhere"),
    }[kind]()
    with pytest.raises(UserError, match="no journal can be written"):
        opened(place)
    with pytest.raises(UserError, match="cannot be read"):
        verify(place)


# --- tampering


def rewritten(line: bytes, before: bytes, **changes: Any) -> bytes:
    """The entry in ``line`` with ``changes``, and a hash that fits it, behind an entry whose line is ``before``."""
    values = {**json.loads(line), **changes}
    if before:
        values["prev"] = json.loads(before)["hash"]
    del values["hash"]
    body = json.dumps(values, separators=(",", ":")).encode()
    digest = hashlib.sha256(bytes.fromhex(values["prev"]) + body).hexdigest()
    return body[:-1] + f',"hash":"{digest}"}}\n'.encode()


def replace_and_chain_anew(lines: list[bytes]) -> list[bytes]:
    """Entry 4 says something else, and everything behind it fits."""
    lines = [*lines[:3], rewritten(lines[3], lines[2], bytes=1), *lines[4:]]
    for index in range(4, len(lines)):
        lines[index] = rewritten(lines[index], lines[index - 1])
    return lines


Edit = Callable[[list[bytes]], list[bytes]]

EDITS: dict[str, tuple[Edit, list[str]]] = {
    "changed": (
        lambda lines: [*lines[:3], lines[3].replace(b'"records":64', b'"records":65'), *lines[4:]],
        ["line 4: entry 4 was changed, or put in"],
    ),
    "changed in a byte that means nothing": (
        lambda lines: [*lines[:3], lines[3].replace(b'":', b'": ', 1), *lines[4:]],
        ["line 4: entry 4 was changed, or put in"],
    ),
    "the last one changed": (
        lambda lines: [*lines[:7], lines[7].replace(b'"step":6', b'"step":7')],
        ["line 8: entry 8 was changed, or put in"],
    ),
    "changed, with a hash that fits": (
        lambda lines: [*lines[:3], rewritten(lines[3], lines[2], bytes=1), *lines[4:]],
        ["line 5: entry 5 does not follow entry 4 (line 4): one of them was written anew"],
    ),
    "changed, with all hashes that fit": (
        replace_and_chain_anew,
        ["entry 8 is not the one that the head file knows: everything was written anew"],
    ),
    "removed": (
        lambda lines: [*lines[:3], *lines[5:]],
        ["before line 4: entries 4 to 5 are missing: removed"],
    ),
    "removed at the start": (lambda lines: lines[1:], ["before line 1: entry 1 is missing: removed"]),
    "removed at the end": (lambda lines: lines[:-2], ["at the end: entries 7 to 8 are missing: removed"]),
    "something before the start": (
        lambda lines: [rewritten(lines[0], b"", prev="1" * 64), *lines[1:]],
        [
            "line 1: entry 1 names one before it: written anew",
            "line 2: entry 2 does not follow entry 1 (line 1): one of them was written anew",
        ],
    ),
    "removed, all": (
        lambda lines: [],
        ["the journal holds no whole entry", "at the end: entries 1 to 8 are missing: removed"],
    ),
    "its last line torn": (
        lambda lines: [*lines[:-1], lines[-1][:-1]],
        ["at the end: entry 8 is missing: removed"],
    ),
    "reordered": (
        lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]],
        ["line 5: entry 4 stands behind entry 5: moved"],
    ),
    "duplicated": (
        lambda lines: [*lines[:5], lines[3], *lines[5:]],
        ["line 6: entry 4 stands there again (first in line 4): duplicated"],
    ),
    "put in": (
        lambda lines: [*lines[:4], rewritten(lines[3], lines[2], step=99), *lines[4:]],
        ["line 5: entry 4 stands there again (first in line 4): one of the two was put in"],
    ),
    "put in, with another number": (
        lambda lines: [*lines, rewritten(lines[3], lines[2], number=9)],
        ["line 9: entry 9 does not follow entry 8 (line 8): one of them was written anew"],
    ),
    "rubbish put in": (
        lambda lines: [*lines[:4], b"rubbish\n", *lines[4:]],
        [
            "line 5: entry 5 was changed, or put in",
            "line 6: entry 5 stands there again (first in line 5): one of the two was put in",
        ],
    ),
}


@pytest.mark.threat("T61")
@pytest.mark.parametrize("edit", EDITS)
def test_tampering_is_found_and_named(written: Path, edit: str) -> None:
    change, expected = EDITS[edit]
    lines = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(b"".join(change(lines)))
    assert sentences(written) == expected


def test_a_finding_says_number_and_line(written: Path) -> None:
    lines = written.read_bytes().splitlines(keepends=True)
    del lines[1]
    lines[3] = lines[3].replace(b"server", b"others")
    written.write_bytes(b"".join(lines))
    assert {(one.number, one.line) for one in verify(written)} == {(2, 2), (5, 4)}


@pytest.mark.threat("T61")
def test_the_head_file_is_missed_and_a_head_kept_elsewhere_shows_what_was_done_to_both(written: Path) -> None:
    kept = list(read(written))[-1].hash
    lines = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(b"".join(lines[:-2]))
    head_file(written).unlink()
    assert sentences(written) == ["the head file journal.jsonl.head is missing or empty"]
    last = list(read(written))[-1]
    known = {"number": last.number, "hash": last.hash}
    head_file(written).write_text(json.dumps({"written": known, "synced": known}))
    assert sentences(written) == []  # whoever can write both files can do this
    assert sentences(written, kept) == [
        f"no entry has the hash {kept[:16]}...: entries were removed at the end, or all written anew"
    ]
    head_file(written).write_text("{}")
    assert "cannot be used" in sentences(written)[0]


@pytest.mark.parametrize(
    "edit",
    [
        "the last one changed",
        "changed, with all hashes that fit",
        "removed at the end",
        "removed, all",
        "its last line torn",
    ],
)
def test_no_run_goes_on_with_a_journal_that_lost_its_end(written: Path, edit: str) -> None:
    written.write_bytes(b"".join(EDITS[edit][0](written.read_bytes().splitlines(keepends=True))))
    before = written.read_bytes()
    with pytest.raises(UserError, match="cannot be continued"):
        opened(written)
    assert written.read_bytes() == before


def test_no_run_goes_on_without_the_head_file(written: Path) -> None:
    head_file(written).unlink()
    with pytest.raises(UserError, match="is gone"):
        opened(written)


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    one = st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 10**6), st.integers(1, 255)),
        st.tuples(st.just("cut"), st.integers(0, 10**6), st.integers(1, 900)),
        st.tuples(st.just("insert"), st.integers(0, 10**6), st.binary(min_size=1, max_size=40)),
        st.tuples(st.sampled_from(["delete", "double", "swap", "rehash"]), st.integers(0, 99), st.integers(0, 99)),
        st.tuples(st.just("tail"), st.just(0), st.binary(min_size=1, max_size=40)),
    )
    return draw(st.lists(one, min_size=1, max_size=4))


def edited(contents: bytes, how: list[tuple[Any, ...]]) -> bytes:
    for name, where, what in how:
        lines = contents.splitlines(keepends=True)
        if name == "tail":
            contents += what
        elif not lines:
            continue
        elif name == "flip":
            place = where % len(contents)
            contents = contents[:place] + bytes([contents[place] ^ what]) + contents[place + 1 :]
        elif name == "cut":
            place = where % len(contents)
            contents = contents[:place] + contents[place + what :]
        elif name == "insert":
            place = where % (len(contents) + 1)
            contents = contents[:place] + what + contents[place:]
        else:
            first, second = where % len(lines), what % len(lines)
            if name == "delete":
                del lines[first]
            elif name == "double":
                lines.insert(second, lines[first])
            elif name == "swap":
                lines[first], lines[second] = lines[second], lines[first]
            else:
                with suppress(ValueError, KeyError, TypeError):
                    lines[first] = rewritten(lines[first], lines[first - 1] if first else b"", step=what)
            contents = b"".join(lines)
    return contents


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(how=edits())
def test_any_edit_is_found_or_means_nothing(written: Path, how: list[tuple[Any, ...]]) -> None:
    original = written.read_bytes()
    changed = edited(original, how)
    place = written.with_name("edited.jsonl")
    place.write_bytes(changed)
    shutil.copy(head_file(written), place.with_name("edited.jsonl.head"))
    findings = verify(place)
    meaning = changed[: changed.rfind(b"\n") + 1]  # a last line without an end is not an entry
    assert bool(findings) == (meaning != original), sentences(place)


# --- killed


WRITER = """
import sys
from splitsec.journal import Journal
journal = Journal(sys.argv[1], party="clinic", graph_digest="ab" * 32, version="1")
for step in range(10**9):
    number = journal.append(to="server", kind="activation", cut="cut", step=step, micro_batch=None, shapes=[(4, 4)],
                            dtypes=["float32"], body=[bytes(64)], records=4, privacy=None)
    print(number, flush=True)
"""


@pytest.mark.threat("T60")
def test_killed_at_any_moment_it_verifies_goes_on_and_holds_all_that_was_announced(file: Path) -> None:
    rng = random.Random(5)
    env = {**os.environ, "PYTHONPATH": str(TREE)}
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE, env=env) as child:
            assert child.stdout is not None
            for _ in range(rng.randrange(1, 300)):
                child.stdout.readline()
            child.kill()
            said = [line for line in child.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
        last = int(said[-1]) if said else 0
        assert verify(file) == []
        numbers = [one.number for one in read(file)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= last
    assert sum(one.kind == "opened" for one in read(file)) == 8


# --- the commands


def command(module: Any, *arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers(required=True))
    name = module.__name__.rsplit(".", 1)[1]
    return int(module.run(parser.parse_args([name, *map(str, arguments)])))


def test_show_finds_every_partys_journal(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(written.parents[1] / "server" / "journal.jsonl", "server") as journal:
        put(journal, 5, to="clinic", kind="gradient", privacy=None)
    root = written.parents[2]
    assert command(cli_journal, "show", root) == 0
    out = capsys.readouterr().out
    assert out.count("activation stem -> trunk") == 7 and out.count("gradient stem -> trunk") == 1
    assert "run of server began: graph abababababababab" in out and "no privacy" in out
    assert command(cli_journal, "show", root / "state" / "clinic", "--last", "2") == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["7", "8"]
    assert "step 6/0  float32 [64, 32]  6 bytes  64 samples  clip 1, gaussian 2" in shown[1]
    assert command(cli_journal, "show", written, "--json") == 0
    assert [json.loads(line)["number"] for line in capsys.readouterr().out.splitlines()] == list(range(1, 9))


def test_verify_prints_the_head_or_a_sentence_for_each_finding(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = list(read(written))[-1].hash
    assert command(cli_journal, "verify", written.parents[2]) == 0
    assert f"8 entries, as they were written; the last one's hash is\n  {head}\n" in capsys.readouterr().out
    assert command(cli_journal, "verify", written, "--head", head) == 0
    assert command(cli_journal, "verify", written, "--head", "0" * 64) == 3
    capsys.readouterr()
    lines = written.read_bytes().splitlines(keepends=True)
    del lines[3]
    written.write_bytes(b"".join(lines))
    assert command(cli_journal, "verify", written) == 3
    assert capsys.readouterr().out == f"{written}: before line 4: entry 4 is missing: removed\n"
    assert command(cli_journal, "verify", written, "--json") == 3
    (report,) = json.loads(capsys.readouterr().out)["journals"]
    assert report["findings"] == [{"entry": 4, "line": 4, "what": "before line 4: entry 4 is missing: removed"}]


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (("show", "nowhere"), "no such file or folder"),
        (("verify", "."), "no journal there"),
        (("verify", "file", "--head", "12"), "--head 12"),
        (("show", "file", "--last", "0"), "--last 0"),
        (("show", "file"), "not an entry as a run wrote it"),
    ],
)
def test_mistakes_of_users_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], seen: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("something else\n")
    with pytest.raises(UserError, match=seen) as caught:
        command(cli_journal, *arguments)
    assert caught.value.expected and caught.value.fix


def test_the_ledger_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("splitsec.privacy.accounting")
    from splitsec.privacy.ledger import Ledger
    from splitsec.privacy.release import Gaussian

    file = tmp_path / "state" / "clinic" / "ledger.sqlite"
    with Ledger(file, party="clinic") as ledger:
        rows = ledger.dataset("train", [b"1", b"2"]).slots
        account = ledger.account("stem -> trunk", "inputs", Gaussian(2.0, 8), 1.0)
        for _ in range(10):
            ledger.reserve(account, rows, budget=8.0, delta=1e-5)
        ledger.set_policy(delta=1e-5, budget=8.0)
        before = {one: one.read_bytes() for one in file.parent.iterdir()}
        for place in (tmp_path, tmp_path / "state", file.parent, file):  # while it is open here
            assert command(cli_ledger, place, "--json") == 0
            (entry,) = json.loads(capsys.readouterr().out)["entries"]
        assert {one: one.read_bytes() for one in file.parent.iterdir()} == before
        assert 7.511 <= entry.pop("epsilon") == entry.pop("epsilon_alone") <= 7.549
        assert entry == {
            "party": "clinic",
            "cut": "stem -> trunk",
            "dataset": "train",
            "protects": "inputs",
            "releases": 10,
            "samples": 2,
            "mechanism": "gaussian",
            "noise_multiplier": 2.0,
            "clip": 1.0,
            "delta": 1e-5,
            "epsilon_budget": 8.0,
        }
    assert command(cli_ledger, tmp_path) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "stem -> trunk" in line)
    assert re.search(r"clinic .*train .*gaussian .*2 .*1 .*2 .*10 .*1e-05 .*7\.5\d\d .*7\.5\d\d .*8", row)
    assert command(cli_ledger, file, "--delta", "1e-6", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    assert entry["epsilon"] > 7.6 and entry["epsilon_budget"] is None


def test_mistakes_at_the_ledger_command_are_answered(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"something else")
    for arguments, seen in (
        ((tmp_path,), "this is no ledger"),
        ((tmp_path / "nowhere",), "no such file"),
        ((tmp_path, "--delta", "2"), "--delta 2"),
    ):
        with pytest.raises(UserError, match=seen) as caught:
            command(cli_ledger, *arguments)
        assert caught.value.expected and caught.value.fix


def test_entries_behind_the_head_and_an_emptied_journal(file: Path) -> None:
    """Found though the chain is right: the head is at most one entry behind.  What was emptied with its head leads
    nowhere.
    """
    with opened(file) as journal:
        put(journal)
        kept = journal.head
    marks = head_file(file).read_bytes()
    with opened(file) as journal:
        for step in range(3):
            put(journal, step)
    head_file(file).write_bytes(marks)
    assert sentences(file) == ["at the end: entries 4 to 6 stand behind what the head file knows: put in"]
    file.write_bytes(b"")
    head_file(file).write_bytes(b"")
    assert sentences(file) == []
    assert sentences(file, kept)[-1].startswith(f"no entry has the hash {kept[:16]}")


def test_a_journal_that_is_gone_is_missed(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(written.parents[1] / "server" / "journal.jsonl", "server") as journal:
        put(journal, 5)
    root = written.parents[2]
    assert command(cli_journal, "verify", root) == 0
    written.unlink()
    capsys.readouterr()
    assert command(cli_journal, "verify", root) == 3
    assert f"{written}: the journal is gone" in capsys.readouterr().out
