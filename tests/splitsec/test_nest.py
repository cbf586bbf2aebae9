"""A process of a nest is what a process started anew would be: its own streams, place, name, end and randomness.  The
warm process that it comes of has one thread, runs nothing of the user's, and dies with whoever asked.

How whole simulations end is in ``tests/processes``; what they weigh in ``tests/processes/test_clients.py``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from splitsec.nest import Forked, Nest, open_nest
from splitsec.simulation import simulate
from tests.conftest import PATIENCE, SOURCE, ended, write_folder

TOKEN = "SPLITSEC_TEST_NEST"
"""Environment variable that says which simulation a process is of."""

GUEST = """\
import json, os, sys, threading

STARTED = threading.active_count()


def main():
    for line in sys.stdin:
        print(json.dumps(eval(line)), flush=True)
    return 7
"""
"""Runs in the process: answers each line with what it comes to, and ends with its input."""


@pytest.fixture(scope="module")
def nest() -> Iterator[Nest]:
    with Nest() as nest:
        assert nest.wait(PATIENCE)
        yield nest


class Guest:
    def __init__(self, process: Forked) -> None:
        self.process = process

    def ask(self, expression: str) -> Any:
        self.process.stdin.write(expression.encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@contextmanager
def guest(nest: Nest, place: Path, monkeypatch: pytest.MonkeyPatch, **environment: str) -> Iterator[Guest]:
    """A process that runs ``GUEST``, which lies in its own working directory."""
    place.mkdir(exist_ok=True)
    (place / "guest.py").write_text(GUEST)
    with monkeypatch.context() as there, (place / "errors").open("ab") as errors:
        there.chdir(place)
        made = Guest(
            nest.start(["guest", "clinic-a"], stderr=errors.fileno(), environment={**os.environ, **environment})
        )
    try:
        yield made
    finally:
        made.close()


def test_a_process_of_its_own(nest: Nest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        with guest(nest, tmp_path / "place", monkeypatch, FLAVOUR="plum") as one:
            assert one.ask("os.getpid()") == one.process.pid != os.getpid()
            assert one.ask("os.getppid()") == nest.pid
            assert one.ask("os.getsid(0)") == one.process.pid
            assert one.ask("os.getcwd()") == str(tmp_path / "place")
            assert one.ask("os.environ['FLAVOUR']") == "plum"
            assert one.ask("oct(os.umask(0o027))") == "0o27"
            assert one.ask("sys.argv") == ["guest", "clinic-a"]
            assert one.ask("sys.orig_argv") == [sys.executable, "-m", "guest", "clinic-a"]
            line = Path(f"/proc/{one.process.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            assert line == [os.fsencode(sys.executable), b"-m", b"guest", b"clinic-a"]
            assert one.ask("'splitsec.party' in sys.modules and 'torch' in sys.modules")
            assert one.ask("print('to standard error', file=sys.stderr)") is None
            assert (tmp_path / "place" / "errors").read_text() == "to standard error\n"
            assert one.process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                one.process.wait(0.01)
    finally:
        os.umask(before)


def test_no_descriptor_of_anybody_elses(nest: Nest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the socket to whoever asks for processes, nor the pidfds and pipes of those forked before."""
    with guest(nest, tmp_path / "a", monkeypatch), guest(nest, tmp_path / "b", monkeypatch) as second:
        held = second.ask("sorted(int(one) for one in os.listdir('/proc/self/fd'))")
        assert held[:3] == [0, 1, 2] and len(held) == 4  # and the listing's own


def test_how_it_ends(nest: Nest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with guest(nest, tmp_path / "a", monkeypatch) as one:
        one.process.stdin.close()
        assert one.process.wait(PATIENCE) == 7
    with guest(nest, tmp_path / "a", monkeypatch) as one:
        os.kill(one.process.pid, signal.SIGKILL)
        assert one.process.wait(PATIENCE) == -signal.SIGKILL
    with guest(nest, tmp_path / "a", monkeypatch) as one:
        os.kill(one.process.pid, signal.SIGINT)  # as Python ends where nobody expects it
        assert one.process.wait(PATIENCE) == -signal.SIGINT
    with guest(nest, tmp_path / "a", monkeypatch) as one:
        one.process.stdin.write(b"1 / 0\n")
        one.process.stdin.flush()
        assert one.process.wait(PATIENCE) == 1
        assert "ZeroDivisionError" in (tmp_path / "a" / "errors").read_text()
    for said, code in (("3", 3), ("", 0), ("'a word'", 1)):
        with guest(nest, tmp_path / "a", monkeypatch) as one:
            one.process.stdin.write(f"sys.exit({said})\n".encode())
            one.process.stdin.flush()
            assert one.process.wait(PATIENCE) == code


def test_its_number_is_nobody_elses_until_its_end_was_heard(
    nest: Nest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a signal meant for it could reach another process."""
    with guest(nest, tmp_path / "a", monkeypatch) as one:
        pidfd = os.pidfd_open(one.process.pid)
        one.process.stdin.close()
        assert ended(pidfd, PATIENCE)
        os.close(pidfd)
        assert Path(f"/proc/{one.process.pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
        assert one.process.wait(PATIENCE) == 7
        with guest(nest, tmp_path / "b", monkeypatch) as other:
            assert other.ask("1") == 1  # by now the warm process has heard it
            assert not Path(f"/proc/{one.process.pid}").exists()


DRAWS = {
    "Python's random": "__import__('random').getrandbits(64)",
    "secrets": "__import__('secrets').token_hex(8)",
    "uuid": "str(__import__('uuid').uuid4())",
    "numpy": "int(__import__('numpy').random.randint(2**62))",
    "numpy, a generator of its own": "int(__import__('numpy').random.default_rng().integers(2**62))",
    "torch": "__import__('torch').randint(2**62, ()).item()",
    "torch's seed": "__import__('torch').initial_seed()",
    "OpenSSL": "__import__('cryptography.hazmat.primitives.asymmetric.x25519', fromlist=['x'])"
    ".X25519PrivateKey.generate().private_bytes_raw().hex()",
    "our keystream": "__import__('splitsec.privacy.randomness', fromlist=['x']).KeystreamSource().words(1).item()",
    "a temporary name": "next(__import__('tempfile')._get_candidate_names())",
}


def test_two_processes_share_no_random_state(nest: Nest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, set[object]] = {what: set() for what in DRAWS}
    for _ in range(3):
        with guest(nest, tmp_path / "a", monkeypatch) as one:
            for what, expression in DRAWS.items():
                drawn[what].add(one.ask(expression))
    assert {what: len(values) for what, values in drawn.items()} == dict.fromkeys(DRAWS, 3)


THREADS = [
    "__import__('splitsec.process', fromlist=['x']).prepare(2)",
    "float((__import__('torch').ones(400, 400) @ __import__('torch').ones(400, 400)).sum())",
    "float((__import__('numpy').ones((400, 400)) @ __import__('numpy').ones((400, 400))).sum())",
    "__import__('torch').get_num_threads()",
    "len(os.listdir('/proc/self/task'))",
]


def test_threads_begin_after_the_fork(nest: Nest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's and numpy's, as many as the party has; the warm process never has a second one, nor a GPU."""
    (tmp_path / "guest.py").write_text(GUEST)
    anew = subprocess.run(
        [sys.executable, "-c", "import torch, guest; guest.main()"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(SOURCE)},
        input="\n".join(THREADS),
        capture_output=True,
        text=True,
        check=True,
    )
    alone = Path(f"/proc/{nest.pid}/task")
    assert len(list(alone.iterdir())) == 1
    with guest(nest, tmp_path / "a", monkeypatch, OMP_NUM_THREADS="2") as one:
        assert one.ask("STARTED") == 1
        assert one.ask("__import__('torch').cuda.is_initialized()") is False
        found = [one.ask(expression) for expression in THREADS]
    assert found == [json.loads(line) for line in anew.stdout.splitlines()]
    assert found[1:4] == [400.0**3, 400.0**3, 2] and found[4] > 2
    assert len(list(alone.iterdir())) == 1


def test_a_party_has_everything_loaded(nest: Nest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is imported after the fork is in nobody else's memory, and takes time at each."""
    start = "__import__('splitsec.rehearsal', fromlist=['x']).rehearse()"
    with guest(nest, tmp_path / "a", monkeypatch) as one:
        assert one.ask("globals().update(was=set(sys.modules))") is None
        assert one.ask(start) is None
        assert one.ask("__import__('socket').getaddrinfo('127.0.0.1', 7400) and None") is None
        assert one.ask("sorted(set(sys.modules) - was)") == []


def test_all_die_with_the_warm_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Nest() as nest:
        assert nest.wait(PATIENCE)
        with guest(nest, tmp_path / "a", monkeypatch) as one:
            pidfd = os.pidfd_open(one.process.pid)
            os.kill(nest.pid, signal.SIGKILL)
            assert ended(pidfd, PATIENCE)
            os.close(pidfd)
            assert one.process.wait(PATIENCE) == -signal.SIGKILL
            assert nest.lost == -signal.SIGKILL
            assert nest.wait() is False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_all_die_with_whoever_asked(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "guest.py").write_text(GUEST)
    asks = (
        "import os, signal\n"
        "from splitsec.nest import Nest\n"
        "nest = Nest()\n"
        "nest.wait()\n"
        "one = nest.start(['guest'], stderr=2, environment=os.environ)\n"
        "print(nest.pid, one.pid, flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", asks],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    ) as process:
        assert process.stdout is not None
        pidfds = [os.pidfd_open(int(pid)) for pid in process.stdout.readline().split()]
        process.send_signal(number)
        assert len(pidfds) == 2 and all(ended(pidfd, PATIENCE) for pidfd in pidfds)
    for pidfd in pidfds:
        os.close(pidfd)


def come_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[bool]:
    """Whether the parties of a simulation are children of ours."""
    found = set()
    monkeypatch.setenv(TOKEN, str(folder))

    def watch(party: str, event: dict[str, Any]) -> None:
        if event["event"] == "connected":
            for place in Path("/proc").iterdir():
                if place.name.isdecimal():
                    try:
                        words = (place / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                        parent = int((place / "stat").read_text().rpartition(") ")[2].split()[1])
                        ours = f"{TOKEN}={folder}".encode() in (place / "environ").read_bytes().split(b"\0")
                    except OSError:
                        continue
                    if ours and words[-2:] == [b"splitsec.process", party.encode()]:
                        found.add(parent == os.getpid())

    simulate(folder, epochs=1, watch=watch)
    return found


def test_parties_are_forked_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "small")
    assert come_of(folder, monkeypatch) == {False}
    monkeypatch.setenv("SPLITSEC_FORK", "0")
    with open_nest() as none:
        assert none is None
    assert come_of(folder, monkeypatch) == {True}


def test_where_the_warm_process_has_a_second_thread_parties_are_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A debugger's, say.  What it holds at the moment of a fork would be held in the party for ever."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys, threading\n"
        "if 'splitsec.nest' in sys.orig_argv:\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{SOURCE}")
    with Nest() as nest:
        assert nest.wait(PATIENCE) is False
    assert come_of(write_folder(tmp_path / "small"), monkeypatch) == {True}


def test_the_warm_process_runs_nothing_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's own code tells where it runs: in each party's process, and in the one that checks the folder."""
    folder = write_folder(tmp_path / "small")
    file = folder / "parties" / "models.py"
    told = tmp_path / "told"
    file.write_text(f"import sys\nopen({str(told)!r}, 'a').write(' '.join(sys.orig_argv) + '\\n')\n{file.read_text()}")
    simulate(folder, epochs=1)
    ran = told.read_text().splitlines()
    parties = [line for line in ran if "-m splitsec.process " in line]
    assert {line.split()[-1] for line in parties} == {"clinic-a", "clinic-b", "server"}
    assert not any("splitsec.nest" in line for line in ran)
