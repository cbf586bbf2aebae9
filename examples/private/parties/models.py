"""The two segments of the private example.  A narrow cut: noise is added to every number that leaves."""

from __future__ import annotations

from torch import nn


def stem() -> nn.Module:
    """Images ``[n, 1, 28, 28]`` to activations ``[n, 16]``.  No BatchNorm: it would mix the images of a batch."""
    return nn.Sequential(
        nn.Conv2d(1, 8, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 16),
    )


def trunk() -> nn.Module:
    """Activations ``[n, 16]`` to one score for each of ten digits, ``[n, 10]``."""
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))
