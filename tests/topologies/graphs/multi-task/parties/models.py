"""The three segments of the multi-task graph."""

from __future__ import annotations

from torch import nn


def stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2))


def urgency() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 5, 3), nn.GroupNorm(1, 5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))


def amount() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 8), nn.Sigmoid(), nn.Linear(8, 1))
