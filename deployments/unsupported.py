"""What vLLM answers with a server error and is the request's fault: answered with 400.

A model without a chat template is asked to chat, say, or a field holds a list where vLLM's own check of it expects an
object. As server errors, a few such requests would look like a replica that fails, and take it out of rotation.
"""

from __future__ import annotations

import traceback
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deployments import errors

# What vLLM's checks of a field raise, beside the errors that it turns into 400 itself.
_CARELESS = (AttributeError, LookupError)
# Where FastAPI reads a request; the application's own code is called from elsewhere.
_READING = "fastapi.dependencies.utils"


def refuse_kindly(app: Any) -> None:
    """Take the place of vLLM's handlers in its application (a FastAPI object)."""
    otherwise = app.exception_handlers[Exception]

    async def refused_in_reading(request: Request, error: Exception) -> Response:
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        if not any(frame.f_globals.get("__name__") == _READING for frame in frames):
            response: Response = await otherwise(request, error)
            return response
        message = f"the request cannot be read: {error}"
        return JSONResponse(errors.body(400, message, "invalid_request"), status_code=400)

    app.add_exception_handler(NotImplementedError, _refused)
    for kind in _CARELESS:
        app.add_exception_handler(kind, refused_in_reading)
    app.middleware_stack = None  # vLLM has built it, with the handlers of then; the first request builds it again


async def _refused(request: Request, error: Exception) -> Response:
    message = str(error) or "this model does not support that"
    return JSONResponse(errors.body(400, message, "not_supported"), status_code=400)
