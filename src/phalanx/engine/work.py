"""The requests of one client: their streams, and which of them its engine has."""

from __future__ import annotations

from collections.abc import Iterable

from phalanx.engine.stream import Origin, RequestStream, Streams
from phalanx.engine.trials import ENDS_OF_A_CULPRIT, Trials
from phalanx.protocol.client import Submit, TokenBatch
from phalanx.protocol.sampling import FinishReason

Ids = list[int]


class Work:
    """Outlives the engines that do it.

    Several methods give the requests that the engine must be told to cancel: those that it has, and nobody waits for.
    """

    def __init__(self) -> None:
        self._streams = Streams()
        self._trials = Trials(lambda request_id: self._streams[request_id].num_tokens)

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._streams

    def add(self, request_id: int, stream: RequestStream) -> None:
        """One more, the last to come: ids grow."""
        self._streams.add(request_id, stream)
        self._trials.add(request_id)

    def take_next(self) -> list[Submit]:
        """What the engine is to be given now. From then on it has these requests."""
        return [self._streams[request_id].submit(request_id) for request_id in self._trials.take_next()]

    def take(self, batch: TokenBatch, origin: Origin | None = None) -> tuple[Ids, Ids]:
        """Hand out what the engine, as `origin` tells, has made. Gives requests with news, and those to cancel."""
        touched, stopped = self._streams.apply(batch, origin)
        for request_id in touched:
            if request_id not in self._streams:
                self._trials.drop(request_id)
        return touched, stopped

    def drop(self, request_id: int) -> Ids:
        """Take no more interest in a request, if it has not ended. Gives what is to cancel."""
        return self._withdrawn([request_id] if self._streams.drop(request_id) else [])

    def release(self, stream: RequestStream | None) -> tuple[Ids, Ids]:
        """Let go of one request, or of all, which do not end. Gives those, and which of them to cancel."""
        released = self._streams.drop_all() if stream is None else self._streams.drop_stream(stream)
        return released, self._withdrawn(released)

    def cancel_all(self) -> tuple[Ids, Ids]:
        """End all. Gives those that had not ended, and which of them to cancel."""
        cancelled = self._streams.end_all(FinishReason.CANCELLED)
        return cancelled, self._withdrawn(cancelled)

    def engine_ended(self, reason: str, *, is_from_outside: bool) -> Ids:
        """No engine has any of them now. Gives the request that ends with it, if it was to blame."""
        culprit = self._trials.engine_ended(is_from_outside=is_from_outside)
        if culprit is None:
            return []
        complaint = f"the engine has ended {ENDS_OF_A_CULPRIT} times in a row while it had this request"
        self._streams[culprit].finish(FinishReason.ERROR, f"{complaint}, which got no further; the last time: {reason}")
        self._streams.drop(culprit)
        self._trials.drop(culprit)
        return [culprit]

    def _withdrawn(self, request_ids: Iterable[int]) -> Ids:
        return [request_id for request_id in request_ids if self._trials.drop(request_id)]
