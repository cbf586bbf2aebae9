"""The two segments of the graph with code of its own."""

from __future__ import annotations

from torch import nn


def stem() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 12), nn.BatchNorm1d(12), nn.ReLU())


def trunk() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 3))
