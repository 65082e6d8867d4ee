"""Noise_NNpsk0_25519_AESGCM_SHA256 of the Noise Protocol Framework, revision 34 (https://noiseprotocol.org/noise.html).

    -> psk, e
    <- e, ee

Both ends prove that they have the pre-shared key, and agree on keys that nobody learns who gets hold of it later. The
first message can be replayed; its sender is only known to be there when the first transport message arrives. Names of
classes and methods are the specification's (section 5). Its limit of 65,535 bytes for a message (section 3) is not kept
here: the handshake's are far below, and those after it are longer (see docs/decisions/0007-noise-between-nodes.md).
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from phalanx.errors import FrameError

Bytes: TypeAlias = bytes | bytearray | memoryview

PROTOCOL_NAME = b"Noise_NNpsk0_25519_AESGCM_SHA256"
TAG_BYTES = 16
KEY_BYTES = 32
_MAX_NONCE = 2**64 - 1


class CipherState:
    """One direction's key and the number of the next message. For one thread."""

    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(key)
        self._next = 0

    def encrypt(self, plaintext: Bytes, associated_data: bytes = b"") -> bytes:
        """The ciphertext, TAG_BYTES longer than `plaintext`."""
        message = self._aead.encrypt(self._nonce(), plaintext, associated_data)
        self._next += 1
        return message

    def encrypt_into(self, plaintext: Bytes, ciphertext: memoryview) -> None:
        """The same into memory of exactly that length."""
        self._aead.encrypt_into(self._nonce(), plaintext, b"", ciphertext)
        self._next += 1

    def decrypt(self, ciphertext: Bytes, associated_data: bytes = b"") -> bytes:
        """The plaintext. Raises FrameError unless this is the next message that the other end encrypted."""
        try:
            plaintext = self._aead.decrypt(self._nonce(), ciphertext, associated_data)
        except InvalidTag:
            raise _not_authentic() from None
        self._next += 1
        return plaintext

    def decrypt_into(self, ciphertext: Bytes, plaintext: memoryview) -> None:
        """The same into memory of exactly that length. After a FrameError its content is of no meaning."""
        try:
            self._aead.decrypt_into(self._nonce(), ciphertext, b"", plaintext)
        except InvalidTag:
            raise _not_authentic() from None
        self._next += 1

    def _nonce(self) -> bytes:
        """32 zero bits, and the number as 64 bits, big-endian (section 12.4)."""
        assert self._next < _MAX_NONCE
        return self._next.to_bytes(12, "big")


class _SymmetricState:
    """What both ends have mixed so far: the chaining key and the hash of all that was said."""

    def __init__(self, prologue: bytes) -> None:
        assert len(PROTOCOL_NAME) == hashlib.sha256().digest_size  # else it would have to be padded or hashed
        self._chaining_key = self._hash = PROTOCOL_NAME
        self._cipher: CipherState | None = None
        self.mix_hash(prologue)

    def mix_hash(self, data: bytes) -> None:
        self._hash = hashlib.sha256(self._hash + data).digest()

    def mix_key(self, material: bytes) -> None:
        self._chaining_key, key = _hkdf(self._chaining_key, material, 2)
        self._cipher = CipherState(key)

    def mix_key_and_hash(self, material: bytes) -> None:
        self._chaining_key, mixed, key = _hkdf(self._chaining_key, material, 3)
        self.mix_hash(mixed)
        self._cipher = CipherState(key)

    def mix_public_key(self, key: bytes) -> None:
        """An ephemeral key that was sent. With a pre-shared key it goes into the chaining key too (section 9.2)."""
        self.mix_hash(key)
        self.mix_key(key)

    def encrypt_and_hash(self, payload: bytes) -> bytes:
        assert self._cipher is not None
        ciphertext = self._cipher.encrypt(payload, self._hash)
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        assert self._cipher is not None
        payload = self._cipher.decrypt(ciphertext, self._hash)
        self.mix_hash(ciphertext)
        return payload

    def split(self) -> tuple[CipherState, CipherState]:
        """The initiator's sending key, and the responder's."""
        ours, theirs = _hkdf(self._chaining_key, b"", 2)
        return CipherState(ours), CipherState(theirs)


class Initiator:
    """The end that speaks first: `write_message`, `read_message`, `split`, each once and in this order."""

    def __init__(self, psk: bytes, prologue: bytes) -> None:
        self._symmetric = _SymmetricState(prologue)
        self._symmetric.mix_key_and_hash(psk)
        self._ephemeral = _new_ephemeral()

    def write_message(self, payload: bytes) -> bytes:
        public_key = self._ephemeral.public_key().public_bytes_raw()
        self._symmetric.mix_public_key(public_key)
        return public_key + self._symmetric.encrypt_and_hash(payload)

    def read_message(self, message: bytes) -> bytes:
        """The responder's payload. Raises FrameError if it has another key, prologue or history."""
        public_key, ciphertext = _cut(message)
        self._symmetric.mix_public_key(public_key)
        self._symmetric.mix_key(_agree(self._ephemeral, public_key))
        return self._symmetric.decrypt_and_hash(ciphertext)

    def split(self) -> tuple[CipherState, CipherState]:
        """For sending and for receiving."""
        return self._symmetric.split()


class Responder:
    """The end that answers: `read_message`, `write_message`, `split`, each once and in this order."""

    def __init__(self, psk: bytes, prologue: bytes) -> None:
        self._symmetric = _SymmetricState(prologue)
        self._symmetric.mix_key_and_hash(psk)
        self._peer_key = b""

    def read_message(self, message: bytes) -> bytes:
        """The initiator's payload. Raises FrameError if it has another key or prologue. Costs no curve operation."""
        self._peer_key, ciphertext = _cut(message)
        self._symmetric.mix_public_key(self._peer_key)
        return self._symmetric.decrypt_and_hash(ciphertext)

    @property
    def peer_key(self) -> bytes:
        """The initiator's ephemeral key, another one in each handshake."""
        return self._peer_key

    def write_message(self, payload: bytes) -> bytes:
        """Raises FrameError if the initiator's ephemeral key is none of the curve's."""
        ephemeral = _new_ephemeral()
        public_key = ephemeral.public_key().public_bytes_raw()
        self._symmetric.mix_public_key(public_key)
        self._symmetric.mix_key(_agree(ephemeral, self._peer_key))
        return public_key + self._symmetric.encrypt_and_hash(payload)

    def split(self) -> tuple[CipherState, CipherState]:
        """For sending and for receiving."""
        theirs, ours = self._symmetric.split()
        return ours, theirs


def _new_ephemeral() -> X25519PrivateKey:
    return X25519PrivateKey.generate()


def _agree(ephemeral: X25519PrivateKey, public_key: bytes) -> bytes:
    try:
        return ephemeral.exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError as error:  # a point of low order: the result would not be a secret
        raise FrameError(f"a handshake with a public key that is none: {error}") from error


def _cut(message: bytes) -> tuple[bytes, bytes]:
    if len(message) < KEY_BYTES + TAG_BYTES:
        raise FrameError(f"a handshake message of {len(message)} bytes")
    return message[:KEY_BYTES], message[KEY_BYTES:]


def _hkdf(chaining_key: bytes, material: bytes, num_outputs: int) -> list[bytes]:
    """The specification's HKDF (section 4.3): `num_outputs` keys of 32 bytes."""
    secret = hmac.digest(chaining_key, material, "sha256")
    outputs = [b""]
    for number in range(1, num_outputs + 1):
        outputs.append(hmac.digest(secret, outputs[-1] + bytes([number]), "sha256"))
    return outputs[1:]


def _not_authentic() -> FrameError:
    return FrameError("bytes that the other end did not encrypt with this key, or not at this place")
