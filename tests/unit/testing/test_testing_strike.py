"""What a blow sets off beside the kill."""

from __future__ import annotations

import pytest

from phalanx.config import Config
from phalanx.membership import room
from phalanx.membership.resize import Size
from phalanx.testing.strike import smaller, why_no_way_back


def test_a_resize_takes_half_of_the_ranks_of_a_replica_or_half_of_the_replicas() -> None:
    assert smaller(Size(2, 4)) == Size(2, 2)
    assert smaller(Size(2, 2)) == Size(2, 1)
    assert smaller(Size(4, 1)) == Size(2, 1)


@pytest.mark.parametrize(
    ("cores", "threads", "expected"),
    [(4, 1, None), (3, 1, "3 cores, too few for 4 ranks"), (4, 2, "4 cores, too few for 4 ranks of 2"), (8, 2, None)],
)
def test_there_is_a_way_back_if_growing_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, expected: str | None
) -> None:
    monkeypatch.setattr(room, "num_cores", lambda: cores)
    config = Config.build(model="m", device="cpu", tensor_parallel_size=4, threads_per_rank=threads)
    found = why_no_way_back(config)
    assert found is None if expected is None else found is not None and expected in found
