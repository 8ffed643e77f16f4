"""What vLLM answers with 501, answered with 400: the request is at fault, not the engine.

A model without a chat template, say, is asked to chat. As a server error, a few such requests would look like a replica
that fails, and take it out of rotation.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deployments import errors


def refuse_kindly(app: Any) -> None:
    """Take the place of vLLM's handler in its application (a FastAPI object)."""
    app.add_exception_handler(NotImplementedError, _refused)


async def _refused(request: Request, error: Exception) -> Response:
    message = str(error) or "this model does not support that"
    return JSONResponse(errors.body(400, message, "not_supported"), status_code=400)
