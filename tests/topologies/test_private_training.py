"""NoPeek, clipping and DP-SGD across processes: the same numbers as in one process, where there is no noise.

Here: real processes, as a user would run them; beside them the same network in plain PyTorch.  Not here: each part by
itself (tests/privacy), what is spent and what leaves (tests/processes/test_private).
"""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from splitsec.cli import main
from splitsec.errors import PartyFailed, PartyFileError, UnsafeSegment
from splitsec.partyfile import load_function
from splitsec.privacy.leakage import nopeek_term
from splitsec.privacy.mechanism import clip_rows
from splitsec.simulation import Result, simulate
from tests.topologies import test_exactness as exactness

ALPHA = 0.3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- NoPeek, in every configuration


class Watched(NamedTuple):
    """``parts`` of ``network`` that read data have NoPeek; each leaves over so many cuts."""

    network: type[exactness.Plain]
    parts: tuple[str, ...]
    cuts: int = 1
    exact: bool = True
    """To the last bit; else floating point adds up the terms in another order than plain PyTorch."""


CONFIGURATIONS = (
    Watched(exactness.Vanilla, ("stem",)),
    Watched(exactness.UShaped, ("stem",)),
    Watched(exactness.Vertical, ("shapes", "textures")),
    Watched(exactness.ExtendedVanilla, ("image", "genes")),
    Watched(exactness.MultiTask, ("stem",), cuts=2, exact=False),
    Watched(exactness.MultiHop, ("first",)),
)


def with_nopeek(watched: Watched, alpha: float) -> exactness.Plain:
    """The network in one process for one epoch, with NoPeek's terms in its loss."""

    class Peeked(watched.network):  # type: ignore[misc, name-defined]
        epochs = 1

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.terms: list[Tensor] = []
            for name in watched.parts:
                self.parts[name].register_forward_hook(self.keep)

        def keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if module.training and alpha:
                self.terms += [nopeek_term(inputs[0], output)] * watched.cuts

        def loss(self, name: str, outputs: Any, fields: Any) -> Tensor:
            loss: Tensor = super().loss(name, outputs, fields)
            while self.terms:  # beside the first loss, whose weight is not theirs
                loss = loss + self.terms.pop() * (alpha / self.losses[name].weight)
            return loss

    return Peeked()


@pytest.mark.parametrize("watched", CONFIGURATIONS, ids=lambda one: one.network.folder)
def test_nopeek_across_processes_equals_one_process(watched: Watched, tmp_path: Path) -> None:
    folder = exactness.prepared(watched.network, tmp_path / "graph", exactness.sgd)
    readers = "|".join(watched.parts)
    for file in (folder / "parties").glob("*.yaml"):
        file.write_text(re.sub(rf'(model: "models:(?:{readers})")', rf"\1, nopeek: {ALPHA}", file.read_text()))
    plain, without = with_nopeek(watched, ALPHA), with_nopeek(watched, 0.0)
    plain.fit(exactness.sgd)
    without.fit(exactness.sgd)
    simulate(folder, out=tmp_path / "out", epochs=1)
    if watched.exact:
        exactness.assert_equal_weights(plain, tmp_path / "out")
    for name, held in plain.places.items():
        for place in held:
            found = load_file(tmp_path / "out" / f"{place}.safetensors")
            torch.testing.assert_close(found, dict(plain.parts[name].state_dict()), rtol=1e-5, atol=1e-6)
            bare = without.parts[name].state_dict()
            assert any((found[key] - bare[key]).abs().max() > 1e-4 for key in found if found[key].is_floating_point())


# --- a small network of one or two clinics

GRAPH = """\
splitsec: 1
name: small
parties:
{parties}  server: {{listen: "tcp://0.0.0.0:7400", address: "tcp://server.example.org:7400"}}
groups: {{clinics: {{members: [{members}], schedule: round_robin}}}}
segments:
  stem: {{at: clinics, data: x}}
  trunk: {{at: server, loss: cross_entropy}}
cuts:
  - {{from: stem, to: trunk, shape: [6], dtype: float32{cut}}}
labels:
  - {{from: clinics, to: trunk}}
training: {{epochs: {epochs}, batch_size: 16, seed: 5{training}}}
"""
PARTY = """\
party: {party}
segments: {{{segment}: {{model: "models:{model}", optimizer: {{name: sgd, lr: 0.1, momentum: 0.5}}{more}}}}}
threads: 1
{data}"""
MODELS = """\
import torch
from torch import nn


def stem():
    return nn.Sequential(nn.Linear(12, 6), nn.Tanh())


def averaged():
    return nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6))


class Rooted(nn.Module):  # finite forward; backward, the root of 0 has an infinite slope, which is then times 0
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 6)

    def forward(self, x):
        made = self.linear(x)
        return (made * (made > 0)).sqrt()


def trunk():
    return nn.Linear(6, 3)
"""
DATA = """\
import torch


def samples(site, count):
    x = torch.randn(count, 12, generator=torch.Generator().manual_seed(site))
    return {"x": x, "y": x[:, :3].argmax(1)}


def train(site):
    return samples(site, 40)


def test(site):
    return samples(100 + site, 12)
"""


def small(
    folder: Path,
    *,
    clinics: int = 1,
    epochs: int = 2,
    model: str = "stem",
    more: str = "",
    cut: str = "",
    training: str = "",
    privacy: str = "",
) -> Path:
    """A folder of so many clinics, with ``more`` at their segment, ``cut`` at the cut and ``privacy`` for each."""
    names = [f"clinic-{letter}" for letter in "ab"[:clinics]]
    parties = folder / "parties"
    parties.mkdir(parents=True)
    made = GRAPH.format(
        parties="".join(f"  {name}: {{}}\n" for name in names),
        members=", ".join(names),
        epochs=epochs,
        cut=cut,
        training=training,
    )
    (folder / "graph.yaml").write_text(made)
    (parties / "models.py").write_text(MODELS)
    (parties / "data.py").write_text(DATA)
    for site, name in enumerate(names):
        data = f'data: {{train: "data:train", test: "data:test", args: {{site: {site}}}}}\n{privacy}'
        text = PARTY.format(party=name, segment="stem", model=model, more=more, data=data)
        (parties / f"{name}.yaml").write_text(text)
    server = PARTY.format(party="server", segment="trunk", model="trunk", more="", data="")
    (parties / "server.yaml").write_text(server)
    return folder


def alone(
    folder: Path, *, clinics: int = 1, epochs: int = 2, clip: float | None = None, dp_sgd: float | None = None
) -> dict[str, nn.Module]:
    """The two segments, trained in one process.

    ``clip``: of what leaves the stem; the gradient passes as it is.  ``dp_sgd``: of what each sample's own loss adds to
    the stem's gradient, sample by sample.
    """
    parts: dict[str, nn.Module] = {}
    for name in ("stem", "trunk"):
        torch.manual_seed(exactness.seed_of("weights", 5, name))
        parts[name] = load_function(f"models:{name}", folder / "parties")()
    made = [load_function("data:train", folder / "parties")(site=site) for site in range(clinics)]
    optimizer = torch.optim.SGD([p for part in parts.values() for p in part.parameters()], lr=0.1, momentum=0.5)
    for epoch in range(epochs):
        for member, samples in enumerate(made):
            for rows in torch.split(exactness.order_of(40, 5, epoch, member), 16):
                output = parts["stem"](samples["x"][rows])
                sent = output.detach() if clip is None else clip_rows(output.detach(), clip)
                sent.requires_grad_()
                functional.cross_entropy(parts["trunk"](sent), samples["y"][rows]).backward()  # type: ignore[no-untyped-call]
                assert sent.grad is not None
                if dp_sgd is None:
                    output.backward(sent.grad)
                else:
                    clipped_backward(parts["stem"], output, sent.grad, dp_sgd)
                optimizer.step()
                optimizer.zero_grad()
    return parts


def clipped_backward(stem: nn.Module, output: Tensor, gradient: Tensor, bound: float) -> None:
    """The mean over samples of the gradients of their own losses, each clipped to ``bound``."""
    weights, count = list(stem.parameters()), len(output)
    for row in range(count):
        found = torch.autograd.grad(output[row] @ gradient[row] * count, weights, retain_graph=True)
        norm = torch.cat([one.flatten() for one in found]).norm()
        for weight, one in zip(weights, found, strict=True):
            share = one * (bound / norm).clamp(max=1.0) / count
            weight.grad = share if weight.grad is None else weight.grad + share


def trained(out: Path, place: str) -> dict[str, Tensor]:
    return load_file(out / f"{place}.safetensors")


def exact(mu: float) -> float:
    """Epsilon at delta 1e-5 of a Gaussian mechanism with this mu, by bisection (Balle and Wang 2018, theorem 8)."""
    low, high = 0.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2
        cdf = NormalDist().cdf
        delta = cdf(mu / 2 - middle / mu) - math.exp(middle) * cdf(-mu / 2 - middle / mu)
        low, high = (middle, high) if delta > 1e-5 else (low, middle)
    return high


def ledger(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What ``splitsec ledger --json`` says, by party, cut and split."""
    capsys.readouterr()
    before = signal.getsignal(signal.SIGTERM)  # the command line takes it
    try:
        assert main(["ledger", str(folder), "--json"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    entries = json.loads(capsys.readouterr().out)["entries"]
    return {(one["party"], one["cut"], one["dataset"].split("-")[0]): one for one in entries}


def test_a_cut_that_is_only_clipped_equals_one_process_with_the_same_clip(tmp_path: Path) -> None:
    folder = small(tmp_path / "graph", cut=", privacy: {forward: {clip: 0.7}}")
    simulate(folder, out=tmp_path / "out")
    parts, free = alone(folder, clip=0.7), alone(folder)
    for name, place in (("stem", "clinic-a/stem"), ("trunk", "server/trunk")):
        found, state = trained(tmp_path / "out", place), parts[name].state_dict()
        assert all(torch.equal(found[key], state[key]) for key in state)
        assert not any(torch.equal(found[key], tensor) for key, tensor in free[name].state_dict().items())


def test_nopeek_lowers_what_the_party_itself_measures(tmp_path: Path) -> None:
    def leaked(name: str, more: str) -> Result:
        watching = "privacy: {leakage: {every: 1}}\n"
        return simulate(small(tmp_path / name, epochs=6, more=more, privacy=watching))

    without, with_it = leaked("without", ""), leaked("with", ", nopeek: 3.0")
    figures = {}
    for name, result in (("without", without), ("with", with_it)):
        assert [(one["party"], one["cut"], one["epoch"]) for one in result.leakage] == [
            ("clinic-a", "stem -> trunk", epoch) for epoch in range(6)
        ]
        figures[name] = [one["distance_correlation_corrected"] for one in result.leakage]
    assert figures["without"][-1] > 0.5
    assert figures["with"][-1] < 0.6 * figures["without"][-1]
    assert all(one < other for one, other in zip(figures["with"][1:], figures["without"][1:], strict=True))


# --- DP-SGD


def test_dp_sgd_with_weights_handed_on_costs_what_both_releases_compose_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = "{forward: {clip: 1.0, noise: gaussian, noise_multiplier: 2.0}}"
    folder = small(
        tmp_path / "graph",
        clinics=2,
        more=", dp_sgd: {clip: 0.5, noise_multiplier: 4.0}",
        cut=f", privacy: {noise}",
        privacy="privacy: {epsilon: 100.0}\n",
    )
    result = simulate(folder, out=tmp_path / "out")
    assert result.epochs == 2 and all(map(math.isfinite, result.metrics["train_loss"]))
    one, other = (trained(tmp_path / "out", f"clinic-{letter}/stem") for letter in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)
    entries = ledger(folder, capsys)
    assert {(cut, split) for _, cut, split in entries} == {
        ("stem -> trunk", "train"),
        ("weights of stem", "train"),
        ("stem -> trunk", "test"),
    }
    for party in ("clinic-a", "clinic-b"):
        composed = exact(math.sqrt(2 / 4 + 2 / 16))
        for cut, multiplier, clip in (("stem -> trunk", 2.0, 1.0), ("weights of stem", 4.0, 0.5)):
            entry = entries[party, cut, "train"]
            assert (entry["protects"], entry["releases"], entry["samples"]) == ("inputs", 2, 40)
            assert (entry["noise_multiplier"], entry["clip"]) == (multiplier, clip)
            assert composed <= entry["epsilon"] <= composed * 1.005
            assert entry["epsilon_alone"] == pytest.approx(exact(math.sqrt(2) / multiplier), rel=0.005)
        held_out = entries[party, "stem -> trunk", "test"]
        assert held_out["epsilon"] == pytest.approx(exact(math.sqrt(2) / 2), rel=0.005)


def test_dp_sgd_without_noise_to_speak_of_is_plain_training_and_without_noise_at_the_cut_unbounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small(tmp_path / "graph", clinics=2, more=", dp_sgd: {clip: 10.0, noise_multiplier: 1.0e-6}")
    warnings: set[tuple[str, str]] = set()

    def watch(party: str, event: dict[str, Any]) -> None:
        if event["event"] == "warning":
            warnings.add((party, event["text"]))

    simulate(folder, out=tmp_path / "out", watch=watch)
    parts = alone(folder, clinics=2)
    for name, place in (("stem", "clinic-a/stem"), ("stem", "clinic-b/stem"), ("trunk", "server/trunk")):
        found, state = trained(tmp_path / "out", place), parts[name].state_dict()
        torch.testing.assert_close(found, dict(state), rtol=0, atol=1e-4)
        assert not any(torch.equal(found[key], tensor) for key, tensor in state.items())  # a little noise there is
    assert {party for party, _ in warnings} == {"clinic-a", "clinic-b"}
    for _, text in warnings:
        assert "the activation of stem -> trunk to server carries inputs without noise" in text
    entries = ledger(folder, capsys)
    assert {cut for _, cut, split in entries if split == "train"} == {"weights of stem"}  # the cut stands in the clear
    for (_, _, split), entry in entries.items():
        assert entry["epsilon"] is None
        assert entry["releases"] == 2, split


def test_dp_sgd_clips_the_gradient_of_each_samples_own_loss(tmp_path: Path) -> None:
    """Also in the last batch, which has half as many samples; almost without noise, so that it can be seen."""
    folder = small(tmp_path / "graph", more=", dp_sgd: {clip: 0.5, noise_multiplier: 1.0e-6}")
    simulate(folder, out=tmp_path / "out")
    parts, free = alone(folder, dp_sgd=0.5), alone(folder)
    for name, place in (("stem", "clinic-a/stem"), ("trunk", "server/trunk")):
        found = trained(tmp_path / "out", place)
        torch.testing.assert_close(found, dict(parts[name].state_dict()), rtol=0, atol=2e-5)
        assert max(float((found[key] - bare).abs().max()) for key, bare in free[name].state_dict().items()) > 1e-3


def test_a_gradient_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    folder = small(tmp_path / "graph", model="Rooted", more=", dp_sgd: {clip: 1.0, noise_multiplier: 1.0}")
    with pytest.raises(PartyFailed, match="a sample's gradient is not finite") as failed:
        simulate(folder, out=tmp_path / "out")
    assert (failed.value.party, failed.value.kind, failed.value.exit_code) == ("clinic-a", "UnsafeSegment", 3)
    assert "segment 'stem' with dp_sgd" in str(failed.value)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


DP_SGD = ", dp_sgd: {clip: 1.0, noise_multiplier: 1.0}"


def test_dp_sgd_refuses_batch_statistics_and_says_why(tmp_path: Path) -> None:
    folder = small(tmp_path / "graph", model="averaged", more=DP_SGD)
    with pytest.raises(UnsafeSegment) as refused:
        simulate(folder)
    assert "`dp_sgd` at the segment 'stem'" in refused.value.seen
    assert "'1' (BatchNorm1d) normalises with statistics of the batch" in refused.value.seen
    assert "use GroupNorm" in refused.value.seen
    assert f"{folder / 'parties' / 'clinic-a.yaml'}:2" in refused.value.seen


@pytest.mark.parametrize(
    ("settings", "seen", "fix"),
    [
        (
            {"more": DP_SGD, "training": ", micro_batches: 2"},
            "several micro-batches under way in a step",
            "write `micro_batches: 1` in the graph file",
        ),
        ({"more": DP_SGD + ", nopeek: 0.5"}, "`dp_sgd` and `nopeek` at the segment `stem`", "remove one of the two"),
    ],
    ids=["micro-batches", "nopeek"],
)
def test_dp_sgd_refuses_what_mixes_samples(settings: dict[str, str], seen: str, fix: str, tmp_path: Path) -> None:
    folder = small(tmp_path / "graph", **settings)  # type: ignore[arg-type]
    with pytest.raises(PartyFileError) as refused:
        simulate(folder)
    assert seen in refused.value.seen
    assert refused.value.fix == fix
    assert (refused.value.file, refused.value.line) == (str(folder / "parties" / "clinic-a.yaml"), 2)
