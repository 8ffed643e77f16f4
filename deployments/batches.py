"""All that a replica does about batches: splits those it manages, answers for files and batches, runs the latter."""

from __future__ import annotations

import asyncio
import os
import re
import time
from pathlib import Path
from typing import Any

from balancer.batches import Room, headroom
from balancer.key_file import internal_key
from deployments.batch_api import routes
from deployments.batch_door import BatchDoor
from deployments.batch_runner import BatchRunner, PublicAddress
from deployments.batch_store import BatchStore
from deployments.batch_way import open_client
from deployments.config import HttpBounds, ServeArgs
from deployments.processes import URL_VARIABLE
from deployments.slot import Slot

_GIB = 1 << 30


class Batches:
    """Attached to vLLM's application; `door` is what the router's managed requests go to. Needs a running loop."""

    def __init__(self, app: Any, args: ServeArgs, slot: Slot) -> None:
        self._args = args
        self._slot = slot
        self._client = open_client()
        self._runner: asyncio.Task[None] | None = None
        self.door = BatchDoor(app, self._room, self._client, args.batches.threshold)
        if args.batches.enabled:
            store = BatchStore(store_folder(args), time.time, int(args.batches.folder_gib * _GIB))
            app.router.routes.extend(routes(store))
            sender = PublicAddress(public_url(), server_key(args), self._client)
            runner = BatchRunner(store, sender.send, args.batches.concurrency, time.time)
            self._runner = asyncio.create_task(runner.run())

    async def close(self) -> None:
        """Stop running batches, leaving them for whoever is next."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        await self._client.close()

    def _room(self) -> Room:
        knobs = self._args.balancer.knobs()
        return headroom(self._slot.neighbours(), knobs.stale_after_s, knobs.kv_reserve_ratio)


def store_folder(args: ServeArgs) -> Path:
    """The configured folder, else one of the user's own for each served model: it outlives a run."""
    if args.batches.folder:
        return Path(args.batches.folder).expanduser()
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state / "splitwiser" / (re.sub(r"[^\w.-]+", "_", args.public_name) + ".batches")


def public_url() -> str:
    """Where this system is asked. `splitwiser serve` tells; a bare `serve run` is at Serve's default address."""
    defaults = HttpBounds()
    return os.environ.get(URL_VARIABLE, f"http://{defaults.host}:{defaults.port}")


def server_key(args: ServeArgs) -> str | None:
    """The key with which this system asks itself: the one that vLLM's application was given, or the run's own."""
    keys = args.engine.get("api_key") or os.environ.get("VLLM_API_KEY") or internal_key()
    return str(keys[0]) if isinstance(keys, list) and keys else str(keys) if keys else None
