"""The listening socket: free ports, taken ports, IPv6, and errors that name the setting."""

import errno
import resource
import socket

import pytest

from phalanx.errors import ConfigError
from phalanx.server.listen import is_loopback, listen, url_of


def test_port_0_takes_a_free_one() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert port > 0
        assert url_of(listener) == f"http://127.0.0.1:{port}"
        assert is_loopback(listener)


def test_a_taken_port_is_named_with_what_to_do() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            listen("127.0.0.1", port)
    assert caught.value.field == "port"
    assert caught.value.value == port
    assert f"127.0.0.1:{port}" in caught.value.allowed
    listen("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6(host: str) -> None:
    try:
        listener = listen(host, 0)
    except ConfigError:
        pytest.skip("no IPv6 here")
    with listener:
        assert url_of(listener) == f"http://[::1]:{listener.getsockname()[1]}"
        assert is_loopback(listener)


def test_every_interface_is_not_loopback_and_its_url_can_be_used_here() -> None:
    with listen("0.0.0.0", 0) as listener:
        assert not is_loopback(listener)
        assert url_of(listener).startswith("http://127.0.0.1:")


def test_localhost_is_ipv4_first() -> None:
    with listen("localhost", 0) as listener:
        assert listener.family == socket.AF_INET


@pytest.mark.parametrize("host", ["no such host", "192.0.2.1"])
def test_a_wrong_host_is_named(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        listen(host, 0)
    assert (caught.value.field, caught.value.value) == ("host", host)


def test_that_descriptors_have_run_out_is_said_once_a_time() -> None:
    """And then that nobody waits: asyncio asks again in the same turn, and would note each."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        listener.setblocking(False)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        try:
            for _ in range(2):
                with pytest.raises(OSError, match="Too many open files") as caught:
                    listener.accept()
                assert caught.value.errno == errno.EMFILE
                with pytest.raises(BlockingIOError):
                    listener.accept()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        connection, _ = listener.accept()
        connection.close()
        with pytest.raises(BlockingIOError):
            listener.accept()
