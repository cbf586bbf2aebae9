"""The six segments of the graph that fans out."""

from __future__ import annotations

from torch import Tensor, nn


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(9, 12), nn.BatchNorm1d(12))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.layers(x)
        return {"hidden": hidden, "signs": (hidden > 0).long()}


def stem() -> nn.Module:
    return Stem()


def left() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Dropout(0.1))


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 10)

    def forward(self, hidden: Tensor, signs: Tensor) -> Tensor:
        return self.linear(hidden * signs)


def middle() -> nn.Module:
    return Middle()


def right() -> nn.Module:
    return nn.Sequential(nn.Tanh(), nn.Linear(12, 10))


def mixed() -> nn.Module:
    """Has nothing to train."""
    return nn.ReLU()


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, 3)
        self.linear = nn.Linear(10, 3)

    def forward(self, mixed: Tensor, signs: Tensor) -> Tensor:
        return self.linear(mixed) + self.embedding(signs).mean(1)


def head() -> nn.Module:
    return Head()
