"""``splitsec bench step``: a training step split over two processes, against the same step in one process.

Here: both sides, in turn, in one run: a round of the one-process side while the parties stand still, then one of
theirs.  The parties are the real ones: ``simulate``'s processes, channels and engine over loopback TCP.  All
processes use the same number of threads, and the one-process side takes the whole batch at once whatever the
micro-batches are.  In lock-step (one micro-batch) both sides must end with equal weights, to the last bit, or the
measurement is void.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

__all__ = ["CASES", "StepResult", "bench_step"]

CASES: Final = (("mlp", 1), ("cnn-small", 1), ("cnn-deep", 1), ("cnn-small", 4), ("cnn-deep", 4))
"""(network, micro-batches) of a full run."""

LEARNING_RATE: Final = 0.01
SEED: Final = 7


@dataclass(frozen=True)
class StepResult:
    """Medians over rounds of the time per step, in milliseconds; ``ratio`` is the median of the rounds' own ratios."""

    network: str
    about: str
    batch: int
    micro_batches: int
    threads: int
    rounds: int
    client_share: float
    """What the segment before the cut takes of the one-process step."""
    one_process_ms: float
    split_ms: float
    ratio: float
    added_ms: float
    weights_equal: bool | None
    """In lock-step, whether both sides ended with equal weights; None with several micro-batches."""


def bench_step(
    cases: tuple[tuple[str, int], ...] = CASES,
    *,
    rounds: int = 7,
    threads: int = 1,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[StepResult]:
    """Measure each of ``cases``; yields results as they come.  ``rounds`` are counted, one more warms up."""
    for network, micro_batches in cases:
        tell(f"{network}, {micro_batches} micro-batch{'es' if micro_batches > 1 else ''} ...")
        yield _measure(network, micro_batches, rounds=rounds, threads=threads)


def _measure(network: str, micro_batches: int, *, rounds: int, threads: int) -> StepResult:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch
    from safetensors.torch import load_file

    from splitsec.bench.networks import NETWORKS
    from splitsec.process import prepare
    from splitsec.simulation import simulate

    prepare(threads)
    one = _OneProcess(network, batches=1)
    one.run(3)
    steps = max(5, min(200, int(1.0 / (one.run(3) / 3))))
    one = _OneProcess(network, batches=steps)

    one_ms: list[float] = []
    split_ms: list[float] = []

    def before_turn(turn: dict[str, Any]) -> None:
        if turn["phase"] == "train":
            one_ms.append(1000 * one.epoch(turn["epoch"]) / steps)

    seconds: dict[int, list[float]] = {}

    def watch(party: str, event: dict[str, Any]) -> None:
        if event["event"] == "turn over" and event["phase"] == "train":
            seconds.setdefault(event["epoch"], []).append(event["seconds"])

    with tempfile.TemporaryDirectory(prefix="splitsec-bench-") as scratch:
        folder = _folder(Path(scratch), network, micro_batches, steps, rounds + 1, threads)
        simulate(folder, out=Path(scratch) / "out", watch=watch, before_turn=before_turn)
        equal = None
        if micro_batches == 1:
            equal = all(
                torch.equal(tensor, load_file(Path(scratch) / "out" / party / f"{party}-segment.safetensors")[name])
                for party, module in one.modules.items()
                for name, tensor in module.state_dict().items()
            )
    split_ms = [1000 * max(seconds[epoch]) / steps for epoch in sorted(seconds)]
    one_ms, split_ms = one_ms[1:], split_ms[1:]  # the first round warms up
    return StepResult(
        network=network,
        about=NETWORKS[network].about,
        batch=NETWORKS[network].batch,
        micro_batches=micro_batches,
        threads=threads,
        rounds=rounds,
        client_share=round(one.client_share(), 3),
        one_process_ms=round(statistics.median(one_ms), 3),
        split_ms=round(statistics.median(split_ms), 3),
        ratio=round(statistics.median(split / whole for split, whole in zip(split_ms, one_ms, strict=True)), 4),
        added_ms=round(statistics.median(split - whole for split, whole in zip(split_ms, one_ms, strict=True)), 3),
        weights_equal=equal,
    )


class _OneProcess:
    """The same network, batches and seeds in this process: plain PyTorch, whole batches."""

    def __init__(self, network: str, batches: int) -> None:
        import torch

        from splitsec.bench import networks
        from splitsec.samples import seed_of

        self.batch = networks.NETWORKS[network].batch
        self.modules = {}
        for party, build in (("client", networks.client), ("server", networks.server)):
            torch.manual_seed(seed_of("weights", SEED, f"{party}-segment"))
            self.modules[party] = build(network)
        parameters = [p for module in self.modules.values() for p in module.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)
        self.loss = torch.nn.CrossEntropyLoss()
        self.samples = networks.samples(network, batches)

    def _step(self, x: Any, y: Any) -> None:
        loss = self.loss(self.modules["server"](self.modules["client"](x)), y)
        loss.backward()
        float(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, steps: int) -> float:
        """Seconds for ``steps`` steps on the first batch."""
        x, y = self.samples["x"][: self.batch], self.samples["y"][: self.batch]
        began = time.perf_counter()
        for _ in range(steps):
            self._step(x, y)
        return time.perf_counter() - began

    def epoch(self, epoch: int) -> float:
        """Seconds for one pass in the order that every party of the split run uses."""
        import torch

        from splitsec.samples import epoch_order

        order = epoch_order(SEED, epoch, 0, len(self.samples["x"]))
        began = time.perf_counter()
        for rows in torch.split(order, self.batch):
            self._step(self.samples["x"][rows], self.samples["y"][rows])
        return time.perf_counter() - began

    def client_share(self, repeats: int = 5) -> float:
        """The share of forward and backward that the segment before the cut takes."""
        import torch

        x, y = self.samples["x"][: self.batch], self.samples["y"][: self.batch]
        shares = []
        for _ in range(repeats):
            began = time.perf_counter()
            made = self.modules["client"](x)
            forward = time.perf_counter()
            leaf = made.detach().requires_grad_()
            self.loss(self.modules["server"](leaf), y).backward()
            served = time.perf_counter()
            torch.autograd.backward(made, leaf.grad)
            done = time.perf_counter()
            shares.append(1 - (served - forward) / (done - began))
        self.optimizer.zero_grad()
        return statistics.median(shares)


def _folder(folder: Path, network: str, micro_batches: int, steps: int, epochs: int, threads: int) -> Path:
    """A graph of two parties whose models and data come from ``splitsec.bench.networks``."""
    from splitsec.bench.networks import NETWORKS

    graph = {
        "splitsec": 1,
        "name": "bench-step",
        "parties": {"client": {}, "server": {"listen": "tcp://127.0.0.1:7400", "address": "tcp://127.0.0.1:7400"}},
        "segments": {
            "client-segment": {"at": "client", "data": "x"},
            "server-segment": {"at": "server", "loss": "cross_entropy"},
        },
        "cuts": [
            {"from": "client-segment", "to": "server-segment", "shape": list(NETWORKS[network].cut), "dtype": "float32"}
        ],
        "labels": [{"from": "client", "to": "server-segment"}],
        "training": {
            "epochs": epochs,
            "batch_size": NETWORKS[network].batch,
            "micro_batches": micro_batches,
            "seed": SEED,
        },
    }
    code = {"args": {"network": network}, "optimizer": {"name": "sgd", "lr": LEARNING_RATE}}
    client = {
        "party": "client",
        "segments": {"client-segment": {"model": "splitsec.bench.networks:client", **code}},
        "data": {"train": "splitsec.bench.networks:samples", "args": {"network": network, "batches": steps}},
        "threads": threads,
    }
    server = {
        "party": "server",
        "segments": {"server-segment": {"model": "splitsec.bench.networks:server", **code}},
        "threads": threads,
    }
    (folder / "parties").mkdir()
    for name, content in (("graph", graph), ("parties/client", client), ("parties/server", server)):
        (folder / f"{name}.yaml").write_text(json.dumps(content))  # JSON is YAML
    return folder


def as_json(results: list[StepResult]) -> dict[str, Any]:
    """The document that ``--json`` prints."""
    import torch

    return {
        "bench": "step",
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "results": [asdict(result) for result in results],
    }
