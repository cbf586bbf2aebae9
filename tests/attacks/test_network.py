"""Every case of network abuse on a small folder: what it costs, and in what words; and that who attacks does it well.

The runs are those of the command: real processes, real sockets, real keys that were stolen.  An impersonation that
fails proves little if it was clumsy: here each is shown to come through with the one secret that it lacks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from splitsec.attacks.arena import Ground
from splitsec.attacks.network import CASES, Line, Man, NetworkAbuse, forged_accept, forged_answer, forged_hello
from splitsec.attacks.outcome import Case, Outcome
from splitsec.graph import load_graph
from splitsec.nest import Nest
from splitsec.transports.errors import Damaged, Refused
from splitsec.transports.handshake import Initiator, Responder, State
from splitsec.transports.iothread import IOThread, Opened, Peer, Received
from splitsec.transports.layer import Asking
from splitsec.transports.noise import public_key_of
from tests.attacks.test_abuse import WITHOUT, small
from tests.conftest import PATIENCE

BROKE: Final = "(a record that is altered, or not the next one) and was made again"
WENT_ON: Final = "the run went on to weights equal to the last bit"
TURNED: Final = "server: turned somebody down: "
ENDED: Final = "the run ended; "

HELD: Final = {
    "tampering: an activation": BROKE,
    "tampering: a gradient": BROKE,
    "tampering: a header": BROKE,
    "dropping": BROKE,
    "truncation": "was made again",
    "reordering": BROKE,
    "replay: a frame": BROKE,
    "replay: a frame of an older connection": BROKE,
    "replay: a whole recorded connection": TURNED + "a record that is altered, or not the next one",
    "invention": BROKE,
    "cutting the cable for good": "was lost: the peer is gone: no connection that lasted for 3 s",
    "downgrade: version": "the two sides speak different versions of the splitsec protocol",
    "downgrade: no ML-KEM": TURNED + "a hello without an ML-KEM key, against the contract",
    "downgrade: another graph": TURNED + "handshake refused by us: the graphs differ",
    "a forged refusal": "its graph does not name our key",
    "impersonation: a fresh key": "the key that we expect there is not the key that it has",
    "impersonation: a stolen relay key": "the circuit through server ended (damaged)",
    "key-compromise impersonation: of the listener": "did not come up within 6 s",
    "key-compromise impersonation: of the dialer": TURNED + "a record that is altered, or not the next one",
    "a second process with a stolen key": "turned away: somebody who has the key of clinic-a",
}
"""What the operator reads."""

ENDS_IT: Final = {
    "cutting the cable for good",
    "downgrade: version",
    "a forged refusal",
    "impersonation: a fresh key",
    "impersonation: a stolen relay key",
    "key-compromise impersonation: of the listener",
}
"""Whoever is on the line can end a run; all others cost a try, or nothing."""


def abuse(folder: Path, nest: Nest, cases: Sequence[str] | None = None) -> Outcome:
    with Ground(folder) as ground:
        return NetworkAbuse(cases, nest).run(ground)


@pytest.fixture(scope="module")
def nest() -> Iterator[Nest]:
    with Nest() as nest:
        yield nest


@pytest.fixture(scope="module")
def outcome(nest: Nest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return abuse(small(tmp_path_factory.mktemp("network") / "small"), nest)


@pytest.fixture(scope="module")
def found(outcome: Outcome) -> dict[str, Case]:
    return {case.name: case for case in outcome.cases}


def test_every_case_is_tried(outcome: Outcome) -> None:
    assert [case.name for case in outcome.cases] == [case.name for case in CASES]
    assert {case.name for case in CASES} == HELD.keys()
    assert outcome.verdict == "refused"


@pytest.mark.threat("T10", "T12", "T13", "T14", "T16", "T19", "T93", "T126", "T127")
@pytest.mark.parametrize("name", HELD)
def test_nothing_is_read_or_altered_and_the_operator_reads_what_happened(name: str, found: dict[str, Case]) -> None:
    """Nothing leaves beyond a run in peace, nobody gets a session: else the judge says that, and not this."""
    assert found[name].held, found[name].seen
    assert HELD[name] in found[name].seen
    assert found[name].seen.startswith(ENDED) if name in ENDS_IT else found[name].seen.endswith(WENT_ON)


@pytest.mark.threat("T33")
def test_who_comes_with_a_stolen_key_drives_the_real_one_out_once_the_check_is_gone(nest: Nest, tmp_path: Path) -> None:
    """In the server's process alone: only its segment is built there."""
    folder = small(tmp_path / "small")
    file = folder / "parties" / "models.py"
    file.write_text(
        file.read_text()
        + WITHOUT.format(
            module="splitsec.transports.iothread",
            name="_Driver._greet_as_listener",
            check="if another or not state.channel.fits(theirs):",
            instead="if False:",
        )
    )
    (case,) = abuse(folder, nest, ["a second process with a stolen key"]).cases
    assert not case.held
    assert case.seen.startswith(ENDED), case.seen


# --- the line


class Counter(Man):
    """Lets everything pass, and counts."""

    def __init__(self) -> None:
        super().__init__(load_graph(Path("examples/vanilla/graph.yaml")), "server")
        self.seen: list[tuple[int, bool, int]] = []

    def passes(self, frame):  # type: ignore[no-untyped-def]
        self.seen.append((frame.connection, frame.to_listener, frame.number))
        return super().passes(frame)


def test_a_line_on_which_nobody_meddles_changes_nothing() -> None:
    keys, contract = [os.urandom(32) for _ in range(2)], os.urandom(32)
    publics = [public_key_of(key) for key in keys]
    man = Counter()
    with IOThread(
        private_key=keys[0], digest=contract, peers=[Peer(publics[1], lanes={1: 1 << 22})], listen="tcp://127.0.0.1:*"
    ) as listener:
        line = Line(listener.endpoint or "", man)
        peer = Peer(publics[0], dial=line.address, lanes={1: 1 << 22})
        with IOThread(private_key=keys[1], digest=contract, peers=[peer]) as dialer:
            assert listener.receive(PATIENCE) == Opened(publics[1])
            assert dialer.receive(PATIENCE) == Opened(publics[0])
            for body in (b"", b"x", os.urandom(3_000_000)):
                dialer.send(publics[0], 1, b"to", [body])
                assert listener.receive(PATIENCE) == Received(publics[1], 1, b"to", memoryview(body))
                listener.send(publics[1], 1, b"fro", [body])
                assert dialer.receive(PATIENCE) == Received(publics[0], 1, b"fro", memoryview(body))
        line.close()
    for direction in (True, False):
        numbers = [number for _, to_listener, number in man.seen if to_listener is direction]
        assert sorted(set(numbers)) == list(range(max(numbers) + 1))
        assert max(numbers) >= 6


# --- impersonations that lack nothing


def shared(private: bytes, public: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))


PARTS: Final = 8 + 1 + 8
"""Bytes of a hello in front of the ephemeral key."""


@pytest.mark.threat("T127")
@pytest.mark.parametrize("post_quantum", [True, False])
def test_a_forged_accept_lacks_one_secret(post_quantum: bool) -> None:
    """With DH(e of the dialer, s of the listener), which only the listener's key gives, it would be believed."""
    dialer, listener, contract = os.urandom(32), os.urandom(32), os.urandom(32)
    for es_is_known in (True, False):
        initiator = Initiator(dialer, public_key_of(listener), contract, post_quantum=post_quantum)
        initiator.start()
        (hello,) = initiator.frames_to_send()
        accept = forged_accept(
            hello,
            contract,
            dialer=public_key_of(dialer),
            listener=public_key_of(listener),
            stolen=dialer,
            es=shared(listener, hello[PARTS : PARTS + 32]) if es_is_known else shared(dialer, public_key_of(listener)),
            post_quantum=post_quantum,
        )
        if es_is_known:
            assert initiator.receive(accept).remote_static == public_key_of(listener)
        else:
            with pytest.raises(Damaged):
                initiator.receive(accept)
            assert initiator.state is State.FAILED


@pytest.mark.threat("T127")
@pytest.mark.parametrize("post_quantum", [True, False])
def test_a_hello_forged_with_the_listeners_key_is_taken_and_one_without_it_is_not(post_quantum: bool) -> None:
    dialer, listener, contract = os.urandom(32), os.urandom(32), os.urandom(32)
    keys = {"dialer": public_key_of(dialer), "listener": public_key_of(listener)}
    for stolen in (listener, os.urandom(32)):
        responder = Responder(listener, contract, [keys["dialer"]], post_quantum=post_quantum)
        ss = shared(stolen, keys["dialer"])
        hello = forged_hello(contract, ss=ss, post_quantum=post_quantum, **keys)
        if stolen is listener:
            assert responder.receive(hello).remote_static == keys["dialer"]
        else:
            with pytest.raises(Refused):
                responder.receive(hello)


@pytest.mark.threat("T126")
@pytest.mark.parametrize("post_quantum", [True, False])
def test_a_forged_far_end_lacks_one_secret(post_quantum: bool) -> None:
    hop, contract = os.urandom(32), os.urandom(32)
    for es_is_known in (True, False):
        asking = Asking(public_key_of(hop), contract, post_quantum=post_quantum)
        es = shared(hop, asking.message[:32]) if es_is_known else bytes(32)
        answer = forged_answer(public_key_of(hop), contract, asking.message, es=es, post_quantum=post_quantum)
        if es_is_known:
            asking.answered(answer)
        else:
            with pytest.raises(Damaged):
                asking.answered(answer)
