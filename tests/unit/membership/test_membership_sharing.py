"""Engines whose ranks compute with the same memory of weights, each in this process; who writes takes its own first."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.engine.maintenance import Maintenance
from phalanx.errors import PhalanxError
from phalanx.executor.start import settle
from phalanx.membership import sharing
from phalanx.membership.formation import start_formation
from phalanx.membership.sharing import kind_of, may_share
from phalanx.memory.shared_weights import SharedWeights, decode_shared, encode_shared, resident_bytes
from phalanx.models.checkpoint import resolve
from phalanx.models.weights import WeightReader
from phalanx.protocol.client import Maintained, MaintenanceOrder, Reload, Sleep, Submit, Wake
from phalanx.protocol.columns import as_ints, ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import write_checkpoint

PROMPT = tuple((7 * i) % 250 for i in range(20))
NUM_TOKENS = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
WITHIN_S = 30.0


class Served:
    """What an engine's loop does, without its process."""

    def __init__(self, checkpoint: Path, offered: SharedWeights | None, **settings: Any) -> None:
        here = {"launcher": "inline", "block_size": 4, "threads_per_rank": 1}
        config = Config.build(model=str(checkpoint), device="cpu", **{**here, **settings})
        found = resolve(str(checkpoint))
        self.formation = start_formation(config, found, lambda _: None, offered)
        capacity = self.formation.capacity
        self.brain = Brain(
            config,
            self.formation,
            num_blocks=capacity.num_blocks,
            max_model_len=capacity.max_model_len,
            eos_token_ids=(),
        )
        self.maintenance = Maintenance(config, found, self.brain, self.formation)
        self._num_requests = 0

    def made(self) -> list[int]:
        """A request's output."""
        self.brain.reset_prefix_cache()
        self.brain.submit(Submit(self._num_requests, ints(PROMPT), GREEDY))
        self._num_requests += 1
        tokens: list[int] = []
        while self.brain.has_work():
            if (batch := self.brain.step()) is not None:
                tokens += as_ints(batch.tokens).tolist()
        return tokens

    def maintain(self, order: MaintenanceOrder) -> Maintained:
        self.maintenance.begin(order)
        expires_at = time.monotonic() + WITHIN_S
        while (outcome := self.maintenance.turn()) is None:
            assert time.monotonic() < expires_at
            if self.brain.has_work():
                self.brain.step()
        return outcome


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("new"), seed=1)


@pytest.fixture(scope="module")
def of_old(old: Path) -> list[int]:
    return made_alone(old)


@pytest.fixture(scope="module")
def of_new(new: Path) -> list[int]:
    return made_alone(new)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def engine(checkpoint: Path, stack: ExitStack, offered: SharedWeights | None = None, **settings: Any) -> Served:
    served = Served(checkpoint, offered, max_num_seqs=2, **{"share_weights": "always", **settings})
    stack.callback(served.formation.close)
    return served


def made_alone(checkpoint: Path) -> list[int]:
    with ExitStack() as stack:
        return engine(checkpoint, stack).made()


def offer_of(served: Served) -> SharedWeights:
    found = served.formation.share_weights()
    assert found is not None
    return decode_shared(encode_shared(found))


def segments_of(served: Served) -> set[int]:
    """Those that its weights lie in, by their nonces."""
    assert served.formation._recovery is not None
    held = served.formation._recovery._memory.of_ranks()[0]
    return {handle.nonce for handle in held.part(lambda name: name not in held.cache).segments}


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> None:
        raise AssertionError("the checkpoint is read")

    monkeypatch.setattr(WeightReader, "fill", fill)


def test_nothing_is_read_and_the_memory_outlives_who_has_read_it(
    old: Path, of_old: list[int], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engine(old, stack)
    assert not first.formation.shares_weights
    offered = offer_of(first)
    assert resident_bytes(encode_shared(offered)) > sum(first.formation.capacity.weight_bytes) // 2
    forbid_reading(monkeypatch)
    second = engine(old, stack, offered)
    assert segments_of(first) == segments_of(second)
    assert first.made() == second.made() == of_old
    for one in (first, second):
        assert one.formation.stats().shares_weights, "is told"  # type: ignore[union-attr]
    first.formation.close()
    assert resident_bytes(encode_shared(offered)) == 0, "nobody has it from that one any more"
    third = engine(old, stack, offer_of(second))
    second.formation.close()
    assert third.made() == of_old


def test_what_is_offered_may_be_gone_or_of_others(
    old: Path, new: Path, of_old: list[int], of_new: list[int], stack: ExitStack
) -> None:
    first = engine(old, stack)
    offered = offer_of(first)
    other = engine(new, stack, offered)
    assert not other.formation.shares_weights and other.made() == of_new
    first.formation.close()
    late = engine(old, stack, offered)
    assert not late.formation.shares_weights and late.made() == of_old


@pytest.mark.parametrize(("who", "pack_weights"), [(0, True), (1, True), (1, False)])
def test_other_weights_of_one_are_not_the_others_before_they_are_taken(
    old: Path,
    new: Path,
    of_old: list[int],
    of_new: list[int],
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    who: int,
    pack_weights: bool,
) -> None:
    """Whether it is the one that has read them, or the one that came later; and they are read only once."""
    first = engine(old, stack, pack_weights=pack_weights)
    both = [first, engine(old, stack, offer_of(first), pack_weights=pack_weights)]
    writer, other = both[who], both[1 - who]
    assert writer.maintain(Reload(str(new), "now", 60.0)).error is None
    assert writer.made() == of_new and other.made() == of_old
    assert not writer.formation.shares_weights and other.formation.shares_weights
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        assert other.maintain(Reload(str(new), "now", 60.0, encode_shared(offer_of(writer)))).error is None
    assert other.made() == writer.made() == of_new
    assert segments_of(writer) == segments_of(other)
    assert writer.maintain(Reload(str(old), "now", 60.0, encode_shared(offer_of(other)))).error is None
    assert writer.made() == of_old and other.made() == of_new, "these were no weights of that checkpoint, which is read"


def test_one_sleeps_and_the_other_computes(
    old: Path, new: Path, of_old: list[int], of_new: list[int], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = engine(old, stack)
    sleeper = engine(old, stack, offer_of(other))
    shared = segments_of(other)
    assert sleeper.maintain(Sleep(1)).error is None
    assert segments_of(sleeper) == shared and sleeper.formation.shares_weights
    assert sleeper.maintain(Sleep(2)).error is None
    assert not sleeper.formation.shares_weights and other.made() == of_old
    assert sleeper.maintain(Wake(str(new))).error is None
    assert sleeper.made() == of_new and other.made() == of_old
    assert sleeper.maintain(Sleep(2)).error is None
    forbid_reading(monkeypatch)
    assert sleeper.maintain(Wake(str(old), encode_shared(offer_of(other)))).error is None
    assert sleeper.made() == other.made() == of_old and segments_of(sleeper) == shared


def test_who_cannot_be_held_in_its_sleep_wakes_with_what_it_reads(
    old: Path, of_old: list[int], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = engine(old, stack)
    sleeper = engine(old, stack, offer_of(other))

    def follow(told: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(sleeper.formation._recovery, "follow", follow)
        assert sleeper.maintain(Sleep(2)).error is None
    assert sleeper.maintain(Wake(None)).error is None
    assert sleeper.made() == other.made() == of_old


@pytest.mark.slow
def test_a_rank_with_a_process_of_its_own_is_killed(old: Path, of_old: list[int], stack: ExitStack) -> None:
    first = engine(old, stack)
    second = engine(old, stack, offer_of(first), launcher="local")
    assert second.made() == first.made() == of_old and second.formation.shares_weights
    os.kill(second.formation._line.pids()[0], signal.SIGKILL)
    with pytest.raises(PhalanxError) as caught:
        second.formation.check_health()
    epoch, keeps_cache, _ = second.formation.heal(caught.value)
    second.brain.rewind(epoch, keeps_cache=keeps_cache, failure=str(caught.value))
    assert second.formation.stats().healed == {"new line": 1}  # type: ignore[union-attr]
    assert second.formation.shares_weights and segments_of(second) == segments_of(first)
    first.formation.close()
    assert second.made() == of_old


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"tensor_parallel_size": 2}, True),
        ({"share_weights": "never"}, False),
        ({"heal": False}, False),
        ({"worker_extension_cls": "a:B"}, False),
    ],
)
def test_who_may_share(old: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: bool) -> None:
    def config(**more: Any) -> Config:
        return settle(Config.build(model=str(old), device="cpu", **settings, **more), resolve(str(old)))

    monkeypatch.setattr(sharing, "num_memory_nodes", lambda: 1)
    assert may_share(config()) == expected
    monkeypatch.setattr(sharing, "num_memory_nodes", lambda: 2)
    assert not may_share(config())
    if "share_weights" not in settings:
        assert may_share(config(share_weights="always")) == expected


def test_what_has_to_be_the_same(old: Path, new: Path) -> None:
    def kind(checkpoint: Path = old, **settings: Any) -> object:
        found = resolve(str(checkpoint))
        return kind_of(settle(Config.build(model=str(checkpoint), device="cpu", **settings), found), found)

    apart = [
        kind(),
        kind(new),
        kind(dtype="bfloat16"),
        kind(tensor_parallel_size=2),
        kind(pipeline_parallel_size=2),
        kind(pack_weights=False),
    ]
    assert len({msgspec.msgpack.encode(one) for one in apart}) == len(apart)
    assert kind(max_num_seqs=3, block_size=4) == kind()
