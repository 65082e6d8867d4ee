"""Methods of a worker that may be called by name (`collective_rpc`): declared, with typed arguments.

    class Probe:                                    # --worker-extension-cls my_package.probe:Probe
        def __init__(self, worker: Worker) -> None: ...

        @remote_method
        def norm(self, name: str) -> float: ...

        @remote_method(changes_weights=True)
        def scale(self, name: str, factor: float) -> None: ...

Arguments and results travel as msgpack and are checked against the annotations; nothing is pickled, and no name but
those that are declared can be called.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints, overload

import msgspec

from phalanx.errors import ConfigError, UserError
from phalanx.protocol.worker import CallMethod, MethodError, MethodResult
from phalanx.worker.error_text import message_of, traceback_of

F = TypeVar("F", bound=Callable[..., Any])

_DECLARATION = "__phalanx_remote_method__"


class MethodCallError(UserError):
    """No such method, or arguments that it does not take."""


class Arguments(msgspec.Struct, frozen=True, array_like=True):
    """What a call passes; each argument is decoded by the type that the method declares for it."""

    positional: tuple[msgspec.Raw, ...]
    named: dict[str, msgspec.Raw]


class Declaration(msgspec.Struct, frozen=True):
    """What `remote_method` says of a method."""

    changes_weights: bool


@overload
def remote_method(function: F, /) -> F: ...


@overload
def remote_method(*, changes_weights: bool = ...) -> Callable[[F], F]: ...


def remote_method(function: F | None = None, /, *, changes_weights: bool = False) -> F | Callable[[F], F]:
    """Declare that this method of a worker extension may be called by name. Its arguments should be annotated with
    types that msgspec can decode.

    With `changes_weights`, `LLM.collective_rpc` resets the prefix cache: what it holds was computed with the weights
    from before.
    """

    def declare(function: F) -> F:
        setattr(function, _DECLARATION, Declaration(changes_weights))
        return function

    return declare if function is None else declare(function)


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
    """The declared methods of a worker and its extension, by name."""

    def __init__(self, worker: object) -> None:
        self._methods = _declared(worker)

    def extend(self, path: str, extension: object) -> None:
        """Add those of the extension at `path`. Raises ConfigError if the worker has one of the same name."""
        added = _declared(extension)
        taken = sorted(self._methods.keys() & added.keys())
        if taken:
            allowed = f"its method {taken[0]!r} needs another name: every worker has one that is called so"
            raise ConfigError("worker_extension_cls", path, allowed)
        self._methods |= added

    def __contains__(self, name: str) -> bool:
        """Whether it is declared."""
        return name in self._methods

    def changing_weights(self) -> list[str]:
        """Names of those that are declared to change the weights."""
        return [name for name, method in self._methods.items() if getattr(method, _DECLARATION).changes_weights]

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
                message=message_of(error),
                traceback=traceback_of(error),
                is_user_error=isinstance(error, UserError),
            )

    def _find(self, name: str) -> Callable[..., object]:
        if name not in self._methods:
            known = ", ".join(sorted(self._methods)) or "none"
            raise MethodCallError(f"method: {name!r} is not declared by the worker or its extension; declared: {known}")
        return self._methods[name]


def _declared(owner: object) -> dict[str, Callable[..., object]]:
    # Of the class: looking at an object's properties would run them.
    functions = inspect.getmembers(type(owner), inspect.isfunction)
    return {name: getattr(owner, name) for name, function in functions if hasattr(function, _DECLARATION)}


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
