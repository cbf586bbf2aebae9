"""The command line: one file per command; each parses, calls the Python API, prints.

Here: the list of commands, and how an error reaches a person: what was seen, what was expected, what to do, and an
exit code (2: a mistake you can mend, 3: we stopped ourselves, 4: another party, 70: our fault, 130: Ctrl-C).  No
traceback, unless ``SPLITSEC_DEBUG=1`` asks for it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

__all__ = ["main"]

DESCRIPTION = """\
Train one neural network across institutions that do not pool their data.

A folder holds the graph file (graph.yaml, shared by all) and one party file for each party (parties/NAME.yaml,
private):

  splitsec check FOLDER        is it right?  and a picture of it
  splitsec plan FOLDER         what will it cost whom, and where else could it be cut?
  splitsec simulate FOLDER     train it here, one process for each party
  splitsec attack FOLDER ...   what would attackers get from it?
  splitsec keys new NAME       make a party's key
  splitsec predict FOLDER ...  use what was trained
  splitsec join ...            be one party, over the network
  splitsec relay GRAPH ...     pass on what others send, unread, over the network
  splitsec ledger FOLDER       what privacy was spent, and on what
  splitsec journal show FOLDER what left, entry by entry; `verify`: and that nobody changed it
  splitsec listen FILE         read the trace of a party's traffic
  splitsec bench step          measure
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from splitsec import __version__
    from splitsec.cli import attack, bench, check, join, journal, keys, ledger, listen, plan, predict, relay, simulate

    parser = argparse.ArgumentParser(
        prog="splitsec", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"splitsec {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    runs: dict[str, Callable[[argparse.Namespace], int]] = {}
    for module in (check, plan, keys, simulate, attack, predict, join, relay, ledger, journal, listen, bench):
        module.add_parser(commands)
        runs[module.__name__.rsplit(".", 1)[1]] = module.run
    arguments = parser.parse_args(argv)

    from splitsec.errors import SplitsecError

    with contextlib.suppress(ValueError):  # not in the main thread: then it is not ours to say
        signal.signal(
            signal.SIGTERM, lambda number, _: sys.exit(128 + number)
        )  # so that what was begun is cleared away
    try:
        return runs[arguments.command](arguments)
    except SplitsecError as error:
        return _failed(error)
    except KeyboardInterrupt:
        print("splitsec: stopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:
        from splitsec.process import internal

        return _failed(internal(error))


def _failed(error: BaseException) -> int:
    if os.environ.get("SPLITSEC_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    print(f"splitsec: {error}", file=sys.stderr)
    return int(getattr(error, "exit_code", 70))
