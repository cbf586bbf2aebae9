"""What a process does to be a party: errors as plain values, start-up without torch's compiler, an end with its parent.

How whole runs end is in ``tests/processes``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from splitsec.errors import (
    EgressRefused,
    GraphError,
    InternalError,
    PartyFileError,
    PeerError,
    PeerLost,
    SamplesError,
    SplitsecError,
)
from splitsec.process import described, internal
from tests.conftest import PATIENCE, SOURCE, ended


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            PartyFileError("segment 'stem' failed", file="models.py", line=3),
            {"code": "PartyFileError", "text": "models.py:3: segment 'stem' failed", "exit_code": 2, "peer": None},
        ),
        (
            PeerLost("was lost", party="server", fix="look"),
            {"code": "PeerLost", "text": "server: was lost\n  to do: look", "exit_code": 4, "peer": "server"},
        ),
        (
            EgressRefused("NaN", expected="finite"),
            {"code": "EgressRefused", "text": "NaN\n  expected: finite", "exit_code": 3, "peer": None},
        ),
        (
            ZeroDivisionError("division by zero"),
            {
                "code": "InternalError",
                "text": "ZeroDivisionError: division by zero\n"
                "  to do: this is a fault of splitsec: please report it with the lines above",
                "exit_code": 70,
                "peer": None,
            },
        ),
    ],
)
def test_an_error_as_plain_values(error: Exception, expected: dict[str, Any]) -> None:
    found = described(error)
    assert found == {"event": "failed", **expected}
    assert json.loads(json.dumps(found)) == found


def test_exit_codes() -> None:
    """2: you can mend it; 3: we stopped ourselves; 4: another party; 70: our fault."""

    def kinds(kind: type[SplitsecError]) -> list[type[SplitsecError]]:
        return [kind, *(below for one in kind.__subclasses__() for below in kinds(one))]

    codes = {kind.__name__: kind.exit_code for kind in kinds(SplitsecError)}
    assert {codes[kind.__name__] for kind in (GraphError, PartyFileError, SamplesError)} == {2}
    assert codes["EgressRefused"] == codes["UnsafeSegment"] == codes["BudgetSpent"] == 3
    assert {kind.exit_code for kind in kinds(PeerError)} == {4}
    assert isinstance(internal(ValueError()), InternalError) and internal(ValueError()).exit_code == 70
    assert set(codes.values()) == {2, 3, 4, 70}


def run(program: str) -> str:
    end = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert end.returncode == 0, end.stderr
    return end.stdout


def test_start_up_without_the_compiler() -> None:
    """torch imports its compiler (seconds of processor time in every party) on the first use of an optimiser."""
    program = (
        "import sys, torch\n"
        "from splitsec.process import prepare\n"
        "prepare(1)\n"
        "layer = torch.nn.Linear(2, 2)\n"
        "for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):\n"
        "    optimizer = kind(layer.parameters(), lr=0.1)\n"
        "    layer(torch.ones(1, 2)).sum().backward()\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad()\n"
        "    optimizer.load_state_dict(optimizer.state_dict())\n"
        "    print(kind.__name__, 'torch._dynamo' in sys.modules, torch.get_num_threads())\n"
    )
    assert run(program) == "SGD False 1\nAdam False 1\nAdamW False 1\nRMSprop False 1\n"


def start(module: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        start_new_session=True,
    )


@pytest.mark.parametrize("module", ["splitsec.process", "splitsec.relay"])
def test_a_parent_that_is_gone_before_it_says_anything(module: str) -> None:
    """Standard input ends: there is nothing to do and nobody to tell."""
    process = start(module)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    handle = os.pidfd_open(process.pid)
    process.stdin.close()
    try:
        assert ended(handle, PATIENCE)
        assert process.wait() != 0
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()
        os.close(handle)
