"""The errors a user of splitsec can meet, and whose fault each one is.

Here: one tree, its exit codes, and the mapping from the two lower layers' trees.  Not here: wording of single errors,
which stands where the mistake is noticed.  Every error says what was seen, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = [
    "BelowFloor",
    "BudgetSpent",
    "EgressRefused",
    "GraphError",
    "InternalError",
    "KeyFileError",
    "LedgerError",
    "PartyFailed",
    "PartyFileError",
    "PeerError",
    "PeerLost",
    "PeerMisbehaved",
    "PeerRefusedUs",
    "PeerUnreachable",
    "Refusal",
    "SamplesError",
    "SplitsecError",
    "SuspectedAttack",
    "UnsafeSegment",
    "UserError",
]


class SplitsecError(Exception):
    """Base of every error that splitsec raises on purpose.

    ``seen``: what was found.  ``expected``: what should have been there.  ``fix``: what the reader can do next.
    """

    exit_code = 70

    def __init__(self, seen: str, *, expected: str = "", fix: str = "") -> None:
        self.seen = seen
        self.expected = expected
        self.fix = fix
        super().__init__(seen)

    @property
    def code(self) -> str:
        """Stable name of the kind of error, e.g. ``GraphError``; docs/errors.md has a section for each."""
        return type(self).__name__

    def where(self) -> str:
        """File and line, or the peer, that the message starts with; empty where there is none."""
        return ""

    def __str__(self) -> str:
        where = self.where()
        text = f"{where}: {self.seen}" if where else self.seen
        if self.expected:
            text += f"\n  expected: {self.expected}"
        if self.fix:
            text += f"\n  to do: {self.fix}"
        return text


class UserError(SplitsecError):
    """A mistake that the person at the keyboard can mend."""

    exit_code = 2


class _FileError(UserError):
    def __init__(
        self, seen: str, *, file: str | Path | None = None, line: int | None = None, expected: str = "", fix: str = ""
    ) -> None:
        self.file = str(file) if file is not None else None
        self.line = line
        super().__init__(seen, expected=expected, fix=fix)

    def where(self) -> str:
        if self.file is None:
            return ""
        return self.file if self.line is None else f"{self.file}:{self.line}"


class GraphError(_FileError):
    """The graph file cannot be used as it stands."""


class PartyFileError(_FileError):
    """A party file, or something that it names, cannot be used as it stands."""


class KeyFileError(_FileError):
    """A private key file is missing, too widely readable, or not what it says."""


class LedgerError(UserError):
    """A party's ledger or journal cannot be used: it is none, in use elsewhere, damaged, or cannot be written."""


class SamplesError(UserError):
    """A party's samples do not fit: ids missing, duplicated or not shared, fields of unequal length."""


class Refusal(SplitsecError):
    """We stopped ourselves: going on would have broken a promise."""

    exit_code = 3


class BelowFloor(Refusal):
    """The party's own policy is less strict than what the graph demands of everybody."""


class BudgetSpent(Refusal):
    """A release would pass the privacy budget."""


class EgressRefused(Refusal):
    """The guard did not let a tensor out: the graph does not declare it so."""


class UnsafeSegment(Refusal):
    """A segment does something that its cut's promises do not allow."""


class SuspectedAttack(Refusal):
    """What comes back from another party looks like an attack on our samples: we stopped before anything more left.

    Not a ``PeerError``: nobody is proven to have done wrong.  ``detector`` noticed it in what ``party`` sent over
    ``cut`` in the training step numbered ``batch`` of ours, from 1.  ``evidence``: the numbers behind it.
    """

    def __init__(
        self,
        seen: str,
        *,
        detector: str,
        cut: str,
        party: str,
        batch: int,
        evidence: Mapping[str, float],
        expected: str = "",
        fix: str = "",
    ) -> None:
        self.detector = detector
        self.cut = cut
        self.party = party
        self.batch = batch
        self.evidence = dict(evidence)
        super().__init__(seen, expected=expected, fix=fix)


class PeerError(SplitsecError):
    """Another party did something, or stopped doing anything."""

    exit_code = 4

    def __init__(self, seen: str, *, party: str, expected: str = "", fix: str = "") -> None:
        self.party = party
        super().__init__(seen, expected=expected, fix=fix)

    def where(self) -> str:
        return self.party


class PeerUnreachable(PeerError):
    """The party never came up within the time that the graph allows."""


class PeerLost(PeerError):
    """The party was there and is not any more."""


class PeerRefusedUs(PeerError):
    """The party's side turned our handshake down."""


class PeerMisbehaved(PeerError):
    """The party sent what the contract does not allow."""


class PartyFailed(SplitsecError):
    """A party of a simulation failed; carries that party's own message and exit code."""

    def __init__(self, party: str, text: str, *, exit_code: int, kind: str) -> None:
        self.party = party
        self.exit_code = exit_code
        self.kind = kind
        super().__init__(f"party {party} failed ({kind}): {text}")


class InternalError(SplitsecError):
    """A fault of splitsec itself."""

    exit_code = 70
