"""Some modules have one home. (import-linter keeps the layers; it cannot speak of parts of other packages.)"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import phalanx

SOURCE = Path(phalanx.__file__).parent

HOMES = {
    "torch.distributed": ("collectives",),
    "socket": ("transport", "server"),
    "pickle": ("ledger/flight_recorder.py",),
    "cloudpickle": (),
    "marshal": (),
    "ray": ("executor/ray/",),
    "triton": ("models/attention_triton.py", "moe/four_bits_triton.py"),
    "fastapi": ("server",),
    "uvicorn": ("server",),
    "click": ("cli",),
}
"""Where a module may be imported. The HTTP port is the server's own.
PyTorch's Flight Recorder writes pickles, which are read without running anything in them."""


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize(("module", "homes"), HOMES.items())
def test_a_module_has_one_home(module: str, homes: tuple[str, ...]) -> None:
    strays = [
        file.relative_to(SOURCE).as_posix()
        for file in SOURCE.rglob("*.py")
        if any(is_within(name, module) for name in imported(file))
    ]
    assert [stray for stray in strays if not stray.startswith(homes or ("-",))] == []


def test_nothing_runs_text_as_code() -> None:
    calls = [
        f"{file.name}:{node.lineno}"
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec")
    ]
    assert calls == []
