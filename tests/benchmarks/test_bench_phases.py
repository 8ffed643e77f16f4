"""The bench's arithmetic: phases, steady state, latencies and what counts as good."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bench.phases import Limits, Served, Spread, covered_s, measured, saved, steady_tokens_per_s

LIMITS = Limits(ttft_s=1.0, tpot_s=0.5)


@pytest.mark.parametrize(
    ("spans", "length_s"),
    [([], 0.0), ([(1, 3)], 2.0), ([(0, 2), (1, 3)], 3.0), ([(0, 1), (4, 5)], 2.0), ([(0, 9), (1, 2), (3, 4)], 9.0)],
)
def test_what_overlaps_is_counted_once(spans: list[tuple[float, float]], length_s: float) -> None:
    assert covered_s(spans) == length_s


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=12))
def test_covered_time_is_the_number_of_covered_seconds(starts: list[tuple[int, int]]) -> None:
    """Against the plainest count there is: the whole seconds that lie in any span."""
    spans = [(float(a), float(a + n)) for a, n in starts]
    assert covered_s(spans) == len({second for a, n in starts for second in range(a, a + n)})


def test_one_process_alternates_between_its_phases() -> None:
    """Two batches one after the other: both phases sum up to the whole, with no overlap."""
    row = measured([Served(0, 0, 1, 3, 5), Served(0, 3, 4, 6, 5)], [], 0.0, LIMITS)
    assert (row["prompt_s"], row["token_s"], row["overlap_s"], row["wall_s"]) == (2.0, 4.0, 0.0, 6.0)


def test_split_processes_are_in_both_phases_at_once() -> None:
    """The second batch's prompts are computed while the first one's tokens are: the overlap is what was won."""
    row = measured([Served(0, 0, 1, 3, 5), Served(0, 1, 2, 5, 5)], [], 0.0, LIMITS)
    assert (row["prompt_s"], row["token_s"], row["overlap_s"], row["wall_s"]) == (2.0, 4.0, 1.0, 5.0)


def test_a_failed_request_is_counted_and_gives_no_token_latency_or_goodput() -> None:
    row = measured([Served(0, 0, 0.5, 2.5, 5), Served(0, 0, 9.0, 9.0, 0)], [], 0.0, LIMITS)
    assert (row["requests"], row["failed"], row["output_tokens"]) == (2, 1, 5)
    assert row["ttft_s_p99"] == 0.5
    assert row["goodput_per_s"] == pytest.approx(1 / 9)


def test_goodput_wants_both_limits_kept() -> None:
    """Within both; a late first token; slow further tokens; and a single token, which has no further ones."""
    kept = [LIMITS.kept(Served(0, 0, *times)) for times in ((1.0, 2.0, 3), (1.1, 1.2, 3), (0.5, 2.0, 3), (0.9, 0.9, 1))]
    assert kept == [True, False, False, True]


def test_waiting_before_the_start_counts_as_latency_but_not_as_prompt_phase() -> None:
    row = measured([Served(0, 2, 3, 4, 2)], [], 0.0, LIMITS)
    assert (row["ttft_s_p50"], row["prompt_s"]) == (3.0, 1.0)


def test_steady_state_leaves_out_filling_and_draining() -> None:
    """Ten tokens in each of ten seconds, but a hundred in the first and none in the last two."""
    made = [(0.5, 100), *((s + 0.5, 10) for s in range(1, 8))]
    assert steady_tokens_per_s(made, 0.0, 10.0) == pytest.approx(10.0, rel=0.01)


def test_spread_and_saving() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert saved(10.0, 8.0) == pytest.approx(0.2)
    assert saved(10.0, 12.0) == pytest.approx(-0.2)
