"""The memory plan holds or refuses: it never promises more than the card has, and says what would fit."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.memory import (
    GIB,
    KNOWN_CARDS,
    MIB,
    Card,
    Demand,
    MemoryPlan,
    MemoryPlanError,
    ModelShape,
    Overheads,
    correct,
    largest_replicas,
    model_shape,
    plan_memory,
    render,
)

OPT_125M: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "word_embed_proj_dim": 768,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "do_layer_norm_before": True,
    "torch_dtype": "float16",
}
OPT_350M = OPT_125M | {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "ffn_dim": 4096,
    "word_embed_proj_dim": 512,
    "do_layer_norm_before": False,
}
LLAMA_2_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
LLAMA_3_8B = LLAMA_2_7B | {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
MISTRAL_7B = LLAMA_3_8B | {"model_type": "mistral", "vocab_size": 32000, "sliding_window": 4096}
QWEN_25_05B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
QWEN3_06B = QWEN_25_05B | {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (OPT_125M, 125_239_296),
        (OPT_350M, 331_196_416),
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_3_8B, 8_030_261_248),
        (MISTRAL_7B, 7_241_732_096),
        (QWEN_25_05B, 494_032_768),
        (QWEN3_06B, 596_049_920),
    ],
)
def test_weights_are_counted_exactly(config: dict[str, Any], parameters: int) -> None:
    """Without a checkpoint, the weights of a known family are its published number of parameters, two bytes each."""
    shape = model_shape(config)
    assert shape.weights_bytes == 2 * parameters
    assert shape.weights_estimated


@pytest.mark.parametrize(
    ("config", "kv_bytes"),
    [(OPT_125M, 36_864), (LLAMA_2_7B, 524_288), (LLAMA_3_8B, 131_072), (QWEN_25_05B, 12_288), (QWEN3_06B, 114_688)],
)
def test_kv_bytes_per_token(config: dict[str, Any], kv_bytes: int) -> None:
    """KV bytes follow layers, KV heads (not query heads) and head size, which may differ from hidden / heads."""
    assert model_shape(config).kv_bytes_per_token == kv_bytes


def test_a_checkpoint_size_replaces_the_estimate() -> None:
    """A known checkpoint size is used as it is, and makes model types plannable whose weights cannot be counted."""
    mixtral = MISTRAL_7B | {"model_type": "mixtral"}
    assert model_shape(mixtral, 93 * GIB).weights_bytes == 93 * GIB
    assert not model_shape(mixtral, 93 * GIB).weights_estimated


def test_float32_checkpoints_are_served_in_16_bits() -> None:
    """`auto` halves a float32 checkpoint as it loads; asked for by name, float32 stays."""
    config = OPT_125M | {"torch_dtype": "float32"}
    assert model_shape(config, 500).weights_bytes == 250
    assert model_shape(config, 500, dtype="float32").weights_bytes == 500
    assert model_shape(config).kv_bytes_per_token == 36_864


def test_a_quantized_checkpoint_keeps_its_size_and_fp8_halves_the_cache() -> None:
    """Quantized weights are not converted; the KV cache has its own number type."""
    shape = model_shape(LLAMA_3_8B | {"quantization_config": {"bits": 4}}, 5 * GIB, kv_cache_dtype="fp8")
    assert shape.weights_bytes == 5 * GIB
    assert shape.kv_bytes_per_token == 65_536


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
        ({"intermediate_size": None}, "no intermediate_size or ffn_dim"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"torch_dtype": "int7"}, "'int7' is unknown"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"is_encoder_decoder": True}, "an encoder"),
        ({"model_type": "mixtral"}, "model_type 'mixtral'"),
        ({"quantization_config": {"bits": 4}}, "a quantized model"),
    ],
)
def test_an_unsupported_shape_is_named(change: dict[str, Any], named: str) -> None:
    """A config that cannot be planned is refused in one sentence naming what is missing or unsupported."""
    with pytest.raises(MemoryPlanError, match=re.escape(named)) as refused:
        model_shape(LLAMA_3_8B | change)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "replicas", "mps", "measured_mib"),
    [
        (OPT_125M, 1, False, 2351),
        (OPT_125M, 4, True, 2004),
        (OPT_125M, 8, True, 1843),
        (QWEN_25_05B, 1, False, 3504),
        (QWEN_25_05B, 4, True, 3056),
        (LLAMA_3_8B, 1, False, 19599),
        (LLAMA_3_8B, 4, True, 19397),
    ],
)
def test_the_default_overheads_cover_what_was_measured(
    config: dict[str, Any], replicas: int, mps: bool, measured_mib: int
) -> None:
    """Beyond its KV bytes an engine is planned at no less than what it took on an H200, and at most 1.5 times that."""
    demand = Demand(replicas, 2048, max_num_seqs=384, max_num_batched_tokens=16384, mps=mps)
    plan = plan_memory(KNOWN_CARDS["H200"], model_shape(config), demand)
    planned = plan.replica_bytes - plan.kv_cache_bytes
    assert measured_mib * MIB <= planned <= 1.5 * measured_mib * MIB


def test_opt_125m_four_times_on_an_h200() -> None:
    """The project's first case: four replicas with tens of GiB of KV cache each, hundreds of full sequences."""
    plan = plan_memory(KNOWN_CARDS["H200"], model_shape(OPT_125M), Demand(4, 2048, max_num_seqs=384))
    assert 30 * GIB < plan.kv_cache_bytes < 33 * GIB
    assert plan.kv_cache_bytes == plan.blocks_per_replica * 16 * 36_864
    assert plan.tokens_per_replica == (plan.blocks_per_replica - 1) * 16  # vLLM keeps one block for itself
    assert plan.full_length_sequences > 384


def test_llama_3_8b_four_times_on_an_h200() -> None:
    """Four private copies of 15 GiB of weights still leave each replica room for more than a hundred 1k sequences."""
    plan = plan_memory(KNOWN_CARDS["H200"], model_shape(LLAMA_3_8B), Demand(4, 8192))
    assert 14 * GIB < plan.kv_cache_bytes < 18 * GIB
    assert plan.full_length_sequences >= 14


A10_TWICE = Demand(2, 3584, max_num_batched_tokens=2048)


def test_llama_2_7b_twice_on_an_a10_needs_shared_weights() -> None:
    """Two private copies do not fit 22 GiB, one does; with shared weights two replicas hold a full sequence each."""
    shape = model_shape(LLAMA_2_7B)
    with pytest.raises(MemoryPlanError, match="at most 1 would") as refused:
        plan_memory(KNOWN_CARDS["A10"], shape, A10_TWICE)
    assert "\n" not in str(refused.value)
    assert plan_memory(KNOWN_CARDS["A10"], shape, replace(A10_TWICE, replicas=1)).full_length_sequences == 3
    shared = plan_memory(KNOWN_CARDS["A10"], shape, replace(A10_TWICE, weights_shared=True))
    assert shared.full_length_sequences == 1
    assert shared.needed_bytes + shared.reserve_bytes <= KNOWN_CARDS["A10"].total_bytes


def test_the_table_says_what_sharing_saves() -> None:
    """One copy, its host's own memory, what that saves, and how many replicas would fit with and without."""
    shape = model_shape(LLAMA_2_7B)
    table = render(plan_memory(KNOWN_CARDS["A10"], shape, replace(A10_TWICE, weights_shared=True)))
    assert re.search(r"weights, estimated, one copy for all +12\.55\n", table)
    assert re.search(r"weight host \(CUDA context\) +0\.69\n", table)
    assert "sharing the weights saves 11.86 GiB: at most 2 replica(s) like these fit, 1 with private weights" in table
    alone = render(plan_memory(KNOWN_CARDS["A10"], shape, replace(A10_TWICE, replicas=1)))
    assert "sharing" not in alone
    assert "weight host" not in alone


def test_not_even_one_says_how_long_a_sequence_would_fit() -> None:
    """Where the weights fit but one full sequence does not, the refusal's shorter length really fits."""
    demand = Demand(1, 32768, max_num_batched_tokens=2048)
    with pytest.raises(MemoryPlanError, match="not even one would: lower max_model_len to at most") as refused:
        plan_memory(KNOWN_CARDS["A10"], model_shape(LLAMA_2_7B), demand)
    tokens = int(re.findall(r"at most (\d+)", str(refused.value))[0])
    plan_memory(KNOWN_CARDS["A10"], model_shape(LLAMA_2_7B), replace(demand, max_model_len_tokens=tokens))


def test_weights_larger_than_the_card_are_refused_without_a_length() -> None:
    """Where not even the weights fit, a shorter sequence is not offered."""
    with pytest.raises(MemoryPlanError, match="smaller or quantized model") as refused:
        plan_memory(KNOWN_CARDS["L4"], model_shape(LLAMA_3_8B, 40 * GIB), Demand(1, 2048))
    assert "max_model_len" not in str(refused.value)


SIZES: dict[str, Any] = {"max_model_len_tokens": 2048}


@pytest.mark.parametrize("field", ["replicas", "max_model_len_tokens", "max_num_seqs", "kv_block_tokens"])
def test_impossible_numbers_are_refused(field: str) -> None:
    """A demand of zero is refused by its name."""
    with pytest.raises(MemoryPlanError, match=f"{field} is 0"):
        plan_memory(KNOWN_CARDS["H200"], model_shape(OPT_125M), Demand(**({"replicas": 1} | SIZES | {field: 0})))


def test_a_negative_reserve_is_refused() -> None:
    """A reserve below nothing would promise memory that the card lacks."""
    with pytest.raises(MemoryPlanError, match="reserve_bytes is -1"):
        plan_memory(KNOWN_CARDS["H200"], model_shape(OPT_125M), Demand(1, 2048, reserve_bytes=-1))


def test_a_pinned_cache_is_checked_and_rounded_to_blocks() -> None:
    """The user's bytes are kept but for the last partial block; too small and too large are refused with the mend."""
    shape, card = model_shape(OPT_125M), KNOWN_CARDS["H200"]
    block = 16 * shape.kv_bytes_per_token
    demand = Demand(4, 2048, kv_cache_bytes=1000 * block + 5)
    assert plan_memory(card, shape, demand).kv_cache_bytes == 1000 * block
    with pytest.raises(MemoryPlanError, match=f"raise it to at least {129 * block}"):
        plan_memory(card, shape, replace(demand, kv_cache_bytes=129 * block - 1))
    assert plan_memory(card, shape, replace(demand, kv_cache_bytes=129 * block)).full_length_sequences == 1
    with pytest.raises(MemoryPlanError, match="at most 3 would, or lower kv_cache_bytes"):
        plan_memory(card, shape, replace(demand, kv_cache_bytes=40 * GIB))


# --- properties ---

shapes = st.builds(
    lambda layers, kv_heads, group, head_dim, inter, vocab, weights: ModelShape(
        layers, kv_heads * group * head_dim, inter, kv_heads * group, kv_heads, head_dim, vocab, 2, 2, weights
    ),
    st.integers(1, 100),
    st.integers(1, 32),
    st.integers(1, 8),
    st.sampled_from([32, 64, 128, 256]),
    st.integers(64, 30_000),
    st.integers(100, 260_000),
    st.integers(1, 40 * GIB),
)
cards = st.builds(
    lambda total, share: Card("a card", total, int(total * share)), st.integers(GIB, 200 * GIB), st.floats(0, 1)
)
demands = st.builds(
    Demand,
    replicas=st.integers(1, 16),
    max_model_len_tokens=st.integers(1, 200_000),
    max_num_seqs=st.integers(1, 1024),
    max_num_batched_tokens=st.integers(1, 32_768),
    kv_block_tokens=st.sampled_from([1, 16, 32, 128]),
    kv_cache_bytes=st.one_of(st.none(), st.integers(0, 60 * GIB)),
    reserve_bytes=st.one_of(st.none(), st.integers(0, 8 * GIB)),
    weights_shared=st.booleans(),
    mps=st.booleans(),
)


# Timing never decides: a busy machine may take longer over an example than hypothesis' deadline.
unhurried = settings(deadline=None, max_examples=100)


def attempt(card: Card, shape: ModelShape, demand: Demand) -> MemoryPlan | str:
    try:
        return plan_memory(card, shape, demand)
    except MemoryPlanError as refused:
        return str(refused)


@unhurried
@given(cards, shapes, demands)
def test_an_accepted_plan_never_exceeds_the_card(card: Card, shape: ModelShape, demand: Demand) -> None:
    """Used before, all replicas and the reserve stay within the card; the rows add up; one full sequence fits."""
    plan = attempt(card, shape, demand)
    if isinstance(plan, str):
        assert "\n" not in plan
        return
    assert card.used_bytes + plan.needed_bytes + plan.reserve_bytes <= card.total_bytes
    assert sum(row.bytes_total for row in plan.rows) == card.total_bytes
    assert all(row.bytes_total >= 0 for row in plan.rows)
    assert plan.full_length_sequences >= 1
    assert plan.tokens_per_replica >= demand.max_model_len_tokens
    assert plan.client_limit_bytes * demand.replicas <= card.free_bytes


@unhurried
@given(cards, shapes, demands)
def test_more_replicas_never_get_more_cache_each(card: Card, shape: ModelShape, demand: Demand) -> None:
    """One replica more either does not fit or leaves each no more KV cache; and what fits n fits n - 1."""
    plan, more = attempt(card, shape, demand), attempt(card, shape, replace(demand, replicas=demand.replicas + 1))
    if isinstance(more, MemoryPlan):
        assert isinstance(plan, MemoryPlan)
        assert more.kv_cache_bytes <= plan.kv_cache_bytes


@unhurried
@given(cards, shapes, demands)
def test_the_largest_number_in_a_refusal_fits_and_one_more_does_not(
    card: Card, shape: ModelShape, demand: Demand
) -> None:
    """ "at most n would" is true: n replicas are accepted and n + 1 are not."""
    refusal = attempt(card, shape, demand)
    if isinstance(refusal, MemoryPlan) or "at most" not in refusal or "would" not in refusal:
        return
    most = 0 if "not even one" in refusal else int(re.findall(r"at most (\d+) would", refusal)[0])
    assert most < demand.replicas
    assert most == 0 or isinstance(attempt(card, shape, replace(demand, replicas=most)), MemoryPlan)
    assert isinstance(attempt(card, shape, replace(demand, replicas=most + 1)), str)


@unhurried
@given(cards, shapes, demands)
def test_the_shorter_length_in_a_refusal_fits(card: Card, shape: ModelShape, demand: Demand) -> None:
    """ "lower max_model_len to at most t" is true for the number of replicas that was asked for, or for one."""
    refusal = attempt(card, shape, replace(demand, kv_cache_bytes=None))
    found = re.findall(r"max_model_len to at most (\d+)", refusal) if isinstance(refusal, str) else []
    if not found:
        return
    replicas = 1 if "not even one" in str(refusal) else demand.replicas
    shorter = replace(demand, kv_cache_bytes=None, replicas=replicas, max_model_len_tokens=int(found[0]))
    assert isinstance(attempt(card, shape, shorter), MemoryPlan)


@unhurried
@given(cards, shapes, demands)
def test_sharing_weights_never_costs_cache(card: Card, shape: ModelShape, demand: Demand) -> None:
    """Where sharing saves memory, whatever fitted still fits, with at least as much KV cache each."""
    private = attempt(card, shape, replace(demand, weights_shared=False))
    shared = attempt(card, shape, replace(demand, weights_shared=True))
    if isinstance(private, MemoryPlan) and private.sharing_saves_bytes >= 0:
        assert isinstance(shared, MemoryPlan)
        assert shared.kv_cache_bytes >= private.kv_cache_bytes


# --- after the first replica is up ---

PLANNED = plan_memory(KNOWN_CARDS["H200"], model_shape(OPT_125M), Demand(4, 2048))


def test_a_first_replica_as_planned_confirms_the_plan() -> None:
    """Less than planned, with the card as it was: the plan stands, KV bytes untouched."""
    measured = PLANNED.replica_bytes - 300 * MIB
    confirmed = correct(PLANNED, measured, PLANNED.card.free_bytes - measured)
    assert confirmed == PLANNED


def test_a_larger_engine_is_taken_over_where_it_still_fits() -> None:
    """With a KV cache that leaves room, a larger engine is written into the plan and the KV bytes stay identical."""
    roomy = plan_memory(PLANNED.card, PLANNED.shape, Demand(4, 2048, kv_cache_bytes=8 * GIB))
    measured = roomy.replica_bytes + GIB
    corrected = correct(roomy, measured, roomy.card.free_bytes - measured)
    assert corrected.kv_cache_bytes == roomy.kv_cache_bytes
    assert corrected.replica_bytes == measured
    assert corrected.measured
    assert "measured" in render(corrected)


def test_a_larger_engine_that_does_not_fit_names_the_setting() -> None:
    """The refusal's smaller KV cache and smaller number of replicas are both true."""
    measured = PLANNED.replica_bytes + 2 * GIB
    free = PLANNED.card.free_bytes - measured
    with pytest.raises(MemoryPlanError, match=r"set replicas to 3 or kv_cache_bytes to \d+") as refused:
        correct(PLANNED, measured, free)
    smaller = int(re.findall(r"kv_cache_bytes to (\d+)", str(refused.value))[0])
    replan = plan_memory(PLANNED.card, PLANNED.shape, replace(PLANNED.demand, kv_cache_bytes=smaller))
    less = measured - (PLANNED.kv_cache_bytes - smaller)
    assert correct(replan, less, PLANNED.card.free_bytes - less).kv_cache_bytes == replan.kv_cache_bytes


def test_memory_taken_by_someone_else_meanwhile_is_refused() -> None:
    """A neighbour that took memory after planning is noticed before the second replica starts."""
    free = PLANNED.card.free_bytes - PLANNED.replica_bytes - 5 * GIB
    with pytest.raises(MemoryPlanError, match="are free, too little for 3 more"):
        correct(PLANNED, PLANNED.replica_bytes, free)


def test_a_first_replica_that_has_yet_to_grow_is_counted_in_full() -> None:
    """A first replica that takes less than planned so far still has the rest coming to it."""
    one = plan_memory(PLANNED.card, PLANNED.shape, Demand(1, 2048))
    so_far = one.replica_bytes - GIB
    with pytest.raises(MemoryPlanError, match="too little for the reserve"):
        correct(one, so_far, one.reserve_bytes + GIB - 1)
    assert correct(one, so_far, one.reserve_bytes + GIB) == one


def test_a_single_replica_must_leave_the_reserve() -> None:
    """With one replica there is nothing more to start, but the reserve must be there."""
    one = plan_memory(PLANNED.card, PLANNED.shape, Demand(1, 2048))
    with pytest.raises(MemoryPlanError, match="too little for the reserve"):
        correct(one, one.replica_bytes, one.reserve_bytes - 1)
    assert correct(one, one.replica_bytes, one.reserve_bytes).kv_cache_bytes == one.kv_cache_bytes


def attempt_correction(plan: MemoryPlan, measured_bytes: int, free_bytes: int) -> MemoryPlan | str:
    try:
        return correct(plan, measured_bytes, free_bytes)
    except MemoryPlanError as refused:
        return str(refused)


@unhurried
@given(cards, shapes, demands, st.integers(-2 * GIB, 8 * GIB), st.integers(0, 4 * GIB))
def test_a_correction_never_overcommits(
    card: Card, shape: ModelShape, demand: Demand, off_bytes: int, taken_bytes: int
) -> None:
    """Whatever was measured: KV bytes never change, and a confirmed plan's replicas fit what is free."""
    plan = attempt(card, shape, demand)
    if isinstance(plan, str):
        return
    measured = max(0, plan.replica_bytes + off_bytes)
    free = max(0, card.free_bytes - plan.mps_server_bytes - plan.shared_weights_bytes - measured - taken_bytes)
    corrected = attempt_correction(plan, measured, free)
    if isinstance(corrected, str):
        assert "\n" not in corrected
        return
    assert corrected.kv_cache_bytes == plan.kv_cache_bytes
    assert corrected.replica_bytes >= max(plan.replica_bytes, measured)
    growth = max(0, plan.replica_bytes - measured)
    assert growth + (demand.replicas - 1) * corrected.replica_bytes + plan.reserve_bytes <= free


def test_the_table_names_every_part() -> None:
    """The table has a line for each part, the KV cache in blocks, tokens and full sequences, and no empty lines."""
    text = render(PLANNED)
    for part in ("H200", "weights, estimated", "workspace", "KV cache", "MPS server", "reserve", "left over"):
        assert part in text
    assert f"{PLANNED.blocks_per_replica} blocks" in text
    assert "in use before" not in text
    assert "in use before" in render(plan_memory(Card("H200", 100 * GIB, GIB), PLANNED.shape, PLANNED.demand))
    assert all(line.strip() for line in text.splitlines())


def test_other_overheads_change_the_plan() -> None:
    """Overheads are an argument: a leaner engine leaves more for the KV cache."""
    lean = plan_memory(PLANNED.card, PLANNED.shape, PLANNED.demand, Overheads(engine_bytes=GIB))
    assert lean.kv_cache_bytes > PLANNED.kv_cache_bytes
    assert largest_replicas(lean) > largest_replicas(PLANNED)


def test_a_plan_knows_how_much_larger_engines_may_be() -> None:
    """What is left over and the reserve together are what all replicas may grow by."""
    demand = Demand(replicas=4, max_model_len_tokens=2048, reserve_bytes=4 * GIB)
    made = plan_memory(KNOWN_CARDS["H200"], model_shape(OPT_125M), demand)
    room = made.card.free_bytes - made.needed_bytes
    fits = room / (4 * (made.engine_bytes + made.workspace_bytes))
    assert made.tolerates(0.0)
    assert made.tolerates(0.99 * fits)
    assert not made.tolerates(1.01 * fits)
