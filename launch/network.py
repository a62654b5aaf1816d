"""Network interfaces by address. Linux only; elsewhere nothing is found."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of linux/sockios.h
_NAME_BYTES, _ADDRESS = 16, slice(20, 24)  # of struct ifreq


def interface_of(address: str) -> str | None:
    """Name of the interface with this IPv4 address, such as eth0; None where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode()[: _NAME_BYTES - 1])
                answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)
                if socket.inet_ntoa(answer[_ADDRESS]) == address:
                    return name
    return None


def accepts_connections(address: str, port: int, seconds: float) -> bool:
    """Whether somebody listens there and can be reached. The kernel answers, so a busy process does too."""
    try:
        with socket.create_connection((address, port), timeout=seconds):
            return True
    except OSError:
        return False
