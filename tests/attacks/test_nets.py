"""The attackers' networks: any shape in, the right shape out, and a decoder that learns to invert what it should."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from splitsec.attacks.nets import classifier, decoder, discriminator, encoder, folding

SHAPES = [(1, 28, 28), (3, 32, 32), (1, 17, 40), (3, 5, 5), (30,), (4, 9), (), (2, 1, 1), (3, 96, 64)]
CUTS = [(32, 7, 7), (64, 4, 4), (16, 28, 28), (8, 13, 13), (64,), (5, 6), (), (10, 1, 1), (4, 3, 20), (2, 9, 9)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_shape_of_sample_and_cut(shape: tuple[int, ...], cut: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.rand(3, *shape) * 2 - 1
    for positive in (False, True):
        for made in (encoder(shape, cut, positive=positive), folding(shape, cut, positive=positive)):
            z = made(x)
            assert z.shape == (3, *cut) and z.isfinite().all()
            assert not positive or z.min() >= 0
            back = decoder(cut, shape)(z)
            assert back.shape == x.shape and back.abs().max() <= 1
    z = torch.randn(3, *cut)
    assert discriminator(cut)(z).shape == (3,)
    assert classifier(cut, 7, dropout=0.1)(z).shape == (3, 7)


@pytest.mark.parametrize(
    ("shape", "cut"),
    [((1, 28, 28), (32, 7, 7)), ((1, 28, 28), (64,)), ((30,), (16,)), ((3, 32, 32), (16, 8, 8))],
    ids=str,
)
def test_what_one_sample_gives_does_not_depend_on_the_others(shape: tuple[int, ...], cut: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.rand(4, *shape) * 2 - 1
    z = torch.randn(4, *cut)
    for net, batch in (
        (encoder(shape, cut), x),
        (folding(shape, cut), x),
        (decoder(cut, shape), z),
        (discriminator(cut), z),
        (classifier(cut, 3), z),
    ):
        assert torch.allclose(net(batch)[:1], net(batch[:1]), atol=1e-5)


@pytest.mark.parametrize(("channels", "positive"), [(64, False), (32, True), (16, True)])
def test_folding_keeps_every_pixel(channels: int, positive: bool) -> None:
    x = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = folding((1, 28, 28), (channels, 7, 7), positive=positive)(x)
    blocks = z[:, :16]
    if channels == 64:
        assert torch.equal(z[:, 16:32], -blocks) and torch.equal(z[:, 32:], z[:, :32])
    if positive:  # positive and negative parts, or one scale where there is no room for both
        assert z.min() >= 0
        blocks = blocks - z[:, 16:32] if channels == 32 else blocks * 2 - 1
    assert torch.allclose(nn.functional.pixel_shuffle(blocks, 4), x, atol=1e-6)


def test_folding_keeps_every_column() -> None:
    x = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = folding((9,), (20,), positive=True)(x)
    assert z.min() >= 0 and torch.equal(z[:, :9] - z[:, 9:18], x)
    mixed = folding((9,), (4,))  # and of a smaller cut, as much as goes in: the lengths of four directions
    rows = mixed.get_buffer("mixing")
    assert torch.allclose(mixed(rows), torch.eye(4), atol=1e-6)


def test_folding_by_seed() -> None:
    x = torch.rand(5, 40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(folding((40,), (8,), seed=1)(x), folding((40,), (8,), seed=1)(x))
    assert not torch.equal(folding((40,), (8,), seed=1)(x), folding((40,), (8,), seed=2)(x))


def test_a_decoder_of_dark_pictures_learns() -> None:
    """With PyTorch's own first weights and no normalisation its tanh saturates in the first steps, for good, at 1.3."""
    torch.manual_seed(3)
    images = torch.tensor(load_digits().images[:256], dtype=torch.float32).unsqueeze(1) / 16
    large = nn.functional.interpolate(images, (20, 20), mode="bilinear")
    x = nn.functional.pad(large, (4, 4, 4, 4)) * 2 - 1
    coder, back = encoder((1, 28, 28), (64, 7, 7)), decoder((64, 7, 7), (1, 28, 28))
    optimizer = torch.optim.Adam([*coder.parameters(), *back.parameters()], lr=1e-3)
    for _ in range(50):
        some = x[torch.randint(len(x), (32,))]
        loss = nn.functional.mse_loss(back(coder(some)), some)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert float(loss.detach()) < 0.1 * float(x.var())
