"""How many requests may be tried again: a second try is work that nobody asked for, when work is least wanted."""

from __future__ import annotations

from collections import deque

# As Envoy's retry budget: a fifth of the requests, and a floor of three, without which a quiet server never retries.
# (The SRE book, "Addressing Cascading Failures", is stricter with a tenth.)
RETRY_RATIO = 0.2
RETRY_FLOOR = 3
WINDOW_S = 10.0


class RetryBudget:
    """Retries are at most RETRY_RATIO of the first tries of the last WINDOW_S, or RETRY_FLOOR if that is more."""

    def __init__(self) -> None:
        self._first: deque[float] = deque()
        self._again: deque[float] = deque()

    def first(self, now_s: float) -> None:
        """A request came for the first time."""
        self._first.append(now_s)
        _forget(self._first, now_s)

    def again(self, now_s: float) -> bool:
        """Whether a request that comes a second time may be served; if so, it is counted."""
        _forget(self._first, now_s)
        _forget(self._again, now_s)
        allowed = len(self._again) < max(RETRY_FLOOR, RETRY_RATIO * len(self._first))
        if allowed:
            self._again.append(now_s)
        return allowed


def _forget(times: deque[float], now_s: float) -> None:
    while times and times[0] <= now_s - WINDOW_S:
        times.popleft()
