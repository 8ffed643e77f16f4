"""Everything an operator may set in `balancer:` of the configuration, with the reason for each default."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Knobs:
    """Defaults stand for every model and load; none of them was fitted to a trace."""

    policy: str = "gpu_aware"

    # A replica not heard of for this long receives nothing. Replicas write at every engine step and at least four
    # times a second, so 2 s is eight missed heartbeats.
    stale_after_s: float = 2.0

    # A replica whose requests wait while its engine makes no step for this long is out until it steps again. A step
    # takes milliseconds on a GPU and up to a few seconds on a busy CPU.
    stalled_after_s: float = 8.0

    # Makes choices between equals repeatable.
    seed: int | None = None

    # Requests that wait at once. At a few hundred tokens each, more could not be answered within the deadline by one
    # GPU, and a client told so at once can go elsewhere.
    queue_limit: int = 1024

    # How long a request may wait before it is turned away: half of the 60 s at which common proxies give up.
    queue_deadline_s: float = 30.0

    # How many replicas of each GPU receive new work; None lets the measured step times decide.
    active_set: int | None = None

    # Share of a replica's KV cache that is never promised: blocks are handed out 16 tokens at a time (half a block
    # lost for each sequence is 1 % at 768 tokens), and predictions of output lengths err by more than that.
    kv_reserve_ratio: float = 0.05

    # How many later requests may pass one that does not fit yet, and for how long. Then all wait behind it until a
    # replica has drained enough: a second is far more than a turn of the queue, far less than the deadline.
    overtake_limit: int = 64
    overtake_patience_s: float = 1.0

    # A replica holding more than this times the mean gets nothing for the sake of its prefix cache.
    affinity_load_bound: float = 1.5

    # What another number of active replicas must promise before it is tried. Step times measured over a quarter of a
    # second scatter by about 2 %, so a smaller difference cannot be told from noise.
    gain_ratio: float = 0.03

    # Expected output of a request that names no cap, until enough answers were seen.
    default_output_tokens: int = 256

    # Seconds that the device takes to read the model's weights once: the least that a further replica costs every step.
    # The system works it out on a GPU; None where it is not known.
    weights_read_s: float | None = None
