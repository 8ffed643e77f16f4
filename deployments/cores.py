"""CPU cores for replicas: each its own, where there are enough."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

# HTTP side, engine loop, and their helper threads.
LEAST_PER_REPLICA = 3
# HAProxy, router, controller and device manager; they may run anywhere, but find these free of engines.
_FOR_THE_REST = 2


def shares(cores: Sequence[int], replicas: int) -> list[tuple[int, ...]]:
    """Equal, disjoint shares of `cores`, the first two kept free; [] where a share would have fewer than three."""
    each = (len(cores) - _FOR_THE_REST) // replicas
    if each < LEAST_PER_REPLICA:
        return []
    ordered = sorted(cores)[_FOR_THE_REST:]
    return [tuple(ordered[i * each : (i + 1) * each]) for i in range(replicas)]


def pin(pids: Iterable[int], cores: Sequence[int], proc: Path = Path("/proc")) -> None:
    """Keep every thread that these processes have, and those they will start, on `cores`."""
    for pid in pids:
        for thread in (proc / str(pid) / "task").glob("*"):
            with contextlib.suppress(ProcessLookupError):  # threads end
                os.sched_setaffinity(int(thread.name), cores)


def words(cores: Sequence[int]) -> str:
    """`2-4` or `2,5,9`."""
    whole = len(cores) > 1 and list(cores) == list(range(cores[0], cores[-1] + 1))
    return f"{cores[0]}-{cores[-1]}" if whole else ",".join(map(str, cores))
