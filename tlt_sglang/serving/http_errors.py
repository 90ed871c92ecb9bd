"""Answer a request that SGLang's HTTP process cannot read with status 400 and one sentence.

SGLang answers some broken requests with `500 Internal Server Error`, and ends the connection where
the error comes up once a stream has been promised. Here the status line of every answer waits for
its first bytes, so that an error before them can still take its place.

Runs in the main process, and in each tokenizer worker.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

CAUSED_BY_REQUEST = (ValueError, TypeError, AttributeError, LookupError, AssertionError)
"""Exceptions that a field of an unexpected shape raises. Everything else, such as RuntimeError and
OSError, is the engine's own."""
LONGEST_CAUSE = 300


def install(app: FastAPI) -> None:
    """Answer the requests of SGLang's `app`, which is not served yet, in this way."""
    app.add_middleware(RequestErrors)


class RequestErrors:
    """ASGI middleware around SGLang's routes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; raises what is not the request's fault, or came too late."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held: list[Message] = []
        answered = False

        async def hold(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                held.append(message)
                return
            answered = True
            while held:
                await send(held.pop())
            await send(message)

        try:
            await self._app(scope, receive, hold)
        except Exception as error:
            cause = cause_in_request(error)
            if answered or cause is None:
                raise
            logger.warning("%s is answered with status 400", scope["path"], exc_info=error)
            await _refuse(scope, receive, send, cause)


def cause_in_request(error: BaseException) -> BaseException | None:
    """Return the exception that a request's fields caused, None for any other."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]  # a stream's task group wraps it
    return error if isinstance(error, CAUSED_BY_REQUEST) else None


def sentence(path: str, cause: BaseException) -> str:
    """Return what is said of a request to `path` that cannot be read."""
    reason = " ".join(str(cause).split())[:LONGEST_CAUSE] or type(cause).__name__
    return f"The request to {path} cannot be read, check the type and value of its fields: {reason}"


async def _refuse(scope: Scope, receive: Receive, send: Send, cause: BaseException) -> None:
    from starlette.responses import JSONResponse

    message = sentence(scope["path"], cause)
    body = {"error": {"message": message, "type": "BadRequest", "param": None, "code": 400}}
    await JSONResponse(body, status_code=400)(scope, receive, send)
