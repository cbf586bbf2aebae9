"""Zeros that are left out cost no bit: weights are those of one process; codecs that round are another training.

Here: graphs of ``test_exactness`` with `codec: nonzero` at their cuts that begin at a ReLU, and ``zeros``, where every
cut does; in real processes, with micro-batches, decoys and predictions.  How much less passes stands in the traces.
What a codec makes of one tensor: ``tests/splitsec/test_codecs.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from splitsec.errors import PartyFailed, UnsafeSegment
from splitsec.journal import read as read_journal
from splitsec.simulation import predict, simulate
from splitsec.trace import SUFFIX
from tests.conftest import change
from tests.topologies import test_decoys as decoys
from tests.topologies.test_exactness import (
    Diamond,
    Fields,
    Loss,
    MakeOptimizer,
    MultiHop,
    Plain,
    SideBranch,
    UShaped,
    Vanilla,
    adam,
    assert_equal_weights,
    assert_same_training,
    one_thread,
    prepared,
    sgd,
)

__all__ = ["one_thread"]


class Zeros(Plain):
    """A U of four segments, three with a ReLU at the end."""

    folder = "zeros"
    batch = 16
    seed = 59
    places: ClassVar = {
        "stem": ("clinic/stem",),
        "middle": ("hospital/middle",),
        "trunk": ("server/trunk",),
        "head": ("clinic/head",),
    }
    losses: ClassVar = {"head": Loss(functional.cross_entropy, "y")}

    def forward(self, member: int, fields: Fields) -> dict[str, Tensor]:
        through = fields["x"]
        for part in self.places:
            through = self.parts[part](through)
        return {"head": through}


AT_A_RELU = {
    Vanilla: ("stem, to: trunk, shape: [4, 4, 4]",),
    UShaped: ("stem, to: trunk, shape: [4, 8, 8]",),
    MultiHop: ("first, to: second, shape: [4, 8, 8]", "third, to: fourth, shape: [12]"),
    SideBranch: ("first, to: second, shape: [4, 8, 8]", "third, to: fourth, shape: [12]"),
    Diamond: ("stem, to: fine, shape: [4, 4, 4]", "stem, to: coarse, shape: [4, 4, 4]"),
    Zeros: (),
}
"""The cuts that begin at one, where the folder does not say so itself."""


def coded(network: type[Plain], folder: Path, codec: str = "nonzero") -> Path:
    """``folder`` with ``codec`` at the cuts above."""
    changes = [(f"{cut}, dtype: float32", f"{cut}, dtype: float32, codec: {codec}") for cut in AT_A_RELU[network]]
    change(folder / "graph.yaml", *changes)
    return folder


def passed(traces: Path, party: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (traces / f"{party}{SUFFIX}").read_text().splitlines()]
    return [line for line in lines if line.get("kind") in ("activation", "gradient")]


@pytest.mark.parametrize(
    ("network", "make_optimizer", "micro_batches"),
    [
        (Vanilla, adam, 1),
        (UShaped, sgd, 4),
        (MultiHop, adam, 1),
        (SideBranch, sgd, 1),
        (Diamond, adam, 4),
        (Zeros, sgd, 1),
        (Zeros, adam, 3),
    ],
    ids=lambda value: getattr(value, "folder", getattr(value, "__name__", str(value))),
)
def test_weights_and_losses_are_those_of_one_process(
    network: type[Plain], make_optimizer: MakeOptimizer, micro_batches: int, tmp_path: Path
) -> None:
    """The last batch of an epoch is smaller; where several segments hang on one ReLU, or a loss, gradients add up."""
    folder = coded(network, prepared(network, tmp_path / "graph", make_optimizer, micro_batches=micro_batches))
    assert "codec: nonzero" in (folder / "graph.yaml").read_text()
    assert_same_training(folder, tmp_path / "out", network(micro_batches=micro_batches), make_optimizer)


def test_less_passes_and_the_journal_says_how(tmp_path: Path) -> None:
    folder = prepared(Zeros, tmp_path / "graph", sgd)
    with (folder / "parties" / "clinic.yaml").open("a") as file:
        file.write("privacy: {delta: 1.0e-5}\n")
    simulate(folder, trace=tmp_path / "traces", state=tmp_path / "state")
    plain = {"float32": 4, "float64": 8}
    sent, whole = 0, 0
    for line in passed(tmp_path / "traces", "hospital"):
        for dtype, shape in line["tensors"]:
            assert dtype == "float32" and len(shape) == 4  # a trace tells of tensors, not of how they travel
            sent += line["body"]
            whole += torch.Size(shape).numel() * plain[dtype]
    assert 0.3 < sent / whole < 0.7
    entries = [entry.values for entry in read_journal(tmp_path / "state" / "clinic" / "journal.jsonl")]
    first = next(one for one in entries if one["kind"] == "activation")
    assert (first["dtypes"], first["shapes"]) == (["float32 as nonzero"], [[16, 8, 8, 8]])
    assert first["bytes"] < 16 * 512 * 4 * 0.8


def test_a_step_that_is_redone_costs_no_bit(tmp_path: Path) -> None:
    """The same activations leave twice; each attempt has its own gradients, left out at the same places."""

    class Longer(MultiHop):
        epochs = 7

    AT_A_RELU[Longer] = AT_A_RELU[MultiHop]
    folder = coded(Longer, decoys.deceiving(Longer, tmp_path / "graph", adam, micro_batches=2))
    plain = Longer(micro_batches=2)
    plain.fit(adam)
    simulate(folder, out=tmp_path / "out", trace=tmp_path / "traces")
    assert decoys.assert_redone(folder, tmp_path / "traces", micro_batches=2) >= 3
    assert_equal_weights(plain, tmp_path / "out")


def test_a_prediction_is_that_of_one_process(tmp_path: Path) -> None:
    folder = prepared(Zeros, tmp_path / "graph", sgd)
    plain = Zeros()
    plain.fit(sgd)
    simulate(folder, out=tmp_path / "out")
    predict(folder, weights=tmp_path / "out", out=tmp_path / "predicted")
    expected = torch.cat([outputs["head"] for _, _, outputs in plain.look("predict")])
    found = load_file(tmp_path / "predicted" / "clinic" / "predictions.safetensors")
    assert torch.equal(found["head"], expected)


@pytest.mark.parametrize(("codec", "most"), [("bfloat16", 0.02), ("float16", 0.01), ("int8", 0.1)])
def test_codecs_that_round_change_a_training_a_little_and_both_runs_alike(
    codec: str, most: float, tmp_path: Path
) -> None:
    """Two runs agree to the last bit; neither agrees with one process."""
    folder = coded(MultiHop, prepared(MultiHop, tmp_path / "graph", sgd), codec)
    plain = MultiHop()
    losses, _ = plain.fit(sgd)
    for out in ("one", "two"):
        result = simulate(folder, out=tmp_path / out)
        assert result.metrics["train_loss"] == pytest.approx(losses, rel=most)
        print(codec, [one / other - 1 for one, other in zip(result.metrics["train_loss"], losses, strict=True)])
    for name, held in plain.places.items():
        one, two = (load_file(tmp_path / out / f"{held[0]}.safetensors") for out in ("one", "two"))
        for key, tensor in plain.parts[name].state_dict().items():
            assert torch.equal(one[key], two[key])
            assert not torch.equal(one[key], tensor) or not tensor.is_floating_point()


@pytest.mark.parametrize("end", ["nn.ReLU(), nn.AvgPool2d(1)", "nn.LeakyReLU()", "nn.ReLU6()", "nn.Softplus()"])
def test_a_segment_without_a_relu_at_its_end_sends_nothing(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(Zeros, tmp_path / "graph", sgd)
    change(folder / "parties" / "models.py", ("nn.ReLU(inplace=True)", end))
    with pytest.raises(
        UnsafeSegment, match="segment 'stem' returns for its cut to 'middle' is not the output of a ReLU"
    ):
        simulate(folder)  # before anything is started
    monkeypatch.setattr("splitsec.simulation._check", lambda folder: None)
    with pytest.raises(PartyFailed) as failed:
        simulate(folder, trace=tmp_path / "traces")
    assert (failed.value.party, failed.value.kind, failed.value.exit_code) == ("clinic", "UnsafeSegment", 3)
    assert "segment 'stem' returns for its cut to 'middle' is not the output of a ReLU" in str(failed.value)
    assert passed(tmp_path / "traces", "clinic") == []
