"""The segments, and what a defence makes of them: a deeper cut, rounded activations, a U shape."""

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


def stem(deep: bool = False, levels: int = 0) -> nn.Module:
    """Images ``[n, 1, 28, 28]`` to activations ``[n, 64, 7, 7]``; ``deep``: to ``[n, 64]``."""
    layers: list[nn.Module] = []
    for width_in, width_out, stride in ((1, 16, 2), (16, 32, 2), (32, 64, 1)):
        layers += [nn.Conv2d(width_in, width_out, kernel_size=3, stride=stride, padding=1), nn.ReLU()]
    if deep:
        layers += [nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()]
    if levels:
        layers.append(Rounded(levels, most=4.0))
    return nn.Sequential(*layers)


def trunk(deep: bool = False, headless: bool = False) -> nn.Module:
    """Activations to ten scores ``[n, 10]``; ``headless``: to 64 numbers, the rest is at the clinic."""
    if deep:
        return nn.Linear(64, 10)
    body = [nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU()]
    return nn.Sequential(*body, nn.Linear(128, 64), nn.ReLU()) if headless else nn.Sequential(*body, nn.Linear(128, 10))


def head() -> nn.Module:
    """The end of a U shape: ``[n, 64]`` to ten scores."""
    return nn.Linear(64, 10)
