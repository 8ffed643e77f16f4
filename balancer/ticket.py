"""What the route service tells the replica about a request: one header that HAProxy strips from what clients send."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from balancer.board import REPLICA_SLOTS, ROUTER_ROWS
from balancer.readings import NO_SLOT

# HAProxy removes every client header with the prefix `x-serve-router-` before it asks the router.
HEADER = "x-serve-router-splitwiser"
# Beside the ticket of a batch: where its parts ask for a place (host:port).
ROUTER_HEADER = "x-serve-router-address"
NO_ROW = -1
_MOST_TOKENS = 1 << 40
_MOST_SEQUENCES = 1 << 16
_NOT_A_WORD = re.compile(r"[^\w.:-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Ticket:
    """Policy that decided, its reason, the router's row on the board, predicted tokens; status 200 means serve it.

    `tokens` are prompt and output together, `output_tokens` (all sequences) the part still to be made. `sequences`
    are the places it takes in an engine's batch; 0 for what this replica only manages and no engine of it serves.
    `slot` is the replica that was chosen, `waited_s` what the request has spent in the queue.
    """

    policy: str
    reason: str
    row: int = NO_ROW
    tokens: int = 0
    status: int = 200
    retry_after_s: float = 0.0
    probe: bool = False
    output_tokens: int = 0
    sequences: int = 1
    slot: int = NO_SLOT
    waited_s: float = 0.0

    @property
    def served(self) -> bool:
        """Whether it is work for an engine: neither turned away nor a probe."""
        return self.status == 200 and not self.probe

    @property
    def routed(self) -> bool:
        """Whether a router wrote it, for a request that entered there."""
        return self.slot != NO_SLOT

    def encode(self) -> str:
        """No quotes, no braces: HAProxy's Lua reads the router's answer with a pattern, not a JSON parser."""
        numbers = (
            f"{self.row} {self.tokens} {self.status} {self.retry_after_s:.3f} {int(self.probe)} {self.output_tokens}"
            f" {self.sequences} {self.slot} {self.waited_s:.3f}"
        )
        return f"{_word(self.policy)} {_word(self.reason)} {numbers}"

    @staticmethod
    def decode(text: str) -> Ticket:
        """Raises ValueError when it is no ticket, or none that a router writes: clients can forge it."""
        policy, reason, row, tokens, status, retry_after_s, probe, output, sequences, slot, waited_s = text.split(" ")
        numbers = int(row), int(tokens), int(status), float(retry_after_s)
        places = int(sequences), int(slot), float(waited_s)
        ticket = Ticket(policy, reason, *numbers, probe == "1", int(output), *places)
        if not ticket._possible():
            raise ValueError(f"{text!r} is not a router's ticket")
        return ticket

    def _possible(self) -> bool:
        return (
            NO_ROW <= self.row < ROUTER_ROWS
            and 0 <= self.output_tokens <= self.tokens <= _MOST_TOKENS
            and (self.status == 200 or 400 <= self.status < 600)
            and math.isfinite(self.retry_after_s)
            and 0 <= self.sequences <= _MOST_SEQUENCES
            and NO_SLOT <= self.slot < REPLICA_SLOTS
            and 0.0 <= self.waited_s < math.inf
        )


def _word(text: str) -> str:
    return _NOT_A_WORD.sub("_", text) or "_"


DIRECT = Ticket("direct", "asked_directly")
