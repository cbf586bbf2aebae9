"""Relays as processes: how they start and end, what they are not, and trainings through them while they are killed.

Real processes and real sockets throughout.  What a relay can read, and what passes it, is tested below
(``tests/transports``, ``tests/hostile``).
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitsec import simulate
from splitsec.errors import PartyFailed, PeerLost
from splitsec.identity import new_key
from splitsec.simulation import RELAY_DEATHS
from tests.conftest import Command, Shell, change, ended, free_port, keyed, replaced, write_folder

SECONDS = 15.0
"""Within which a relay ends; it takes a fraction of one on an idle machine."""

IDLE_MIB = 60
"""Resident, of a relay that nobody is connected with; 45 here."""

ROUTED = """\
splitsec: 1
name: routed
parties:
  clinic-a: {}
  clinic-b: {}
  server: {listen: "tcp://127.0.0.1:SERVER"}
  relay-1: {listen: "tcp://127.0.0.1:FIRST"}
  relay-2: {listen: "tcp://127.0.0.1:SECOND"}
groups:
  clinics: {members: [clinic-a, clinic-b], schedule: round_robin}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [8], dtype: float32}
labels:
  - {from: clinics, to: trunk}
training: {epochs: 40, batch_size: 7, seed: 11}
timeouts: {connect: 60, lost: 5, gone: 60}
routes:
  - {from: clinics, to: server, via: [relay-1, relay-2]}
  - {from: clinic-a, to: clinic-b, via: [relay-1]}
"""

PARTIES = ("clinic-a", "clinic-b", "server", "relay-1", "relay-2")


def with_ports(graph: str) -> str:
    for place in ("SERVER", "FIRST", "SECOND"):
        graph = replaced(graph, (place, str(free_port())))
    return graph


@pytest.fixture
def routed(tmp_path: Path) -> Path:
    """A folder without keys, as ``simulate`` takes it: two clinics, a server, two relays that have no party file."""
    return write_folder(tmp_path / "routed", with_ports(ROUTED))


@pytest.fixture
def keys(shell: Shell, routed: Path) -> Path:
    """The same with keys."""
    return keyed(shell, routed, *PARTIES)


def relay(shell: Shell, folder: Path, name: str, *more: str | Path) -> Command:
    key = folder / "parties" / f"{name}.key"
    return shell.start("relay", folder / "graph.yaml", "--key", key, *more)


def address_of(folder: Path, name: str) -> tuple[str, int]:
    found = re.search(rf'^  {name}: .*listen: "tcp://(.+):([0-9]+)"', (folder / "graph.yaml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1], int(found[2])


# --- one relay


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_relay_listens_until_it_is_told_to_stop(shell: Shell, keys: Path, number: signal.Signals) -> None:
    command = relay(shell, keys, "relay-1")
    line = command.out.line_with("listens at")
    host, port = address_of(keys, "relay-1")
    assert line == f"relay-1: listens at tcp://{host}:{port}, relays for clinic-a, clinic-b, relay-2; Ctrl-C ends it"
    with socket.create_connection((host, port), SECONDS):  # a stranger who says nothing does not keep it
        os.kill(command.pid, number)
        end = command.end()
    assert (end.code, end.stderr) == (0, "")
    assert end.seconds < SECONDS
    assert end.stdout.splitlines()[0] == line
    assert end.stdout.splitlines()[1].startswith("relay-1: stopped")
    assert len(end.stdout.splitlines()) == 2


def test_what_a_relay_says_as_json(shell: Shell, keys: Path) -> None:
    """Also at another address than the graph's, and with its name, which the key would have told."""
    port = free_port()
    command = relay(shell, keys, "relay-2", "--json", "--as", "relay-2", "--listen", f"tcp://127.0.0.1:{port}")
    said = json.loads(command.out.line_with("relays"))
    assert said == {
        "party": "relay-2",
        "event": "relays",
        "listens": f"tcp://127.0.0.1:{port}",
        "neighbours": ["server", "relay-1"],
    }
    os.kill(command.pid, signal.SIGTERM)
    end = command.end()
    assert end.code == 0, end.stderr
    last = json.loads(end.stdout.splitlines()[-1])
    assert (last["party"], last["event"]) == ("relay-2", "stopped")


def memory(pid: int) -> dict[str, int]:
    """What the process holds, in MiB: now (VmRSS), and at most so far (VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.MULTILINE))
    return {name: int(kilobytes) // 1024 for name, kilobytes in found.items()}


def libraries(pid: int) -> str:
    """Everything that the process has mapped: of torch and numpy no import leaves nothing."""
    return Path(f"/proc/{pid}/maps").read_text()


def test_a_relay_is_small(shell: Shell, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = relay(shell, keys, "relay-1")
    command.out.line_with("listens at")
    taken, mapped = memory(command.pid), libraries(command.pid)
    with capsys.disabled():
        print(f"\nan idle relay: {taken}")
    assert taken["VmRSS"] <= taken["VmHWM"] < IDLE_MIB
    assert "cryptography" in mapped  # so that the test can fail
    assert not re.findall(r"/(?:torch|numpy)/", mapped)
    os.kill(command.pid, signal.SIGTERM)
    assert command.end().code == 0


def refused(shell: Shell, folder: Path, *options: str | Path) -> str:
    """What ``splitsec relay`` says where it does not start."""
    end = shell.run("relay", folder / "graph.yaml", *options)
    assert (end.code, end.stdout) == (2, "")
    assert end.stderr.startswith("splitsec: ")
    assert "\n  expected: " in end.stderr and "\n  to do: " in end.stderr
    return end.stderr


@pytest.mark.threat("T74")
def test_a_key_that_is_no_relays(shell: Shell, keys: Path) -> None:
    """Nobody's, another's than --as says, that of a party which trains, none at all, or one that is not there."""
    parties = keys / "parties"
    new_key(parties / "stranger.key")
    assert "graph.yaml:3: no party has this key" in (said := refused(shell, keys, "--key", parties / "stranger.key"))
    assert "splitsec keys show" in said
    said = refused(shell, keys, "--key", parties / "relay-1.key", "--as", "relay-2")
    assert "graph.yaml:8: the key is that of 'relay-1', and not of 'relay-2'" in said
    said = refused(shell, keys, "--key", parties / "relay-1.key", "--as", "nobody")
    assert "no party 'nobody'" in said and "'relay-1'" in said
    said = refused(shell, keys, "--key", parties / "server.key")
    assert "graph.yaml:6: 'server' trains" in said and "splitsec join --party server" in said
    assert "no key" in refused(shell, keys)
    assert "there is no such file" in refused(shell, keys, "--key", parties / "nobody.key")


def test_a_party_that_no_route_goes_through(shell: Shell, routed: Path) -> None:
    """The graph itself refuses a party that nothing needs; one that only exchanges tensors has something to do."""
    change(
        routed / "graph.yaml",
        ("  relay-1:", f'  registry: {{listen: "tcp://127.0.0.1:{free_port()}"}}\n  relay-1:'),
        ("routes:", "exchanges:\n  - {name: count, from: registry, to: server, shape: [1], dtype: float32}\nroutes:"),
    )
    folder = keyed(shell, routed, *PARTIES, "registry")
    said = refused(shell, folder, "--key", folder / "parties" / "registry.key")
    assert "graph.yaml:7: 'registry' has nothing to relay: no route goes through it" in said
    assert "relay-1, relay-2" in said


def test_an_address_that_is_taken(shell: Shell, keys: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        said = refused(shell, keys, "--key", keys / "parties" / "relay-1.key", "--listen", address)
    assert f"relay-1 cannot listen at {address}" in said
    assert "--listen" in said


def test_a_graph_without_keys(shell: Shell, routed: Path) -> None:
    new_key(routed / "parties" / "relay-1.key")
    assert "has no key" in refused(shell, routed, "--key", routed / "parties" / "relay-1.key")


def test_a_party_file_of_a_relay(shell: Shell, keys: Path) -> None:
    """It may have one, which says where it listens, and where its key is."""
    port = free_port()
    file = keys / "parties" / "relay-1.yaml"
    file.write_text(f'party: relay-1\nkey_file: relay-1.key\nlisten: "tcp://127.0.0.1:{port}"\n')
    command = shell.start("relay", keys / "graph.yaml", "--party", file)
    assert f"listens at tcp://127.0.0.1:{port}," in command.out.line_with("listens at")
    os.kill(command.pid, signal.SIGTERM)
    assert command.end().code == 0


# --- trainings through relays


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a simulation of ROUTED writes where nothing happens to it."""
    place = tmp_path_factory.mktemp("undisturbed")
    shell = Shell(place)
    try:
        folder = write_folder(place / "routed", with_ports(ROUTED))
        end = shell.run("simulate", folder, "--out", place / "out")
        assert end.code == 0, end.stderr
        assert "relay ended" not in end.stderr
        yield place / "out"
    finally:
        shell.close()


def same_weights(out: Path, expected: Path) -> None:
    """To the last bit; and something was trained at all."""
    files = sorted(file.relative_to(expected) for file in expected.rglob("*.safetensors"))
    assert len(files) == 3 and files == sorted(file.relative_to(out) for file in out.rglob("*.safetensors"))
    for file in files:
        ours, theirs = load_file(out / file), load_file(expected / file)
        assert ours.keys() == theirs.keys() and len(ours) == 2
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def relays_of(shell: Shell) -> dict[str, int]:
    """Process ids of the relays of a simulation."""
    found = {}
    for pid, line in shell.alive().items():
        if " -m splitsec.relay " in line:
            found[line.split()[-1]] = pid
    return found


def test_the_same_weights_as_without_relays(shell: Shell, undisturbed: Path, tmp_path: Path) -> None:
    graph = with_ports(ROUTED)
    direct = replaced(
        graph[: graph.index("routes:")],
        *((line, "") for line in re.findall(r"^  relay-.*\n", graph, re.MULTILINE)),
    )
    folder = write_folder(tmp_path / "direct", direct)
    change(folder / "graph.yaml", ("name: routed", "name: direct"))
    end = shell.run("simulate", folder, "--out", tmp_path / "out")
    assert end.code == 0, end.stderr
    same_weights(tmp_path / "out", undisturbed)


def test_the_relays_of_a_simulation(shell: Shell, routed: Path) -> None:
    """One process each without a key on its command line, and without torch; none is left."""
    change(routed / "graph.yaml", ("epochs: 40", "epochs: 1000000"))
    command = shell.start("simulate", routed)
    shell.hear("step", "clinic-b", "3")
    found = relays_of(shell)
    assert sorted(found) == ["relay-1", "relay-2"]
    for pid in found.values():
        assert memory(pid)["VmHWM"] < IDLE_MIB + 40
        assert not re.findall(r"/(?:torch|numpy)/", libraries(pid))
    assert not any("key" in line for line in shell.alive().values())
    os.kill(command.pid, signal.SIGINT)
    end = command.end()
    assert (end.code, end.seconds < SECONDS) == (130, True)
    assert shell.alive() == {}
    assert list(shell.scratch.iterdir()) == []


@pytest.mark.threat("T49")
@pytest.mark.parametrize("name", ["relay-1", "relay-2"])
def test_a_relay_that_is_killed_in_a_simulation(
    shell: Shell, routed: Path, undisturbed: Path, tmp_path: Path, name: str
) -> None:
    """There is no other route: it is started again, and the training ends with the same weights."""
    command = shell.start("simulate", routed, "--out", tmp_path / "out")
    shell.hear("step", "clinic-b", "3")
    before = relays_of(shell)
    os.kill(before[name], signal.SIGKILL)
    end = command.end()
    assert end.code == 0, end.stderr
    said = " ".join(end.stderr.split())
    assert f"{name}: the relay ended, and is started again (died: killed by signal SIGKILL)" in said
    assert "Traceback" not in end.stderr
    same_weights(tmp_path / "out", undisturbed)


def children(name: str) -> list[int]:
    """Process ids of our own children that are the relay ``name`` of a simulation, and run."""
    found = []
    for place in Path("/proc").iterdir():  # not /proc/self/task/*/children: that may leave some out
        with suppress(OSError):  # it has ended
            ours = f"\nPPid:\t{os.getpid()}\n" in (place / "status").read_text()
            if ours and f"splitsec.relay\0{name}\0".encode() in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    return found


def test_a_relay_that_cannot_be_started_again(routed: Path) -> None:
    """Somebody else has its address by then: the run fails with what it says, and nobody is left."""
    change(routed / "graph.yaml", ("epochs: 40", "epochs: 1000000"))
    where: list[str] = []
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def watch(party: str, event: dict[str, Any]) -> None:
            if (party, event["event"]) == ("relay-1", "relays"):
                where.append(event["listens"])
            if (party, event["event"]) == ("server", "turn over") and where:
                (pid,) = children("relay-1")
                handle = os.pidfd_open(pid)
                os.kill(pid, signal.SIGKILL)
                assert ended(handle, SECONDS)
                os.close(handle)
                host, port = where.pop().removeprefix("tcp://").split(":")
                other.bind((host, int(port)))
                other.listen()

        with pytest.raises(PartyFailed, match=r"relay-1 failed \(UserError\): relay-1 cannot listen at") as failed:
            simulate(routed, watch=watch)
    assert failed.value.exit_code == 2
    assert children("relay-1") == children("relay-2") == []


def test_a_relay_that_dies_again_and_again(routed: Path) -> None:
    """As it starts, each time: that is no accident, and the run does not go on like that for ever."""
    change(routed / "graph.yaml", ("epochs: 40", "epochs: 1000000"))
    begun, deaths = False, 0

    def watch(party: str, event: dict[str, Any]) -> None:
        nonlocal begun, deaths
        if event["event"] == "relay ended":
            deaths += 1
        elif begun or (party, event["event"]) != ("server", "turn over"):
            return
        begun, until = True, time.monotonic() + SECONDS
        while not (found := children("relay-2")):  # just started: the kernel may not show its command line yet
            assert time.monotonic() < until
        os.kill(found[0], signal.SIGKILL)

    with pytest.raises(PeerLost, match="relay-2: died: killed by signal SIGKILL"):
        simulate(routed, watch=watch)
    assert deaths == RELAY_DEATHS
    assert children("relay-1") == children("relay-2") == []


def joined(shell: Shell, folder: Path, out: Path) -> dict[str, Command]:
    """The parties that train, each a command of its own, with one thread each."""
    return {
        name: shell.start("join", "--graph", folder / "graph.yaml", "--party", name, "--out", out, OMP_NUM_THREADS="1")
        for name in ("clinic-a", "clinic-b", "server")
    }


def stop(relays: Mapping[str, Command]) -> None:
    for command in relays.values():
        os.kill(command.pid, signal.SIGTERM)
    for command in relays.values():
        end = command.end()
        assert end.code == 0, end.stderr
        assert "Traceback" not in end.stderr


def test_a_pilot_through_relays_that_go_on_for_the_next_run(
    shell: Shell, keys: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The relays outlive a training, and carry the one after it."""
    relays = {name: relay(shell, keys, name) for name in ("relay-1", "relay-2")}
    for out in ("first", "second"):
        for name, command in joined(shell, keys, tmp_path / out).items():
            end = command.end()
            assert end.code == 0, f"{name}: {end.stderr}"
            assert "broke" not in end.stderr
        same_weights(tmp_path / out, undisturbed)
    stop(relays)


@pytest.mark.threat("T49")
def test_another_route_when_a_relay_is_killed(shell: Shell, routed: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Nobody starts it again: the circuits are built anew over the next route, whose relay was not there before."""
    change(
        routed / "graph.yaml",
        (
            "to: server, via: [relay-1, relay-2]}",
            "to: server, via: [relay-1]}\n  - {from: clinics, to: server, via: [relay-2]}",
        ),
        (
            "to: clinic-b, via: [relay-1]}",
            "to: clinic-b, via: [relay-1]}\n  - {from: clinic-a, to: clinic-b, via: [relay-2]}",
        ),
    )
    folder, out = keyed(shell, routed, *PARTIES), tmp_path / "out"
    first, commands = relay(shell, folder, "relay-1"), joined(shell, folder, out)
    shell.hear("step", "clinic-b", "3")
    second = relay(shell, folder, "relay-2")
    second.out.line_with("listens at")
    os.kill(first.pid, signal.SIGKILL)
    commands["clinic-b"].err.line_with("clinic-b: the connection with server broke")
    for name, command in commands.items():
        end = command.end()
        assert end.code == 0, f"{name}: {end.stderr}"
        assert "Traceback" not in end.stderr
    same_weights(out, undisturbed)
    stop({"relay-2": second})
