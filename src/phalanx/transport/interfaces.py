"""The network interfaces of this host and their addresses."""

from __future__ import annotations

import ctypes
import ipaddress
import socket
from collections.abc import Iterator
from typing import NamedTuple

_ADDRESS_AT = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}
"""Offset and size of the address within struct sockaddr_in and sockaddr_in6."""


class InterfaceAddress(NamedTuple):
    interface: str
    address: str
    """IPv4 or IPv6, numeric, without a zone."""


class _Entry(ctypes.Structure):
    """struct ifaddrs of ifaddrs.h."""


_Entry._fields_ = [
    ("next", ctypes.POINTER(_Entry)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
    ("other_end", ctypes.c_void_p),
    ("data", ctypes.c_void_p),
]


def interface_addresses() -> list[InterfaceAddress]:
    """Every address of every interface, in the kernel's order; IPv4 first."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_Entry)()
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        raise OSError(ctypes.get_errno(), "getifaddrs failed")
    try:
        found = [InterfaceAddress(entry.name.decode(), str(address)) for entry, address in _with_address(first)]
    finally:
        libc.freeifaddrs(first)
    return sorted(found, key=lambda entry: ":" in entry.address)


def _with_address(
    pointer: ctypes._Pointer[_Entry],
) -> Iterator[tuple[_Entry, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    while pointer:
        entry = pointer.contents
        if entry.address:
            family = ctypes.c_ushort.from_address(entry.address).value
            if family in _ADDRESS_AT:
                offset, size = _ADDRESS_AT[socket.AddressFamily(family)]
                yield entry, ipaddress.ip_address(ctypes.string_at(entry.address + offset, size))
        pointer = entry.next
