"""The hint: what HAProxy composes from a client's headers, and what the route service makes of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from balancer.hint import CLIENT_HEADERS, MOST_PRIORITY, NO_HINT, Hint, haproxy_rule


def test_every_field_arrives_as_the_client_wrote_it() -> None:
    """Percent signs as HAProxy's `url_enc` writes them are undone."""
    text = "session=a%20b&priority=-3&explain=1&timeout=2.5&authorization=Bearer%20k%26y"
    assert Hint.decode(text) == Hint("a b", -3, True, 2.5, "Bearer k&y")


def test_absent_headers_are_no_hint() -> None:
    """HAProxy writes an empty value for a header that the client did not send."""
    assert Hint.decode("session=&priority=&explain=&timeout=&authorization=") == NO_HINT


def test_nonsense_counts_as_not_written() -> None:
    """A priority that is no number, a timeout that is none or not positive, an explanation refused."""
    assert Hint.decode("priority=high&timeout=-1&explain=0") == NO_HINT
    assert Hint.decode("timeout=inf") == Hint.decode("timeout=nan") == NO_HINT
    assert Hint.decode("priority=999999").priority == MOST_PRIORITY


@given(st.text())
def test_no_text_at_all_makes_it_raise(text: str) -> None:
    """Clients write parts of it."""
    assert -MOST_PRIORITY <= Hint.decode(text).priority <= MOST_PRIORITY


def test_the_rule_takes_over_every_header_once() -> None:
    """Each client header stands in the rule under its short name."""
    rule = haproxy_rule()
    assert rule.count("path=%[path,url_enc]") == 1
    assert all(rule.count(f"{short}=%[req.hdr({header}),url_enc]") == 1 for short, header in CLIENT_HEADERS.items())


def test_the_path_travels_and_a_part_of_a_batch_says_so() -> None:
    """Only at the router's own port: what HAProxy composes names no part, whatever a client's headers say."""
    assert Hint.decode("path=%2Fv1%2Fcompletions&session=&priority=&explain=&timeout=&authorization=") == Hint(
        path="/v1/completions"
    )
    assert Hint.decode("part=1&path=/v1/completions&priority=4") == Hint(priority=4, path="/v1/completions", part=True)
    assert "part" not in haproxy_rule()
    assert not Hint.decode("session=x%26part%3D1&path=%2F").part
