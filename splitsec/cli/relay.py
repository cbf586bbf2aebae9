"""``splitsec relay``: be a relay of a graph, over the network, until stopped."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from splitsec.cli.keys import add_passphrase_option, passphrase_for

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Pass on what other parties of GRAPH send each other along its `routes`, without being able to read it.  Needs the graph
file and this relay's key; no data, no model, little memory.  Runs until Ctrl-C, for as many trainings as come.

  splitsec relay graph.yaml --key relay-1.key
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "relay",
        help="pass on what others send along the graph's routes",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("graph", metavar="GRAPH", help="the graph file that all parties share")
    parser.add_argument(
        "--key", metavar="FILE", help="this relay's private key; it says which party of the graph we are"
    )
    parser.add_argument(
        "--as", dest="name", metavar="NAME", help="which party we mean to be; an error where the key differs"
    )
    parser.add_argument("--listen", metavar="ADDRESS", help="address to listen at, in place of the graph's")
    parser.add_argument(
        "--party",
        metavar="FILE",
        help="this relay's party file, where it has one: `key_file`, `listen`, and what wss:// needs",
    )
    parser.add_argument("--json", action="store_true", help="say what happens as JSON, one document a line")
    add_passphrase_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Relay until Ctrl-C or SIGTERM, which are how it should end."""
    from splitsec.errors import UserError
    from splitsec.graph import load_graph
    from splitsec.identity import read_key
    from splitsec.process import keep_freed_memory
    from splitsec.relay import party_of, run_relay, told_to_stop

    graph = load_graph(arguments.graph)
    name, key, listen, options = arguments.name, arguments.key, arguments.listen, None
    if arguments.party is not None:
        from splitsec.partyfile import check_party, load_party

        party_file = load_party(arguments.party)
        check_party(graph, party_file)
        name, key, listen = name or party_file.party, key or party_file.key_path, listen or party_file.listen
        options = party_file.transport_options()
    if key is None:
        raise UserError(
            "no key: neither --key nor a party file that has `key_file`",
            expected="this relay's private key file",
            fix="make one with `splitsec keys new NAME`, or name it with --key",
        )
    private_key = read_key(key, passphrase=passphrase_for(Path(key), arguments))
    name = party_of(graph, private_key, name)
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format=f"{name}: %(message)s")

    def report(event: dict[str, Any]) -> None:
        print(json.dumps({"party": name, **event}) if arguments.json else _sentence(name, event), flush=True)

    with told_to_stop():
        run_relay(graph, name, private_key=private_key, listen=listen, options=options, report=report)
    report({"event": "stopped"})
    return 0


def _sentence(name: str, event: dict[str, Any]) -> str:
    match event["event"]:
        case "relays":
            where = f"listens at {event['listens']}" if event["listens"] else "listens nowhere"
            return f"{name}: {where}, relays for {', '.join(event['neighbours'])}; Ctrl-C ends it"
        case _:
            return f"{name}: stopped"
