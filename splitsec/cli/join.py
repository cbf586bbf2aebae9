"""``splitsec join``: be one party of a graph, over the network."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitsec.cli.keys import add_passphrase_option, passphrase_for
from splitsec.cli.simulate import add_state_option

if TYPE_CHECKING:
    from splitsec.graph import Graph
    from splitsec.partyfile import PartyFile

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Run one party: read its party file and key, connect to the peers that the graph names, train, write its own segments.

Every party runs the same command with the same graph file, in any order, within the graph's `timeouts: {connect: ...}`.

  splitsec join --graph graph.yaml --party parties/clinic-a.yaml --out trained
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "join",
        help="be one party, over the network",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--graph", metavar="G", required=True, help="the graph file that all parties share")
    parser.add_argument(
        "--party",
        metavar="P",
        required=True,
        help="this party's file, or its name (then parties/NAME.yaml beside the graph file)",
    )
    parser.add_argument("--out", metavar="DIR", help="write trained segments (or predictions) to DIR/<party>/")
    parser.add_argument(
        "--predict", action="store_true", help="predict in place of training; needs --weights and --out"
    )
    parser.add_argument("--weights", metavar="DIR", help="start from the trained segments in DIR/<party>/")
    parser.add_argument(
        "--data",
        choices=("predict", "test", "train"),
        default="predict",
        help="which samples to predict (default: predict)",
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write a line for every message to FILE: kind, size, time, never contents (`splitsec listen` reads it)",
    )
    add_state_option(parser, "DIR in place of the party file's `state`")
    add_passphrase_option(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Be the party until the run is over."""
    from splitsec.errors import UserError
    from splitsec.graph import load_graph
    from splitsec.identity import parse_public, public_of, read_key
    from splitsec.partyfile import check_party, load_party

    if arguments.predict and not (arguments.weights and arguments.out):
        raise UserError(
            "--predict without --weights or --out",
            expected="both",
            fix="name the folder of a training run and one for predictions",
        )
    graph = load_graph(arguments.graph)
    file = Path(arguments.party)
    if not file.suffix and file.name == arguments.party:
        file = Path(arguments.graph).parent / "parties" / f"{arguments.party}.yaml"
    party_file = load_party(file)
    check_party(graph, party_file)
    name = party_file.party
    for other, party in graph.parties.items():
        if party.key is None:
            raise graph.error(
                f"party {other!r} has no key",
                "parties",
                other,
                expected="a public key for every party, to run over a network",
                fix=f"run `splitsec keys new {other}` at that party and paste the line that it prints",
            )
    if party_file.key_path is None:
        raise party_file.error(
            "`key_file` is missing",
            expected="this party's private key file",
            fix=f"run `splitsec keys new {name}`, then add `key_file: {name}.key`",
        )
    private_key = read_key(party_file.key_path, passphrase=passphrase_for(party_file.key_path, arguments))
    own = graph.parties[name].key
    assert own is not None
    if public_of(private_key) != parse_public(own):
        raise graph.error(
            f"the key of {name!r} in the graph is not the one in {party_file.key_path}",
            "parties",
            name,
            expected="the public half of this party's key file",
            fix=f"compare with `splitsec keys show {party_file.key_path}`",
        )
    group_key = _group_key(graph, party_file, arguments)

    from splitsec.cli.progress import Followed, print_traffic
    from splitsec.party import Job, run_party
    from splitsec.process import prepare

    if arguments.out is None and party_file.segments:
        print(f"{name}: without --out the trained segments are not kept", file=sys.stderr)
    prepare(party_file.threads)
    job = Job(
        action="predict" if arguments.predict else "train",
        out=Path(arguments.out) if arguments.out else None,
        weights=Path(arguments.weights) if arguments.weights else None,
        split=arguments.data,
        trace=Path(arguments.trace) if arguments.trace else None,
        state=Path(arguments.state) if arguments.state else None,
        journal=True,
    )
    left: list[dict[str, Any]] = []
    with Followed(quiet=arguments.quiet) as watch:

        def report(event: dict[str, Any]) -> None:
            watch(name, event)
            if event["event"] == "traffic":
                left.extend(event["lanes"])

        run_party(graph, party_file, private_key=private_key, group_key=group_key, job=job, report=report)
    if not arguments.quiet:
        print_traffic(name, left)
    return 0


def _group_key(graph: Graph, party_file: PartyFile, arguments: argparse.Namespace) -> bytes | None:
    """The private key of the anonymous group that this party is a member of; None where it is of none."""
    from splitsec.identity import parse_public, public_of, read_key

    group = graph.anonymous
    if group is None or party_file.party not in graph.members(group):
        return None
    public = graph.groups[group].key
    if public is None:
        raise graph.error(
            f"the anonymous group {group!r} has no key",
            "groups",
            group,
            expected="a public key, whose private half every member holds",
            fix=f"let one member run `splitsec keys new {group} --group`, paste the line that it prints, and hand the "
            "file to the others",
        )
    file = party_file.group_key_path
    if file is None:
        raise party_file.error(
            "`group_key_file` is missing",
            expected=f"the private key file of the anonymous group {group!r}, since we are a member",
            fix=f"get the file from whoever ran `splitsec keys new {group} --group`, then add "
            f"`group_key_file: {group}.key`",
        )
    private_key = read_key(file, passphrase=passphrase_for(file, arguments))
    if public_of(private_key) != parse_public(public):
        raise graph.error(
            f"the key of the group {group!r} in the graph is not the one in {file}",
            "groups",
            group,
            expected="the public half of the group's key file",
            fix=f"compare with `splitsec keys show --group {file}`",
        )
    return private_key
