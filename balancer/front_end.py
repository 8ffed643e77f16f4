"""What a replica's front end allows: one thread takes requests in, detokenizes and sends, while the engine steps.

The two work side by side, so the slower one sets the pace. A streamed token costs the front end about five times what a
whole answer's does, and one replica alone may then make half of what its engine could. How much CPU time the thread
used is on the board; by the utilization law, so much for each step is the shortest that a step can be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# What streaming costs, of which `FrontEnd.ratio` is a multiple: one `vllm serve` streams 20,900 tokens/s on the host
# of an H200 with 160 clients as with 320. A step and a request were guessed; `h200_board_2026-11-23c` fits 55 us for a
# token, 0.34 ms for a step and 2.7 ms for a request with a prompt of 1,024 tokens, so these weigh requests lightly.
TOKEN_S = 4.5e-5
STEP_S = 2e-4
REQUEST_S = 8e-4
# The newest window weighs a quarter, as in the fit of step times.
BLEND = 0.25
# A dearer kind of answers is remembered for about this long: when it comes back, it comes at once.
MEMORY_S = 60.0
# More than this share of a thread's time is never got: the kernel and other threads take the rest.
USABLE = 0.9


def typical_s(batch: float, requests: float) -> float:
    """CPU seconds for one engine step of `batch` streamed sequences, `requests` of which begin or end in it."""
    return STEP_S + TOKEN_S * batch + REQUEST_S * requests


@dataclass(slots=True)
class FrontEnd:
    """The cost of one GPU's front ends. Until anything was measured it stands in nobody's way."""

    ratio: float = 0.0
    _recent: float = 1.0

    def observe(self, batch: float, requests: float, cpu_s: float, length_s: float) -> None:
        """One replica's window: mean batch, requests and CPU seconds for each step; it stands for `length_s`."""
        if cpu_s <= 0.0:
            return
        # No more than twice the last: a thread may once be busy with something else.
        seen = min(cpu_s / typical_s(batch, requests), 2.0 * self._recent)
        self._recent += BLEND * (seen - self._recent)
        faded = (self.ratio or 1.0) * math.exp(-length_s / MEMORY_S)
        self.ratio = max(self._recent, faded)

    def step_s(self, batch: float, requests: float) -> float:
        """The shortest that a step can be."""
        return self.ratio * typical_s(batch, requests) / USABLE
