"""What a replica is told about batches: where they are kept, where the system is asked, and with which key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from starlette.applications import Starlette

from balancer.key_file import INTERNAL_VARIABLE
from deployments.batches import Batches, public_url, server_key, store_folder
from deployments.config import parse_args
from deployments.launch import Run, environment, runs_folder
from deployments.slot import Slot


def test_batches_are_kept_where_the_configuration_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else below the user's state folder, apart for each served model, whatever its name."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert store_folder(parse_args({"batches": {"folder": "~/kept"}})) == Path("/home/me/kept")
    own = store_folder(parse_args({"model": "/models/../a b", "served_model_name": "org/../x y"}))
    assert own == Path("/home/me/.local/state/splitwiser/org_.._x_y.batches")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert store_folder(parse_args({})) == tmp_path / "splitwiser" / "demo.batches"


def test_lines_go_to_the_address_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """`splitwiser serve` tells it to all that it starts; a bare `serve run` is at Serve's default address."""
    run = Run("1-1", runs_folder() / "1-1", "0.0.0.0", 8123, plain=False)
    monkeypatch.setenv("SPLITWISER_URL", environment(run)["SPLITWISER_URL"])
    assert public_url() == "http://127.0.0.1:8123"
    monkeypatch.delenv("SPLITWISER_URL")
    assert public_url() == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("engine", "variable", "key"),
    [({}, None, None), ({"api_key": "k"}, "v", "k"), ({"api_key": ["a", "b"]}, None, "a"), ({}, "v", "v")],
)
def test_the_server_asks_itself_with_its_own_key(
    monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any], variable: str | None, key: str | None
) -> None:
    """The configured one before the environment's, as vLLM takes them, and both before the run's own, which it does not
    know."""
    monkeypatch.setenv(INTERNAL_VARIABLE, "of the run")
    if variable is None:
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
    else:
        monkeypatch.setenv("VLLM_API_KEY", variable)
    assert server_key(parse_args({"engine": engine})) == (key or "of the run")


@pytest.mark.parametrize("enabled", [True, False])
def test_files_and_batches_are_served_only_where_they_are_enabled(tmp_path: Path, enabled: bool) -> None:
    """The routes join vLLM's own, and everything that was begun is over after `close`."""
    args = parse_args({"batches": {"enabled": enabled, "folder": str(tmp_path / "store")}})

    async def attached() -> set[str]:
        application = Starlette()
        batches = Batches(application, args, slot)
        await asyncio.sleep(0)
        await batches.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        with pytest.raises(RuntimeError, match="Session is closed"):
            await batches._client.get("http://127.0.0.1:9")
        return {route.path for route in application.router.routes}  # type: ignore[attr-defined]

    slot = Slot(tmp_path / "board", "app#Replica#x", 0, lambda: 1.0)
    try:
        assert ("/v1/batches" in asyncio.run(attached())) is enabled
    finally:
        slot.close()
    assert not (tmp_path / "store").exists()


def test_a_client_session_without_a_limit_is_what_parts_need() -> None:
    """A part may wait for its place, and be answered, for minutes; a connection attempt may not."""

    async def limits() -> aiohttp.ClientTimeout:
        from deployments.batch_way import open_client

        async with open_client() as client:
            assert client.connector is not None
            assert client.connector.limit == 0
            return client.timeout

    timeout = asyncio.run(limits())
    assert (timeout.total, timeout.sock_read, timeout.sock_connect) == (None, None, 5.0)
