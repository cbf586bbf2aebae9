"""A relay: a party that passes cells on for others, in a process of its own, with neither torch nor data.

Here: which party a key makes us, its whole life from listening to the signal that ends it, and the process that a
simulation starts for each relay (as ``process`` is for the parties that compute).  Not here: circuits, which the I/O
thread carries (``transports``); who is linked with whom (``wiring``); the command (``cli/relay.py``).

This module and all that it imports stay clear of torch and numpy: a relay is to need little memory.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, final

from splitsec.graph import Graph, parse_graph
from splitsec.identity import public_of
from splitsec.plan import cell_links, taking_part
from splitsec.process import keep_freed_memory, serve
from splitsec.transports.iothread import CloseCode
from splitsec.wiring import keys_of, open_thread, peers_of

__all__ = ["main", "neighbours_of", "party_of", "run_relay", "told_to_stop"]

Report = Callable[[dict[str, Any]], None]
"""Takes what happens, as plain JSON values with an ``event``: relays, stopped."""


def party_of(graph: Graph, private_key: bytes, name: str | None = None) -> str:
    """The party of ``graph`` that ``private_key`` belongs to, which must be ``name`` where one is given.

    Raises ``GraphError`` where it is nobody's, or another's; and where that party has nothing to relay, or trains.
    """
    if name is not None and name not in graph.parties:
        raise graph.error(
            f"no party {name!r}",
            "parties",
            expected="one of " + ", ".join(map(repr, graph.parties)),
            fix="correct --as, or leave it out: the key says who we are",
        )
    public = public_of(private_key)
    whose = next((one for one, key in keys_of(graph).items() if key == public), None)
    if whose is None or whose not in graph.parties:
        raise graph.error(
            "no party has this key" if whose is None else f"this is the key of the group {whose!r}, and no party's",
            "parties",
            expected="the private half of the key that the graph gives the relay",
            fix="compare with `splitsec keys show` of the key file",
        )
    if name is not None and whose != name:
        raise graph.error(
            f"the key is that of {whose!r}, and not of {name!r}",
            "parties",
            name,
            expected=f"the private half of the key that the graph gives {name!r}",
            fix=f"take the key file of {name!r}, or leave --as out",
        )
    if whose in taking_part(graph):
        raise graph.error(
            f"{whose!r} trains: it holds segments, data or labels",
            "parties",
            whose,
            expected="a party that only relays",
            fix=f"run `splitsec join --party {whose}`, which relays for others, too",
        )
    if whose not in graph.relays:
        raise graph.error(
            f"{whose!r} has nothing to relay: no route goes through it",
            "parties",
            whose,
            expected="a party that stands in `via` of a route: " + (", ".join(sorted(graph.relays)) or "there is none"),
            fix=f"add `routes: [{{from: ..., to: ..., via: [{whose}]}}]` to the graph file, for every party alike",
        )
    return whose


def neighbours_of(graph: Graph, name: str) -> tuple[str, ...]:
    """The parties that ``name`` has a link with over which cells pass, in the order of the file."""
    linked = {party for link in cell_links(graph, name) for party in link}
    return tuple(party for party in graph.parties if party in linked - {name})


def run_relay(
    graph: Graph,
    name: str,
    *,
    private_key: bytes,
    listen: str | None = None,
    options: Mapping[str, Mapping[str, str]] | None = None,
    report: Report = lambda event: None,
) -> None:
    """Relay for others as the party ``name``, until an exception (``KeyboardInterrupt``, say) ends it.

    Neighbours come and go, and many runs may pass through.  ``listen``: in place of the graph's; ``options``: for a
    transport, by scheme.  Raises ``GraphError`` where a party has no key, ``UserError`` where an address is of no use.
    """
    thread = open_thread(graph, name, private_key, peers_of(graph, name), listen=listen, options=options)
    try:
        report({"event": "relays", "listens": thread.endpoint, "neighbours": list(neighbours_of(graph, name))})
        while True:
            thread.receive()  # of links that carry cells alone nothing is told: only a fault comes out of here
    finally:
        thread.close(CloseCode.STOPPED)


# --- ending it


@final
class _Told(BaseException):
    """Ctrl-C, or SIGTERM.  No ``Exception``: nothing on the way may take it for a fault."""


@contextmanager
def told_to_stop() -> Iterator[None]:
    """Leave the block at the first Ctrl-C or SIGTERM.  While it says its goodbyes, a second Ctrl-C is an interrupt."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Told

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with suppress(_Told):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- one of a simulation


def main() -> int:
    """Be the relay that standard input describes, until it closes."""
    return serve(_relay)


def _relay(assignment: dict[str, Any], report: Report) -> None:
    def follow_parent() -> None:
        while sys.stdin.readline():
            pass
        os._exit(130)

    threading.Thread(target=follow_parent, name="parent", daemon=True).start()
    keep_freed_memory()
    run_relay(
        parse_graph(json.dumps(assignment["graph"]), assignment["graph_file"]),
        assignment["party"],
        private_key=base64.b64decode(assignment["key"]),
        report=report,
    )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
