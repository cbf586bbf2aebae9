"""Tensors in, safer tensors out, and an honest account of what that cost.

This layer makes a released tensor say less about one person: clipping and noise (``mechanism``, with randomness from
``randomness``), accounting of the privacy spent (``accounting``, kept in ``ledger``), floors and policies
(``policy``), measurements of leakage (``leakage``), private training of a segment's weights (``dpsgd``).  It never
touches the network and never imports ``splitsec.transports``; the guard in ``splitsec/`` decides when it is asked.

Import it only as ``splitsec.privacy``, and its files by name: this package itself loads no torch.
"""

from __future__ import annotations

from splitsec.privacy.errors import BadParameter, BudgetSpent, PrivacyError, Unsupported

__all__ = ["BadParameter", "BudgetSpent", "PrivacyError", "Unsupported"]
