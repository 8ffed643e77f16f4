"""The PromQL that dashboards are made of.

Rates are over `$__rate_interval`; percentiles come from buckets. No mean is taken from a histogram of Ray's: its sums
are made up of bucket midpoints.
"""

from __future__ import annotations

from monitoring.metrics import STATES
from monitoring.panels import GREEN, GREY, RED, YELLOW, Query

# Ray's workers report every 10 s.
RAY_EVERY = "10s"
RATE = "$__rate_interval"
OURS = 'job=~"$job",node=~"$node"'
NODE = 'node=~"$node"'
OCCUPIED = f'on (slot) (sum by (slot) (splitwiser_replica_state{{{OURS},state="empty"}}) == 0)'
SM_IS_COUNTED = f'on (gpu) (max by (gpu) (splitwiser_gpu_source{{{OURS},source="nvml"}}) == 0)'
STATE_COLOURS = (GREY, YELLOW, GREEN, YELLOW, RED)
USE = f"splitwiser:gpu_use:ratio{{{OURS}}}"


def per_slot(metric: str, more: str = "") -> str:
    """The gauge of each slot that a replica holds."""
    return f"sum by (slot) ({metric}{{{OURS}{more}}}) and {OCCUPIED}"


def rate_per_slot(metric: str, more: str = "") -> str:
    return f"sum by (slot) (rate({metric}{{{OURS}{more}}}[{RATE}])) and {OCCUPIED}"


def total_rate(metric: str, by: str = "", more: str = "") -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({metric}{{{OURS}{more}}}[{RATE}]))"


def quantile(q: float, histogram: str, by: str = "", more: str = "", scope: str = OURS) -> str:
    """A percentile from a histogram's buckets, over all series or for each value of the label `by`."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({histogram}_bucket{{{scope}{more}}}[{RATE}])))"


def quantiles(histogram: str, more: str = "", every: str = "", scope: str = OURS) -> list[Query]:
    return [Query(quantile(q, histogram, "", more, scope), f"p{q * 100:.0f}", every) for q in (0.5, 0.95, 0.99)]


def mean(histogram: str, more: str = "") -> str:
    """For histograms that publish their own sum: vLLM's and ours."""
    return f"{total_rate(histogram + '_sum', '', more)} / {total_rate(histogram + '_count', '', more)}"


def haproxy_per_slot(metric: str, rate: bool = True, more: str = "", slot: str = "") -> str:
    """HAProxy names servers after the replica's id, from which the slot is found.

    Each replica stands in two of its backends, and the one without checks says NaN of them: `>= 0` leaves that out.
    """
    series = f"{metric}{{{NODE}{more}}}"
    value = f"rate({series}[{RATE}])" if rate else series
    tagged = f'sum by (replica) (label_replace({value} >= 0, "replica", "$1", "server", ".*-(.+)"))'
    info = f'max by (replica, slot) (splitwiser_replica_info{{{OURS},replica!=""{slot}}})'
    return f"sum by (slot) ({tagged} * on (replica) group_left (slot) {info})"


def state_number(more: str = "") -> str:
    """Each slot's state as its place in STATES."""
    terms = (
        f'{number} * sum by (slot) (splitwiser_replica_state{{{OURS},state="{state}"{more}}})'
        for number, state in enumerate(STATES)
        if number
    )
    return " + ".join(terms)
