"""The party file: one institution's private half of the work, and the folder that holds a graph with its party files.

Here: the models of the file, what a party must define to match its graph, and the loading of the functions that it
names.  Not here: what those functions return; segments.py and samples.py check that, where the story goes next.
Importing a party's modules runs that institution's own code: a party file is trusted by who wrote it, and never shared.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import re
import stat
import sys
import threading
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)

from splitsec import yamlfile
from splitsec.errors import PartyFileError
from splitsec.graph import CUSTOM, Address, Graph, Name, Safeguard, load_graph
from splitsec.yamlfile import Document, FrozenDict, meant, mistake, shown

__all__ = [
    "DataFunctions",
    "DpSgd",
    "Folder",
    "Leakage",
    "Optimizer",
    "OwnCutPrivacy",
    "OwnDetectors",
    "OwnLabelPrivacy",
    "OwnPrivacy",
    "PartyFile",
    "SegmentCode",
    "WebSocket",
    "check_party",
    "load_folder",
    "load_function",
    "load_party",
]

GRAPH_FILE: Final = "graph.yaml"
PARTIES: Final = "parties"

_FUNCTION = re.compile(r"(?!.*\.py:)[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*\Z", re.ASCII)


def _function_name(text: str) -> str:
    if not _FUNCTION.match(text):
        raise mistake(
            f"`{shown(text)}` where a function is named",
            expected="MODULE:FUNCTION, e.g. `models:stem` for the function `stem` in models.py beside the party file",
            fix="write the module without `.py`, a colon, and the function's name without brackets",
        )
    return text


def _optimizer_name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9_]+", text) and not _FUNCTION.match(text):
        raise mistake(
            f"the optimizer `{shown(text)}`",
            expected="a class of torch.optim in lower case, e.g. `sgd` or `adam`, or MODULE:CLASS",
            fix=f"write `{text.lower()}`" if re.fullmatch(r"\w+", text) else "correct the name",
        )
    return text


def _proxy_url(text: str) -> str:
    from splitsec.transports.tunnel import NO_PROXY, parse_proxy  # loads the web; most parties never need it

    try:
        if text != NO_PROXY:
            parse_proxy(text)
    except ValueError as reason:  # the URL may hold a password: it is not shown
        raise mistake(
            "`wss.proxy` is no proxy that can be used",
            expected=str(reason).removeprefix("expected "),
            fix="correct it, or write `proxy: none` to go without one",
        ) from None
    return text


FunctionName = Annotated[str, AfterValidator(_function_name)]


def _early(value: Any) -> Any:
    if value is True or value is False or value == "auto":
        return value
    raise mistake(
        f"`early_gradient` is {shown(value)}", expected="`true`, `false` or `auto`", fix="choose one of the three"
    )


EarlyGradient = Annotated[bool | Literal["auto"], BeforeValidator(_early)]
Arguments = Annotated[dict[str, Any], AfterValidator(FrozenDict)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class Optimizer(_Entry):
    """How a segment's weights are updated; every key but `name` is an argument of the optimizer."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, AfterValidator(_optimizer_name)] = Field(
        description="class of `torch.optim` in lower case, e.g. `sgd`, `adam`, `adamw`; or `module:Class`; "
        "the other keys are its arguments"
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the optimizer, e.g. ``{"lr": 0.001}``."""
        return dict(self.model_extra or {})


class DpSgd(_Entry):
    """Clipping and noise on what every sample adds to a segment's weights (docs/dp-sgd.md)."""

    clip: float = Field(
        ge=1e-9, le=1e9, description="largest L2 norm of one sample's gradient, over all weights of the segment"
    )
    noise_multiplier: float = Field(
        ge=1e-6, le=1000, description="standard deviation of the noise over the sensitivity, which is twice `clip`"
    )


class SegmentCode(_Entry):
    """What builds and trains one segment at this party."""

    model: FunctionName = Field(description="`module:function` that returns the segment as an `nn.Module`")
    args: Arguments = Field(default_factory=FrozenDict, description="keyword arguments of that function")
    optimizer: Optimizer = Field(description="how the segment's weights are updated, e.g. `{name: adam, lr: 0.001}`")
    loss: FunctionName | None = Field(
        default=None,
        description="`module:function` that computes the loss, where the graph says `loss: custom`; or `module:Class`",
    )
    loss_args: Arguments = Field(
        default_factory=FrozenDict, description="keyword arguments of that function, or of making the class"
    )
    nopeek: float | None = Field(
        default=None,
        gt=0,
        description="NoPeek: this many times the distance correlation of raw input and output is added to the "
        "segment's own loss (docs/leakage.md)",
    )
    dp_sgd: DpSgd | None = Field(
        default=None, description="train the segment's weights with DP-SGD; for weights that are handed on or published"
    )


class DataFunctions(_Entry):
    """Where the party's samples come from: functions that return a dict of fields, and optionally `id`."""

    train: FunctionName = Field(description="`module:function` that returns the samples to train on")
    test: FunctionName | None = Field(
        default=None, description="`module:function` that returns the samples held out for evaluation"
    )
    predict: FunctionName | None = Field(
        default=None, description="`module:function` that returns the samples to predict"
    )
    args: Arguments = Field(default_factory=FrozenDict, description="keyword arguments of all of them")


class OwnCutPrivacy(_Entry):
    """What this party does at one cut, at least as strict as the graph's floor."""

    source: Name = Field(alias="from", description="the segment whose output the cut carries")
    target: Name = Field(alias="to", description="the segment that takes it")
    forward: Safeguard | None = Field(default=None, description="for every sample's activation")
    backward: Safeguard | None = Field(default=None, description="for every sample's gradient")


class OwnLabelPrivacy(_Entry):
    """What this party does to labels before they leave."""

    target: Name = Field(alias="to", description="the segment that computes the loss")
    epsilon: float = Field(ge=1e-5, le=40, description="epsilon of one release of one label, by randomised response")
    classes: int | None = Field(
        default=None, ge=2, le=2**20, description="how many classes; without it, what the graph says"
    )


class Leakage(_Entry):
    """How often this party measures what its activations tell about its samples, and what it tolerates."""

    every: int = Field(default=50, ge=1, description="training steps from one measurement to the next")
    limit: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="warn when the distance correlation (bias-corrected) of samples and what leaves is above this",
    )


class OwnPrivacy(_Entry):
    """What one sample may cost, and what is done to what leaves."""

    delta: float = Field(default=1e-5, gt=0, lt=1, description="the delta that every epsilon here goes with")
    epsilon: float | None = Field(
        default=None,
        gt=0,
        description="budget of one sample's inputs over everything that carries them, in all runs together",
    )
    label_epsilon: float | None = Field(
        default=None, gt=0, description="budget of one sample's label over everything that carries it, in all runs"
    )
    cuts: Annotated[tuple[OwnCutPrivacy, ...], Field(strict=False)] = Field(
        default=(), description="what this party does at its cuts, where it wants more than the graph's floor"
    )
    labels: Annotated[tuple[OwnLabelPrivacy, ...], Field(strict=False)] = Field(
        default=(), description="what this party does to labels, where it wants more than the graph's floor"
    )
    leakage: Leakage | None = Field(
        default=None, description="measure what activations tell about samples, while training"
    )


class OwnDetectors(_Entry):
    """What this party looks for in what it receives while training (docs/detectors.md); each where it applies."""

    label_agreement: bool = Field(
        default=True,
        description="stop where the gradients that come back do not heed the labels that this party holds",
    )
    decoys: bool = Field(
        default=True,
        description="try a step with false labels first, now and then (`training: {decoys: ...}` in the graph), and "
        "stop where the answer does not change",
    )
    outliers: bool = Field(
        default=True, description="stop at gradients of a size that no training makes; warn where all point one way"
    )
    loss: bool = Field(default=True, description="warn where the loss that this party computes never falls, or grows")


NO_DETECTORS: Final = OwnDetectors(label_agreement=False, decoys=False, outliers=False, loss=False)


def _all_or_none(value: object) -> object:
    """`true` and `false` in place of the keys of `detectors`: all of them, or none."""
    return dict.fromkeys(OwnDetectors.model_fields, value) if isinstance(value, bool) else value


class WebSocket(_Entry):
    """What this party needs for addresses that begin with `wss://`; paths are relative to the party file."""

    certificate: str | None = Field(
        default=None,
        min_length=1,
        description="certificate in PEM, with the chain behind it, of a party that listens at `wss://`",
    )
    key: str | None = Field(
        default=None,
        min_length=1,
        description="its private key in PEM, without a passphrase; a file that only its owner may read (mode 0600)",
    )
    ca: str | None = Field(
        default=None,
        min_length=1,
        description="certificates in PEM of those who vouch for the parties that this one dials; without it, those "
        "whom the system trusts",
    )
    proxy: Annotated[str, AfterValidator(_proxy_url)] | None = Field(
        default=None,
        min_length=1,
        repr=False,
        description="HTTP proxy on the way out, `http://HOST:PORT` or `http://USER:PASSWORD@HOST:PORT`; `none`: "
        "without one; without this key, what HTTPS_PROXY and NO_PROXY in the environment say",
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> WebSocket:
        for one, other in (("certificate", "key"), ("key", "certificate")):
            if getattr(self, one) is not None and getattr(self, other) is None:
                raise mistake(
                    f"`wss` has a `{one}`, but no `{other}`",
                    expected="both where the party listens at wss://, none where it only dials",
                    fix=f"add `{other}`, or remove `{one}`",
                )
        return self


class PartyFile(_Entry):
    """A whole party file."""

    party: Name = Field(description="the party's name in the graph; also the name of the file")
    key_file: str | None = Field(
        default=None,
        min_length=1,
        description="private key file, relative to this file; `join` needs it, `simulate` makes throw-away keys",
    )
    group_key_file: str | None = Field(
        default=None,
        min_length=1,
        description="private key file of this party's anonymous group, which all its members hold alike, relative to "
        "this file; `join` needs it, `simulate` makes a throw-away key",
    )
    segments: Annotated[dict[Name, SegmentCode], AfterValidator(FrozenDict)] = Field(
        default_factory=FrozenDict,
        description="the code of every segment that the graph places at this party or its group",
    )
    data: DataFunctions | None = Field(
        default=None, description="where the party's samples come from, if the graph needs data or labels from it"
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="threads that compute; without it, what the machine has is shared out"
    )
    early_gradient: EarlyGradient = Field(
        default="auto",
        description="whether the gradient that the party before waits for is computed and sent first, those of the "
        "weights after it; `auto`: where a backward pass takes 3 ms or more. No number changes by it",
    )
    listen: Address | None = Field(
        default=None, description="address to listen on in place of the graph's `listen`, e.g. behind a port mapping"
    )

    privacy: OwnPrivacy | None = Field(
        default=None, description="this party's privacy budget, and what it does beyond the graph's floors"
    )
    state: str | None = Field(
        default=None,
        min_length=1,
        description="folder of this party's ledger and journal, relative to this file; `../state/NAME` without it",
    )
    detectors: Annotated[OwnDetectors, BeforeValidator(_all_or_none)] = Field(
        default_factory=OwnDetectors,
        description="what to look for in what comes from other parties; `false`: nothing but NaN and infinity",
    )
    wss: WebSocket | None = Field(
        default=None, description="TLS files and proxy, where an address begins with `wss://`; see docs/websocket.md"
    )

    _document: Document | None = PrivateAttr(None)

    def model_post_init(self, context: Any) -> None:
        self._document = context if isinstance(context, Document) else None

    @property
    def file(self) -> Path | None:
        """The file that this was read from; None for one that was made in code."""
        return None if self._document is None else Path(self._document.file)

    @property
    def folder(self) -> Path:
        """The folder that modules and the key file are looked up in."""
        return Path() if self.file is None else self.file.parent

    @property
    def key_path(self) -> Path | None:
        """Where the private key file is; None where the party file names none."""
        return None if self.key_file is None else self.folder / Path(self.key_file).expanduser()

    @property
    def group_key_path(self) -> Path | None:
        """Where the private key file of the anonymous group is; None where the party file names none."""
        return None if self.group_key_file is None else self.folder / Path(self.group_key_file).expanduser()

    @property
    def state_folder(self) -> Path:
        """Where this party's ledger and journal are kept from run to run."""
        return self.folder / (Path("..", "state", self.party) if self.state is None else Path(self.state).expanduser())

    def undefended(self) -> PartyFile:
        """A copy without policies, NoPeek, DP-SGD and detectors: for ``splitsec attack``, never for ``join``."""
        bare = {name: one.model_copy(update={"nopeek": None, "dp_sgd": None}) for name, one in self.segments.items()}
        copied = self.model_copy(update={"privacy": None, "detectors": NO_DETECTORS, "segments": FrozenDict(bare)})
        copied._document = self._document
        return copied

    def transport_options(self) -> dict[str, dict[str, str]]:
        """What transports need to be told, by scheme; paths of files that are there and may be used.

        Raises ``PartyFileError`` with the line of a file that is missing, cannot be read, or is a key that others may
        read.
        """
        if self.wss is None:
            return {}
        options: dict[str, str] = {}
        for name in ("certificate", "key", "ca"):
            named = getattr(self.wss, name)
            if named is not None:
                options[name] = str(self._checked(self.folder / Path(named).expanduser(), "wss", name))
        if self.wss.proxy is not None:
            options["proxy"] = self.wss.proxy
        return {"wss": options}

    def _checked(self, file: Path, *keys: str) -> Path:
        """``file``, if it can be read, and if a `key` by nobody but its owner."""
        what = f"`{'.'.join(keys)}`"
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as reason:
            missing = isinstance(reason, FileNotFoundError)
            raise self.error(
                f"{what}: {file} is not there" if missing else f"{what}: {file} cannot be read: {reason.strerror}",
                *keys,
                expected="a file in PEM that this user may read",
                fix="correct the path, which is relative to the party file"
                if missing
                else "run as the user that may, or give this user a copy",
            ) from None
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise self.error(f"{what}: {file} is not a file", *keys, expected="a file in PEM", fix="correct the path")
        mode = stat.S_IMODE(status.st_mode)
        if keys[-1] == "key" and mode & 0o077:
            raise self.error(
                f"{what}: others may use {file} (mode {mode:04o})",
                *keys,
                expected="mode 0600: only its owner",
                fix=f"run `chmod 600 {file}`; if others could have read it, have a new certificate made for a new key",
            )
        return file

    def line_of(self, *keys: str | int) -> int | None:
        """Line of an entry in the file, e.g. ``line_of("segments", "stem", "model")``; None for one made in code."""
        return None if self._document is None else self._document.line_of(*keys)

    def error(self, seen: str, *keys: str | int, expected: str = "", fix: str = "") -> PartyFileError:
        """A ``PartyFileError`` (to be raised by the caller) about the entry at ``keys``, with its file and line."""
        return PartyFileError(seen, file=self.file, line=self.line_of(*keys), expected=expected, fix=fix)

    def function(self, spec: str, *keys: str | int) -> Callable[..., Any]:
        """The function that ``spec``, the entry at ``keys``, names; see ``load_function``."""
        try:
            return load_function(spec, self.folder)
        except PartyFileError as reason:
            if reason.file is not None:
                raise
            raise self.error(reason.seen, *keys, expected=reason.expected, fix=reason.fix) from None

    def __eq__(self, other: object) -> bool:
        """Equal values; where they came from and how the file was laid out does not count."""
        return self.model_dump() == other.model_dump() if isinstance(other, PartyFile) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # args may hold lists


@dataclass(frozen=True)
class Folder:
    """A graph and the party files beside it, as ``check`` and ``simulate`` take them."""

    path: Path
    graph: Graph
    parties: Mapping[str, PartyFile]


def load_party(path: str | Path) -> PartyFile:
    """The party file at ``path``; a ``PartyFileError`` with file and line where it is wrong in itself."""
    file = Path(path)
    party = yamlfile.validate(PartyFile, yamlfile.read(file, PartyFileError), PartyFileError)
    if party.party != file.stem:
        raise party.error(
            f"`party` is {party.party}, but the file is called {file.name}",
            "party",
            expected="a file that is called after its party",
            fix=f"rename the file to {party.party}.yaml, or write `party: {file.stem}`",
        )
    return party


def load_folder(folder: str | Path) -> Folder:
    """FOLDER/graph.yaml with every FOLDER/parties/NAME.yaml, checked against each other.

    A party that holds segments, data or labels must have a file; one that only takes part in exchanges may have one.
    Raises ``GraphError`` or ``PartyFileError``.
    """
    path = Path(folder)
    graph = load_graph(path / GRAPH_FILE)
    places = path / PARTIES
    files = sorted(places.iterdir()) if places.is_dir() else []
    found: dict[str, Path] = {}
    for file in files:
        if file.suffix == ".yml":
            raise PartyFileError(
                "the name ends in .yml", file=file, expected="NAME.yaml", fix=f"rename it to {file.stem}.yaml"
            )
        if file.suffix == ".yaml" and not file.name.startswith("."):
            found[file.stem] = file
    for name in graph.parties:
        if name not in found and _works(graph, name):
            raise _missing_file(graph, name, places)
    for name, file in found.items():
        if name not in graph.parties:
            near = meant(name, (one for one in graph.parties if one not in found))
            raise PartyFileError(
                f"a party file for `{shown(name)}`, which is not in {graph.file}",
                file=file,
                expected="one file for each party of the graph",
                fix=f"{near} Rename or remove the file"
                if near.startswith("did")
                else "remove the file, or add the party to the graph",
            )
    parties = {name: load_party(found[name]) for name in graph.parties if name in found}
    for party in parties.values():
        check_party(graph, party)
    _check_tests(graph, parties)
    return Folder(path, graph, FrozenDict(parties))


def _holds(graph: Graph, name: str) -> tuple[str, ...]:
    """The segments that the party ``name`` holds, in the order of the file."""
    return tuple(segment for segment, one in graph.segments.items() if name in graph.members(one.at))


def _data_needs(graph: Graph, name: str) -> tuple[str, ...]:
    """Why the graph needs samples of the party ``name``, in words; empty where it does not."""
    reads = [
        f"`{segment}` reads its field `{graph.segments[segment].data}`"
        for segment in _holds(graph, name)
        if graph.segments[segment].data
    ]
    brings = [
        f"its field `{one.field}` labels `{one.target}`" for one in graph.labels if name in graph.members(one.source)
    ]
    return (*reads, *brings)


def _works(graph: Graph, name: str) -> bool:
    return bool(_holds(graph, name) or _data_needs(graph, name))


def _missing_file(graph: Graph, name: str, places: Path) -> PartyFileError:
    group = next((one for one, group in graph.groups.items() if name in group.members), None)
    who = f"`{name}`, a member of the group `{group}`," if group else f"`{name}`"
    held = [f"`{segment}`" for segment in _holds(graph, name)]
    what = "the code of " + ", ".join(held) if held else "its `data`"
    return PartyFileError(
        f"{who} has no party file",
        file=places / f"{name}.yaml",
        expected=f"a file with {what}",
        fix="write it"
        + (f", or take `{name}` out of the group" if group else "")
        + f"; it begins with `party: {name}`",
    )


def check_party(graph: Graph, party: PartyFile) -> None:
    """Raise ``PartyFileError`` unless ``party`` defines what ``graph`` asks of it, and nothing else."""
    name = party.party
    if name not in graph.parties:
        fix = meant(name, graph.parties)
        raise party.error(
            f"the party `{name}` is not in the graph {graph.file or ''}".rstrip(),
            "party",
            expected="a name from its `parties`",
            fix=fix,
        )
    held = _holds(graph, name)
    for segment in party.segments:
        if segment not in held:
            _refuse_segment(graph, party, segment, held)
    for segment in held:
        if segment not in party.segments:
            place = graph.segments[segment].at
            raise party.error(
                f"the code of the segment `{segment}` is missing",
                "segments",
                expected=f"an entry for it: the graph places it at `{place}`",
                fix=f'add `{segment}: {{model: "models:{segment.replace("-", "_")}", optimizer: ...}}`',
            )
        _check_loss(graph, party, segment)
    needs = _data_needs(graph, name)
    if needs and party.data is None:
        raise party.error(
            "`data` is missing",
            expected="the functions that return the samples: " + ", ".join(needs),
            fix='add `data: {train: "data:train", test: "data:test"}`',
        )
    if party.data is not None and not needs:
        raise party.error(
            "`data` is given, but the graph needs no samples of this party",
            "data",
            expected="`data` only where a segment of the party has `data`, or `labels` come from it",
            fix="remove `data` here, or name it in the graph",
        )
    if party.group_key_file is not None and (graph.anonymous is None or name not in graph.members(graph.anonymous)):
        raise party.error(
            "`group_key_file` is given, but the graph has this party in no anonymous group",
            "group_key_file",
            expected="`group_key_file` only at the members of a group whose cuts are `anonymous: true`",
            fix="remove it here; if the key is a group's, this party should not have it",
        )
    if party.listen is not None and graph.parties[name].listen is None:
        raise party.error(
            "`listen` is given, but in the graph this party does not listen",
            "listen",
            expected="`listen` in the graph, too: the others must know that they shall dial",
            fix="remove `listen` here, or add `listen` and `address` to the party in the graph",
        )


def _refuse_segment(graph: Graph, party: PartyFile, segment: str, held: Sequence[str]) -> None:
    if segment in graph.segments:
        seen = f"the code of the segment `{segment}`, which the graph places at `{graph.segments[segment].at}`"
        fix = "remove it here, or place it at this party in the graph"
    else:
        seen = f"the code of `{segment}`, which is no segment of the graph"
        fix = meant(segment, [one for one in held if one not in party.segments] or held) or "remove it"
    expected = (
        "the segments of this party: " + ", ".join(f"`{one}`" for one in held) if held else "no segments at this party"
    )
    raise party.error(seen, "segments", segment, expected=expected, fix=fix)


def _check_loss(graph: Graph, party: PartyFile, segment: str) -> None:
    declared, code = graph.segments[segment].loss, party.segments[segment]
    if declared == CUSTOM and code.loss is None:
        raise party.error(
            f"the segment `{segment}` has no `loss`",
            "segments",
            segment,
            expected="a function: the graph says `loss: custom`",
            fix='add `loss: "losses:NAME"`',
        )
    if declared != CUSTOM and (code.loss is not None or code.loss_args):
        says = f"`loss: {declared}`" if declared else "that it computes none"
        raise party.error(
            f"the segment `{segment}` has a loss here, but the graph says {says}",
            "segments",
            segment,
            "loss" if code.loss is not None else "loss_args",
            expected="a loss in the party file only where the graph says `loss: custom`",
            fix="remove it here, or write `loss: custom` in the graph",
        )


def _check_tests(graph: Graph, parties: Mapping[str, PartyFile]) -> None:
    """Within a stream, all data parties hold test samples, or none: an evaluation needs every field of a sample."""
    for stream in range(graph.streams):
        data = [(name, parties[name].data) for name in graph.data_parties(stream)]
        having = [name for name, one in data if one is not None and one.test is not None]
        lacking = [name for name, one in data if one is not None and one.test is None]
        if having and lacking:
            raise parties[lacking[0]].error(
                f"`{lacking[0]}` has no test samples, but `{having[0]}` has",
                "data",
                expected="`test` at all parties whose samples belong together, or at none",
                fix='add `test: "data:test"`',
            )


# Functions that a party file names.
#
# The modules of a folder become a package of their own, `_splitsec_party_<hash of the folder>`, so that two folders may
# both have a models.py, and so that a folder's random.py or data.py hides nobody else's.  There, `import data` finds
# data.py: each module there runs with an `__import__` that looks beside it first.  Nothing is put on sys.path.


def load_function(spec: str, folder: str | Path) -> Callable[..., Any]:
    """The function (or class) that ``spec``, ``"module:name"``, names, in ``folder``/module.py or an installed module.

    Raises ``PartyFileError``: with the file and line of the user's own code where that failed; without a file where
    ``spec`` itself leads nowhere, for the caller to add where it was written (``PartyFile.function`` does).
    """
    module_name, _, name = _function_name_or_error(spec).partition(":")
    place = Path(folder).resolve()
    module = _load_module(module_name, place)
    found = getattr(module, name, None)
    if found is None:
        names = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
        raise PartyFileError(
            f"no function `{name}`",
            file=getattr(module, "__file__", None) or module_name,
            expected=f"a function `{name}`, which `{spec}` names",
            fix=meant(name, names) or f"define `def {name}(...)`",
        )
    if not callable(found):
        raise PartyFileError(
            f"`{name}` is {type(found).__name__}, not a function",
            file=getattr(module, "__file__", None) or module_name,
            expected=f"a function `{name}`, which `{spec}` names",
            fix=f"define `def {name}(...)`",
        )
    result: Callable[..., Any] = found
    return result


def _function_name_or_error(spec: str) -> str:
    if not _FUNCTION.match(spec):
        raise PartyFileError(
            f"`{shown(spec)}` where a function is named", expected="MODULE:FUNCTION, e.g. `models:stem`"
        )
    return spec


def _load_module(name: str, folder: Path) -> types.ModuleType:
    beside = _is_beside(name.partition(".")[0], folder)
    try:
        return importlib.import_module(f"{_package_of(folder)}.{name}" if beside else name)
    except Exception as reason:
        raise _import_failed(reason, name, folder, beside) from reason


def _import_failed(reason: Exception, name: str, folder: Path, beside: bool) -> PartyFileError:
    what = f"{type(reason).__name__}: {reason}".splitlines()[0].replace(f"{_package_of(folder)}.", "")
    if (
        not beside
        and isinstance(reason, ModuleNotFoundError)
        and reason.name is not None
        and f"{name}.".startswith(f"{reason.name}.")
    ):
        files = [one.stem for one in sorted(folder.glob("*.py"))] if folder.is_dir() else []
        return PartyFileError(
            f"there is no {name.replace('.', '/')}.py in {folder}, nor an installed module `{name}`",
            expected="a Python file beside the party file, or an installed module",
            fix=meant(name, files) or f"write {name.replace('.', '/')}.py",
        )
    own = [frame for frame in traceback.extract_tb(reason.__traceback__) if _within(frame.filename, folder)]
    file, line = (own[-1].filename, own[-1].lineno) if own else (None, None)
    if isinstance(reason, SyntaxError) and reason.filename is not None:
        file, line, what = reason.filename, reason.lineno, f"{type(reason).__name__}: {reason.msg}"
    if isinstance(reason, ModuleNotFoundError):
        fix = "install what is missing in this environment, or correct the import"
    else:
        fix = "mend the code on that line; it runs when the module is imported"
    return PartyFileError(
        f"`{name}` cannot be imported: {what}", file=file or name, line=line, expected="a module that imports", fix=fix
    )


def _within(file: str, folder: Path) -> bool:
    try:
        return Path(file).resolve().is_relative_to(folder)
    except (OSError, ValueError):
        return False


def _is_beside(name: str, folder: Path) -> bool:
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()


_packages: dict[str, Path] = {}
_lock = threading.Lock()


def _package_of(folder: Path) -> str:
    """Name of the package that stands for ``folder``, made on first use."""
    name = "_splitsec_party_" + hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    with _lock:
        if name not in _packages:
            if not _packages:
                sys.meta_path.insert(0, _Finder())
            _packages[name] = folder
            package = types.ModuleType(name)
            package.__path__ = [str(folder)]
            package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            sys.modules[name] = package
    return name


class _Finder:
    """Finds the modules below our packages, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in _packages or path is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs a party's module with an ``__import__`` that looks in the party's folder first."""

    def exec_module(self, module: types.ModuleType) -> None:
        package = module.__name__.partition(".")[0]
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import_beside(package)}
        super().exec_module(module)


def _import_beside(package: str) -> Callable[..., types.ModuleType]:
    folder = _packages[package]

    def __import__(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> types.ModuleType:
        top = name.partition(".")[0]
        if level != 0 or not _is_beside(top, folder):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        if not fromlist:
            importlib.import_module(f"{package}.{name}")
            return sys.modules[f"{package}.{top}"]
        return builtins.__import__(f"{package}.{name}", globals, locals, fromlist, 0)

    return __import__
