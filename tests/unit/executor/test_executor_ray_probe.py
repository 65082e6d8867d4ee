"""Whether a Ray is there and lets us in, asked of a server that speaks as much of Ray's protocol as that takes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

grpc = pytest.importorskip("grpc")
pytest.importorskip("ray")

from ray._raylet import AuthenticationTokenLoader, Config  # noqa: E402

from phalanx.errors import ConfigError  # noqa: E402
from phalanx.executor.ray.probe import NoRayError, get_ready_for  # noqa: E402

TOKEN = "0123456789" * 4


@contextmanager
def head(token: str | None = None, *, is_ray: bool = True) -> Iterator[str]:
    """The address of one that asks for `token`."""

    def answer(request: bytes, context: Any) -> bytes:
        sent = dict(context.invocation_metadata()).get("authorization")
        if token is not None and sent != f"Bearer {token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    handler = grpc.method_handlers_generic_handler(
        "ray.rpc.NodeInfoGcsService", {"CheckAlive": grpc.unary_unary_rpc_method_handler(answer)}
    )
    server = grpc.server(ThreadPoolExecutor(1))
    if is_ray:
        server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user without a token, whatever the real one has."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "")  # so that it is taken back afterwards
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    AuthenticationTokenLoader.instance().reset_cache()
    yield tmp_path
    monkeypatch.undo()
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")


def give_token(home: Path, token: str) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(token)


def test_a_ray_without_tokens(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_token(home, TOKEN)
    with head() as address:
        get_ready_for(address)
    with pytest.raises(KeyError):
        monkeypatch.delenv("RAY_AUTH_MODE")  # sending it the token would break it


def test_a_ray_with_our_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_token(home, TOKEN)
    with head(TOKEN) as address:
        get_ready_for(address)
    monkeypatch.delenv("RAY_AUTH_MODE")


@pytest.mark.parametrize(
    ("held", "complaint"), [(None, "it asks for its token"), ("9" * 40, "our token is not the one")]
)
def test_a_ray_with_a_token_that_we_have_not(home: Path, held: str | None, complaint: str) -> None:
    if held is not None:
        give_token(home, held)
    with head(TOKEN) as address, pytest.raises(ConfigError, match=complaint) as caught:
        get_ready_for(address)
    assert caught.value.field == "ray_address"
    assert TOKEN not in str(caught.value)


def test_told_to_use_a_token_that_we_have_not(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    Config.initialize("")
    with head(TOKEN) as address, pytest.raises(ConfigError, match="it asks for its token"):
        get_ready_for(address)


def test_nobody_is_there(home: Path) -> None:
    with head() as address:
        pass
    with pytest.raises(NoRayError, match="no Ray answers there"):
        get_ready_for(address)


def test_somebody_else_is_there(home: Path) -> None:
    with head(is_ray=False) as address, pytest.raises(ConfigError, match=r"is not Ray's head \(UNIMPLEMENTED\)"):
        get_ready_for(address)
