"""What a connection to Ray leaves behind when it fails, and who may share it. Ray itself is a fake."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from ray_head import head  # noqa: E402

from phalanx.config import ClusterConfig  # noqa: E402
from phalanx.errors import ConfigError, StartError  # noqa: E402
from phalanx.executor.ray import connection, private_ray  # noqa: E402
from phalanx.executor.ray.connection import Connection, connect  # noqa: E402
from phalanx.executor.ray.private_ray import descendants  # noqa: E402

pytestmark = pytest.mark.timeout(20)

AUTH_MODE = "RAY_AUTH_MODE"
OWN_ADDRESS = "10.0.0.1:6379"


class FakeRay:
    """As much of the module as a connection uses."""

    exceptions = ray.exceptions

    def __init__(self, session: Path) -> None:
        self._session = session
        self.address: str | None = None

    def is_initialized(self) -> bool:
        return self.address is not None

    def init(self, address: str, **_: Any) -> Any:
        self.address = OWN_ADDRESS if address == "local" else address
        return SimpleNamespace(address_info={"session_dir": str(self._session)})

    def shutdown(self) -> None:
        self.address = None

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address=self.address, get_node_id=lambda: "a")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    """No Ray runs, and no token is known."""
    fake = FakeRay(tmp_path)
    monkeypatch.setattr(connection, "ray", fake)
    monkeypatch.setattr(private_ray, "ray", fake)
    monkeypatch.setattr(connection, "find_ray", lambda: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(AUTH_MODE, "")  # so that it is taken back afterwards
    for name in (AUTH_MODE, "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    yield fake
    assert connection._num_users == 0
    assert not connection._keeper.is_hired


def connected(address: str | None = None) -> Connection:
    return connect(ClusterConfig(ray_address=address), num_ranks=1)


def test_another_address_than_that_of_our_connection(fake: FakeRay) -> None:
    with connected("local") as own:
        assert own.node_id == "a"
        with pytest.raises(ConfigError, match=r"connected to the Ray at 10\.0\.0\.1:6379 already"):
            connected("10.9.8.7:6379")
        with connected("local"), connected(OWN_ADDRESS), connected():
            pass
        assert fake.is_initialized()
    assert not fake.is_initialized()


def test_a_ray_of_the_users_is_no_private_one(fake: FakeRay) -> None:
    fake.init("10.0.0.2:6379")
    with pytest.raises(ConfigError, match=r"ray_address: 'local' .* at 10\.0\.0\.2:6379, which is not one of its own"):
        connected("local")
    connected().close()
    assert fake.is_initialized()


@pytest.mark.parametrize("is_connected", [False, True])
@pytest.mark.parametrize("address", ["nonsense", "ray://10.0.0.1:10001", "10.0.0.1"])
def test_an_address_of_the_wrong_form(fake: FakeRay, address: str, is_connected: bool) -> None:
    if is_connected:
        fake.init(OWN_ADDRESS)
    with pytest.raises(ConfigError, match=r"ray_address: .* HOST:PORT"):
        connected(address)


def test_an_address_in_the_environment(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(ConfigError, match=r"ray_address: .* HOST:PORT"):
        connected()
    monkeypatch.setenv("RAY_ADDRESS", "")  # which Ray takes for none
    with connected():
        assert fake.address == OWN_ADDRESS


def test_a_failed_connection_leaves_the_environment_as_it_was(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "9" * 40)
    with head("0" * 40) as address, pytest.raises(ConfigError, match="our token is not the one"):
        connected(address)
    assert AUTH_MODE not in os.environ


def test_a_ray_that_nobody_keeps_is_ended(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(StartError, match=r"Ray did not start: .*temporarily unavailable"):
        connected("local")
    assert not fake.is_initialized()


def test_what_rays_shutdown_leaves_is_ended(tmp_path: Path) -> None:
    keeper = private_ray.Keeper()
    with subprocess.Popen(["sleep", "60"]) as agent:
        keeper.hire(tmp_path / "sockets", [agent.pid])
        keeper.dismiss()
        assert agent.wait(5.0) == -9
    assert not keeper.is_hired


def test_descendants_that_end_meanwhile(tmp_path: Path) -> None:
    """Of process 1: 3 has ended, as has the first thread of 2, whose folder is there for a moment more."""
    for thread, children in {"1/task/1": "2 3 ", "2/task/2": None, "2/task/4": "5 ", "5/task/5": ""}.items():
        (tmp_path / thread).mkdir(parents=True)
        if children is not None:
            (tmp_path / thread / "children").write_text(children)
    assert sorted(descendants(1, tmp_path)) == [2, 3, 5]
