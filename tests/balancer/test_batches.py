"""A batch's parts: what is split, how it is cut, and that no prompt is lost, doubled or out of order on any way."""

from __future__ import annotations

import heapq
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.batches import (
    ATTEMPTS,
    COMPLETIONS,
    Part,
    Room,
    WorkList,
    headroom,
    read_batch,
    sequence_tokens,
    sequences_announced,
)
from balancer.readings import ReplicaReading, ReplicaState, Snapshot

PROMPTS = ["one", "two", "three", "four"]
AMPLE = Room(sequences=1 << 20, tokens=1 << 40, replicas=4.0)
ROOMS = st.builds(
    Room, st.integers(0, 40), st.integers(0, 5000), st.floats(1.0, 16.0, allow_nan=False, allow_infinity=False)
)
WORK = st.lists(st.integers(1, 400), min_size=1, max_size=60)


def reading(slot: int, requests: int = 0, tokens: int = 0, **more: Any) -> ReplicaReading:
    """A replica of 64 places and 1,600 tokens."""
    empty: dict[str, Any] = dict.fromkeys(
        (
            "on_the_way_requests", "on_the_way_tokens", "running_requests", "waiting_requests", "kv_blocks_used",
            "prompt_tokens_total", "output_tokens_total", "preemptions_total", "received_total", "finished_total",
        ), 0,
    )  # fmt: skip
    known: dict[str, Any] = {
        "slot": slot, "replica_id": f"r{slot}", "gpu": 0, "state": ReplicaState.READY, "written_at_s": 10.0,
        "in_flight_requests": requests, "in_flight_tokens": tokens, "kv_blocks_total": 100, "kv_block_tokens": 16,
        "max_running_requests": 64, "step_time_s": 0.0,
    }  # fmt: skip
    return ReplicaReading(**{**empty, **known, **more})


def test_a_list_of_prompts_is_a_batch_from_the_threshold_on() -> None:
    """Text or token ids, whatever `n`; a part is the same request with fewer prompts."""
    batch = read_batch({"model": "m", "prompt": PROMPTS, "n": 2, "stream": True}, threshold=4)
    assert batch is not None
    assert (batch.sequences, batch.n, batch.stream) == (8, 2, True)
    assert batch.part(Part(1, 1, 3)) == {"model": "m", "prompt": ["two", "three"], "n": 2, "stream": True}
    assert read_batch({"prompt": [[1, 2], [3], [4, 5], [6]]}, threshold=4) is not None
    assert read_batch({"prompt": PROMPTS}, threshold=5) is None


@pytest.mark.parametrize(
    "body",
    [
        {}, {"prompt": "one"}, {"prompt": []}, {"prompt": [1, 2, 3, 4]}, {"prompt": ["a", [1], "b", "c"]},
        {"prompt": [{}, {}, {}, {}]}, {"prompt": PROMPTS, "n": "2"}, {"prompt": PROMPTS, "n": 0},
        {"prompt": PROMPTS, "n": None}, {"prompt": PROMPTS, "n": True}, {"prompt": PROMPTS, "stream": "yes"},
        {"prompt": PROMPTS, "prompt_embeds": "x"}, {"prompt": PROMPTS, "kv_transfer_params": {}},
    ],
)  # fmt: skip
def test_what_an_engine_should_judge_as_a_whole_is_no_batch(body: dict[str, Any]) -> None:
    """Single prompts, mixed lists, odd numbers, and fields that tie a request to one engine."""
    assert read_batch(body, threshold=2) is None


@pytest.mark.parametrize(
    ("body", "path", "sequences"),
    [
        ({"prompt": PROMPTS, "n": 3}, COMPLETIONS, 12),
        ({"prompt": PROMPTS}, "", 4),
        ({"prompt": [[1], [2], [3], [4]]}, COMPLETIONS, 4),
        ({"prompt": PROMPTS}, "/v1/embeddings", 0),
        ({"prompt": PROMPTS[:3]}, COMPLETIONS, 0),
        ({"prompt": PROMPTS, "messages": []}, "", 0),
        ({"prompt": 'say "prompt": ["a", "b", "c", "d"]'}, COMPLETIONS, 0),
    ],
)
def test_the_router_sees_a_batch_in_the_body_alone(body: Any, path: str, sequences: int) -> None:
    """It announces its sequences; a prompt that only speaks of lists is none."""
    assert sequences_announced(json.dumps(body).encode(), path, threshold=4) == sequences
    assert sequences_announced(json.dumps(body).encode(), path, threshold=0) == 0


def test_a_body_cut_short_counts_as_a_batch_when_it_begins_like_one() -> None:
    """HAProxy shows the router only the first megabyte: the replica then sees the whole."""
    body = json.dumps({"model": "m", "prompt": ["x" * 100] * 50}).encode()
    assert sequences_announced(body[:2000], COMPLETIONS, threshold=8) == 1
    assert sequences_announced(json.dumps({"prompt": "x" * 5000}).encode()[:2000], COMPLETIONS, threshold=8) == 0


@settings(deadline=None)
@given(st.binary())
def test_no_body_at_all_makes_the_router_raise(body: bytes) -> None:
    """Anything may be posted."""
    assert sequences_announced(b'{"prompt": ["' + body, "", threshold=2) >= 0


def test_prompts_are_weighed_by_their_length_and_their_answers() -> None:
    """Text by its letters, token ids exactly, each with its cap for each choice (vLLM's own where none is named)."""
    batch = read_batch({"prompt": ["x" * 40, "y" * 4], "max_tokens": 5, "n": 2}, threshold=2)
    ids = read_batch({"prompt": [[1] * 7, [2] * 9]}, threshold=2)
    assert batch is not None
    assert ids is not None
    assert (sequence_tokens(batch), sequence_tokens(ids)) == ([20, 11], [23, 25])


def test_headroom_is_what_the_widest_replica_can_take() -> None:
    """Places and KV tokens less the reserve, and how many such replicas the rest amounts to; stale ones have none."""
    fresh = (reading(0), reading(1, requests=60, tokens=840), reading(2, written_at_s=1.0))
    room = headroom(Snapshot(10.0, fresh), stale_after_s=2.0, kv_reserve_ratio=0.05)
    assert (room.sequences, room.tokens) == (64, 1520)
    assert room.replicas == pytest.approx(1.0 + 680 / 1520)
    assert headroom(Snapshot(10.0, ()), 2.0, 0.05) == Room(0, 0, 1.0)


def test_parts_shrink_towards_the_end() -> None:
    """With room for everything each part is half of a replica's share of what is left, down to single prompts."""
    work = WorkList([10] * 160)
    sizes = [len(part) for part in iter(lambda: work.cut(AMPLE), None)]
    assert sizes[0] == 20
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-4:] == [1, 1, 1, 1]
    assert sum(sizes) == 160


@settings(deadline=None)
@given(WORK, ROOMS, st.integers(1, 4))
def test_a_part_fits_the_room_or_is_a_single_prompt(tokens: list[int], room: Room, n: int) -> None:
    """Never more sequences or tokens than one replica has room for; a prompt too big for all goes alone."""
    part = WorkList(tokens, n).cut(room)
    assert part is not None
    alone = len(part) == 1
    assert alone or n * len(part) <= room.sequences
    assert alone or sum(tokens[part.first : part.end]) <= room.tokens


@settings(deadline=None)
@given(WORK, st.integers(0, 1 << 32))
def test_no_prompt_is_lost_or_doubled_under_any_order_of_what_may_happen(tokens: list[int], seed: int) -> None:
    """Parts finish, are refused and fail in any order: at each moment every prompt is in exactly one place, none is
    tried more than twice, and in the end each was finished exactly once."""
    rng, work, out, finished = random.Random(seed), WorkList(tokens), list[Part](), list[int]()
    while not work.finished:
        handed_out = [index for part in out for index in range(part.first, part.end)]
        assert sorted(waiting(work) + handed_out + finished) == list(range(len(tokens)))
        if not out or rng.random() < 0.5:
            part = work.cut(Room(rng.randint(0, 40), rng.randint(0, 5000), rng.uniform(1.0, 16.0)))
            out += [part] if part else []
            continue
        part, fate = out.pop(rng.randrange(len(out))), rng.choice(["finish", "finish", "refuse", "fail"])
        if fate == "fail" and part.attempt < ATTEMPTS:
            assert work.fail(part)
        elif fate == "refuse":
            work.give_back(part)
        else:
            work.finish(part)
            finished += range(part.first, part.end)
    assert sorted(finished) == list(range(len(tokens)))
    assert (work.left, work.out) == (0, 0)


def waiting(work: WorkList) -> list[int]:
    return [index for first, end, _ in work._spans for index in range(first, end)]


def test_a_part_that_fails_twice_ends_the_batch() -> None:
    """The second failure is refused, and the prompts stay accounted for; a refusal costs no attempt."""
    work = WorkList([1, 1])
    part = work.cut(AMPLE)
    assert part is not None
    work.give_back(part)
    part = work.cut(AMPLE)
    assert part is not None
    assert part.attempt == 1
    assert work.fail(part)
    again = work.cut(AMPLE)
    assert again is not None
    assert (again.attempt, again.first) == (2, part.first)
    assert not work.fail(again)
    with pytest.raises(KeyError):
        work.finish(part)


@pytest.mark.parametrize("speeds", [(1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 0.5), (1.0, 0.8, 0.6, 0.4)])
@pytest.mark.parametrize("prompts", [160, 640])
def test_no_replica_holds_the_end_whatever_its_speed(speeds: tuple[float, ...], prompts: int) -> None:
    """Replicas that take a part when they have room, with answers of very different length: the last of them ends
    within 5 % of the mean, where equal shares would have left the slowest far behind."""
    rng = random.Random(5)
    tokens = [rng.randint(20, 400) for _ in range(prompts)]
    ends = [end / (sum(tokens) / sum(speeds)) for end in simulated(tokens, speeds)]
    equal = [sum(tokens[k :: len(speeds)]) / speed / (sum(tokens) / sum(speeds)) for k, speed in enumerate(speeds)]
    assert max(ends) <= 1.05 * sum(ends) / len(ends)
    assert max(ends) <= max(equal) + 0.02


def simulated(tokens: list[int], speeds: tuple[float, ...]) -> list[float]:
    """When each replica has worked off its parts, if a part goes to whoever is free first."""
    work = WorkList(tokens)
    free = [(0.0, k) for k in range(len(speeds))]
    ends = [0.0] * len(speeds)
    while part := work.cut(Room(64, 1 << 30, float(len(speeds)))):
        now, k = heapq.heappop(free)
        ends[k] = now + sum(tokens[part.first : part.end]) / speeds[k]
        heapq.heappush(free, (ends[k], k))
    return ends
