"""The three segments of the U-shaped example: a small U-Net, bent so that both of its ends stay at the clinic."""

from __future__ import annotations

from torch import nn


def stem() -> nn.Module:
    """At the clinic. Images ``[n, 1, 28, 28]`` to ``[n, 16, 14, 14]``, for the trunk and, as the skip, for the head."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def trunk() -> nn.Module:
    """At the server. ``[n, 16, 14, 14]`` one level further down and up again, to ``[n, 16, 14, 14]``."""
    return nn.Sequential(
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, kernel_size=2, stride=2),
        nn.ReLU(),
    )


def head() -> nn.Module:
    """At the clinic. The trunk's output and the skip, joined to ``[n, 32, 14, 14]``, to ten scores ``[n, 10]``."""
    return nn.Sequential(
        nn.Conv2d(32, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32 * 7 * 7, 10),
    )
