"""The four segments of the chain."""

from __future__ import annotations

from torch import nn


def first() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())


def second() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.AvgPool2d(2))


def third() -> nn.Module:
    return nn.Sequential(nn.Dropout2d(0.2), nn.Flatten(), nn.Linear(96, 12), nn.GroupNorm(1, 12), nn.ReLU())


def fourth() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 3), nn.LogSoftmax(1))
