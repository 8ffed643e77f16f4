"""CPU cores for replicas: each its own, where there are enough."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

# HTTP side, engine loop, and their helper threads. The first two are busy all the time: the two threads of one physical
# core would halve each other.
LEAST_PER_REPLICA = 3
_LEAST_PHYSICAL = 2
# HAProxy, router, controller and device manager; they may run anywhere, but find these free of engines.
_FOR_THE_REST = 2


def siblings(core: int, sysfs: Path = Path("/sys/devices/system/cpu")) -> str:
    """What all threads of one physical core have in common; a core whose topology is not told is one by itself."""
    try:
        return (sysfs / f"cpu{core}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(core)


def shares(cores: Sequence[int], replicas: int, of: Callable[[int], str] = siblings) -> list[tuple[int, ...]]:
    """Disjoint shares of `cores`, as many physical ones in each, two threads kept free; [] where a share would
    have fewer than three threads or two physical cores."""
    physical: dict[str, list[int]] = {}
    for core in sorted(cores):
        physical.setdefault(of(core), []).append(core)
    groups = list(physical.values())
    kept_free = 0
    while groups and kept_free < _FOR_THE_REST:
        kept_free += len(groups.pop(0))
    each = len(groups) // replicas
    parts = [tuple(sorted(itertools.chain(*groups[i * each : (i + 1) * each]))) for i in range(replicas)]
    enough = each >= _LEAST_PHYSICAL and all(len(part) >= LEAST_PER_REPLICA for part in parts)
    return parts if enough else []


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
