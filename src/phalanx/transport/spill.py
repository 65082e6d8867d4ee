"""Frames that are larger than a slot travel in a shared segment of their own; the slot holds only where it is."""

from __future__ import annotations

from collections import deque

from phalanx.transport.shared_memory import SegmentHandle, SharedSegment

# A sequence of large frames (weights, logits) would else pay for fresh pages each time, which cost more than the copy.
_SPARE_BYTES = 64 * 1024 * 1024


class SpillWriter:
    """Segments for one ring's large frames: in flight until all readers passed them, then one is kept as a spare."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._in_flight: deque[tuple[int, SharedSegment]] = deque()
        self._spare: SharedSegment | None = None

    def segment(self, sequence: int, size_bytes: int) -> SharedSegment:
        """Memory of at least `size_bytes` for frame number `sequence`."""
        spare, self._spare = self._spare, None
        if spare is not None and spare.handle.size_bytes < size_bytes:
            spare.close()
            spare = None
        segment = spare or SharedSegment.create(size_bytes, f"large frame of {self._label}")
        self._in_flight.append((sequence, segment))
        return segment

    def reclaim(self, num_passed: int) -> None:
        """Take back the segments of frames below number `num_passed`: every reader is done with those."""
        while self._in_flight and self._in_flight[0][0] < num_passed:
            _, segment = self._in_flight.popleft()
            if self._spare is None and segment.handle.size_bytes <= _SPARE_BYTES:
                self._spare = segment
            else:
                segment.close()

    def __bool__(self) -> bool:
        """Whether any is in flight."""
        return bool(self._in_flight)

    def close(self) -> None:
        for _, segment in self._in_flight:
            segment.close()
        self._in_flight.clear()
        if self._spare is not None:
            self._spare.close()
            self._spare = None


class SpillReader:
    """The other end: keeps the last segment mapped, as the writer uses its spare again."""

    def __init__(self) -> None:
        self._segment: SharedSegment | None = None

    def memory(self, handle: SegmentHandle) -> memoryview:
        """The large frame's memory. Raises PeerDiedError, FrameError as `SharedSegment.attach` does."""
        if self._segment is None or self._segment.handle.nonce != handle.nonce:
            self.close()
            self._segment = SharedSegment.attach(handle)
        return self._segment.buf

    def close(self) -> None:
        if self._segment is not None:
            self._segment.close()
            self._segment = None
