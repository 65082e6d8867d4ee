"""File descriptors for other processes of the same user, on the same host.

What has a path, or is a memfd, can be opened through its owner's /proc entry. Of a device's object that makes another,
empty one: the descriptor itself has to travel, over a socket. (`pidfd_getfd` would do as well, and is often forbidden:
in containers, and to who is no ancestor of the owner.) The socket's name is abstract, so nothing is left of it in a
file system.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import msgspec

from phalanx.errors import DeadlineError, FrameError, PeerDiedError
from phalanx.transport.liveness import is_running

ANSWER_S = 5.0
"""For a process to hand out a batch of descriptors; one that computes has its GIL busy for less."""

_BATCH = 128
"""Descriptors in a message; the kernel takes 253."""

_NONCE_BYTES = 8
_GIVEN, _UNKNOWN = b"+", b"-"
_FD = struct.Struct("i")
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid


class DescriptorHandle(msgspec.Struct, frozen=True):
    """Which descriptor, and who offers it. Travels to another process of the same host and user."""

    pid: int
    address: str
    """The socket's name, without the zero that it begins with."""
    nonce: int
    label: str = ""


class DescriptorOffers:
    """Gives descriptors that it owns to whoever has a handle, from a thread of its own. For any thread."""

    def __init__(self) -> None:
        self._descriptors: dict[int, int] = {}
        self._changing = threading.Lock()
        self._address = f"phalanx-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ExitStack() as undo:
            undo.callback(self._listener.close)
            self._listener.bind("\0" + self._address)
            self._listener.listen()
            undo.pop_all()
        self._thread = threading.Thread(target=self._serve, name="phalanx-descriptors", daemon=True)
        self._thread.start()

    def offer(self, fd: int, label: str) -> DescriptorHandle:
        """From now on `fd` belongs to this object. `label` shows in errors."""
        handle = DescriptorHandle(os.getpid(), self._address, secrets.randbits(63), label)
        with self._changing:
            self._descriptors[handle.nonce] = fd
        return handle

    def withdraw(self, handle: DescriptorHandle) -> None:
        """Close it, unless that has been done."""
        with self._changing:
            fd = self._descriptors.pop(handle.nonce, None)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Close all. May be called more than once."""
        with suppress(OSError):  # it is closed already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(2 * ANSWER_S)
        self._listener.close()
        with self._changing:
            descriptors, self._descriptors = self._descriptors, {}
        for fd in descriptors.values():
            os.close(fd)

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:  # it was closed
                return
            with peer, suppress(OSError, struct.error):  # who asks may go away, or say nothing, or nonsense
                peer.settimeout(ANSWER_S)
                if _user_of(peer) == os.geteuid():
                    self._answer(peer)

    def _answer(self, peer: socket.socket) -> None:
        while asked := peer.recv(_NONCE_BYTES * _BATCH):
            nonces = [nonce for (nonce,) in struct.iter_unpack("Q", asked)]
            with self._changing:  # none is closed before it has left
                fds = [self._descriptors[nonce] for nonce in nonces if nonce in self._descriptors]
                if len(fds) == len(nonces):
                    socket.send_fds(peer, [_GIVEN], fds)
                    continue
            peer.send(_UNKNOWN)


def take_descriptors(handles: Sequence[DescriptorHandle]) -> list[int]:
    """New descriptors of what is offered, all by the same process; they are the caller's to close.

    Raises PeerDiedError if that process is gone, FrameError if it does not offer one of them any more, DeadlineError if
    it does not answer. Then there are none.
    """
    if not handles:
        return []
    first = handles[0]
    assert all(handle.address == first.address for handle in handles), "they are of several processes"
    with ExitStack() as undo, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(ANSWER_S)
        taken: list[int] = []
        try:
            peer.connect("\0" + first.address)
            for i in range(0, len(handles), _BATCH):
                for fd in _take_batch(peer, handles[i : i + _BATCH]):
                    undo.callback(os.close, fd)
                    taken.append(fd)
        except TimeoutError as error:
            raise DeadlineError("descriptors", f"the owner of {first.label} (pid {first.pid})", ANSWER_S) from error
        except ConnectionError as error:
            if not is_running(first.pid):
                raise PeerDiedError(f"the owner of {first.label}", first.pid) from error
            raise _not_offered(first) from error
        undo.pop_all()
    return taken


def _take_batch(peer: socket.socket, handles: Sequence[DescriptorHandle]) -> list[int]:
    peer.send(struct.pack(f"{len(handles)}Q", *(handle.nonce for handle in handles)))
    # socket.recv_fds drops the flag.
    room = socket.CMSG_LEN(len(handles) * _FD.size)
    answer, messages, _, _ = peer.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
    fds = [fd for _, _, data in messages for (fd,) in _FD.iter_unpack(data[: len(data) // _FD.size * _FD.size])]
    if answer == _GIVEN and len(fds) == len(handles):
        return fds
    for fd in fds:
        os.close(fd)
    if not answer:
        raise ConnectionResetError
    if answer == _GIVEN:
        raise OSError(f"{len(fds)} of {len(handles)} descriptors have come: too many are open (ulimit -n)")
    raise _not_offered(handles[0])


def _user_of(peer: socket.socket) -> int:
    _, user, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(user)


def _not_offered(handle: DescriptorHandle) -> FrameError:
    return FrameError(f"process {handle.pid} does not offer {handle.label!r}: its owner has closed it")
