"""The relayed-chain example's network trained in one process, in plain PyTorch: nothing of splitsec is imported here.

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

EPOCHS, BATCH, MICRO_BATCHES, SEED = 16, 64, 4, 7  # as in graph.yaml
LEARNING_RATE = 0.002  # as in the party files
SEGMENTS = ("first", "second", "third", "fourth")


def seed_of(use: str, *names: object) -> int:
    digest = hashlib.sha256("/".join(["splitsec", use, *map(str, names)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def load(name: str) -> ModuleType:
    path = Path(__file__).parent / "parties" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"relayed_chain_{name}", path)
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
    images = data.train()
    step = 0
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed_of("order", seed, epoch, 0))
        for batch in torch.randperm(len(images["y"]), generator=generator).split(BATCH):
            for micro, rows in enumerate(batch.tensor_split(MICRO_BATCHES)):  # gradient accumulation
                value = images["x"][rows]
                for name, segment in segments.items():
                    value = forward(seed, name, segment, step, micro, value)
                loss = nn.functional.cross_entropy(value, images["y"][rows])
                (loss * (len(rows) / len(batch))).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
    return {name: segment.state_dict() for name, segment in segments.items()}


@torch.no_grad()
def accuracy(weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Share of the test images that these weights get right, by segment with a loss."""
    segments = build(SEED)
    for name, segment in segments.items():
        segment.load_state_dict(weights[name])
    images = data.test()
    scores = nn.Sequential(*segments.values()).eval()(images["x"])
    right = int((scores.argmax(1) == images["y"]).sum())
    return {"fourth": right / len(images["y"])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, share in accuracy(train()).items():
        print(f"one process, {EPOCHS} epochs: test accuracy of {name} {share:.4f}")
