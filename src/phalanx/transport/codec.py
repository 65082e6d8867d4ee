"""Messages to the parts of a frame, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from phalanx.errors import FrameError
from phalanx.transport.frame import Part, as_part

if TYPE_CHECKING:
    from typing_extensions import Buffer

Sent = TypeVar("Sent")
Received = TypeVar("Received")


class Codec(Generic[Sent, Received]):
    """The encoded message is the first part; its buffers are the others."""

    def __init__(self, sent_type: Any, received_type: Any) -> None:
        """Raises TypeError for a type that msgspec cannot handle."""
        msgspec.msgpack.Decoder(sent_type)  # the encoder would say so only with the first message
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(received_type)
        self._head = bytearray()
        self._head_alone = (self._head,)

    def encode(self, message: Sent, buffers: Sequence[Buffer]) -> Sequence[Part]:
        """Parts that are valid until the next call."""
        self._encoder.encode_into(message, self._head)
        return (self._head, *map(as_part, buffers)) if buffers else self._head_alone

    def decode(self, parts: list[memoryview], sender: object) -> tuple[Received, list[memoryview]]:
        """The message, and the buffers as views of the same memory. `sender` is who to blame."""
        try:
            return self._decoder.decode(parts[0]), parts[1:]
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise FrameError(f"a message from {sender} that is none of ours: {error}") from error
