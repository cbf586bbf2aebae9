"""The documentation is true: bytes are recomputed, snippets run, and whatever is named exists.

Here: the worked example of docs/protocol.md against splitsec's machines and against a second implementation, written
from that page alone; the snippets of docs/api.md; docs/errors.md against the error tree, both ways; every test, file,
command and link that a page names; the limits that docs/protocol.md lists.  Not here: docs/graph-file.md
(tests/splitsec/test_reference.py), which is generated.
"""

from __future__ import annotations

import ast
import hashlib
import hmac
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import pytest
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from splitsec import errors
from splitsec.contract import canonical_bytes, digest
from splitsec.graph import Graph, parse_graph
from splitsec.messages import Message, encode
from splitsec.plan import make_plan
from splitsec.transports import limits
from splitsec.transports.channel import Channel, Outgoing
from splitsec.transports.handshake import MAX_FRAME, Initiator, Responder
from splitsec.transports.session import Session
from splitsec.transports.wire import CloseCode

TREE: Final = Path(__file__).parents[2]
DOCS: Final = TREE / "docs"
PAGES: Final = (TREE / "README.md", *sorted(DOCS.glob("*.md")))


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> dict[str, str]:
    """Fenced blocks of ``language`` by the name that follows it, e.g. ```` ```hex hello ````."""
    return dict(re.findall(rf"^```{language} (\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


# --- docs/protocol.md, the worked example


@pytest.fixture(scope="module")
def example() -> dict[str, bytes]:
    """Every block of hexadecimal digits in the worked example, by name."""
    return {name: bytes.fromhex(body) for name, body in blocks(text_of("protocol.md"), "hex").items()}


@pytest.fixture(scope="module")
def graph() -> Graph:
    text = text_of("protocol.md")
    return parse_graph(re.findall(r"^```yaml\n(.*?)^```$", text[text.index("## Worked example") :], re.M | re.S)[0])


A_STATIC, B_STATIC, A_EPHEMERAL, B_EPHEMERAL = (bytes([value]) * 32 for value in (0xA1, 0xB2, 0x11, 0x22))


def public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def test_the_canonical_bytes_and_the_digest_of_the_example(graph: Graph, example: dict[str, bytes]) -> None:
    written = blocks(text_of("protocol.md"), "text")["canonical"].replace("\n", "").encode()
    assert written == canonical_bytes(graph)
    assert example["digest"] == hashlib.sha256(written).digest() == digest(graph)


def lend(size: int) -> memoryview:
    return memoryview(bytearray(size))


def frames(sender: Channel, receiver: Channel) -> list[bytes]:
    """What ``sender`` has to send, each frame received by ``receiver`` before the next is made."""
    sent = []
    for frame in sender.frames_to_send(lend):
        sent.append(bytes(frame))
        receiver.receive(memoryview(bytearray(frame)), 0.0)
    return sent


def test_the_frames_of_the_example_are_those_of_our_machines(graph: Graph, example: dict[str, bytes]) -> None:
    def channel(party: str, handshake: Initiator | Responder) -> Channel:
        lanes = {number: lane.max_body for (_, number), lane in make_plan(graph, party).lanes_in.items()}
        return Channel(Session(handshake, now=0.0, lost_after=20.0), lanes)

    bound = digest(graph)
    clinic = channel("clinic-a", Initiator(A_STATIC, public(B_STATIC), bound, lambda n: A_EPHEMERAL[:n]))
    server = channel("server", Responder(B_STATIC, bound, {public(A_STATIC)}, lambda n: B_EPHEMERAL[:n]))
    assert frames(clinic, server) == [example["hello"]]
    assert frames(server, clinic) == [example["accept"]]
    assert clinic.session.handshake_hash == server.session.handshake_hash == example["handshake-hash"]
    assert frames(clinic, server) == [example["ready-frame"]]
    assert frames(server, clinic) == [example["grant-frame"]]
    counts = {"say": "counts", "stream": 0, "train": 2, "test": 0, "predict": 0}
    for lane, name, message in (
        (0, "counts", Message("control", facts=counts)),
        (18, "labels", Message("labels", (0, 0), tensors={"": torch.tensor([1, 0])})),
        (16, "activation", Message("activation", (0, 0), tensors={"": torch.tensor([[1.0, 2.0], [3.0, -4.0]])})),
    ):
        header, body = encode(message)
        assert example[f"{name}-message"] == header + b"".join(body)
        clinic.send(Outgoing(lane, header, body))
        assert frames(clinic, server) == [example[f"{name}-frame"]]
    clinic.close(CloseCode.NORMAL)
    assert frames(clinic, server) == [example["close-frame"]]


class SecondImplementation:
    """The initiator's side of docs/protocol.md, sections 3 and 4, from that page and the Noise specification alone."""

    def __init__(self, static: bytes, ephemeral: bytes, responder: bytes, bound: bytes) -> None:
        self.s, self.e, self.rs = static, ephemeral, responder
        name = b"Noise_IK_25519_AESGCM_SHA256"
        self.h = self.ck = name.ljust(32, b"\0")
        self.bound = bound
        self.mix_hash(b"splitsec/1 " + bound)
        self.mix_hash(responder)

    def mix_hash(self, data: bytes) -> None:
        self.h = hashlib.sha256(self.h + data).digest()

    def mix_dh(self, private: bytes, other: bytes) -> None:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(other))
        self.ck, self.k = self.hkdf(secret)
        self.n = 0

    def hkdf(self, material: bytes) -> tuple[bytes, bytes]:
        key = hmac.digest(self.ck, material, "sha256")
        first = hmac.digest(key, b"\x01", "sha256")
        return first, hmac.digest(key, first + b"\x02", "sha256")

    def sealed(self, plain: bytes) -> bytes:
        out = AESGCM(self.k).encrypt(struct.pack(">4xQ", self.n), plain, self.h)
        self.n += 1
        self.mix_hash(out)
        return out

    def opened(self, cipher: bytes) -> bytes:
        out = AESGCM(self.k).decrypt(struct.pack(">4xQ", self.n), cipher, self.h)
        self.n += 1
        self.mix_hash(cipher)
        return out

    def hello(self) -> bytes:
        e = public(self.e)
        self.mix_hash(e)
        self.mix_dh(self.e, self.rs)
        s = self.sealed(public(self.s))
        self.mix_dh(self.s, self.rs)
        return b"SPLITSEC\x01" + self.bound[:8] + e + s + self.sealed(b"")

    def answer(self, frame: bytes) -> tuple[bytes, bytes]:
        """The two keys of ``Split()``: ours, the peer's."""
        assert frame[0] == 1
        re_, rest = frame[1:33], frame[33:]
        self.mix_hash(re_)
        self.mix_dh(self.e, re_)
        self.mix_dh(self.s, re_)
        assert self.opened(rest) == b""
        return self.hkdf(b"")


def unsealed(key: bytes, first: int, frame: bytes) -> tuple[bytes, bytes, int]:
    """Chunk header, payload and the number of the next record, of a frame whose header is record ``first``."""
    assert frame[0] == 3
    cipher = AESGCM(key)
    header = cipher.decrypt(struct.pack(">4xQ", first), frame[1:41], b"\x03")
    if len(frame) == 41:
        return header, b"", first + 1
    return header, cipher.decrypt(struct.pack(">4xQ", first + 1), frame[41:], b""), first + 2


def test_the_example_follows_from_the_page_alone(example: dict[str, bytes]) -> None:
    other = SecondImplementation(A_STATIC, A_EPHEMERAL, public(B_STATIC), example["digest"])
    assert other.hello() == example["hello"]
    ours, theirs = other.answer(example["accept"])
    assert (ours, theirs) == (example["key-from-initiator"], example["key-from-responder"])
    assert other.h == example["handshake-hash"]

    assert unsealed(theirs, 0, example["grant-frame"]) == (example["grant-header"], b"", 1)
    record = 0
    for name in ("ready", "counts", "labels", "activation", "close"):
        header, payload, record = unsealed(ours, record, example[f"{name}-frame"])
        assert header == example[f"{name}-header"]
        assert payload == example.get(f"{name}-message", b"")
        kind, zero, lane, header_size, value, payload_size, number = struct.unpack(">BBHIQII", header)
        assert (zero, payload_size, number) == (0, len(payload), 0)
        if kind == 2:
            assert header_size + value == len(payload)
            assert lane == {"counts": 0, "labels": 18, "activation": 16}[name]
    assert record == 8
    with pytest.raises(InvalidTag):
        unsealed(ours, 1, example["ready-frame"])


def test_the_limits_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \| (?:yes|no|by)", text_of("protocol.md"), re.MULTILINE))
    mib = 1 << 20
    assert {name: rows.get(name) for name in rows} == {
        "frame": f"{limits.FRAME_MAX:,}",
        "chunk": f"{limits.CHUNK_MAX // mib} MiB",
        "header of a message": f"{limits.HEADER_MAX // mib} MiB",
        "handshake frame": f"{MAX_FRAME}",
        "records under one key": f"2^{limits.COUNTER_LIMIT.bit_length() - 1}",
        "lanes of a channel": f"{limits.LANES_MAX:,}",
        "body of a message": "by lane, see section 6",
        "window": f"{limits.WINDOW // mib} MiB",
        "held for one forwarded pair and direction": f"{limits.RELAY_BYTES // mib} MiB",
        "waiting to be sent to one peer, before `send` blocks": f"{limits.OUTBOX_BYTES // mib} MiB",
        "frames queued in ZeroMQ for a connection and direction": f"{limits.QUEUED_FRAMES}",
        "handshakes in flight at a listener": f"{limits.STRANGERS_MAX}; then the oldest is dropped",
        "handshakes that a listener computes": f"{limits.HANDSHAKES_BURST:g} at once, "
        f"{limits.HANDSHAKES_PER_SECOND:g} a second",
        "time for a handshake": f"{limits.ANSWER_SECONDS:g} s",
        "lines that strangers cause in the log": f"{limits.LOGS_BURST:g} at once, 1 in {1 / limits.LOGS_PER_SECOND:g} s",
        "messages that wait on one lane for the computing thread": "65,536",
    }


# --- docs/errors.md


def error_classes() -> dict[str, type[errors.SplitsecError]]:
    return {name: getattr(errors, name) for name in errors.__all__}


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^### `?(\w+)`?.*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_error_has_a_section_and_every_section_an_error() -> None:
    assert set(sections(text_of("errors.md"))) == set(error_classes())


@pytest.mark.parametrize("name", sorted(error_classes()))
def test_a_section_says_what_the_class_is(name: str) -> None:
    section, kind = sections(text_of("errors.md"))[name], error_classes()[name]
    parent = kind.__mro__[2 if kind.__mro__[1].__name__.startswith("_") else 1]
    code = "of the party's own error" if kind is errors.PartyFailed else str(kind.exit_code)
    assert f"Exit code {code}" in section
    if parent is not Exception:
        assert f"a `{parent.__name__}`" in section, "its parent in the tree"
    if kind not in (errors.SplitsecError, errors.UserError, errors.Refusal, errors.PeerError):
        assert "**Causes.**" in section and "**What to do.**" in section


# --- docs/api.md


def test_the_snippets_of_the_api_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, in an empty folder; files that the page shows are written first."""
    text = text_of("api.md")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(TREE))
    files = list(re.finditer(r"^`([\w/.-]+)`:\n\n```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    for file in files:
        Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(file[1]).write_text(file[2])
    namespace: dict[str, Any] = {"__name__": "snippets"}
    threads = torch.get_num_threads()
    shown = {file.end() for file in files}
    found = [
        snippet
        for snippet in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if snippet.end() not in shown
    ]
    assert len(found) >= 6
    try:
        for snippet in found:
            line = text.count("\n", 0, snippet.start()) + 1
            exec(compile("\n" * line + snippet[1], str(DOCS / "api.md"), "exec"), namespace)
    finally:
        torch.set_num_threads(threads)


def test_the_api_page_shows_every_public_name() -> None:
    import splitsec

    text = text_of("api.md")
    public_names = set(splitsec.__all__) - {"__version__"}
    assert [name for name in sorted(public_names) if f"`{name}" not in text] == []


# --- what pages name


def node_ids(text: str) -> Iterator[tuple[str, str]]:
    """File and name of every pytest node id in ``text``; one that begins with ``::`` is in the file named before it."""
    file = ""
    for found in re.finditer(r"`((?:tests/[\w/.-]+\.py)?)::([\w:]+)(?:\[[^\]]*\])?`", text):
        file = found[1] or file
        yield file, found[2]


def defined(file: Path) -> set[str]:
    names: set[str] = set()

    def collect(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}::")
            elif isinstance(node, ast.FunctionDef):
                names.add(prefix + node.name)

    collect(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    missing = [
        f"{file}::{name}"
        for file, name in node_ids(page.read_text(encoding="utf-8"))
        if not (TREE / file).is_file() or name not in defined(TREE / file)
    ]
    assert missing == []


def test_every_claim_of_the_threat_model_names_a_test_or_says_that_nothing_stops_it() -> None:
    rows = [row for row in text_of("threat-model.md").splitlines() if re.match(r"\| T\d", row)]
    assert len(rows) > 30
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 4, row
        assert "`" in cells[3] or cells[2].startswith("**Nothing") or cells[2].startswith("Not by"), row
    numbers = [row.split("|")[1].strip() for row in rows]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_file_that_a_page_names_exists(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    for path in re.findall(r"`((?:splitsec|transports|privacy|examples|docs|tests)/[\w/.-]+\.(?:py|md|yaml|svg))`", text):
        if not (TREE / path).is_file():
            missing.append(path)
    assert missing == []


def anchors(file: Path) -> set[str]:
    """Anchors as GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_reached_from_the_readme() -> None:
    readme = (TREE / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme] == []


def test_the_readme_is_short() -> None:
    assert len((TREE / "README.md").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("picture", sorted(DOCS.glob("*.svg")), ids=lambda picture: picture.name)
def test_a_picture_stands_alone(picture: Path) -> None:
    root = ElementTree.parse(picture).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = picture.read_text(encoding="utf-8")
    assert not re.search(r"<script|href=|url\((?!#)", text), "a picture loads nothing from elsewhere and runs nothing"
    assert root.find("{http://www.w3.org/2000/svg}title") is not None


def commands() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every ``splitsec ...`` line in a console block of a page, with the options it uses."""
    for page in PAGES:
        for block in re.findall(r"^```console\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                found = re.search(r"(?:^|\$ |&& )splitsec (\w+)(.*)", line.split("#")[0])
                if found:
                    yield found[1], tuple(re.findall(r"(--[\w-]+)", found[2]))


def test_every_command_line_that_a_page_shows_is_understood() -> None:
    used: dict[str, set[str]] = {}
    for command, options in commands():
        used.setdefault(command, set()).update(options)
    assert {"simulate", "join", "keys", "predict", "check"} <= set(used)
    for command, options in used.items():
        arguments = [command, "new"] if command == "keys" else [command]
        ended = subprocess.run(
            [sys.executable, "-m", "splitsec", *arguments, "--help"], capture_output=True, text=True, cwd=TREE
        )
        assert ended.returncode == 0, ended.stderr
        assert [option for option in options if option not in ended.stdout] == [], command
