"""``python -m splitsec.attacks.seeds FOLDER``: one attack, many seeds: does it always come as it did once?

Here: hijacking against what the folder has switched on, once for each seed, and once undefended; each over the real
channel, as ``splitsec attack`` runs it.  One seed is one throw: first weights, order of samples, the attacker's own.
"""

from __future__ import annotations

import argparse
import json
import sys

from splitsec.attacks.arena import Ground
from splitsec.attacks.catalogue import load
from splitsec.attacks.outcome import Outcome

__all__ = ["main", "many"]

BATCHES = 40
"""Of a run that a detector should stop within ten."""


def many(folder: str, attack: str, seeds: range, *, batches: int) -> list[Outcome]:
    """``attack`` on ``folder`` with each of ``seeds``, told on standard error as they come."""
    found = []
    for seed in seeds:
        with Ground(folder, seed=seed, batches=batches) as ground:
            found.append(load(attack).run(ground))
        print(f"seed {seed}: {found[-1].sentence}", file=sys.stderr, flush=True)
    return found


def main() -> int:
    """Read the command line, run, print one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m splitsec.attacks.seeds", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--attack", default="hijacking", help="which (default: hijacking)")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="seeds 1 to N (default: 20)")
    parser.add_argument("--batches", type=int, default=BATCHES, metavar="N", help="training batches of a run")
    parser.add_argument("--undefended", action="store_true", help="then once at full length with nothing switched on")
    given = parser.parse_args()
    found = many(given.folder, given.attack, range(1, given.runs + 1), batches=given.batches)
    stops = [one.stopped_at_batch for one in found]
    errors = [one.reconstruction_mse for one in found if one.reconstruction_mse is not None]
    document = {
        "attack": given.attack,
        "runs": len(found),
        "stopped_within_10": sum(stop is not None and stop <= 10 for stop in stops),
        "stopped_at_batch": stops,
        "least_error_of_what_it_held": min(errors, default=None),
        "error_of_the_mean_sample": found[0].baseline_mse if found else None,
    }
    if given.undefended:
        with Ground(given.folder, undefended=True) as ground:
            document["undefended"] = load(given.attack).run(ground).as_json()
    print(json.dumps(document, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
