"""A batch of prompts split over the replicas: which request is one, what its parts are, what becomes of a failed part.

A batch lies in one work list. Parts are cut off its front, one at a time, only when the last one found a place, and
each smaller than the one before: guided self-scheduling (Polychronopoulos and Kuck, IEEE Transactions on Computers
1987), so that the parts which end last are the smallest. How big a part may be follows from the replicas' headroom,
which replica gets it from the policy. `balancer.merge` puts the answers together.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from balancer.cost import BYTES_PER_TOKEN, output_cap, parse
from balancer.readings import ReplicaReading, Snapshot
from balancer.selection import kv_tokens_free

COMPLETIONS = "/v1/completions"
# The files and batches of OpenAI's batch interface: answered by whichever replica they reach, no work for its engine.
MANAGED = ("/v1/files", "/v1/batches")

# A part is this fraction of what each replica would still get: half is the usual factor of guided self-scheduling. The
# other half levels out what the first parts got wrong.
SHARE = 0.5
# vLLM's own cap for completions that name none.
DEFAULT_OUTPUT_TOKENS = 16
# A part that failed is tried once more.
ATTEMPTS = 2

_KEY = b'"prompt"'
_LIST_OF_PROMPTS = re.compile(rb'\s*:\s*\[\s*["\[]')
# Fields that mean one request to one engine.
_WHOLE_ONLY = ("prompt_embeds", "kv_transfer_params", "ec_transfer_params")


@dataclass(frozen=True, slots=True)
class Batch:
    """A completions request with a list of prompts, as its client sent it. `n` choices for each prompt."""

    body: dict[str, Any]
    prompts: list[Any]
    n: int
    stream: bool

    @property
    def sequences(self) -> int:
        return self.n * len(self.prompts)

    def part(self, part: Part) -> dict[str, Any]:
        """The body for one part: the client's own, with these prompts only."""
        return {**self.body, "prompt": self.prompts[part.first : part.end]}


def read_batch(body: dict[str, object], threshold: int) -> Batch | None:
    """The batch in this body; None when it has fewer prompts than `threshold`, or something that only a whole request
    means, or a field so odd that an engine should answer it."""
    prompts, n, stream = body.get("prompt"), body.get("n", 1), body.get("stream") or False
    if not isinstance(prompts, list) or len(prompts) < max(2, threshold) or type(prompts[0]) not in (str, list):
        return None
    if type(n) is not int or n < 1 or type(stream) is not bool:
        return None
    kind = type(prompts[0])
    if any(type(prompt) is not kind for prompt in prompts) or any(body.get(key) is not None for key in _WHOLE_ONLY):
        return None
    return Batch(body, prompts, n, stream)


def sequences_announced(body: bytes, path: str, threshold: int) -> int:
    """How many sequences a batch that will be split has; 0 for every other request.

    `body` may be cut short, as HAProxy does beyond its buffer: then a list of prompts counts as one sequence.
    """
    if path not in ("", COMPLETIONS) or not threshold or not _shows_list(body):
        return 0
    parsed = parse(body)
    if not parsed:
        return 1
    batch = read_batch(parsed, threshold) if "messages" not in parsed else None
    return batch.sequences if batch else 0


def _shows_list(body: bytes) -> bool:
    """Whether JSON text has a list of prompts, without parsing it: most bodies have none. A key inside a string would
    have its quotes escaped."""
    at = body.find(_KEY)
    while at >= 0:
        if body[at - 1 : at] != b"\\" and _LIST_OF_PROMPTS.match(body, at + len(_KEY)):
            return True
        at = body.find(_KEY, at + len(_KEY))
    return False


def sequence_tokens(batch: Batch) -> list[int]:
    """The KV tokens that each prompt with its answers will need, roughly: no tokenizer runs here."""
    cap = output_cap(batch.body)
    output = batch.n * (DEFAULT_OUTPUT_TOKENS if cap is None else cap)
    return [output + (len(p) if isinstance(p, list) else math.ceil(len(p) / BYTES_PER_TOKEN)) for p in batch.prompts]


@dataclass(frozen=True, slots=True)
class Room:
    """The replicas' headroom: the most that one of them can take now, and how many such replicas all together make."""

    sequences: int
    tokens: int
    replicas: float


def headroom(snapshot: Snapshot, stale_after_s: float, kv_reserve_ratio: float) -> Room:
    """What the ready replicas have free in batch and KV cache."""
    ready = snapshot.ready(stale_after_s)
    tokens = [max(0, kv_tokens_free(r) - math.ceil(kv_reserve_ratio * r.kv_tokens_total)) for r in ready]
    places = [max(0, _places(r)) for r in ready]
    widest = max(tokens, default=0)
    return Room(max(places, default=0), widest, max(1.0, sum(tokens) / widest if widest else len(ready)))


def _places(replica: ReplicaReading) -> int:
    return (replica.max_running_requests or 1 << 30) - replica.engine_requests


@dataclass(frozen=True, slots=True)
class Part:
    """The prompts first..end-1 of a batch, on their `attempt`-th way to a replica."""

    number: int
    first: int
    end: int
    attempt: int = 1

    def __len__(self) -> int:
        return self.end - self.first


class WorkList:
    """What of a batch is still to be handed out. Each prompt is in exactly one place: here, in a part, or finished."""

    def __init__(self, tokens: Sequence[int], n: int = 1) -> None:
        self._tokens = list(tokens)
        self._n = n
        self._spans: deque[tuple[int, int, int]] = deque([(0, len(tokens), 1)])
        self._left_tokens = sum(tokens)
        self._out: dict[int, Part] = {}
        self._cut = 0
        self._finished = 0

    @property
    def left(self) -> int:
        """Prompts that wait to be handed out."""
        return sum(end - first for first, end, _ in self._spans)

    @property
    def out(self) -> int:
        """Parts handed out and neither finished nor given back."""
        return len(self._out)

    @property
    def finished(self) -> bool:
        return self._finished == len(self._tokens)

    def cut(self, room: Room) -> Part | None:
        """The next part, never more than one replica has room for unless that is a single prompt; None when all is
        handed out."""
        if not self._spans:
            return None
        first, end, attempt = self._spans.popleft()
        cut_at = min(end, first + self._prompts(first, end, room))
        if cut_at < end:
            self._spans.appendleft((cut_at, end, attempt))
        self._cut += 1
        part = self._out[self._cut] = Part(self._cut, first, cut_at, attempt)
        self._left_tokens -= sum(self._tokens[first:cut_at])
        return part

    def finish(self, part: Part) -> None:
        """The part was answered in full. Raises KeyError when it is not out."""
        del self._out[part.number]
        self._finished += len(part)

    def give_back(self, part: Part) -> None:
        """Nobody took the part: its prompts are the next to be handed out, in parts as they fit then."""
        self._return(part, part.attempt)

    def fail(self, part: Part) -> bool:
        """The part was lost; whether it may be tried again. If not, it stays out and the batch has failed."""
        if part.attempt >= ATTEMPTS:
            return False
        self._return(part, part.attempt + 1)
        return True

    def _return(self, part: Part, attempt: int) -> None:
        del self._out[part.number]
        self._spans.appendleft((part.first, part.end, attempt))
        self._left_tokens += sum(self._tokens[part.first : part.end])

    def _prompts(self, first: int, end: int, room: Room) -> int:
        """How many prompts from `first` on: a share of the tokens left, within the room of one replica."""
        share = SHARE * self._left_tokens / room.replicas
        most = max(1, room.sequences // self._n)
        tokens = 0
        for count, index in enumerate(range(first, min(end, first + most))):
            tokens += self._tokens[index]
            if count and (tokens > share or tokens > room.tokens):
                return count
        return min(end - first, most)
