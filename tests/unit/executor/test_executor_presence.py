"""What an engine shows of itself, and what it does not."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from phalanx.config import Config
from phalanx.errors import ConfigError
from phalanx.executor.presence import open_outlets, show_instance
from phalanx.ledger.instance import shown_by
from phalanx.ledger.other_nodes import OtherNodesOrder
from phalanx.ledger.watch_order import WatchOrder
from phalanx.transport.keys import RunKey


def test_it_is_found_until_it_ends_and_no_key_is_in_it() -> None:
    config = Config.build(model="m", tensor_parallel_size=2, launcher="local", device="cpu")
    others = OtherNodesOrder(listener=3, key=RunKey.new(), ranks={"beta": (1,)}, node_timeout_s=5.0, steps_ahead=2)
    with ExitStack() as resources:
        resources.enter_context(show_instance(config, WatchOrder(ranks=(), groups={}, other_nodes=others), 1))
        (found,) = shown_by(os.getpid())
        assert found.instance is not None and found.instance.order == WatchOrder(ranks=(), groups={})
        assert (found.instance.model, found.instance.layout) == ("m", {"tensor_parallel_size": 2})
        assert (found.instance.pid, found.instance.launcher) == (os.getpid(), "local")
    assert shown_by(os.getpid()) == []


def test_events_that_cannot_be_written_are_the_users_mistake(tmp_path: Path) -> None:
    path = str(tmp_path / "none" / "events")
    with ExitStack() as resources, pytest.raises(ConfigError) as caught:
        open_outlets(Config.build(model="m", ledger_events=path), resources)
    assert (caught.value.field, caught.value.allowed) == (
        "ledger_events",
        "it cannot be written: No such file or directory",
    )


def test_events_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ExitStack() as resources:
        assert open_outlets(Config.build(model="m", ledger_events="e"), resources).events == str(tmp_path / "e")
        assert (tmp_path / "e").read_text() == ""
        assert open_outlets(Config.build(model="m"), resources).events is None
