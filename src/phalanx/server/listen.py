"""The socket that the server listens on, taken before the model loads: whether it is free must not cost minutes."""

from __future__ import annotations

import errno
import socket

from phalanx.errors import ConfigError

_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class _Listener(socket.socket):
    """Says once that descriptors or memory have run out, and then that nobody waits.

    asyncio accepts a hundred clients at a turn, goes on with the next after such an error, and for each schedules to
    try again and writes to the log (python/cpython#151615): that many timers more every second.
    """

    _is_told = False

    def accept(self) -> tuple[socket.socket, object]:
        """Raises OSError, and after one of those BlockingIOError."""
        if self._is_told:
            self._is_told = False
            raise BlockingIOError(errno.EAGAIN, "what has been run out of is not asked for again at once")
        try:
            return super().accept()
        except OSError as error:
            self._is_told = error.errno in _OUT_OF_RESOURCES
            raise


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. An IPv6 host may stand in brackets; `::` takes IPv4 too.

    Raises ConfigError naming the host or the port.
    """
    family, address = _resolve(host.removeprefix("[").removesuffix("]"), port)
    listener = _Listener(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)  # only now nobody else can take the port
    except OSError as error:
        listener.close()
        raise _explained(error, host, port) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a client of this machine finds the server."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    host: str = listener.getsockname()[0]
    return host == "::1" or host.startswith("127.")


def _resolve(host: str, port: int) -> tuple[int, tuple[object, ...]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError("host", host, f"it is no address, and no name that resolves ({error})") from error
    # `localhost` may be both: clients try 127.0.0.1 if ::1 refuses, and not all of them the other way round.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, address


def _explained(error: OSError, host: str, port: int) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            "port", port, f"another process listens on {host}:{port}; stop it, or choose another (0 takes a free one)"
        )
    if error.errno == errno.EACCES:
        return ConfigError("port", port, "this user may not listen there; choose one from 1024 to 65535")
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError("host", host, "no interface of this machine has it; 127.0.0.1 and 0.0.0.0 always work")
    return ConfigError("host", host, f"listening on {host}:{port} fails: {error.strerror}")
