"""The cost of a request from its body: right for the APIs' shapes, harmless for anything else, corrected by engines."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.cost import CostEstimator, tempered_cap
from balancer.knobs import Knobs
from balancer.readings import ReplicaReading, ReplicaState, RequestCost, Snapshot


def estimate(body: Any, estimator: CostEstimator | None = None) -> RequestCost:
    return (estimator or CostEstimator(Knobs())).estimate(json.dumps(body).encode())


def reported(prompt_tokens: int, output_tokens: int, requests: int, in_flight: int = 0) -> Snapshot:
    """What engines would show after `requests` requests in all."""
    reading = ReplicaReading(
        0, "a", 0, ReplicaState.READY, 0.0, in_flight, 0, 0, 0, 0, 0, 0, 100, 16, 8, 0.0,
        prompt_tokens, output_tokens, 0, requests, requests,
    )  # fmt: skip
    return Snapshot(0.0, (reading,))


def test_text_counts_by_its_bytes() -> None:
    """A completion's prompt of 400 ASCII characters is taken for about 100 tokens."""
    assert estimate({"prompt": "abcd" * 100}).prompt_tokens == 100


def test_text_outside_ascii_counts_by_its_bytes_not_its_characters() -> None:
    """Chinese text needs about a token a character, and counts three quarters of one, not a quarter."""
    assert estimate({"prompt": "语" * 400}).prompt_tokens == 300


def test_token_ids_count_exactly() -> None:
    """A prompt given as token ids has as many tokens as ids."""
    assert estimate({"prompt": list(range(777))}).prompt_tokens == 777


def test_several_prompts_are_several_answers() -> None:
    """A list of prompts asks for `n` answers to each, and their tokens add up."""
    cost = estimate({"prompt": [[1, 2, 3], [4, 5]], "n": 3, "max_tokens": 7})
    assert (cost.prompt_tokens, cost.sequences, cost.output_tokens) == (5, 6, 7)


def test_chat_messages_count_their_text_and_their_frame() -> None:
    """A chat counts the text of its messages, in parts or not, and a few tokens around each message."""
    plain = estimate({"messages": [{"role": "user", "content": "x" * 400}]})
    parts = estimate({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 400}]}]})
    assert 100 <= plain.prompt_tokens <= 110
    assert 0 <= parts.prompt_tokens - plain.prompt_tokens <= 2


def test_a_picture_is_not_read_as_text() -> None:
    """A base64 picture of a megabyte costs hundreds of tokens, not hundreds of thousands."""
    url = {"url": "data:image/png;base64," + "A" * 1_000_000}
    cost = estimate({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]})
    assert 500 <= cost.prompt_tokens <= 700


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_a_cap_is_believed_until_answers_were_seen(key: str) -> None:
    """Before any history, the expected output is the client's cap."""
    assert estimate({"prompt": "hi", key: 123}).output_tokens == 123


def test_the_newer_name_of_the_cap_wins() -> None:
    """`max_completion_tokens` is used when both are given, as vLLM does."""
    assert estimate({"prompt": "hi", "max_tokens": 9, "max_completion_tokens": 5}).output_tokens == 5


def test_caps_nobody_means_are_tempered_by_history() -> None:
    """After answers of 50 tokens to requests capped at 4,096, the next such request is expected to make about 50."""
    estimator = CostEstimator(Knobs())
    estimator.learn(reported(0, 0, 0))
    for _ in range(100):
        estimate({"prompt": "word " * 40, "max_tokens": 4096}, estimator)
    estimator.learn(reported(100 * 50, 100 * 50, 100))
    assert estimate({"prompt": "hi", "max_tokens": 4096}, estimator).output_tokens == pytest.approx(50, abs=2)
    assert estimate({"prompt": "hi", "max_tokens": 10}, estimator).output_tokens == 10


def test_short_answers_that_end_first_do_not_stand_for_their_generation() -> None:
    """A hundred clients that began together get answers of 100 to 200 steps: after two generations the mean stays."""
    rng, estimator = random.Random(1), CostEstimator(Knobs())
    estimator.learn(reported(0, 0, 0))
    left = [rng.randint(100, 200) for _ in range(100)]
    ended, means = 0, []
    for step in range(1, 2001):
        left = [steps - 1 for steps in left]
        for client in [client for client, steps in enumerate(left) if steps == 0]:
            estimate({"prompt": "hi", "max_tokens": 1000}, estimator)
            left[client] = rng.randint(100, 200)
            ended += 1
        estimator.learn(reported(ended, 100 * step, ended, in_flight=100))
        means += [estimator.mean_output] if ended > 250 else []
    assert means == pytest.approx([150] * len(means), rel=0.08)


def test_caps_that_clients_mean_stay_what_they_are() -> None:
    """When answers are as long as their caps, short and long, every cap is believed."""
    estimator = CostEstimator(Knobs())
    estimator.learn(reported(0, 0, 0))
    for i in range(100):
        estimate({"prompt": "hi", "max_tokens": 1000 if i % 2 else 20}, estimator)
    estimator.learn(reported(100, 100 * 510, 100))
    assert estimate({"prompt": "hi", "max_tokens": 1000}, estimator).output_tokens == 1000


def test_the_ratio_of_bytes_to_tokens_follows_what_engines_report() -> None:
    """When prompts of 400 bytes turn out to be 200 tokens, estimates approach two bytes a token."""
    estimator = CostEstimator(Knobs())
    for updates in range(21):
        estimator.learn(reported(200 * 30 * updates, 30 * 10 * updates, 30 * updates))
        for _ in range(30):
            estimate({"prompt": "abcd" * 100}, estimator)
    assert estimate({"prompt": "abcd" * 100}, estimator).prompt_tokens == pytest.approx(200, rel=0.05)


def test_a_replica_that_starts_anew_teaches_nothing() -> None:
    """Counters that went down belong to another life and are not subtracted from."""
    estimator = CostEstimator(Knobs())
    estimator.learn(reported(10_000, 10_000, 500))
    estimator.learn(reported(1, 1, 1))
    assert estimator.mean_output is None


def test_the_same_start_has_the_same_fingerprint_and_another_another() -> None:
    """Prompts that share their first kilobyte share a fingerprint, whatever follows."""
    system = "You are helpful. " * 100
    one, two = estimate({"prompt": system + "one"}), estimate({"prompt": system + "two"})
    assert one.prefix == two.prefix != 0
    assert estimate({"prompt": "Z" + system}).prefix != one.prefix
    assert estimate({}).prefix == 0


@pytest.mark.parametrize("n", [0, -3, "x", None, True, [], float("nan"), 1e400, 2.5])
def test_an_impossible_n_counts_as_few(n: Any) -> None:
    """Whatever stands in `n`, the number of sequences stays a small whole number."""
    assert estimate({"prompt": "hi", "n": n}).sequences in (1, 2)


def test_a_body_nested_without_end_is_survived() -> None:
    """A hundred thousand opening brackets are neither a crash nor a large request."""
    cost = CostEstimator(Knobs()).estimate(b'{"prompt":' + b"[" * 100_000)
    assert cost.prompt_tokens == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
KEYS = ["prompt", "messages", "input", "n", "max_tokens", "max_completion_tokens", "tools", "content", "image_url"]


@given(st.dictionaries(st.sampled_from(KEYS), json_values) | json_values)
def test_any_json_has_a_cost(body: Any) -> None:
    """No JSON value of any shape raises; every cost has at least a token of prompt, of output, and one sequence."""
    cost = estimate(body)
    assert min(cost.prompt_tokens, cost.output_tokens, cost.sequences) >= 1


@pytest.mark.parametrize("key", ["max_tokens", "n", "max_completion_tokens"])
def test_a_number_beyond_all_floats_is_only_a_large_number(key: str) -> None:
    """JSON may hold an integer that no float can: the engine refuses it, the estimate does not fail."""
    cost = CostEstimator(Knobs()).estimate(json.dumps({"prompt": "x", key: 10**400}))
    assert cost.tokens > 0


@given(st.binary())
def test_any_bytes_have_a_cost(body: bytes) -> None:
    """No bytes raise, JSON or not."""
    assert CostEstimator(Knobs()).estimate(body).prompt_tokens >= 1


@given(st.lists(st.floats(1, 1e6) | st.just(math.inf), min_size=1), st.floats(1, 1e5))
def test_caps_cut_to_their_level_average_what_was_observed(caps: list[float], mean_output: float) -> None:
    """The tempered level reproduces the mean output, or is infinite where even whole caps stay below it."""
    level = tempered_cap(caps, mean_output)
    mean_cut = sum(min(cap, level) for cap in caps) / len(caps)
    assert mean_cut == pytest.approx(mean_output, rel=1e-6) if math.isfinite(level) else mean_cut <= mean_output * 1.001


def test_expected_output_is_that_of_one_answer_however_many_a_request_has() -> None:
    """Requests for twenty prompts of ten tokens each teach ten tokens, not two hundred."""
    estimator = CostEstimator(Knobs())
    estimator.learn(reported(0, 0, 0))
    for _ in range(50):
        estimate({"prompt": ["hi"] * 20, "max_tokens": 500}, estimator)
    estimator.learn(reported(100, 50 * 20 * 10, 50))
    assert estimator.mean_output == pytest.approx(10)
