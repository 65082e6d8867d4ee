"""Where nodes are reached, and how long they are waited for. Needs no Ray that runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from phalanx.config import ClusterConfig, Config
from phalanx.errors import ConfigError
from phalanx.executor.deadline import Deadline
from phalanx.executor.ray import link, rank_actors
from phalanx.topology.placement import Node
from phalanx.transport.interfaces import InterfaceAddress

ALPHA = Node("a", "alpha", "10.0.0.1", 4, 4, is_driver=True)
BETA = Node("b", "beta", "10.0.0.2", 4, 4)
NODES = {"a": ALPHA, "b": BETA}
OF_ALPHA = [InterfaceAddress("eth0", "10.0.0.1"), InterfaceAddress("eth1", "fd00::1")]
OF_BETA = [InterfaceAddress("eth0", "10.0.0.2"), InterfaceAddress("eth0", "fd00::2")]


@pytest.fixture(autouse=True)
def on_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_actors, "interface_addresses", lambda: OF_ALPHA)
    monkeypatch.setattr(rank_actors, "numeric_address", str)  # the real one wants an address of this host


def addresses(cluster: ClusterConfig, of_beta: Sequence[InterfaceAddress] = OF_BETA) -> dict[str, str]:
    return rank_actors.addresses_of(cluster, NODES, {"a": OF_ALPHA, "b": of_beta})


def test_the_drivers_address_may_be_on_another_interface_than_rays() -> None:
    assert addresses(ClusterConfig(node_address="fd00::1")) == {"a": "fd00::1", "b": "fd00::2"}


def test_the_other_nodes_must_have_an_address_of_that_kind() -> None:
    with pytest.raises(ConfigError, match="beta has no IPv6 address on eth0"):
        addresses(ClusterConfig(node_address="fd00::1"), OF_BETA[:1])


def test_without_a_word_the_address_is_rays_or_that_of_the_interface() -> None:
    assert addresses(ClusterConfig()) == {"a": "10.0.0.1", "b": "10.0.0.2"}
    with pytest.raises(ConfigError, match="beta has eth0"):
        addresses(ClusterConfig(network_interface="eth1"))


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("phalanx.executor.deadline.time", SimpleNamespace(monotonic=lambda: self.now))


def test_what_one_phase_takes_is_not_there_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits_s = Clock(monkeypatch), []

    def answers_to(calls: object, phase: str, deadline_s: float) -> list[bytes]:
        waits_s.append((phase, deadline_s))
        clock.now += 4.0
        return []

    def accept(*, deadline_s: float) -> None:
        waits_s.append(("accept", deadline_s))

    queue = SimpleNamespace(accept=accept, address="10.0.0.1")
    monkeypatch.setattr(link, "answers_to", answers_to)
    monkeypatch.setattr(link, "_listen", lambda *_: queue)
    hired: Any = SimpleNamespace(
        deadline=Deadline(10.0), placed=[], prepare_nodes=lambda orders: {}, ranks_of_agents=dict, driver_node=ALPHA
    )
    clock.now = 3.0  # the actors were long in coming
    link.link_nodes(Config.build(model="m"), hired, [], {}, ExitStack())
    assert waits_s == [("linking", 7.0), ("accept", 3.0)]
