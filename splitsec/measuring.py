"""What modules cost: parameters, FLOPs, memory and time, found out without training them.

Here: ``Cost`` of a layer of a built-in network by formula, of a module of a folder by torch's own counter, both on the
*meta* device where nothing is computed and no memory is taken (a module that needs real numbers is run on two samples
instead); what a folder's parties need and send; how long a segment takes on this machine.  Not here: what follows from
it (``resources``), schedules (``advice``), how it looks (``cli/plan``).
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from splitsec.advice import Act, Crossing, Pipeline
from splitsec.architectures import Layer
from splitsec.errors import PartyFileError, SplitsecError
from splitsec.graph import EXACT, Cut, Graph, wire_bytes
from splitsec.messages import DTYPES
from splitsec.partyfile import Folder, PartyFile
from splitsec.plan import Stage, make_plan
from splitsec.probe import check_shapes
from splitsec.resources import (
    OPTIMIZER_NUMBERS,
    Candidate,
    Cost,
    Flow,
    Method,
    PartyUse,
    Report,
    Setting,
    baselines,
    candidates,
    fewest_clients,
    join,
    split_method,
)
from splitsec.samples import Samples, micro_batch_rows, read_own
from splitsec.schedule import EVALUATE, TRAIN, HandOn, Phase, run_schedule, steps_of
from splitsec.segments import Segment, batch_statistics, build_segments, join_inputs, output_of

__all__ = ["Measured", "chain_costs", "cost_of", "measure_folder", "segment_cost", "weight_uses"]

ROWS: Final = 2
"""Samples of which a module's FLOPs are counted; batch normalisation refuses one."""

SECONDS: Final = 0.25
"""For timing one segment at one number of rows; at least three passes."""

Tell = Callable[[str], None]

_Piece = tuple[str, tuple[int, ...], Cost]
"""A layer of a chain: name, shape of what comes out for one sample, cost."""


# --- one module


def weight_uses(module: nn.Module, shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Multiply-accumulates of a forward of one sample of ``shape``, and the shape of what comes out.

    By formula: a weight of a convolution is used once for every pixel that it makes, one of a linear layer once for
    every row.  Nothing else counts.  ``module`` is on the meta device.
    """
    uses = 0

    def count(one: nn.Module, _: Any, made: torch.Tensor) -> None:
        nonlocal uses
        if isinstance(one, nn.Conv2d):
            height, width = one.kernel_size
            uses += made[0].numel() * (one.in_channels // one.groups) * height * width
        elif isinstance(one, nn.Linear):
            uses += made[0].numel() * one.in_features

    hooks = [one.register_forward_hook(count) for one in module.modules()]
    try:
        with torch.no_grad():
            made = module(torch.zeros(ROWS, *shape, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return uses, tuple(made.shape[1:])


def chain_costs(layers: Sequence[Layer], image: Sequence[int], *, optimizer: str = "sgd") -> list[_Piece]:
    """Name, shape of what comes out, and cost of every layer of a built-in chain; ``saved`` is left at 0 (layers share
    what they keep: ``segment_cost``).  The first layer needs no gradient of its input.
    """
    shape = tuple(image)
    found = []
    for place, layer in enumerate(layers):
        uses, shape = weight_uses(layer.module, shape)
        flops = (2 * uses, 2 * uses if place else 0, 2 * uses)
        cost = cost_of(layer.module, flops, saved=0, optimizer=OPTIMIZER_NUMBERS[optimizer])
        found.append((layer.name, shape, cost))
    return found


def cost_of(
    module: nn.Module,
    flops: tuple[float, float, float],
    *,
    saved: float,
    optimizer: float,
    handed_on: int | None = None,
) -> Cost:
    """The cost of ``module``.  ``flops``: of forward, input gradient and weight gradient for one sample; ``optimizer``:
    numbers that the optimiser keeps for each parameter.
    """
    parameters = list(module.parameters())
    state = sum(one.nbytes for one in module.state_dict().values() if isinstance(one, torch.Tensor))
    trained = sum(one.nbytes for one in parameters if one.requires_grad)
    kept = int(optimizer * trained)
    return Cost(
        parameters=sum(one.numel() for one in parameters),
        state=state,
        trained=trained,
        optimizer=kept,
        handed_on=state + kept if handed_on is None else handed_on,
        forward=flops[0],
        input_gradient=flops[1],
        weight_gradient=flops[2],
        saved=saved,
        batch_statistics=(batch_statistics(module) or "").partition(" at ")[0] or None,
    )


def segment_cost(layers: Sequence[Layer], shape: Sequence[int], costs: Sequence[Cost]) -> Cost:
    """The cost of consecutive built-in ``layers`` that begin with tensors of ``shape``: the sum of ``costs``, with what
    a sample keeps for the way back.
    """
    inputs = [torch.zeros(ROWS, *shape, device="meta")]
    saved = _saved(nn.Sequential(*(one.module for one in layers)), lambda module: module(inputs[0]))
    return replace(join(costs), saved=saved / ROWS)


class _Saved:
    """Bytes of the tensors that autograd keeps for the way back, each piece of memory once, parameters not counted."""

    def __init__(self, module: nn.Module) -> None:
        self.bytes = 0
        self._seen = {_memory(one) for one in (*module.parameters(), *module.buffers())}
        self._kept: list[torch.Tensor] = []  # so that no memory is given out twice

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if (place := _memory(tensor)) not in self._seen:
            self._seen.add(place)
            self._kept.append(tensor)
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _saved(module: nn.Module, run: Callable[[nn.Module], Any]) -> int:
    count = _Saved(module)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        run(module.train())
    return count.bytes


# --- a segment of a folder


class _Passed(torch.autograd.Function):
    """An input as the module sees it: no leaf, which a module may not change in place, as some activations do."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor) -> torch.Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


_passed = cast("Callable[[torch.Tensor], torch.Tensor]", _Passed.apply)


@dataclass
class _Trial:
    """A segment, and inputs of ``rows`` samples for it: those that came over cuts, in order, then its own data."""

    segment: Segment
    stage: Stage
    inputs: list[torch.Tensor]
    rows: int

    def forward(self) -> list[torch.Tensor]:
        """What leaves over cuts, or else the prediction, floats only; inputs that came over a cut want gradients."""
        given = list(self.inputs)
        for place in range(len(self.stage.inputs)):
            if given[place].is_floating_point():
                given[place] = _passed(given[place].requires_grad_())
        made: Any = self.segment.module(*join_inputs(self.stage.join, given))
        outputs = [output_of(self.stage.segment, made, edge) for edge in self.stage.outputs]
        if self.stage.labels is not None and isinstance(made, torch.Tensor):
            outputs.append(made)
        return [one for one in outputs if one.is_floating_point() and one.requires_grad]

    def shapes(self) -> list[tuple[tuple[int, ...], str]]:
        """Shape (without samples) and dtype of what leaves over each cut."""
        made: Any = self.segment.module(*join_inputs(self.stage.join, self.inputs))
        outputs = [output_of(self.stage.segment, made, edge) for edge in self.stage.outputs]
        return [(tuple(one.shape[1:]), str(one.dtype).removeprefix("torch.")) for one in outputs]

    def backward(self, outputs: Sequence[torch.Tensor], *, weights: bool, keep: bool = False) -> None:
        """Gradients of the inputs; with ``weights`` of the parameters, too."""
        wanted = [one for one in self.inputs if one.requires_grad]
        wanted += [one for one in self.segment.module.parameters() if one.requires_grad] if weights else []
        if wanted and outputs:
            seeds = [torch.ones_like(one) for one in outputs]
            torch.autograd.grad(outputs, wanted, seeds, allow_unused=True, retain_graph=keep)


def _inputs(stage: Stage, samples: Samples | None, rows: int, device: str) -> list[torch.Tensor]:
    inputs = [torch.zeros(rows, *edge.shape, dtype=DTYPES[edge.dtype], device=device) for edge in stage.inputs]
    if stage.reads is not None:
        assert samples is not None, "checked with the folder"
        field = samples.fields[stage.reads]
        if device == "meta":
            inputs.append(torch.zeros(rows, *field.shape[1:], dtype=field.dtype, device=device))
        else:
            inputs.append(field[torch.arange(rows) % max(samples.count, 1)])
    return inputs


def _counted(trial: _Trial) -> Cost:
    """By torch's counter, which sees every convolution, matrix product and attention, whatever a module is made of."""
    module, rows = trial.segment.module.train(), trial.rows
    saved = _Saved(module)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        with FlopCounterMode(display=False) as forward:
            outputs = trial.forward()
        with FlopCounterMode(display=False) as inputs_only:
            trial.backward(outputs, weights=False, keep=True)
        with FlopCounterMode(display=False) as both:
            trial.backward(outputs, weights=True)
    numbers = [one.get_total_flops() / rows for one in (forward, inputs_only, both)]
    cost = cost_of(module, (numbers[0], numbers[1], numbers[2] - numbers[1]), saved=saved.bytes / rows, optimizer=0)
    return _with_optimizer(cost, trial.segment)


def _with_optimizer(cost: Cost, segment: Segment) -> Cost:
    """``cost`` with what the optimiser keeps after a step: it takes one, with gradients of zero."""
    if segment.optimizer is None:
        return cost
    for parameter in segment.module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    try:
        segment.optimizer.step()
        tensors, _ = segment.hand_on()
    except (RuntimeError, TypeError, PartyFileError):  # one that wants a closure, say
        return cost
    handed = sum(one.nbytes for one in tensors.values())
    return replace(cost, optimizer=handed - cost.state, handed_on=handed)


# --- a folder


@dataclass(frozen=True)
class Times:
    """What a segment takes: forward, input gradient and weight gradient, and the ``optimizer`` once a step, seconds."""

    acts: tuple[Act, Act, Act]
    optimizer: float = 0.0


@dataclass(frozen=True)
class Measured:
    """A folder's plan.  ``pipeline``: what a schedule is chosen by, given seconds for each segment."""

    report: Report
    costs: Mapping[str, Cost]
    graph: Graph
    stages: Mapping[str, Stage]
    time: Callable[[Tell], dict[str, Times]]
    """What each segment takes, measured here and now."""

    def pipeline(self, times: Mapping[str, Times]) -> Pipeline:
        """The steps of the graph, each act taking as long as ``times`` says."""
        graph = self.graph
        streams = graph.streams if graph.schedule == "parallel" else 1
        order = list(graph.order)
        return Pipeline(
            names=tuple(order),
            acts=tuple(times[name].acts for name in order),
            parties=tuple(tuple(graph.party_at(graph.segments[name].at, k) for k in range(streams)) for name in order),
            crossings=tuple(
                Crossing(order.index(cut.source), order.index(cut.target), _of_one(cut, graph), _way_back(cut, graph))
                for cut in graph.cuts
            ),
            losses=frozenset(order.index(one.target) for one in graph.labels),
            streams=streams,
            optimizers=tuple(times[name].optimizer for name in order),
        )


def _of_one(cut: Cut, graph: Graph) -> float:
    """Bytes of one sample on its way over ``cut``, as its codec makes them: of a whole batch, shared out."""
    return cut.message_bytes(graph.training.batch_size) / graph.training.batch_size


def _way_back(cut: Cut, graph: Graph) -> float | None:
    return _of_one(cut, graph) if DTYPES[cut.dtype].is_floating_point else None


def measure_folder(folder: Folder, *, epochs: float | None = None, rounds: float = 1.0, tell: Tell) -> Measured:
    """The plan of ``folder``, from its modules and data.  What user code prints goes to standard error.

    Raises ``GraphError``, ``PartyFileError`` or ``SamplesError`` where modules and data do not fit the graph.
    """
    graph = folder.graph
    if not graph.segments:
        raise graph.error(
            "the graph has no segments, so there is nothing to plan",
            expected="at least one segment",
            fix="plan a folder that trains",
        )
    costs: dict[str, Cost] = {}
    stages: dict[str, Stage] = {}
    own: dict[str, dict[str, Samples]] = {}
    layers: dict[str, list[_Piece]] = {}
    with redirect_stdout(sys.stderr):
        for name, party_file in folder.parties.items():
            plan = make_plan(graph, name)
            tell(f"reads the samples of {name}")
            own[name] = read_own(party_file, plan, ("train", "test"), labels=True)
        for name, party_file in folder.parties.items():
            here = {stage.segment: stage for stream in make_plan(graph, name).streams for stage in stream.stages}
            missing = [segment for segment in here if segment not in costs]
            if not missing:
                continue
            tell(f"builds the segments of {name}")
            for segment, trial in _trials(graph, party_file, own[name], here):
                if segment in missing:
                    stages[segment] = trial.stage
                    costs[segment] = _counted(trial)
                    layers[segment] = _pieces(trial, costs[segment])
    counts = [_counts(graph, own, stream) for stream in range(graph.streams)]
    report = _report(folder, costs, counts, layers, epochs, rounds)
    return Measured(report, costs, graph, stages, lambda say: _times(folder, own, stages, say))


def _trials(
    graph: Graph, party_file: PartyFile, own: Mapping[str, Samples], stages: Mapping[str, Stage]
) -> list[tuple[str, _Trial]]:
    """Each segment of a party with inputs for it: on the meta device where that works and gives what the graph
    declares, else for real, with the errors of ``probe``.
    """
    samples = next((one for one in own.values() if one.count), None)
    bare = party_file.undefended()  # DP-SGD and NoPeek wrap modules; what they add is not counted
    if samples is None and any(stage.reads is not None for stage in stages.values()):
        raise party_file.error(
            "the data functions returned no samples",
            "data",
            expected="at least one, whose shape and dtype the segments take",
            fix="return the samples that the party will train on",
        )
    try:
        with torch.device("meta"):
            built = build_segments(graph, bare)
        made = [
            (name, _Trial(built[name], stage, _inputs(stage, samples, ROWS, "meta"), ROWS))
            for name, stage in stages.items()
        ]
        for _, trial in made:
            declared = [(tuple(edge.shape), edge.dtype) for edge in trial.stage.outputs]
            with torch.no_grad():
                if trial.shapes() != declared or any(one.device.type != "meta" for one in _tensors(trial)):
                    raise RuntimeError("not as declared, or not on meta")
            trial.backward(trial.forward(), weights=True)
        return made
    except (SplitsecError, RuntimeError, NotImplementedError, TypeError, ValueError):
        built = build_segments(graph, bare)
        check_shapes(graph, bare, make_plan(graph, party_file.party), built, own)
        return [
            (name, _Trial(built[name], stage, _inputs(stage, samples, ROWS, "cpu"), ROWS))
            for name, stage in stages.items()
        ]


def _tensors(trial: _Trial) -> Iterator[torch.Tensor]:
    yield from trial.segment.module.parameters()
    yield from trial.segment.module.buffers()


def _pieces(trial: _Trial, cost: Cost) -> list[_Piece]:
    """The layers between which a segment could be cut: those of an ``nn.Sequential`` with one input and one output;
    else the segment as one layer, whose shape is that of its cut.
    """
    module, stage = trial.segment.module, trial.stage
    shape = tuple(stage.outputs[0].shape) if stage.outputs else ()
    whole = [(stage.segment, shape, cost)]
    if type(module) is not nn.Sequential or len(trial.inputs) != 1 or len(module) < 2:
        return whole
    made, found = trial.inputs[0].detach(), []
    share = cost.optimizer / cost.trained if cost.trained else 0.0
    for place, layer in enumerate(module):
        leaf = made.detach()
        if (place or stage.inputs) and leaf.is_floating_point():
            leaf.requires_grad_()
        with FlopCounterMode(display=False) as forward:
            made = layer(_passed(leaf) if leaf.requires_grad else leaf)
        if not isinstance(made, torch.Tensor) or made.dim() < 1 or len(made) != trial.rows:
            return whole
        wanted = [leaf] if leaf.requires_grad else []
        weights = [one for one in layer.parameters() if one.requires_grad]
        numbers = [forward.get_total_flops()]
        for asked in (wanted, [*wanted, *weights]):
            with FlopCounterMode(display=False) as counter:
                if asked and made.requires_grad:
                    torch.autograd.grad(made, asked, torch.ones_like(made), allow_unused=True, retain_graph=True)
            numbers.append(counter.get_total_flops())
        flops = (numbers[0] / trial.rows, numbers[1] / trial.rows, (numbers[2] - numbers[1]) / trial.rows)
        name = f"{stage.segment}.{place} {type(layer).__name__}"
        found.append((name, tuple(made.shape[1:]), cost_of(layer, flops, saved=0, optimizer=share)))
    return found


def _counts(graph: Graph, own: Mapping[str, Mapping[str, Samples]], stream: int) -> dict[str, int]:
    """Samples of a stream by split: the leader's, which is the first of its data parties."""
    holders = graph.data_parties(stream)
    leader = own.get(holders[0], {}) if holders else {}
    return {split: leader[split].count if split in leader else 0 for split in ("train", "test", "predict")}


def _report(
    folder: Folder,
    costs: Mapping[str, Cost],
    counts: Sequence[Mapping[str, int]],
    layers: Mapping[str, list[_Piece]],
    epochs: float | None,
    rounds: float,
) -> Report:
    graph = folder.graph
    training = graph.training
    together = graph.schedule == "parallel"
    setting = Setting(
        clients=max(1, graph.streams),
        samples=sum(one["train"] for one in counts),
        evaluated=sum(one["test"] for one in counts),
        batch=training.batch_size,
        epochs=training.epochs if epochs is None else epochs,
        schedule="parallel" if together or not graph.groups else "round_robin",
    )
    travelling = _travelling(graph, counts)
    rows = {key: sum(size * times for size, times in sizes.items()) for key, sizes in travelling.items()}
    flows = [*_edge_flows(graph, travelling), *_weight_flows(graph, costs)]
    parties = []
    for name in graph.parties:
        if name not in folder.parties:
            continue
        here = [
            [segment for segment in graph.order if graph.party_at(graph.segments[segment].at, stream) == name]
            for stream in range(graph.streams)
        ]
        held = [segment for segment in graph.order if any(segment in one for one in here)]
        steps = [
            min(training.batch_size, counts[stream]["train"]) * join([costs[one] for one in here[stream]]).step
            for stream in range(graph.streams)
        ]
        cost = join([costs[one] for one in held])
        busy = sum(bool(one) for one in here) if together else 1
        buffers = (
            2
            * training.batch_size
            * sum(cut.sample_bytes for cut in graph.cuts if (cut.source in held) != (cut.target in held))
        )
        parties.append(
            PartyUse(
                party=name,
                segments=tuple(held),
                parameters=cost.parameters,
                flop_step=sum(steps) if together else max(steps),
                flop_epoch=sum(
                    rows[stream, TRAIN] * join([costs[one] for one in here[stream]]).step
                    for stream in range(graph.streams)
                ),
                flop_evaluation=sum(
                    rows[stream, EVALUATE] * join([costs[one] for one in here[stream]]).forward
                    for stream in range(graph.streams)
                ),
                published_epoch=sum(
                    rows[stream, TRAIN] * join([costs[one] for one in here[stream]]).published
                    for stream in range(graph.streams)
                ),
                memory=cost.memory(training.batch_size * max(busy, 1)) + buffers * max(busy, 1),
                sent=sum(one.epoch for one in flows if one.sender == name),
                received=sum(one.epoch for one in flows if one.receiver == name),
            )
        )
    methods, fewer, why = _methods(graph, setting, costs, flows, parties, rounds)
    return Report(
        title=graph.name,
        setting=setting,
        parties=tuple(parties),
        flows=tuple(flows),
        methods=methods,
        fewer_from=fewer,
        candidates=_folder_candidates(graph, setting, layers, rounds) if methods[1:] else (),
        why=why,
        notes=_notes(folder),
    )


def _travelling(graph: Graph, counts: Sequence[Mapping[str, int]]) -> dict[tuple[int, Phase], Counter[int]]:
    """By stream and phase, how many micro-batches of each size an epoch has."""
    found: dict[tuple[int, Phase], Counter[int]] = {
        (stream, phase): Counter() for stream in range(graph.streams) for phase in (TRAIN, EVALUATE)
    }
    for turn in run_schedule(graph, epochs=1):
        if isinstance(turn, HandOn):
            continue
        for step in steps_of(graph, turn, counts, 0):
            for micro in step.micro_batches:
                found[micro.stream, turn.phase][micro.rows] += 1
    return found


def _edge_flows(graph: Graph, travelling: Mapping[tuple[int, Phase], Counter[int]]) -> Iterator[Flow]:
    """What crosses over cuts and labels edges in an epoch; the way back is empty where nothing is trained."""
    training = graph.training
    for stream in range(graph.streams):
        trained, looked = travelling[stream, TRAIN], travelling[stream, EVALUATE]
        rows = sum(size * times for size, times in trained.items())
        full = Counter(micro_batch_rows(min(training.batch_size, rows), training.micro_batches))
        messages = trained.total() + looked.total()

        def over(of: Callable[[int], int], *sizes: Counter[int]) -> list[int]:
            return [sum(times * of(size) for size, times in one.items()) for one in sizes]

        for cut in graph.cuts:
            source = graph.party_at(graph.segments[cut.source].at, stream)
            target = graph.party_at(graph.segments[cut.target].at, stream)
            if source == target:
                continue
            name, back = f"{cut.source} -> {cut.target}", DTYPES[cut.dtype].is_floating_point
            step, epoch, evaluation = over(cut.message_bytes, full, trained, looked)
            yield Flow("activation", name, source, target, step, epoch, evaluation, messages)
            yield Flow("gradient", name, target, source, step * back, epoch * back, 0, messages)
        for one in graph.labels:
            source = graph.party_at(one.source, stream)
            target = graph.party_at(graph.segments[one.target].at, stream)
            if source != target:
                step, epoch, evaluation = over(one.sample_bytes.__mul__, full, trained, looked)
                yield Flow("labels", f"{one.source} -> {one.target}", source, target, step, epoch, evaluation, messages)


def _weight_flows(graph: Graph, costs: Mapping[str, Cost]) -> Iterator[Flow]:
    """What is handed on in an epoch."""
    times: dict[tuple[int, int], int] = {}
    for turn in run_schedule(graph, epochs=1):
        if isinstance(turn, HandOn):
            times[turn.giver, turn.taker] = times.get((turn.giver, turn.taker), 0) + 1
    for (giver, taker), count in times.items():
        for name, segment in graph.segments.items():
            if segment.at in graph.groups:
                ends = graph.party_at(segment.at, giver), graph.party_at(segment.at, taker)
                yield Flow("weights", name, *ends, 0.0, count * costs[name].handed_on, messages=count)


def _methods(
    graph: Graph,
    setting: Setting,
    costs: Mapping[str, Cost],
    flows: Sequence[Flow],
    parties: Sequence[PartyUse],
    rounds: float,
) -> tuple[tuple[Method, ...], int | None, str]:
    """Split learning as the graph has it, and the other two where each client has whole samples and labels."""
    holders = [graph.data_parties(stream) for stream in range(graph.streams)]
    whole = join(list(costs.values()))
    clients = {one[0] for one in holders}
    held = [name for name in graph.order if graph.party_at(graph.segments[name].at, 0) == holders[0][0]]
    client = join([costs[name] for name in held])
    used = [one for one in parties if one.party in clients]
    amount = sum(one.sent + one.received for one in used) / len(used)
    split = replace(
        split_method(setting, client, 0.0, max(one.memory for one in used)),
        flop_epoch=sum(one.flop_epoch for one in used) / len(used),
        bytes_epoch=amount,
        bytes_epoch_all=amount * len(used),
    )
    if any(len(one) != 1 for one in holders):
        return (
            (split,),
            None,
            "federated learning and large-batch SGD want whole samples with their labels at every client; here they "
            f"are spread over {' and '.join(holders[0])}",
        )
    crossing = sum(one.epoch for one in flows if one.kind != "weights" and clients & {one.sender, one.receiver})
    sample = crossing / setting.samples if setting.samples else 0.0
    handed = sum(costs[name].handed_on for name in held if graph.segments[name].at in graph.groups)
    return (
        (split, *baselines(setting, whole, rounds=rounds)),
        fewest_clients(setting, sample, handed, whole.state, rounds=rounds),
        "",
    )


def _folder_candidates(
    graph: Graph, setting: Setting, layers: Mapping[str, list[_Piece]], rounds: float
) -> tuple[Candidate, ...]:
    """The cuts that the graph's chain could have between any two layers; none where it is no chain."""
    pairs = [(cut.source, cut.target) for cut in graph.cuts]
    if not pairs or pairs != list(pairwise(graph.order)):
        return ()
    flat: list[_Piece] = []
    ends = []
    for name in graph.order:
        for place, piece in enumerate(layers[name]):
            if flat and _alike(piece, flat[-1]):
                if place and not piece[0].endswith((" Flatten", " Dropout", " Identity")):
                    flat[-1] = (piece[0], piece[1], flat[-1][2])  # called after its activation
            else:
                flat.append(piece)
        ends.append(len(flat))
    places = [(graph.segments[one].at, end) for one, end in zip(graph.order, ends, strict=True)]
    made = [end for (at, end), (after, _) in pairwise(places) if at != after]
    labels = sum(one.sample_bytes for one in graph.labels if one.source != graph.segments[one.target].at)
    dtype, codec, batch = graph.cuts[0].dtype, graph.cuts[0].codec, setting.batch
    return candidates(
        setting,
        flat,
        label_bytes=labels,
        size=lambda shape: wire_bytes(codec, shape, dtype, batch) / batch,
        chosen=made,
        rounds=rounds,
    )


def _alike(piece: _Piece, before: _Piece) -> bool:
    """Whether a cut after ``piece`` is one after ``before``: as many numbers, nothing computed that counts."""
    (_, shape, cost), (_, earlier, _) = piece, before
    return not cost.parameters and not cost.step and math.prod(shape) == math.prod(earlier)


def _notes(folder: Folder) -> tuple[str, ...]:
    graph, notes = folder.graph, []
    if graph.routes:
        notes.append("bytes are those between the ends; relays pass them on in cells of one size, which adds to them")
    if any(cut.codec == EXACT for cut in graph.cuts):
        notes.append(f"bytes of a cut with the codec {EXACT} are the most that it can take: zeros are not known ahead")
    if any(code.dp_sgd or code.nopeek for one in folder.parties.values() for code in one.segments.values()):
        notes.append("what DP-SGD and NoPeek compute besides is not counted")
    return tuple(notes)


# --- time


def _times(
    folder: Folder, own: Mapping[str, Mapping[str, Samples]], stages: Mapping[str, Stage], tell: Tell
) -> dict[str, Times]:
    """What each segment takes, on as many threads as its party has, from passes with a whole and a small batch."""
    graph = folder.graph
    batch = graph.training.batch_size
    found: dict[str, Times] = {}
    threads = torch.get_num_threads()
    try:
        for name, party_file in folder.parties.items():
            here = [one for one in stages if one not in found and one in party_file.segments]
            if not here:
                continue
            torch.set_num_threads(party_file.threads or threads)
            samples = next((one for one in own[name].values() if one.count), None)
            with redirect_stdout(sys.stderr):
                built = build_segments(graph, party_file.undefended())
                for segment in here:
                    tell(f"times {segment}")
                    stage = stages[segment]
                    sizes = sorted({min(16, batch), batch})
                    acts = _acts([(size, _timed(built[segment], stage, samples, size)) for size in sizes])
                    found[segment] = Times(acts, _timed_optimizer(built[segment]))
    finally:
        torch.set_num_threads(threads)
    return found


def _timed(segment: Segment, stage: Stage, samples: Samples | None, rows: int) -> tuple[float, float, float]:
    """Medians of the seconds of forward, of the inputs' gradients, and of what a whole way back takes besides."""
    segment.module.train()
    taken: list[tuple[float, float, float]] = []
    until = time.perf_counter() + SECONDS
    while len(taken) < 4 or (time.perf_counter() < until and len(taken) < 50):
        trial = _Trial(segment, stage, _inputs(stage, samples, rows, "cpu"), rows)
        marks = [time.perf_counter()]
        outputs = trial.forward()
        marks.append(time.perf_counter())
        if stage.inputs:
            trial.backward(outputs, weights=False, keep=True)
        marks.append(time.perf_counter())
        trial.backward(outputs, weights=True)
        marks.append(time.perf_counter())
        forward, inputs, both = (b - a for a, b in pairwise(marks))
        taken.append((forward, min(inputs, both), max(both - inputs, 0.0)))
    forwards, inputs_only, rest = zip(*taken[1:], strict=True)  # the first warms up
    return statistics.median(forwards), statistics.median(inputs_only), statistics.median(rest)


def _timed_optimizer(segment: Segment) -> float:
    """Median seconds of a step of the optimiser, with the gradients that are there; 0 where none can be taken."""
    if segment.optimizer is None:
        return 0.0
    taken = []
    try:
        for _ in range(6):
            began = time.perf_counter()
            segment.optimizer.step()
            taken.append(time.perf_counter() - began)
    except (RuntimeError, TypeError):  # one that wants a closure, say
        return 0.0
    return statistics.median(taken[1:])


def _acts(measured: Sequence[tuple[int, tuple[float, float, float]]]) -> tuple[Act, Act, Act]:
    """A line through two points, never falling and never below zero, for each of the three acts."""
    acts = []
    for act in range(3):
        (few, short), (many, long) = (measured[0][0], measured[0][1][act]), (measured[-1][0], measured[-1][1][act])
        each = max(0.0, (long - short) / (many - few)) if many > few else long / many
        each = min(each, long / many)
        acts.append(Act(max(0.0, long - each * many), each))
    return acts[0], acts[1], acts[2]
