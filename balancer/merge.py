"""The answers to the parts of a batch, put together as one engine would have given them.

Written against vLLM's completions interface (0.29): choices in the order of the prompts, `n` of them for each, one id
and time for all, usage summed, and in a stream one final chunk of usage where there is any.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from balancer.batches import Part

Document = dict[str, Any]
DONE = b"data: [DONE]"
_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
_DATA = b"data: "
# What stands before the index in each chunk of a part is the same: vLLM writes its fields in a fixed order.
_UP_TO_INDEX = re.compile(
    rb'(data: \{"id":"[^"\\]*","object":"text_completion","created":\d+,(.*?)"choices":\[\{"index":)(\d+),'
)


class MergeError(ValueError):
    """A part's answer is not what vLLM answers; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What all parts share: the id of the answer and the time it was begun (Unix seconds)."""

    id: str
    created: int


def merge_answers(answers: Sequence[tuple[Part, Document]], n: int, identity: Identity) -> Document:
    """One answer made of the answers to all parts, in any order. Raises MergeError."""
    ordered = sorted(answers, key=lambda answer: answer[0].first)
    choices = [choice for part, document in ordered for choice in _choices(part, document, n)]
    last = ordered[-1][1]
    usage = {**(last.get("usage") or {}), **_summed([document.get("usage") for _, document in ordered])}
    first = ordered[0][1]
    merged = {**first, "id": identity.id, "created": identity.created, "choices": choices, "usage": usage}
    # They describe one generation; vLLM leaves them out for several prompts.
    return {**merged, "metrics": None} if "metrics" in first else merged


def _choices(part: Part, document: Document, n: int) -> list[Document]:
    choices = document.get("choices")
    if not isinstance(choices, list) or len(choices) != n * len(part):
        raise MergeError(f"a part of {len(part)} prompts was not answered with {n * len(part)} choices")
    return [{**choice, "index": n * part.first + index} for index, choice in enumerate(choices)]


def _summed(usages: Sequence[Document | None]) -> dict[str, int]:
    return {key: sum((usage or {}).get(key) or 0 for usage in usages) for key in _COUNTS}


@dataclass(frozen=True, slots=True)
class Passage:
    """What of a piece of a part's stream goes to the client, and what was met in it. `error` is a whole event."""

    send: bytes = b""
    done: bool = False
    error: bytes = b""


class PartStream:
    """One part's stream of events, rewritten. Feed it bytes as they come; whole events come out."""

    def __init__(self, part: Part, n: int, merged: MergedStream) -> None:
        self._offset = part.first * n
        self._merged = merged
        self._rest = b""
        self._usage: Document | None = None
        self._prefix: bytes | None = None
        self._new_prefix = b""

    def commit(self) -> None:
        """The part has ended well: what it used counts."""
        if self._usage:
            self._merged.add_usage(self._usage)

    def feed(self, data: bytes) -> Passage:
        """Raises MergeError when an event is none of vLLM's."""
        *events, self._rest = (self._rest + data).split(b"\n\n")
        out: list[bytes] = []
        for event in events:
            if event == DONE:
                return Passage(b"".join(out), done=True)
            if event.startswith(b'data: {"error"'):
                return Passage(b"".join(out), error=event + b"\n\n")
            out.append(self._event(event))
        return Passage(b"".join(out))

    def _event(self, event: bytes) -> bytes:
        if self._prefix and event.startswith(self._prefix):
            index, comma, rest = event[len(self._prefix) :].partition(b",")
            if comma and index.isdigit():
                return b"%b%d,%b\n\n" % (self._new_prefix, self._offset + int(index), rest)
        if not event.startswith(_DATA):
            return event + b"\n\n"  # a comment that keeps the connection alive
        return self._parsed(event)

    def _parsed(self, event: bytes) -> bytes:
        """The slow way, for a part's first chunk and for the last one with its usage."""
        try:
            chunk = json.loads(event[len(_DATA) :])
            choices = chunk["choices"]
            if not choices:
                self._usage = chunk
                return b""
            chunk = {**chunk, "id": self._merged.identity.id, "created": self._merged.identity.created}
            chunk["choices"] = [{**choice, "index": self._offset + choice["index"]} for choice in choices]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise MergeError(f"a part's stream holds what is no chunk of a completion ({error!r})") from None
        rewritten = _DATA + _dumps(chunk) + b"\n\n"
        self._learn(event, rewritten)
        return rewritten

    def _learn(self, event: bytes, rewritten: bytes) -> None:
        before, after = _UP_TO_INDEX.match(event), _UP_TO_INDEX.match(rewritten)
        if before and after and before[2] == after[2]:
            self._prefix, self._new_prefix = before[1], after[1]


class MergedStream:
    """What the streams of all parts have in common: identity, and the usage that ends the whole."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self._usages: list[Document] = []

    def add_usage(self, chunk: Document) -> None:
        self._usages.append(chunk)

    def end(self) -> bytes:
        """The last events: usage when the parts told theirs, and the mark of a clean end."""
        if not self._usages:
            return DONE + b"\n\n"
        last = self._usages[-1]
        usage = {**(last.get("usage") or {}), **_summed([chunk.get("usage") for chunk in self._usages])}
        chunk = {**last, "id": self.identity.id, "created": self.identity.created, "usage": usage}
        chunk.pop("metrics", None)
        return _DATA + _dumps(chunk) + b"\n\n" + DONE + b"\n\n"


def _dumps(value: Document) -> bytes:
    """As pydantic writes it: without spaces, and with letters beyond ASCII as they are."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
