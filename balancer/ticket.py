"""What the route service tells the replica about a request: one header that HAProxy strips from what clients send."""

from __future__ import annotations

from dataclasses import dataclass

# HAProxy removes every client header with the prefix `x-serve-router-` before it asks the router.
HEADER = "x-serve-router-splitwiser"
NO_ROW = -1


@dataclass(frozen=True, slots=True)
class Ticket:
    """Policy that decided, its reason, the router's row on the board, the predicted tokens; status 200 means serve it."""

    policy: str
    reason: str
    row: int = NO_ROW
    tokens: int = 0
    status: int = 200
    retry_after_s: float = 0.0
    probe: bool = False

    def encode(self) -> str:
        """No quotes, no braces: HAProxy's Lua reads the router's answer with a pattern, not a JSON parser."""
        numbers = f"{self.row} {self.tokens} {self.status} {self.retry_after_s:.3f} {int(self.probe)}"
        return f"{self.policy} {self.reason} {numbers}"

    @staticmethod
    def decode(text: str) -> Ticket:
        """Raises ValueError when it is not a ticket."""
        policy, reason, row, tokens, status, retry_after_s, probe = text.split(" ")
        return Ticket(policy, reason, int(row), int(tokens), int(status), float(retry_after_s), probe == "1")


DIRECT = Ticket("direct", "asked_directly")
