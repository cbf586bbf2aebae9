"""Small handwritten digits, all at the clinic: scikit-learn's 1,797 images of 8 by 8 pixels, 1,200 to train on."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

TRAIN, TEST = slice(0, 1200), slice(1200, 1797)


def digits(part: slice) -> dict[str, torch.Tensor]:
    """The images of one part, shuffled: ``x`` float32 ``[n, 1, 8, 8]`` in 0..1, ``y`` int64 ``[n]``, and ``id``."""
    # find_spec instead of an import: reading this file needs nothing of scikit-learn, which takes seconds to load.
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("this example reads a file of scikit-learn: pip install 'splitsec[examples]'")
    path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    rows = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))
    chosen = torch.from_numpy(np.random.default_rng(1797).permutation(len(rows))[part])
    return {"id": chosen, "x": rows[chosen, :-1].reshape(-1, 1, 8, 8) / 16, "y": rows[chosen, -1].long()}


def train() -> dict[str, torch.Tensor]:
    """The images to train on."""
    return digits(TRAIN)


def test() -> dict[str, torch.Tensor]:
    """The images kept out of training, to measure with."""
    return digits(TEST)


def predict() -> dict[str, torch.Tensor]:
    """New images, without labels."""
    return {name: field for name, field in test().items() if name != "y"}
