"""Command lines and what they print, to the letter.  Keys differ each time and stand here as KEY.

Not here: mistakes in the graph file (``test_graph_mistakes.py``), and how runs end (``tests/processes``).
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from splitsec.identity import public_of, public_text, read_key
from tests.conftest import GRAPH, Shell, change, keyed, write_folder


def transcript(shell: Shell, *lines: str) -> str:
    """What a terminal shows: each command, what it printed, and its exit code where it is not 0."""
    shown = []
    for line in lines:
        end = shell.run(*line.split())  # one after the other, as typed
        text = f"$ splitsec {line}\n{end.stdout}{end.stderr}" + (f"[exit {end.code}]\n" if end.code else "")
        shown.append(re.sub(r"x25519:[A-Za-z0-9+/]{43}=", "KEY", text))
    return "".join(shown)


def test_help(shell: Shell) -> None:
    """What somebody sees first names every command, in the order in which one needs them."""
    end = shell.run("--help")
    assert (end.code, end.stderr) == (0, "")
    assert end.stdout.startswith(
        """\
usage: splitsec [-h] [--version] COMMAND ...

Train one neural network across institutions that do not pool their data.

A folder holds the graph file (graph.yaml, shared by all) and one party file for each party (parties/NAME.yaml,
private):

  splitsec check FOLDER        is it right?  and a picture of it
  splitsec plan FOLDER         what will it cost whom, and where else could it be cut?
  splitsec simulate FOLDER     train it here, one process for each party
  splitsec attack FOLDER ...   what would attackers get from it?
  splitsec keys new NAME       make a party's key
  splitsec predict FOLDER ...  use what was trained
  splitsec join ...            be one party, over the network
  splitsec relay GRAPH ...     pass on what others send, unread, over the network
  splitsec ledger FOLDER       what privacy was spent, and on what
  splitsec journal show FOLDER what left, entry by entry; `verify`: and that nobody changed it
  splitsec listen FILE         read the trace of a party's traffic
"""
    )
    for command in (
        "check",
        "plan",
        "keys",
        "simulate",
        "predict",
        "join",
        "relay",
        "ledger",
        "journal",
        "listen",
        "attack",
    ):
        assert re.search(rf"^    {command} ", end.stdout, re.MULTILINE)
        assert shell.run(command, "--help").stdout.startswith(f"usage: splitsec {command} ")


def test_a_new_key(shell: Shell, tmp_path: Path) -> None:
    assert (
        transcript(shell, "keys new clinic-a", "keys show clinic-a.key", "keys new clinic-a")
        == """\
$ splitsec keys new clinic-a
  clinic-a: {key: "KEY"}
Private key: clinic-a.key (keep it here, and a backup in a safe place).
Paste this line into the graph file, under `parties:`
$ splitsec keys show clinic-a.key
  clinic-a: {key: "KEY"}
$ splitsec keys new clinic-a
splitsec: clinic-a.key: there is a file already, and a key is never written over another
  expected: a name that is free
  to do: choose another --out, or move the old key away
[exit 2]
"""
    )
    file = tmp_path / "clinic-a.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    private = read_key(file)
    assert shell.run("keys", "show", file).stdout == f'  clinic-a: {{key: "{public_text(public_of(private))}"}}\n'


def test_a_new_key_of_a_group(shell: Shell) -> None:
    """It goes to every member, and another line into the graph file."""
    assert (
        transcript(shell, "keys new clinics --group", "keys show clinics.key --group")
        == """\
$ splitsec keys new clinics --group
    key: "KEY"
Private key of the group: clinics.key.  Hand a copy to each of its members (`group_key_file` in the \
party file) and to nobody else: who has it can speak as one of them.
Paste this line into the graph file, under `groups:`, into `clinics`
$ splitsec keys show clinics.key --group
    key: "KEY"
"""
    )


def test_a_key_for_another_party_than_the_file_says(shell: Shell) -> None:
    assert (
        transcript(shell, "keys new Clinic.A", "keys show nobody.key", "keys new clinic-a --out nowhere")
        == """\
$ splitsec keys new Clinic.A
splitsec: the name `Clinic.A`
  expected: 1 to 40 of a-z, 0-9, `-` and `_`, the first a letter or digit
  to do: rename it, for instance to `clinic-a`
[exit 2]
$ splitsec keys show nobody.key
splitsec: nobody.key: there is no such file
  expected: a private key file
  to do: make one with `splitsec keys new`
[exit 2]
$ splitsec keys new clinic-a --out nowhere
splitsec: nowhere/clinic-a.key: cannot be written: No such file or directory
  expected: a folder that you may write to
  to do: check --out
[exit 2]
"""
    )


def test_a_key_that_others_may_read(shell: Shell, tmp_path: Path) -> None:
    """Both by the command that shows its public half, and by the one that would use it; the key is never printed."""
    folder = keyed(shell, write_folder(tmp_path / "small", GRAPH), "clinic-a", "clinic-b", "server")
    file = folder / "parties" / "server.key"
    secret = file.read_text().split("\nkey: ")[1].strip()
    file.chmod(0o640)
    said = """\
splitsec: small/parties/server.key: others may use the file (mode 0640)
  expected: mode 0600: only its owner
  to do: run `chmod 600 small/parties/server.key`; if others could have read it, make a new key
"""
    for command in ("keys show small/parties/server.key", "join --graph small/graph.yaml --party server --out out"):
        end = shell.run(*command.split())
        assert (end.code, end.stdout, end.stderr) == (2, "", said)
        assert secret not in end.stderr
    assert not (tmp_path / "out").exists()


def test_a_key_with_a_passphrase(shell: Shell, tmp_path: Path) -> None:
    """From the environment; a wrong one, or none where there is no terminal to ask at, opens nothing."""
    made = shell.run("keys", "new", "server", "--passphrase", SPLITSEC_PASSPHRASE="correct horse")
    assert made.code == 0
    assert "horse" not in made.stdout + made.stderr + (tmp_path / "server.key").read_text()
    folder = keyed(shell, write_folder(tmp_path / "small", GRAPH), "clinic-a", "clinic-b", "server")
    os.replace(tmp_path / "server.key", folder / "parties" / "server.key")
    public = shell.run("keys", "show", folder / "parties" / "server.key").stdout.split('"')[1]
    text = (folder / "graph.yaml").read_text()
    change(folder / "graph.yaml", (text.split('server: {key: "')[1].split('"')[0], public))
    join = ("join", "--graph", "small/graph.yaml", "--party", "server")
    wrong = shell.run(*join, SPLITSEC_PASSPHRASE="wrong horse")
    assert wrong.code == 2
    assert (
        wrong.stderr
        == """\
splitsec: small/parties/server.key: the passphrase does not open the key
  expected: the passphrase that was set when the key was made, and a file that nobody has changed
  to do: try again; without it the key is lost: make a new one with `splitsec keys new`
"""
    )
    none = shell.run(*join)
    assert none.code == 2
    assert none.stderr.startswith(
        "splitsec: small/parties/server.key: the key is protected by a passphrase, and none was given\n"
    )


def test_join_with_another_key_than_the_graph_gives(shell: Shell, tmp_path: Path) -> None:
    folder = keyed(shell, write_folder(tmp_path / "small", GRAPH), "clinic-a", "clinic-b", "server")
    os.replace(folder / "parties" / "clinic-a.key", folder / "parties" / "server.key")
    assert (
        transcript(shell, "join --graph small/graph.yaml --party server")
        == """\
$ splitsec join --graph small/graph.yaml --party server
splitsec: small/graph.yaml:6: the key of 'server' in the graph is not the one in small/parties/server.key
  expected: the public half of this party's key file
  to do: compare with `splitsec keys show small/parties/server.key`
[exit 2]
"""
    )


def test_join_without_keys(shell: Shell, folder: Path) -> None:
    assert (
        transcript(
            shell,
            "join --graph small/graph.yaml --party clinic-a",
            "join --graph small/graph.yaml --party nobody",
        )
        == """\
$ splitsec join --graph small/graph.yaml --party clinic-a
splitsec: small/graph.yaml:4: party 'clinic-a' has no key
  expected: a public key for every party, to run over a network
  to do: run `splitsec keys new clinic-a` at that party and paste the line that it prints
[exit 2]
$ splitsec join --graph small/graph.yaml --party nobody
splitsec: small/parties/nobody.yaml: there is no such file
  expected: a YAML file
  to do: check the path
[exit 2]
"""
    )


def test_no_folder(shell: Shell) -> None:
    assert (
        transcript(shell, "simulate nowhere", "check nowhere", "predict nowhere --weights nowhere --out out")
        == """\
$ splitsec simulate nowhere
splitsec: nowhere/graph.yaml: there is no such file
  expected: a YAML file
  to do: check the path
[exit 2]
$ splitsec check nowhere
splitsec: nowhere/graph.yaml: there is no such file
  expected: a YAML file
  to do: check the path
[exit 2]
$ splitsec predict nowhere --weights nowhere --out out
splitsec: nowhere/graph.yaml: there is no such file
  expected: a YAML file
  to do: check the path
[exit 2]
"""
    )


def test_no_trained_segments(shell: Shell, folder: Path) -> None:
    assert (
        transcript(shell, "predict small --weights nowhere --out out")
        == """\
$ splitsec predict small --weights nowhere --out out
splitsec: no folder nowhere
  expected: the folder that `--out` of a training run wrote
  to do: train first
[exit 2]
"""
    )


def test_listening_to_what_is_no_trace(shell: Shell, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    assert (
        transcript(shell, "listen nowhere", "listen traces", "listen small/graph.yaml --follow")
        == """\
$ splitsec listen nowhere
splitsec: nowhere: there is no such file or folder
  expected: a trace, or a folder of traces
  to do: check the path; a run writes one with --trace
[exit 2]
$ splitsec listen traces
splitsec: traces: no trace there
  expected: files whose names end in .trace.jsonl
  to do: write them with `splitsec simulate FOLDER --trace DIR`, or name a file of another name itself
[exit 2]
$ splitsec listen small/graph.yaml --follow
splitsec: small/graph.yaml:1: not a line of a trace: no JSON object
  expected: a file that `--trace` of `splitsec join` or `splitsec simulate` wrote
  to do: look whether it is the right file, and whether somebody has edited it
[exit 2]
"""
    )


def test_attack_help(shell: Shell) -> None:
    """It teaches: what it does, commands to begin with, every option."""
    end = shell.run("attack", "--help")
    assert (end.code, end.stderr) == (0, "")
    assert end.stdout.split("\n\n", 1)[1].startswith(
        """\
Attack FOLDER's own graph, data and policies on this machine, and say what was got.  One party, the server as a rule,
is run by an attacker that speaks the real protocol; the others are the ordinary processes, which are told nothing.  Do
it before you join: it shows what your data would give away, and what stops it.

  splitsec attack --list                                             what attacks there are
  splitsec attack examples/vanilla --attack inversion
  splitsec attack examples/vanilla --attack all --report report.html
  splitsec attack examples/vanilla --attack hijacking --undefended   what it would get if nothing looked

The exit code is 0 whatever was got: this measures.  docs/attacks.md says what each attack does, and what a good result
does not mean.
"""
    )
    for option in (
        "attack",
        "list",
        "report",
        "undefended",
        "auxiliary",
        "batches",
        "attacker",
        "seed",
        "json",
        "quiet",
    ):
        assert re.search(rf"^  --{option}\b", end.stdout, re.MULTILINE), option


def test_the_list_of_attacks(shell: Shell) -> None:
    end = shell.run("attack", "--list")
    assert (end.code, end.stderr) == (0, "")
    assert end.stdout.startswith(
        """\
hijacking           Feature-space hijacking: trains the clients' segment into an encoder that the server can
                    invert.
                    By a server that returns gradients of its own choosing; source: Pasquini, Ateniese,
                    Bernaschi 2021 (FSHA).
hijacking-adaptive  """
    )
    assert max(map(len, end.stdout.splitlines())) <= 110


def test_attacks_that_cannot_be_run(shell: Shell, folder: Path) -> None:
    """A mistake is told before torch is loaded, with the nearest name."""
    (folder.parent / "no-torch" / "torch").mkdir(parents=True)
    (folder.parent / "no-torch" / "torch" / "__init__.py").write_text("raise ImportError('torch was loaded')")
    shell.env["PYTHONPATH"] = f"{folder.parent}/no-torch:{shell.env['PYTHONPATH']}"
    assert (
        transcript(
            shell,
            "attack small --attack inverson",
            "attack small",
            "attack --attack inversion",
            "attack nowhere --attack all",
            "attack small --attack inversion --report nowhere/report.html",
            "attack small --attack inversion --report small",
            "attack small --attack inversion --attacker sever",
        )
        == """\
$ splitsec attack small --attack inverson
splitsec: there is no attack `inverson`
  expected: an attack's name, or `all`
  to do: did you mean `inversion`?  `splitsec attack --list` says what each is
[exit 2]
$ splitsec attack small
splitsec: no attack named
  expected: --attack NAME, or --attack all
  to do: choose one: `splitsec attack --list` prints them
[exit 2]
$ splitsec attack --attack inversion
splitsec: no folder named
  expected: a folder with graph.yaml and parties/
  to do: give it: splitsec attack FOLDER
[exit 2]
$ splitsec attack nowhere --attack all
splitsec: nowhere/graph.yaml: there is no such file
  expected: a YAML file
  to do: check the path
[exit 2]
$ splitsec attack small --attack inversion --report nowhere/report.html
splitsec: nowhere/report.html: cannot be written: there is no folder nowhere
  expected: a file in a folder that you may write to
  to do: check --report
[exit 2]
$ splitsec attack small --attack inversion --report small
splitsec: small: cannot be written: it is a folder
  expected: a file in a folder that you may write to
  to do: check --report
[exit 2]
$ splitsec attack small --attack inversion --attacker sever
splitsec: there is no party `sever` in small/graph.yaml
  expected: the party that shall attack
  to do: did you mean `server`?
[exit 2]
"""
    )


@pytest.mark.parametrize(
    ("option", "value"), [("--epochs", "0"), ("--epochs", "many"), ("--seed", "-1"), ("--seed", "x")]
)
def test_a_number_that_is_none(shell: Shell, folder: Path, option: str, value: str) -> None:
    end = shell.run("simulate", "small", option, value)
    assert end.code == 2
    assert end.stdout == ""
    assert option in end.stderr and value in end.stderr
    assert "Traceback" not in end.stderr


def test_a_place_to_write_that_is_none(shell: Shell, folder: Path) -> None:
    """Noticed before the training, and not at its end."""
    (folder.parent / "occupied").write_text("")
    end = shell.run("simulate", "small", "--out", "occupied")
    assert end.code == 2
    assert end.stderr.startswith("splitsec: ")
    assert "occupied" in end.stderr
    assert "fault of splitsec" not in end.stderr
    assert "connected" not in end.stderr


def test_a_plan_that_cannot_be_made(shell: Shell) -> None:
    """Without a folder or a network, with a network that is not there, and with a layer that it has not."""
    assert (
        transcript(shell, "plan", "plan --model vgg", "plan --model alexnet --cut conv9", "plan nowhere")
        == """\
$ splitsec plan
splitsec: nothing to plan
  expected: a FOLDER, or --model with vgg16, resnet18, resnet50 or alexnet, or --published
  to do: try `splitsec plan examples/vanilla`, or `splitsec plan --model resnet18`
[exit 2]
$ splitsec plan --model vgg
splitsec: no network `vgg` is built in
  expected: one of vgg16, resnet18, resnet50, alexnet; or a FOLDER with modules of your own
  to do: did you mean `vgg16`?
[exit 2]
$ splitsec plan --model alexnet --cut conv9
splitsec: no layer `conv9` to cut after
  expected: one of conv1, pool1, conv2, pool2, conv3, conv4, conv5, pool5, fc1, fc2
  to do: did you mean `conv5` or `conv4` or `conv3`?
[exit 2]
$ splitsec plan nowhere
splitsec: nowhere/graph.yaml: there is no such file
  expected: a YAML file
  to do: check the path
[exit 2]
"""
    )


def test_the_published_tables(shell: Shell) -> None:
    """What the paper prints beside what formulas give, and which of its rows follow from none."""
    end = shell.run("plan", "--published")
    assert end.code == 0
    assert [line.rstrip() for line in end.stdout.splitlines()] == PUBLISHED.splitlines()


PUBLISHED = """\
Vepakomma, Gupta, Swedish, Raskar 2018, Split learning for health (arXiv:1812.00564)
computing of one client: VGG-16 on 32 x 32, cut after conv1
┏━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━┳━━━━━━━━┓
┃ method             ┃ clients ┃      printed ┃       formula ┃ off by ┃
┡━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━╇━━━━━━━━┩
│ split learning     │     100 │ 0.1548 TFLOP │  0.1547 TFLOP │ -0.04% │
│ federated learning │     100 │   29.4 TFLOP │    29.4 TFLOP │ -0.01% │
│ large-batch SGD    │     100 │   29.4 TFLOP │    29.4 TFLOP │ -0.01% │
│ split learning     │     500 │   0.03 TFLOP │ 0.03095 TFLOP │ +3.16% │
│ federated learning │     500 │   5.89 TFLOP │    5.88 TFLOP │ -0.18% │
│ large-batch SGD    │     500 │   5.89 TFLOP │    5.88 TFLOP │ -0.18% │
└────────────────────┴─────────┴──────────────┴───────────────┴────────┘
The formula: multiply-accumulates, three for every use of a weight (forward, gradient of the input, gradient
of the weight), times 50,000 samples over clients, times 58.3 epochs; the head is 4096-4096-1000.  `--count
published` counts so.  The paper prints 0.03 with one digit.

bytes of one client: ResNet on CIFAR-100; which, where cut, how many epochs: not said
┏━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━┓
┃ method             ┃ clients ┃ printed ┃ formula, ResNet-50 cut after its stem ┃ so it would be ┃
┡━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━┩
│ large-batch SGD    │     100 │   13 GB │                       189.6 MB a step │     68.6 steps │
│ large-batch SGD    │     500 │   14 GB │                       189.6 MB a step │     73.8 steps │
│ federated learning │     100 │    3 GB │                      190.1 MB a round │    15.8 rounds │
│ federated learning │     500 │  2.4 GB │                      190.1 MB a round │    12.6 rounds │
│ split learning     │     100 │    6 GB │                     262.1 MB an epoch │    22.9 epochs │
│ split learning     │     500 │  1.2 GB │                      52.4 MB an epoch │    22.9 epochs │
└────────────────────┴─────────┴─────────┴───────────────────────────────────────┴────────────────┘
Split learning's row follows from a formula: five times the clients, a fifth of each one's bytes.
The other two follow from none: a round moves the weights once each way and a step the gradients, however
many clients there are; rounds and steps would have to be as many as the last column says, and the table
gives neither.
"""
