"""The wiring, and the contract with what is internal to Ray: a test that breaks with an upgrade says what it is for."""

from __future__ import annotations

import importlib.resources
from typing import Any

import pytest
from ray import serve
from ray.serve._private import constants, replica

from balancer.ticket import HEADER
from deployments import app
from deployments.config import ConfigError, parse_args
from deployments.launch import Run, environment, runs_folder

ARGS: dict[str, Any] = {"model": "demo", "replicas": 3, "engine": {"max_model_len": 512}}


@pytest.fixture
def haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")


def deployment(application: serve.Application) -> Any:
    return application._bound_deployment


@pytest.mark.usefixtures("haproxy")
def test_behind_haproxy_the_route_service_is_attached_to_the_replicas() -> None:
    """HAProxy asks the Router deployment; the replicas then have no request router of their own."""
    built = app.build(ARGS)
    assert (deployment(built).name, deployment(built).num_replicas) == ("Replica", 3)
    assert deployment(built._ingress_request_router).name == "Router"
    assert deployment(built._ingress_request_router).init_args[-1] == 8  # batches of so many prompts are split
    assert "BoardRouter" not in str(deployment(built)._deployment_config.request_router_config)


@pytest.mark.usefixtures("plain")
def test_without_haproxy_serves_proxy_gets_the_same_policies() -> None:
    """The replicas carry a BoardRouter with the board's path and the knobs."""
    built = app.build({**ARGS, "balancer": {"policy": "round_robin"}})
    router = deployment(built)._deployment_config.request_router_config
    assert built._ingress_request_router is None
    assert router.request_router_class == "balancer.router:BoardRouter"
    assert router.request_router_kwargs["knobs"]["policy"] == "round_robin"


@pytest.mark.usefixtures("plain")
def test_a_mistake_is_refused_while_building() -> None:
    """`serve run` without the supervisor refuses the same configurations, before any replica."""
    with pytest.raises(ConfigError, match="unknown key `replica`"):
        app.build({"replica": 3})


def test_a_ray_without_the_hook_is_named_with_the_way_around() -> None:
    """The one internal hook is checked for, and its absence is one sentence."""
    with pytest.raises(RuntimeError, match=r"_with_ingress_request_router.*--plain"):
        app.attach_router(object(), object())  # type: ignore[arg-type]


def test_rays_hook_is_there() -> None:
    """Ray 2.60's internal way to have HAProxy ask an application where a request goes."""
    assert hasattr(serve.Application, "_with_ingress_request_router"), "HAProxy can no longer ask the balancer"


def test_rays_late_bound_asgi_application_is_there() -> None:
    """vLLM's application exists only once the engine is up, so Serve must ask for it after the constructor."""
    assert replica.SERVE_BUILD_ASGI_APP_METHOD == "__serve_build_asgi_app__"
    assert hasattr(app.Replica, "__serve_build_asgi_app__")


def test_rays_lua_asks_and_understands_as_the_route_service_answers() -> None:
    """The path, the two fields of the answer, and that the session travels are what the route service relies on."""
    lua = importlib.resources.files("ray.serve._private").joinpath("ingress_request_router.lua.tmpl").read_text()
    for needed in ("POST /internal/route HTTP", '"replica_id"', '"request_headers"', "SESSION_HEADER"):
        assert needed in lua, f"HAProxy's Lua no longer has {needed}"


def test_rays_haproxy_strips_forged_tickets() -> None:
    """Clients must not be able to send what only a router may say."""
    templates = importlib.resources.files("ray.serve._private").joinpath("haproxy_templates.py").read_text()
    assert "http-request del-header {{ ingress_request_router_header_prefix }} -m beg" in templates
    source = importlib.resources.files("ray.serve._private").joinpath("constants.py").read_text()
    assert '"x-serve-router-"' in source, "HAProxy no longer strips this prefix"
    assert HEADER.startswith("x-serve-router-")


def test_every_setting_for_ray_serve_is_one_that_it_reads() -> None:
    """A renamed environment variable would be ignored without a word."""
    source = importlib.resources.files("ray.serve._private").joinpath("constants.py").read_text()
    ours = environment(Run("1-1", runs_folder() / "1-1", "127.0.0.1", 8000, plain=False))
    settings = [name for name in ours if name.startswith("RAY_SERVE_")]
    assert len(settings) >= 10
    assert [name for name in settings if f'"{name}"' not in source] == []
    assert constants.RAY_SERVE_HAPROXY_METRICS_PORT > 0


@pytest.mark.parametrize("replicas", range(1, 65))
def test_exactly_the_replicas_of_a_gpu_fit_on_it(replicas: int) -> None:
    """Ray counts resources in steps of 0.0001: shares must not add up to more than one GPU, nor leave room for more."""
    share = round(app.gpu_share(replicas) * 10_000)
    assert share * replicas <= 10_000
    assert share * (replicas + 1) > 10_000


@pytest.mark.usefixtures("haproxy")
def test_every_gpu_gets_its_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs with three replicas each are six replicas of a third of a GPU."""
    built = app.assemble({}, parse_args({"replicas": 3, "gpus": 2, "balancer": {"weights_read_s": 0.1}}), "gpu", Echo)
    assert deployment(built).num_replicas == 6
    assert deployment(built).ray_actor_options["num_gpus"] == 0.3333


class Echo:
    """Stands for a replica."""
