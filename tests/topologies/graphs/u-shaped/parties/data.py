"""Samples made by a formula: images, and for every pixel to which of three parts it belongs."""

from __future__ import annotations

import torch
from torch import Tensor


def scans(count: int, draw: int) -> dict[str, Tensor]:
    """x float32 [count, 1, 8, 8]; mask int64 [count, 8, 8]: 0 outside, 1 in the rim and 2 in the core of a disc."""
    random = torch.Generator().manual_seed(draw)
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    centre = 2 + 4 * torch.rand(count, 2, 1, 1, generator=random)
    distance = ((row - centre[:, 0]) ** 2 + (column - centre[:, 1]) ** 2).sqrt()
    mask = (distance < 3).long() + (distance < 1.5).long()
    x = mask + 0.4 * torch.randn(count, 8, 8, generator=random)
    return {"x": x.unsqueeze(1), "mask": mask}


def train(site: int) -> dict[str, Tensor]:
    return scans(21 - 2 * site, draw=site)


def test(site: int) -> dict[str, Tensor]:
    return scans(10, draw=100 + site)


def predict(site: int) -> dict[str, Tensor]:
    return scans(11, draw=200 + site)
