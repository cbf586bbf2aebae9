"""The three segments of the vertical example: one for each institution's columns, and one that joins them."""

from __future__ import annotations

from torch import nn


def columns() -> nn.Module:
    """At the hospital, and with weights of its own at the laboratory: 15 measurements ``[n, 15]`` to ``[n, 16]``."""
    return nn.Sequential(nn.Linear(15, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())


def diagnosis() -> nn.Module:
    """At the registry. Both institutions' activations side by side ``[n, 32]`` to one logit ``[n, 1]``: malignant?"""
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))
