"""Progress of a run and its tables, for people: bars on a terminal, a line per epoch in a pipe or a log.

Here: what events look like.  Not here: the events (``party``) and sums (``simulation``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from splitsec.simulation import Result

__all__ = ["Followed", "print_result", "print_traffic"]

PHASES = {"train": "trains", "evaluate": "evaluates", "predict": "predicts"}


class Followed:
    """Shows events as they come, on standard error.  Use in a ``with`` block; call it with (party, event)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.live = self.console.is_terminal and not quiet
        self.bars = Progress(
            TextColumn("{task.fields[party]}", style="bold"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            transient=True,
            disable=not self.live,
        )
        self.tasks: dict[str, TaskID] = {}
        self.started = time.monotonic()
        self.sums: dict[tuple[str, int], list[float]] = {}

    def __enter__(self) -> Followed:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def __call__(self, party: str, event: dict[str, Any]) -> None:
        """Show one event of one party."""
        if party not in self.tasks:
            self.tasks[party] = self.bars.add_task("starts", total=None, party=party)
        task = self.tasks[party]
        match event["event"]:
            case "ready":
                self.bars.update(task, description="waits for the others")
            case "relays":
                self.bars.update(task, description="relays")
            case "relay ended":
                self._line(f"{party}: the relay ended, and is started again ({event['why']})")
            case "interrupted":
                self._line(
                    f"{party}: the connection with {event['peer']} broke ({event['why']}); nothing is lost, "
                    f"trying again for {event['seconds']:g} s"
                )
            case "resumed":
                self._line(f"{party}: connected with {event['peer']} again")
            case "connected":
                self.bars.update(task, description="connected")
                self._line(f"{party}: connected to all its peers, every channel encrypted")
            case "turn":
                self.bars.reset(task, total=event["steps"], description=self._doing(event))
            case "step":
                self.bars.update(task, completed=event["done"], total=event["of"], description=self._doing(event))
            case "score":
                loss = event["loss"] / event["rows"]
                accuracy = "" if event["correct"] is None else f", accuracy {event['correct'] / event['rows']:.1%}"
                self._line(
                    f"epoch {event['epoch'] + 1}: {party} {PHASES[event['phase']]} {event['segment']}: "
                    f"loss {loss:.4f}{accuracy}"
                )
            case "warning":
                if self.console.quiet:
                    print(f"{party}: {event['text']}", file=sys.stderr)
                else:
                    self._line(f"{party}: {event['text']}")
            case "alarm":
                text = (
                    f"{party}: ALARM in training step {event['batch']} ({event['detector']}): {event['text']}; "
                    "nothing more leaves"
                )
                if self.console.quiet:
                    print(text, file=sys.stderr)
                else:
                    self._line(text)
            case "budget spent":
                self._line(
                    f"{party}: the run ends after epoch {event['epochs']} of {event['of']}: a privacy budget is spent"
                )
            case "leakage":
                self._line(
                    f"epoch {event['epoch'] + 1}: {party} measured {event['cut']}: distance correlation of samples "
                    f"and what left {event['distance_correlation_corrected']:.2f} (bias-corrected)"
                )
            case "saved":
                self._line(f"{party}: wrote {event['folder']}")
            case "done":
                self.bars.update(task, description="done")

    @staticmethod
    def _doing(event: dict[str, Any]) -> str:
        epoch = "" if event["phase"] == "predict" else f" epoch {event['epoch'] + 1}"
        return f"{PHASES[event['phase']]}{epoch}"

    def _line(self, text: str) -> None:
        (self.bars.console if self.live else self.console).print(
            f"{time.monotonic() - self.started:7.1f} s  {text}", markup=False
        )


def print_traffic(party: str, lanes: Sequence[Mapping[str, Any]]) -> None:
    """What left one party, on standard output: what its data-protection officer asks for first."""
    table = Table(title=f"what left {party}", title_justify="left")
    for column in ("what", "of", "to"):
        table.add_column(column)
    table.add_column("messages", justify="right")
    table.add_column("bytes", justify="right")
    for row in lanes:
        table.add_row(row["kind"], row["name"], row["peer"], f"{row['messages']:,}", _bytes(row["bytes"]))
    _console().print(table)


def _console() -> Console:
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=110)


def print_result(result: Result) -> None:
    """The tables that a run ends with, on standard output."""
    console = _console()
    metrics = result.metrics
    if metrics:
        table = Table(
            title=f"{result.graph}: {len(result.parties)} parties, {result.steps} steps", title_justify="left"
        )
        table.add_column("epoch", justify="right")
        for column in ("train loss", "eval loss", "eval accuracy"):
            table.add_column(column, justify="right")
        for epoch in range(result.epochs):
            accuracy = metrics["eval_accuracy"][epoch]
            table.add_row(
                str(epoch + 1),
                _number(metrics["train_loss"][epoch]),
                _number(metrics["eval_loss"][epoch]),
                "-" if accuracy is None else f"{accuracy:.2%}",
            )
        console.print(table)
    crossed = Table(title="what crossed a line between parties", title_justify="left")
    for column in ("from", "to", "carries", "direction", "sender", "receiver"):
        crossed.add_column(column)
    crossed.add_column("messages", justify="right")
    crossed.add_column("bytes", justify="right")
    for row in result.cuts:
        crossed.add_row(
            row["from"],
            row["to"],
            row["kind"],
            row["direction"],
            row["sender"],
            row["receiver"],
            f"{row['messages']:,}",
            _bytes(row["bytes"]),
        )
    console.print(crossed)
    if result.short_of_budget:
        whose = " and ".join(result.short_of_budget)
        console.print(
            f"ended after {result.epochs} of {result.epochs_wanted} epochs: the privacy budget of {whose} is spent"
            if result.epochs_wanted
            else f"went on without samples of {whose} once the privacy budget there was spent"
        )
    for segment, rows in result.predicted.items():
        console.print(f"predicted {rows:,} samples with {segment}")
    console.print(
        f"{result.wall_seconds:.1f} s in all, {result.startup_seconds:.1f} s of them to start and connect every party"
        + (f"; written to {result.out}" if result.out else ""),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
