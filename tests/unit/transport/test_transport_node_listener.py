"""Whoever is no node of the run is refused, counted and logged once; nodes come in all the same."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import msgspec
import pytest

from phalanx.errors import DeadlineError, StartError
from phalanx.transport import node_listener
from phalanx.transport.address import connect_to, listen_on
from phalanx.transport.handshake import MAX_MESSAGE_BYTES, PROLOGUE, VERSION, Refusal
from phalanx.transport.keys import RunKey
from phalanx.transport.link_messages import Hello, Welcome
from phalanx.transport.node_listener import MAX_PENDING, JoinedNode, NodeListener
from phalanx.transport.noise import KEY_BYTES, Initiator
from phalanx.transport.relay import NodeRelay

KEY = RunKey.new()
HELLO = Hello(VERSION, "node-b", (2, 3), 1, 16)
ENCODED_HELLO = msgspec.msgpack.encode(HELLO)


def _why_not(hello: Hello) -> str | None:
    return None if hello.node == "node-b" else f"{hello.node} is not awaited"


@pytest.fixture(params=["127.0.0.1", "::1"])
def listener(request: pytest.FixtureRequest) -> Iterator[NodeListener]:
    made = NodeListener(listen_on(request.param), KEY, _why_not, Welcome("brain", os.getpid(), 10.0))
    yield made
    made.close()


def _connect(listener: NodeListener) -> socket.socket:
    return connect_to(listener.address, listener.port, deadline_s=5)


def _first_message(key: RunKey = KEY, payload: bytes = ENCODED_HELLO) -> bytes:
    message = Initiator(key.secret, PROLOGUE).write_message(payload)
    return len(message).to_bytes(2, "big") + message


def _message_of_low_order() -> bytes:
    """The right key for the run, and a public key that gives no secret with any other."""
    initiator, zero = Initiator(KEY.secret, PROLOGUE), bytes(KEY_BYTES)
    initiator._symmetric.mix_public_key(zero)
    message = zero + initiator._symmetric.encrypt_and_hash(ENCODED_HELLO)
    return len(message).to_bytes(2, "big") + message


def _await_refusal(listener: NodeListener, refusal: Refusal, count: int = 1) -> None:
    expires_at = time.monotonic() + 10
    while listener.refusals[refusal] < count:
        assert time.monotonic() < expires_at, listener.refusals
        time.sleep(0.002)
    assert listener.refusals[refusal] == count


def _node_comes_in(listener: NodeListener) -> None:
    relay = NodeRelay("node-b", [2, 3])
    try:
        relay.dial(listener.address, listener.port, KEY, deadline_s=10)
        (joined,) = _joined(listener)
        assert (joined.hello.node, joined.hello.ranks, joined.hello.pid) == ("node-b", (2, 3), os.getpid())
        joined.connection.close()
    finally:
        relay.close()


def _joined(listener: NodeListener) -> list[JoinedNode]:
    return listener.joined(10)


def test_a_node_comes_in(listener: NodeListener) -> None:
    _node_comes_in(listener)
    assert not listener.refusals


STRANGERS = {
    "another key": (_first_message(RunKey.new()), Refusal.WRONG_KEY),
    "no key": (_first_message(RunKey(bytes(32))), Refusal.WRONG_KEY),
    "a changed byte": (_first_message()[:-1] + b"\0", Refusal.WRONG_KEY),
    "zeros": (b"\0\60" + bytes(48), Refusal.WRONG_KEY),
    "HTTP": (b"GET / HTTP/1.1\r\n\r\n", Refusal.OVERSIZE),
    "the greatest length": (b"\xff\xff", Refusal.OVERSIZE),
    "too great a length": ((MAX_MESSAGE_BYTES + 1).to_bytes(2, "big"), Refusal.OVERSIZE),
    "nothing": (b"\0\0", Refusal.GARBAGE),
    "too little": (b"\0\5hello", Refusal.GARBAGE),
    "a public key of low order": (_message_of_low_order(), Refusal.GARBAGE),
    "no hello": (_first_message(payload=b"hello"), Refusal.GARBAGE),
    "no text": (_first_message(payload=ENCODED_HELLO.replace(b"node-b", b"node-\xff")), Refusal.GARBAGE),
}


@pytest.mark.parametrize(("said", "refusal"), STRANGERS.values(), ids=STRANGERS)
def test_strangers_get_no_answer(listener: NodeListener, said: bytes, refusal: Refusal) -> None:
    with _connect(listener) as stranger:
        stranger.sendall(said)
        _await_refusal(listener, refusal)
        with suppress(ConnectionResetError):  # it is, if not everything was read
            assert stranger.recv(1) == b""
    _node_comes_in(listener)
    assert listener.refusals.total() == 1


@pytest.mark.parametrize("said", [b"", _first_message()[:20]], ids=["nothing", "a part"])
def test_who_leaves_is_counted(listener: NodeListener, said: bytes) -> None:
    with _connect(listener) as stranger:
        stranger.sendall(said)
    _await_refusal(listener, Refusal.LEFT)
    _node_comes_in(listener)


@pytest.mark.parametrize(
    "said", [b"", _first_message()[:20], _first_message()], ids=["nothing", "a part", "all but the proof"]
)
def test_who_says_nothing_or_not_enough_is_not_awaited_for_long(
    listener: NodeListener, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_listener, "HANDSHAKE_TIMEOUT_S", 0.2)
    with _connect(listener) as stranger:
        stranger.sendall(said)
        _node_comes_in(listener)
        _await_refusal(listener, Refusal.SILENT)


def test_dripping_bytes_gain_no_time(listener: NodeListener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_listener, "HANDSHAKE_TIMEOUT_S", 0.3)
    started = time.monotonic()
    with _connect(listener) as stranger:
        for byte in _first_message():
            try:
                stranger.sendall(bytes([byte]))
            except ConnectionError:
                break
            time.sleep(0.01)
            if listener.refusals:
                break
        _await_refusal(listener, Refusal.SILENT)
    assert time.monotonic() - started < 1.5


def test_a_recorded_handshake_is_refused(listener: NodeListener) -> None:
    recorded = _first_message()
    with _connect(listener) as first:
        first.sendall(recorded)
        assert len(first.recv(1 << 16)) > 50
        with _connect(listener) as second:
            second.sendall(recorded)
            _await_refusal(listener, Refusal.REPLAYED)
            assert second.recv(1) == b""
    _node_comes_in(listener)


def test_a_recorded_handshake_of_a_node_that_never_came_does_not_help_either(listener: NodeListener) -> None:
    with _connect(listener) as thief:  # it has kept the message from the brain, so that this never saw it
        thief.sendall(_first_message())
        assert len(thief.recv(1 << 16)) > 50
        thief.sendall(b"\0\x20" + bytes(32))
        _await_refusal(listener, Refusal.REPLAYED)
    _node_comes_in(listener)


def test_a_crowd_of_silent_connections_keeps_no_node_out(listener: NodeListener) -> None:
    with ExitStack() as crowd:
        for _ in range(MAX_PENDING + 8):
            crowd.enter_context(_connect(listener))
        _await_refusal(listener, Refusal.CROWDED, 8)
        _node_comes_in(listener)


def test_it_is_logged_once_a_kind(listener: NodeListener, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for number in range(1, 6):
            with _connect(listener) as stranger:
                stranger.sendall(_first_message(RunKey.new()))
                _await_refusal(listener, Refusal.WRONG_KEY, number)
    (record,) = caplog.records
    assert "does not have the key" in record.getMessage()
    assert listener.address in record.getMessage()
    assert KEY.secret.hex() not in caplog.text


def test_the_totals_are_logged_at_the_end(listener: NodeListener, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1, 4):
        with _connect(listener) as stranger:
            stranger.sendall(_first_message(RunKey.new()))
            _await_refusal(listener, Refusal.WRONG_KEY, number)
    with _connect(listener) as stranger:
        stranger.sendall(b"\0\0")
        _await_refusal(listener, Refusal.GARBAGE)
    caplog.clear()
    listener.close()
    listener.close()
    assert caplog.messages == [
        "refused 4 connections in all: it does not have the key of this run (3); what it sends is no handshake (1)"
    ]


def test_a_node_that_is_not_awaited_hears_why(listener: NodeListener) -> None:
    relay = NodeRelay("node-x", [2, 3])
    try:
        with pytest.raises(StartError, match="node-x is not awaited"):
            relay.dial(listener.address, listener.port, KEY, deadline_s=10)
    finally:
        relay.close()
    _await_refusal(listener, Refusal.UNEXPECTED)


def test_a_node_with_another_key_hears_that_it_may_have_one(listener: NodeListener) -> None:
    relay = NodeRelay("node-b", [2, 3])
    try:
        with pytest.raises(StartError, match="key"):
            relay.dial(listener.address, listener.port, RunKey.new(), deadline_s=0.5)
    finally:
        relay.close()
    assert listener.refusals[Refusal.WRONG_KEY] > 1


def test_a_brain_that_does_not_answer_is_a_deadline() -> None:
    relay = NodeRelay("node-b", [2, 3])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        try:
            with pytest.raises(DeadlineError, match=r"an answer from 127\.0\.0\.1"):
                relay.dial(*silent.getsockname(), KEY, deadline_s=0.2)
        finally:
            relay.close()


def test_a_stranger_in_the_brains_place_is_found_out() -> None:
    relay = NodeRelay("node-b", [2, 3])
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def answer() -> None:
            connection, _ = stranger.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"\0\60" + bytes(range(48)))
                connection.recv(1)

        answering = threading.Thread(target=answer)
        answering.start()
        try:
            with pytest.raises(StartError, match="did not encrypt"):
                relay.dial(*stranger.getsockname(), KEY, deadline_s=5)
        finally:
            relay.close()
            answering.join()


def test_closing_ends_what_is_pending() -> None:
    listener = NodeListener(listen_on("127.0.0.1"), KEY, _why_not, Welcome("brain", 1, 10.0))
    with _connect(listener) as pending:
        pending.sendall(_first_message())
        assert pending.recv(1 << 16)
        listener.close()
        listener.close()
        assert pending.recv(1) == b""
    with pytest.raises(StartError):
        _connect(listener)
