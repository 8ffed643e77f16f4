"""Whatever is sent: no server error but our own 503, and every replica lives on.

SPLITWISER_FUZZ_S sets how long each of the two long fuzzers runs (`make fuzz`), SPLITWISER_FUZZ_SEED where they begin.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
from body_fuzzer import VALID, BodyFuzzer
from conftest import System
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from schemathesis.generation import GenerationMode

from balancer.counters import REJECTIONS

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]

LASTS_S = float(os.environ.get("SPLITWISER_FUZZ_S", "25"))
SEED = int(os.environ.get("SPLITWISER_FUZZ_SEED", "20261122"))
AT_ONCE = 6
# A client that waits this long goes away; the engine drops its request.
PATIENCE_S = 20.0
OURS = {*REJECTIONS, "starting", "replica_lost"}


def description(system: System) -> dict[str, Any]:
    """The OpenAPI document, which only a replica's own port shows."""
    answer = httpx.get(next(iter(system.direct_urls().values())) + "/openapi.json", timeout=60)  # made when first asked
    document: dict[str, Any] = answer.json()
    return document


def fields(document: dict[str, Any], path: str) -> list[str]:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return sorted(_names(document, schema))


def _names(document: dict[str, Any], schema: dict[str, Any]) -> set[str]:
    if reference := schema.get("$ref"):
        schema = document["components"]["schemas"][reference.rsplit("/", 1)[-1]]
    inner = [_names(document, part) for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ()))]
    return set(schema.get("properties", ())).union(*inner)


def is_fine(answer: httpx.Response) -> bool:
    """Anything below 500; and of those above, the 503 with which the system says that it is full."""
    if answer.status_code < 500:
        return True
    try:
        return answer.status_code == 503 and answer.json()["error"]["code"] in OURS
    except (ValueError, KeyError, TypeError):
        return False


class Witness:
    """Sends, and keeps what came back."""

    def __init__(self, system: System) -> None:
        self._client = httpx.Client(base_url=system.url, timeout=PATIENCE_S)
        self.seen: Counter[str] = Counter()
        self.bad: list[str] = []

    def post(self, path: str, body: bytes) -> None:
        try:
            answer = self._client.post(path, content=body, headers={"content-type": "application/json"})
        except httpx.ReadTimeout:
            self.seen["patience over"] += 1
            return
        self.judge(answer, body)

    def judge(self, answer: httpx.Response, body: bytes) -> None:
        self.seen[f"{answer.request.url.path} {answer.status_code}"] += 1
        if not is_fine(answer):
            self.bad.append(f"{answer.request.url.path} {answer.status_code} {answer.text[:300]} for {body[:2000]!r}")

    def verdict(self, record: Callable[[str, object], None]) -> None:
        print("\n".join(f"{n:6} {what}" for what, n in sorted(self.seen.items())))
        record("answers", dict(self.seen))
        assert self.bad == []
        assert sum(self.seen.values()) > 20


@pytest.fixture
def witness(system: System, record_property: Callable[[str, object], None]) -> Any:
    """Afterwards no replica was replaced, each of them answers, and nothing is left in flight."""
    before = system.direct_urls()
    witness = Witness(system)
    yield witness
    witness.verdict(record_property)
    assert system.direct_urls() == before
    for name in before:
        wish = {"model": "demo", "prompt": "x", "max_tokens": 2}
        assert system.post_directly(name, "/v1/completions", wish).status == 200


def send_mangled(system: System, witness: Witness, lasts_s: float) -> None:
    """Valid bodies of every route with a few fields, or a few bytes, made wrong; several clients at once."""
    document = description(system)
    bodies = iter(BodyFuzzer({path: fields(document, path) for path in VALID}, SEED))
    ends_s = time.monotonic() + lasts_s
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        while time.monotonic() < ends_s:
            for future in [pool.submit(witness.post, *pair) for pair in itertools.islice(bodies, 4 * AT_ONCE)]:
                future.result()


def test_mangled_bodies_of_a_few_seconds(system: System, witness: Witness) -> None:
    """The beginning of what the long fuzzer sends."""
    send_mangled(system, witness, 4.0)


@pytest.mark.long
def test_mangled_bodies_break_nothing(system: System, witness: Witness) -> None:
    """For as long as is asked."""
    send_mangled(system, witness, LASTS_S)


@pytest.mark.long
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_what_the_served_openapi_describes_breaks_nothing(
    system: System, witness: Witness, mode: GenerationMode
) -> None:
    """Schemathesis' bodies for every public route, as the description has them and as it forbids them."""
    document = description(system)
    paths = [path for path in VALID if LASTS_S > 60 or path in ("/v1/completions", "/v1/chat/completions")]
    for path in paths:
        operation = schemathesis.openapi.from_dict(document)[path]["POST"]
        ends_s = time.monotonic() + LASTS_S / 2 / len(paths)
        with pytest.raises(TimeIsUpError):
            send_until(ends_s, path, operation.as_strategy(generation_mode=mode), witness)


def send_until(ends_s: float, path: str, cases: SearchStrategy[Any], witness: Witness) -> None:
    """Raises TimeIsUpError: Hypothesis has no end in time of its own."""

    @seed(SEED)
    @settings(max_examples=100_000, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=cases)
    def send(case: Any) -> None:
        if time.monotonic() > ends_s:
            raise TimeIsUpError
        body = case.body if isinstance(case.body, bytes) else json.dumps(short(case.body)).encode()
        witness.post(path, body)

    send()


class TimeIsUpError(Exception):
    """Enough was sent."""


def short(body: Any) -> Any:
    """The same wish for an answer of at most a few tokens, where it wishes for one."""
    if not isinstance(body, dict):
        return body
    name = next((n for n in ("max_output_tokens", "max_completion_tokens", "max_tokens") if n in body), "max_tokens")
    wish = body.get(name, 4)
    return {**body, name: min(wish, 4)} if isinstance(wish, int | float) else body
