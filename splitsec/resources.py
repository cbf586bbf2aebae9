"""The resource plan: what split learning costs each party, beside federated learning and large-batch SGD.

Here: arithmetic alone, from what a sample costs (``Cost``) to parties, cuts, methods and candidate cuts.  Pure: no
torch, no files.  Not here: how a module's cost is found (``measuring``), which schedule is fastest (``advice``).  What
every number means stands in docs/resource-plan.md.

FLOPs are those of convolutions and matrix products, two for a multiply-accumulate, as ``torch.utils.flop_counter``
counts them; with ``published`` they are multiply-accumulates, three for every use of a weight (forward, gradient of the
input, gradient of the weight), as the tables of Vepakomma et al. 2018 count.  Bytes are those of tensors, before
encryption; a message adds about 40 bytes for its header.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

__all__ = [
    "FEDERATED",
    "OPTIMIZER_NUMBERS",
    "SGD",
    "SPLIT",
    "Candidate",
    "Cost",
    "Flow",
    "Method",
    "PartyUse",
    "Report",
    "Setting",
    "baselines",
    "candidates",
    "fewest_clients",
    "hand_ons",
    "join",
    "plain",
    "split_method",
    "split_plan",
    "with_saved",
]

Schedule = Literal["round_robin", "parallel"]

SPLIT: Final = "split learning"
FEDERATED: Final = "federated learning"
SGD: Final = "large-batch SGD"

OPTIMIZER_NUMBERS: Final[Mapping[str, int]] = {"sgd": 0, "momentum": 1, "adam": 2}
"""Numbers that an optimiser keeps for every parameter."""


def plain(shape: tuple[int, ...]) -> float:
    """Bytes of a float32 tensor of ``shape``."""
    return 4.0 * math.prod(shape)


@dataclass(frozen=True)
class Cost:
    """What one module costs.  FLOPs and ``saved`` are for one sample, all else for the module.

    ``input_gradient`` and ``weight_gradient``: the two halves of going backward.  ``saved``: bytes kept from the
    forward for the way back.  ``state``: bytes of parameters and buffers; ``trained``: of the parameters that are
    trained; ``optimizer``: what its optimiser keeps; ``handed_on``: what the next member of a group is given.
    """

    parameters: int
    state: int
    trained: int
    optimizer: int
    handed_on: int
    forward: float
    input_gradient: float
    weight_gradient: float
    saved: float
    batch_statistics: str | None = None
    """Class of the first module whose output for one sample depends on the others of its batch."""

    @property
    def step(self) -> float:
        """FLOPs of forward and backward."""
        return self.forward + self.input_gradient + self.weight_gradient

    @property
    def published(self) -> float:
        """Multiply-accumulates, three for every use of a weight."""
        return 1.5 * self.forward

    def memory(self, batch: int) -> float:
        """Bytes while training: state, gradients, optimiser, and what a batch keeps for the way back."""
        return self.state + self.trained + self.optimizer + batch * self.saved


NOTHING: Final = Cost(0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0)


def join(costs: Sequence[Cost]) -> Cost:
    """The cost of several modules together."""
    numbers = {
        name: sum(getattr(one, name) for one in costs)
        for name in Cost.__dataclass_fields__
        if name != "batch_statistics"
    }
    return Cost(**numbers, batch_statistics=next((one.batch_statistics for one in costs if one.batch_statistics), None))


@dataclass(frozen=True)
class Setting:
    """What is trained on what.  ``samples``: of all clients together, shared out evenly; ``evaluated``: those that an
    epoch only looks at.  ``shared``: whether members of a group hand segment weights on (``round_robin``).
    """

    clients: int
    samples: float
    batch: int
    epochs: float
    evaluated: float = 0
    schedule: Schedule = "round_robin"

    @property
    def each(self) -> float:
        """Samples of one client."""
        return self.samples / self.clients

    @property
    def steps(self) -> int:
        """Steps of one client in an epoch."""
        return math.ceil(self.each / self.batch)


@dataclass(frozen=True)
class PartyUse:
    """One party's share.  ``flop_step``: at full batches; bytes: tensors of an epoch's training."""

    party: str
    segments: tuple[str, ...]
    parameters: int
    flop_step: float
    flop_epoch: float
    flop_evaluation: float
    published_epoch: float
    memory: float
    sent: float
    received: float


@dataclass(frozen=True)
class Flow:
    """What crosses from one party to another in an epoch.  ``step``: bytes of one step with a full batch."""

    kind: Literal["activation", "gradient", "labels", "weights"]
    name: str
    sender: str
    receiver: str
    step: float
    epoch: float
    evaluation: float = 0
    messages: float = 0
    """In an epoch, of training and evaluation together."""


@dataclass(frozen=True)
class Method:
    """What a way of training costs one client, and all of them.  ``bytes_epoch``: sent and received by one client."""

    name: str
    parameters: int
    memory: float
    flop_epoch: float
    published_epoch: float
    bytes_epoch: float
    bytes_epoch_all: float
    epochs: float

    @property
    def flop(self) -> float:
        """One client's FLOPs over all epochs."""
        return self.flop_epoch * self.epochs

    @property
    def published(self) -> float:
        """The same in multiply-accumulates, three for every use of a weight."""
        return self.published_epoch * self.epochs

    @property
    def bytes(self) -> float:
        """One client's bytes over all epochs."""
        return self.bytes_epoch * self.epochs


@dataclass(frozen=True)
class Candidate:
    """A cut that a chain could have.  ``fewer_from``: clients from which split learning sends fewer bytes than
    federated learning; None: never.  ``chosen``: it is the cut of this plan.
    """

    after: str
    shape: tuple[int, ...]
    sample_bytes: float
    client_parameters: int
    client_share: float
    """Of all FLOPs of a step."""
    bytes_epoch: float
    """Sent and received by one client in an epoch."""
    fewer_from: int | None
    chosen: bool = False


@dataclass(frozen=True)
class Report:
    """A whole plan.  ``methods``: split learning first; alone where the others do not apply, and ``why`` says so."""

    title: str
    setting: Setting
    parties: tuple[PartyUse, ...]
    flows: tuple[Flow, ...]
    methods: tuple[Method, ...]
    fewer_from: int | None
    candidates: tuple[Candidate, ...] = ()
    why: str = ""
    notes: tuple[str, ...] = field(default=())


def hand_ons(clients: int) -> int:
    """How often members of a ``round_robin`` group hand their segments' weights on in an epoch: round the members to
    train, and round them once more to evaluate, which brings the newest back to the first.
    """
    return 2 * (clients - 1)


def _handed_on(setting: Setting, handed: int) -> float:
    """Bytes that one client gives and takes in an epoch with the weights of its segments, on average."""
    if setting.schedule != "round_robin":
        return 0.0
    return 2 * hand_ons(setting.clients) / setting.clients * handed


def split_method(setting: Setting, cost: Cost, sample_bytes: float, memory: float) -> Method:
    """Split learning.  ``cost``: of a client's segments; ``sample_bytes``: what crosses for one sample, both ways."""
    each = setting.each * sample_bytes + _handed_on(setting, cost.handed_on)
    return Method(
        SPLIT,
        cost.parameters,
        memory,
        setting.each * cost.step,
        setting.each * cost.published,
        each,
        setting.clients * each,
        setting.epochs,
    )


def baselines(setting: Setting, whole: Cost, *, rounds: float = 1.0) -> tuple[Method, Method]:
    """Federated learning and large-batch SGD of the ``whole`` network at every client.

    Federated: the state goes to every client and comes back, ``rounds`` times an epoch.  Large-batch SGD: in every step
    a client sends its gradients and gets everybody's mean.
    """

    def method(name: str, amount: float) -> Method:
        return Method(
            name,
            whole.parameters,
            whole.memory(setting.batch),
            setting.each * whole.step,
            setting.each * whole.published,
            amount,
            setting.clients * amount,
            setting.epochs,
        )

    return method(FEDERATED, 2 * rounds * whole.state), method(SGD, 2 * setting.steps * whole.trained)


def fewest_clients(
    setting: Setting, sample_bytes: float, handed: int, whole_state: int, *, rounds: float = 1.0
) -> int | None:
    """The number of clients from which split learning sends fewer bytes in an epoch than federated learning, all
    samples staying as many; None if no number does.

    With K clients, N samples, c bytes that cross for a sample, h for handed-on weights and S of the whole network's
    state, split learning sends N c + 4 (K - 1) h and federated learning 2 r S K, in r rounds.  So K must exceed
    (N c - 4 h) / (2 r S - 4 h), and h be below r S / 2; without handing on, h is 0.
    """
    handed = handed if setting.schedule == "round_robin" else 0
    gain = 2 * rounds * whole_state - 4 * handed
    if gain <= 0:
        return None
    return max(1, math.floor((setting.samples * sample_bytes - 4 * handed) / gain) + 1)


def candidates(
    setting: Setting,
    layers: Sequence[tuple[str, tuple[int, ...], Cost]],
    *,
    label_bytes: float = 0.0,
    size: Callable[[tuple[int, ...]], float] = plain,
    chosen: Sequence[int] = (),
    rounds: float = 1.0,
) -> tuple[Candidate, ...]:
    """Every place where a chain could be cut once.  ``layers``: name, shape of what comes out for one sample, and cost;
    ``size``: bytes of a sample's tensor of a shape at a cut; ``chosen``: how many layers stand before a cut that is
    made.
    """
    whole = join([cost for *_, cost in layers])
    found = []
    for place in range(1, len(layers)):
        name, shape, _ = layers[place - 1]
        client = join([cost for *_, cost in layers[:place]])
        sample = size(shape)
        crossing = 2 * sample + label_bytes
        found.append(
            Candidate(
                after=name,
                shape=shape,
                sample_bytes=sample,
                client_parameters=client.parameters,
                client_share=client.step / whole.step if whole.step else 0.0,
                bytes_epoch=setting.each * crossing + _handed_on(setting, client.handed_on),
                fewer_from=fewest_clients(setting, crossing, client.handed_on, whole.state, rounds=rounds),
                chosen=place in chosen,
            )
        )
    return tuple(found)


def split_plan(
    title: str,
    setting: Setting,
    layers: Sequence[tuple[str, tuple[int, ...], Cost]],
    cuts: Sequence[int],
    segments: Sequence[Cost],
    *,
    label_bytes: int = 8,
    size: Callable[[tuple[int, ...]], float] = plain,
    rounds: float = 1.0,
) -> Report:
    """The plan of a chain that is cut once (client, server) or twice (client, server, client: a U shape, whose labels
    stay).  ``cuts``: how many layers stand before each; ``segments``: the cost of each part.
    """
    names = [name for name, *_ in layers]
    sizes = [size(layers[place - 1][1]) for place in cuts]
    whole = join([cost for *_, cost in layers])
    client, server = join([*segments[:1], *segments[2:]]), segments[1]
    labels = label_bytes if len(cuts) == 1 else 0
    sample_bytes = 2 * sum(sizes) + labels
    crossing = 2 * setting.batch * sum(plain(layers[place - 1][1]) for place in cuts)
    client_memory = client.memory(setting.batch) + crossing
    together = setting.clients if setting.schedule == "parallel" else 1
    server_memory = server.memory(setting.batch * together) + crossing * together
    clients = "client" if setting.clients == 1 else f"each of {setting.clients:,} clients"
    split = split_method(setting, client, sample_bytes, client_memory)
    flows: list[Flow] = []
    for place, of_one in zip(cuts, sizes, strict=True):
        start, end = ("client", "server") if place == cuts[0] else ("server", "client")
        name = f"{names[place - 1]} -> {names[place]}"
        amounts = (setting.batch * of_one, setting.each * of_one)
        flows.append(Flow("activation", name, start, end, *amounts, messages=setting.steps))
        flows.append(Flow("gradient", name, end, start, *amounts, messages=setting.steps))
    if labels:
        amounts = (setting.batch * labels, setting.each * labels)
        flows.append(Flow("labels", "labels", "client", "server", *amounts, messages=setting.steps))
    if handed := _handed_on(setting, client.handed_on) / 2:
        times = hand_ons(setting.clients) / setting.clients
        flows.append(Flow("weights", "client", "client", "next client", 0.0, handed, messages=times))
    into = sum(one.epoch for one in flows if one.receiver == "client") + handed
    out = sum(one.epoch for one in flows if one.sender == "client")
    ends_of = [*cuts, len(names)]
    parts = [
        f"{names[start]} to {names[end - 1]}" if end - start > 1 else names[start]
        for start, end in zip([0, *cuts], ends_of, strict=True)
    ]
    parties = (
        PartyUse(
            clients,
            (parts[0], *parts[2:]),
            client.parameters,
            setting.batch * client.step,
            setting.each * client.step,
            setting.evaluated / setting.clients * client.forward,
            setting.each * client.published,
            client_memory,
            out,
            into,
        ),
        PartyUse(
            "server",
            (parts[1],),
            server.parameters,
            setting.batch * together * server.step,
            setting.samples * server.step,
            setting.evaluated * server.forward,
            setting.samples * server.published,
            server_memory,
            setting.clients * sum(one.epoch for one in flows if one.sender == "server"),
            setting.clients * sum(one.epoch for one in flows if one.receiver == "server"),
        ),
    )
    return Report(
        title,
        setting,
        parties,
        tuple(flows),
        (split, *baselines(setting, with_saved(whole, segments), rounds=rounds)),
        fewest_clients(setting, sample_bytes, client.handed_on, whole.state, rounds=rounds),
        candidates(
            setting,
            layers,
            label_bytes=label_bytes,
            size=size,
            chosen=cuts if len(cuts) == 1 else (),
            rounds=rounds,
        ),
    )


def with_saved(whole: Cost, segments: Sequence[Cost]) -> Cost:
    """``whole`` with what its ``segments`` keep for the way back: layers alone do not know what they share."""
    return replace(whole, saved=sum(one.saved for one in segments), optimizer=sum(one.optimizer for one in segments))
