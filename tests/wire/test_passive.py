"""Who reads every byte on the wire learns nothing: no tensor, no weight, no label, no name, no sample id, no key.

Four parties join, each a process of its own, and all they say passes one tap: activations, gradients, labels and what
the server forwards between others (weights of the clinics' segment, fingerprints of sample ids).  The parties' own
model code writes down every tensor that it takes and makes; what it wrote is what the recording is searched for.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from splitsec.graph import load_graph
from tests.conftest import Shell, free_port, keyed, write_folder
from tests.wire.conftest import Tap

GRAPH = """\
splitsec: 1
name: overheard
parties:
  clinic-a: {}
  clinic-b: {}
  registry: {}
  server: {listen: "tcp://127.0.0.1:HERE", address: "tcp://127.0.0.1:TAP"}
groups:
  clinics: {members: [clinic-a, clinic-b], schedule: round_robin}
segments:
  stem: {at: clinics, data: scan}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [16], dtype: float32}
labels:
  - {from: registry, to: trunk, field: finding}
training: {epochs: 2, batch_size: 6, micro_batches: 2, seed: 5}
timeouts: {connect: 90, lost: 20}
"""

MODELS = """\
import os

import torch
from torch import nn


class Overheard(nn.Linear):
    def forward(self, x):
        with open(os.environ["WRITTEN_DOWN"], "ab") as file:
            def write_down(*tensors):
                for tensor in tensors:
                    file.write(tensor.detach().contiguous().numpy().tobytes())
                file.flush()

            made = super().forward(x)
            write_down(x, made, self.weight, self.bias)
        if x.requires_grad:
            x.register_hook(self.write_down_gradient)
        if made.requires_grad:
            made.register_hook(self.write_down_gradient)
        return made

    @staticmethod
    def write_down_gradient(gradient):
        with open(os.environ["WRITTEN_DOWN"], "ab") as file:
            file.write(gradient.contiguous().numpy().tobytes())


def stem():
    return Overheard(12, 16)


def trunk():
    return Overheard(16, 4)
"""

DATA = """\
import torch

FINDINGS = torch.tensor([3, 1, 2, 3, 2, 1, 1, 3, 3, 2, 1, 2])


def ids(sites):
    return [f"patient-{site}-{row:04}" for site in sites for row in range(12)]


def scans(site):
    x = torch.full((12, 12), 3.14159274) * torch.arange(1, 13).unsqueeze(1) + site
    return {"id": ids([site]), "scan": x}


def findings():
    return {"id": ids([0, 1]), "finding": FINDINGS.repeat(2)}
"""

CLINIC = """\
party: {name}
segments: {{stem: {{model: "models:stem", optimizer: {{name: sgd, lr: 0.01}}}}}}
data: {{train: "data:scans", args: {{site: {site}}}}}
"""

SERVER = """\
party: server
segments: {trunk: {model: "models:trunk", optimizer: {name: sgd, lr: 0.01}}}
"""

WINDOW = 8
"""Bytes: any two neighbouring float32.  That so many agree by chance somewhere has a probability below 1e-7 here."""

LABELS_WINDOW = 24
"""Bytes: any three neighbouring int64 labels; these are small numbers, so most of it is zeros."""


def windows(data: bytes, size: int, at_least: int) -> Iterator[bytes]:
    """Every run of ``size`` bytes in ``data`` that has ``at_least`` that are not zero: zeros are everywhere."""
    for start in range(len(data) - size + 1):
        window = data[start : start + size]
        if size - window.count(0) >= at_least:
            yield window


def leaked(recorded: bytes, secrets: Iterable[bytes], size: int, at_least: int) -> list[bytes]:
    """The windows of ``secrets`` that stand in ``recorded``."""
    seen = set(windows(recorded, size, at_least))
    return [window for secret in secrets for window in windows(secret, size, at_least) if window in seen]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("overheard")


@pytest.fixture(scope="module")
def wire(shared: Path) -> Iterator[dict[str, bytes]]:
    """One run of four parties; what was on the wire, and what each party wrote down."""
    shell = Shell(shared)
    here = free_port()
    tap = Tap(here)
    try:
        graph = GRAPH.replace("HERE", str(here)).replace("TAP", str(tap.port))
        folder = write_folder(shared / "folder", graph, clinics=())
        parties = folder / "parties"
        (parties / "models.py").write_text(MODELS)
        (parties / "data.py").write_text(DATA)
        for site, name in enumerate(("clinic-a", "clinic-b")):
            (parties / f"{name}.yaml").write_text(CLINIC.format(name=name, site=site))
        (parties / "registry.yaml").write_text('party: registry\ndata: {train: "data:findings"}\n')
        (parties / "server.yaml").write_text(SERVER)
        names = ("clinic-a", "clinic-b", "registry", "server")
        keyed(shell, folder, *names)
        commands = {
            name: shell.start(
                "join", "--graph", folder / "graph.yaml", "--party", name, "--out", shared / "out", "--quiet",
                WRITTEN_DOWN=str(shared / f"{name}.bin"), OMP_NUM_THREADS="1",
            )
            for name in names
        }  # fmt: skip
        for name, command in commands.items():
            end = command.end()
            assert end.code == 0, f"{name}: {end.stderr}"
        tap.close()
        assert shell.alive() == {}
        found = {name: (shared / f"{name}.bin").read_bytes() for name in names if name != "registry"}
        yield {**found, "wire": b"".join(bytes(taken) for _, taken in tap.recorded)}
    finally:
        tap.close()
        shell.close()


def test_everything_went_over_this_wire(wire: dict[str, bytes]) -> None:
    """Three dialed, and more bytes passed than the tensors alone have: 4 epoch-turns of 12 samples, both ways."""
    assert wire["wire"].count(b"SPLITSEC") >= 3  # how every hello begins
    assert len(wire["wire"]) > 4 * 12 * (16 * 4 * 2 + 8)


@pytest.mark.threat("T1")
def test_no_tensor_can_be_read(wire: dict[str, bytes]) -> None:
    """No two neighbouring numbers of any input, activation, gradient or weight that there was at any party."""
    for party in ("clinic-a", "clinic-b", "server"):
        assert len(wire[party]) > 10_000
        assert leaked(wire["wire"], [wire[party]], WINDOW, 4) == []


@pytest.mark.threat("T1")
def test_no_trained_weight_can_be_read(wire: dict[str, bytes], shared: Path) -> None:
    files = sorted((shared / "out").rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["clinic-a", "clinic-b", "server"]
    for file in files:
        assert leaked(wire["wire"], [tensor.tobytes() for tensor in load_file(file).values()], WINDOW, 4) == []


@pytest.mark.threat("T2")
def test_no_label_can_be_read(wire: dict[str, bytes]) -> None:
    """No three neighbouring labels, in whatever order the epochs had them: any three of 1, 2 and 3."""
    orders = [(a, b, c) for a in (1, 2, 3) for b in (1, 2, 3) for c in (1, 2, 3)]
    secrets = [b"".join(n.to_bytes(8, "little") for n in order) for order in orders]
    assert leaked(wire["wire"], secrets, LABELS_WINDOW, 3) == []


@pytest.mark.threat("T3", "T43")
def test_no_name_can_be_read(wire: dict[str, bytes]) -> None:
    """No name of the graph file, no sample id, no word of our own messages."""
    names = ["clinic", "registry", "server", "stem", "trunk", "overheard", "scan", "finding", "patient-"]
    ours = ["activation", "gradient", "labels", "weights", "order", "control", "prints", "counts", "float32", "int64"]
    for name in names + ours:
        assert name.encode() not in wire["wire"].lower(), name


@pytest.mark.threat("T4")
def test_no_identity_key_can_be_read(wire: dict[str, bytes], shared: Path) -> None:
    """Noise IK seals the dialer's key, and never sends the listener's."""
    for name, party in load_graph(shared / "folder" / "graph.yaml").parties.items():
        assert party.key is not None
        assert base64.b64decode(party.key.removeprefix("x25519:")) not in wire["wire"], name


def test_the_search_finds_what_is_there(wire: dict[str, bytes]) -> None:
    """Two numbers of one activation, spliced into the recording at an odd place, are found; so are three labels."""
    middle = len(wire["wire"]) // 2 + 1
    secret = wire["server"][4000:4008]
    assert leaked(wire["wire"][:middle] + secret + wire["wire"][middle:], [wire["server"]], WINDOW, 4)
    labels = b"".join(n.to_bytes(8, "little") for n in (3, 1, 2))
    assert leaked(wire["wire"][:middle] + labels + wire["wire"][middle:], [labels], LABELS_WINDOW, 3)
