"""The handshake against published test vectors, and against everything that is not the other end."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from phalanx.errors import FrameError
from phalanx.transport import noise
from phalanx.transport.keys import RunKey
from phalanx.transport.noise import CipherState, Initiator, Responder

PSK, PROLOGUE = bytes(range(32)), b"test"

# Of the vectors that the Haskell implementation "cacophony" published, and others such as "snow" test with.
VECTOR_PSK = "54686973206973206d7920417573747269616e20706572737065637469766521"
VECTOR_PROLOGUE = "4a6f686e2047616c74"
VECTOR_EPHEMERALS = (
    "893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a",
    "bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b",
)
VECTOR_MESSAGES = (
    (
        "4c756477696720766f6e204d69736573",
        "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c7944"
        "7c37a89fc17813788d30df2d59501d6066f5f8aecc3406bbd9829f2d24a531b1",
    ),
    (
        "4d757272617920526f746862617264",
        "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f144808843"
        "2f29d79368ef9de4e1ae7a362fb05bf0ad668e026bf5714554497b3a720461",
    ),
    ("462e20412e20486179656b", "7c01e898a6201f36aecee532e29cd0b7f8ffa29d3366ad0dce39a6"),
    ("4361726c204d656e676572", "a9ff535aace3db6a1da1a7fb00fe2de2622bb373abad9fb42c00e0"),
    ("4a65616e2d426170746973746520536179", "6cfc49a3e65472edc2d0152abe5ce950170a8a47c959f30bd48b5f0aacf29adbfd"),
    (
        "457567656e2042f6686d20766f6e2042617765726b",
        "9bc86e6d974ed21ba04604a94aa68de21677eb409ead070c0cd569b069ee19ba142aa4c1a9",
    ),
)


def test_the_published_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    ephemerals = iter(VECTOR_EPHEMERALS)
    monkeypatch.setattr(
        noise, "_new_ephemeral", lambda: X25519PrivateKey.from_private_bytes(bytes.fromhex(next(ephemerals)))
    )
    psk, prologue = bytes.fromhex(VECTOR_PSK), bytes.fromhex(VECTOR_PROLOGUE)
    initiator, responder = Initiator(psk, prologue), Responder(psk, prologue)
    first, second, *transport = [tuple(map(bytes.fromhex, pair)) for pair in VECTOR_MESSAGES]
    assert initiator.write_message(first[0]) == first[1]
    assert responder.read_message(first[1]) == first[0]
    assert responder.write_message(second[0]) == second[1]
    assert initiator.read_message(second[1]) == second[0]
    (to_responder, from_responder), (to_initiator, from_initiator) = initiator.split(), responder.split()
    for number, (payload, ciphertext) in enumerate(transport):
        sending, receiving = (to_responder, from_initiator) if number % 2 == 0 else (to_initiator, from_responder)
        assert sending.encrypt(payload) == ciphertext
        assert receiving.decrypt(ciphertext) == payload


def _split() -> tuple[CipherState, CipherState]:
    """What the initiator sends with, and what the responder receives with."""
    initiator, responder = Initiator(PSK, PROLOGUE), Responder(PSK, PROLOGUE)
    responder.read_message(initiator.write_message(b""))
    initiator.read_message(responder.write_message(b""))
    return initiator.split()[0], responder.split()[1]


@pytest.mark.parametrize(
    "stranger", [Responder(bytes(32), PROLOGUE), Responder(PSK, b"another"), Responder(PSK[::-1], PROLOGUE)]
)
def test_another_key_or_prologue_is_refused_at_the_first_message(stranger: Responder) -> None:
    with pytest.raises(FrameError):
        stranger.read_message(Initiator(PSK, PROLOGUE).write_message(b"hello"))


def test_the_initiator_finds_out_who_has_another_key() -> None:
    initiator, stranger = Initiator(PSK, PROLOGUE), Responder(bytes(32), PROLOGUE)
    with pytest.raises(FrameError):
        stranger.read_message(initiator.write_message(b"hello"))
    with pytest.raises(FrameError):
        initiator.read_message(stranger.write_message(b"welcome"))


@given(place=st.integers(0, 52), bit=st.integers(0, 7))
def test_no_bit_of_a_handshake_can_be_changed(place: int, bit: int) -> None:
    message = bytearray(Initiator(PSK, PROLOGUE).write_message(b"hello"))
    assert len(message) == 53
    message[place] ^= 1 << bit
    with pytest.raises(FrameError):
        Responder(PSK, PROLOGUE).read_message(bytes(message))


@pytest.mark.parametrize("length", [0, 1, 31, 47])
def test_a_short_handshake_is_none(length: int) -> None:
    with pytest.raises(FrameError, match=f"{length} bytes"):
        Responder(PSK, PROLOGUE).read_message(bytes(length))


def test_a_public_key_that_gives_no_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    initiator, responder = Initiator(PSK, PROLOGUE), Responder(PSK, PROLOGUE)
    zero = bytes(32)  # a point of low order
    initiator._symmetric.mix_public_key(zero)
    responder.read_message(zero + initiator._symmetric.encrypt_and_hash(b"hello"))
    with pytest.raises(FrameError, match="public key"):
        responder.write_message(b"welcome")


def test_the_answer_to_a_replayed_handshake_is_of_no_use_to_who_replays_it() -> None:
    initiator = Initiator(PSK, PROLOGUE)
    recorded = initiator.write_message(b"hello")
    first, second = Responder(PSK, PROLOGUE), Responder(PSK, PROLOGUE)
    first.read_message(recorded)
    initiator.read_message(first.write_message(b"welcome"))
    sent = initiator.split()[0].encrypt(b"here I am")
    second.read_message(recorded)
    second.write_message(b"welcome")
    with pytest.raises(FrameError):
        second.split()[1].decrypt(sent)


def test_messages_come_once_and_in_order() -> None:
    sending, receiving = _split()
    first, second = sending.encrypt(b"1"), sending.encrypt(b"2")
    with pytest.raises(FrameError):
        receiving.decrypt(second)
    assert receiving.decrypt(first) == b"1"
    with pytest.raises(FrameError):
        receiving.decrypt(first)
    assert receiving.decrypt(second) == b"2"


def test_the_two_directions_have_keys_of_their_own() -> None:
    initiator, responder = Initiator(PSK, PROLOGUE), Responder(PSK, PROLOGUE)
    responder.read_message(initiator.write_message(b""))
    initiator.read_message(responder.write_message(b""))
    sending, receiving = initiator.split()
    with pytest.raises(FrameError):
        receiving.decrypt(sending.encrypt(b"reflected"))


@pytest.mark.parametrize("size_bytes", [0, 1, 131_072])
def test_encryption_into_memory_is_the_same(size_bytes: int) -> None:
    plaintext = bytes(range(256)) * (size_bytes // 256) + bytes(size_bytes % 256)
    sending, receiving = _split()
    ciphertext, decrypted = memoryview(bytearray(size_bytes + 16)), memoryview(bytearray(size_bytes))
    sending.encrypt_into(plaintext, ciphertext)
    receiving.decrypt_into(ciphertext, decrypted)
    assert bytes(decrypted) == plaintext
    ciphertext[-1] ^= 1
    with pytest.raises(FrameError):
        receiving.decrypt_into(ciphertext, decrypted)


def test_a_key_does_not_show() -> None:
    key = RunKey.new()
    assert key != RunKey.new()
    assert repr(key) == str(key) == f"{key}" == "RunKey(...)"
