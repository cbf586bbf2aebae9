"""The onion example's network trained in one process, in plain PyTorch: nothing of splitsec is imported here.

Same segments, same seeds, same batches in the same order, so the weights must come out equal to the last bit.  The
rules for seeds and order are those of docs/protocol.md, written out here again so that the comparison means something.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

EPOCHS, BATCH, SEED, CLINICS = 10, 50, 7, 3  # as in graph.yaml
LEARNING_RATE = 0.001  # as in the party files
SEGMENTS = ("stem", "trunk")


def seed_of(use: str, *names: object) -> int:
    digest = hashlib.sha256("/".join(["splitsec", use, *map(str, names)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def load(name: str) -> ModuleType:
    path = Path(__file__).parent / "parties" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"onion_{name}", path)
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
    for name in SEGMENTS:
        torch.manual_seed(seed_of("weights", seed, name))
        segments[name] = getattr(models, name)()
    return segments


def train(epochs: int = EPOCHS, seed: int = SEED) -> dict[str, dict[str, Tensor]]:
    """Train, and return each segment's state dict by name."""
    segments = build(seed)
    optimizers = [torch.optim.Adam(segment.parameters(), lr=LEARNING_RATE) for segment in segments.values()]
    clinics = [data.train(site) for site in range(CLINICS)]
    step = 0
    for epoch in range(epochs):
        for k, clinic in enumerate(clinics):  # round robin: one pass over each clinic's images, in turn
            generator = torch.Generator().manual_seed(seed_of("order", seed, epoch, k))
            for rows in torch.randperm(len(clinic["y"]), generator=generator).split(BATCH):
                activations = forward(seed, "stem", segments["stem"], step, 0, clinic["x"][rows])
                scores = forward(seed, "trunk", segments["trunk"], step, 0, activations)
                nn.functional.cross_entropy(scores, clinic["y"][rows]).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                step += 1
    return {name: segment.state_dict() for name, segment in segments.items()}


@torch.no_grad()
def accuracy(weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Share of the test images, of all clinics together, that these weights get right, by segment with a loss."""
    segments = build(SEED)
    for name, segment in segments.items():
        segment.load_state_dict(weights[name])
        segment.eval()
    right = total = 0
    for site in range(CLINICS):
        images = data.test(site)
        scores = segments["trunk"](segments["stem"](images["x"]))
        right += int((scores.argmax(1) == images["y"]).sum())
        total += len(images["y"])
    return {"trunk": right / total}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, share in accuracy(train()).items():
        print(f"one process, {EPOCHS} epochs: test accuracy of {name} {share:.4f}")
