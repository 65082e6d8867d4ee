"""What is left of a line of another size in whoever has prepared it, once that line is somebody else's, or ended."""

from __future__ import annotations

import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.config import Config
from phalanx.membership import resizer as module
from phalanx.membership.resize import LineResize, Size
from phalanx.membership.resizer import NextLine, Resizer

DEADLINE_S = 10.0


class FakeExecutor:
    failure = None

    def check_health(self, timeout_s: float) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


def prepared(monkeypatch: pytest.MonkeyPatch) -> tuple[Resizer, LineResize, weakref.ref[FakeExecutor]]:
    """A resize whose line is ready."""
    config, executor, nobody = Config.build(model="m"), FakeExecutor(), SimpleNamespace(close=lambda: None)
    line: Any = SimpleNamespace(executor=executor)
    anything: Any = nobody
    following = Resizer(config, anything, anything)
    monkeypatch.setattr(module, "check_devices", lambda *_: None)
    monkeypatch.setattr(following, "_config_of", lambda *_: config)
    monkeypatch.setattr(following, "_prepare", lambda *_: NextLine(config, line, anything, anything))
    capacity: Any = SimpleNamespace(max_model_len=256)
    resize = following.begin(Size(2, 1), capacity, (), lambda _: None)
    monkeypatch.undo()
    follow(following, lambda: resize.state == "ready")
    return following, resize, weakref.ref(executor)


def follow(following: Resizer, is_over: Any) -> None:
    expires_at = time.monotonic() + DEADLINE_S
    while not is_over():
        following.follow(0.001)
        assert time.monotonic() < expires_at


def test_nothing_of_one_that_has_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    following, _, executor = prepared(monkeypatch)
    taken = following.commit()
    assert executor() is taken.line.executor
    del taken
    assert executor() is None


def test_nothing_of_one_that_is_not_wanted_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    following, resize, executor = prepared(monkeypatch)
    assert following.cancel()
    follow(following, lambda: resize.state == "cancelled")
    assert executor() is None
