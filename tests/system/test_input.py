"""Bad input gets its 4xx, at the public address and at a replica's own port, and harms no replica."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import System
from raw_http import head, post, send

from balancer.ticket import DIRECT, HEADER

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DEEP = 100_000


def wish(**changes: Any) -> bytes:
    return json.dumps({"model": "demo", "prompt": "x", "max_tokens": 2, **changes}).encode()


def literal(name: str, value: str) -> bytes:
    """A field whose value JSON's own writer would not write."""
    return wish()[:-1] + f', "{name}": {value}}}'.encode()


def talk(**changes: Any) -> bytes:
    return json.dumps({"model": "demo", "messages": [{"role": "user", "content": "x"}], **changes}).encode()


# What is sent, and what it must get. vLLM's own words are OpenAI's form but where it could not read the body at all.
BODIES: dict[str, tuple[str, bytes, int]] = {
    "not JSON": (COMPLETIONS, b"{", 400),
    "not an object": (COMPLETIONS, b"[]", 400),
    "a number": (COMPLETIONS, b"7", 400),
    "null": (COMPLETIONS, b"null", 400),
    "empty": (COMPLETIONS, b"", 400),
    "opened 100,000 times": (COMPLETIONS, b"[" * DEEP, 400),
    "nested 100,000 deep": (COMPLETIONS, b"[" * DEEP + b"]" * DEEP, 400),
    "a prompt nested 100,000 deep": (COMPLETIONS, literal("prompt", "[" * DEEP + "]" * DEEP), 400),
    "an unknown field nested 100,000 deep": (COMPLETIONS, literal("x", '{"a":' * DEEP + "1" + "}" * DEEP), 400),
    "invalid UTF-8": (COMPLETIONS, b'{"model": "demo", "prompt": "\xff\xfe"}', 400),
    "half a surrogate pair": (COMPLETIONS, literal("prompt", '"\\ud800"'), 400),
    "no prompt": (COMPLETIONS, b'{"model": "demo"}', 400),
    "an empty prompt": (COMPLETIONS, wish(prompt=""), 400),
    "a prompt over the model's length": (COMPLETIONS, wish(prompt="word " * 5000), 400),
    "token ids outside the vocabulary": (COMPLETIONS, wish(prompt=[10**9]), 400),
    "wrong model": (COMPLETIONS, wish(model="nobody"), 404),
    "a model that is no name": (COMPLETIONS, wish(model=3), 400),
    "max_tokens 0": (COMPLETIONS, wish(max_tokens=0), 400),
    "max_tokens -1": (COMPLETIONS, wish(max_tokens=-1), 400),
    "max_tokens 10^9": (COMPLETIONS, wish(max_tokens=10**9), 400),
    "max_tokens 10^400": (COMPLETIONS, wish(max_tokens=10**400), 400),
    "max_tokens x": (COMPLETIONS, wish(max_tokens="x"), 400),
    "temperature NaN": (COMPLETIONS, literal("temperature", "NaN"), 400),
    "temperature infinite": (COMPLETIONS, literal("temperature", "1e999"), 400),
    "temperature -1": (COMPLETIONS, wish(temperature=-1), 400),
    "n 0": (COMPLETIONS, wish(n=0), 400),
    "n 10^9": (COMPLETIONS, wish(n=10**9), 400),
    "n beyond OpenAI's 128": (COMPLETIONS, wish(n=129), 400),
    "a regular expression that is none": (COMPLETIONS, wish(structured_outputs={"regex": "("}), 400),
    "a schema of no known type": (COMPLETIONS, wish(structured_outputs={"json": {"type": "zzz"}}), 400),
    "chat without messages": (CHAT, b'{"model": "demo", "messages": []}', 400),
    "chat messages that are a string": (CHAT, b'{"model": "demo", "messages": "x"}', 400),
    "a chat template of one's own": (CHAT, talk(chat_template="{% for i in range(10 ** 9) %}x{% endfor %}"), 400),
    "a picture from a local file": (
        CHAT,
        talk(
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
        ),
        400,
    ),
}
UNREADABLE = {name for name in BODIES if "deep" in name or "times" in name or "UTF-8" in name}


@pytest.fixture(scope="module")
def unharmed(system: System) -> Iterator[System]:
    """Afterwards the same replicas serve, each of them."""
    before = system.direct_urls()
    yield system
    assert system.direct_urls() == before
    for name in before:
        assert system.post_directly(name, COMPLETIONS, json.loads(wish())).status == 200
    assert system.complete().status == 200


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_gets_its_4xx(unharmed: System, name: str) -> None:
    """The same at the ingress, where the router reads it first, and at a replica that is asked directly."""
    path, body, status = BODIES[name]
    replica = next(iter(unharmed.direct_urls().values()))
    for answer in (post(unharmed.url, path, body), post(replica, path, body, f"{HEADER}: {DIRECT.policy}")):
        assert answer.status == status, answer.body[:500]
        assert name in UNREADABLE or answer.error


def test_a_missing_model_is_the_one_that_is_served(unharmed: System) -> None:
    """vLLM's way: an address that serves one model needs no name for it."""
    assert post(unharmed.url, COMPLETIONS, b'{"prompt": "x", "max_tokens": 1}').status == 200


@pytest.mark.parametrize("type_", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_body_of_another_type_is_refused(unharmed: System, type_: str) -> None:
    """A web page can send these without asking its user; JSON it cannot."""
    sent = head("POST", COMPLETIONS, length=len(wish())).replace(b"application/json", type_.encode())
    assert send(unharmed.url, sent + wish()).status == 400


@pytest.mark.parametrize("at", ["ingress", "replica"])
def test_100_megabytes_are_refused_before_they_are_sent_when_they_are_announced(unharmed: System, at: str) -> None:
    """413 for the headers alone."""
    url = unharmed.url if at == "ingress" else next(iter(unharmed.direct_urls().values()))
    answer = send(url, head("POST", COMPLETIONS, f"{HEADER}: {DIRECT.policy}", length=100_000_000))
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("at", ["ingress", "replica"])
def test_100_megabytes_in_chunks_are_cut_off(unharmed: System, at: str) -> None:
    """Their length is not known before: they are counted as they come."""
    url = unharmed.url if at == "ingress" else next(iter(unharmed.direct_urls().values()))
    start = head("POST", COMPLETIONS, "transfer-encoding: chunked", f"{HEADER}: {DIRECT.policy}")
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    answer = send(url, start, *[chunk] * 100, b"0\r\n\r\n")
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")


def test_a_length_that_is_too_short_cuts_the_json(unharmed: System) -> None:
    """What follows is not taken for a second request's beginning that is served."""
    answer = send(unharmed.url, head("POST", COMPLETIONS, length=5) + wish())
    assert answer.status == 400


@pytest.mark.parametrize("length", ["x", "-1", "1e3", str(10**30)])
def test_a_length_that_is_none_is_refused(unharmed: System, length: str) -> None:
    """By HAProxy, before anybody else sees it. One that is too long is a slow sender: see test_ingress."""
    assert send(unharmed.url, head("POST", COMPLETIONS, length=length) + wish()).status == 400


def test_huge_headers_are_refused(unharmed: System) -> None:
    """431 while they fit into HAProxy's buffer, 400 beyond."""
    lines = "x-a: " + "a" * 20_000, "x-a: " + "a" * 2_000_000
    assert [send(unharmed.url, head("GET", "/v1/models", line)).status for line in lines] == [431, 400]


@pytest.mark.parametrize("forged", ["a\r\n b: c", "a\rb", 'a"b', "\xe9\xff", "a" * 5000, "a b"])
def test_a_forged_request_id_is_never_taken_over(unharmed: System, forged: str) -> None:
    """Refused where HTTP forbids it, else replaced by one of ours; the engine's own id follows."""
    answer = send(unharmed.url, head("POST", COMPLETIONS, f"x-request-id: {forged}", length=len(wish())) + wish())
    if answer.status == 400:
        return
    assert answer.status == 200
    mine = answer.headers["x-request-id"]
    assert len(mine) == 36
    assert json.loads(answer.body)["id"] == f"cmpl-{mine}"


@pytest.mark.parametrize(
    "path", ["/v1/nothing", "/metrics", "/%6detrics", "/scale_elastic_ep", "/docs", "/internal/route"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_route_is_404(unharmed: System, path: str, method: str) -> None:
    """Also where vLLM has one there that is not for clients; test_ingress has the long list."""
    answer = send(unharmed.url, head(method, path, length=0))
    assert answer.status == 404
    assert answer.error


def test_a_replicas_own_port_does_not_administrate_either(unharmed: System) -> None:
    """Whatever ticket is shown; metrics and the API's description are for this machine."""
    for url in unharmed.direct_urls().values():
        for path in ("/scale_elastic_ep", "/v1/load_lora_adapter", "/start_profile", "/sleep"):
            assert post(url, path, b"{}", f"{HEADER}: {DIRECT.policy}").status == 404
        assert send(url, head("GET", "/openapi.json")).status == 200
