"""Whatever happens to a simulation, it ends within seconds, says which party and why, and leaves no process behind.

Real processes throughout.  The ``shell`` fixture fails every test that leaves a process; here each test says, beside
that, how soon the end comes, and with which words and exit code.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.conftest import GRAPH, PATIENCE, Command, Shell, change, ended, replaced, write_folder

SECONDS = 15.0
"""Within which everything ends; it takes 3 on an idle machine (2 to ask and then kill, 1 to look for the cause)."""

FOR_EVER = ("epochs: 2", "epochs: 1000000")


def in_the_middle(shell: Shell, folder: Path, third_step: str = "") -> tuple[Command, dict[str, int]]:
    """A simulation that trains for ever, a few steps on, and the process id of each party.  Then clinic-b trains, the
    last of them, and in its third step its user code does ``third_step``.
    """
    change(folder / "graph.yaml", FOR_EVER)
    change(folder / "parties" / "clinic-b.yaml", ("party: clinic-b}", f"party: clinic-b, third_step: '{third_step}'}}"))
    command = shell.start("simulate", folder, "--out", folder.parent / "out")
    parties = {}
    for party in ("clinic-a", "server", "clinic-b"):
        parties[party] = int(shell.hear("step", party, "3")[3])
    warm = warm_processes(shell)
    assert len(warm) == (shell.env.get("SPLITSEC_FORK") != "0")
    assert {command.pid, *warm, *parties.values()} == set(shell.alive())
    return command, parties


def warm_processes(shell: Shell) -> list[int]:
    """Process ids of those that parties are forked from."""
    return [pid for pid, line in shell.alive().items() if "-m splitsec.nest" in line]


@pytest.mark.parametrize(("party", "fork"), [("clinic-a", "1"), ("clinic-b", "1"), ("server", "1"), ("server", "0")])
def test_a_party_that_is_killed(
    shell: Shell, folder: Path, party: str, fork: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where parties are not forked from a warm process, but each started anew."""
    monkeypatch.setitem(shell.env, "SPLITSEC_FORK", fork)
    command, parties = in_the_middle(shell, folder)
    os.kill(parties[party], signal.SIGKILL)
    end = command.end()
    assert shell.alive() == {}
    assert end.seconds < SECONDS
    assert end.code == 4
    assert f"\nsplitsec: {party}: died: killed by signal SIGKILL" in end.stderr
    assert "Traceback" not in end.stderr
    assert end.stdout == ""
    assert not (folder.parent / "out").exists()
    assert list(shell.scratch.iterdir()) == []


def test_the_process_that_the_parties_come_of_is_killed(shell: Shell, folder: Path) -> None:
    """It is no party, and holds nothing of theirs; but they cannot outlive it, and the end says so."""
    command, _ = in_the_middle(shell, folder)
    (warm,) = warm_processes(shell)
    os.kill(warm, signal.SIGKILL)
    end = command.end()
    assert shell.alive() == {}
    assert end.seconds < SECONDS
    assert end.code == 4
    said = " ".join(end.stderr.split())
    assert re.search("splitsec: (clinic-.|server): died with the process it came of, which died: killed by", said)
    assert "Traceback" not in end.stderr
    assert not (folder.parent / "out").exists()
    assert list(shell.scratch.iterdir()) == []


@pytest.mark.parametrize("third_step", ["", "deafen"])
def test_ctrl_c(shell: Shell, folder: Path, third_step: str) -> None:
    """Also while a party's own code is deaf to everything but SIGKILL."""
    command, _ = in_the_middle(shell, folder, third_step)
    if third_step:
        shell.hear("deaf", "clinic-b")
    os.kill(command.pid, signal.SIGINT)
    end = command.end()
    assert shell.alive() == {}
    assert end.seconds < SECONDS
    assert end.code == 130
    assert end.stderr.endswith("\nsplitsec: stopped by Ctrl-C\n")
    assert "Traceback" not in end.stderr
    assert end.stdout == ""
    assert list(shell.scratch.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_simulation_itself_is_ended(shell: Shell, folder: Path, number: signal.Signals) -> None:
    """The parties notice that their parent is gone, and end by themselves: nobody else can end them after SIGKILL.

    None of them has anything to report meanwhile: one stands in its own code, and the others wait for it.
    """
    command, parties = in_the_middle(shell, folder, "stand")
    handles = [os.pidfd_open(pid) for pid in parties.values()]
    os.kill(command.pid, number)
    end = command.end()
    assert end.seconds < SECONDS
    assert end.code in (-number, 128 + number)
    assert all(ended(handle, SECONDS) for handle in handles)
    assert shell.alive() == {}
    for handle in handles:
        os.close(handle)
    if number == signal.SIGTERM:  # nobody can clear away after SIGKILL
        assert list(shell.scratch.iterdir()) == []


def test_a_party_that_never_comes_up(shell: Shell, folder: Path) -> None:
    """Its data function waits for ever: in the process of clinic-a alone, as one does that waits for a disk."""
    change(folder / "graph.yaml", ("connect: 30", "connect: 3"))
    (folder / "parties" / "stuck.py").write_text(
        "import os, signal, sys\n"
        "from data import samples, test\n"
        "def train(site):\n"
        "    while 'splitsec.process' in ' '.join(sys.orig_argv):\n"
        "        signal.pause()\n"
        "    return samples(site, 24)\n"
    )
    change(folder / "parties" / "clinic-a.yaml", ('"data:train"', '"stuck:train"'))
    end = shell.run("simulate", folder)
    assert shell.alive() == {}
    assert end.code == 4
    assert "\nsplitsec: clinic-a: did not come up within 3 s" in f"\n{end.stderr}"
    assert "data function" in end.stderr
    assert "Traceback" not in end.stderr


def test_data_that_never_come(shell: Shell, folder: Path) -> None:
    """Its data function waits for ever, also when the folder is checked before anything is started."""
    change(folder / "graph.yaml", ("connect: 30", "connect: 3"))
    (folder / "parties" / "stuck.py").write_text(
        "import signal\n"
        "from data import test\n"
        "from models import tell\n"
        "def train(site):\n"
        "    tell('stuck', site)\n"
        "    while True:\n"
        "        signal.pause()\n"
    )
    change(folder / "parties" / "clinic-a.yaml", ('"data:train"', '"stuck:train"'))
    command = shell.start("simulate", folder)
    shell.hear("stuck", "0")
    end = command.end(3 + SECONDS)
    assert end.code == 4
    assert "\nsplitsec: clinic-a: did not come up within 3 s" in f"\n{end.stderr}"


def test_user_code_that_fails_in_a_step(shell: Shell, folder: Path) -> None:
    change(folder / "graph.yaml", FOR_EVER)
    change(folder / "parties" / "clinic-b.yaml", ("party: clinic-b}", "party: clinic-b, third_step: fail}"))
    command = shell.start("simulate", folder)
    shell.hear("step", "clinic-b", "3")
    end = command.end()
    assert shell.alive() == {}
    assert end.seconds < SECONDS
    assert end.code == 2
    models = folder / "parties" / "models.py"
    line = 1 + models.read_text().split("\n").index('            raise ValueError("the third step is too much")')
    assert re.search(
        rf"\nsplitsec: party clinic-b failed \(PartyFileError\): {re.escape(str(models))}:{line}: "
        r"segment 'stem' failed: ValueError: the third step is too much\n",
        end.stderr,
    )
    assert "Traceback" not in end.stderr


def test_standard_output_is_one_json_document(shell: Shell, folder: Path) -> None:
    """User code that prints, in every function and also below Python, does not spoil it.

    The same run shows that the compute threads are shared out: cores by parties, and at least one for each.
    """
    for file, begin in (("models.py", "def stem"), ("data.py", "def train")):
        noisy = 'import os\nprint("rubbish from Python")\nos.write(1, b"rubbish from below\\n")\n'
        change(folder / "parties" / file, (begin, f"{noisy}\n\n{begin}"))
    end = shell.run("simulate", folder, "--json", "--epochs", "1", "--seed", "3")
    assert end.code == 0, end.stderr
    assert "rubbish" not in end.stdout
    found = json.loads(end.stdout)
    assert end.stdout == json.dumps(found, indent=2) + "\n"
    assert {"graph", "parties", "epochs", "steps", "wall_seconds", "metrics", "cuts"} <= found.keys()
    assert found["graph"] == "small"
    assert found["parties"] == ["clinic-a", "clinic-b", "server"]
    assert found["epochs"] == 1
    assert found["steps"] == 6  # 24 samples in batches of 8, at each of two clinics
    assert 0 < found["startup_seconds"] <= found["wall_seconds"] < PATIENCE
    for name in ("train_loss", "eval_loss"):
        (loss,) = found["metrics"][name]
        assert 0.5 < loss < 2.0  # log 3 = 1.1 for a guess among three
    (accuracy,) = found["metrics"]["eval_accuracy"]
    assert accuracy * 16 == round(accuracy * 16)  # of 16 test samples in all
    for party in ("clinic-a", "clinic-b", "server"):
        assert int(shell.hear("step", party, "1")[4]) == max(1, len(os.sched_getaffinity(0)) // 3)
    directions = {(row["from"], row["to"], row["direction"], row["sender"]) for row in found["cuts"]}
    for clinic in ("clinic-a", "clinic-b"):
        assert ("stem", "trunk", "forward", clinic) in directions
    assert ("stem", "trunk", "backward", "server") in directions
    activations = [row for row in found["cuts"] if (row["kind"], row["sender"]) == ("activation", "clinic-a")]
    assert [row["messages"] for row in activations] == [4]  # 3 to train, 1 to evaluate
    assert 32 * 8 * 4 < activations[0]["bytes"] < 32 * 8 * 4 + 4 * 100  # 32 samples of 8 floats, and headers


ONE_PARTY = """\
splitsec: 1
name: alone
parties: {server: {}}
segments: {trunk: {at: server, data: x, loss: cross_entropy}}
labels: [{from: server, to: trunk}]
training: {epochs: 1, batch_size: 8, seed: 7}
"""


def test_a_single_party_has_all_cores(shell: Shell, tmp_path: Path) -> None:
    """Several share them: see above."""
    folder = write_folder(tmp_path / "alone", ONE_PARTY, clinics=())
    change(folder / "parties" / "models.py", ("nn.Sequential(nn.ReLU(), Watched(8, 3, **args))", "stem(**args)"))
    with (folder / "parties" / "server.yaml").open("a") as file:
        file.write('data: {train: "data:train", args: {site: 0}}\n')
    end = shell.run("simulate", folder, "--quiet")
    assert end.code == 0, end.stderr
    assert int(shell.hear("step", "server", "1")[4]) == len(os.sched_getaffinity(0))


def test_ten_parties_start(shell: Shell, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under 15 s on two idle cores; the bound here is for machines that others use, too."""
    clinics = [f"clinic-{number}" for number in range(9)]
    graph = replaced(
        GRAPH,
        ("  clinic-a: {}\n  clinic-b: {}\n", "".join(f"  {name}: {{}}\n" for name in clinics)),
        (
            "members: [clinic-a, clinic-b], schedule: round_robin",
            f"members: [{', '.join(clinics)}], schedule: parallel",
        ),
        ("connect: 30", "connect: 120"),
    )
    folder = write_folder(tmp_path / "ten", graph, clinics=clinics)
    end = shell.run("simulate", folder, "--epochs", "1", "--json", "--quiet")
    assert end.code == 0, end.stderr
    found = json.loads(end.stdout)
    assert len(found["parties"]) == 10
    with capsys.disabled():
        print(f"\nten parties started and connected in {found['startup_seconds']:.1f} s")
    assert found["startup_seconds"] < 60


def test_a_slow_line_makes_every_step_longer_and_changes_no_weight(shell: Shell, folder: Path) -> None:
    found = {}
    for name, line in (("near", ()), ("far", ("--bandwidth", "100mbit", "--delay", "20ms"))):
        end = shell.run("simulate", folder, "--epochs", "1", "--json", "--quiet", "--out", folder.parent / name, *line)
        assert end.code == 0, end.stderr
        found[name] = json.loads(end.stdout)
    took = {name: one["wall_seconds"] - one["startup_seconds"] for name, one in found.items()}
    assert took["far"] >= took["near"] / 2 + 0.04 * found["far"]["steps"]
    files = [one.relative_to(folder.parent / "near") for one in (folder.parent / "near").rglob("*.safetensors")]
    assert len(files) == 3
    for file in files:
        assert (folder.parent / "near" / file).read_bytes() == (folder.parent / "far" / file).read_bytes()
    assert shell.alive() == {}

    end = shell.run("simulate", folder, "--delay", "25")
    assert end.code == 2
    assert "--delay 25\n  expected: a number with us, ms, s, such as 25ms\n" in end.stderr
