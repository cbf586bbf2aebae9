"""``splitsec plan``: what split learning would cost every party, before anything runs.

Here: options, tables and sentences.  Not here: the numbers (``resources``, ``measuring``), the choice of a schedule
(``advice``), the picture (``plot``).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from splitsec.cli.line import BANDWIDTH, DELAY, line_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.table import Table

    from splitsec.advice import Advice, Line
    from splitsec.resources import Cost, Flow, Report, Setting

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Say what a training would cost each party, before it runs: parameters, FLOPs, memory, and the bytes that cross; the same
for federated learning and large-batch SGD; every other place where the network could be cut; and which schedule would
be fastest, and why.

of a folder, from its own graph, modules and data (nothing is sent, nothing is trained):

  splitsec plan examples/vanilla
  splitsec plan examples/vanilla --bandwidth 100mbit --delay 25ms     over such a line
  splitsec plan examples/vanilla --svg cuts.svg                       where it could be cut, as a picture

of a well-known network, before there is a folder:

  splitsec plan --model resnet18 --input 3x32x32 --classes 10         every place to cut
  splitsec plan --model resnet18 --input 3x32x32 --classes 10 --cut layer1 --clients 5 --samples 50000 --epochs 20
  splitsec plan --model vgg16 --cut pool2 --cut fc2                   two cuts, a U shape: labels stay with the clients
  splitsec plan --published                                           the published tables, and what formulas give
"""

EPILOG = """\
FLOPs are those of convolutions and matrix products, two for a multiply-accumulate.  Bytes are those of tensors, before
encryption, which adds less than a thousandth.  1 MiB is 2^20 bytes.  Memory is what must be kept while training;
where it was measured, kernels took up to three quarters of that besides, and Python with torch about 250 MiB.
docs/resource-plan.md has every formula.
"""

CLIENTS: Final = 10
SAMPLES: Final = 50_000
GFLOPS: Final = 50.0
MOST_STREAMS: Final = 64
"""Clients at once that a schedule is played through with."""

MODEL_ONLY: Final = (
    "input", "classes", "cut", "clients", "samples", "batch", "optimizer", "schedule", "codec",
)  # fmt: skip


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "plan",
        help="what a training would cost each party, and where to cut",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="folder with graph.yaml and parties/")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--svg", metavar="FILE", help="draw every place to cut to FILE, too; - for standard output alone"
    )
    parser.add_argument("--epochs", type=float, metavar="E", help="passes over the data (default: the graph's, or 1)")
    parser.add_argument(
        "--count",
        choices=("flop", "published"),
        default="flop",
        help="`published`: multiply-accumulates, three for every use of a weight, as the published tables count",
    )
    parser.add_argument(
        "--local-epochs",
        type=float,
        default=1.0,
        metavar="E",
        help="epochs that a client of federated learning trains between two rounds (default 1)",
    )
    parser.add_argument("--published", action="store_true", help="the tables of Vepakomma et al. 2018, and ours beside")
    model = parser.add_argument_group("in place of FOLDER, a network that is built in")
    model.add_argument("--model", metavar="NAME", help="vgg16, resnet18, resnet50 or alexnet")
    model.add_argument("--input", metavar="CxHxW", help="size of an image (default 3x224x224)")
    model.add_argument("--classes", type=int, metavar="N", help="outputs of the last layer (default 1000)")
    model.add_argument(
        "--cut",
        metavar="LAYER",
        action="append",
        help="layer to cut after; twice for a U shape; without it, all are shown",
    )
    model.add_argument("--clients", type=int, metavar="K", help="clients that share the samples evenly (default 10)")
    model.add_argument("--samples", type=int, metavar="N", help="training samples of all clients (default 50000)")
    model.add_argument("--batch", type=int, metavar="B", help="samples of a step, of each client (default 64)")
    model.add_argument("--optimizer", choices=("sgd", "momentum", "adam"), help="what is kept for each weight (sgd)")
    model.add_argument(
        "--schedule",
        choices=("round_robin", "parallel"),
        help="clients in turn, handing weights on (the default), or all at once",
    )
    model.add_argument("--codec", choices=("bfloat16", "float16", "int8"), help="how tensors are made smaller at cuts")
    line = parser.add_argument_group("the line between parties, and what they compute, for the choice of a schedule")
    line.add_argument(
        "--bandwidth", default=BANDWIDTH, metavar="RATE", help="e.g. 100mbit (default %(default)s), each way"
    )
    line.add_argument("--delay", default=DELAY, metavar="TIME", help="one way, e.g. 25ms (default %(default)s)")
    line.add_argument(
        "--gflops",
        action="append",
        metavar="[PARTY=]G",
        help="billions of FLOPs a second, of everybody or of one party (`client`, `server` with --model); without it, "
        f"a folder's segments are timed here, and --model takes {GFLOPS:g}",
    )


def run(arguments: argparse.Namespace) -> int:
    """Work out, then print."""
    from splitsec.errors import UserError
    from splitsec.plot import svg
    from splitsec.process import prepare

    line = line_of(arguments)
    _check_options(arguments)
    with _Telling() as tell:
        tell("loads torch")
        prepare(None)
        tell.began = time.monotonic()
        if arguments.published:
            tell("works out the published tables")
            rows = _published()
            tell.done()
            return _print_published(rows, arguments.json)
        report, advice = (
            _of_folder(arguments, line, tell) if arguments.folder is not None else _of_model(arguments, line, tell)
        )
    if arguments.svg is not None and not report.candidates:
        raise UserError(
            "there is nothing to draw: the graph is no chain, or its samples are spread over several parties",
            expected="a graph whose segments follow one another",
            fix="leave out --svg; `splitsec check FOLDER --svg FILE` draws the graph itself",
        )
    if arguments.svg == "-":
        sys.stdout.write(svg(report))
        return 0
    if arguments.svg is not None:
        _write(Path(arguments.svg), svg(report))
    if arguments.json:
        print(json.dumps(_as_json(report, advice, line), indent=2, allow_nan=False))
    else:
        _print(report, advice, arguments)
    return 0


# --- options


def _check_options(arguments: argparse.Namespace) -> None:
    from splitsec.errors import UserError

    given = [f"--{name}" for name in MODEL_ONLY if getattr(arguments, name) is not None]
    chosen = [arguments.folder is not None, arguments.model is not None, arguments.published]
    if sum(chosen) != 1:
        raise UserError(
            "nothing to plan" if not any(chosen) else "more than one thing to plan",
            expected="a FOLDER, or --model with vgg16, resnet18, resnet50 or alexnet, or --published",
            fix="try `splitsec plan examples/vanilla`, or `splitsec plan --model resnet18`",
        )
    if arguments.folder is not None and given:
        raise UserError(
            f"{given[0]} with a FOLDER",
            expected=f"{given[0]} with --model only: a folder's graph and data say it",
            fix="leave it out, or change the folder",
        )
    for name, least in (("classes", 1), ("clients", 1), ("samples", 1), ("batch", 1)):
        value = getattr(arguments, name)
        if value is not None and not least <= value < 2**53:
            raise UserError(
                f"--{name} {value}", expected=f"a whole number from {least}", fix=f"choose another --{name}"
            )
    clients, samples = arguments.clients or CLIENTS, arguments.samples or SAMPLES
    if arguments.model is not None and samples < clients:
        raise UserError(
            f"--samples {samples} for {clients} clients",
            expected="at least one sample for each client: samples are those of all together",
            fix="raise --samples, or lower --clients",
        )
    if arguments.json and arguments.svg == "-":
        raise UserError(
            "--json and --svg - both write to standard output",
            expected="one document there",
            fix="write the picture to a file: `--svg cuts.svg`",
        )
    for name in ("epochs", "local_epochs"):
        value = getattr(arguments, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} {value:g}", expected="a number above 0", fix=f"choose another {option}")


def _speeds(given: Sequence[str] | None, parties: Sequence[str], default: float | None) -> dict[str, float] | None:
    """FLOPs a second of each party; None where nothing was said of any and there is no ``default``."""
    from splitsec.errors import UserError
    from splitsec.yamlfile import meant

    if given is None and default is None:
        return None
    speeds = dict.fromkeys(parties, 0.0 if default is None else default * 1e9)
    for text in sorted(given or (), key=lambda one: "=" in one):
        party, named, number = text.rpartition("=")
        if named and party not in speeds:
            raise UserError(
                f"--gflops {text}: no party `{party}`",
                expected="one of " + ", ".join(parties),
                fix=meant(party, parties),
            )
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not (value > 0 and math.isfinite(value)):
            raise UserError(
                f"--gflops {text}",
                expected="billions of FLOPs a second, such as 50, or server=5000 for one party",
                fix="write e.g. `--gflops 50 --gflops server=5000`",
            )
        speeds.update({party: value * 1e9} if named else dict.fromkeys(parties, value * 1e9))
    lacking = [party for party, speed in speeds.items() if not speed]
    if lacking:
        raise UserError(
            f"--gflops says nothing of {lacking[0]}",
            expected="a number for every party that computes: " + ", ".join(parties),
            fix="add `--gflops G` for all others",
        )
    return speeds


def _image(text: str | None, default: tuple[int, int, int]) -> tuple[int, int, int]:
    from splitsec.errors import UserError

    if text is None:
        return default
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})x([0-9]{1,5})", text.strip().lower())
    sizes = tuple(int(one) for one in found.groups()) if found else ()
    if len(sizes) != 3 or not all(sizes):
        raise UserError(
            f"--input {text}",
            expected="channels, height and width, such as 3x32x32",
            fix="write e.g. `--input 3x32x32`",
        )
    return sizes[0], sizes[1], sizes[2]


# --- a network that is built in


def _of_model(arguments: argparse.Namespace, line: Line, tell: _Telling) -> tuple[Report, Advice | None]:
    from splitsec.advice import advise
    from splitsec.architectures import ARCHITECTURES
    from splitsec.graph import wire_bytes
    from splitsec.resources import Setting

    setting = Setting(
        clients=arguments.clients or CLIENTS,
        samples=arguments.samples or SAMPLES,
        batch=arguments.batch or 64,
        epochs=arguments.epochs or 1.0,
        schedule=arguments.schedule or "round_robin",
    )
    codec, batch = arguments.codec, setting.batch
    known = ARCHITECTURES.get(arguments.model)
    image = _image(arguments.input, (3, 224, 224) if known is None else known.image)
    tell(f"counts {arguments.model}")
    report, segments = chain_report(
        arguments.model,
        image,
        arguments.classes or 1000,
        arguments.cut or [],
        setting,
        optimizer=arguments.optimizer or "sgd",
        size=lambda shape: wire_bytes(codec, shape, "float32", batch) / batch,
        rounds=1 / arguments.local_epochs,
    )
    speeds = _speeds(arguments.gflops, ("client", "server"), GFLOPS)
    assert speeds is not None
    if not segments:
        return report, None
    if setting.schedule == "parallel" and setting.clients > MOST_STREAMS:
        note = f"schedules were played through with {MOST_STREAMS} clients at once, not {setting.clients:,}"
        report = replace(report, notes=(*report.notes, note))
    tell("plays schedules through")
    statistics = next((one.batch_statistics for one in segments if one.batch_statistics), None)
    return report, advise(
        _chain_pipeline(report, segments, speeds),
        line,
        batch,
        whole_batches=_statistics(arguments.model, statistics) if statistics else "",
    )


def chain_report(
    model: str,
    image: tuple[int, int, int],
    classes: int,
    cuts: Sequence[str],
    setting: Setting,
    *,
    optimizer: str = "sgd",
    size: Any = None,
    rounds: float = 1.0,
) -> tuple[Report, list[Cost]]:
    """The plan of a built-in network, and the cost of each part; without ``cuts``, its candidates alone."""
    import torch

    from splitsec.architectures import build, find_cut
    from splitsec.errors import UserError
    from splitsec.measuring import chain_costs, segment_cost
    from splitsec.resources import Report, baselines, candidates, join, plain, split_plan, with_saved

    title = f"{model} on {'x'.join(map(str, image))}, {classes:,} classes"
    size = size or plain
    with torch.device("meta"):
        layers = build(model, image, classes)
        costs = chain_costs(layers, image, optimizer=optimizer)
        places = [find_cut([name for name, *_ in costs], cut) for cut in cuts]
        if len(places) > 2 or sorted(set(places)) != places:
            raise UserError(
                "--cut " + " --cut ".join(cuts),
                expected="one layer, or two in the order of the network: a U shape, labels with the client",
                fix="write a folder for longer chains: `splitsec plan FOLDER`",
            )
        ends = [0, *places, len(layers)]
        segments = []
        for start, end in pairwise(ends):
            shape = costs[start - 1][1] if start else image
            segments.append(segment_cost(layers[start:end], shape, [cost for *_, cost in costs[start:end]]))
    if not places:
        whole = with_saved(join([cost for *_, cost in costs]), segments)
        found = candidates(setting, costs, label_bytes=8, size=size, rounds=rounds)
        return Report(title, setting, (), (), baselines(setting, whole, rounds=rounds), None, found), []
    return split_plan(title, setting, costs, places, segments, size=size, rounds=rounds), segments


def _chain_pipeline(report: Report, segments: Sequence[Cost], speeds: dict[str, float]) -> Any:
    from splitsec.advice import Act, Crossing, Pipeline

    streams = min(report.setting.clients, MOST_STREAMS) if report.setting.schedule == "parallel" else 1
    owners = ["client", "server", "client"][: len(segments)]
    sent = [one.step / report.setting.batch for one in report.flows if one.kind == "activation"]
    return Pipeline(
        names=tuple(str(index) for index in range(len(segments))),
        acts=tuple(
            (
                Act(0.0, one.forward / speeds[owner]),
                Act(0.0, one.input_gradient / speeds[owner]),
                Act(0.0, one.weight_gradient / speeds[owner]),
            )
            for one, owner in zip(segments, owners, strict=True)
        ),
        parties=tuple(
            tuple(f"client {stream}" if owner == "client" else owner for stream in range(streams)) for owner in owners
        ),
        crossings=tuple(Crossing(index, index + 1, amount, amount) for index, amount in enumerate(sent)),
        losses=frozenset({len(segments) - 1}),
        streams=streams,
    )


def _statistics(where: str, module: str) -> str:
    return f"{where} has {module}, which looks at a whole batch, so micro-batches are refused there"


# --- a folder


def _of_folder(arguments: argparse.Namespace, line: Line, tell: _Telling) -> tuple[Report, Advice | None]:
    from splitsec.advice import Act, advise
    from splitsec.measuring import Times, measure_folder
    from splitsec.partyfile import load_folder

    folder = load_folder(arguments.folder)
    measured = measure_folder(folder, epochs=arguments.epochs, rounds=1 / arguments.local_epochs, tell=tell)
    graph = folder.graph
    speeds = _speeds(arguments.gflops, [one.party for one in measured.report.parties if one.segments], None)
    if speeds is None:
        times = measured.time(tell)
    else:
        times = {}
        for name, cost in measured.costs.items():
            speed = speeds[graph.party_at(graph.segments[name].at, 0)]
            forward, inputs, weights = (
                Act(0.0, flops / speed) for flops in (cost.forward, cost.input_gradient, cost.weight_gradient)
            )
            times[name] = Times((forward, inputs, weights))
    looking = [(name, one.batch_statistics) for name, one in measured.costs.items() if one.batch_statistics]
    whole = _statistics(f"`{looking[0][0]}`", looking[0][1]) if looking else ""
    private = [
        name for one in folder.parties.values() for name, code in one.segments.items() if code.dp_sgd is not None
    ]
    if private and not whole:
        whole = f"`{private[0]}` trains with DP-SGD, which takes one forward and one backward a step"
    tell("plays schedules through")
    advice = advise(
        measured.pipeline(times),
        line,
        graph.training.batch_size,
        whole_batches=whole,
        may_be_early=all(one.early_gradient is not False for one in folder.parties.values()),
        now=graph.training.micro_batches,
    )
    return measured.report, advice


# --- the published tables

PAPER: Final = "Vepakomma, Gupta, Swedish, Raskar 2018, Split learning for health (arXiv:1812.00564)"
EPOCHS: Final = 58.3
COMPUTED: Final = {  # TFLOP of one client, VGG on CIFAR-10, by clients
    "large-batch SGD": {100: 29.4, 500: 5.89},
    "federated learning": {100: 29.4, 500: 5.89},
    "split learning": {100: 0.1548, 500: 0.03},
}
SENT: Final = {  # GB of one client, ResNet on CIFAR-100, by clients
    "large-batch SGD": {100: 13.0, 500: 14.0},
    "federated learning": {100: 3.0, 500: 2.4},
    "split learning": {100: 6.0, 500: 1.2},
}


def _published() -> dict[str, Any]:
    """Both tables: what the paper prints, and what formulas give."""
    from splitsec.resources import Setting

    computed = []
    for clients in (100, 500):
        report, _ = chain_report("vgg16", (3, 32, 32), 1000, ["conv1"], Setting(clients, 50_000, 64, EPOCHS))
        for method in report.methods:
            ours, printed = method.published / 1e12, COMPUTED[method.name][clients]
            computed.append(
                {
                    "method": method.name,
                    "clients": clients,
                    "printed_tflop": printed,
                    "formula_tflop": ours,
                    "off": ours / printed - 1,
                }
            )
    report, _ = chain_report("resnet50", (3, 32, 32), 100, ["stem"], Setting(100, 50_000, 64, 1))
    state = report.methods[1].bytes_epoch
    step = report.methods[2].bytes_epoch / report.setting.steps
    sample = 2 * report.candidates[0].sample_bytes
    sent = []
    for name, printed_by in SENT.items():
        each = {"large-batch SGD": step, "federated learning": state, "split learning": sample}[name]
        for clients, printed in printed_by.items():
            per = 50_000 / clients if name == "split learning" else 1
            sent.append(
                {
                    "method": name,
                    "clients": clients,
                    "printed_gb": printed,
                    "formula_bytes_each": each * per,
                    "each": {"large-batch SGD": "step", "federated learning": "round", "split learning": "epoch"}[name],
                    "needed": printed * 1e9 / (each * per),
                }
            )
    return {"paper": PAPER, "epochs": EPOCHS, "computed": computed, "sent": sent}


def _print_published(tables: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print(json.dumps(tables, indent=2, allow_nan=False))
        return 0
    console = _console()
    console.print(PAPER)
    table = _table("computing of one client: VGG-16 on 32 x 32, cut after conv1")
    for column in ("method", "clients", "printed", "formula", "off by"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in tables["computed"]:
        table.add_row(
            row["method"],
            str(row["clients"]),
            f"{row['printed_tflop']:g} TFLOP",
            f"{row['formula_tflop']:.4g} TFLOP",
            f"{row['off']:+.2%}",
        )
    console.print(table)
    console.print(
        "The formula: multiply-accumulates, three for every use of a weight (forward, gradient of the input, gradient\n"
        "of the weight), times 50,000 samples over clients, times 58.3 epochs; the head is 4096-4096-1000.  `--count\n"
        "published` counts so.  The paper prints 0.03 with one digit.\n"
    )
    table = _table("bytes of one client: ResNet on CIFAR-100; which, where cut, how many epochs: not said")
    for column in ("method", "clients", "printed", "formula, ResNet-50 cut after its stem", "so it would be"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in tables["sent"]:
        table.add_row(
            row["method"],
            str(row["clients"]),
            f"{row['printed_gb']:g} GB",
            f"{row['formula_bytes_each'] / 1e6:.1f} MB a{'n' if row['each'] == 'epoch' else ''} {row['each']}",
            f"{row['needed']:.1f} {row['each']}s",
        )
    console.print(table)
    console.print(
        "Split learning's row follows from a formula: five times the clients, a fifth of each one's bytes.\n"
        "The other two follow from none: a round moves the weights once each way and a step the gradients, however\n"
        "many clients there are; rounds and steps would have to be as many as the last column says, and the table\n"
        "gives neither."
    )
    return 0


# --- what a person sees


class _Telling:
    """What is being done, on standard error: at once on a terminal, else in lines once two seconds have passed."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console: Console = Console(stderr=True, highlight=False)
        self.status: Status | None = None
        self.began = time.monotonic()

    def __enter__(self) -> _Telling:
        if self.console.is_terminal:
            self.status = self.console.status("")
            self.status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done()

    def done(self) -> None:
        """Take it off the screen."""
        if self.status is not None:
            self.status.stop()

    def __call__(self, text: str) -> None:
        if self.status is not None:
            self.status.update(text)
        elif time.monotonic() - self.began > 2:
            self.console.print(f"{time.monotonic() - self.began:5.1f} s  {text}", markup=False)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)


def _table(title: str) -> Table:
    from rich.table import Table

    return Table(title=title, title_justify="left")


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if count < 1024 or unit == "PiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError


def _flop(count: float) -> str:
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"):
        if count < 1000 or unit == "EFLOP":
            return f"{count:.4g} {unit}" if count < 1e6 else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError


def _count(many: int) -> str:
    return f"{many:,}"


def _print(report: Report, advice: Advice | None, arguments: argparse.Namespace) -> None:
    console, setting = _console(), report.setting
    many = (
        f"{len(report.parties)} parties"
        if report.why
        else f"{setting.clients:,} client{'' if setting.clients == 1 else 's'}"
    )
    console.print(
        f"{report.title}: {many}, {setting.samples:,.9g} training samples in all, batches of {setting.batch:,}, "
        f"{setting.epochs:g} epoch{'' if setting.epochs == 1 else 's'}"
    )
    if arguments.count == "published":
        console.print("FLOP: multiply-accumulates, three for every use of a weight, as the published tables count")
    if report.parties:
        _print_parties(console, report, arguments.count == "published")
        _print_flows(console, report)
    if report.methods[1:]:
        _print_methods(console, report, arguments.count == "published")
    if report.why:
        console.print(f"No comparison: {report.why}.")
    if report.parties and report.methods[1:]:
        console.print(
            f"Split learning sends fewer bytes than federated learning from {_count(report.fewer_from)} "
            f"{'client' if report.fewer_from == 1 else 'clients'} on, if these share the same samples."
            if report.fewer_from is not None
            else "Split learning sends more bytes than federated learning, however many clients share the samples: the "
            "weights that clients hand on are too many."
        )
    if report.candidates:
        _print_candidates(console, report)
    for note in report.notes:
        console.print(f"Note: {note}.")
    if advice is not None:
        console.print(
            f"\nschedule, over {arguments.bandwidth} with {arguments.delay} each way: {advice.chosen.name}",
            style="bold",
        )
        console.print(f"({_speed_of(arguments)})")
        for reason in advice.reasons:
            console.print(reason)
    elif not report.parties:
        console.print("Choose one with --cut LAYER; then --bandwidth, --delay and --gflops say which schedule is best.")


def _speed_of(arguments: argparse.Namespace) -> str:
    if arguments.gflops is None and arguments.model is None:
        return "with every segment as fast as it was here, just now"
    return f"at {', '.join(arguments.gflops or [f'{GFLOPS:g}'])} GFLOP a second"


def _print_parties(console: Console, report: Report, published: bool) -> None:
    ratio = _published_share(report) if published else None
    table = _table("what each party needs")
    for column in ("party", "runs"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "FLOP\na step", "\nan epoch", "memory", "sends\nan epoch", "receives\nan epoch"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in report.parties:
        share = 1.0 if ratio is None else ratio.get(one.party, 1.0)
        table.add_row(
            one.party,
            ", ".join(one.segments) or "its data alone",
            _count(one.parameters),
            _flop(one.flop_step * share),
            _flop(one.flop_epoch * share),
            _bytes(one.memory),
            _bytes(one.sent),
            _bytes(one.received),
        )
    console.print(table)


def _published_share(report: Report) -> dict[str, float]:
    """By party, multiply-accumulates counted as published over FLOPs."""
    return {one.party: one.published_epoch / one.flop_epoch for one in report.parties if one.flop_epoch}


def _print_flows(console: Console, report: Report) -> None:
    rows: dict[tuple[str, str, str, str], list[float]] = {}
    evaluated = any(one.evaluation for one in report.flows)
    for one in _gathered(report):
        amounts = rows.setdefault((one.kind, one.name, one.sender, one.receiver), [0.0] * 4)
        for index, amount in enumerate((one.step, one.epoch, one.evaluation, one.messages)):
            amounts[index] = max(amounts[0], amount) if index == 0 else amounts[index] + amount
    table = _table("what crosses between parties, in an epoch")
    for column in ("what", "of", "from", "to"):
        table.add_column(column, overflow="fold")
    for column in ("a step", "to train", *(["to evaluate"] if evaluated else []), "messages"):
        table.add_column(column, justify="right", no_wrap=True)
    for key, (step, epoch, evaluation, messages) in rows.items():
        shown = [_bytes(step) if step else "-", _bytes(epoch), *([_bytes(evaluation)] if evaluated else [])]
        table.add_row(*key, *shown, f"{messages:,.4g}" if messages < 10 else f"{messages:,.0f}")
    console.print(table)


def _gathered(report: Report) -> list[Flow]:
    """Flows with parties that do the same under one name, where there are many."""
    clients: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for one in report.flows:
        clients.setdefault((one.kind, one.name), []).append((one.sender, one.receiver))
    found = []
    for one in report.flows:
        pairs = clients[one.kind, one.name]
        senders, receivers = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
        found.append(
            replace(
                one,
                sender=one.sender if len(senders) == 1 else f"{len(senders)} parties",
                receiver=one.receiver if len(receivers) == 1 else f"{len(receivers)} parties",
            )
        )
    return found


def _print_methods(console: Console, report: Report, published: bool) -> None:
    table = _table("what one client needs, by method")
    table.add_column("method", no_wrap=True)
    for column in (
        "parameters",
        "memory",
        "FLOP\nan epoch",
        "\nin all",
        "bytes\nan epoch",
        "\nin all",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for one in report.methods:
        epoch, whole = (one.published_epoch, one.published) if published else (one.flop_epoch, one.flop)
        table.add_row(
            one.name,
            _count(one.parameters),
            _bytes(one.memory),
            _flop(epoch),
            _flop(whole),
            _bytes(one.bytes_epoch),
            _bytes(one.bytes),
        )
    console.print(table)


def _print_candidates(console: Console, report: Report) -> None:
    mark = " (*: this plan)" if any(one.chosen for one in report.candidates) else ""
    table = _table(f"where it could be cut, once{mark}, and what a client then has")
    table.add_column("after", no_wrap=True)
    for column in (
        "a sample\nthere",
        "\nbytes",
        "parameters",
        "share of\nFLOP",
        "bytes\nan epoch",
        "fewer than\nfederated",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for one in report.candidates:
        table.add_row(
            f"* {one.after}" if one.chosen else f"  {one.after}",
            "x".join(map(str, one.shape)),
            _bytes(one.sample_bytes),
            _count(one.client_parameters),
            f"{one.client_share:.1%}",
            _bytes(one.bytes_epoch),
            "never" if one.fewer_from is None else f"from {_count(one.fewer_from)}",
            style="bold" if one.chosen else None,
        )
    console.print(table)


# --- what a machine sees


def _as_json(report: Report, advice: Advice | None, line: Line) -> dict[str, Any]:
    from splitsec.advice import as_json

    document = asdict(report)
    for shown, one in zip(document["methods"], report.methods, strict=True):
        shown.update(flop=one.flop, published=one.published, bytes=one.bytes)
    document["line"] = {"bytes_per_second": line.bandwidth, "delay_seconds": line.delay}
    document["schedule"] = None if advice is None else as_json(advice)
    return document


def _write(file: Path, text: str) -> None:
    from splitsec.errors import UserError

    try:
        file.write_text(text, encoding="utf-8")
    except OSError as reason:
        raise UserError(
            f"{file} cannot be written: {reason.strerror}",
            expected="a file that you may write",
            fix="choose another --svg",
        ) from None
