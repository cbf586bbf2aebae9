"""Breast-cancer records of scikit-learn: real ones, split by columns.  Every holder has its own order of patients."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_breast_cancer

COLUMNS = {"clinic": slice(0, 17), "laboratory": slice(17, 30)}
ORDERS = {"registry": 1, "clinic": 2, "laboratory": 3}


def records(holder: str, first: int, last: int) -> dict[str, Any]:
    """x float32 [n, columns] and malignant float32 [n, 1] of the patients from ``first`` to ``last``, with id."""
    table = load_breast_cancer()
    order = first + torch.randperm(last - first, generator=torch.Generator().manual_seed(ORDERS[holder]))
    found: dict[str, Any] = {"id": [f"patient-{row}" for row in order.tolist()]}
    if holder in COLUMNS:
        x = torch.from_numpy(table.data).float()
        x = (x - x.mean(0)) / x.std(0)
        found["x"] = x[order, COLUMNS[holder]]
    else:
        found["malignant"] = (torch.from_numpy(table.target)[order] == 0).float().unsqueeze(1)
    return found


def train(holder: str) -> dict[str, Any]:
    return records(holder, 0, 233)


def test(holder: str) -> dict[str, Any]:
    return records(holder, 233, 300)


def predict(holder: str) -> dict[str, Any]:
    return records(holder, 300, 345)
