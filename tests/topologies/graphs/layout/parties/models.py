"""Three segments that look at an image as pixels, as tokens, and as pixels."""

from __future__ import annotations

from torch import Tensor, nn


def stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8))


class Tokens(nn.Module):
    """One token for each pixel, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.layers(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, (8, 8))


def middle() -> nn.Module:
    return Tokens()


def trunk() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
