"""Fork servers for the runs of many tests: torch is imported once for all of them, and not for each."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from phalanx import LLM
from phalanx.executor.local import LocalLauncher
from phalanx.executor.start import NewLauncher, start_executor
from phalanx.testing.warm_launcher import WarmLauncher


class WarmLaunchers:
    """As many as there are runs at a time; one that is given back serves the next run of the same environment."""

    def __init__(self) -> None:
        self._free: list[tuple[dict[str, str], WarmLauncher]] = []
        self._changing = threading.Lock()

    @contextmanager
    def lent(self) -> Iterator[NewLauncher]:
        """For `start_executor`, whose executor must be closed first. For any thread."""
        taken: list[tuple[dict[str, str], WarmLauncher]] = []

        def new_launcher(environment: Mapping[str, str]) -> LocalLauncher:
            whole = {**os.environ, **environment}
            whole.pop("PYTEST_CURRENT_TEST", None)
            taken.append((whole, self._take(whole) or WarmLauncher(environment)))
            return taken[-1][1]

        try:
            yield new_launcher
        finally:
            with self._changing:
                self._free += taken

    def end(self) -> None:
        """End those that are not lent."""
        with self._changing:
            while self._free:
                self._free.pop()[1].end()

    def _take(self, environment: dict[str, str]) -> WarmLauncher | None:
        with self._changing:
            for i, (whole, launcher) in enumerate(self._free):
                if whole == environment and not launcher.has_ended:
                    del self._free[i]
                    return launcher
        return None


LAUNCHERS = WarmLaunchers()
"""Of this process; ended with the session (tests/conftest.py)."""


@contextmanager
def warm_llm(model: str, **settings: Any) -> Iterator[LLM]:
    """An LLM whose ranks come from one of them."""
    with LAUNCHERS.lent() as new_launcher, pytest.MonkeyPatch.context() as patch:
        patch.setattr("phalanx.llm.start_executor", partial(start_executor, new_launcher=new_launcher))
        with LLM(model, **settings) as llm:
            yield llm
