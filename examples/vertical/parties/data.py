"""The Wisconsin breast-cancer records (569 patients, 30 measurements), split by column between two institutions.

The hospital has the 15 measurements of the nuclei's size and texture, the laboratory the 15 of their shape, the
registry knows who fell ill.  Each keeps its patients in an order of its own, so only the patient's id says which rows
belong together.  400 patients are for training, 169 are held out.  Each scales by its own training patients.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

TRAIN, TEST = slice(0, 400), slice(400, 569)

# The file's columns are ten features three times over: their means, their standard errors, their worst values.
COLUMNS = {
    "hospital": [feature + 10 * kind for kind in range(3) for feature in range(0, 5)],  # radius ... smoothness
    "laboratory": [feature + 10 * kind for kind in range(3) for feature in range(5, 10)],  # compactness ...
}
OWN_ORDER = {"hospital": 1, "laboratory": 2, "registry": 3}


def records() -> tuple[np.ndarray, np.ndarray]:
    """Measurements float32 ``[569, 30]`` and diagnoses float32 ``[569]`` (1: malignant), patient by patient."""
    # find_spec instead of an import: reading this file needs nothing of scikit-learn, which takes seconds to load.
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("this example reads a file of scikit-learn: pip install 'splitsec[examples]'")
    path = Path(found.origin).parent / "datasets" / "data" / "breast_cancer.csv"
    table = np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.float32)
    return table[:, :30], 1 - table[:, 30]  # in the file 0 is malignant


def patients(part: slice, owner: str) -> np.ndarray:
    """The rows of one part of the patients, in the order in which ``owner`` happens to keep them."""
    chosen = np.random.default_rng(569).permutation(569)[part]
    return np.random.default_rng(OWN_ORDER[owner]).permutation(chosen)


def samples(part: slice, owner: str) -> dict[str, object]:
    """What ``owner`` holds of one part of the patients: ids, and either measurements ``x`` or diagnoses ``y``."""
    measurements, malignant = records()
    rows = patients(part, owner)
    held: dict[str, object] = {"id": [f"patient-{row:04}" for row in rows]}
    if owner == "registry":
        held["y"] = torch.from_numpy(malignant[rows]).unsqueeze(1)
    else:
        known = measurements[patients(TRAIN, owner)][:, COLUMNS[owner]]
        x = measurements[rows][:, COLUMNS[owner]]
        held["x"] = torch.from_numpy((x - known.mean(0)) / known.std(0))
    return held


def train(owner: str) -> dict[str, object]:
    """The patients to train on."""
    return samples(TRAIN, owner)


def test(owner: str) -> dict[str, object]:
    """The patients held out, to measure with."""
    return samples(TEST, owner)


def predict(owner: str) -> dict[str, object]:
    """Patients without a diagnosis."""
    return {name: field for name, field in test(owner).items() if name != "y"}
