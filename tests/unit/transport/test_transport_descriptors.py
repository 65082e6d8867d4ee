"""Descriptors travel to whoever has a handle, and to nobody else."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from phalanx.errors import DeadlineError, FrameError, PeerDiedError
from phalanx.transport import descriptors
from phalanx.transport.descriptors import DescriptorHandle, DescriptorOffers, take_descriptors


@pytest.fixture
def offers() -> Iterator[DescriptorOffers]:
    offers = DescriptorOffers()
    yield offers
    offers.close()


def offered(offers: DescriptorOffers, text: bytes) -> DescriptorHandle:
    fd = os.memfd_create("offered")
    os.write(fd, text)
    return offers.offer(fd, text.decode())


def contents(fd: int) -> bytes:
    try:
        return os.pread(fd, 100, 0)
    finally:
        os.close(fd)


def test_each_handle_gets_its_own_from_another_process_too(offers: DescriptorOffers) -> None:
    handles = [offered(offers, b"%d" % i) for i in range(200)]
    pid = os.fork()
    if pid == 0:
        taken = take_descriptors(handles[::-1])
        right = not any(map(os.get_inheritable, taken)) and [*map(contents, taken)] == [
            b"%d" % i for i in reversed(range(200))
        ]
        os._exit(0 if right else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert take_descriptors([]) == []


def test_what_is_withdrawn_is_closed_and_cannot_be_had(offers: DescriptorOffers) -> None:
    kept, gone = offered(offers, b"kept"), offered(offers, b"gone")
    (taken,) = take_descriptors([gone])
    offers.withdraw(gone)
    offers.withdraw(gone)
    with pytest.raises(FrameError, match=f"process {os.getpid()} does not offer 'kept'"):
        take_descriptors([kept, gone])
    assert contents(taken) == b"gone", "it is of whoever has taken it"
    assert [*map(contents, take_descriptors([kept]))] == [b"kept"]


def test_a_guess_gets_nothing(offers: DescriptorOffers) -> None:
    handle = offered(offers, b"kept")
    with pytest.raises(FrameError):
        take_descriptors([msgspec.structs.replace(handle, nonce=handle.nonce + 1)])


def test_nonsense_does_not_keep_others_from_theirs(offers: DescriptorOffers) -> None:
    handle = offered(offers, b"kept")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect("\0" + handle.address)
        stranger.send(b"nonsense, but not eight bytes")
    assert [*map(contents, take_descriptors([handle]))] == [b"kept"]


def test_other_users_get_nothing(offers: DescriptorOffers, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = offered(offers, b"kept")
    monkeypatch.setattr(descriptors, "_user_of", lambda peer: os.geteuid() + 1)
    with pytest.raises(FrameError):
        take_descriptors([handle])


def test_an_owner_that_is_gone_is_named() -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        handle = offered(DescriptorOffers(), b"its memory")
        os.write(write, msgspec.msgpack.encode(handle))
        signal.pause()
    handle = msgspec.msgpack.decode(os.read(read, 1000), type=DescriptorHandle)
    for fd in (read, write):
        os.close(fd)
    assert [*map(contents, take_descriptors([handle]))] == [b"its memory"]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with pytest.raises(PeerDiedError, match=rf"the owner of its memory \(pid {pid}\) died"):
        take_descriptors([handle])


def test_an_owner_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "ANSWER_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(f"\0phalanx-test-silent-{os.getpid()}")
        silent.listen()
        handle = DescriptorHandle(os.getpid(), f"phalanx-test-silent-{os.getpid()}", 1, "its memory")
        with pytest.raises(DeadlineError, match=r"waited 0\.05 s for descriptors from the owner of its memory"):
            take_descriptors([handle])


def test_closing_ends_the_thread_and_closes_what_is_left() -> None:
    before = threading.active_count()
    offers = DescriptorOffers()
    fd = os.memfd_create("offered")
    offers.offer(fd, "one")
    offers.close()
    offers.close()
    assert threading.active_count() == before
    with pytest.raises(OSError):
        os.fstat(fd)
