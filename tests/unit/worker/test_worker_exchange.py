"""What a rank makes of the brain's messages while it waits for other ranks."""

from __future__ import annotations

from collections import deque

from phalanx.protocol.worker import Call, Ping, Publish, Published, Stop
from phalanx.worker.exchange import BrainExchange


class Bench:
    """An exchange of epoch 3, and what the brain has sent."""

    def __init__(self, *calls: Call) -> None:
        self.sent: list[Publish] = []
        self.calls = deque(calls)
        self.asked: list[float | None] = []
        self.exchange = BrainExchange(3, "10.0.0.1", self.sent.append, self._get)

    def _get(self, timeout_s: float | None) -> Call | None:
        self.asked.append(timeout_s)
        return self.calls.popleft() if self.calls else None


def published(*keys: str, epoch: int = 3) -> Call:
    return Call(0, Published(tuple(Publish(epoch, "tp", key, key.encode()) for key in keys)), ())


def test_calls_that_come_meanwhile_keep_their_order() -> None:
    ping, stop = Call(1, Ping(), (0,)), Call(2, Stop(), ())
    bench = Bench(published("a"), ping, published("b"), stop, published("c"))
    assert bench.exchange.wait("tp", ["a", "b"], 1.0) == {"a": b"a", "b": b"b"}
    assert bench.exchange.next_call(0.0) == ping
    assert bench.exchange.next_call(0.0) == stop
    assert bench.exchange.next_call(0.0) is None
    assert bench.exchange.wait("tp", ["c"], 0.0) == {"c": b"c"}


def test_what_this_rank_publishes_it_finds_at_once() -> None:
    bench = Bench()
    bench.exchange.publish("tp", "mine", b"1")
    assert bench.sent == [Publish(3, "tp", "mine", b"1")]
    assert bench.exchange.wait("tp", ["mine"], 0.0) == {"mine": b"1"}
    assert bench.exchange.wait("pp", ["mine"], 0.0) == {}


def test_a_wait_that_ends_tells_what_it_has() -> None:
    bench = Bench(published("a"))
    assert bench.exchange.wait("tp", ["a", "b"], 0.01) == {"a": b"a"}
    assert all(timeout_s is not None and timeout_s <= 0.01 for timeout_s in bench.asked)


def test_what_belongs_to_another_epoch_is_dropped() -> None:
    bench = Bench(published("a", epoch=2), published("a", "b", epoch=4))
    bench.exchange.take_in()
    assert bench.exchange.wait("tp", ["a", "b"], 0.0) == {}
    assert bench.exchange.num_stale == 3
