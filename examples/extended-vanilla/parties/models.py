"""The four segments of the extended vanilla example: two that look, one that joins, one that decides."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def half() -> nn.Module:
    """At each scanner, with weights of its own. Half an image ``[n, 1, 14, 28]`` to ``[n, 16, 7, 14]``."""
    return nn.Sequential(nn.Conv2d(1, 16, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


class Joined(nn.Module):
    """At the ward. Puts the upper half above the lower one, where it came from, and looks across the seam.

    Two inputs ``[n, 16, 7, 14]`` (``join: arguments`` in the graph file) to ``[n, 32, 7, 7]``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(16, 32, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, upper: Tensor, lower: Tensor) -> Tensor:
        joined: Tensor = self.look(torch.cat([upper, lower], dim=2))
        return joined


def trunk() -> nn.Module:
    """At the server. ``[n, 32, 7, 7]`` to ten scores ``[n, 10]``."""
    return nn.Sequential(
        nn.Conv2d(32, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
