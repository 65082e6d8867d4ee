"""Methods of a worker that the brain may call by name (`Executor.collective_rpc`): declared, with typed arguments.

    class Probe:                                    # --worker-extension-cls my_package.probe:Probe
        def __init__(self, worker: Worker) -> None: ...

        @remote_method
        def norm(self, name: str) -> float: ...

Arguments and results travel as msgpack and are checked against the annotations; nothing is pickled, and no name but
those that are declared can be called.
"""

from __future__ import annotations

import importlib
import inspect
import os
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

import msgspec

from phalanx.errors import ConfigError, UserError
from phalanx.protocol import CallMethod, MethodError, MethodResult

F = TypeVar("F", bound=Callable[..., Any])

_MARK = "__phalanx_remote_method__"


class MethodCallError(UserError):
    """No such method, or arguments that it does not take."""


class Arguments(msgspec.Struct, frozen=True, array_like=True):
    """What a call passes; each argument is decoded by the type that the method declares for it."""

    positional: tuple[msgspec.Raw, ...]
    named: dict[str, msgspec.Raw]


def remote_method(function: F) -> F:
    """Declare that the brain may call this method of a worker extension. Its arguments should be annotated with types
    that msgspec can decode."""
    setattr(function, _MARK, True)
    return function


def load_extension(path: str, worker: object) -> object:
    """An instance of the class at `package.module:Class`, made with the worker as its one argument.

    Raises ConfigError if there is no such class. What the constructor raises is passed on.
    """
    module_name, _, class_name = path.partition(":")
    try:
        extension: Callable[[object], object] = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError("worker_extension_cls", path, f"it must be package.module:Class ({error})") from error
    return extension(worker)


class Methods:
    """The declared methods of some objects, by name. The first object that has a name is called."""

    def __init__(self, *owners: object) -> None:
        self._methods: dict[str, Callable[..., object]] = {}
        for owner in owners:
            # Of the class: looking at an object's properties would run them.
            for name, function in inspect.getmembers(type(owner), inspect.isfunction):
                if hasattr(function, _MARK):
                    self._methods.setdefault(name, getattr(owner, name))

    def call(self, call: CallMethod) -> MethodResult | MethodError:
        """Carry out a call. What the method raises is the answer, and the worker goes on."""
        try:
            method = self._find(call.method)
            positional, named = _decode(method, call.arguments)
            return MethodResult(msgspec.msgpack.encode(method(*positional, **named)))
        except Exception as error:  # it is the method's user who must know: see Executor.collective_rpc
            return MethodError(
                node=os.uname().nodename,
                kind=type(error).__name__,
                message=str(error) or repr(error),
                traceback="".join(traceback.format_exception(error)),
                is_user_error=isinstance(error, UserError),
            )

    def _find(self, name: str) -> Callable[..., object]:
        if name not in self._methods:
            known = ", ".join(sorted(self._methods)) or "none"
            raise MethodCallError(f"method: {name!r} is not declared by the worker or its extension; declared: {known}")
        return self._methods[name]


def encode_arguments(positional: tuple[object, ...], named: Mapping[str, object]) -> bytes:
    """For `CallMethod`. Raises MethodCallError for what cannot be sent."""
    try:
        return msgspec.msgpack.encode((positional, named))
    except (TypeError, ValueError, OverflowError) as error:
        raise MethodCallError(f"args: {error}; they must be what msgspec can encode") from error


def _decode(method: Callable[..., object], arguments: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
    passed = msgspec.msgpack.decode(arguments, type=Arguments)
    try:
        bound = inspect.signature(method).bind(*passed.positional, **passed.named)
    except TypeError as error:
        raise MethodCallError(f"args of {method.__name__}: {error}") from None
    hints = get_type_hints(method)
    parameters = inspect.signature(method).parameters
    for name, value in bound.arguments.items():
        hint = hints.get(name, Any)
        kind = parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            bound.arguments[name] = tuple(_convert(method, name, each, hint) for each in value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = {key: _convert(method, key, each, hint) for key, each in value.items()}
        else:
            bound.arguments[name] = _convert(method, name, value, hint)
    return bound.args, bound.kwargs


def _convert(method: Callable[..., object], name: str, value: msgspec.Raw, hint: Any) -> Any:
    try:
        return msgspec.msgpack.decode(value, type=hint)
    except msgspec.ValidationError as error:
        raise MethodCallError(f"{name} of {method.__name__}: {error}") from None
