"""The end of a node's agent, without Ray."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("ray")

from phalanx.executor.ray import node_agent
from phalanx.executor.ray.node_agent import NodeAgent


def test_it_ends_though_a_line_cannot_be_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its ranks with it."""
    started: list[tuple[Any, ...]] = []
    monkeypatch.setattr(node_agent, "end_with_raylet", lambda: None)
    agent = NodeAgent()

    def timer(*what: Any) -> SimpleNamespace:
        return SimpleNamespace(start=lambda: started.append(what))

    def fail() -> None:
        raise OSError("cannot be let go")

    monkeypatch.setattr(node_agent.threading, "Timer", timer)
    line = SimpleNamespace(run=lambda: None, close=fail, stay_s=7.0)
    agent._lines[1] = cast(Any, line)
    with pytest.raises(OSError, match="cannot be let go"):
        agent.run(1)
    assert started == [(7.0, os._exit, (0,))]
