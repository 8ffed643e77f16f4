"""What a model cannot do is the request's fault: 400, where vLLM's own handler says 501."""

from __future__ import annotations

import asyncio

import fastapi
import httpx

from deployments.unsupported import refuse_kindly


def test_not_implemented_is_400_with_openais_error() -> None:
    """The handler that was there before, as vLLM registers it, has no say any more."""
    app = fastapi.FastAPI()

    @app.exception_handler(NotImplementedError)
    async def vllms(request: fastapi.Request, error: Exception) -> fastapi.Response:
        return fastapi.Response(status_code=501)

    @app.post("/v1/chat/completions")
    async def chat() -> None:
        raise NotImplementedError("The model does not support Chat Completions API")

    refuse_kindly(app)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://replica") as client:
            return await client.post("/v1/chat/completions")

    answer = asyncio.run(ask())
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "not_supported"
    assert "Chat Completions" in answer.json()["error"]["message"]
