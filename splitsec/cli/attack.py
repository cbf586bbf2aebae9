"""``splitsec attack``: what an attacking party would get from a folder's data, graph and policies.

Here: which attacks, how they look on a terminal and as JSON, when the report is written.  Not here: the attacks
(``splitsec.attacks``), the page (``splitsec.attacks.report``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from splitsec.cli.simulate import counted, seeded

if TYPE_CHECKING:
    from splitsec.attacks.outcome import Outcome, Verdict
    from splitsec.attacks.report import Failed
    from splitsec.graph import Graph

__all__ = ["Watched", "add_parser", "print_outcome", "run"]

DESCRIPTION = """\
Attack FOLDER's own graph, data and policies on this machine, and say what was got.  One party, the server as a rule,
is run by an attacker that speaks the real protocol; the others are the ordinary processes, which are told nothing.  Do
it before you join: it shows what your data would give away, and what stops it.

  splitsec attack --list                                             what attacks there are
  splitsec attack examples/vanilla --attack inversion
  splitsec attack examples/vanilla --attack all --report report.html
  splitsec attack examples/vanilla --attack hijacking --undefended   what it would get if nothing looked

The exit code is 0 whatever was got: this measures.  docs/attacks.md says what each attack does, and what a good result
does not mean.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "attack",
        help="what attackers would get from your data, before you join",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="folder with graph.yaml and parties/")
    parser.add_argument("--attack", metavar="NAME", help="an attack of --list, or `all` for one after the other")
    parser.add_argument("--list", action="store_true", help="print what attacks there are, and run none")
    parser.add_argument(
        "--report",
        metavar="FILE.html",
        help="write one page for people who are no researchers, also after each attack of `all`; it may show samples, "
        "so only you can read it",
    )
    parser.add_argument(
        "--undefended",
        action="store_true",
        help="switch off what the folder demands (noise, DP-SGD, NoPeek) and what is on by default (detectors)",
    )
    parser.add_argument(
        "--auxiliary",
        metavar="MODULE:FUNCTION",
        help="returns samples like the victims' that the attacker has; without it `public` beside the victims' data "
        "functions, else their test samples",
    )
    parser.add_argument("--batches", type=counted, metavar="N", help="training batches, in place of each attack's own")
    parser.add_argument("--attacker", metavar="PARTY", help="the party that attacks, in place of the attack's choice")
    parser.add_argument("--seed", type=seeded, metavar="S", help="seed of weights and order, in place of the graph's")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document and nothing else on standard output"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Attack and print."""
    if arguments.list:
        _print_list(as_json=arguments.json)
        return 0
    names = _wanted(arguments)

    from splitsec.partyfile import load_folder

    graph = load_folder(arguments.folder).graph  # a mistake is told before torch is loaded
    if arguments.attacker is not None:
        _check_attacker(arguments.attacker, graph)
    report = None if arguments.report is None else _Page(arguments)

    from splitsec.attacks.arena import Ground
    from splitsec.process import leave_the_compiler_out

    with Watched(quiet=arguments.quiet) as watch:
        leave_the_compiler_out()
        with Ground(
            arguments.folder,
            undefended=arguments.undefended,
            seed=arguments.seed,
            auxiliary=arguments.auxiliary,
            batches=arguments.batches,
            attacker=arguments.attacker,
            report=watch,
        ) as ground:
            return _attacked(arguments, names, ground, watch, report)


def _wanted(arguments: argparse.Namespace) -> list[str]:
    from splitsec.attacks.catalogue import names
    from splitsec.errors import UserError
    from splitsec.yamlfile import meant, shown

    known = names()
    if arguments.attack is None:
        raise UserError(
            "no attack named",
            expected="--attack NAME, or --attack all",
            fix="choose one: `splitsec attack --list` prints them",
        )
    if arguments.attack not in ("all", *known):
        raise UserError(
            f"there is no attack `{shown(arguments.attack)}`",
            expected="an attack's name, or `all`",
            fix=f"{meant(arguments.attack, ['all', *known])}  `splitsec attack --list` says what each is",
        )
    if arguments.folder is None:
        raise UserError(
            "no folder named", expected="a folder with graph.yaml and parties/", fix="give it: splitsec attack FOLDER"
        )
    return known if arguments.attack == "all" else [arguments.attack]


def _check_attacker(name: str, graph: Graph) -> None:
    from splitsec.errors import UserError
    from splitsec.yamlfile import meant, shown

    if name not in graph.parties:
        raise UserError(
            f"there is no party `{shown(name)}` in {graph.file}",
            expected="the party that shall attack",
            fix=meant(name, graph.parties),
        )


def _attacked(
    arguments: argparse.Namespace, names: Sequence[str], ground: Any, watch: Watched, report: _Page | None
) -> int:
    """Run ``names`` one after the other; one that fails does not take the others with it."""
    from splitsec.attacks.catalogue import ATTACKS, load
    from splitsec.attacks.report import Failed, summary
    from splitsec.errors import SplitsecError
    from splitsec.process import internal

    outcomes: list[Outcome] = []
    failed: list[Failed] = []
    documents: list[dict[str, Any]] = []
    codes: set[int] = set()
    for place, name in enumerate(names):
        watch({"event": "attack", "attack": name, "title": ATTACKS[name].title, "of": len(names), "place": place + 1})
        try:
            outcome = load(name).run(ground)
        except Exception as error:
            if arguments.attack != "all":
                raise
            if os.environ.get("SPLITSEC_DEBUG") == "1":
                import traceback

                traceback.print_exception(error)
            told = error if isinstance(error, SplitsecError) else internal(error)
            codes.add(told.exit_code)
            failed.append(Failed(name, ATTACKS[name].title, str(told)))
            documents.append(_failure(failed[-1]))
            watch.line(f"{name} failed, the others go on: {told}", always=True)
        else:
            outcomes.append(outcome)
            documents.append(outcome.as_json())
            if not arguments.json:
                watch.pause(lambda one=outcome: print_outcome(one))
        if report is not None:
            report.write(outcomes, failed, names[place + 1 :], ground)
    if arguments.json:
        whole = {
            "folder": _named(arguments.folder),
            "undefended": arguments.undefended,
            "seed": ground.graph.training.seed,
            "sentence": summary(outcomes, undefended=arguments.undefended, failed=failed),
            "attacks": documents,
        }
        print(json.dumps(whole if arguments.attack == "all" else documents[0], indent=2))
    elif len(names) > 1:
        watch.pause(lambda: _print_end(summary(outcomes, undefended=arguments.undefended, failed=failed)))
    if report is not None:
        watch.line(f"report: {report.file}")
    return 0 if not codes else codes.pop() if len(codes) == 1 else 70


def _failure(failed: Failed) -> dict[str, Any]:
    """What stands in the JSON document of `all` for an attack that could not be run: the same keys."""
    from splitsec.attacks.catalogue import ATTACKS
    from splitsec.attacks.outcome import Outcome

    entry = ATTACKS[failed.attack]
    empty = Outcome(entry.name, entry.title, entry.adversary, entry.source, "does not apply", "it failed to run")
    return {**empty.as_json(), "verdict": "failed", "error": failed.why}


def _named(folder: str) -> str:
    """A folder's name as a report shows it."""
    return Path(folder).resolve().name if Path(folder).name in ("", "..") else str(Path(folder))


class _Page:
    """The report's file, looked at before anything runs and written after each attack."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from splitsec.errors import UserError

        self.file = Path(arguments.report)
        self.arguments = arguments
        why = (
            "it is a folder"
            if self.file.is_dir()
            else f"there is no folder {self.file.parent}"
            if not self.file.parent.is_dir()
            else "the folder may not be written to"
            if not os.access(self.file.parent, os.W_OK | os.X_OK)
            else ""
        )
        if why:
            raise UserError(
                f"{self.file}: cannot be written: {why}",
                expected="a file in a folder that you may write to",
                fix="check --report",
            )

    def write(self, outcomes: Sequence[Outcome], failed: Sequence[Failed], waiting: Sequence[str], ground: Any) -> None:
        from splitsec import __version__
        from splitsec.attacks.catalogue import ATTACKS
        from splitsec.attacks.report import page, save
        from splitsec.errors import UserError

        text = page(
            _named(self.arguments.folder),
            outcomes,
            undefended=self.arguments.undefended,
            failed=failed,
            waiting=[ATTACKS[name].title for name in waiting],
            about={
                "made on": time.strftime("%d %B %Y, %H:%M"),
                "by splitsec": __version__,
                "seed": str(ground.graph.training.seed),
            },
            tries={name: entry.tries for name, entry in ATTACKS.items()},
        )
        try:
            save(self.file, text)
        except OSError as error:
            raise UserError(
                f"{self.file}: cannot be written: {error.strerror or error}",
                expected="a file in a folder that you may write to",
                fix="check --report, and whether the disk is full",
            ) from error


# --- on a terminal


class Watched:
    """Shows how an attack goes, on standard error.  Use in a ``with`` block; call it with each event."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.live = self.console.is_terminal and not quiet
        self.bar = Progress(
            TextColumn("{task.fields[attack]}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            transient=True,
            disable=not self.live,
        )
        self.task = self.bar.add_task("starts", total=None, attack="")
        self.started = time.monotonic()
        self.warned: set[str] = set()
        self.counts_itself = False
        """Whether the attack says how far it is: then its parties' steps are many short runs and do not."""

    def __enter__(self) -> Watched:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event: of the command (``attack``), of a party (it has a ``party``), or of the attack itself."""
        match event["event"]:
            case "attack":
                name = event["attack"]
                of = f"attack {event['place']} of {event['of']}: " if event["of"] > 1 else ""
                self.counts_itself = False
                self.bar.reset(self.task, total=None, attack=name, description="starts the parties")
                self.line(f"{of}{event['title']} ({name})")
            case "step" if not self.counts_itself and event.get("phase", "train") == "train":
                self.bar.update(self.task, total=event["of"], completed=event["done"], description=self._doing(event))
            case "progress":
                self.counts_itself = self.counts_itself or "party" not in event
                words = str(event.get("text", "cases tried" if "party" not in event else "the attacker computes"))
                self.bar.update(self.task, total=event["of"], completed=event["done"], description=words)
            case "alarm":
                self.line(f"{event['party']} stopped in batch {event['batch']}: {event['text']}")
            case "warning":
                if (text := f"{event.get('party', 'splitsec')}: {event['text']}") not in self.warned:
                    self.warned.add(text)
                    self.line(text)

    @staticmethod
    def _doing(event: Mapping[str, Any]) -> str:
        return f"trains epoch {event['epoch'] + 1}" if "epoch" in event else "trains"

    def line(self, text: str, *, always: bool = False) -> None:
        """One line of progress; ``always``: also where no progress is wanted."""
        from splitsec.attacks.report import clean

        text = "\n".join(clean(line) for line in text.split("\n"))
        if always and self.console.quiet:
            print(text, file=sys.stderr)
        else:
            where = self.bar.console if self.live else self.console
            where.print(f"{time.monotonic() - self.started:7.1f} s  {text}", markup=False, soft_wrap=True)

    def pause(self, show: Any) -> None:
        """``show()`` prints on standard output, which may be the terminal that the bar is on."""
        self.bar.stop()
        show()
        sys.stdout.flush()
        self.bar.start()


STYLES: Final[Mapping[Verdict, str]] = {
    "recovered": "bold red",
    "partly recovered": "bold yellow",
    "nothing recovered": "bold green",
    "stopped": "bold green",
    "refused": "bold green",
    "not all held": "bold yellow",
    "does not apply": "dim",
}


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=110)


def print_outcome(outcome: Outcome) -> None:
    """A block on standard output: title and verdict, the sentence, the numbers, the cases."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from splitsec.attacks.report import clean, numbers, sentence

    console = _console()
    console.print(
        Text.assemble(
            (clean(outcome.title), "bold"), f" ({clean(outcome.attack)}): ", (outcome.verdict, STYLES[outcome.verdict])
        )
    )
    _print_indented(console, Text(sentence(outcome)))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for one in numbers(outcome):
        table.add_row(Text(clean(one.name)), Text(one.shown, style="bold"), Text(clean(one.reading), style="dim"))
    if outcome.verdict != "does not apply":
        table.add_row(Text("defences"), "", Text(clean("; ".join(outcome.defences)) or "none"))
    if table.row_count:
        console.print(Padding(table, (0, 0, 0, 2)))
    for case in sorted(outcome.cases, key=lambda case: case.held):
        how = ("held", "green") if case.held else ("NOT HELD", "bold red")
        line = Text.assemble(how, f"  {clean(case.name)}: {clean(case.tried)}. ", (clean(case.seen), "dim"))
        _print_indented(console, line)
    console.print()


def _print_indented(console: Any, text: Any) -> None:
    """``text`` wrapped, without the blanks at the end of lines that padding would leave."""
    for line in text.wrap(console, console.width - 2):
        line.rstrip()
        line.pad_left(2)
        console.print(line)


def _print_end(text: str) -> None:
    from rich.text import Text

    _console().print(Text(text))


def _print_list(*, as_json: bool) -> None:
    from splitsec.attacks.catalogue import ATTACKS

    if as_json:
        shown = ("name", "title", "adversary", "tries", "source")
        print(json.dumps([{key: getattr(entry, key) for key in shown} for entry in ATTACKS.values()], indent=2))
        return
    width = max(map(len, ATTACKS))
    for entry in ATTACKS.values():
        lines = [f"{entry.title}: {entry.tries}.", f"By {entry.adversary}; source: {entry.source}."]
        first, *rest = [part for line in lines for part in textwrap.wrap(line, 108 - width)]
        print(f"{entry.name:<{width}}  {first}")
        for line in rest:
            print(f"{'':<{width}}  {line}")
