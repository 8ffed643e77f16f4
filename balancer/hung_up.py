"""Which clients have hung up while HAProxy asks the router about their request.

HAProxy (2.8) does not look at its client as long as its router script waits, so that it would hold the place of a
client that has long gone. The kernel knows: the socket that HAProxy has to such a client is in CLOSE_WAIT, and
sock_diag(7) lists those. A client that only closes its own side and goes on reading counts as gone, as it does for
HAProxy's `abortonclose`.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _DONE, _ERROR = 20, 3, 2
_REQUEST_AND_DUMP = 0x301
_CLOSE_WAIT = 1 << 8
_HEADER = struct.Struct("=IHHII")
_WISH = struct.Struct("=BBBBI48x")  # family, protocol, extensions, padding, states, any socket
_FOUND = struct.Struct("!4xHH16s16s")  # ports and addresses, ours first, after family, state, timer, retransmits
_SIZES = {socket.AF_INET: 4, socket.AF_INET6: 16}


def name(address: str, port: int) -> str:
    """A client as HAProxy's hint and this module both name it."""
    found = ipaddress.ip_address(address)
    return f"{getattr(found, 'ipv4_mapped', None) or found}:{port}"


def clients() -> frozenset[str]:
    """Every client whose side of a connection to this machine is closed. Raises OSError where the kernel refuses."""
    return frozenset(client for family in _SIZES for client in _half_closed(family))


def _half_closed(family: socket.AddressFamily) -> Iterator[str]:
    wish = _WISH.pack(family, socket.IPPROTO_TCP, 0, 0, _CLOSE_WAIT)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(1.0)
        kernel.send(_HEADER.pack(_HEADER.size + len(wish), _SOCK_DIAG_BY_FAMILY, _REQUEST_AND_DUMP, 1, 0) + wish)
        while True:
            for kind, message in _messages(kernel.recv(1 << 16)):
                if kind in (_DONE, _ERROR):
                    return
                _, port, _, address = _FOUND.unpack_from(message)
                yield name(socket.inet_ntop(family, address[: _SIZES[family]]), port)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        yield kind, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3
