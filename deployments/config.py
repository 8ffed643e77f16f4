"""The arguments of `serve_config.yaml`, checked: what is unknown or impossible is refused in one sentence."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from balancer.board import GPU_RECORDS, REPLICA_SLOTS
from balancer.policies import POLICIES, Knobs
from deployments.limits import Limits

IMPORT_PATHS = ("deployments.app:build", "benchmarks.echo_app:build", "benchmarks.stand_in_app:build")

# Engine arguments that the system itself sets; the second string says where the user's wish belongs.
OWNED_ENGINE_ARGUMENTS = {
    "model": "set `model` instead",
    "served_model_name": "set `served_model_name` instead",
    "tokenizer_mode": "it follows the model",
    "data_parallel_size": "set `replicas` instead",
    "data_parallel_backend": "set `replicas` instead",
    "pipeline_parallel_size": "a replica uses one GPU; set `replicas` instead",
    "tensor_parallel_size": "a replica uses one GPU; set `replicas` instead",
    "distributed_executor_backend": "a replica runs its engine itself",
    "disable_log_stats": "the balancer reads the engine's statistics",
    "api_server_count": "set `replicas` instead",
    "host": "set `http_options.host` instead",
    "port": "set `http_options.port` instead",
    "uds": "set `http_options` instead",
    "headless": "the system serves over HTTP",
    "root_path": "set `route_prefix` instead",
}

# What Ray Serve (2.60) reads from a configuration file; it ignores every other key without a word.
DOCUMENT_KEYS = frozenset({
    "applications", "controller_options", "grpc_options", "http_options", "logging_config", "proxy_location",
    "target_capacity", "tracing_config",
})  # fmt: skip
APPLICATION_KEYS = frozenset({
    "args", "autoscaling_policy", "deployments", "external_scaler_enabled", "host", "import_path", "logging_config",
    "name", "port", "route_prefix", "runtime_env",
})  # fmt: skip


Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A setting is unknown or impossible. The message is one sentence that names the key and the mend."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Bounds(BaseModel):
    """Bounds of some keys; None is not set, and keys without a bound are not looked at."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _expanded(value: Any) -> Any:
    """vLLM's way to write large numbers: 8k is 8000, 8K is 8192."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)", value) if isinstance(value, str) else None
    return int(float(found[1]) * _SUFFIXES[found[2]]) if found else value


def _length(value: int) -> int:
    if value < 1 and value != -1:
        raise ValueError("must be at least 1, or -1 to let vLLM choose")
    return value


_Whole = Annotated[int, BeforeValidator(_expanded)]
_Count = Annotated[_Whole, Field(ge=1)]
_Amount = Annotated[_Whole, Field(ge=0)]
_Length = Annotated[_Whole, BeforeValidator(lambda value: -1 if value == "auto" else value), AfterValidator(_length)]


class EngineBounds(_Bounds):
    """The numeric engine arguments that an engine would choke on only after minutes, or silently misread."""

    max_model_len: _Length | None = None
    max_num_seqs: _Count | None = None
    max_num_batched_tokens: _Count | None = None
    max_num_scheduled_tokens: _Count | None = None
    max_num_queued_tokens: _Amount | None = None
    max_num_queued_reqs: _Amount | None = None
    kv_cache_memory_bytes: _Count | None = None
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    block_size: _Count | None = None
    num_gpu_blocks_override: _Count | None = None
    cpu_offload_gb: float | None = Field(None, ge=0)
    kv_offloading_size: float | None = Field(None, ge=0)
    mm_processor_cache_gb: float | None = Field(None, ge=0)
    long_prefill_token_threshold: _Amount | None = None
    prefill_schedule_interval: _Count | None = None
    stream_interval: _Count | None = None
    max_logprobs: int | None = Field(None, ge=-1)
    max_loras: _Count | None = None
    max_cpu_loras: _Count | None = None
    watermark: float | None = Field(None, ge=0, lt=1)


class KnobBounds(_Bounds):
    """The balancer's knobs; their types and defaults stand in `balancer.knobs`."""

    stale_after_s: float | None = Field(None, gt=0)
    stalled_after_s: float | None = Field(None, gt=0)
    seed: int | None = None
    queue_limit: int | None = Field(None, ge=0)
    queue_deadline_s: float | None = Field(None, ge=0)
    active_set: int | None = Field(None, ge=1)
    kv_reserve_ratio: float | None = Field(None, ge=0, lt=1)
    overtake_limit: int | None = Field(None, ge=0)
    overtake_patience_s: float | None = Field(None, ge=0)
    affinity_load_bound: float | None = Field(None, ge=1)
    gain_ratio: float | None = Field(None, ge=0)
    default_output_tokens: int | None = Field(None, ge=1)
    weights_read_s: float | None = Field(None, gt=0)


class HttpBounds(_Bounds):
    """Where the address is; Ray checks the rest."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)


class MonitoringConfig(_Strict):
    """How the machine is watched."""

    sample_hz: float = Field(25.0, ge=1.0, le=100.0, strict=True)
    exporter_port: int | None = Field(9410, ge=0, le=65535)
    memory_reserve_gib: float = Field(1.0, ge=0.0, strict=True)


class AccessConfig(_Strict):
    """Who may enter, how much each key may use, and how large and how slow a request may be."""

    api_keys_file: str | None = None
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    concurrent: int | None = Field(None, ge=1)
    extra_routes: list[str] = Field(default_factory=list)
    body_bytes: _Whole = Field(8 << 20, ge=1 << 10)
    file_bytes: _Whole = Field(200 << 20, ge=1 << 10)
    header_bytes: _Whole = Field(16 << 10, ge=1 << 10, le=512 << 10)
    header_s: float = Field(10.0, gt=0.0, le=3600.0)
    body_s: float = Field(30.0, gt=0.0, le=3600.0)

    @field_validator("api_keys_file")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_absolute():
            raise ValueError("must be an absolute path: replicas do not run where you start them")
        return value

    @field_validator("extra_routes")
    @classmethod
    def _paths(cls, value: list[str]) -> list[str]:
        if not all(re.fullmatch(r"/[A-Za-z0-9._~/-]+", path) for path in value):
            raise ValueError("must be paths such as /version")
        return value


class BatchesConfig(_Strict):
    """What is split over the replicas, and OpenAI's files and batches."""

    enabled: bool = True
    threshold: int = Field(8, ge=2, strict=True)
    folder: str | None = Field(None, min_length=1)
    folder_gib: float = Field(16.0, gt=0.0, strict=True)
    concurrency: int = Field(32, ge=1, le=1024, strict=True)

    @property
    def split_from(self) -> int:
        """The fewest prompts of a request that is split; 0 for never."""
        return self.threshold if self.enabled else 0


class LimitsConfig(_Strict):
    """How long each part may take, in seconds. `queue_s` is another name of `balancer.queue_deadline_s`."""

    queue_s: float | None = Field(None, gt=0, strict=True)
    connect_s: int = Field(5, ge=1, le=60)
    first_token_s: float = Field(Limits().first_token_s, gt=0)
    between_tokens_s: float = Field(Limits().between_tokens_s, gt=0)
    total_s: float = Field(Limits().total_s, gt=0)

    def of_answers(self) -> Limits:
        return Limits(self.first_token_s, self.between_tokens_s, self.total_s)


class BalancerConfig(_Strict):
    """The policy and its knobs; unknown knobs are refused against `balancer.policies.Knobs`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    policy: str = Knobs().policy

    @field_validator("policy")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in POLICIES:
            raise ValueError(f"must be one of {', '.join(sorted(POLICIES))}")
        return value

    def knobs(self) -> Knobs:
        return Knobs(policy=self.policy, **(self.model_extra or {}))


class RestartsConfig(_Strict):
    """When a replica that keeps dying is given up: `deaths` in a row, each within `within_s` of having been ready."""

    deaths: int = Field(3, ge=1, strict=True)
    within_s: float = Field(120.0, gt=0)
    first_wait_s: float = Field(1.0, ge=0)


class MpsLimitsConfig(_Strict):
    """Caps of each MPS client: `memory: plan` is its share of the memory plan; a percentage of the SMs is checked."""

    memory: Literal["off", "plan"] = "off"
    thread_percentage: int | None = Field(None, ge=1, le=100, strict=True)

    @field_validator("memory", mode="before")
    @classmethod
    def _yaml_reads_off_as_false(cls, value: Any) -> Any:
        return "off" if value is False else value


class ServeArgs(_Strict):
    """The `args:` of the application."""

    model: str = Field("demo", min_length=1)
    served_model_name: str | None = Field(None, min_length=1)
    replicas: int = Field(2, ge=1, le=REPLICA_SLOTS, strict=True)
    device: Literal["auto", "gpu", "cpu"] = "auto"
    gpus: int = Field(1, ge=1, le=GPU_RECORDS, strict=True)
    mps: Literal["auto", "on", "off"] = "auto"
    weights: Literal["auto", "shared", "private"] = "auto"
    mps_limits: MpsLimitsConfig = MpsLimitsConfig()
    start: Literal["auto", "together", "first_alone"] = "auto"
    cpu_pinning: Literal["auto", "off"] = "auto"
    restarts: RestartsConfig = RestartsConfig()
    engine: dict[str, Any] = Field(default_factory=dict)
    balancer: BalancerConfig = BalancerConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    access: AccessConfig = AccessConfig()
    batches: BatchesConfig = BatchesConfig()
    limits: LimitsConfig = LimitsConfig()
    # How long what runs may go on after Ctrl-C, and in a replica that is restarted or replaced.
    drain_s: float = Field(10.0, ge=0, le=3600)

    @field_validator("mps", "cpu_pinning", mode="before")
    @classmethod
    def _yaml_reads_on_as_true(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _fits_the_board(self) -> ServeArgs:
        if self.total_replicas > REPLICA_SLOTS:
            raise ValueError(f"replicas x gpus must be at most {REPLICA_SLOTS}")
        return self

    @model_validator(mode="after")
    def _one_kind_of_keys(self) -> ServeArgs:
        if self.access.api_keys_file and self.engine.get("api_key"):
            raise ValueError(
                "`engine.api_key` and `access.api_keys_file` ask for two keys in one header; keep the file"
            )
        return self

    @property
    def total_replicas(self) -> int:
        """`replicas` on each of `gpus`."""
        return self.replicas * self.gpus

    @property
    def public_name(self) -> str:
        return self.served_model_name or self.model


def parse_args(raw: dict[str, Any]) -> ServeArgs:
    """Check the application's arguments. Raises ConfigError."""
    args = _validated(ServeArgs, raw, "args")
    args = args.model_copy(update={"balancer": _with_queue_limit(args)})
    _check_knobs(args.balancer)
    _check_engine(args.engine)
    numbers = _validated(EngineBounds, args.engine, "engine").model_dump(exclude_none=True)
    return args.model_copy(update={"engine": {**args.engine, **numbers}})


def _with_queue_limit(args: ServeArgs) -> BalancerConfig:
    wished = args.limits.queue_s
    if wished is None:
        return args.balancer
    if "queue_deadline_s" in (args.balancer.model_extra or {}):
        raise ConfigError("`limits.queue_s` and `balancer.queue_deadline_s` are the same limit; set one of them")
    return BalancerConfig(**{**args.balancer.model_dump(), "queue_deadline_s": wished})


def live_knobs(at_start: dict[str, Any], changed: dict[str, Any]) -> Knobs:
    """The knobs that a router started with, with the changed ones. Raises ConfigError: the old ones stay in force."""
    balancer = _validated(BalancerConfig, {**at_start, **changed}, "balancer")
    _check_knobs(balancer)
    return balancer.knobs()


def load(path: Path) -> tuple[ServeArgs, dict[str, Any]]:
    """Read and check a Serve configuration file: its one application's arguments, and the whole document.

    Raises ConfigError when the file is missing, is not YAML, or is not one application of this project.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name an existing configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    applications = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError(f"{path} must hold exactly one entry under `applications`")
    if applications[0].get("import_path") not in IMPORT_PATHS:
        raise ConfigError(f"`import_path` in {path} must be {IMPORT_PATHS[0]}")
    _check_keys(applications[0], APPLICATION_KEYS, "applications.0.")
    _check_keys(document, DOCUMENT_KEYS, "")
    _validated(HttpBounds, document.get("http_options") or {}, "http_options")
    return parse_args(applications[0].get("args") or {}), document


def _validated(model: type[Model], raw: Any, key: str) -> Model:
    """`raw` as a `model`. Raises ConfigError, which names the key within `key` (within nothing for `args`)."""
    try:
        return model.model_validate(raw)
    except pydantic.ValidationError as error:
        raise ConfigError(_sentence(error, key)) from None


def _sentence(error: pydantic.ValidationError, within: str) -> str:
    first = error.errors()[0]
    prefix = () if within == "args" and first["loc"] else (within,)
    key = ".".join(str(part) for part in (*prefix, *first["loc"]))
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(_siblings(first["loc"])))
        return f"unknown key `{key}`; known here are {known}"
    reason = re.sub(r"^(Value error, |Input |String |Value )", "", first["msg"])
    return f"`{key}` is {first['input']!r}, but it {reason}"


_NESTED: dict[str, type[BaseModel]] = {
    "balancer": BalancerConfig,
    "monitoring": MonitoringConfig,
    "access": AccessConfig,
    "limits": LimitsConfig,
    "mps_limits": MpsLimitsConfig,
    "restarts": RestartsConfig,
    "batches": BatchesConfig,
}


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = ServeArgs
    for part in location[:-1]:
        model = _NESTED[str(part)]
    return list(model.model_fields)


def _check_keys(found: dict[str, Any], known: frozenset[str], prefix: str) -> None:
    for key in found:
        if key not in known:
            raise ConfigError(f"unknown key `{prefix}{key}`; known here are {', '.join(sorted(known))}")


def _check_knobs(balancer: BalancerConfig) -> None:
    set_here = balancer.model_extra or {}
    _check_keys(set_here, frozenset(f.name for f in dataclasses.fields(Knobs)), "balancer.")
    _validated(KnobBounds, set_here, "balancer")
    try:
        pydantic.TypeAdapter(Knobs).validate_python(dataclasses.asdict(balancer.knobs()))
    except pydantic.ValidationError as error:
        raise ConfigError(_sentence(error, "balancer")) from None


def _check_engine(engine: dict[str, Any]) -> None:
    for key in engine:
        if key in OWNED_ENGINE_ARGUMENTS:
            raise ConfigError(f"`engine.{key}` belongs to the system: {OWNED_ENGINE_ARGUMENTS[key]}")
    known = _engine_argument_names()
    for key in engine:
        if key not in known:
            raise ConfigError(f"unknown engine argument `engine.{key}`; write one of vLLM's own, with underscores")


def _engine_argument_names() -> set[str]:
    """Every argument of vLLM's server. Imports vLLM (seconds), so only when `engine` is not empty would do, but a
    wrong name is worth more to know before the engines start than the seconds cost."""
    from deployments.engine import argument_names

    return argument_names()
