"""What can be done to a process from within. Everything here that lasts ends by itself."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import NoReturn

_MUTEX_BYTES = 64  # more than pthread_mutex_t has anywhere
_EVENT_BYTES = 64
_SIGEV_SIGNAL = 0
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


def slow(seconds: float) -> None:
    """Sleep without the GIL."""
    time.sleep(seconds)


def fail() -> NoReturn:
    """Raises InjectedError."""
    raise InjectedError("a fault plan said so")
