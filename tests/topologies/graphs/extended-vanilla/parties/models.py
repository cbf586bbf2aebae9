"""The four segments of the extended vanilla graph."""

from __future__ import annotations

from torch import nn


def image() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 16))


def genes() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Dropout(0.25))


def fusion() -> nn.Module:
    """Takes 16 numbers from the scanner, 6 from the genome and 5 of the ward's own."""
    return nn.Sequential(nn.BatchNorm1d(27), nn.Linear(27, 12), nn.ReLU())


def trunk() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.1), nn.Linear(12, 3))
