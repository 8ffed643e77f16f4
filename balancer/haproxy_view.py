"""Which replicas HAProxy can reach right now: naming one that it does not know yet would cost the request."""

from __future__ import annotations

import asyncio
import csv
import re
from pathlib import Path

_REPLY_LIMIT_S = 1.0


def server_name(replica_id: str) -> str:
    """The name Ray Serve gives a replica's server in HAProxy's configuration (ray 2.60, `HAProxyManager.get_safe_name`)."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", replica_id.replace("#", "-").replace("/", "."))


def servers_up(stat_csv: str) -> frozenset[str]:
    """The servers that HAProxy's `show stat` reports as up or unchecked."""
    rows = csv.DictReader(stat_csv.lstrip("# ").splitlines())
    return frozenset(
        row["svname"] for row in rows if row["svname"] not in ("FRONTEND", "BACKEND") and row["status"][:2] in ("UP", "no")
    )


async def ask(socket_path: Path) -> frozenset[str]:
    """Ask the running HAProxy over its administration socket. Raises OSError or TimeoutError when it does not answer."""
    async with asyncio.timeout(_REPLY_LIMIT_S):
        reader, writer = await asyncio.open_unix_connection(socket_path)
        try:
            writer.write(b"show stat\n")
            return servers_up((await reader.read()).decode())
        finally:
            writer.close()
