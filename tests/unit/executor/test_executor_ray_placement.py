"""Which actors a line of ranks gets its processes from, and what is waited for before. Needs no Ray that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from phalanx.config import Config
from phalanx.errors import DeadlineError, PlacementError, StartError
from phalanx.executor.deadline import Deadline
from phalanx.executor.ray import agents as agents_module
from phalanx.executor.ray import placement as module
from phalanx.executor.ray.agents import Agents
from phalanx.executor.ray.placement import RayPlacement
from phalanx.executor.ray.reservation import Reservation, busy_places
from phalanx.executor.ray.shared_bundle import SharedBundle
from phalanx.topology.placement import Demand, Node, Place

ALPHA = Node("a", "alpha", "10.0.0.1", 1, 1, is_driver=True)
BETA = Node("b", "beta", "10.0.0.2", 1, 1)
GAMMA = Node("c", "gamma", "10.0.0.3", 1, 1)
DEMAND = Demand("CPU", 1.0, False)
GROUP: Any = SimpleNamespace(id=SimpleNamespace(hex=lambda: "f00"))
FREE = {"a": {"CPU_group_0_f00": 1.0}, "b": {"CPU_group_1_f00": 1.0}}


def bundles(places: Sequence[Place]) -> tuple[SharedBundle, ...]:
    return tuple(SharedBundle(GROUP, place.bundle, place.node_id) for place in places)


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
        return Reservation(places, bundles(places), nodes, DEMAND)

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
    monkeypatch.setattr(module, "RankActors", FakeActors)
    monkeypatch.setattr(module, "LineProcesses", FakeProcesses)
    return found


class FakeActors:
    """Actors, of which those of `gone` are gone."""

    has_ray = True

    def __init__(self, cluster: object, grid: object, reservation: Reservation, agents: object) -> None:
        self.places = reservation.places
        self.gone: list[Place] = []
        self.is_closed = False

    def introduce(self, on_progress: object, deadline: Deadline) -> None:
        pass

    def absent(self) -> list[Place]:
        return list(self.gone)

    def dismiss(self, places: list[Place]) -> None:
        assert places == self.gone

    def replace(self, places: list[Place], deadline: Deadline) -> None:
        self.gone.clear()

    def close(self) -> None:
        self.is_closed = True


class FakeProcesses:
    def __init__(self, config: Config, actors: FakeActors, *_: object) -> None:
        self.actors = actors
        self.nodes = [place.node_id for place in actors.places]
        self.is_killed = False

    def make(self) -> None:
        if self.actors.gone or self.actors.is_closed:
            raise StartError("a rank", "starting", "its actor is gone")

    def kill(self) -> None:
        self.is_killed = True


@pytest.fixture
def make(cluster: Cluster) -> Callable[..., Any]:
    """The second line and those after it, as they are hired."""
    config = Config.build(model="m", launcher="ray", tensor_parallel_size=2, device="cpu")
    placement = RayPlacement(config, lambda *_: None)
    placement.make_processes("m", 1, lambda *_: None, Deadline(1.0))

    def next_line(timeout_s: float = 5.0, **how: Any) -> Any:
        return placement.make_processes("m", 2, lambda *_: None, Deadline(timeout_s), **how)

    next_line.placement = placement  # type: ignore[attr-defined]
    return next_line


@pytest.mark.parametrize("how", [{"has_memory": True}, {"is_beside": True}])
def test_actors_that_are_there_serve_the_next_line(
    cluster: Cluster, make: Callable[..., Any], how: dict[str, bool]
) -> None:
    actors, cluster.free_until_then = make.placement.actors, [{}]  # type: ignore[attr-defined]
    assert make(**how).actors is actors
    assert cluster.free_until_then, "there is no need to look"


def test_an_actor_that_is_gone_is_replaced_when_its_bundle_is_free(cluster: Cluster, make: Callable[..., Any]) -> None:
    actors = make.placement.actors  # type: ignore[attr-defined]
    actors.gone = list(actors.places[1:])
    cluster.free_until_then = [{}, {"b": FREE["b"]}]
    assert make(has_memory=True).actors is actors and not actors.gone
    assert not cluster.free_until_then


def test_a_line_beside_another_one_changes_no_actor(make: Callable[..., Any]) -> None:
    actors = make.placement.actors  # type: ignore[attr-defined]
    actors.gone = list(actors.places[1:])
    with pytest.raises(StartError, match="rank 1 on beta did not start: its actor is gone"):
        make(is_beside=True)
    assert actors.gone and not actors.is_closed


def test_nobody_comes_beside_ranks_that_get_their_places(make: Callable[..., Any]) -> None:
    """A thread that waits for a node must not hold up one that prepares a standby line, and would have to be ended."""
    with make.placement._making, pytest.raises(StartError, match="ranks are just getting their places"):  # type: ignore[attr-defined]
        make(is_beside=True)


def test_a_start_that_is_not_needed_any_more(make: Callable[..., Any]) -> None:
    noted: list[Any] = []

    def note(processes: Any) -> None:
        noted.append(processes)
        raise StartError("a line", "starting", "it is not needed any more")

    with pytest.raises(StartError, match="not needed any more"):
        make(is_beside=True, note=note)
    assert noted[0].is_killed


def test_from_the_checkpoint_all_actors_are_new(cluster: Cluster, make: Callable[..., Any]) -> None:
    actors, cluster.free_until_then = make.placement.actors, [{}, {"a": FREE["a"]}]  # type: ignore[attr-defined]
    assert make().actors is not actors and actors.is_closed
    assert not cluster.free_until_then, "their bundles are waited for"


def test_bundles_that_are_never_free(cluster: Cluster, make: Callable[..., Any]) -> None:
    cluster.free_until_then = [{"a": FREE["a"]}] * 1000
    with pytest.raises(DeadlineError, match=r"waited 0\.0\d+ s for bundles to be free from rank 1 on beta"):
        make(0.02)


def test_another_node_has_room(cluster: Cluster, make: Callable[..., Any]) -> None:
    cluster.alive = [ALPHA, GAMMA]
    with pytest.raises(StartError, match="rank 1 on beta did not start: a lost node has taken its memory along"):
        make(has_memory=True)
    assert make().nodes == ["a", "c"]


def test_another_node_comes(cluster: Cluster, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.alive = [ALPHA]
    monkeypatch.setattr(module.time, "sleep", lambda _: cluster.alive.append(GAMMA))
    assert make().nodes == ["a", "c"]


@pytest.mark.parametrize("patience_s", [0.0, 60.0])
def test_a_lack_of_room_is_told_when_it_lasts(
    cluster: Cluster, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    told: list[str | None] = []

    def look_again(_: float) -> None:
        told.append(make.placement.lacks_room)  # type: ignore[attr-defined]
        cluster.alive.append(GAMMA)

    monkeypatch.setattr(module, "LACKS_ROOM_AFTER_S", patience_s)
    monkeypatch.setattr(module.time, "sleep", look_again)
    cluster.alive = [ALPHA]
    assert make().nodes == ["a", "c"]
    assert told == [None if patience_s else "lost: rank 1 on beta: there is room for 1"]
    assert make.placement.lacks_room is None  # type: ignore[attr-defined]


def test_no_other_node(cluster: Cluster, make: Callable[..., Any]) -> None:
    cluster.alive = [ALPHA]
    complaint = r"rank 1 on beta did not start: no other place in 0\.0\d+ s .*: there is room for 1 \(while placing\)$"
    with pytest.raises(StartError, match=complaint):
        make(0.02)


def test_nobody_comes_any_more(cluster: Cluster, make: Callable[..., Any]) -> None:
    make.placement.kill()  # type: ignore[attr-defined]
    with pytest.raises(StartError, match="the engine ends"):
        make()


def test_without_rays_head(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_gone", lambda _: True)
    with pytest.raises(StartError, match=r"Ray's head at 10\.0\.0\.1:6379 is gone"):
        make()


def test_a_part_of_a_bundle_is_not_enough() -> None:
    places = (Place(0, "a", 0),)
    reservation = Reservation(places, bundles(places), {"a": ALPHA}, DEMAND)
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
