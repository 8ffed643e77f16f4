"""The retry budget: second tries never become a load of their own."""

from __future__ import annotations

from balancer.retries import RETRY_FLOOR, WINDOW_S, RetryBudget


def test_a_quiet_replica_may_take_three_retries() -> None:
    """The floor holds without any first try, and no more than the floor."""
    budget = RetryBudget()
    assert [budget.again(0.0) for _ in range(RETRY_FLOOR + 2)] == [True] * RETRY_FLOOR + [False] * 2


def test_a_busy_replica_takes_a_fifth_more() -> None:
    """Of a hundred first tries, twenty retries pass and the twenty-first does not."""
    budget = RetryBudget()
    for _ in range(100):
        budget.first(0.0)
    assert sum(budget.again(0.0) for _ in range(100)) == 20


def test_the_past_is_forgotten() -> None:
    """After the window neither the first tries nor the retries count."""
    budget = RetryBudget()
    for _ in range(100):
        budget.first(0.0)
    assert sum(budget.again(0.0) for _ in range(100)) == 20
    assert sum(budget.again(WINDOW_S) for _ in range(100)) == RETRY_FLOOR
