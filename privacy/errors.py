"""What can go wrong in the privacy layer.

Here: one tree, with no party names and no files in it, since this layer knows neither.  ``splitsec/errors.py`` maps it
to what a user reads: ``BadParameter`` and ``Unsupported`` to a mistake in a file, ``BudgetSpent`` to a refusal.
"""

from __future__ import annotations

__all__ = ["BadParameter", "BudgetSpent", "LedgerError", "PrivacyError", "Unsupported"]


class PrivacyError(Exception):
    """Base of every error that this layer raises on purpose."""


class BadParameter(PrivacyError):
    """A parameter for which no promise holds: a negative clip norm, say, or a delta outside (0, 1)."""


class Unsupported(PrivacyError):
    """A combination for which no promise is known here: refused instead of guessed."""


class BudgetSpent(PrivacyError):
    """The release would pass the budget.  Nothing was released."""


class LedgerError(PrivacyError):
    """A ledger that cannot be used: in use elsewhere, no ledger, damaged, or not written to the disk for certain."""
