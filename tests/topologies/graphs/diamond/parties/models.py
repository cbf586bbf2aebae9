"""The four segments of the diamond."""

from __future__ import annotations

from torch import nn


def stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2))


def coarse() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 12))


def fine() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 12))


def trunk() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3))
