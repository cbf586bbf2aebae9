"""The five segments of the chain and its branch."""

from __future__ import annotations

from torch import nn


def first() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def second() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(0.1))


def third() -> nn.Module:
    """The first three of its twelve outputs come to stand for the classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(96, 12), nn.BatchNorm1d(12), nn.ReLU())


def fourth() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 3))


def side() -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 1))
