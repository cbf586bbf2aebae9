"""The I/O thread of a party, and what it must know: with whom it has a link, over which links cells pass, who is at the
end of a circuit, and with which keys.

Here: a graph's links and circuits, and a party's plan, as ``Peer``s; a thread that was told all that, started.  Not
here: which lanes there are (``plan``), how cells travel (``transports``).  Neither torch nor numpy: a relay reads this,
too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splitsec.contract import digest
from splitsec.errors import InternalError, UserError
from splitsec.graph import Circuit, Graph
from splitsec.identity import parse_public
from splitsec.plan import Plan, cell_links, largest_bodies
from splitsec.transports import limits
from splitsec.transports.errors import TransportsError
from splitsec.transports.iothread import IOThread, Peer

__all__ = ["cell_limit_of", "cell_of", "keys_of", "open_thread", "passages_of", "peers_of"]


def open_thread(
    graph: Graph,
    party: str,
    private_key: bytes,
    peers: Sequence[Peer],
    *,
    listen: str | None = None,
    options: Mapping[str, Mapping[str, str]] | None = None,
) -> IOThread:
    """The I/O thread of ``party``, started: it listens, dials, and passes cells on for others.

    ``peers``: as ``peers_of`` gives them.  ``listen``: in place of the graph's; ``options``: for a transport, by
    scheme. Raises ``GraphError`` where a party has no key, ``UserError`` where an address is of no use.
    """
    listen = listen or graph.parties[party].listen
    thread = IOThread(
        private_key=private_key,
        digest=digest(graph),
        peers=peers,
        listen=listen,
        passages=passages_of(graph, party),
        cell_limit=cell_limit_of(graph),
        cover=graph.circuits.cover,
        labels={key: name for name, key in keys_of(graph).items()},
        connect_timeout=graph.timeouts.connect,
        lost_after=graph.timeouts.lost,
        gone_after=graph.timeouts.gone,
        post_quantum=graph.post_quantum,
        options=options,
    )
    try:
        thread.start()
    except TransportsError as error:
        if "cannot listen" in str(error):
            raise UserError(
                f"{party} cannot listen at {listen}: {error}",
                expected="an address of this machine that nobody else listens at",
                fix="look what uses it, or give another: `listen` in the party file, or `--listen` of a relay",
            ) from error
        raise UserError(
            f"{party} cannot use its addresses: {error}",
            expected="addresses in the graph file that this machine can dial or listen at",
            fix="follow the message; docs/websocket.md says what wss:// needs, which stands in a party file",
        ) from error
    return thread


def keys_of(graph: Graph) -> dict[str, bytes]:
    """The public key of every party, and of an anonymous group, by name.  ``GraphError`` where one is missing."""
    keys: dict[str, bytes] = {}
    for name, entry in graph.parties.items():
        if entry.key is None:
            raise graph.error(
                f"party {name!r} has no key",
                "parties",
                name,
                expected="a public key for every party",
                fix=f"run `splitsec keys new {name}` there and paste the line that it prints",
            )
        keys[name] = parse_public(entry.key)
    if graph.anonymous is not None:
        key = graph.groups[graph.anonymous].key
        if key is None:
            raise graph.error(
                f"the anonymous group {graph.anonymous!r} has no key",
                "groups",
                graph.anonymous,
                expected="a public key of its own, whose private half all members hold",
                fix=f"run `splitsec keys new {graph.anonymous} --group` at one member, paste the line that it prints, "
                "and hand the file to the others in a way that nobody else can read",
            )
        keys[graph.anonymous] = parse_public(key)
    return keys


def cell_limit_of(graph: Graph) -> int:
    """Bytes of the largest cell that passes a relay of ``graph``: smaller where more circuits share one."""
    return limits.cell_limit(graph.busiest)


def cell_of(graph: Graph, *, exchanges: bool = False) -> int | None:
    """Bytes of every cell that carries a part of a message, on all circuits alike; None: by Padmé.

    ``exchanges``: in a run that exchanges tensors, and does not train.
    """
    if graph.circuits.padding == "padme":
        return None
    ends = {frozenset((one.first, one.second)) for one in graph.circuits_between()}
    bodies = (size for pair, size in largest_bodies(graph, exchanges=exchanges) if pair in ends)
    return limits.fixed_cell(max(bodies, default=None), cell_limit_of(graph))


def peers_of(graph: Graph, party: str, plan: Plan | None = None, *, group_key: bytes | None = None) -> list[Peer]:
    """Everybody that ``party`` has to do with: links with lanes, links for cells alone, ends of circuits.

    Without a ``plan``, ``party`` is a relay and no more.  ``group_key``: the private key of its anonymous group, where
    it is a member of one.  Raises ``GraphError`` where somebody has no key.
    """
    keys = keys_of(graph)
    links = (*plan.links, *plan.cell_links) if plan is not None else cell_links(graph, party)
    peers = []
    for dialer, listener in dict.fromkeys(links):
        other = listener if dialer == party else dialer
        dial = graph.parties[listener].dialled if dialer == party else None
        lanes = _lanes(plan, other)
        talks = plan is not None and other in plan.peers  # it may have nothing to say to us, and we much to it
        peers.append(Peer(keys[other], dial=dial, lanes=lanes, cells_only=not talks))
    if plan is not None:
        cell = cell_of(graph, exchanges=not plan.streams)
        peers += [_at_the_end(graph, plan, circuit, keys, group_key, cell) for circuit in plan.circuits]
    return peers


def passages_of(graph: Graph, party: str) -> tuple[tuple[bytes, bytes], ...]:
    """From whose link circuits may go on to whose at ``party``, by key: as the routes lead, and nowhere else; each way
    as often as there are circuits that go it.
    """
    keys = keys_of(graph)
    found: list[tuple[bytes, bytes]] = []
    for first, second, routes in graph.circuits_between():
        for route in routes:
            if party in route:
                way = (first, *route, second)
                at = way.index(party)
                found.append((keys[way[at - 1]], keys[way[at + 1]]))
    return tuple(found)


def _at_the_end(
    graph: Graph, plan: Plan, circuit: Circuit, keys: dict[str, bytes], group_key: bytes | None, cell: int | None
) -> Peer:
    """The other end of ``circuit``."""
    other, builds = _other(plan.party, circuit), plan.party == circuit.first
    hidden = builds and other in graph.far_ends and plan.party in graph.members(graph.anonymous or "")
    if hidden and group_key is None:
        raise InternalError(f"{plan.party} must speak for its group {graph.anonymous}, whose key it was not given")
    return Peer(
        keys[other],
        lanes=_lanes(plan, other),
        routes=tuple(tuple(keys[name] for name in route) for route in circuit.routes),
        initiator=builds,
        cell=cell,
        proves=group_key if hidden else None,
        crowd=other == graph.anonymous,
        on_call=hidden,
    )


def _other(party: str, circuit: Circuit) -> str:
    return circuit.second if party == circuit.first else circuit.first


def _lanes(plan: Plan | None, peer: str) -> dict[int, int]:
    lanes = {} if plan is None else plan.lanes_in
    return {number: lane.max_body for (other, number), lane in lanes.items() if other == peer}
