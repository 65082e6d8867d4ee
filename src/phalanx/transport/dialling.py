"""The node's end of a new connection: reach the other end, and come to trust each other."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from typing import cast

from phalanx.errors import DeadlineError, FrameError, StartError
from phalanx.transport.address import connect_to
from phalanx.transport.handshake import Ciphers, RefusedError, node_conversation
from phalanx.transport.keys import RunKey
from phalanx.transport.link_messages import Hello

_PAUSE_S = 0.1
"""Before dialling in again."""


def dial(
    address: str,
    port: int,
    key: RunKey,
    hello: Hello,
    *,
    party: str,
    deadline_s: float,
    source_address: str | None = None,
) -> tuple[socket.socket, Ciphers]:
    """Connect to who listens for nodes, as `party`, and shake hands. `source_address`: of this host, to dial from.

    Tries again while the other end closes the connection without a word. The connection is the caller's. Raises
    DeadlineError, StartError if it cannot be reached, does not want this node, or is another one.
    """
    expires_at = time.monotonic() + deadline_s
    where = f"{address} port {port}"
    while True:
        remaining_s = max(expires_at - time.monotonic(), 0.001)
        with ExitStack() as undo:
            connection = undo.enter_context(
                connect_to(address, port, deadline_s=remaining_s, source_address=source_address)
            )
            try:
                ciphers = _shake_hands(connection, key, hello, expires_at)
            except (RefusedError, FrameError) as error:
                raise StartError(party, f"dialling in at {where}", str(error)) from error
            except TimeoutError:
                raise DeadlineError("an answer", where, deadline_s) from None
            except ConnectionError as error:
                if time.monotonic() + _PAUSE_S >= expires_at:
                    cause = "it closes the connection: this node has not the key of its run"
                    raise StartError(party, f"dialling in at {where}", cause) from error
                time.sleep(_PAUSE_S)
                continue
            undo.pop_all()
            return connection, ciphers


def _shake_hands(connection: socket.socket, key: RunKey, hello: Hello, expires_at: float) -> Ciphers:
    """Lead the node's end of the conversation. Raises what that raises, TimeoutError, ConnectionError."""
    conversation = node_conversation(key, hello)
    step = next(conversation)
    try:
        while True:
            connection.settimeout(max(expires_at - time.monotonic(), 0.001))
            if isinstance(step, bytes):
                connection.sendall(step)
                step = next(conversation)
            else:
                step = conversation.send(_receive(connection, step))
    except StopIteration as stop:
        return cast("Ciphers", stop.value)


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    received = b""
    while len(received) < num_bytes:
        data = connection.recv(num_bytes - len(received))
        if not data:
            raise ConnectionResetError("closed in the middle of the handshake")
        received += data
    return received
