"""Anonymous shared memory: a memfd that other processes of the same user open through its owner's /proc entry.

Such memory has no name, neither in /dev/shm nor elsewhere, so nothing can be left behind: the kernel frees it when the
last process that maps it is gone. It is not limited by the size of /dev/shm either.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import secrets
import struct
from collections.abc import Iterable
from contextlib import ExitStack, suppress

import msgspec

from phalanx.errors import FrameError, PeerDiedError
from phalanx.transport.liveness import is_running

_MAGIC = b"PHALANX1"
_HEADER = struct.Struct("<8sQQ")  # magic, nonce, size_bytes
# A whole page, so that what the user gets is aligned to a page too.
_HEADER_BYTES = 4096
_NAME_PREFIX = "phalanx:"
_BLOCK_BYTES = 512
"""What stat counts in."""

_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)


class SegmentHandle(msgspec.Struct, frozen=True):
    """Where a segment is. Travels to another process of the same machine and user, which attaches with it."""

    pid: int
    fd: int
    size_bytes: int
    nonce: int
    label: str = ""


class SharedSegment:
    """`size_bytes` of zeroed memory that several processes map. `buf` starts at a page boundary.

    Closing drops the descriptor and this object's mapping; views that were taken from `buf` stay usable, and the memory
    lives until the last of them is gone.
    """

    def __init__(self, fd: int | None, mapping: mmap.mmap, handle: SegmentHandle) -> None:
        self._fd = fd
        self._mapping = mapping
        self.handle = handle
        self.buf = memoryview(mapping)[_HEADER_BYTES : _HEADER_BYTES + handle.size_bytes]

    @classmethod
    def create(cls, size_bytes: int, label: str) -> SharedSegment:
        """Make a segment that this process owns. `label` shows in /proc/PID/fd and in errors."""
        with ExitStack() as undo:
            handle = _new_segment(size_bytes, label)
            undo.callback(os.close, handle.fd)
            mapping = _mapped(handle.fd, _HEADER_BYTES + size_bytes)
            undo.pop_all()
        return cls(handle.fd, mapping, handle)

    @classmethod
    def attach(cls, handle: SegmentHandle) -> SharedSegment:
        """Map a segment of another process (or of this one).

        Raises PeerDiedError when its owner is gone, FrameError when the owner closed it or the descriptor is now
        something else (pids and descriptors are used again).
        """
        fd = _open_segment(handle)
        try:
            mapping = _mapped(fd, _HEADER_BYTES + handle.size_bytes)
        finally:
            os.close(fd)
        return cls(None, mapping, handle)

    def adopt(self, handle: SegmentHandle) -> None:
        """Have another process's segment of the same size here instead, where views that were taken stay.

        Raises what `attach` does; then all is as it was before.
        """
        assert handle.size_bytes == self.handle.size_bytes, (handle, self.handle)
        fd = _open_segment(handle)
        try:
            self._map_over(fd)
        finally:
            os.close(fd)
        self._own(None, handle)

    def detach(self, kept: Iterable[tuple[int, int]] = ()) -> None:
        """Have memory of its own here instead of what others map, where views that were taken stay.

        What lies between these places in `buf` is copied, and all else reads as zeros. Others keep what there was. No
        thread may write meanwhile. Raises OSError; then all is as it was before.
        """
        with ExitStack() as undo:
            handle = _new_segment(self.handle.size_bytes, self.handle.label)
            undo.callback(os.close, handle.fd)
            with mmap.mmap(handle.fd, _HEADER_BYTES + handle.size_bytes) as fresh:
                for start, stop in kept:
                    fresh[_HEADER_BYTES + start : _HEADER_BYTES + stop] = self.buf[start:stop]
            self._map_over(handle.fd)
            undo.pop_all()
        self._own(handle.fd, handle)

    def release(self, start: int, stop: int) -> None:
        """Give the whole pages between these places in `buf` back to the system, for all who map them.

        They read as zeros from now on, and take memory again when they are written to.
        """
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = stop // mmap.PAGESIZE * mmap.PAGESIZE
        if start < stop:
            self._mapping.madvise(mmap.MADV_REMOVE, _HEADER_BYTES + start, stop - start)

    def close(self) -> None:
        """Drop the descriptor and the mapping. May be called more than once."""
        self._own(None, self.handle)
        self.buf.release()
        with suppress(BufferError):  # somebody still holds a view; the mapping goes with the last one
            self._mapping.close()

    def __enter__(self) -> SharedSegment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _map_over(self, fd: int) -> None:
        _map_at(_address_of(self._mapping), fd, len(self._mapping))

    def _own(self, fd: int | None, handle: SegmentHandle) -> None:
        if self._fd is not None:
            os.close(self._fd)
        self._fd, self.handle = fd, handle


class SegmentHold:
    """Keeps a segment of another process alive, without mapping it. `handle` is how others attach to it from now on."""

    def __init__(self, handle: SegmentHandle) -> None:
        """Raises what SharedSegment.attach does."""
        self._fd: int | None = _open_segment(handle)
        self.handle = msgspec.structs.replace(handle, pid=os.getpid(), fd=self._fd)

    def close(self) -> None:
        """Let go of it. May be called more than once."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> SegmentHold:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def resident_bytes_of(handle: SegmentHandle) -> int:
    """Memory that a segment takes by now, whoever maps it; 0 if it is gone."""
    try:
        fd = _open_segment(handle)
    except (PeerDiedError, FrameError):
        return 0
    try:
        return os.fstat(fd).st_blocks * _BLOCK_BYTES
    finally:
        os.close(fd)


def _new_segment(size_bytes: int, label: str) -> SegmentHandle:
    """Its descriptor is the caller's."""
    with ExitStack() as undo:
        fd = os.memfd_create(f"{_NAME_PREFIX}{label}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        undo.callback(os.close, fd)
        os.ftruncate(fd, _HEADER_BYTES + size_bytes)
        # A file that shrinks under a mapping is a SIGBUS in every process that has it.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        handle = SegmentHandle(os.getpid(), fd, size_bytes, secrets.randbits(63), label)
        os.pwrite(fd, _HEADER.pack(_MAGIC, handle.nonce, size_bytes), 0)
        undo.pop_all()
    return handle


def _mapped(fd: int, size_bytes: int) -> mmap.mmap:
    """The memory of a descriptor, at addresses that stay when other memory comes there.

    mmap would keep the descriptor for as long as the addresses, so it has these alone.
    """
    mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _map_at(_address_of(mapping), fd, size_bytes)
    return mapping


def _address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def _map_at(address: int, fd: int, size_bytes: int) -> None:
    """Raises OSError."""
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
    if _libc.mmap(address, size_bytes, protection, flags, fd, 0) == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "mmap")


def _open_segment(handle: SegmentHandle) -> int:
    """A new descriptor of the segment, once it is sure that it is this one."""
    with ExitStack() as undo:
        fd = _open_of_owner(handle)
        undo.callback(os.close, fd)
        if os.fstat(fd).st_size != _HEADER_BYTES + handle.size_bytes:
            raise _not_the_segment(handle)
        if _HEADER.unpack(os.pread(fd, _HEADER.size, 0)) != (_MAGIC, handle.nonce, handle.size_bytes):
            raise _not_the_segment(handle)
        undo.pop_all()
    return fd


def _open_of_owner(handle: SegmentHandle) -> int:
    path = f"/proc/{handle.pid}/fd/{handle.fd}"
    try:
        # Looked at before it is opened: opening a stranger's FIFO or device can block or have effects.
        if not os.readlink(path).startswith(f"/memfd:{_NAME_PREFIX}"):
            raise _not_the_segment(handle)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if not is_running(handle.pid):
            raise PeerDiedError(f"the owner of {_described(handle)}", handle.pid) from error
        if isinstance(error, FileNotFoundError):
            raise _not_the_segment(handle) from error
        raise FrameError(f"{_described(handle)} cannot be opened: {error}") from error


def _not_the_segment(handle: SegmentHandle) -> FrameError:
    return FrameError(
        f"descriptor {handle.fd} of process {handle.pid} is not {_described(handle)}: "
        "its owner closed it, or is gone and its pid is in use again"
    )


def _described(handle: SegmentHandle) -> str:
    return f"the shared segment {handle.label!r} ({handle.size_bytes} bytes)"
