"""The arguments of `serve_config.yaml`, checked: what is unknown or impossible is refused in one sentence naming the key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from balancer.board import REPLICA_SLOTS
from balancer.policies import POLICIES, Knobs

IMPORT_PATH = "deployments.app:build"

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


class ConfigError(ValueError):
    """A setting is unknown or impossible. The message is one sentence that names the key and the mend."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MonitoringConfig(_Strict):
    """How the machine is watched."""

    sample_hz: float = Field(25.0, ge=1.0, le=100.0)
    memory_reserve_gib: float = Field(1.0, ge=0.0)


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


class ServeArgs(_Strict):
    """The `args:` of the application."""

    model: str = "demo"
    served_model_name: str | None = None
    replicas: int = Field(2, ge=1, le=REPLICA_SLOTS)
    device: Literal["auto", "gpu", "cpu"] = "auto"
    mps: Literal["auto", "on", "off"] = "auto"
    engine: dict[str, Any] = Field(default_factory=dict)
    balancer: BalancerConfig = BalancerConfig()
    monitoring: MonitoringConfig = MonitoringConfig()

    @field_validator("mps", mode="before")
    @classmethod
    def _yaml_reads_on_as_true(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @property
    def public_name(self) -> str:
        return self.served_model_name or self.model


def parse_args(raw: dict[str, Any]) -> ServeArgs:
    """Check the application's arguments. Raises ConfigError."""
    try:
        args = ServeArgs.model_validate(raw)
    except pydantic.ValidationError as error:
        raise ConfigError(_sentence(error)) from None
    _check_knobs(args.balancer)
    _check_engine(args.engine)
    return args


def load(path: Path) -> tuple[ServeArgs, dict[str, Any]]:
    """Read and check a Serve configuration file: its one application's arguments, and the whole document.

    Raises ConfigError when the file is missing, is not YAML, or is not one application of this project.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name an existing configuration file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    applications = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError(f"{path} must hold exactly one entry under `applications`")
    if applications[0].get("import_path") != IMPORT_PATH:
        raise ConfigError(f"`import_path` in {path} must be {IMPORT_PATH}")
    return parse_args(applications[0].get("args") or {}), document


def _sentence(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(_siblings(first["loc"])))
        return f"unknown key `{key}`; known here are {known}"
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"`{key}` is {first['input']!r}, but it {reason}"


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = ServeArgs
    for part in location[:-1]:
        model = {"balancer": BalancerConfig, "monitoring": MonitoringConfig}[str(part)]
    return list(model.model_fields)


def _check_knobs(balancer: BalancerConfig) -> None:
    known = {f.name for f in dataclasses.fields(Knobs)}
    for key in balancer.model_extra or {}:
        if key not in known:
            raise ConfigError(f"unknown key `balancer.{key}`; known here are {', '.join(sorted(known))}")
    try:
        pydantic.TypeAdapter(Knobs).validate_python(dataclasses.asdict(balancer.knobs()))
    except pydantic.ValidationError as error:
        raise ConfigError(f"`balancer.{_sentence(error).removeprefix('`')}") from None


def _check_engine(engine: dict[str, Any]) -> None:
    for key in engine:
        if key in OWNED_ENGINE_ARGUMENTS:
            raise ConfigError(f"`engine.{key}` belongs to the system: {OWNED_ENGINE_ARGUMENTS[key]}")
    known = _engine_argument_names()
    for key in engine:
        if key not in known:
            raise ConfigError(f"unknown engine argument `engine.{key}`; vLLM's own arguments are allowed, with underscores")


def _engine_argument_names() -> set[str]:
    """Every argument of vLLM's server. Imports vLLM (seconds), so only when `engine` is not empty would do, but a
    wrong name is worth more to know before the engines start than the seconds cost."""
    from deployments.engine import argument_names

    return argument_names()
