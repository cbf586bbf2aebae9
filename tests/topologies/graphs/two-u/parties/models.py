"""The five segments of the two U shapes."""

from __future__ import annotations

from torch import Tensor, nn


def north_stem() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 10), nn.BatchNorm1d(10), nn.ReLU())


def south_stem() -> nn.Module:
    return nn.Sequential(nn.Linear(11, 10), nn.Tanh(), nn.Dropout(0.1))


class Trunk(nn.Module):
    """Sends what came from either side through the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8))

    def forward(self, north: Tensor, south: Tensor) -> dict[str, Tensor]:
        return {"north": self.layers(north), "south": self.layers(south)}


def trunk() -> nn.Module:
    return Trunk()


def north_head() -> nn.Module:
    """Takes 8 numbers from the trunk and 10 from its own stem."""
    return nn.Sequential(nn.Linear(18, 3))


def south_head() -> nn.Module:
    return nn.Sequential(nn.Linear(18, 6), nn.ReLU(), nn.Linear(6, 2))
