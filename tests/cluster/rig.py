"""A brain over real ranks, driven turn by turn: requests arrive and are cancelled at chosen turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from warm_launchers import LAUNCHERS

from phalanx.config import Config
from phalanx.engine.balancing import Balancing
from phalanx.engine.brain import Brain
from phalanx.executor.start import start_executor
from phalanx.models.checkpoint import resolve
from phalanx.protocol.client import Cancel, Submit
from phalanx.protocol.columns import as_floats, as_ints, ints
from phalanx.protocol.sampling import FinishReason, SamplingParams


class Arrival(msgspec.Struct, frozen=True):
    """A request that arrives at turn `at`, and that its client gives up at turn `cancelled_at`."""

    at: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    cancelled_at: int | None = None


class Outcome(msgspec.Struct):
    """What came of a request. `top` is a list of {token: logprob} for each output token."""

    tokens: list[int] = []
    finish: FinishReason | None = None
    num_cached: int = 0
    chosen: list[float] = []
    top: list[dict[int, float]] = []


class Rig:
    """Ranks that live through many runs: each run leaves them with whatever its prefix cache holds."""

    def __init__(self, checkpoint: Path, **settings: Any) -> None:
        self.config = config = Config.build(model=str(checkpoint), dtype=settings.pop("dtype", "float32"), **settings)
        resolved = resolve(config.model.model)
        with ExitStack() as stack:
            self.executor, self.capacity = start_executor(
                config, resolved, lambda *_: None, new_launcher=LAUNCHERS.launcher
            )
            stack.push(self.executor)
            self.brain = Brain(
                config,
                self.executor,
                num_blocks=self.capacity.num_blocks,
                max_model_len=self.capacity.max_model_len,
                eos_token_ids=(257,),
                balancing=Balancing(config, self.executor) if config.parallel.enable_eplb else None,
            )
            self._stack = stack.pop_all()
        self._next_id = 0

    def run(self, arrivals: Sequence[Arrival], *, max_turns: int = 20_000) -> list[Outcome]:
        """Drive the brain until every request has ended."""
        ids = [self._next_id + i for i in range(len(arrivals))]
        self._next_id += len(arrivals)
        outcomes: dict[int, Outcome] = {request_id: Outcome() for request_id in ids}
        events = defaultdict(list)
        for request_id, arrival in zip(ids, arrivals, strict=True):
            events[arrival.at].append(Submit(request_id, ints(arrival.prompt), arrival.sampling))
            if arrival.cancelled_at is not None:
                events[max(arrival.cancelled_at, arrival.at)].append(Cancel((request_id,)))
        turn = 0
        while events or self.brain.has_work():
            for event in events.pop(turn, ()):
                if isinstance(event, Submit):
                    self.brain.submit(event)
                else:
                    self.brain.cancel(event.request_ids)
            self._take(outcomes)
            turn += 1
            assert turn < max_turns, "the brain does not come to an end"
        assert all(outcome.finish is not None for outcome in outcomes.values())
        return [outcomes[request_id] for request_id in ids]

    def _take(self, outcomes: dict[int, Outcome]) -> None:
        batch = self.brain.step()
        if batch is None:
            return
        request_ids = memoryview(batch.request_ids).cast("q").tolist()
        for request_id, token in zip(request_ids, as_ints(batch.tokens).tolist(), strict=True):
            assert outcomes[request_id].finish is None, "a token after the end"
            outcomes[request_id].tokens.append(token)
        for request_id, reason in batch.finished:
            assert outcomes[request_id].finish is None, "ended twice"
            outcomes[request_id].finish = reason
        for request_id, count in batch.cached:
            outcomes[request_id].num_cached = count
        if batch.logprobs is not None:
            columns = batch.logprobs
            ids, values = as_ints(columns.top_ids), as_floats(columns.top_logprobs)
            for i, (entry, chosen) in enumerate(zip(as_ints(columns.entries), as_floats(columns.chosen), strict=True)):
                outcome = outcomes[request_ids[entry]]
                row = slice(i * columns.width, (i + 1) * columns.width)
                outcome.chosen.append(float(chosen))
                outcome.top.append(dict(zip(ids[row].tolist(), values[row].tolist(), strict=True)))

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
