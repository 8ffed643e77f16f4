"""The peak of a KV cache whose sequences grow together and leave one after another."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.kv_peak import expected_remaining, peak_tokens, rounding_scatter_tokens

sequences = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 200)), max_size=12)


def played(given_sequences: list[tuple[int, int]]) -> int:
    """The same peak, by playing every step."""
    live, peak = list(given_sequences), 0
    while live:
        live = [(to_come - 1, now + 1) for to_come, now in live]
        peak = max(peak, sum(now for _, now in live))
        live = [(to_come, now) for to_come, now in live if to_come > 0]
    return peak


@given(sequences)
def test_the_peak_is_what_playing_every_step_shows(given_sequences: list[tuple[int, int]]) -> None:
    """The closed form equals a step-by-step play of the same sequences."""
    assert peak_tokens(given_sequences) == played(given_sequences)


@given(sequences)
def test_the_peak_lies_between_now_and_all_final_sizes(given_sequences: list[tuple[int, int]]) -> None:
    """Never less than what is held now, never more than every sequence at its final size."""
    now = sum(held for _, held in given_sequences)
    assert now <= peak_tokens(given_sequences) <= now + sum(to_come for to_come, _ in given_sequences)


def test_a_sequence_that_outlived_its_prediction_is_expected_to_go_on() -> None:
    """Past its predicted end, a sequence is expected to make a quarter more than it made."""
    assert expected_remaining(100, 40) == 60
    assert expected_remaining(100, 400) == 100
    assert expected_remaining(0, 0) == 1


@pytest.mark.parametrize(("block_tokens", "sequences"), [(16, 200), (128, 10)])
def test_the_scatter_of_last_blocks_covers_nearly_every_draw(block_tokens: int, sequences: int) -> None:
    """Where sequences end anywhere in their last blocks, half a block each and the scatter hold all but a few sums."""
    rng = random.Random(1)
    kv_tokens, allowed = sequences * 512, sequences * block_tokens / 2
    allowed += rounding_scatter_tokens(kv_tokens, block_tokens, 512.0)
    wasted = [sum(rng.uniform(0, block_tokens) for _ in range(sequences)) for _ in range(2000)]
    assert 0.01 < sum(w > allowed for w in wasted) / len(wasted) < 0.05


def test_the_scatter_is_small_beside_any_cache() -> None:
    """It is nothing without a cache, and leaves room for one sequence where one block is all there is."""
    assert rounding_scatter_tokens(0, 0, 0.0) == 0.0
    assert rounding_scatter_tokens(128, 128, 1.0) < 0.6 * 128
    assert rounding_scatter_tokens(195_000, 16, 1500.0) < 0.001 * 195_000
