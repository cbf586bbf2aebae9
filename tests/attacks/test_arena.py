"""What an attacker is granted, what it hears over the real channel, and whose samples its places stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from splitsec.attacks.arena import Aim, Ground
from splitsec.attacks.attack import Truth, aim_at_cut, mean_error, verdict_of
from splitsec.errors import UserError
from splitsec.simulation import simulate

GRAPH = """
splitsec: 1
name: small
parties:
  north: {{}}
  south: {{}}
  server: {{listen: "tcp://127.0.0.1:7400", address: "tcp://127.0.0.1:7400"}}
groups:
  clinics: {{members: [north, south], schedule: round_robin}}
segments:
  stem: {{at: clinics, data: x}}
  trunk: {{at: server, loss: cross_entropy}}
cuts:
  - {{from: stem, to: trunk, shape: [5], dtype: float32{privacy}}}
labels:
  - {{from: clinics, to: trunk, field: y, shape: [], dtype: int64}}
training: {{epochs: 3, batch_size: 8, seed: 3, decoys: {decoys}}}
"""
CODE = """
import torch
from torch import nn


def stem():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU())


def trunk():
    return nn.Linear(5, 3)


def rows(site, count=44):
    generator = torch.Generator().manual_seed(site)
    y = torch.randint(3, (count,), generator=generator)
    return {"x": torch.randn(count, 4, generator=generator) + y[:, None], "y": y}


def test(site):
    return rows(site + 10, 9)


def public(count=12):
    return rows(5, count)
"""
PARTY = """
party: {name}
segments: {{stem: {{model: "code:stem", optimizer: {{name: adam, lr: 0.01}}{more}}}}}
data: {{train: "code:rows", test: "code:test", args: {{site: {site}}}}}
threads: 1
"""
SERVER = """
party: server
segments: {trunk: {model: "code:trunk", optimizer: {name: adam, lr: 0.01}}}
threads: 1
"""
MODULE = "tests.attacks.eavesdropper"


def folder(place: Path, *, privacy: str = "", decoys: int = 2, more: str = "") -> Path:
    (place / "parties").mkdir(parents=True)
    (place / "graph.yaml").write_text(GRAPH.format(privacy=privacy, decoys=decoys))
    (place / "parties" / "code.py").write_text(CODE)
    for site, name in enumerate(("north", "south")):
        (place / "parties" / f"{name}.yaml").write_text(PARTY.format(name=name, site=site, more=more))
    (place / "parties" / "server.yaml").write_text(SERVER)
    return place


def aim_of(ground: Ground) -> Aim:
    aim = aim_at_cut(ground)
    assert isinstance(aim, Aim)
    return aim


@pytest.mark.threat("T44")
def test_an_eavesdropper_hears_what_passes_and_changes_no_bit(tmp_path: Path) -> None:
    place = folder(tmp_path / "small")
    with Ground(place) as ground:
        aim = aim_of(ground)
        assert aim == Aim("server", ("north", "south"), "stem -> trunk", (4,), (5,), "x", "y")
        fought = ground.fight("eavesdropping", aim, ["server"], batches=70, module=MODULE)
        assert not fought.failures, fought.failures
        assert fought.graph.training.epochs == 6, "12 batches an epoch"
        loot = fought.loots["server"]
        assert loot.numbers["batches"] == 72
        assert loot.numbers["decoys"] > 0, "decoys are on, and heard apart from what stands"
        assert loot.numbers["public"] == ["x", "y"]
        truth = Truth(ground, aim, fought.graph)
        places = loot.tensors["places"]
        assert len(places) == 6 * 88
        assert torch.equal(truth.labels(places), loot.tensors["labels"]), "each place is the sample that stood there"
        last = places[:, 0] == 5
        held = torch.cat([truth.samples(places[last & (places[:, 1] == stream)]) for stream in (0, 1)])
        for one in truth.all():
            assert (held == one).all(1).any(), "every sample of every clinic passes in every epoch"
        with_ears = {
            file.relative_to(fought.out): load_file(file) for file in sorted(fought.out.rglob("*.safetensors"))
        }
        assert {file.parts[0] for file in with_ears} == {"north", "south", "server"}
    simulate(place, epochs=6, out=tmp_path / "peace", state=tmp_path / "state")
    for file, tensors in with_ears.items():
        for name, tensor in load_file(tmp_path / "peace" / file).items():
            assert torch.equal(tensors[name], tensor), f"{file}: {name}"


def test_what_it_is_not_granted_it_does_not_get(tmp_path: Path) -> None:
    with Ground(folder(tmp_path / "small", decoys=0)) as ground:
        aim = aim_of(ground)
        fought = ground.fight("eavesdropping", aim, ["server"], batches=1, module=MODULE, has_public=False)
        assert fought.loots["server"].numbers["public"] == []
        assert fought.loots["server"].numbers["knows"] is False
        granted = ground.fight("eavesdropping", aim, ["server"], batches=1, module=MODULE, knows_architecture=True)
        assert granted.loots["server"].numbers["knows"] is True


def test_undefended_switches_off_what_graph_and_party_files_demand(tmp_path: Path) -> None:
    place = folder(tmp_path / "small", privacy=", privacy: {forward: {clip: 0.001}}", more=", nopeek: 1.0")
    with Ground(place) as ground:
        assert any("clip" in one for one in ground.defences()) and any("NoPeek" in one for one in ground.defences())
        assert "detectors" in ground.defences()
        aim = aim_of(ground)
        norms = ground.fight("eavesdropping", aim, ["server"], batches=1, module=MODULE).loots["server"].tensors
        assert norms["activations"].norm(dim=1).max() <= 0.001 * (1 + 1e-6)
    with Ground(place, undefended=True) as ground:
        assert ground.defences() == ()
        bare = ground.fight("eavesdropping", aim, ["server"], batches=1, module=MODULE).loots["server"].tensors
        assert bare["activations"].norm(dim=1).max() > 0.1
    assert not (tmp_path / "small" / "state").exists(), "an attack on paper spends nothing of a party's own ledger"


def test_public_samples_come_from_where_they_are_said_to(tmp_path: Path) -> None:
    place = folder(tmp_path / "small")
    with Ground(place) as ground:
        assert len(ground.public(aim_of(ground))["x"]) == 12
    with Ground(place, auxiliary="code:rows") as ground, pytest.raises(UserError, match="no field"):
        wrong = aim_of(ground)
        ground.public(Aim(**{**vars(wrong), "field": "z"}))
    without = folder(tmp_path / "without")
    code = without / "parties" / "code.py"
    code.write_text(code.read_text().partition("def public")[0])
    with Ground(without) as ground:
        assert len(ground.public(aim_of(ground))["x"]) == 18, "both clinics' test samples"


def test_an_unknown_attacker_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no party 'eve'"):
        Ground(folder(tmp_path / "small"), attacker="eve")


def test_errors_are_of_samples_scaled_to_one() -> None:
    public = torch.tensor([[0.0, 10.0], [1.0, 30.0]])
    truth = torch.tensor([[0.0, 20.0]])
    assert mean_error(torch.tensor([[0.5, 20.0]]), truth, public) == pytest.approx(0.5)
    assert mean_error(torch.tensor([[0.0, 30.0]]), truth, public) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("mse", "verdict"), [(0.1, "recovered"), (0.16, "partly recovered"), (0.26, "nothing recovered")]
)
def test_a_verdict_is_about_the_mean_sample(mse: float, verdict: str) -> None:
    assert verdict_of(mse, 0.27) == verdict
