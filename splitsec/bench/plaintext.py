"""A process whose records are not encrypted: what a step costs without, for the ratio of the two.

Here: copying in place of AES-256-GCM, in this process and from now on.  Not an option of anything: it exists so that
``splitsec bench step`` can measure what encryption costs, and refuses in any process that this command did not start.
Handshakes and everything else stay as they are.
"""

from __future__ import annotations

import os
from typing import Any, Final

from splitsec.errors import UserError
from splitsec.transports import record
from splitsec.transports.limits import TAG_SIZE

__all__ = ["MEASURING", "stop_encrypting"]

MEASURING: Final = "SPLITSEC_BENCH_PLAINTEXT"
"""Environment variable that ``splitsec bench step`` sets for its own processes: the process id of the command."""


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
    """Seal and open records by copying them, in sessions that begin from now on.  Raises ``UserError`` elsewhere."""
    if os.environ.get(MEASURING) not in _ancestors():
        raise UserError(
            "a party without encryption",
            expected="a measurement of `splitsec bench step`, which alone starts such parties",
            fix="remove `plaintext` from the party file",
        )
    record._cipher = lambda key: _Copy()  # type: ignore[assignment, return-value]
    record._next = lambda cipher: cipher


def _ancestors() -> list[str]:
    """The process ids of whoever started this process, and so on (Linux; elsewhere of the next one alone)."""
    found, pid = [], os.getppid()
    while pid > 1:
        found.append(str(pid))
        try:
            with open(f"/proc/{pid}/stat") as file:
                pid = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            break
    return found
