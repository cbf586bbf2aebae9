"""The attackers' own networks, made from shapes alone: an attacker knows a graph's shapes, not its parties' modules.

Here: encoder, folding, decoder, discriminator and classifier, for images ``[C, H, W]`` with cuts that are maps
``[c, h, w]`` or flat, for tables ``[n]``, and for any other shape, which is flattened.  All shapes are without the
batch dimension; all tensors float32.  Small, so that an attack keeps pace with its victims on one thread.  No batch
statistics anywhere: what a network says of one sample does not depend on the others.  Not here: losses and training
(each attack's own).

Weights come from torch's generator as it stands: who wants them again sets the seed before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

__all__ = ["classifier", "decoder", "discriminator", "encoder", "folding"]

Size = tuple[int, int]

_SMALLEST = 4
"""Maps are not made smaller than this many pixels a side on the way to a flat cut."""
_WIDEST = 128
"""Channels of the widest map that is the attacker's own choice."""


def encoder(shape: Sequence[int], cut_shape: Sequence[int], *, width: int = 32, positive: bool = False) -> nn.Module:
    """Samples ``[n, *shape]`` to activations ``[n, *cut_shape]``: the attacker's stand-in for a victim's segment.

    ``positive``: activations at least 0, as segments that end in ReLU give them.  ``width``: channels of the first
    convolution, or a quarter of the units of a hidden layer.
    """
    shape, cut_shape = tuple(shape), tuple(cut_shape)
    layers: list[nn.Module] = []
    if not _is_map(shape):
        layers += [*_perceptron(_count(shape), _count(cut_shape), 4 * width), nn.Unflatten(1, cut_shape or (1,))]
    elif _is_map(cut_shape):
        sizes = _halvings(_size(shape), _size(cut_shape))
        layers += _down(_widths(shape[0], width, sizes), sizes)
        if sizes[-1] != _size(cut_shape):
            layers.append(nn.AdaptiveAvgPool2d(_size(cut_shape)))
        layers.append(nn.Conv2d(_widths(shape[0], width, sizes)[-1], cut_shape[0], 3, padding=1))
    else:
        sizes = _halvings(_size(shape), (_SMALLEST, _SMALLEST))
        channels = _widths(shape[0], width, sizes)
        layers += [*_down(channels, sizes), nn.Flatten()]
        layers += [
            nn.Linear(channels[-1] * math.prod(sizes[-1]), _count(cut_shape)),
            nn.Unflatten(1, cut_shape or (1,)),
        ]
    if cut_shape == ():
        layers.append(nn.Flatten(0))
    if positive:
        layers.append(nn.ReLU())
    return _started(nn.Sequential(*layers))


def folding(shape: Sequence[int], cut_shape: Sequence[int], *, positive: bool = False, seed: int = 0) -> nn.Module:
    """An encoder without weights: samples ``[n, *shape]`` in [-1, 1], rearranged to ``[n, *cut_shape]``.

    A picture for a map is brought to a multiple of the map's size, as large as the map's channels can hold, and each
    block of pixels becomes the channels of one place: what is near stays near, as in any convolutional segment.
    Anything else is repeated, or where the cut is smaller than the sample, mixed by fixed weights that follow from
    ``seed``.
    ``positive``: positive and negative parts apart, or one scale in [0, 1] where there is no room for both.
    """
    shape, cut_shape = tuple(shape), tuple(cut_shape)
    if _is_map(shape) and _is_map(cut_shape) and shape[0] <= cut_shape[0]:
        return _FoldedMap(shape, cut_shape, positive)
    return _FoldedRow(_count(shape), cut_shape, positive, seed)


def decoder(cut_shape: Sequence[int], shape: Sequence[int], *, width: int = 16) -> nn.Module:
    """Activations ``[n, *cut_shape]`` to samples ``[n, *shape]`` with every feature in [-1, 1], as ``Scene.scaled``
    has them.

    ``width``: channels of the last map before the picture, or an eighth of the units of a hidden layer.
    """
    shape, cut_shape = tuple(shape), tuple(cut_shape)
    layers: list[nn.Module] = []
    if not _is_map(shape):
        layers += [*_perceptron(_count(cut_shape), _count(shape), 8 * width), nn.Unflatten(1, shape or (1,))]
        if shape == ():
            layers.append(nn.Flatten(0))
        return _started(nn.Sequential(*layers, nn.Tanh()))
    if _is_map(cut_shape):
        sizes = _halvings(_size(shape), _size(cut_shape))
        first = cut_shape[0]
        if sizes[-1] != _size(cut_shape):
            layers.append(nn.AdaptiveAvgPool2d(sizes[-1]))
    else:
        sizes = _halvings(_size(shape), (_SMALLEST, _SMALLEST))
        first = min(_WIDEST, 4 * width)
        layers += [_Flat(), nn.Linear(_count(cut_shape), first * math.prod(sizes[-1])), nn.LeakyReLU(0.1)]
        layers.append(nn.Unflatten(1, (first, *sizes[-1])))
    channels = [min(_WIDEST, width << i) for i in range(len(sizes))][::-1]
    layers += [nn.Conv2d(first, channels[0], 3, padding=1), _norm(channels[0]), nn.LeakyReLU(0.1)]
    for (before, after), (small, large) in zip(pairwise(channels), pairwise(sizes[::-1]), strict=True):
        layers += [*_up(before, after, small, large), _norm(after), nn.LeakyReLU(0.1)]
    return _started(nn.Sequential(*layers, nn.Conv2d(channels[-1], shape[0], 3, padding=1), nn.Tanh()))


def discriminator(cut_shape: Sequence[int], *, width: int = 64) -> nn.Module:
    """Activations ``[n, *cut_shape]`` to one score each, ``[n]``, unbounded: the higher, the more like the first of two
    kinds.
    """
    return nn.Sequential(*_judge(tuple(cut_shape), 1, width, dropout=0.0), nn.Flatten(0))


def classifier(cut_shape: Sequence[int], classes: int, *, width: int = 64, dropout: float = 0.0) -> nn.Module:
    """Activations ``[n, *cut_shape]`` to one score for each of ``classes`` classes, ``[n, classes]``: the attacker's
    stand-in for what is trained on the victims' activations.
    """
    return nn.Sequential(*_judge(tuple(cut_shape), classes, width, dropout=dropout))


class _FoldedMap(nn.Module):
    def __init__(self, shape: tuple[int, ...], cut_shape: tuple[int, ...], positive: bool) -> None:
        super().__init__()
        self.channels, height, width = cut_shape
        most = max(1, -(-shape[1] // height), -(-shape[2] // width))
        self.fold = max(k for k in range(1, most + 1) if k == 1 or k * k * shape[0] <= self.channels)
        self.size = (self.fold * height, self.fold * width)
        self.parts = positive and 2 * self.fold**2 * shape[0] <= self.channels
        self.positive = positive

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[2:]) != self.size:
            x = nn.functional.interpolate(x, self.size, mode="bilinear", antialias=True)
        folded = nn.functional.pixel_unshuffle(x, self.fold)
        if self.positive:
            folded = torch.cat([folded.relu(), (-folded).relu()], 1) if self.parts else (folded + 1) / 2
        else:
            folded = torch.cat([folded, -folded], 1)
        return folded.repeat(1, -(-self.channels // folded.shape[1]), 1, 1)[:, : self.channels]


class _FoldedRow(nn.Module):
    mixing: torch.Tensor

    def __init__(self, inputs: int, cut_shape: tuple[int, ...], positive: bool, seed: int) -> None:
        super().__init__()
        self.cut_shape, self.positive = cut_shape, positive
        outputs = _count(cut_shape)
        room = max(1, outputs // 2) if positive else outputs
        if inputs <= room:
            mixing = torch.eye(inputs)
        else:  # rows at right angles: as much of a sample as so few numbers can hold
            drawn = torch.randn(inputs, room, generator=torch.Generator().manual_seed(seed))
            mixing = torch.linalg.qr(drawn).Q.T
        self.register_buffer("mixing", mixing)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = x.reshape(len(x), -1) @ self.mixing.T
        mixed = torch.cat([mixed.relu(), (-mixed).relu()] if self.positive else [mixed, -mixed], 1)
        count = _count(self.cut_shape)
        return mixed.repeat(1, -(-count // mixed.shape[1]))[:, :count].reshape(len(x), *self.cut_shape)


class _Flat(nn.Module):
    """``[n, ...]`` to ``[n, features]``; a sample that is one number too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), -1)


class _Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(nn.functional.leaky_relu(self.first(nn.functional.leaky_relu(x, 0.2)), 0.2))
        return x + out


def _judge(cut_shape: tuple[int, ...], out: int, width: int, *, dropout: float) -> list[nn.Module]:
    """What discriminator and classifier have in common."""
    drop: list[nn.Module] = [nn.Dropout(dropout)] if dropout else []
    if not _is_map(cut_shape):
        return [
            _Flat(),
            *(nn.Linear(_count(cut_shape), 4 * width), nn.LeakyReLU(0.2), *drop),
            *(nn.Linear(4 * width, 2 * width), nn.LeakyReLU(0.2), *drop),
            nn.Linear(2 * width, out),
        ]
    layers: list[nn.Module] = []
    channels, size = cut_shape[0], _size(cut_shape)
    while not layers or max(size) > _SMALLEST:
        stride = 2 if max(size) > _SMALLEST else 1
        layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.LeakyReLU(0.2)]
        channels, size = width, _half(size) if stride == 2 else size
    layers[-1:] = [
        _Residual(width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
    ]
    size = _half(size)
    return [*layers, nn.Flatten(), *drop, nn.Linear(width * math.prod(size), out)]


def _perceptron(inputs: int, outputs: int, hidden: int) -> list[nn.Module]:
    return [
        _Flat(),
        *(nn.Linear(inputs, hidden), nn.LeakyReLU(0.1)),
        *(nn.Linear(hidden, hidden), nn.LeakyReLU(0.1)),
        nn.Linear(hidden, outputs),
    ]


def _down(channels: Sequence[int], sizes: Sequence[Size]) -> list[nn.Module]:
    """Convolutions from each of ``sizes`` to the next."""
    layers: list[nn.Module] = []
    for (before, after), (large, small) in zip(pairwise(channels), pairwise(sizes), strict=True):
        stride = (1 if large[0] == small[0] else 2, 1 if large[1] == small[1] else 2)
        layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.LeakyReLU(0.1)]
    return layers


def _up(before: int, after: int, small: Size, large: Size) -> list[nn.Module]:
    """A transposed convolution from ``small`` to ``large``, sides doubled or as they are, or doubled less one."""
    stride = (1 if large[0] == small[0] else 2, 1 if large[1] == small[1] else 2)
    kernel = (3 if stride[0] == 1 else 4, 3 if stride[1] == 1 else 4)
    over = [one * by - goal for one, by, goal in zip(small, stride, large, strict=True)]
    layers: list[nn.Module] = [nn.ConvTranspose2d(before, after, kernel, stride=stride, padding=1)]
    return [*layers, nn.ZeroPad2d((0, -over[1], 0, -over[0]))] if any(over) else layers


def _widths(first: int, width: int, sizes: Sequence[Size]) -> list[int]:
    return [first, *(min(_WIDEST, width << i) for i in range(len(sizes) - 1))]


def _norm(channels: int) -> nn.Module:
    """Without it and with torch's own first weights, a decoder of dark pictures goes dark for good (tanh saturates)."""
    return nn.GroupNorm(math.gcd(channels, 8), channels)


def _started(net: nn.Sequential) -> nn.Sequential:
    """``net`` with first weights that keep signals at their size (He et al. 2015), biases 0."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, a=0.1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net


def _halvings(start: Size, goal: Size) -> list[Size]:
    """Sizes from ``start`` downwards, each side halved (rounded up) as long as it does not fall below ``goal``."""
    sizes = [start]
    while True:
        last = sizes[-1]
        half = _half(last)
        following = tuple(h if h >= g and h < s else s for h, g, s in zip(half, goal, last, strict=True))
        if following == last:
            return sizes
        sizes.append((following[0], following[1]))


def _half(size: Size) -> Size:
    return -(-size[0] // 2), -(-size[1] // 2)


def _is_map(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and min(shape[1:]) > 1


def _size(shape: tuple[int, ...]) -> Size:
    return shape[1], shape[2]


def _count(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
