"""Fork servers for the runs of many tests: torch is imported once for all of them, and not for each."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from phalanx import LLM
from phalanx.executor.local import LocalLauncher, LocalLaunchers


class WarmLaunchers:
    """A fork server for each environment that runs have had, for any number of runs. For any thread."""

    def __init__(self) -> None:
        self._known: list[tuple[dict[str, str], LocalLaunchers]] = []
        self._changing = threading.Lock()

    def launcher(self, environment: Mapping[str, str]) -> LocalLauncher:
        """For `start_executor`."""
        whole = {**os.environ, **environment}
        whole.pop("PYTEST_CURRENT_TEST", None)
        with self._changing:
            for known, launchers in self._known:
                if known == whole:
                    return launchers.launcher(environment)
            self._known.append((whole, LocalLaunchers()))
            return self._known[-1][1].launcher(environment)

    def close(self) -> None:
        """Called at the end of a run, whose own ranks have ended: the fork servers stay."""

    def end(self) -> None:
        """End all fork servers."""
        with self._changing:
            while self._known:
                self._known.pop()[1].close()


LAUNCHERS = WarmLaunchers()
"""Of this process; ended with the session (tests/conftest.py)."""


@contextmanager
def warm_llm(model: str, **settings: Any) -> Iterator[LLM]:
    """An LLM whose ranks come from one of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phalanx.membership.lines.LocalLaunchers", lambda: LAUNCHERS)
        with LLM(model, **settings) as llm:
            yield llm
