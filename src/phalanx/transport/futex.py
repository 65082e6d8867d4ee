"""Sleeping and waking across processes on a 32-bit word of shared memory: futex(2)."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import threading
import time
from collections.abc import Callable

from phalanx.errors import StartError

_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAIT = 0
_FUTEX_WAKE_OP = 5
_ADD_ONE = 1 << 28 | 1 << 12  # FUTEX_OP(FUTEX_OP_ADD, 1, FUTEX_OP_CMP_EQ, 0)
_EVERYBODY = 2**31 - 1

MAX_SPINNERS_PER_CORE = 4


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_int64), ("tv_nsec", ctypes.c_int64))


def _syscall_of(library: ctypes.CDLL) -> Callable[..., int]:
    syscall = library.syscall
    syscall.restype = ctypes.c_long
    return syscall


# Sleeping lets go of the GIL. Waking keeps it: it takes about a microsecond, and who lets go of the GIL while another
# thread wants it gets it back after that thread's whole switch interval, 5 ms.
_sleeping_syscall = _syscall_of(ctypes.CDLL(None, use_errno=True))
_waking_syscall = _syscall_of(ctypes.PyDLL(None))


STORES_ARE_SEEN_IN_ORDER = platform.machine() in ("x86_64", "AMD64")
"""Whether who sees one of a thread's stores sees those before it as well, without a fence between them (Intel SDM 3A,
8.2.2: stores are not reordered with other stores)."""


def new_fence() -> Callable[[], None]:
    """A function that is a full memory barrier, for the use of one thread.

    Pure Python has no atomics, but it has locks. Releasing and then taking a lock that nobody else uses is a
    read-modify-write with release semantics followed by one with acquire semantics. On ARMv8 those two are in
    barrier-order ([L]; po; [A], Arm ARM B2.3), everything before is ordered before the first and everything after is
    ordered after the second: together a full barrier, store to load included. On x86-64 either is a locked
    instruction, which is one by itself. The stores and loads between fences are single aligned 8-byte (4-byte) moves:
    items of a memoryview cast to "Q" ("I"), which CPython copies with a memcpy of constant size.
    """
    lock = threading.Lock()
    lock.acquire()
    release, acquire = lock.release, lock.acquire

    def fence() -> None:
        release()
        acquire()

    return fence


def spin_s_for(num_parties: int) -> float:
    """How long a party of `num_parties` may spin before it sleeps: 50 µs if each can have a core, 25 µs if up to four
    share one, else not at all.

    A sleeper's wake-up costs about as much, so spinning at most doubles the cost of a wait. Who spins must yield its
    core now and then, or parties that share cores would keep it from the one that is waited for. (Round trip on two
    cores to two workers: 80 µs without spinning, 25 with it; to four: 135 and 60.)
    """
    cores = len(os.sched_getaffinity(0))
    if num_parties <= cores:
        return 50e-6
    return 25e-6 if num_parties <= MAX_SPINNERS_PER_CORE * cores else 0.0


def long_spin_s_for(num_parties: int) -> float:
    """How long a party may spin that waits for another host, while calls follow each other at once: see SpinTime."""
    return 500e-6 if num_parties <= MAX_SPINNERS_PER_CORE * len(os.sched_getaffinity(0)) else 0.0


class Doorbell:
    """An event count: `ring` raises it and wakes everybody that waits for it. Any thread of any process may do either.

    To wait for a condition without losing a wake-up: read `value`, fence, test the condition, `wait` for that value to
    change, test again. Who makes the condition true fences and then rings. Count and wake-up are one system call
    (FUTEX_WAKE_OP), so several may ring at once.
    """

    def __init__(self, word: memoryview) -> None:
        """`word`: 4 writable bytes at an address divisible by 4, zero at first. It is kept mapped by this object."""
        number = _SYS_FUTEX.get(platform.machine())
        if number is None:
            raise StartError("shared memory", "starting", f"no futex call is known for {platform.machine()}")
        self._pinned = ctypes.c_uint32.from_buffer(word)
        address = ctypes.addressof(self._pinned)
        assert address % 4 == 0
        # Made once: converting the arguments at each call takes three times as long as the system call.
        self._futex = (ctypes.c_long(number), ctypes.c_long(address))
        self._wake_op = tuple(map(ctypes.c_long, (number, address, _FUTEX_WAKE_OP, _EVERYBODY, 0, address, _ADD_ONE)))
        self._count = word.cast("I")

    def value(self) -> int:
        """The count now, modulo 2**32. It may already be old when it is returned."""
        return self._count[0]

    def ring(self) -> None:
        """Raise the count and wake all that wait. Never blocks. The caller fences before it."""
        num_woken = _waking_syscall(*self._wake_op)
        assert num_woken >= 0

    def wait(self, seen: int, timeout_s: float | None) -> bool:
        """Block until the count differs from `seen`: True; or for `timeout_s` (None: no limit): False.

        Sleeps without the GIL, takes no CPU.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._count[0] == seen:
            remaining_s = None if deadline is None else deadline - time.monotonic()
            if remaining_s is not None and remaining_s <= 0:
                return False
            self._sleep(seen, remaining_s)
        return True

    def _sleep(self, seen: int, timeout_s: float | None) -> None:
        timeout = None
        if timeout_s is not None:
            whole_s = int(min(timeout_s, 1e9))
            timeout = ctypes.byref(_Timespec(whole_s, int((timeout_s - whole_s) * 1e9) % 1_000_000_000))
        if _sleeping_syscall(*self._futex, ctypes.c_long(_FUTEX_WAIT), ctypes.c_long(seen), timeout) < 0:
            code = ctypes.get_errno()
            # Changed already; a signal, whose Python handler runs when this returns; or the time is over.
            if code not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
                raise OSError(code, "FUTEX_WAIT")
