"""What one operating-system process does to be a party: set torch up, run, and tell its parent in JSON lines.

Here: ``prepare``, which ``splitsec join`` uses too, and the process that a simulation starts for each party.  Its
assignment comes on standard input (so that throw-away keys never touch a disk or a command line), which then stays
open: when it closes, the parent is gone and the process ends.  Not here: the party itself (``party``).
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import functools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from splitsec.errors import InternalError, PeerError, SplitsecError

__all__ = [
    "described",
    "die_with_parent",
    "give_free_memory_back",
    "internal",
    "keep_freed_memory",
    "leave_the_compiler_out",
    "main",
    "prepare",
    "serve",
]

SWITCH_SECONDS = 0.0002
"""How long the computing thread may keep the interpreter while the I/O thread has a frame to send or open.  Python's
own 5 ms is longer than a small step; measured here, a step of 0.8 ms then costs 2.3 ms more when split, else 1.5 ms."""

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc


def prepare(threads: int | None) -> None:
    """Set this process up for one party: memory, ``threads`` compute threads (None: torch's choice), a lean start."""
    keep_freed_memory()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    sys.setswitchinterval(SWITCH_SECONDS)
    leave_the_compiler_out()


def keep_freed_memory() -> None:
    """Keep glibc from handing freed tensors and frames back to the kernel at every step (mallopt(3)).

    A step frees and takes the same megabytes again; each time the kernel has to map and clear the pages anew, which
    costs more than encrypting them.  Only on glibc; ``SPLITSEC_MALLOPT=0`` leaves the allocator as it is.
    """
    if os.environ.get("SPLITSEC_MALLOPT") == "0":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20)):
        mallopt(parameter, value)


def give_free_memory_back() -> None:
    """Hand what ``keep_freed_memory`` kept back to the kernel, once; for who will be idle for long (malloc_trim(3)).

    What a step needs is then mapped and cleared anew when it is needed.  Only on glibc.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def leave_the_compiler_out() -> None:
    """Keep torch.optim from importing torch's compiler, which no party uses.

    torch imports it (one to two seconds of processor time in every party) on the first call of a few optimiser methods:
    four are wrapped so that the compiler skips them, and the wrapper looks for the unwrapped function in an attribute
    first, where we put it; ``step`` is wrapped to tell the compiler where gradients are off, which we do untold.
    Where torch works otherwise, this does nothing.
    """
    import torch

    if "torch._dynamo" in sys.modules:
        return
    for name in ("add_param_group", "zero_grad", "load_state_dict", "state_dict"):
        plain = getattr(getattr(torch.optim.Optimizer, name, None), "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            plain.__dynamo_disable = plain
    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            step = vars(kind).get("step")
            if (
                step is not None
                and getattr(step, "__code__", None) is not None
                and step.__code__.co_name == "_use_grad"
            ):
                kind.step = _without_gradients(step.__wrapped__)  # type: ignore[method-assign]


def _without_gradients(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            return step(self, *args, **kwargs)

    return plain


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, also where user code lets no other thread run."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def described(error: BaseException) -> dict[str, Any]:
    """An error as plain values for the parent: what a user reads, and what it exits with."""
    known = error if isinstance(error, SplitsecError) else internal(error)
    return {
        "event": "failed",
        "code": known.code,
        "text": str(known),
        "exit_code": known.exit_code,
        "peer": known.party if isinstance(known, PeerError) else None,
    }


def internal(error: BaseException) -> InternalError:
    """Any exception that we did not foresee, as an error with something to do about it."""
    return InternalError(
        f"{type(error).__name__}: {error}", fix="this is a fault of splitsec: please report it with the lines above"
    )


def serve(work: Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], None]) -> int:
    """Do ``work(assignment, report)`` as standard input says; its exit code.  Reports go out on what was standard
    output, all else to standard error.
    """
    die_with_parent()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    assignment = json.loads(sys.stdin.readline())

    def report(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")

    try:
        work(assignment, report)
    except Exception as error:
        if not isinstance(error, SplitsecError):
            traceback.print_exc()
        failure = described(error)
        report(failure)
        return int(failure["exit_code"])
    return 0


def main() -> int:
    """Be the party that standard input describes."""
    return serve(_party)


def _party(assignment: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    prepare(assignment["threads"])
    from splitsec.graph import parse_graph
    from splitsec.party import Job, run_party
    from splitsec.partyfile import load_party
    from splitsec.trace import SUFFIX

    job, group_key = assignment["job"], assignment.get("group_key")
    may_go_on = threading.Semaphore(0)
    pauses = {"ready", "turn"} if assignment["pause_at_turns"] else {"ready"}

    def follow_parent() -> None:
        while sys.stdin.readline():
            may_go_on.release()
        os._exit(130)

    threading.Thread(target=follow_parent, name="parent", daemon=True).start()
    graph = parse_graph(json.dumps(assignment["graph"]), assignment["graph_file"])
    party_file = load_party(assignment["party_file"]).model_copy(update={"listen": None})  # it listens on loopback here
    takes_turns = graph.schedule == "round_robin" and any(
        party_file.party in group.members and len(group.members) > 1 for group in graph.groups.values()
    )

    def tell(event: dict[str, Any]) -> None:
        report(event)
        if takes_turns and event["event"] in ("agreed", "turn over"):
            give_free_memory_back()  # it sleeps through the others' turns, and there may be a hundred of them
        if event["event"] in pauses:
            may_go_on.acquire()

    if assignment.get("undefended"):
        party_file = party_file.undefended()
    run_party(
        graph,
        party_file,
        private_key=base64.b64decode(assignment["key"]),
        group_key=None if group_key is None else base64.b64decode(group_key),
        job=Job(
            action=job["action"],
            out=None if job["out"] is None else Path(job["out"]),
            weights=None if job["weights"] is None else Path(job["weights"]),
            split=job["split"],
            trace=None if job["trace"] is None else Path(job["trace"]) / f"{party_file.party}{SUFFIX}",
            state=None if job.get("state") is None else Path(job["state"]) / party_file.party,
            journal=job.get("state") is not None,
        ),
        report=tell,
    )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
