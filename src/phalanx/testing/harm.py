"""What can be done to a process from within. Everything here that lasts ends by itself."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NoReturn

_MUTEX_BYTES = 64  # more than pthread_mutex_t has anywhere
_EVENT_BYTES = 64
_SIGEV_SIGNAL = 0
_SOL_SOCKET, _SO_TYPE, _SO_DOMAIN, _SO_ATTACH_FILTER, _SO_DETACH_FILTER = 1, 3, 39, 26, 27  # asm-generic/socket.h
_INTERNET, _STREAM = (2, 10), (1,)  # AF_INET and AF_INET6; SOCK_STREAM
_ADDRESS_BYTES = 128  # sockaddr_storage
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
    libc = ctypes.CDLL(None, use_errno=True)
    nothing = _Filter(_RETURN, 0, 0, 0)
    program = _FilterProgram(1, ctypes.pointer(nothing))
    connections = [os.dup(int(name)) for name in os.listdir("/proc/self/fd") if _is_connection(libc, int(name))]
    for connection in connections:
        size = ctypes.sizeof(program)
        if libc.setsockopt(connection, _SOL_SOCKET, _SO_ATTACH_FILTER, ctypes.byref(program), size):
            raise OSError(ctypes.get_errno(), "SO_ATTACH_FILTER")

    def end() -> None:
        time.sleep(seconds)
        for connection in connections:
            ignored = ctypes.c_int()
            libc.setsockopt(connection, _SOL_SOCKET, _SO_DETACH_FILTER, ctypes.byref(ignored), ctypes.sizeof(ignored))
            os.close(connection)

    threading.Thread(target=end, name="phalanx-silence", daemon=True).start()
    return len(connections)


def _is_connection(libc: ctypes.CDLL, descriptor: int) -> bool:
    """Whether it is a TCP connection; its owner has it, and nothing is said or heard over it here."""
    found, size = ctypes.c_int(), ctypes.c_uint(ctypes.sizeof(ctypes.c_int))
    for option, allowed in ((_SO_DOMAIN, _INTERNET), (_SO_TYPE, _STREAM)):
        failed = libc.getsockopt(descriptor, _SOL_SOCKET, option, ctypes.byref(found), ctypes.byref(size))
        if failed or found.value not in allowed:
            return False
    address = ctypes.create_string_buffer(_ADDRESS_BYTES)
    return not libc.getpeername(descriptor, address, ctypes.byref(ctypes.c_uint(_ADDRESS_BYTES)))


def slow(seconds: float) -> None:
    """Sleep without the GIL."""
    time.sleep(seconds)


def fail() -> NoReturn:
    """Raises InjectedError."""
    raise InjectedError("a fault plan said so")
