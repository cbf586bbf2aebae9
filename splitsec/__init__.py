"""splitsec: train one neural network across institutions that do not pool their data.

Here: the names that other people's programs use, loaded when they are first asked for, so that a process which only
moves bytes (``import splitsec.transports``) never loads torch.  docs/api.md shows each in use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Folder": "partyfile",
    "Graph": "graph",
    "Job": "party",
    "Line": "messaging",
    "PartyFile": "partyfile",
    "Result": "simulation",
    "SplitsecError": "errors",
    "load_folder": "partyfile",
    "load_graph": "graph",
    "load_party": "partyfile",
    "open_line": "messaging",
    "predict": "simulation",
    "read_key": "identity",
    "run_party": "party",
    "simulate": "simulation",
}

__all__ = [
    "Folder",
    "Graph",
    "Job",
    "Line",
    "PartyFile",
    "Result",
    "SplitsecError",
    "__version__",
    "load_folder",
    "load_graph",
    "load_party",
    "open_line",
    "predict",
    "read_key",
    "run_party",
    "simulate",
]

if TYPE_CHECKING:
    from splitsec.errors import SplitsecError
    from splitsec.graph import Graph, load_graph
    from splitsec.identity import read_key
    from splitsec.messaging import Line, open_line
    from splitsec.party import Job, run_party
    from splitsec.partyfile import Folder, PartyFile, load_folder, load_party
    from splitsec.simulation import Result, predict, simulate


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"splitsec.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'splitsec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
