"""The admin routes: `GET /tlt/status` and the commands of `POST /tlt/...`.

`GET /tlt/status` returns as JSON what TLT does in every process of the engine. `POST /tlt/strategy`
with {"strategy": "off"} pins one of several strategies; with null the policy chooses again.
`POST /tlt/drafter` with {"version": 3} loads a version of the drafter's store and stays with it;
with null the engine follows the newest version again, and {"rollback": true} goes back from the
present version for good. `POST /tlt/harvest` with {"rate": 0.5} logs that fraction of the requests.
All take SGLang's admin key where one is set; `client_routes` has `POST /tlt/free`.

Runs in the HTTP (main) process. It does nothing to the engine itself: commands travel to the
schedulers through SGLang's own internal-state calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from tlt_sglang.engine import client_routes, engine
from tlt_sglang.errors import ConfigError, TltError
from tlt_sglang.strategy.strategies import parse
from tlt_sglang.weights.store import Store

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tlt_sglang.upstream.protocols import GlobalState

STATUS_PATH = "/tlt/status"
STRATEGY_PATH = "/tlt/strategy"
DRAFTER_PATH = "/tlt/drafter"
HARVEST_PATH = "/tlt/harvest"
STATUS_SECONDS = 10.0
"""Time after which the status is that of the main process alone."""
COMMAND_KEY = "tlt"
"""The key under which a command travels to the schedulers in SGLang's own call."""

_BAD_RATE = 'Write {"rate": F}, with a fraction of requests from 0 to 1.'

Body = Mapping[str, object]
"""The JSON object that a request sends."""
Json = dict[str, object]
Command = dict[str, object]
"""A key that `Engine.act` knows, and its value."""


def has_routes(app: FastAPI) -> bool:
    """Return True if the routes were added to `app`."""
    return any(getattr(route, "path", None) == STATUS_PATH for route in app.routes)


def add_routes(app: FastAPI, global_state: Callable[[], GlobalState]) -> None:
    """Add the routes to SGLang's FastAPI `app`, which does not have them."""

    async def tlt_status() -> Json:
        if engine.require().clients.busy:
            return report([])
        answer = asyncio.create_task(global_state().tokenizer_manager.get_internal_state())
        # A scheduler that carries out a call answers when the call ends, which may be never.
        await asyncio.wait([answer], timeout=STATUS_SECONDS)
        states = answer.result() if answer.done() else []
        return report([state.get("tlt") for state in states])

    app.add_api_route(STATUS_PATH, tlt_status, methods=["GET"])
    add_command(app, global_state, STRATEGY_PATH, strategy_command)
    add_command(app, global_state, DRAFTER_PATH, drafter_command)
    add_command(app, global_state, HARVEST_PATH, harvest_command)
    client_routes.add(app, global_state)


def add_command(
    app: FastAPI,
    global_state: Callable[[], GlobalState],
    path: str,
    parse_body: Callable[[Body], Command],
) -> None:
    """Add a route that sends the command in a request's body to every scheduler."""
    from fastapi import HTTPException
    from sglang.srt.managers.io_struct import SetInternalStateReq
    from sglang.srt.utils.auth import AuthLevel, auth_level

    async def tlt_command(body: dict[str, object]) -> dict[str, object]:
        try:
            command = parse_body(body)
        except TltError as error:
            raise HTTPException(400, str(error)) from error
        request = SetInternalStateReq(server_args={COMMAND_KEY: command})
        await global_state().tokenizer_manager.set_internal_state(request)
        return body

    route = auth_level(AuthLevel.ADMIN_OPTIONAL)(tlt_command)
    app.add_api_route(path, route, methods=["POST"])


def strategy_command(body: Body) -> Command:
    """Return the command to pin the strategy that a body names, or to unpin it (index -1)."""
    return {"strategy": strategy_index(body)}


def strategy_index(body: Body) -> int:
    """Return the index in the pool of the strategy that a body names, -1 for null.

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
    strategy = parse(str(body["strategy"]))
    if strategy not in pool:
        names = ", ".join(map(str, pool))
        raise ConfigError(f"This server does not have the strategy {strategy}; it has {names}.")
    return pool.index(strategy)


def drafter_command(body: Body) -> Command:
    """Return the command to load a drafter version, follow the newest (null), or roll back.

    Raises ConfigError for any other body, and BadVersion for a version that is not in the store.
    """
    assert engine.current is not None
    folder = engine.current.config.store_path
    if folder is None:
        raise ConfigError(
            "This server has no store of drafter versions; start it with --tlt-store."
        )
    # One of two forms: {"rollback": true}, or {"version": N or null}.
    if body == {"rollback": True}:
        return {"drafter": body}
    version = body.get("version")
    if set(body) != {"version"} or isinstance(version, bool) or not isinstance(version, int | None):
        raise ConfigError(
            'Write {"version": N} to load a version, null for the newest, or {"rollback": true} '
            "to go back from the present one."
        )
    if version is not None and version < 0:
        raise ConfigError(
            f"Drafter version {version} does not exist; 0 is what the engine began with."
        )
    if version:
        Store(folder).manifest(version)
    return {"drafter": body}


def harvest_command(body: Body) -> Command:
    """Return the command to log a fraction of the requests; raise ConfigError for a bad body."""
    assert engine.current is not None
    if not engine.current.config.harvests:
        raise ConfigError("This server has no harvest log; start it with --tlt-store.")
    rate = body.get("rate")
    if set(body) != {"rate"} or isinstance(rate, bool) or not isinstance(rate, int | float):
        raise ConfigError(_BAD_RATE)
    if not 0 <= rate <= 1:
        raise ConfigError(_BAD_RATE)
    return {"harvest": float(rate)}


def report(schedulers: list[Json | None]) -> Json:
    """Return the status: the engine's own part, and those of its data-parallel schedulers."""
    assert engine.current is not None
    parts = [part for part in schedulers if part is not None]
    first = parts[0] if parts else {}
    return {
        "versions": engine.versions(),
        "device": engine.current.device,
        "strategy": first.get("strategy"),
        "drafter": first.get("drafter"),
        "accept_length": first.get("accept_length"),
        "clients": engine.current.clients.status(),
        "patches": engine.current.patcher.report(),
        "schedulers": parts,
    }
