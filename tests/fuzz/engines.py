"""One process that runs one target on many inputs: where inputs come from, and how the last one survives a crash.

Here: two engines.  *atheris* is Python's libFuzzer: it watches which branches of splitsec an input takes, keeps those
that take new ones, and changes them further.  *chance* makes inputs from seeds and random bytes and watches nothing.
Not here: how processes are started, watched and reported; that is ``__main__``.

Every input is written to a mapped file before it runs, so that it can be found whatever becomes of this process: an
error, a crash of an extension, an endless loop, no memory.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import random
import resource
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from tests.fuzz.targets import Function, load

ATHERIS: Final = "atheris"
CHANCE: Final = "chance"
MEMORY: Final = 2 << 30  # bytes that a process may have; an input that makes it ask for more has found something
EYE: Final = struct.Struct(">QQ")  # inputs done, bytes of the one at work; then the input
WATCHED: Final = (
    "splitsec.messages",
    *(f"splitsec.transports.{name}" for name in ("channel", "handshake", "hybrid", "noise", "record", "session")),
    *(f"splitsec.transports.{name}" for name in ("wire", "zmtp")),
    *(f"tests.fuzz.{name}" for name in ("delivery", "hostile", "planted")),  # how far a story got
)
"""Modules whose branches atheris looks at.  All of splitsec would take longer to begin, and see no more."""
_LOOKS: Final = 32  # inputs between two looks at the clock


class Job(NamedTuple):
    """What one process is to do."""

    target: str
    engine: str
    inputs: int
    seconds: float
    seed: int
    largest: int
    """Bytes of the longest input."""
    eye: str
    """Path of the mapped file, EYE.size + ``largest`` bytes."""
    corpus: str
    """Folder for inputs that took new branches."""


def best() -> str:
    """The engine to be preferred here."""
    return CHANCE if importlib.util.find_spec(ATHERIS) is None else ATHERIS


def run(job: Job) -> NoReturn:
    """Run until there were enough inputs, or until one fails: then the traceback is on standard error."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(job.eye, "r+b") as file:
        eye = mmap.mmap(file.fileno(), 0)
    if job.engine == ATHERIS:
        _run_atheris(job, eye)
    function, seeds = load(job.target)
    watched = _watched(function, job, eye)
    for data in chance(seeds, job.seed, job.largest):
        watched(data)
    raise AssertionError("chance never ends")


def _watched(function: Function, job: Job, eye: mmap.mmap) -> Function:
    """``function``, with its input in ``eye``; ends the process when there were enough."""
    until = time.monotonic() + job.seconds
    parent = os.getppid()
    done = 0

    def watched(data: bytes) -> None:
        nonlocal done
        eye[EYE.size : EYE.size + len(data)] = data
        EYE.pack_into(eye, 0, done, len(data))
        function(data)
        done += 1
        enough = done >= job.inputs
        if enough or (done % _LOOKS == 0 and (time.monotonic() >= until or os.getppid() != parent)):
            EYE.pack_into(eye, 0, done, 0)
            sys.stdout.flush()
            os._exit(0)

    return watched


def chance(seeds: Sequence[bytes], seed: int, largest: int) -> Iterator[bytes]:
    """Inputs without end, the same for the same ``seed``: all seeds, then changed seeds and random bytes."""
    yield b""
    yield from (data[:largest] for data in seeds)
    source = random.Random(seed)
    while True:
        data = bytearray(source.choice(seeds) if seeds and source.random() < 0.7 else b"")
        if source.random() < 0.2 and seeds:
            data += source.choice(seeds)
        if source.random() < 0.8:
            data += source.randbytes(int(source.expovariate(8 / largest)))
        for _ in range(source.choice((0, 0, 1, 2, 8)) if data else 0):
            at = source.randrange(len(data))
            match source.randrange(4):
                case 0:
                    data[at] = source.randrange(256)
                case 1:
                    data[at] ^= 1 << source.randrange(8)
                case 2:
                    del data[at : at + source.randrange(1, 9)]
                case _:
                    data[at:at] = data[at : at + source.randrange(1, 33)]
            if not data:
                break
        yield bytes(data[:largest])


def _run_atheris(job: Job, eye: mmap.mmap) -> NoReturn:
    import atheris

    with atheris.instrument_imports(include=[*WATCHED]):
        function, seeds = load(job.target)
    begin = Path(job.eye).parent / "seeds"
    begin.mkdir(exist_ok=True)
    for number, data in enumerate(seeds):
        (begin / f"{job.target}-{number}").write_bytes(data)
    arguments = [
        sys.argv[0],
        f"-seed={job.seed % (1 << 32) or 1}",  # 0 would be the clock
        f"-max_len={job.largest}",
        "-len_control=20",
        "-timeout=100000",  # seconds: the parent looks after that, and after memory this process itself (0 would be 1)
        "-rss_limit_mb=0",
        "-reload=0",
        f"-artifact_prefix={begin.parent}/",
        job.corpus,
        str(begin),
    ]
    atheris.Setup(arguments, _watched(function, job, eye))
    atheris.Fuzz()
    raise AssertionError("libFuzzer ended on its own")


if __name__ == "__main__":
    run(Job(*json.loads(sys.argv[1])))
