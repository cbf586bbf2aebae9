"""The segments, and what a defence makes of them: a deeper cut, rounded activations, a third party in between."""

from __future__ import annotations

import torch
from torch import nn


class Rounded(nn.Module):
    """Activations rounded to ``levels`` values between 0 and ``most``; gradients pass as if they were not."""

    def __init__(self, levels: int, most: float) -> None:
        super().__init__()
        self.step = most / (levels - 1)
        self.most = most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest level, the same shape."""
        kept = x.clamp(0, self.most)
        return kept + ((kept / self.step).round() * self.step - kept).detach()


def measurements(deep: bool = False, levels: int = 0) -> nn.Module:
    """30 measurements ``[n, 30]`` to ``[n, 16]``; ``deep``: to ``[n, 4]``."""
    layers: list[nn.Module] = [nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()]
    if deep:
        layers += [nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU()]
    if levels:
        layers.append(Rounded(levels, most=4.0))
    return nn.Sequential(*layers)


def diagnosis(deep: bool = False) -> nn.Module:
    """``[n, 16]`` (``deep``: ``[n, 4]``) to one logit ``[n, 1]``: malignant?"""
    return nn.Linear(4, 1) if deep else nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))


def middle() -> nn.Module:
    """Where the registry keeps the last layer to itself: ``[n, 16]`` to ``[n, 16]``."""
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU())


def last() -> nn.Module:
    """``[n, 16]`` to one logit."""
    return nn.Linear(16, 1)
