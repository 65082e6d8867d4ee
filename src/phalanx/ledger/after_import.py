"""Something to be done as soon as a module has been imported, by whomever. Imports nothing that takes time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def after_import(name: str, act: Callable[[], None]) -> None:
    """Call `act` now if the module is there, else right after its import is complete.

    An error of `act` is logged: the import is that of a program which may know nothing of it.
    """
    if name in sys.modules:
        _do(name, act)
    else:
        sys.meta_path.insert(0, _Finder(name, act))


def _do(name: str, act: Callable[[], None]) -> None:
    try:
        act()
    except Exception:  # whatever it is, it is no fault of the program's
        import logging  # which takes time

        logging.getLogger("phalanx.ledger").exception("what was to be done after the import of %s was not", name)


class _Finder(MetaPathFinder):
    """Finds one module, once, by asking all others."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self._name = name
        self._act = act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(self._name, spec.loader, self._act)
        return spec


class _Loader(Loader):
    """The module's own loader, and then the act."""

    def __init__(self, name: str, loader: Loader, act: Callable[[], None]) -> None:
        self._name = name
        self._loader = loader
        self._act = act

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # what looks for data of the module asks it
        self._loader.exec_module(module)
        _do(self._name, self._act)
