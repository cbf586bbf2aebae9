"""Key files: private from the first moment, never overwritten, never printed, and opened only as they were written."""

from __future__ import annotations

import argparse
import base64
import os
import re
import stat
import traceback
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitsec import identity
from splitsec.cli import keys as command
from splitsec.errors import GraphError, KeyFileError
from splitsec.graph import parse_graph


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "SCRYPT_N", 2**14)  # 16 MiB in place of 128: the least that is accepted


def refused(file: Path, passphrase: str | None = None) -> KeyFileError:
    with pytest.raises(KeyFileError) as caught:
        identity.read_key(file, passphrase)
    assert caught.value.exit_code == 2
    assert caught.value.file == str(file)
    assert caught.value.expected
    return caught.value


def rewritten(file: Path, old: str, new: str) -> Path:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    return file


# Keys


def test_a_key_goes_out_and_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "a.key"
    public = identity.new_key(file)
    private = identity.read_key(file)
    assert identity.public_text(identity.public_of(private)) == public
    assert identity.parse_public(public) == identity.public_of(private)
    assert identity.read_public(file) == public
    assert not identity.is_protected(file)
    assert identity.read_key(file, "not needed") == private


def test_two_keys_are_two(tmp_path: Path) -> None:
    assert identity.new_key(tmp_path / "a.key") != identity.new_key(tmp_path / "b.key")


def test_the_public_key_is_that_of_rfc_7748() -> None:
    # Section 5.2: after one iteration, with the scalar and the point both 9
    nine = bytes([9]) + bytes(31)
    expected = "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert identity.public_of(nine).hex() == expected


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("", "does not begin with"),
        ("X25519:" + "A" * 43 + "=", "does not begin with"),
        ("x25519:" + "A" * 42 + "-=", "not base64"),
        ("x25519:" + "A" * 43, "not base64"),
        ("x25519:" + base64.b64encode(bytes(31)).decode(), "of 31 bytes"),
        ("x25519:" + base64.b64encode(bytes(33)).decode(), "of 33 bytes"),
        ("x25519:" + "A" * 42 + "B=", "not the only one"),  # the last character has two bits that say nothing
        ("x25519:" + base64.b64encode(bytes([9] + [0] * 30 + [0x80])).decode(), "not the only one"),
        ("x25519:" + base64.b64encode((2**255 - 19 + 9).to_bytes(32, "little")).decode(), "not the only one"),
        ("x25519:" + base64.b64encode(bytes(32)).decode(), "small order"),
        ("x25519:" + base64.b64encode(bytes([1]) + bytes(31)).decode(), "small order"),
        ("x25519:" + base64.b64encode((2**255 - 20).to_bytes(32, "little")).decode(), "small order"),
    ],
)
def test_a_public_key_has_one_text(text: str, seen: str) -> None:
    with pytest.raises(KeyFileError, match=re.escape(seen)):
        identity.parse_public(text)


# Files


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o277])
def test_a_new_file_has_mode_0600_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        identity.new_key(tmp_path / "a.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600


@pytest.mark.threat("T51")
def test_the_file_is_never_open_to_others_not_even_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[int, int]] = []
    real = os.open

    def noting(path: Path, flags: int, mode: int = 0o777) -> int:
        opened.append((flags, mode))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", noting)
    identity.new_key(tmp_path / "a.key")
    assert [mode for _, mode in opened] == [0o600]
    assert opened[0][0] & (os.O_EXCL | os.O_CREAT) == os.O_EXCL | os.O_CREAT


def test_a_key_is_never_written_over_anything(tmp_path: Path) -> None:
    file = tmp_path / "a.key"
    file.write_text("precious")
    with pytest.raises(KeyFileError, match="never written over"):
        identity.new_key(file)
    assert file.read_text() == "precious"
    link = tmp_path / "link.key"
    link.symlink_to(tmp_path / "elsewhere.key")
    with pytest.raises(KeyFileError, match="never written over"):
        identity.new_key(link)
    assert not (tmp_path / "elsewhere.key").exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be written"):
        identity.new_key(tmp_path / "no" / "a.key")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyFileError, match="No space left"):
        identity.new_key(tmp_path / "a.key")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.threat("T51")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644, 0o700 | 0o001])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "a.key"
    identity.new_key(file)
    file.chmod(mode)
    error = refused(file)
    assert f"mode {mode:04o}" in error.seen
    assert "chmod 600" in error.fix
    with pytest.raises(KeyFileError):
        identity.read_public(file)
    file.chmod(0o400)
    identity.read_key(file)


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.key"
    identity.new_key(file)
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert f"you are {other}" in refused(file).seen


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "a.key").seen
    assert "regular file" in refused(tmp_path).seen
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    assert "regular file" in refused(fifo).seen  # and does not wait for a writer


# Passphrases


@pytest.mark.threat("T52")
def test_a_passphrase_opens_what_it_closed(tmp_path: Path, fast: None) -> None:
    file = tmp_path / "a.key"
    public = identity.new_key(file, "correct horse")
    assert identity.is_protected(file)
    assert identity.read_public(file) == public
    private = identity.read_key(file, "correct horse")
    assert identity.public_text(identity.public_of(private)) == public
    assert base64.b64encode(private).decode() not in file.read_text()
    assert "does not open" in refused(file, "correct horsf").seen
    assert "none was given" in refused(file).seen


@pytest.mark.threat("T52")
def test_the_default_cost_is_what_the_documentation_says(tmp_path: Path) -> None:
    file = tmp_path / "a.key"
    identity.new_key(file, "p")
    assert file.read_text().splitlines()[2] == "protection: scrypt n=131072 r=8 p=1 aes-256-gcm"


def test_one_passphrase_in_two_encodings(tmp_path: Path, fast: None) -> None:
    file = tmp_path / "a.key"
    identity.new_key(file, "caf\u00e9")
    assert identity.read_key(file, "cafe\u0301")


def test_an_empty_passphrase_is_none(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="empty"):
        identity.new_key(tmp_path / "a.key", "")
    assert not (tmp_path / "a.key").exists()


def test_two_files_with_one_passphrase_share_nothing(tmp_path: Path, fast: None) -> None:
    for name in "ab":
        identity.new_key(tmp_path / name, "p")
    first, second = ((tmp_path / name).read_text().splitlines()[3:] for name in "ab")
    assert not set(first) & set(second)


@pytest.mark.parametrize(
    "numbers",
    [
        "n=8192 r=8 p=1",  # too weak
        "n=131073 r=8 p=1",  # not a power of two
        "n=2097152 r=8 p=1",  # 2 GiB
        "n=16384 r=1024 p=1",  # 2 GiB
        "n=131072 r=8 p=1024",  # hours
        "n=9999999999 r=8 p=1",
    ],
)
def test_costs_out_of_bounds_are_refused_before_anything_is_computed(
    tmp_path: Path, fast: None, monkeypatch: pytest.MonkeyPatch, numbers: str
) -> None:
    file = tmp_path / "a.key"
    identity.new_key(file, "p")
    rewritten(file, "n=16384 r=8 p=1", numbers)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(identity, "Scrypt", never)
    error = refused(file, "p")
    assert numbers in error.seen
    assert error.line == 3


@pytest.mark.threat("T53")
def test_nothing_in_a_protected_file_can_be_changed_unseen(tmp_path: Path, fast: None) -> None:
    file = tmp_path / "a.key"
    identity.new_key(file, "p")
    other = identity.new_key(tmp_path / "b.key", "p")
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    changes = [
        text.replace(identity.read_public(file), other),
        text.replace("n=16384", "n=32768"),
        text.replace("p=1 ", "p=2 "),
        "".join((*lines[:3], "salt: AAAAAAAAAAAAAAAAAAAAAA==\n", *lines[4:])),
        "".join((*lines[:4], "nonce: AAAAAAAAAAAAAAAA\n", *lines[5:])),
    ]
    for change in changes:
        assert change != text
        file.write_text(change)
        assert "does not open" in refused(file, "p").seen
    file.write_text(text)
    assert identity.read_key(file, "p")


# Files that are no key files


@pytest.mark.parametrize(
    ("old", "new", "seen", "line"),
    [
        ("splitsec private key", "-----BEGIN PRIVATE KEY-----", "first line", 1),
        ("key: 1", "key: 2", "another version", 1),
        ("public: x25519", "public: ed25519", "does not begin with", 2),
        ("protection: none", "protection: rot13", "the lines are not those", None),
        ("key: ", "key: A", "`key` is not 32 bytes", 4),
        ("protection: none\n", "", "the lines are not those", None),
        ("key: ", "comment: x\nkey: ", "the lines are not those", None),
    ],
)
def test_what_is_not_a_key_file(tmp_path: Path, old: str, new: str, seen: str, line: int | None) -> None:
    file = tmp_path / "a.key"
    identity.new_key(file)
    if old == "key: ":
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join((*lines[:3], lines[3].replace(old, new))))
    else:
        rewritten(file, old, new)
    error = refused(file)
    assert seen in error.seen
    assert error.line == line


def test_a_public_key_that_belongs_to_another(tmp_path: Path) -> None:
    file = tmp_path / "a.key"
    rewritten(file, identity.new_key(file), identity.new_key(tmp_path / "b.key"))
    assert "does not belong" in refused(file).seen
    with pytest.raises(KeyFileError, match="does not belong"):
        identity.read_public(file)


@given(raw=st.binary(max_size=5000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused_with_a_key_file_error(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "any.key"
    file.touch(mode=0o600)
    file.write_bytes(raw)
    refused(file)


@pytest.mark.threat("T54")
def test_no_error_shows_the_private_key(tmp_path: Path, fast: None) -> None:
    file = tmp_path / "a.key"
    identity.new_key(file)
    secret = file.read_text().splitlines()[3].removeprefix("key: ")
    said: list[str] = [repr(identity._read(file)), str(identity._read(file))]
    text = file.read_text()
    for at in range(len(text)):
        file.write_text(text[:at] + text[at + 1 :])
        with pytest.raises(KeyFileError) as caught:
            identity.read_key(file)
        said += [str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))]
    for size in range(8, 44):
        assert not any(secret[:size] in one for one in said)
    assert not any(secret[10:20] in one for one in said)


# The command


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["keys", *arguments])


def test_the_command_prints_one_line_for_the_graph_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(parsed("new", "clinic-a", "--out", str(tmp_path))) == 0
    out, err = capsys.readouterr()
    assert out == f'  clinic-a: {{key: "{identity.read_public(tmp_path / "clinic-a.key")}"}}\n'
    assert str(tmp_path / "clinic-a.key") in err
    exchange = "exchanges: [{name: n, from: a, to: clinic-a, shape: [], dtype: bool}]\n"
    graph = parse_graph(f'splitsec: 1\nname: n\nparties:\n  a: {{listen: "ipc:///a"}}\n{out}{exchange}')
    assert graph.parties["clinic-a"].key == identity.read_public(tmp_path / "clinic-a.key")

    assert command.run(parsed("show", str(tmp_path / "clinic-a.key"))) == 0
    assert capsys.readouterr().out == out


def test_the_command_refuses_a_name_that_no_graph_may_have(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="the name"):
        command.run(parsed("new", "../Clinic", "--out", str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_a_passphrase_from_the_environment(
    tmp_path: Path, fast: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(command.PASSPHRASE_VARIABLE, "from outside")
    command.run(parsed("new", "a", "--passphrase", "--out", str(tmp_path)))
    assert identity.read_key(tmp_path / "a.key", "from outside")
    assert "from outside" not in "".join(capsys.readouterr())
    command.run(parsed("new", "b", "--out", str(tmp_path)))
    assert not identity.is_protected(tmp_path / "b.key")  # the variable alone protects nothing


def test_a_passphrase_from_a_descriptor(tmp_path: Path, fast: None) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"down the pipe\nnot this\n")
    os.close(writing)
    command.run(parsed("new", "a", "--passphrase-fd", str(reading), "--out", str(tmp_path)))
    assert identity.read_key(tmp_path / "a.key", "down the pipe")


def test_a_passphrase_from_the_terminal_is_asked_for_twice(
    tmp_path: Path, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["one", "two", "same", "same", "same"])
    monkeypatch.setattr("getpass.getpass", lambda *_, **__: next(answers))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.delenv(command.PASSPHRASE_VARIABLE, raising=False)
    arguments = parsed("new", "a", "--passphrase", "--out", str(tmp_path))
    with pytest.raises(KeyFileError, match="differ"):
        command.run(arguments)
    assert list(tmp_path.iterdir()) == []
    command.run(arguments)
    assert identity.read_key(tmp_path / "a.key", "same")
    assert command.passphrase_for(tmp_path / "a.key", arguments) == "same"


def test_nobody_to_ask(tmp_path: Path, fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    monkeypatch.delenv(command.PASSPHRASE_VARIABLE, raising=False)
    with pytest.raises(KeyFileError, match="no terminal"):
        command.run(parsed("new", "a", "--passphrase", "--out", str(tmp_path)))
    identity.new_key(tmp_path / "b.key", "p")
    assert command.passphrase_for(tmp_path / "b.key", parsed("new", "b")) is None
