"""A process whose records are not encrypted: what a step costs without, for the ratio of the two.

Here: copying in place of AES-256-GCM, in this process and from now on.  Not an option of anything: it exists so that
``splitsec bench step`` can measure what encryption costs.  Handshakes and everything else stay as they are; a peer that
encrypts cannot read a word of it, so that it is no way to turn encryption off for one side of a channel.
"""

from __future__ import annotations

from typing import Any

from splitsec.transports import record
from splitsec.transports.limits import TAG_SIZE

__all__ = ["stop_encrypting"]


class _Copy:
    """The methods of AESGCM that records use, without a cipher."""

    def encrypt_into(self, nonce: bytes, plain: Any, associated: bytes | None, out: memoryview) -> int:
        out[: len(plain)] = plain
        out[len(plain) :] = bytes(TAG_SIZE)
        return len(out)

    def decrypt_into(self, nonce: bytes, sealed: Any, associated: bytes | None, out: memoryview) -> int:
        out[:] = sealed[: len(out)]
        return len(out)


def stop_encrypting() -> None:
    """Seal and open records by copying them, in sessions that begin from now on."""
    record._cipher = lambda key: _Copy()  # type: ignore[assignment, return-value]
    record._next = lambda cipher: cipher
