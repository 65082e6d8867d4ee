"""What the tests of the transport say to each other."""

from __future__ import annotations

import msgspec


class Add(msgspec.Struct, tag=True, array_like=True):
    left: int
    right: int


class Stop(msgspec.Struct, tag=True, array_like=True):
    pass


class Sum(msgspec.Struct, tag=True, array_like=True):
    value: int


Command = Add | Stop


class Tick(msgspec.Struct, tag=True, array_like=True):
    """A command, and the answer to it."""

    number: int = 0
