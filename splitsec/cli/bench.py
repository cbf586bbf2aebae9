"""``splitsec bench``: measure on this machine, each figure beside its alternative, as ratios."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from splitsec.cli.simulate import counted

if TYPE_CHECKING:
    from rich.console import Console

    from splitsec.bench import circuit
    from splitsec.bench.channel import Report

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Measure on this machine.  Every figure stands beside its alternative, measured in turn in the same run; compare
ratios, not milliseconds: machines differ and are shared.

  splitsec bench step          a training step over two encrypted processes, against the same step in one process
  splitsec bench channel       round trips of the encrypted channel, beside plain pyzmq, CURVE, gRPC and ssl
  splitsec bench circuit       the same channel through 0 to 3 relays: time, bytes, and what one more relay costs
  splitsec bench clients       a hundred simulated clients in turn: memory of all, a step's time beside that of five

  splitsec bench privacy       what noise, ledger and journal cost a step
  splitsec bench epsilon       accuracy against epsilon; `bench nopeek`: against a decoder's error
  splitsec bench detectors     false alarms in honest trainings, and attacks seen, at every threshold
  splitsec bench strangers     a training with two thousand strangers at the port
  splitsec bench linking       what a server that records everything guesses of who speaks, and what a relay does

  splitsec bench step --figure early --rounds 9 --threads 1
  splitsec bench clients --members 5,100 --rounds 3
  splitsec bench channel --quick --sizes 1KiB,4MiB --transports tcp --rounds 9 --tensors 20
  splitsec bench channel --json
  splitsec bench circuit --relays 0,3 --sizes 4MiB --circuits 0
  splitsec bench epsilon --picture epsilon.png
  splitsec bench nopeek --pictures out --minimise plain --alphas 2,8 --seeds 1 --bottleneck 256

`splitsec bench WHAT --help` says what the options mean.
"""

STEP = """\
A training step over encrypted processes, against the same step in one process of plain PyTorch: in lock-step, with the
gradient of the cut sent early, with micro-batches, with two clients at once, over a line of 100 Mbit/s and 25 ms each
way, and with codecs.  All ways of a group are running for the whole time and take turns; what is told is the median of
the rounds' own ratios.  Every way that rounds nothing must end with the weights of one process, to the last bit; where
one does not, the exit status is 1.  Takes about a quarter of an hour on two idle cores.

  splitsec bench step
  splitsec bench step --figure cnn --figure early --rounds 9
  splitsec bench step --json > step.json
"""

CHANNEL = """\
Round trips between two processes: splitsec's channel beside plain pyzmq without encryption, ZeroMQ's own CURVE, gRPC
with TLS, and Python's ssl.  All are connected for the whole run and take turns in an order that changes; what is told
is the median.  Then what a stream of tensors costs in memory, and what opening a channel costs with and without its
post-quantum part.  Takes one to two minutes; the machine should be idle.

  splitsec bench channel
  splitsec bench channel --quick --sizes 1KiB,4MiB --transports tcp
  splitsec bench channel --json > channel.json

gRPC takes part where grpcio is installed: pip install 'splitsec[bench]'
"""

CIRCUIT = """\
The channel through relays, beside the same channel over an ordinary link: round trips, one-way throughput, bytes on
every link, and what padding adds.  Then the processor time of one more relay, as cipher, sockets and the rest, and the
memory of a relay that carries a hundred circuits at once.  Ends and relays are processes of their own over tcp on this
machine, so all of them share its cores.  Takes about three minutes; the machine should be idle.

  splitsec bench circuit
  splitsec bench circuit --relays 0,1,3 --sizes 64KiB,4MiB --rounds 5 --circuits 0
  splitsec bench circuit --json > circuit.json
"""

MORE = {
    "clients": "a hundred simulated clients in turn: memory of all, and a step's time beside that of five",
    "privacy": "what noise, ledger and journal cost a step",
    "epsilon": "accuracy against epsilon for a Gaussian cut, on real images",
    "nopeek": "what NoPeek does to a decoder that inverts activations, and to accuracy",
    "detectors": "how often detectors stop an honest training, and how soon they see an attack",
    "linking": "what the far end of an anonymous group, and a relay, can tell",
    "strangers": "a training with two thousand strangers at the port",
}
"""Measurements that stand in a file of their own: its name, and what it measures."""

JSON_HELP = "print one JSON document, nothing else, on standard output"

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_LONGEST = 1 << 30


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "bench",
        help="measure speed here, beside the alternatives",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    step = what.add_parser(
        "step",
        help="a training step, against the same in one process",
        description=STEP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    step.add_argument("--json", action="store_true", help=JSON_HELP)
    step.add_argument("--rounds", type=counted, default=5, metavar="N", help="counted rounds of each way (default: 5)")
    step.add_argument(
        "--threads", type=counted, default=1, metavar="N", help="compute threads of every process (default: 1)"
    )
    step.add_argument("--figure", action="append", metavar="NAME", help="only this figure (may be repeated)")

    for name, measures in MORE.items():
        # Its own options are declared in its own file, which is read only when it is asked for.
        rest = what.add_parser(name, help=measures, prefix_chars="\0", add_help=False)
        rest.add_argument("options", nargs="*")

    channel = what.add_parser(
        "channel",
        help="the encrypted channel, against other ways to carry bytes",
        description=CHANNEL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    channel.add_argument("--json", action="store_true", help=JSON_HELP)
    channel.add_argument("--quick", action="store_true", help="a few rounds and tensors: half a minute, rough figures")
    channel.add_argument(
        "--sizes",
        type=_sizes,
        metavar="LIST",
        help="sizes of a message, with commas between (default: 1KiB,256KiB,4MiB,64MiB)",
    )
    channel.add_argument("--transports", type=_transports, metavar="LIST", help="tcp, ipc, or both (default: tcp,ipc)")
    channel.add_argument(
        "--rounds",
        type=counted,
        metavar="N",
        help="counted rounds at every size (default: 41, of 16 MiB and more 15; with --quick 7 and 3)",
    )
    channel.add_argument(
        "--tensors",
        type=_count,
        metavar="N",
        help="64 MiB tensors to stream for the memory figure; 0: leave it out (default: 100; with --quick 20)",
    )

    circuit = what.add_parser(
        "circuit",
        help="the channel through relays, against the channel without",
        description=CIRCUIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    circuit.add_argument("--json", action="store_true", help=JSON_HELP)
    circuit.add_argument(
        "--relays",
        type=_relays,
        nargs="+",
        metavar="LIST",
        help="how many relays, each from 0 to 7; 0: an ordinary link (default: 0,1,2,3)",
    )
    circuit.add_argument(
        "--sizes", type=_sizes, nargs="+", metavar="LIST", help="sizes of a message (default: 64KiB,4MiB,64MiB)"
    )
    circuit.add_argument(
        "--rounds",
        type=counted,
        metavar="N",
        help="counted rounds at every size (default: 15, of 16 MiB and more 5)",
    )
    circuit.add_argument(
        "--circuits",
        type=_count,
        metavar="N",
        help="circuits that one relay carries at once for its memory; 0: leave that out (default: 100)",
    )


def _sizes(text: str) -> tuple[int, ...]:
    """Numbers of bytes, for argparse."""
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,12})\s*([a-zA-Z]*)\s*", part, re.ASCII)
        size = int(found[1]) * _UNITS.get(found[2].upper(), 0) if found else 0
        if not 1 <= size <= _LONGEST:
            raise argparse.ArgumentTypeError(f"{part!r} is no size from 1B to 1GiB, such as 512B, 1KiB or 4MiB")
        sizes.append(size)
    return tuple(dict.fromkeys(sizes))


def _relays(text: str) -> tuple[int, ...]:
    found = [part.strip() for part in text.split(",")]
    if wrong := [part for part in found if not re.fullmatch(r"[0-7]", part, re.ASCII)]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not a number of relays from 0 to 7")
    return tuple(dict.fromkeys(map(int, found)))


def _transports(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [part for part in found if part not in ("tcp", "ipc")]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not tcp or ipc")
    return found


def _count(text: str) -> int:
    return 0 if text == "0" else counted(text)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    if arguments.what in MORE:
        module = importlib.import_module(f"splitsec.bench.{arguments.what}")
        measures = MORE[arguments.what]
        parser = argparse.ArgumentParser(
            prog=f"splitsec bench {arguments.what}", description=measures[:1].upper() + measures[1:]
        )
        module.add_arguments(parser)
        code: int = module.run(parser.parse_args(arguments.options))
        return code
    runs = {"step": _run_step, "channel": _run_channel, "circuit": _run_circuit}
    return runs[arguments.what](arguments)


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


# --- bench step -------------------------------------------------------------------------------------------------------


def _run_step(arguments: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from splitsec.bench.step import FIGURES, as_json, bench_step
    from splitsec.errors import UserError

    names = [figure.name for figure in FIGURES]
    wanted = arguments.figure or names
    if unknown := [name for name in wanted if name not in names]:
        raise UserError(f"no figure {unknown[0]!r}", expected=f"one of {', '.join(names)}")

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    figures = [figure for figure in FIGURES if figure.name in wanted]
    results = []
    for result in bench_step(figures, rounds=arguments.rounds, threads=arguments.threads, tell=tell):
        tell(f"  {result.name}: {result.ratio:.3f} (accepted: {result.accept:g})")
        results.append(result)
    void = any(result.equal is False for result in results)
    if arguments.json:
        print(json.dumps(as_json(results), indent=2))
        return int(void)
    table = Table(title=f"one training step, {arguments.threads} thread(s) a process, medians of {arguments.rounds}")
    table.add_column("figure", overflow="fold")
    for column in ("ratio", "accepted", "aim", "least to most", "ms a step", "same weights"):
        table.add_column(column, justify="right")
    for result in results:
        met = "green" if result.ratio <= result.aim else "" if result.ratio <= result.accept else "red"
        table.add_row(
            result.text,
            Text(f"{result.ratio:.3f}", style=met),
            f"{result.accept:g}",
            f"{result.aim:g}",
            f"{min(result.rounds):.3f} to {max(result.rounds):.3f}",
            "\n".join(f"{name} {value:.1f}" for name, value in result.milliseconds.items()),
            {True: "yes", False: "NO", None: "-"}[result.equal],
        )
    _console().print(table)
    return int(void)


# --- bench channel ----------------------------------------------------------------------------------------------------


def _run_channel(arguments: argparse.Namespace) -> int:
    from splitsec.bench.channel import SIZES, bench_channel
    from splitsec.bench.rivals import FAMILIES

    with _Followed() as watch:
        report = bench_channel(
            sizes=arguments.sizes or SIZES,
            transports=arguments.transports or FAMILIES,
            rounds=arguments.rounds,
            quick=arguments.quick,
            tensors=arguments.tensors,
            watch=watch,
        )
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        _print_report(report)
    return 0


class _Followed:
    """Shows on standard error how far the measurement is: a bar on a terminal, a line for each stage elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(stderr=True, highlight=False)
        self._live = console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            refresh_per_second=2,  # drawing takes processor time from what is measured
            disable=not self._live,
        )
        self._task = self._bars.add_task("")

    def __enter__(self) -> _Followed:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        if event["event"] == "stage":
            self._bars.remove_task(self._task)
            self._task = self._bars.add_task(event["text"], total=event["of"])
            if not self._live:
                print(event["text"], file=sys.stderr, flush=True)
        else:
            self._bars.update(self._task, completed=event["done"])


def _print_report(report: Report) -> None:
    from rich.table import Table

    from splitsec.bench.channel import size_text
    from splitsec.bench.rivals import CONTENDERS

    console = _console()
    rivals = [name for name in CONTENDERS if name != "splitsec"]
    table = Table(title="one round trip between two processes, medians in milliseconds", title_justify="left")
    table.add_column("transport")
    for column in ("size", "rounds", *(contender.title for contender in CONTENDERS.values())):
        table.add_column(column, justify="right")
    ratios = Table(title="splitsec takes, times the other's median", title_justify="left")
    ratios.add_column("transport")
    for column in ("size", *(CONTENDERS[name].title for name in rivals)):
        ratios.add_column(column, justify="right")
    for result in report.results:
        place = (result.transport, size_text(result.size_bytes))
        table.add_row(*place, str(result.rounds), *(_number(result.median(name), 3) for name in CONTENDERS))
        ratios.add_row(*place, *(_number(result.ratio(name), 2) for name in rivals))
    console.print(table)
    console.print(ratios)

    verdicts = [(verdict.target.text(), _number(verdict.ratio, 2), verdict.met) for verdict in report.verdicts]
    if report.memory is not None:
        both = [report.memory.multiple(end) for end in ("sender", "receiver")]
        worst = None if None in both else max(multiple for multiple in both if multiple is not None)
        wanted = f"peak memory of a stream: under {report.memory.BELOW:g} tensors"
        verdicts.append((wanted, _number(worst, 2), report.memory.met))
    if verdicts:
        aims = Table(title="targets, for an idle machine with two cores", title_justify="left")
        aims.add_column("target")
        aims.add_column("here", justify="right")
        aims.add_column("met")
        for text, here, met in verdicts:
            aims.add_row(text, here, {True: "[green]yes[/]", False: "[bold red]NO[/]", None: "-"}[met])
        console.print(aims)

    if (memory := report.memory) is not None:
        console.print(
            f"memory: {memory.tensors} tensors of {size_text(memory.tensor_bytes)} streamed over tcp in "
            f"{memory.seconds:.1f} s; peak above what was held before: "
            f"sender {_peak(memory.sender_peak_bytes, memory.multiple('sender'))}, "
            f"receiver {_peak(memory.receiver_peak_bytes, memory.multiple('receiver'))}"
        )
    if (times := report.handshake) is not None:
        console.print(
            f"handshake, computing at both ends: {times['plain_ms']:.2f} ms with X25519 alone, "
            f"{times['hybrid_ms']:.2f} ms with ML-KEM-768 beside it"
        )
        console.print(
            f"from the dial to an open channel: {times['open_plain_ms']:.1f} ms with X25519 alone, "
            f"{times['open_hybrid_ms']:.1f} ms with ML-KEM-768 beside it"
        )
    for note in report.notes:
        console.print(f"not measured: {note}", markup=False)
    _say_load(console, report.load)


# --- bench circuit ----------------------------------------------------------------------------------------------------


def _run_circuit(arguments: argparse.Namespace) -> int:
    from splitsec.bench.circuit import CIRCUITS, RELAYS, SIZES, bench_circuit

    def flat(lists: list[tuple[int, ...]] | None, default: tuple[int, ...]) -> tuple[int, ...]:
        return default if lists is None else tuple(dict.fromkeys(one for some in lists for one in some))

    with _Followed() as watch:
        report = bench_circuit(
            sizes=flat(arguments.sizes, SIZES),
            relays=flat(arguments.relays, RELAYS),
            rounds=arguments.rounds,
            circuits=CIRCUITS if arguments.circuits is None else arguments.circuits,
            watch=watch,
        )
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        _print_circuits(report)
    return 0


def _print_circuits(report: circuit.Report) -> None:
    from rich.table import Table

    from splitsec.bench.channel import size_text

    console = _console()
    table = Table(title="messages through relays; medians, and bytes of the busiest link", title_justify="left")
    for column in ("size", "relays", "cells", "round trip", "one way", "of direct", "bytes of a message", "added"):
        table.add_column(column, justify="right")
    for path in report.results:
        share = report.share(path)
        table.add_row(
            size_text(path.size),
            str(path.relays),
            "-" if not path.relays else "Padmé" if path.cell is None else size_text(path.cell),
            f"{path.median_ms:.2f} ms",
            f"{path.rate / (1 << 20):.0f} MiB/s",
            _number(share, 2),
            _number(path.wire, 0),
            "-" if path.overhead is None else f"{path.overhead:.2%}",
        )
    console.print(table)

    if report.costs:
        hop = Table(title="one more relay: processor time for 1 MiB of messages", title_justify="left")
        for column in ("size", "in all", "cipher", "sockets", "copies and the rest"):
            hop.add_column(column, justify="right")
        for cost in report.costs:
            parts = (cost.total, cost.cipher, cost.sockets, cost.rest)
            hop.add_row(size_text(cost.size), *(f"{part:.3f} ms" for part in parts))
        console.print(hop)

    if report.verdicts:
        aims = Table(title="targets, for an idle machine with two cores", title_justify="left")
        aims.add_column("target")
        aims.add_column("here", justify="right")
        aims.add_column("met")
        for verdict in report.verdicts:
            met = "[green]yes[/]" if verdict.met else "[bold red]NO[/]"
            aims.add_row(verdict.text, _number(verdict.value, 3), met)
        console.print(aims)

    if (crowd := report.crowd) is not None:
        peak = "unknown (there is no /proc here)" if crowd.peak is None else f"{crowd.peak / 1e6:.0f} MB"
        wanted = f"; under {crowd.BELOW / 1e6:.0f} MB: {'yes' if crowd.met else 'NO'}" if crowd.met is not None else ""
        console.print(
            f"memory: a relay with {crowd.circuits} circuits, all transferring, took at most {peak}{wanted}",
            highlight=False,
        )
    _say_load(console, report.load)


def _say_load(console: Console, load: float | None) -> None:
    if load is not None and load > 0.5:
        console.print(
            f"the load average was {load:.1f} when this began: unless that was an earlier run, other programs "
            "were at work, and the figures say less"
        )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _peak(count: int | None, multiple: float | None) -> str:
    if count is None or multiple is None:
        return "unknown (there is no /proc here)"
    return f"{count / (1 << 20):.0f} MiB ({multiple:.2f} tensors)"
