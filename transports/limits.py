"""Every number that bounds something, with its unit and its reason.

Here: first what the protocol fixes (both sides must agree), then what this implementation chose (each side may differ).
Not here: limits that the contract declares (the largest body of a lane, timeouts): those are arguments.  The story goes
on in ``wire``.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "ACCEPT_PAUSE_SECONDS",
    "ACK_BYTES",
    "ACK_CHUNKS",
    "ACK_SECONDS",
    "ANSWER_SECONDS",
    "BURST_FRAMES",
    "BUSY_RETRY_SECONDS",
    "CELL_COST",
    "CELL_HEAD",
    "CELL_LENGTH",
    "CELL_MAX",
    "CELL_MIN",
    "CELL_ROOM",
    "CHUNK_COST",
    "CHUNK_FIRST",
    "CHUNK_HEADER_SIZE",
    "CHUNK_MAX",
    "CHUNK_MIN",
    "CHUNK_SECONDS",
    "CIRCUITS_SPARE",
    "CIRCUIT_CELLS",
    "CLOSE_SECONDS",
    "CONNECT_RETRY_MAX_SECONDS",
    "CONNECT_RETRY_SECONDS",
    "CONNECT_SECONDS",
    "COUNTER_LIMIT",
    "CROWD_MAX",
    "CROWD_SECONDS",
    "FRAME_MAX",
    "GATHER_MAX",
    "HANDSHAKES_BURST",
    "HANDSHAKES_PER_SECOND",
    "HEADER_MAX",
    "HEADER_ROOM",
    "HELLO_RETRY_SECONDS",
    "HOPS_MAX",
    "INLINE_MAX",
    "KEY_SIZE",
    "LANES_MAX",
    "LAYER_COST",
    "LINK_WINDOW",
    "LOGS_BURST",
    "LOGS_PER_SECOND",
    "LONE_CELL",
    "MARKS_MAX",
    "MARK_BYTES",
    "MARK_SECONDS",
    "MEASURE_BYTES",
    "MEASURE_SECONDS",
    "MESSAGE_COST",
    "OUTBOX_BYTES",
    "OVERHEAD",
    "PAYLOAD_MAX",
    "QUEUED_FRAMES",
    "RATE_SECONDS",
    "READ_BYTES",
    "REDIAL_MAX_SECONDS",
    "REDIAL_SECONDS",
    "REKEY_BYTES",
    "REKEY_SECONDS",
    "RELAY_BYTES",
    "REST_SECONDS",
    "ROUND_TRIPS",
    "ROUTE_TRIES",
    "RUN_SIZE",
    "SMALL_BLOCK",
    "SMALL_CELL",
    "SPARE_BLOCKS",
    "STRANGERS_CONNECTED_MAX",
    "STRANGERS_MAX",
    "STRANGER_BYTES",
    "STRANGER_FRAME_MAX",
    "STRANGER_READ_BYTES",
    "STRANGER_SECONDS",
    "TAG_SIZE",
    "UNACKED_CHUNKS",
    "WINDOW",
    "WINDOW_MAX",
    "cell_limit",
    "fixed_cell",
    "padme",
]

# --- fixed by the protocol (docs/protocol.md); a change needs a new protocol version ----------------------------------

KEY_SIZE: Final = 32
"""Bytes of an X25519 key and of an AES-256-GCM key."""

TAG_SIZE: Final = 16
"""Bytes that AES-GCM adds to a record (NIST SP 800-38D, t = 128)."""

CHUNK_MAX: Final = 1 << 20
"""Bytes of a message in one chunk.  1 MiB fits a second-level cache, and is what a small message waits for at most."""

CHUNK_COST: Final = 512
"""Bytes that each chunk counts against the window beside its payload: tiny messages, too, cost whoever holds them."""

HEADER_MAX: Final = 1 << 20
"""Bytes of a message's header."""

LANES_MAX: Final = 1 << 16
"""Lanes of one channel: the number is 16 bits on the wire."""

CHUNK_HEADER_SIZE: Final = 32
"""Bytes of the header of a chunk, before sealing."""

OVERHEAD: Final = 1 + CHUNK_HEADER_SIZE + TAG_SIZE + TAG_SIZE
"""Bytes that a frame is longer than its payload: type, sealed chunk header, the payload's tag."""

RUN_SIZE: Final = 16
"""Bytes of the random name of one end of a channel: nobody meets the same one twice."""

PAYLOAD_MAX: Final = CHUNK_MAX
"""Bytes of the longest payload."""

FRAME_MAX: Final = PAYLOAD_MAX + OVERHEAD
"""Bytes of the longest frame; a transport refuses anything longer before it stores it."""

CELL_HEAD: Final = 1 + CHUNK_HEADER_SIZE + TAG_SIZE
"""Bytes of a cell's frame before what the layers of its circuit seal: type, sealed chunk header."""

CELL_MAX: Final = 1 << 20
"""Bytes of the largest cell.  A cell's size is what its frame holds beyond CELL_HEAD."""

SMALL_CELL: Final = 2048
"""Bytes of the smallest cell, and of every cell that carries no part of a message: the longest of these, an EXTEND with
its handshake or a hello, fits."""

HOPS_MAX: Final = 8
"""Hops of a circuit: seven relays and the far end."""

LAYER_COST: Final = 1 + TAG_SIZE
"""Bytes that one layer adds to a cell: command and tag."""

CELL_ROOM: Final = HOPS_MAX * LAYER_COST
"""Bytes of every cell that are kept for layers, however many there are: so sizes do not tell how far it has come."""

CELL_LENGTH: Final = 4
"""Bytes that say how much of a cell is meant."""

CELL_COST: Final = CELL_ROOM + CELL_LENGTH + OVERHEAD
"""Bytes that a cell is longer than the part of a message in it."""

COUNTER_LIMIT: Final = 1 << 32
"""Records under one key.  2^32 records of 2^16 blocks are 2^48 blocks, which keeps AES-GCM's distinguishing advantage
below 2^-32 (Bellare and Tackmann 2016, theorem for counter nonces); the nonce itself would allow 2^64 - 1 (Noise,
section 5.1).  A session changes its key long before."""

# --- chosen by this implementation; a peer with other values still understands us -------------------------------------

GATHER_MAX: Final = (256 << 10) + 4096
"""Bytes up to which pieces of a message are copied together into one chunk.  A copy of 256 KiB costs about what one
more frame costs (15 us), and a tensor of 256 KiB with its header then travels in one frame."""

REKEY_BYTES: Final = 1 << 30
"""Bytes sealed under one key before the next: who steals a key from memory reads at most these, and nothing older."""

REKEY_SECONDS: Final = 120.0
"""Seconds under one key, if anything was sealed with it; as WireGuard's REKEY_AFTER_TIME."""

UNACKED_CHUNKS: Final = 1024
"""Chunks sent and not acknowledged, at most: bounds what is kept to be sent again where messages are tiny.  The window
bounds it where they are not."""

ACK_BYTES: Final = 8 << 20
"""Bytes of chunks taken before they are acknowledged with a frame of their own; every other frame acknowledges too."""

ACK_CHUNKS: Final = 256
"""Chunks taken before they are acknowledged with a frame of their own."""

ACK_SECONDS: Final = 0.05
"""Seconds that an acknowledgement waits for a frame to ride on."""

LINK_WINDOW: Final = 64 << 20
"""As WINDOW, for every peer of a contract: room for the next micro-batches while one is computed."""

MESSAGE_COST: Final = 1024
"""Bytes that each message that nobody took yet counts beside its own: what Python needs to hold one."""

WINDOW: Final = 16 << 20
"""Bytes that a peer may send beyond what was taken from us, where nobody says otherwise.  16 MiB keeps 1 Gbit/s busy
over a round trip of 130 ms; over a longer one the window opens further."""

WINDOW_MAX: Final = 128 << 20
"""Bytes to which a window opens at most, where so much arrives within two round trips; as OUTBOX_BYTES, for we have no
more than those under way ourselves."""

CHUNK_SECONDS: Final = 0.01
"""Seconds of a connection that one chunk takes up, where it is known: what another lane waits for at most, and what a
receiver waits for before it can open anything.  Less would cost more frames than it saves time."""

CHUNK_MIN: Final = 16 << 10
"""Bytes of a chunk on the slowest connection: 0.4 % of them are headers and tags.  130 ms at 1 Mbit/s."""

CHUNK_FIRST: Final = 64 << 10
"""Bytes of a chunk where nothing is known yet.  Before 20 s are over, the default of `timeouts.lost`, it has arrived
at 26 kbit/s."""

MEASURE_BYTES: Final = 64 << 10
"""Bytes in one stretch of which a rate is made, at least."""

MEASURE_SECONDS: Final = 0.25
"""Seconds between two measurements where little is sent at a time: eight PINGs of 51 bytes a second."""

MARK_BYTES: Final = 256 << 10
"""Bytes of a long stretch between two marks, at least."""

MARK_SECONDS: Final = 0.1
"""Seconds of a long stretch between two marks, at least, once something is known."""

MARKS_MAX: Final = 2
"""Marks of earlier stretches that may be unanswered when another begins."""

RATE_SECONDS: Final = 10.0
"""Seconds for which a rate counts after it was measured, as long as there are others: a line that has become slower is
noticed after so long.  BBR's filter for round trips has the same length."""

ROUND_TRIPS: Final = 16
"""Round trips of which the shortest counts."""

CIRCUIT_CELLS: Final = 4
"""Largest cells that may wait at a relay for one circuit and direction.  Fewer stall the pipe, more fill memory."""

RELAY_BYTES: Final = 64 << 20
"""Bytes that all circuits of the busiest relay may have waiting there, if they agree on it: see ``cell_limit``."""

CELL_MIN: Final = 16 << 10
"""Bytes of the largest cell where a relay carries more circuits than RELAY_BYTES is made for."""

LONE_CELL: Final = 16 << 10
"""Bytes of the cells of a circuit whose messages have no largest size: weights that are handed on."""

CIRCUITS_SPARE: Final = 64
"""Circuits that a link may carry beyond twice those that the contract has through us: those that end here, or are being
built."""

CROWD_SECONDS: Final = 600.0
"""Seconds, at least, until a group is given up of which one has said goodbye and no other has come: weights may be on
their way from one to the other, and we cannot see that."""

CROWD_MAX: Final = 1024
"""Channels that all who prove one key may have at the same time."""

HEADER_ROOM: Final = 512
"""Bytes that are reckoned for a message's header where cells are cut so that they fit the largest message."""

OUTBOX_BYTES: Final = 128 << 20
"""Bytes of messages that wait for one peer, or for its acknowledgement, before ``send`` blocks.  They are lent, not
copied: the bound is on what callers keep alive."""

SPARE_BLOCKS: Final = 4
"""Blocks of memory remembered per lane for the next messages; fresh memory costs a page fault every 4 KiB."""

SMALL_BLOCK: Final = 16 << 10
"""Bytes below which fresh memory costs less than looking for a block to use again."""

INLINE_MAX: Final = GATHER_MAX
"""Bytes of a message that a computing thread seals and sends itself, where nothing else waits: 20 us of cipher and 30
us of copying at most, against some 50 us to wake the I/O thread."""

REST_SECONDS: Final = 0.002
"""Seconds that the I/O thread leaves its work to a computing thread that has just been given a message.  Where that one
computes for longer, what comes in waits this long at most, once."""

QUEUED_FRAMES: Final = 16
"""Frames that a transport may queue per connection and direction.  Fewer stall the pipe (4: a third slower at 4 MiB),
more hold back small messages."""

BURST_FRAMES: Final = 32
"""Frames taken from one port before the others have their turn."""

ROUTE_TRIES: Final = 3
"""Tries to build a circuit by one route before the next is tried: when all start at once, relays need a moment to find
each other."""

HELLO_RETRY_SECONDS: Final = 0.25
"""Seconds between two copies of a hello that nobody answered: a busy listener ignores it."""

BUSY_RETRY_SECONDS: Final = 0.5
"""Seconds before a dialer tries again after the answer "busy", and that a goodbye has to leave."""

REDIAL_SECONDS: Final = 0.05
"""Seconds before a broken connection is dialled again; the pause doubles with every try that fails."""

REDIAL_MAX_SECONDS: Final = 2.0
"""Seconds between two tries, at most."""

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

# --- chosen for transports on sockets ---------------------------------------------------------------------------------

READ_BYTES: Final = 64 << 10
"""Bytes read at once from a connection.  Of a longer frame the rest is read in one go; never is more than this moved
inside a buffer.  More would leave a second-level cache, less would cost calls."""

STRANGER_FRAME_MAX: Final = 2304
"""Bytes of the longest frame from somebody who has not proved who it is: a hello with its payload, and some air."""

STRANGER_READ_BYTES: Final = 4096
"""Bytes read at once from a stranger, and all that is stored of what it sends."""

STRANGER_BYTES: Final = 16 << 10
"""Bytes taken from a stranger in all; a handshake needs less than 3 KiB."""

STRANGER_SECONDS: Final = 10.0
"""Seconds until a stranger has proved who it is, or is hung up on; as ANSWER_SECONDS."""

STRANGERS_CONNECTED_MAX: Final = 256
"""Connections of strangers at a listener; the oldest goes when one more comes.  Each holds a descriptor and
STRANGER_READ_BYTES."""

ACCEPT_PAUSE_SECONDS: Final = 0.5
"""Seconds without a new connection after the operating system had no descriptor left for one."""

CONNECT_SECONDS: Final = 5.0
"""Seconds that one attempt to connect may take; as long again for the transport's own handshake."""

CONNECT_RETRY_SECONDS: Final = 0.1
"""Seconds between the first two attempts; the pause doubles with each."""

CONNECT_RETRY_MAX_SECONDS: Final = 1.0
"""Seconds between two attempts at most: a peer that comes up late waits no longer."""

# --- sizes of cells ---------------------------------------------------------------------------------------------------


def cell_limit(circuits: int) -> int:
    """Bytes of the largest cell where the busiest relay carries so many circuits: a power of two, so that what waits at
    that relay stays below RELAY_BYTES, in both directions together, down to CELL_MIN.
    """
    share = RELAY_BYTES // (2 * CIRCUIT_CELLS * max(1, circuits))
    return min(CELL_MAX, max(CELL_MIN, 1 << (share.bit_length() - 1) if share else 0))


def fixed_cell(largest: int | None, limit: int) -> int:
    """Bytes of every cell that carries messages of at most ``largest`` bytes (None: of any size): the least that cuts
    the largest message in as few equal parts as ``limit``, the largest cell, allows.
    """
    if largest is None:
        return min(LONE_CELL, limit)
    whole = largest + HEADER_ROOM
    parts = -(-whole // (limit - CELL_COST))
    part = -(-whole // parts)
    return min(limit, max(SMALL_CELL, -(-(part + CELL_COST) // 64) * 64))


def padme(size: int) -> int:
    """``size`` rounded up so that it tells little more than its order of magnitude: at most 12 % more, from 64 KiB on
    at most 3.1 % (Nikitin et al., Reducing Metadata Leakage from Encrypted Files, 2019, section 4.2).
    """
    if size < 2:
        return size
    exponent = size.bit_length() - 1
    free = exponent - exponent.bit_length()
    return (size + (1 << free) - 1) >> free << free
