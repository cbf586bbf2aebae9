"""An optimizer that torch does not have, with every kind of state: a whole number, a number, and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Careful(torch.optim.Optimizer):
    """Momentum in double precision; the rate falls with the steps taken, and no step is longer than the longest yet."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
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
