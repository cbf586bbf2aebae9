"""The three segments of the U: down, across, up."""

from __future__ import annotations

from torch import nn


def stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU())


def trunk() -> nn.Module:
    return nn.Sequential(
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Dropout2d(0.2),
        nn.Upsample(scale_factor=2),
    )


def head() -> nn.Module:
    """Takes 6 channels from the trunk and 4 from the stem, one after the other."""
    return nn.Sequential(nn.Conv2d(10, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 3, 1))
