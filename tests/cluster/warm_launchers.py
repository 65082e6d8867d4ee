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
    """A fork server for each environment that a test has asked for. It stays when the test is over."""

    def __init__(self) -> None:
        self._made: dict[frozenset[tuple[str, str]], LocalLaunchers] = {}
        self._making = threading.Lock()

    def launcher(self, environment: Mapping[str, str]) -> LocalLauncher:
        """For `start_executor`, in any thread."""
        whole = {**os.environ, **environment}
        whole.pop("PYTEST_CURRENT_TEST", None)
        with self._making:
            launchers = self._made.setdefault(frozenset(whole.items()), LocalLaunchers())
        return launchers.launcher(environment)

    def end(self) -> None:
        """End the fork servers, and what is left of their ranks."""
        with self._making:
            while self._made:
                self._made.popitem()[1].close()


LAUNCHERS = WarmLaunchers()
"""Of this process; ended with the session (tests/conftest.py)."""


class Lent:
    """In the place of a formation's own launchers: stays when its lines have ended their ranks."""

    launcher = staticmethod(LAUNCHERS.launcher)

    def close(self) -> None: ...


@contextmanager
def warm_llm(model: str, **settings: Any) -> Iterator[LLM]:
    """An LLM whose ranks come from one of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phalanx.membership.lines.LocalLaunchers", Lent)
        with LLM(model, **settings) as llm:
            yield llm
