"""What a line of ranks waits for before its actors are asked for. Needs no Ray that runs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from phalanx.config import Config
from phalanx.errors import DeadlineError, PlacementError, StartError
from phalanx.executor.deadline import Deadline
from phalanx.executor.ray import agents as agents_module
from phalanx.executor.ray import quarters as module
from phalanx.executor.ray.agents import Agents
from phalanx.executor.ray.quarters import Quarters
from phalanx.executor.ray.reservation import Reservation, busy_places
from phalanx.topology.placement import Demand, Node, Place

ALPHA = Node("a", "alpha", "10.0.0.1", 1, 1, is_driver=True)
BETA = Node("b", "beta", "10.0.0.2", 1, 1)
GAMMA = Node("c", "gamma", "10.0.0.3", 1, 1)
DEMAND = Demand("CPU", 1.0, False)
GROUP: Any = SimpleNamespace(id=SimpleNamespace(hex=lambda: "f00"))
FREE = {"a": {"CPU_group_0_f00": 1.0}, "b": {"CPU_group_1_f00": 1.0}}


class Cluster:
    """What Ray would say."""

    def __init__(self) -> None:
        self.alive = [ALPHA, BETA]
        self.free_until_then: list[dict[str, dict[str, float]]] = []
        """What is free at the next looks; then all is."""

    def nodes(self, resource: str) -> list[Node]:
        return self.alive

    def free(self) -> dict[str, dict[str, float]]:
        return self.free_until_then.pop(0) if self.free_until_then else FREE

    def reserve(self, *_: object, **__: object) -> Reservation:
        if len(self.alive) < 2:
            raise PlacementError("there is room for 1", "a table")
        nodes = {node.node_id: node for node in self.alive}
        places = tuple(Place(rank, node_id, bundle=rank) for rank, node_id in enumerate(nodes))
        return Reservation(GROUP, places, nodes, DEMAND)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    context = SimpleNamespace(gcs_address="10.0.0.1:6379")
    monkeypatch.setattr(
        module, "ray", SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)
    )
    monkeypatch.setattr(module, "connect", lambda *_, **__: found)
    monkeypatch.setattr(module, "reserve", found.reserve)
    monkeypatch.setattr(module, "is_gone", lambda _: False)
    monkeypatch.setattr(module, "split_groups", lambda *_: ())
    monkeypatch.setattr(module, "MOVE_POLL_S", 0.01)
    monkeypatch.setattr(module, "Crew", FakeCrew)
    return found


class FakeCrew:
    has_ray = True

    def __init__(self, *arguments: Any) -> None:
        self.nodes = [place.node_id for place in arguments[3].places]

    def introduce(self, on_progress: object) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def hire(cluster: Cluster) -> Callable[..., Any]:
    """The second line and those after it, as they are hired."""
    config = Config.build(model="m", launcher="ray", tensor_parallel_size=2, device="cpu")
    quarters = Quarters(config, lambda *_: None)
    quarters.hire("m", 1, lambda *_: None, Deadline(1.0))

    def next_line(timeout_s: float = 5.0, *, has_memory: bool = False) -> Any:
        return quarters.hire("m", 2, lambda *_: None, Deadline(timeout_s), has_memory=has_memory)

    next_line.quarters = quarters  # type: ignore[attr-defined]
    return next_line


def test_bundles_are_waited_for(cluster: Cluster, hire: Callable[..., Any]) -> None:
    cluster.free_until_then = [{}, {"a": FREE["a"]}]
    assert hire(has_memory=True).nodes == ["a", "b"]
    assert not cluster.free_until_then


def test_bundles_that_are_never_free(cluster: Cluster, hire: Callable[..., Any]) -> None:
    cluster.free_until_then = [{"a": FREE["a"]}] * 1000
    with pytest.raises(DeadlineError, match=r"waited 0\.0\d+ s for bundles to be free from rank 1 on beta"):
        hire(0.02)


def test_another_node_has_room(cluster: Cluster, hire: Callable[..., Any]) -> None:
    cluster.alive = [ALPHA, GAMMA]
    with pytest.raises(StartError, match="rank 1 on beta did not start: a lost node has taken its memory along"):
        hire(has_memory=True)
    assert hire().nodes == ["a", "c"]


def test_another_node_comes(cluster: Cluster, hire: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.alive = [ALPHA]
    monkeypatch.setattr(module.time, "sleep", lambda _: cluster.alive.append(GAMMA))
    assert hire().nodes == ["a", "c"]


def test_no_other_node(cluster: Cluster, hire: Callable[..., Any]) -> None:
    cluster.alive = [ALPHA]
    complaint = r"rank 1 on beta did not start: no other place in 0\.0\d+ s .*: there is room for 1 \(while placing\)$"
    with pytest.raises(StartError, match=complaint):
        hire(0.02)


def test_nobody_comes_any_more(cluster: Cluster, hire: Callable[..., Any]) -> None:
    hire.quarters.vacate()  # type: ignore[attr-defined]
    with pytest.raises(StartError, match="the engine ends"):
        hire()


def test_without_rays_head(hire: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_gone", lambda _: True)
    with pytest.raises(StartError, match=r"Ray's head at 10\.0\.0\.1:6379 is gone"):
        hire()


def test_a_part_of_a_bundle_is_not_enough() -> None:
    reservation = Reservation(GROUP, (Place(0, "a", 0),), {"a": ALPHA}, DEMAND)
    for free, is_busy in ((0.5, True), (0.99995, False)):
        connection: Any = SimpleNamespace(free=lambda free=free: {"a": {"CPU_group_0_f00": free}})
        assert bool(busy_places(connection, reservation)) == is_busy


class FakeAgent:
    """Says that the ranks are gone, or not, or nothing."""

    def __init__(self, answer: bool | None) -> None:
        self.end_ranks = SimpleNamespace(remote=lambda epoch, timeout_s: answer)


def test_an_agent_that_cannot_say_that_its_ranks_are_gone_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(answer: bool | None, timeout: float) -> bool:
        if answer is None:
            raise RuntimeError("the actor died")
        return answer

    killed: list[Any] = []
    monkeypatch.setattr(agents_module, "ray", SimpleNamespace(get=get, kill=killed.append))
    found = Agents(Config.build(model="m").cluster)
    actors = {"a": FakeAgent(True), "b": FakeAgent(False), "c": FakeAgent(None)}
    monkeypatch.setattr(Agents, "_make", lambda self, node_id, _: self._actors.setdefault(node_id, actors[node_id]))
    assert found.of("abc", "f00") == actors
    found.end_ranks(1, "abc")
    assert [found.living(node_id) for node_id in "abc"] == [actors["a"], None, None]
    found.renew()
    assert killed == list(actors.values()) and found.living("a") is None
