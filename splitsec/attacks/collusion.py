"""Parties that work together: what two of them know that neither does alone.

Here: *the server with a clinic*.  In a round robin every clinic holds the same stem, handed on from one to the next, so
a clinic that talks to the server gives it the very function that made the others' activations, and samples of the same
kind to learn from.  Between its own turn and the end of an epoch the stem changes; the clinic knows it at both ends,
and what lies between is taken as a straight line.  Samples are then searched whose activations are those that came
(He, Zhang, Lee: Model Inversion Attacks Against Collaborative Inference, ACSAC 2019, section 4: white box), beginning
with what a decoder says that was trained on the clinic's own samples.  Members of a ``parallel`` group keep stems of
their own, so the colluder's is the wrong one, and how wrong is what the error says.

Not here: *the server with a relay*.  Where no cut is anonymous the server knows whom it talks to, and a relay, which
cannot read what it passes on, has nothing to add.  Where one is, the first relay and the server together know whose
turn it is: ``splitsec bench linking`` measures that (docs/circuits.md).  Nor what the server can do alone
(``inversion``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import torch
from torch import nn
from torch.func import functional_call

from splitsec.attacks import nets
from splitsec.attacks.arena import Aim, Fought, Ground
from splitsec.attacks.attack import (
    CutAttack,
    Judgement,
    Truth,
    images,
    mean_error,
    verdict_of,
)
from splitsec.attacks.strategy import Imposter, Listener, Loot, Scene, Strategy, bounds
from splitsec.plan import Edge, Stage, relays_needed
from splitsec.segments import Segment, build_segments

__all__ = ["Collusion", "CollusionStrategy", "Recovered", "put_together", "stem_at"]

ROWS: Final = 200
"""Of the victims' samples that are recovered: whole batches, spread over the last epoch."""
DECODER_STEPS: Final = 400
SEARCH_STEPS: Final = 200


class CollusionStrategy(Strategy):
    """Honest work; afterwards each of the two hands over what it holds.

    The server's loot: ``activations [n, *cut shape]`` and ``places [n, 3]`` of the last epoch that it heard.  The
    clinic's: the stem when its last turn began, when it ended, and at the end (``before/``, ``after/``, ``final/`` and
    the name), and ``own``, the samples that its stem reads.
    """

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.listener: Listener | None = None
        self.keeper: _Keeper | None = None
        self.own = torch.empty(0)

    def take_over(self, honest: Mapping[str, Segment]) -> dict[str, Segment]:
        source, _, target = self.scene.cut.partition(" -> ")
        if target in honest:
            self.listener = Listener(honest[target], self.scene.cut, self)
            return {**honest, target: self.listener}
        self.keeper = _Keeper(honest[source], self)
        return {**honest, source: self.keeper}

    def samples(self, split: str, fields: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        read = self.scene.graph.segments[self.scene.cut.partition(" -> ")[0]].data
        if split == "train" and read is not None and read in fields:
            self.own = fields[read]
        return fields

    def loot(self) -> Loot:
        if self.listener is not None:
            heard = self.listener.heard
            numbers = {"batches": self.listener.batches}
            if not heard:
                return Loot(numbers=numbers)
            last = max(one.place[0] for one in heard)
            kept = [one for one in heard if one.place[0] == last]
            places = [
                (one.place[0], one.place[1], one.place[2] + row) for one in kept for row in range(len(one.activation))
            ]
            activations = torch.cat([one.activation for one in kept])
            return Loot({"activations": activations, "places": torch.tensor(places)}, numbers)
        assert self.keeper is not None
        stems = {"before": self.keeper.before, "after": self.keeper.after, "final": self.keeper.weights()}
        tensors = {f"{when}/{name}": one for when, stem in stems.items() for name, one in stem.items()}
        return Loot({**tensors, "own": self.own})


class _Keeper(Imposter):
    """An honest stem that keeps a copy of itself from the beginning and the end of its last turn."""

    def __init__(self, honest: Segment, strategy: Strategy) -> None:
        super().__init__(honest)
        self.before = self.after = self.weights()
        self._strategy = strategy
        self._epoch = -1

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
        turn = self._strategy.now
        if update is not None and turn is not None and turn.epoch != self._epoch:
            self._epoch, self.before = turn.epoch, self.weights()
        return super().forward(stage, inputs, labels, micro=micro, update=update, share=share)

    def step(self) -> None:
        super().step()
        self.after = self.weights()


# --- what they put together


@dataclass(frozen=True)
class Recovered:
    """Samples ``[n, *shape]`` and where they stood; ``decoded``: what the decoder alone said, before the search."""

    samples: torch.Tensor
    decoded: torch.Tensor
    places: torch.Tensor


def stem_at(clinic: Loot, place: int, own: tuple[int, int], rows: int) -> dict[str, torch.Tensor]:
    """The stem's weights when row ``place`` of an epoch's ``rows`` went through it, as the clinic whose own rows were
    ``own`` (from, to) can best tell.
    """
    stems: dict[str, dict[str, torch.Tensor]] = {"before": {}, "after": {}, "final": {}}
    for name, tensor in clinic.tensors.items():
        when, _, which = name.partition("/")
        if when in stems:
            stems[when][which] = tensor
    if place < own[0]:
        return stems["before"]
    earlier, later = ("before", "after") if place < own[1] else ("after", "final")
    start, end = own if place < own[1] else (own[1], rows)
    share = (place - start) / max(1, end - start)
    return {
        name: torch.lerp(tensor, stems[later][name], share) if tensor.is_floating_point() else tensor
        for name, tensor in stems[earlier].items()
    }


def put_together(
    server: Loot,
    clinic: Loot,
    stem: nn.Module,
    *,
    stream: int,
    batch: int,
    seed: int,
    moving: bool = True,
) -> Recovered:
    """Samples of other members than the clinic, which works ``stream``, from what both hold.

    ``stem``: a module of the clinic's own making, whose weights are of no account.  ``moving``: whether the stem is
    handed on, so that the others' lies between what the clinic saw.
    """
    activations, places = server.tensors["activations"], server.tensors["places"]
    mine = (places[:, 1] == stream).nonzero()[:, 0]
    own = (int(mine.min()), int(mine.max()) + 1) if len(mine) else (0, 0)
    starts = [row for row in range(len(places)) if places[row, 1] != stream and places[row, 2] % batch == 0]
    wanted = max(1, min(len(starts), ROWS // batch))
    chosen = [starts[round(one * (len(starts) - 1) / max(1, wanted - 1))] for one in range(wanted)]
    stem.eval()
    x = clinic.tensors["own"].float()
    low, high = bounds(x)
    final = stem_at(clinic, len(places), own, len(places))
    with torch.no_grad():
        known = functional_call(stem, final, (x,))
    scale = known.square().mean().sqrt().clamp_min(1e-12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = _decoder(known / scale, (x - low) / (high - low) * 2 - 1)
    found, decoded, kept = [], [], []
    for start in chosen:
        same = (places[:, 1] == places[start, 1]) & (places[:, 2] // batch == places[start, 2] // batch)
        came = activations[same].float()
        weights = stem_at(clinic, start, own, len(places)) if moving else final
        with torch.no_grad():
            first = ((decoder(came / scale) + 1) / 2 * (high - low) + low).clamp(low, high)
        found.append(_search(stem, weights, came, first, low, high))
        decoded.append(first)
        kept.append(places[same])
    return Recovered(torch.cat(found), torch.cat(decoded), torch.cat(kept))


def _decoder(activations: torch.Tensor, samples: torch.Tensor) -> nn.Module:
    decoder = nets.decoder(tuple(activations.shape[1:]), tuple(samples.shape[1:]))
    optimizer = torch.optim.Adam(decoder.parameters(), lr=2e-3)
    for _ in range(DECODER_STEPS):
        rows = torch.randint(len(samples), (min(32, len(samples)),))
        loss = (decoder(activations[rows]) - samples[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return decoder.eval()


def _search(
    stem: nn.Module,
    weights: Mapping[str, torch.Tensor],
    came: torch.Tensor,
    first: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
) -> torch.Tensor:
    """Samples near ``first`` whose activations are ``came``."""
    x = first.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.02 * float((high - low).mean()))
    power = came.square().mean().clamp_min(1e-12)
    for _ in range(SEARCH_STEPS):
        misfit = (functional_call(stem, dict(weights), (x,)) - came).square().mean() / power
        optimizer.zero_grad()
        misfit.backward()
        optimizer.step()
        with torch.no_grad():
            x.clamp_(low, high)
    return x.detach()


# --- the judge's half


class Collusion(CutAttack):
    """The server and one clinic against the other clinics."""

    name: ClassVar[str] = "collusion"
    batches: ClassVar[int] = 150
    has_public: ClassVar[bool] = False
    strategy: ClassVar[type[Strategy]] = CollusionStrategy

    def aim(self, ground: Ground) -> Aim | str:
        graph = ground.graph
        if graph.anonymous is not None:
            return (
                "members of an anonymous group are not told apart, so nobody here could judge what was recovered; what "
                "a first relay and the server learn together is measured by `splitsec bench linking`"
            )
        relay = (
            ", and a relay adds nothing to what the server knows: it cannot read what it passes on, and the server "
            "knows whom it talks to"
            if relays_needed(graph)
            else ""
        )
        for cut in graph.cuts:
            source, target = graph.segments[cut.source], graph.segments[cut.target]
            clinics = graph.members(source.at)
            if source.data is None or source.at == target.at or len(clinics) < 2:
                continue
            attacker = graph.members(target.at)[0]
            if ground.attacker not in (None, attacker, *clinics):
                continue
            held = ground.samples[clinics[0]]["train"].fields[source.data]
            return Aim(
                attacker=attacker,
                victims=tuple(name for name in clinics if name != _colluder(ground, clinics)),
                cut=f"{cut.source} -> {cut.target}",
                shape=tuple(held.shape[1:]),
                cut_shape=tuple(cut.shape),
                field=source.data,
                label_field=next((edge.field for edge in graph.labels), None),
            )
        return f"nobody here has the same segment as the parties that the server would spy on{relay}"

    def fight(self, ground: Ground, aim: Aim) -> Fought:
        return ground.fight(
            self.name, aim, [aim.attacker, self._clinic(ground, aim)], batches=self.batches, has_public=False
        )

    def judge(self, ground: Ground, aim: Aim, fought: Fought, truth: Truth) -> Judgement:
        clinic = self._clinic(ground, aim)
        server, other = fought.loots[aim.attacker], fought.loots[clinic]
        graph = fought.graph
        stream = graph.members(graph.segments[aim.cut.partition(" -> ")[0]].at).index(clinic)
        heard = server.tensors.get("places", torch.empty(0, 3))
        if not bool((heard[:, 1] != stream).any()) or "own" not in other.tensors:
            return Judgement("stopped", f"The run ended before the others had sent {aim.attacker} anything.")
        stem = build_segments(graph, ground.folder.parties[clinic])[aim.cut.partition(" -> ")[0]].module
        together = put_together(
            server,
            other,
            stem,
            stream=stream,
            batch=graph.training.batch_size,
            seed=graph.training.seed,
            moving=graph.schedule == "round_robin",
        )
        samples, public = truth.samples(together.places), ground.public(aim)["x"]
        error = mean_error(together.samples, samples, public)
        baseline = mean_error(public.mean(0).expand_as(samples), samples, public)
        low, high = bounds(public)
        judged = Judgement(
            verdict_of(error, baseline),
            _sentence(aim.attacker, clinic, error, baseline, relays=bool(relays_needed(graph))),
            reconstruction_mse=error,
            baseline_mse=baseline,
            figures={"error of the decoder alone": mean_error(together.decoded, samples, public)},
            pictures=(
                *images("what the others have", (samples - low) / (high - low) * 2 - 1),
                *images("what the two make of it", (together.samples - low) / (high - low) * 2 - 1),
            ),
        )
        if fought.alarm is not None and judged.verdict == "nothing recovered":
            judged = replace(judged, verdict="stopped")
        return judged

    def _clinic(self, ground: Ground, aim: Aim) -> str:
        source = ground.graph.segments[aim.cut.partition(" -> ")[0]]
        return _colluder(ground, ground.graph.members(source.at))


def _colluder(ground: Ground, clinics: Sequence[str]) -> str:
    return clinics[0] if ground.attacker is None or ground.attacker not in clinics else ground.attacker


def _sentence(server: str, clinic: str, error: float, baseline: float, *, relays: bool) -> str:
    said = {
        "recovered": f"{server} and {clinic} together redraw the other clinics' samples with an error of {error:.3f}, "
        f"where guessing the mean sample gives {baseline:.2f}: {clinic} holds the segment that made their activations.",
        "partly recovered": f"{server} and {clinic} together recover something of the other clinics' samples: an error "
        f"of {error:.3f}, where guessing the mean sample gives {baseline:.2f}.",
    }.get(
        verdict_of(error, baseline),
        f"{server} and {clinic} together recover nothing of the other clinics' samples that the mean sample does not "
        f"give (error {error:.2f} beside {baseline:.2f}).",
    )
    return said + (
        " A relay that joins them adds nothing: it cannot read what it passes on, and the server knows whom it talks "
        "to."
        if relays
        else ""
    )
