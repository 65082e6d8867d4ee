"""When each rank computed: shows whether the stages of a pipeline overlap, and how long they wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phalanx.worker.methods import remote_method

if TYPE_CHECKING:
    from phalanx.worker.worker import Worker

Spans = list[tuple[float, float]]
"""When something began and ended, in seconds of the host's monotonic clock."""

EXTENSION = f"{__name__}:StageClock"


class StageClock:
    """A worker extension (`worker_extension_cls`). On a GPU it would time launches; on a CPU it times the work."""

    def __init__(self, worker: Worker) -> None:
        self._spans: Spans = []
        self._layers_take_s = 0.0
        for name in ("hidden_states", "logits"):
            setattr(worker.model, name, self._timed(getattr(worker.model, name), is_padded=name == "hidden_states"))

    @remote_method
    def make_layers_take(self, seconds: float) -> None:
        """From now on a stage sleeps after its layers until they have taken so long."""
        self._layers_take_s = seconds

    @remote_method
    def take_spans(self) -> Spans:
        """When this rank computed since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def _timed(self, compute: Callable[..., Any], *, is_padded: bool) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began_at = time.monotonic()
            result = compute(*arguments)
            if is_padded:
                time.sleep(max(0.0, began_at + self._layers_take_s - time.monotonic()))
            self._spans.append((began_at, time.monotonic()))
            return result

        return run


def total_s(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)


def both(spans: Spans, others: Spans) -> Spans:
    """When both computed."""
    overlaps = [
        (max(begin, other_begin), min(end, other_end)) for begin, end in spans for other_begin, other_end in others
    ]
    return [(begin, end) for begin, end in overlaps if begin < end]
