"""Tensors in, safer tensors out, and an honest account of what that cost.

This layer is for everything that makes a released tensor say less about one person: clipping, noise, accounting of
the privacy spent, policies that set floors, measurements of leakage.  It never touches the network and never imports
``splitsec.transports``; the guard in ``splitsec/`` decides when it is asked.

**This release adds no noise.**  Nothing here changes a tensor yet: activations and gradients leave a party exactly as
the segments computed them.  They are encrypted on their way, so nobody outside the graph reads them, but the party that
a cut leads to receives them in full and may learn about the raw data from them.  Do not read privacy towards the
*receiving* party into this version.

Here today: the layer's errors, in ``errors``.  Import it only as ``splitsec.privacy``.
"""

from __future__ import annotations

from splitsec.privacy.errors import BadParameter, BudgetSpent, PrivacyError, Unsupported

__all__ = ["BadParameter", "BudgetSpent", "PrivacyError", "Unsupported"]
