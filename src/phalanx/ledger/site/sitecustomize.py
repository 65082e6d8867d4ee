"""Python runs this at its start if the directory is in PYTHONPATH, where `phalanx watch` has it (environment.py).

It has the processes of a program record what they do, once they import torch. Then it runs the `sitecustomize` that
would have been found without it.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec


def _record() -> None:
    from phalanx.ledger import install

    install()


def _await_torch() -> None:
    if "PHALANX_WATCH" not in os.environ:
        return
    try:
        from phalanx.ledger.after_import import after_import
    except ImportError as error:
        print(f"phalanx watch: {sys.executable} is not watched: {error}", file=sys.stderr)
        return
    after_import("torch", _record)


def _run_next() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec(__name__, [path for path in sys.path if os.path.abspath(path or ".") != here])
    if spec is not None and spec.loader is not None:
        module = sys.modules[__name__] = module_from_spec(spec)
        spec.loader.exec_module(module)


_await_torch()
_run_next()
