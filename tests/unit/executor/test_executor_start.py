"""Who is told of which groups, and what becomes of the cache that the ranks have room for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.config import Config
from phalanx.errors import ConfigError, DeadlineError
from phalanx.executor.allocation import allocate_cache, fit_model_len
from phalanx.executor.deadline import Deadline
from phalanx.executor.line_plan import LinePlan
from phalanx.executor.start import _open_groups, _report_inline, _specs, settle, start_executor
from phalanx.protocol.client import StartProgress
from phalanx.protocol.worker import AllocateCache, CommandBody, Done, Loaded, Measured, MeasureMemory, Progress
from phalanx.topology.grid import Grid

CHECKPOINT: Any = SimpleNamespace(max_model_len=512, num_layers=3, dtype="float32", path=Path("model"))


def fit(num_blocks: int, **settings: Any) -> int:
    config = Config.build(model="m", block_size=16, **settings)
    return fit_model_len(config, CHECKPOINT, num_blocks, block_bytes=1000)


def test_the_models_limit_is_shortened_to_what_fits() -> None:
    assert fit(100) == 512
    assert fit(10) == 160
    assert fit(10, max_model_len=100) == 100


@pytest.mark.parametrize(
    ("settings", "field", "value", "says"),
    [
        ({"kv_cache_memory": 999}, "kv_cache_memory", 999, "at least one block of 1000 bytes"),
        ({"device": "cpu"}, "kv_cache_memory", None, "at least one block of 1000 bytes"),
        ({"device": "cuda"}, "gpu_memory_utilization", 0.9, "one block of KV cache: 1000 bytes"),
        ({"device": "cuda", "kv_cache_memory": 5}, "kv_cache_memory", 5, "at least one block"),
        ({"max_model_len": 20}, "max_model_len", 20, "raise kv_cache_memory to 2000 bytes"),
    ],
)
def test_no_room_names_what_the_user_wrote(settings: dict[str, Any], field: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        fit(0, **settings)
    assert (caught.value.field, caught.value.value) == (field, value)


def test_a_rank_is_told_of_its_own_groups_and_errors_will_name_global_ranks() -> None:
    config = Config.build(model="m", tensor_parallel_size=2, pipeline_parallel_size=2, device="cpu")
    with ExitStack() as stack:
        specs = _specs(config, CHECKPOINT, _open_groups(config, Grid(2, 2), stack), [None] * 4)
    assert [[(group.name, group.ranks) for group in spec.groups] for spec in specs] == [
        [("tp@0", (0, 1)), ("pp0-1@0", (0, 2))],
        [("tp@0", (0, 1)), ("pp0-1@1", (1, 3))],
        [("tp@1", (2, 3)), ("pp0-1@0", (0, 2))],
        [("tp@1", (2, 3)), ("pp0-1@1", (1, 3))],
    ]
    assert {group.name: group.runs_ahead for spec in specs for group in spec.groups} == {
        "tp@0": False,
        "tp@1": False,
        "pp0-1@0": True,
        "pp0-1@1": True,
    }


def test_a_stage_of_one_rank_needs_no_memory_to_meet_in() -> None:
    config = Config.build(model="m", pipeline_parallel_size=2, device="cpu", collective_backend="gloo")
    with ExitStack() as stack:
        groups = _open_groups(config, Grid(1, 2), stack)
    assert [(group.name, group.backend) for group in groups] == [
        ("tp@0", "single"),
        ("tp@1", "single"),
        ("pp0-1@0", "gloo"),
    ]


def test_more_stages_than_layers_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size: 4 .* at most 3"):
        settle(Config.build(model="m", pipeline_parallel_size=4, device="cpu"), CHECKPOINT)


class Stages:
    """Ranks that have room for different numbers of blocks."""

    world_size = 2

    def __init__(self, *measured: Measured) -> None:
        self.measured = measured
        self.allocated: list[AllocateCache] = []
        self.measurements: list[MeasureMemory] = []
        self.clock: Clock | None = None
        self.deadlines_s: list[float] = []

    def await_loaded(self, on_progress: object, deadline_s: float) -> list[Loaded]:
        self._take_time(deadline_s)
        return LOADED

    def submit(self, body: CommandBody, *, deadline_s: float) -> Any:
        self._take_time(deadline_s)
        if isinstance(body, AllocateCache):
            self.allocated.append(body)
        if isinstance(body, MeasureMemory):
            self.measurements.append(body)
        replies: Sequence[object] = self.measured if isinstance(body, MeasureMemory) else [Done()] * 2
        return SimpleNamespace(result=lambda: replies)

    def _take_time(self, deadline_s: float) -> None:
        self.deadlines_s.append(deadline_s)
        if self.clock is not None:
            self.clock.now += 4.0

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None: ...


class Clock:
    """The time of deadlines, which passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("phalanx.executor.deadline.time", SimpleNamespace(monotonic=lambda: self.now))


LOADED = [Loaded(weight_bytes=1, device="cpu", dtype="float32")] * 2


def test_the_stage_with_the_least_room_decides_for_all() -> None:
    executor: Any = Stages(Measured(cache_bytes=20_000, block_bytes=2000), Measured(cache_bytes=7000, block_bytes=1000))
    capacity = allocate_cache(executor, Config.build(model="m", block_size=16), CHECKPOINT, LOADED, Deadline(1.0))
    assert (capacity.num_blocks, capacity.block_bytes) == (7, (2000, 1000))
    assert executor.allocated == [AllocateCache(num_blocks=7, max_model_len=112)]


def test_ranks_that_are_awaited_capture_later() -> None:
    executor: Any = Stages(Measured(cache_bytes=20_000, block_bytes=2000), Measured(cache_bytes=7000, block_bytes=1000))
    config = Config.build(model="m", block_size=16)
    allocate_cache(executor, config, CHECKPOINT, LOADED, Deadline(1.0), LinePlan(is_awaited=True))
    config = Config.build(model="m", block_size=16, worker_extension_cls="module:Name")
    allocate_cache(executor, config, CHECKPOINT, LOADED, Deadline(1.0), LinePlan(is_awaited=True))
    assert [order.captures_later for order in executor.allocated] == [True, False], "all graphs have what it does"


def test_the_advice_counts_what_the_largest_stage_needs() -> None:
    executor: Any = Stages(Measured(cache_bytes=4000, block_bytes=1000), Measured(cache_bytes=4000, block_bytes=2000))
    config = Config.build(model="m", block_size=16, max_model_len=48)
    with pytest.raises(ConfigError, match="raise kv_cache_memory to 6000 bytes"):
        allocate_cache(executor, config, CHECKPOINT, LOADED, Deadline(1.0))


def test_a_block_for_padding_is_for_no_request_and_is_asked_for() -> None:
    measured = [
        Measured(cache_bytes=4000, block_bytes=1000),
        Measured(cache_bytes=4000, block_bytes=1000, num_padding=1),
    ]
    executor: Any = Stages(*measured)
    capacity = allocate_cache(executor, Config.build(model="m", block_size=16), CHECKPOINT, LOADED, Deadline(1.0))
    assert capacity.num_blocks == 3
    with pytest.raises(ConfigError, match="raise kv_cache_memory to 5000 bytes"):
        config = Config.build(model="m", block_size=16, max_model_len=64)
        allocate_cache(Stages(*measured), config, CHECKPOINT, LOADED, Deadline(1.0))


@pytest.mark.parametrize(("device", "measurements"), [("cpu", []), ("cuda", [MeasureMemory(sizes_cache=False)])])
def test_a_line_after_another_one_gets_a_cache_as_large(device: str, measurements: list[MeasureMemory]) -> None:
    """Ranks with GPUs only find out what can be captured: another line's memory is not theirs to count."""
    first: Any = Stages(*[Measured(cache_bytes=16_000, block_bytes=1000)] * 2)
    config = Config.build(model="m", block_size=16, device=device)
    capacity = allocate_cache(first, config, CHECKPOINT, LOADED, Deadline(1.0))
    assert first.measurements == [MeasureMemory()]
    second: Any = Stages(*[Measured(cache_bytes=0, block_bytes=1000)] * 2)
    line = LinePlan(capacity=capacity)
    assert allocate_cache(second, config, CHECKPOINT, LOADED, Deadline(1.0), line) == capacity
    assert second.measurements == measurements and second.allocated == first.allocated


def test_one_deadline_is_for_all_phases_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    executor: Any = Stages(*[Measured(cache_bytes=16_000, block_bytes=1000)] * 2)
    executor.clock = clock = Clock(monkeypatch)

    def launch(*_: object) -> Any:
        clock.now += 1.0
        return executor

    monkeypatch.setattr("phalanx.executor.start._launch", launch)
    start_executor(Config.build(model="m", device="cpu", start_timeout_s=10.0), CHECKPOINT, lambda *_: None)
    assert executor.deadlines_s == [9.0, 5.0, 1.0]


def test_an_inline_start_that_takes_too_long_ends_where_it_tells_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    deadline, told = Deadline(2.0), list[StartProgress]()
    clock.now = 1.9
    _report_inline(told.append, deadline, Progress("loading", 1, 2))
    clock.now = 2.5
    with pytest.raises(DeadlineError, match=r"waited 2\.5 s for the end of its start from rank 0"):
        _report_inline(told.append, deadline, Progress("loading", 2, 2))
    assert [progress.done for progress in told] == [1, 2]


@pytest.mark.parametrize(("num_ranks", "is_ahead"), [(1, False), (2, True)])
def test_no_step_is_planned_ahead_where_nobody_computes_meanwhile(num_ranks: int, is_ahead: bool) -> None:
    """One rank in this process, on a CPU, computes a step while it is given to it."""
    settled = settle(Config.build(model="m", tensor_parallel_size=num_ranks, device="cpu"), CHECKPOINT)
    assert settled.scheduler.async_scheduling == is_ahead
