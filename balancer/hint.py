"""What a client's headers tell the route service, which HAProxy otherwise asks with the body alone.

HAProxy's router script forwards one header of its client besides the body: the session's. Its place is taken by one
that HAProxy itself composes (whatever a client sends under that name is overwritten), in the form of a query string.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

HEADER = "x-splitwiser-hint"
SESSION = "x-session-id"
# What is taken over, by the short name it travels under.
CLIENT_HEADERS = {
    "session": SESSION,
    "priority": "x-splitwiser-priority",
    "explain": "x-splitwiser-decision",
    "timeout": "x-request-timeout-s",
    "authorization": "authorization",
    "api_key": "x-api-key",
}
# Priorities beyond these say no more; each distinct one is a line of its own in the queue.
MOST_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class Hint:
    """`priority` within +-MOST_PRIORITY, 0 being ordinary; `timeout_s` None when the client named none.

    `concurrent`: this client's requests at HAProxy now, this one included; 0 when it showed no key. `from_client`:
    HAProxy composed this, so that a client stands behind it and not a part of the system. `path` is where the request
    goes, "" when HAProxy does not tell; `part` marks a part of a batch, which only replicas ask for, at the router's
    own port.
    """

    session: str = ""
    priority: int = 0
    explain: bool = False
    timeout_s: float | None = None
    authorization: str = ""
    api_key: str = ""
    concurrent: int = 0
    from_client: bool = field(default=False, compare=False)
    path: str = ""
    part: bool = False

    @staticmethod
    def decode(text: str) -> Hint:
        """Never raises: what a client wrote that makes no sense counts as not written."""
        values = dict(parse_qsl(text, max_num_fields=len(CLIENT_HEADERS) + 2))
        return Hint(
            values.get("session", ""),
            _priority(values.get("priority", "")),
            values.get("explain", "") not in ("", "0", "false"),
            _seconds(values.get("timeout", "")),
            values.get("authorization", ""),
            values.get("api_key", ""),
            _count(values.get("concurrent", "")),
            from_client=values.get("part", "") != "1",
            path=values.get("path", ""),
            part=values.get("part", "") == "1",
        )


NO_HINT = Hint()


def haproxy_rule() -> str:
    """The line of HAProxy's configuration that composes the header, where requests are tracked by their key."""
    parts = ["path=%[path,url_enc]"]
    parts += [f"{short}=%[req.hdr({header}),url_enc]" for short, header in CLIENT_HEADERS.items()]
    return f"http-request set-header {HEADER} {'&'.join([*parts, 'concurrent=%[sc_trackers(0)]'])}"


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


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
