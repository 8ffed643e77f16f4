"""Wires the rooms together: `build(args)` is the `import_path` of serve_config.yaml."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from balancer.board import board_path
from balancer.knobs import Knobs
from balancer.route_service import RouteService
from deployments import device, entrance, gpu_setup, privacy
from deployments.config import AccessConfig, ServeArgs, live_knobs, parse_args
from deployments.device_manager import DeviceManager
from deployments.processes import RUN_VARIABLE
from deployments.replica import Replica

# Serve's own limits would refuse before the policy has spoken; how many a replica takes is the balancer's decision.
_UNLIMITED = 1_000_000
# Serve runs user code in a thread of its own by default, which adds a hop between threads to every decision and every
# streamed chunk.
_ONE_THREAD = {"env_vars": {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}}
# A vLLM engine on CPUs takes 5 s to end in order; killed sooner it leaves its shared memory behind.
_STOPPING: dict[str, Any] = {"graceful_shutdown_timeout_s": 7.0, "graceful_shutdown_wait_loop_s": 0.1}
# Serve replaces a replica after three failed checks in a row.
_HEALTH_EVERY_S = 1.0
# When to give up a replica that does not start is decided by its place (deployments/places.py), not by Serve's counts.
_RETRIES_OF_REPLICAS = 1_000_000
_RETRIES = 3


def gpu_share(replicas: int) -> float:
    """What one of `replicas` takes of a GPU, so that exactly so many fit: Ray counts in steps of 0.0001 and rounds."""
    return 10_000 // replicas / 10_000


def build(args: dict[str, Any]) -> serve.Application:
    """The Serve application for these arguments. Raises ConfigError, in one sentence, before anything starts."""
    config = parse_args(args)
    on = device.resolve(config)
    if on == "gpu":
        gpu_setup.check(config, _run_name())
    return assemble(args, config, on, Replica)


def assemble(args: dict[str, Any], config: ServeArgs, on: str, replica: type) -> serve.Application:
    """Wire `replica` to the device manager and the balancer, through HAProxy where Serve has it, else Serve's proxy."""
    board, haproxy = str(board_path(_run_name())), haproxy_enabled()
    app = _replicas(replica, config, on, haproxy, board).bind(args, board, haproxy, _manager(args, on, board))
    return attach_router(app, _router(config, on, board)) if haproxy else app


def _run_name() -> str:
    return os.environ.get(RUN_VARIABLE, "default")


def haproxy_enabled() -> bool:
    """Whether Serve was started with HAProxy as its ingress."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def attach_router(app: serve.Application, router: serve.Application) -> serve.Application:
    """Make Serve's HAProxy ask `router` where each POST goes: the one place that uses a hook internal to Ray (2.60).

    Raises RuntimeError when a Ray upgrade took the hook away; the plain Serve proxy still works then.
    """
    if not hasattr(app, "_with_ingress_request_router"):
        raise RuntimeError(
            "this Ray has no `_with_ingress_request_router`, by which HAProxy asks the balancer; "
            "install ray==2.60.0, or run with `--plain` to use Serve's own proxy"
        )
    return app._with_ingress_request_router(router)


def haproxy_socket() -> Path:
    """Where this node's HAProxy takes administration commands; Serve puts the node's id into the path."""
    from ray.serve._private.constants import RAY_SERVE_HAPROXY_SOCKET_PATH

    path = Path(RAY_SERVE_HAPROXY_SOCKET_PATH)
    return path.parent / str(ray.get_runtime_context().get_node_id()) / path.name


def _replicas(replica: type, config: ServeArgs, on: str, haproxy: bool, board: str) -> serve.Deployment:
    options: dict[str, Any] = {}
    if not haproxy:
        options["request_router_config"] = RequestRouterConfig(
            request_router_class="balancer.router:BoardRouter",
            request_router_kwargs={"board_path": board, "knobs": _knobs(config, on)},
        )
    return serve.deployment(
        replica,
        name="Replica",
        num_replicas=config.total_replicas,
        max_ongoing_requests=_UNLIMITED,
        **_STOPPING,
        health_check_period_s=_HEALTH_EVERY_S,
        max_constructor_retry_count=_RETRIES_OF_REPLICAS,
        ray_actor_options={
            "num_cpus": 0,
            "num_gpus": gpu_share(config.replicas) if on == "gpu" else 0,
            "runtime_env": _ONE_THREAD,
        },
        **options,
    )


def _manager(args: dict[str, Any], on: str, board: str) -> serve.Application:
    deployment = serve.deployment(
        DeviceManager,
        name="DeviceManager",
        max_constructor_retry_count=_RETRIES,
        ray_actor_options={"num_cpus": 0},
        **_STOPPING,
    )
    return deployment.bind(args, on, board, _run_name())


def _router(config: ServeArgs, on: str, board: str) -> serve.Application:
    deployment = serve.deployment(
        Router,
        name="Router",
        max_ongoing_requests=_UNLIMITED,
        max_constructor_retry_count=_RETRIES,
        **_STOPPING,
        ray_actor_options={"num_cpus": 0, "runtime_env": _ONE_THREAD},
    )
    return deployment.bind(board, _knobs(config, on), config.access.model_dump(), config.batches.split_from)


def _knobs(config: ServeArgs, on: str) -> dict[str, Any]:
    """The user's knobs, and what the policy should know of model and device before it has measured anything."""
    knobs = dataclasses.asdict(config.balancer.knobs())
    if on == "gpu" and knobs["weights_read_s"] is None:
        knobs["weights_read_s"] = gpu_setup.weights_read_s(config)
    return knobs


@serve.ingress()
class Router:
    """The route service as a Serve deployment, one per proxy node."""

    def __init__(self, board: str, knobs: dict[str, Any], access: dict[str, Any], split_from: int) -> None:
        privacy.keep_grpc_on_loopback()
        self._knobs = knobs
        keys = entrance.access(AccessConfig(**access), time.monotonic)
        service = RouteService(Path(board), Knobs(**knobs), time.monotonic, haproxy_socket(), keys, split_from)
        self._service = service

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's live change: the keys of `balancer:`, each that is left out as it was at the start."""
        self._service.reconfigure(live_knobs(self._knobs, user_config))

    async def __serve_build_asgi_app__(self) -> RouteService:
        await self._service.start()
        return self._service

    def check_health(self) -> None:
        """Serve replaces the router when this raises."""
        self._service.check()

    async def __del__(self) -> None:
        await self._service.close()
