"""Decoder inversion on a small folder: what it recovers, what the first weights bring, and that listening is honest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from splitsec.attacks.inversion import (
    FIRST,
    Inversion,
    InversionStrategy,
    Scale,
    apart,
    comparison,
    drawn_afresh,
    first_weights,
    imitate,
    sent_as,
)
from splitsec.attacks.strategy import Loot
from splitsec.segments import build_segments
from tests.attacks.bystander import Bout, attacked, weights, write
from tests.attacks.in_process import open_world, train

STEPS = 300


@pytest.fixture(scope="module")
def bout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bout]:
    folder = write(tmp_path_factory.mktemp("inversion") / "blobs")
    with attacked(folder, Inversion(), options={"steps": STEPS}) as one:
        yield one


@pytest.fixture(scope="module")
def loot(bout: Bout) -> Loot:
    return bout.strategy.loot()


def test_listening_changes_no_bit(bout: Bout) -> None:
    honest = train(open_world(bout.ground.folder.path), {})
    ours, theirs = weights(bout.world), weights(honest)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.threat("T44")
def test_samples_are_recovered(bout: Bout, loot: Loot) -> None:
    judged = bout.judge(loot)
    assert judged.verdict == "recovered"
    assert judged.reconstruction_mse is not None and judged.baseline_mse is not None
    assert judged.reconstruction_mse < 0.25 * judged.baseline_mse
    assert 0.1 < judged.baseline_mse < 0.4
    assert "images of clinic-a and clinic-b" in judged.sentence and "first weights" in judged.sentence
    (curve,) = judged.curves
    assert curve.points[-1][0] == STEPS and curve.points[-1][1] < 0.5 * curve.points[0][1]
    assert [len(pictures.row) for pictures in judged.pictures] == [12, 12, 12]


def test_each_sample_is_recovered_at_its_own_place(bout: Bout, loot: Loot) -> None:
    places = loot.tensors["places"]
    assert places.shape == (256, 3) and set(places[:, 0].tolist()) == {5} and set(places[:, 1].tolist()) == {0, 1}
    truth = bout.scene.scaled(bout.truth.samples(places))
    recovered = loot.tensors["recovered"]
    distances = torch.cdist(recovered.flatten(1), truth.flatten(1))
    assert (distances.argmin(1) == torch.arange(len(truth))).double().mean() > 0.75
    assert apart(recovered.roll(1, 0), truth) > 4 * apart(recovered, truth)


def test_the_seed_gives_first_weights_away(bout: Bout, loot: Loot) -> None:
    known = first_weights(bout.scene)
    assert known is not None
    graph, files = bout.world.folder.graph, bout.world.folder.parties
    begun = build_segments(graph, files["clinic-b"])["stem"].weights()
    assert all(torch.equal(tensor, begun[name]) for name, tensor in known.state_dict().items())
    other = drawn_afresh(known, 3)
    assert not torch.equal(other[0].weight, known[0].weight)  # type: ignore[index,union-attr,arg-type]

    figures = bout.judge(loot).figures
    truth = bout.scene.scaled(bout.truth.samples(loot.tensors["places"]))
    assert figures["error where the first weights are not known"] > 1.2 * apart(loot.tensors["recovered"], truth)
    assert loot.tensors["beginning_places"].tolist() == [[0, 0, row] for row in range(16 * FIRST)]
    assert figures[f"error of the first {FIRST} batches of the run, without a shadow"] < 0.08


def test_a_decoder_of_another_segment_recovers_nothing(bout: Bout) -> None:
    assert isinstance(bout.strategy, InversionStrategy)
    heard = bout.strategy.overheard()
    known = first_weights(bout.scene)
    assert heard is not None and known is not None
    wrong = imitate(drawn_afresh(known, 5), heard, bout.scene, steps=150, warm=150)
    found = comparison(bout.truth.samples(heard.places), wrong.recover(heard.activations), bout.scene.public["x"])
    assert found.mse > 0.85 * found.baseline and found.verdict == "nothing recovered"


def test_the_server_own_segment_stays_as_it_is(bout: Bout, loot: Loot) -> None:
    trunk = bout.world.segments["server"]["trunk"].module
    assert all(parameter.requires_grad for parameter in trunk.parameters())
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    assert isinstance(bout.strategy, InversionStrategy)
    classify, heard = bout.strategy.classifier(), bout.strategy.overheard()
    assert classify is not None and heard is not None and heard.labels is not None
    assert float(classify(heard.activations, heard.labels)) < 0.5  # it is the trained one
    assert all(torch.equal(before[name], tensor) for name, tensor in trunk.state_dict().items())


def test_without_architecture_a_segment_of_our_own_stands_in(tmp_path: Path) -> None:
    folder = write(tmp_path / "blobs", ("epochs: 6", "epochs: 4"))
    with attacked(folder, Inversion(), options={"steps": STEPS}, architecture=None) as bout:
        loot = bout.strategy.loot()
        assert "afresh" not in loot.tensors and "beginning" not in loot.tensors
        judged = bout.judge(loot)
        assert judged.reconstruction_mse is not None and judged.baseline_mse is not None
        assert judged.reconstruction_mse < judged.baseline_mse
        assert "first weights" not in judged.sentence


def test_who_heard_nothing_recovers_nothing(tmp_path: Path) -> None:
    with attacked(write(tmp_path / "blobs"), Inversion(), trained=False) as bout:
        bout.strategy.take_over(bout.world.segments["server"])
        loot = bout.strategy.loot()
        assert loot.tensors == {} and loot.numbers == {"batches": 0}
        assert bout.judge(loot).verdict == "nothing recovered"


def test_of_parallel_clinics_one_is_taken(tmp_path: Path) -> None:
    folder = write(tmp_path / "blobs", ("schedule: round_robin", "schedule: parallel"), ("epochs: 6", "epochs: 1"))
    with attacked(folder, Inversion()) as bout:
        assert isinstance(bout.strategy, InversionStrategy)
        heard, beginning = bout.strategy.overheard(), bout.strategy.beginning()
        assert heard is not None and heard.places.tolist() == [[0, 0, row] for row in range(128)]
        assert beginning is not None and set(beginning.places[:, 1].tolist()) == {0}


def test_what_a_floor_does_is_done_to_shadows_too(tmp_path: Path) -> None:
    floor = "dtype: float32, privacy: {forward: {clip: 2.0, noise: gaussian, noise_multiplier: 0.25}}}"
    noisy = open_world(write(tmp_path / "noisy", ("dtype: float32}", floor))).folder.graph
    chance = torch.Generator().manual_seed(1)
    activations = 3 * torch.rand(2000, 8, 4, 4, generator=chance)
    sent = sent_as(noisy, "stem -> trunk", chance)(activations)
    norms = activations.flatten(1).norm(dim=1)
    clipped = activations * (2.0 / norms).clamp(max=1).reshape(-1, 1, 1, 1)
    assert float((sent - clipped).std()) == pytest.approx(2 * 2.0 * 0.25, rel=0.01)
    assert abs(float((sent - clipped).mean())) < 0.01

    plain = open_world(write(tmp_path / "plain")).folder.graph
    assert sent_as(plain, "stem -> trunk", chance)(activations) is activations


def test_scale_leaves_no_channel_apart_and_no_dead_one_infinite() -> None:
    x = torch.randn(500, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([5.0, 1.0, 0.0]).reshape(
        1, 3, 1, 1
    )
    scaled = Scale(x + 7)(x + 7)
    assert scaled.mean((0, 2, 3)).abs().max() < 1e-4
    assert scaled[:, :2].std((0, 2, 3)).tolist() == pytest.approx([1, 1], abs=0.05)
    assert torch.equal(scaled[:, 2], torch.zeros(500, 4, 4))
    flat = Scale(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    assert flat.middle.tolist() == [[2, 20]]
