"""``splitsec bench``: measure on this machine, each figure beside its alternative, as ratios."""

from __future__ import annotations

import argparse
import json
import sys

from splitsec.cli.simulate import counted

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Measure on this machine.  Every figure stands beside its alternative, measured in turn in the same run; compare
ratios, not milliseconds: machines differ and are shared.

  splitsec bench step          a training step over two encrypted processes, against the same step in one process
  splitsec bench step --json
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "bench",
        help="measure speed here, beside the alternatives",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("step",), help="what to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON document, nothing else, on standard output")
    parser.add_argument(
        "--rounds", type=counted, default=7, metavar="N", help="counted rounds of each side (default: 7)"
    )
    parser.add_argument(
        "--threads", type=counted, default=1, metavar="N", help="compute threads of every process (default: 1)"
    )
    parser.add_argument("--network", action="append", metavar="NAME", help="only this network (may be repeated)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from rich.console import Console
    from rich.table import Table

    from splitsec.bench.step import CASES, as_json, bench_step
    from splitsec.errors import UserError

    cases = tuple(case for case in CASES if not arguments.network or case[0] in arguments.network)
    if unknown := set(arguments.network or ()) - {case[0] for case in CASES}:
        known = ", ".join(sorted({case[0] for case in CASES}))
        raise UserError(f"no network {sorted(unknown)[0]!r}", expected=f"one of {known}")

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    results = list(bench_step(cases, rounds=arguments.rounds, threads=arguments.threads, tell=tell))
    if arguments.json:
        print(json.dumps(as_json(results), indent=2))
        return 0
    table = Table(title=f"one training step, {arguments.threads} thread(s) a process, medians of {arguments.rounds}")
    table.add_column("network")
    columns = ("micro-batches", "client's share", "one process", "split, encrypted", "ratio", "added", "same weights")
    for column in columns:
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.network,
            str(result.micro_batches),
            f"{result.client_share:.0%}",
            f"{result.one_process_ms:.2f} ms",
            f"{result.split_ms:.2f} ms",
            f"{result.ratio:.3f}",
            f"{result.added_ms:+.2f} ms",
            {True: "yes", False: "NO", None: "-"}[result.weights_equal],
        )
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)
    return 0
