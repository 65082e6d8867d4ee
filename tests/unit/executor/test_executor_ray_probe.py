"""Whether a Ray is there and lets us in, asked of a server that speaks as much of Ray's protocol as that takes."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray")

from ray._raylet import AuthenticationTokenLoader, Config
from ray_head import head
from tls_files import write_tls_files

from phalanx.errors import ConfigError
from phalanx.executor.ray import probe
from phalanx.executor.ray.probe import NoRayError, answers, get_ready_for, is_gone

TOKEN = "0123456789" * 4


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user without a token, whatever the real one has."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "")  # so that it is taken back afterwards
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")  # a Ray that another test has started left its mode here too
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


def test_a_head_that_refuses_us_is_there(home: Path) -> None:
    with head(TOKEN) as address:
        assert answers(address)
        assert not is_gone(address)
    assert not answers(address)
    assert is_gone(address)


def test_a_head_that_is_slow_is_not_gone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LOOK_S", 0.05)
    with head(delay_s=0.3) as address:
        assert not is_gone(address)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (OSError(errno.EMFILE, "Too many open files"), False),
        (socket.gaierror(socket.EAI_SYSTEM, "System error"), False),
        (OSError(errno.ECONNREFUSED, "Connection refused"), True),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), True),
        (TimeoutError("timed out"), True),
    ],
)
def test_what_this_process_lacks_is_not_the_heads_end(
    monkeypatch: pytest.MonkeyPatch, error: OSError, found: bool
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(socket, "create_connection", fail)
    assert is_gone("10.0.0.1:6379") is found


def test_a_head_with_tls(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_tls_files(tmp_path)
    monkeypatch.setenv("RAY_USE_TLS", "true")
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", str(files.certificate))
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", str(files.key))
    monkeypatch.setenv("RAY_TLS_CA_CERT", str(files.certificate))
    with head(tls=files) as address:
        assert answers(address)
        assert not is_gone(address)
    assert is_gone(address)
