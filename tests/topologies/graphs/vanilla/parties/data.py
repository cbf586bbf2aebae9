"""Samples made by a formula: every clinic has its own, and another number of them."""

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


def train(site: int) -> dict[str, Tensor]:
    return images(20 + 3 * site, draw=site)


def test(site: int) -> dict[str, Tensor]:
    return images(9 + site, draw=100 + site)


def predict(site: int) -> dict[str, Tensor]:
    return images(5 + site, draw=200 + site)
