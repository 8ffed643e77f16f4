"""How long each part of an answer may take: pure clockwork, told what happens and asked what is over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

CLIENT_HEADER = b"x-request-timeout-s"


class Limit(Enum):
    """A limit that ran out, with its error code and what a client is told."""

    FIRST_TOKEN = ("first_token_timeout", "the engine did not begin to answer in time")
    BETWEEN_TOKENS = ("between_tokens_timeout", "the engine stopped in the middle of its answer")
    TOTAL = ("total_timeout", "the answer took longer than this server allows")
    CLIENT = ("client_timeout", "the answer took longer than the time that the request allows itself")

    @property
    def code(self) -> str:
        return self.value[0]

    @property
    def message(self) -> str:
        return self.value[1]

    @property
    def blames_engine(self) -> bool:
        """Whether the engine is to blame, rather than the length of what was asked for."""
        return self in (Limit.FIRST_TOKEN, Limit.BETWEEN_TOKENS)


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds; each counts on its own. Defaults are for patience, not for comfort: they end what hangs."""

    # A prompt of a long context may take this long to be read when the engine is full.
    first_token_s: float = 120.0
    # Preempted, a sequence waits for others to end; a minute without a token is a stopped engine.
    between_tokens_s: float = 60.0
    total_s: float = 3600.0


class Watch:
    """One answer's times. Begins when its request has arrived; `client_s` is what the client's header leaves of it.

    An answer that is sent whole shows no token before its end; until an answer is known to be a stream, any step of the
    engine counts as a sign of life. The time that a client takes to read counts for the total only.
    """

    def __init__(self, limits: Limits, began_s: float, client_s: float = math.inf) -> None:
        self._limits = limits
        self._total, total_s = (Limit.CLIENT, client_s) if client_s < limits.total_s else (Limit.TOTAL, limits.total_s)
        self._ends_s = began_s + total_s
        self._began_s = self._alive_s = began_s
        self._token_s: float | None = None
        self._held = False

    def streams(self) -> None:
        """The answer comes token by token: its first one is due."""
        self._alive_s = self._began_s

    def engine_stepped(self, at_s: float) -> None:
        """The engine made a step at `at_s`, whoever it was for; to be told only before `streams`."""
        self._alive_s = max(self._alive_s, at_s)

    def hold(self) -> None:
        """Something is being sent: until it is taken, no limit but the total counts."""
        self._held = True

    def go_on(self, now_s: float, token: bool) -> None:
        """It was taken; `token`: it was a part of the answer, not only its headers."""
        self._held = False
        if token:
            self._token_s = now_s

    def over(self, now_s: float) -> Limit | None:
        """The limit that has run out by now."""
        if now_s >= self._ends_s:
            return self._total
        if now_s < self._silent_at_s:
            return None
        return Limit.FIRST_TOKEN if self._token_s is None else Limit.BETWEEN_TOKENS

    @property
    def next_s(self) -> float:
        """Before this moment nothing can run out."""
        return min(self._ends_s, self._silent_at_s)

    @property
    def _silent_at_s(self) -> float:
        if self._held:
            return math.inf
        if self._token_s is None:
            return self._alive_s + self._limits.first_token_s
        return self._token_s + self._limits.between_tokens_s


def client_seconds(header: bytes | None, waited_s: float) -> float:
    """What is left of the seconds in a client's header after `waited_s` in the queue; without sense it is no limit."""
    try:
        seconds = float(header or b"inf")
    except ValueError:
        return math.inf
    return max(0.0, seconds - waited_s) if math.isfinite(seconds) and seconds > 0.0 else math.inf
