"""A server that runs, as a command speaks with it: JSON over HTTP, and its errors as ours."""

from __future__ import annotations

import os
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from typing import TypeVar

import msgspec

from phalanx.errors import ConfigError, DeadlineError, PhalanxError, UserError

KEY_VARIABLE = "PHALANX_API_KEY"
TIMEOUT_S = 30.0

T = TypeVar("T")


class _Error(msgspec.Struct):
    message: str


class _ErrorAnswer(msgspec.Struct):
    error: _Error


class RunningServer:
    """Reached at its URL, with or without /v1, and with the key in PHALANX_API_KEY if there is one."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError if it is none."""
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("URL", url, "such as http://127.0.0.1:8000")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"

    def call(
        self,
        method: str,
        path: str,
        kind: type[T],
        body: msgspec.Struct | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> T:
        """The answer. Raises UserError with the server's words if it refuses, and DeadlineError or PhalanxError if it
        cannot be reached or fails.
        """
        request = urllib.request.Request(f"{self.url}{path}", method=method)
        if key := os.environ.get(KEY_VARIABLE, "").strip():
            request.add_header("Authorization", f"Bearer {key}")
        if body is not None:
            request.add_header("Content-Type", "application/json")
            request.data = msgspec.json.encode(body)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return msgspec.json.decode(response.read(), type=kind)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error.code, error.read()) from None
        except TimeoutError:
            raise DeadlineError(f"the answer to {method} {path}", self.url, timeout_s) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error  # of a urllib.error.URLError: what is behind it
            raise PhalanxError(f"{self.url} cannot be reached: {getattr(reason, 'strerror', None) or reason}") from None
        except msgspec.DecodeError:
            raise UserError(f"{self.url} is no Phalanx server, or one of another version") from None


def _refusal(status: int, content: bytes) -> PhalanxError:
    try:
        message = msgspec.json.decode(content, type=_ErrorAnswer).error.message
    except msgspec.DecodeError:
        return UserError(f"it answers with status {status}: no Phalanx server, or one of another version")
    return UserError(message) if status < 500 else PhalanxError(message)
