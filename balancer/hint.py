"""What a client's headers tell the route service, which HAProxy otherwise asks with the body alone.

HAProxy's router script forwards one header of its client besides the body: the session's. Its place is taken by one
that HAProxy itself composes (whatever a client sends under that name is overwritten), in the form of a query string.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from urllib.parse import parse_qsl

from balancer import hung_up

HEADER = "x-splitwiser-hint"
SESSION = "x-session-id"
# What is taken over, by the short name it travels under.
CLIENT_HEADERS = {
    "session": SESSION,
    "priority": "x-splitwiser-priority",
    "explain": "x-splitwiser-decision",
    "timeout": "x-request-timeout-s",
    "authorization": "authorization",
}
# Priorities beyond these say no more; each distinct one is a line of its own in the queue.
MOST_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class Hint:
    """`client` is the other end of HAProxy's connection, as `balancer.hung_up` names it.

    `priority` within +-MOST_PRIORITY, 0 being ordinary; `timeout_s` None when the client named none."""

    session: str = ""
    priority: int = 0
    explain: bool = False
    timeout_s: float | None = None
    authorization: str = ""
    client: str = ""

    @staticmethod
    def decode(text: str) -> Hint:
        """Never raises: what a client wrote that makes no sense counts as not written."""
        values = dict(parse_qsl(text, max_num_fields=len(CLIENT_HEADERS) + 3))
        return Hint(
            values.get("session", ""),
            _priority(values.get("priority", "")),
            values.get("explain", "") not in ("", "0", "false"),
            _seconds(values.get("timeout", "")),
            values.get("authorization", ""),
            _client(values.get("from", ""), values.get("port", "")),
        )


NO_HINT = Hint()


def haproxy_rule() -> str:
    """The line of HAProxy's configuration that composes the header."""
    parts = [f"{short}=%[req.hdr({header}),url_enc]" for short, header in CLIENT_HEADERS.items()]
    return f"http-request set-header {HEADER} {'&'.join([*parts, 'from=%[src,url_enc]', 'port=%[src_port]'])}"


def _client(address: str, port: str) -> str:
    try:
        return hung_up.name(address, int(port))
    except ValueError:
        return ""


def _priority(text: str) -> int:
    try:
        return max(-MOST_PRIORITY, min(MOST_PRIORITY, int(text)))
    except ValueError:
        return 0


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0.0 else None
