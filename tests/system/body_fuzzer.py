"""Bodies that clients should not send: valid ones, broken in a few places by a seeded random source."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MESSAGES = [{"role": "user", "content": "Once upon a time"}]
# For each route a body that is answered with 200; answers are short.
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "demo", "prompt": "Once upon a time", "max_tokens": 2},
    "/v1/chat/completions": {"model": "demo", "messages": MESSAGES, "max_tokens": 2},
    "/v1/responses": {"model": "demo", "input": "Once upon a time", "max_output_tokens": 2, "store": False},
    "/v1/messages": {"model": "demo", "messages": MESSAGES, "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": "demo", "messages": MESSAGES},
    "/tokenize": {"model": "demo", "prompt": "Once upon a time"},
    "/detokenize": {"model": "demo", "tokens": [5, 6, 7]},
}
# Fields that decide how long an answer takes: a value that is fine, but long, would only fill the time.
LENGTHS = {"max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of", "min_tokens", "use_beam_search"}
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, float("nan"), float("inf"), 10**9, -(10**9), 2**31, 2**63,
    -(2**63) - 1, 10**30, 10**400, "", "x", " ", "0", "1e9", "NaN", "null", "demo", "auto", "\x00", "\ud800",
    "\U0001f600" * 50, "a" * 70_000, "%s%n{}{{0}}", "../../etc/passwd", "<|im_start|>", [], [[]], [None], [""], [0],
    [-1], [10**9], [1, "a"], [[1], ["a"]], ["a"] * 5000, list(range(5000)), {}, {"": None}, {"a": {}}, {"type": "x"},
    {"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, {"json": {"type": "object"}}, {"regex": "[a-"},
    {"1": 5.0}, {"999999": 1}, {"type": "function", "function": {"name": "f"}}, [{"type": "text", "text": "x"}],
    [{"type": "image_url"}], [{"role": "user"}], [{"role": 5, "content": []}], [{"role": "tool", "content": "x"}],
    [{"type": "function"}],
]  # fmt: skip


class BodyFuzzer:
    """Endless bodies for every route in `fields`; the same seed gives the same ones.

    `fields`: the names that a route's body may hold, as the served OpenAPI lists them.
    """

    def __init__(self, fields: Mapping[str, Sequence[str]], seed: int) -> None:
        self._fields = {path: [*names, *VALID[path]] for path, names in fields.items() if path in VALID}
        self._random = random.Random(seed)

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        paths = sorted(self._fields)
        while True:
            path = self._random.choice(paths)
            text = json.dumps(self._changed(path)).encode("utf-8", "surrogatepass")
            yield path, self._damaged(text) if self._random.random() < 0.15 else text

    def _changed(self, path: str) -> Any:
        body: dict[str, Any] = json.loads(json.dumps(VALID[path]))
        if self._random.random() < 0.03:
            return self._value()
        for _ in range(self._random.randint(1, 4)):
            self._change(body, self._random.choice(self._fields[path]))
        return body

    def _change(self, body: dict[str, Any], name: str) -> None:
        if self._random.random() < 0.1:
            body.pop(name, None)
        elif name in LENGTHS:
            body[name] = self._random.choice([0, -1, 3, 1.5, None, "x", [], 10**9, 10**400, float("nan")])
        else:
            body[name] = self._value()

    def _value(self) -> Any:
        value = self._random.choice(NASTY)
        match self._random.randint(0, 5):
            case 0:
                return [value, self._random.choice(NASTY)]
            case 1:
                return {self._random.choice(["type", "text", "content", "role", "name", "a"]): value}
            case 2:
                return self._nested(value)
            case _:
                return value

    def _nested(self, value: Any) -> Any:
        for _ in range(self._random.choice([3, 50, 200])):
            value = [value] if self._random.random() < 0.5 else {"a": value}
        return value

    def _damaged(self, text: bytes) -> bytes:
        at = self._random.randrange(len(text))
        match self._random.randint(0, 3):
            case 0:
                return text[:at]
            case 1:
                return text[:at] + self._random.randbytes(3) + text[at:]
            case 2:
                return text[:at] + text[at + 1 :]
            case _:
                return text + text
