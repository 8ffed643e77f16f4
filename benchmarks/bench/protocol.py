"""What the bench and its worker processes say to each other: JSON lines.

The worker gets its spec, builds its model and says hello. For each round it gets an order, makes everything ready and
says so, gets `{"go": true}`, and answers with a report; it ends when its input closes.

An order holds `prompts` (token ids), `output_tokens` and `at_s` of each request and `limit`: at most so many at once,
null for no limit. A report holds `requests`: [due, begun, first token, end, output tokens] of each, in monotonic
seconds, and `made`: [when, how many output tokens] by engine step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.workers import answers_on_stdout

Json = dict[str, Any]
Serve = Callable[[Json], Callable[[], Json]]
"""Makes an order ready and returns what runs it."""


def work(build: Callable[[Json], tuple[Json, Serve]]) -> None:
    """A worker's life. `build` turns the spec into a greeting and a function that serves orders."""
    answer = answers_on_stdout()
    hello, serve = build(json.loads(sys.stdin.readline()))
    answer(hello)
    while line := sys.stdin.readline():
        run = serve(json.loads(line))
        answer({"ready": True})
        if not sys.stdin.readline():
            return
        answer(run())


class Ranges:
    """NVTX ranges `prompt` and `token`, one open at a time; without a module it does nothing.

    `nvtx` is torch.cuda.nvtx, or None.
    """

    def __init__(self, nvtx: Any = None) -> None:
        self._nvtx = nvtx
        self._open: str | None = None

    def enter(self, name: str | None) -> None:
        """End the open range and begin `name`'s, unless that is the one; None only ends."""
        if self._nvtx is None or name == self._open:
            return
        if self._open is not None:
            self._nvtx.range_pop()
        if name is not None:
            self._nvtx.range_push(name)
        self._open = name


def ranges(wanted: bool) -> Ranges:
    """Imports torch where ranges are wanted."""
    if not wanted:
        return Ranges()
    import torch

    return Ranges(torch.cuda.nvtx)
