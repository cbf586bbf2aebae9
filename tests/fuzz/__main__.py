"""``make fuzz``: hostile inputs by the million, in several processes, and a file for each that did harm.

Here: the command line, how inputs are divided among targets and targets among processes, progress, and what is kept of
a failure.  Not here: what is fuzzed (``targets``) and how (``engines``).

    make fuzz                                            a million inputs
    make fuzz FUZZ_ARGS="--target record --seconds 60"   one target, for a minute
    python -m tests.fuzz --target record --replay out/fuzz/record-1f2e3d4c.bin [--shrink]

With atheris installed (``pip install splitsec[fuzz]``; Linux on x86-64) inputs follow the code's branches; without it
they are left to chance, and a line says so.  The same seed gives the same inputs with chance; with atheris it does as
long as not a line of the code changes, so keep the file of what failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

from tests.fuzz import engines
from tests.fuzz.engines import EYE, Job
from tests.fuzz.targets import TARGETS, Function, load

INPUTS: Final = 1_000_000
ROOT: Final = Path(__file__).parents[2]
OUT: Final = Path("out/fuzz")
FOREVER: Final = float(1 << 31)  # seconds
HANG: Final = 60.0  # seconds for one input, on a machine that is busy
START: Final = 300.0  # seconds until the first input
POLL: Final = 0.5  # seconds
TELL: Final = 10.0  # seconds between two lines of progress
SHRINK: Final = 60.0  # seconds
LAST_LINES: Final = 30  # of a process's own words after it failed

_COVERAGE: Final = re.compile(rb"cov: (\d+)")


def main(arguments: Sequence[str] | None = None) -> int:
    """0: nothing was found.  1: something was."""
    options = _options(arguments)
    if options.replay is not None:
        return replay(options.target[0], options.replay, options.shrink)
    seed = secrets.randbelow(1 << 31) + 1 if options.seed is None else options.seed
    engine = options.engine or engines.best()
    if engine == engines.CHANCE and options.engine is None:
        print("atheris is not installed: inputs are left to chance, and nothing looks at which branches they take")
    with tempfile.TemporaryDirectory(prefix="splitsec-fuzz-") as folder:
        runs = _divided(options, engine, seed, Path(folder))
        total = sum(run.job.inputs for run in runs) if options.seconds is None or options.inputs else None
        print(
            f"engine {engine}, seed {seed}, {options.jobs} processes, "
            f"{f'{total:,} inputs' if total else f'{options.seconds:g} s for each target'}",
            flush=True,
        )
        began = time.monotonic()
        try:
            _run_all(runs, options.jobs)
        except KeyboardInterrupt:
            print("stopped")
        finally:
            for run in runs:
                run.stop()
        return _report(runs, time.monotonic() - began, seed)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, formatter_class=_Plain)
    parser.add_argument("--inputs", type=int, metavar="N", help=f"all targets together (default: {INPUTS:,})")
    parser.add_argument("--seconds", type=float, metavar="S", help="at most, for each target")
    parser.add_argument(
        "--target",
        action="append",
        metavar="NAME",
        help=f"may be given several times: {', '.join(TARGETS)}; or module:function for one of your own",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="for the same inputs again")
    parser.add_argument("--engine", choices=[engines.ATHERIS, engines.CHANCE])
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="processes at once")
    parser.add_argument("--corpus", type=Path, metavar="FOLDER", help="keep what took new branches, and begin with it")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input that was kept")
    parser.add_argument("--shrink", action="store_true", help="with --replay: look for a shorter one that fails alike")
    options = parser.parse_args(arguments)
    for name in options.target or ():
        if name not in TARGETS and ":" not in name:
            parser.error(f"there is no target {name}; there are {', '.join(TARGETS)}")
    if options.replay is not None and len(options.target or ()) != 1:
        parser.error("--replay needs one --target")
    if options.jobs < 1 or (options.inputs is not None and options.inputs < 1):
        parser.error("numbers begin at 1")
    return options


class _Plain(argparse.RawDescriptionHelpFormatter):
    pass


@final
@dataclass
class Run:
    """One target's turn."""

    job: Job
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    ended: float | None = None
    done: int = 0
    moved: float = 0.0
    """When it last finished an input."""
    failure: str | None = None
    kept: Path | None = None
    words: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return Path(self.job.eye).with_suffix(".log")

    @property
    def coverage(self) -> str:
        """Branches that libFuzzer has seen, as far as it said so."""
        found = _COVERAGE.findall(self.log.read_bytes()) if self.log.exists() else []
        return found[-1].decode() if found else "-"

    @property
    def seconds(self) -> float:
        return (time.monotonic() if self.ended is None else self.ended) - self.began if self.began else 0.0

    @property
    def rate(self) -> float:
        return self.done / self.seconds if self.seconds else 0.0

    def start(self) -> None:
        self.began = self.moved = time.monotonic()
        Path(self.job.eye).write_bytes(bytes(EYE.size + self.job.largest))
        Path(self.job.corpus).mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.engines", json.dumps(self.job)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
                },
            )

    def look(self) -> bool:
        """Whether it still runs."""
        assert self.process is not None
        code = self.process.poll()
        done, size = EYE.unpack(Path(self.job.eye).read_bytes()[: EYE.size])
        now = time.monotonic()
        if done != self.done:
            self.done, self.moved = done, now
        if code is None and now - self.moved < (HANG if done or size else START):
            return True
        self.ended = now
        if code is None:
            self.stop()
            self._keep(f"no end after {now - self.moved:.0f} s")
        elif code:
            self._keep(f"ended with {code}")
        return False

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _keep(self, failure: str) -> None:
        """What it was at."""
        self.failure = failure
        eye = Path(self.job.eye).read_bytes()
        data = eye[EYE.size : EYE.size + EYE.unpack_from(eye)[1]]
        OUT.mkdir(parents=True, exist_ok=True)
        name = self.job.target.rpartition(":")[2]
        self.kept = OUT / f"{name}-{hashlib.sha256(data).hexdigest()[:8]}.bin"
        self.kept.write_bytes(data)
        lines = self.log.read_text(errors="replace").splitlines()
        begins = [number for number, line in enumerate(lines) if line.startswith("Traceback ")]
        self.words = lines[begins[-1] :][:LAST_LINES] if begins else lines[-LAST_LINES:]


def _divided(options: argparse.Namespace, engine: str, seed: int, folder: Path) -> list[Run]:
    names = [*dict.fromkeys(options.target)] if options.target else [*TARGETS]
    shares = {name: TARGETS[name].share if name in TARGETS else 100 for name in names}
    inputs = options.inputs or INPUTS
    runs, before = [], 0
    for name in names:
        after = before + shares[name]
        most = inputs * after // sum(shares.values()) - inputs * before // sum(shares.values())
        before = after
        if options.seconds is not None and options.inputs is None:
            most = 1 << 62
        place = name.replace(":", ".")
        job = Job(
            target=name,
            engine=engine,
            inputs=most,
            seconds=FOREVER if options.seconds is None else options.seconds,
            seed=seed,
            largest=TARGETS[name].largest if name in TARGETS else 4096,
            eye=str(folder / place),
            corpus=str((options.corpus or folder / "corpus").absolute() / place),
        )
        runs.append(Run(job))
    return runs


def _run_all(runs: list[Run], jobs: int) -> None:
    waiting, running = [*runs], list[Run]()
    told = time.monotonic()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(waiting.pop(0))
            running[-1].start()
        time.sleep(POLL)
        for run in [*running]:
            if not run.look():
                running.remove(run)
                print(f"{_line(run)}{f'  FAILED: {run.failure}' if run.failure else ''}", flush=True)
        if running and time.monotonic() - told >= TELL:
            told = time.monotonic()
            print("  " + "   ".join(map(_line, running)), flush=True)


def _line(run: Run) -> str:
    of = f" of {run.job.inputs:,}" if run.job.inputs < 1 << 62 else ""
    return f"{run.job.target} {run.done:,}{of} ({run.rate:,.0f}/s)"


def _report(runs: list[Run], seconds: float, seed: int) -> int:
    total = sum(run.done for run in runs)
    print(f"\n{'target':12}{'inputs':>12}{'inputs/s':>10}{'seconds':>9}{'branches':>10}")
    for run in runs:
        print(f"{run.job.target:12}{run.done:12,}{run.rate:10,.0f}{run.seconds:9,.0f}{run.coverage:>10}")
    print(f"{'all':12}{total:12,}{total / max(seconds, 1e-9):10,.0f}{seconds:9,.0f}\nseed {seed}")
    failed = [run for run in runs if run.failure is not None]
    for run in failed:
        print(f"\n{run.job.target}: {run.failure} in input {run.done + 1:,}", *run.words, sep="\n  ")
        print(f"the same again:\n  {_python()} -m tests.fuzz --target {run.job.target} --replay {run.kept} --shrink")
    if not failed:
        print("nothing was found")
    return 1 if failed else 0


def _python() -> str:
    """This interpreter, as one would type it here."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


# One input again.


def replay(target: str, path: Path, shrink: bool) -> int:
    """Run one input; 1 where it fails."""
    function, _ = load(target)
    data = path.read_bytes()
    error = failure(function, data)
    if error is None:
        print(f"{path} ({len(data)} bytes): nothing happens")
        return 0
    if shrink:
        data = shrunk(function, data)
        path = path.with_suffix(".short.bin")
        path.write_bytes(data)
        error = failure(function, data) or error
    traceback.print_exception(error)
    print(f"{path} ({len(data)} bytes): {data[:200].hex()}")
    return 1


def failure(function: Function, data: bytes) -> Exception | None:
    """How ``function`` fails on ``data``, if it does."""
    try:
        function(data)
    except Exception as error:
        return error
    return None


def shrunk(function: Function, data: bytes) -> bytes:
    """A shorter input, or one with more zeros, that fails in the same line."""

    def where(data: bytes) -> tuple[type, object] | None:
        error = failure(function, data)
        return None if error is None else (type(error), traceback.extract_tb(error.__traceback__)[-1])

    place = where(data)
    until = time.monotonic() + SHRINK
    size = max(1, len(data) // 2)
    while size and time.monotonic() < until:
        at, found = 0, False
        while at < len(data) and time.monotonic() < until:
            part = data[at : at + size]
            for other in (data[:at] + data[at + size :], data[:at] + bytes(len(part)) + data[at + size :]):
                if other != data and where(other) == place:
                    data, found = other, True
                    break
            else:
                at += size
        size = size if found and size == 1 else size // 2
    return data


if __name__ == "__main__":
    sys.exit(main())
