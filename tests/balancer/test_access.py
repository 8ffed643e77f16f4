"""API keys and what each may use: who is let in, when a limit refuses, and when it lets in again."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.access import (
    SHORTEST_SECRET,
    Access,
    Key,
    Keys,
    Limits,
    TokenBucket,
    digest,
    parse_keys,
    presented,
    refusal_of_strangers,
)
from balancer.readings import Decision

ALICE, BOB = "alice-" + "a" * 32, "bob-" + "b" * 32
FILE = f"""
# who        key                       limits
alice {ALICE}
bob   sha256:{hashlib.sha256(BOB.encode()).hexdigest()}   requests_per_minute=2 concurrent=1  # on trial
"""


class Desk:
    """An Access on a clock that stands still until it is told to go on."""

    def __init__(self, limits: Limits, keys: Keys | None = None) -> None:
        self.now_s = 1000.0
        self.keys = keys
        self.access = Access(lambda: self.keys, lambda: self.now_s, limits)

    def ask(self, tokens: int = 1, concurrent: int = 1, secret: str = "") -> Decision | None:
        key = self.access.holder(secret)
        assert key is not None
        return self.access.admit(key, tokens, concurrent)


def test_a_file_names_holders_hashed_or_plain_with_limits_of_their_own() -> None:
    """What the entry does not say is the default."""
    alice, bob = parse_keys(FILE, Limits(requests_per_minute=60, tokens_per_minute=900))
    assert (alice.name, alice.digest, alice.limits) == ("alice", digest(ALICE), Limits(60, 900, None))
    assert (bob.name, bob.digest, bob.limits) == ("bob", digest(BOB), Limits(2, 900, 1))


def test_semicolons_separate_entries_as_lines_do() -> None:
    """The form that fits an environment variable."""
    assert [key.name for key in parse_keys(f"a {ALICE}; b {BOB};", Limits())] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("alice", "entry 1 is not `NAME SECRET`"),
        (f"al/ice {ALICE}", "entry 1 is not `NAME SECRET`"),
        ("alice short", "the secret of `alice` is neither"),
        ("alice sha256:abc", "the secret of `alice` is neither"),
        (f"a {ALICE}\na {BOB}", "entry 2 names `a` a second time"),
        (f"a {ALICE} speed=3", "`speed=3` of `a` is not a limit"),
        (f"a {ALICE} concurrent=0", "`concurrent=0` of `a` is not a limit"),
        (f"a {ALICE} concurrent=x", "`concurrent=x` of `a` is not a limit"),
    ],
)
def test_a_wrong_entry_is_refused_in_words_without_the_secret(text: str, complaint: str) -> None:
    """The message says which entry, and never what the key is."""
    with pytest.raises(ValueError, match=complaint) as refused:
        parse_keys(text, Limits())
    assert ALICE not in str(refused.value)


def test_a_key_does_not_show_its_digest_when_printed() -> None:
    """So that no log has it by accident."""
    assert digest(ALICE).hex() not in repr(Key("alice", digest(ALICE)))
    assert repr(digest(ALICE)) not in repr(Key("alice", digest(ALICE)))


@pytest.mark.parametrize(
    ("authorization", "api_key", "secret"),
    [
        ("Bearer abc", "", "abc"),
        ("bearer  abc ", "", "abc"),
        ("Bearer abc", "def", "abc"),
        ("", "def", "def"),
        ("Basic abc", "def", "def"),
        ("Bearer", "", ""),
        ("abc", "", ""),
        ("", "", ""),
    ],
)
def test_the_secret_is_a_bearer_token_or_an_api_key_header(authorization: str, api_key: str, secret: str) -> None:
    """As OpenAI's and Anthropic's clients send it."""
    assert presented(authorization, api_key) == secret


def test_only_the_holder_of_a_key_enters() -> None:
    """Each by his own key; no key, a prefix of one, the digest itself and another's name are strangers."""
    desk = Desk(Limits(), parse_keys(FILE, Limits()))
    for secret, name in ((ALICE, "alice"), (BOB, "bob")):
        key = desk.access.holder(secret)
        assert key is not None
        assert key.name == name
    for stranger in ("", "alice", ALICE[:-1], ALICE + "x", digest(ALICE).hex(), "\ud800"):
        assert desk.access.holder(stranger) is None
    assert refusal_of_strangers().status == 401


def test_without_keys_everybody_is_one_holder_with_the_default_limits() -> None:
    """The limits hold for all requests together."""
    desk = Desk(Limits(requests_per_minute=2))
    assert desk.ask(secret="") is None
    assert desk.ask(secret="anything") is None
    assert desk.ask(secret="else") is not None


def test_without_limits_nothing_is_refused() -> None:
    """The default."""
    desk = Desk(Limits())
    assert {desk.ask(tokens=10**9, concurrent=10**6) for _ in range(1000)} == {None}


def test_requests_beyond_the_rate_wait_exactly_as_long_as_they_are_told() -> None:
    """A minute's worth at once, then one each time the rate allows one; a refusal costs nothing."""
    desk = Desk(Limits(requests_per_minute=30))
    assert [desk.ask() for _ in range(30)] == [None] * 30
    for _ in range(5):
        refused = desk.ask()
        assert refused is not None
        assert (refused.status, refused.reason) == (429, "request_rate")
        assert refused.retry_after_s == pytest.approx(2.0)
    desk.now_s += 1.999
    assert desk.ask() is not None
    desk.now_s += 0.0011
    assert desk.ask() is None
    assert desk.ask() is not None


def test_tokens_beyond_the_rate_are_refused_and_do_not_use_up_requests() -> None:
    """Both limits are asked before either is charged."""
    desk = Desk(Limits(requests_per_minute=2, tokens_per_minute=600))
    assert desk.ask(tokens=500) is None
    refused = desk.ask(tokens=400)
    assert refused is not None
    assert (refused.reason, refused.retry_after_s) == ("token_rate", pytest.approx(30.0))
    assert desk.ask(tokens=100) is None
    assert desk.ask(tokens=0) is not None  # now the requests are used up: the refused one was not counted


def test_a_request_dearer_than_a_minute_passes_when_the_bucket_is_full() -> None:
    """And its holder pays for it afterwards, instead of being refused for ever."""
    desk = Desk(Limits(tokens_per_minute=100))
    assert desk.ask(tokens=250) is None
    desk.now_s += 60.0
    refused = desk.ask(tokens=1)
    assert refused is not None
    assert refused.retry_after_s == pytest.approx(30.6)


def test_too_many_at_once_is_refused_before_any_rate_is_charged() -> None:
    """The number counts the request itself."""
    desk = Desk(Limits(requests_per_minute=1, concurrent=2))
    refused = desk.ask(concurrent=3)
    assert refused is not None
    assert (refused.status, refused.reason) == (429, "too_many_at_once")
    assert desk.ask(concurrent=2) is None


def test_one_holder_does_not_use_up_anothers_limits() -> None:
    """Each key has buckets of its own."""
    desk = Desk(Limits(), parse_keys(f"a {ALICE}\nb {BOB}", Limits(requests_per_minute=1)))
    assert desk.ask(secret=ALICE) is None
    assert desk.ask(secret=ALICE) is not None
    assert desk.ask(secret=BOB) is None


def test_changed_limits_are_effective_at_once_and_unchanged_ones_keep_their_count() -> None:
    """As when the file of keys is read again; a key taken out of it is a stranger's from then on."""
    desk = Desk(Limits(), parse_keys(f"a {ALICE} requests_per_minute=1", Limits()))
    assert desk.ask(secret=ALICE) is None
    desk.keys = parse_keys(f"a {ALICE} requests_per_minute=1\nb {BOB}", Limits())
    assert desk.ask(secret=ALICE) is not None
    desk.keys = parse_keys(f"a {ALICE} requests_per_minute=3\nb {BOB}", Limits())
    assert desk.ask(secret=ALICE) is None
    desk.keys = parse_keys(f"b {BOB}", Limits())
    assert desk.access.holder(ALICE) is None


def test_doors_that_count_for_themselves_share_the_limits() -> None:
    """Three replicas without a common router let in as much as one would; nobody gets a limit of 0."""
    assert Limits(30, None, 4).shared_by(3) == Limits(10, None, 2)
    assert Limits().shared_by(3) == Limits()
    by_file = parse_keys(f"a {ALICE} requests_per_minute=6", Limits())
    doors = [Access(lambda: by_file, lambda: 0.0, doors=3) for _ in range(3)]
    assert sum(door.admit(by_file[0], 1) is None for door in doors for _ in range(6)) == 6


@given(
    per_minute=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(0, 2000)), min_size=1, max_size=50),
)
def test_no_more_flows_than_the_rate_and_one_bucket(per_minute: int, steps: list[tuple[float, int]]) -> None:
    """Whatever is asked when: taken by a time is at most a bucket, the flow since, and the last request."""
    bucket, now_s, taken, dearest = TokenBucket(per_minute, 0.0), 0.0, 0, 0
    for pause_s, cost in steps:
        now_s += pause_s
        if bucket.wait_s(cost, now_s) == 0.0:
            bucket.take(cost)
            taken, dearest = taken + cost, max(dearest, cost)
        assert taken <= per_minute + now_s * per_minute / 60 + dearest + 1e-6


@given(st.text())
def test_no_text_makes_the_parser_raise_anything_but_its_own_complaint(text: str) -> None:
    """A file of keys is written by hand."""
    try:
        keys = parse_keys(text, Limits())
    except ValueError:
        return
    assert all(len(key.digest) == 32 for key in keys)


def test_the_shortest_secret_is_long_enough_for_a_random_one() -> None:
    """16 random characters of 64 kinds are 96 bits."""
    assert SHORTEST_SECRET >= 16
