"""Which weights a checkpoint has, told in milliseconds. No torch here.

Fine-tunes of one model agree in every name, type and shape, and reading all their bytes takes minutes. So of each
tensor one page is read, from its middle: whatever trained a tensor has changed every page of it, or nearly so. What
changes single rows alone, such as the embeddings of a few tokens, can go unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from phalanx.errors import CheckpointError
from phalanx.models.weight_files import TensorInfo

PAGE_BYTES = 4096
MAX_PAGES = 1024
"""A mixture's experts are tens of thousands of tensors; they are trained together."""
DIGEST_BYTES = 16


def fingerprint(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> bytes:
    """Of config.json and the weights, however they are shared out to files. Raises CheckpointError."""
    names = sorted(tensors)
    kinds = [(name, tensors[name].dtype, tensors[name].shape) for name in names]
    digest = hashlib.blake2b(json.dumps([settings, kinds], sort_keys=True).encode(), digest_size=DIGEST_BYTES)
    for page in _read_pages([tensors[name] for name in _sample(names)]):
        digest.update(page)
    return digest.digest()


def _sample(names: list[str]) -> list[str]:
    """All, or MAX_PAGES of them: drawn as if at random, so that every kind and every layer is among them."""
    if len(names) <= MAX_PAGES:
        return names
    return sorted(names, key=lambda name: zlib.crc32(name.encode()))[:MAX_PAGES]


def _read_pages(tensors: Sequence[TensorInfo]) -> Iterator[bytes]:
    """The middle page of each tensor."""
    with ExitStack() as stack:
        try:
            descriptors = {file: _open(file, stack) for file in {tensor.file for tensor in tensors}}
            # Asked for all at once, so that a disk or a file server has not one wait for the other.
            for tensor in tensors:
                os.posix_fadvise(descriptors[tensor.file], *_middle(tensor), os.POSIX_FADV_WILLNEED)
            for tensor in tensors:
                offset_bytes, num_bytes = _middle(tensor)
                yield os.pread(descriptors[tensor.file], num_bytes, offset_bytes)
        except OSError as error:
            at_fault = error.filename or "a file of weights"
            raise CheckpointError(f"{at_fault} cannot be read: {error.strerror}") from error


def _open(file: Path, stack: ExitStack) -> int:
    descriptor = os.open(file, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # nothing beyond what is asked for
    return descriptor


def _middle(tensor: TensorInfo) -> tuple[int, int]:
    num_bytes = min(PAGE_BYTES, tensor.num_bytes)
    return tensor.offset_bytes + (tensor.num_bytes - num_bytes) // 2, num_bytes
