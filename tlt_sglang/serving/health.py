"""Say in the body of a failed health check what the engine waits for.

SGLang answers `/health` of a paused engine with an empty 503 after 20 seconds. Status and time stay
as they are.

Runs in the main process, and in each tokenizer worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATHS = ("/health", "/health_generate", "/ready")
UNAVAILABLE = 503


class HealthReason:
    """ASGI middleware around SGLang's routes; `reason` returns the sentence, None if healthy."""

    def __init__(self, app: ASGIApp, reason: Callable[[], str | None]) -> None:
        self._app, self._reason = app, reason

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] not in PATHS:
            await self._app(scope, receive, send)
            return
        failed = False

        async def explain(message: Message) -> None:
            nonlocal failed
            if message["type"] == "http.response.start" and message["status"] == UNAVAILABLE:
                failed = True
            if not failed:
                await send(message)

        await self._app(scope, receive, explain)
        if failed:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.responses import Response

        text = self._reason() or ""
        await Response(text, UNAVAILABLE, media_type="text/plain")(scope, receive, send)
