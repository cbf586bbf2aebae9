"""The networks that ``splitsec bench step`` trains, each as two segments, and samples for them.

Here: builders and data functions that the bench's party files name, and that its one-process side calls too.  Not here:
what is measured (``step``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from splitsec.architectures import build, find_cut

__all__ = ["NETWORKS", "Network", "client", "samples", "server"]


@dataclass(frozen=True)
class Network:
    """One network cut in two.  ``image``: shape of a sample; ``cut``: shape at the cut."""

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


def _small_server() -> nn.Module:
    return nn.Sequential(
        *_conv(32, 64, 64), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 64, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def _resnet18(after: str, cut: tuple[int, ...], *, groups: int = 0) -> Network:
    """ResNet-18 on 32 x 32, cut after a stage.  ``groups``: of GroupNorm, in place of BatchNorm; 0 leaves that."""

    def half(first: bool) -> nn.Module:
        layers = build("resnet18", (3, 32, 32), 10)
        place = find_cut([layer.name for layer in layers], after)
        made = nn.Sequential(*(layer.module for layer in (layers[:place] if first else layers[place:])))
        return _without_batch_norm(made, groups) if groups else made

    return Network(
        client=lambda: half(True),
        server=lambda: half(False),
        image=(3, 32, 32),
        cut=cut,
        batch=64,
        about=f"ResNet-18 on 32 x 32{', GroupNorm' if groups else ''}, cut after {after}",
    )


def _without_batch_norm(module: nn.Module, groups: int) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        else:
            _without_batch_norm(child, groups)
    return module


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
        server=_small_server,
        image=(3, 32, 32),
        cut=(32, 16, 16),
        batch=64,
        about="four convolutions on 32 x 32, cut after the second",
    ),
    "cnn-relu": Network(
        client=lambda: nn.Sequential(*_conv(3, 32), nn.MaxPool2d(2), *_conv(32, 32)),
        server=_small_server,
        image=(3, 32, 32),
        cut=(32, 16, 16),
        batch=64,
        about="four convolutions on 32 x 32, cut after the second one's ReLU",
    ),
    "resnet18-layer1": _resnet18("layer1", (64, 32, 32)),
    "resnet18-layer1-gn": _resnet18("layer1", (64, 32, 32), groups=32),
    "resnet18-layer2-gn": _resnet18("layer2", (128, 16, 16), groups=32),
}


def client(network: str, plaintext: bool = False) -> nn.Module:
    """The segment before the cut.  ``plaintext``: this process does not encrypt (``splitsec.bench.plaintext``)."""
    _maybe(plaintext)
    return NETWORKS[network].client()


def server(network: str, plaintext: bool = False) -> nn.Module:
    """The segment after the cut."""
    _maybe(plaintext)
    return NETWORKS[network].server()


def _maybe(plaintext: bool) -> None:
    if plaintext:
        from splitsec.bench.plaintext import stop_encrypting

        stop_encrypting()


def samples(network: str, batches: int, member: int = 0) -> dict[str, Any]:
    """Random images in [0, 1) and classes, ``batches`` full batches of them; the same for everyone who asks."""
    generator = torch.Generator().manual_seed(1 + member)
    count = batches * NETWORKS[network].batch
    return {
        "x": torch.rand(count, *NETWORKS[network].image, generator=generator),
        "y": torch.randint(10, (count,), generator=generator),
    }
