"""What can go wrong below the names of parties, and whose fault it is.

Here: the one tree of errors that everything in ``splitsec.transports`` raises, and the short list of reasons for which
a handshake is turned down.  Not here: names of parties and files (this layer knows neither), exit codes and advice; for
those go on to ``splitsec/errors.py``, which maps this tree onto what a user reads.
"""

from __future__ import annotations

import enum

__all__ = [
    "Damaged",
    "LocalProtocolError",
    "Lost",
    "PeerMisbehaved",
    "RefusalReason",
    "Refused",
    "Restarted",
    "TransportsError",
]


class RefusalReason(enum.IntEnum):
    """Why a handshake was turned down.  The values are on the wire; never give one a new meaning."""

    VERSION = 1
    """The two sides speak different versions of the protocol."""
    DIGEST_DIFFERS = 2
    """The two sides hold different contracts (graph files)."""
    WRONG_KEY = 3
    """The responder cannot open the hello: it was meant for another key, or was altered on the way."""
    UNKNOWN_KEY = 4
    """The initiator proved a key that the responder's contract does not name."""
    BUSY = 5
    """The responder takes no session now; trying again later may work."""


class TransportsError(Exception):
    """Base of every error that ``splitsec.transports`` raises on purpose."""


class LocalProtocolError(TransportsError):
    """We did something that the protocol or the machine's state forbids: a fault on this side."""


class PeerMisbehaved(TransportsError):
    """The other side, or somebody on the way, sent what the protocol forbids.  Nothing that it sent was used."""


class Damaged(PeerMisbehaved):
    """What came is not what the peer sent: altered, repeated, left out or swapped on the way, or not the peer's at all.

    It proves nothing about the peer.  The session is over; a channel goes on with the next.
    """


class Refused(TransportsError):
    """A handshake was turned down, by the peer (``by_peer``) or by us.

    A refusal that comes from the peer is not authenticated, for there are no keys yet: whoever sits on the wire can
    forge one.  It explains why there is no session; it proves nothing.
    """

    def __init__(
        self,
        reason: RefusalReason,
        ours: bytes | None = None,
        theirs: bytes | None = None,
        by_peer: bool = True,
    ) -> None:
        """``ours``, ``theirs``: the first bytes of the two contracts' digests, None where not known."""
        self.reason = reason
        self.ours = ours
        self.theirs = theirs
        self.by_peer = by_peer
        super().__init__(reason, ours, theirs, by_peer)

    def __str__(self) -> str:
        return f"handshake refused by {'the peer' if self.by_peer else 'us'}: {self._why()}"

    def _why(self) -> str:
        match self.reason:
            case RefusalReason.VERSION:
                return "the two sides speak different versions of the splitsec protocol"
            case RefusalReason.DIGEST_DIFFERS:
                return f"the graphs differ: ours {_short(self.ours)}, theirs {_short(self.theirs)}"
            case RefusalReason.WRONG_KEY if self.by_peer:
                return "the key that we expect there is not the key that it has, or our hello was altered on the way"
            case RefusalReason.WRONG_KEY:
                return "the hello was meant for another key than ours, or was altered on the way"
            case RefusalReason.UNKNOWN_KEY if self.by_peer:
                return "its graph does not name our key"
            case RefusalReason.UNKNOWN_KEY:
                return "our graph does not name its key"
            case RefusalReason.BUSY:
                return "no session is taken now"


class Lost(TransportsError):
    """The connection went away, or the other side fell silent for longer than it may."""


class Restarted(TransportsError):
    """One side was started anew and has lost what the two had exchanged; the channel cannot go on."""


def _short(digest: bytes | None) -> str:
    return "unknown" if digest is None else digest.hex()
