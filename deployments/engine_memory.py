"""How much device memory this replica's engine holds, kept in its slot: NVML names MPS clients one by one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from deployments.slot import Slot
from monitoring.sampler import Reader, ReadingError, open_reader

# An engine's memory hardly moves once it is ready, and a list of processes costs NVML 35 to 60 us.
WEIGH_EVERY_S = 2.0
_UNKNOWN = "the memory of this replica's engine is unknown: %s"

logger = logging.getLogger(__name__)


def held_bytes(reader: Reader, pids: Sequence[int]) -> int:
    """What the processes hold together; 0 where that is unknown, because NVML does not answer or names none of them."""
    try:
        held = reader.memory_by_pid()
    except ReadingError as error:
        logger.warning(_UNKNOWN, error)
        return 0
    return sum(held.get(pid, 0) for pid in pids)


async def weigh(slot: Slot, pids: Sequence[int], reader: Reader | None = None) -> None:
    """Write into the slot, until cancelled, what the processes hold (of the host's memory, without a GPU).

    In a thread, because a GPU that was lost may block. The slot's heartbeat publishes it. A device that cannot be read
    at all is logged and left at that.
    """
    try:
        reader = reader or open_reader(0, logger, pids=lambda: pids)
    except (ReadingError, ValueError) as error:  # no reason not to serve
        logger.warning(_UNKNOWN, error)
        return
    try:
        while True:
            slot.fields.gpu_memory_bytes = await asyncio.to_thread(held_bytes, reader, pids)
            await asyncio.sleep(WEIGH_EVERY_S)
    finally:
        reader.close()
