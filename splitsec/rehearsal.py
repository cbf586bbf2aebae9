"""A party's start, gone through once with a network of a few weights and made-up samples.

Here: ``rehearse``, which the warm process of a ``nest`` calls before it forks: what libraries set up on first use is
then there, and its memory is shared (measured: 3 MB less for each party, and some of its time to start).  Not here:
anything that a party could keep.  It draws no key and opens no socket, goes backward through nothing (torch would then
start threads where it finds a GPU), and runs nothing of the user's.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import nn

from splitsec.graph import parse_graph
from splitsec.partyfile import load_folder
from splitsec.plan import make_plan
from splitsec.probe import probe
from splitsec.segments import build_segments

__all__ = ["rehearse", "samples", "stem", "trunk"]

GRAPH: dict[str, Any] = {
    "splitsec": 1,
    "name": "rehearsal",
    "parties": {
        "clinic-a": {},
        "clinic-b": {},
        "server": {"listen": "tcp://127.0.0.1:7400", "address": "tcp://127.0.0.1:7400"},
    },
    "groups": {"clinics": {"members": ["clinic-a", "clinic-b"], "schedule": "round_robin"}},
    "segments": {"stem": {"at": "clinics", "data": "x"}, "trunk": {"at": "server", "loss": "cross_entropy"}},
    "cuts": [{"from": "stem", "to": "trunk", "shape": [2, 2, 2], "dtype": "float32"}],
    "labels": [{"from": "clinics", "to": "trunk"}],
    "training": {"epochs": 1, "batch_size": 2, "seed": 7},
}


def stem() -> nn.Module:
    """Images ``[n, 1, 4, 4]`` to activations ``[n, 2, 2, 2]``."""
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2))


def trunk() -> nn.Module:
    """Activations ``[n, 2, 2, 2]`` to two scores, ``[n, 2]``."""
    return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(8, 2))


def samples() -> dict[str, torch.Tensor]:
    """Four images and their classes: ``x`` float32 ``[4, 1, 4, 4]``, ``y`` int64 ``[4]``."""
    return {"x": torch.zeros(4, 1, 4, 4), "y": torch.arange(4) % 2}


def rehearse() -> None:
    """Read the files, build the segments, run them forward, step with no gradients, seal a few bytes."""
    with tempfile.TemporaryDirectory(prefix="splitsec-rehearsal-") as place:
        folder = load_folder(_write(Path(place)))
        probe(folder)
        for name, party in folder.parties.items():
            make_plan(folder.graph, name)
            for segment in build_segments(folder.graph, party).values():
                segment.weights()
    public = X25519PrivateKey.from_private_bytes(bytes(range(32))).public_key()  # a key of nobody's
    graph = parse_graph(json.dumps(GRAPH), "rehearsal")
    graph.with_keys({}, {})
    X25519PrivateKey.from_private_bytes(bytes(range(1, 33))).exchange(public)
    cipher = AESGCM(bytes(32))
    cipher.decrypt(bytes(12), cipher.encrypt(bytes(12), b"rehearsal", b""), b"")
    weights = [nn.Parameter(torch.zeros(2))]
    weights[0].grad = torch.zeros(2)
    for kind in (torch.optim.SGD, torch.optim.Adam):
        optimizer = kind(weights, lr=0.1)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad(set_to_none=False)


def _write(place: Path) -> Path:
    code = {"optimizer": {"name": "sgd", "lr": 0.1}}
    clinic = {
        "segments": {"stem": {"model": "splitsec.rehearsal:stem", **code}},
        "data": {"train": "splitsec.rehearsal:samples"},
    }
    server = {"segments": {"trunk": {"model": "splitsec.rehearsal:trunk", **code}}}
    (place / "parties").mkdir()
    (place / "graph.yaml").write_text(json.dumps(GRAPH))  # JSON is YAML
    for name, party in (("clinic-a", clinic), ("clinic-b", clinic), ("server", server)):
        (place / "parties" / f"{name}.yaml").write_text(json.dumps({"party": name, **party}))
    return place
