"""Which bundles ranks get, which they share with ranks that they take over from, and what is given back when. Needs no
Ray that runs."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from phalanx.config import ClusterConfig, Config
from phalanx.errors import PlacementError
from phalanx.executor.ray import rank_actors
from phalanx.executor.ray import reservation as module
from phalanx.executor.ray.agents import Agents
from phalanx.executor.ray.messages import Introduction
from phalanx.executor.ray.rank_actors import RankActors
from phalanx.executor.ray.reservation import Reservation, reserve
from phalanx.executor.ray.shared_bundle import SharedBundle
from phalanx.topology.grid import Grid
from phalanx.topology.placement import Demand, Node, Place

NAMES = {"a": "alpha", "b": "beta", "c": "gamma"}


class Cluster:
    """Nodes with so many CPUs each, of which placement groups take some."""

    def __init__(self, **cpus: int) -> None:
        self.cpus = cpus
        self.groups: list[SimpleNamespace] = []
        self.never_ready: set[str] = set()
        """Nodes whose bundles do not come."""

    def nodes(self, resource: str) -> list[Node]:
        taken = [group.home for group in self.groups]
        return [
            Node(home, NAMES[home], f"10.0.0.{i}", total, total - taken.count(home), is_driver=home == "a")
            for i, (home, total) in enumerate(self.cpus.items(), 1)
        ]

    def placement_group(self, bundles: list[dict[str, float]], bundle_label_selector: list[dict[str, str]]) -> Any:
        assert bundles == [{"CPU": 1.0}]
        home = bundle_label_selector[0]["ray.io/node-id"]
        group = SimpleNamespace(home=home, wait=lambda _: home not in self.never_ready)
        self.groups.append(group)
        return group

    def remove(self, groups: list[Any]) -> None:
        for group in groups:
            self.groups.remove(group)

    def homes(self) -> str:
        """Of the bundles that there are."""
        return "".join(sorted(group.home for group in self.groups))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster(a=2, b=2, c=2)
    monkeypatch.setattr(module, "placement_group", found.placement_group)
    monkeypatch.setattr(module, "_remove", found.remove)
    monkeypatch.setattr(module, "_existing", lambda _: None)
    monkeypatch.setattr(module, "SETTLE_S", 0.0)
    monkeypatch.setattr(module, "COLLISION_S", 0.0)
    return found


def reserved(
    cluster: Cluster, ownership: ExitStack, size: int, *, avoid: tuple[str, ...] = (), **how: Any
) -> Reservation:
    config = Config.build(
        model="m", launcher="ray", data_parallel_size=size, enable_expert_parallel=True, avoid_nodes=avoid
    )
    return reserve(cluster, config, Grid.of(config.parallel), "cpu", ownership, **how)  # type: ignore[arg-type]


def test_another_grid_shares_what_it_can_and_gives_back_what_is_left(cluster: Cluster) -> None:
    with ExitStack() as second:
        with ExitStack() as first:
            before = reserved(cluster, first, 3)
            assert cluster.homes() == "aab"
            after = reserved(cluster, second, 4, beside=before.bundles)
            assert cluster.homes() == "aabb", "one is new"
            assert [bundle.is_shared for bundle in after.bundles] == [True, True, True, False]
            assert set(before.bundles) < set(after.bundles)
        assert cluster.homes() == "aabb" and not any(bundle.is_shared for bundle in after.bundles)
        with ExitStack() as third:
            smaller = reserved(cluster, third, 1, beside=after.bundles)
            second.close()
            assert cluster.homes() == "a" and smaller.bundles[0] in before.bundles
    assert not cluster.groups


def test_what_is_undone_leaves_the_bundles_before(cluster: Cluster) -> None:
    with ExitStack() as first:
        before = reserved(cluster, first, 3)
        with ExitStack() as second:
            reserved(cluster, second, 4, beside=before.bundles)
        assert cluster.homes() == "aab" and not any(bundle.is_shared for bundle in before.bundles)
        cluster.never_ready = {"b"}
        with pytest.raises(PlacementError, match="taken by somebody else in this moment"):
            reserved(cluster, second, 4, beside=before.bundles)
        assert cluster.homes() == "aab" and not any(bundle.is_shared for bundle in before.bundles)


def test_a_node_that_is_drained(cluster: Cluster) -> None:
    with ExitStack() as second:
        with ExitStack() as first:
            before = reserved(cluster, first, 3)
            after = reserved(cluster, second, 3, beside=before.bundles, avoid=("beta",))
            assert [bundle.node_id for bundle in after.bundles] == ["a", "a", "c"]
            with pytest.raises(PlacementError, match="room for 3"):
                reserved(cluster, second, 5, beside=before.bundles, avoid=("beta",))
        assert cluster.homes() == "aac"


def test_bundles_that_cannot_be_shared(cluster: Cluster) -> None:
    """As two lines have no room on a GPU, or they are given back by now."""
    with ExitStack() as ownership:
        with ExitStack() as first:
            before = reserved(cluster, first, 3)
            reserved(cluster, ownership, 3, beside=before.bundles, shares=False)
            assert cluster.homes() == "aabbcc"
        reserved(cluster, ownership, 3, beside=before.bundles)
        assert not any(bundle.is_shared for bundle in before.bundles)


def test_in_a_group_of_the_users_others_are_looked_for(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_in: list[Any] = []
    monkeypatch.setattr(module, "_in_existing", lambda *arguments: looked_in.append(arguments[-1]))
    group: Any = SimpleNamespace()
    theirs = SharedBundle(group, 1, "a")
    reserved(cluster, ExitStack(), 3, beside=[theirs])
    assert looked_in == [group] and not theirs.share()


class FakeActor:
    """Of a rank, that has asked for so much."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options


def test_an_actor_in_a_shared_bundle_asks_for_nothing_and_has_the_devices_that_are_there(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda: FakeActor(options)))
    monkeypatch.setattr(
        rank_actors, "ray", SimpleNamespace(remote=lambda _: made, is_initialized=lambda: True, kill=lambda _: None)
    )
    monkeypatch.setattr(rank_actors, "PlacementGroupSchedulingStrategy", lambda *where: where)
    group: Any = SimpleNamespace()
    bundles = (SharedBundle(group, 0, "a", is_ours=True), SharedBundle(group, 1, "a", is_ours=True))
    bundles[0].devices = ("3",)
    assert bundles[0].share()
    places = (Place(0, "a", 0), Place(1, "a", 1))
    nodes = {"a": Node("a", "alpha", "10.0.0.1", 4, 4, is_driver=True)}
    reservation = Reservation(places, bundles, nodes, Demand("GPU", 1.0, True))
    config = ClusterConfig()
    actors = RankActors(config, Grid(2, 1), reservation, Agents(config))
    assert [(actor.options["num_gpus"], actor.options["num_cpus"]) for actor in actors.ranks] == [(0, 0), (1.0, 0)]
    assert [actor.options["scheduling_strategy"] for actor in actors.ranks] == [(group, 0), (group, 1)]
    told = Introduction(
        node_id="a",
        host="alpha",
        pid=1,
        raylet_pid=1,
        log="",
        version="",
        devices=(),
        addresses=(),
        nicer_than_raylet=0,
    )
    assert actors._with_devices(places[0], told).devices == ("3",)
