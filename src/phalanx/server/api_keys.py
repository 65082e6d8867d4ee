"""Who may ask. Keys come from a file or the environment, never from the command line, and are kept as digests only."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from phalanx.config import ServerConfig
from phalanx.errors import ConfigError
from phalanx.server.api_error import ApiError

ENVIRONMENT_VARIABLE = "PHALANX_API_KEY"


class ApiKeys:
    """Without any key, everybody may ask."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    @classmethod
    def load(cls, config: ServerConfig) -> ApiKeys:
        """Keys of `api_key_file`, one a line, and of PHALANX_API_KEY. Raises ConfigError if the file has none."""
        keys = [key] if (key := os.environ.get(ENVIRONMENT_VARIABLE, "").strip()) else []
        if config.api_key_file is not None:
            keys += _read(config.api_key_file)
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> None:
        """`authorization` is the header's value. Raises ApiError 401."""
        if not self._digests:
            return
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))  # the header's own bytes
        # Digests of equal length, each compared in full: the time tells nothing about any key, or how many there are.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "a key is needed: send the header 'Authorization: Bearer KEY' with one that this server knows",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _read(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError("api_key_file", path, f"it cannot be read: {reason}") from error
    keys = [key for line in lines if (key := line.strip())]
    if not keys:
        raise ConfigError("api_key_file", path, "it must have a key on each line, and has none")
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
