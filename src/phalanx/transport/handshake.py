"""How a node and the brain come to trust each other: what they say on a new connection, as coroutines without sockets.

Each yields either bytes to send or a number of bytes to receive, which it is then sent. So one thread of the brain
leads many such conversations at once, and the node's end needs no more than a loop.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Generator
from typing import TypeAlias

import msgspec

from phalanx.errors import FrameError
from phalanx.transport.keys import RunKey
from phalanx.transport.link_messages import Answer, Hello, Passed, Refused, Welcome
from phalanx.transport.noise import KEY_BYTES, TAG_BYTES, CipherState, Initiator, Responder
from phalanx.transport.wire import decode_note, encode_note
from phalanx.version import __version__

PROLOGUE = b"phalanx relay 2"
"""The number is that of the format of all that follows on the connection."""
LENGTH_BYTES = 2
MAX_MESSAGE_BYTES = 16 * 1024
"""Of a handshake's messages: before the other end is known, it cannot make us take more."""
VERSION = __version__

Conversation: TypeAlias = "Generator[bytes | int, bytes, Ciphers]"
"""Yields what is to be sent, or how many bytes are to be received."""


class Ciphers(msgspec.Struct, frozen=True):
    """What the two ends agreed on: a key for each direction. `peer` is what the other end said of itself."""

    sending: CipherState
    receiving: CipherState
    peer: Hello | Welcome


class Refusal(enum.StrEnum):
    """Why a connection was refused."""

    WRONG_KEY = "it does not have the key of this run"
    REPLAYED = "it repeats a handshake that was recorded"
    GARBAGE = "what it sends is no handshake"
    OVERSIZE = "it announces a message longer than any of a handshake"
    SILENT = "it did not finish the handshake in time"
    LEFT = "it left in the middle of the handshake"
    CROWDED = "too many others were waiting at once, and it was the oldest of them"
    UNEXPECTED = "it is no node that is awaited"


class RefusedError(Exception):
    """The connection is not for us. `answer` tells a node that has the key why."""

    def __init__(self, refusal: Refusal, detail: str = "", answer: bytes = b"") -> None:
        super().__init__(detail)
        self.refusal = refusal
        self.answer = answer


def node_conversation(key: RunKey, hello: Hello) -> Conversation:
    """The node's end. Raises FrameError if the brain has another key, RefusedError if it does not want this node."""
    initiator = Initiator(key.secret, PROLOGUE)
    yield _message(initiator.write_message(msgspec.msgpack.encode(hello)))
    length = int.from_bytes((yield LENGTH_BYTES), "big")
    if not KEY_BYTES + TAG_BYTES <= length <= MAX_MESSAGE_BYTES:
        raise FrameError(f"a handshake message of {length} bytes")
    answer = msgspec.msgpack.decode(initiator.read_message((yield length)), type=Answer)
    if isinstance(answer, Refused):
        raise RefusedError(Refusal.UNEXPECTED, answer.reason)
    sending, receiving = initiator.split()
    yield _message(sending.encrypt(encode_note(Passed(0, hello.ranks[0]))))
    return Ciphers(sending, receiving, answer)


def brain_conversation(
    key: RunKey, seen: set[bytes], why_not: Callable[[Hello], str | None], welcome: Welcome
) -> Conversation:
    """The brain's end. `seen` keeps the ephemeral keys of nodes; `why_not` says why a node with the key is not wanted.

    Raises RefusedError.
    """
    responder = Responder(key.secret, PROLOGUE)
    first = yield from _receive(KEY_BYTES + TAG_BYTES)
    try:
        encoded = responder.read_message(first)
    except FrameError as error:
        raise RefusedError(Refusal.WRONG_KEY) from error
    if responder.peer_key in seen:
        raise RefusedError(Refusal.REPLAYED)
    seen.add(responder.peer_key)
    try:
        hello = msgspec.msgpack.decode(encoded, type=Hello)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RefusedError(Refusal.GARBAGE, str(error)) from error
    reason = why_not(hello)
    answer = msgspec.msgpack.encode(welcome if reason is None else Refused(reason))
    try:
        second = _message(responder.write_message(answer))
    except FrameError as error:
        raise RefusedError(Refusal.GARBAGE, str(error)) from error
    if reason is not None:
        raise RefusedError(Refusal.UNEXPECTED, reason, second)
    yield second
    sending, receiving = responder.split()
    try:
        decode_note(receiving.decrypt((yield from _receive(TAG_BYTES))))
    except FrameError as error:  # it cannot make keys of our answer: somebody repeats what a node has said
        raise RefusedError(Refusal.REPLAYED) from error
    return Ciphers(sending, receiving, hello)


def _receive(min_bytes: int) -> Generator[bytes | int, bytes, bytes]:
    length = int.from_bytes((yield LENGTH_BYTES), "big")
    if length < min_bytes:
        raise RefusedError(Refusal.GARBAGE, f"a message of {length} bytes")
    if length > MAX_MESSAGE_BYTES:
        raise RefusedError(Refusal.OVERSIZE, f"{length} bytes")
    return (yield length)


def _message(message: bytes) -> bytes:
    assert len(message) <= MAX_MESSAGE_BYTES
    return len(message).to_bytes(LENGTH_BYTES, "big") + message
