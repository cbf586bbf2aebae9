"""Handshake patterns of the Noise specification, sections 7 and 9, written the way the specification writes them.

Here: the text of each pattern, its reading, and psk modifiers.  Not here: what a token does; for that go on to
``handshakestate``.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, cast, final, get_args

from splitsec.transports.errors import LocalProtocolError

__all__ = ["HandshakePattern", "Token", "pattern"]

Token: TypeAlias = Literal["e", "s", "ee", "es", "se", "ss", "psk"]

# Section 7.5, interactive patterns; "..." ends the pre-messages (section 7.1).  XX knows nothing beforehand.
_FUNDAMENTAL: Final = {
    "NK": """
        <- s
        ...
        -> e, es
        <- e, ee
    """,
    "KK": """
        -> s
        <- s
        ...
        -> e, es, ss
        <- e, ee, se
    """,
    "IK": """
        <- s
        ...
        -> e, es, s, ss
        <- e, ee, se
    """,
    "XX": """
        -> e
        <- e, ee, s, es
        -> s, se
    """,
}

_NAME: Final = re.compile(r"([A-Z]+)((?:psk[0-9])(?:\+psk[0-9])*)?")
_CRYPTO: Final = "25519_AESGCM_SHA256"


@final
@dataclass(frozen=True)
class HandshakePattern:
    """What each side knows beforehand, and the tokens of each message; messages alternate, the initiator's first."""

    name: str
    """Pattern with its modifiers, e.g. ``IKpsk2``."""
    initiator_knows_responder: bool
    """Pre-message ``<- s``: the initiator holds the responder's static public key beforehand."""
    responder_knows_initiator: bool
    """Pre-message ``-> s``: the responder holds the initiator's static public key beforehand."""
    messages: tuple[tuple[Token, ...], ...]

    @property
    def protocol_name(self) -> bytes:
        """The full name that is hashed into the handshake, section 8."""
        return f"Noise_{self.name}_{_CRYPTO}".encode()

    @property
    def psks(self) -> int:
        """How many pre-shared keys the handshake uses."""
        return sum(tokens.count("psk") for tokens in self.messages)

    def needs_static(self, initiator: bool) -> bool:
        """Whether that side must own a static key pair: it is known beforehand, or sent in one of its messages."""
        known = self.responder_knows_initiator if initiator else self.initiator_knows_responder
        return known or any("s" in tokens for tokens in self.messages[0 if initiator else 1 :: 2])


@functools.cache
def pattern(name: str) -> HandshakePattern:
    """Read a pattern name such as ``XX``, ``IKpsk2`` or ``KKpsk0+psk2``.

    ``psk0`` stands before the first message's tokens, ``pskN`` behind the N-th message's (section 9.4); several stand
    in ascending order, so that one handshake has one name.  Raises LocalProtocolError where there is no such pattern.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in _FUNDAMENTAL:
        raise LocalProtocolError(f"no pattern {name!r}; there are {', '.join(_FUNDAMENTAL)}, with psk modifiers")
    before, _, after = _FUNDAMENTAL[match[1]].rpartition("...")
    messages = [_tokens(line) for line in after.split("\n") if line.strip()]
    places = [int(modifier.removeprefix("psk")) for modifier in match[2].split("+")] if match[2] else []
    if places != sorted(set(places)) or (places and places[-1] > len(messages)):
        raise LocalProtocolError(f"no pattern {name!r}: {match[1]} takes psk0 to psk{len(messages)}, ascending")
    for place in places:
        if place == 0:
            messages[0] = ("psk", *messages[0])
        else:
            messages[place - 1] = (*messages[place - 1], "psk")
    return HandshakePattern(name, "<- s" in before, "-> s" in before, tuple(messages))


def _tokens(line: str) -> tuple[Token, ...]:
    tokens = line.strip()[len("-> ") :].split(", ")
    assert set(tokens) <= set(get_args(Token)), line
    return tuple(cast(Token, token) for token in tokens)
