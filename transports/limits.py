"""Every number that bounds something, with its unit and its reason.

Here: first what the protocol fixes (both sides must agree), then what this implementation chose (each side may differ).
Not here: limits that the contract declares (the largest body of a lane, timeouts): those are arguments.  The story goes
on in ``wire``.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "ANSWER_SECONDS",
    "BURST_FRAMES",
    "BUSY_RETRY_SECONDS",
    "CHUNK_HEADER_SIZE",
    "CHUNK_MAX",
    "CLOSE_SECONDS",
    "COUNTER_LIMIT",
    "FORWARD_PREFIX",
    "FRAME_MAX",
    "GATHER_MAX",
    "HANDSHAKES_BURST",
    "HANDSHAKES_PER_SECOND",
    "HEADER_MAX",
    "HELLO_RETRY_SECONDS",
    "KEY_SIZE",
    "LANES_MAX",
    "LINK_WINDOW",
    "LOGS_BURST",
    "LOGS_PER_SECOND",
    "OUTBOX_BYTES",
    "OVERHEAD",
    "PAYLOAD_MAX",
    "QUEUED_FRAMES",
    "RELAY_BYTES",
    "SMALL_BLOCK",
    "SPARE_BLOCKS",
    "STRANGERS_MAX",
    "TAG_SIZE",
    "WINDOW",
]

# --- fixed by the protocol (docs/protocol.md); a change needs a new protocol version ----------------------------------

KEY_SIZE: Final = 32
"""Bytes of an X25519 key and of an AES-256-GCM key."""

TAG_SIZE: Final = 16
"""Bytes that AES-GCM adds to a record (NIST SP 800-38D, t = 128)."""

CHUNK_MAX: Final = 1 << 20
"""Bytes of a message in one chunk.  1 MiB fits a second-level cache, and is what a small message waits for at most."""

HEADER_MAX: Final = 1 << 20
"""Bytes of a message's header."""

LANES_MAX: Final = 1 << 16
"""Lanes of one channel: the number is 16 bits on the wire."""

CHUNK_HEADER_SIZE: Final = 24
"""Bytes of the header of a chunk, before sealing."""

OVERHEAD: Final = 1 + CHUNK_HEADER_SIZE + TAG_SIZE + TAG_SIZE
"""Bytes that a frame is longer than its payload: type, sealed chunk header, the payload's tag."""

FORWARD_PREFIX: Final = KEY_SIZE + 8
"""Bytes in front of a forwarded frame: the far peer's key and the number of the connection."""

PAYLOAD_MAX: Final = FORWARD_PREFIX + CHUNK_MAX + OVERHEAD
"""Bytes of the longest payload: a forwarded frame that holds a whole chunk.  (Forwarding does not nest.)"""

FRAME_MAX: Final = PAYLOAD_MAX + OVERHEAD
"""Bytes of the longest frame; a transport refuses anything longer before it stores it."""

COUNTER_LIMIT: Final = 1 << 32
"""Records under one key.  2^32 records of 2^16 blocks are 2^48 blocks, which keeps AES-GCM's distinguishing advantage
below 2^-32 (Bellare and Tackmann 2016, theorem for counter nonces); the nonce itself would allow 2^64 - 1 (Noise,
section 5.1)."""

# --- chosen by this implementation; a peer with other values still understands us -------------------------------------

GATHER_MAX: Final = (256 << 10) + 4096
"""Bytes up to which pieces of a message are copied together into one chunk.  A copy of 256 KiB costs about what one
more frame costs (15 us), and a tensor of 256 KiB with its header then travels in one frame."""

LINK_WINDOW: Final = 64 << 20
"""As WINDOW, where nobody stands between: room for the next micro-batches while one is computed."""

WINDOW: Final = 16 << 20
"""Bytes that a peer may send beyond what was taken from us.  16 MiB keeps 1 Gbit/s busy over a round trip of 130 ms,
and bounds what a forwarding peer must hold for a pair."""

RELAY_BYTES: Final = WINDOW + (8 << 20)
"""Bytes held for one forwarded pair in one direction.  Above the window plus overhead only who ignores the window can
get.
"""

OUTBOX_BYTES: Final = 256 << 20
"""Bytes of messages that wait for one peer before ``send`` blocks.  They are lent, not copied: the bound is on what
callers keep alive, and leaves room for every micro-batch of a step."""

SPARE_BLOCKS: Final = 4
"""Blocks of memory remembered per lane for the next messages; fresh memory costs a page fault every 4 KiB."""

SMALL_BLOCK: Final = 16 << 10
"""Bytes below which fresh memory costs less than looking for a block to use again."""

QUEUED_FRAMES: Final = 16
"""Frames that a transport may queue per connection and direction.  Fewer stall the pipe (4: a third slower at 4 MiB),
more hold back small messages."""

BURST_FRAMES: Final = 32
"""Frames taken from one port before the others have their turn."""

HELLO_RETRY_SECONDS: Final = 0.25
"""Seconds between two copies of a hello that nobody answered: a peer in the middle drops it while the far end is not
there, and a busy listener ignores it."""

BUSY_RETRY_SECONDS: Final = 0.5
"""Seconds before a dialer tries again after the answer "busy" or a dropped connection."""

ANSWER_SECONDS: Final = 10.0
"""Seconds between a hello and the end of its handshake, at most; then the listener forgets it and the dialer starts
anew.
"""

STRANGERS_MAX: Final = 64
"""Handshakes in flight at a listener.  Each holds about 10 kB."""

HANDSHAKES_PER_SECOND: Final = 100.0
"""Handshakes that a listener computes per second in the long run; one takes about 0.4 ms, so strangers get 4 % of a
core.
"""

HANDSHAKES_BURST: Final = 100.0
"""Handshakes that a listener computes at once after a quiet time: all parties of a large graph that start together."""

LOGS_PER_SECOND: Final = 0.2
"""Lines that strangers may cause in the operator's log, per second in the long run."""

LOGS_BURST: Final = 10.0
"""Lines that strangers may cause in the operator's log at once."""

CLOSE_SECONDS: Final = 5.0
"""Seconds that ``close`` waits for outboxes to drain when the caller names no other time."""
