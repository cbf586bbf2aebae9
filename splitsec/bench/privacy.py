"""``splitsec bench privacy``: what safeguards cost a step, each beside what a researcher would write.

Here: clip and Gaussian noise from the cryptographic generator against ``torch.randn_like`` and an ordinary clip; the
ledger and the journal against a step of 40 ms.  One process, one thread; rounds interleaved; medians.  Not here: what
noise costs in accuracy (``epsilon``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

__all__ = ["add_arguments", "measured", "run"]

SHAPE: Final = (64, 32, 16, 16)
STEP_MS: Final = 40.0
SAMPLES: Final = 50_000
STEPS: Final = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--rounds", type=int, default=41, metavar="N", help="interleaved rounds (default: 41)")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    figures = measured(arguments.rounds)
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return 0
    noise, ledger, journal = figures["noise"], figures["ledger"], figures["journal"]
    print(f"one activation of {' x '.join(map(str, SHAPE))} float32, one thread, medians of {figures['rounds']} rounds")
    print(f"  clip and torch.randn_like                    {noise['plain_ms']:7.2f} ms")
    print(f"  clip and Gaussian on the grid, AES keystream {noise['safe_ms']:7.2f} ms   {noise['ratio']:.2f} times")
    print(f"  journal entry, with the digest of its bytes  {journal['ms']:7.2f} ms   {journal['share']:.1%} of a step")
    print(f"ledger, {SAMPLES:,} samples in batches of {SHAPE[0]}, durable, a step of {STEP_MS:g} ms")
    mean = f"{ledger['mean_ms']:7.2f} ms   {ledger['share']:.1%} of a step"
    print(f"  mean over {STEPS} steps                          {mean}")
    print(f"  the longest: a reservation for many steps    {ledger['longest_ms']:7.2f} ms")
    return 0


def measured(rounds: int = 41) -> dict[str, Any]:
    """Milliseconds and ratios, as ``--json`` prints them."""
    import torch

    from splitsec.process import keep_freed_memory

    keep_freed_memory()  # as every party does; both sides alike
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"rounds": rounds, "noise": _noise(rounds), "journal": _journal(rounds), "ledger": _ledger()}
    finally:
        torch.set_num_threads(before)


def _noise(rounds: int) -> dict[str, float]:
    import torch

    from splitsec.privacy.mechanism import gaussian
    from splitsec.privacy.randomness import KeystreamSource

    activation, source = torch.randn(SHAPE), KeystreamSource()

    def plain() -> torch.Tensor:
        norms = activation.flatten(1).norm(dim=1).clamp_min(1e-12)
        clipped = activation * (1.0 / norms).clamp_max(1.0).view(-1, 1, 1, 1)
        noisy: torch.Tensor = clipped + 4.0 * torch.randn_like(clipped)
        return noisy

    def safe() -> torch.Tensor:
        return gaussian(activation, clip=1.0, noise_multiplier=2.0, source=source)

    times: dict[str, list[float]] = {"plain": [], "safe": []}
    for number in range(rounds + 2):
        for name, call in (("plain", plain), ("safe", safe))[:: 1 if number % 2 else -1]:
            took = _ms(call)
            if number >= 2:
                times[name].append(took)
    ratio = statistics.median(a / b for a, b in zip(times["safe"], times["plain"], strict=True))
    return {
        "plain_ms": statistics.median(times["plain"]),
        "safe_ms": statistics.median(times["safe"]),
        "ratio": ratio,
    }


def _journal(rounds: int) -> dict[str, float]:
    import torch

    from splitsec.journal import Journal
    from splitsec.messages import Message, encode

    header, body = encode(Message("activation", (0, 0), tensors={"": torch.randn(SHAPE)}))
    with tempfile.TemporaryDirectory(prefix="splitsec-") as folder:
        journal = Journal(Path(folder) / "journal.jsonl", party="clinic", graph_digest="0" * 64, version="bench")

        def append() -> None:
            journal.append(
                to="server",
                kind="activation",
                cut="stem -> trunk",
                step=0,
                micro_batch=0,
                shapes=[SHAPE],
                dtypes=["float32"],
                records=SHAPE[0],
                privacy="clip 1, gaussian 2",
                body=(header, *body),
            )

        took = statistics.median(_ms(append) for _ in range(rounds))
        journal.close()
    return {"ms": took, "share": took / STEP_MS, "bytes": float(sum(part.nbytes for part in body))}


def _ledger() -> dict[str, float]:
    import numpy as np

    from splitsec.privacy.ledger import Ledger, Meter
    from splitsec.privacy.release import Gaussian

    order = np.random.default_rng(1).permutation(SAMPLES)
    with tempfile.TemporaryDirectory(prefix="splitsec-", dir=Path.cwd()) as folder:  # a real disk, not /tmp in memory
        ledger = Ledger(Path(folder) / "ledger.sqlite", party="clinic")
        slots = ledger.dataset("train", [row.to_bytes(8, "big") for row in range(SAMPLES)]).slots
        account = ledger.account("stem -> trunk", "inputs", Gaussian(2.0, 8192), 1.0)
        meter = Meter(ledger, delta=1e-5, budget=8.0)
        meter.expect(slots[order])
        batches = [slots[order[start : start + SHAPE[0]]] for start in range(0, STEPS * SHAPE[0], SHAPE[0])]
        times = [_ms(lambda batch=batch: meter.spend(account, batch)) for batch in batches]  # type: ignore[misc]
        meter.close(orderly=True)
        ledger.close()
    mean = statistics.mean(times)
    return {"mean_ms": mean, "share": mean / STEP_MS, "longest_ms": max(times)}


def _ms(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)
