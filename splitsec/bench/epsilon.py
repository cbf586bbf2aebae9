"""``splitsec bench epsilon``: accuracy against epsilon for a Gaussian cut, on real images, as a table and a picture.

Here: the network of examples/private trained at several noise multipliers.  Both halves run in one process, with the
mechanism that a party applies at its door (``splitsec.privacy.mechanism``) between them: what a run over the graph
computes, without its messages.  Epsilon is what the ledger would say of one training image.  Not here: the example's
own run, over two processes (``splitsec simulate examples/private``).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

__all__ = ["add_arguments", "curve", "run"]

MULTIPLIERS: Final = (None, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0)
"""None: clipped, without noise."""
EPOCHS: Final = (1, 10)
BATCH: Final = 64
CLIP: Final = 1.0
DELTA: Final = 1e-5
RATE: Final = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--example", type=Path, default=Path("examples/private"), metavar="DIR", help="folder of the private example"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each setting (default: 3)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the curve (.svg or .png; needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, draw."""
    rows = []
    for row in curve(arguments.example, seeds=arguments.seeds):
        rows.append(row)
        print(f"{len(rows)} of {len(EPOCHS) * len(MULTIPLIERS)}: {_told(row)}", file=sys.stderr)
    if arguments.picture is not None:
        _draw(rows, arguments.picture)
    if arguments.json:
        print(json.dumps({"clip": CLIP, "delta": DELTA, "rows": rows}, indent=2))
        return 0
    print(f"| noise multiplier | releases | epsilon at delta {DELTA:g} | test accuracy |\n| --: | --: | --: | --: |")
    for row in rows:
        epsilon = "none" if row["epsilon"] is None else f"{row['epsilon']:,.2f}"
        multiplier = "0" if row["noise_multiplier"] is None else f"{row['noise_multiplier']:g}"
        print(f"| {multiplier} | {row['releases']} | {epsilon} | {row['accuracy']:.1%} |")
    return 0


def _told(row: dict[str, Any]) -> str:
    epsilon = "no finite epsilon" if row["epsilon"] is None else f"epsilon {row['epsilon']:.2f}"
    noise = f"noise multiplier {row['noise_multiplier'] or 0:g}"
    return f"{noise}, {row['releases']} epochs: {epsilon}, {row['accuracy']:.1%}"


def curve(example: Path, *, seeds: int) -> Iterator[dict[str, Any]]:
    """A row for each number of epochs and noise multiplier: the median accuracy over ``seeds`` runs, and its range."""
    import torch

    from splitsec.partyfile import load_function
    from splitsec.privacy.accounting import epsilon
    from splitsec.privacy.release import Gaussian

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    folder = example / "parties"
    stem, trunk, train, test = (
        load_function(spec, folder) for spec in ("models:stem", "models:trunk", "data:train", "data:test")
    )
    data = train(), test()
    torch.set_num_threads(1)
    for epochs in EPOCHS:
        for multiplier in MULTIPLIERS:
            found = sorted(_trained(stem, trunk, data, multiplier, epochs, seed) for seed in range(seeds))
            yield {
                "noise_multiplier": multiplier,
                "releases": epochs,
                "epsilon": None if multiplier is None else finite(epsilon({Gaussian(multiplier, 16): epochs}, DELTA)),
                "accuracy": statistics.median(found),
                "lowest": found[0],
                "highest": found[-1],
            }


def _trained(stem_of: Any, trunk_of: Any, data: Any, multiplier: float | None, epochs: int, seed: int) -> float:
    import torch

    torch.manual_seed(seed)
    stem, trunk = stem_of(), trunk_of()
    optimizers = [torch.optim.Adam(one.parameters(), lr=RATE) for one in (stem, trunk)]
    (train, test), order = data, torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        shuffled = torch.randperm(len(train["y"]), generator=order)
        for start in range(0, len(shuffled), BATCH):
            rows = shuffled[start : start + BATCH]
            made = stem(train["x"][rows])
            arrived = _released(made.detach(), multiplier).requires_grad_()
            torch.autograd.backward(torch.nn.functional.cross_entropy(trunk(arrived), train["y"][rows]))
            torch.autograd.backward(made, arrived.grad)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    stem.eval(), trunk.eval()
    with torch.no_grad():
        scores = trunk(_released(stem(test["x"]), multiplier))
    return float((scores.argmax(1) == test["y"]).float().mean())


def _released(activation: torch.Tensor, multiplier: float | None) -> torch.Tensor:
    from splitsec.privacy.mechanism import clip_rows, gaussian
    from splitsec.privacy.randomness import KeystreamSource

    if multiplier is None:
        return clip_rows(activation, CLIP)
    return gaussian(activation, clip=CLIP, noise_multiplier=multiplier, source=KeystreamSource())


def _draw(rows: list[dict[str, Any]], file: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        from splitsec.errors import UserError

        raise UserError(
            "matplotlib is not installed", expected="it, to draw", fix="pip install matplotlib, or leave out --picture"
        ) from None
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    for epochs, colour in zip(EPOCHS, ("#b5651d", "#1f5fa8"), strict=True):
        noisy = [row for row in rows if row["releases"] == epochs and row["epsilon"] is not None]
        x, y = [row["epsilon"] for row in noisy], [100 * row["accuracy"] for row in noisy]
        error = [
            [100 * (r["accuracy"] - r["lowest"]) for r in noisy],
            [100 * (r["highest"] - r["accuracy"]) for r in noisy],
        ]
        word = "release" if epochs == 1 else "releases"
        axes.errorbar(x, y, yerr=error, fmt="o-", color=colour, capsize=2, label=f"{epochs} {word} of every image")
        clean = next(row for row in rows if row["releases"] == epochs and row["epsilon"] is None)
        axes.axhline(100 * clean["accuracy"], color=colour, linestyle=":", linewidth=1)
    axes.axhline(10, color="grey", linewidth=1)
    axes.text(0.01, 0.115, "guessing", color="grey", fontsize=8, transform=axes.transAxes)
    axes.set_xscale("log")
    axes.set_ylim(0, 100)
    axes.set_xlabel(f"epsilon of one image against whoever receives the cut (delta {DELTA:g})")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("2,500 MNIST images, 16 numbers across the cut; dotted: clipped, no noise", fontsize=9)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
