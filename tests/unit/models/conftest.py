"""What the tests of models share: checkpoints, written once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from models_variants import VARIANTS

from phalanx.testing.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the checkpoint of a variant or family, once for all tests that ask for it; they do not change it."""

    @cache
    def write(name: str, **more: Any) -> Path:
        family, shape = VARIANTS.get(name, (name, {}))
        return write_checkpoint(tmp_path_factory.mktemp("model"), family, **{**shape, **more})

    return write
