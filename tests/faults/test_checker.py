"""Streams of different kinds through kills and faults of all sorts, as `phalanx chaos --check` has them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from phalanx.config import Config
from phalanx.testing import memory_limit
from phalanx.testing.blows import Blow
from phalanx.testing.chaos import settings_for_chaos
from phalanx.testing.checker import Checker, Round
from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

BLOWS = (
    Blow(kind="kill", rank=1, after=0.4),
    Blow(kind="kill", rank=0, state="prefill", step=2, collective=3),
    Blow(kind="kill-switch", rank=1, collective=500, after=0.2),
    Blow(kind="error", rank=1, state="decode", collective=1),
    Blow(kind="skip", rank=0, state="decode", step=2),
    Blow(kind="kill", rank=0, state="idle"),
    *([Blow(kind="oom", rank=1, state="decode", step=2, collective=1)] if memory_limit.is_possible() else []),
    Blow(kind="kill-watcher", rank=0, after=0.2),
    Blow(kind="kill-reload", rank=1, collective=300, after=0.3),
    Blow(kind="kill-resize", rank=1, collective=200, after=0.2),
    Blow(kind="kill", rank=1, state="decode", step=3, collective=2),
)


@pytest.mark.skipif(not memory_limit.is_possible(), reason="no memory limits here: no kill for lack of memory is tried")
def test_a_kill_for_lack_of_memory_is_among_them() -> None:
    assert any(blow.kind == "oom" for blow in BLOWS)


WITH_A_FULL_DISK = (Blow(kind="kill", rank=1, after=0.3), Blow(kind="kill-reload", rank=0, collective=300, after=0.2))


async def rounds(config: Config) -> tuple[list[Round], list[str]]:
    checker = await Checker.start(config, num_streams=8, seed=5)
    try:
        found = [await checker.round(index, blow) for index, blow in enumerate(BLOWS)]
        expected = checker._expected[1]
        expected.tokens[3] += 1
        wrong = await checker.round(len(BLOWS), Blow(kind="kill", rank=0, after=0.3))
        assert wrong.violations == (f"stream 1: token 3 of {len(expected.tokens)} differs",), "it does look"
    finally:
        left = await checker.close()
    return found, left


async def rounds_with_a_full_disk(config: Config) -> tuple[list[Round], list[str]]:
    """What the engine says of them cannot be written."""
    checker = await Checker.start(config, num_streams=4, seed=5, log=Path("/dev/full"))
    try:
        found = [await checker.round(index, blow) for index, blow in enumerate(WITH_A_FULL_DISK)]
    finally:
        left = await checker.close()
    return found, left


def engine(folder: Path, **settings: Any) -> Config:
    sizes = {"tensor_parallel_size": 2, "max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory": 4 << 20}
    return Config.build(model=str(write_checkpoint(folder / "llama")), **settings_for_chaos(**sizes, **settings))


def test_clients_see_nothing_but_pauses(tmp_path: Path) -> None:
    found, left = asyncio.run(rounds(engine(tmp_path)))
    assert left == []
    assert {str(one.blow): one.violations for one in found if one.violations} == {}
    assert all(one.has_happened for one in found)
    assert all(one.rungs for one in found if one.blow.ends_a_line)
    assert all(one.num_streams >= 8 for one in found)
    assert all(one.again_s > 0 for one in found if one.blow.kind == "kill-switch")


def test_clients_see_nothing_of_a_full_disk_either(tmp_path: Path) -> None:
    found, left = asyncio.run(rounds_with_a_full_disk(engine(tmp_path, ledger_events="/dev/full")))
    assert left == [] and [(one.has_happened, one.violations) for one in found] == [(True, ()), (True, ())]
