"""Every case of protocol abuse on a small folder: who refuses it and in what words; and that a case which a party no
longer checks is found out.

The runs are those of the command: real processes, real sockets.  What a victim's check is worth is seen by taking it
out, in the victim's process alone: a party's own code may change anything there, and that of the folders ``BROKEN``
does.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from splitsec.attacks.abuse import ABUSER, CASES, LATER, Peace, ProtocolAbuse, abuser_of
from splitsec.attacks.arena import Ground
from splitsec.attacks.outcome import Case, Outcome
from splitsec.books import JOURNAL_FILE
from splitsec.journal import Journal
from splitsec.nest import Nest
from tests.conftest import change, write_folder

GRADIENT: Final = "clinic-a: server: gradient of stem -> trunk: "
ACTIVATION: Final = "server: clinic-a: activation of stem -> trunk: "
UNASKED: Final = "an answer to what we have not sent"
WENT_ON: Final = "was made again; the run went on to weights equal to the last bit"

HELD: Final = {
    "more epochs: never done": "server: is connected, but has not said that it is done",
    "more epochs: another graph": "server: no session: handshake refused by the peer: the graphs differ",
    "more epochs: a gradient after the last step": UNASKED,
    "more samples": "server: says that stream",
    "another shape": GRADIENT + "shape [8, 8, 1]",
    "another dtype": GRADIENT + "dtype float16",
    "more rows": "clinic-a: server: a message of 512 bytes on lane 17, which takes at most 256",
    "fewer rows": "clinic-a: server: sent 7 samples in gradient of stem -> trunk",
    "an undeclared cut": "clinic-a: server: a message on lane 24, which is not declared",
    "the wrong direction": "clinic-a: server: a message on lane 16, which is not declared",
    "another kind": GRADIENT + "a 'weights' message",
    "words beside the gradient": GRADIENT + "facts beside the tensor",
    "bytes that mean nothing": "clinic-a: server: sent an unreadable message for stem -> trunk",
    "an empty answer": "clinic-a: server: sent no gradient of stem -> trunk",
    "a gradient once more": GRADIENT + "message (0, 0) after (0, 0)",
    "an old gradient": GRADIENT + "message (0, 0) after (3, 0)",
    "an old gradient under a new name": "the very gradients that it sent in step",
    "a gradient of a later step": GRADIENT + "message (1000, 0), " + UNASKED,
    "the next gradient, too": GRADIENT + "message (1, 0), " + UNASKED,
    "gradients of many steps": GRADIENT + "message (1, 0), " + UNASKED,
    "another micro-batch": GRADIENT + "message (0, 1024), " + UNASKED,
    "a redo that nobody asked for": "for step, micro-batch (0, 1)",
    "not a number": GRADIENT + "NaN or infinite values",
    "infinity": GRADIENT + "NaN or infinite values",
    "huge values at once": "clinic-a: server sends back a gradient over stem -> trunk of norm 2.26e+31",
    "large values later": "clinic-a: server sends back a gradient over stem -> trunk of norm",
    "another party's gradient": "clinic-b: server: gradient of stem -> trunk: message (0, 0), " + UNASKED,
    "weights": "clinic-a: server: a message on lane 20, which is not declared",
    "a stall": "clinic-a: server: is connected, but has sent nothing that the step needs",
    "a relay that alters what it passes on": WENT_ON,
    "a relay that drops what it passes on": WENT_ON,
    "a relay that repeats what it passes on": WENT_ON,
    "client: not a number": ACTIVATION + "NaN or infinite values",
    "client: more rows": "server: clinic-a: a message of 512 bytes on lane 16, which takes at most 256",
    "client: another shape": ACTIVATION + "shape [8, 8, 1]",
    "client: nothing": ACTIVATION + "0 tensors",
    "client: a later step": "server: clinic-a: sent activation of stem -> trunk for step, micro-batch (1000, 0)",
    "client: the wrong direction": "server: clinic-a: a message on lane 17, which is not declared",
    "client: a third attempt": "server: clinic-a: sent activation of stem -> trunk for step, micro-batch (0, 2)",
    "client: an earlier step again": ACTIVATION + "message (0, 1) after (2, 0)",
    "client: classes that there are not": "server: clinic-a: sent the label 1048576 for 'trunk'",
    "client: more samples": "clinic-a: says that stream",
    "client: a stall": "server: clinic-a: is connected, but has sent nothing that the step needs",
    "client: weights before its turn": "clinic-b: clinic-a: handed weights of 'stem' on out of turn",
    "client: weights that are not numbers": "clinic-b: clinic-a: weights of stem: NaN or infinite values",
    "client: weights of another shape": "clinic-b: clinic-a: handed on weights of 'stem' that do not fit",
}
"""What the operator reads."""

NOT_HELD: Final = {
    "large values at once": "are not those of a run in peace",
}
"""What gets through, or is not said by its name; docs/threat-model.md says so, too."""

ELSEWHERE: Final = {"swapped micro-batches"}
"""Cases that do not apply to this graph."""


def small(folder: Path, *changes: tuple[str, tuple[str, str]]) -> Path:
    """Two clinics that take turns of ten steps, with an optimizer that has something to hand on, and a server."""
    write_folder(folder)
    change(folder / "parties" / "data.py", ("samples(site, 24)", "samples(site, 80)"))
    for clinic in ("clinic-a", "clinic-b"):
        change(folder / "parties" / f"{clinic}.yaml", ("lr: 0.1", "lr: 0.1, momentum: 0.9"))
    for file, one in changes:
        change(folder / file, one)
    return folder


def abuse(folder: Path, nest: Nest, cases: Sequence[str] | None = None) -> Outcome:
    with Ground(folder) as ground:
        return ProtocolAbuse(cases, nest).run(ground)


@pytest.fixture(scope="module")
def nest() -> Iterator[Nest]:
    with Nest([ABUSER]) as nest:
        yield nest


@pytest.fixture(scope="module")
def outcome(nest: Nest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return abuse(small(tmp_path_factory.mktemp("abuse") / "small"), nest)


@pytest.fixture(scope="module")
def found(outcome: Outcome) -> dict[str, Case]:
    return {case.name: case for case in outcome.cases}


def test_every_case_that_applies_is_tried(outcome: Outcome) -> None:
    assert [case.name for case in outcome.cases] == [case.name for case in CASES if case.name not in ELSEWHERE]
    assert {case.name for case in CASES} == HELD.keys() | NOT_HELD.keys() | ELSEWHERE
    assert outcome.verdict == "not all held"
    assert outcome.figures == {"cases": len(HELD) + len(NOT_HELD), "held": len(HELD)}
    assert all(name in outcome.sentence for name in NOT_HELD)


@pytest.mark.threat("T38", "T40", "T41", "T42", "T65", "T119", "T122", "T123", "T131", "T132")
@pytest.mark.parametrize("name", HELD)
def test_it_is_refused_and_the_operator_reads_why(name: str, found: dict[str, Case]) -> None:
    """Nothing leaves beyond a run in peace, and nobody's weights are others: else the judge says that, and not this."""
    assert found[name].held, found[name].seen
    assert HELD[name] in found[name].seen


@pytest.mark.threat("T119")
@pytest.mark.parametrize("name", NOT_HELD)
def test_what_gets_through_is_said_to_get_through(name: str, found: dict[str, Case]) -> None:
    assert not found[name].held
    assert NOT_HELD[name] in found[name].seen


def test_micro_batches_may_not_be_swapped(nest: Nest, tmp_path: Path) -> None:
    folder = small(tmp_path / "small", ("graph.yaml", ("batch_size: 8", "batch_size: 8, micro_batches: 2")))
    (case,) = abuse(folder, nest, ["swapped micro-batches"]).cases
    assert case.held, case.seen
    assert "clinic-a: server: " in case.seen


def test_without_a_cut_between_parties_there_is_nobody_to_abuse(nest: Nest, tmp_path: Path) -> None:
    listens = 'listen: "tcp://0.0.0.0:7400", address: "tcp://server.example.org:7400"'
    folder = small(
        tmp_path / "small",
        ("graph.yaml", ("trunk: {at: server", "trunk: {at: clinics")),
        ("graph.yaml", (f"  server: {{{listens}}}\n", "")),
        ("graph.yaml", ("  clinic-a: {}", f"  clinic-a: {{{listens}}}")),
    )
    (folder / "parties" / "server.yaml").unlink()
    for clinic in ("clinic-a", "clinic-b"):
        trunk = 'segments:\n  trunk: {model: "models:trunk", args: {party: x}, optimizer: {name: sgd, lr: 0.1}}'
        change(folder / "parties" / f"{clinic}.yaml", ("segments:", trunk))
    outcome = abuse(folder, nest, ["another shape"])
    assert outcome.verdict == "does not apply"
    assert outcome.cases == ()


# --- a check that is gone

WITHOUT: Final = """

def _without(module, name, check, instead):
    import importlib, inspect, textwrap
    module = importlib.import_module(module)
    owner = module
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    source = textwrap.dedent(inspect.getsource(getattr(owner, last)))
    assert source.count(check) == 1, (name, check)
    made = dict()
    source = "from __future__ import annotations\\n" + source.replace(check, instead)
    exec(compile(source, "<without>", "exec"), vars(module), made)
    setattr(owner, last, made[last])


import sys

if sys.argv[0] == "splitsec.process":  # the command itself calls this code, too, to see whether it works
    _without({module!r}, {name!r}, {check!r}, {instead!r})
"""
"""A line of a function in a victim's process is another one."""

CLIENT, SERVER = "data.py", "models.py"
"""Whose code takes it out: only clinics read their data, and only what is at all parties can be at the server."""

BROKEN: Final = {
    "finite": (
        *(CLIENT, "splitsec.guard", "_complaint"),
        *('return None if all(map(finite, tensors.values())) else "NaN or infinite values"', "return None"),
        ["not a number", "infinity"],
    ),
    "dtype": (
        *(CLIENT, "splitsec.guard", "_complaint"),
        *("if NAMES.get(tensor.dtype) != lane.dtype:", "if False:"),
        ["another dtype"],
    ),
    "shape": (
        *(CLIENT, "splitsec.guard", "_complaint"),
        *("if len(shape) != len(lane.shape) or any(", "if False and any("),
        ["another shape"],
    ),
    "kind": (
        *(CLIENT, "splitsec.guard", "_misplaced"),
        *("if message.kind != lane.kind:", "if False:"),
        ["another kind"],
    ),
    "facts": (
        *(CLIENT, "splitsec.guard", "_complaint"),
        *('if message.facts and lane.kind not in ("control", "order", "weights"):', "if False:"),
        ["words beside the gradient"],
    ),
    "asked": (
        *(CLIENT, "splitsec.guard", "Guard._admit"),
        *("if asked is None or message.key > asked:", "if False:"),
        ["more epochs: a gradient after the last step"],
    ),
    "rows": (
        *(CLIENT, "splitsec.engine", "_StepRun._came"),
        *("if len(tensor) != micro.rows:", "if False:"),
        ["fewer rows"],
    ),
    "empty": (
        *(CLIENT, "splitsec.engine", "_StepRun._take_back"),
        *("if gradient is None and self.update is not None and _has_gradient(edge):", "if False:"),
        ["an empty answer"],
    ),
    "counts": (
        *(CLIENT, "splitsec.agreement", "Gossip._learn_counts"),
        *("elif self._counts[stream] != counts:", "elif False:"),
        ["more samples"],
    ),
    "weights": (
        *(CLIENT, "splitsec.party", "Party._hand_on"),
        *("if message.key != (place,):", "if False:"),
        ["client: weights before its turn"],
    ),
}
"""Check to where it is, what stands in its place, and the cases that it is for."""


@pytest.mark.threat("T40", "T123")
@pytest.mark.parametrize("check", BROKEN)
def test_a_case_is_not_held_once_its_check_is_gone(check: str, nest: Nest, tmp_path: Path) -> None:
    where, module, name, line, instead, cases = BROKEN[check]
    folder = small(tmp_path / "small")
    file = folder / "parties" / where
    file.write_text(file.read_text() + WITHOUT.format(module=module, name=name, check=line, instead=instead))
    outcome = abuse(folder, nest, cases)
    for case in outcome.cases:
        assert not case.held or HELD[case.name] not in case.seen, case.seen
    assert [case.name for case in outcome.cases] == cases
    if check not in TWICE:
        assert not any(case.held for case in outcome.cases), [case.seen for case in outcome.cases]


TWICE: Final = {"weights", "counts", "kind"}
"""Checks behind which another one stands."""


@pytest.fixture(scope="module")
def unwatched(nest: Nest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """With the clinics' detectors off."""
    folder = small(tmp_path_factory.mktemp("unwatched") / "small")
    for clinic in ("clinic-a", "clinic-b"):
        file = folder / "parties" / f"{clinic}.yaml"
        file.write_text(file.read_text() + "detectors: false\n")
    return {case.name: case for case in abuse(folder, nest, WATCHED).cases}


WATCHED: Final = ["huge values at once", "large values later", "an old gradient under a new name"]
"""What the detectors see, and the protocol does not."""


@pytest.mark.threat("T119")
@pytest.mark.parametrize("name", WATCHED)
def test_a_case_for_the_detectors_is_not_held_without_them(name: str, unwatched: dict[str, Case]) -> None:
    assert not unwatched[name].held, unwatched[name].seen


# --- the judge


@pytest.fixture(scope="module")
def peace(nest: Nest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peace]:
    with Ground(small(tmp_path_factory.mktemp("peace") / "small")) as ground:
        yield Peace.on(ground, "protocol-abuse", nest)


def test_a_run_in_peace_is_its_own_measure(peace: Peace) -> None:
    honest = ["clinic-a", "clinic-b", "server"]
    assert peace.exact
    assert peace.leaves_more(peace.fought, honest) is None
    assert peace.weights_moved(peace.fought, honest) is None
    assert len(peace.steps["activation", "stem -> trunk"]) == 2 * 10 + 2 * 1
    assert peace.weights == 2


MORE: Final = {
    "an undeclared cut": (dict(kind="activation", cut="stem -> elsewhere", step=1), "which the graph does not declare"),
    "another party": (dict(to="clinic-b"), "which the graph does not declare"),
    "a step twice": (dict(step=1), "for step 1 twice"),
    "a step that there is not": (dict(step=1000), "for step 1000, which no run in peace has"),
    "other shapes": (dict(step=15, shapes=[[8, 9]]), "as [[8, 9]] ['float32']"),
    "more rows": (dict(step=15, shapes=[[9, 8]]), "as [[9, 8]] ['float32']"),
    "another dtype": (dict(step=15, dtypes=["float64"]), "as [[8, 8]] ['float64']"),
    "weights once more": (dict(to="clinic-b", kind="weights", cut="stem", step=None), "weights left 3 times"),
}
"""What a journal has besides, and what is said of it."""


@pytest.mark.parametrize("name", MORE)
def test_what_leaves_besides_is_seen(name: str, peace: Peace, tmp_path: Path) -> None:
    """One more entry in a clinic's journal."""
    values, said = MORE[name]
    place = tmp_path / "place"
    shutil.copytree(peace.fought.place, place)
    entry = {
        **dict(to="server", kind="activation", cut="stem -> trunk", step=1, micro_batch=0, shapes=[[8, 8]]),
        **dict(dtypes=["float32"], body=[b"x"], records=8, privacy=None),
        **values,
    }
    with Journal(place / "state" / "clinic-a" / JOURNAL_FILE, party="clinic-a", graph_digest="", version="") as journal:
        journal.append(**entry)  # type: ignore[arg-type]
    fought = type(peace.fought)(**{**vars(peace.fought), "place": place})
    assert said in (peace.leaves_more(fought, ["clinic-a", "clinic-b"]) or "")


def test_weights_that_moved_by_a_bit_are_seen(peace: Peace, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(peace.fought.place, place)
    file = place / "out" / "clinic-a" / "stem.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    fought = type(peace.fought)(**{**vars(peace.fought), "place": place})
    assert peace.weights_moved(fought, ["clinic-b", "server"]) is None
    said = peace.weights_moved(fought, ["clinic-a"])
    assert said == "the weights of stem that clinic-a wrote are not those of a run in peace"


def test_who_abuses_is_at_the_first_cut_between_two_parties(peace: Peace) -> None:
    assert abuser_of(peace.graph, "server") == "server"
    assert abuser_of(peace.graph, "client") == "clinic-a"
    assert LATER > 20  # the steps after which detectors are settled
