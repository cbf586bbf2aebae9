"""A segment at work: its module, optimiser and loss; forward now, backward when the gradients of its cuts come.

Here: one micro-batch through one module, and the state that is saved or handed on.  Every input begins a
new autograd graph, also when it comes from another segment of the same party, so that one rule holds for every edge.
Not here: when and with whose tensors (``engine``), where models come from (``partyfile``).
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import nn

from splitsec.backward import Kept, WayBack
from splitsec.codecs import check_source
from splitsec.errors import PartyFileError, PeerMisbehaved, UnsafeSegment
from splitsec.graph import CUSTOM, LOSSES, Graph
from splitsec.messages import finite
from splitsec.partyfile import PartyFile
from splitsec.plan import Edge, Stage
from splitsec.privacy.dpsgd import PrivateTraining
from splitsec.privacy.errors import PrivacyError
from splitsec.privacy.leakage import nopeek_term
from splitsec.privacy.randomness import KeystreamSource
from splitsec.samples import seed_of
from splitsec.usercode import user_code
from splitsec.yamlfile import meant

__all__ = ["Score", "Segment", "batch_statistics", "build_segments", "join_inputs", "output_of"]

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

IGNORED: Final = -100
"""The label of samples that torch's own losses leave out."""


def _correct(loss: str | None, output: torch.Tensor, labels: torch.Tensor) -> int | None:
    """How many of a batch are classified right, or None where the loss is no classification's."""
    if loss in ("cross_entropy", "nll") and output.dim() >= 2 and labels.dim() == output.dim() - 1:
        hits = output.argmax(1) == labels
    elif loss in ("bce_with_logits", "bce") and output.shape == labels.shape:
        threshold = 0.0 if loss == "bce_with_logits" else 0.5
        hits = (output > threshold) == (labels > 0.5)
    else:
        return None
    return int(hits.flatten(1).all(1).sum()) if hits.dim() > 1 else int(hits.sum())


def _check_classes(loss: str | None, produced: Any, labels: torch.Tensor, edge: Edge) -> None:
    """Raise ``PeerMisbehaved`` where another party's labels are none of the classes that the segment tells apart."""
    if loss not in ("cross_entropy", "nll") or labels.dtype != torch.int64 or not isinstance(produced, torch.Tensor):
        return
    classes = produced.shape[1] if produced.dim() >= 2 else 0
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
    if classes and bool(wrong.any()):
        raise PeerMisbehaved(
            f"sent the label {int(labels[wrong][0])} for {edge.target!r}",
            party=edge.source_party,
            expected=f"classes from 0 to {classes - 1}",
            fix="make labels and the last layer agree",
        )


@dataclass
class Score:
    """Sums over samples at one segment with a loss; ``correct`` is None where accuracy has no meaning."""

    loss: float = 0.0
    correct: int | None = 0
    rows: int = 0

    def add(self, loss: float, correct: int | None, rows: int) -> None:
        """Count one micro-batch of ``rows`` samples with mean loss ``loss``."""
        self.loss += loss * rows
        self.correct = None if self.correct is None or correct is None else self.correct + correct
        self.rows += rows


class _Arrived(torch.autograd.Function):
    """An input as the module sees it; on the way back it keeps the gradient as autograd made it.

    A leaf's ``.grad`` would not do: autograd lays it out in memory like the leaf, and the next kernel on the way back
    would then add up in another order than in one process.  Nor may a module change a leaf in place, as
    ``ReLU(inplace=True)`` does.
    """

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, kept: list[torch.Tensor | None], place: int) -> torch.Tensor:
        ctx.kept, ctx.place = kept, place
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        ctx.kept[ctx.place] = gradient
        return None, None, None


_arrived = cast("Callable[[torch.Tensor, list[torch.Tensor | None], int], torch.Tensor]", _Arrived.apply)


@dataclass
class _InFlight:
    gradients: list[torch.Tensor | None]
    leaves: list[torch.Tensor] = field(default_factory=list)
    outputs: dict[Edge, torch.Tensor] = field(default_factory=dict)
    losses: list[torch.Tensor] = field(default_factory=list)


class Segment:
    """One module with its optimiser.  Forward and backward each go through the micro-batches of a step in order.

    After ``hold`` a step can be undone: ``forget`` then takes the place of ``step``, and the next begins where it did.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        loss: LossFunction | None = None,
        loss_name: str | None = None,
        seed: int = 0,
        nopeek: float | None = None,
        private: PrivateTraining | None = None,
        early_gradient: bool | None = None,
    ) -> None:
        self.name = name
        self.module = module
        two_acts = False if private is not None else early_gradient  # opacus computes as the whole pass goes by
        self._has_buffers = next(module.buffers(), None) is not None
        self.way_back = WayBack(name, module, two_acts=two_acts)
        self.nopeek = nopeek
        self.private = private
        self._step_rows = 0
        self.optimizer = optimizer
        self.loss = loss
        self.loss_name = loss_name
        self.seed = seed
        self.score = Score()
        self._of_step: dict[int, tuple[float, int | None, int]] = {}
        self._kept: Kept | None = None
        self._in_flight: dict[int, _InFlight] = {}

    # --- one micro-batch

    def forward(
        self,
        stage: Stage,
        inputs: Sequence[torch.Tensor],
        labels: torch.Tensor | None,
        *,
        micro: int,
        update: int | None,
        share: float,
    ) -> tuple[dict[Edge, torch.Tensor], torch.Tensor | None]:
        """Send one micro-batch through the module.

        ``inputs``: one tensor ``[rows, ...]`` for each edge of ``stage.inputs`` in order, then the data field if the
        stage reads one.  ``update``: number of the optimiser update this counts for, or None to look without
        training.  ``share``: rows of the micro-batch over rows of the step, what its mean loss weighs.  Returns the
        output tensor for each outgoing edge, detached, and the whole output where the segment has a loss (a
        prediction).
        """
        training = update is not None
        self.module.train(training)
        if self._has_buffers:
            self.way_back.catch_up()  # what a forward writes into may be needed on the way back of the one before
        with torch.set_grad_enabled(training):
            leaves = [tensor.detach() for tensor in inputs]
            flight = _InFlight([None] * len(stage.inputs))
            if training:
                assert update is not None
                torch.default_generator.manual_seed(seed_of("forward", self.seed, self.name, update, micro))
                self._step_rows = round(len(inputs[0]) / share)
                for place in range(len(stage.inputs)):
                    if leaves[place].is_floating_point():
                        flight.leaves.append(leaves[place].requires_grad_())
                        leaves[place] = _arrived(leaves[place], flight.gradients, place)
            with user_code(f"segment {self.name!r}"), self._private():
                produced = self.module(*join_inputs(stage.join, leaves))
            for edge in stage.outputs:
                flight.outputs[edge] = output_of(self.name, produced, edge)
                check_source(edge, flight.outputs[edge])
            if labels is not None and self.loss is not None:
                if stage.labels is not None and not stage.labels.local:
                    _check_classes(self.loss_name, produced, labels, stage.labels)
                with user_code(f"the loss of segment {self.name!r}"):
                    loss = self.loss(produced, labels)
                correct = _correct(self.loss_name, produced.detach(), labels)
                if training:
                    self._of_step[micro] = (float(loss.detach()), correct, len(labels))
                    weight = stage.loss_weight * share
                    flight.losses.append(loss if weight == 1.0 else loss * weight)
                else:
                    self.score.add(float(loss.detach()), correct, len(labels))
            if training and self.nopeek is not None and stage.reads is not None:
                leaves_here = [tensor for edge, tensor in flight.outputs.items() if not edge.local]
                flight.losses += [self.nopeek * share * nopeek_term(inputs[-1], tensor) for tensor in leaves_here]
        if training:
            self._in_flight[micro] = flight
        prediction = produced.detach() if stage.labels is not None and isinstance(produced, torch.Tensor) else None
        shared = Counter(map(id, flight.outputs.values()))
        return {
            # What also goes elsewhere must not be changed here while it is still being sent.
            edge: tensor.detach().clone() if edge.local and shared[id(tensor)] > 1 else tensor.detach()
            for edge, tensor in flight.outputs.items()
        }, prediction

    def backward(
        self, stage: Stage, gradients: Mapping[Edge, torch.Tensor | None], *, micro: int, place: int = 0
    ) -> list[torch.Tensor | None]:
        """Go backward through micro-batch ``micro`` with the gradient of every outgoing edge (None: nothing came back).

        Returns the gradient of each incoming edge, None where the edge carries no floats.  The parameters' gradients
        are added to now, or as ``way_back`` owes them.  ``place``: of the micro-batch among those of the step that this
        segment goes through.
        """
        flight = self._in_flight.pop(micro)
        roots: list[torch.Tensor] = []
        seeds: list[torch.Tensor] = []
        summed: dict[int, int] = {}
        # A tensor that feeds several edges gets their gradients added last consumer first, which is autograd's own
        # order.
        for edge, output in reversed(flight.outputs.items()):
            gradient = gradients[edge]
            if gradient is None or not output.requires_grad:
                continue
            earlier = summed.get(id(output))
            if earlier is None:
                summed[id(output)] = len(roots)
                roots.append(output)
                seeds.append(gradient)
            else:
                seeds[earlier] = seeds[earlier] + gradient
        ends = [_Seed.apply(seeds, *roots)] if roots else []  # type: ignore[no-untyped-call]
        ends += [loss for loss in flight.losses if loss.requires_grad]
        self.way_back.go(ends, flight.leaves, flight.gradients, place=place)
        return flight.gradients

    @property
    def any_order(self) -> bool:
        """Whether micro-batches of a step may be taken as they come, with the same result: no state but the weights."""
        return self.way_back.any_order and not self._has_buffers

    def hold(self) -> None:
        """From here on the step may come to nothing: keep what its forwards will change, until ``step`` or ``forget``.

        Buffers; what a module keeps elsewhere is not put back, as it is not handed on.
        """
        self._kept = Kept(self.module)

    def forget(self) -> None:
        """Be as if the step that ``hold`` began had not been: no gradients, no score, and buffers as they were."""
        assert self._kept is not None, "hold first"
        self._kept.put_back()
        self._kept = None
        self._of_step.clear()
        self._in_flight.clear()
        self.way_back.forget()
        if self.private is not None:
            self.private.forget()
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    @property
    def step_loss(self) -> float | None:
        """Mean loss over the samples of the training step under way, before its weight; None where there is none."""
        score = Score()
        for _, one in sorted(self._of_step.items()):  # in the order of micro-batches, in whatever order they came
            score.add(*one)
        return score.loss / score.rows if score.rows else None

    def step(self) -> None:
        """Apply the gradients gathered over the step's micro-batches, and forget them."""
        self._kept = None
        for _, one in sorted(self._of_step.items()):
            self.score.add(*one)
        self._of_step.clear()
        self.way_back.finish()
        if self.private is not None:
            with self._private():
                self.private.privatise(self._step_rows)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    @contextmanager
    def _private(self) -> Iterator[None]:
        """What private training cannot promise, in words that name the segment."""
        try:
            yield
        except PrivacyError as error:
            raise UnsafeSegment(
                f"segment {self.name!r} with dp_sgd: {error}",
                expected="gradients that are each one sample's own (docs/dp-sgd.md)",
                fix="change the module as the message says, or remove `dp_sgd` from the party file",
            ) from error

    def loss_of(self, micro: int) -> float:
        """Mean loss over the samples of a micro-batch of the training step under way, before its weight."""
        return self._of_step[micro][0]

    def take_score(self) -> Score:
        """The sums since the last call."""
        score, self.score = self.score, Score()
        return score

    # --- state

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name, as ``nn.Module.state_dict``; copies."""
        return {name: tensor.detach().clone().contiguous() for name, tensor in self.module.state_dict().items()}

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take over parameters and buffers.  Names, shapes and dtypes must be the module's own; raises
        ``ValueError``.
        """
        own = self.module.state_dict()
        if set(own) != set(weights):
            missing, foreign = sorted(set(own) - set(weights)), len(set(weights) - set(own))
            raise ValueError(
                f"{foreign} tensors that the module has not, and without {', '.join(missing) or 'none'} of its own"
            )
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape or tensor.dtype != weights[name].dtype:
                raise ValueError(
                    f"{name} is {list(weights[name].shape)} {weights[name].dtype}, "
                    f"here {list(tensor.shape)} {tensor.dtype}"
                )
        self.module.load_state_dict(dict(weights))

    def hand_on(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that the next member needs to go on: weights, buffers and optimiser state, as tensors and plain
        numbers.
        """
        tensors = {f"weights/{name}": tensor for name, tensor in self.weights().items()}
        plain: dict[str, Any] = {}
        if self.optimizer is not None:
            for index, state in self.optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor):
                        tensors[f"optimizer/{index}/{name}"] = value.detach().clone()
                    elif value is None or isinstance(value, bool | int | float):
                        plain[f"{index}/{name}"] = value
                    else:
                        raise PartyFileError(
                            f"the optimizer of segment {self.name!r} keeps {name!r} as {type(value).__name__}",
                            expected="state made of tensors and numbers, which can be handed to the next member",
                            fix="use another optimizer, or a group with `schedule: parallel`",
                        )
            for index, group in enumerate(self.optimizer.param_groups):
                for name, value in group.items():  # settings that it changes as it goes, as some do with their rate
                    if type(value) in (int, float) and value != self.optimizer.defaults.get(name):
                        plain[f"group/{index}/{name}"] = value
        return tensors, plain

    def take_over(self, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
        """Go on from what another member handed on.  Raises ``ValueError``, with nothing changed, if it does not fit.

        It is tried on a copy first, with a step of no gradient: an optimizer believes whatever state it is given.
        """
        if not all(name.startswith(("weights/", "optimizer/")) for name in tensors):
            raise ValueError("tensors that are neither weights nor optimizer state")
        if not all(
            value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in plain.values()
        ):
            raise ValueError("optimizer state that is no number")
        trial = Segment(self.name, *copy.deepcopy((self.module, self.optimizer)))
        try:
            trial._adopt({name: tensor.clone() for name, tensor in tensors.items()}, plain)
            if trial.optimizer is not None:
                for parameter in trial.module.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                trial.optimizer.step()
        except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"optimizer state that it cannot step with ({type(error).__name__})") from error
        if not all(map(finite, trial.weights().values())):
            raise ValueError("optimizer state that makes weights infinite")
        self._adopt(tensors, plain)

    def _adopt(self, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
        self.load_weights(
            {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
        )
        if self.optimizer is None:
            return
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        state: dict[int, dict[str, Any]] = {}
        for place, value in [*tensors.items(), *((f"optimizer/{name}", value) for name, value in plain.items())]:
            if not place.startswith("optimizer/"):
                continue
            _, index_text, name = place.split("/", 2)
            if index_text == "group":
                index_text, _, name = name.partition("/")
                if not index_text.isdecimal() or int(index_text) >= len(groups) or type(value) not in (int, float):
                    raise ValueError(f"optimizer setting {name} of parameter group {index_text}")
                if type(groups[int(index_text)].get(name)) not in (int, float):
                    raise ValueError(f"optimizer setting {name}, which is no number here")
                groups[int(index_text)][name] = value
                continue
            if not index_text.isdecimal() or int(index_text) >= len(parameters):
                raise ValueError(f"optimizer state for parameter {index_text} of {len(parameters)}")
            if isinstance(value, torch.Tensor) and value.numel() > max(1, parameters[int(index_text)].numel()):
                raise ValueError(f"optimizer state {name} is {list(value.shape)}")
            state.setdefault(int(index_text), {})[name] = value
        # Not by load_state_dict, which rounds state that is kept in another precision to the parameter's dtype.
        self.optimizer.state.clear()
        for index, entries in state.items():
            self.optimizer.state[parameters[index]] = entries


class _Seed(torch.autograd.Function):
    """Ends a segment's autograd graph: whoever goes backward from its result gives the outputs the gradients it holds.

    ``torch.autograd.backward(outputs, gradients)`` would do the same, after importing torch's symbolic shapes to
    compare two sizes that the guard has compared already (half a second in every party).
    """

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[torch.Tensor], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        return None, *ctx.gradients


def join_inputs(join: str, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The arguments of a module: its inputs joined along dimension 1, summed, averaged, or one by one."""
    if len(inputs) == 1 or join == "arguments":
        return inputs
    if join == "concat":
        return [torch.cat(list(inputs), 1)]
    total = inputs[0]
    for tensor in inputs[1:]:
        total = total + tensor
    return [total if join == "sum" else total / len(inputs)]


def output_of(segment: str, produced: Any, edge: Edge) -> torch.Tensor:
    """The tensor that ``edge`` carries, out of what the module returned: a tensor, or a dict of several by name."""
    chosen = produced
    if isinstance(produced, Mapping):
        if edge.output is None or edge.output not in produced:
            raise PartyFileError(
                f"segment {segment!r} returns a dict with {', '.join(map(repr, produced))}; "
                f"its cut to {edge.target!r} asks for "
                f"{'no output by name' if edge.output is None else repr(edge.output)}",
                expected="`output:` of the cut to name one of them",
            )
        chosen = produced[edge.output]
    elif edge.output is not None:
        raise PartyFileError(
            f"segment {segment!r} returns {type(produced).__name__}; "
            f"its cut to {edge.target!r} asks for output {edge.output!r}",
            expected="a dict with that name",
        )
    if not isinstance(chosen, torch.Tensor):
        raise PartyFileError(
            f"segment {segment!r} returns {type(chosen).__name__} for its cut to {edge.target!r}", expected="a tensor"
        )
    return chosen


def make_optimizer(party_file: PartyFile, segment: str, module: nn.Module) -> torch.optim.Optimizer | None:
    """The optimiser that the party file names for ``segment``; None if the module has nothing to train."""
    wanted = party_file.segments[segment].optimizer
    where = ("segments", segment, "optimizer")
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        return None
    kinds: dict[str, Callable[..., Any]] = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    kind = party_file.function(wanted.name, *where) if ":" in wanted.name else kinds.get(wanted.name)
    if kind is None:
        raise party_file.error(
            f"no optimizer `{wanted.name}`",
            *where,
            expected="one of " + ", ".join(sorted(kinds)) + ', or "module:Class"',
            fix=meant(wanted.name, kinds),
        )
    try:
        made = kind(parameters, **wanted.arguments)
    except (TypeError, ValueError) as error:
        raise party_file.error(
            f"optimizer `{wanted.name}`: {error}",
            *where,
            expected="settings that it takes",
            fix="look them up in torch.optim; the rate is called `lr`",
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise party_file.error(
            f"`{wanted.name}` made {type(made).__name__}", *where, expected="a torch.optim.Optimizer"
        )
    return made


def make_loss(graph: Graph, party_file: PartyFile, segment: str) -> LossFunction | None:
    """The loss that the graph names for ``segment`` (mean over the batch), or the party's own where it says
    ``custom``.
    """
    name = graph.segments[segment].loss
    if name is None:
        return None
    if name != CUSTOM:
        standard: LossFunction = getattr(nn, LOSSES[name].torch_class)()
        return standard
    code = party_file.segments[segment]
    assert code.loss is not None, "checked with the party file"
    function = party_file.function(code.loss, "segments", segment, "loss")
    with user_code(f"loss `{code.loss}`"):
        return _partial(function, code.loss_args)


def _partial(function: Callable[..., Any], settings: Mapping[str, Any]) -> LossFunction:
    if inspect.isclass(function):  # an nn.Module's class, say
        return cast("LossFunction", function(**settings))
    return functools.partial(function, **settings) if settings else function


def batch_statistics(module: nn.Module) -> str | None:
    """What in ``module`` looks at the whole batch, with its place; None where every sample is treated by itself."""
    for place, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            return f"{type(part).__name__} at {place or 'its top'}"
    return None


def check_slices(graph: Graph, party_file: PartyFile, segment: str, module: nn.Module) -> None:
    """Raise ``PartyFileError`` where micro-batches would change what ``module`` computes."""
    if graph.training.micro_batches > 1 and (found := batch_statistics(module)) is not None:
        raise party_file.error(
            f"segment {segment!r} has {found}, and the graph has `micro_batches: {graph.training.micro_batches}`",
            "segments",
            segment,
            "model",
            expected="modules that treat every sample by itself: statistics of a slice are not those of the batch",
            fix="use nn.GroupNorm or nn.LayerNorm in its place, or write `micro_batches: 1` in the graph file (the "
            "gradient of the cut is sent early also then)",
        )


def make_private(graph: Graph, party_file: PartyFile, segment: str, module: nn.Module) -> PrivateTraining | None:
    """DP-SGD for ``segment``'s weights, where the party file asks for it.  Raises ``PartyFileError``,
    ``UnsafeSegment``.
    """
    code = party_file.segments[segment]
    if code.dp_sgd is None:
        return None
    where = ("segments", segment, "dp_sgd")
    shared = graph.schedule == "parallel" and graph.segments[segment].at not in graph.groups and graph.streams > 1
    if graph.training.micro_batches > 1 or shared:
        raise party_file.error(
            f"`dp_sgd` at the segment `{segment}`, which has several micro-batches under way in a step",
            *where,
            expected="one forward and one backward a step: gradients by sample cannot be told apart otherwise",
            fix="place it at the members of the group" if shared else "write `micro_batches: 1` in the graph file",
        )
    if code.nopeek is not None:
        raise party_file.error(
            f"`dp_sgd` and `nopeek` at the segment `{segment}`",
            *where,
            expected="one of them: NoPeek compares the samples of a batch, so that no gradient is one sample's own",
            fix="remove one of the two",
        )
    try:
        return PrivateTraining(
            module,
            clip=code.dp_sgd.clip,
            noise_multiplier=code.dp_sgd.noise_multiplier,
            source=KeystreamSource(),
        )
    except PrivacyError as error:
        raise UnsafeSegment(
            f"{party_file.file}:{party_file.line_of(*where)}: `dp_sgd` at the segment {segment!r}: {error}",
            expected="a module for which private training keeps its promise (docs/dp-sgd.md)",
            fix="change the module as the message says, or remove `dp_sgd`",
        ) from error


def build_segments(graph: Graph, party_file: PartyFile) -> dict[str, Segment]:
    """Build every segment that ``graph`` places at this party, with its weights drawn from the seed of its own name."""
    segments = {}
    seed = graph.training.seed
    for name, code in party_file.segments.items():
        builder = party_file.function(code.model, "segments", name, "model")
        torch.manual_seed(seed_of("weights", seed, name))
        with user_code(
            f"`{code.model}`, which builds segment {name!r},", (party_file.file, party_file.line_of("segments", name))
        ):
            module = builder(**code.args)
        if not isinstance(module, nn.Module):
            raise party_file.error(
                f"`{code.model}` returned {type(module).__name__}",
                "segments",
                name,
                "model",
                expected="a torch.nn.Module",
            )
        check_slices(graph, party_file, name, module)
        segments[name] = Segment(
            name,
            module,
            make_optimizer(party_file, name, module),
            private=make_private(graph, party_file, name, module),
            loss=make_loss(graph, party_file, name),
            loss_name=graph.segments[name].loss,
            seed=seed,
            nopeek=code.nopeek,
            early_gradient=None if party_file.early_gradient == "auto" else party_file.early_gradient,
        )
    return segments
