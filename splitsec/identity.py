"""Identity keys: one long-term X25519 key pair a party; the private half in a file that only its owner can read.

Here: making, writing and reading key files, and the text form of public keys.  Not here: what the keys are used for;
that is in transports/handshake.py.  The story goes on in graph.py, where public keys are named.

A key file is ASCII text, one `name: value` a line, in this order:

    splitsec private key: 1
    public: x25519:<base64 of the 32 bytes>
    protection: none
    key: <base64 of the 32 private bytes>

or, with a passphrase, `protection: scrypt n=131072 r=8 p=1 aes-256-gcm` (RFC 7914; NIST SP 800-38D), the lines `salt`
(16 bytes) and `nonce` (12 bytes), and as `key` the ciphertext and its tag (48 bytes).  The additional data of the
cipher are all bytes of the file before the last line, so that nothing in it can be changed unseen.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import secrets
import stat
import unicodedata
from pathlib import Path
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from splitsec.errors import KeyFileError

__all__ = ["is_protected", "new_key", "parse_public", "public_of", "public_text", "read_key", "read_public"]

KEY_BYTES: Final = 32  # RFC 7748, section 5
SALT_BYTES: Final = 16
NONCE_BYTES: Final = 12  # NIST SP 800-38D, section 5.2.1.1
TAG_BYTES: Final = 16
SCRYPT_N: Final = 2**17  # with r = 8: 128 MiB and about half a second; OWASP's first choice for scrypt
SCRYPT_R: Final = 8
SCRYPT_P: Final = 1
SCRYPT_MEMORY: Final = 2**30  # bytes; a file that asks for more (128 * n * r) is refused before anything is computed
SCRYPT_WORK: Final = 2**27  # n * r * p; a file that asks for more is refused: it would take minutes
FILE_BYTES: Final = 4096

PREFIX: Final = "x25519:"
_HEAD = "splitsec private key"
_VERSION = "1"
_SCRYPT = re.compile(r"scrypt n=([1-9][0-9]{0,9}) r=([1-9][0-9]{0,3}) p=([1-9][0-9]{0,3}) aes-256-gcm")
_P = 2**255 - 19  # RFC 7748, section 4.1


# Public keys


def public_text(public: bytes) -> str:
    """The text form of a public key, as it stands in graph files: ``x25519:`` and base64."""
    return PREFIX + base64.b64encode(public).decode("ascii")


def public_of(private: bytes) -> bytes:
    """The public key, 32 bytes, that belongs to the private key ``private``, 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def parse_public(text: str) -> bytes:
    """The public key, 32 bytes, that ``text`` spells; a ``KeyFileError`` where it is none.

    One key has one text: encodings that RFC 7748 would reduce to another, and the points of small order that would make
    every shared secret zero (RFC 7748, section 6.1), are refused.
    """
    expected, fix = '"x25519:" and 44 characters of base64', "paste the line that `splitsec keys new` printed"
    if not text.startswith(PREFIX):
        raise KeyFileError(f"a public key that does not begin with {PREFIX}", expected=expected, fix=fix)
    try:
        public = base64.b64decode(text[len(PREFIX) :], validate=True)
    except (binascii.Error, ValueError):
        raise KeyFileError("a public key that is not base64", expected=expected, fix=fix) from None
    if len(public) != KEY_BYTES:
        raise KeyFileError(f"a public key of {len(public)} bytes", expected=f"{KEY_BYTES} bytes in base64", fix=fix)
    if public_text(public) != text or int.from_bytes(public, "little") >= _P:
        raise KeyFileError("a public key in a form that is not the only one it has", expected=expected, fix=fix)
    try:
        X25519PrivateKey.from_private_bytes(bytes(KEY_BYTES)).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise KeyFileError(
            "a public key of small order: with it, everybody would share one secret", expected=expected, fix=fix
        ) from None
    return public


# Key files


class _Contents(NamedTuple):
    """A key file that has been read and not yet opened."""

    public: bytes
    bound: bytes  # everything before the last line
    scrypt: tuple[int, int, int] | None  # n, r, p; None: not protected
    salt: bytes
    nonce: bytes
    key: bytes

    def __repr__(self) -> str:
        return f"_Contents({public_text(self.public)})"


def new_key(path: str | Path, passphrase: str | None = None) -> str:
    """Make a key pair, write its private half to a new file at ``path``, and return the public half as text.

    The file has mode 0600 from its first moment.  It is never written over another: ``KeyFileError`` if ``path``
    exists.
    """
    file = Path(path)
    private = X25519PrivateKey.generate().private_bytes_raw()
    public = public_text(public_of(private))
    text = f"{_HEAD}: {_VERSION}\npublic: {public}\n"
    if passphrase is None:
        text += f"protection: none\nkey: {_base64(private)}\n"
    else:
        salt, nonce = secrets.token_bytes(SALT_BYTES), secrets.token_bytes(NONCE_BYTES)
        text += f"protection: scrypt n={SCRYPT_N} r={SCRYPT_R} p={SCRYPT_P} aes-256-gcm\n"
        text += f"salt: {_base64(salt)}\nnonce: {_base64(nonce)}\n"
        secret = _stretched(_encoded(passphrase, file), salt, (SCRYPT_N, SCRYPT_R, SCRYPT_P))
        text += f"key: {_base64(AESGCM(secret).encrypt(nonce, private, text.encode('ascii')))}\n"
    _write_new(file, text.encode("ascii"))
    return public


def read_key(path: str | Path, passphrase: str | None = None) -> bytes:
    """The private key, 32 bytes, in the file at ``path``; ``passphrase`` is used only where the file is protected.

    Raises ``KeyFileError`` if anybody but its owner may touch the file, if it belongs to somebody else, if the
    passphrase does not open it, or if it is not a key file.
    """
    file = Path(path)
    found = _read(file)
    private = found.key
    if found.scrypt is not None:
        if passphrase is None:
            raise KeyFileError(
                "the key is protected by a passphrase, and none was given",
                file=file,
                expected="the passphrase that was set when the key was made",
                fix="set SPLITSEC_PASSPHRASE, or use --passphrase-fd, or start from a terminal to be asked",
            )
        secret = _stretched(_encoded(passphrase, file), found.salt, found.scrypt)
        try:
            private = AESGCM(secret).decrypt(found.nonce, found.key, found.bound)
        except InvalidTag:
            raise KeyFileError(
                "the passphrase does not open the key",
                file=file,
                expected="the passphrase that was set when the key was made, and a file that nobody has changed",
                fix="try again; without it the key is lost: make a new one with `splitsec keys new`",
            ) from None
    if public_of(private) != found.public:
        raise _not_a_key_file(file, "`public` does not belong to `key`", 2)
    return private


def read_public(path: str | Path) -> str:
    """The public key, as text, that the key file at ``path`` states; no passphrase is needed to read it."""
    file = Path(path)
    found = _read(file)
    if found.scrypt is None and public_of(found.key) != found.public:
        raise _not_a_key_file(file, "`public` does not belong to `key`", 2)
    return public_text(found.public)


def is_protected(path: str | Path) -> bool:
    """Whether a passphrase is needed to open the key file at ``path``."""
    return _read(Path(path)).scrypt is not None


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _encoded(passphrase: str, file: Path) -> bytes:
    if not passphrase:
        raise KeyFileError("the passphrase is empty", file=file, expected="at least one character", fix="choose one")
    try:
        return unicodedata.normalize("NFC", passphrase).encode("utf-8")  # one passphrase, whichever keyboard typed it
    except UnicodeEncodeError:
        raise KeyFileError("the passphrase is not text", file=file, expected="UTF-8", fix="choose another") from None


def _stretched(passphrase: bytes, salt: bytes, scrypt: tuple[int, int, int]) -> bytes:
    n, r, p = scrypt
    return Scrypt(salt=salt, length=KEY_BYTES, n=n, r=r, p=p).derive(passphrase)


def _write_new(file: Path, contents: bytes) -> None:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise KeyFileError(
            "there is a file already, and a key is never written over another",
            file=file,
            expected="a name that is free",
            fix="choose another --out, or move the old key away",
        ) from None
    except OSError as reason:
        raise KeyFileError(
            f"cannot be written: {reason.strerror}",
            file=file,
            expected="a folder that you may write to",
            fix="check --out",
        ) from None
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), 0o600)  # whatever the umask took away
            stream.write(contents)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException as reason:
        with contextlib.suppress(OSError):
            file.unlink()
        if isinstance(reason, OSError):
            raise KeyFileError(
                f"cannot be written: {reason.strerror}",
                file=file,
                expected="room on the disk",
                fix="make room, try again",
            ) from None
        raise


def _read(file: Path) -> _Contents:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise KeyFileError(
            "there is no such file", file=file, expected="a private key file", fix="make one with `splitsec keys new`"
        ) from None
    except OSError as reason:
        raise KeyFileError(
            f"cannot be read: {reason.strerror}", file=file, expected="a private key file that is yours"
        ) from None
    try:
        _check_access(file, os.fstat(descriptor))  # of the open file: nobody can swap it in between
        raw = os.read(descriptor, FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    return _parsed(file, raw)


def _check_access(file: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise KeyFileError("not a regular file", file=file, expected="a private key file", fix="check the path")
    if status.st_uid != os.geteuid():
        raise KeyFileError(
            f"the file belongs to user {status.st_uid}, and you are {os.geteuid()}",
            file=file,
            expected="a private key of your own",
            fix="run as the user that made the key, or make a new one with `splitsec keys new`",
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise KeyFileError(
            f"others may use the file (mode {mode:04o})",
            file=file,
            expected="mode 0600: only its owner",
            fix=f"run `chmod 600 {file}`; if others could have read it, make a new key",
        )


def _not_a_key_file(file: Path, seen: str, line: int | None = None) -> KeyFileError:
    return KeyFileError(
        f"not a splitsec key file: {seen}",
        file=file,
        line=line,
        expected="a file that `splitsec keys new` wrote",
        fix="check the path, or restore the file from a backup",
    )


def _parsed(file: Path, raw: bytes) -> _Contents:
    """The contents of a key file; its errors tell what is wrong, and never what stands there."""
    if not raw.isascii() or not raw.endswith(b"\n") or len(raw) > FILE_BYTES:
        raise _not_a_key_file(file, "not some lines of ASCII text")
    lines = raw.decode("ascii").removesuffix("\n").split("\n")
    head, _, version = lines[0].partition(": ")
    if head != _HEAD:
        raise _not_a_key_file(file, f"the first line is not `{_HEAD}: {_VERSION}`", 1)
    if version != _VERSION:
        raise KeyFileError(
            "another version of the key file format",
            file=file,
            line=1,
            expected=f"version {_VERSION}",
            fix="install the splitsec that wrote it",
        )
    protection = lines[2].partition(": ")[2] if len(lines) > 2 else ""
    protected = protection != "none"
    names = ("public", "protection", "salt", "nonce", "key") if protected else ("public", "protection", "key")
    if tuple(line.partition(": ")[0] for line in lines[1:]) != names:
        raise _not_a_key_file(file, "the lines are not those of a key file")
    values = {name: line.partition(": ")[2] for name, line in zip(names, lines[1:], strict=True)}
    try:
        public = parse_public(values["public"])
    except KeyFileError as reason:
        raise _not_a_key_file(file, reason.seen, 2) from None
    sizes = {"key": KEY_BYTES}
    if protected:
        sizes = {"salt": SALT_BYTES, "nonce": NONCE_BYTES, "key": KEY_BYTES + TAG_BYTES}
    decoded: dict[str, bytes] = {}
    for name, size in sizes.items():
        try:
            decoded[name] = base64.b64decode(values[name], validate=True)
        except (binascii.Error, ValueError):
            decoded[name] = b""
        if len(decoded[name]) != size:
            raise _not_a_key_file(file, f"`{name}` is not {size} bytes in base64", names.index(name) + 2)
    return _Contents(
        public,
        raw[: raw.rindex(b"\nkey: ") + 1],
        _scrypt_numbers(file, protection) if protected else None,
        decoded.get("salt", b""),
        decoded.get("nonce", b""),
        decoded["key"],
    )


def _scrypt_numbers(file: Path, protection: str) -> tuple[int, int, int]:
    found = _SCRYPT.fullmatch(protection)
    if found is None:
        raise _not_a_key_file(file, "an unknown protection", 3)
    n, r, p = (int(number) for number in found.groups())
    if n < 2**14 or n & (n - 1) or 128 * n * r > SCRYPT_MEMORY or n * r * p > SCRYPT_WORK:
        raise KeyFileError(
            f"scrypt with n={n} r={r} p={p}",
            file=file,
            line=3,
            expected=f"n a power of two from 16384, at most {SCRYPT_MEMORY // 2**20} MiB, and a minute of work",
            fix="make a new key with `splitsec keys new`",
        )
    return n, r, p
