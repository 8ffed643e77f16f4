"""Answers to parts put together: the same as the answer of one engine to the whole, whole or streamed."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.batches import Part
from balancer.merge import Identity, MergedStream, MergeError, PartStream, merge_answers

ME = Identity("cmpl-me", 1700000000)
TEXTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=12)
CUTS = st.lists(st.integers(0, 12), max_size=6)


def parts_of(count: int, cuts: list[int]) -> list[Part]:
    """The prompts 0..count-1 cut at these places."""
    edges = sorted({0, count, *(cut for cut in cuts if cut < count)})
    return [Part(k, first, end) for k, (first, end) in enumerate(itertools.pairwise(edges))]


def usage(prompts: int, n: int, texts: list[str]) -> dict[str, Any]:
    made = n * sum(map(len, texts))
    return {"prompt_tokens": 3 * prompts, "completion_tokens": made, "total_tokens": 3 * prompts + made,
            "prompt_tokens_details": None}  # fmt: skip


def choice(index: int, text: str) -> dict[str, Any]:
    logprobs = {"tokens": list(text), "token_logprobs": [-0.25] * len(text)}
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": "stop", "stop_reason": None}


def engine(identity: Identity, texts: list[str], n: int) -> dict[str, Any]:
    """What an engine answers to these prompts: each choice repeats its prompt."""
    choices = [choice(n * i + j, text) for i, text in enumerate(texts) for j in range(n)]
    return {"id": identity.id, "object": "text_completion", "created": identity.created, "model": "m",
            "choices": choices, "service_tier": None, "system_fingerprint": "f", "usage": usage(len(texts), n, texts),
            "kv_transfer_params": None, "metrics": None}  # fmt: skip


@settings(deadline=None)
@given(TEXTS, CUTS, st.integers(1, 3), st.randoms())
def test_merged_answers_equal_the_unsplit_one(texts: list[str], cuts: list[int], n: int, rng: Any) -> None:
    """Whatever the parts and the order in which they were answered: choices, indices, usage, all other fields."""
    answers = [
        (part, engine(Identity(f"cmpl-{part.number}", 5), texts[part.first : part.end], n))
        for part in parts_of(len(texts), cuts)
    ]
    rng.shuffle(answers)
    assert merge_answers(answers, n, ME) == engine(ME, texts, n)


def test_what_describes_one_generation_is_left_out() -> None:
    """A part of one prompt may carry its own timing; a batch has none, as in vLLM."""
    answer = {**engine(Identity("x", 1), ["a"], 1), "metrics": {"time": 1}}
    assert merge_answers([(Part(1, 0, 1), answer)], 1, ME)["metrics"] is None


@pytest.mark.parametrize("document", [{}, {"choices": []}, {"choices": None}, {"choices": [{"index": 0}] * 3}])
def test_an_answer_with_another_number_of_choices_is_none(document: dict[str, Any]) -> None:
    """A part of two prompts with two choices too few, or one too many, cannot be put in order."""
    with pytest.raises(MergeError, match="2 choices"):
        merge_answers([(Part(1, 0, 2), document)], 1, ME)


def event(document: dict[str, Any]) -> bytes:
    """As pydantic writes it."""
    return b"data: " + json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def chunks(identity: Identity, texts: list[str], n: int, with_usage: bool) -> list[bytes]:
    """An engine's stream: one chunk for each letter, round and round, then usage."""
    head = {"id": identity.id, "object": "text_completion", "created": identity.created, "model": 'm,"ö'}
    found = []
    for step in range(max(map(len, texts), default=0) + 1):
        for i, text in enumerate(texts):
            for j in range(n):
                if step <= len(text):
                    found.append(event({**head, "choices": [choice(n * i + j, text[step : step + 1])]}))
    if with_usage:
        found.append(event({**head, "choices": [], "usage": usage(len(texts), n, texts)}))
    return [*found, b"data: [DONE]\n\n"]


@settings(deadline=None)
@given(TEXTS, CUTS, st.integers(1, 3), st.booleans(), st.randoms())
def test_a_merged_stream_holds_the_unsplit_streams_chunks(
    texts: list[str], cuts: list[int], n: int, with_usage: bool, rng: Any
) -> None:
    """Cut into parts, and each part's bytes into any pieces, interleaved at random: the same chunks byte by byte, each
    choice's in order, one usage, one [DONE], both last."""
    merged, out = MergedStream(ME), b""
    streams = []
    for part in parts_of(len(texts), cuts):
        data = b"".join(chunks(Identity(f"cmpl-{part.number}", 5), texts[part.first : part.end], n, with_usage))
        streams.append((PartStream(part, n, merged), pieces(data, rng)))
    while streams:
        stream, left = rng.choice(streams)
        passage = stream.feed(left.pop(0))
        out += passage.send
        assert not passage.error
        if passage.done:
            stream.commit()
            streams.remove((stream, left))
    out += merged.end()
    expected = chunks(ME, texts, n, with_usage)
    assert sorted(split_events(out)) == sorted(expected)
    assert split_events(out)[-2:] == (expected[-2:] if with_usage else [*split_events(out)[-2:-1], expected[-1]])
    for index in range(n * len(texts)):
        assert of_choice(out, index) == of_choice(b"".join(expected), index)


def pieces(data: bytes, rng: Any) -> list[bytes]:
    edges = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(rng.randrange(8)))})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def split_events(data: bytes) -> list[bytes]:
    return [text + b"\n\n" for text in data.split(b"\n\n")[:-1]]


def of_choice(data: bytes, index: int) -> list[bytes]:
    return [text for text in split_events(data) if b'"choices":[{"index":%d,' % index in text]


def test_usage_of_a_part_counts_only_when_it_ended_well() -> None:
    """A part that is lost after its usage and before [DONE] is tried again: its usage must not count twice."""
    merged = MergedStream(ME)
    *most, done = chunks(Identity("a", 1), ["ab"], 1, with_usage=True)
    PartStream(Part(1, 0, 1), 1, merged).feed(b"".join(most))
    again = PartStream(Part(2, 0, 1), 1, merged)
    assert again.feed(b"".join(most) + done).done
    again.commit()
    last_but_one = split_events(merged.end())[0]
    assert json.loads(last_but_one.removeprefix(b"data: "))["usage"]["completion_tokens"] == 2


def test_an_error_event_is_told_apart_and_ends_the_part() -> None:
    """vLLM's own error event comes out as such, after what came before it."""
    stream = PartStream(Part(1, 4, 6), 1, MergedStream(ME))
    error = b'data: {"error": {"message": "no", "code": 500}}\n\n'
    passage = stream.feed(chunks(Identity("a", 1), ["ab"], 1, False)[0] + error + b"data: [DONE]\n\n")
    assert (passage.error, passage.done) == (error, False)
    assert b'"index":4,' in passage.send


def test_comments_pass_untouched() -> None:
    """What vLLM sends to keep a connection alive."""
    assert PartStream(Part(1, 0, 1), 1, MergedStream(ME)).feed(b": keep-alive\n\n").send == b": keep-alive\n\n"


@pytest.mark.parametrize("text", [b"data: {", b"data: 1", b'data: {"choices":[{}]}', b'data: {"choices":[1]}'])
def test_what_is_no_chunk_is_an_error(text: bytes) -> None:
    """A broken event is never passed on."""
    with pytest.raises(MergeError, match="no chunk"):
        PartStream(Part(1, 0, 1), 1, MergedStream(ME)).feed(text + b"\n\n")
