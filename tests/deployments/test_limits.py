"""The limits of an answer, on a simulated clock: each fires alone."""

from __future__ import annotations

import math

import pytest

from deployments.limits import Limit, Limits, Watch, client_seconds

LIMITS = Limits(first_token_s=10.0, between_tokens_s=4.0, total_s=100.0)


def first_over(watch: Watch, from_s: float) -> tuple[float, Limit | None]:
    """When the next limit runs out if nothing more happens, and which."""
    at_s = watch.next_s
    assert at_s > from_s
    assert watch.over(at_s - 0.001) is None
    return at_s, watch.over(at_s)


def test_a_stream_that_never_begins_misses_its_first_token() -> None:
    """Counted from the request's arrival, not from the headers."""
    watch = Watch(LIMITS, began_s=50.0)
    watch.hold()
    watch.go_on(53.0, token=False)
    watch.streams()
    assert first_over(watch, 53.0) == (60.0, Limit.FIRST_TOKEN)


def test_an_answer_sent_whole_lives_while_the_engine_steps() -> None:
    """Nothing of it is seen before its end; a silent engine still is."""
    watch = Watch(LIMITS, began_s=0.0)
    for second in range(1, 60):
        watch.engine_stepped(float(second))
        assert watch.over(second + 9.0) is None
    assert first_over(watch, 59.0) == (69.0, Limit.FIRST_TOKEN)


def test_a_stream_that_stalls_misses_the_next_token() -> None:
    """Each token allows for another; the first token's limit no longer counts."""
    watch = Watch(LIMITS, began_s=0.0)
    watch.streams()
    for second in (9.0, 12.0, 15.9):
        assert watch.over(second) is None
        watch.go_on(second, token=True)
    assert first_over(watch, 15.9) == (19.9, Limit.BETWEEN_TOKENS)


def test_a_stream_that_never_ends_meets_the_total() -> None:
    """However steady its tokens are."""
    watch = Watch(LIMITS, began_s=0.0)
    watch.streams()
    for second in range(1, 100):
        watch.go_on(float(second), token=True)
        assert watch.over(second + 0.5) is None
    assert watch.over(100.0) is Limit.TOTAL


def test_the_clients_own_time_counts_when_it_is_shorter() -> None:
    """And is named as the client's, not as the server's."""
    assert first_over(Watch(LIMITS, began_s=5.0, client_s=2.0), 5.0) == (7.0, Limit.CLIENT)
    slow = Watch(Limits(1e6, 1e6, 100.0), began_s=5.0, client_s=200.0)
    assert first_over(slow, 5.0) == (105.0, Limit.TOTAL)


def test_a_client_that_does_not_read_is_not_the_engines_silence() -> None:
    """While something is being sent only the total counts; then the next token is due anew."""
    watch = Watch(LIMITS, began_s=0.0)
    watch.streams()
    watch.go_on(1.0, token=True)
    watch.hold()
    assert watch.next_s == 100.0
    assert watch.over(99.9) is None
    watch.go_on(90.0, token=True)
    assert first_over(watch, 90.0) == (94.0, Limit.BETWEEN_TOKENS)


def test_only_silence_is_the_engines_fault() -> None:
    """A long answer or an impatient client says nothing against the replica."""
    assert {limit for limit in Limit if limit.blames_engine} == {Limit.FIRST_TOKEN, Limit.BETWEEN_TOKENS}
    assert len({limit.code for limit in Limit}) == len(Limit)


@pytest.mark.parametrize(
    ("header", "waited_s", "left_s"),
    [(b"5", 0.0, 5.0), (b"5", 2.0, 3.0), (b"5", 9.0, 0.0), (b"0.5", 0.0, 0.5)]
    + [(text, 1.0, math.inf) for text in (None, b"", b"x", b"nan", b"inf", b"-3", b"0", b"1e999")],
)
def test_a_clients_header(header: bytes | None, waited_s: float, left_s: float) -> None:
    """The queue is part of the client's time; what makes no sense is no limit."""
    assert client_seconds(header, waited_s) == left_s
