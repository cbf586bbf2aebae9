"""Three segments in four precisions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.layers(x)
        return {"coarse": hidden.bfloat16(), "fine": hidden.flatten(1).half()}


def stem() -> nn.Module:
    return Stem()


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()).bfloat16()
        self.upper = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 12))

    def forward(self, coarse: Tensor) -> Tensor:
        made: Tensor = self.upper(self.lower(coarse).float())
        return made.double()


def middle() -> nn.Module:
    return Middle()


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(76, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def forward(self, fine: Tensor, middle: Tensor) -> Tensor:
        made: Tensor = self.layers(torch.cat([fine.double(), middle], 1))
        return made


def trunk() -> nn.Module:
    return Trunk()
