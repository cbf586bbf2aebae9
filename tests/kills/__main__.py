"""``make kills``: kill -9 at random moments of a short private training, and compare the books with the wire each time.

    make kills                                        50 times; some minutes
    python -m tests.kills --kills 500 --seed 7        the same choice of moments again; the machine adds its own
    python -m tests.kills --steps                     not at random: before every write, commit and send of a run

After every kill the ledger holds no fewer releases than passed the relay between the two parties, the journal verifies
and names no fewer activations; at last a training runs to its end, and spends exactly what it releases.
"""

from __future__ import annotations

import argparse
import itertools
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import Shell
from tests.kills import Kills, Nursery


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the books held every time.  1: once they did not."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="how many (default: 50)")
    parser.add_argument("--seed", type=int, metavar="N", help="for the same choice of moments again")
    parser.add_argument("--steps", action="store_true", help="not at random, but once at every step")
    options = parser.parse_args(arguments)
    seed = secrets.randbelow(1 << 31) if options.seed is None else options.seed
    print("every step" if options.steps else f"seed {seed}, {options.kills} kills", flush=True)
    with tempfile.TemporaryDirectory(prefix="splitsec-kills-") as place:
        shell = Shell(Path(place))
        kills = Kills(shell, Path(place) / "killed", seed, epochs=1 if options.steps else 3)
        began, of = time.monotonic(), "" if options.steps else f" of {options.kills}"
        kills.say = lambda text: print(f"{time.monotonic() - began:6.1f} s  {kills.kills:3}{of}  {text}", flush=True)
        try:
            if options.steps:
                nursery = Nursery(kills)
                try:
                    nursery.every_step(itertools.count())
                finally:
                    nursery.close()
            else:
                kills.at_random(options.kills)
            kills.to_the_end()
        except AssertionError as error:
            print(f"FAILED after {kills.kills} kills, seed {seed}: {error}", file=sys.stderr)
            return 1
        finally:
            kills.close()
            shell.close()
    print(f"{kills.kills} kills in {kills.starts} runs, {time.monotonic() - began:.0f} s: the books held every time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
