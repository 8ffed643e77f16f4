"""What a request will cost, from its JSON body alone: prompt tokens, expected output, sequences, and a fingerprint.

No tokenizer runs here. Text counts by its UTF-8 bytes, at a ratio that the engines' own counters correct; lists of
token ids count exactly. Anything at all may be in the body: what cannot be understood counts as small, and the engine
answers it with its own 400.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from balancer.knobs import Knobs
from balancer.readings import ReplicaReading, RequestCost, Snapshot

# English text of current tokenizers; corrected as soon as engines report.
BYTES_PER_TOKEN = 4.0
# Beyond these a learned ratio is a miscount (base64, or counters that were reset), not a language.
BYTES_PER_TOKEN_RANGE = (1.0, 12.0)
# A chat template adds about this much around each message (role, separators).
MESSAGE_TOKENS = 4
# A picture, sound or film is not text: one tile of the common vision encoders.
MEDIA_TOKENS = 576
MEDIA_KEYS = frozenset({"image_url", "input_audio", "audio_url", "video_url", "file", "file_data"})
FINGERPRINT_CHARS = 1024
FINGERPRINT_IDS = 256
# More sequences or tokens than any engine takes at once: such a body gets the engine's 400, not our arithmetic.
MOST_SEQUENCES = 1024
MOST_TOKENS = 1 << 24
# Caps remembered, and finished requests that make one update: enough for a mean within about a tenth.
CAPS_REMEMBERED = 256
FINISHED_PER_UPDATE = 24
# How much one update counts against what was known.
BLEND = 0.3
# And the mean of a generation: as many answers as were in flight.
GENERATION_BLEND = 0.5


@dataclass(slots=True)
class Prompt:
    """A prompt's size: text bytes still to be divided by the ratio, tokens counted exactly, and separate prompts."""

    text_bytes: int = 0
    tokens: int = 0
    prompts: int = 1
    start: str = ""

    def add_text(self, text: str) -> None:
        self.text_bytes += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        if len(self.start) < FINGERPRINT_CHARS:
            self.start += text[: FINGERPRINT_CHARS - len(self.start)]

    def add_ids(self, ids: Sequence[object]) -> None:
        self.tokens += len(ids)
        if len(self.start) < FINGERPRINT_CHARS:
            self.start += repr(ids[:FINGERPRINT_IDS])[: FINGERPRINT_CHARS - len(self.start)]

    @property
    def fingerprint(self) -> int:
        """CRC of the prompt's start; 0 when it has none."""
        return zlib.crc32(self.start.encode("utf-8", "surrogatepass")) or 1 if self.start else 0


def measure_prompt(body: dict[str, object]) -> Prompt:
    """The prompt of a completions, chat, responses or embeddings body."""
    prompt = Prompt()
    messages = body.get("messages")
    if isinstance(messages, list):
        prompt.tokens += MESSAGE_TOKENS * len(messages)
        _add_values(prompt, [body.get("tools"), *messages])
        return prompt
    value = body.get("prompt", body.get("input"))
    if isinstance(value, list) and value and not isinstance(value[0], int | dict):
        prompt.prompts = len(value)
    _add_values(prompt, [body.get("instructions"), value])
    return prompt


def _add_values(prompt: Prompt, values: list[object]) -> None:
    """Add every text and token list inside `values`, in reading order. A loop, for bodies nested without end."""
    stack = values[::-1]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            prompt.add_text(value)
        elif isinstance(value, list):
            if value and isinstance(value[0], int):
                prompt.add_ids(value)
            else:
                stack.extend(reversed(value))
        elif isinstance(value, dict):
            prompt.tokens += MEDIA_TOKENS * sum(key in MEDIA_KEYS for key in value)
            stack.extend(v for key, v in reversed(value.items()) if key not in MEDIA_KEYS)


def output_cap(body: dict[str, object]) -> int | None:
    """The most tokens each sequence may have; None when the body names none that makes sense."""
    for key in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        cap = _whole(body.get(key))
        if cap is not None and cap > 0:
            return min(cap, MOST_TOKENS)
    return None


def sequences(body: dict[str, object]) -> int:
    return min(MOST_SEQUENCES, max(1, _whole(body.get("n")) or 1))


def _whole(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if isinstance(value, int) or math.isfinite(value) else None


def parse(body: bytes | str) -> dict[str, object]:
    """The body as a JSON object; empty when it is anything else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def tempered_cap(caps: Sequence[float], mean_output: float) -> float:
    """The level L at which the caps, each cut to L, average `mean_output`; infinite when whole caps do not exceed it.

    Caps that clients mean are far below L and stay what they are; caps that nobody means are cut to it.
    """
    ordered = sorted(caps)
    below = 0.0
    for i, cap in enumerate(ordered):
        if below + cap * (len(ordered) - i) >= mean_output * len(ordered):
            return (mean_output * len(ordered) - below) / (len(ordered) - i)
        below += cap
    return math.inf


class CostEstimator:
    """One router's estimates, corrected by `learn`. Never raises, whatever the body."""

    def __init__(self, knobs: Knobs) -> None:
        self.knobs = knobs
        self.bytes_per_token = BYTES_PER_TOKEN
        self.mean_output: float | None = None
        self.cap = math.inf
        self._caps: deque[float] = deque(maxlen=CAPS_REMEMBERED)
        self._text_bytes = 0
        self._exact_tokens = 0
        self._estimated = 0
        self._answers = 0
        self._made = 0.0
        self._ended = self._generations = 0
        self._readings: dict[int, ReplicaReading] = {}
        self._pending = [0, 0, 0, 0]

    def estimate(self, body: bytes | str, session: str = "", priority: int = 0) -> RequestCost:
        """The cost of a request whose body is these bytes."""
        return self.estimate_parsed(parse(body), session, priority)

    def estimate_parsed(self, body: dict[str, object], session: str = "", priority: int = 0) -> RequestCost:
        prompt = measure_prompt(body)
        return self.cost(prompt, output_cap(body), sequences(body), session, priority)

    def cost(
        self, prompt: Prompt, cap: int | None, sequences: int = 1, session: str = "", priority: int = 0
    ) -> RequestCost:
        """From the measured parts; remembers them to learn from."""
        self._estimated += 1
        self._text_bytes += prompt.text_bytes
        self._exact_tokens += prompt.tokens
        self._caps.append(math.inf if cap is None else cap)
        tokens = prompt.tokens + math.ceil(prompt.text_bytes / self.bytes_per_token)
        answers = min(MOST_SEQUENCES, sequences * prompt.prompts)
        self._answers += answers
        return RequestCost(
            max(1, min(tokens, MOST_TOKENS)), self._expected_output(cap), answers, prompt.fingerprint, session, priority
        )

    def _expected_output(self, cap: int | None) -> int:
        level = self.cap if math.isfinite(self.cap) else math.inf
        if cap is None:
            known = self.knobs.default_output_tokens if self.mean_output is None else self.mean_output
            return max(1, round(level if math.isfinite(level) else known))
        return max(1, round(min(cap, level)))

    def learn(self, snapshot: Snapshot) -> None:
        """Correct ratio and expectation by what the engines counted since the last call. Cheap; call it at will."""
        for r in snapshot.replicas:
            before = self._readings.get(r.slot)
            if before is r:
                continue
            self._readings[r.slot] = r
            if before is not None and before.replica_id == r.replica_id:
                grown = [new - old for new, old in zip(_counts(r), _counts(before), strict=True)]
                if min(grown) >= 0:
                    self._pending = [p + more for p, more in zip(self._pending, grown, strict=True)]
        if self._pending[3] >= FINISHED_PER_UPDATE:
            self._update(sum([r.in_flight_requests for r in snapshot.replicas]), *self._pending)
            self._pending = [0, 0, 0, 0]

    def _update(self, in_flight: int, prompt_tokens: int, received: int, output_tokens: int, finished: int) -> None:
        # Engines count requests; one of many prompts, or with `n`, has many answers.
        made = output_tokens * (self._estimated / self._answers if self._answers else 1.0)
        if self._generations < 2:
            self._blend(made / finished, BLEND)
        self._made, self._ended = self._made + made, self._ended + finished
        if self._ended >= in_flight:
            self._generation(self._made / self._ended)
        if self._caps and self.mean_output is not None:
            self.cap = tempered_cap(self._caps, self.mean_output)
        if received and self._estimated and self._text_bytes:
            self._correct_ratio(prompt_tokens / received)
        self._text_bytes = self._exact_tokens = self._estimated = self._answers = 0

    def _generation(self, mean: float) -> None:
        """Of answers that began together the short ones end first: only the mean over as many as were in flight does
        not swing with that. The first such mean counts the tokens of those that have not ended, and is left out."""
        self._generations += 1
        if self._generations >= 2:
            self._blend(mean, GENERATION_BLEND if self._generations > 2 else 1.0)
        self._made, self._ended = 0.0, 0

    def _blend(self, mean: float, weight: float) -> None:
        self.mean_output = mean if self.mean_output is None else self.mean_output + weight * (mean - self.mean_output)

    def _correct_ratio(self, mean_prompt_tokens: float) -> None:
        text_tokens = mean_prompt_tokens - self._exact_tokens / self._estimated
        if text_tokens <= 0.0:
            return
        low, high = BYTES_PER_TOKEN_RANGE
        ratio = min(high, max(low, self._text_bytes / self._estimated / text_tokens))
        self.bytes_per_token += BLEND * (ratio - self.bytes_per_token)


def _counts(r: ReplicaReading) -> tuple[int, int, int, int]:
    return r.prompt_tokens_total, r.received_total, r.output_tokens_total, r.finished_total
