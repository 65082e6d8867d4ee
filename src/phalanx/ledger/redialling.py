"""A link that is dialled until somebody answers, and again when it breaks, without anybody waiting for it."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from phalanx.errors import DeadlineError, FrameError, PeerDiedError, StartError

LEAST_PAUSE_S = 0.1
"""Between two attempts, the first time; then twice as long each time."""

LONGEST_PAUSE_S = 5.0

SOUND_S = 5.0
"""After a link that has lasted for so long the pauses are short again."""

WARN_S = 3.0
"""Who is not reached for so long is told of. At the end of a run links break a moment before all is over."""

Broken = PeerDiedError | DeadlineError | FrameError

log = logging.getLogger("phalanx.ledger")


class _Link(Protocol):
    def close(self) -> None: ...


L = TypeVar("L", bound=_Link)


class Redialling(Generic[L]):
    """For the use of one thread, which is never held up. A context manager: the link ends with it."""

    def __init__(self, reach: Callable[[], L], whom: str) -> None:
        """`reach` is called in threads of its own; it raises StartError, DeadlineError or OSError if it cannot. `whom`:
        for the log."""
        self._reach = reach
        self._whom = whom
        self._lock = threading.Lock()
        self._link: L | None = None
        self._is_dialling = self._is_closed = False
        self._pause_s = LEAST_PAUSE_S
        self._dial_at = self._linked_at = float("-inf")
        self._missed_since = time.monotonic()
        self._why = "it has not answered yet"
        self._has_warned = False

    def __enter__(self) -> Redialling[L]:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_closed = True
            if self._link is not None:
                self._link.close()

    def link(self) -> L | None:
        """The one there is; None while there is none, and it is dialled."""
        with self._lock:
            if self._link is None:
                self._go_on()
            return self._link

    def lose(self, error: Broken) -> None:
        """The link is of no more use."""
        with self._lock:
            if self._link is not None:
                self._link.close()
            self._link, self._why = None, str(error)
            self._missed_since = now = time.monotonic()
            if now - self._linked_at >= SOUND_S:
                self._pause_s = LEAST_PAUSE_S
            self._put_off(now)

    def _go_on(self) -> None:
        """With the lock held."""
        now = time.monotonic()
        if now - self._missed_since >= WARN_S and not self._has_warned:
            self._has_warned = True
            log.warning("%s cannot be reached, and is dialled until it can: %s", self._whom, self._why)
        if not self._is_dialling and now >= self._dial_at:
            self._is_dialling = True
            threading.Thread(target=self._dial, name="phalanx-redialling", daemon=True).start()

    def _dial(self) -> None:
        """In a thread of its own."""
        link, why = None, "the attempt has failed by a mistake of ours"
        try:
            link = self._reach()
        except (StartError, DeadlineError, OSError) as error:
            why = str(error)
        finally:  # whatever it was: there is another attempt
            with self._lock:
                self._is_dialling = False
                self._come_of_it(link, why)

    def _come_of_it(self, link: L | None, why: str) -> None:
        """With the lock held."""
        now = time.monotonic()
        if link is None:
            self._why = why
            self._put_off(now)
        elif self._is_closed:
            link.close()
        else:
            self._link, self._linked_at = link, now
            if self._has_warned:
                log.info("%s is reached again, after %.1f s", self._whom, now - self._missed_since)
            self._has_warned = False

    def _put_off(self, now: float) -> None:
        """Many may have lost the same one at once, so they do not come back at once."""
        self._dial_at = now + random.uniform(0.5, 1.0) * self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
