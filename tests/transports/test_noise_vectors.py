"""Our Noise against published test vectors, and each of its objects against the specification's text.

The vectors come from another implementation, flynn/noise (Go, BSD 3-clause), file vectors.txt: of each pattern the one
with payloads in the handshake messages, with a prologue where the name says so.  The keys, the same in every vector,
and the payloads are its own.  A vector fixes all bytes of a handshake, then those of one message from each side.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from splitsec.transports.errors import LocalProtocolError, PeerMisbehaved
from splitsec.transports.noise import (
    MAX_MESSAGE,
    MAX_NONCE,
    CipherState,
    HandshakeState,
    SymmetricState,
    pattern,
    public_key_of,
)
from splitsec.transports.noise.symmetricstate import hkdf

INITIATOR_STATIC = bytes(range(0x00, 0x20))
RESPONDER_STATIC = bytes(range(0x01, 0x21))
INITIATOR_EPHEMERAL = bytes(range(0x20, 0x40))
RESPONDER_EPHEMERAL = bytes(range(0x41, 0x61))
PSK = b"!verysecretverysecretverysecret!"
PROLOGUE = b"notsecret"
HANDSHAKE_PAYLOADS = [b"test_msg_0", b"test_msg_1", b"test_msg_2"]

VECTORS = """
NK prologue
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd1662546cfcd5c91dd95543a2363b9bd07c092d8fff1468
    7e5f48b43afc
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d48466b3f3dd3e34414275ad73c9d7e1d03e86e1580404
    241350ed9ab1
  2 95922788fcef822a17b42f450fa14d05d8e6a4377ca0aea3b4804f03db74a2
  3 0976cd4a786c253b37489b6bc3867b2df0dddf9f939b218da54092c6d3eca4
NKpsk0 prologue
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd16625485932c8c7615c82637987b6d1508724221d9ac49
    e27a147f5b20
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d48466cce9cb21a513f9de326ccb24b4012111db3db7d4
    1383ad139bf4
  2 093acd47149fadf3574dd440428181edf9c61cc4a1b5ef815e8b779f1bbf40
  3 2b8e170039917a61d4fe8acbd2147d50afafc32070458b51b666225614f364
NKpsk1 prologue
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd1662543f74b70b971271ffb3ef260b21a3f29655bee689
    e501c2a16b89
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d484669920e429a6643b44e75f92aa79146466904a0217
    560ee27b49df
  2 51fd5d7489dae3d6a99766db0afe89c1d19ed91a80b1bb64f94e747360fd2c
  3 be24f94a04505c8ab51768a80b388f2758ddab3b2fa3eebfeaceeff0130d78
NKpsk2 prologue
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd166254537ac869369393768b21c12506b70b078d6cb283
    78d02e8d93af
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d4846695f32217406ccaa2da8ffcd2908a04cb425c65da
    ad407f91f131
  2 d848f074d3d766c1a7770c51ceba699a16ad262790fc279e7dd2fcccfd4dca
  3 51f74c4a80c3768dd6476fbb9c599efe5491567af3d18c8415d9d017821004
KK prologue
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd166254f076403f2e0cdd201c5a743d4aab448e6e3b29d4
    aa05628a5cbd
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d48466f12abbcda56565bf3fa37b196488daf515b74340
    96aa1638346b
  2 0e79035855cdea04bc833d5ff63291042c6e12b0ac55ef2c4096deed1cbac2
  3 c6dbcc2ac8f85338732b71a58f4c3be89bdfa7b2da8a8506ec4f1d2d9299a0
KKpsk0 prologue
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd16625413c6b4c495bbc7b95432535cc6716834442ddae5
    e177d5bfd397
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d48466169cfd28ccd38213e17b518f78c70703c52b0d8d
    51d4479b557a
  2 13f09ec7877b005731a876958cec004a7f9c2734e971828082db441ce001c1
  3 cf3a9cb9da7eb9bea19447b1f9bea60ac70124dfef886e9b82cd52f748c682
KKpsk1 prologue
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd166254f45eb20acd443feff46b315ad0366d803b7da09e
    6b84e12c1064
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d48466d510ee9dd1b542ca5a0dca75e69bc396eea2dade
    c726382e2030
  2 96252868cb85131fc634b43f37c135da2b02902158369ec7a8e6b45b246732
  3 52822ad96c98c7ebcf68cafe91b6f18929aad75af5424a973cdb0f004b3832
KKpsk2 prologue
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd1662540590c32754712b9ce391bf35caa325f1ed107ec1
    2d5cb4fc49af
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d48466f1bd851e93bfded9a6c776e0614d573731a40e7f
    562f6f3c067f
  2 d219ab65f4416d18e67f501afa99f43009c0a1c2c78427b1dcbdd6cf020928
  3 1c6b3e31392287e06fcc5a885ea8690e39a2d3d54e23f5aeca14fca3c2f053
IK prologue
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd16625419d6fab175300a577115c701c41ed681373f0432
    f81d3bf8676bd05216cd1919e61b75ccef0c0cf0b216fcdf371d0859e6d8177aa9777fe9b8435bb6f8202c3acd9051a9aee0a63e
    76f6
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d4846658a7bb8caac5097833909e90778571d34ce0e5b6
    ea4c3a76f102
  2 80a75e75c8e8d2e9c2a6c7bc6e550c4997d6d2b45429a530821c4aa5d36f27
  3 b8475410da62a98493d33a1e669f8f56dd8f61d449b53bd375299c3435424a
IKpsk0 prologue
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd166254694ead724bb690ad27ce3893ebd8394b455e44e3
    62122cce141b66200c2ac5a340048ce6c8456ff4837c29fe67256f8117106241219f60be8d1ad5cce3624dd12b08c8095b0abfe5
    58a2
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d48466f6bef292d60d7dd4c6d103923a164717d1f2c43d
    4a0be832d29f
  2 2471b2688160616fc0bd108fde1be5848e763d448a018f8f9052697444a95a
  3 e48f8d2d66ccb8f59321228086764d403dac49de50617604bd4e1399ec7714
IKpsk1 prologue
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd166254d090a76917ed86b1ca3f8af8ac5c0803d5b3b290
    ab95fa415d8bf2f9200a59fc0aef8b6d695b38b638d8a84ff6029bfa720b9cbc2e1f0e39ae53481de7823a9ec40e8e82d4e52bdb
    e833
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d48466c92aa230bccd4126f41bba00c0183e8a92b2d41d
    3874e2d39c67
  2 245e2f9694b825a856dc97709fcc450870d23dd07637b57d21268ad60016e4
  3 977eb8234bef8ece7a14c771fa5019aae42c0f4655d4e1ffbfdb4a96def193
IKpsk2
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd1662540322be5210eec7e84567f5b4ad376b908b7c38a5
    87eb71776e0661a6ca9f3ef251962835db06e694781bcf163d3cb38d2dbe7ee0a408573e5466e702c802dce4b432bd175dff1a5c
    aae4
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d48466574ad0a465f5fa10665727be848a181ffd21211d
    5aa7d5be8e28
  2 c033f4a3312af700a5a655f6992bcad095ceb5af11b02027cecd87ef65738c
  3 3363987af8578ae96cb358858a859ef8060129a05d85700d8a9c4955c599c1
XX
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd166254746573745f6d73675f30
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d484665393019dbd6f438795da206db0886610b26108e4
    24142c2e9b5fd1f7ea70cde8c9f29dcec8d3ab554f4a5330657867fe4917917195c8cf360e08d6dc5f71baf875ec6e3bfc7afda4
    c9c2
  2 e610eadc4b00c17708bf223f29a66f02342fbedf6c0044736544b9271821ae40232c55cd96d1350af861f6a04978f7d5e070c076
    02c6b84d25a331242a71c50ae31dd4c164267fd48bd2
  3 9ea1da1ec3bfecfffab213e537ed1791bfa887dd9c631351b3f63d6315ab9a
  4 217c5111fad7afde33bd28abaff3def88a57ab50515115d23a10f28621f842
XXpsk0
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd1662542dfece4dae76dc5ac85cb897862e0637e7403c75
    bb5761111b83
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d48466807dca8877a33959186ac0181ac963a7dd13a134
    ae4a2191da2bedd96911f7b1549721eaf8b8212a701886c355be87e686ae9e443b823f0d58eceab3e52ff4d365f9b6793b5a6e91
    3e82
  2 099fd29f5cad05f9d2c9be076d04e80a092e181fa13a4e844386e360defdca4e476fccf79130a33fd25244336598bf55637ea8de
    a2acb6fd2e6c98213519f6f2d25947620be6979e3858
  3 99521768e8b75eae6d56db072601817fd0606206ca444b02f911562521e4fd
  4 ab15274dff9f222379cd9feac0e4a82b7fb61fc0c79372dd9c07d283b1e765
XXpsk1
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd1662548b1c5b18c538c8c63ca5d317942e39790c9a490e
    c0349924c9f1
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d484667017a62eaf03e7998188e6751f9fcac8bc79848f
    ad62102c1936a2af6aef691c0ad62dc8498b97040b8a96630d1c68a6f8fbe4180e999511b4e3bfa3e0ae626aa97e13adc6eeaa2d
    4310
  2 8f83154157fddfe88c38ce42a13b74127986fd61dc310450deb5ff6a181fa057acf4829f9429fc717589b9998148cf0580a72833
    458eaac993ba86ca4314f11ac370f7fb7a1d92360504
  3 776c311a7a1a1a31a0fa9950b6435a8116fc986c30aefb84b1de1a1ea3e0cf
  4 c79820d7cd308ba3da226008598c022aeb8f084dde84fee307293a3634e331
XXpsk2
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd16625444c72fdfcc26b692b2435ad02e6c7f0c07226d2e
    dd62204fbe9c
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d48466bc9f39c99cf603e2db23dbe9ce2adec44a572047
    d4a1d3f8c0df894e11f5bd7f45cdfbefb68a646406aebe4c1987a2686d93f50fbd193f60379e3691036e92cb41993381816ab66d
    1ea3
  2 b58fc4f341feab3fe253ee6489ad653afe49fcc6eea1f18a892b1a8febc146ee526267e460783c68aefd8a71354f3919ae4d3c4c
    228a97bbbbef8021883cd1832050c4b17c7b02155569
  3 fc4829fa5f449a9aca1577156e58691997a90a5a55b7aa6401257535595eb9
  4 b069da251403dba1f073a2fea640f5a8cc91d1f012a01c1fa87435a8492030
XXpsk3
  0 358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd1662545d791aebd7b1ff3a73ba5c27944833f62facffa3
    b38f7ec45f9f
  1 64b101b1d0be5a8704bd078f9895001fc03e8e9f9522f188dd128d9846d48466bb1259f77345353d70dcef1e97d161dd9c3324e7
    2b46203ebe87dcb40159eb66954fa813c5770391ff0e4006fa005462b1bfa8057f6e8f62584a272b0eec13b6cf6a75a736ddf5d0
    d3cd
  2 a702c30239110afbb8afacb639f961e5c2574c3fe59ee6069c0f5f5414ea2493ab8dbfb3e1f6148b9c0d93e8d9ebf5183e3be30d
    1cb36cf2cd66eccebe0493ead2ba5f2bfae0d821ce21
  3 187cadad4158250d0af49c2aea3bedc34aee2cc962336fbe649527ca78e48c
  4 91de652b73884e25506003fe72969748b9092a4518be9c6e4911a52b60375f
"""


def read_vectors() -> dict[tuple[str, bytes], list[bytes]]:
    """All messages of each pattern and prologue, in order."""
    vectors: dict[tuple[str, bytes], list[bytes]] = {}
    messages: list[bytes] = []
    for line in VECTORS.strip().splitlines():
        if not line.startswith(" "):
            name, _, prologue = line.partition(" ")
            messages = vectors[name, PROLOGUE if prologue else b""] = []
        elif line.startswith("    "):
            messages[-1] += bytes.fromhex(line)
        else:
            messages.append(bytes.fromhex(line.split()[1]))
    return vectors


def sides(name: str, prologue: bytes = b"", **keys: bytes) -> tuple[HandshakeState, HandshakeState]:
    """Initiator and responder with the vectors' keys; ``initiator_rs`` and ``responder_rs`` replace what they know."""
    knows = pattern(name)
    initiator_rs = keys.get("initiator_rs", public_key_of(RESPONDER_STATIC))
    responder_rs = keys.get("responder_rs", public_key_of(INITIATOR_STATIC))
    initiator = HandshakeState(
        name,
        initiator=True,
        prologue=prologue,
        s=INITIATOR_STATIC if knows.needs_static(True) else None,
        rs=initiator_rs if knows.initiator_knows_responder else None,
        psks=[PSK] * knows.psks,
        fixed_e_for_vectors=INITIATOR_EPHEMERAL,
    )
    responder = HandshakeState(
        name,
        initiator=False,
        prologue=prologue,
        s=RESPONDER_STATIC if knows.needs_static(False) else None,
        rs=responder_rs if knows.responder_knows_initiator else None,
        psks=[PSK] * knows.psks,
        fixed_e_for_vectors=RESPONDER_EPHEMERAL,
    )
    return initiator, responder


def run(initiator: HandshakeState, responder: HandshakeState) -> None:
    """Both sides to the end, payloads empty."""
    while not initiator.finished:
        writer, reader = (initiator, responder) if initiator.my_turn else (responder, initiator)
        reader.read_message(writer.write_message())


@pytest.mark.parametrize(("name", "prologue"), read_vectors())
def test_published_vector(name: str, prologue: bytes) -> None:
    messages = read_vectors()[name, prologue]
    initiator, responder = sides(name, prologue)
    count = len(pattern(name).messages)
    assert len(messages) == count + 2
    for index in range(count):
        writer, reader = (responder, initiator) if index % 2 else (initiator, responder)
        assert writer.write_message(HANDSHAKE_PAYLOADS[index]) == messages[index]
        assert reader.read_message(messages[index]) == HANDSHAKE_PAYLOADS[index]
    assert initiator.handshake_hash == responder.handshake_hash
    ends = initiator.split(), responder.split()
    for writer_index, payload in enumerate([b"yellowsubmarine", b"submarineyellow"]):
        (send, _), (_, receive) = ends[writer_index], ends[1 - writer_index]
        assert send.encrypt_with_ad(b"", payload) == messages[count + writer_index]
        assert receive.decrypt_with_ad(b"", messages[count + writer_index]) == payload


# Patterns, sections 7 and 9.


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("NK", ["e es", "e ee"]),
        ("KK", ["e es ss", "e ee se"]),
        ("IK", ["e es s ss", "e ee se"]),
        ("XX", ["e", "e ee s es", "s se"]),
        ("IKpsk0", ["psk e es s ss", "e ee se"]),
        ("IKpsk1", ["e es s ss psk", "e ee se"]),
        ("XXpsk3", ["e", "e ee s es", "s se psk"]),
        ("XXpsk0+psk1+psk2", ["psk e psk", "e ee s es psk", "s se"]),
    ],
)
def test_tokens(name: str, messages: list[str]) -> None:
    assert [" ".join(tokens) for tokens in pattern(name).messages] == messages
    assert pattern(name).protocol_name == f"Noise_{name}_25519_AESGCM_SHA256".encode()


@pytest.mark.parametrize(
    "name",
    ["", "NN", "ik", "IKpsk", "IKpsk3", "XXpsk4", "IKpsk1psk2", "IKpsk2+psk0", "IKpsk1+psk1", "IK_25519", "IKfallback"],
)
def test_no_such_pattern(name: str) -> None:
    with pytest.raises(LocalProtocolError, match="no pattern"):
        pattern(name)


# HandshakeState, section 5.3.


def test_fixed_ephemeral_is_used_and_entropy_is_not() -> None:
    def no_entropy(size: int) -> bytes:
        raise AssertionError(size)

    state = HandshakeState(
        "XX", initiator=True, s=os.urandom(32), entropy=no_entropy, fixed_e_for_vectors=bytes(range(32))
    )
    assert state.write_message() == public_key_of(bytes(range(32)))


def test_ephemeral_is_drawn_from_entropy_once() -> None:
    asked: list[int] = []

    def entropy(size: int) -> bytes:
        asked.append(size)
        return bytes(range(size))

    state = HandshakeState("XX", initiator=True, s=os.urandom(32), entropy=entropy)
    assert state.write_message() == public_key_of(bytes(range(32)))
    assert asked == [32]


def test_entropy_of_the_wrong_length_is_refused() -> None:
    state = HandshakeState("XX", initiator=True, s=os.urandom(32), entropy=lambda size: b"short")
    with pytest.raises(LocalProtocolError, match="32 bytes, not 5"):
        state.write_message()


KEY = bytes(range(32))


@pytest.mark.parametrize(
    "make",
    [
        lambda: HandshakeState("IK", initiator=True, s=KEY),
        lambda: HandshakeState("IK", initiator=True, rs=KEY),
        lambda: HandshakeState("IK", initiator=False, s=KEY, rs=KEY),
        lambda: HandshakeState("IK", initiator=False),
        lambda: HandshakeState("NK", initiator=True, s=KEY, rs=KEY),
        lambda: HandshakeState("KK", initiator=False, s=KEY),
        lambda: HandshakeState("XX", initiator=True, s=KEY[:31]),
        lambda: HandshakeState("IK", initiator=True, s=KEY, rs=KEY + b"0"),
        lambda: HandshakeState("XXpsk3", initiator=True, s=KEY),
        lambda: HandshakeState("XX", initiator=True, s=KEY, psks=[KEY]),
        lambda: HandshakeState("XXpsk3", initiator=True, s=KEY, psks=[KEY[:31]]),
        lambda: HandshakeState("XXpsk0+psk3", initiator=True, s=KEY, psks=[KEY]),
        lambda: HandshakeState("XX", initiator=True, s=KEY, fixed_e_for_vectors=b""),
    ],
)
def test_keys_must_fit_the_pattern(make: Callable[[], HandshakeState]) -> None:
    with pytest.raises(LocalProtocolError):
        make()


@pytest.mark.parametrize("name", ["IK", "NK", "KK", "XX"])
def test_out_of_turn(name: str) -> None:
    initiator, responder = sides(name)
    with pytest.raises(LocalProtocolError, match="not ours to write"):
        responder.write_message()
    with pytest.raises(LocalProtocolError, match="ours to write"):
        initiator.read_message(bytes(200))
    run(initiator, responder)  # being out of turn has broken nothing
    for state in (initiator, responder):
        with pytest.raises(LocalProtocolError, match="over"):
            state.write_message()
        with pytest.raises(LocalProtocolError, match="over"):
            state.read_message(bytes(200))


def test_nothing_is_given_before_the_end_and_keys_only_once() -> None:
    initiator, responder = sides("IK")
    for state in (initiator, responder):
        with pytest.raises(LocalProtocolError, match="over"):
            _ = state.handshake_hash
        with pytest.raises(LocalProtocolError, match="over"):
            state.split()
    with pytest.raises(LocalProtocolError, match="not known"):
        _ = responder.remote_static
    run(initiator, responder)
    assert responder.remote_static == public_key_of(INITIATOR_STATIC)
    (sends, receives), (peer_sends, peer_receives) = initiator.split(), responder.split()
    assert sends.key == peer_receives.key != receives.key == peer_sends.key
    assert len(sends.key) == len(receives.key) == 32
    with pytest.raises(LocalProtocolError, match="taken already"):
        initiator.split()


@pytest.mark.parametrize("name", ["IK", "NK", "KK", "XX", "IKpsk0", "IKpsk2", "XXpsk0", "XXpsk3"])
def test_every_altered_byte_is_noticed_and_ends_the_handshake(name: str) -> None:
    """Each byte of each message; where nothing is sealed yet (XX, first message) the next message shows it."""
    for number, tokens in enumerate(pattern(name).messages):
        length = len(replayed(name, number)[2])
        for position in range(length):
            writer, reader, message = replayed(name, number)
            altered = message[:position] + bytes([message[position] ^ 0x80]) + message[position + 1 :]
            try:
                reader.read_message(altered)
                assert name == "XX" and number == 0, (tokens, position)
                with pytest.raises(PeerMisbehaved):
                    writer.read_message(reader.write_message())
                reader = writer
            except PeerMisbehaved:
                pass
            with pytest.raises(LocalProtocolError, match="failed"):
                reader.write_message()
            with pytest.raises(LocalProtocolError, match="failed"):
                reader.read_message(message)
            with pytest.raises(LocalProtocolError, match="failed"):
                reader.split()
            with pytest.raises(LocalProtocolError, match="failed"):
                _ = reader.handshake_hash
            with pytest.raises(LocalProtocolError, match="failed"):
                _ = reader.remote_static


def replayed(name: str, number: int) -> tuple[HandshakeState, HandshakeState, bytes]:
    """Writer, reader and bytes of message ``number``, not yet read."""
    writer, reader = sides(name)
    for _ in range(number):
        reader.read_message(writer.write_message())
        writer, reader = reader, writer
    return writer, reader, writer.write_message(b"payload" if number else b"")


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("IK", (96, 48)), ("NK", (48, 48)), ("KK", (48, 48)), ("XX", (32, 96, 64)), ("XXpsk0", (48, 96, 64))],
)
def test_lengths(name: str, lengths: tuple[int, ...]) -> None:
    """Shorter than the empty message, or longer than 65,535 bytes: refused; the longest: taken."""
    for number, length in enumerate(lengths):
        for bad in (0, length - 1, MAX_MESSAGE + 1):
            _, reader, _ = replayed(name, number)
            with pytest.raises(PeerMisbehaved, match="bytes, not"):
                reader.read_message(bytes(bad))
        initiator, responder = sides(name)
        for _ in range(number):
            responder.read_message(initiator.write_message())
            initiator, responder = responder, initiator
        assert initiator.overhead() == responder.overhead() == length
        with pytest.raises(LocalProtocolError, match="no room"):
            initiator.write_message(bytes(MAX_MESSAGE - length + 1))
        longest = bytes(MAX_MESSAGE - length)
        assert responder.read_message(initiator.write_message(longest)) == longest


# Public keys of small order: with any private key the result is all zeros (section 12.1 lets us refuse it, and we do).
SMALL_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_small_order_ephemeral_is_the_peers_fault(point: str) -> None:
    _, responder = sides("IK")
    with pytest.raises(PeerMisbehaved, match="gives no secret"):
        responder.read_message(bytes.fromhex(point) + bytes(64))
    _, responder = sides("XX")
    responder.read_message(bytes.fromhex(point))
    with pytest.raises(PeerMisbehaved, match="gives no secret"):
        responder.write_message()


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_small_order_pinned_key_is_our_fault(point: str) -> None:
    initiator, _ = sides("KK", initiator_rs=bytes.fromhex(point))
    with pytest.raises(LocalProtocolError, match="gives no secret"):
        initiator.write_message()
    initiator, _ = sides("KK")
    _, responder = sides("KK", responder_rs=bytes.fromhex(point))
    with pytest.raises(LocalProtocolError, match="gives no secret"):
        responder.read_message(initiator.write_message())


# SymmetricState, section 5.2.


def test_hkdf_is_that_of_rfc_5869() -> None:
    """Section 4.3: HKDF with the chaining key as salt and no info, in pieces of 32 bytes."""
    chaining_key, material = os.urandom(32), os.urandom(40)
    expected = HKDF(SHA256(), length=96, salt=chaining_key, info=b"").derive(material)
    assert b"".join(hkdf(chaining_key, material)) == expected


def test_short_protocol_name_is_padded_and_long_one_hashed() -> None:
    assert SymmetricState(b"Noise_N").handshake_hash() == b"Noise_N" + bytes(25)
    assert SymmetricState(b"n" * 32).handshake_hash() == b"n" * 32
    assert SymmetricState(b"abc" * 11).handshake_hash() == bytes.fromhex(
        "b951b21038300d359ef3f6267f60236c87f347a41f4dfa5b691c3d702afbbc96"
    )


# CipherState, section 5.1.


def cipherstate(key: bytes = KEY) -> CipherState:
    state = CipherState()
    state.initialize_key(key)
    return state


def test_without_key_everything_passes_as_it_is() -> None:
    state = CipherState()
    assert not state.has_key()
    assert state.encrypt_with_ad(b"ad", b"text") == b"text" == state.decrypt_with_ad(b"ad", b"text")
    assert state.nonce == 0
    with pytest.raises(LocalProtocolError, match="no key"):
        _ = state.key
    with pytest.raises(LocalProtocolError, match="no key"):
        state.rekey()


def test_nonce_is_four_zero_bytes_and_the_big_endian_counter() -> None:
    state = cipherstate()
    state.set_nonce(0x0102030405060708)
    sealed = state.encrypt_with_ad(b"ad", b"text")
    assert sealed == AESGCM(KEY).encrypt(bytes([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]), b"text", b"ad")
    assert state.nonce == 0x0102030405060709


def test_last_nonce_is_reserved() -> None:
    """2^64-1 is never used: the message before it is the last, both ways."""
    state = cipherstate()
    state.set_nonce(MAX_NONCE - 1)
    last = state.encrypt_with_ad(b"", b"last")
    assert state.nonce == MAX_NONCE
    with pytest.raises(LocalProtocolError, match="all the messages"):
        state.encrypt_with_ad(b"", b"one more")
    state.set_nonce(MAX_NONCE - 1)
    assert state.decrypt_with_ad(b"", last) == b"last"
    with pytest.raises(LocalProtocolError, match="all the messages"):
        state.decrypt_with_ad(b"", last)
    for nonce in (-1, MAX_NONCE + 1):
        with pytest.raises(LocalProtocolError):
            state.set_nonce(nonce)


def test_failed_opening_does_not_move_the_counter() -> None:
    sealed = cipherstate().encrypt_with_ad(b"ad", b"text")
    state = cipherstate()
    for bad in (b"", sealed[:15], sealed[:-1], sealed + b"0", bytes(len(sealed))):
        with pytest.raises(PeerMisbehaved):
            state.decrypt_with_ad(b"ad", bad)
    with pytest.raises(PeerMisbehaved):
        state.decrypt_with_ad(b"other", sealed)
    assert state.nonce == 0
    assert state.decrypt_with_ad(b"ad", sealed) == b"text"
    with pytest.raises(PeerMisbehaved):
        state.decrypt_with_ad(b"ad", sealed)  # the same message once more: its counter has passed
    assert state.nonce == 1


def test_rekey_keeps_the_counter() -> None:
    state = cipherstate()
    state.encrypt_with_ad(b"", b"")
    state.rekey()
    new_key = AESGCM(KEY).encrypt(bytes(4) + b"\xff" * 8, bytes(32), b"")[:32]
    assert (state.key, state.nonce) == (new_key, 1)
    assert state.encrypt_with_ad(b"", b"text") == AESGCM(new_key).encrypt(bytes(11) + b"\x01", b"text", b"")


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_key_length(length: int) -> None:
    with pytest.raises(LocalProtocolError, match="32 bytes"):
        CipherState().initialize_key(bytes(length))
