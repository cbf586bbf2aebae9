"""The three segments of the vertical graph."""

from __future__ import annotations

from torch import nn


def shapes() -> nn.Module:
    return nn.Sequential(nn.Linear(17, 9), nn.BatchNorm1d(9), nn.ReLU())


def textures() -> nn.Module:
    return nn.Sequential(nn.Linear(13, 7), nn.Tanh(), nn.Dropout(0.2))


def trunk() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
