"""Samples made by a formula: rows of numbers in three classes."""

from __future__ import annotations

import torch
from torch import Tensor


def numbers(count: int, draw: int) -> dict[str, Tensor]:
    """x float32 [count, 9]: one of three lines under noise; y int64 [count]: which."""
    random = torch.Generator().manual_seed(draw)
    y = torch.randint(3, (count,), generator=random)
    x = torch.randn(count, 9, generator=random) + (y - 1).unsqueeze(1) * torch.linspace(-1, 1, 9)
    return {"x": x, "y": y}


def train() -> dict[str, Tensor]:
    return numbers(55, draw=1)


def test() -> dict[str, Tensor]:
    return numbers(20, draw=2)


def predict() -> dict[str, Tensor]:
    return numbers(19, draw=3)
