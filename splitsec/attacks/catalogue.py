"""What attacks there are, in the order in which ``--attack all`` runs them; no torch until one is loaded."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from splitsec.attacks.attack import CutAttack

__all__ = ["ATTACKS", "Entry", "load", "names"]


@dataclass(frozen=True)
class Entry:
    """One attack, before it is loaded.  ``where``: ``module:Class``."""

    name: str
    title: str
    adversary: str
    source: str
    tries: str
    where: str


_ALL: Final = (
    Entry(
        "hijacking",
        "Feature-space hijacking",
        "a server that returns gradients of its own choosing",
        "Pasquini, Ateniese, Bernaschi 2021 (FSHA)",
        "trains the clients' segment into an encoder that the server can invert",
        "splitsec.attacks.hijacking:Hijacking",
    ),
    Entry(
        "hijacking-adaptive",
        "Hijacking that knows the detectors",
        "a server that knows how clients look at its gradients",
        "Pasquini et al. 2021; Erdogan, Kupcu, Cicek 2022 (SplitGuard); ours",
        "answers decoys honestly, and makes hijacking gradients look as if they heeded labels",
        "splitsec.attacks.hijacking:AdaptiveHijacking",
    ),
    Entry(
        "inversion",
        "Decoder inversion with public samples",
        "an honest server that looks at what it receives, has public samples and the architecture",
        "He, Zhang, Lee 2019",
        "trains a decoder from activations back to samples",
        "splitsec.attacks.inversion:Inversion",
    ),
    Entry(
        "unsplit",
        "Inversion without data, and model stealing",
        "an honest server that knows the clients' architecture and has no sample",
        "Erdogan, Kupcu, Cicek 2022 (UnSplit)",
        "finds samples and a copy of the clients' segment that explain the activations",
        "splitsec.attacks.unsplit:UnSplit",
    ),
    Entry(
        "simulator",
        "Passive simulator",
        "an honest server that has public samples, and knows nothing of the clients' segment",
        "Zhu et al. 2025 (SDAR)",
        "learns to simulate the clients' segment and to invert the simulation",
        "splitsec.attacks.simulator:Simulator",
    ),
    Entry(
        "label-inference",
        "Label inference from gradients",
        "an honest party that receives gradients and no labels",
        "Li et al. 2022; Kariyappa, Qureshi 2023 (ExPLoit); Erdogan et al. 2022 (UnSplit)",
        "tells labels from the norm and the direction of gradients, and by matching them",
        "splitsec.attacks.labels:LabelInference",
    ),
    Entry(
        "membership",
        "Membership inference",
        "an honest server that knows the clients' architecture and is shown samples",
        "Shokri et al. 2017 (shadow models); matching of activations: ours",
        "tells which samples were trained on",
        "splitsec.attacks.membership:Membership",
    ),
    Entry(
        "backdoor",
        "Backdoor and poisoned gradients",
        "a client or a server that spoils the training",
        "Bai et al. 2023 (VILLAIN); Gu et al. 2017 (BadNets); simple forms",
        "plants a trigger, or ruins what is learnt",
        "splitsec.attacks.backdoor:Backdoor",
    ),
    Entry(
        "protocol-abuse",
        "Protocol abuse",
        "a party with a right key that says what the graph does not allow",
        "ours",
        "asks for more epochs, other shapes, undeclared cuts; replays, stalls, sends NaN and huge values",
        "splitsec.attacks.abuse:ProtocolAbuse",
    ),
    Entry(
        "network-abuse",
        "Network abuse",
        "somebody on the line, or with a stolen key",
        "ours",
        "tampers, replays, reorders, downgrades, impersonates",
        "splitsec.attacks.network:NetworkAbuse",
    ),
    Entry(
        "collusion",
        "Colluding parties",
        "the server with a clinic",
        "He, Zhang, Lee 2019 (white box); ours",
        "puts together what each of two parties knows",
        "splitsec.attacks.collusion:Collusion",
    ),
)

ATTACKS: Final = {entry.name: entry for entry in _ALL}


def names() -> list[str]:
    """Every attack's name, in order."""
    return list(ATTACKS)


def load(name: str) -> CutAttack:
    """The attack called ``name``."""
    module, _, kind = ATTACKS[name].where.partition(":")
    made: CutAttack = getattr(importlib.import_module(module), kind)()
    return made
