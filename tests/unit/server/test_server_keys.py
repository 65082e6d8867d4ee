"""API keys from a file and from the environment."""

import base64
from pathlib import Path

import pytest

from phalanx.config import ServerConfig
from phalanx.errors import ConfigError
from phalanx.server.api_error import ApiError
from phalanx.server.api_keys import ApiKeys


@pytest.fixture(autouse=True)
def _no_key_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PHALANX_API_KEY", raising=False)


def test_without_keys_everybody_may() -> None:
    keys = ApiKeys.load(ServerConfig())
    assert not keys
    keys.check(None)


def test_keys_of_both_sources_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n  two  \nvierzöhn\n", encoding="utf-8-sig")
    monkeypatch.setenv("PHALANX_API_KEY", "three")
    keys = ApiKeys.load(ServerConfig(api_key_file=str(file)))
    for key in ("one", "two", "three", "vierzöhn"):
        keys.check(f"Bearer {key.encode().decode('latin-1')}")  # as a header arrives
    with pytest.raises(ApiError):
        keys.check("Bearer ")


def test_keys_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHALANX_API_KEY", "secret")
    keys = ApiKeys.load(ServerConfig())
    assert "secret" not in repr(vars(keys))
    with pytest.raises(ApiError) as caught:
        keys.check("Bearer sekret")
    assert "sekret" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff"])
def test_a_file_without_keys_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        ApiKeys.load(ServerConfig(api_key_file=str(file)))
    assert caught.value.field == "api_key_file"


def test_a_browser_sends_the_key_as_a_password_where_that_is_taken() -> None:
    keys = ApiKeys(["k:ey"])
    given = f"Basic {base64.b64encode(b'anybody:k:ey').decode()}"
    keys.check(given, takes_password=True)
    keys.check("Bearer k:ey", takes_password=True)
    with pytest.raises(ApiError) as caught:
        keys.check(given)
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}
    for wrong in (
        "Basic",
        "Basic !!",
        "Basic a2V5",
        f"Basic {base64.b64encode(b'k:ey:').decode()}",
        "Digest k:ey",
        None,
    ):
        with pytest.raises(ApiError) as caught:
            keys.check(wrong, takes_password=True)
        assert caught.value.headers == {"WWW-Authenticate": 'Basic realm="Phalanx"'}
