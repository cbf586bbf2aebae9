"""Party files against their graph, and the loading of the functions that they name."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from splitsec import partyfile
from splitsec.errors import GraphError, PartyFileError
from splitsec.partyfile import PartyFile, check_party, load_folder, load_function, load_party

GRAPH = """\
splitsec: 1
name: vanilla
parties:
  clinic-a: {}
  clinic-b: {}
  server: {listen: "tcp://127.0.0.1:7400"}
  auditor: {}
groups:
  clinics: {members: [clinic-a, clinic-b], schedule: round_robin}
segments:
  stem: {at: clinics, data: x}
  trunk: {at: server, loss: cross_entropy}
  extra: {at: server, data: z, loss: custom}
cuts:
  - {from: stem, to: trunk, shape: [4], dtype: float32}
labels:
  - {from: clinics, to: trunk}
  - {from: server, to: extra}
exchanges:
  - {name: note, from: server, to: auditor, shape: [], dtype: int64}
"""

CLINIC = """\
party: clinic-a
key_file: clinic-a.key
segments:
  stem: {model: "models:stem", args: {width: 4}, optimizer: {name: adam, lr: 1e-3}}
data: {train: "data:train", test: "data:test", args: {site: 0}}
threads: 1
"""

SERVER = """\
party: server
segments:
  trunk: {model: "models:trunk", optimizer: {name: sgd, lr: 0.1, momentum: 0.9}}
  extra:
    model: "models:extra"
    optimizer: {name: "torch.optim:Adam"}
    loss: "losses:focal"
    loss_args: {gamma: 2}
data: {train: "data:train", test: "data:test"}
listen: "tcp://0.0.0.0:7400"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "parties").mkdir()
    (tmp_path / "graph.yaml").write_text(GRAPH)
    (tmp_path / "parties" / "clinic-a.yaml").write_text(CLINIC)
    (tmp_path / "parties" / "clinic-b.yaml").write_text(CLINIC.replace("clinic-a", "clinic-b"))
    (tmp_path / "parties" / "server.yaml").write_text(SERVER)
    return tmp_path


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
    file.write_text(text.replace(old, new))


def refused(folder: Path) -> PartyFileError:
    with pytest.raises(PartyFileError) as caught:
        load_folder(folder)
    assert caught.value.exit_code == 2
    assert caught.value.expected
    assert caught.value.fix
    return caught.value


# Good ones


def test_a_folder_as_it_should_be(folder: Path) -> None:
    loaded = load_folder(folder)
    assert list(loaded.parties) == [
        "clinic-a",
        "clinic-b",
        "server",
    ]  # the auditor, who only receives a note, needs none
    assert loaded.path == folder
    clinic = loaded.parties["clinic-a"]
    assert clinic.folder == folder / "parties"
    assert clinic.key_path == folder / "parties" / "clinic-a.key"
    assert clinic.segments["stem"].optimizer.name == "adam"
    assert clinic.segments["stem"].optimizer.arguments == {"lr": 0.001}
    assert clinic.segments["stem"].args == {"width": 4}
    assert clinic.data is not None
    assert (clinic.data.train, clinic.data.predict, clinic.data.args) == ("data:train", None, {"site": 0})
    assert clinic.threads == 1
    assert clinic.line_of("segments", "stem", "optimizer") == 4
    server = loaded.parties["server"]
    assert server.segments["extra"].loss_args == {"gamma": 2}
    assert server.listen == "tcp://0.0.0.0:7400"
    assert server.key_path is None


def test_a_party_with_exchanges_only_may_have_a_file(folder: Path) -> None:
    (folder / "parties" / "auditor.yaml").write_text("party: auditor\nkey_file: a.key\n")
    assert load_folder(folder).parties["auditor"].threads is None


def test_other_files_in_the_folder_do_not_matter(folder: Path) -> None:
    for name in ("models.py", "README.md", "clinic-a.key", ".clinic-a.yaml.swp", ".hidden.yaml", "clinic-a.yaml~"):
        (folder / "parties" / name).write_text("not yaml: [")
    assert len(load_folder(folder).parties) == 3


def test_an_absolute_key_file_stays_absolute(folder: Path) -> None:
    change(folder / "parties" / "clinic-a.yaml", "key_file: clinic-a.key", "key_file: /etc/splitsec/a.key")
    assert load_folder(folder).parties["clinic-a"].key_path == Path("/etc/splitsec/a.key")


def test_the_key_of_an_anonymous_group(folder: Path) -> None:
    """Only its members have one; where it is not named, `check` and `simulate` do without."""
    change(folder / "graph.yaml", "  server: {listen", '  relay: {listen: "tcp://127.0.0.1:7401"}\n  server: {listen')
    change(folder / "graph.yaml", "  extra: {at: server, data: z, loss: custom}\n", "")
    change(folder / "graph.yaml", "  - {from: server, to: extra}\n", "")
    change(
        folder / "graph.yaml",
        "dtype: float32}\n",
        "dtype: float32, anonymous: true}\nroutes: [{from: clinics, to: server, via: [relay]}]\n",
    )
    (folder / "parties" / "server.yaml").write_text(
        'party: server\nsegments:\n  trunk: {model: "models:trunk", optimizer: {name: sgd, lr: 0.1}}\n'
    )
    assert load_folder(folder).parties["clinic-a"].group_key_path is None
    for name in ("clinic-a", "clinic-b"):
        file = folder / "parties" / f"{name}.yaml"
        file.write_text(file.read_text() + "group_key_file: ../clinics.key\n")
    loaded = load_folder(folder).parties["clinic-a"]
    assert loaded.group_key_path == folder / "parties" / "../clinics.key"
    file = folder / "parties" / "server.yaml"
    file.write_text(file.read_text() + "group_key_file: clinics.key\n")
    error = refused(folder)
    assert error.seen == "`group_key_file` is given, but the graph has this party in no anonymous group"
    assert (error.file, error.line) == (str(file), 4)
    assert "anonymous: true" in error.expected
    assert "this party should not have it" in error.fix


def test_a_group_key_where_no_group_is_anonymous(folder: Path) -> None:
    file = folder / "parties" / "clinic-a.yaml"
    file.write_text(file.read_text() + "group_key_file: clinics.key\n")
    assert "no anonymous group" in refused(folder).seen


def test_everything_is_frozen(folder: Path) -> None:
    clinic = load_party(folder / "parties" / "clinic-a.yaml")
    with pytest.raises(ValueError, match="frozen"):
        clinic.threads = 2
    with pytest.raises(TypeError, match="cannot be changed"):
        clinic.segments["more"] = clinic.segments["stem"]
    with pytest.raises(TypeError, match="cannot be changed"):
        clinic.segments["stem"].args["width"] = 5


# Mistakes: (file, old text, new text, line, seen, expected, to do)

MISTAKES = {
    "unknown key": ("clinic-a", "threads: 1", "thread: 1",
        6, "unknown key `thread`", "`threads`", "did you mean `threads`"),
    "early gradient": ("clinic-a", "threads: 1", "early_gradient: maybe",
        6, "`early_gradient` is maybe", "`true`, `false` or `auto`", "choose one"),
    "unknown key of a segment": ("clinic-a", "args: {width", "arg: {width",
        4, "unknown key `arg` in `segments.stem`", "", "`args`"),
    "no party": ("clinic-a", "party: clinic-a\n", "", 1, "`party` is missing", "name in the graph", "add `party"),
    "no optimizer": ("clinic-a", ", optimizer: {name: adam, lr: 1e-3}", "",
        4, "`optimizer` is missing in `segments.stem`", "", "add"),
    "no optimizer name": ("clinic-a", "name: adam, ", "",
        4, "`name` is missing in `segments.stem.optimizer`", "torch.optim", ""),
    "optimizer in capitals": ("clinic-a", "adam", "Adam", 4, "the optimizer `Adam`", "lower case", "`adam`"),
    "no colon": ("clinic-a", "models:stem", "models.stem",
        4, "`models.stem` where a function is named", "MODULE:FUNCTION", "colon"),
    "a path": ("clinic-a", "data:train", "data.py:train()",
        5, "`data.py:train()` where a function", "", "without brackets"),
    "no train": ("clinic-a", 'train: "data:train", ', "", 5, "`train` is missing in `data`", "", ""),
    "no threads": ("clinic-a", "threads: 1", "threads: 0", 6, "`threads` is 0", "greater than or equal to 1", ""),
    "bad listen": ("server", "tcp://0.0.0.0:7400", "0.0.0.0:7400", 10, "without a scheme", "tcp://", ""),
    "other name": ("clinic-a", "party: clinic-a\n", "party: clinic-c\n",
        1, "`party` is clinic-c", "called after", "`party: clinic-a`"),
    "segment missing": ("server", "  trunk:", "  trnk:",
        3, "`trnk`, which is no segment", "`trunk`", "did you mean `trunk`"),
    "segment of another": ("clinic-a", "  stem:", "  trunk:",
        4, "`trunk`, which the graph places at `server`", "`stem`", "remove it"),
    "loss not wanted": (
        "server", "{name: sgd, lr: 0.1, momentum: 0.9}", "{name: sgd}, loss: a:b",
        3, "`trunk` has a loss here, but the graph says `loss: cross_entropy`", "custom", "remove",
    ),
    "loss args not wanted": (
        "clinic-a", "args: {width: 4}", "loss_args: {width: 4}",
        4, "`stem` has a loss here, but the graph says that it computes none", "custom", "remove",
    ),
    "loss wanted": ("server", '    loss: "losses:focal"\n', "",
        4, "the segment `extra` has no `loss`", "custom", "losses:"),
    "no data": (
        "clinic-a", 'data: {train: "data:train", test: "data:test", args: {site: 0}}\n', "",
        1, "`data` is missing", "`stem` reads its field `x`, its field `y` labels `trunk`", "add `data",
    ),
    "tests at one place only": ("clinic-a", ', test: "data:test"', "",
        5, "`clinic-a` has no test samples, but `server`", "", ""),
    "not yaml": ("clinic-a", "threads: 1", "threads: [", 7, "not YAML", "YAML", ""),
    "unknown key of wss": ("clinic-a", "threads: 1", "wss: {cert: a.pem}",
        6, "unknown key `cert` in `wss`", "`certificate`", ""),
    "a certificate alone": ("clinic-a", "threads: 1", "wss: {certificate: a.pem}",
        6, "`wss` has a `certificate`, but no `key`", "both where the party listens", "add `key`"),
    "a key alone": ("clinic-a", "threads: 1", "wss: {key: a.pem}",
        6, "`wss` has a `key`, but no `certificate`", "none where it only dials", "add `certificate`"),
    "a proxy of another kind": ("clinic-a", "threads: 1", 'wss: {ca: a, proxy: "socks5://me:secret@here:1"}',
        6, "`wss.proxy` is no proxy that can be used", "http://HOST:PORT", "`proxy: none`"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_line_and_the_way_out(folder: Path, name: str) -> None:
    party, old, new, line, seen, expected, fix = MISTAKES[name]
    file = folder / "parties" / f"{party}.yaml"
    change(file, old, new)
    error = refused(folder)
    assert seen in error.seen
    assert expected in error.expected
    assert fix in error.fix
    assert (error.file, error.line) == (str(file), line)


def test_a_segment_without_code(folder: Path) -> None:
    change(folder / "parties" / "server.yaml", '  trunk: {model: "models:trunk"', '# {model: "models:trunk"')
    error = refused(folder)
    assert "the code of the segment `trunk` is missing" in error.seen
    assert "places it at `server`" in error.expected
    assert error.line == 2


def test_a_member_of_a_group_without_a_file(folder: Path) -> None:
    (folder / "parties" / "clinic-b.yaml").unlink()
    error = refused(folder)
    assert error.seen == "`clinic-b`, a member of the group `clinics`, has no party file"
    assert error.file == str(folder / "parties" / "clinic-b.yaml")
    assert error.expected == "a file with the code of `stem`"
    assert "party: clinic-b" in error.fix


def test_a_party_without_a_file(folder: Path) -> None:
    (folder / "parties" / "server.yaml").unlink()
    assert refused(folder).seen == "`server` has no party file"


def test_a_holder_of_labels_alone_without_a_file(folder: Path) -> None:
    change(folder / "graph.yaml", "  - {from: clinics, to: trunk}", "  - {from: auditor, to: trunk}")
    error = refused(folder)
    assert (error.seen, error.expected) == ("`auditor` has no party file", "a file with its `data`")


def test_no_folder_of_party_files(folder: Path) -> None:
    (folder / "parties").rename(folder / "party")
    assert "has no party file" in refused(folder).seen


def test_a_file_for_nobody(folder: Path) -> None:
    (folder / "parties" / "auditer.yaml").write_text("party: auditer\n")
    error = refused(folder)
    assert "a party file for `auditer`, which is not in" in error.seen
    assert "did you mean `auditor`?" in error.fix


def test_a_file_with_the_other_ending(folder: Path) -> None:
    (folder / "parties" / "clinic-b.yaml").rename(folder / "parties" / "clinic-b.yml")
    assert "rename it to clinic-b.yaml" in refused(folder).fix


def test_data_that_nobody_needs(folder: Path) -> None:
    (folder / "parties" / "auditor.yaml").write_text('party: auditor\ndata: {train: "data:train"}\n')
    error = refused(folder)
    assert "needs no samples of this party" in error.seen
    assert error.line == 2


def test_listening_where_the_graph_does_not_say_so(folder: Path) -> None:
    change(folder / "parties" / "clinic-a.yaml", "threads: 1", 'listen: "tcp://0.0.0.0:1"')
    assert "in the graph this party does not listen" in refused(folder).seen


def test_a_party_that_is_not_in_the_graph(folder: Path) -> None:
    graph = load_folder(folder).graph
    stranger = PartyFile(party="clinic-c")
    with pytest.raises(PartyFileError, match="`clinic-c` is not in the graph"):
        check_party(graph, stranger)


def test_mistakes_of_the_graph_come_first(folder: Path) -> None:
    (folder / "parties" / "server.yaml").unlink()
    change(folder / "graph.yaml", "seg", "sge")
    with pytest.raises(GraphError, match="sgements"):
        load_folder(folder)


# Files for wss://


@pytest.fixture
def web(folder: Path) -> Path:
    """A party file with a `wss` section, line by line from line 6, and its files."""
    parties = folder / "parties"
    (parties / "tls").mkdir()
    for name in ("a.crt", "a.key", "ca.pem"):
        (parties / "tls" / name).write_text("PEM")
        (parties / "tls" / name).chmod(0o600 if name == "a.key" else 0o644)
    section = (
        'wss:\n  certificate: tls/a.crt\n  key: tls/a.key\n  ca: tls/ca.pem\n  proxy: "http://me:secret@proxy:3128"\n'
    )
    change(parties / "clinic-a.yaml", "threads: 1\n", section)
    return parties


def test_the_files_for_wss_are_beside_the_party_file(web: Path) -> None:
    assert load_party(web / "clinic-a.yaml").transport_options() == {
        "wss": {
            "certificate": str(web / "tls" / "a.crt"),
            "key": str(web / "tls" / "a.key"),
            "ca": str(web / "tls" / "ca.pem"),
            "proxy": "http://me:secret@proxy:3128",
        }
    }


def test_without_a_section_there_is_nothing_to_tell(folder: Path) -> None:
    change(folder / "parties" / "clinic-a.yaml", "threads: 1", "wss: {proxy: none}")
    assert load_party(folder / "parties" / "clinic-a.yaml").transport_options() == {"wss": {"proxy": "none"}}
    assert load_party(folder / "parties" / "clinic-b.yaml").transport_options() == {}


def test_an_absolute_path_for_wss_stays_absolute(web: Path) -> None:
    elsewhere = web.parent / "elsewhere.pem"
    elsewhere.write_text("PEM")
    change(web / "clinic-a.yaml", "ca: tls/ca.pem", f"ca: {elsewhere}")
    assert load_party(web / "clinic-a.yaml").transport_options()["wss"]["ca"] == str(elsewhere)


def test_the_files_need_not_be_there_to_check_or_simulate(web: Path) -> None:
    for file in (web / "tls").iterdir():
        file.unlink()
    assert load_folder(web.parent).parties["clinic-a"].wss is not None


def file_refused(web: Path) -> PartyFileError:
    with pytest.raises(PartyFileError) as caught:
        load_party(web / "clinic-a.yaml").transport_options()
    assert caught.value.file == str(web / "clinic-a.yaml")
    assert caught.value.expected
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("name", "key", "line"), [("a.crt", "certificate", 7), ("a.key", "key", 8), ("ca.pem", "ca", 9)]
)
def test_a_file_for_wss_that_is_missing(web: Path, name: str, key: str, line: int) -> None:
    (web / "tls" / name).unlink()
    error = file_refused(web)
    assert error.seen == f"`wss.{key}`: {web / 'tls' / name} is not there"
    assert error.line == line


def test_a_file_for_wss_that_is_none(web: Path) -> None:
    (web / "tls" / "a.crt").unlink()
    (web / "tls" / "a.crt").mkdir()
    assert "is not a file" in file_refused(web).seen


def test_a_file_for_wss_that_cannot_be_read(web: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def guarded(path: str | Path, *arguments: Any, **named: Any) -> int:
        if str(path).endswith("a.crt"):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", guarded)
    error = file_refused(web)
    assert error.seen == f"`wss.certificate`: {web / 'tls' / 'a.crt'} cannot be read: Permission denied"
    assert error.line == 7


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610])
def test_a_tls_key_that_others_may_use(web: Path, mode: int) -> None:
    (web / "tls" / "a.key").chmod(mode)
    error = file_refused(web)
    assert error.seen == f"`wss.key`: others may use {web / 'tls' / 'a.key'} (mode {mode:04o})"
    assert error.line == 8
    assert f"chmod 600 {web / 'tls' / 'a.key'}" in error.fix


def test_a_proxys_password_is_not_shown(folder: Path) -> None:
    change(folder / "parties" / "clinic-a.yaml", "threads: 1", 'wss: {proxy: "ftp://me:secret@here"}')
    assert "secret" not in str(refused(folder))


# Functions


def write(folder: Path, **modules: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)


def function_refused(spec: str, folder: Path) -> PartyFileError:
    with pytest.raises(PartyFileError) as caught:
        load_function(spec, folder)
    return caught.value


def test_a_function_beside_the_party_file(tmp_path: Path) -> None:
    write(tmp_path, models="def stem(width):\n    return width + 1\n")
    assert load_function("models:stem", tmp_path)(3) == 4


def test_an_installed_function() -> None:
    assert load_function("os.path:join", Path("/nowhere"))("a", "b") == "a/b"


def test_two_folders_with_the_same_modules_do_not_meet(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(
            tmp_path / name,
            data=f"WHO = '{name}'\n",
            models="import data\nfrom data import WHO\n"
            "def stem():\n    import data as late\n    return WHO, data.WHO, late.WHO\n",
        )
    one, two = (load_function("models:stem", tmp_path / name) for name in ("one", "two"))
    assert one() == ("one", "one", "one")
    assert two() == ("two", "two", "two")
    assert one.__module__ != two.__module__
    assert "data" not in sys.modules
    assert "models" not in sys.modules
    assert str(tmp_path / "one") not in sys.path


def test_a_module_is_run_once(tmp_path: Path) -> None:
    write(
        tmp_path,
        data="ROWS = []\n",
        models="from data import ROWS\ndef a(): return ROWS\n",
        more="import data\ndef b(): return data.ROWS\n",
    )
    assert load_function("models:a", tmp_path)() is load_function("more:b", tmp_path / ".")()


def test_a_name_of_the_standard_library_is_the_partys_own_for_the_party_alone(tmp_path: Path) -> None:
    import random

    write(
        tmp_path,
        random="def randint(a, b): return 'mine'\n",
        models="import random\ndef f(): return random.randint(0, 1)\n",
    )
    assert load_function("models:f", tmp_path)() == "mine"
    assert sys.modules["random"] is random


def test_packages_and_relative_imports(tmp_path: Path) -> None:
    write(
        tmp_path,
        models="import net.wide.layers\nfrom net import NAME\nfrom . import plain\n"
        "def f(): return net.wide.layers.f(), NAME, plain.X\n",
        plain="X = 1\n",
    )
    write(tmp_path / "net", __init__="NAME = 'net'\n", __main__="")
    write(
        tmp_path / "net" / "wide",
        __init__="",
        layers="from .. import NAME\nimport plain\ndef f(): return NAME, plain.X\n",
    )
    assert load_function("models:f", tmp_path)() == (("net", 1), "net", 1)
    assert load_function("net.wide.layers:f", tmp_path)() == ("net", 1)


def test_classes_know_where_they_come_from(tmp_path: Path) -> None:
    write(tmp_path, models="import dataclasses\n@dataclasses.dataclass\nclass Net:\n    width: int = 3\n")
    assert load_function("models:Net", tmp_path)().width == 3


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, models="")
    error = function_refused("modles:stem", tmp_path)
    assert "there is no modles.py in" in error.seen
    assert error.file is None  # the caller knows where it was written
    assert "did you mean `models`?" in error.fix


def test_a_function_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, models="import os\ndef stem(): ...\nx = 3\n")
    error = function_refused("models:sten", tmp_path)
    assert error.file == str(tmp_path / "models.py")
    assert error.seen == "no function `sten`"
    assert error.fix == "did you mean `stem`?"
    assert "int, not a function" in function_refused("models:x", tmp_path).seen


@pytest.mark.parametrize(
    ("module", "line", "seen"),
    [
        ("x = 1\nimport nothing_of_the_kind\n", 2, "ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("\n\nx = 1 / 0\n", 3, "ZeroDivisionError: division by zero"),
        ("def f(:\n", 1, "SyntaxError"),
        ("from other import nothing\n", 1, "cannot import name 'nothing' from 'other'"),
        ("import other.more\n", 1, "No module named 'other.more'"),
        ("import json\n\njson.loads('{')\n", 3, "JSONDecodeError"),
    ],
)
def test_code_that_fails_on_import_is_named_with_its_own_line(
    tmp_path: Path, module: str, line: int, seen: str
) -> None:
    write(tmp_path, models=module, other="")
    error = function_refused("models:stem", tmp_path)
    assert (error.file, error.line) == (str(tmp_path / "models.py"), line)
    assert error.seen.startswith("`models` cannot be imported: ")
    assert seen in error.seen
    assert "\n" not in error.seen
    assert "_splitsec" not in error.seen


def test_code_that_fails_in_a_sibling_is_named_there(tmp_path: Path) -> None:
    write(tmp_path, models="import data\n", data="\n\n\nraise ValueError('no\\nsuch file')\n")
    error = function_refused("models:stem", tmp_path)
    assert (error.file, error.line) == (str(tmp_path / "data.py"), 4)
    assert error.seen == "`models` cannot be imported: ValueError: no"


def test_after_a_failure_the_mended_module_loads(tmp_path: Path) -> None:
    write(tmp_path, models="raise ValueError\n")
    function_refused("models:f", tmp_path)
    write(tmp_path, models="def f(): return 'mended'\n")
    sys.path_importer_cache.clear()
    assert load_function("models:f", tmp_path)() == "mended"


def test_the_party_file_adds_where_a_function_was_named(folder: Path) -> None:
    party = load_party(folder / "parties" / "clinic-a.yaml")
    with pytest.raises(PartyFileError) as caught:
        party.function("models:stem", "segments", "stem", "model")
    assert (caught.value.file, caught.value.line) == (str(party.file), 4)
    write(folder / "parties", models="def stem(): return 5\n")
    assert party.function("models:stem", "segments", "stem", "model")() == 5


@pytest.mark.parametrize(
    "spec", ["models", "models:", ":stem", "models.py:stem", "../models:stem", "a:b:c", "models:stem()", "a b:c", ""]
)
def test_what_names_no_function(tmp_path: Path, spec: str) -> None:
    assert "MODULE:FUNCTION" in function_refused(spec, tmp_path).expected


def test_the_models_say_what_they_are() -> None:
    models: list[Any] = [partyfile.PartyFile, partyfile.SegmentCode, partyfile.DataFunctions, partyfile.Optimizer]
    models.append(partyfile.WebSocket)
    assert all(one.description for model in models for one in model.model_fields.values())
