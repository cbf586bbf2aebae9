"""What can be fuzzed: the table of targets, and how many of a million inputs each is given.

Here: names, places and shares.  A target is a plain function from bytes to None that raises where one of its
properties does not hold; its own file says which they are.  Both engines (``engines``: atheris, which looks at the
code's branches, and chance) and the short test in the suite (``test_fuzz``) call the same functions.  The story goes on
in ``zmtp``, ``handshake``, ``record``, ``delivery``, ``hostile``, ``circuit`` and ``messages``, from the outside in.

To add one: a function, a tuple ``SEEDS`` beside it (inputs that get far; may be empty), and a line here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

Function: TypeAlias = Callable[[bytes], None]


class Target(NamedTuple):
    """One thing to fuzz."""

    place: str
    """module:function; ``module.SEEDS`` are the inputs to begin with."""
    share: int
    """Inputs out of a thousand.  Not equal: one of ``delivery`` is a story of dozens of frames, and costs as much as
    fifteen of ``record``.
    """
    largest: int
    """Bytes of the longest input."""
    what: str


TARGETS: Final = MappingProxyType(
    {
        "circuit": Target("tests.fuzz.circuit:circuit", 40, 1500, "relays, origins and far ends that keep no rule"),
        "delivery": Target(
            "tests.fuzz.delivery:delivery", 110, 1500, "two honest ends and a wire that does what it likes"
        ),
        "hostile": Target("tests.fuzz.hostile:hostile", 200, 1500, "a peer that holds the session's keys and lies"),
        "handshake": Target(
            "tests.fuzz.handshake:handshake", 110, 1500, "strangers, replays and hostile peers at hello"
        ),
        "zmtp": Target("tests.fuzz.zmtp:zmtp", 130, 1500, "bytes from a stranger's socket"),
        "record": Target("tests.fuzz.record:record", 200, 500, "sealed records, lost, repeated, swapped and changed"),
        "messages": Target("tests.fuzz.messages:messages", 210, 5000, "headers and bodies that become tensors"),
    }
)
"""The slowest first, so that processes end together."""


def load(place: str) -> tuple[Function, Sequence[bytes]]:
    """The function at ``place`` (a name from the table, or module:function), and inputs to begin with."""
    module_name, _, name = (TARGETS[place].place if place in TARGETS else place).partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, name), getattr(module, "SEEDS", ())
