"""Who may ask. Keys come from a file or the environment, never from the command line, and are kept as digests only."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Iterable
from contextlib import suppress
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

    def check(self, authorization: str | None, *, takes_password: bool = False) -> None:
        """`authorization` is the header's value. With `takes_password` a key may also come as a password, as browsers
        send it. Raises ApiError 401.
        """
        if not self._digests:
            return
        given = _digest(_key_in(authorization or "", takes_password))
        # Digests of equal length, each compared in full: the time tells nothing about any key, or how many there are.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(matches):
            also = ", or the key as the password of any user" if takes_password else ""
            raise ApiError(
                401,
                f"a key is needed: send the header 'Authorization: Bearer KEY' with one that this server knows{also}",
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Basic realm="Phalanx"' if takes_password else "Bearer"},
            )


def _key_in(authorization: str, takes_password: bool) -> bytes:
    """The key in a header's value; nothing, which is no key, if there is none."""
    scheme, _, credentials = authorization.partition(" ")
    content = credentials.strip().encode("latin-1")  # the header's own bytes
    if scheme.lower() == "bearer":
        return content
    if takes_password and scheme.lower() == "basic":
        with suppress(binascii.Error):
            return base64.b64decode(content, validate=True).partition(b":")[2]
    return b""


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
