"""Breast-cancer records of scikit-learn: real ones, split by columns.  Every holder has its own order of patients."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

COLUMNS = {"clinic": slice(0, 17), "laboratory": slice(17, 30)}
ORDERS = {"registry": 1, "clinic": 2, "laboratory": 3}


def records(holder: str, first: int, last: int) -> dict[str, Any]:
    """x float32 [n, columns] and malignant float32 [n, 1] of the patients from ``first`` to ``last``, with id."""
    found = find_spec("sklearn")  # its file alone: to import it takes each process seconds
    assert found is not None and found.origin is not None
    file = Path(found.origin).parent / "datasets" / "data" / "breast_cancer.csv"
    table = torch.from_numpy(np.loadtxt(file, delimiter=",", skiprows=1))
    order = first + torch.randperm(last - first, generator=torch.Generator().manual_seed(ORDERS[holder]))
    made: dict[str, Any] = {"id": [f"patient-{row}" for row in order.tolist()]}
    if holder in COLUMNS:
        x = table[:, :30].float()
        x = (x - x.mean(0)) / x.std(0)
        made["x"] = x[order, COLUMNS[holder]]
    else:
        made["malignant"] = (table[order, 30:] == 0).float()
    return made


def train(holder: str) -> dict[str, Any]:
    return records(holder, 0, 233)


def test(holder: str) -> dict[str, Any]:
    return records(holder, 233, 300)


def predict(holder: str) -> dict[str, Any]:
    return records(holder, 300, 345)
