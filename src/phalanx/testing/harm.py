"""What can be done to a process from within. Everything here that lasts ends by itself."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NoReturn

_MUTEX_BYTES = 64  # more than pthread_mutex_t has anywhere
_EVENT_BYTES = 64
_SIGEV_SIGNAL = 0
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27  # asm-generic/socket.h; Python has no names for them
_RETURN = 6  # linux/bpf_common.h: keep so many bytes of a packet
_NS = 10**9


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))

    @classmethod
    def of(cls, seconds: float) -> _TimeSpec:
        return cls(*divmod(int(seconds * _NS), _NS))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


class _SignalEvent(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("_rest", ctypes.c_byte * (_EVENT_BYTES - 16)),
    )


class _Filter(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("value", ctypes.c_uint),
    )


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Filter)))


class InjectedError(Exception):
    """The exception of a fault plan."""


def kill() -> NoReturn:
    """SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def stop(seconds: float) -> None:
    """SIGSTOP; returns after SIGCONT, which the kernel sends when the time is over: nobody else has to."""
    libc = ctypes.CDLL(None, use_errno=True)
    timer = ctypes.c_void_p()
    event = _SignalEvent(signal=signal.SIGCONT, notify=_SIGEV_SIGNAL)
    if libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError(ctypes.get_errno(), "timer_create")
    try:
        spec = _TimerSpec(_TimeSpec(0, 0), _TimeSpec.of(seconds))
        if libc.timer_settime(timer, 0, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), "timer_settime")
        os.kill(os.getpid(), signal.SIGSTOP)
    finally:
        libc.timer_delete(timer)


def wedge(seconds: float) -> None:
    """Wait in C with the GIL held: for a lock that this thread itself has, which no signal interrupts."""
    libc = ctypes.PyDLL(None)
    mutex = ctypes.create_string_buffer(_MUTEX_BYTES)  # zeroes are an ordinary lock that is free
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_timedlock(mutex, ctypes.byref(_TimeSpec.of(time.time() + seconds)))


def loop(seconds: float) -> None:
    """Compute without end, in Python."""
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        pass


@contextmanager
def hung_stores() -> Iterator[int]:
    """Hold the locks of all stores of Gloo that this process has made for ranks of this host, and give how many there
    are: whoever reads or writes there waits until this ends."""
    with ExitStack() as stack:
        stores = [one for one in os.listdir("/proc/self/fd") if _is_store(one)]
        for name in stores:
            store = os.open(f"/proc/self/fd/{name}", os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, store)
            fcntl.flock(store, fcntl.LOCK_EX)
        yield len(stores)


def _is_store(descriptor: str) -> bool:
    with suppress(OSError):  # it is closed by now
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:phalanx:store of ")
    return False


def silence(seconds: float) -> int:
    """Have nothing arrive any more over this process's TCP connections to others, as when a link is cut; returns how
    many there are, at once. After `seconds` all arrives that was sent meanwhile: TCP goes on trying.

    By a filter in the kernel that drops every packet, confirmations of what was sent included.
    """
    connections = _connections()
    nothing = _Filter(_RETURN, 0, 0, 0)
    program = _FilterProgram(1, ctypes.pointer(nothing))
    for connection in connections:
        connection.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(program))

    def end() -> None:
        time.sleep(seconds)
        for connection in connections:
            with connection, suppress(OSError):  # it has ended meanwhile
                connection.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)

    threading.Thread(target=end, name="phalanx-silence", daemon=True).start()
    return len(connections)


def _connections() -> list[socket.socket]:
    """Descriptors of their own for the TCP connections of this process."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with ExitStack() as undo, suppress(OSError):  # what is no socket, not connected, or closed by now
            one = undo.enter_context(socket.socket(fileno=_copy_of_socket(name)))
            one.getpeername()
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                undo.pop_all()
                found.append(one)
    return found


def _copy_of_socket(name: str) -> int:
    """Raises OSError if the descriptor is none."""
    if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
        raise OSError(errno.ENOTSOCK, name)
    return os.dup(int(name))


def slow(seconds: float) -> None:
    """Sleep without the GIL."""
    time.sleep(seconds)


def fail() -> NoReturn:
    """Raises InjectedError."""
    raise InjectedError("a fault plan said so")
