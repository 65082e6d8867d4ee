"""What messages are made of: their base, columns of numbers, and what several of them hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from phalanx.errors import ConfigError

Ints = bytes
"""Column of int32."""

Floats = bytes
"""Column of float32."""


def ints(values: Sequence[int] | NDArray[np.int32]) -> Ints:
    """A column of these numbers. Raises OverflowError for one that is no int32."""
    return np.asarray(values, dtype=np.int32).tobytes()


def as_ints(column: Ints) -> NDArray[np.int32]:
    """The column's numbers, read-only and without a copy."""
    return np.frombuffer(column, dtype=np.int32)


def as_floats(column: Floats) -> NDArray[np.float32]:
    """The column's numbers, read-only and without a copy."""
    return np.frombuffer(column, dtype=np.float32)


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Anything that goes from one process to another. Field order is the wire format."""


class WrongSetting(Message, frozen=True):
    """A ConfigError: an exception cannot travel itself, and its text does not know how the user calls the setting."""

    field: str
    value: bool | int | float | str | None
    allowed: str

    @classmethod
    def of(cls, error: Exception) -> Self | None:
        """None if the error is another one."""
        if not isinstance(error, ConfigError):
            return None
        value = error.value if isinstance(error.value, bool | int | float | str | None) else repr(error.value)
        return cls(error.field, value, error.allowed)

    def error(self) -> ConfigError:
        return ConfigError(self.field, self.value, self.allowed)


class LogprobColumns(Message, frozen=True):
    """Log-probabilities for some entries of a batch of tokens.

    `entries` are indices into the batch; `chosen` has one number an entry; `top_ids` and `top_logprobs` have `width`
    numbers an entry, most likely first. An entry that asked for fewer than `width` uses the first ones.
    """

    entries: Ints
    chosen: Floats
    width: int
    top_ids: Ints
    top_logprobs: Floats
