"""Errors in the form that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from phalanx.errors import (
    ConfigError,
    EngineDeadError,
    MaintenanceError,
    NotNowError,
    PhalanxError,
    RequestError,
    UserError,
)

RETRY_AFTER_S = "5"
"""While an engine is started again, which takes some seconds at least."""


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, frozen=True):
    error: ErrorBody


class ApiError(PhalanxError):
    """An answer other than 200. `param` names the part of the request that is wrong; `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> ErrorAnswer:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return ErrorAnswer(ErrorBody(str(self), kind, self.param, self.code))

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def engine_dead(reason: str) -> ApiError:
    return ApiError(503, f"the engine has stopped: {reason}", code="engine_dead")


def engine_restarting(reason: str) -> ApiError:
    message = f"the engine is being started again: {reason}"
    return ApiError(503, message, code="engine_restarting", headers={"Retry-After": RETRY_AFTER_S})


def engine_asleep(level: int, why_now: str) -> ApiError:
    message = f"the engine is asleep (level {level}) until POST /wake, and {why_now}"
    return ApiError(503, message, code="engine_asleep", headers={"Retry-After": RETRY_AFTER_S})


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about `error`. Of our own mistakes it learns nothing but that there was one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError | ConfigError):
        message = f"{error.field}: {reprlib.repr(error.value)} is not possible: {error.allowed}"
        return ApiError(400, message, param=error.field)
    if isinstance(error, NotNowError):
        return ApiError(409, str(error), code="not_now")
    if isinstance(error, MaintenanceError):
        return ApiError(500, str(error), code="maintenance_failed")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, EngineDeadError):
        return engine_dead(str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, headers=error.headers)
    return ApiError(500, "an internal error; the server's log has its traceback", code="internal_error")
