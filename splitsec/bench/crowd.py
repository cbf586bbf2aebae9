"""What ``splitsec bench clients`` trains: the network of examples/vanilla on made-up images, by any number of clients.

Here: what the clients' and the server's party files name, with no import but what a party has loaded anyway: what a
client imports for itself, a hundred of them hold a hundred times.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

__all__ = ["BATCH", "BATCHES", "samples", "stem", "test", "trunk", "write"]

BATCH: Final = 50
BATCHES: Final = 8
"""Training batches of a client, and of a turn."""


def stem() -> nn.Module:
    """Images ``[n, 1, 28, 28]`` to activations ``[n, 32, 7, 7]``."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def trunk() -> nn.Module:
    """Activations ``[n, 32, 7, 7]`` to scores ``[n, 10]``."""
    return nn.Sequential(
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 7 * 7, 128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, 10),
    )


def samples(site: int, batches: int) -> dict[str, torch.Tensor]:
    """Ten patterns under noise, and which it is: ``batches`` full batches of them."""
    patterns = torch.rand(10, 1, 28, 28, generator=torch.Generator().manual_seed(10))
    generator = torch.Generator().manual_seed(site)
    count = batches * BATCH
    y = torch.randint(10, (count,), generator=generator)
    return {"x": (patterns[y] + torch.rand(count, 1, 28, 28, generator=generator)) / 2, "y": y}


def test(site: int, batches: int) -> dict[str, torch.Tensor]:
    """One batch to evaluate with."""
    return samples(10_000 + site, 1)


def write(folder: Path, members: int, *, batches: int = BATCHES, epochs: int = 2) -> Path:
    """A folder as ``simulate`` takes it, in ``folder``: so many clients in turn, and a server."""
    names = [f"client-{number:03}" for number in range(members)]
    graph = {
        "splitsec": 1,
        "name": "bench-clients",
        "parties": {
            **{name: {} for name in names},
            "server": {"listen": "tcp://127.0.0.1:7400", "address": "tcp://127.0.0.1:7400"},
        },
        "groups": {"clients": {"members": names, "schedule": "round_robin"}},
        "segments": {"stem": {"at": "clients", "data": "x"}, "trunk": {"at": "server", "loss": "cross_entropy"}},
        "cuts": [{"from": "stem", "to": "trunk", "shape": [32, 7, 7], "dtype": "float32"}],
        "labels": [{"from": "clients", "to": "trunk"}],
        "training": {"epochs": epochs, "batch_size": BATCH, "seed": 7},
        "timeouts": {"connect": 300},
    }
    optimizer = {"name": "adam", "lr": 0.001}
    (folder / "parties").mkdir()
    (folder / "graph.yaml").write_text(json.dumps(graph))  # JSON is YAML
    for site, name in enumerate(names):
        party: dict[str, Any] = {
            "party": name,
            "segments": {"stem": {"model": "splitsec.bench.crowd:stem", "optimizer": optimizer}},
            "data": {
                "train": "splitsec.bench.crowd:samples",
                "test": "splitsec.bench.crowd:test",
                "args": {"site": site, "batches": batches},
            },
            "threads": 1,
            "detectors": False,  # they look more often the more epochs a client sees, and here few see more than many
        }
        (folder / "parties" / f"{name}.yaml").write_text(json.dumps(party))
    server = {
        "party": "server",
        "segments": {"trunk": {"model": "splitsec.bench.crowd:trunk", "optimizer": optimizer}},
        "threads": 1,
    }
    (folder / "parties" / "server.yaml").write_text(json.dumps(server))
    return folder
