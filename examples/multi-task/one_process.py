"""The multi-task example's network trained in one process, in plain PyTorch: nothing of splitsec is imported here.

Same segments, same seeds, same batches in the same order, so the weights must come out equal to the last bit.  The
rules for seeds and order are those of docs/protocol.md, written out here again so that the comparison means something.
"""

from __future__ import annotations

import hashlib
import importlib.util
from itertools import zip_longest
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

EPOCHS, BATCH, SEED, CLINICS = 12, 20, 7, ("clinic-a", "clinic-b", "clinic-c")  # as in graph.yaml
DIGIT_WEIGHT, PARITY_WEIGHT = 1.0, 0.5  # likewise
LEARNING_RATE = 0.001  # as in the party files


def seed_of(use: str, *names: object) -> int:
    digest = hashlib.sha256("/".join(["splitsec", use, *map(str, names)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def load(name: str) -> ModuleType:
    path = Path(__file__).parent / "parties" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"multi_task_{name}", path)
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
    """Every segment with its first weights; the stem once for each clinic, all beginning alike."""
    segments = {}
    for place in (*(f"{clinic}/stem" for clinic in CLINICS), "digit", "parity"):
        name = place.rpartition("/")[2]
        torch.manual_seed(seed_of("weights", seed, name))
        segments[place] = getattr(models, name)()
    return segments


def train(epochs: int = EPOCHS, seed: int = SEED) -> dict[str, dict[str, Tensor]]:
    """Train, and return each segment's state dict by name; the clinics' stems by clinic and name."""
    segments = build(seed)
    optimizers = [torch.optim.Adam(segment.parameters(), lr=LEARNING_RATE) for segment in segments.values()]
    clinics = [data.train(site) for site in range(len(CLINICS))]
    step = 0
    for epoch in range(epochs):
        batches = []
        for k, clinic in enumerate(clinics):
            generator = torch.Generator().manual_seed(seed_of("order", seed, epoch, k))
            batches.append(torch.randperm(len(clinic["x"]), generator=generator).split(BATCH))
        for step_rows in zip_longest(*batches):  # parallel: a batch of each clinic that still has one
            present = [(k, rows) for k, rows in enumerate(step_rows) if rows is not None]
            total = sum(len(rows) for _, rows in present)
            for micro, (k, rows) in enumerate(present):
                stem = segments[f"{CLINICS[k]}/stem"]
                activations = forward(seed, "stem", stem, step, micro, clinics[k]["x"][rows])
                digit = forward(seed, "digit", segments["digit"], step, micro, activations)
                parity = forward(seed, "parity", segments["parity"], step, micro, activations)
                share = len(rows) / total
                digit_loss = nn.functional.cross_entropy(digit, clinics[k]["digit"][rows])
                parity_loss = nn.functional.binary_cross_entropy_with_logits(parity, clinics[k]["odd"][rows])
                (digit_loss * (DIGIT_WEIGHT * share) + parity_loss * (PARITY_WEIGHT * share)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
    return {place: segment.state_dict() for place, segment in segments.items()}


@torch.no_grad()
def accuracy(weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Share of the test images, of all clinics together, that these weights get right, by segment with a loss."""
    segments = build(SEED)
    for place, segment in segments.items():
        segment.load_state_dict(weights[place])
        segment.eval()
    digits = parities = total = 0
    for site, clinic in enumerate(CLINICS):
        images = data.test(site)
        activations = segments[f"{clinic}/stem"](images["x"])
        digits += int((segments["digit"](activations).argmax(1) == images["digit"]).sum())
        parities += int(((segments["parity"](activations) > 0) == (images["odd"] > 0.5)).sum())
        total += len(images["x"])
    return {"digit": digits / total, "parity": parities / total}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, share in accuracy(train()).items():
        print(f"one process, {EPOCHS} epochs: test accuracy of {name} {share:.4f}")
