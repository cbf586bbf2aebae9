"""Every simulation here forks its parties from one warm process (``splitsec.nest``), so that dozens take minutes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from splitsec import simulation
from splitsec.nest import Nest


@pytest.fixture(scope="session")
def nest() -> Iterator[Nest]:
    with Nest(["opacus.grad_sample"]) as nest:
        yield nest


@pytest.fixture(autouse=True)
def warm(nest: Nest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "open_nest", lambda load=(): nullcontext(nest))
