"""Samples made by a formula: images with three classes."""

from __future__ import annotations

import torch
from torch import Tensor


def images(count: int, draw: int) -> dict[str, Tensor]:
    """x float32 [count, 1, 8, 8]: stripes in one of three directions under noise; y int64 [count]: which."""
    random = torch.Generator().manual_seed(draw)
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    stripes = torch.stack([torch.sin(row), torch.sin(column), torch.sin(row + column)])
    y = torch.randint(3, (count,), generator=random)
    x = stripes[y] + 0.5 * torch.randn(count, 8, 8, generator=random)
    return {"x": x.unsqueeze(1), "y": y}


def train() -> dict[str, Tensor]:
    return images(57, draw=1)


def test() -> dict[str, Tensor]:
    return images(15, draw=2)


def predict() -> dict[str, Tensor]:
    return images(13, draw=3)
