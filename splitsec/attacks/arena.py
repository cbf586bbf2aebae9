"""Where an attack is fought: a folder's honest parties, each the ordinary process, beside one process that attacks.

Here: what of a folder an attacker is granted, the run, and what the parties told of it.  The honest parties get the
folder's own files, and neither know nor are told that somebody stands in for one of them.  Not here: what the attacker
does (``strategy``), whether it succeeded (``attack``).
"""

from __future__ import annotations

import inspect
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from splitsec.attacks.strategy import Loot
from splitsec.demands import demands_of
from splitsec.errors import PartyFailed, PartyFileError, UserError
from splitsec.graph import Graph
from splitsec.nest import Nest, open_nest
from splitsec.partyfile import NO_DETECTORS, Folder, PartyFile, load_folder, load_function
from splitsec.plan import make_plan
from splitsec.probe import probe
from splitsec.samples import Samples, read_own
from splitsec.schedule import TRAIN, Turn, run_schedule, step_count
from splitsec.simulation import Processes, StandIn, needed_by
from splitsec.usercode import user_code

__all__ = ["Aim", "Alarm", "Fought", "Ground", "Report", "read_loot", "write_loot"]

Report = Callable[[dict[str, Any]], None]

ADVERSARY: Final = "splitsec.attacks.adversary"
"""What an attacking party's process runs, as a rule."""

PATIENCE: Final = 1800.0
"""Seconds that one run may take, the attacker's own computing included."""


@dataclass(frozen=True)
class Aim:
    """Who attacks whom, over which cut."""

    attacker: str
    victims: tuple[str, ...]
    cut: str
    """``source -> target``, as in ``Lane.name``."""
    shape: tuple[int, ...]
    """Of one of the victims' samples."""
    cut_shape: tuple[int, ...]
    field: str
    """The field of the victims' samples that their segment reads."""
    label_field: str | None

    @classmethod
    def told(cls, values: Mapping[str, Any]) -> Aim:
        """One that went through JSON."""
        tuples = {name: tuple(values[name]) for name in ("victims", "shape", "cut_shape")}
        return cls(**{**values, **tuples})


@dataclass(frozen=True)
class Alarm:
    """What the first detector that went off said."""

    party: str
    detector: str
    batch: int
    text: str


@dataclass
class Fought:
    """How a run with an attacker in it went."""

    graph: Graph
    """As it was run: with the epochs and the seed of this run."""
    events: Mapping[str, list[dict[str, Any]]]
    """What each party reported."""
    failures: Mapping[str, dict[str, Any]]
    """How parties failed, by party: ``code``, ``text``."""
    loots: Mapping[str, Loot]
    """What each attacker carried off."""
    place: Path
    """What the parties wrote: ``out`` (trained segments), ``state`` (journals and ledgers) and ``trace`` (where asked
    for), each with a folder or file for every party."""
    logs: Mapping[str, str]
    """The last lines of what each party's process wrote."""
    stalled: bool
    """Whether it was ended because it took too long, or nobody said anything any more."""
    seconds: float

    @property
    def loot(self) -> Loot:
        """Of the only attacker."""
        (loot,) = self.loots.values()
        return loot

    @property
    def out(self) -> Path:
        """Every party's trained segments, ``<party>/<segment>.safetensors``, where the run came to its end."""
        return self.place / "out"

    @property
    def alarm(self) -> Alarm | None:
        """The first alarm of an honest party."""
        alarms = [
            Alarm(party, event["detector"], event["batch"], event["text"])
            for party, events in self.events.items()
            for event in events
            if event["event"] == "alarm"
        ]
        return min(alarms, key=lambda alarm: alarm.batch, default=None)


class Ground:
    """A folder to attack.  Use as a context: its scratch folder goes with it.

    ``auxiliary``: ``module:function`` of the attacker's public samples; ``batches``: how many training batches to run
    for, in place of each attack's own; ``attacker``: the party to stand in for, in place of the attack's choice.
    ``report`` is told of all parties' events and of the attack's own progress.  Raises ``SplitsecError`` where the
    folder has a mistake.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        undefended: bool = False,
        seed: int | None = None,
        auxiliary: str | None = None,
        batches: int | None = None,
        attacker: str | None = None,
        options: Mapping[str, Any] | None = None,
        report: Report = lambda event: None,
    ) -> None:
        loaded = load_folder(folder)
        graph = loaded.graph
        if not graph.segments:
            raise graph.error("the graph has no segments, so there is nothing to attack", expected="a graph to train")
        if attacker is not None and attacker not in graph.parties:
            raise UserError(
                f"no party {attacker!r} in {graph.file}",
                expected="one of " + ", ".join(graph.parties),
                fix="choose another --attacker",
            )
        if seed is not None:
            graph = _with_training(graph, seed=seed)
        if undefended:
            graph = _without_floors(graph)
        parties = {name: one.undefended() if undefended else one for name, one in loaded.parties.items()}
        self.folder = Folder(loaded.path, graph, parties)
        probe(self.folder)
        self.graph = graph
        self.undefended = undefended
        self.batches = batches
        self.attacker = attacker
        self.options = dict(options or {})
        self.report = report
        self._auxiliary = auxiliary
        self._closing = ExitStack()
        self.scratch = Path(self._closing.enter_context(tempfile.TemporaryDirectory(prefix="splitsec-attack-")))

    def __enter__(self) -> Ground:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    # --- what there is

    @cached_property
    def samples(self) -> Mapping[str, Mapping[str, Samples]]:
        """Every party's samples by split: the truth, for the judge alone."""
        return {
            name: read_own(one, make_plan(self.graph, name), ("train", "test"), labels=True)
            for name, one in self.folder.parties.items()
        }

    def steps_an_epoch(self) -> int:
        """Training batches of one epoch, over all turns."""
        return _steps(_with_training(self.graph, epochs=1), self._counts())

    def _counts(self) -> list[dict[str, int]]:
        counts = []
        for stream in range(self.graph.streams):
            leader = self.samples[self.graph.data_parties(stream)[0]]
            counts.append({split: leader[split].count if split in leader else 0 for split in ("train", "test")})
        return [{**count, "predict": 0} for count in counts]

    def public(self, aim: Aim) -> dict[str, torch.Tensor]:
        """Samples like the victims' that belong to nobody: ``x`` and, where there are labels, ``y``.

        From ``auxiliary``, else from a function ``public`` beside the victims' data functions, else the victims' test
        samples.
        """
        owner = self.folder.parties[aim.victims[0]]
        fields = self._public_fields(aim, owner)
        if aim.field not in fields:
            raise UserError(
                f"the auxiliary samples have no field {aim.field!r}",
                expected="the fields of the victims' samples",
                fix="return the same fields as `data.train` does",
            )
        found = {"x": torch.as_tensor(fields[aim.field])}
        if aim.label_field is not None and aim.label_field in fields:
            found["y"] = torch.as_tensor(fields[aim.label_field])
        if tuple(found["x"].shape[1:]) != aim.shape:
            raise UserError(
                f"the auxiliary samples have shape {list(found['x'].shape[1:])}",
                expected=f"{list(aim.shape)}, as the victims' have",
                fix="choose another --auxiliary",
            )
        return {name: tensor.clone().contiguous() for name, tensor in found.items()}

    def _public_fields(self, aim: Aim, owner: PartyFile) -> Mapping[str, Any]:
        assert owner.data is not None and owner.data.train is not None
        spec = self._auxiliary
        if spec is None:
            beside = owner.data.train.partition(":")[0] + ":public"
            try:
                load_function(beside, owner.folder)
                spec = beside
            except PartyFileError:
                held = [self.samples[name].get("test") for name in aim.victims]
                tests = [one for one in held if one is not None and one.count]
                if not tests:
                    raise UserError(
                        "the attacker has no samples of its own",
                        expected="a function `public` beside the data functions, test samples, or --auxiliary",
                        fix="name a function that returns samples like the victims': --auxiliary data:public",
                    ) from None
                fields = set(tests[0].fields).intersection(*(one.fields for one in tests))
                return {name: torch.cat([one.fields[name] for one in tests]) for name in fields}
        function = load_function(spec, owner.folder)
        with user_code(f"`{spec}`, which gives the attacker's samples,"):
            takes = inspect.signature(function).parameters
            returned = function(**{name: value for name, value in owner.data.args.items() if name in takes})
        if not isinstance(returned, Mapping):
            raise UserError(f"`{spec}` returned {type(returned).__name__}", expected="a dict of fields, as data.train")
        return returned

    def defences(self) -> tuple[str, ...]:
        """What is switched on in this folder, in words."""
        found: dict[str, None] = {}
        for name, one in self.folder.parties.items():
            for demand in demands_of(self.graph, one, make_plan(self.graph, name)).values():
                if demand.policy is not None:
                    found[f"{demand}: {demand.lane.kind} of {demand.lane.name}"] = None
            for segment, code in one.segments.items():
                if code.nopeek is not None:
                    found[f"NoPeek {code.nopeek:g} at {segment}"] = None
                if code.dp_sgd is not None:
                    found[f"DP-SGD at {segment}"] = None
        if any(one.detectors != NO_DETECTORS for one in self.folder.parties.values()):
            found["detectors"] = None
        return tuple(found)

    # --- a run

    def fight(
        self,
        attack: str,
        aim: Aim | None,
        attackers: Sequence[str] = (),
        *,
        batches: int,
        module: str = ADVERSARY,
        knows_architecture: bool = False,
        has_public: bool = True,
        options: Mapping[str, Any] | None = None,
        in_front: Callable[[str, str], str] = lambda party, address: address,
        told: Mapping[str, Any] | None = None,
        timeouts: Mapping[str, float] | None = None,
        when: Callable[[str, dict[str, Any], Processes], None] = lambda party, event, processes: None,
        trace: bool = False,
        patience: float = PATIENCE,
        quiet: float | None = None,
        nest: Nest | None = None,
    ) -> Fought:
        """Train the folder's graph for at least ``batches`` training batches, with each of ``attackers`` run by
        ``module``, told ``attack``, ``aim`` and ``options``.

        ``in_front``: as ``Processes`` takes it.  ``nest``: where processes are forked; None: in one of this run's own.
        ``told``: replaces what attackers are told (another ``graph``, say).  ``timeouts``: replace the graph's.
        ``when`` sees every event as it comes, with the processes (their throw-away keys, their addresses in
        ``graph``).  ``patience``, ``quiet``: seconds, as ``Processes.outlast`` takes them.  Raises ``PartyFailed``
        where an attacker with the standard ``module`` fails by itself.
        """
        began = time.monotonic()
        wanted = self.batches or batches
        epochs = max(1, math.ceil(wanted / max(1, self.steps_an_epoch())))
        graph = _with_training(self.graph, epochs=epochs)
        graph = graph.model_copy(update={"timeouts": graph.timeouts.model_copy(update=dict(timeouts or {}))})
        place = Path(tempfile.mkdtemp(dir=self.scratch))
        (place / "out").mkdir()
        job = {
            "action": "train",
            "out": str(place / "out"),
            "weights": None,
            "split": "train",
            "trace": str(place / "trace") if trace else None,
            "state": str(place / "state"),
        }
        stand_ins = {}
        public = self._public_file(aim, place) if has_public else None
        for attacker in attackers:
            loot = place / f"loot-{attacker}"
            more = {
                "attack": attack,
                "aim": None if aim is None else vars(aim),
                "options": {**self.options, **(options or {})},
                "public": public,
                "architecture": self._architecture(aim) if knows_architecture and aim is not None else None,
                "loot": str(loot),
                "seed": self.graph.training.seed,
                **(told or {}),
            }
            stand_ins[attacker] = StandIn(module, more)

        def watch(party: str, event: dict[str, Any]) -> None:
            self.report({**event, "party": party})
            when(party, event, processes)

        if trace:
            (place / "trace").mkdir()
        needed = [*needed_by(self.folder), *([module] if attackers else [])]
        with (
            open_nest(needed) if nest is None else nullcontext(nest) as open_one,
            Processes(
                Folder(self.folder.path, graph, self.folder.parties),
                job,
                watch,
                stand_ins=stand_ins,
                in_front=in_front,
                more={"undefended": self.undefended},
                nest=open_one,
            ) as processes,
        ):
            ended = processes.outlast(patience, quiet=quiet)
            failures = processes.failures
            logs = {name: processes.log_of(name) for name in processes.events}
            for attacker in attackers:
                if attacker in failures and module == ADVERSARY:
                    failure = failures[attacker]
                    text = f"{failure['text']}\n{logs[attacker]}"
                    raise PartyFailed(attacker, text, exit_code=failure["exit_code"], kind=failure["code"])
        return Fought(
            graph=processes.graph,
            events=dict(processes.events),
            failures=failures,
            loots={attacker: read_loot(place / f"loot-{attacker}") for attacker in attackers},
            place=place,
            logs=logs,
            stalled=not ended,
            seconds=time.monotonic() - began,
        )

    def _public_file(self, aim: Aim | None, place: Path) -> str | None:
        if aim is None:
            return None
        file = place / "public.safetensors"
        save_file(self.public(aim), file)
        return str(file)

    def _architecture(self, aim: Aim) -> dict[str, str]:
        """Where an attacker that knows the victims' architecture finds it."""
        return {
            "party_file": str(self.folder.parties[aim.victims[0]].file),
            "segment": aim.cut.partition(" -> ")[0],
        }


def write_loot(loot: Loot, folder: Path) -> None:
    """Write ``loot`` to ``folder``, for ``read_loot``."""
    folder.mkdir(parents=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in loot.tensors.items()}, folder / "tensors")
    (folder / "numbers.json").write_text(json.dumps({"numbers": loot.numbers, "curves": loot.curves}))


def read_loot(folder: Path) -> Loot:
    """What ``write_loot`` wrote; empty where the attacker wrote nothing."""
    if not (folder / "numbers.json").is_file():
        return Loot()
    plain = json.loads((folder / "numbers.json").read_text())
    curves = {name: [(float(x), float(y)) for x, y in points] for name, points in plain["curves"].items()}
    return Loot(load_file(folder / "tensors"), plain["numbers"], curves)


def _with_training(graph: Graph, **values: int) -> Graph:
    return graph.model_copy(update={"training": graph.training.model_copy(update=values)})


def _without_floors(graph: Graph) -> Graph:
    cuts = tuple(cut.model_copy(update={"privacy": None}) for cut in graph.cuts)
    labels = tuple(edge.model_copy(update={"privacy": None}) for edge in graph.labels)
    return graph.model_copy(update={"cuts": cuts, "labels": labels})


def _steps(graph: Graph, counts: Sequence[Mapping[str, int]]) -> int:
    turns = [turn for turn in run_schedule(graph, epochs=graph.training.epochs) if isinstance(turn, Turn)]
    return sum(step_count(graph, turn, counts) for turn in turns if turn.phase == TRAIN)
