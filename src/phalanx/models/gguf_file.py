"""What a GGUF file says of itself: metadata, and where each tensor lies. No torch here.

The `gguf` package reads the same, but takes seconds for a vocabulary of 50,000 tokens. Source of the format:
github.com/ggml-org/ggml, docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from phalanx.errors import CheckpointError

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    kind: struct.Struct(f"<{code}")
    for kind, code in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_HEADER = struct.Struct("<4sIQQ")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_DEFAULT_ALIGNMENT = 32


class GGUFTensor(NamedTuple):
    """A tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first, as in torch."""
    ggml_type: int
    offset_bytes: int
    """From the start of the file."""


@dataclass(frozen=True)
class GGUFFile:
    """The head of a GGUF file."""

    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]

    @classmethod
    def read(cls, path: Path) -> GGUFFile:
        """Raises CheckpointError if the file is not GGUF of a version that is known, or is cut short in its head."""
        try:
            with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Parser(content).parse()
        except (struct.error, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(f"{path} cannot be read as a GGUF file: {error}") from error


class _Parser:
    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._at = 0

    def parse(self) -> GGUFFile:
        magic, version, num_tensors, num_entries = _HEADER.unpack_from(self._content)
        if magic != b"GGUF" or version not in _VERSIONS:
            raise ValueError(f"it begins with {magic!r}, version {version}")
        self._at = _HEADER.size
        metadata = {self._string(): self._value(self._scalar(_U32)) for _ in range(num_entries)}
        tensors = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        data_start = -(-self._at // alignment) * alignment
        return GGUFFile(
            metadata, tuple(tensor._replace(offset_bytes=data_start + tensor.offset_bytes) for tensor in tensors)
        )

    def _tensor(self) -> GGUFTensor:
        name = self._string()
        dimensions = [self._scalar(_U64) for _ in range(self._scalar(_U32))]
        return GGUFTensor(name, tuple(reversed(dimensions)), self._scalar(_U32), self._scalar(_U64))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        item_kind, length = self._scalar(_U32), self._scalar(_U64)
        return [self._value(item_kind) for _ in range(length)]

    def _scalar(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self._content, self._at)
        self._at += layout.size
        return value

    def _string(self) -> str:
        size = self._scalar(_U64)
        value = self._content[self._at : self._at + size].decode()
        self._at += size
        return value
