"""The contract: what a graph file says, as bytes that are the same for everybody who reads it the same way.

Here: the canonical bytes of a graph and their digest, which the prologue of every handshake is bound to.  Not here:
what a graph means (graph.py), nor the handshake (transports/handshake.py), where the story goes next.

The canonical bytes are one JSON document (RFC 8259) in UTF-8 without a byte order mark and without white space outside
strings, made from the graph by these rules:

1.  A record (the file itself, a party, group, segment, cut, labels edge, safeguard, exchange, route, `circuits`,
    `training`, `timeouts`, `privacy`) is an object with the keys of the graph file reference.  Every key is there: one
    that the file leaves out has its default, and `null` where the default is nothing.  Keys stand in ascending order of
    their code points.
2.  The mappings `parties`, `groups` and `segments` are arrays of [name, record], in the order of the file: their
    order means something.  Lists are arrays in the order of the file.
3.  A number that the reference calls a float is a string of 16 lower-case hexadecimal digits: its IEEE 754 binary64
    representation, most significant byte first ("3ff0000000000000" is 1.0).  Other numbers are decimal integers,
    without leading zeros.  `true` and `false` are JSON's.
4.  In strings, `"` and `\\` are preceded by `\\`; every other character stands for itself.

The digest is the SHA-256 of these bytes.  Comments, white space, quotes, the order of keys in a record, and whether a
default is written out do not change it; any change of a value does.
"""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

from pydantic import BaseModel

from splitsec.graph import Graph

__all__ = ["canonical_bytes", "digest"]


def canonical_bytes(graph: Graph) -> bytes:
    """The canonical bytes of ``graph``, by the rules above."""
    return json.dumps(
        _canonical(graph), sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    ).encode("utf-8")


def digest(graph: Graph) -> bytes:
    """SHA-256 of the canonical bytes of ``graph``: 32 bytes that all parties must share."""
    return hashlib.sha256(canonical_bytes(graph)).digest()


def _canonical(value: Any) -> Any:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {one.alias or name: _canonical(getattr(value, name)) for name, one in fields.items()}
    if isinstance(value, dict):
        return [[name, _canonical(one)] for name, one in value.items()]
    if isinstance(value, tuple):
        return [_canonical(one) for one in value]
    if isinstance(value, float):
        return struct.pack(">d", value).hex()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise AssertionError(f"no canonical form for {type(value).__name__}")
