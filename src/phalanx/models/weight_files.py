"""What the safetensors files of a checkpoint hold, from their headers alone. No torch here.

A file is the header's length (8 bytes, little-endian), the header (JSON: dtype, shape and offsets of each tensor), then
the tensors' bytes. Source: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from phalanx.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""torch's names of the types that weights may have, by safetensors' names."""

_LENGTH = struct.Struct("<Q")
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


class TensorInfo(NamedTuple):
    """A tensor of a checkpoint: its file, safetensors' name of its type (such as "BF16"), its shape, its bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    """From the start of the file."""
    num_bytes: int


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    """The file of each tensor."""


def read_headers(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint by name.

    Raises CheckpointError: there are no safetensors files, one is missing, of the wrong size or not of this format, or
    one lacks a tensor that the index says it has.
    """
    index = directory / INDEX
    if not index.exists():
        return _read_header(directory / SINGLE)
    weight_map = _weight_map(index)
    headers = {file: _read_header(directory / file) for file in sorted(set(weight_map.values()))}
    for tensor, file in weight_map.items():
        if tensor not in headers[file]:
            raise CheckpointError(f"{directory / file} lacks the tensor {tensor}, which {INDEX} says it has")
    return {tensor: headers[file][tensor] for tensor, file in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except (msgspec.DecodeError, OSError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files: {error}") from error
    if not weight_map:
        raise CheckpointError(f"{index} is not an index of safetensors files: it names no tensor")
    return weight_map


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        with file.open("rb") as stream:
            (header_bytes,) = _LENGTH.unpack(stream.read(_LENGTH.size))
            size_bytes = file.stat().st_size
            if header_bytes > size_bytes:
                raise CheckpointError(f"{file} is cut short, or is no safetensors file")
            header: dict[str, Any] = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        data_bytes = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        data_start = _LENGTH.size + header_bytes
        expected_bytes = data_start + data_bytes
        tensors = {name: _describe(file, entry, data_start) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise CheckpointError(_describe_missing(file)) from error
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is no safetensors file: {error}") from error
    if size_bytes != expected_bytes:
        fault = "is cut short" if size_bytes < expected_bytes else "goes on after its last tensor"
        raise CheckpointError(f"{file} {fault}: it has {size_bytes} bytes of {expected_bytes}")
    return tensors


def _describe(file: Path, entry: Mapping[str, Any], data_start: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    return TensorInfo(file, entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin)


def _describe_missing(file: Path) -> str:
    others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in file.parent.glob(pattern))
    if others:
        return f"{file.parent} has no {file.name}, only {others[0]}: weights must be in safetensors files"
    return f"{file} is missing: the checkpoint has no weights, or not all of them"


def write_header(sink: BinaryIO, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """Begin a safetensors file whose tensors, all of torch's `dtype`, follow one another in this order."""
    (kind,) = (kind for kind, name in DTYPES.items() if name == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * _ITEM_BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % _LENGTH.size)  # tensors begin aligned
    sink.write(_LENGTH.pack(len(encoded)) + encoded)
