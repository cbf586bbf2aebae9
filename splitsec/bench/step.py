"""``splitsec bench step``: a training step split over processes, against the same step in one process.

Here: all ways to make the step side by side, in turn, in one run: while one makes its steps, all others stand still.
The parties are the real ones: ``simulate``'s processes, channels and engine over loopback TCP, and for wide-area
figures over a line that is as slow as asked for.  All processes use the same number of threads and the same settings
of the memory allocator.  Every way that rounds nothing must end with the weights of one process that took the same
micro-batches, to the last bit, or the measurement is void.  Not here: the networks (``networks``).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    pass

__all__ = ["FIGURES", "GROUPS", "Figure", "FigureResult", "Group", "Line", "Way", "as_json", "bench_step"]

LEARNING_RATE: Final = 0.01
SEED: Final = 7
CUT: Final = ("client-segment", "server-segment")


@dataclass(frozen=True)
class Line:
    """A slow line between the parties.  ``rate``: bytes per second each way; ``delay``: seconds one way."""

    rate: float
    delay: float


WIDE: Final = Line(rate=100e6 / 8, delay=0.025)


@dataclass(frozen=True)
class Way:
    """One way to make a step.  ``one``: in one process; else between a server and ``clients``."""

    one: bool = False
    micro_batches: int = 1
    early: bool = False
    """Whether the gradient of the cut goes out before those of the weights are computed."""
    clients: int = 1
    line: Line | None = None
    codec: str | None = None
    plaintext: bool = False


@dataclass(frozen=True)
class Group:
    """Ways that are measured in turn.  ``steps``: of each way in a round, 0: as many as take about a second."""

    network: str
    ways: Mapping[str, Way]
    steps: int = 0


@dataclass(frozen=True)
class Figure:
    """A ratio: the time of one way over that of another (or the sum of several, or ``formula``)."""

    name: str
    text: str
    group: str
    over: str
    under: tuple[str, ...]
    accept: float
    aim: float
    of: str = "time"
    """``time`` or ``bytes`` (activations and gradients that crossed the cut)."""


ONE: Final = Way(one=True)
LOCK: Final = Way()
EARLY: Final = Way(early=True)
FORMULA: Final = "formula"
"""In place of a way: the time in one process, and what the line needs for the bytes both ways and one round trip."""

GROUPS: Final[dict[str, Group]] = {
    "mlp": Group("mlp", {"one": ONE, "lock-step": LOCK}),
    "cnn": Group("cnn-small", {"one": ONE, "lock-step": LOCK, "plaintext": Way(plaintext=True), "early": EARLY}),
    "resnet": Group(
        "resnet18-layer1", {"one": ONE, "lock-step": LOCK, "plaintext": Way(plaintext=True), "early": EARLY}, steps=6
    ),
    "micro": Group(
        "resnet18-layer2-gn",
        {
            "one": ONE,
            "one, 4 micro-batches": Way(one=True, micro_batches=4),
            "4 micro-batches": Way(micro_batches=4, early=True),
        },
        steps=6,
    ),
    "clients": Group(
        "cnn-small", {"one": ONE, "two clients": Way(clients=2, early=True), "two, lock-step": Way(clients=2)}
    ),
    "wide cnn": Group(
        "cnn-small",
        {
            "one": ONE,
            "lock-step": Way(line=WIDE),
            "8 micro-batches": Way(micro_batches=8, early=True, line=WIDE),
            "8, bfloat16": Way(micro_batches=8, early=True, line=WIDE, codec="bfloat16"),
        },
        steps=4,
    ),
    "wide resnet": Group(
        "resnet18-layer1-gn",
        {
            "one": ONE,
            "lock-step": Way(line=WIDE),
            "8 micro-batches": Way(micro_batches=8, early=True, line=WIDE),
            "8, bfloat16": Way(micro_batches=8, early=True, line=WIDE, codec="bfloat16"),
        },
        steps=3,
    ),
    "zeros": Group("cnn-relu", {"one": ONE, "plain": LOCK, "without zeros": Way(codec="nonzero")}),
}

FIGURES: Final = (
    Figure("mlp", "784-256-10 perceptron, lock-step / one process", "mlp", "lock-step", ("one",), 5.0, 3.0),
    Figure("cnn", "small CNN, lock-step / one process", "cnn", "lock-step", ("one",), 1.20, 1.08),
    Figure("cnn-cipher", "small CNN, encrypted / plaintext", "cnn", "lock-step", ("plaintext",), 1.04, 1.02),
    Figure("resnet", "ResNet-18, lock-step / one process", "resnet", "lock-step", ("one",), 1.06, 1.02),
    Figure("resnet-cipher", "ResNet-18, encrypted / plaintext", "resnet", "lock-step", ("plaintext",), 1.04, 1.02),
    Figure("early", "ResNet-18, early cut gradient / one process", "resnet", "early", ("one",), 0.85, 0.78),
    Figure(
        "micro",
        "ResNet-18 cut after layer2, 4 micro-batches and early gradient / one process",
        "micro",
        "4 micro-batches",
        ("one",),
        0.72,
        0.62,
    ),
    Figure(
        "clients", "two clients at once / two one-process steps", "clients", "two clients", ("one", "one"), 0.80, 0.72
    ),
    Figure(
        "wide-cnn",
        "100 Mbit/s, 25 ms: 8 micro-batches / lock-step, small CNN",
        "wide cnn",
        "8 micro-batches",
        ("lock-step",),
        0.65,
        0.60,
    ),
    Figure(
        "wide-resnet",
        "100 Mbit/s, 25 ms: 8 micro-batches / lock-step, ResNet-18",
        "wide resnet",
        "8 micro-batches",
        ("lock-step",),
        0.50,
        0.45,
    ),
    Figure(
        "wide-cnn-bf16",
        "the same line, 8 micro-batches in bfloat16 / lock-step, small CNN",
        "wide cnn",
        "8, bfloat16",
        ("lock-step",),
        0.42,
        0.37,
    ),
    Figure(
        "wide-resnet-bf16",
        "the same line, 8 micro-batches in bfloat16 / lock-step, ResNet-18",
        "wide resnet",
        "8, bfloat16",
        ("lock-step",),
        0.33,
        0.28,
    ),
    Figure(
        "formula-cnn", "the same line, lock-step / formula, small CNN", "wide cnn", "lock-step", (FORMULA,), 1.10, 1.03
    ),
    Figure(
        "formula-resnet",
        "the same line, lock-step / formula, ResNet-18",
        "wide resnet",
        "lock-step",
        (FORMULA,),
        1.10,
        1.03,
    ),
    Figure(
        "zeros", "bytes at a cut without its zeros / with", "zeros", "without zeros", ("plain",), 0.56, 0.52, "bytes"
    ),
)


@dataclass
class FigureResult:
    """``ratio``: the median of the rounds' own ratios, which are in ``rounds``; ``equal``: see ``Measured``."""

    name: str
    text: str
    network: str
    ratio: float
    accept: float
    aim: float
    equal: bool | None
    milliseconds: dict[str, float]
    """Of a step, by way: medians over the rounds."""
    rounds: list[float] = field(default_factory=list)


@dataclass
class Measured:
    """One way: milliseconds a step in each counted round, and bytes that crossed the cut in a step.

    ``equal``: whether it ended with the weights of one process; None where it rounds, or is that process.
    """

    milliseconds: list[float]
    bytes: float = 0.0
    equal: bool | None = None


def bench_step(
    figures: Sequence[Figure] = FIGURES,
    *,
    rounds: int = 5,
    threads: int = 1,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[FigureResult]:
    """Measure ``figures``, group by group; yields results as they come.  ``rounds`` are counted, one more warms up."""
    from splitsec.bench.plaintext import MEASURING
    from splitsec.process import prepare

    os.environ |= {"OMP_NUM_THREADS": str(threads), MEASURING: str(os.getpid())}

    prepare(threads)
    for name in dict.fromkeys(figure.group for figure in figures):
        group = GROUPS[name]
        tell(f"{name}: {', '.join(group.ways)} ...")
        measured = _measure(group, rounds=rounds, threads=threads)
        for figure in figures:
            if figure.group == name:
                yield _result(figure, group, measured)


def _result(figure: Figure, group: Group, measured: Mapping[str, Measured]) -> FigureResult:
    over = measured[figure.over]
    if figure.of == "bytes":
        ratios = [over.bytes / sum(measured[name].bytes for name in figure.under)]
    else:
        under = [
            [one + _on_the_line(group, figure.over) for one in measured["one"].milliseconds]
            if name == FORMULA
            else measured[name].milliseconds
            for name in figure.under
        ]
        ratios = [a / sum(b) for a, *b in zip(over.milliseconds, *under, strict=True)]
    return FigureResult(
        name=figure.name,
        text=figure.text,
        network=group.network,
        ratio=round(statistics.median(ratios), 4),
        accept=figure.accept,
        aim=figure.aim,
        equal=over.equal,
        milliseconds={name: round(statistics.median(one.milliseconds), 2) for name, one in measured.items()},
        rounds=[round(ratio, 4) for ratio in ratios],
    )


def _on_the_line(group: Group, way: str) -> float:
    """Milliseconds that the line needs in lock-step: activation, labels and gradient, and one round trip."""
    from splitsec.bench.networks import NETWORKS

    line = group.ways[way].line
    assert line is not None
    network = NETWORKS[group.network]
    sample = 4
    for extent in network.cut:
        sample *= extent
    return 1000 * (network.batch * (2 * sample + 8) / line.rate + 2 * line.delay)


def _measure(group: Group, *, rounds: int, threads: int) -> dict[str, Measured]:
    steps = group.steps or _steps_in_a_second(group.network)
    ones = {
        (way.micro_batches, way.clients): _OneProcess(group.network, way.micro_batches, way.clients, steps)
        for way in group.ways.values()
        if way.codec in (None, "nonzero")
    }
    timed = {name: (way.micro_batches, way.clients) for name, way in group.ways.items() if way.one}
    found = {name: Measured([]) for name in group.ways}
    with ExitStack() as open_ways:
        split = {
            name: open_ways.enter_context(_Split(group.network, way, steps, rounds + 1, threads))
            for name, way in group.ways.items()
            if not way.one
        }
        for epoch in range(rounds + 1):
            seconds = {key: one.epoch(epoch) for key, one in ones.items()}
            for name, key in timed.items():
                found[name].milliseconds.append(1000 * seconds[key] / steps)
            for name, running in split.items():
                found[name].milliseconds.append(1000 * running.epoch() / steps)
        for name, running in split.items():
            running.finish()
            way = group.ways[name]
            found[name].bytes = running.cut_bytes() / (steps * (rounds + 1))
            alike = ones.get((way.micro_batches, way.clients))
            if alike is not None and way.codec in (None, "nonzero"):
                found[name].equal = running.ended_like(alike)
    for measured in found.values():
        del measured.milliseconds[0]  # the first round warms up
    return found


def _steps_in_a_second(network: str) -> int:
    one = _OneProcess(network, 1, 1, 3)
    one.epoch(0)
    return max(5, min(200, int(1.0 / (one.epoch(0) / 3))))


class _OneProcess:
    """The same network, batches and seeds in this process, in plain PyTorch.

    With several clients, a step is one batch of each, as micro-batches, and each client has a module of its own.
    """

    def __init__(self, network: str, micro_batches: int, clients: int, steps: int) -> None:
        import torch

        from splitsec.bench import networks
        from splitsec.samples import seed_of

        self.batch = networks.NETWORKS[network].batch
        self.micro_batches = micro_batches
        self.clients = []
        for _ in range(clients):
            torch.manual_seed(seed_of("weights", SEED, CUT[0]))
            self.clients.append(networks.client(network))
        torch.manual_seed(seed_of("weights", SEED, CUT[1]))
        self.server = networks.server(network)
        parameters = [p for module in (*self.clients, self.server) for p in module.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)
        self.loss = torch.nn.CrossEntropyLoss()
        self.samples = [networks.samples(network, steps, member) for member in range(clients)]

    def epoch(self, epoch: int) -> float:
        """Seconds for one pass in the order that every party of the split run uses."""
        import torch

        from splitsec.samples import epoch_order, micro_batch_rows

        orders = [epoch_order(SEED, epoch, member, len(one["x"])) for member, one in enumerate(self.samples)]
        began = time.perf_counter()
        for batches in zip(*(torch.split(order, self.batch) for order in orders), strict=True):
            rows = sum(len(batch) for batch in batches)
            for member, batch in enumerate(batches):
                for chosen in torch.split(batch, micro_batch_rows(len(batch), self.micro_batches)):
                    x, y = self.samples[member]["x"][chosen], self.samples[member]["y"][chosen]
                    loss = self.loss(self.server(self.clients[member](x)), y)
                    float(loss.detach())
                    share = len(chosen) / rows
                    (loss if share == 1.0 else loss * share).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - began


class _Split:
    """The same steps by real parties, which stand still between two calls of ``epoch``.  Use it with ``with``."""

    def __init__(self, network: str, way: Way, steps: int, epochs: int, threads: int) -> None:
        self._way = way
        self._scratch = tempfile.TemporaryDirectory(prefix="splitsec-bench-")
        self._folder = _write_folder(Path(self._scratch.name), network, way, steps, epochs, threads)
        self._out = Path(self._scratch.name) / "out"
        self._parties = len(way_parties(way))
        self._stands = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self._over = threading.Semaphore(0)
        self._seconds: list[float] = []
        self._passed: list[dict[str, Any]] = []
        self._failure: BaseException | None = None
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Split:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._go.release()
        self._thread.join(60)
        self._scratch.cleanup()

    def _run(self) -> None:
        from splitsec.partyfile import load_folder
        from splitsec.simulation import Processes

        def before_turn(turn: dict[str, Any]) -> None:
            if turn["phase"] == "train":
                self._stands.release()
                self._go.acquire()
                if self._stop:
                    raise _Stopped

        def watch(party: str, event: dict[str, Any]) -> None:
            if event["event"] == "turn over" and event["phase"] == "train":
                self._seconds.append(event["seconds"])
                if len(self._seconds) % self._parties == 0:
                    self._over.release()

        job = {
            "action": "train",
            "out": str(self._out),
            "weights": None,
            "split": "train",
            "trace": None,
            "state": None,
        }
        try:
            with ExitStack() as lines:

                def in_front(party: str, address: str) -> str:
                    if self._way.line is None:
                        return address
                    from splitsec.transports.testing import SlowLink

                    port = int(address.rpartition(":")[2])
                    line = SlowLink(port, rate=self._way.line.rate, delay=self._way.line.delay)
                    return lines.enter_context(line).address

                folder = load_folder(self._folder)
                with Processes(folder, job, watch, before_turn, in_front=in_front) as processes:
                    processes.follow()
                    told = [event for events in processes.events.values() for event in events]
                    self._passed = [event for event in told if event["event"] == "traffic"]
        except _Stopped:
            pass
        except BaseException as error:
            self._failure = error
        self._stands.release()
        self._over.release()

    def epoch(self) -> float:
        """Seconds that the slowest party took for its next pass."""
        self._stands.acquire()
        self._raise()
        self._go.release()
        self._over.acquire()
        self._raise()
        return max(self._seconds[-self._parties :])

    def finish(self) -> None:
        """Wait until every party has ended and written its weights."""
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def cut_bytes(self) -> float:
        """Bytes of activations and gradients over the whole run, before encryption."""
        lanes = [lane for event in self._passed for lane in event["lanes"]]
        return float(sum(lane["bytes"] for lane in lanes if lane["kind"] in ("activation", "gradient")))

    def ended_like(self, one: _OneProcess) -> bool:
        """Whether every segment's weights and buffers are those of ``one``, bit by bit."""
        import torch
        from safetensors.torch import load_file

        clients = [party for party in way_parties(self._way) if party != "server"]
        pairs = [(party, CUT[0], module) for party, module in zip(clients, one.clients, strict=True)]
        pairs.append(("server", CUT[1], one.server))
        return all(
            torch.equal(tensor, load_file(self._out / party / f"{segment}.safetensors")[name])
            for party, segment, module in pairs
            for name, tensor in module.state_dict().items()
        )


class _Stopped(Exception):
    """The measurement ended before the run did."""


def way_parties(way: Way) -> list[str]:
    """The parties of a split run: clients, then the server."""
    return [*(f"client-{number}" for number in range(way.clients)), "server"]


def _write_folder(folder: Path, network: str, way: Way, steps: int, epochs: int, threads: int) -> Path:
    """A graph whose models and data come from ``splitsec.bench.networks``."""
    from splitsec.bench.networks import NETWORKS

    *clients, _ = way_parties(way)
    place = "clients" if way.clients > 1 else clients[0]
    cut: dict[str, Any] = {"from": CUT[0], "to": CUT[1], "shape": list(NETWORKS[network].cut), "dtype": "float32"}
    if way.codec is not None:
        cut["codec"] = way.codec
    graph: dict[str, Any] = {
        "splitsec": 1,
        "name": "bench-step",
        "parties": {
            **{client: {} for client in clients},
            "server": {"listen": "tcp://127.0.0.1:7400", "address": "tcp://127.0.0.1:7400"},
        },
        "segments": {CUT[0]: {"at": place, "data": "x"}, CUT[1]: {"at": "server", "loss": "cross_entropy"}},
        "cuts": [cut],
        "labels": [{"from": place, "to": CUT[1]}],
        "training": {
            "epochs": epochs,
            "batch_size": NETWORKS[network].batch,
            "micro_batches": way.micro_batches,
            "seed": SEED,
            "decoys": 0,
        },
    }
    if way.clients > 1:
        graph["groups"] = {"clients": {"members": clients, "schedule": "parallel"}}
    code = {
        "args": {"network": network, "plaintext": way.plaintext},
        "optimizer": {"name": "sgd", "lr": LEARNING_RATE},
    }
    common = {"threads": threads, "early_gradient": way.early}
    (folder / "parties").mkdir()
    (folder / "graph.yaml").write_text(json.dumps(graph))  # JSON is YAML
    for member, client in enumerate(clients):
        given = {"network": network, "batches": steps, "member": member}
        party = {
            "party": client,
            "segments": {CUT[0]: {"model": "splitsec.bench.networks:client", **code}},
            "data": {"train": "splitsec.bench.networks:samples", "args": given},
            **common,
        }
        (folder / "parties" / f"{client}.yaml").write_text(json.dumps(party))
    server = {"party": "server", "segments": {CUT[1]: {"model": "splitsec.bench.networks:server", **code}}, **common}
    (folder / "parties" / "server.yaml").write_text(json.dumps(server))
    return folder


def as_json(results: list[FigureResult]) -> dict[str, Any]:
    """The document that ``--json`` prints."""
    import torch

    return {
        "bench": "step",
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "figures": [asdict(result) for result in results],
    }
