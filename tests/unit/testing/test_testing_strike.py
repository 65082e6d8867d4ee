"""What a blow sets off beside the kill."""

from __future__ import annotations

from phalanx.membership.resize import Size
from phalanx.testing.strike import smaller


def test_a_resize_takes_half_of_the_ranks_of_a_replica_or_half_of_the_replicas() -> None:
    assert smaller(Size(2, 4)) == Size(2, 2)
    assert smaller(Size(2, 2)) == Size(2, 1)
    assert smaller(Size(4, 1)) == Size(2, 1)
