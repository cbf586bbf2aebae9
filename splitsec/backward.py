"""The way back through one segment in two acts: the gradients of its inputs first, those of its weights later.

Here: ``WayBack``, a segment's passes over a run, and ``Pass``, one of them: made at once, or as far as the inputs first
and then the rest.  The party upstream waits for the first act alone; the second, about half of the arithmetic, is done
while that party is at work.  Not here: when each act has its turn (``engine``), what the gradients are for
(``segments``).

How: autograd's graph is walked once, from the losses and outputs down.  The nodes on a way to an input are its *trunk*;
where a trunk node has children that lead to weights alone, a *branch* begins, and what arrives at that node is all that
these weights need.  The first act runs the trunk and keeps what arrives where a branch begins (node pre-hooks); the
second enters there once more (``GradientEdge``) and asks for the weights of that branch alone.  A convolution or matrix
product computes only what is asked for, so nothing is computed twice; a normalisation would do most of its work again,
so its weights are asked for in the first act.

Every number is the same where each weight's gradient is one term.  A weight reached by more than one edge (a module
used twice, shared weights) gets several, added in an order that is autograd's own; nodes of the user's own may compute
everything in one go, with side effects; hooks of weights may count how often they are called.  Such graphs go back at
once.  And before a run relies on two acts, its first batch goes both ways, and every gradient is compared to the last
bit, and every buffer, too: a module that computes its forward again on the way back may change them.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

__all__ = ["Kept", "Pass", "WayBack"]

_log = logging.getLogger("splitsec")

WORTH_IT: Final = 0.003
"""Seconds.  A whole pass that takes less is made at once, where nothing else is asked for: walking the graph and the
calls of the second act cost some tenths of a millisecond, and torch loads half a second's worth of modules for them."""

TRIALS: Final = 2
"""Passes at once before that is decided: the first one also warms up."""

LEAF: Final = "AccumulateGrad"
"""The name of the node that stands for a weight, or for an input."""

IN_ONE_GO: Final = ("NativeBatchNorm", "NativeGroupNorm", "NativeLayerNorm", "CudnnBatchNorm", "MiopenBatchNorm")
"""Beginnings of the names of nodes that sum up for their inputs' gradient what their weights' gradients are."""


class _Branch:
    """The weights that are reached through one trunk node alone, and what arrived there."""

    def __init__(self, node: Node, weights: list[torch.Tensor]) -> None:
        self.node = node
        self.weights = weights
        self._arrived: tuple[torch.Tensor | None, ...] = ()

    def keep(self, gradients: tuple[torch.Tensor | None, ...]) -> None:
        """Node pre-hook: ``gradients`` are those of the node's outputs, added up."""
        self._arrived = gradients

    def run(self, keep_graph: bool) -> None:
        """Add this branch's gradients to its weights' own."""
        edges = [GradientEdge(self.node, place) for place, one in enumerate(self._arrived) if one is not None]
        if edges:
            given = [one for one in self._arrived if one is not None]
            torch.autograd.backward(edges, given, inputs=self.weights, retain_graph=keep_graph)


class Kept:
    """What a pass through a module changes beside gradients: its buffers."""

    def __init__(self, module: nn.Module) -> None:
        self._buffers = [
            (part, [(name, held, None if held is None else held.clone()) for name, held in part._buffers.items()])
            for part in module.modules()
            if part._buffers
        ]

    def now(self) -> list[torch.Tensor | None]:
        """Copies of the buffers as they are now."""
        held = [part._buffers[name] for part, buffers in self._buffers for name, _, _ in buffers]
        return [None if one is None else one.clone() for one in held]

    @torch.no_grad()
    def put_back(self) -> None:
        """Put the buffers back as they were, also those that were exchanged for others.

        By way of ``.data``: a graph that has saved a buffer shall not take it for changed.
        """
        for part, buffers in self._buffers:
            for name, held, before in buffers:
                part._buffers[name] = held
                if held is not None and before is not None:
                    held.data.copy_(before)


class WayBack:
    """The backward passes of one segment, whose ``module`` has all the weights that may get gradients from them.

    ``two_acts``: True, wherever they give what one pass gives; False, never; None, where a pass takes long enough for
    it to matter.  The gradients never depend on it.
    """

    def __init__(self, name: str, module: nn.Module, *, two_acts: bool | None = None) -> None:
        self._name = name
        self._module = module
        self._two_acts = two_acts
        self._proven = False
        self._took: list[float] = []
        self._owed: dict[int, Pass] = {}
        self._next = 0

    @property
    def any_order(self) -> bool:
        """Whether passes may be made in any order, and their weights' gradients are added in the right one still."""
        return bool(self._two_acts) and self._proven

    def go(
        self,
        ends: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        caught: list[torch.Tensor | None],
        *,
        place: int = 0,
    ) -> None:
        """Go back from ``ends`` at least as far as ``inputs``, whose gradients are caught in ``caught`` on the way.

        ``place``: of this pass among those of a step, from 0; the weights' gradients are added in this order.
        """
        way = Pass(ends, inputs)
        if self._two_acts is None and inputs:
            began = time.perf_counter()
            self._at_once(way)
            self._took.append(time.perf_counter() - began)
            if len(self._took) == TRIALS:
                self._two_acts = min(self._took) >= WORTH_IT
        elif not self._two_acts or (not inputs and place <= self._next):
            self._at_once(way)
        elif not self._proven:
            if way.splits():
                self._prove(way, caught)
            else:
                self._at_once(way)
        elif way.splits() or place > self._next:
            way.inputs_first()
            self._owed[place] = way
        else:
            self._at_once(way)

    def _at_once(self, way: Pass) -> None:
        way.at_once()
        self._next += 1

    @property
    def owes(self) -> bool:
        """Whether gradients of weights can be computed that were left for later."""
        return self._next in self._owed

    def some_weights(self) -> None:
        """Compute some of them, of the pass whose turn it is."""
        if not self._owed[self._next].some_weights():
            del self._owed[self._next]
            self._next += 1

    def catch_up(self) -> None:
        """Compute all of them that can be."""
        while self.owes:
            self.some_weights()

    def finish(self) -> None:
        """Compute all of them, at the end of a step."""
        self.catch_up()
        assert not self._owed, "a pass that comes before these was not made"
        self.forget()

    def forget(self) -> None:
        """Leave what is owed, and begin another step."""
        self._owed.clear()
        self._next = 0

    def _prove(self, way: Pass, caught: list[torch.Tensor | None]) -> None:
        """Go ``way`` in two acts, then at once, which is what counts.  Alike: from now on two acts; else never."""
        weights = list(self._module.parameters())
        before = [None if weight.grad is None else weight.grad.clone() for weight in weights]
        kept = Kept(self._module)
        two: list[torch.Tensor | None] = []
        why = "the gradients differ"
        try:
            way.inputs_first()
            way.all_weights(keep_graph=True)
            two = [*caught, *(weight.grad for weight in weights), *kept.now()]
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
        for place in range(len(caught)):
            caught[place] = None
        for weight, gradient in zip(weights, before, strict=True):
            weight.grad = None if gradient is None else gradient.clone()
        kept.put_back()
        self._at_once(way)
        gradients = [*caught, *(weight.grad for weight in weights)]
        one = [*gradients, *kept.now()]
        if not all(gradient is None or bool(torch.isfinite(gradient).all()) for gradient in gradients):
            return  # refused elsewhere, in its own words; it proves nothing
        if not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
            return  # zeros are alike whatever is done to them
        if len(one) == len(two) and all(_same(*pair) for pair in zip(one, two, strict=True)):
            self._proven = True
        else:
            self._two_acts = False
            _log.warning(
                "segment %r goes back in one pass: in two it would not compute the same (%s); "
                "those upstream get their gradients later, and nothing else changes",
                self._name,
                why,
            )


class Pass:
    """One backward pass, from ``ends`` to the weights and the leaves ``inputs``.

    ``ends``: scalars, each with the gradient 1.  ``inputs``: tensors ``[rows, ...]`` that arrived over cuts and require
    gradients; whoever wants those catches them on the way (``segments``).  Use either ``at_once``, or ``inputs_first``
    and then ``some_weights`` until there are none left.
    """

    def __init__(self, ends: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        self._ends = list(ends)
        self._inputs = list(inputs)
        self._early: list[torch.Tensor] = []
        self._early_gradients: Sequence[torch.Tensor | None] = ()
        self._branches: list[_Branch] = []
        self._left: Iterator[None] = iter(())
        self._split = False

    def splits(self) -> bool:
        """Whether the second act can leave out what the first has done.  To be asked before it; walks the graph."""
        found = _branches(self._ends, self._inputs) if self._ends and self._inputs else None
        if found is None:
            return False
        self._branches, self._early = found
        self._split = True
        return True

    def at_once(self) -> None:
        """Everything in one pass."""
        if self._ends:
            torch.autograd.backward(self._ends)

    def inputs_first(self) -> None:
        """The first act: back as far as the inputs.  No weight's gradient changes yet."""
        hooks = [branch.node.register_prehook(branch.keep) for branch in self._branches]
        try:
            asked = [*self._inputs, *self._early]
            gradients = torch.autograd.grad(self._ends, asked, retain_graph=True, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        self._early_gradients = gradients[len(self._inputs) :]
        self._left = self._rest(keep_graph=False)

    def some_weights(self) -> bool:
        """The second act, a piece of it: add the gradients of some more weights; False where there were none left."""
        return next(self._left, self) is None

    def all_weights(self, *, keep_graph: bool = False) -> None:
        """The second act in one piece; ``keep_graph``: the graph can be gone through again."""
        for _ in self._rest(keep_graph):
            pass

    def _rest(self, keep_graph: bool) -> Iterator[None]:
        with torch.no_grad():
            for weight, gradient in zip(self._early, self._early_gradients, strict=True):
                if gradient is None:
                    continue
                if weight.grad is None:
                    weight.grad = gradient
                else:
                    weight.grad += gradient
        if not self._split:
            torch.autograd.backward(self._ends, retain_graph=keep_graph)
        for branch in self._branches:
            branch.run(keep_graph)
            yield
        if not keep_graph:  # all that was kept for the weights goes with the graph
            self._ends, self._inputs, self._branches, self._early = [], [], [], []
            self._early_gradients = ()


def _branches(
    ends: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> tuple[list[_Branch], list[torch.Tensor]] | None:
    """The branches from the last to the first, and the weights that belong to the first act; None: not in two acts."""
    roots = [end.grad_fn for end in ends]
    if any(root is None for root in roots):
        return None
    children = _walk([root for root in roots if root is not None])
    reached = Counter(id(child) for below in children.values() for child in below)
    weights = {id(node): _variable(node) for node in children if node.name().endswith(LEAF)}
    arriving = {id(tensor) for tensor in inputs}
    trunk: set[int] = set()
    for node, below in reversed(children.items()):  # children stand after their parents
        if any(id(child) in trunk for child in below) or id(weights.get(id(node))) in arriving:
            trunk.add(id(node))
    if any(id(root) not in trunk for root in roots) or any(
        count > 1 and node not in trunk for node, count in reached.items()
    ):
        return None
    branches: list[_Branch] = []
    early: list[torch.Tensor] = []
    for node, below in children.items():
        if id(node) not in trunk:
            continue
        led_to = [
            weight for child in below if id(child) not in trunk for weight in _weights_below(child, children, weights)
        ]
        if not led_to:
            continue
        if issubclass(type(node), BackwardCFunction) or any(_watched(weight) for weight in led_to):
            return None
        direct = all(id(child) in weights for child in below if id(child) not in trunk)
        if direct and node.name().startswith(IN_ONE_GO):
            early += led_to
        else:
            branches.append(_Branch(node, led_to))
    return branches, early


def _walk(roots: Sequence[Node]) -> dict[Node, list[Node]]:
    """Every node below ``roots`` with its children, parents before children.  The nodes are kept: their identity is
    that of Python objects, which torch makes anew where nobody holds them.
    """
    found: dict[Node, list[Node]] = {}
    after: list[Node] = []
    stack: list[tuple[Node, Iterator[Node]]] = []

    def enter(node: Node) -> None:
        if node not in found:
            found[node] = [child for child, _ in node.next_functions if child is not None]
            stack.append((node, iter(found[node])))

    for root in roots:
        enter(root)
        while stack:
            node, left = stack[-1]
            child = next(left, None)
            if child is None:
                after.append(node)
                stack.pop()
            else:
                enter(child)
    return {node: found[node] for node in reversed(after)}


def _weights_below(
    node: Node, children: dict[Node, list[Node]], weights: dict[int, torch.Tensor]
) -> Iterator[torch.Tensor]:
    """The weights that ``node``, off the trunk, leads to.  Each is reached by one edge, so that none comes twice."""
    seen = {id(node)}
    stack = [node]
    while stack:
        one = stack.pop()
        if id(one) in weights:
            yield weights[id(one)]
        for child in children[one]:
            if id(child) not in seen:
                seen.add(id(child))
                stack.append(child)


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _variable(node: Any) -> torch.Tensor:
    found: torch.Tensor = node.variable
    return found


def _watched(weight: torch.Tensor) -> bool:
    """Whether somebody is told of the weight's gradient, who may count how often."""
    return bool(getattr(weight, "_post_accumulate_grad_hooks", None) or getattr(weight, "_backward_hooks", None))
