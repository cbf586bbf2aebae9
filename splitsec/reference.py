"""The reference of the graph file and the party file, written from the models that read them.

Here: ``markdown()``, which is what docs/graph-file.md holds.  A test compares the two; in the repository,
``python -m splitsec.reference`` writes the file again.  Not here: the models, and the descriptions of their keys
(graph.py, partyfile.py).
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from splitsec import contract, graph, partyfile

__all__ = ["markdown"]

_ENTRIES: Final[tuple[tuple[type[BaseModel], str], ...]] = (
    (graph.Party, "A party"),
    (graph.Group, "A group"),
    (graph.Segment, "A segment"),
    (graph.Cut, "A cut"),
    (graph.CutPrivacy, "`privacy` of a cut"),
    (graph.Safeguard, "A safeguard"),
    (graph.Labels, "A labels edge"),
    (graph.LabelPrivacy, "`privacy` of labels"),
    (graph.Exchange, "An exchange"),
    (graph.Route, "A route"),
    (graph.Circuits, "`circuits`"),
    (graph.Training, "`training`"),
    (graph.Timeouts, "`timeouts`"),
    (graph.Privacy, "`privacy` of the graph"),
    (partyfile.SegmentCode, "A segment's code"),
    (partyfile.Optimizer, "An optimizer"),
    (partyfile.DpSgd, "`dp_sgd`"),
    (partyfile.DataFunctions, "`data`"),
    (partyfile.OwnPrivacy, "`privacy` of a party"),
    (partyfile.OwnCutPrivacy, "A party's own cut"),
    (partyfile.OwnLabelPrivacy, "A party's own labels"),
    (partyfile.Leakage, "`leakage`"),
    (partyfile.OwnDetectors, "`detectors`"),
    (partyfile.WebSocket, "`wss`"),
)

EXAMPLE_GRAPH: Final = """\
splitsec: 1
name: vanilla
parties:
  clinic-a: {key: "x25519:hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="}
  clinic-b: {key: "x25519:3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08="}
  server:
    key: "x25519:5Yw0cK/JPVYwbQjFQ6U3ASU2LXRwxvA0q1cPcW5VNBo="
    listen: "tcp://0.0.0.0:7400"
    address: "tcp://server.example.org:7400"
groups:
  clinics: {members: [clinic-a, clinic-b], schedule: round_robin}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [32, 7, 7], dtype: float32}
labels:
  - {from: clinics, to: trunk, field: y, shape: [], dtype: int64}
training: {epochs: 5, batch_size: 64, micro_batches: 4, seed: 7}
"""

EXAMPLE_PARTY: Final = """\
party: clinic-a
key_file: clinic-a.key
segments:
  stem:
    model: "models:stem"
    args: {channels: 32}
    optimizer: {name: adam, lr: 0.001}
data: {train: "data:train", test: "data:test", args: {site: 0}}
threads: 2
"""

_HEAD: Final = """\
<!-- Written by `python -m splitsec.reference` from the models that read these files; change those, not this. -->

# The graph file and the party file

`splitsec check FOLDER` reads FOLDER/graph.yaml and FOLDER/parties/NAME.yaml, and says of every mistake the file, the
line, what was found, what was expected and what to do. An unknown key is a mistake, and so is a key that stands there
twice.

Both are YAML 1.2: `no` is a name like any other, `1e-3` is a number. Anchors, aliases and tags are refused, and so
are files of more than 1 MiB.

* A *name* is 1 to 40 of `a` to `z`, `0` to `9`, `-` and `_`, and begins with a letter or digit.
* A *field name* is 1 to 40 letters, digits and `_`, and does not begin with a digit. `id` is taken: it holds the
  sample ids.
* An *address* is `tcp://HOST:PORT` (an IPv6 host in brackets), `ipc:///PATH`, `wss://HOST:PORT/PATH` (with the extra
  `wss`), `memory://NAME` inside one process, or has the scheme of an installed transport (entry point group
  `splitsec.transports`).
* A *shape* is a list of sizes without the batch dimension, at most 8; `[]` is a single number.

# The graph file

Shared by all parties, and the contract between them: every handshake is bound to its digest, so that two parties
whose graph files differ in one value cannot talk. It holds no code, no paths and no secrets.

"""

_RULES: Final = """\
## Rules

Besides what the tables say:

* Cuts form no cycle. Every segment has a cut that ends there or `data`, and a cut that begins there or a `loss`.
* Every segment with a `loss` has exactly one labels edge, also where the labels are at the same party; no other has
  one.
* No two parties have one key, or one address. A party with a wildcard `listen` (`0.0.0.0`, `[::]`, `*`) has an
  `address`.
* Of two parties that a cut, labels edge or exchange joins, and of two neighbours in a route, at least one listens. If
  both do, the one that stands first in `parties` dials.
* Neighbours in the ring of a `round_robin` group that holds segments talk end to end, and so does, for each stream,
  the first party that holds data or labels with every other one. Where neither of such two listens, a party that is
  linked with both forwards what it cannot read: their circuit has one relay.
* Two parties with a route have no link: all that they say to each other goes through the relays. A route joins parties
  that talk to each other; with a group at an end, those of its members that do. Within one group, the member that
  stands first in `parties` builds the circuit. A pair has routes in one direction only. No party is in a route twice,
  nor relay and end of one; a relay is any party, also one that trains.
* A party is in one group at most. All groups have one size and one schedule: member k of each works with member k of
  the others, as stream k.
* Inputs that are joined by `concat` agree in dtype and in all sizes but the first; by `sum` or `mean`, in dtype and
  shape.
* Either all cuts from a segment name an `output` or none does. No two cuts have the same ends and output.
* No party, and no group, has nothing to do.

A group is *anonymous* if `anonymous: true` stands at a cut between one of its segments and a party outside. Then:

* All cuts that leave or reach it are anonymous. It is the only group, `round_robin`, and has two members at least;
  `when_spent` is `end`.
* All samples and labels are at its members.
* Every member has a route to each party outside with a cut or labels edge to the group: to each *far end*. The routes
  begin at the group. Neither far ends nor members are relays there.
* All members reach each other, to hand weights on in an order that only they know: over links, or through relays that
  are no far ends.
* No exchange joins a member and a far end.
* Only an anonymous group has a `key` or another `pseudonym` than `turn`.

"""

_PARTY_HEAD: Final = """\
# The party file

Private to one institution. It is called after its party, `parties/clinic-a.yaml`, and holds what nobody else needs to
know. A party that holds segments, data or labels needs one; one that only takes part in exchanges needs one to `join`
with a key.

"""

_FUNCTIONS: Final = """\
## Functions

`module:function` names a function in `module.py` beside the party file or, where there is none, in an installed
module. Modules beside the party file see each other (`import data`), and nothing else sees them: two folders may both
have a `models.py`, and a `random.py` of yours hides nobody else's.

* A model function is called with `args` and returns an `nn.Module`.
* A loss function is called as `loss(output, labels, **loss_args)` and returns the mean over the samples. A class is
  made with `loss_args` first, and what is made is called as `loss(output, labels)`.
* A data function is called with `args` and returns a dict of fields, tensors or arrays whose first dimensions are
  equal; `id`, where it is there, is a list or one-dimensional tensor of whole numbers or text that tells the samples
  apart.

A party file has an entry under `segments` for each segment that the graph places at the party or its group, and for
no other; `data` if the graph reads data or labels from it, and only then; a `loss` for each segment with `loss:
custom`, and for no other. Of the parties whose samples belong together, all have `test` or none has.
"""


def markdown() -> str:
    """The whole of docs/graph-file.md."""
    parts = [_HEAD, "```yaml\n", EXAMPLE_GRAPH, "```\n\n", *_table(graph.Graph)]
    for model, title in _ENTRIES:
        if model.__module__ == graph.__name__:
            parts += [f"## {title}\n\n{_sentence(model)}\n\n", *_table(model)]
    parts += [_RULES, "## Canonical form and digest\n\n", _canonical(), "\n\n"]
    parts += [_PARTY_HEAD, "```yaml\n", EXAMPLE_PARTY, "```\n\n", *_table(partyfile.PartyFile)]
    for model, title in _ENTRIES:
        if model.__module__ == partyfile.__name__:
            parts += [f"## {title}\n\n{_sentence(model)}\n\n", *_table(model)]
    return "".join((*parts, _FUNCTIONS))


def _sentence(model: type[BaseModel]) -> str:
    return inspect.getdoc(model) or ""


def _canonical() -> str:
    """The rules of contract.py, which its own first lines spell."""
    text = inspect.getdoc(contract) or ""
    return text[text.index("The canonical bytes are") :]


def _table(model: type[BaseModel]) -> Iterator[str]:
    yield "| key | value | default | meaning |\n| --- | --- | --- | --- |\n"
    hints = typing.get_type_hints(model, include_extras=True)
    for name, field in model.model_fields.items():
        cells = (
            f"`{field.alias or name}`",
            _value(hints[name], field),
            _default(field),
            _upper(field.description or ""),
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    yield "\n"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or isinstance(value, BaseModel) or value == {}:
        return ""
    if isinstance(value, tuple):
        return "`[]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


_WORDS: Final[tuple[tuple[Any, str], ...]] = (
    (graph.Name, "name"),
    (graph.FieldName, "field name"),
    (graph.DataField, "field name"),
    (graph.Address, "address"),
    (graph.Shape, "shape"),
    (graph.OpenShape, "shape"),
    (partyfile.FunctionName, "`module:function`"),
    (partyfile.Arguments, "mapping"),
    (partyfile.EarlyGradient, "`true`, `false` or `auto`"),
    (bool, "`true` or `false`"),
    (int, "whole number"),
    (float, "float"),
    (str, "text"),
)


def _value(hint: Any, field: FieldInfo) -> str:
    words = _kind(hint)
    for one in field.metadata:
        if isinstance(one, annotated_types.Ge):
            words += f" from {one.ge}"
        if isinstance(one, annotated_types.Gt):
            words += f" above {one.gt}"
    return words


def _kind(hint: Any) -> str:
    for known, words in _WORDS:
        if hint == known:
            return words
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        title = next(title for model, title in _ENTRIES if model is hint)
        return f"[{title[:1].lower() + title[1:]}](#{_anchor(title)})"
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _kind(inside[0])
    if origin in (types.UnionType, typing.Union):
        return _kind(next(one for one in inside if one is not type(None)))
    if origin is typing.Literal:
        return ", ".join(f"`{one}`" for one in inside)
    if origin is tuple:
        return f"list of {_kind(inside[0])}"
    if origin is dict:
        return f"{_kind(inside[1])} by name"
    raise AssertionError(f"no words for {hint}")


def _anchor(title: str) -> str:
    """What a link to a heading is called where Markdown is shown."""
    return "".join(one for one in title.lower().replace(" ", "-") if one.isalnum() or one in "-_")


def main() -> int:
    """Write docs/graph-file.md of the repository that this module is in."""
    file = Path(__file__).resolve().parent.parent / "docs" / "graph-file.md"
    if not file.parent.is_dir():
        print(f"{file.parent} is not there: run this in the repository", file=sys.stderr)
        return 2
    file.write_text(markdown(), encoding="utf-8")
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
