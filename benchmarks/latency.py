"""What the way through HAProxy and the router adds to a request, against the same replica's own port, alternating."""

from __future__ import annotations

import http.client
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from balancer.ticket import DIRECT, HEADER

WISH = {"prompt": [11, 12, 13], "max_tokens": 1, "temperature": 1.0}


def direct_urls(folder: Path) -> list[str]:
    """Each replica's own address, from the configuration of the run's HAProxy."""
    text = "".join(path.read_text() for path in folder.glob("*/haproxy.cfg"))
    return sorted(set(re.findall(r"server SERVE_REPLICA_\S*Replica\S* (127\.0\.0\.1:\d+) check", text)))


def added(url: str, direct: list[str], model: str, going_on: Callable[[], bool], most: int = 1000) -> dict[str, Any]:
    """Seconds of one-token requests through the public address, each followed by one straight to the replica that
    answered it: others may be idle, and answer sooner.

    Single differences hold an engine's step each, several milliseconds under load; so the two distributions are
    compared, by quantile.
    """
    body = json.dumps({"model": model, **WISH}).encode()
    addresses = {_ask(address, body, {HEADER: DIRECT.policy})[1]: address for address in direct}
    through: list[float] = []
    straight: list[float] = []
    while going_on() and len(through) < most:
        seconds, replica = _ask(urlsplit(url).netloc, body, {})
        through.append(seconds)
        straight.append(_ask(addresses[replica], body, {HEADER: DIRECT.policy})[0])
    row: dict[str, Any] = {"requests_each": len(through)}
    for name, values in (("through_s", through), ("straight_s", straight)):
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        row[name] = {"p50": round(cuts[49], 6), "p99": round(cuts[98], 6)}
    for quantile in ("p50", "p99"):
        row[f"added_{quantile}_s"] = round(row["through_s"][quantile] - row["straight_s"][quantile], 6)
    return row


def _ask(address: str, body: bytes, headers: dict[str, str]) -> tuple[float, str]:
    """Seconds of one request, and who answered. Its connection is opened before the clock starts.

    Raises RuntimeError unless the answer is 200.
    """
    host, port = address.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.connect()
    try:
        began_s = time.perf_counter()
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json", **headers})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{address} answered {answer.status}")
        return time.perf_counter() - began_s, answer.headers.get("x-splitwiser-replica", "")
    finally:
        connection.close()
