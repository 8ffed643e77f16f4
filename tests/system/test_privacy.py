"""What other users of the machine, and other machines, see of a running system: nothing."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

import psutil
import pytest
from conftest import System, belongings
from raw_http import post

from balancer.board import board_path
from deployments.launch import runs_folder

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

# Unlike any word of the demo model's, and unlike anything that vLLM or Ray would write.
MARKER = "xyzzyplugh"


def session_folder(system: System) -> Path:
    assert system.session is not None
    (folder,) = Path("/tmp/ray").glob(f"session_*_{system.session.pid}")
    return folder


def listening(system: System) -> dict[str, list[str]]:
    """Each address on which a process of the run listens, with who does."""
    found: dict[str, list[str]] = {}
    for process in belongings(system, system.run_id):
        try:
            for c in process.net_connections("tcp"):
                if c.status == psutil.CONN_LISTEN:
                    found.setdefault(c.laddr.ip, []).append(f"{process.name()}:{c.laddr.port}")
        except psutil.NoSuchProcess:
            continue
    return found


def is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def test_every_port_is_on_loopback(system: System) -> None:
    """HAProxy's, the router's, the replicas', the exporter's, and all of Ray's."""
    found = listening(system)
    assert sum(map(len, found.values())) > 10
    assert {ip: who for ip, who in found.items() if not is_loopback(ip)} == {}


def test_the_runs_files_are_its_users_alone(system: System) -> None:
    """The run's folder, the board and what lies beside it, Ray's session with all logs and sockets in it."""
    for folder in (runs_folder(), runs_folder() / system.run_id, session_folder(system)):
        assert folder.stat().st_mode & 0o777 == 0o700, folder
    board = board_path(system.run_id)
    shared = list(board.parent.glob(board.name + "*"))
    logs = [path for path in session_folder(system).glob("logs/**/*") if path.is_file()]
    assert shared
    assert logs
    assert [path for path in (*shared, *logs) if path.stat().st_mode & 0o077] == []


def test_haproxys_administration_is_its_users_alone(system: System) -> None:
    """With it, one could send requests elsewhere."""
    (socket,) = (runs_folder() / system.run_id).glob("*/ctl")
    assert socket.stat().st_mode & 0o777 == 0o600


def test_no_prompt_reaches_a_log(system: System) -> None:
    """Neither of answered requests, nor of refused ones, nor of those that could not be read."""
    good = {"model": "demo", "prompt": MARKER, "max_tokens": 2}
    assert system.post("/v1/completions", good).status == 200
    chat = {"model": "demo", "messages": [{"role": "user", "content": MARKER}], "max_tokens": 2}
    assert system.post("/v1/chat/completions", chat).status == 200
    assert system.post("/v1/completions", {**good, "prompt": MARKER * 2000}).status == 400
    assert system.post("/v1/completions", {**good, "temperature": MARKER}).status == 400
    assert (
        system.post("/v1/chat/completions", {**chat, "messages": [{"role": "user", "content": {"a": MARKER}}]}).status
        == 400
    )
    broken = f'{{"model": "demo", "prompt": "{MARKER}", '.encode()
    assert post(system.url, "/v1/completions", broken).status == 400
    assert system.post("/v1/completions", json.dumps(good).encode() + b"\xff").status == 400
    logs = [path for path in session_folder(system).rglob("*") if path.is_file()]
    assert len(logs) > 10
    assert [path for path in (*logs, system.log) if MARKER.encode() in path.read_bytes()] == []
