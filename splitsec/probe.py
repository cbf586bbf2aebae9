"""Does each segment really take and give what the graph declares?  Two samples through every module tell.

Here: the comparison of real modules and data with the graph's shapes and dtypes, before anything is started.  Not
here: the checks that need no torch (``graph``, ``partyfile``).  ``check``, ``simulate`` and every party that starts
use it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch

from splitsec.codecs import check_source
from splitsec.demands import Demand, check_demands, demands_of
from splitsec.errors import GraphError, PartyFileError, UnsafeSegment
from splitsec.graph import CUSTOM, EXACT, LOSSES, Graph
from splitsec.messages import DTYPES, NAMES
from splitsec.partyfile import Folder, PartyFile
from splitsec.plan import Edge, Plan, Stage, make_plan
from splitsec.samples import Samples, read_own
from splitsec.segments import Segment, batch_statistics, build_segments, join_inputs, output_of
from splitsec.usercode import user_code

__all__ = ["check_private", "check_shapes", "probe"]

ROWS = 2


def probe(folder: Folder, before: Callable[[str], None] = lambda party: None) -> None:
    """Build every party's segments and read its samples, and check them against the graph.

    ``before`` is called with each party's name before its code runs.  What that code prints goes to standard error.
    Raises ``GraphError`` with the line of the cut or label edge that is wrong, ``PartyFileError`` or ``SamplesError``.
    """
    classes: dict[str, int] = {}
    highest: dict[str, tuple[int, str]] = {}
    for name, party_file in folder.parties.items():
        before(name)
        plan = make_plan(folder.graph, name)
        with _output_to_stderr():
            own = read_own(party_file, plan, ("train", "test"), labels=True)
            segments = build_segments(folder.graph, party_file)
            check_shapes(folder.graph, party_file, plan, segments, own, classes)
            check_private(party_file, plan, demands_of(folder.graph, party_file, plan), segments)
        for edge in (edge for stream in plan.streams for edge in stream.own_labels):
            for samples in own.values():
                labels = samples.fields[edge.field or ""]
                if labels.numel() and not labels.is_floating_point():
                    most = int(labels.max()), name
                    highest[edge.target] = max(highest.get(edge.target, most), most)
    for segment, (most_label, holder) in highest.items():
        if segment in classes and most_label >= classes[segment]:
            raise GraphError(
                f"labels for {segment!r} at {holder!r} go up to {most_label}, but it has {classes[segment]} outputs",
                file=folder.graph.file,
                line=folder.graph.line_of("segments", segment),
                expected=f"one output for each class: at least {most_label + 1}",
                fix="give the segment's last layer more outputs, or number the classes from 0",
            )


@contextmanager
def _output_to_stderr() -> Iterator[None]:
    """Send what user code prints, below Python too, to standard error: standard output is for our own document."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def check_shapes(
    graph: Graph,
    party_file: PartyFile,
    plan: Plan,
    segments: Mapping[str, Segment],
    own: Mapping[str, Samples],
    classes: dict[str, int] | None = None,
) -> None:
    """Send two samples through each of this party's segments: real ones where it reads data, else zeros.

    ``classes`` takes the number of outputs of each segment whose loss wants the number of a class.
    """
    classes = {} if classes is None else classes
    samples = next((samples for samples in own.values() if samples.count), None)
    seen: set[str] = set()
    for stream in plan.streams:
        for edge in stream.gives_labels:
            _check_labels(graph, party_file, edge, samples)
        for stage in stream.stages:
            if stage.labels is not None and stage.labels.local:
                _check_labels(graph, party_file, stage.labels, samples)
            if stage.segment not in seen:
                seen.add(stage.segment)
                produced = _check_stage(graph, party_file, stage, segments[stage.segment], samples)
                if graph.segments[stage.segment].loss in ("cross_entropy", "nll") and isinstance(
                    produced, torch.Tensor
                ):
                    classes[stage.segment] = produced.shape[1]


def check_private(
    party_file: PartyFile,
    plan: Plan,
    demands: Mapping[tuple[str, int], Demand],
    segments: Mapping[str, Segment],
) -> None:
    """Refuse modules for which the promises of this party's policies do not hold.

    Batch statistics make one sample's tensor depend on all others of its batch: clipping one sample then bounds
    nothing.  Raises ``UnsafeSegment``, ``PartyFileError``.
    """
    check_demands(party_file, demands)
    reading = {stage.segment for stream in plan.streams for stage in stream.stages if stage.reads is not None}
    for name, code in party_file.segments.items():
        if code.nopeek is not None and name not in reading:
            raise party_file.error(
                f"`nopeek` at the segment `{name}`, which reads no data",
                "segments",
                name,
                "nopeek",
                expected="`nopeek` at a segment with `data` in the graph: it compares samples with what leaves",
                fix="move it to the segment that reads the samples, or remove it",
            )
        if code.nopeek is not None and any(
            one.lane.kind == "gradient" and one.mechanism is not None for one in demands.values()
        ):
            raise party_file.error(
                f"`nopeek` at the segment `{name}`, and noise on gradients that leave this party",
                "segments",
                name,
                "nopeek",
                expected="one of them: NoPeek compares the samples of a batch, so that no gradient is one sample's",
                fix="remove one of the two",
            )
    if not any(demand.mechanism is not None and demand.carries for demand in demands.values()):
        return
    for name, segment in segments.items():
        if (found := batch_statistics(segment.module)) is not None:
            raise UnsafeSegment(
                f"segment {name!r} has {found}, and noise is demanded of what leaves it",
                expected="modules that treat every sample by itself: with batch statistics one person's sample "
                "changes what leaves for all others of the batch, which no clipping of single samples bounds",
                fix="use nn.GroupNorm or nn.LayerNorm in its place",
            )


def _check_stage(graph: Graph, party_file: PartyFile, stage: Stage, segment: Segment, samples: Samples | None) -> Any:
    inputs = [torch.zeros(ROWS, *edge.shape, dtype=DTYPES[edge.dtype]) for edge in stage.inputs]
    rows = ROWS
    if stage.reads is not None:
        if samples is None:
            return None
        rows = min(ROWS, samples.count)
        inputs = [tensor[:rows] for tensor in inputs] + [samples.fields[stage.reads][:rows]]
    taken = ", ".join(f"{list(tensor.shape)} {NAMES[tensor.dtype]}" for tensor in inputs)
    segment.module.eval()
    try:
        with torch.no_grad(), user_code(f"segment {stage.segment!r}, given {taken} (the first number is samples),"):
            produced: Any = segment.module(*join_inputs(stage.join, inputs))
    except PartyFileError as error:
        if not stage.inputs:
            raise
        raise GraphError(
            error.seen + (f"\n  at: {error.where()}" if error.where() else ""),
            file=graph.file,
            line=graph.line_of("cuts", stage.inputs[0].index),
            expected="cuts whose shapes and dtypes this segment can take",
            fix=error.fix or f"make `shape` and `dtype` of the cuts into {stage.segment!r} and its module agree",
        ) from error
    for edge in stage.outputs:
        output = output_of(stage.segment, produced, edge)
        found, declared = (list(output.shape[1:]), NAMES.get(output.dtype)), (list(edge.shape), edge.dtype)
        if output.dim() == 0 or len(output) != rows or found != declared:
            raise GraphError(
                f"the cut {edge.source} -> {edge.target} declares shape {declared[0]}, {declared[1]}",
                file=graph.file,
                line=graph.line_of("cuts", edge.index),
                expected=f"what segment {edge.source!r} at {party_file.party!r} really makes of {rows} samples: "
                f"shape {list(output.shape)} with the batch, {str(output.dtype).removeprefix('torch.')}",
                fix=f"write `shape: {found[0]}, dtype: {found[1]}` there, or change the module",
            )
        if edge.codec == EXACT and output.is_floating_point():
            _check_end(stage, segment, inputs, edge)
    if stage.labels is not None and segment.loss is not None:
        _check_loss(graph, stage, segment, produced, rows)
    return produced


def _check_end(stage: Stage, segment: Segment, inputs: list[torch.Tensor], edge: Edge) -> None:
    """Whether what leaves over ``edge`` is made by a ReLU, which only a forward with gradients shows."""
    if not any(weight.requires_grad for weight in segment.module.parameters()):
        return
    with torch.enable_grad(), user_code(f"segment {stage.segment!r}"):
        produced = segment.module(*join_inputs(stage.join, [tensor.detach() for tensor in inputs]))
    check_source(edge, output_of(stage.segment, produced, edge))


def _check_loss(graph: Graph, stage: Stage, segment: Segment, produced: Any, rows: int) -> None:
    assert stage.labels is not None and segment.loss is not None
    labels = torch.zeros(rows, *stage.labels.shape, dtype=DTYPES[stage.labels.dtype])
    place = stage.labels.index - len(graph.cuts)
    wanted = (
        f"labels of shape {list(stage.labels.shape)}, {stage.labels.dtype}, that fit the output of {stage.segment!r}"
    )
    if not isinstance(produced, torch.Tensor):
        raise PartyFileError(
            f"segment {stage.segment!r} has a loss, but returns {type(produced).__name__}",
            expected="a tensor, which the loss takes",
        )
    try:
        with (
            torch.no_grad(),
            user_code(
                f"the loss of segment {stage.segment!r}, given {list(produced.shape)} and labels {list(labels.shape)},"
            ),
        ):
            loss: Any = segment.loss(produced, labels)
    except PartyFileError as error:
        raise GraphError(error.seen, file=graph.file, line=graph.line_of("labels", place), expected=wanted) from error
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        raise PartyFileError(
            f"the loss of segment {stage.segment!r} is no single number",
            expected="the mean over the batch, a tensor without dimensions",
        )


def _check_labels(graph: Graph, party_file: PartyFile, edge: Edge, samples: Samples | None) -> None:
    labels = samples.fields.get(edge.field) if samples is not None and edge.field is not None else None
    if labels is None:
        return
    found, declared = (list(labels.shape[1:]), NAMES.get(labels.dtype)), (list(edge.shape), edge.dtype)
    loss = graph.segments[edge.target].loss or CUSTOM
    if loss in LOSSES and found[1] not in LOSSES[loss].labels:
        raise PartyFileError(
            f"field {edge.field!r}, which labels {edge.target!r}, is {found[1]}",
            file=party_file.file,
            line=party_file.line_of("data"),
            expected=f"{' or '.join(LOSSES[loss].labels)}, as the loss {loss} takes",
            fix=f"return it as {LOSSES[loss].labels[0]} from the data function",
        )
    if found != declared:
        raise GraphError(
            f"the labels for {edge.target!r} declare shape {declared[0]}, {declared[1]}",
            file=graph.file,
            line=graph.line_of("labels", edge.index - len(graph.cuts)),
            expected=f"what field {edge.field!r} of {party_file.party!r} really holds: shape {found[0]}, {found[1]}",
            fix=f"write `shape: {found[0]}, dtype: {found[1]}` there, or change the data function",
        )
