"""The end of a node's agent, without Ray."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("ray")

from phalanx.executor.ray import node_agent
from phalanx.executor.ray.node_agent import NodeAgent
from phalanx.executor.ray.node_line import NodeLine


def test_it_ends_though_what_it_holds_cannot_be_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its ranks with it."""
    started: list[tuple[Any, ...]] = []

    def timer(*what: Any) -> SimpleNamespace:
        return SimpleNamespace(start=lambda: started.append(what))

    def fail() -> None:
        raise OSError("cannot be let go")

    monkeypatch.setattr(node_agent, "end_with_raylet", lambda: None)
    monkeypatch.setattr(node_agent, "as_nice_as_raylet", lambda: None)
    monkeypatch.setattr(node_agent, "threading", SimpleNamespace(Timer=timer, Lock=threading.Lock))
    agent = NodeAgent()
    agent._lines[1] = cast(NodeLine, SimpleNamespace(run=lambda: None, close=fail, stay_s=2.5))
    with pytest.raises(OSError, match="cannot be let go"):
        agent.run(1)
    assert started == [(2.5, os._exit, (0,))]
