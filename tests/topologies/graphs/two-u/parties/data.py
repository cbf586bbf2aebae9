"""Samples made by a formula: two institutions know different things about the same patients, in different orders."""

from __future__ import annotations

import torch
from torch import Tensor

ORDERS = {"north": 1, "south": 2}


def patients(holder: str, first: int, count: int) -> dict[str, Tensor]:
    """north: x float32 [n, 9] and y int64 [n]; south: x [n, 11] and score float32 [n, 2]; both: id int64 [n]."""
    random = torch.Generator().manual_seed(first)
    y = torch.randint(3, (count,), generator=random)
    north = torch.randn(count, 9, generator=random) + y.unsqueeze(1) * torch.linspace(-1, 1, 9)
    south = torch.randn(count, 11, generator=random) - y.unsqueeze(1) * torch.linspace(0, 1, 11)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(first + ORDERS[holder]))
    fields = {
        "north": {"x": north, "y": y},
        "south": {"x": south, "score": torch.stack([south.mean(1), north.mean(1)], 1)},
    }[holder]
    return {name: field[order] for name, field in fields.items()} | {"id": order + first}


def train(holder: str) -> dict[str, Tensor]:
    return patients(holder, 1000, 54)


def test(holder: str) -> dict[str, Tensor]:
    return patients(holder, 2000, 20)


def predict(holder: str) -> dict[str, Tensor]:
    return patients(holder, 3000, 19)
