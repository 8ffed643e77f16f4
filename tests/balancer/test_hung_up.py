"""Clients that have gone, as the kernel tells of them."""

from __future__ import annotations

import socket

import pytest

from balancer import hung_up


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_client_that_closes_is_seen_and_one_that_waits_is_not(family: socket.AddressFamily, host: str) -> None:
    """From the moment that it closes until the server's side is closed too."""
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        leaving, staying = (socket.create_connection(listener.getsockname()[:2]) for _ in range(2))
        names = [hung_up.name(*client.getsockname()[:2]) for client in (leaving, staying)]
        accepted = [listener.accept()[0] for _ in range(2)]
        assert not hung_up.clients() & set(names)
        leaving.close()
        assert hung_up.clients() & set(names) == {names[0]}
        for server_side in accepted:
            server_side.close()
        assert names[0] not in hung_up.clients()
        staying.close()


def test_an_address_has_one_name() -> None:
    """An IPv4 client of a listener for both families is named as the same client."""
    assert hung_up.name("::ffff:127.0.0.1", 80) == hung_up.name("127.0.0.1", 80) == "127.0.0.1:80"
    assert hung_up.name("::1", 5) == hung_up.name("0:0:0:0:0:0:0:1", 5)
