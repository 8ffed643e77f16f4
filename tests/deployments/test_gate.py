"""The gate before a replica's door: routes, keys and bodies, with an application behind it that reads what it gets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from balancer.access import Access, Keys, Limits, parse_keys
from deployments import routes
from deployments.gate import Gate
from deployments.ingress import Entrance

ALICE = "alice-" + "a" * 32
KEYS = parse_keys(f"alice {ALICE}", Limits())
BEARER = {"authorization": f"Bearer {ALICE}"}
ENTRANCE = Entrance(body_bytes=1000, file_bytes=5000, header_bytes=4096, header_s=1.0, body_s=0.05)


class Behind:
    """An application that reads the whole body and says how much it was; or that its client is gone."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.gone = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope["path"])
        read, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone += 1
                break
            read, more = read + len(message["body"]), message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"read %d" % read})


class Site:
    def __init__(self, keys: Keys | None = None, limits: Limits | None = None, meters: bool = False) -> None:
        self.behind = Behind()
        self.now_s = 5.0
        access = Access(lambda: keys, lambda: self.now_s, limits or Limits())
        self.gate = Gate(self.behind, routes.at_the_replica(["/extra"]), access, meters, ENTRANCE)

    def ask(self, path: str = "/v1/completions", method: str = "POST", **wish: Any) -> httpx.Response:
        async def exchange() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.gate)
            async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
                return await client.request(method, path, **wish)

        return asyncio.run(exchange())


@pytest.mark.parametrize("path", [*sorted(routes.PUBLIC | routes.OPEN | routes.PRIVATE), "/extra", "/v1/files/f-1"])
def test_routes_that_are_served_reach_the_application(path: str) -> None:
    """With a body and without."""
    site = Site()
    assert site.ask(path, content=b"hello").text == "read 5"
    assert site.ask(path, "GET").text == "read 0"
    assert site.behind.asked == [path, path]


@pytest.mark.parametrize(
    "path", ["/scale_elastic_ep", "/v1/load_lora_adapter", "/sleep", "/docs", "/metrics/", "/", "/v1"]
)
def test_other_routes_do_not_even_reach_it(path: str) -> None:
    """vLLM's administration answers nobody, whatever ticket or key is shown."""
    site = Site(KEYS)
    answer = site.ask(path, headers={**BEARER, "x-serve-router-splitwiser": "direct"})
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]
    assert site.behind.asked == []


def test_percent_signs_do_not_hide_a_route() -> None:
    """The path is compared as the application would see it."""
    assert Site().ask("/%73leep").status_code == 404


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": ALICE}, {"x-api-key": "wrong"}, {"authorization": ""},
     {"x-serve-router-splitwiser": "direct"}],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_strangers_are_401_whatever_they_ask(headers: dict[str, str], method: str) -> None:
    """With the error that OpenAI's clients know, and nothing behind the gate stirs."""
    site = Site(KEYS)
    answer = site.ask("/v1/models", method, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "retry-after" not in answer.headers
    assert site.behind.asked == []


@pytest.mark.parametrize("headers", [BEARER, {"x-api-key": ALICE}])
def test_holders_enter(headers: dict[str, str]) -> None:
    """As OpenAI's or as Anthropic's clients show the key."""
    assert Site(KEYS).ask(headers=headers).status_code == 200


@pytest.mark.parametrize("path", sorted(routes.OPEN))
def test_health_needs_no_key(path: str) -> None:
    """A load balancer has none."""
    assert Site(KEYS).ask(path, "GET").status_code == 200


def test_where_no_router_counts_the_gate_does() -> None:
    """Requests per minute, for POSTs only; the refusal says when to come back."""
    site = Site(KEYS, meters=True)
    limited = Site(parse_keys(f"a {ALICE} requests_per_minute=2", Limits()), meters=True)
    assert {site.ask(headers=BEARER).status_code for _ in range(9)} == {200}
    assert [limited.ask(headers=BEARER).status_code for _ in range(3)] == [200, 200, 429]
    refused = limited.ask(headers=BEARER)
    assert (refused.json()["error"]["code"], refused.headers["retry-after"]) == ("request_rate", "30")
    assert limited.ask("/v1/models", "GET", headers=BEARER).status_code == 200
    limited.now_s += 30.0
    assert limited.ask(headers=BEARER).status_code == 200


def test_where_the_router_counts_the_gate_does_not_count_again() -> None:
    """Or every request would cost two."""
    site = Site(parse_keys(f"a {ALICE} requests_per_minute=1", Limits()))
    assert [site.ask(headers=BEARER).status_code for _ in range(3)] == [200] * 3


def test_an_announced_length_beyond_the_limit_is_413_before_a_byte_is_read() -> None:
    """A file has a larger limit of its own."""
    site = Site()
    assert site.ask(content=b"x" * 1000).text == "read 1000"
    answer = site.ask(content=b"x" * 1001)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert answer.headers["connection"] == "close"
    assert site.ask("/v1/files", content=b"x" * 5000).text == "read 5000"
    assert site.ask("/v1/files", content=b"x" * 5001).status_code == 413
    assert len(site.behind.asked) == 2


def chunks(count: int, pause_s: float = 0.0) -> Callable[[], AsyncIterator[bytes]]:
    async def make() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * 300
            await asyncio.sleep(pause_s)

    return make


def test_a_body_in_chunks_is_cut_off_where_it_passes_the_limit() -> None:
    """The application sees its client leave; what it says then does not reach the client, who gets 413."""
    site = Site()
    assert site.ask(content=chunks(3)()).text == "read 900"
    answer = site.ask(content=chunks(40)())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert site.behind.gone == 1


def test_a_body_that_does_not_arrive_in_time_is_408() -> None:
    """However it trickles: the limit is on the whole."""

    async def send_slowly() -> list[dict[str, Any]]:
        site, sent = Site(), []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await asyncio.wait_for(site.gate(scope, receive, send), 10)
        return sent

    start, body = asyncio.run(send_slowly())
    assert start["status"] == 408
    assert json.loads(body["body"])["error"]["code"] == "too_slow"


def test_an_answer_that_did_not_wait_for_the_body_stands() -> None:
    """An application may refuse before it has read everything; one answer is what the client gets."""
    site = Site()

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 415, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.body", "body": b"no"})

    site.gate._app = refuse
    answer = site.ask(content=chunks(40)())
    assert (answer.status_code, answer.text) == (415, "no")


def test_websockets_are_closed_and_the_life_span_passes() -> None:
    """No route is served over a websocket."""

    async def connect() -> tuple[list[Any], list[Any]]:
        site, sent, passed = Site(), [], []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            passed.append(scope["type"])

        async def send(message: Any) -> None:
            sent.append(message["type"])

        site.gate._app = app
        await site.gate({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send)  # type: ignore[arg-type]
        await site.gate({"type": "lifespan"}, None, send)  # type: ignore[arg-type]
        return sent, passed

    assert asyncio.run(connect()) == (["websocket.close"], ["lifespan"])
