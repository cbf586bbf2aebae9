"""Four segments, each but the last with a ReLU at its end."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace=True))


class Tokens(nn.Module):
    """One token for each pixel: what it returns lies in memory token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.layers(x.flatten(2).transpose(1, 2))
        return functional.relu(tokens.transpose(1, 2).unflatten(2, (8, 8)))


def middle() -> nn.Module:
    return Tokens()


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).double().relu()


def trunk() -> nn.Module:
    return Trunk()


class Head(nn.Module):
    """Sums up, so that one gradient comes back for all pixels of a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.linear(x.sum((2, 3)).float() / 64)
        return made


def head() -> nn.Module:
    return Head()
