"""The graph file: who takes part, which segment runs where, and which tensors may cross from whom to whom.

Here: the models of the file, every rule that a graph must keep, and what follows from a graph without running it: the
order of segments, streams, links, circuits.  Pure: no torch, no network.  Not here: code, paths and secrets;
they are in the party files (partyfile.py), where the story goes next.

A *stream* is the work that member k of every group does together; without groups there is one.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from splitsec import identity, yamlfile
from splitsec.errors import GraphError, KeyFileError
from splitsec.yamlfile import Document, FrozenDict, meant, mistake, shown

__all__ = [
    "CODEC_BYTES",
    "DTYPE_BYTES",
    "EXACT",
    "FLOATS",
    "LOSSES",
    "RELAYS_MAX",
    "Circuit",
    "Circuits",
    "Cut",
    "CutPrivacy",
    "Exchange",
    "Graph",
    "Group",
    "LabelPrivacy",
    "Labels",
    "Link",
    "Party",
    "Privacy",
    "Route",
    "Safeguard",
    "Segment",
    "Timeouts",
    "Training",
    "check_name",
    "load_graph",
    "parse_graph",
    "wire_bytes",
]

DTYPE_BYTES: Final[Mapping[str, int]] = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}
FLOATS: Final = ("float16", "bfloat16", "float32", "float64")
CODEC_BYTES: Final[Mapping[str, int]] = {"bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of one number in the codecs that round."""
EXACT: Final = "nonzero"  # the codec that rounds nothing: it leaves zeros out
CODED: Final = ("float32", "float64")  # what codecs take


class Loss(NamedTuple):
    """A loss that a graph may name: its class in ``torch.nn`` and the dtypes its labels may have."""

    torch_class: str
    labels: tuple[str, ...]


LOSSES: Final[Mapping[str, Loss]] = {
    "cross_entropy": Loss("CrossEntropyLoss", ("int64", *FLOATS)),
    "nll": Loss("NLLLoss", ("int64",)),
    "bce": Loss("BCELoss", FLOATS),
    "bce_with_logits": Loss("BCEWithLogitsLoss", FLOATS),
    "mse": Loss("MSELoss", FLOATS),
    "l1": Loss("L1Loss", FLOATS),
    "smooth_l1": Loss("SmoothL1Loss", FLOATS),
    "huber": Loss("HuberLoss", FLOATS),
}
CUSTOM: Final = "custom"  # the loss that only the party knows: its party file names the function

MAX_DIMENSIONS = 8  # of one tensor, the batch not counted
MAX_SAMPLE_BYTES = 2**30  # 1 GiB for one sample on one cut: what a message can hold with room to spare
MAX_EDGES = 10_000  # of each kind: two lanes for each stay below the 65536 lanes of a channel
RELAYS_MAX: Final = 7  # in one route: what the smallest cell has room for

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}\Z")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}\Z")


def _name(text: str) -> str:
    if not _NAME.match(text):
        raise mistake(
            f"the name `{shown(text)}`",
            expected="1 to 40 of a-z, 0-9, `-` and `_`, the first a letter or digit",
            fix=f"rename it, for instance to `{_tamed(text)}`",
        )
    return text


def _tamed(text: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-_")[:40] or "party-1"


def _field_name(text: str) -> str:
    if not _FIELD.match(text):
        raise mistake(
            f"the field name `{shown(text)}`",
            expected="1 to 40 of letters, digits and `_`, the first no digit",
            fix="rename the field",
        )
    return text


def _data_field(text: str) -> str:
    if text == "id":
        raise mistake(
            "the field `id`",
            expected="a field of the samples",
            fix="`id` holds the sample ids; name the field that holds the data",
        )
    return _field_name(text)


def _shape(shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    for size in shape:
        if size is not None and not 1 <= size < 2**31:
            raise mistake(
                f"the size {size} in the shape {shown(shape)}",
                expected="sizes from 1 to 2147483647",
                fix="write the real size",
            )
    if len(shape) > MAX_DIMENSIONS:
        raise mistake(
            f"a shape of {len(shape)} dimensions", expected=f"at most {MAX_DIMENSIONS}", fix="flatten some of them"
        )
    return shape


def _ends(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(names) != 2:
        raise mistake(
            f"`cut: {shown(names)}`",
            expected="the two segments of a cut, as in `cut: [stem, trunk]`",
            fix="write the segment it comes from and the one it goes to",
        )
    return names


def _key(text: str) -> str:
    try:
        identity.parse_public(text)
    except KeyFileError as reason:
        raise mistake(reason.seen, expected=reason.expected, fix=reason.fix) from None
    return text


@cache
def _schemes() -> tuple[str, ...]:
    ours = ("tcp", "ipc", "wss", "memory", "ws", "zmq+tcp", "zmq+ipc")
    others = {one.name for one in importlib.metadata.entry_points(group="splitsec.transports")}
    return (*ours, *sorted(others - set(ours)))


def _address(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    if not separator:
        fix = f"write `tcp://{text}`" if ":" in text else "write the address in full"
        raise mistake(
            f"the address `{shown(text)}` without a scheme",
            expected="an address such as tcp://example.org:7400",
            fix=fix,
        )
    if scheme not in _schemes():
        raise mistake(
            f"the address `{shown(text)}` with the scheme `{shown(scheme)}`",
            expected="one of the transports " + ", ".join(_schemes()),
            fix=meant(scheme, _schemes()),
        )
    if not rest or not text.isprintable() or " " in text or len(text) > 255:
        raise mistake(
            f"the address {text!r}", expected=f"{scheme}:// and where to find it, without spaces", fix="complete it"
        )
    if scheme == "tcp":
        _tcp(text, rest)
    if scheme == "ipc" and len(rest.encode()) > 100:
        raise mistake(
            f"an ipc path of {len(rest.encode())} bytes",
            expected="at most 100, as the operating system demands",
            fix="shorten it",
        )
    return text


def _tcp(text: str, rest: str) -> None:
    host, separator, port = rest.rpartition(":")
    if not separator or (rest.startswith("[") and rest.endswith("]")) or (":" in host and not host.startswith("[")):
        raise mistake(
            f"the address `{shown(text)}` without a port",
            expected="tcp://HOST:PORT",
            fix=f"write `tcp://{rest}:7400`"
            if "[" in rest or ":" not in rest
            else "put an IPv6 address in brackets: tcp://[::1]:7400",
        )
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise mistake(
            f"the address `{shown(text)}` with the port `{shown(port)}`",
            expected="a port from 1 to 65535",
            fix="choose one, for instance 7400",
        )
    if not re.fullmatch(r"\[[0-9a-fA-F:.]+(%[A-Za-z0-9_.-]+)?\]|[A-Za-z0-9_.-]+|\*", host):
        raise mistake(
            f"the address `{shown(text)}` with the host `{shown(host)}`",
            expected="a host name, an IPv4 address, or an IPv6 address in brackets",
            fix="leave only HOST:PORT after tcp://",
        )


def _is_wildcard(address: str) -> bool:
    return re.match(r"[a-z+]*://(\*|0\.0\.0\.0|\[(0*:)+(0*|0\.0\.0\.0)\])(:[0-9]+)?(/|$)", address) is not None


Name = Annotated[str, AfterValidator(_name)]
FieldName = Annotated[str, AfterValidator(_field_name)]
DataField = Annotated[str, AfterValidator(_data_field)]
Address = Annotated[str, AfterValidator(_address)]
Size = Annotated[int, Field(strict=True)]
Shape = Annotated[tuple[Size, ...], Field(strict=False), AfterValidator(_shape)]
OpenShape = Annotated[tuple[Size | None, ...], Field(strict=False), AfterValidator(_shape)]
CutDtype = Literal["float16", "bfloat16", "float32", "float64", "int64"]
Codec = Literal["bfloat16", "float16", "int8", "nonzero"]
AnyDtype = Literal["float16", "bfloat16", "float32", "float64", "int64", "int32", "uint8", "bool"]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True)


class Party(_Entry):
    """One process owned by one institution."""

    key: Annotated[str, AfterValidator(_key)] | None = Field(
        default=None,
        description="public identity key, as `splitsec keys new` prints it; `join` needs it, `simulate` makes its own",
    )
    listen: Address | None = Field(
        default=None,
        description="address where the party waits for others, e.g. `tcp://0.0.0.0:7400`; a party without it dials",
    )
    address: Address | None = Field(
        default=None,
        description="address that others dial, where it is not what `listen` says, e.g. `tcp://server.example.org:7400`",
    )

    @property
    def dialled(self) -> str | None:
        """The address at which others reach the party; None where it does not listen."""
        return self.address or self.listen


class Group(_Entry):
    """Several parties that hold the same role."""

    members: Annotated[tuple[Name, ...], Field(strict=False)] = Field(
        description="the parties, in the order of their turns"
    )
    schedule: Literal["round_robin", "parallel"] = Field(
        description="`round_robin`: members take turns and hand the segments' weights on; `parallel`: every step holds "
        "a batch of each, and every member keeps its own weights"
    )
    key: Annotated[str, AfterValidator(_key)] | None = Field(
        default=None,
        description="public key of an anonymous group, whose private half all members hold, as `splitsec keys new "
        "--group` prints it; `join` needs it, `simulate` makes its own",
    )
    pseudonym: Literal["turn", "epoch"] = Field(
        default="turn",
        description="how long a member of an anonymous group stays in one channel with a far end: `turn`, or `epoch`, "
        "from its training turn until it has evaluated",
    )


class Segment(_Entry):
    """A part of the network, placed at a party or at every member of a group."""

    at: Name = Field(description="the party or group that holds the segment")
    data: DataField | None = Field(default=None, description="field of the party's own samples that the segment reads")
    loss: str | None = Field(
        default=None,
        description="the loss computed on the segment's output: "
        + ", ".join(f"`{name}`" for name in LOSSES)
        + "; or `custom`, which the party file defines",
    )
    loss_weight: float = Field(default=1.0, gt=0, description="factor of this loss in the sum of all losses")
    join: Literal["concat", "sum", "mean", "arguments"] = Field(
        default="concat",
        description="how several inputs become one: `concat` along the first dimension after the batch, `sum`, `mean`, "
        "or `arguments`: passed to the module one by one; in the order of `cuts`, the data field last",
    )


class Safeguard(_Entry):
    """What is done to every sample's tensor before it leaves; in the graph, the least that every sender does."""

    clip: float | None = Field(
        default=None, ge=1e-15, le=1e15, description="largest norm of one sample's tensor: L2, or L1 with Laplace noise"
    )
    noise: Literal["gaussian", "laplace"] | None = Field(
        default=None, description="distribution of the noise that is added to every number after clipping"
    )
    noise_multiplier: float | None = Field(
        default=None,
        ge=0.001,
        le=1e6,
        description="standard deviation (Laplace: scale) of the noise over the sensitivity, which is twice `clip`",
    )

    @model_validator(mode="after")
    def _noise_is_whole(self) -> Self:
        if self.clip is None:
            raise mistake(
                "a safeguard without `clip`",
                expected="the largest norm of one sample's tensor, which noise is measured by",
                fix="add `clip`, e.g. `clip: 1.0`",
            )
        if (self.noise is None) != (self.noise_multiplier is None):
            lacking = "noise" if self.noise is None else "noise_multiplier"
            raise mistake(
                f"{'noise_multiplier' if self.noise is None else 'noise'} without `{lacking}`",
                expected="both, or neither to clip only",
                fix="add `noise: gaussian`" if self.noise is None else "add `noise_multiplier`, e.g. 2.0",
            )
        return self


class CutPrivacy(_Entry):
    """What senders do at a cut: to activations on the way forward, to gradients on the way back."""

    forward: Safeguard | None = Field(default=None, description="for every sample's activation")
    backward: Safeguard | None = Field(default=None, description="for every sample's gradient")


class LabelPrivacy(_Entry):
    """Randomised response: a label leaves as it is with a known probability, else as any other class."""

    epsilon: float = Field(ge=1e-5, le=40, description="largest epsilon of one release of one label")
    classes: int = Field(ge=2, le=2**20, description="how many classes there are, numbered from 0")


class Cut(_Entry):
    """An edge between two segments: activations go forward, gradients come back."""

    source: Name = Field(alias="from", description="the segment whose output it carries")
    target: Name = Field(alias="to", description="the segment that takes it as input")
    shape: Shape = Field(description="shape of the tensor for one sample, without the batch dimension")
    dtype: CutDtype = Field(description="dtype of the tensor: `float16`, `bfloat16`, `float32`, `float64` or `int64`")
    output: FieldName | None = Field(
        default=None, description="which output, where the segment's module returns a dict of several"
    )
    privacy: CutPrivacy | None = Field(
        default=None, description="the least that is done to tensors before they leave over this cut"
    )
    raw: bool = Field(
        default=False, description="`true`: the cut may carry samples as they are; else a copy of the input is refused"
    )
    anonymous: bool = Field(
        default=False,
        description="`true`: the end that is no group learns that a member of the group speaks, and not which",
    )
    codec: Codec | None = Field(
        default=None,
        description="how activations and gradients are made smaller for the way (docs/codecs.md): `bfloat16`, "
        "`float16` and `int8` round; `nonzero` leaves out the zeros after a ReLU and changes no bit; without it, "
        "nothing is done",
    )

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def message_bytes(self, rows: int) -> int:
        """Bytes of the largest body of a message with ``rows`` samples, as its codec makes it."""
        return wire_bytes(self.codec, self.shape, self.dtype, rows)


def wire_bytes(codec: str | None, shape: tuple[int, ...], dtype: str, rows: int) -> int:
    """Bytes of the largest body of a message with ``rows`` tensors of ``shape`` and ``dtype``, as ``codec`` makes it.

    ``nonzero`` sends as they are tensors that it would make no smaller.
    """
    numbers = rows * math.prod(shape)
    if codec is None or codec == EXACT:
        return numbers * DTYPE_BYTES[dtype]
    scales = 0 if codec != "int8" else shape[0] if len(shape) > 1 else rows
    return numbers * CODEC_BYTES[codec] + scales * DTYPE_BYTES["float32"]


class Labels(_Entry):
    """An edge that brings labels to the segment that computes a loss; needed also where both are at one party."""

    source: Name = Field(alias="from", description="the party or group whose samples hold the labels")
    target: Name = Field(alias="to", description="the segment that computes the loss")
    field: DataField = Field(default="y", description="field of the samples that holds the labels")
    shape: Shape = Field(default=(), description="shape of one sample's label; `[]` is a single number")
    dtype: AnyDtype = Field(
        default="int64", description="dtype of the labels: as of a cut, or `int32`, `uint8`, `bool`"
    )
    privacy: LabelPrivacy | None = Field(default=None, description="the least that is done to labels before they leave")

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's label."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class Exchange(_Entry):
    """A named tensor that one party may send another outside training."""

    name: Name = Field(description="what both sides call it")
    source: Name = Field(alias="from", description="the party that sends")
    target: Name = Field(alias="to", description="the party that receives")
    shape: OpenShape = Field(description="shape of the whole tensor; `null` stands for any size")
    dtype: AnyDtype = Field(description="dtype of the tensor")
    max_bytes: int = Field(default=64 * 2**20, ge=1, le=2**40, description="largest tensor accepted, in bytes")


class Route(_Entry):
    """Relays between two ends: what these say to each other passes through all of them, and none can read it."""

    source: Name | None = Field(
        default=None, alias="from", description="the party or group that builds the circuits; every member its own"
    )
    target: Name | None = Field(
        default=None, alias="to", description="the party or group at the far end; the same group: among its members"
    )
    cut: Annotated[tuple[Name, ...], Field(strict=False), AfterValidator(_ends)] | None = Field(
        default=None,
        description="in place of `from` and `to`: the two segments of a cut; the parties that hold the first build",
    )
    via: Annotated[tuple[Name, ...], Field(strict=False)] = Field(
        description=f"the relays, 1 to {RELAYS_MAX} parties, in the order from `from`"
    )


class Circuits(_Entry):
    """What whoever watches circuits may see of them; all parties do it alike."""

    padding: Literal["fixed", "padme"] = Field(
        default="fixed",
        description="`fixed`: every cell that carries messages has one size, on all circuits; `padme`: one of few "
        "sizes, which costs less and tells more",
    )
    cover: float | None = Field(
        default=None,
        ge=0.001,
        le=2,
        description="seconds: one cell in each direction every so many, whether there is something to send or not; "
        "without it, cells go when there is",
    )


class Training(_Entry):
    """What all parties must do alike while they train."""

    epochs: int = Field(default=1, ge=1, le=10**9, description="passes over the data")
    batch_size: int = Field(
        default=64, ge=1, le=2**31 - 1, description="samples of one step; with `parallel` groups, of each member"
    )
    micro_batches: int = Field(
        default=1,
        ge=1,
        le=4096,
        description="slices of a batch that are in flight together; dropout is drawn for each, and gradients add up as "
        "in gradient accumulation",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="from which weights, order of samples and dropout follow")
    drop_last: bool = Field(default=False, description="leave out a last batch that is smaller than `batch_size`")
    decoys: int = Field(
        default=100,
        ge=0,
        le=10**9,
        description="of about so many training steps, a party that holds all samples and labels of a stream makes one "
        "with false labels first, which does not stand, to see whether its peers heed labels; 0: none "
        "(docs/protocol.md, section 9)",
    )


class Timeouts(_Entry):
    """How long the parties wait for each other."""

    connect: float = Field(default=60.0, gt=0, le=86400 * 7, description="seconds for all parties to come up")
    lost: float = Field(
        default=20.0,
        gt=0,
        le=86400,
        description="seconds of silence after which a connection is held for broken and made again",
    )
    gone: float = Field(
        default=60.0,
        gt=0,
        le=86400 * 7,
        description="seconds without a connection after which a party is given up, and the run ends",
    )
    answer: float = Field(
        default=900.0,
        gt=0,
        le=86400 * 7,
        description="seconds without a word from anybody in the middle of a step, though connections are alive, after "
        "which the run ends; longer than any party's longest step",
    )


class Privacy(_Entry):
    """What all parties do alike when one of them has no privacy budget left."""

    when_spent: Literal["end", "leave"] = Field(
        default="end",
        description="`end`: the run ends for all, with what was trained so far; `leave`: it goes on without the "
        "samples of that party, where others of its group are left",
    )


class Link(NamedTuple):
    """Two parties that connect directly."""

    dialer: str
    listener: str


class Circuit(NamedTuple):
    """Two parties that talk end to end through relays, which cannot read it.  ``first`` builds; ``routes``: the relays
    from ``first`` on, first choice first.
    """

    first: str
    second: str
    routes: tuple[tuple[str, ...], ...]


class _Routed(NamedTuple):
    """The routes that the file has for a pair, and for each its index there."""

    first: str
    second: str
    routes: list[tuple[str, ...]]
    indices: list[int]


class _Need(NamedTuple):
    """Why two parties must talk, and the entry of the file that says so."""

    pair: frozenset[str]
    why: str
    keys: tuple[str | int, ...]
    direct: bool


class Graph(_Entry):
    """A whole graph file that keeps every rule."""

    version: int = Field(alias="splitsec", description="version of the file format: 1")
    name: Name = Field(description="what people call the graph")
    parties: Annotated[dict[Name, Party], AfterValidator(FrozenDict)] = Field(
        min_length=1,
        max_length=1000,
        description="every party by name; the order matters: the earlier of two that could dial each other dials",
    )
    groups: Annotated[dict[Name, Group], AfterValidator(FrozenDict)] = Field(
        default_factory=FrozenDict,
        description="parties that hold the same role; all groups have the same size and schedule",
    )
    segments: Annotated[dict[Name, Segment], AfterValidator(FrozenDict)] = Field(
        default_factory=FrozenDict, max_length=1000, description="every segment by name"
    )
    cuts: Annotated[tuple[Cut, ...], Field(strict=False)] = Field(
        default=(), max_length=MAX_EDGES, description="every edge between two segments"
    )
    labels: Annotated[tuple[Labels, ...], Field(strict=False)] = Field(
        default=(), max_length=MAX_EDGES, description="one edge for every segment with a loss"
    )
    exchanges: Annotated[tuple[Exchange, ...], Field(strict=False)] = Field(
        default=(), max_length=MAX_EDGES, description="named tensors that parties may send each other outside training"
    )
    routes: Annotated[tuple[Route, ...], Field(strict=False)] = Field(
        default=(),
        max_length=MAX_EDGES,
        description="relays between parties that do not connect directly; several for one pair: the first that works",
    )
    circuits: Circuits = Field(default=Circuits(), description="what can be seen of what travels along routes")
    training: Training = Field(default=Training(), description="what all parties must do alike while they train")
    timeouts: Timeouts = Field(default=Timeouts(), description="how long the parties wait for each other")
    privacy: Privacy = Field(
        default=Privacy(), description="what all parties do alike when one has no privacy budget left"
    )
    post_quantum: bool = Field(
        default=True,
        description="`true`: ML-KEM-768 beside X25519 in every handshake, so that what is recorded today cannot be "
        "opened with a quantum computer later; it costs 2272 bytes and about 0.3 ms of computing per connection",
    )

    _document: Document | None = PrivateAttr(None)

    # Made from a file

    def model_post_init(self, context: Any) -> None:
        self._document = context if isinstance(context, Document) else None

    @model_validator(mode="after")
    def _keeps_the_rules(self) -> Self:
        _check(self)
        return self

    @property
    def file(self) -> Path | None:
        """The file that the graph was read from; None for one that was made in code."""
        return None if self._document is None else Path(self._document.file)

    def line_of(self, *keys: str | int) -> int | None:
        """Line of an entry in the file, e.g. ``line_of("cuts", 0, "shape")``; None for a graph made in code."""
        return None if self._document is None else self._document.line_of(*keys)

    def error(self, seen: str, *keys: str | int, expected: str = "", fix: str = "") -> GraphError:
        """A ``GraphError`` (to be raised by the caller) about the entry at ``keys``, with its file and line."""
        return GraphError(seen, file=self.file, line=self.line_of(*keys), expected=expected, fix=fix)

    def with_keys(self, keys: Mapping[str, str], addresses: Mapping[str, tuple[str | None, str | None]]) -> Graph:
        """A copy with other public keys (an anonymous group has one, too) and other (listen, address) for the parties
        named; checked again.
        """
        for name in (*keys, *addresses):
            if name not in self.parties and (name not in self.groups or name in addresses):
                raise self.error(
                    f"unknown party `{shown(name)}`",
                    "parties",
                    expected="a party of the graph",
                    fix=meant(name, self.parties),
                )
        values = self.model_dump(by_alias=True)
        for name, key in keys.items():
            values["parties" if name in self.parties else "groups"][name]["key"] = key
        for name, (listen, address) in addresses.items():
            values["parties"][name].update(listen=listen, address=address)
        return Graph.model_validate(values, context=self._document)

    def __eq__(self, other: object) -> bool:
        """Equal values; where they came from and how the file was laid out does not count."""
        return self.model_dump() == other.model_dump() if isinstance(other, Graph) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.name, tuple(self.parties), tuple(self.segments), self.cuts))

    # Places and streams

    def members(self, place: str) -> tuple[str, ...]:
        """The parties at ``place``: a party is itself, a group its members in the order of their turns."""
        return self.groups[place].members if place in self.groups else (place,)

    def party_at(self, place: str, stream: int) -> str:
        """The party that works for ``stream`` at ``place``."""
        return self.groups[place].members[stream] if place in self.groups else place

    @cached_property
    def streams(self) -> int:
        """How many streams there are: the size of the groups, 1 without groups."""
        return len(next(iter(self.groups.values())).members) if self.groups else 1

    @cached_property
    def schedule(self) -> Literal["round_robin", "parallel"] | None:
        """The schedule of the groups; None without groups."""
        return next(iter(self.groups.values())).schedule if self.groups else None

    def data_parties(self, stream: int, *, labels: bool = True) -> tuple[str, ...]:
        """The parties that hold data or labels of ``stream``; the first leads when they agree on the order of samples.

        Members of a group stand first (their samples are the stream), then those that hold data, then those that hold
        labels alone, who are left out without ``labels``; each in the order of `parties`.
        """
        readers = {self.party_at(one.at, stream) for one in self.segments.values() if one.data is not None}
        holders = readers | ({self.party_at(one.source, stream) for one in self.labels} if labels else set())
        grouped = {member for group in self.groups.values() for member in group.members}
        ranks = {name: (name not in grouped, name not in readers, rank) for rank, name in enumerate(self.parties)}
        return tuple(sorted(holders, key=ranks.__getitem__))

    def hand_ons(self, group: str) -> tuple[tuple[str, str], ...]:
        """Who may hand the weights of ``group`` on to whom: along the ring, or to anybody where members may leave or
        take turns in a secret order.
        """
        members = self.groups[group].members
        if self.privacy.when_spent == "leave" or group == self.anonymous:
            return tuple((giver, taker) for giver in members for taker in members if giver != taker)
        return tuple(zip(members, (*members[1:], members[0]), strict=True))

    # Edges and order

    def edges_into(self, segment: str) -> tuple[int, ...]:
        """Indices in ``cuts`` of the edges that end at ``segment``, in the order of the file."""
        return self._edges_into.get(segment, ())

    def edges_out_of(self, segment: str) -> tuple[int, ...]:
        """Indices in ``cuts`` of the edges that begin at ``segment``, in the order of the file."""
        return self._edges_out_of.get(segment, ())

    @cached_property
    def _edges_into(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(i for i, cut in enumerate(self.cuts) if cut.target == name) for name in self.segments}

    @cached_property
    def _edges_out_of(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(i for i, cut in enumerate(self.cuts) if cut.source == name) for name in self.segments}

    @cached_property
    def order(self) -> tuple[str, ...]:
        """All segments, each after those it takes input from; of several possible ones, the first in the file."""
        done: dict[str, None] = {}
        while len(done) < len(self.segments):
            done[
                next(
                    name
                    for name in self.segments
                    if name not in done and all(self.cuts[i].source in done for i in self.edges_into(name))
                )
            ] = None
        return tuple(done)

    # Anonymous groups

    @cached_property
    def anonymous(self) -> str | None:
        """The group whose members are not told apart outside it; None where there is none."""
        for cut in self.cuts:
            for segment in (cut.source, cut.target) if cut.anonymous else ():
                if self.segments[segment].at in self.groups:
                    return self.segments[segment].at
        return None

    @cached_property
    def far_ends(self) -> frozenset[str]:
        """The parties that members of the anonymous group talk to in training, outside the group."""
        if self.anonymous is None:
            return frozenset()
        edges = [(self.segments[cut.source].at, self.segments[cut.target].at) for cut in self.cuts]
        edges += [(edge.source, self.segments[edge.target].at) for edge in self.labels]
        places = {place for edge in edges if self.anonymous in edge for place in edge} - {self.anonymous}
        return frozenset(member for place in places for member in self.members(place))

    # Who talks to whom

    def links(self) -> tuple[Link, ...]:
        """The pairs of parties that connect directly, each once, in the order in which the file first needs them.

        One listens and the other dials; where both could listen, the one that stands first in `parties` dials.  They
        are those that must talk and have no route, and the neighbours in every route.
        """
        return self._connections[0]

    def circuits_between(self) -> tuple[Circuit, ...]:
        """The pairs that must talk and do not connect: by the routes of the file, or where neither listens through a
        third party that is linked with both.

        Pairs without a cut, labels edge or exchange between them are members of a `round_robin` group (they hand
        weights on) and, for every stream, its first data party with each of the others (they agree on the order of
        sample ids).
        """
        return self._connections[1]

    def has_routes(self, circuit: Circuit) -> bool:
        """Whether the file has routes for it; else its route follows from who is linked with whom."""
        return frozenset((circuit.first, circuit.second)) in self._routed

    @cached_property
    def relays(self) -> frozenset[str]:
        """The parties that some circuit passes through."""
        return frozenset(relay for circuit in self.circuits_between() for route in circuit.routes for relay in route)

    @cached_property
    def busiest(self) -> int:
        """How many circuits pass through the relay with most of them; 0 without relays."""
        through: dict[str, int] = {}
        for circuit in self.circuits_between():
            for relay in {relay for route in circuit.routes for relay in route}:
                through[relay] = through.get(relay, 0) + 1
        return max(through.values(), default=0)

    def talking(self, *, exchanges: bool = True) -> tuple[frozenset[str], ...]:
        """The pairs of parties that must talk, each once; without ``exchanges``, for training alone."""
        needs = (one for one in self._all_needs if exchanges or one.keys[0] != "exchanges")
        return tuple(dict.fromkeys(one.pair for one in needs))

    @cached_property
    def _rank(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.parties)}

    def _link(self, pair: frozenset[str]) -> Link | None:
        """Who of a pair dials whom; None where neither listens."""
        first, second = sorted(pair, key=self._rank.__getitem__)
        if self.parties[second].listen is not None:
            return Link(first, second)
        return Link(second, first) if self.parties[first].listen is not None else None

    @cached_property
    def _connections(self) -> tuple[tuple[Link, ...], tuple[Circuit, ...]]:
        links: dict[frozenset[str], Link] = {}
        waiting: dict[frozenset[str], _Need] = {}
        for need in self._all_needs:
            if need.pair in self._routed or need.pair in links:
                continue
            link = self._link(need.pair)
            if link is not None:
                links[need.pair] = link
            elif need.direct:
                first, second = sorted(need.pair, key=self._rank.__getitem__)
                raise self.error(
                    f"`{first}` and `{second}` must connect ({need.why}), but neither of them listens",
                    *need.keys,
                    expected="`listen` at one of the two, or a route between them",
                    fix='add `listen: "tcp://0.0.0.0:7400"` and `address: "tcp://HOST:7400"` to one of them',
                )
            else:
                waiting.setdefault(need.pair, need)
        for pair, (side, index) in self._side_by_side().items():
            link = self._link(pair)
            if link is None:
                raise self.error(
                    f"`{side[0]}` and `{side[1]}` stand side by side in a route, but neither of them listens",
                    "routes",
                    index,
                    "via",
                    expected="`listen` at one of the two",
                    fix='add `listen: "tcp://0.0.0.0:7400"` and `address: "tcp://HOST:7400"` to the relay',
                )
            links.setdefault(pair, link)
        linked: dict[str, set[str]] = {name: set() for name in self.parties}
        for one, other in links:
            linked[one].add(other)
            linked[other].add(one)
        circuits = []
        for pair in dict.fromkeys(need.pair for need in self._all_needs):
            routed, lacking = self._routed.get(pair), waiting.get(pair)
            if routed is not None:
                circuits.append(Circuit(routed.first, routed.second, tuple(routed.routes)))
            elif lacking is not None:
                circuits.append(self._implied(lacking, linked))
        return tuple(links.values()), tuple(circuits)

    def _side_by_side(self) -> dict[frozenset[str], tuple[tuple[str, str], int]]:
        """The neighbours in the routes of the file: in the order of their route, and the index of the first."""
        found: dict[frozenset[str], tuple[tuple[str, str], int]] = {}
        for routed in self._routed.values():
            for route, index in zip(routed.routes, routed.indices, strict=True):
                for side in pairwise((routed.first, *route, routed.second)):
                    pair = frozenset(side)
                    if pair in self._routed:
                        first, second, _, indices = self._routed[pair]
                        line = self.line_of("routes", indices[0])
                        raise self.error(
                            f"`{side[0]}` and `{side[1]}` stand side by side here, which takes a link, but talk to "
                            "each other by a route" + ("" if line is None else f" (on line {line})"),
                            "routes",
                            index,
                            "via",
                            expected="a link or a route between two parties, not both",
                            fix=f"put another relay between them here, or remove the route from `{first}` to "
                            f"`{second}`",
                        )
                    found.setdefault(pair, (side, index))
        return found

    def _implied(self, need: _Need, linked: Mapping[str, set[str]]) -> Circuit:
        """The circuit of two parties that have no route and cannot connect: through the first that both link with."""
        first, second = sorted(need.pair, key=self._rank.__getitem__)
        thirds = linked[first] & linked[second]
        if not thirds:
            raise self.error(
                f"`{first}` and `{second}` must talk ({need.why}), but neither listens and nobody links them",
                *need.keys,
                expected="`listen` at one of the two, a party that both connect to, or a route",
                fix=f"add `listen` (and `address`) to `{first}` or `{second}`, or "
                f"`{{from: {first}, to: {second}, via: [...]}}` under `routes`",
            )
        return Circuit(first, second, ((min(thirds, key=self._rank.__getitem__),),))

    @cached_property
    def _routed(self) -> dict[frozenset[str], _Routed]:
        """What the file says under `routes`, for every pair that talks."""
        talking = set(self.talking())
        found: dict[frozenset[str], _Routed] = {}
        for index, route in enumerate(self.routes):
            pairs = self._route_pairs(route)
            used = [pair for pair in pairs if frozenset(pair) in talking]
            if not used:
                raise self.error(
                    f"a route {_between(route)}, but no two parties there talk to each other"
                    if route.cut is not None or {route.source, route.target} & self.groups.keys()
                    else f"a route {_between(route)}, who never talk to each other",
                    "routes",
                    index,
                    expected="two ends of a cut, labels edge or exchange, or parties that hand weights on or agree on "
                    "the order of samples",
                    fix="correct the names, or remove the route",
                )
            for first, second in used:
                one = found.setdefault(frozenset((first, second)), _Routed(first, second, [], []))
                if one.first != first:
                    raise self.error(
                        f"a route from `{first}` to `{second}`, and another from `{second}` to `{first}`"
                        + _first(self, "routes", one.indices[0]),
                        "routes",
                        index,
                        expected="one of the two to build the circuits",
                        fix=f"write it from `{second}` to `{first}`, the relays in that order",
                    )
                if route.via in one.routes:
                    raise self.error(
                        f"the route from `{first}` to `{second}` via {', '.join(f'`{name}`' for name in route.via)} is "
                        "there twice" + _first(self, "routes", one.indices[one.routes.index(route.via)]),
                        "routes",
                        index,
                        expected="other relays in every route of a pair",
                        fix="remove one of them",
                    )
                one.routes.append(route.via)
                one.indices.append(index)
        return found

    def _route_pairs(self, route: Route) -> list[tuple[str, str]]:
        """The pairs that ``route`` is between, whether they talk or not; the first builds."""
        if route.cut is not None:
            source, target = (self.segments[name].at for name in route.cut)
            pairs = [(self.party_at(source, stream), self.party_at(target, stream)) for stream in range(self.streams)]
        else:
            assert route.source is not None
            assert route.target is not None
            source, target = route.source, route.target
            if source == target:
                return list(combinations(sorted(self.members(source), key=self._rank.__getitem__), 2))
            pairs = [(one, other) for one in self.members(source) for other in self.members(target)]
        return [pair for pair in dict.fromkeys(pairs) if pair[0] != pair[1]]

    @cached_property
    def _all_needs(self) -> tuple[_Need, ...]:
        return tuple(self._needs())

    def _needs(self) -> Iterator[_Need]:
        """Every reason for two different parties to talk: edges as in the file, then what follows."""
        for index, cut in enumerate(self.cuts):
            ends = self.segments[cut.source].at, self.segments[cut.target].at
            yield from self._pairs(*ends, f"the cut from `{cut.source}` to `{cut.target}`", ("cuts", index))
        for index, edge in enumerate(self.labels):
            yield from self._pairs(
                edge.source, self.segments[edge.target].at, f"the labels for `{edge.target}`", ("labels", index)
            )
        for index, one in enumerate(self.exchanges):
            yield from self._pairs(one.source, one.target, f"the exchange `{one.name}`", ("exchanges", index))
        held = {one.at for one in self.segments.values()}
        for name, group in self.groups.items():
            if group.schedule == "round_robin" and name in held:
                for giver, taker in self.hand_ons(name):
                    if giver != taker:
                        why = f"`{giver}` hands the weights of the group `{name}` on"
                        yield _Need(frozenset((giver, taker)), why, ("groups", name), direct=False)
        for stream in range(self.streams):
            leader, *others = self.data_parties(stream) or ("",)
            for other in others:
                yield _Need(
                    frozenset((leader, other)),
                    "they agree on the order of sample ids",
                    ("parties", other),
                    direct=False,
                )

    def _pairs(self, source: str, target: str, why: str, keys: tuple[str | int, ...]) -> Iterator[_Need]:
        for stream in range(self.streams):
            pair = frozenset((self.party_at(source, stream), self.party_at(target, stream)))
            if len(pair) == 2:
                yield _Need(pair, why, keys, direct=True)


def _between(route: Route) -> str:
    """Where a route leads, in words."""
    if route.cut is not None:
        return f"for the cut from `{route.cut[0]}` to `{route.cut[1]}`"
    return f"among `{route.source}`" if route.source == route.target else f"from `{route.source}` to `{route.target}`"


def load_graph(path: str | Path) -> Graph:
    """The graph in the file at ``path``; a ``GraphError`` with file and line where it breaks a rule."""
    return yamlfile.validate(Graph, yamlfile.read(path, GraphError), GraphError)


def parse_graph(text: str, file: str | Path = "graph.yaml") -> Graph:
    """The graph in ``text``; ``file`` is what errors call it."""
    return yamlfile.validate(Graph, yamlfile.parse(text, file, GraphError), GraphError)


def check_name(name: str) -> None:
    """Raise ``GraphError`` unless ``name`` may be the name of a party, group, segment or exchange."""
    try:
        _name(name)
    except PydanticCustomError as reason:
        context = reason.context or {}
        raise GraphError(context["seen"], expected=context["expected"], fix=context["fix"]) from None


# The rules, each with its own words.  They run in this order: a later one may lean on the earlier ones.


def _check(graph: Graph) -> None:
    if graph.version != 1:
        raise graph.error(
            f"version {graph.version} of the file format",
            "splitsec",
            expected="version 1",
            fix="write `splitsec: 1`, or install a newer splitsec",
        )
    _check_training(graph)
    _check_parties(graph)
    _check_groups(graph)
    _check_segments(graph)
    _check_cuts(graph)
    _check_labels(graph)
    _check_privacy(graph)
    _check_codecs(graph)
    _check_exchanges(graph)
    _check_acyclic(graph)
    _check_reached(graph)
    _check_joins(graph)
    _check_routes(graph)
    _check_used(graph)
    _check_anonymous(graph)
    graph._connections  # noqa: B018  raises where a pair can neither connect nor be led through others
    _check_hidden(graph)


def _check_training(graph: Graph) -> None:
    training = graph.training
    if training.micro_batches > training.batch_size:
        raise graph.error(
            f"batches of {training.batch_size} in {training.micro_batches} micro-batches",
            "training",
            "micro_batches",
            expected="at least one sample in each, and some 16 for it to pay",
            fix=f"write {max(1, training.batch_size // 16)}, or a larger `batch_size`",
        )


def _check_parties(graph: Graph) -> None:
    keys: dict[str, str] = {one.key: name for name, one in graph.groups.items() if one.key is not None}
    reached: dict[str, str] = {}
    for name, party in graph.parties.items():
        if party.key is not None and keys.setdefault(party.key, name) != name:
            raise graph.error(
                f"`{name}` has the same key as `{keys[party.key]}`",
                "parties",
                name,
                "key",
                expected="a key of its own for every party",
                fix=f"run `splitsec keys new {name}` at that institution and paste the line it prints",
            )
        if party.address is not None and party.listen is None:
            raise graph.error(
                f"`{name}` has an `address` but does not listen",
                "parties",
                name,
                "address",
                expected="`listen` beside `address`",
                fix='add `listen: "tcp://0.0.0.0:7400"`, or remove `address` where the party only dials',
            )
        if party.listen is None or party.dialled is None:
            continue
        if _is_wildcard(party.dialled):
            key, what = ("listen", "listens on") if party.address is None else ("address", "is to be dialled at")
            raise graph.error(
                f"`{name}` {what} {party.dialled}, where nobody can dial it",
                "parties",
                name,
                key,
                expected="a host that others can reach",
                fix=f'add `address: "tcp://HOST:{party.dialled.rpartition(":")[2]}"` with the host name that others use'
                if party.address is None
                else "put the host name that others use in its place",
            )
        if party.listen.partition("://")[0] != party.dialled.partition("://")[0]:
            raise graph.error(
                f"`{name}` listens on {shown(party.listen)} but is dialled at {shown(party.dialled)}",
                "parties",
                name,
                "address",
                expected="the same scheme in both",
                fix="change one of them",
            )
        if reached.setdefault(party.dialled, name) != name:
            raise graph.error(
                f"`{name}` is dialled at {shown(party.dialled)}, and so is `{reached[party.dialled]}`",
                "parties",
                name,
                "listen" if party.address is None else "address",
                expected="an address of its own for every party that listens",
                fix="use another port",
            )


def _check_groups(graph: Graph) -> None:
    group_of: dict[str, str] = {}
    first: str | None = None
    for name, group in graph.groups.items():
        if name in graph.parties:
            raise graph.error(
                f"`{name}` is the name of a group and of a party",
                "groups",
                name,
                expected="one name for one thing: `at` and `from` may name either",
                fix="rename the group",
            )
        if not group.members:
            raise graph.error(
                f"the group `{name}` has no members",
                "groups",
                name,
                expected="at least one party",
                fix="list its members",
            )
        for index, member in enumerate(group.members):
            keys = ("groups", name, "members", index)
            if member not in graph.parties:
                raise graph.error(
                    f"unknown party `{member}` in the group `{name}`",
                    *keys,
                    expected="a name from `parties`",
                    fix=meant(member, graph.parties),
                )
            if member in group.members[:index]:
                raise graph.error(
                    f"`{member}` is in the group `{name}` twice",
                    *keys,
                    expected="every member once",
                    fix="remove one of them",
                )
            if member in group_of:
                raise graph.error(
                    f"`{member}` is in the group `{name}` and in the group `{group_of[member]}`",
                    *keys,
                    expected="a party in one group only (a group may hold several segments)",
                    fix="place the segments of both at one group, or take the party out of one of them",
                )
            group_of[member] = name
        if first is None:
            first = name
        elif len(group.members) != len(graph.groups[first].members):
            raise graph.error(
                f"`{name}` has {len(group.members)} members and `{first}` has {len(graph.groups[first].members)}",
                "groups",
                name,
                "members",
                expected="groups of one size: member k of each works with member k of the others",
                fix="add or remove members",
            )
        elif group.schedule != graph.groups[first].schedule:
            raise graph.error(
                f"the group `{name}` is `{group.schedule}` and `{first}` is `{graph.groups[first].schedule}`",
                "groups",
                name,
                "schedule",
                expected="one schedule for all groups",
                fix="change one of them",
            )


def _check_place(graph: Graph, place: str, *keys: str | int) -> None:
    if place not in graph.parties and place not in graph.groups:
        known = (*graph.parties, *graph.groups)
        raise graph.error(
            f"unknown party or group `{place}`",
            *keys,
            expected="a name from `parties` or `groups`",
            fix=meant(place, known),
        )


def _check_segments(graph: Graph) -> None:
    for name, segment in graph.segments.items():
        _check_place(graph, segment.at, "segments", name, "at")
        if segment.loss is not None and segment.loss not in LOSSES and segment.loss != CUSTOM:
            raise graph.error(
                f"unknown loss `{shown(segment.loss)}` of the segment `{name}`",
                "segments",
                name,
                "loss",
                expected="a standard loss, or `custom` and a function in the party file",
                fix=meant(segment.loss, (*LOSSES, CUSTOM)),
            )
        if segment.loss is None and "loss_weight" in segment.model_fields_set and segment.loss_weight != 1.0:
            raise graph.error(
                f"the segment `{name}` has a `loss_weight` but no `loss`",
                "segments",
                name,
                "loss_weight",
                expected="`loss` beside `loss_weight`",
                fix="add `loss`, or remove `loss_weight`",
            )


def _check_known_segment(graph: Graph, name: str, *keys: str | int) -> None:
    if name not in graph.segments:
        if name in graph.parties or name in graph.groups:
            held = [one for one, segment in graph.segments.items() if segment.at == name]
            seen, fix = (
                f"`{name}` is a party or group, not a segment",
                "write the segment that it holds" + (f": `{held[0]}`" if held else ""),
            )
        else:
            seen, fix = f"unknown segment `{name}`", meant(name, graph.segments)
        raise graph.error(seen, *keys, expected="a name from `segments`", fix=fix)


def _check_cuts(graph: Graph) -> None:
    first: dict[tuple[str, str, str | None], int] = {}
    named: dict[str, int] = {}
    unnamed: dict[str, int] = {}
    for index, cut in enumerate(graph.cuts):
        _check_known_segment(graph, cut.source, "cuts", index, "from")
        _check_known_segment(graph, cut.target, "cuts", index, "to")
        _check_size(graph, f"the cut from `{cut.source}` to `{cut.target}`", cut.sample_bytes, "cuts", index, "shape")
        edge = (cut.source, cut.target, cut.output)
        if first.setdefault(edge, index) != index:
            raise graph.error(
                f"the cut from `{cut.source}` to `{cut.target}` is there twice" + _first(graph, "cuts", first[edge]),
                "cuts",
                index,
                expected="every cut once; two outputs of one segment are told apart by `output`",
                fix="remove one of them",
            )
        (unnamed if cut.output is None else named).setdefault(cut.source, index)
        if cut.source in named and cut.source in unnamed:
            raise graph.error(
                f"some cuts from `{cut.source}` name an `output` and some do not",
                "cuts",
                index,
                expected="`output` at all of them, where the module returns a dict, or at none",
                fix="add or remove `output`" + _first(graph, "cuts", min(named[cut.source], unnamed[cut.source])),
            )


def _first(graph: Graph, kind: str, index: int) -> str:
    line = graph.line_of(kind, index)
    return "" if line is None else f" (the first is on line {line})"


def _check_size(graph: Graph, what: str, size: int, *keys: str | int) -> None:
    if size > MAX_SAMPLE_BYTES:
        raise graph.error(
            f"{what} carries {size:,} bytes a sample", *keys, expected="at most 1 GiB", fix="check the shape"
        )


def _check_labels(graph: Graph) -> None:
    first: dict[str, int] = {}
    for index, edge in enumerate(graph.labels):
        _check_place(graph, edge.source, "labels", index, "from")
        _check_known_segment(graph, edge.target, "labels", index, "to")
        _check_size(graph, f"the labels edge to `{edge.target}`", edge.sample_bytes, "labels", index, "shape")
        loss = graph.segments[edge.target].loss
        if loss is None:
            raise graph.error(
                f"labels for `{edge.target}`, which computes no loss",
                "labels",
                index,
                "to",
                expected="a segment with `loss`",
                fix=f"add `loss` to `{edge.target}`, or bring the labels to the segment that has it",
            )
        if first.setdefault(edge.target, index) != index:
            raise graph.error(
                f"two labels edges to `{edge.target}`" + _first(graph, "labels", first[edge.target]),
                "labels",
                index,
                expected="one labels edge for every segment with a loss",
                fix="remove one; where several parties hold labels, make them a group",
            )
        allowed = LOSSES[loss].labels if loss in LOSSES else (edge.dtype,)
        if edge.dtype not in allowed:
            raise graph.error(
                f"labels of dtype {edge.dtype} for the loss {loss}",
                "labels",
                index,
                "dtype",
                expected=" or ".join(allowed),
                fix=f"write `dtype: {'int64' if 'int64' in allowed else 'float32'}`, and check the `shape`",
            )
    for name, segment in graph.segments.items():
        if segment.loss is not None and name not in first:
            raise graph.error(
                f"the segment `{name}` computes a loss, but no edge brings it labels",
                "segments",
                name,
                "loss",
                expected="a labels edge, also where the labels are at the same party",
                fix=f"add `{{from: {segment.at}, to: {name}}}` under `labels`, or another `from` that holds them",
            )


def _check_privacy(graph: Graph) -> None:
    for index, cut in enumerate(graph.cuts):
        if cut.privacy is not None and cut.dtype not in FLOATS:
            raise graph.error(
                f"the cut from `{cut.source}` to `{cut.target}` carries {cut.dtype}, which can be neither clipped nor "
                "given noise",
                "cuts",
                index,
                "privacy",
                expected="a cut of floats: " + ", ".join(FLOATS),
                fix="remove `privacy` there, or let the cut carry floats",
            )
        if cut.privacy is not None and cut.privacy.forward is not None and cut.raw:
            raise graph.error(
                f"the cut from `{cut.source}` to `{cut.target}` may carry raw samples, and has a safeguard",
                "cuts",
                index,
                "raw",
                expected="one or the other",
                fix="remove `raw: true`, or `privacy`",
            )
    for index, edge in enumerate(graph.labels):
        if edge.privacy is not None and (edge.dtype != "int64" or edge.shape):
            raise graph.error(
                f"the labels for `{edge.target}` are {edge.dtype} {shown(edge.shape)}, where `privacy` needs class "
                "numbers",
                "labels",
                index,
                "privacy",
                expected="`shape: []` and `dtype: int64`, the number of a class",
                fix="remove `privacy` there, or send class numbers",
            )


def _check_codecs(graph: Graph) -> None:
    for index, cut in enumerate(graph.cuts):
        if cut.codec is None:
            continue
        what, keys = f"the cut from `{cut.source}` to `{cut.target}`", ("cuts", index, "codec")
        if cut.dtype == cut.codec:
            raise graph.error(
                f"{what} is {cut.dtype}, and its codec is {cut.codec}, too",
                *keys,
                expected="a codec that makes its tensors smaller",
                fix="remove `codec`, or write `dtype: float32`: then the segments compute in that",
            )
        if cut.dtype not in CODED:
            raise graph.error(
                f"{what} carries {cut.dtype}, which {cut.codec} does not take",
                *keys,
                expected=" or ".join(CODED),
                fix="remove `codec` there",
            )
        place = graph.segments[cut.source].at
        if place == graph.segments[cut.target].at:
            raise graph.error(
                f"{what} stays inside `{place}`, and has a codec",
                *keys,
                expected="codecs where something is sent: what stays inside is not written for the wire, nor rounded",
                fix="remove `codec` there",
            )
        rows = -(-graph.training.batch_size // graph.training.micro_batches)
        if cut.codec != EXACT and cut.message_bytes(rows) >= rows * cut.sample_bytes:
            raise graph.error(
                f"{what} carries {shown(cut.shape)}, which {cut.codec} makes no smaller",
                *keys,
                expected="several numbers for each of its scales, which are 4 bytes",
                fix="remove `codec` there, or write `codec: bfloat16`",
            )
        if cut.codec == EXACT:
            _check_exact(graph, cut, what, index)


def _check_exact(graph: Graph, cut: Cut, what: str, index: int) -> None:
    """What the codec that leaves zeros out does not go with."""
    if cut.privacy is not None:
        raise graph.error(
            f"{what} has `privacy` and the codec {EXACT}",
            "cuts",
            index,
            "codec",
            expected="one of them: noise leaves no zeros, and how many there are would tell about samples uncounted",
            fix="remove one, or write another codec: rounding comes after the noise and takes nothing from it",
        )
    if cut.anonymous:
        raise graph.error(
            f"{what} is anonymous, and its codec is {EXACT}",
            "cuts",
            index,
            "codec",
            expected="messages as long as any other member's: how many zeros there are tells members apart",
            fix="remove it, or write another codec",
        )
    if cut.raw:
        raise graph.error(
            f"{what} may carry raw samples, and its codec is {EXACT}",
            "cuts",
            index,
            "codec",
            expected="the output of a ReLU at its beginning",
            fix="remove `raw: true`, or `codec`",
        )


def _check_exchanges(graph: Graph) -> None:
    first: dict[str, int] = {}
    for index, one in enumerate(graph.exchanges):
        for key, name in (("from", one.source), ("to", one.target)):
            if name not in graph.parties:
                known = "a group, not a party" if name in graph.groups else "unknown"
                raise graph.error(
                    f"the exchange `{one.name}` names `{name}`, which is {known}",
                    "exchanges",
                    index,
                    key,
                    expected="a name from `parties`",
                    fix=meant(name, graph.parties),
                )
        if one.source == one.target:
            raise graph.error(
                f"the exchange `{one.name}` goes from `{one.source}` to itself",
                "exchanges",
                index,
                "to",
                expected="two parties",
                fix="change one",
            )
        if first.setdefault(one.name, index) != index:
            raise graph.error(
                f"two exchanges are called `{one.name}`",
                "exchanges",
                index,
                "name",
                expected="a name of its own for each",
                fix="rename one",
            )
        fixed = math.prod(size or 1 for size in one.shape) * DTYPE_BYTES[one.dtype]
        if fixed > one.max_bytes:
            raise graph.error(
                f"the exchange `{one.name}` needs at least {fixed:,} bytes but allows {one.max_bytes:,}",
                "exchanges",
                index,
                "shape",
                expected="a tensor that fits in `max_bytes`",
                fix=f"write `max_bytes: {fixed}` or more",
            )


def _listed(names: tuple[str, ...]) -> str:
    return ", then ".join(f"`{name}`" for name in names)


def _check_acyclic(graph: Graph) -> None:
    cycle = _cycle(graph)
    if cycle:
        names = [graph.cuts[index].source for index in cycle]
        raise graph.error(
            "the segments form a cycle: " + " -> ".join((*names, names[0])),
            "cuts",
            cycle[-1],
            expected="cuts that lead from the data to the loss and never back",
            fix="remove one of these cuts, or split a segment in two, each with its own name",
        )


def _cycle(graph: Graph) -> list[int]:
    """Indices in ``cuts`` of a cycle, in its order; empty where there is none.  Iterative: chains may be long."""
    state: dict[str, Literal["open", "done"]] = {}
    for start in graph.segments:
        if start in state:
            continue
        state[start] = "open"
        path: list[int] = []
        stack = [(start, iter(graph.edges_out_of(start)))]
        while stack:
            name, edges = stack[-1]
            edge = next(edges, None)
            if edge is None:
                state[name] = "done"
                stack.pop()
                if path:
                    path.pop()
                continue
            target = graph.cuts[edge].target
            if state.get(target) == "open":
                path.append(edge)
                begin = next(i for i, index in enumerate(path) if graph.cuts[index].source == target)
                return path[begin:]
            if target not in state:
                state[target] = "open"
                path.append(edge)
                stack.append((target, iter(graph.edges_out_of(target))))
    return []


def _check_reached(graph: Graph) -> None:
    for name, segment in graph.segments.items():
        if not graph.edges_into(name) and segment.data is None:
            raise graph.error(
                f"no edge reaches the segment `{name}`",
                "segments",
                name,
                expected="a cut that ends there, or `data`, the field of the samples that it reads",
                fix=f"add `data: x` to `{name}`, or `{{from: ..., to: {name}, ...}}` under `cuts`",
            )
    for name, segment in graph.segments.items():
        if not graph.edges_out_of(name) and segment.loss is None:
            raise graph.error(
                f"the segment `{name}` leads nowhere",
                "segments",
                name,
                expected="a cut that begins there, or a `loss`: without either, nothing could train it",
                fix=f"add `loss: cross_entropy` to `{name}`, or `{{from: {name}, to: ..., ...}}` under `cuts`",
            )


def _check_joins(graph: Graph) -> None:
    for name, segment in graph.segments.items():
        edges = graph.edges_into(name)
        if segment.join == "arguments" or len(edges) < 2:
            continue
        first = graph.cuts[edges[0]]
        for index in edges[1:]:
            cut = graph.cuts[index]
            if segment.join == "concat":
                fits = cut.shape[1:] == first.shape[1:] and len(cut.shape) == len(first.shape) > 0
                wanted = f"shapes that differ in their first number only, as {shown(first.shape)} from `{first.source}`"
            else:
                fits, wanted = cut.shape == first.shape, f"the shape {shown(first.shape)}, as from `{first.source}`"
            if not fits:
                raise graph.error(
                    f"`{name}` joins its inputs by `{segment.join}`, but `{cut.source}` sends {shown(cut.shape)}",
                    "cuts",
                    index,
                    "shape",
                    expected=wanted,
                    fix=f"change the shape, or write `join: arguments` at `{name}` and join them in its module",
                )
            if cut.dtype != first.dtype:
                raise graph.error(
                    f"`{name}` joins its inputs by `{segment.join}`, but `{cut.source}` sends {cut.dtype}",
                    "cuts",
                    index,
                    "dtype",
                    expected=f"{first.dtype}, as from `{first.source}`",
                    fix=f"change the dtype, or write `join: arguments` at `{name}` and join them in its module",
                )


def _check_used(graph: Graph) -> None:
    if not graph.segments and not graph.exchanges:
        raise graph.error(
            "the graph has neither segments nor exchanges",
            expected="something to do",
            fix="add `segments` and `cuts`, or `exchanges`",
        )
    places = {one.at for one in graph.segments.values()} | {one.source for one in graph.labels}
    for name in graph.groups:
        if name not in places:
            raise graph.error(
                f"nothing is placed at the group `{name}`",
                "groups",
                name,
                expected="a segment or labels at every group",
                fix=f"write `at: {name}` at a segment, or remove the group",
            )
    busy = {member for place in places for member in graph.members(place)}
    busy |= {end for one in graph.exchanges for end in (one.source, one.target)}
    busy |= {relay for one in graph.routes for relay in one.via}
    for name in graph.parties:
        if name not in busy:
            raise graph.error(
                f"the party `{name}` has nothing to do",
                "parties",
                name,
                expected="a segment, labels, an exchange or a route for every party",
                fix="place something there, or remove the party",
            )


def _check_routes(graph: Graph) -> None:
    for index, route in enumerate(graph.routes):
        if route.cut is not None:
            _check_cut_of_route(graph, route, index)
        else:
            _check_ends_of_route(graph, route, index)
        _check_relays(graph, route, index)


def _check_cut_of_route(graph: Graph, route: Route, index: int) -> None:
    assert route.cut is not None
    if route.source is not None or route.target is not None:
        raise graph.error(
            "a route with `cut` and with `" + ("from" if route.source is not None else "to") + "`",
            "routes",
            index,
            expected="`cut`, or `from` and `to`",
            fix="remove one of them",
        )
    for name in route.cut:
        _check_known_segment(graph, name, "routes", index, "cut")
    if not any((cut.source, cut.target) == route.cut for cut in graph.cuts):
        back = any((cut.target, cut.source) == route.cut for cut in graph.cuts)
        raise graph.error(
            f"a route for the cut from `{route.cut[0]}` to `{route.cut[1]}`, which is not there",
            "routes",
            index,
            "cut",
            expected="a cut of the file, in its direction",
            fix=f"write `cut: [{route.cut[1]}, {route.cut[0]}]`" if back else "correct it, or write `from` and `to`",
        )


def _check_ends_of_route(graph: Graph, route: Route, index: int) -> None:
    for key, name, other in (("from", route.source, "to"), ("to", route.target, "from")):
        if name is None:
            raise graph.error(
                f"a route without `{key}`",
                "routes",
                index,
                expected="`from` and `to`, or `cut`",
                fix=f"add `{key}`: the party or group at the "
                + ("end that builds the circuits" if other == "to" else "far end"),
            )
        _check_place(graph, name, "routes", index, key)
    if route.source == route.target and route.source in graph.parties:
        raise graph.error(
            f"a route from `{route.source}` to itself",
            "routes",
            index,
            "to",
            expected="two parties; only a group may stand at both ends, for all pairs of its members",
            fix="change one",
        )


def _check_relays(graph: Graph, route: Route, index: int) -> None:
    keys = ("routes", index, "via")
    if not 1 <= len(route.via) <= RELAYS_MAX:
        raise graph.error(
            f"a route of {len(route.via)} relays",
            *keys,
            expected=f"1 to {RELAYS_MAX}",
            fix="name a relay, or remove the route: without one, the parties connect directly"
            if not route.via
            else "take some out",
        )
    ends = {end for pair in graph._route_pairs(route) for end in pair}
    for place, name in enumerate(route.via):
        if name not in graph.parties:
            what = "a group, not a party" if name in graph.groups else "unknown"
            raise graph.error(
                f"the relay `{name}` is {what}",
                *keys,
                place,
                expected="a name from `parties`",
                fix=meant(name, graph.parties),
            )
        if name in route.via[:place]:
            raise graph.error(
                f"`{name}` is in the route twice",
                *keys,
                place,
                expected="every relay once",
                fix="remove one of them",
            )
        if name in ends:
            raise graph.error(
                f"`{name}` is a relay and an end of its own route",
                *keys,
                place,
                expected="relays other than the parties at the ends",
                fix="take it out, or name the ends one by one in routes of their own",
            )


def _check_anonymous(graph: Graph) -> None:
    """What an anonymous group takes, but for the ways to it."""
    for index, cut in enumerate(graph.cuts):
        if not cut.anonymous:
            continue
        ends = graph.segments[cut.source].at, graph.segments[cut.target].at
        if not set(ends) & graph.groups.keys() or ends[0] == ends[1]:
            raise graph.error(
                f"the cut from `{cut.source}` to `{cut.target}` is anonymous, but "
                + (f"stays inside `{ends[0]}`" if ends[0] == ends[1] else "neither end is a group"),
                "cuts",
                index,
                "anonymous",
                expected="a group at one end, among whose members the one that speaks is hidden",
                fix="remove `anonymous`" + ("" if ends[0] == ends[1] else ", or place one of the segments at a group"),
            )
    name = graph.anonymous
    for other, group in graph.groups.items():
        if other == name:
            continue
        if name is not None:
            raise graph.error(
                f"the group `{other}` beside `{name}`, which is anonymous",
                "groups",
                other,
                expected="one group: who works with a member of another group is known by that",
                fix=f"make `{other}` one party, or remove `anonymous` from the cuts",
            )
        set_ = "key" if group.key is not None else "pseudonym" if group.pseudonym != "turn" else None
        if set_ is not None:
            raise graph.error(
                f"the group `{other}` has a `{set_}`, but is not anonymous",
                "groups",
                other,
                set_,
                expected=f"`{set_}` only at a group with `anonymous: true` at its cuts",
                fix=f"remove `{set_}`, or add `anonymous: true` to the cuts that leave or reach the group",
            )
    if name is not None:
        _check_anonymous_group(graph, name)


def _check_anonymous_group(graph: Graph, name: str) -> None:
    group = graph.groups[name]
    for index, cut in enumerate(graph.cuts):
        ends = {graph.segments[cut.source].at, graph.segments[cut.target].at}
        if name in ends and len(ends) == 2 and not cut.anonymous:
            marked = next(one for one in graph.cuts if one.anonymous)
            raise graph.error(
                f"the cut from `{cut.source}` to `{cut.target}` is not anonymous, but that from `{marked.source}` to "
                f"`{marked.target}` is",
                "cuts",
                index,
                expected=f"all cuts that leave or reach the group `{name}` to be, or none",
                fix="add `anonymous: true`, or remove it there",
            )
    if group.schedule != "round_robin":
        raise graph.error(
            f"the group `{name}` is anonymous and `{group.schedule}`",
            "groups",
            name,
            "schedule",
            expected="`round_robin`: one speaks at a time, in an order that only members know",
            fix="write `schedule: round_robin`, or remove `anonymous` from the cuts",
        )
    if len(group.members) < 2:
        raise graph.error(
            f"the anonymous group `{name}` has one member",
            "groups",
            name,
            "members",
            expected="several, among whom the one that speaks is hidden",
            fix="add members, or remove `anonymous` from the cuts",
        )
    if graph.privacy.when_spent != "end":
        raise graph.error(
            f"`when_spent: {graph.privacy.when_spent}` with the anonymous group `{name}`",
            "privacy",
            "when_spent",
            expected="`end`: who leaves would be told from the others",
            fix="write `when_spent: end`, or remove `anonymous` from the cuts",
        )
    for segment, one in graph.segments.items():
        if one.data is not None and one.at != name:
            raise _samples_elsewhere(graph, name, f"`{one.at}` holds samples, too", "segments", segment, "data")
    for index, edge in enumerate(graph.labels):
        if edge.source != name:
            seen = f"the labels for `{edge.target}` are at `{edge.source}`"
            raise _samples_elsewhere(graph, name, seen, "labels", index, "from")
    for index, exchange in enumerate(graph.exchanges):
        ends = {exchange.source, exchange.target}
        if ends & set(group.members) and ends & graph.far_ends:
            raise graph.error(
                f"the exchange `{exchange.name}` goes from `{exchange.source}` to `{exchange.target}`, where the group "
                f"`{name}` is anonymous",
                "exchanges",
                index,
                expected="exchanges of its members with others only: here each would be seen by its name",
                fix="remove it, or remove `anonymous` from the cuts",
            )


def _samples_elsewhere(graph: Graph, group: str, seen: str, *keys: str | int) -> GraphError:
    return graph.error(
        f"{seen}, but the group `{group}` is anonymous",
        *keys,
        expected="all samples and labels at its members: by the samples that it shares, a member would be known",
        fix=f"place them at `{group}`, or remove `anonymous` from the cuts",
    )


def _check_hidden(graph: Graph) -> None:
    """The ways between the members of an anonymous group, and to the far ends."""
    name = graph.anonymous
    if name is None:
        return
    members = graph.groups[name].members
    for far in (one for one in graph.parties if one in graph.far_ends):
        for member in members:
            routed = graph._routed.get(frozenset((member, far)))
            if routed is None:
                raise graph.error(
                    f"`{member}` has no route to `{far}`, but the group `{name}` is anonymous there",
                    *next(need.keys for need in graph._all_needs if need.pair == {member, far}),
                    expected="a route from every member: on a link of its own, each would be known by its address",
                    fix=f"add `{{from: {name}, to: {far}, via: [...]}}` under `routes`",
                )
            if routed.first != member:
                raise graph.error(
                    f"a route from `{far}` to `{member}`, whose group `{name}` is anonymous there",
                    "routes",
                    routed.indices[0],
                    expected=f"routes from `{name}`: who builds a circuit must know whom it leads to",
                    fix=f"write `from: {name}, to: {far}`, the relays in that order",
                )
    hidden = graph.far_ends | set(members)
    for pair, routed in graph._routed.items():
        known = pair <= set(members)
        if not known and not (pair & graph.far_ends and pair & set(members)):
            continue
        for route, index in zip(routed.routes, routed.indices, strict=True):
            for relay in route:
                if relay in (graph.far_ends if known else hidden):
                    raise graph.error(
                        f"`{relay}` is a relay between `{routed.first}` and `{routed.second}`, and "
                        + ("a far end" if relay in graph.far_ends else "a member")
                        + f" of the anonymous group `{name}`",
                        "routes",
                        index,
                        "via",
                        expected="relays that see no more of the group than that something passes",
                        fix="put another party in its place",
                    )
    for far in sorted(graph.far_ends):
        routes = {member: graph._routed[frozenset((member, far))] for member in members}
        first = tuple(route[-1] for route in routes[members[0]].routes)
        for member, routed in routes.items():
            last = tuple(route[-1] for route in routed.routes)
            if last != first:
                raise graph.error(
                    f"`{member}` comes to `{far}` through {_listed(last)}, and `{members[0]}` through "
                    f"{_listed(first)}, where `{name}` is anonymous",
                    "routes",
                    routed.indices[-1],
                    expected="the same last relays for all members, in the same order: the far end sees them",
                    fix=f"write `{{from: {name}, to: {far}, via: [...]}}` for all members alike",
                )
