"""The end of a node's agent, without Ray."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("ray")

from phalanx.executor.ray import node_agent
from phalanx.executor.ray.node_agent import DISMISSAL_S, NodeAgent


def test_it_ends_though_what_it_holds_cannot_be_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its ranks with it."""
    started: list[tuple[Any, ...]] = []

    def timer(*what: Any) -> SimpleNamespace:
        return SimpleNamespace(start=lambda: started.append(what))

    def fail() -> None:
        raise OSError("cannot be let go")

    monkeypatch.setattr(node_agent, "end_with_raylet", lambda: None)
    monkeypatch.setattr(node_agent, "threading", SimpleNamespace(Timer=timer))
    agent = NodeAgent()
    agent._relay = cast(Any, SimpleNamespace(run=lambda: None))
    agent._resources.callback(fail)
    with pytest.raises(OSError, match="cannot be let go"):
        agent.run()
    assert started == [(DISMISSAL_S, os._exit, (0,))]
