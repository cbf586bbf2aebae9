"""``splitsec predict``: send samples through trained segments, across the parties."""

from __future__ import annotations

import argparse
import json

from splitsec.cli.simulate import add_state_option

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Send samples through the trained segments of a folder's graph, one process for each party on this machine.

Predictions land where the last segment is (OUT/<party>/predictions.safetensors), the ids of the samples, in the same
order, where the samples are (OUT/<party>/predicted_ids.json).  Over a network: `splitsec join --predict`.

  splitsec simulate examples/vertical --out trained
  splitsec predict examples/vertical --weights trained --data test --out predicted
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "predict",
        help="predict with trained segments, across the parties",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder with graph.yaml and parties/")
    parser.add_argument("--weights", metavar="DIR", required=True, help="the --out of a training run")
    parser.add_argument("--out", metavar="DIR", required=True, help="where predictions and ids are written")
    parser.add_argument(
        "--data",
        choices=("predict", "test", "train"),
        default="predict",
        help="which samples of every party (default: predict)",
    )
    add_state_option(parser, "DIR/<party>/ in place of the party file's `state` (FOLDER/state/<party>/)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document and nothing else on standard output"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Predict and print."""
    from splitsec.partyfile import load_folder

    load_folder(arguments.folder)  # a mistake in the files is told before torch is loaded

    from splitsec.cli.progress import Followed, print_result
    from splitsec.simulation import predict

    with Followed(quiet=arguments.quiet) as watch:
        result = predict(
            arguments.folder,
            weights=arguments.weights,
            out=arguments.out,
            split=arguments.data,
            state=arguments.state,
            watch=watch,
        )
    if arguments.json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        print_result(result)
    return 0
