"""Engines that size their memory by what is free start one at a time on a node: two at once mis-size each other."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path

_ASK_AGAIN_S = 0.2


def together(start: str, safe: bool) -> bool:
    """Whether engines need no turns: `start` as in the configuration; with `auto`, where it is `safe`."""
    return start == "together" or (start == "auto" and safe)


@contextlib.asynccontextmanager
async def turn(path: Path) -> AsyncIterator[None]:
    """Hold the node's start turn. The kernel gives it back when the holder dies, so a crash never blocks the others."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _try_lock(descriptor):
            await asyncio.sleep(_ASK_AGAIN_S)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # said aloud: an engine forked meanwhile shares the descriptor
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
