"""The process of a party that attacks: an ordinary party with its own files, key and channel, whose segments mean harm.

Here: how a ``Strategy`` is put in place of an honest party's segments, and how its loot reaches the judge.  It is told
what any party is told, and what its adversary model grants it; of the victims it has nothing but what they send.  Not
here: what it does (each attack's own file).
"""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from splitsec.attacks.arena import Aim, write_loot
from splitsec.attacks.catalogue import load
from splitsec.attacks.strategy import Scene, Strategy, bounds
from splitsec.engine import Engine
from splitsec.errors import PeerError
from splitsec.graph import Graph, parse_graph
from splitsec.party import Job, Party
from splitsec.partyfile import load_party
from splitsec.plan import Plan
from splitsec.process import prepare, serve
from splitsec.samples import Samples, seed_of
from splitsec.schedule import Turn
from splitsec.transports.iothread import CloseCode

__all__ = ["Adversary", "follow_parent", "main", "party_of", "scene_of"]

Told = Callable[[dict[str, Any]], None]


class Adversary(Party):
    """A party whose segments and samples are its strategy's."""

    strategy: Strategy

    def mean_harm(self, strategy: Strategy) -> None:
        """Put ``strategy``'s segments and samples in place of the honest ones."""
        self.strategy = strategy
        self.segments = strategy.take_over(self.segments)
        self.own = {
            split: Samples(strategy.samples(split, one.fields), one.ids, one.count) for split, one in self.own.items()
        }

    def _take_turn(self, engine: Engine, turn: Turn, number: int, update: int) -> tuple[int, int]:
        self.strategy.turn(turn)
        return super()._take_turn(engine, turn, number, update)


def main() -> int:
    """Be the attacking party that standard input describes."""
    return serve(_attack)


def follow_parent(report: Told) -> Told:
    """Passes events on to the parent, and waits after ``ready`` until all are; ends with the parent."""
    may_go_on = threading.Semaphore(0)

    def follow() -> None:
        while sys.stdin.readline():
            may_go_on.release()
        os._exit(130)

    threading.Thread(target=follow, name="parent", daemon=True).start()

    def tell(event: dict[str, Any]) -> None:
        report(event)
        if event["event"] == "ready":
            may_go_on.acquire()

    return tell


def party_of(assignment: dict[str, Any], report: Told, kind: type[Adversary] = Adversary) -> Adversary:
    """The party that ``assignment`` describes, with its segments built and nothing opened; it reports when ready."""
    job, group_key = assignment["job"], assignment.get("group_key")
    party_file = load_party(assignment["party_file"]).model_copy(update={"listen": None}).undefended()
    return kind(
        parse_graph(json.dumps(assignment["graph"]), assignment["graph_file"]),
        party_file,
        private_key=base64.b64decode(assignment["key"]),
        group_key=None if group_key is None else base64.b64decode(group_key),
        job=Job(out=Path(job["out"]), state=Path(job["state"]) / party_file.party),
        report=report,
    )


def _attack(assignment: dict[str, Any], report: Told) -> None:
    prepare(assignment["threads"])
    party = party_of(assignment, follow_parent(lambda event: None if event["event"] == "done" else report(event)))
    scene = scene_of(assignment, party.graph, party.plan, report)
    party.mean_harm(load(assignment["attack"]).strategy_of(party.name)(scene))
    reason = CloseCode.ERROR
    try:
        party.connect()
        party.agree()
        party.run()
        party.gossip.say_done()
        party.save()
        party.stay()
        party.sum_up()
        reason = CloseCode.NORMAL
    except PeerError as error:
        report({"event": "left alone", "text": str(error)})
    finally:
        party.close(reason)
    write_loot(party.strategy.loot(), Path(assignment["loot"]))
    report({"event": "done"})


def scene_of(assignment: dict[str, Any], graph: Graph, plan: Plan, report: Told) -> Scene:
    """What the attacker is granted."""
    aim = Aim.told(assignment["aim"])
    public = load_file(assignment["public"]) if assignment["public"] else {}
    low, high = bounds(public["x"]) if "x" in public else (torch.zeros(()), torch.ones(()))
    return Scene(
        graph=graph,
        plan=plan,
        cut=aim.cut,
        shape=aim.shape,
        cut_shape=aim.cut_shape,
        public=public,
        low=low,
        high=high,
        architecture=None if assignment["architecture"] is None else _architecture(assignment, graph),
        options=assignment["options"],
        seed=assignment["seed"],
        report=report,
    )


def _architecture(assignment: dict[str, Any], graph: Graph) -> Callable[[], nn.Module]:
    victim = load_party(assignment["architecture"]["party_file"])
    segment = assignment["architecture"]["segment"]
    code = victim.segments[segment]

    def make() -> nn.Module:
        torch.manual_seed(seed_of("weights", graph.training.seed, segment))
        module: nn.Module = victim.function(code.model, "segments", segment, "model")(**code.args)
        return module

    return make


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
