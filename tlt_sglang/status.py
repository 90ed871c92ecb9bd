"""`GET /tlt/status`: what TLT is doing, in every process of the engine, as JSON.

Runs in the HTTP (main) process; asks the schedulers through SGLang's own internal-state call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tlt_sglang import engine

PATH = "/tlt/status"


def add_route(app: Any, global_state: Callable[[], Any]) -> None:
    """Add the route to SGLang's FastAPI `app`; once."""
    if any(getattr(route, "path", None) == PATH for route in app.routes):
        return

    async def tlt_status() -> dict[str, Any]:
        states = await global_state().tokenizer_manager.get_internal_state()
        return report([state.get("tlt") for state in states])

    app.add_api_route(PATH, tlt_status, methods=["GET"])


def report(schedulers: list[dict[str, Any] | None]) -> dict[str, Any]:
    """The answer, given each data-parallel scheduler's own part of it."""
    assert engine.current is not None
    parts = [part for part in schedulers if part is not None]
    first = parts[0] if parts else {}
    return {
        "versions": engine.versions(),
        "device": engine.current.device,
        "strategy": first.get("strategy"),
        "drafter": first.get("drafter"),
        "accept_length": first.get("accept_length"),
        "patches": engine.current.patcher.report(),
        "schedulers": parts,
    }
