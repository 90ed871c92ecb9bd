"""`GET /tlt/status`: what TLT is doing, in every process of the engine, as JSON.

`POST /tlt/strategy` with {"strategy": "off"} pins one of several strategies, with null it lets the
policy choose again. `POST /tlt/drafter` with {"version": 3} loads a version of the drafter's store
and stays with it, with null it follows the newest again, and with {"reject": true} it goes back
from the version in use for good. `POST /tlt/harvest` with {"rate": 0.5} logs so many of the
requests. All take SGLang's admin key where one is set.
Runs in the HTTP (main) process; asks the schedulers through SGLang's own internal-state calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tlt_sglang.engine import engine
from tlt_sglang.errors import ConfigError, TltError
from tlt_sglang.strategy.strategies import parse
from tlt_sglang.weights.store import Store

PATH = "/tlt/status"
STRATEGY_PATH = "/tlt/strategy"
DRAFTER_PATH = "/tlt/drafter"
HARVEST_PATH = "/tlt/harvest"
ORDER = "tlt"
"""The name under which an order travels to the schedulers in SGLang's own call."""


def add_route(app: Any, global_state: Callable[[], Any]) -> None:
    """Add the route to SGLang's FastAPI `app`; once."""
    if any(getattr(route, "path", None) == PATH for route in app.routes):
        return

    async def tlt_status() -> dict[str, Any]:
        states = await global_state().tokenizer_manager.get_internal_state()
        return report([state.get("tlt") for state in states])

    app.add_api_route(PATH, tlt_status, methods=["GET"])
    for path, order_of in (
        (STRATEGY_PATH, lambda body: {"strategy": place_of(body)}),
        (DRAFTER_PATH, drafter_order),
        (HARVEST_PATH, harvest_order),
    ):
        add_order(app, global_state, path, order_of)


def add_order(
    app: Any,
    global_state: Callable[[], Any],
    path: str,
    order_of: Callable[[dict[str, Any]], Any],
) -> None:
    """Add a route that carries what `order_of` makes of a request's body to every scheduler."""
    from fastapi import HTTPException
    from sglang.srt.managers.io_struct import SetInternalStateReq
    from sglang.srt.utils.auth import AuthLevel, auth_level

    async def tlt_order(body: dict[str, Any]) -> dict[str, Any]:
        try:
            order = order_of(body)
        except TltError as error:
            raise HTTPException(400, str(error)) from error
        request = SetInternalStateReq(server_args={ORDER: order})
        await global_state().tokenizer_manager.set_internal_state(request)
        return body

    route = auth_level(AuthLevel.ADMIN_OPTIONAL)(tlt_order)
    app.add_api_route(path, route, methods=["POST"])


def drafter_order(body: dict[str, Any]) -> dict[str, Any]:
    """What a request asks of the drafter: {"version": N or None}, or {"reject": True}.

    Raises ConfigError, or a BadVersion for one that the store does not have.
    """
    assert engine.current is not None
    folder = engine.current.config.store_path
    if folder is None:
        raise ConfigError(
            "This server has no store of drafter versions; start it with --tlt-store."
        )
    if body == {"reject": True}:
        return {"drafter": body}
    if set(body) != {"version"} or type(body["version"]) not in (int, type(None)):
        raise ConfigError(
            'Write {"version": N} to use one, null for the newest, or {"reject": true} to go back.'
        )
    version = body["version"]
    if version is not None and version < 0:
        raise ConfigError(f"Drafter version {version} is none; 0 is what the engine began with.")
    if version:
        Store(folder).manifest(version)
    return {"drafter": body}


def harvest_order(body: dict[str, Any]) -> dict[str, Any]:
    """The fraction of requests to log that a request asks for. Raises ConfigError."""
    assert engine.current is not None
    if not engine.current.config.harvests:
        raise ConfigError("This server has no harvest log; start it with --tlt-store.")
    rate: Any = body.get("rate")
    if set(body) != {"rate"} or type(rate) not in (int, float) or not 0 <= rate <= 1:
        raise ConfigError('Write {"rate": F}, with a fraction of requests from 0 to 1.')
    return {"harvest": float(rate)}


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
