"""The documentation is true: bytes are recomputed, snippets run, and whatever is named exists.

Here: the worked example of docs/protocol.md against splitsec's machines and against a second implementation, written
from that page alone, and the order of turns; the graph of docs/circuits.md; the snippets of docs/api.md; docs/errors.md
against the error tree, both ways; every test, file, command and link that a page names; the limits that
docs/protocol.md lists.  Not here: docs/threat-model.md (tests/docs/test_threat_model.py), and docs/graph-file.md
(tests/splitsec/test_reference.py), which is generated.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import hmac
import json
import os
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

from splitsec import errors, turns
from splitsec.contract import canonical_bytes, digest
from splitsec.graph import Graph, parse_graph
from splitsec.guard import SMALL_HEADER
from splitsec.messages import Message, encode
from splitsec.plan import Lane, make_plan
from splitsec.relay import neighbours_of
from splitsec.transports import limits
from splitsec.transports.channel import Channel, Outgoing
from splitsec.transports.handshake import MAX_FRAME, Initiator, Responder
from splitsec.transports.hybrid import combine
from splitsec.transports.session import Session
from splitsec.transports.wire import CloseCode
from tests.conftest import free_port

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
A_RUN, B_RUN = (bytes([value]) * 16 for value in (0xC1, 0xD2))


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
    bound = digest(graph)
    hybrid = graph.post_quantum
    assert not hybrid

    def channel(party: str, run: bytes, handshake: Initiator | Responder) -> Channel:
        lanes = {number: lane.max_body for (_, number), lane in make_plan(graph, party).lanes_in.items()}
        end = Channel(lanes, run=run, window=limits.LINK_WINDOW)
        end.carry(Session(handshake, now=0.0, lost_after=20.0, greet=lambda peer, theirs: end.ready()))
        return end

    dials = Initiator(A_STATIC, public(B_STATIC), bound, lambda n: A_EPHEMERAL[:n], hybrid)
    listens = Responder(B_STATIC, bound, {public(A_STATIC)}, lambda n: B_EPHEMERAL[:n], hybrid)
    clinic, server = channel("clinic-a", A_RUN, dials), channel("server", B_RUN, listens)
    assert frames(clinic, server) == [example["hello"]]
    assert frames(server, clinic) == [example["accept"]]
    assert clinic.session is not None
    assert server.session is not None
    assert clinic.session.handshake_hash == server.session.handshake_hash == example["handshake-hash"]
    assert frames(clinic, server) == [example["ready-frame"]]
    assert frames(server, clinic) == [example["answer-frame"]]
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
    assert frames(server, clinic) == [example["reply-frame"]]


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
    header = cipher.decrypt(struct.pack(">4xQ", first), frame[1:49], b"\x03")
    if len(frame) == 49:
        return header, b"", first + 1
    return header, cipher.decrypt(struct.pack(">4xQ", first + 1), frame[49:], b""), first + 2


@pytest.mark.threat("T7")
def test_the_example_follows_from_the_page_alone(example: dict[str, bytes]) -> None:
    other = SecondImplementation(A_STATIC, A_EPHEMERAL, public(B_STATIC), example["digest"])
    assert other.hello() == example["hello"]
    ours, theirs = other.answer(example["accept"])
    assert (ours, theirs) == (example["key-from-initiator"], example["key-from-responder"])
    assert other.h == example["handshake-hash"]

    assert unsealed(theirs, 0, example["answer-frame"]) == (example["answer-header"], example["answer-message"], 2)
    assert unsealed(theirs, 2, example["reply-frame"]) == (example["reply-header"], b"", 3)
    assert example["ready-message"] == A_RUN + bytes(16)
    assert example["answer-message"] == B_RUN + bytes(16)  # nothing has been exchanged yet
    record = 0
    for name in ("ready", "counts", "labels", "activation", "close"):
        header, payload, record = unsealed(ours, record, example[f"{name}-frame"])
        assert header == example[f"{name}-header"]
        assert payload == example.get(f"{name}-message", b"")
        kind, zero, lane, header_size, value, payload_size, number, received = struct.unpack(">BBHIQIIQ", header)
        assert (zero, payload_size, number, received) == (0, len(payload), 0, 0)
        if kind == 2:
            assert header_size + value == len(payload)
            assert lane == {"counts": 0, "labels": 18, "activation": 16}[name]
    assert record == 9
    assert struct.unpack(">BBHIQIIQ", example["reply-header"])[-1] == 3  # chunks, all acknowledged
    with pytest.raises(InvalidTag):
        unsealed(ours, 1, example["ready-frame"])


def test_the_step_with_ml_kem_of_the_example(example: dict[str, bytes]) -> None:
    """Once with our own code, once from the page."""
    h, k1, k2 = (example[name] for name in ("handshake-hash", "key-from-initiator", "key-from-responder"))
    secret, info = bytes([0x33]) * 32, b"splitsec/1 X25519+ML-KEM-768"
    shown = example["hybrid-key-from-initiator"], example["hybrid-key-from-responder"]
    assert combine(h, secret, k1, k2, info) == shown
    prk = hmac.digest(h, secret + k1 + k2, "sha256")
    there = hmac.digest(prk, info + b"\x01", "sha256")
    assert (there, hmac.digest(prk, there + info + b"\x02", "sha256")) == shown


def test_the_limits_are_those_of_the_code() -> None:
    assert limits.CIRCUIT_CELLS == 4  # in words below
    text = text_of("protocol.md")
    table = text[text.index("## 10. Limits") : text.index("## Worked example")]
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \| (?:yes|no|by)", table, re.MULTILINE))
    mib = 1 << 20
    assert {name: rows.get(name) for name in rows} == {
        "frame": f"{limits.FRAME_MAX:,}",
        "chunk": f"{limits.CHUNK_MAX // mib} MiB",
        "header of a message": f"{limits.HEADER_MAX // mib} MiB",
        "handshake frame": f"{MAX_FRAME}",
        "records under one key": f"2^{limits.COUNTER_LIMIT.bit_length() - 1}",
        "lanes of a channel": f"{limits.LANES_MAX:,}",
        "body of a message": "by lane, see section 6",
        "window of a session": f"{limits.LINK_WINDOW // mib} MiB",
        "hops of a circuit": f"{limits.HOPS_MAX}, the far end included",
        "cell": f"{limits.SMALL_CELL:,} to {limits.CELL_MAX:,} bytes; "
        "less where many circuits share a relay, see section 7",
        "held at a relay for one circuit and direction": "four of the largest cells",
        "circuits that go on from one neighbour to another": "twice those that the graph has",
        "circuits over one link": f"twice those that the graph has through this party, and {limits.CIRCUITS_SPARE}; "
        f"at the far end of an anonymous group {limits.CROWD_MAX:,} more",
        "channels of one anonymous group at a time": f"{limits.CROWD_MAX:,}",
        "bytes under one key, before the next": f"{limits.REKEY_BYTES >> 30} GiB",
        "time under one key, before the next": f"{limits.REKEY_SECONDS:g} s",
        "chunks sent and not acknowledged": f"{limits.UNACKED_CHUNKS:,}",
        "waiting for one peer, or for its acknowledgement, before an exchange waits": (
            f"{limits.OUTBOX_BYTES // mib} MiB"
        ),
        "frames queued for a connection and direction, with libzmq or in memory": f"{limits.QUEUED_FRAMES}",
        "strangers connected to a listener": (
            f"{limits.STRANGERS_CONNECTED_MAX}, or a quarter of the descriptors allowed; then the oldest goes"
        ),
        "bytes that a stranger may send": f"{limits.STRANGER_BYTES // 1024} KiB",
        "time for a stranger to prove a key": f"{limits.STRANGER_SECONDS:g} s",
        "handshakes in flight at a listener": f"{limits.STRANGERS_MAX}; then the oldest is dropped",
        "handshakes that a listener computes": f"{limits.HANDSHAKES_BURST:g} at once, "
        f"{limits.HANDSHAKES_PER_SECOND:g} a second",
        "time for a handshake": f"{limits.ANSWER_SECONDS:g} s",
        "lines that strangers cause in the log": f"{limits.LOGS_BURST:g} at once, "
        f"1 in {1 / limits.LOGS_PER_SECOND:g} s",
        "messages that wait on one lane for the computing thread": (
            "cuts and labels: micro-batches · streams · (parties + 1); weights 2; order 8; "
            f"others {Lane(0, '', 'control', '', 0).most_waiting:,}"
        ),
        "header of a message, but of weights and order": f"{SMALL_HEADER // 1024} KiB",
    }


def test_the_order_of_turns_follows_from_the_page_alone() -> None:
    """Section 9 of docs/protocol.md, from RFC 5869 up."""
    text = text_of("protocol.md")
    assert all(text.count(f"`splitsec/{name}/` ||") == 1 for name in ("run", "turns", "rows"))

    def expand(key: bytes, info: bytes, size: int) -> bytes:
        out = block = b""
        for number in range(1, -(-size // 32) + 1):
            block = hmac.digest(key, block + info + bytes([number]), "sha256")
            out += block
        return out[:size]

    def permutation(count: int, purpose: bytes) -> tuple[int, ...]:
        key = expand(hmac.digest(run, private, "sha256"), purpose, 32)
        words = (
            word
            for block in range(1000)
            for word in struct.unpack(">2040I", expand(key, struct.pack(">I", block), 8160))
        )
        places = list(range(count))
        for last in range(count - 1, 0, -1):
            word = next(word for word in words if word < 2**32 - 2**32 % (last + 1))
            chosen = word % (last + 1)
            places[last], places[chosen] = places[chosen], places[last]
        return tuple(places)

    private, bound, drawn = (bytes([value]) * 32 for value in (0x51, 0x52, 0x53))
    run = hashlib.sha256(b"splitsec/run/" + bound + drawn + private).digest()
    assert turns.run_of(bound, [drawn, private]) == run
    for epoch in range(20):
        assert turns.order(private, run, epoch, 7) == permutation(7, b"splitsec/turns/" + struct.pack(">Q", epoch))
    purpose = b"splitsec/rows/" + struct.pack(">QQ", 3, 2) + b"train"
    assert tuple(turns.rows(private, run, "train", 3, 2, 5000)) == permutation(5000, purpose)


# --- docs/circuits.md


def test_the_graph_of_the_circuits_page_is_one() -> None:
    (shown,) = re.findall(r"^```yaml\n(splitsec: 1\n.*?)^```$", text_of("circuits.md"), re.MULTILINE | re.DOTALL)
    graph = parse_graph(shown)
    assert graph.anonymous == "clinics" and graph.far_ends == {"server"}
    assert neighbours_of(graph, "relay-1") == ("clinic-a", "clinic-b", "clinic-c", "relay-2")  # as the page says
    assert parse_graph(shown.replace(", anonymous: true", "").replace(", pseudonym: turn", "")).anonymous is None


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


# --- docs/quickstart.md


def test_the_pilot_of_the_quickstart_runs_as_shown(tmp_path: Path) -> None:
    """Keys, files and `join` commands of section 3, at two sites: two folders, one port of this machine."""
    text = text_of("quickstart.md")
    text = text[text.index("## 3. Two machines") :]

    def at(site: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "splitsec", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(TREE)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=tmp_path / site, stdout=pipe, stderr=pipe, text=True, env=environment)

    sites = {"clinic-a": "clinic", "server": "server"}
    pasted = dict(re.findall(r"^  ([\w-]+): \{key: \"(x25519:[^\"]+)\"\}$", text, re.MULTILINE))
    assert set(pasted) == set(sites)
    graph = re.findall(r"^```yaml\n# graph.yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0]
    for party, site in sites.items():
        (tmp_path / site / "parties").mkdir(parents=True)
        said, _ = at(site, "keys", "new", party, "--out", "parties").communicate(timeout=60)
        assert re.sub('x25519:[^"]+', "KEY", said) == f'  {party}: {{key: "KEY"}}\n'
        graph = graph.replace(pasted[party], said.split('"')[1])
    graph = graph.replace("server.example.org:7400", f"127.0.0.1:{free_port()}").replace(
        "0.0.0.0:7400", "127.0.0.1:PORT"
    )
    graph = graph.replace("PORT", graph.split("address: ")[1].split(":")[2].split('"')[0])
    site = ""
    for name, body in re.findall(r"^```(?:yaml|python)\n# (parties/\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        site = sites.get(Path(name).stem, site)  # a party's own file stands before its code
        (tmp_path / site / name).write_text(body)

    joins = [line.split() for line in re.findall(r"^(?:\$ )?splitsec (join .*)$", text, re.MULTILINE)]
    assert len(joins) == 4
    for pair in (joins[:2], joins[2:]):
        running = []
        for arguments in pair:
            site = sites[arguments[arguments.index("--party") + 1]]
            (tmp_path / site / "graph.yaml").write_text(graph)
            running.append(at(site, *arguments))
        for process in running:
            log = process.communicate(timeout=90)[1]
            assert process.returncode == 0, log
            if "trains trunk" in log:  # the numbers that the page shows
                losses = re.findall(r"epoch \d: server \w+ trunk: loss [\d.]+", log)
                shown = re.findall(r"epoch \d: server \w+ trunk: loss [\d.]+", text)
                assert shown and [line for line in shown if line not in losses] == []
    assert len(json.loads((tmp_path / "clinic/predicted/clinic-a/predicted_ids.json").read_text())) == 5
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.safetensors")) == [
        "clinic/trained/clinic-a/stem.safetensors",
        "server/predicted/server/predictions.safetensors",
        "server/trained/server/trunk.safetensors",
    ]


# --- what pages name


def node_ids(text: str) -> Iterator[tuple[str, str]]:
    """File and name of every pytest node id in ``text``; one that begins with ``::`` is in the file named before it."""
    file = ""
    for found in re.finditer(r"`((?:tests/[\w/.-]+\.py)?)::([\w:]+)(?:\[[^\]]*\])?`", text):
        file = found[1] or file
        yield file, found[2]


@functools.cache
def defined(file: Path) -> set[str]:
    names: set[str] = set()

    def collect(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                names.add(prefix + node.name)
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
    for path in re.findall(
        r"`((?:splitsec|transports|privacy|examples|docs|tests)/[\w/.-]+\.(?:py|md|yaml|svg))`", text
    ):
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
    for command, shown in used.items():
        arguments = [command, "new"] if command == "keys" else [command]
        ended = subprocess.run(
            [sys.executable, "-m", "splitsec", *arguments, "--help"], capture_output=True, text=True, cwd=TREE
        )
        assert ended.returncode == 0, ended.stderr
        assert [option for option in shown if not re.search(rf"{option}\b", ended.stdout)] == [], command


# --- docs/architecture.md


def imports_of(folder: str, package: str) -> dict[str, set[str]]:
    """Which files of ``folder`` import which, one room a file or a package; ``transports.x`` from ``splitsec/``."""
    found: dict[str, set[str]] = {}
    rooms = {
        path.stem if path.is_file() else f"{path.name}/"
        for path in (TREE / folder).iterdir()
        if not path.is_symlink() and (path.suffix == ".py" or (path / "__init__.py").is_file())
    } - {"__init__", "__main__"}
    for room in sorted(rooms):
        files = sorted((TREE / folder / room).glob("*.py")) if room.endswith("/") else [TREE / folder / f"{room}.py"]
        names: set[str] = set()
        for file in files:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith(f"{package}."):
                    below = node.module.removeprefix(package).removeprefix(".")
                    if below in ("", "transports"):
                        names |= {f"{below}.{alias.name}".removeprefix(".") for alias in node.names}
                    else:
                        names.add(below)
        shown = {
            name if name.startswith("transports.") else f"{first}/" if f"{first}/" in rooms else first
            for name in names
            for first in [name.partition(".")[0]]
        }
        found[room] = {name.removesuffix("/") for name in shown - {room}}
    return found


@pytest.mark.parametrize(("folder", "package"), [("splitsec", "splitsec"), ("transports", "splitsec.transports")])
def test_the_map_shows_every_file_and_what_it_imports(folder: str, package: str) -> None:
    text = text_of("architecture.md")
    start = text.rindex(f"\n`{folder}/`")
    table = text[text.index("| file |", start) :].split("\n\n")[0]
    shown: dict[str, set[str]] = {}
    for line in table.splitlines()[2:]:
        rooms, _, imports = (cell.strip() for cell in line.strip("|").split("|"))
        for room in re.findall(r"`([\w/]+)`", rooms):
            shown[room] = {name.strip() for name in imports.split(",") if name.strip()}
    real = imports_of(folder, package)
    assert set(shown) == set(real)
    for room in ("cli/",):
        shown.pop(room, None)
        real.pop(room, None)
    assert shown == real
