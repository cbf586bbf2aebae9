"""Four well-known networks as chains of named layers, for plans that are made before anybody has written a module.

Here: VGG-16, ResNet-18, ResNet-50 and AlexNet in plain ``torch.nn``, each as a list of layers that can be cut between
any two.  Not here: what they cost (``measuring``, ``resources``).

They are the published networks: with 1,000 classes and images of 3 x 224 x 224 they have 138,357,544, 11,689,512,
25,557,032 and 62,378,344 parameters (AlexNet in one tower, without local response normalisation, which has none).
The first fully connected layer of VGG-16 and AlexNet takes what the convolutions leave of the image, so on 32 x 32
pixels VGG-16 goes 512-4096-4096-classes.  A ResNet on images below 64 pixels begins, as is usual there, with a
convolution of 3 x 3 and stride 1, and without a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from splitsec.errors import UserError
from splitsec.yamlfile import meant

__all__ = ["ARCHITECTURES", "Architecture", "Layer", "build", "find_cut"]

SMALL: Final = 64
"""Pixels of the shorter side below which a ResNet does not shrink the image before its first block."""


@dataclass(frozen=True)
class Layer:
    """A piece of a chain.  ``name``: what a cut after it is called."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Architecture:
    """``make``: image ``(channels, height, width)`` and classes to layers.  ``image``: what it was published for."""

    make: Callable[[tuple[int, int, int], int], list[Layer]]
    image: tuple[int, int, int]
    about: str


def _left(size: int, *windows: tuple[int, int, int]) -> int:
    """Pixels that are left of ``size`` after windows of (size, stride, padding): of a convolution or a pool."""
    for window, stride, padding in windows:
        size = (size + 2 * padding - window) // stride + 1
    return size


def _fully_connected(channels: int, height: int, width: int, classes: int) -> list[Layer]:
    if height < 1 or width < 1:
        raise UserError(f"the pools leave {max(height, 0)} x {max(width, 0)} pixels")
    features = channels * height * width
    return [
        Layer("fc1", nn.Sequential(nn.Flatten(), nn.Linear(features, 4096), nn.ReLU(), nn.Dropout())),
        Layer("fc2", nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout())),
        Layer("fc3", nn.Linear(4096, classes)),
    ]


def _vgg16(image: tuple[int, int, int], classes: int) -> list[Layer]:
    layers: list[Layer] = []
    channels, convolution = image[0], 0
    for stage, (repeats, wide) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)), 1):
        for _ in range(repeats):
            convolution += 1
            made = nn.Sequential(nn.Conv2d(channels, wide, 3, padding=1), nn.ReLU())
            layers.append(Layer(f"conv{convolution}", made))
            channels = wide
        layers.append(Layer(f"pool{stage}", nn.MaxPool2d(2)))
    height, width = (_left(side, *[(2, 2, 0)] * 5) for side in image[1:])
    return layers + _fully_connected(512, height, width, classes)


def _alexnet(image: tuple[int, int, int], classes: int) -> list[Layer]:
    layers = [
        Layer("conv1", nn.Sequential(nn.Conv2d(image[0], 96, 11, stride=4, padding=2), nn.ReLU())),
        Layer("pool1", nn.MaxPool2d(3, 2)),
        Layer("conv2", nn.Sequential(nn.Conv2d(96, 256, 5, padding=2), nn.ReLU())),
        Layer("pool2", nn.MaxPool2d(3, 2)),
        Layer("conv3", nn.Sequential(nn.Conv2d(256, 384, 3, padding=1), nn.ReLU())),
        Layer("conv4", nn.Sequential(nn.Conv2d(384, 384, 3, padding=1), nn.ReLU())),
        Layer("conv5", nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU())),
        Layer("pool5", nn.MaxPool2d(3, 2)),
    ]
    windows = (11, 4, 2), (3, 2, 0), (5, 1, 2), (3, 2, 0), (3, 2, 0)
    height, width = (_left(side, *windows) for side in image[1:])
    return layers + _fully_connected(256, height, width, classes)


class _Residual(nn.Module):
    """``main`` beside a way past it, added up."""

    def __init__(self, main: nn.Module, past: nn.Module) -> None:
        super().__init__()
        self.main = main
        self.past = past
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[rows, channels, height, width]`` in and out."""
        return self.relu(self.main(x) + self.past(x))  # type: ignore[no-any-return]


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def _past(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(*_convolution(inputs, outputs, 1, stride))


def _basic(inputs: int, width: int, stride: int) -> tuple[nn.Module, int]:
    main = [*_convolution(inputs, width, 3, stride), nn.ReLU(), *_convolution(width, width, 3)]
    return _Residual(nn.Sequential(*main), _past(inputs, width, stride)), width


def _bottleneck(inputs: int, width: int, stride: int) -> tuple[nn.Module, int]:
    main = [
        *_convolution(inputs, width, 1),
        nn.ReLU(),
        *_convolution(width, width, 3, stride),
        nn.ReLU(),
        *_convolution(width, 4 * width, 1),
    ]
    return _Residual(nn.Sequential(*main), _past(inputs, 4 * width, stride)), 4 * width


def _resnet(
    block: Callable[[int, int, int], tuple[nn.Module, int]],
    blocks: tuple[int, int, int, int],
    image: tuple[int, int, int],
    classes: int,
) -> list[Layer]:
    small = min(image[1:]) < SMALL
    stem = _convolution(image[0], 64, 3) if small else _convolution(image[0], 64, 7, 2)
    layers = [Layer("stem", nn.Sequential(*stem, nn.ReLU()))]
    if not small:
        layers.append(Layer("pool", nn.MaxPool2d(3, 2, padding=1)))
    width = 64
    for stage, repeats in enumerate(blocks, 1):
        for index in range(repeats):
            made, width = block(width, 32 * 2**stage, 2 if stage > 1 and index == 0 else 1)
            layers.append(Layer(f"layer{stage}.{index}", made))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    return [*layers, Layer("head", head)]


ARCHITECTURES: Final[dict[str, Architecture]] = {
    "vgg16": Architecture(_vgg16, (3, 224, 224), "VGG-16: 13 convolutions, 3 fully connected layers"),
    "resnet18": Architecture(
        lambda image, classes: _resnet(_basic, (2, 2, 2, 2), image, classes), (3, 224, 224), "ResNet-18"
    ),
    "resnet50": Architecture(
        lambda image, classes: _resnet(_bottleneck, (3, 4, 6, 3), image, classes), (3, 224, 224), "ResNet-50"
    ),
    "alexnet": Architecture(_alexnet, (3, 224, 224), "AlexNet: 5 convolutions, 3 fully connected layers"),
}


def build(name: str, image: tuple[int, int, int] | None = None, classes: int = 1000) -> list[Layer]:
    """The layers of the network ``name``, on the device that is the default now (``with torch.device("meta")`` makes
    no weights).  Raises ``UserError`` for an unknown name, or an image that nothing would be left of.
    """
    known = ARCHITECTURES.get(name)
    if known is None:
        raise UserError(
            f"no network `{name}` is built in",
            expected="one of " + ", ".join(ARCHITECTURES) + "; or a FOLDER with modules of your own",
            fix=meant(name, ARCHITECTURES),
        )
    image = known.image if image is None else image
    try:
        return known.make(image, classes)
    except UserError as error:
        raise UserError(
            f"--input {'x'.join(map(str, image))} for {name}: {error.seen}",
            expected=f"images large enough for its pools, such as {'x'.join(map(str, known.image))}",
            fix="give a larger --input",
        ) from None


def find_cut(names: Sequence[str], wanted: str) -> int:
    """How many layers stand before the cut after ``wanted``: a layer, or a stage such as `layer1` for its last block.

    Raises ``UserError``, with the candidates, where there is none; a cut after the last layer leaves nothing to cut.
    """
    candidates = list(names[:-1])
    found = [place for place, name in enumerate(candidates, 1) if wanted and f"{name}.".startswith(f"{wanted}.")]
    if not found:
        near = meant(wanted, candidates)
        raise UserError(
            f"no layer `{wanted}` to cut after"
            if wanted != names[-1]
            else f"a cut after `{wanted}`, the last layer, leaves nothing for the other side",
            expected="one of " + ", ".join(candidates),
            fix=near if near.startswith("did") else "choose one of them",
        )
    return found[-1]
