"""``splitsec bench channel``, the handshake's part: what a session costs to begin, with ML-KEM and without.

Here: both machines in one process, frames handed over in memory, so that what is measured is computing alone.  Not
here: round trips, and what sealed frames cost once the session is there.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from typing import Final

from splitsec.transports.handshake import Initiator, Responder
from splitsec.transports.noise import public_key_of

__all__ = ["handshake_times"]

_WAYS: Final = (("plain", False), ("hybrid", True))


def handshake_times(rounds: int = 200) -> dict[str, float]:
    """Milliseconds of computing for one handshake: medians over ``rounds`` (1 or more), after one that does not count.

    Every round makes a plain handshake (Noise IK) and a hybrid one (with ML-KEM-768), in turns first, so that whatever
    else the machine does meets both.  ``plain_ms`` and ``hybrid_ms`` are both sides together; ``plain_initiator_ms``,
    ``plain_responder_ms``, ``hybrid_initiator_ms`` and ``hybrid_responder_ms`` each side from making its machine to
    holding its keys.  ``added_ms`` and ``ratio`` compare the two handshakes of each round.
    """
    _round({"plain": False, "hybrid": True})
    taken: dict[str, list[float]] = {}
    for number in range(rounds):
        seconds = _round(dict(_WAYS if number % 2 == 0 else reversed(_WAYS)))
        plain, with_kem = sum(seconds["plain"]), sum(seconds["hybrid"])
        for way, (initiator, responder) in seconds.items():
            taken.setdefault(f"{way}_ms", []).append(1000 * (initiator + responder))
            taken.setdefault(f"{way}_initiator_ms", []).append(1000 * initiator)
            taken.setdefault(f"{way}_responder_ms", []).append(1000 * responder)
        taken.setdefault("added_ms", []).append(1000 * (with_kem - plain))
        taken.setdefault("ratio", []).append(with_kem / plain)
    return {name: statistics.median(values) for name, values in taken.items()}


def _round(ways: dict[str, bool]) -> dict[str, tuple[float, float]]:
    """Seconds at the initiator and at the responder, for each way."""
    return {name: _handshake(post_quantum) for name, post_quantum in ways.items()}


def _handshake(post_quantum: bool) -> tuple[float, float]:
    initiator_key, responder_key, digest = (os.urandom(32) for _ in range(3))
    known, pinned = {public_key_of(initiator_key)}, public_key_of(responder_key)
    clock = [time.perf_counter()]
    initiator = Initiator(initiator_key, pinned, digest, post_quantum=post_quantum)
    initiator.start()
    (hello,) = initiator.frames_to_send()
    clock.append(time.perf_counter())
    responder = Responder(responder_key, digest, known, post_quantum=post_quantum)
    responder.receive(hello)
    theirs = responder.accept()
    (answer,) = responder.frames_to_send()
    clock.append(time.perf_counter())
    ours = initiator.receive(answer)
    clock.append(time.perf_counter())
    if (ours.send_key, ours.receive_key) != (theirs.receive_key, theirs.send_key):
        raise AssertionError("the two sides hold different keys: the measurement is void")
    hello_made, answer_made, answer_read = (after - before for before, after in itertools.pairwise(clock))
    return hello_made + answer_read, answer_made
