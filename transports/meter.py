"""What a connection carries, measured on the way: round trip, delivery rate, and what arrives in one round trip.

Here: the arithmetic.  Not here: who asks and answers (``channel``: numbered PINGs between the chunks), and the clock
(``iothread``).  What follows from the figures: how long the next chunk is, how much may lie unsent in the socket, and
how far the window opens.

The sender measures as BBR does (Cheng et al., Delivery Rate Estimation, draft-cheng-iccrg-delivery-rate-estimation):
bytes that were delivered between two acknowledgements, over the time between them or the time that sending them took,
whichever is longer.  The largest of late counts, for whatever disturbs makes a sample too small.  One difference: the
acknowledgements are asked for.  Ours wait for a frame to ride on, and one that waited for somebody's backward pass
would make a fast line look slow.  So a *mark*, a PING with a number, goes before the first chunk of a stretch in which
we have something to send all the time, and behind the last (in a long one, every so often between); its PONG, which
waits for nothing, says that all before it is there.

The receiver measures as Linux sizes its receive buffers: what arrives in a round trip.  Where the window was what kept
it small, twice as much next time finds out.

A peer that lies in its PONGs gets chunks that are longer, or a window that is wider, up to the bounds in ``limits``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, final

from splitsec.transports.limits import (
    CHUNK_FIRST,
    CHUNK_MAX,
    CHUNK_MIN,
    CHUNK_SECONDS,
    MARK_BYTES,
    MARK_SECONDS,
    MARKS_MAX,
    MEASURE_BYTES,
    MEASURE_SECONDS,
    RATE_SECONDS,
    ROUND_TRIPS,
)

__all__ = ["Meter"]

_BRIEFEST: Final = 1e-6  # seconds: what a clock tells apart
_UNSENT_MAX: Final = 1 << 30  # bytes: what every operating system can be told
_WRAP: Final = 1 << 64  # numbers of PINGs are 64 bits


@final
@dataclass(frozen=True, slots=True)
class _Mark:
    """A PING with a number."""

    number: int
    at: float
    """When it left, seconds."""
    handed: int
    """Bytes that had left before it."""
    after: bool
    """From the mark before it on, there was always something to send."""


@final
class Meter:
    """One connection's figures, of both directions.  Times in seconds, by one clock that never goes back."""

    def __init__(self) -> None:
        self.rate: float | None = None
        """Bytes a second that the connection carries from us, as far as known."""
        self.round_trip: float | None = None
        """Seconds there and back: the shortest of late, for queues only add to it.  None: not known yet."""
        self.flight = 0
        """Bytes that arrived within a round trip, at most."""
        self.chunk = CHUNK_FIRST
        """Bytes of the next chunk at most: what the connection carries in CHUNK_SECONDS."""
        self.unsent: int | None = None
        """Bytes that may lie in the socket and wait: two chunks, so that one is always ready while we make the next.
        None: as many as the operating system likes, where nothing was measured yet.
        """
        self._handed = 0
        self._number = 0
        self._marks: deque[_Mark] = deque()  # not answered yet
        self._last: _Mark | None = None  # of this stretch
        self._answered: tuple[_Mark, float] | None = None  # the mark before, and when its answer came
        self._next = 0.0  # when another stretch is measured
        self._rates: deque[tuple[float, float]] = deque()  # when, bytes a second
        self._round_trips: deque[float] = deque(maxlen=ROUND_TRIPS)
        self._known_at = 0.0  # when the last of those came
        self._arrived = 0  # bytes in this round
        self._unasked = 0  # bytes since somebody last asked for a round trip
        self._round_at = 0.0

    def __repr__(self) -> str:
        rate = "unknown" if self.rate is None else f"{self.rate:.0f} bytes/s"
        trip = "unknown" if self.round_trip is None else f"{self.round_trip:.6f} s"
        return f"<Meter rate {rate}, round trip {trip}, flight {self.flight}, chunk {self.chunk}>"

    # --- we send ------------------------------------------------------------------------------------------------------

    def handed(self, size: int) -> None:
        """``size`` bytes have left."""
        self._handed += size

    def mark_due(self, queued: int, now: float) -> bool:
        """Whether a mark should go before whatever leaves next, of ``queued`` bytes that wait to be sent."""
        last = self._last
        if last is None and queued < MEASURE_BYTES and self._unasked < MARK_BYTES:
            return False  # asked before every frame
        if last is not None:
            if not queued:
                return True
            since = self._handed - last.handed
            slow = self.rate is None or now - last.at >= MARK_SECONDS
            return since >= MARK_BYTES and slow and not self._marks
        if len(self._marks) >= MARKS_MAX:
            return False
        if queued >= MEASURE_BYTES and (self.rate is None or now >= self._next):
            return True
        if self._unasked < MARK_BYTES or self._marks:
            return False
        self._unasked = 0
        return self.round_trip is None or now >= self._known_at + RATE_SECONDS

    def mark(self, queued: int, now: float) -> int:
        """The number of a mark that leaves now, not 0."""
        self._number = (self._number + 1) % _WRAP or 1
        mark = _Mark(self._number, now, self._handed, self._last is not None)
        self._marks.append(mark)
        self._unasked = 0
        if self.unsent is None:
            self.unsent = 2 * CHUNK_FIRST
        if queued >= MEASURE_BYTES or (queued and self._last is not None):
            self._last = mark
        elif self._last is not None:
            self._last = None
            self._next = now + MEASURE_SECONDS
        return self._number

    def answered(self, number: int, now: float) -> None:
        """The peer's PONG to a mark.  One to something else says nothing."""
        if all(mark.number != number for mark in self._marks):
            return
        while (mark := self._marks.popleft()).number != number:
            self._answered = (mark, mark.at)  # a later answer took the place of this one: no earlier than it was asked
        self._round_trips.append(max(_BRIEFEST, now - mark.at))
        self.round_trip = min(self._round_trips)
        self._known_at = now
        before, self._answered = self._answered, (mark, now)
        if before is None or not mark.after:
            return
        size = mark.handed - before[0].handed
        if size >= MEASURE_BYTES:
            self._rates.append((now, size / max(now - before[1], mark.at - before[0].at, _BRIEFEST)))
            while self._rates[0][0] < now - RATE_SECONDS:
                self._rates.popleft()
            rate = self.rate = max(rate for _, rate in self._rates)
            self.chunk = min(CHUNK_MAX, max(CHUNK_MIN, int(rate * CHUNK_SECONDS) & -4096))
            self.unsent = min(_UNSENT_MAX, max(2 * self.chunk, int(2 * CHUNK_SECONDS * rate)))

    def stalled(self) -> None:
        """The peer takes nothing more for now: what is measured across this pause says nothing of the connection."""
        self._last = None
        self._answered = None
        self._marks.clear()

    def interrupted(self) -> None:
        """The connection is gone; the next one is taken for as good until more is known."""
        self.stalled()
        self._round_trips.clear()
        self.round_trip = None
        self._arrived = self._unasked = 0

    # --- they send ----------------------------------------------------------------------------------------------------

    def arrived(self, size: int, now: float) -> None:
        """``size`` bytes came."""
        self._unasked += size
        trip = self.round_trip
        if trip is None:
            self._round_at = now
            return
        self._arrived += size
        elapsed = now - self._round_at
        if elapsed >= trip:
            self.flight = max(self.flight, int(self._arrived * trip / elapsed))
            self._arrived = 0
            self._round_at = now
