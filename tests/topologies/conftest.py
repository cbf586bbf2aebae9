"""Every simulation here starts its parties from a process that has torch loaded: ``warm``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.topologies.warm import Nest


@pytest.fixture(scope="session")
def nest() -> Iterator[Nest]:
    with tempfile.TemporaryDirectory() as place:  # a short path: it is a socket's, too
        nest = Nest(Path(place))
        try:
            yield nest
        finally:
            nest.close()


@pytest.fixture(autouse=True)
def warm(nest: Nest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(nest.launcher))
