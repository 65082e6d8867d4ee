"""Addresses of nodes, and the connections between them."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import time
from contextlib import ExitStack

from phalanx.errors import ConfigError, DeadlineError, StartError

_BACKLOG = 128
_TCP_RTO_MAX_MS = 44  # linux/tcp.h; Python has no name for it
_RTO_MAX_MS = 1000
_LACKS_HERE = (
    *(errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL),
    *(socket.EAI_SYSTEM, socket.EAI_MEMORY),
)
"""That no connection was tried, and nothing is known of the other end."""


def listen_on(address: str) -> socket.socket:
    """A socket that listens on this address of this host alone. The system picks the port.

    `address`: IPv4 or IPv6, literal or host name. Raises ConfigError if it is no address of this host, or means all.
    """
    allowed = "an address, or the name of one, of this host"
    if not address:
        raise ConfigError("node_address", address, allowed)
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError("node_address", address, f"{allowed} ({error})") from error
    failure: OSError | None = None
    for family, kind, protocol, _, where in found:
        if ipaddress.ip_address(str(where[0])).is_unspecified:
            raise ConfigError("node_address", address, "one address of this host, not all of them")
        with ExitStack() as undo:
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            try:
                listener.bind(where)
                listener.listen(_BACKLOG)
            except OSError as error:
                failure = error
                continue
            undo.pop_all()
            return listener
    raise ConfigError("node_address", address, f"{allowed} ({failure})")


def inherited_listener(descriptor: int) -> socket.socket:
    """The socket of `listen_on` in a process that it was passed on to. Takes over the descriptor."""
    return socket.socket(fileno=descriptor)


def address_of(listener: socket.socket) -> tuple[str, int]:
    """Numeric address (with its zone, if it has one) and port of a socket that is bound."""
    host, port = socket.getnameinfo(listener.getsockname(), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
    return host, int(port)


def numeric_address(address: str) -> str:
    """The address of this host that `listen_on` would take. Raises ConfigError like that."""
    with listen_on(address) as listener:
        return address_of(listener)[0]


def connect_to(address: str, port: int, *, deadline_s: float, source_address: str | None = None) -> socket.socket:
    """A connection to the first address that answers, from `source_address` of this host if it is given.

    Raises StartError saying what each address had to say, DeadlineError.
    """
    started = time.monotonic()
    source = (source_address, 0) if source_address else None
    try:
        return socket.create_connection((address, port), timeout=deadline_s, source_address=source, all_errors=True)
    except TimeoutError as error:
        raise DeadlineError("a connection", f"{address} port {port}", time.monotonic() - started) from error
    except (OSError, ExceptionGroup) as error:
        causes = error.exceptions if isinstance(error, ExceptionGroup) else [error]
        if any(isinstance(cause, TimeoutError) for cause in causes):
            raise DeadlineError("a connection", f"{address} port {port}", time.monotonic() - started) from error
        raise StartError(f"the link to {address} port {port}", "connecting", "; ".join(map(str, causes))) from error


def is_nobody_at(address: str, port: int, *, within_s: float) -> bool:
    """Whether nobody takes connections there, or the host cannot be reached.

    Not so if it cannot be asked, as this process has no descriptors left, or this host no ports.
    """
    try:
        socket.create_connection((address, port), timeout=within_s).close()
    except OSError as error:
        return error.errno not in _LACKS_HERE
    return False


def is_unreachable(error: OSError) -> bool:
    """Whether a connection ended because nobody answers any more, rather than because the other end ended it."""
    return error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)


def close_at_once(connection: socket.socket) -> None:
    """Close it and drop what is not sent, which the kernel would else go on trying to send for minutes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def tune(connection: socket.socket) -> None:
    """For small frames at once, and for stalls: the kernel tries again at least every second.

    Otherwise it doubles its pauses, and after a stall it would be silent for as long again. Kernels before Linux 6.15
    do not know that: there the stalls that are survived are those of up to half the node's time-out.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, _RTO_MAX_MS)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
