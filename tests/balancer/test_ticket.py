"""The ticket: what the router tells the replica survives HAProxy, and a forged one is turned down."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.board import ROUTER_ROWS
from balancer.ticket import DIRECT, NO_ROW, Ticket

WORD = st.from_regex(r"[A-Za-z0-9_.:-]{1,30}", fullmatch=True)
TICKETS = st.builds(
    Ticket,
    policy=WORD,
    reason=WORD,
    row=st.integers(NO_ROW, ROUTER_ROWS - 1),
    tokens=st.integers(1 << 20, 1 << 40),
    output_tokens=st.integers(0, 1 << 20),
    status=st.sampled_from([200, 400, 413, 429, 503]),
    retry_after_s=st.integers(0, 10_000_000).map(lambda ms: ms / 1000),
    probe=st.booleans(),
    sequences=st.integers(0, 1 << 16),
)


@given(TICKETS)
def test_a_ticket_comes_back_as_it_was_written(ticket: Ticket) -> None:
    """What is decoded is what was encoded."""
    assert Ticket.decode(ticket.encode()) == ticket


@given(st.text(), st.text())
def test_a_policys_words_never_break_the_header(policy: str, reason: str) -> None:
    """Whatever a policy calls itself or its reason, the header stays one plain line and can be decoded."""
    text = Ticket(policy, reason, row=2, tokens=5).encode()
    assert re.fullmatch(r"[A-Za-z0-9_.: -]+", text)
    assert (Ticket.decode(text).row, Ticket.decode(text).tokens) == (2, 5)


@pytest.mark.parametrize(
    "text",
    [
        "", "direct", "a b 0 1 200 0.0 0 0", "a b 0 1 200 0.0 0 0 0 0",
        "a b x 1 200 0.0 0 0 1", "a b 0 1.5 200 0.0 0 0 1",
        f"a b {ROUTER_ROWS} 1 200 0.0 0 0 1", "a b -2 1 200 0.0 0 0 1", "a b 0 -1 200 0.0 0 0 1",
        f"a b 0 {1 << 64} 200 0.0 0 0 1", "a b 0 1 99 0.0 0 0 1", "a b 0 1 302 0.0 0 0 1", "a b 0 1 200 nan 0 0 1",
        "a b 0 1 200 inf 0 0 1", "a b 0 1 200 0.0 0 2 1", "a b 0 1 200 0.0 0 -1 1", "a b 0 1 200 0.0 0 0 -1",
        f"a b 0 1 200 0.0 0 0 {1 << 32}",
    ],
)  # fmt: skip
def test_what_no_router_writes_is_no_ticket(text: str) -> None:
    """A malformed or impossible ticket is a ValueError, so that a forged header can never corrupt a slot."""
    with pytest.raises(ValueError, match=r"."):
        Ticket.decode(text)


@given(st.text())
def test_any_text_is_a_ticket_or_a_value_error(text: str) -> None:
    """Decoding garbage ends in a ticket with possible numbers or a ValueError, never in anything else."""
    try:
        ticket = Ticket.decode(text)
    except ValueError:
        return
    assert NO_ROW <= ticket.row < ROUTER_ROWS


def test_asked_directly_belongs_to_no_router() -> None:
    """A request sent straight to a replica serves, counts for no row and promises no tokens."""
    assert (DIRECT.row, DIRECT.tokens, DIRECT.status) == (NO_ROW, 0, 200)
