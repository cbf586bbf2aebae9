"""The two segments of the parallel graph; they can take a batch of one."""

from __future__ import annotations

from torch import nn


def stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2))


def trunk() -> nn.Module:
    return nn.Sequential(
        nn.Dropout2d(0.2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)
    )
