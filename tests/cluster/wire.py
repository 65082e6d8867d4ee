"""A cable that delays and loses Ethernet frames, where there is no `tc netem`: two TAP devices, and this between them.

    wire.py A B  DELAY LOSS (from A to B)  DELAY LOSS (from B to A)

Frames come out as the kernel would put them on a real wire: segmented and with checksums. TCP at both ends sees the
delay and the loss, and does what it does.
"""

from __future__ import annotations

import collections
import errno
import fcntl
import os
import random
import select
import struct
import sys
import time

_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_LONGEST_FRAME = 65_536


def open_tap(name: str) -> int:
    """A new TAP device, which is there for as long as the descriptor is open."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


class Way:
    """One direction: frames in the order of their coming, each with the time at which it may go on."""

    def __init__(self, source: int, sink: int, delay_s: float, loss: float, dice: random.Random) -> None:
        self.source = source
        self._sink = sink
        self._delay_s = delay_s
        self._loss = loss
        self._dice = dice
        self._waiting: collections.deque[tuple[float, bytes]] = collections.deque()

    def take(self, now: float) -> None:
        while True:
            try:
                frame = os.read(self.source, _LONGEST_FRAME)
            except BlockingIOError:
                return
            if self._dice.random() >= self._loss:
                self._waiting.append((now + self._delay_s, frame))

    def pass_on(self, now: float) -> None:
        while self._waiting and self._waiting[0][0] <= now:
            try:
                os.write(self._sink, self._waiting.popleft()[1])
            except OSError as error:
                if error.errno != errno.EIO:  # that device is not up yet: the frame is lost
                    raise

    def due(self) -> float | None:
        return self._waiting[0][0] if self._waiting else None


def main() -> None:
    name_a, name_b, *numbers = sys.argv[1:]
    there_delay_s, there_loss, back_delay_s, back_loss = map(float, numbers)
    a, b = open_tap(name_a), open_tap(name_b)
    dice = random.Random(0)
    ways = (Way(a, b, there_delay_s, there_loss, dice), Way(b, a, back_delay_s, back_loss, dice))
    poll = select.poll()
    for way in ways:
        poll.register(way.source, select.POLLIN)
    os.write(1, b"ready\n")
    while True:
        dues = [due for way in ways if (due := way.due()) is not None]
        pause_ms = max(min(dues) - time.monotonic(), 0.0) * 1000 + 0.5 if dues else None
        ready = {fd for fd, _ in poll.poll(pause_ms)}
        now = time.monotonic()
        for way in ways:
            if way.source in ready:
                way.take(now)
            way.pass_on(now)


if __name__ == "__main__":
    main()
