"""Every mistake in a graph file that has a message of its own, as the person at the keyboard sees it.

A mistake is the small folder (``tests/conftest.py``) with one passage replaced; beneath stands what ``check`` and
``simulate`` both print, to the letter: where, what was found, what was expected, what to do.  Exit code 2, and nothing
is started or written.  The rules themselves, each from several sides, are tested in ``tests/splitsec/test_graph.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Shell, change

ONE_KEY = 'key: "x25519:hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="'


@dataclass(frozen=True)
class Mistake:
    """``spoil`` does it to a folder; ``said`` goes to standard error; ``models``: it takes the modules to notice."""

    said: str
    spoil: Callable[[Path], None]
    models: bool = False


def written(*changes: tuple[str, str]) -> Callable[[Path], None]:
    return lambda folder: change(folder / "graph.yaml", *changes)


MISTAKES = {
    "an unknown key": Mistake(
        spoil=written(("data: x}", "data: x, colour: blue}")),
        said="""\
splitsec: small/graph.yaml:10: unknown key `colour` in `segments.stem`
  expected: one of `at`, `data`, `loss`, `loss_weight`, `join`
  to do: use one of `at`, `data`, `loss`, `loss_weight`, `join` (or remove the line)
""",
    ),
    "an unknown party": Mistake(
        spoil=written(("stem: {at: clinics", "stem: {at: clinic-c")),
        said="""\
splitsec: small/graph.yaml:10: unknown party or group `clinic-c`
  expected: a name from `parties` or `groups`
  to do: did you mean `clinic-b` or `clinic-a` or `clinics`?
""",
    ),
    "an unknown party in a group": Mistake(
        spoil=written(("members: [clinic-a, clinic-b]", "members: [clinic-a, clinic-d]")),
        said="""\
splitsec: small/graph.yaml:8: unknown party `clinic-d` in the group `clinics`
  expected: a name from `parties`
  to do: did you mean `clinic-b` or `clinic-a`?
""",
    ),
    "an unknown segment": Mistake(
        spoil=written(("{from: stem, to: trunk, shape", "{from: stem, to: trunck, shape")),
        said="""\
splitsec: small/graph.yaml:13: unknown segment `trunck`
  expected: a name from `segments`
  to do: did you mean `trunk`?
""",
    ),
    "a cycle among segments": Mistake(
        spoil=written(("labels:\n", "  - {from: trunk, to: stem, shape: [3], dtype: float32}\nlabels:\n")),
        said="""\
splitsec: small/graph.yaml:14: the segments form a cycle: stem -> trunk -> stem
  expected: cuts that lead from the data to the loss and never back
  to do: remove one of these cuts, or split a segment in two, each with its own name
""",
    ),
    "a segment that no edge reaches": Mistake(
        spoil=written(("stem: {at: clinics, data: x}", "stem: {at: clinics}")),
        said="""\
splitsec: small/graph.yaml:10: no edge reaches the segment `stem`
  expected: a cut that ends there, or `data`, the field of the samples that it reads
  to do: add `data: x` to `stem`, or `{from: ..., to: stem, ...}` under `cuts`
""",
    ),
    "a cut of another shape than its segment makes": Mistake(
        spoil=written(("shape: [8]", "shape: [9]")),
        models=True,
        said="""\
splitsec: small/graph.yaml:13: the cut stem -> trunk declares shape [9], float32
  expected: what segment 'stem' at 'clinic-a' really makes of 2 samples: shape [2, 8] with the batch, float32
  to do: write `shape: [8], dtype: float32` there, or change the module
""",
    ),
    "two parties with one key": Mistake(
        spoil=written(("clinic-a: {}", f"clinic-a: {{{ONE_KEY}}}"), ("clinic-b: {}", f"clinic-b: {{{ONE_KEY}}}")),
        said="""\
splitsec: small/graph.yaml:5: `clinic-b` has the same key as `clinic-a`
  expected: a key of its own for every party
  to do: run `splitsec keys new clinic-b` at that institution and paste the line it prints
""",
    ),
    "a listening address that nobody can dial": Mistake(
        spoil=written((', address: "tcp://server.example.org:7400"', "")),
        said="""\
splitsec: small/graph.yaml:6: `server` listens on tcp://0.0.0.0:7400, where nobody can dial it
  expected: a host that others can reach
  to do: add `address: "tcp://HOST:7400"` with the host name that others use
""",
    ),
    "a member of a group without a party file": Mistake(
        spoil=lambda folder: (folder / "parties" / "clinic-b.yaml").unlink(),
        said="""\
splitsec: small/parties/clinic-b.yaml: `clinic-b`, a member of the group `clinics`, has no party file
  expected: a file with the code of `stem`
  to do: write it, or take `clinic-b` out of the group; it begins with `party: clinic-b`
""",
    ),
    "labels needed where no edge brings them": Mistake(
        spoil=written(("labels:\n  - {from: clinics, to: trunk}\n", "")),
        said="""\
splitsec: small/graph.yaml:11: the segment `trunk` computes a loss, but no edge brings it labels
  expected: a labels edge, also where the labels are at the same party
  to do: add `{from: server, to: trunk}` under `labels`, or another `from` that holds them
""",
    ),
    "a route through somebody unknown": Mistake(
        spoil=written(("labels:\n", "routes:\n  - {from: clinics, to: server, via: [relay-1]}\nlabels:\n")),
        said="""\
splitsec: small/graph.yaml:15: the relay `relay-1` is unknown
  expected: a name from `parties`
  to do: use one of `clinic-a`, `clinic-b`, `server`
""",
    ),
    "an anonymous group without a route": Mistake(
        spoil=written(("shape: [8]", "anonymous: true, shape: [8]")),
        said="""\
splitsec: small/graph.yaml:13: `clinic-a` has no route to `server`, but the group `clinics` is anonymous there
  expected: a route from every member: on a link of its own, each would be known by its address
  to do: add `{from: clinics, to: server, via: [...]}` under `routes`
""",
    ),
    "a file that is not YAML": Mistake(
        spoil=written(("groups:\n", "groups: {\n")),
        said="""\
splitsec: small/graph.yaml:9: not YAML: expected ',' or '}', but got '<scalar>', while parsing a flow mapping
  expected: YAML
  to do: mend the line, or the one before it; brackets and quotes must close
""",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_anything_happens(name: str, shell: Shell, folder: Path) -> None:
    mistake = MISTAKES[name]
    mistake.spoil(folder)
    before = sorted(folder.parent.rglob("*"))
    models = [] if mistake.models else ["--no-models"]
    started = [
        shell.start("check", "small", *models, "--svg", "small.svg"),
        shell.start("simulate", "small", "--out", "out", "--json"),
    ]
    for command in started:
        end = command.end()
        assert end.stderr == mistake.said
        assert end.stdout == ""
        assert end.code == 2
    after = [path for path in folder.parent.rglob("*") if path.name != "__pycache__" and path.suffix != ".pyc"]
    assert sorted(after) == before, "something was written"


def test_join_tells_the_same(shell: Shell, folder: Path) -> None:
    mistake = MISTAKES["a cycle among segments"]
    mistake.spoil(folder)
    end = shell.run("join", "--graph", "small/graph.yaml", "--party", "server", "--out", "out")
    assert (end.code, end.stdout, end.stderr) == (2, "", mistake.said)
    assert not (folder.parent / "out").exists()


def test_nothing_is_wrong(shell: Shell, folder: Path) -> None:
    """The folder as it stands passes, so that each message above comes of its own mistake."""
    end = shell.run("check", "small", "--no-models")
    assert (end.code, end.stderr) == (0, "")
    assert end.stdout.startswith("small: 3 parties, 2 segments, 1 cut, 2 epochs of batches of 8\n")
