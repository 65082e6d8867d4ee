"""Asks a Ray whether it is there and lets us in, before Ray's own client, which takes minutes to say no."""

from __future__ import annotations

import os

import grpc
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray._private.grpc_utils import init_grpc_channel
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled

from phalanx.errors import ConfigError
from phalanx.transport.address import is_nobody_at

DEADLINE_S = 5.0
LOOK_S = 1.0
"""For one look of many."""
_QUESTION = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_NO_PROXY = (("grpc.enable_http_proxy", 0),)
_SILENCE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class NoRayError(ConfigError):
    """Nobody answers at the address."""


def get_ready_for(address: str) -> None:
    """Make sure that the Ray at `address` (host and port) answers; this process then uses the token if Ray asks for it.

    Both sides must agree about tokens: a client that sends them to a Ray that has none loses its actors, unsaid. Raises
    ConfigError.
    """
    if _uses_tls():
        return  # it is only Ray that knows what is wrong with certificates
    code = _ask(address, {})
    if code == grpc.StatusCode.UNAUTHENTICATED:
        is_sent = maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        if not is_sent or not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
            raise ConfigError("ray_address", address, f"it asks for its token; {_WHERE_TOKENS_ARE}")
        code = _ask(address, get_auth_headers_if_auth_enabled({}))
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise ConfigError("ray_address", address, f"our token is not the one that it asks for; {_WHERE_TOKENS_ARE}")
    if code in _SILENCE:
        raise NoRayError("ray_address", address, "no Ray answers there")
    if code != grpc.StatusCode.OK:
        raise ConfigError("ray_address", address, f"what answers there is not Ray's head ({code.name})")


_WHERE_TOKENS_ARE = "put it into ~/.ray/auth_token, or its path into RAY_AUTH_TOKEN_PATH"


def answers(address: str) -> bool:
    """Whether Ray's head says anything within `DEADLINE_S`, be it that it wants a token."""
    return _ask(address, {}) not in _SILENCE


def is_gone(address: str) -> bool:
    """Whether nobody is at the address of Ray's head any more, or its host cannot be reached.

    One that is only slow, or stopped, is there: its kernel still takes connections.
    """
    host, _, port = address.rpartition(":")
    return is_nobody_at(host.strip("[]"), int(port), within_s=LOOK_S)


def _ask(address: str, headers: dict[str, str]) -> grpc.StatusCode:
    with _channel(address) as channel:
        try:
            metadata = tuple((name.lower(), value) for name, value in headers.items())
            channel.unary_unary(_QUESTION)(b"", timeout=DEADLINE_S, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def _channel(address: str) -> grpc.Channel:
    if _uses_tls():
        return init_grpc_channel(address, _NO_PROXY)  # with Ray's certificates
    return grpc.insecure_channel(address, options=_NO_PROXY)


def _uses_tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
