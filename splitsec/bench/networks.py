"""The networks that ``splitsec bench step`` trains, each as two segments, and samples for them.

Here: builders and data functions that the bench's party files name, and that its one-process side calls too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

__all__ = ["NETWORKS", "Network", "client", "samples", "server"]


@dataclass(frozen=True)
class Network:
    """One network cut in two.  ``image``: shape of a sample; ``cut``: shape at the cut; ``work``: the client's share
    of a step.
    """

    client: Callable[[], nn.Module]
    server: Callable[[], nn.Module]
    image: tuple[int, ...]
    cut: tuple[int, ...]
    batch: int
    about: str


def _conv(*widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return layers


NETWORKS: Final[dict[str, Network]] = {
    "mlp": Network(
        client=lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU()),
        server=lambda: nn.Linear(256, 10),
        image=(1, 28, 28),
        cut=(256,),
        batch=64,
        about="784-256-10 perceptron, cut before the last layer",
    ),
    "cnn-small": Network(
        client=lambda: nn.Sequential(*_conv(3, 32, 32), nn.MaxPool2d(2)),
        server=lambda: nn.Sequential(
            *_conv(32, 64, 64), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 64, 128), nn.ReLU(), nn.Linear(128, 10)
        ),
        image=(3, 32, 32),
        cut=(32, 16, 16),
        batch=64,
        about="four convolutions on 32 x 32, cut after the second",
    ),
    "cnn-deep": Network(
        client=lambda: nn.Sequential(*_conv(3, 32, 32), nn.MaxPool2d(2)),
        server=lambda: nn.Sequential(
            *_conv(32, 64, 64, 64),
            nn.MaxPool2d(2),
            *_conv(64, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, 10),
        ),
        image=(3, 32, 32),
        cut=(32, 16, 16),
        batch=128,
        about="six convolutions on 32 x 32, cut after the second",
    ),
}


def client(network: str) -> nn.Module:
    """The segment before the cut."""
    return NETWORKS[network].client()


def server(network: str) -> nn.Module:
    """The segment after the cut."""
    return NETWORKS[network].server()


def samples(network: str, batches: int) -> dict[str, Any]:
    """Random images in [0, 1) and classes, ``batches`` full batches of them; the same for everyone who asks."""
    generator = torch.Generator().manual_seed(1)
    count = batches * NETWORKS[network].batch
    return {
        "x": torch.rand(count, *NETWORKS[network].image, generator=generator),
        "y": torch.randint(10, (count,), generator=generator),
    }
