"""Which replicas HAProxy can reach right now: naming one that it does not know yet would cost the request."""

from __future__ import annotations

import asyncio
import csv
import re
from pathlib import Path

_REPLY_LIMIT_S = 1.0


def server_name(replica_id: str) -> str:
    """The name of a replica's server in Ray Serve's configuration of HAProxy (2.60, `HAProxyManager.get_safe_name`)."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", replica_id.replace("#", "-").replace("/", "."))


def servers_up(stat_csv: str) -> dict[str, str]:
    """The servers that HAProxy's `show stat` reports as up or unchecked, with their addresses (host:port).

    Raises ConnectionError when this is no such report: a HAProxy that is being replaced answers nothing.
    """
    if not stat_csv.startswith("# pxname,"):
        raise ConnectionError("no statistics came back")
    rows = csv.DictReader(stat_csv.lstrip("# ").splitlines())
    servers = (row for row in rows if row["svname"] not in ("FRONTEND", "BACKEND"))
    return {row["svname"]: row.get("addr") or "" for row in servers if (row["status"] or "")[:2] in ("UP", "no")}


async def ask(socket_path: Path) -> dict[str, str]:
    """Ask the running HAProxy over its administration socket. Raises OSError (TimeoutError) when it does not answer."""
    async with asyncio.timeout(_REPLY_LIMIT_S):
        reader, writer = await asyncio.open_unix_connection(socket_path)
        try:
            writer.write(b"show stat\n")
            return servers_up((await reader.read()).decode())
        finally:
            writer.close()
