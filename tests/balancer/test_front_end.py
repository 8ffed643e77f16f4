"""What a front end allows: nothing is held against it before it was measured, and dear answers are remembered."""

from __future__ import annotations

import pytest

from balancer.front_end import MEMORY_S, FrontEnd, typical_s

WINDOW_S = 0.25


def after(front_end: FrontEnd, seconds: float, share: float, batch: float = 100.0) -> FrontEnd:
    """As if each step took so much of what streaming typically takes."""
    for _ in range(round(seconds / WINDOW_S)):
        front_end.observe(batch, 0.1, share * typical_s(batch, 0.1), WINDOW_S)
    return front_end


def test_unmeasured_it_stands_in_nobodys_way() -> None:
    """Engines whose CPU time is not known are judged by their steps alone."""
    assert FrontEnd().step_s(1000.0, 1.0) == 0.0
    assert after(FrontEnd(), 10.0, share=0.0).step_s(1000.0, 1.0) == 0.0


@pytest.mark.parametrize("batch", [160, 320])
def test_one_front_end_streams_as_fast_as_was_measured(batch: int) -> None:
    """`vllm serve` on the host of an H200: 20,700 and 20,900 tokens/s with 160 and 320 clients, 1,024 tokens each."""
    assert batch / after(FrontEnd(), 5.0, share=1.0).step_s(batch, batch / 1024) == pytest.approx(20_800, rel=0.15)


def test_dear_answers_are_remembered_when_cheap_ones_come() -> None:
    """After ten seconds of whole answers, streams that come back find the replicas that they need; not for ever."""
    front_end = after(after(FrontEnd(), 10.0, share=1.0), 10.0, share=0.5)
    assert front_end.ratio >= 0.8
    assert after(front_end, 5 * MEMORY_S, share=0.5).ratio == pytest.approx(0.5, rel=0.01)


def test_dearer_answers_are_believed_within_seconds() -> None:
    """A slower host, or longer parts."""
    assert after(FrontEnd(), 4.0, share=3.0).ratio >= 2.7


def test_a_moment_of_other_work_changes_little() -> None:
    """The same thread reads uploads and starts batches."""
    assert after(FrontEnd(), WINDOW_S, share=1000.0).ratio <= 1.25
