"""The Wisconsin breast-cancer records: a hospital has 30 measurements of each patient, a registry the diagnoses.

285 patients are the hospital's own, 284 others are known to everybody; the two measure with these.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

OWN, OTHERS = slice(0, 285), slice(285, 569)


def patients(part: slice) -> dict[str, object]:
    """``x`` float32 ``[n, 30]``, scaled by the public patients, ``y`` float32 ``[n, 1]`` (1: malignant), and ``id``."""
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("this example reads a file of scikit-learn: pip install 'splitsec[examples]'")
    path = Path(found.origin).parent / "datasets" / "data" / "breast_cancer.csv"
    table = np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.float32)
    order = np.random.default_rng(569).permutation(569)
    known = table[order[OTHERS], :30]
    rows = order[part]
    return {
        "id": [f"patient-{row:04}" for row in rows],
        "x": torch.from_numpy((table[rows, :30] - known.mean(0)) / known.std(0)),
        "y": torch.from_numpy(1 - table[rows, 30:]),  # in the file 0 is malignant
    }


def held(part: slice, owner: str) -> dict[str, object]:
    """What ``owner`` holds of one part."""
    kept = {"hospital": ("id", "x"), "registry": ("id", "y")}[owner]
    return {name: value for name, value in patients(part).items() if name in kept}


def train(owner: str) -> dict[str, object]:
    """The hospital's own patients."""
    return held(OWN, owner)


def test(owner: str) -> dict[str, object]:
    """Patients to measure with."""
    return held(OTHERS, owner)


def public() -> dict[str, object]:
    """Patients whose records are known: what an attacker may have."""
    return patients(OTHERS)
