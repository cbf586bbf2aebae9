"""The three segments of the multi-task example: one that looks, and two that answer different questions."""

from __future__ import annotations

from torch import nn


def stem() -> nn.Module:
    """At each clinic, with weights of its own. Images ``[n, 1, 28, 28]`` to ``[n, 32, 7, 7]``, for both servers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def digit() -> nn.Module:
    """At the first server. Which of the ten digits is it? ``[n, 32, 7, 7]`` to ten scores ``[n, 10]``."""
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10))


def parity() -> nn.Module:
    """At the second server. Is it an odd one? ``[n, 32, 7, 7]`` to one logit ``[n, 1]``."""
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 7 * 7, 32), nn.ReLU(), nn.Linear(32, 1))
