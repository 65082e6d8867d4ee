"""How a process shows that its loop turns: a count in memory that whoever has started it has, too."""

from __future__ import annotations

import mmap
import os

CHECK_S = 1.0
"""How often somebody who is to beat is looked at."""

SILENT_CHECKS = 15
"""So often in a row without a beat, and it hangs. It may have had no core: that takes a host with some hundred times
as much to do as it has cores.
"""

STARTING_CHECKS = 15
"""So many more until its first beat: it has to be loaded, maybe from a disk that others wait for, too."""

_BYTES = 8


class Beats:
    """Those of one process after another, which get `descriptor`. For one thread, which calls `have_stopped` every
    CHECK_S.
    """

    def __init__(self) -> None:
        """Raises OSError if there is no more memory, or descriptor."""
        self.descriptor = os.memfd_create("beats")
        try:
            os.ftruncate(self.descriptor, _BYTES)
            self._memory = mmap.mmap(self.descriptor, _BYTES)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._seen = 0
        self._num_silent = -STARTING_CHECKS

    def begin(self) -> None:
        """Another process is to beat from now on."""
        self._seen = self._count()  # what the one before has beaten since it was looked at is none of this one's
        self._num_silent = -STARTING_CHECKS

    def have_stopped(self) -> bool:
        """Whether it has now been looked at so often without a beat that it hangs; said once. Not the time counts, as
        this process may have been stopped for as long."""
        seen = self._count()
        self._num_silent = self._num_silent + 1 if seen == self._seen else 0
        self._seen = seen
        return self._num_silent == SILENT_CHECKS

    def _count(self) -> int:
        return int.from_bytes(self._memory[:], "little")

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)


class Beating:
    """The end of who beats."""

    def __init__(self, descriptor: int) -> None:
        self._words = memoryview(mmap.mmap(descriptor, _BYTES)).cast("Q")

    def beat(self) -> None:
        """Another turn."""
        self._words[0] += 1
