"""The vertical example's network trained in one process, in plain PyTorch: nothing of splitsec is imported here.

Same segments, same seeds, same batches in the same order, so the weights must come out equal to the last bit.  The
rules for seeds and order are those of docs/protocol.md, written out here again so that the comparison means something.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

EPOCHS, BATCH, SEED = 10, 32, 7  # as in graph.yaml
LEARNING_RATE = 0.005  # as in the party files
BUILDERS = {"size": "columns", "shape": "columns", "diagnosis": "diagnosis"}  # and these


def seed_of(use: str, *names: object) -> int:
    digest = hashlib.sha256("/".join(["splitsec", use, *map(str, names)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def load(name: str) -> ModuleType:
    path = Path(__file__).parent / "parties" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"vertical_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models, data = load("models"), load("data")


def forward(seed: int, name: str, segment: nn.Module, step: int, micro: int, value: Tensor) -> Tensor:
    """One segment's training pass; the seed decides what dropout drops."""
    torch.default_generator.manual_seed(seed_of("forward", seed, name, step, micro))
    return segment.train()(value)


def build(seed: int) -> dict[str, nn.Module]:
    """Every segment with its first weights."""
    segments = {}
    for name in BUILDERS:
        torch.manual_seed(seed_of("weights", seed, name))
        segments[name] = getattr(models, BUILDERS[name])()
    return segments


def aligned(part: Callable[[str], dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Both institutions' measurements and the diagnoses, row by row the same patient, in the order of the hospital.

    The hospital leads because it stands first in the graph file.
    """
    hospital, laboratory, registry = part("hospital"), part("laboratory"), part("registry")
    at_laboratory = [laboratory["id"].index(patient) for patient in hospital["id"]]
    at_registry = [registry["id"].index(patient) for patient in hospital["id"]]
    return hospital["x"], laboratory["x"][at_laboratory], registry["y"][at_registry]


def train(epochs: int = EPOCHS, seed: int = SEED) -> dict[str, dict[str, Tensor]]:
    """Train, and return each segment's state dict by name."""
    segments = build(seed)
    optimizers = [torch.optim.Adam(segment.parameters(), lr=LEARNING_RATE) for segment in segments.values()]
    size, shape, malignant = aligned(data.train)
    step = 0
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed_of("order", seed, epoch, 0))
        for rows in torch.randperm(len(malignant), generator=generator).split(BATCH):
            sizes = forward(seed, "size", segments["size"], step, 0, size[rows])
            shapes = forward(seed, "shape", segments["shape"], step, 0, shape[rows])
            logits = forward(seed, "diagnosis", segments["diagnosis"], step, 0, torch.cat([sizes, shapes], 1))
            nn.functional.binary_cross_entropy_with_logits(logits, malignant[rows]).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
    return {name: segment.state_dict() for name, segment in segments.items()}


@torch.no_grad()
def accuracy(weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Share of the patients held out that these weights diagnose right, by segment with a loss."""
    segments = build(SEED)
    for name, segment in segments.items():
        segment.load_state_dict(weights[name])
        segment.eval()
    size, shape, malignant = aligned(data.test)
    logits = segments["diagnosis"](torch.cat([segments["size"](size), segments["shape"](shape)], 1))
    right = int(((logits > 0) == (malignant > 0.5)).sum())
    return {"diagnosis": right / len(malignant)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, share in accuracy(train()).items():
        print(f"one process, {EPOCHS} epochs: test accuracy of {name} {share:.4f}")
