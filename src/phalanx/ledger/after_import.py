"""Something to be done as soon as a module has been imported, by whomever. Imports nothing that takes time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
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
    """Finds one module by asking the finders after it, until the module has been imported.

    Not only once: who looks whether the module is there asks too, and an import that fails may be tried again.
    """

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self._name = name
        self._act = act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def finish(self) -> None:
        """The module is there."""
        if self in sys.meta_path:  # else it has been executed once more, from what was found before
            sys.meta_path.remove(self)
            _do(self._name, self._act)


class _Loader(Loader):
    """The module's own loader, and then the act."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> object:
        """Who only looks where the module is may ask more of its loader than to load."""
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # what looks for data of the module asks it
        self._loader.exec_module(module)
        self._finder.finish()
