"""What is the request's fault is 400, where vLLM's own handlers say 501 or 500."""

from __future__ import annotations

import asyncio
from typing import Any

import fastapi
import httpx
import pydantic
import pytest

from deployments.unsupported import refuse_kindly


class Body(pydantic.BaseModel):
    """As vLLM checks a field before pydantic has."""

    wish: Any = None

    @pydantic.field_validator("wish", mode="before")
    @classmethod
    def _checked(cls, value: Any) -> Any:
        return value.get("json") and value["json"]["schema"]


def vllms() -> fastapi.FastAPI:
    """An application with the handlers that vLLM's has."""
    app = fastapi.FastAPI()

    async def failed(request: fastapi.Request, error: Exception) -> fastapi.Response:
        return fastapi.responses.JSONResponse({"failed": str(error)}, status_code=500)

    for kind in (NotImplementedError, Exception):
        app.add_exception_handler(kind, failed)

    @app.post("/v1/completions")
    async def complete(body: Body) -> None:
        raise AttributeError("the engine's own mistake")

    @app.post("/v1/chat/completions")
    async def chat() -> None:
        raise NotImplementedError("The model does not support Chat Completions API")

    app.middleware_stack = app.build_middleware_stack()
    refuse_kindly(app)
    return app


def ask(path: str, body: Any) -> httpx.Response:
    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=vllms()), base_url="http://replica") as client:
            return await client.post(path, json=body)

    return asyncio.run(post())


def test_not_implemented_is_400_with_openais_error() -> None:
    """The handler that was there before, as vLLM registers it, has no say any more."""
    answer = ask("/v1/chat/completions", {})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "not_supported"
    assert "Chat Completions" in answer.json()["error"]["message"]


@pytest.mark.parametrize("wish", [5, ["a"], "x", {"json": {"a": 1}}])
def test_a_field_that_vllms_own_check_stumbles_over_is_400(wish: Any) -> None:
    """As server errors, a few of them would have taken the replica out of rotation."""
    answer = ask("/v1/completions", {"wish": wish})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"


def test_what_fails_beyond_the_reading_of_the_request_stays_a_server_error() -> None:
    answer = ask("/v1/completions", {"wish": {"json": {"schema": 1}}})
    assert (answer.status_code, answer.json()) == (500, {"failed": "the engine's own mistake"})
