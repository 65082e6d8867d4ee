"""What the tests of models share: checkpoints, written once, and one thread for tiny matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
