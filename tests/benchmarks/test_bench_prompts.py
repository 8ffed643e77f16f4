"""What the bench sends: radiology-like text of an exact length, and lengths that follow the workload."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.bench.plan import FULL, Kind, workloads
from benchmarks.bench.prompts import Source, kv_bytes_per_token, radiology_prompts
from deployments.demo_model import demo_text, train_tokenizer

TRACE = [(0.0, 30, 4), (0.5, 7, 2)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(demo_text(), 400)


@pytest.fixture
def source(tmp_path: Path, tokenizer: Tokenizer) -> Source:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Source(tmp_path, TRACE)


@pytest.mark.parametrize("tokens", [200, 512])
def test_a_radiology_prompt_is_text_of_exactly_the_length_asked_for(tokenizer: Tokenizer, tokens: int) -> None:
    """Every one differs from the others and ends by asking for the impression."""
    prompts = radiology_prompts(tokenizer, 6, tokens, seed=3)
    assert {len(prompt) for prompt in prompts} == {tokens}
    texts = [tokenizer.decode(list(prompt)) for prompt in prompts]
    assert all(text.rstrip().endswith("Impression:") for text in texts)
    assert len(set(texts)) == 6


def test_radiology_is_sent_as_one_row_of_requests(source: Source) -> None:
    workload = workloads(FULL, 0)[0]
    wishes = source.wishes(workload, 1)
    assert len(wishes) == 160
    assert {(len(w.prompt), w.output_tokens, w.at_s) for w in wishes} == {(512, 20, 0.0)}


def test_random_ids_leave_special_tokens_and_padding_out(source: Source, tokenizer: Tokenizer) -> None:
    long = next(w for w in workloads(FULL, 0) if w.name == "1024/1024, batch 10")
    ids = {token for wish in source.wishes(long, 1) for token in wish.prompt}
    assert min(ids) >= 10
    assert max(ids) < tokenizer.get_vocab_size()


def test_a_closed_loop_spreads_its_lengths_around_their_mean(source: Source) -> None:
    closed = next(w for w in workloads(FULL, 0) if w.kind is Kind.CLOSED)
    lengths = [w.output_tokens for w in source.wishes(closed, 1)]
    assert min(lengths) >= closed.output_tokens / 2
    assert max(lengths) <= closed.output_tokens * 1.5
    assert sum(lengths) / len(lengths) == pytest.approx(closed.output_tokens, rel=0.1)


def test_the_trace_is_sent_as_it_was_shaped(source: Source) -> None:
    trace = next(w for w in workloads(FULL, 2) if w.kind is Kind.TRACE)
    assert [(w.at_s, len(w.prompt), w.output_tokens) for w in source.wishes(trace, 1)] == TRACE


def test_a_model_without_a_tokenizer_file_gets_random_ids(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 20}))
    wishes = Source(tmp_path, []).wishes(workloads(FULL, 0)[0], 1)
    assert {token for w in wishes for token in w.prompt} == set(range(10, 20))


@pytest.mark.parametrize(
    ("config", "kv_bytes"),
    [
        ({"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768}, 36_864),
        ({"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}, 131_072),
        ({"num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16, "hidden_size": 32}, 256),
    ],
)
def test_kv_bytes_of_a_token_follow_the_models_configuration(
    tmp_path: Path, config: dict[str, int], kv_bytes: int
) -> None:
    """OPT-125m, Llama-3-8B with its fewer KV heads, and a model that names its head size."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert kv_bytes_per_token(tmp_path) == kv_bytes
