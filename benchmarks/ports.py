"""Ports for what a benchmark or a test starts."""

from __future__ import annotations

import itertools
import random
import socket

# Below what the system takes for outgoing connections (32768 and up: one of these may take a port between the look and
# its use) and what Serve gives to replicas (30000 and up), above Ray's workers (10002 to 19999). In turn, from a place
# of this process's own: the same port is not given twice before it is used.
_CANDIDATES = itertools.cycle(random.sample(range(20_000, 30_000), 10_000))


def free_port() -> int:
    """One that nobody on this machine listens at now."""
    while True:
        port = next(_CANDIDATES)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
