"""How much KV cache the requests that a replica holds will need at their peak.

The sum of their final sizes is too much: by the time the youngest is long, the oldest has left. What is held now is too
little: it grows by a token for each sequence and step. The peak in between follows from what each has and will still
add, since all sequences of an engine grow at one pace. Source: the "future peak" of LightLLM's past-future scheduler
(Gong et al., ASPLOS 2025).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

# A sequence that outlived its prediction is expected to go on for this share of what it made: lengths of answers have
# long tails, so the longer one has run, the longer it will.
OVERTIME_RATIO = 0.25


def expected_remaining(predicted_output_tokens: int, made_tokens: int) -> int:
    """Output tokens a sequence will still make, at least one."""
    remaining = predicted_output_tokens - made_tokens
    overtime = int(OVERTIME_RATIO * made_tokens) or 1
    return remaining if remaining > overtime else overtime


def peak_tokens(sequences: Iterable[tuple[int, int]]) -> int:
    """The most KV tokens ever held at once, when nothing is added, by sequences of (tokens to come, tokens now)."""
    held, peak = 0, 0
    for count, (to_come, now) in enumerate(sorted(sequences, reverse=True), start=1):
        held += now
        if held + to_come * count > peak:
            peak = held + to_come * count
    return peak


def rounding_scatter_tokens(kv_tokens: int, block_tokens: int, sequence_tokens: float) -> float:
    """Tokens that last blocks waste, now and then, beyond half a block each: two standard deviations of their sum, over
    as many sequences as fill the cache. Each wastes evenly between nothing and a block."""
    sequences = kv_tokens / max(1.0, sequence_tokens, block_tokens)
    return block_tokens * math.sqrt(sequences / 3)
