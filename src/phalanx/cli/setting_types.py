"""From the text of a flag to the value of a setting. A mistake is a ConfigError that says what is allowed."""

from __future__ import annotations

import math
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

import click
import msgspec
from msgspec import Meta

from phalanx.errors import ConfigError

BYTE_SETTINGS = frozenset({"kv_cache_memory"})
"""Settings in bytes, which take units."""

_UNITS = {
    unit: factor**power
    for power, letter in enumerate("kMGT", start=1)
    for unit, factor in ((f"{letter}b".lower(), 1000), (f"{letter}ib".lower(), 1024))
} | {"": 1, "b": 1}
_WORDS = {int: "a whole number", float: "a number", str: "text"}
_LIMITS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


def type_for(field: str, hint: Any) -> ValueType | ChoiceType | ObjectType:
    """The flag's type for a setting whose annotation is `hint`."""
    wanted = _without_none(hint)
    if get_origin(wanted) is Literal:
        return ChoiceType(field, get_args(wanted))
    if get_origin(wanted) is tuple:
        return ListType(field, get_args(wanted)[0])
    if get_origin(wanted) is dict:
        return ObjectType(field)
    return ByteSizeType(field, wanted) if field in BYTE_SETTINGS else ValueType(field, wanted)


class ValueType(click.ParamType):  # type: ignore[type-arg]  # generic only in later versions of click
    """A number or text within its limits."""

    def __init__(self, field: str, hint: Any) -> None:
        self.field = field
        self._hint = hint
        base, *annotations = get_args(hint) if get_origin(hint) is not None else (hint,)
        self.name = base.__name__
        limits = [
            f"{words} {limit:g}"
            for meta in annotations
            if isinstance(meta, Meta)
            for attribute, words in _LIMITS
            if (limit := getattr(meta, attribute)) is not None
        ]
        self.allowed = ", ".join([_WORDS[base], " and ".join(limits)]).removesuffix(", ")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not _is_unicode(value):
            raise ConfigError(self.field, value, "text in UTF-8")
        try:
            return msgspec.convert(value, self._hint, strict=False)
        except msgspec.ValidationError:
            raise ConfigError(self.field, _as_number(value), self.allowed) from None


class ChoiceType(click.Choice):  # type: ignore[type-arg]
    """One of a few words."""

    def __init__(self, field: str, choices: tuple[str, ...]) -> None:
        super().__init__(choices)
        self.field = field

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in self.choices:
            raise ConfigError(self.field, value, f"one of {', '.join(self.choices)}")
        return value


class ListType(ValueType):
    """Values with commas between them: 0,1,4."""

    def __init__(self, field: str, hint: Any) -> None:
        super().__init__(field, hint)
        self.name = "list"
        self.allowed = f"values with commas between them, each {self.allowed}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return tuple(super(ListType, self).convert(part.strip(), param, ctx) for part in value.split(","))
        except ConfigError:
            raise ConfigError(self.field, value, self.allowed) from None


class ObjectType(click.ParamType):  # type: ignore[type-arg]
    """A JSON object."""

    name = "json"

    def __init__(self, field: str) -> None:
        self.field = field

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return msgspec.json.decode(value, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ConfigError(self.field, value, f"a JSON object ({error})") from None


class SecondsRange(click.FloatRange):
    """A number within limits, among which click has NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return number if not math.isnan(number) else self.fail(f"{value} is not a number of seconds.", param, ctx)


class ByteSizeType(ValueType):
    """A number of bytes, with or without a unit: 512MiB, 2GB, 1073741824."""

    def __init__(self, field: str, hint: Any) -> None:
        super().__init__(field, hint)
        self.name = "size"
        self.allowed += ", in bytes or with a unit such as 512MiB or 2GB"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        written = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value))
        if written is None or written[2].lower() not in _UNITS:
            raise ConfigError(self.field, value, self.allowed)
        size = float(written[1]) * _UNITS[written[2].lower()]
        if math.isinf(size):
            raise ConfigError(self.field, value, self.allowed)
        return super().convert(str(int(size)), param, ctx)


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not types.NoneType)
    return hint


def _is_unicode(text: str) -> bool:
    """False for bytes of the command line that are not UTF-8: Python has them as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_number(text: Any) -> Any:
    """What the user meant to write, so that the message shows 0 and not '0'."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
