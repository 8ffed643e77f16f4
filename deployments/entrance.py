"""The configuration's `access:` made into what the gate and the router work with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from balancer.access import Access, Limits
from balancer.key_file import KeyFileError, KeySource
from deployments import routes
from deployments.config import AccessConfig, ConfigError, ServeArgs
from deployments.gate import App, Gate
from deployments.ingress import Entrance


def entrance(config: AccessConfig) -> Entrance:
    return Entrance(
        config.body_bytes,
        config.file_bytes,
        config.header_bytes,
        config.header_s,
        config.body_s,
        tuple(config.extra_routes),
    )


def limits(config: AccessConfig) -> Limits:
    """What a key may use whose own entry says nothing else."""
    return Limits(config.requests_per_minute, config.tokens_per_minute, config.concurrent)


def access(config: AccessConfig, clock: Callable[[], float], doors: int = 1) -> Access:
    """The keys, and the part of their limits that one of `doors` doors lets in. Raises ConfigError."""
    path, default = config.api_keys_file, limits(config)
    try:
        return Access(KeySource(Path(path) if path else None, default, clock), clock, default, doors)
    except KeyFileError as error:
        raise ConfigError(str(error)) from None


def gate(app: App, args: ServeArgs, routed: bool, clock: Callable[[], float]) -> Gate:
    """`app` behind a replica's gate; `routed`: HAProxy and the router are in front of it."""
    extra = args.access.extra_routes
    served = routes.at_the_replica(extra) if routed else routes.public(extra)
    mine = access(args.access, clock, doors=1 if routed else args.total_replicas)
    return Gate(app, served, mine, meters=not routed, entrance=entrance(args.access))
