"""Processes from one that has torch loaded already: they start in a hundredth of the time and share its memory.

Here: ``Nest``, the side that asks; ``main``, the *warm process*, which loads what parties need and then forks one
process for each request; ``Forked``, such a process, spoken to as ``subprocess.Popen``.  Not here: what runs in it
(``process``, an attacker's module), who asks (``simulation``).

The warm process has one thread and no secret: it never sees an assignment, whose keys come after the fork, on the new
process's own standard input.  It imports nothing of the user's.  What is forked is a process of its own, with its own
session, working directory, environment, streams, name in the list of processes and randomness, as if Python had been
started for it.  It dies with the warm process, and that one with whoever asked; no process waits for another's exit:
it is told by a pidfd.  Linux only; elsewhere, and with ``SPLITSEC_FORK=0``, there is no nest and every process is
started anew.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, NoReturn

from splitsec.process import die_with_parent, give_free_memory_back, keep_freed_memory, leave_the_compiler_out

__all__ = ["Forked", "Nest", "main", "open_nest"]

LOADED: Final = (
    "encodings.idna",
    "numpy.random",
    "splitsec.party",
    "splitsec.process",
    "splitsec.trace",
    "splitsec.transports.sockets",
)
"""What parties load when they need it."""

ROOM: Final = 160
"""Bytes kept free on the warm process's command line, for that of whoever is forked."""

HEAD: Final = 8
"""Bytes of a request's length, which its descriptors travel with."""

FAILED: Final = 1
"""Exit status where Python ends with a traceback."""


@contextmanager
def open_nest(load: Collection[str] = ()) -> Iterator[Nest | None]:
    """A ``Nest`` for the ``with`` block; None where this system cannot fork safely, or ``SPLITSEC_FORK=0`` says no."""
    if sys.platform != "linux" or not hasattr(os, "pidfd_open") or os.environ.get("SPLITSEC_FORK") == "0":
        yield None
        return
    with Nest(load) as nest:
        yield nest


class Nest:
    """The warm process, begun at once; it loads while we go on.  Use it with ``with``, and from one thread at a time.

    ``load``: modules to have ready besides; one that cannot be imported is left to whoever needs it.
    """

    def __init__(self, load: Collection[str] = ()) -> None:
        self._line, theirs = socket.socketpair()
        self._codes: dict[int, int] = {}
        self._pids: list[int] = []  # told, and not taken yet
        self._ready: bool | None = None
        self._refused: str | None = None
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "splitsec.nest", str(theirs.fileno()), json.dumps([*load]), " " * ROOM],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **_one_thread()},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def __enter__(self) -> Nest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # and with it all that it forked and that still runs
        self._process.wait()
        self._line.close()
        self._ready = False

    @property
    def pid(self) -> int:
        """Process id of the warm process."""
        return self._process.pid

    @property
    def lost(self) -> int | None:
        """How the warm process ended, as ``Popen.returncode``, where it was there and is gone."""
        return self._process.wait() if self._ready is False else None

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it can fork.  False where it never will: then start processes anew.  Raises TimeoutError."""
        until = None if seconds is None else time.monotonic() + seconds
        while self._ready is None:
            self._hear(until)
        return self._ready

    def start(self, run: Sequence[str], *, stderr: int, environment: Mapping[str, str]) -> Forked:
        """Fork a process that runs ``main()`` of the module ``run[0]``; all of ``run`` is its ``sys.argv``.

        Pipes lead to its standard input and output; ``stderr`` is a descriptor.  Working directory and umask are
        this process's.  Raises OSError where the system has no room for one more.
        """
        assert self._ready, "wait first"
        wanted = {"run": [*run], "environment": {**environment}, "cwd": _here(), "umask": _umask()}
        their_in, our_in = os.pipe()
        our_out, their_out = os.pipe()
        stdin, stdout = open(our_in, "wb"), open(our_out, "rb")  # noqa: SIM115
        try:
            self._say(wanted, their_in, their_out, stderr)
            while not self._pids and self._refused is None and self._ready:
                self._hear(None)
        except BaseException:  # half a request may have left: nobody must wait for an answer to another
            self._process.kill()
            stdin.close()
            stdout.close()
            raise
        finally:
            os.close(their_in)
            os.close(their_out)
        if not self._pids:
            refused, self._refused = self._refused, None
            stdin.close()
            stdout.close()
            raise OSError(refused or "the process that others are forked from is gone")
        return Forked(self, self._pids.pop(0), run, stdin, stdout)

    def code_of(self, pid: int, seconds: float | None) -> int | None:
        """How ``pid`` ended, as ``Popen.returncode``; None where it still runs after ``seconds``."""
        until = None if seconds is None else time.monotonic() + seconds
        with suppress(TimeoutError):
            while pid not in self._codes:
                if self._ready is False:
                    return -signal.SIGKILL  # the kernel killed it with the warm process
                self._hear(until)
        code = self._codes.pop(pid, None)
        if code is not None:
            self._say({"heard": pid})  # until now nobody else could be given that number
        return code

    def _say(self, words: Mapping[str, Any], *streams: int) -> None:
        said = json.dumps(words).encode()
        with suppress(BrokenPipeError, ConnectionResetError):  # it is gone: ``_hear`` will find out
            socket.send_fds(self._line, [len(said).to_bytes(HEAD, "big")], streams)
            self._line.sendall(said)

    def _hear(self, until: float | None) -> None:
        """Wait for the warm process to say something, and note it.  Raises TimeoutError.

        What it said is taken from the socket last: an interrupt before (Ctrl-C) leaves it there for the next time.
        """
        self._line.settimeout(None if until is None else max(1e-6, until - time.monotonic()))
        try:
            data = self._line.recv(1 << 16, socket.MSG_PEEK)
        except ConnectionResetError:
            data = b""
        finally:
            self._line.settimeout(None)
        if not data:
            self._ready = False
            return
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            match json.loads(line):
                case {"ready": ready}:
                    self._ready = ready
                case {"forked": pid}:
                    self._pids.append(pid)
                case {"refused": why}:
                    self._refused = why
                case {"ended": pid, "code": code}:
                    self._codes[pid] = code
        self._line.recv(len(whole))


class Forked:
    """A process of a nest, with the part of ``subprocess.Popen`` that is used here."""

    def __init__(self, nest: Nest, pid: int, run: Sequence[str], stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self.returncode: int | None = None
        self._nest = nest
        self._run = run

    def poll(self) -> int | None:
        """How it ended: the exit status, or minus the signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._nest.code_of(self.pid, 0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """``poll``, once it has ended.  Raises ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""
        if self.returncode is None:
            self.returncode = self._nest.code_of(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired([*self._run], timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, if it still runs."""
        self.send_signal(signal.SIGKILL)


def _here() -> str | None:
    """The working directory; None where it is no more."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _umask() -> int:
    """Our umask, read without changing it for the moment that ``os.umask`` needs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)


def _one_thread() -> dict[str, str]:
    """Settings that keep libraries from starting threads when they are loaded."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


# --- the warm process


def main() -> int:
    """Load what parties need, then fork one for each request on the socket that the command line names."""
    die_with_parent()
    keep_freed_memory()
    line = socket.socket(fileno=int(sys.argv[1]))
    for name in LOADED:
        import_module(name)
    for name in json.loads(sys.argv[2]):
        with suppress(ImportError):
            import_module(name)
    leave_the_compiler_out()
    import_module("splitsec.rehearsal").rehearse()
    _rename([sys.executable, "-m", "splitsec.nest"])
    with suppress(BrokenPipeError, ConnectionResetError):
        _Warm(line).serve()
    return 0


class _Warm:
    """Who forks, and tells how they end."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self.here = _here()
        self.children: dict[int, int] = {}
        """Those that run: process id by pidfd."""
        self.selector = selectors.EpollSelector()
        self.selector.register(line, selectors.EVENT_READ)

    def say(self, **words: Any) -> None:
        self.line.sendall(json.dumps(words).encode() + b"\n")

    def serve(self) -> None:
        """Until whoever asks is gone."""
        fit = len(os.listdir("/proc/self/task")) == 1 and _has_pidfds()
        gc.collect()
        gc.freeze()  # the collector would write to every page that is to stay shared
        give_free_memory_back()  # nothing free in the pages that are shared: whoever took it would copy them
        self.say(ready=fit)  # a fork takes one thread along, and what the others held stays held
        while fit:
            for key, _ in self.selector.select():
                if key.fileobj is not self.line:
                    self.bury(key.fd)
                elif not self.hear():
                    return

    def bury(self, ending: int) -> None:
        """Say how a child ended.  It keeps its number until we are told that this was heard."""
        pid = self.children.pop(ending)
        self.selector.unregister(ending)
        os.close(ending)
        how = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert how is not None
        self.say(ended=pid, code=how.si_status if how.si_code == os.CLD_EXITED else -how.si_status)

    def hear(self) -> bool:
        """Somebody to fork, with its streams, or a child whose end was heard.  False: nobody is there any more."""
        head, streams, _, _ = socket.recv_fds(self.line, HEAD, 3)
        left, said = int.from_bytes(head, "big"), b""
        while left > len(said):
            if not (more := self.line.recv(left - len(said))):
                return False
            said += more
        if not head:
            return False
        wanted = json.loads(said)
        if "heard" in wanted:
            os.waitpid(wanted["heard"], 0)
            return True
        self.fork(wanted, streams)
        for stream in streams:
            os.close(stream)
        return True

    def fork(self, wanted: dict[str, Any], streams: list[int]) -> None:
        warm = os.getpid()
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # Python's at-fork code would lose it
        try:
            pid = os.fork()
        except OSError as error:
            self.say(refused=f"no process could be forked: {error}")
            return
        finally:
            if os.getpid() == warm:
                signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        if pid == 0:
            _be(wanted, streams, warm, [self.line.fileno(), self.selector.fileno(), *self.children], self.here, signals)
        ending = os.pidfd_open(pid)
        self.children[ending] = pid
        self.selector.register(ending, selectors.EVENT_READ)
        self.say(forked=pid)


def _has_pidfds() -> bool:
    """Whether the kernel, or what stands before it, lets us have them."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


# --- what is forked


def _be(
    wanted: dict[str, Any],
    streams: list[int],
    warm: int,
    kept: list[int],
    here: str | None,
    signals: set[int | signal.Signals],
) -> NoReturn:
    """Become what is ``wanted``, and run it to its end.

    ``warm``, ``kept``, ``here``: the warm process, descriptors that it keeps to itself, where it runs; ``signals``:
    those that it lets wait.
    """
    code = FAILED
    try:
        die_with_parent()
        if os.getppid() != warm:
            os._exit(FAILED)  # it died before we could ask to die with it
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for one in (*streams, *kept):
            os.close(one)
        os.umask(wanted["umask"])
        if wanted["cwd"] != here and wanted["cwd"] is not None:
            os.chdir(wanted["cwd"])
            if sys.path[:1] == [here]:
                sys.path[0] = wanted["cwd"]
        os.environ.clear()
        os.environ.update(wanted["environment"])
        sys.argv[:] = wanted["run"]
        sys.orig_argv[:] = [sys.executable, "-m", *wanted["run"]]
        _rename(sys.orig_argv)
        _draw_afresh()
        _compute_on(wanted["environment"].get("OMP_NUM_THREADS", ""))
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        code = import_module(sys.argv[0]).main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else FAILED if end.code else 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _draw_afresh() -> None:
    """Seed anew what was seeded when it was loaded, as it would have been in a process of its own.

    Python's ``random`` does so by itself after a fork, OpenSSL too; ``os.urandom`` and ``secrets`` ask the kernel.
    """
    import numpy
    import torch

    numpy.random.seed()
    torch.default_generator.seed()


def _compute_on(threads: str) -> None:
    """Give numpy's OpenBLAS, which read its settings when it was loaded, so many threads, as ``prepare`` torch."""
    if not threads.isdecimal() or threads == "1":
        return
    for library in {
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "openblas" in line
    }:
        for name in (
            "scipy_openblas_set_num_threads64_",
            "scipy_openblas_set_num_threads",
            "openblas_set_num_threads64_",
            "openblas_set_num_threads",
        ):
            with suppress(AttributeError, OSError):
                ctypes.CDLL(library)[name](int(threads))


def _rename(command: Sequence[str]) -> None:
    """Write ``command`` over our command line, for who looks at a list of processes."""
    with suppress(OSError, ValueError, IndexError):
        numbers = Path("/proc/self/stat").read_bytes().rpartition(b") ")[2].split()
        begin, end = int(numbers[45]), int(numbers[46])  # arg_start, arg_end of proc(5)
        text = b"\0".join(os.fsencode(word) for word in command)[: max(0, end - begin - 1)]
        ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


if __name__ == "__main__":
    sys.exit(main())
