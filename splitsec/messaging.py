"""The messaging layer on its own: send and receive named tensors between two parties, with no training at all.

Here: a party's end of the exchanges that the graph declares.  Everything passes the same door (``guard``) and the
same channels as training does.  Not here: segments, steps.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

from splitsec.books import open_journal
from splitsec.errors import EgressRefused, UserError
from splitsec.graph import Exchange, Graph
from splitsec.messages import Message
from splitsec.party import open_guard
from splitsec.plan import exchange_lane, make_plan
from splitsec.safeguards import Safeguards
from splitsec.transports.iothread import CloseCode

__all__ = ["Line", "open_line"]


def open_line(
    graph: Graph, party: str, *, private_key: bytes, listen: str | None = None, state: str | Path | None = None
) -> Line:
    """Connect ``party`` with every party that it exchanges tensors with, and return its end of the exchanges.

    ``private_key``: 32 bytes, from ``read_key``.  ``listen``: where to bind, in place of the graph's ``listen``.
    ``state``: folder of the party's journal, which then has an entry for every tensor sent; no policy and no budget
    applies to exchanges.
    Raises ``PeerUnreachable`` or ``PeerRefusedUs`` if a peer does not come up or turns us down.

    >>> with open_line(graph, "clinic-a", private_key=key) as line:  # doctest: +SKIP
    ...     line.send("histogram", torch.ones(4, 16))
    """
    if party not in graph.parties:
        raise UserError(f"no party {party!r} in the graph", expected="one of " + ", ".join(map(repr, graph.parties)))
    return Line(graph, party, private_key=private_key, listen=listen, state=state)


class Line:
    """One party's end of its exchanges.  Use it in a ``with`` block, or call ``close``."""

    def __init__(
        self,
        graph: Graph,
        party: str,
        *,
        private_key: bytes,
        listen: str | None = None,
        state: str | Path | None = None,
    ) -> None:
        self._graph = graph
        self._party = party
        self._exchanges = {exchange.name: exchange for exchange in graph.exchanges}
        self._sent = 0
        plan = make_plan(graph, party, exchanges=True)
        self._safeguards = None if state is None else Safeguards({}, journal=open_journal(Path(state), graph, party))
        try:
            self._guard = open_guard(
                graph, plan, private_key, listen=listen, together=False, safeguards=self._safeguards
            )
        except BaseException:
            self._close_books()
            raise
        try:
            self._guard.open_all(plan.peers)
        except BaseException:
            self.close(failed=True)
            raise

    def send(self, name: str, tensor: torch.Tensor) -> None:
        """Send ``tensor`` to the party that exchange ``name`` goes to.

        Its shape and dtype must be as declared.  The tensor is lent until it is sent: do not change it in place
        before ``close``. Raises ``EgressRefused``; nothing has been sent then.
        """
        tensor = torch.as_tensor(tensor)  # an array of numpy's, say
        exchange = self._exchange(name)
        if exchange.source != self._party:
            raise EgressRefused(
                f"exchange {name!r} goes from {exchange.source!r}", expected=f"an exchange from {self._party!r}"
            )
        self._sent += 1
        self._guard.release(
            (exchange.target, exchange_lane(self._graph, name)),
            Message("exchange", (self._sent,), tensors={name: tensor}),
        )

    def receive(self, name: str) -> torch.Tensor:
        """The next tensor of exchange ``name``, in the order they were sent; waits for it.

        Raises ``PeerLost`` if the sender left without sending one, ``PeerMisbehaved`` if it sent anything else.
        """
        exchange = self._exchange(name)
        if exchange.target != self._party:
            raise UserError(
                f"exchange {name!r} goes to {exchange.target!r}", expected=f"an exchange to {self._party!r}"
            )
        message = self._guard.take((exchange.source, exchange_lane(self._graph, name)))
        return next(iter(message.tensors.values()))

    def _exchange(self, name: str) -> Exchange:
        if name not in self._exchanges:
            raise EgressRefused(
                f"no exchange {name!r}",
                expected="one of "
                + (", ".join(map(repr, self._exchanges)) or "the graph's `exchanges`, of which there are none"),
                fix="declare it under `exchanges:` in the graph file",
            )
        return self._exchanges[name]

    def close(self, *, failed: bool = False) -> None:
        """Send what is queued and say goodbye."""
        self._guard.close(CloseCode.ERROR if failed else CloseCode.NORMAL)
        self._close_books()

    def _close_books(self) -> None:
        if self._safeguards is not None:
            self._safeguards.close()

    def __enter__(self) -> Line:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)
