"""From a request's body to a typed request; what is wrong is named."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from phalanx.errors import RequestError
from phalanx.server.api_error import ApiError
from phalanx.server.attendance import ClientGoneError, uncut
from phalanx.server.service import Service
from phalanx.server.unsupported import drop_harmless

MAX_BODY_BYTES = 32 * 1024 * 1024
"""A prompt of a million tokens, written as token ids, is about 7 MB."""
MAX_SILENCE_S = 30.0
"""Between two pieces of a body."""

T = TypeVar("T", bound=msgspec.Struct)


async def read_request(request: Request, kind: type[T], service: Service) -> T:
    """The request's body as `kind`. Raises ApiError (400, 408, 413, 415) or RequestError, and like `attended`."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Not only pedantry: a page in a browser may post any other type to a server on this host without asking it first.
    if content_type != "application/json":
        message = f"Content-Type is {content_type or 'missing'}; send application/json"
        raise ApiError(415, message, code="unsupported_media_type")
    return parse(await uncut(_read_body(request), service), kind)


def parse(body: bytes, kind: type[T]) -> T:
    """JSON as `kind`. Raises ApiError 400 if it is no JSON object, RequestError if a field is wrong."""
    try:
        values = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return build(values, kind)


def build(values: Mapping[str, Any], kind: type[T], at: str = "") -> T:
    """`values` as `kind`; null is the same as left out. `at` is where `values` stand in the body, for the message.

    Raises RequestError naming the field.
    """
    given = drop_harmless({name: value for name, value in values.items() if value is not None}, kind, at)
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise _named(str(error), given, at) from None


def _named(complaint: str, values: Any, at: str) -> RequestError:
    complaint, _, where = complaint.partition(" - at `$")
    path = where.rstrip("`")
    if missing := re.search("missing required field `(.*)`", complaint):
        return RequestError(f"{at}{path}.{missing[1]}".lstrip("."), None, "it is required")
    found = values
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        found = found[key] if key else found[int(index)]
    return RequestError(f"{at}{path}".lstrip("."), found, complaint.replace("`", "").lower())


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    now = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(MAX_SILENCE_S) as patience:
            async for piece in request.stream():
                patience.reschedule(now() + MAX_SILENCE_S)
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="request_too_large")
    except TimeoutError:
        message = f"{len(body)} bytes of the body came, and then nothing for {MAX_SILENCE_S:g} s"
        raise ApiError(408, message, code="request_timeout") from None
    except ClientDisconnect:
        raise ClientGoneError("the client left before its request was complete") from None
    return bytes(body)
