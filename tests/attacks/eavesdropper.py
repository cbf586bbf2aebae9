"""An attacking party's process for tests: it listens, answers honestly, and carries off what it heard, with places."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import torch

from splitsec.attacks import catalogue
from splitsec.attacks.adversary import main
from splitsec.attacks.attack import CutAttack
from splitsec.attacks.strategy import Listener, Loot, Strategy
from splitsec.segments import Segment

NAME = "eavesdropping"


class Ears(Strategy):
    def take_over(self, honest: Mapping[str, Segment]) -> dict[str, Segment]:
        self.listeners = {name: Listener(one, self.scene.cut, self, keep=100) for name, one in honest.items()}
        return dict(self.listeners)

    def loot(self) -> Loot:
        (listener,) = self.listeners.values()
        places, labels, activations = [], [], []
        for one in listener.heard:
            epoch, stream, first = one.place
            places += [(epoch, stream, first + row) for row in range(len(one.activation))]
            labels.append(one.labels if one.labels is not None else torch.zeros(len(one.activation)))
            activations.append(one.activation)
        return Loot(
            {"places": torch.tensor(places), "labels": torch.cat(labels), "activations": torch.cat(activations)},
            {
                "batches": listener.batches,
                "decoys": len(listener.decoys),
                "public": sorted(self.scene.public),
                "knows": self.scene.architecture is not None,
            },
        )


class Eavesdropping(CutAttack):
    name = NAME
    strategy = Ears


catalogue.ATTACKS[NAME] = catalogue.Entry(NAME, "", "", "", "", f"{__name__}:Eavesdropping")

if __name__ == "__main__":
    catalogue.ATTACKS[NAME] = catalogue.Entry(NAME, "", "", "", "", "tests.attacks.eavesdropper:Eavesdropping")
    code = main()
    sys.stdout.flush()
    os._exit(code)
