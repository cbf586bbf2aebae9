"""The two segments of the onion example, those of vanilla.

At a clinic this file would hold ``stem`` alone and at the server ``trunk`` alone: a segment's code never leaves its
party.  Here one file serves all, because one folder holds the files of all parties.
"""

from __future__ import annotations

from torch import nn


def stem() -> nn.Module:
    """Images ``[n, 1, 28, 28]`` to activations ``[n, 32, 7, 7]``: what leaves the clinic."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def trunk() -> nn.Module:
    """Activations ``[n, 32, 7, 7]`` to one score for each of ten digits, ``[n, 10]``."""
    return nn.Sequential(
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 7 * 7, 128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, 10),
    )
