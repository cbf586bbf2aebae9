"""Every registered transport passes the published suite; and the suite notices a transport that does not."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from splitsec.transports.testing import TransportConformance

_numbers = itertools.count()


class TestMemory(TransportConformance):
    def address(self) -> str:
        return f"memory://conformance-{next(_numbers)}"


class TestTcp(TransportConformance):
    def address(self) -> str:
        return "tcp://127.0.0.1:*"


class TestIpc(TransportConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def address(self) -> str:
        return f"ipc://{self.folder}/{next(_numbers)}.sock"
