"""Parties that join one by one, as in a pilot: each a process of its own, with its own key file.

Two that fit train to the same weights as a simulation, also where one of them stands still for a while.  One that does
not fit is refused with the reason, at its own end and in the log of the party that refuses.  Where one ends, or is
started anew, all end with an error that names it, and keep nothing.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from splitsec.contract import digest
from splitsec.errors import PeerRefusedUs
from splitsec.graph import load_graph
from splitsec.identity import new_key, read_key
from splitsec.party import run_party
from splitsec.partyfile import load_party
from tests.conftest import Command, Shell, change, free_port, keyed, replaced, write_folder

PAIR = """\
splitsec: 1
name: pair
parties:
  clinic: {}
  server: {listen: "tcp://127.0.0.1:PORT"}
segments:
  stem: {at: clinic, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [8], dtype: float32}
labels:
  - {from: clinic, to: trunk}
training: {epochs: 20, batch_size: 7, seed: 11}
timeouts: {connect: 60, lost: 5, gone: 60}
"""

RING = """\
splitsec: 1
name: ring
parties:
  clinic-a: {}
  clinic-b: {}
  server: {listen: "tcp://127.0.0.1:PORT"}
groups:
  clinics: {members: [clinic-a, clinic-b], schedule: round_robin}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [8], dtype: float32}
labels:
  - {from: clinics, to: trunk}
training: {epochs: 1000000, batch_size: 7, seed: 11}
timeouts: {connect: 60, lost: 1, gone: 3}
"""

REFUSED = "handshake refused by the peer"

SECONDS = 15.0
"""Within which all that is due at once has happened; it takes a fraction of one on an idle machine."""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A folder with keys, to be used as it is, and what a simulation of it wrote."""
    place = tmp_path_factory.mktemp("simulated")
    shell = Shell(place)
    try:
        graph = PAIR.replace("PORT", str(free_port()))
        folder = keyed(shell, write_folder(place / "pair", graph, clinics=["clinic"]), "clinic", "server")
        end = shell.run("simulate", folder, "--out", place / "out", "--quiet")
        assert end.code == 0, end.stderr
        yield folder, place / "out"
    finally:
        shell.close()


@pytest.fixture
def pair(shell: Shell, tmp_path: Path) -> Path:
    """A folder with keys: the clinic dials, the server listens on loopback."""
    graph = PAIR.replace("PORT", str(free_port()))
    return keyed(shell, write_folder(tmp_path / "pair", graph, clinics=["clinic"]), "clinic", "server")


def join(shell: Shell, folder: Path, party: str, *more: str | Path, graph: Path | None = None) -> Command:
    """One thread each: these parties share the cores of one machine, where several would only wait for each other."""
    return shell.start("join", "--graph", graph or folder / "graph.yaml", "--party", party, *more, OMP_NUM_THREADS="1")


def same_weights(out: Path, expected: Path) -> None:
    """What the clinic and the server wrote to ``out`` is what a simulation wrote to ``expected``, to the last bit."""
    files = sorted(file.relative_to(out) for file in out.rglob("*.*"))
    assert files == [Path("clinic/stem.safetensors"), Path("server/trunk.safetensors")]
    for file in files:
        joined, simulated = load_file(out / file), load_file(expected / file)
        assert joined.keys() == simulated.keys() and len(joined) == 2
        assert all(torch.equal(joined[name], simulated[name]) for name in joined)


def test_what_was_simulated_is_what_is_piloted(shell: Shell, tmp_path: Path, simulated: tuple[Path, Path]) -> None:
    """Two parties join, with real keys; their weights are those of a simulation of the same folder, to the last bit."""
    (folder, expected), out = simulated, tmp_path / "joined"
    server = join(shell, folder, "server", "--out", out)
    clinic = join(shell, folder, str(folder / "parties" / "clinic.yaml"), "--out", out)
    for name, command in (("clinic", clinic), ("server", server)):
        end = command.end()
        assert end.code == 0, end.stderr
        assert end.stdout.startswith(f"what left {name} ")
        assert f"{name}: wrote" in end.stderr
        assert "broke" not in end.stderr
    same_weights(out, expected)


@pytest.mark.threat("T42")
def test_a_graph_that_differs_by_one_character(shell: Shell, pair: Path) -> None:
    other = pair / "other.yaml"
    other.write_text(replaced((pair / "graph.yaml").read_text(), ("seed: 11", "seed: 12")))
    server = join(shell, pair, "server", "--out", pair.parent / "out")
    clinic = join(shell, pair, "clinic", "--out", pair.parent / "out", graph=other)
    end = clinic.end()
    assert end.code == 4
    ours, theirs = (digest(load_graph(file))[:8].hex() for file in (other, pair / "graph.yaml"))
    assert f"splitsec: server: no session: {REFUSED}: the graphs differ: ours {ours}, theirs {theirs}\n" in end.stderr
    assert "expected: the same values in the graph file at every party" in end.stderr
    line = server.err.line_with("turned somebody down")
    assert line.endswith(f"handshake refused by us: the graphs differ: ours {theirs}, theirs {ours}")
    server.close()
    assert not (pair.parent / "out").exists()


@pytest.mark.threat("T21")
def test_a_party_with_another_key_at_that_address(shell: Shell, tmp_path: Path) -> None:
    """The same graph on both sides, but the registry listens where the server should be, and cannot say it is it."""
    graph = replaced(
        PAIR.replace("PORT", str(free_port())),
        ("segments:", f'  registry: {{listen: "tcp://127.0.0.1:{free_port()}"}}\nsegments:'),
        ("{from: clinic, to: trunk}", "{from: registry, to: trunk}"),
    )
    folder = keyed(shell, write_folder(tmp_path / "three", graph, clinics=["clinic"]), "clinic", "server", "registry")
    address = load_graph(folder / "graph.yaml").parties["server"].listen
    (folder / "parties" / "registry.yaml").write_text(
        f'party: registry\nkey_file: registry.key\nlisten: "{address}"\n'
        'data: {train: "data:train", args: {site: 0}}\n'
    )
    change(folder / "parties" / "clinic.yaml", (', test: "data:test"', ""))
    registry = join(shell, folder, "registry")
    clinic = join(shell, folder, "clinic")
    end = clinic.end()
    assert end.code == 4
    assert f"splitsec: server: no session: {REFUSED}: the key that we expect there is not the key that it" in end.stderr
    assert "expected: the party at that address to hold the key that the graph file gives it" in end.stderr
    line = registry.err.line_with("turned somebody down")
    assert "handshake refused by us: the hello was meant for another key than ours" in line
    registry.close()


@pytest.mark.threat("T20")
def test_a_key_that_the_graph_does_not_name(shell: Shell, pair: Path) -> None:
    """``join`` itself refuses to start with such a key (tests/transcripts), so here is who leaves that check out."""
    server = join(shell, pair, "server", "--out", pair.parent / "out")
    graph, party = load_graph(pair / "graph.yaml"), load_party(pair / "parties" / "clinic.yaml")
    new_key(pair / "stranger.key")
    with pytest.raises(PeerRefusedUs) as refused:
        run_party(graph, party, private_key=read_key(pair / "stranger.key"))
    assert refused.value.exit_code == 4
    assert str(refused.value).startswith(
        f"server: no session: {REFUSED}: its graph does not name our key\n"
        "  expected: our key to stand in the peer's graph file\n"
    )
    line = server.err.line_with("turned somebody down")
    assert line.endswith("handshake refused by us: our graph does not name its key")
    server.close()
    assert not (pair.parent / "out").exists()


def test_the_other_party_never_joins(shell: Shell, pair: Path) -> None:
    change(pair / "graph.yaml", ("connect: 60", "connect: 2"))
    end = join(shell, pair, "server").end()
    assert end.code == 4
    assert re.search(r"^splitsec: clinic: did not come up.* within 2 s$", end.stderr, re.MULTILINE)


def stands(folder: Path, party: str, how: str = "stand") -> Path:
    """Have this party stand in its third step, for as long as it lives; the others wait.  Its party file.

    ``how``: "halt" stops the whole process instead, as SIGSTOP does, until it is told to go on.
    """
    file = folder / "parties" / f"{party}.yaml"
    change(file, (f"party: {party}}}", f"party: {party}, third_step: {how}}}"))
    return file


def words(text: str) -> str:
    """What a terminal has broken into lines, in one."""
    return " ".join(text.split())


@pytest.mark.threat("T18")
@pytest.mark.parametrize("party", ["clinic-b", "server"])
def test_a_party_that_is_killed_while_it_takes_part(shell: Shell, tmp_path: Path, party: str) -> None:
    """The others say that the connection broke, try for as long as the graph says, then say who was lost, and keep
    nothing: those that dialed it, the one that it dialed, and the clinic that it talks with through the server.
    """
    graph = RING.replace("PORT", str(free_port()))
    names = ("clinic-a", "clinic-b", "server")
    folder = keyed(shell, write_folder(tmp_path / "ring", graph), *names)
    stands(folder, party)
    commands = {name: join(shell, folder, name, "--out", tmp_path / "out") for name in names}
    shell.hear("step", party, "3")
    os.kill(commands.pop(party).pid, signal.SIGKILL)
    for name, command in commands.items():
        command.err.line_with(f"{name}: the connection with {party} broke", SECONDS)
    ends = {name: command.end(3 + SECONDS) for name, command in commands.items()}
    for name, end in ends.items():
        assert end.code == 4, end.stderr
        assert "nothing is lost, trying again for 3 s" in words(end.stderr)
        assert re.search(rf"^splitsec: (?!{name})(clinic-[ab]|server): ", end.stderr, re.MULTILINE)
        assert "Traceback" not in end.stderr
    lost = [name for name, end in ends.items() if f"\nsplitsec: {party}: was lost: the peer is gone" in end.stderr]
    assert set(lost) >= (
        {"server"} if party == "clinic-b" else {"clinic-a", "clinic-b"}
    )  # who is first ends the others
    for name in lost:
        assert "no connection that lasted for 3 s" in ends[name].stderr
        assert f"look whether {party} still runs and is connected" in ends[name].stderr
    assert not (tmp_path / "out").exists()


def restarted(party: str, stderr: str) -> bool:
    """Whether it ended so."""
    assert "Traceback" not in stderr
    found = re.search(rf"^splitsec: {party}: cannot go on: .* was exchanged", stderr, re.MULTILINE)
    return found is not None and "then start all parties again" in stderr


def test_a_clinic_that_runs_twice_or_is_started_anew(shell: Shell, pair: Path) -> None:
    """While it runs, a second process with its key is turned away, and disturbs nobody.  Once it is killed, what it had
    exchanged is lost with it: both sides end with an error that says so, at once, and keep nothing.
    """
    stands(pair, "clinic")
    out = pair.parent / "out"
    server, clinic = (join(shell, pair, name, "--out", out) for name in ("server", "clinic"))
    shell.hear("step", "clinic", "3")
    end = join(shell, pair, "clinic", "--out", out).end()
    assert (end.code, "another run is writing its journal there" in end.stderr) == (2, True)  # by its own books already
    end = join(shell, pair, "clinic", "--out", out, "--state", pair.parent / "elsewhere").end()
    assert end.code == 4
    assert restarted("server", end.stderr)
    assert "broke" not in server.err.text + clinic.err.text
    os.kill(clinic.pid, signal.SIGKILL)
    anew = join(shell, pair, "clinic", "--out", out)
    server.err.line_with("server: the connection with clinic broke", SECONDS)
    ends = {"clinic": server.end(), "server": anew.end(SECONDS)}
    for other, end in ends.items():
        assert end.code == 4
        assert restarted(other, end.stderr)
    assert not out.exists()


def test_a_server_that_is_killed_and_started_anew(shell: Shell, pair: Path, simulated: tuple[Path, Path]) -> None:
    """The clinic ends, as above; the server then waits for one that begins from the first step, as it does itself."""
    file, out = stands(pair, "server"), pair.parent / "out"
    server, clinic = (join(shell, pair, name, "--out", out) for name in ("server", "clinic"))
    shell.hear("step", "server", "3")
    os.kill(server.pid, signal.SIGKILL)
    change(file, (", third_step: stand", ""))
    anew = join(shell, pair, "server", "--out", out)
    end = clinic.end()
    assert end.code == 4
    assert "clinic: the connection with server broke" in end.stderr
    assert restarted("server", end.stderr)
    assert not out.exists()
    for command in (join(shell, pair, "clinic", "--out", out), anew):
        end = command.end()
        assert end.code == 0, end.stderr
    same_weights(out, simulated[1])


@pytest.mark.parametrize("party", ["clinic", "server"])
def test_a_party_that_stands_still_for_a_while(
    shell: Shell, pair: Path, simulated: tuple[Path, Path], party: str
) -> None:
    """For longer than a connection may be silent: then both find it broken, make another, and train to the same weights
    as without.
    """
    change(pair / "graph.yaml", ("lost: 5", "lost: 2"))
    stands(pair, party, "halt")
    out = pair.parent / "out"
    commands = {name: join(shell, pair, name, "--out", out) for name in ("server", "clinic")}
    shell.hear("step", party, "3")
    (other,) = (name for name in commands if name != party)
    line = commands[other].err.line_with(f"{other}: the connection with {party} broke")
    assert "nothing was heard for 2 s" in line
    os.kill(commands[party].pid, signal.SIGCONT)
    for name, command in commands.items():
        end = command.end()
        assert end.code == 0, end.stderr
        assert f"{name}: connected with {party if name == other else other} again" in end.stderr
    same_weights(out, simulated[1])


def test_ctrl_c_at_one_party(shell: Shell, pair: Path) -> None:
    """It ends with 130; the other one says who left."""
    change(pair / "graph.yaml", ("epochs: 20", "epochs: 1000000"))
    server = join(shell, pair, "server")
    clinic = join(shell, pair, "clinic")
    shell.hear("step", "clinic", "3")
    os.kill(clinic.pid, signal.SIGINT)
    end = clinic.end()
    assert end.code == 130
    assert end.seconds < SECONDS
    assert "Traceback" not in end.stderr
    end = server.end()
    assert end.code == 4
    assert end.seconds < SECONDS
    assert "\nsplitsec: clinic: was stopped by its operator\n" in end.stderr


HIDDEN = """\
splitsec: 1
name: hidden
parties:
  clinic-a: {}
  clinic-b: {}
  relay-1: {listen: "tcp://127.0.0.1:FIRST"}
  relay-2: {listen: "tcp://127.0.0.1:SECOND"}
  server: {listen: "tcp://127.0.0.1:SERVER"}
groups:
  clinics: {members: [clinic-a, clinic-b], schedule: round_robin}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [8], dtype: float32, anonymous: true}
labels:
  - {from: clinics, to: trunk}
routes:
  - {from: clinics, to: server, via: [relay-1, relay-2]}
  - {from: clinics, to: clinics, via: [relay-1]}
training: {epochs: 2, batch_size: 8, seed: 11}
timeouts: {connect: 60, lost: 5, gone: 60}
"""


def test_an_anonymous_group_with_the_key_of_its_members(shell: Shell, tmp_path: Path) -> None:
    """What each member needs besides its own key, what is said where it is missing or another, and a run."""
    graph = replaced(HIDDEN, *((place, str(free_port())) for place in ("FIRST", "SECOND", "SERVER")))
    names = ("clinic-a", "clinic-b", "relay-1", "relay-2", "server")
    folder = keyed(shell, write_folder(tmp_path / "hidden", graph), *names)
    parties = folder / "parties"
    end = join(shell, folder, "clinic-a").end()
    assert end.code == 2
    assert "graph.yaml:10: the anonymous group 'clinics' has no key" in end.stderr
    assert "splitsec keys new clinics --group" in end.stderr
    made = shell.run("keys", "new", "clinics", "--group", "--out", parties)
    key = re.search(r'key: "x25519:[^"]+"', made.stdout)
    assert key is not None
    change(folder / "graph.yaml", ("schedule: round_robin}", f"schedule: round_robin, {key[0]}}}"))
    end = join(shell, folder, "clinic-a").end()
    assert (end.code, "clinic-a.yaml: `group_key_file` is missing" in re.sub(r":\d+:", ":", end.stderr)) == (2, True)
    for clinic in ("clinic-a", "clinic-b"):
        with (parties / f"{clinic}.yaml").open("a") as file:
            file.write("group_key_file: clinics.key\n")
    other = parties / "other.key"
    new_key(other)
    change(parties / "clinic-a.yaml", ("group_key_file: clinics.key", "group_key_file: other.key"))
    end = join(shell, folder, "clinic-a").end()
    assert end.code == 2
    assert f"graph.yaml:10: the key of the group 'clinics' in the graph is not the one in {other}" in end.stderr
    assert f"splitsec keys show --group {other}" in end.stderr
    change(parties / "clinic-a.yaml", ("group_key_file: other.key", "group_key_file: clinics.key"))
    relays = [
        shell.start("relay", folder / "graph.yaml", "--key", parties / f"{name}.key") for name in ("relay-1", "relay-2")
    ]
    commands = {
        name: join(shell, folder, name, "--out", tmp_path / "out") for name in ("clinic-a", "clinic-b", "server")
    }
    for name, command in commands.items():
        end = command.end()
        assert end.code == 0, f"{name}: {end.stderr}"
        assert name != "server" or "clinic-" not in end.stdout + end.stderr
    first, second = (load_file(tmp_path / "out" / name / "stem.safetensors") for name in ("clinic-a", "clinic-b"))
    assert len(first) == 2 and all(torch.equal(first[name], second[name]) for name in first)
    for command in relays:
        os.kill(command.pid, signal.SIGTERM)
        assert command.end().code == 0
