"""docs/threat-model.md is true: its rows name tests and these tests carry their names; figures stand where a row says.

Here: the check, both ways, and what it finds in spoilt pages; the guard as the one door, throw-away keys of a
simulation, and rows that nothing else shows.  Tests are found as pytest finds them, but in the syntax tree: nothing is
imported.  Not here: what attacks recover (tests/attacks), the other pages (tests/docs/test_docs.py).
"""

from __future__ import annotations

import ast
import base64
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from torch import nn

from splitsec import errors, simulation
from splitsec.attacks import catalogue
from splitsec.contract import digest
from splitsec.graph import Graph, load_graph, parse_graph
from splitsec.guard import Guard
from splitsec.identity import new_key, parse_public, public_of, read_key
from splitsec.messages import Message, encode
from splitsec.partyfile import load_party
from splitsec.plan import make_plan
from splitsec.samples import seed_of
from splitsec.segments import build_segments
from splitsec.simulation import simulate
from splitsec.transports.handshake import Initiator, Responder
from splitsec.transports.iothread import Received

TREE: Final = Path(__file__).parents[2]
PAGE: Final = TREE / "docs" / "threat-model.md"

ADVERSARIES: Final = {
    "network": ("Network observer", "Active network attacker", "Observer of circuits"),
    "stranger": ("Stranger",),
    "relay": ("Relay", "User of a relay"),
    "client": ("Another client",),
    "server": ("Server (whoever holds the later segments)", "Far end of an anonymous group"),
    "colluders": ("Colluders",),
    "thief of a key file": ("Thief of a key file", "Thief of a group's key"),
    "curious operator": ("Curious operator",),
}
"""Who must have rows, and the headings under which they have them."""

HEAD: Final = "| | can try to | what stops it | test | measured |"


# --- the rows


@dataclass(frozen=True)
class Row:
    """One row.  ``tests``: node ids."""

    name: str
    adversary: str
    stops: str
    tests: tuple[str, ...]
    measured: str


def rows_of(page: str) -> tuple[list[Row], list[str]]:
    """The rows of the page, and what is wrong with how they are written."""
    found: list[Row] = []
    wrong: list[str] = []
    adversary, last = "", ""
    for number, line in enumerate(page.splitlines(), 1):
        if line.startswith("#"):
            adversary = line.removeprefix("### ") if line.startswith("### ") else ""
        elif line.startswith("| ---") and last.startswith("| | can") and last != HEAD:
            wrong.append(f"line {number - 1}: the columns are not {HEAD}")
        elif re.match(r"\|\s*\**T\d", line):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if len(cells) != 5 or not re.fullmatch(r"T[1-9]\d*", cells[0]) or not all(cells[:3]) or not cells[4]:
                wrong.append(f"line {number}: {cells[0]} is not a name and four cells")
            else:
                found.append(Row(cells[0], adversary, cells[2], tuple(node_ids(cells[3])), cells[4]))
        last = line
    return found, wrong


def node_ids(cell: str) -> Iterator[str]:
    """Every test that ``cell`` names; one that begins with ``::`` is in the file named before it."""
    file = ""
    for path, name in re.findall(r"`((?:tests/[\w/.-]+\.py)?)::([\w:]+)`", cell):
        file = path or file
        yield f"{file}::{name}"


# --- the tests


@dataclass
class Collected:
    """Rows by node id, of all tests; those that never run or are meant to fail; marks that mean nothing."""

    rows: dict[str, tuple[str, ...]] = field(default_factory=dict)
    never: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


def collect(tree: Path) -> Collected:
    """Every test below ``tree/tests``."""
    found = Collected()
    for file in sorted((tree / "tests").rglob("test_*.py")):
        where = file.relative_to(tree).as_posix()
        module = ast.parse(file.read_text(encoding="utf-8"))
        understood: set[ast.AST] = set()
        _collect(module.body, f"{where}::", found, understood)
        found.wrong += [
            f"{where}:{node.lineno}: a mark that is not directly above one test, with the names of rows"
            for node in ast.walk(module)
            if isinstance(node, ast.Attribute) and _is_mark(node, "threat") and node not in understood
        ]
    return found


def _is_mark(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == f"pytest.mark.{name}"


def _collect(nodes: list[ast.stmt], prefix: str, found: Collected, understood: set[ast.AST]) -> None:
    for node in nodes:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            _collect(node.body, f"{prefix}{node.name}::", found, understood)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            shows: list[str] = []
            for mark in node.decorator_list:
                call = mark if isinstance(mark, ast.Call) else None
                if call and _is_mark(call.func, "threat") and call.args and not call.keywords:
                    names = [one.value for one in call.args if isinstance(one, ast.Constant)]
                    if len(names) == len(call.args) and all(isinstance(name, str) for name in names):
                        shows += map(str, names)
                        understood.add(call.func)
                if any(_is_mark(call.func if call else mark, name) for name in ("skip", "xfail")):
                    found.never.add(prefix + node.name)
            found.rows[prefix + node.name] = tuple(shows)


# --- the check


def findings(page: Path, tests: Collected) -> list[str]:
    """All that is wrong with the rows of ``page`` and the marks of ``tests``."""
    text = page.read_text(encoding="utf-8")
    rows, wrong = rows_of(text)
    wrong += tests.wrong
    names = [row.name for row in rows]
    wrong += [f"{name} stands twice" for name in sorted({name for name in names if names.count(name) > 1})]
    for row in rows:
        if row.adversary not in sum(ADVERSARIES.values(), ()):
            wrong.append(f"{row.name} has no adversary: it stands under {row.adversary!r}")
        if not row.tests and not row.stops.startswith(("**Nothing**", "Not by")):
            wrong.append(f"{row.name} names no test, and does not say that nothing stops it")
        for test in row.tests:
            if test not in tests.rows:
                wrong.append(f"{row.name} names {test}, which is not there")
            elif row.name not in tests.rows[test]:
                wrong.append(f"{row.name} names {test}, which is not marked so")
            elif test in tests.never:
                wrong.append(f"{row.name} names {test}, which never passes")
        wrong += [f"{row.name}: {what}" for what in unfounded(row.measured, page)]
    for heading in [heading for headings in ADVERSARIES.values() for heading in headings]:
        if not any(row.adversary == heading for row in rows):
            wrong.append(f"nobody stands under {heading!r}")
    for test, shown in tests.rows.items():
        for name in shown:
            if name not in names:
                wrong.append(f"{test} is marked {name}, which is no row")
            elif not any(row.name == name and test in row.tests for row in rows):
                wrong.append(f"{test} is marked {name}, which does not name it")
    return wrong


NUMBER: Final = r"\d[\d,]*(?:\.\d+)?"


def unfounded(measured: str, page: Path) -> list[str]:
    """What is wrong with a cell of figures: none, and so ``-``, or each of them on a page that the cell links to."""
    if measured == "-":
        return []
    links = re.findall(r"\]\(([\w.-]+\.md)(?:#[\w-]*)?\)", measured)
    bodies = [(page.parent / link).read_text(encoding="utf-8") for link in links if (page.parent / link).is_file()]
    figures = re.findall(NUMBER, re.sub(r"\[[^\]]*\]\([^)]*\)", "", measured))
    if not bodies or not figures:
        return ["what was measured has no figure, or no link to the page where it stands"]
    written = {number for body in bodies for number in re.findall(NUMBER, body)}
    return [f"{figure} stands on none of {', '.join(links)}" for figure in figures if figure not in written]


def test_every_row_names_its_tests_and_every_mark_its_row() -> None:
    found = findings(PAGE, collect(TREE))
    assert found == [], "\n".join(found)


def test_all_rows_and_marks_are_seen() -> None:
    """What finds nothing wrong may have found nothing."""
    text = PAGE.read_text(encoding="utf-8")
    assert len(rows_of(text)[0]) == len(set(re.findall(r"^\| (T\d+) \|", text, re.MULTILINE))) > 100
    tests = collect(TREE)
    assert len(tests.rows) > 1000
    own = f"tests/docs/{Path(__file__).name}::test_first_weights_follow_from_the_contract_and_the_architecture"
    assert tests.rows[own] == ("T118",)


def test_every_attack_has_a_row() -> None:
    text = PAGE.read_text(encoding="utf-8")
    tried = "".join(row for row in text.splitlines() if row.startswith("| T"))
    assert [name for name in catalogue.names() if f"(`{name}`)" not in tried] == []


def written(adversary: str, *rows: str) -> str:
    return "\n".join([f"### {adversary}", "", HEAD, "| --- | --- | --- | --- | --- |", *rows, ""])


GOOD_ROWS: Final = {
    heading: f"| T{number} | steal | a lock | `tests/test_a.py::test_one` | - |"
    for number, heading in enumerate((heading for headings in ADVERSARIES.values() for heading in headings), 1)
}
GOOD_MARKS: Final = ", ".join(f'"T{number}"' for number in range(1, len(GOOD_ROWS) + 1))

SPOILT_ROWS: Final = {
    "| T1 | steal | a lock | | - |": "T1 names no test, and does not say that nothing stops it",
    "| T1 | steal | a lock, or **nothing** | `test_one` | - |": "T1 names no test",
    "| T1 | steal | a lock | `tests/test_a.py::test_two` | - |": "test_two, which is not there",
    "| T1 | steal | a lock | `tests/test_b.py::test_one` | - |": "test_one, which is not there",
    "| T1 | steal | a lock | `tests/test_a.py::helper` | - |": "helper, which is not there",
    "| T1 | steal | a lock | `tests/test_a.py::test_bare` | - |": "test_bare, which is not marked so",
    "| T1 | steal | **Nothing** | | - |": "test_one is marked T1, which does not name it",
    "| T1 | steal | a lock | `tests/test_a.py::test_one`, `::test_off` | - |": "test_off, which never passes",
    "| T2 | steal | a lock | `tests/test_a.py::test_one` | - |": "T2 stands twice",
    "| T1a | steal | a lock | `tests/test_a.py::test_one` | - |": "T1a is not a name and four cells",
    "| T1 | steal | a lock | `tests/test_a.py::test_one` |": "T1 is not a name and four cells",
    "| T1 | steal | a lock | `tests/test_a.py::test_one` | |": "T1 is not a name and four cells",
    "| T1 | steal | a lock | `tests/test_a.py::test_one` | 3.5 |": "no figure, or no link",
    "| T1 | steal | a lock | `tests/test_a.py::test_one` | [b](b.md) |": "no figure, or no link",
    "| T1 | steal | a lock | `tests/test_a.py::test_one` | 3.5 ([b](b.md)) |": "T1: 3.5 stands on none of b.md",
    "": "nobody stands under 'Network observer'",
}
SPOILT_TESTS: Final = {
    '@pytest.mark.threat("T99")\ndef test_two(): ...': "test_two is marked T99, which is no row",
    '@pytest.mark.threat("T2")\ndef test_two(): ...': "test_two is marked T2, which does not name it",
    '@pytest.mark.threat("T2")\ndef helper_two(): ...': "a mark that is not directly above one test",
    "@pytest.mark.threat()\ndef test_two(): ...": "a mark that is not directly above one test",
    "@pytest.mark.threat(ROW)\ndef test_two(): ...": "a mark that is not directly above one test",
    '@pytest.mark.threat(row="T2")\ndef test_two(): ...': "a mark that is not directly above one test",
    'pytestmark = pytest.mark.threat("T2")': "a mark that is not directly above one test",
    'class TestTwo:\n    @pytest.mark.threat("T2")\n    def test(self): ...': "TestTwo::test is marked T2, which",
}


def small(tree: Path, *, row: str | None = None, more: str = "") -> list[str]:
    """What the check finds in a small tree, with another first row, or more tests."""
    (tree / "docs").mkdir(parents=True)
    (tree / "tests").mkdir()
    rows = list(GOOD_ROWS.items())
    if row is not None:
        rows[0] = (rows[0][0], row)
    (tree / "docs" / "a.md").write_text("\n".join(written(heading, text) for heading, text in rows))
    (tree / "docs" / "b.md").write_text("3.51 and 13.5 and 1,250\n")
    off = '@pytest.mark.threat("T1")' if row and "test_off" in row else ""
    (tree / "tests" / "test_a.py").write_text(
        f"import pytest\n\n@pytest.mark.threat({GOOD_MARKS})\n@pytest.mark.slow\ndef test_one(): ...\n\n"
        f'def test_bare(): ...\n\ndef helper(): ...\n\n@pytest.mark.skip(reason="off")\n{off}\ndef test_off(): ...\n'
        f"\n{more}\n"
    )
    return findings(tree / "docs" / "a.md", collect(tree))


def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path) -> None:
    assert small(tmp_path / "a") == []
    figures = "1,250 of 3.51, see [5 b](b.md#c)"
    assert small(tmp_path / "b", row=GOOD_ROWS["Network observer"].replace("| - |", f"| {figures} |")) == []


@pytest.mark.parametrize("row", SPOILT_ROWS)
def test_a_spoilt_row_is_found(row: str, tmp_path: Path) -> None:
    found = small(tmp_path, row=row)
    assert any(SPOILT_ROWS[row] in one for one in found), found


@pytest.mark.parametrize("more", SPOILT_TESTS)
def test_a_spoilt_mark_is_found(more: str, tmp_path: Path) -> None:
    (found,) = small(tmp_path, more=more)
    assert SPOILT_TESTS[more] in found


def test_a_row_without_an_adversary_and_another_head_are_found(tmp_path: Path) -> None:
    page = written("Somebody", "| T1 | steal | **Nothing** | | - |").replace("| measured", "| figure")
    (tmp_path / "a.md").write_text(page)
    found = findings(tmp_path / "a.md", Collected())
    assert f"line 3: the columns are not {HEAD}" in found
    assert "T1 has no adversary: it stands under 'Somebody'" in found


# --- what the door promises


@pytest.fixture(scope="module")
def graph() -> Graph:
    """That of the worked example of docs/protocol.md."""
    text = (TREE / "docs" / "protocol.md").read_text(encoding="utf-8")
    return parse_graph(re.findall(r"^```yaml\n(.*?)^```$", text[text.index("## Worked example") :], re.M | re.S)[0])


class Recorder:
    """A channel that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, int]] = []

    def send(self, peer: bytes, lane: int, header: bytes, body: Any = (), *, wait: bool = True) -> None:
        self.sent.append((peer, lane))

    def receive(self, timeout: float | None = None) -> None:
        return None

    def open_peer(self, peer: bytes) -> None: ...
    def leave_peer(self, peer: bytes) -> None: ...
    def close_peer(self, peer: bytes, reason: int, why: str) -> None: ...
    def close(self, reason: int = 0, linger: float = 0) -> None: ...


def door(graph: Graph, party: str) -> tuple[Guard, Recorder]:
    channel = Recorder()
    keys = {name: parse_public(one.key or "") for name, one in graph.parties.items() if name != party}
    return Guard(make_plan(graph, party), keys, channel, connect_timeout=1.0), channel


GOOD: Final = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
BAD: Final = {
    "another shape": {"": torch.ones(2, 3)},
    "another dtype": {"": torch.ones(2, 2, dtype=torch.float64)},
    "more samples than a micro-batch has": {"": torch.ones(3, 2)},
    "NaN": {"": torch.tensor([[1.0, float("nan")]])},
    "infinity": {"": torch.tensor([[1.0, float("inf")]])},
    "two tensors": {"": GOOD, "more": GOOD},
}


@pytest.mark.threat("T38")
@pytest.mark.parametrize("name", BAD)
def test_the_door_lets_nothing_out_that_the_graph_does_not_declare(graph: Graph, name: str) -> None:
    guard, channel = door(graph, "clinic-a")
    with pytest.raises(errors.EgressRefused):
        guard.release(("server", 16), Message("activation", (0, 0), tensors=BAD[name]))
    assert channel.sent == []
    guard.release(("server", 16), Message("activation", (0, 0), tensors={"": GOOD}))
    assert channel.sent == [(parse_public(graph.parties["server"].key or ""), 16)]


@pytest.mark.threat("T34")
def test_the_door_lets_nothing_out_twice_nor_where_there_is_no_edge(graph: Graph) -> None:
    guard, channel = door(graph, "clinic-a")
    message = Message("activation", (0, 0), tensors={"": GOOD})
    guard.release(("server", 16), message)
    for lane in (("server", 16), ("server", 17), ("server", 4711), ("registry", 16)):
        with pytest.raises(errors.EgressRefused):
            guard.release(lane, message)
    with pytest.raises(errors.EgressRefused):
        guard.release(("server", 16), Message("weights", (1, 0), tensors={"": GOOD}))
    assert len(channel.sent) == 1


@pytest.mark.threat("T40", "T123")
@pytest.mark.parametrize("name", BAD)
def test_the_door_lets_no_gradient_in_that_the_graph_does_not_declare(graph: Graph, name: str) -> None:
    guard, _ = door(graph, "clinic-a")
    server = parse_public(graph.parties["server"].key or "")

    def arrived(key: tuple[int, int], tensors: dict[str, torch.Tensor]) -> Received:
        header, body = encode(Message("gradient", key, tensors=tensors))
        return Received(server, 17, header, memoryview(bytearray(b"".join(body))))

    for step in range(2):
        guard.release(("server", 16), Message("activation", (step, 0), tensors={"": GOOD}))
    guard.admit(arrived((0, 0), {"": GOOD}))
    for key, tensors in (((1, 0), BAD[name]), ((0, 0), {"": GOOD}), ((2, 0), {"": GOOD})):
        with pytest.raises(errors.PeerMisbehaved):
            guard.admit(arrived(key, tensors))
    assert torch.equal(guard.take(("server", 17)).tensors[""], GOOD)
    assert guard.peek(("server", 17)) is None


@pytest.mark.threat("T59")
def test_throw_away_keys_are_nowhere_to_be_seen(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither command lines, environments nor files of a simulation hold a private key, in any of three spellings."""
    made: list[bytes] = []

    class Watched:
        @staticmethod
        def generate() -> X25519PrivateKey:
            key = X25519PrivateKey.generate()
            made.append(key.private_bytes_raw())
            return key

    monkeypatch.setattr(simulation, "X25519PrivateKey", Watched)
    monkeypatch.setenv("PYTHONPATH", str(TREE))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found: list[str] = []
    looked: set[str] = set()

    def look(party: str, event: dict[str, Any]) -> None:
        if event["event"] != "connected":
            return
        looked.add(party)
        places = [Path("/proc") / pid / name for pid in children() for name in ("cmdline", "environ")]
        for place in (*places, *(file for file in tmp_path.rglob("*") if file.is_file())):
            text = place.read_bytes()
            for key in made:
                if key in text or key.hex().encode() in text or base64.b64encode(key) in text:
                    found.append(str(place))

    simulate(folder, epochs=1, watch=look)
    assert looked == {"clinic-a", "clinic-b", "server"} and len(made) == 3
    assert found == []


def children(pid: str | None = None) -> list[str]:
    """Process ids of all that came of ``pid``, or of us."""
    pid = pid or str(os.getpid())
    found = (Path("/proc") / pid / "task" / pid / "children").read_text().split()
    return [*found, *(one for child in found for one in children(child))]


# --- what nothing else shows


@pytest.mark.threat("T118")
def test_first_weights_follow_from_the_contract_and_the_architecture(folder: Path) -> None:
    """A server that guesses a client's architecture has the weights that the client begins with, to the last bit."""
    graph = load_graph(folder / "graph.yaml")
    begun = [
        build_segments(graph, load_party(folder / "parties" / f"{clinic}.yaml"))["stem"].weights()
        for clinic in ("clinic-a", "clinic-b")
    ]
    torch.manual_seed(seed_of("weights", graph.training.seed, "stem"))
    guessed = nn.Linear(6, 8).state_dict()
    for weights in begun:
        assert set(weights) == set(guessed)
        assert all(torch.equal(weights[name], guessed[name]) for name in guessed)


@pytest.mark.threat("T56")
def test_whoever_holds_a_key_file_is_that_party(graph: Graph, tmp_path: Path) -> None:
    line = new_key(tmp_path / "clinic-a.key")
    (tmp_path / "copy.key").write_bytes((tmp_path / "clinic-a.key").read_bytes())
    (tmp_path / "copy.key").chmod(0o600)
    server, known = os.urandom(32), parse_public(line)
    thief = Initiator(read_key(tmp_path / "copy.key"), public_of(server), digest(graph), os.urandom, True)
    responder = Responder(server, digest(graph), {known}, os.urandom, True)
    thief.start()
    (hello,) = thief.frames_to_send()
    responder.receive(hello)
    met = responder.accept()
    (accept,) = responder.frames_to_send()
    assert met.remote_static == known
    assert thief.receive(accept).send_key == met.receive_key
