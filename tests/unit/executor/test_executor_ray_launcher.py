"""What is said of a rank's end, and whether the step that it was in may be why. Needs no Ray that runs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, OutOfMemoryError

from phalanx.engine.blame import came_from_outside
from phalanx.errors import PeerDiedError
from phalanx.executor.ray import calls, launcher, liveness
from phalanx.executor.ray.launcher import RayLauncher
from phalanx.executor.shared_fate import describe_exit

DEADLINE_S = 10.0


class Cluster:
    """Rank 0 is on alpha, beside the engine, rank 1 on beta: what Ray and the kernel would say of ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = SimpleNamespace(is_initialized=lambda: True, wait=lambda refs, **_: (refs, []))
        monkeypatch.setattr(liveness, "ray", fake)
        monkeypatch.setattr(calls.ray, "get", self._get)
        monkeypatch.setattr(launcher, "living", lambda *_: ())
        monkeypatch.setattr(launcher, "on_end_of", self._on_end_of)
        self._end: Exception | str = ""

    def ends(self, name: str, end: Exception | str) -> str:
        """What is said of rank 1 when the call of the actor of this name is over."""
        self._end = end
        started = self._start(name)
        assert started._watch is not None and started._watch.wait_for({name}, DEADLINE_S)
        return started.exits()[1]

    def raylet_ends(self) -> str:
        """What is said of rank 0."""
        started = self._start()
        self._note_end_of_raylet()
        return started.exits()[0]

    def _start(self, *names: str) -> RayLauncher:
        processes: Any = SimpleNamespace(
            placed=[
                SimpleNamespace(rank=0, pid=1, is_driver_node=True, node_id="a", node="alpha"),
                SimpleNamespace(rank=1, pid=1, is_driver_node=False, node_id="b", node="beta"),
            ],
            raylet="the raylet of alpha",
            run_rank=lambda spec: str(spec.rank),
            run_nodes=lambda: {name: name for name in names if not name.isdigit()},
            last_words=lambda rank: "its log is empty",
        )
        started = RayLauncher(processes)
        specs: Any = [SimpleNamespace(rank=int(name)) for name in names if name.isdigit()]
        started.start(specs)
        return started

    def _get(self, ref: str, timeout: float) -> str:
        if isinstance(self._end, Exception):
            raise self._end
        return self._end

    def _on_end_of(self, raylet: str, callback: Callable[[], None]) -> Callable[[], None]:
        self._note_end_of_raylet = callback
        return lambda: None


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def is_from_outside(how: str) -> bool:
    return came_from_outside(PeerDiedError("rank 1", 7, how))


@pytest.mark.parametrize("end", [ActorDiedError(), ActorUnavailableError("cut off", None), NodeDiedError("drained")])
def test_a_rank_whose_actor_is_ended_from_outside_is_not_its_requests_doing(cluster: Cluster, end: Exception) -> None:
    how = cluster.ends("1", end)
    assert how.startswith("its actor ended: ") and "(on beta)" in how
    assert is_from_outside(how)


def test_so_with_the_agent_of_its_node(cluster: Cluster) -> None:
    assert is_from_outside(cluster.ends("b", ActorDiedError()))
    assert is_from_outside(cluster.ends("b", "the link broke"))


def test_so_with_its_raylet(cluster: Cluster) -> None:
    assert is_from_outside(cluster.raylet_ends())


@pytest.mark.parametrize("end", [OutOfMemoryError("its node is low on memory"), describe_exit(-11), describe_exit(1)])
def test_what_a_step_can_do_is_not_excused(cluster: Cluster, end: Exception | str) -> None:
    assert not is_from_outside(cluster.ends("1", end))
