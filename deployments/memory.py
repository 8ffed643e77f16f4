"""The memory plan: from card, model and number of replicas to KV cache bytes per replica, or a refusal.

Pure arithmetic: nothing here asks a GPU. Engines that start together on one card mis-size each other's KV cache when
each profiles what is free (vllm#55827, #56830), and equal memory *fractions* give unequal caches, so bytes are planned
once and pinned (`kv_cache_memory_bytes`) to the same number for every replica.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

MIB = 1 << 20
GIB = 1 << 30

# vLLM's block pool keeps block 0 for itself (`null_block`); it is allocated and never holds a token.
NULL_BLOCKS = 1


class MemoryPlanError(ValueError):
    """The plan cannot hold, or cannot be made; one sentence with the cause and the mend."""


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU's memory as CUDA sees it; `used_bytes` is what others already hold."""

    name: str
    total_bytes: int
    used_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes


# What cudaMemGetInfo calls the total (a little under the name on the box), rounded down over driver versions: the H200
# as measured, the others as PyTorch's out-of-memory messages name them in public issues (H100 79.11: vllm#27508).
KNOWN_CARDS: dict[str, Card] = {
    name: Card(name, int(gib * GIB))
    for name, gib in {
        "T4": 14.55,
        "L4": 21.95,
        "A10": 22.05,
        "A30": 23.5,
        "RTX 3090": 23.6,
        "RTX 4090": 23.6,
        "A100-40": 39.35,
        "L40": 44.35,
        "L40S": 44.35,
        "H100": 79.1,
        "A100-80": 79.1,
        "H200": 139.7,
    }.items()
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What decides a model's memory. `dtype_bytes` and `kv_dtype_bytes` are those it is served in, per number."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype_bytes: int
    kv_dtype_bytes: int
    weights_bytes: int
    weights_estimated: bool = False

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_dtype_bytes


@dataclass(frozen=True, slots=True)
class Overheads:
    """What an engine needs beside weights and KV cache; the defaults lie above everything measured.

    Fitted to OPT-125m, Qwen2.5-0.5B and Llama-3-8B on an H200 with vLLM 0.29 (16,384 batched tokens, 384 sequences, 18
    CUDA graphs, 1 to 8 engines with and without MPS): beyond weights and KV they took 1.6-2.1, 2.1-2.5 and 4.0-4.1 GiB.
    """

    # CUDA context (0.5 GiB), kernels, cuBLAS and CUDA graphs in sum: 0.9-1.85 GiB once the workspace is subtracted.
    engine_bytes: int = 1920 * MIB
    # Live at once in the largest layer of a full prefill step: residual, norm, attention in and out ...
    hidden_copies: int = 4
    # ... and gate, up and their product.
    intermediate_copies: int = 3
    # Per sequence and vocabulary entry: float32 logits, probabilities and the sampler's sorted copy.
    sampler_bytes: int = 12
    # The MPS server's own context: 66 MiB seen on an H200.
    mps_server_bytes: int = 128 * MIB
    # A weight host's own CUDA context and libraries: 633 MiB (OPT-125m) and 665 MiB (Llama-3-8B) on an H200.
    weight_host_bytes: int = 704 * MIB
    # Kept free for allocator growth and fragmentation: an engine grew by up to 0.25 GiB after it was ready.
    reserve_ratio: float = 0.02
    reserve_min_bytes: int = 512 * MIB

    def workspace_bytes(self, shape: ModelShape, batched_tokens: int, sequences: int) -> int:
        per_token = self.hidden_copies * shape.hidden + self.intermediate_copies * shape.intermediate
        return batched_tokens * per_token * shape.dtype_bytes + sequences * shape.vocab * self.sampler_bytes

    def reserve_bytes(self, card: Card) -> int:
        return max(self.reserve_min_bytes, int(card.total_bytes * self.reserve_ratio))


DEFAULT_OVERHEADS = Overheads()


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of one card. Every replica is the same; with `weights_shared` one copy of the weights serves all,
    and a weight host takes a little for itself.

    `kv_cache_bytes` (per replica) and `reserve_bytes` are computed when None. `max_num_batched_tokens` is the largest
    prefill step, which sizes the workspace: give the value that vLLM is given.
    """

    replicas: int
    max_model_len_tokens: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    kv_block_tokens: int = 16
    kv_cache_bytes: int | None = None
    reserve_bytes: int | None = None
    weights_shared: bool = False
    mps: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: `bytes_each` of `what`, `times` over."""

    what: str
    bytes_each: int
    times: int = 1

    @property
    def bytes_total(self) -> int:
        return self.bytes_each * self.times


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """An accepted plan: what was used before, all replicas and the reserve fit the card; its rows add up to it."""

    card: Card
    shape: ModelShape
    demand: Demand
    blocks_per_replica: int
    engine_bytes: int
    workspace_bytes: int
    mps_server_bytes: int
    weight_host_bytes: int
    reserve_bytes: int
    measured: bool = False

    @property
    def kv_cache_bytes(self) -> int:
        """Per replica, in whole blocks: what to give each engine as `kv_cache_memory_bytes`."""
        return self.blocks_per_replica * _block_bytes(self.shape, self.demand)

    @property
    def tokens_per_replica(self) -> int:
        return (self.blocks_per_replica - NULL_BLOCKS) * self.demand.kv_block_tokens

    @property
    def full_length_sequences(self) -> int:
        """How many sequences of `max_model_len_tokens` one replica holds at once."""
        return (self.blocks_per_replica - NULL_BLOCKS) // _blocks_for(self.demand, self.demand.max_model_len_tokens)

    @property
    def private_weights_bytes(self) -> int:
        return 0 if self.demand.weights_shared else self.shape.weights_bytes

    @property
    def shared_weights_bytes(self) -> int:
        return self.shape.weights_bytes if self.demand.weights_shared else 0

    @property
    def replica_bytes(self) -> int:
        return self.engine_bytes + self.workspace_bytes + self.private_weights_bytes + self.kv_cache_bytes

    @property
    def needed_bytes(self) -> int:
        """All replicas and what they share, without the reserve."""
        return self.common_bytes + self.demand.replicas * self.replica_bytes

    @property
    def common_bytes(self) -> int:
        """What is there once, however many replicas there are."""
        return self.mps_server_bytes + self.weight_host_bytes + self.shared_weights_bytes

    @property
    def sharing_saves_bytes(self) -> int:
        """What one copy of the weights saves, or would save, against one for each replica; may be negative."""
        return sharing_saves_bytes(self.shape.weights_bytes, self.demand.replicas)

    @property
    def client_limit_bytes(self) -> int:
        """A cap for one MPS client, its share of the reserve above its plan: a runaway meets it, neighbours do not."""
        return (self.replica_bytes + self.reserve_bytes // self.demand.replicas) // MIB * MIB

    def tolerates(self, growth_ratio: float) -> bool:
        """Whether every replica could need `growth_ratio` more than planned beside weights and KV cache."""
        growth = int(growth_ratio * (self.engine_bytes + self.workspace_bytes)) * self.demand.replicas
        return self.card.free_bytes - self.needed_bytes >= growth

    @property
    def rows(self) -> tuple[Row, ...]:
        n = self.demand.replicas
        estimated = ", estimated" if self.shape.weights_estimated else ""
        shared = ", one copy for all" if self.demand.weights_shared else ""
        engine = "engine (CUDA context, graphs, libraries" + (", workspace; measured)" if self.measured else ")")
        return (
            Row("in use before", self.card.used_bytes),
            Row(f"weights{estimated}{shared}", self.shape.weights_bytes, 1 if self.demand.weights_shared else n),
            Row("weight host (CUDA context)", self.weight_host_bytes),
            Row(engine, self.engine_bytes, n),
            Row("workspace (activations, logits)", self.workspace_bytes, n),
            Row("KV cache", self.kv_cache_bytes, n),
            Row("MPS server", self.mps_server_bytes),
            Row("reserve", self.reserve_bytes),
            Row("left over", self.card.free_bytes - self.needed_bytes - self.reserve_bytes),
        )


def plan_memory(card: Card, shape: ModelShape, demand: Demand, overheads: Overheads = DEFAULT_OVERHEADS) -> MemoryPlan:
    """Shares what the card has among `demand.replicas` equal replicas.

    Raises MemoryPlanError where a replica could not hold even one sequence of `max_model_len_tokens`; the sentence
    names the largest number of replicas that could.
    """
    _check(demand)
    bare = _bare_plan(card, shape, demand, overheads)
    blocks = _pinned_blocks(bare) if demand.kv_cache_bytes is not None else _spare_blocks(bare, demand.replicas)
    if demand.replicas > largest_replicas(bare) or blocks < _least_blocks(demand):
        raise MemoryPlanError(_refusal(bare))
    return replace(bare, blocks_per_replica=blocks)


def sharing_saves_bytes(weights_bytes: int, replicas: int, overheads: Overheads = DEFAULT_OVERHEADS) -> int:
    """What one copy of the weights for all replicas saves: every copy but one, less what its host needs for itself."""
    return (replicas - 1) * weights_bytes - overheads.weight_host_bytes


def correct(plan: MemoryPlan, measured_first_replica_bytes: int, free_bytes: int) -> MemoryPlan:
    """Checks the plan against the card once the first replica is up, before any other starts.

    `measured_first_replica_bytes` is what NVML says that the first replica holds, its KV cache included; `free_bytes`
    what it says is free now. The first KV cache is already allocated and all must be identical, so nothing is resized:
    the plan comes back with the larger of planned and measured engine size (an engine grows under its first load), or
    MemoryPlanError names the setting to change.
    """
    engine_bytes = measured_first_replica_bytes - plan.private_weights_bytes - plan.kv_cache_bytes
    measured = replace(plan, engine_bytes=max(0, engine_bytes), workspace_bytes=0)
    larger = measured if measured.replica_bytes > plan.replica_bytes else plan
    growth = larger.replica_bytes - measured_first_replica_bytes
    needed = growth + (plan.demand.replicas - 1) * larger.replica_bytes + plan.reserve_bytes
    if needed > free_bytes:
        raise MemoryPlanError(_correction_refusal(larger, measured_first_replica_bytes, free_bytes))
    return replace(larger, measured=larger is measured)


def largest_replicas(plan: MemoryPlan) -> int:
    """The most replicas of this kind that the card holds, each with one full sequence (or its pinned KV cache)."""
    least = max(_least_blocks(plan.demand), _pinned_blocks(plan)) * _block_bytes(plan.shape, plan.demand)
    return max(0, _shareable_bytes(plan) // (_beside_kv_bytes(plan) + least))


def render(plan: MemoryPlan) -> str:
    """The plan as a table for people, in GiB."""
    demand = plan.demand
    head = f"{plan.card.name}: {plan.card.total_bytes / GIB:.2f} GiB, {demand.replicas} replica(s)"
    lines = [head, f"{'':<54}{'each':>9}{'':>5}{'GiB':>9}"]
    lines += [_line(row) for row in plan.rows if row.bytes_total or row.what == "left over"]
    lines.append(
        f"each replica: {plan.kv_cache_bytes} bytes of KV cache = {plan.blocks_per_replica} blocks,"
        f" {plan.tokens_per_replica} tokens, {plan.full_length_sequences} sequence(s) of {demand.max_model_len_tokens}"
    )
    return "\n".join(lines + _what_sharing_saves(plan))


def _what_sharing_saves(plan: MemoryPlan) -> list[str]:
    if not plan.demand.weights_shared:
        return []
    private = _bare_plan(plan.card, plan.shape, replace(plan.demand, weights_shared=False), DEFAULT_OVERHEADS)
    most, most_private = largest_replicas(plan), largest_replicas(private)
    return [
        f"sharing the weights saves {_gib(plan.sharing_saves_bytes)}: at most {most} replica(s) like these fit,"
        f" {most_private} with private weights"
    ]


def _line(row: Row) -> str:
    each = f"{row.bytes_each / GIB:9.2f} x{row.times:<3}" if row.times > 1 else " " * 14
    return f"{row.what:<54}{each}{row.bytes_total / GIB:9.2f}"


def _check(demand: Demand) -> None:
    for name in ("replicas", "max_model_len_tokens", "max_num_seqs", "max_num_batched_tokens", "kv_block_tokens"):
        if getattr(demand, name) < 1:
            raise MemoryPlanError(f"{name} is {getattr(demand, name)}: it must be at least 1")
    if demand.reserve_bytes is not None and demand.reserve_bytes < 0:
        raise MemoryPlanError(f"reserve_bytes is {demand.reserve_bytes}: it must be 0 or more")


def _bare_plan(card: Card, shape: ModelShape, demand: Demand, overheads: Overheads) -> MemoryPlan:
    """Everything but the KV cache."""
    reserve = overheads.reserve_bytes(card) if demand.reserve_bytes is None else demand.reserve_bytes
    workspace = overheads.workspace_bytes(shape, demand.max_num_batched_tokens, demand.max_num_seqs)
    server = overheads.mps_server_bytes if demand.mps else 0
    host = overheads.weight_host_bytes if demand.weights_shared else 0
    return MemoryPlan(card, shape, demand, 0, overheads.engine_bytes, workspace, server, host, reserve)


def _block_bytes(shape: ModelShape, demand: Demand) -> int:
    return shape.kv_bytes_per_token * demand.kv_block_tokens


def _blocks_for(demand: Demand, tokens: int) -> int:
    return -(-tokens // demand.kv_block_tokens)


def _least_blocks(demand: Demand) -> int:
    return _blocks_for(demand, demand.max_model_len_tokens) + NULL_BLOCKS


def _pinned_blocks(plan: MemoryPlan) -> int:
    return (plan.demand.kv_cache_bytes or 0) // _block_bytes(plan.shape, plan.demand)


def _beside_kv_bytes(plan: MemoryPlan) -> int:
    return plan.replica_bytes - plan.kv_cache_bytes


def _shareable_bytes(plan: MemoryPlan) -> int:
    return plan.card.free_bytes - plan.reserve_bytes - plan.common_bytes


def _spare_blocks(plan: MemoryPlan, replicas: int) -> int:
    """Blocks that each of `replicas` could have; negative where not even the engines fit."""
    return (_shareable_bytes(plan) // replicas - _beside_kv_bytes(plan)) // _block_bytes(plan.shape, plan.demand)


def _longest_tokens(plan: MemoryPlan, replicas: int) -> int:
    return max(0, _spare_blocks(plan, replicas) - NULL_BLOCKS) * plan.demand.kv_block_tokens


def _refusal(plan: MemoryPlan) -> str:
    """One sentence: why it does not fit, how many replicas would, and what to change."""
    demand, pinned = plan.demand, plan.demand.kv_cache_bytes
    least = _least_blocks(demand) * _block_bytes(plan.shape, demand)
    if pinned is not None and pinned < least:
        return (
            f"kv_cache_bytes {pinned} does not hold one sequence of max_model_len {demand.max_model_len_tokens} tokens:"
            f" raise it to at least {least}, or lower max_model_len"
        )
    cache = f"a KV cache of {_gib(least if pinned is None else pinned)}"
    wanted = (
        f"{demand.replicas} replica(s) of {_gib(_beside_kv_bytes(plan))} each and {cache} do not fit into the"
        f" {_gib(max(0, _shareable_bytes(plan)))} that {plan.card.name} has for them"
    )
    most = largest_replicas(plan)
    if not most:
        return f"{wanted}, not even one would: {_mend_one(plan)}"
    return f"{wanted}: at most {most} would{_or_shorter(plan)}"


def _or_shorter(plan: MemoryPlan) -> str:
    if plan.demand.kv_cache_bytes is not None:
        return ", or lower kv_cache_bytes"
    tokens = _longest_tokens(plan, plan.demand.replicas)
    return f", or lower max_model_len to at most {tokens}" if tokens else ""


def _mend_one(plan: MemoryPlan) -> str:
    tokens = _longest_tokens(plan, 1)
    if tokens and plan.demand.kv_cache_bytes is not None:
        return f"lower kv_cache_bytes to at most {_spare_blocks(plan, 1) * _block_bytes(plan.shape, plan.demand)}"
    if tokens:
        return f"lower max_model_len to at most {tokens}"
    return "free memory on the card, lower max_num_batched_tokens, or take a smaller or quantized model"


def _correction_refusal(plan: MemoryPlan, measured_bytes: int, free_bytes: int) -> str:
    n = plan.demand.replicas
    room = max(0, free_bytes - plan.reserve_bytes - max(0, plan.replica_bytes - measured_bytes))
    fit = 1 + room // plan.replica_bytes
    settings = [] if fit >= n else [f"replicas to {fit}"]
    kv_bytes = (free_bytes + measured_bytes - plan.reserve_bytes) // n - _beside_kv_bytes(plan)
    blocks = kv_bytes // _block_bytes(plan.shape, plan.demand)
    if blocks >= _least_blocks(plan.demand):
        settings.append(f"kv_cache_bytes to {blocks * _block_bytes(plan.shape, plan.demand)}")
    others = f"{n - 1} more of {_gib(plan.replica_bytes)} and " if n > 1 else ""
    return (
        f"the first replica takes {_gib(measured_bytes)} and {_gib(free_bytes)} are free, too little for {others}"
        f"the reserve of {_gib(plan.reserve_bytes)}: set {' or '.join(settings) or 'max_model_len lower'},"
        " or free memory on the card"
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB"


# --- the model's shape ---

_DTYPE_BYTES = {"float16": 2, "half": 2, "bfloat16": 2, "float32": 4, "float": 4}
_KV_DTYPE_BYTES = _DTYPE_BYTES | {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
_UNSUPPORTED = {
    "kv_lora_rank": "latent attention",
    "layers_block_type": "hybrid layers",
    "mamba_d_state": "state-space layers",
    "ssm_cfg": "state-space layers",
    "linear_num_key_heads": "linear attention",
    "is_encoder_decoder": "an encoder",
}


def model_shape(
    config: Mapping[str, Any],
    checkpoint_bytes: int | None = None,
    *,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
) -> ModelShape:
    """Reads a decoder's shape from the dict of its Hugging Face config.json.

    `checkpoint_bytes` is the size of the weight files; without it the weights are counted from the shape, exactly for
    OPT, Llama, Mistral and Qwen2/Qwen3. `dtype="auto"` serves float32 checkpoints in 16 bits, as vLLM does. A sliding
    window is planned as full attention, which is its upper bound. Raises MemoryPlanError naming what is missing.
    """
    _refuse_unsupported(config)
    stored = _dtype_bytes(str(config.get("dtype") or config.get("torch_dtype") or "float16"), _DTYPE_BYTES)
    served = min(stored, 2) if dtype == "auto" else _dtype_bytes(dtype, _DTYPE_BYTES)
    heads = _number(config, "num_attention_heads")
    hidden = _number(config, "hidden_size")
    shape = ModelShape(
        layers=_number(config, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_number(config, "intermediate_size", "ffn_dim"),
        heads=heads,
        kv_heads=_number(config, "num_key_value_heads", default=heads),
        head_dim=_number(config, "head_dim", default=hidden // heads),
        vocab=_number(config, "vocab_size"),
        dtype_bytes=served,
        kv_dtype_bytes=served if kv_cache_dtype == "auto" else _dtype_bytes(kv_cache_dtype, _KV_DTYPE_BYTES),
        weights_bytes=0,
    )
    if checkpoint_bytes is not None:
        return replace(shape, weights_bytes=_served_bytes(config, checkpoint_bytes, stored, served))
    return replace(shape, weights_bytes=_parameters(config, shape) * served, weights_estimated=True)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    kinds = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    found = [f"{what} ({key})" for key, what in _UNSUPPORTED.items() if config.get(key)] + sorted(kinds)
    if found:
        raise MemoryPlanError(
            f"config.json describes {found[0]}, whose KV cache this plan cannot size: use a plain-attention decoder"
        )


def _served_bytes(config: Mapping[str, Any], checkpoint_bytes: int, stored: int, served: int) -> int:
    """A quantized checkpoint stays as it is; others are converted to the served type as they load."""
    return checkpoint_bytes if config.get("quantization_config") else checkpoint_bytes * served // stored


def _dtype_bytes(name: str, known: Mapping[str, int]) -> int:
    try:
        return known[name.removeprefix("torch.")]
    except KeyError:
        raise MemoryPlanError(f"the number type '{name}' is unknown: use one of {', '.join(known)}") from None


def _number(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    found = next((config[key] for key in keys if config.get(key) is not None), default)
    if found is None:
        raise MemoryPlanError(f"config.json has no {' or '.join(keys)}: the memory plan needs it to size the model")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise MemoryPlanError(f"config.json says {keys[0]} is {found!r}: it must be a whole number of at least 1")
    return found


def _parameters(config: Mapping[str, Any], shape: ModelShape) -> int:
    family = str(config.get("model_type", ""))
    quantized = bool(config.get("quantization_config"))
    if quantized or family not in _FAMILIES:
        what = "a quantized model" if quantized else f"model_type '{family}'"
        raise MemoryPlanError(
            f"the weights of {what} cannot be counted from config.json: give the checkpoint's size in bytes"
        )
    return _FAMILIES[family](config, shape)


def _opt_parameters(config: Mapping[str, Any], shape: ModelShape) -> int:
    """Biases and two layer norms a layer, learned positions (two more than the longest sequence), tied embeddings."""
    h, ffn = shape.hidden, shape.intermediate
    embed = _number(config, "word_embed_proj_dim", default=h)
    positions = _number(config, "max_position_embeddings") + 2
    layer = 4 * (h * h + h) + 2 * h * ffn + h + ffn + 4 * h
    projections = 2 * h * embed if embed != h else 0
    final_norm = 0 if config.get("_remove_final_layer_norm") or not config.get("do_layer_norm_before", True) else 2 * h
    return shape.vocab * embed + positions * h + shape.layers * layer + projections + final_norm


def _llama_parameters(config: Mapping[str, Any], shape: ModelShape) -> int:
    """Grouped-query attention, gated feed-forward, RMS norms."""
    h, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = 2 * h * queries + 2 * h * keys + 3 * h * shape.intermediate + 2 * h
    embeddings = shape.vocab * h * (1 if config.get("tie_word_embeddings", False) else 2)
    return embeddings + shape.layers * layer + h


def _qwen2_parameters(config: Mapping[str, Any], shape: ModelShape) -> int:
    """As Llama, with a bias on query, key and value."""
    return _llama_parameters(config, shape) + shape.layers * (shape.heads + 2 * shape.kv_heads) * shape.head_dim


def _qwen3_parameters(config: Mapping[str, Any], shape: ModelShape) -> int:
    """As Llama, with a norm on each head's query and key."""
    return _llama_parameters(config, shape) + shape.layers * 2 * shape.head_dim


_FAMILIES: dict[str, Callable[[Mapping[str, Any], ModelShape], int]] = {
    "opt": _opt_parameters,
    "llama": _llama_parameters,
    "mistral": _llama_parameters,
    "qwen2": _qwen2_parameters,
    "qwen3": _qwen3_parameters,
}
