"""A run that is going on: its balancer changed without restarting an engine, its last decisions read."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from deployments import privacy, processes
from deployments.config import ConfigError, load

# What the run was started with, in its folder.
STARTED_WITH = "config.yaml"
ROUTER = "Router"


def note_start(config_path: Path, folder: Path) -> None:
    shutil.copyfile(config_path, folder / STARTED_WITH)


def changed_document(new: Path, folder: Path) -> dict[str, Any]:
    """The running document with `new`'s `balancer:` as the router's `user_config`.

    Raises ConfigError when anything else differs: that would take another run.
    """
    _, wanted = load(new)
    _, running = load(folder / STARTED_WITH)
    if _without_balancer(wanted) != _without_balancer(running):
        raise ConfigError(
            f"{new} differs from the running configuration in more than `args.balancer`, which takes new engines; "
            "stop the run and start it with the new file"
        )
    document = copy.deepcopy(running)
    balancer = wanted["applications"][0].get("args", {}).get("balancer") or {}
    document["applications"][0]["deployments"] = [{"name": ROUTER, "user_config": balancer}]
    return document


def _without_balancer(document: dict[str, Any]) -> dict[str, Any]:
    rest = copy.deepcopy(document)
    (rest["applications"][0].get("args") or {}).pop("balancer", None)
    return rest


def deploy(document: dict[str, Any], folder: Path) -> None:
    """Hand the document to the run's Serve, and wait until it is in force. Raises ConfigError when that fails."""
    # A Ray that `serve run` started on its own asks for the token of this user; an explicit address does not imply it.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.update(privacy.LOOPBACK_ONLY)  # as the run itself was started
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    ray.init(address=_ray_address(folder.name), namespace="serve", log_to_driver=False, logging_level="ERROR")
    try:
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(document), _blocking=True)
        states = {a.status: a.message for a in serve.status().applications.values()}
        if set(states) != {"RUNNING"}:
            raise ConfigError(f"Serve did not take the change ({states}); the old configuration stays in force")
    finally:
        ray.shutdown()


def _ray_address(run_id: str) -> str:
    """Of this run's Ray: others may run beside it."""
    for process in processes.of_run(run_id, None):
        with contextlib.suppress(psutil.Error):
            found = re.search(r"--gcs[-_]address=(\S+)", " ".join(process.cmdline()))
            if found:
                return found[1]
    raise ConfigError("the run's Ray cannot be found; it is still starting, or has ended")


def decisions(folder: Path) -> list[dict[str, Any]]:
    """The last decisions of every router of the run, oldest first. Raises ConfigError behind Serve's own proxy."""
    found: list[dict[str, Any]] = []
    for address in _routers(folder):
        with urllib.request.urlopen(f"http://{address}/internal/decisions", timeout=5) as answer:
            found += json.load(answer)
    return sorted(found, key=lambda decision: float(decision["at_s"]))


def _routers(folder: Path) -> list[str]:
    """Where HAProxy asks, as Serve wrote it into the script that HAProxy runs."""
    scripts = [path.read_text() for path in folder.glob("*/ingress_request_router.lua")]
    if not scripts:
        raise ConfigError("this run has no router to ask: it is not behind HAProxy, or has not begun to serve")
    return re.findall(r'host_header = "([^"]+)"', "".join(scripts))
