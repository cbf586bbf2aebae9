"""An optimizer that torch does not have, with every kind of state: whole numbers, numbers, double-precision tensors,
and a setting that it changes itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Careful(torch.optim.Optimizer):
    """Momentum in double precision; rate and length of steps fall with the steps taken."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["lr"] *= 0.99
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state: dict[str, Any] = self.state[parameter]
                if not state:
                    state.update(count=0, longest=0.0, sum=torch.zeros_like(parameter, dtype=torch.float64))
                state["count"] += 1
                state["sum"].mul_(group["decay"]).add_(parameter.grad)
                length = float(state["sum"].norm())
                state["longest"] = max(state["longest"] * 0.99, min(length, 1.0))
                scale = min(1.0, state["longest"] / (length + 1e-12)) / state["count"] ** 0.5
                parameter.add_((state["sum"] * (-group["lr"] * scale)).to(parameter.dtype))
