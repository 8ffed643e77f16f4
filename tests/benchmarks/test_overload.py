"""What the overload benchmark makes of the moments at which tokens came."""

from __future__ import annotations

from benchmarks.overload import Outcome, gaps


def answer(replica: str, *moments_s: float) -> Outcome:
    return Outcome(200, False, moments_s[-1], replica, moments_s)


def test_an_answer_is_passed_over_when_another_of_its_replica_goes_on_meanwhile() -> None:
    """Two answers of one replica stand still at times; the first does while the second has tokens in between."""
    passed_over, stopped, elsewhere = (
        answer("x", 0.0, 0.5, 3.0, 3.5), answer("x", 0.0, 0.4, 1.4, 1.7, 3.1), answer("y", 0.0, 0.5, 2.5),
    )  # fmt: skip
    found = gaps([passed_over, stopped, elsewhere])
    assert found == {"longest_gap_s": 2.5, "over_a_second_without_a_token": 3, "passed_over": 1}


def test_answers_of_one_piece_have_no_gap() -> None:
    """Nor has no answer at all."""
    nothing = {"longest_gap_s": 0.0, "over_a_second_without_a_token": 0, "passed_over": 0}
    assert gaps([answer("x", 1.0)]) == gaps([]) == nothing
