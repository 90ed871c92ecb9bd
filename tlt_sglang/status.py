"""`GET /tlt/status`: what TLT is doing, in every process of the engine, as JSON.

`POST /tlt/strategy` with {"strategy": "off"} pins one of several strategies, with null it lets the
policy choose again; it takes SGLang's admin key where one is set.
Runs in the HTTP (main) process; asks the schedulers through SGLang's own internal-state calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tlt_sglang import engine
from tlt_sglang.errors import ConfigError
from tlt_sglang.strategy.arms import parse

PATH = "/tlt/status"
STRATEGY_PATH = "/tlt/strategy"
PIN = "tlt_strategy"
"""The name under which the place of a pinned strategy travels in SGLang's own call."""


def add_route(app: Any, global_state: Callable[[], Any]) -> None:
    """Add the route to SGLang's FastAPI `app`; once."""
    if any(getattr(route, "path", None) == PATH for route in app.routes):
        return

    async def tlt_status() -> dict[str, Any]:
        states = await global_state().tokenizer_manager.get_internal_state()
        return report([state.get("tlt") for state in states])

    app.add_api_route(PATH, tlt_status, methods=["GET"])
    add_pin(app, global_state)


def add_pin(app: Any, global_state: Callable[[], Any]) -> None:
    """Add `POST /tlt/strategy`."""
    from fastapi import HTTPException
    from sglang.srt.managers.io_struct import SetInternalStateReq
    from sglang.srt.utils.auth import AuthLevel, auth_level

    async def tlt_strategy(body: dict[str, Any]) -> dict[str, Any]:
        try:
            place = place_of(body)
        except ConfigError as error:
            raise HTTPException(400, str(error)) from error
        request = SetInternalStateReq(server_args={PIN: place})
        await global_state().tokenizer_manager.set_internal_state(request)
        return {"strategy": body["strategy"]}

    route = auth_level(AuthLevel.ADMIN_OPTIONAL)(tlt_strategy)
    app.add_api_route(STRATEGY_PATH, route, methods=["POST"])


def place_of(body: dict[str, Any]) -> int:
    """The place in the pool of the strategy that a request names, -1 for null.

    Raises ConfigError for a strategy that this engine does not have.
    """
    assert engine.current is not None
    pool = engine.current.config.pool
    if len(pool) < 2:
        raise ConfigError("This server has one strategy only; give --tlt-strategies several.")
    if "strategy" not in body:
        raise ConfigError('Write {"strategy": NAME}, or null for what the policy chooses.')
    if body["strategy"] is None:
        return -1
    wanted = parse(str(body["strategy"]))
    if wanted not in pool:
        known = ", ".join(map(str, pool))
        raise ConfigError(f"This server does not have the strategy {wanted}; it has {known}.")
    return pool.index(wanted)


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
