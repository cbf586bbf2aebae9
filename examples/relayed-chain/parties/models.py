"""The four segments of the relayed-chain example, one for each party of the chain."""

from __future__ import annotations

from torch import nn


def first() -> nn.Module:
    """At the clinic. Images ``[n, 1, 8, 8]`` to ``[n, 16, 8, 8]``."""
    return nn.Sequential(nn.Conv2d(1, 16, kernel_size=3, padding=1), nn.ReLU())


def second() -> nn.Module:
    """At the hospital. ``[n, 16, 8, 8]`` to ``[n, 32, 4, 4]``."""
    return nn.Sequential(nn.Conv2d(16, 32, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


def third() -> nn.Module:
    """At the institute. ``[n, 32, 4, 4]`` to ``[n, 64, 2, 2]``."""
    return nn.Sequential(nn.Conv2d(32, 64, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


def fourth() -> nn.Module:
    """At the server. ``[n, 64, 2, 2]`` to ten scores ``[n, 10]``."""
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 2 * 2, 64), nn.ReLU(), nn.Linear(64, 10))
