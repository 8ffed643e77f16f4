"""`/metrics` of a board, read over HTTP again and again by a process of its own, while others break things."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from benchmarks.simulation import quantile
from monitoring.exporter import Exporter

EVERY_S = 0.05
LIMIT_S = 0.1
_END_WITHIN_S = 30.0


class Scrapes:
    """What the readings showed; filled when the context of `scraped` ends."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.series: list[int] = []

    def figures(self) -> dict[str, Any]:
        """How many readings, their times, and how many series the smallest and the largest had."""
        ordered = sorted(self.seconds)
        at = {"p50": quantile(ordered, 0.5), "p99": quantile(ordered, 0.99), "max": ordered[-1]}
        return {
            "scrapes": len(ordered),
            **{f"scrape_{name}_ms": round(1e3 * s, 1) for name, s in at.items()},
            "scrapes_over_100_ms": sum(s > LIMIT_S for s in ordered),
            "scraped_series": [min(self.series), max(self.series)],
        }


@asynccontextmanager
async def scraped(board: Path, slots: int) -> AsyncIterator[Scrapes]:
    """Read until the context ends. Raises AssertionError when a reading failed."""
    found = Scrapes()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.scrapes", str(board), str(slots),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"up\n"
        yield found
    finally:
        process.stdin.close()
        async with asyncio.timeout(_END_WITHIN_S):
            answer, _ = await process.communicate()
    assert process.returncode == 0, "a reading of /metrics failed"
    found.seconds, found.series = json.loads(answer)


def main(board: Path, slots: int) -> None:
    """Read until standard input ends, then print the readings' seconds and numbers of series."""
    ended = Event()
    Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    exporter = Exporter(board, slots, slots=slots)
    url = f"http://127.0.0.1:{exporter.start(0)}/metrics"
    seconds, series = [], []
    print("up", flush=True)
    try:
        while not ended.wait(EVERY_S) or not seconds:
            began_s = time.perf_counter()
            with urllib.request.urlopen(url, timeout=10) as answer:
                lines = answer.read().splitlines()
            seconds.append(time.perf_counter() - began_s)
            series.append(sum(not line.startswith(b"#") for line in lines))
    finally:
        exporter.close()
    print(json.dumps([seconds, series]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
