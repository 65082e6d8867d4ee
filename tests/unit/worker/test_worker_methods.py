from __future__ import annotations

import sys
import types

import msgspec
import pytest

from phalanx.errors import ConfigError
from phalanx.protocol.worker import CallMethod, MethodError, MethodResult
from phalanx.worker.methods import MethodCallError, Methods, encode_arguments, load_extension, remote_method


class Point(msgspec.Struct):
    x: int
    y: int


class Speechless(Exception):
    def __str__(self) -> str:
        raise LookupError


class Probe:
    def __init__(self, worker: object) -> None:
        self.worker = worker

    @remote_method
    def scaled(self, point: Point, factor: int = 1) -> Point:
        return Point(point.x * factor, point.y * factor)

    @remote_method
    def joined(self, *words: str, **more: int) -> str:
        return " ".join(words) + "".join(f" {name}={value}" for name, value in more.items())

    @remote_method
    def broken(self) -> None:
        raise RuntimeError("out of luck")

    @remote_method
    def broken_in_no_language(self) -> None:
        raise ValueError("nothing in model\udcff")

    @remote_method
    def broken_beyond_words(self) -> None:
        raise Speechless

    @remote_method(changes_weights=True)
    def scale(self, factor: float) -> None: ...

    def secret(self) -> str:
        return "not declared"


def call(method: str, *args: object, **kwargs: object) -> MethodResult | MethodError:
    return Methods(Probe(None)).call(CallMethod(method, encode_arguments(args, kwargs)))


def value_of(answer: MethodResult | MethodError) -> object:
    assert isinstance(answer, MethodResult), answer
    return msgspec.msgpack.decode(answer.value)


def test_arguments_and_results_keep_their_types() -> None:
    assert value_of(call("scaled", Point(1, 2), factor=3)) == {"x": 3, "y": 6}
    assert value_of(call("scaled", Point(1, 2))) == {"x": 1, "y": 2}
    assert value_of(call("joined", "a", "b", n=1)) == "a b n=1"


@pytest.mark.parametrize(
    ("method", "args", "complaint"),
    [
        ("secret", (), "declared: broken, broken_beyond_words, broken_in_no_language, joined, scale, scaled"),
        ("__init__", (), "not declared"),
        ("scaled", (), "missing a required argument: 'point'"),
        ("scaled", ("no point",), "point of scaled: Expected `object`, got `str`"),
        ("joined", (1,), "words of joined: Expected `str`, got `int`"),
    ],
)
def test_a_wrong_call_is_the_callers_mistake(method: str, args: tuple[object, ...], complaint: str) -> None:
    answer = call(method, *args)
    assert isinstance(answer, MethodError) and answer.is_user_error
    assert complaint in answer.message


def test_what_a_method_raises_is_the_answer() -> None:
    answer = call("broken")
    assert isinstance(answer, MethodError) and not answer.is_user_error
    assert (answer.kind, answer.message) == ("RuntimeError", "out of luck")
    assert "in broken" in answer.traceback


def test_what_a_method_raises_can_be_sent_whatever_its_text_is() -> None:
    for method, message in (
        ("broken_in_no_language", r"nothing in model\udcff"),
        ("broken_beyond_words", "its text cannot be had: LookupError"),
    ):
        answer = call(method)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=MethodError) == answer
        assert isinstance(answer, MethodError) and answer.message == message
        assert f"in {method}" in answer.traceback


def test_methods_that_change_weights_are_told_apart() -> None:
    assert Methods(Probe(None)).changing_weights() == ["scale"]


class Worker:
    @remote_method
    def whereabouts(self) -> str:
        return "here"


class Impostor:
    @remote_method
    def whereabouts(self) -> str:
        return "elsewhere"


def test_an_extension_adds_methods() -> None:
    methods = Methods(Worker())
    methods.extend("probes:Probe", Probe(None))
    assert value_of(methods.call(CallMethod("whereabouts", encode_arguments((), {})))) == "here"
    assert value_of(methods.call(CallMethod("joined", encode_arguments(("a",), {})))) == "a"
    assert methods.changing_weights() == ["scale"]


def test_a_name_that_the_worker_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"worker_extension_cls: 'probes:Impostor'.*'whereabouts'.*another name"):
        Methods(Worker()).extend("probes:Impostor", Impostor())


def test_what_cannot_be_sent_is_refused_before_it_is() -> None:
    with pytest.raises(MethodCallError, match="msgspec"):
        encode_arguments((object(),), {})


def test_an_extension_is_made_with_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("probes")
    module.Probe = Probe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "probes", module)
    extension = load_extension("probes:Probe", "the worker")
    assert isinstance(extension, Probe) and extension.worker == "the worker"


@pytest.mark.parametrize("path", ["probes", "no_such_module:Probe", "probes:", ":Probe", "json:NoSuchClass"])
def test_a_wrong_extension_is_refused_by_name(path: str) -> None:
    with pytest.raises(ConfigError, match="worker_extension_cls"):
        load_extension(path, None)
