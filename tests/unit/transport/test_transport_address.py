from __future__ import annotations

import errno
import socket
import subprocess
from contextlib import ExitStack

import pytest

from phalanx.errors import ConfigError, DeadlineError, StartError
from phalanx.transport import address
from phalanx.transport.address import address_of, connect_to, listen_on, tune


@pytest.mark.parametrize(("name", "numeric"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("127.0.0.2", "127.0.0.2")])
def test_it_binds_the_chosen_address_alone(name: str, numeric: str) -> None:
    with listen_on(name) as listener:
        assert address_of(listener)[0] == numeric
        port = address_of(listener)[1]
        sockets = subprocess.run(["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout
        assert len(sockets.splitlines()) == 1
        assert f"[{numeric}]:{port}" in sockets or f" {numeric}:{port}" in sockets
        with connect_to(numeric, port, deadline_s=5), listener.accept()[0]:
            pass


def test_a_host_name_will_do() -> None:
    with listen_on("localhost") as listener:
        where, port = address_of(listener)
        assert where in ("127.0.0.1", "::1")
        with connect_to("localhost", port, deadline_s=5, source_address=where) as connection:
            assert connection.getsockname()[0] == where


@pytest.mark.parametrize("name", ["192.0.2.1", "2001:db8::1", "no.such.host.invalid", "", "127.0.0.1:80", "a b"])
def test_what_is_no_address_of_this_host_is_a_setting_to_correct(name: str) -> None:
    with pytest.raises(ConfigError, match="node_address"):
        listen_on(name)


@pytest.mark.parametrize("name", ["0.0.0.0", "::", "0"])
def test_all_addresses_are_too_many(name: str) -> None:
    with pytest.raises(ConfigError, match="not all of them"):
        listen_on(name)


def test_nobody_there_is_an_error_that_says_where() -> None:
    with listen_on("127.0.0.1") as listener:
        port = address_of(listener)[1]
    with pytest.raises(StartError, match=rf"127\.0\.0\.1 port {port}.*refused"):
        connect_to("127.0.0.1", port, deadline_s=5)


def test_no_answer_is_a_deadline() -> None:
    with listen_on("127.0.0.1") as listener:
        listener.listen(0)
        port = address_of(listener)[1]
        with ExitStack() as waiting, pytest.raises(DeadlineError, match=rf"a connection from 127\.0\.0\.1 port {port}"):
            for _ in range(4):  # the kernel keeps one or two that nobody has accepted, and then answers no more
                waiting.enter_context(connect_to("127.0.0.1", port, deadline_s=0.2))


def test_a_kernel_without_the_limit_of_pauses_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "_TCP_RTO_MAX_MS", 9999)
    with listen_on("127.0.0.1") as listener, connect_to(*address_of(listener), deadline_s=5) as connection:
        with pytest.raises(OSError, match="not available") as raised:
            connection.setsockopt(socket.IPPROTO_TCP, 9999, 1)
        assert raised.value.errno == errno.ENOPROTOOPT
        tune(connection)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
