"""Faults on purpose: what the test of ``python -m tests.fuzz`` fuzzes, to see that nothing gets lost."""

from __future__ import annotations

import os

SEEDS = (b"harmless", b"harmless, too")


def nothing(data: bytes) -> None:
    """Never fails, and has branches to look at."""
    if data[:1] == b"h":
        assert data


def error(data: bytes) -> None:
    """Fails on some inputs."""
    assert data.count(b"h") < 2, "planted"


def crash(data: bytes) -> None:
    """Takes the process along."""
    if b"too" in data:
        os.abort()


def hang(data: bytes) -> None:
    """Never ends."""
    while b"too" in data:
        pass


def glutton(data: bytes) -> None:
    """Asks for more memory than anything here may have."""
    if b"too" in data:
        bytearray(1 << 40)
