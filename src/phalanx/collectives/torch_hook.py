"""Has any program that uses torch.distributed write a journal, from `install` on.

Where calls are caught:

- The methods of ProcessGroup, as Python sees them. All functions of torch.distributed end there, however they were
  imported, and so does FSDP.
- init_process_group, in whose place another function is put wherever it has been imported.
- What is called from C++ (the gradients of DistributedDataParallel, functional collectives, and so DTensor and compiled
  code) meets Python nowhere. It goes through the operators c10d::..., which get a kernel before that of the device.
  That costs each call ten times as much, so it is done only once somebody comes who calls from C++.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing import parent_process
from multiprocessing.util import Finalize, register_after_fork
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d

from phalanx.collectives import torch_calls, torch_notes
from phalanx.collectives.torch_calls import METHODS, OPERATORS, Operator
from phalanx.collectives.torch_notes import TorchNotes
from phalanx.collectives.torch_rank import told_to_init
from phalanx.ledger import journal, record
from phalanx.ledger.after_import import after_import

_FUNCTIONAL = "torch.distributed._functional_collectives"
_TRACE_RULES = "torch._dynamo.trace_rules"
_NOT_TRACED = (__name__, torch_calls.__name__, torch_notes.__name__, journal.__name__, record.__name__)
T = TypeVar("T")
_EXIT_PRIORITY = 0

log = logging.getLogger("phalanx.ledger")
_c10d: Any = _distributed_c10d


class _Inside(threading.local):
    """Whether this thread is in a call that has been noted, so that the operator under it is not noted again."""

    now = False


class Hook:
    """One a process, for as long as it lives."""

    def __init__(self) -> None:
        self._notes = TorchNotes()
        self._inside = _Inside()
        self._waits: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._library: Any = None
        self._is_sick = False
        self._error = ""

    def install(self) -> None:
        """From now on everything is noted. What is under way goes on unnoted."""
        for name in METHODS:
            original = getattr(_c10d.ProcessGroup, name, None)
            if original is not None:
                setattr(_c10d.ProcessGroup, name, self._noted(name, original))
        _c10d.Work.wait = self._noted_wait(_c10d.Work.wait)
        _c10d.ProcessGroup._set_group_desc = self._noted_name(_c10d.ProcessGroup._set_group_desc)
        parallel: Any = torch.nn.parallel.DistributedDataParallel
        parallel.__init__ = self._noted_parallel(parallel.__init__)
        _replace(dist.init_process_group, self._noted_init(dist.init_process_group))
        after_import(_FUNCTIONAL, self._catch_operators)
        after_import(_TRACE_RULES, _keep_from_being_traced)
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self._end)
        if parent_process() is not None:
            self._await_end_of_child()
        register_after_fork(self, Hook._await_end_of_child)
        sys.excepthook = self._noted_error(sys.excepthook)
        if dist.is_initialized():
            self._begin(dist.get_rank())
        else:
            self._guarded(self._notes.come)

    @property
    def memory(self) -> memoryview:
        """See `journal_memory`."""
        return self._notes.memory

    def step(self, number: int) -> None:
        """See the function of this name."""
        self._notes.step(number)

    def _noted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        describe, notes, inside = METHODS[name], self._notes, self._inside

        @functools.wraps(original)
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            number = 0
            if not self._is_sick:
                try:
                    number = notes.issue(group, describe(*args, **kwargs))
                except Exception:  # arguments of any version of torch
                    self._give_up()
            inside.now = True
            try:
                work = original(group, *args, **kwargs)
            except BaseException:  # whatever it is, it goes on: an interrupt, too, has ended the call
                notes.failed(number)
                raise
            finally:
                inside.now = False
            if number:
                notes.done(number)
                if work is not None:
                    self._remember(work, number)
            return work

        return call

    def _noted_wait(self, original: Callable[..., bool]) -> Callable[..., bool]:
        waits, notes = self._waits, self._notes

        @functools.wraps(original)
        def wait(work: Any, *args: Any, **kwargs: Any) -> bool:
            _, number = waits.get(id(work), (None, 0))
            if not number:
                return original(work, *args, **kwargs)
            notes.awaited(number)
            try:
                is_done = original(work, *args, **kwargs)
            except BaseException:  # it goes on
                notes.failed(number)
                raise
            notes.done(number)
            waits.pop(id(work), None)
            return is_done

        return wait

    def _remember(self, work: Any, number: int) -> None:
        key = id(work)
        self._waits[key] = weakref.ref(work, lambda _: self._waits.pop(key, None)), number

    def _noted_name(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def name(group: Any, description: str) -> None:
            original(group, description)
            if description == "default_pg" and group.size() > 1:  # before the first collective, which may never come
                self._begin(group.rank())

        return name

    def _noted_init(self, original: Callable[..., None]) -> Callable[..., None]:
        """Ranks may fail or hang before there is a group, because of one that does not come."""
        notes, signature = self._notes, inspect.signature(original)

        def join(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
            place = told_to_init(signature.bind_partial(*args, **kwargs).arguments, os.environ)
            return notes.join(place) if place is not None else 0

        @functools.wraps(original)
        def init(*args: Any, **kwargs: Any) -> None:
            number = 0 if dist.is_initialized() else self._guarded(lambda: join(args, kwargs))
            try:
                original(*args, **kwargs)
            finally:  # who goes on after an error waits for nobody
                notes.done(number or 0)

        return init

    def _noted_parallel(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(module: Any, *args: Any, **kwargs: Any) -> None:
            self._catch_operators()
            original(module, *args, **kwargs)

        return init

    def _noted_error(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
            self._error = _in_words(error)
            return original(kind, error, trace)

        return excepthook

    def _catch_operators(self) -> None:
        """Note what C++ calls, too. Functionality keys come before those of devices, and this one is always on."""
        if self._library is not None:
            return
        library: Any = torch.library  # untyped
        try:
            self._library = library.Library("c10d", "IMPL")
            for name, operator in OPERATORS.items():
                packet = getattr(torch.ops.c10d, name, None)  # not every version of torch has each
                if packet is not None:
                    kernel = self._kernel(operator, packet.default)
                    self._library.impl(name, kernel, "BackendSelect", with_keyset=True)
        except Exception:  # internals of any version of torch
            self._give_up()

    def _kernel(self, operator: Operator, overload: Any) -> Callable[..., Any]:
        describe, redispatch = METHODS[operator.method], overload.redispatch
        below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
        notes, inside = self._notes, self._inside

        def kernel(keys: Any, *args: Any) -> Any:
            if inside.now or self._is_sick:
                return redispatch(keys & below, *args)
            number = 0
            try:
                call = describe(*(args[i] for i in operator.arguments))
                if call.device != "meta":
                    number = notes.issue(_c10d.ProcessGroup.unbox(args[operator.group]), call)
            except Exception:  # arguments of any version of torch
                self._give_up()
            try:
                result = redispatch(keys & below, *args)
            except BaseException:  # it goes on
                notes.failed(number)
                raise
            notes.done(number)
            return result

        return kernel

    def _begin(self, rank: int) -> None:
        self._guarded(lambda: self._notes.begin(rank))

    def _guarded(self, note: Callable[[], T]) -> T | None:
        """Something that may fail: there may be no memory, no descriptor, a watcher of another version."""
        try:
            return None if self._is_sick else note()
        except Exception:  # whatever it is, it is no fault of the program's
            self._give_up()
            return None

    def _give_up(self) -> None:
        """A fault of ours must not become one of the program, so whoever calls this has caught any `Exception`."""
        self._is_sick = True
        log.exception("collectives are not recorded any more")

    def _forget(self) -> None:
        self._waits.clear()
        self._notes.forget()

    def _end(self) -> None:
        self._notes.end(self._error)

    def _await_end_of_child(self) -> None:
        """A process of `multiprocessing` ends without what is registered at exit."""
        Finalize(None, self._end_of_child, exitpriority=_EXIT_PRIORITY)

    def _end_of_child(self) -> None:
        error = sys.exc_info()[1]  # what ends the process, if it does not end in order
        if error is not None and not (isinstance(error, SystemExit) and not error.code):
            self._error = _in_words(error)
        self._end()


def _replace(function: Callable[..., Any], another: Callable[..., Any]) -> None:
    """In all modules that have it by its own name, whoever has imported it from where."""
    name = function.__name__
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is function:
            setattr(module, name, another)


def _keep_from_being_traced() -> None:
    """What runs between the parts of a compiled program would be compiled as well."""
    trace_rules: Any = sys.modules[_TRACE_RULES]
    for name in _NOT_TRACED:
        trace_rules.add(name)


def _in_words(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"has ended with exit code {error.code}"
    first_line = (str(error).splitlines() or [""])[0]
    return f"has ended with {type(error).__name__}: {first_line}"


@functools.cache
def _hook() -> Hook:
    hook = Hook()
    if dist.is_available():
        hook.install()
    return hook


def install() -> None:
    """Record every collective of torch.distributed in this process from now on. A second time does nothing.

    The journal is read by `phalanx watch`, if that has started this process. Never blocks; it is meant for the main
    thread, before the process group is made.
    """
    _hook()


def journal_memory() -> memoryview:
    """The journal of this process, which is a rank, as `ledger.journal.read` takes it."""
    return _hook().memory


def step(number: int) -> None:
    """Say that the program is in its step `number` from now on, so that verdicts can tell steps apart.

    All ranks have to say so, at the same places. Numbers rise, from 0 on. Installs the hook if it is not.
    """
    _hook().step(number)
