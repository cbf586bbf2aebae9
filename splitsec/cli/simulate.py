"""``splitsec simulate``: train a folder's graph on this machine, one process for each party."""

from __future__ import annotations

import argparse
import json

from splitsec.cli.line import BANDWIDTH, DELAY, line_of

__all__ = ["add_parser", "add_state_option", "counted", "run", "seeded"]

DESCRIPTION = """\
Train FOLDER's graph on this machine: one process for each party, with throw-away keys, over real sockets on loopback;
the same code that `splitsec join` runs over a network.  Ends with loss and accuracy by epoch and what crossed each
cut.

  splitsec simulate examples/vanilla
  splitsec simulate examples/vanilla --epochs 2 --out trained
  splitsec simulate examples/vanilla --trace traces      # then: splitsec listen traces
  splitsec simulate examples/vanilla --bandwidth 20mbit --delay 25ms     # what would it take between two sites?
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "simulate",
        help="train on this machine, one process for each party",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder with graph.yaml and parties/")
    parser.add_argument("--epochs", type=counted, metavar="N", help="passes over the data, in place of the graph's")
    parser.add_argument("--seed", type=seeded, metavar="S", help="seed of weights and order, in place of the graph's")
    parser.add_argument("--out", metavar="DIR", help="write trained segments to DIR/<party>/<segment>.safetensors")
    parser.add_argument(
        "--trace",
        metavar="DIR",
        help="write a line for every message of each party to DIR/<party>.trace.jsonl: kind, size, time, never its "
        "contents (`splitsec listen` reads them)",
    )
    add_state_option(parser, "DIR/<party>/ in place of the party file's `state` (FOLDER/state/<party>/)")
    line = parser.add_argument_group("a slow line, in a process of its own, before every party that listens")
    line.add_argument(
        "--bandwidth", metavar="RATE", help=f"each way, e.g. 100mbit (without it none; with --delay alone {BANDWIDTH})"
    )
    line.add_argument(
        "--delay", metavar="TIME", help=f"one way, e.g. 25ms (without it none; with --bandwidth alone {DELAY})"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document and nothing else on standard output"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def add_state_option(parser: argparse.ArgumentParser, where: str) -> None:
    """Declare ``--state``, where ledger and journal are kept."""
    parser.add_argument(
        "--state", metavar="DIR", help=f"keep ledger and journal in {where}; another folder is another account"
    )


def counted(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seeded(text: str) -> int:
    """A seed, for argparse: a whole number from 0 to 2^63 - 1."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Simulate and print."""
    from splitsec.partyfile import load_folder

    load_folder(arguments.folder)  # a mistake in the files is told before torch is loaded

    from splitsec.cli.progress import Followed, print_result
    from splitsec.process import leave_the_compiler_out
    from splitsec.simulation import simulate

    line = None if arguments.bandwidth is None and arguments.delay is None else line_of(arguments)
    with Followed(quiet=arguments.quiet) as watch:
        leave_the_compiler_out()
        result = simulate(
            arguments.folder,
            epochs=arguments.epochs,
            seed=arguments.seed,
            out=arguments.out,
            trace=arguments.trace,
            state=arguments.state,
            watch=watch,
            line=line,
        )
    if arguments.json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        print_result(result)
    return 0
