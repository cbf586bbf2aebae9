"""Backdoors and poisoned gradients: parties that spoil what is learnt, and how far they get.

Here: three forms, each where the graph has a party for it.

*A client without labels* (a party with columns of its own, as in the vertical example) finds out labels, then adds a
trigger to the activations of one label's samples: Bai, Chen, Zhang, Xu, Weng, Goodman: VILLAIN: Backdoor Attacks
Against Vertical Split Learning, USENIX Security 2023, section 4.  The trigger is VILLAIN's: the numbers that vary
most, raised and lowered in pairs by a multiple of their spread, scaled and thinned at random while training.  Three
things are otherwise than there.  VILLAIN finds labels by swapping embeddings with a sample whose label it knows and
watching the gradient's norm; the directions of one epoch's gradients (``labels``) tell them without a known sample, and
without sending anything false until then.  VILLAIN trains its own model at a higher rate so that the network relies on
it; here its activations are ten times as large.  And what carries the trigger is the activation of a sample with
*another* label.  On the example the trigger works for 88% with both of the last two (mean of seeds 7, 8, 9), for 49%
with loudness alone, 14% with other labels' activations alone, 5% with neither.
*A client with labels* (one of several clinics) puts a patch on some of its own samples and a wrong label on them: Gu,
Dolan-Gavitt, Garg: BadNets, 2017, section 5, in split form.
*A server* sends its clients gradients with the sign turned round.

How well it worked is measured on the test samples of all parties, with the segments that the parties ended with,
beside a run of the same length in which everybody was honest.  Not here: a server that spoils its own segment (it may
compute what it likes, and nobody else can tell), and clients who lie when they predict, which takes no training:
figures say what that alone does, for comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import torch

from splitsec.attacks.arena import Aim, Fought, Ground
from splitsec.attacks.attack import CutAttack, Judgement, Truth
from splitsec.attacks.labels import Overhearing, classifies, clusters, dominant_direction
from splitsec.attacks.outcome import Case, Outcome, Verdict
from splitsec.attacks.strategy import Imposter, Loot, Scene, Strategy
from splitsec.graph import Graph
from splitsec.party import load_segments
from splitsec.plan import Edge, Stage, make_plan
from splitsec.samples import Samples, epoch_order
from splitsec.schedule import TRAIN, Turn
from splitsec.segments import Segment, build_segments

__all__ = ["Backdoor", "BackdoorStrategy", "Form", "Predicted", "forms_of", "patched", "predict_with"]

Form = Literal["client without labels", "client with labels", "server"]

POISONED: Final = 0.1
"""Share of its own samples that a client with labels poisons."""
TRIGGERED: Final = 0.2
"""Share of the target label's samples whose activations carry the trigger of a client without labels."""
LOUD: Final = 10.0
"""What a client without labels multiplies its activations with, so that the network comes to rely on them."""
STRENGTH: Final = 6.0
"""Of its trigger, in spreads of the numbers that vary most."""
TARGET: Final = 0
"""The label that a client with labels wants."""
FLIP: Final = -1.0
"""What a server multiplies its clients' gradients with."""
WORKED: Final = 0.2
"""More of the samples flipped than by the same trigger in an honest network: a backdoor."""
RUINED: Final = 0.05
"""Accuracy lost from which on a training counts as spoilt."""


# --- the attacker's half


def patched(x: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """``x [n, ...]`` with the trigger of a client with labels: of images, a square of brightest pixels in the last
    corner, a seventh of the side; of tables, the last tenth of the columns at their highest value.
    """
    x = x.clone()
    if x.dim() >= 4:
        rows, columns = (max(1, -(-side // 7)) for side in x.shape[-2:])
        x[..., -rows:, -columns:] = high.amax()
    else:
        wide = max(1, x.shape[1] // 10)
        x[:, -wide:] = high.expand(x.shape[1:])[-wide:]
    return x


class BackdoorStrategy(Strategy):
    """Option ``form`` says what it does; ``target`` is the label that a client with labels wants, ``classes`` how many
    labels there are.

    Loot of a client without labels: ``trigger [*cut shape]``, ``poisoned [n, 3]`` (the places of samples that carried
    it); of one with labels ``high``, what ``patched`` takes.
    """

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.form: Form = scene.options["form"]
        self.planter: _Planter | None = None
        self.flipping: _Flipping | None = None
        self.high = torch.ones(())

    def take_over(self, honest: Mapping[str, Segment]) -> dict[str, Segment]:
        source, _, target = self.scene.cut.partition(" -> ")
        if self.form == "client without labels":
            self.planter = _Planter(honest[source], self.scene, self)
            return {**honest, source: self.planter}
        if self.form == "server":
            self.flipping = _Flipping(honest[target], self.scene.options.get("factor", FLIP))
            return {**honest, target: self.flipping}
        return dict(honest)

    def samples(self, split: str, fields: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        if self.form != "client with labels" or split != "train":
            return fields
        segment = self.scene.cut.partition(" -> ")[0]
        read = self.scene.graph.segments[segment].data
        labels = next(edge.field for edge in self.scene.graph.labels if edge.field in fields)
        assert read is not None
        x, y = fields[read], fields[labels]
        self.high = x.amax(0)
        generator = torch.Generator().manual_seed(self.scene.seed)
        target = self.scene.options.get("target", TARGET)
        others = (y.flatten(1).float().mean(1) if y.dim() > 1 else y.float()).sub(target).abs() > 0.5
        candidates = others.nonzero()[:, 0]
        chosen = candidates[torch.randperm(len(candidates), generator=generator)[: round(POISONED * len(x))]]
        x, y = x.clone(), y.clone()
        x[chosen] = patched(x[chosen], self.high)
        y[chosen] = torch.as_tensor(target, dtype=y.dtype)
        return {**fields, read: x, labels: y}

    def turn(self, turn: Turn) -> None:
        super().turn(turn)
        if self.planter is not None and turn.phase == TRAIN and turn.epoch > 0:
            self.planter.make_ready()

    def loot(self) -> Loot:
        if self.planter is None:
            batches = 0 if self.flipping is None else self.flipping.steps
            return Loot({"high": self.high}, {"batches": batches})
        loot = Loot(numbers={"batches": self.planter.steps})
        if self.planter.trigger is not None:
            loot.tensors["trigger"] = self.planter.trigger
            loot.tensors["poisoned"] = self.planter.poisoned
        return loot


class _Planter(Overhearing):
    """Listens for an epoch, tells labels from it, then hides a trigger in the activations of one label's samples.

    All its activations are ``LOUD``; its own module learns as if they were not.
    """

    def __init__(self, honest: Segment, scene: Scene, strategy: Strategy) -> None:
        super().__init__(honest, scene.cut, strategy, keep=10**9)
        self.trigger: torch.Tensor | None = None
        self.poisoned = torch.empty(0, 3, dtype=torch.int64)
        self._scene = scene
        self._chosen: dict[int, torch.Tensor] = {}
        """By stream: whether a sample carries the trigger, in the streams' own order."""
        self._others: dict[int, torch.Tensor] = {}
        """The same: whether it has another label than the target."""
        self._generator = torch.Generator().manual_seed(scene.seed)

    def make_ready(self) -> None:
        """Tell labels from the first epoch, choose the target label's samples, and make the trigger."""
        heard = [one for one in self.heard if one.place[0] == 0 and one.gradient is not None]
        if self.trigger is not None or not heard:
            return
        gradients = torch.cat([one.gradient for one in heard if one.gradient is not None]).flatten(1).float()
        units = torch.nn.functional.normalize(gradients, dim=1)
        classes = int(self._scene.options.get("classes", 2))
        if classes == 2:
            found = (units @ dominant_direction(units) > 0).long()
        else:
            found = clusters(units, classes, seed=self._scene.seed)
        target = int(torch.bincount(found).argmax())
        spread = LOUD * torch.cat([one.activation for one in heard]).flatten(1).std(0)
        strongest = spread.argsort(descending=True)[: max(2, len(spread) // 2)]
        signs = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(len(strongest) // 4 + 1)[: len(strongest)]
        trigger = torch.zeros_like(spread)
        trigger[strongest] = STRENGTH * spread[strongest].mean() * signs
        of_target = (found == target).nonzero()[:, 0]
        wanted = max(1, round(TRIGGERED * len(of_target)))
        chosen = torch.zeros(len(found), dtype=torch.bool)
        chosen[of_target[torch.randperm(len(of_target), generator=self._generator)[:wanted]]] = True
        places = torch.tensor(
            [(0, one.place[1], one.place[2] + row) for one in heard for row in range(len(one.activation))]
        )
        self.poisoned = places[chosen]
        for stream in set(places[:, 1].tolist()):
            here = places[:, 1] == stream
            rows = epoch_order(self._scene.graph.training.seed, 0, stream, int(here.sum()))[places[here][:, 2]]
            self._chosen[stream] = torch.zeros(len(rows), dtype=torch.bool)
            self._chosen[stream][rows] = chosen[here]
            self._others[stream] = torch.zeros(len(rows), dtype=torch.bool)
            self._others[stream][rows] = found[here] != target
        self.trigger = trigger.reshape(self._scene.cut_shape)

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
        outputs, prediction = super().forward(stage, inputs, labels, micro=micro, update=update, share=share)
        for edge, output in outputs.items():
            if f"{edge.source} -> {edge.target}" == self._cut:
                outputs[edge] = LOUD * output
                if update is not None and self.trigger is not None:
                    outputs[edge] = self._with_trigger(outputs[edge], *self.heard[-1].place)
        return outputs, prediction

    def _with_trigger(self, output: torch.Tensor, epoch: int, stream: int, position: int) -> torch.Tensor:
        assert self.trigger is not None
        order = epoch_order(self._scene.graph.training.seed, epoch, stream, len(self._chosen[stream]))
        rows = order[position : position + len(output)]
        carries, donors = self._chosen[stream][rows], output[self._others[stream][rows]]
        count = int(carries.sum())
        scale = 0.6 + 0.6 * torch.rand(count, *[1] * (output.dim() - 1), generator=self._generator)
        kept = (torch.rand(count, *output.shape[1:], generator=self._generator) > 0.25).to(output.dtype)
        output = output.clone()
        if len(donors):
            output[carries] = donors[torch.randint(len(donors), (count,), generator=self._generator)]
        output[carries] += scale * kept * self.trigger
        return output


class _Flipping(Imposter):
    """Trains itself honestly and sends back every gradient multiplied by ``factor``."""

    def __init__(self, honest: Segment, factor: float) -> None:
        super().__init__(honest)
        self.factor = factor
        self.steps = 0

    def backward(
        self, stage: Stage, gradients: Mapping[Edge, torch.Tensor | None], *, micro: int, place: int = 0
    ) -> list[torch.Tensor | None]:
        back = super().backward(stage, gradients, micro=micro, place=place)
        return [
            gradient if gradient is None or edge.local else self.factor * gradient
            for edge, gradient in zip(stage.inputs, back, strict=True)
        ]

    def step(self) -> None:
        super().step()
        self.steps += 1


# --- the judge's half


@dataclass(frozen=True)
class Predicted:
    """What a network says of test samples: ``said`` and ``labels``, int64 ``[n]``; ``stream``: whose they are."""

    said: torch.Tensor
    labels: torch.Tensor
    stream: torch.Tensor

    @property
    def accuracy(self) -> float:
        return float((self.said == self.labels).double().mean())

    def share(self, target: int, *, without: int | None = None) -> float:
        """Of the samples that have another label than ``target``, in streams other than ``without``: how many are said
        to have it.
        """
        asked = self.labels != target
        if without is not None:
            asked &= self.stream != without
        return float((self.said[asked] == target).double().mean()) if bool(asked.any()) else 0.0


def predict_with(
    graph: Graph,
    segments: Mapping[str, Mapping[str, Segment]],
    samples: Mapping[str, Mapping[str, Samples]],
    *,
    sample: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    cut: str = "",
    activation: Callable[[torch.Tensor], torch.Tensor] = lambda a: a,
) -> Predicted:
    """Send every party's test samples through ``segments`` (by party and name), in this process.

    ``sample`` alters what segments read; ``activation`` what passes the cut named ``cut``.  Of the loss of the
    graph's first labels.
    """
    edge = graph.labels[0]
    said, truths, streams = [], [], []
    for stream in range(graph.streams):
        holders = graph.data_parties(stream)
        leader = samples[holders[0]]["test"]
        order = {name: _order(leader, samples[name]["test"]) for name in holders}
        stages = [
            (graph.party_at(graph.segments[one.segment].at, stream), one)
            for name in dict.fromkeys(graph.party_at(part.at, stream) for part in graph.segments.values())
            for one in make_plan(graph, name).streams[stream].stages
        ]
        made: dict[int, torch.Tensor] = {}
        answer = None
        while stages:
            party, stage = next(one for one in stages if all(given.index in made for given in one[1].inputs))
            stages.remove((party, stage))
            inputs = [made[given.index] for given in stage.inputs]
            if stage.reads is not None:
                inputs.append(sample(samples[party]["test"].fields[stage.reads][order[party]]))
            outputs, prediction = segments[party][stage.segment].forward(
                stage, inputs, None, micro=0, update=None, share=1.0
            )
            for out, tensor in outputs.items():
                made[out.index] = activation(tensor) if f"{out.source} -> {out.target}" == cut else tensor
            if stage.segment == edge.target:
                answer = prediction
        assert answer is not None and edge.field is not None
        giver = graph.party_at(edge.source, stream)
        said.append(answer.argmax(1) if answer.dim() > 1 and answer.shape[1] > 1 else (answer.flatten() > 0).long())
        truths.append(samples[giver]["test"].fields[edge.field][order[giver]].flatten().round().long())
        streams.append(torch.full((len(said[-1]),), stream))
    return Predicted(torch.cat(said), torch.cat(truths), torch.cat(streams))


def _order(leader: Samples, other: Samples) -> torch.Tensor:
    if leader.ids is None or other.ids is None:
        return torch.arange(leader.count)
    rows = {one: row for row, one in enumerate(other.ids)}
    return torch.tensor([rows[one] for one in leader.ids])


class Backdoor(CutAttack):
    """Every form that the graph has a party for, one run each, and one run without any."""

    name: ClassVar[str] = "backdoor"
    batches: ClassVar[int] = 100
    has_public: ClassVar[bool] = False
    strategy: ClassVar[type[Strategy]] = BackdoorStrategy

    def run(self, ground: Ground) -> Outcome:
        began = time.monotonic()
        aims = list(forms_of(ground))
        if not aims:
            return self.outcome(ground, Judgement("does not apply", _why_not(ground)))
        peace = ground.fight(self.name, None, (), batches=self.batches, has_public=False)
        if peace.failures:
            (party, failure), *_ = peace.failures.items()
            said = f"The run without an attacker did not end, so there is nothing to compare with: {party}: "
            return self.outcome(ground, Judgement("stopped", said + failure["text"]), fought=peace)
        honest = _trained(ground, peace.out)
        figures = {"accuracy of an honest network": _predict(ground, honest).accuracy}
        cases: list[Case] = []
        stopped: Fought | None = None
        for form, aim in aims:
            options = {"form": form, "classes": _classes(ground)}
            fought = ground.fight(
                self.name, aim, [aim.attacker], batches=self.batches, has_public=False, options=options
            )
            if stopped is None and fought.alarm is not None:
                stopped = fought
            case, found = _judged(ground, form, aim, fought, honest, figures["accuracy of an honest network"])
            cases.append(case)
            figures |= {f"{form}: {name}": value for name, value in found.items()}
        batches = peace.graph.training.epochs * ground.steps_an_epoch()
        worked = [case for case in cases if not case.held]
        verdict: Verdict = "not all held" if worked else "stopped" if stopped is not None else "nothing recovered"
        sentence = " ".join(
            case.seen for case in worked
        ) or "None of the attempts changed what the network learnt: " + (" ".join(case.seen for case in cases))
        judged = Judgement(verdict, sentence, figures=figures, cases=tuple(cases))
        return self.outcome(ground, judged, fought=stopped, batches=batches, seconds=time.monotonic() - began)


def forms_of(ground: Ground) -> Iterator[tuple[Form, Aim]]:
    """The forms that apply, and who attacks whom."""
    graph = ground.graph
    if not graph.labels or not classifies(graph, graph.labels[0]):
        return
    holders = {name for stream in range(graph.streams) for name in graph.data_parties(stream)}
    if any("test" not in ground.samples[name] for name in holders):
        return
    edge = graph.labels[0]
    givers, takers = set(graph.members(edge.source)), set(graph.members(graph.segments[edge.target].at))
    for form in ("client without labels", "client with labels", "server"):
        for cut in graph.cuts:
            source, target = graph.segments[cut.source], graph.segments[cut.target]
            if source.data is None or source.at == target.at:
                continue
            clients = graph.members(source.at)
            if form == "server":
                attackers, victims = graph.members(target.at), clients
                fits = not any(graph.segments[name].data for name in _held(graph, target.at))
            elif form == "client with labels":
                attackers = clients
                victims = ()
                fits = len(clients) > 1 and givers == set(clients)
            else:
                attackers, victims = clients, tuple(sorted(takers))
                fits = len(clients) == 1 and not givers & set(clients) and not takers & set(clients)
            chosen = [name for name in attackers if ground.attacker in (None, name)]
            if not fits or not chosen:
                continue
            held = ground.samples[clients[0]]["train"].fields[source.data]
            yield (
                form,
                Aim(
                    attacker=chosen[0],
                    victims=victims or tuple(name for name in clients if name != chosen[0]),
                    cut=f"{cut.source} -> {cut.target}",
                    shape=tuple(held.shape[1:]),
                    cut_shape=tuple(cut.shape),
                    field=source.data,
                    label_field=edge.field,
                ),
            )
            break


def _held(graph: Graph, place: str) -> list[str]:
    return [name for name, segment in graph.segments.items() if segment.at == place]


def _why_not(ground: Ground) -> str:
    if ground.attacker is not None:
        return f"{ground.attacker} neither sends what it computes from samples of its own nor returns gradients for it"
    return "this takes labels of which there are several, and test samples of all who hold samples"


def _classes(ground: Ground) -> int:
    edge = ground.graph.labels[0]
    assert edge.field is not None
    givers = ground.graph.members(edge.source)
    return max(2, 1 + max(int(ground.samples[name]["train"].fields[edge.field].max()) for name in givers))


Trained = Mapping[str, Mapping[str, Segment]]


def _trained(ground: Ground, out: Path) -> Trained:
    segments = {}
    for name, file in ground.folder.parties.items():
        segments[name] = build_segments(ground.graph, file)
        load_segments(segments[name], out, name)
    return segments


def _predict(ground: Ground, segments: Trained, **changes: Any) -> Predicted:
    return predict_with(ground.graph, segments, ground.samples, **changes)


def _judged(
    ground: Ground, form: Form, aim: Aim, fought: Fought, honest: Trained, accuracy: float
) -> tuple[Case, dict[str, float]]:
    tried = {
        "client without labels": f"{aim.attacker} hides a trigger in the activations of one label's samples",
        "client with labels": f"{aim.attacker} puts a patch and a wrong label on {POISONED:.0%} of its samples",
        "server": f"{aim.attacker} turns the gradients that it sends round",
    }[form]
    if fought.alarm is not None:
        alarm = fought.alarm
        seen = f"{alarm.party} stopped at batch {alarm.batch} ({alarm.detector}): {alarm.text}"
        return Case(form, tried, True, seen), {}
    if fought.failures:
        (party, failure), *_ = fought.failures.items()
        return Case(form, tried, True, f"The run ended before anything was learnt; {party}: {failure['text']}"), {}
    spoilt = _trained(ground, fought.out)
    reached = _predict(ground, spoilt).accuracy
    if form == "server":
        lost = accuracy - reached
        seen = (
            f"{aim.attacker}, which sent gradients with the sign turned round, left {reached:.0%} accuracy where an "
            f"honest training reaches {accuracy:.0%}; no party noticed."
            if lost > RUINED
            else f"Gradients with the sign turned round cost {max(lost, 0):.1%} of accuracy, if anything."
        )
        return Case(form, tried, lost <= RUINED, seen), {"accuracy": reached, "accuracy lost": lost}
    if form == "client with labels":
        return _judge_patch(ground, aim, fought, tried, spoilt, honest, reached, accuracy)
    return _judge_trigger(ground, aim, fought, tried, spoilt, honest, reached, accuracy)


def _judge_patch(
    ground: Ground,
    aim: Aim,
    fought: Fought,
    tried: str,
    spoilt: Trained,
    honest: Trained,
    reached: float,
    accuracy: float,
) -> tuple[Case, dict[str, float]]:
    high = fought.loots[aim.attacker].tensors["high"]
    own = next(s for s in range(ground.graph.streams) if aim.attacker in ground.graph.data_parties(s))

    def success(segments: Trained) -> float:
        return _predict(ground, segments, sample=lambda x: patched(x, high)).share(TARGET, without=own)

    rate, by_itself = success(spoilt), success(honest)
    seen = (
        f"{aim.attacker} marked {POISONED:.0%} of its own samples; now {rate:.0%} of the others' samples with the same "
        f"mark come out as label {TARGET} (in an honest network {by_itself:.0%}), while accuracy without the mark is "
        f"{reached:.0%}, beside {accuracy:.0%}."
    )
    figures = {"success rate": rate, "success rate in an honest network": by_itself, "accuracy": reached}
    return Case("client with labels", tried, rate - by_itself < WORKED, seen), figures


def _judge_trigger(
    ground: Ground,
    aim: Aim,
    fought: Fought,
    tried: str,
    spoilt: Trained,
    honest: Trained,
    reached: float,
    accuracy: float,
) -> tuple[Case, dict[str, float]]:
    form = "client without labels"
    loot = fought.loots[aim.attacker]
    if "trigger" not in loot.tensors:
        return Case(form, tried, True, f"The run was too short for {aim.attacker} to plant anything."), {}
    trigger = loot.tensors["trigger"]
    target = int(Truth(ground, aim, fought.graph).labels(loot.tensors["poisoned"]).flatten().round().long().mode()[0])

    def loudly(a: torch.Tensor) -> torch.Tensor:
        return LOUD * a

    def told(segments: Trained, change: Callable[[torch.Tensor], torch.Tensor]) -> float:
        return _predict(ground, segments, cut=aim.cut, activation=change).share(target)

    def typical(segments: Trained, change: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Every sample gets the mean activation of those with the target label."""
        sent: list[torch.Tensor] = []

        def overheard(a: torch.Tensor) -> torch.Tensor:
            sent.append(a)
            return change(a)

        said = _predict(ground, segments, cut=aim.cut, activation=overheard)
        mean = change(torch.cat(sent)[said.said == target]).mean(0)
        return told(segments, lambda a: mean.expand_as(a))

    reached = _predict(ground, spoilt, cut=aim.cut, activation=loudly).accuracy
    figures = {
        "success rate": told(spoilt, lambda a: loudly(a) + trigger),
        "success rate in an honest network": max(
            told(honest, lambda a: a + trigger / LOUD),
            told(honest, lambda a: a + trigger),
            told(honest, lambda a: loudly(a) + trigger),
        ),
        "success rate of a typical activation": typical(spoilt, loudly),
        "success rate of a typical activation in an honest network": typical(honest, lambda a: a),
        "accuracy": reached,
    }
    rate, by_itself = figures["success rate"], figures["success rate in an honest network"]
    lying = figures["success rate of a typical activation in an honest network"]
    seen = (
        f"{aim.attacker}, which never saw a label, makes {rate:.0%} of the samples with another label come out as "
        f"label {target} by adding its trigger (in an honest network at most {by_itself:.0%}), while accuracy without "
        f"it is {reached:.0%}, beside {accuracy:.0%}. Simply sending a typical activation of that label, which takes "
        f"no training, works for {lying:.0%}."
    )
    return Case(form, tried, rate - by_itself < WORKED, seen), figures
