"""Who may enter, on the running system without engines: keys and limits, with HAProxy and router and without."""

from __future__ import annotations

import concurrent.futures
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, System, running
from raw_http import head, send

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

ALICE, BOB, CARL, EVE = (f"{name}-{name[0] * 32}" for name in ("alice", "bob", "carl", "eve"))
KEYS = f"alice {ALICE}\nbob {BOB} requests_per_minute=3\ncarl {CARL} concurrent=2\n"
WISH = {"model": "demo", "prompt": "x", "max_tokens": 2}


def guarded(keys: Path) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        application = document["applications"][0]
        application["import_path"] = "benchmarks.echo_app:build"
        access = {"api_keys_file": str(keys), "body_s": 1.5, "header_s": 1.0, "body_bytes": 4 << 20}
        balancer = {"policy": "round_robin"}
        application["args"] = {"replicas": 2, "device": "cpu", "access": access, "balancer": balancer}

    return change


def write(keys: Path, text: str) -> None:
    """In one step, as an editor does: nobody reads a half of it."""
    new = keys.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o600)
    new.replace(keys)


@dataclass
class Site(System):
    """A system of which is known whether each replica counts for itself."""

    plain: bool = False


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(tmp_path_factory.mktemp("keys")) / "keys"
    write(path, KEYS)
    return path


@pytest.fixture(scope="module", params=["haproxy", "plain"])
def site(request: pytest.FixtureRequest, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two echo replicas behind HAProxy and the router, and behind Serve's own proxy."""
    write(keys, KEYS)
    flags = ["--plain"] if request.param == "plain" else []
    with running(tmp_path_factory.mktemp(request.param), *flags, change=guarded(keys)) as system:
        yield Site(**vars(system), plain=request.param == "plain")


def ask(system: Site, secret: str = "", header: str = "authorization", **wish: Any) -> Answer:
    value = f"Bearer {secret}" if header == "authorization" else secret
    return system.post("/v1/completions", {**WISH, **wish}, {header: value} if secret else {})


def only_routed(system: Site) -> None:
    if system.plain:
        pytest.skip("without a router each replica counts requests alone")


def test_only_holders_of_a_key_are_served(site: Site) -> None:
    """Whatever they ask for; strangers hear 401 with OpenAI's error, and health is for everybody."""
    for secret in ("", "wrong", ALICE[:-1], EVE):
        answer = ask(site, secret)
        assert (answer.status, answer.json["error"]["code"]) == (401, "invalid_api_key")
        assert "retry-after" not in answer.headers
    assert site.get("/v1/models").status == 401
    assert site.get("/health").status != 401
    assert ask(site, ALICE).status == 200
    assert ask(site, ALICE, "x-api-key").status == 200
    models = send(site.url, head("GET", "/v1/models", f"authorization: Bearer {ALICE}"))
    assert models.status == 200


def test_the_configured_policy_is_followed_with_a_router_and_without(site: Site) -> None:
    """Round robin: of ten requests one after the other each replica gets its share."""
    answers = [ask(site, ALICE) for _ in range(10)]
    assert {a.policy for a in answers} == {"round_robin"}
    counts = Counter(a.replica for a in answers)
    assert len(counts) == 2
    assert min(counts.values()) >= 3


def test_routes_that_are_not_public_do_not_exist_even_for_holders(site: Site) -> None:
    """Metrics, administration, and the router's own."""
    for path in (
        "/metrics",
        "/%6detrics",
        "/internal/route",
        "/internal/decisions",
        "/scale_elastic_ep",
        "/openapi.json",
    ):
        assert send(site.url, head("GET", path, f"authorization: Bearer {ALICE}")).status == 404, path


def test_a_rate_refuses_and_says_when_to_come_back(site: Site) -> None:
    """Three a minute, shared out where each replica counts alone; nobody else is refused for it."""
    answers = [ask(site, BOB) for _ in range(8)]
    served = sum(a.status == 200 for a in answers)
    assert served == 3 or (site.plain and 1 <= served <= 4)
    refused = next(a for a in answers if a.status != 200)
    assert (refused.status, refused.json["error"]["code"]) == (429, "request_rate")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert ask(site, ALICE).status == 200


def test_requests_at_once_are_limited_for_each_key(site: Site) -> None:
    """Of six streams that clients are slow to read, two go on; when they end, the next may come."""
    only_routed(site)

    def hold(_: int) -> int:
        return ask(site, CARL, stream=True, max_tokens=100_000).status

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        statuses = list(pool.map(hold, range(6)))
    assert 429 in statuses
    assert statuses.count(200) >= 2
    _until(lambda: ask(site, CARL).status == 200)


def test_a_changed_file_of_keys_is_read_while_the_system_serves(site: Site, keys: Path) -> None:
    """A new holder enters and one who was taken out does not, at every replica and the router, within seconds."""
    write(keys, f"eve {EVE}")
    try:
        _until(lambda: [ask(site, EVE).status for _ in range(6)] == [200] * 6)
        _until(lambda: [ask(site, ALICE).status for _ in range(6)] == [401] * 6)
    finally:
        write(keys, KEYS)
    _until(lambda: [ask(site, ALICE).status for _ in range(6)] == [200] * 6)


def test_no_key_reaches_a_log(site: Site) -> None:
    """Not even of those who have none."""
    assert ask(site, EVE).status == 401
    assert site.session is not None
    (folder,) = Path("/tmp/ray").glob(f"session_*_{site.session.pid}")
    logs = [path for path in folder.rglob("*") if path.is_file()]
    assert logs
    for secret in (ALICE, EVE):
        assert [path for path in (*logs, site.log) if secret.encode() in path.read_bytes()] == []


def test_slow_senders_are_not_waited_for(site: Site) -> None:
    """A body that does not come, and one that stops beyond what HAProxy holds; both end with 408."""
    only_routed(site)
    key = f"authorization: Bearer {ALICE}"
    missing = send(site.url, head("POST", "/v1/completions", key, length=50), b"{}")
    assert (missing.status, missing.error["code"]) == (408, "too_slow")
    stopped = send(site.url, head("POST", "/v1/completions", key, length=3 << 20), b" " * (2 << 20))
    assert (stopped.status, stopped.error["code"]) == (408, "too_slow")


def _until(true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
