"""The addresses of this host."""

from __future__ import annotations

import ipaddress
import socket

from phalanx.transport.interfaces import InterfaceAddress, interface_addresses


def test_loopback_is_there_and_ipv4_comes_first() -> None:
    found = interface_addresses()
    assert InterfaceAddress("lo", "127.0.0.1") in found
    versions = [ipaddress.ip_address(entry.address).version for entry in found]
    assert versions == sorted(versions)
    assert {entry.interface for entry in found} <= {name for _, name in socket.if_nameindex()}
