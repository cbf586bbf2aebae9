"""Samples made by a formula: three holders have different fields of the same patients, each in its own order."""

from __future__ import annotations

import torch
from torch import Tensor

ORDERS = {"scanner": 1, "genome": 2, "ward": 3}


def patients(holder: str, first: int, count: int) -> dict[str, Tensor]:
    """scanner: x float32 [n, 1, 8, 8]; genome: x [n, 10]; ward: vitals [n, 5] and y int64 [n]; all: id int64 [n]."""
    random = torch.Generator().manual_seed(first)
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    y = torch.randint(3, (count,), generator=random)
    kind = y.view(-1, 1, 1)
    image = torch.sin(row * (kind + 1) / 2) + torch.cos(column * kind) + torch.randn(count, 8, 8, generator=random)
    genes = torch.randn(count, 10, generator=random) + y.unsqueeze(1) * torch.linspace(-1, 1, 10)
    vitals = torch.randn(count, 5, generator=random) - y.unsqueeze(1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(first + ORDERS[holder]))
    fields = {
        "scanner": {"x": image.unsqueeze(1)},
        "genome": {"x": genes},
        "ward": {"vitals": vitals, "y": y},
    }[holder]
    return {name: field[order] for name, field in fields.items()} | {"id": order + first}


def train(holder: str) -> dict[str, Tensor]:
    return patients(holder, 1000, 43)


def test(holder: str) -> dict[str, Tensor]:
    return patients(holder, 2000, 17)


def predict(holder: str) -> dict[str, Tensor]:
    return patients(holder, 3000, 14)
