"""A GPU's driver refuses a rank's process while others end: a new one is tried, once, within the start's time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from phalanx.errors import DeviceRefusedError, WorkerError
from phalanx.membership import first_line
from phalanx.membership.first_line import start_first_line
from phalanx.worker import worker

REFUSAL = "CUDA driver initialization failed, you might not have a CUDA gpu."
REFUSED = WorkerError(2, "here", "DeviceRefusedError", REFUSAL, "")
OTHER = WorkerError(2, "here", "RuntimeError", "no kernel", "")


class Lines:
    """Starts that end so, and the time that each is given."""

    def __init__(self, *outcomes: WorkerError | str) -> None:
        self.outcomes = list(outcomes)
        self.times_s: list[float | None] = []

    def start(self, on_progress: object, *, memory: object, show: object, timeout_s: float | None = None) -> Any:
        self.times_s.append(timeout_s)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, WorkerError):
            raise outcome
        return outcome


def start(lines: Any, timeout_s: float = 60.0) -> Any:
    return start_first_line(lines, lambda _: None, lambda order, epoch: None, timeout_s)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_line, "AGAIN_AFTER_S", 0.001)


def test_a_refused_start_is_tried_once_more_in_what_is_left_of_its_time() -> None:
    lines = Lines(REFUSED, "a line")
    assert start(lines) == "a line"
    first, second = lines.times_s
    assert first is None and second is not None and second < 60.0


@pytest.mark.parametrize(
    ("outcomes", "timeout_s", "told"),
    [((REFUSED, REFUSED), 60.0, REFUSED), ((OTHER, "a line"), 60.0, OTHER), ((REFUSED, "a line"), 0.0, REFUSED)],
    ids=["twice", "another error", "no time"],
)
def test_what_is_no_use_to_try_is_told(outcomes: tuple[Any, ...], timeout_s: float, told: WorkerError) -> None:
    with pytest.raises(WorkerError) as raised:
        start(Lines(*outcomes), timeout_s)
    assert raised.value is told


def test_a_rank_says_that_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError(REFUSAL)

    monkeypatch.setattr(torch.cuda, "init", refuse)
    spec: Any = SimpleNamespace(device="cuda", local_rank=1)
    with pytest.raises(DeviceRefusedError, match="driver initialization failed"):
        worker._device(spec)
