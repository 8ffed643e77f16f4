"""The system as shipped, with two real vLLM engines, seen by its clients."""

from __future__ import annotations

import concurrent.futures

import openai
import pytest
from conftest import System

from balancer.ticket import HEADER, Ticket

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

GREEDY = {"temperature": 0.0, "max_tokens": 12}


@pytest.fixture
def client(system: System) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0)


def test_a_completion_is_text_of_the_length_asked_for(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="Once upon a time", max_tokens=16)
    assert answer.choices[0].text.strip()
    assert answer.choices[0].text.isprintable()
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_a_stream_carries_the_same_text_and_ends_with_its_usage(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt="The sea", **GREEDY)  # type: ignore[call-overload]
    chunks = list(
        client.completions.create(
            model="demo", prompt="The sea", stream=True, stream_options={"include_usage": True}, **GREEDY
        )  # type: ignore[call-overload]
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 12
    assert len([c for c in chunks if c.choices]) > 1


def test_chat_answers_and_streams(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "How do you do?"}]
    answer = client.chat.completions.create(model="demo", messages=question, **GREEDY)  # type: ignore[call-overload]
    stream = client.chat.completions.create(model="demo", messages=question, stream=True, **GREEDY)  # type: ignore[call-overload]
    assert answer.choices[0].message.content
    assert "".join(c.choices[0].delta.content or "" for c in stream) == answer.choices[0].message.content


def test_the_model_is_listed_under_its_served_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]


@pytest.mark.parametrize(
    ("wish", "status"),
    [
        ({"model": "nobody"}, 404),
        ({"max_tokens": -1}, 400),
        ({"max_tokens": "x"}, 400),
        ({"max_tokens": 10**9}, 400),
        ({"temperature": -1}, 400),
        ({"prompt": "word " * 3000}, 400),
        ({"prompt": {"a": 1}}, 400),
    ],
)
def test_a_bad_wish_gets_vllms_own_4xx_with_an_openai_error_body(
    system: System, wish: dict[str, object], status: int
) -> None:
    answer = system.post("/v1/completions", {"model": "demo", "prompt": "x", **wish})
    assert answer.status == status
    assert answer.json["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"' * 10000, b"[" * 100_000, b'{"model": "demo", "prompt": NaN}']
)
def test_a_body_that_is_no_request_gets_a_4xx_and_harms_no_replica(system: System, body: bytes) -> None:
    answer = system.post("/v1/completions", body)
    assert 400 <= answer.status < 500, answer.body
    assert system.complete().status == 200


def test_an_unknown_route_is_404(system: System) -> None:
    assert system.get("/v1/nothing").status == 404
    assert system.post("/v1/nothing", {}).status == 404


def test_every_answer_names_its_replica_and_the_policy_that_chose_it(system: System) -> None:
    answer = system.complete()
    assert answer.replica in system.direct_urls()
    assert answer.policy == "gpu_aware"


def test_the_same_request_repeated_shows_both_replicas(system: System) -> None:
    replicas = {system.complete(max_tokens=1).replica for _ in range(40)}  # all on one: a chance of 2 in 2 ** 40
    assert replicas == set(system.direct_urls())


def test_requests_at_the_same_time_are_served_by_both_replicas(system: System) -> None:
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda k: system.complete(f"{k} Once", max_tokens=48), range(160)))
    assert {a.status for a in answers} == {200}
    assert {a.replica for a in answers} == set(system.direct_urls())


def test_greedy_text_through_the_balancer_is_what_each_engine_says_itself(system: System) -> None:
    prompt = {"model": "demo", "prompt": "A quiet harbour", **GREEDY}
    texts = {system.post_directly(name, "/v1/completions", prompt).text for name in system.direct_urls()}
    assert texts == {system.post("/v1/completions", prompt).text}


def test_a_replica_refuses_work_that_did_not_pass_the_router(system: System) -> None:
    name, url = next(iter(system.direct_urls().items()))
    answer = system.post("/v1/completions", {"model": "demo", "prompt": "x"}, url=url)
    assert answer.status == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json["error"]["code"] == "starting"
    assert name


def test_a_ticket_forged_by_a_client_is_stripped(system: System) -> None:
    forged = Ticket("forged", "forged", status=429, retry_after_s=9.0).encode()
    answer = system.post("/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 1}, {HEADER: forged})
    assert (answer.status, answer.policy) == (200, "gpu_aware")


def test_a_request_id_comes_back(system: System) -> None:
    answer = system.post(
        "/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 1}, {"x-request-id": "my-own-id"}
    )
    assert answer.headers["x-request-id"] == "my-own-id"


def test_nothing_but_the_replicas_own_ports_listens_beyond_loopback(system: System) -> None:
    from conftest import belongings

    listening = [
        (process.name(), c.laddr.ip, c.laddr.port)
        for process in belongings(system, system.run_id)
        if "haproxy" in process.name()
        for c in process.net_connections("tcp")
        if c.status == "LISTEN"
    ]
    assert listening
    assert {ip for _, ip, _ in listening} == {"127.0.0.1"}
