"""Routes for clients of every age, and for what they leave behind.

`POST /tlt/free` with {"what": "pause"}, "session", "groups" or "all" ends what a client that has
gone has left open; the answer names it. `GET /get_weight_version` and `/weight_version` are those
of an older SGLang. A health check that fails says what the engine waits for.

Runs in the HTTP (main) process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from tlt_sglang import upstream
from tlt_sglang.engine import engine
from tlt_sglang.engine.clients import KINDS
from tlt_sglang.errors import ConfigError
from tlt_sglang.serving.health import HealthReason

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tlt_sglang.upstream.protocols import GlobalState

FREE_PATH = "/tlt/free"
VERSION_PATHS = ("/get_weight_version", "/weight_version")


def add(app: FastAPI, global_state: Callable[[], GlobalState]) -> None:
    """Add the routes and the middleware to SGLang's `app`, which is not served yet."""
    from sglang.srt.utils.auth import AuthLevel, auth_level

    app.add_api_route(FREE_PATH, auth_level(AuthLevel.ADMIN_OPTIONAL)(free), methods=["POST"])
    app.add_middleware(HealthReason, reason=lambda: engine.require().clients.reason())
    if engine.require().config.older_clients == "off":
        return

    async def weight_version() -> dict[str, object]:
        engine.require().clients.note_older()
        manager = global_state().tokenizer_manager
        return {"weight_version": upstream.current().weight_version(manager)}

    remove_routes(app, VERSION_PATHS)
    for path in VERSION_PATHS:
        app.add_api_route(path, weight_version, methods=["GET", "POST"])


def remove_routes(app: FastAPI, paths: Collection[str]) -> None:
    """Remove routes of SGLang: some versions have those of the weight version to say that they are
    gone."""
    routes = app.router.routes
    routes[:] = [route for route in routes if getattr(route, "path", None) not in paths]


async def free(body: dict[str, object]) -> dict[str, object]:
    """End what clients have left open."""
    from fastapi import HTTPException

    clients = engine.require().clients
    try:
        kinds = kinds_to_free(body)
    except ConfigError as error:
        raise HTTPException(400, str(error)) from error
    if clients.busy:
        raise HTTPException(503, f"{clients.reason()} Nothing can be freed before the call ends.")
    return {"freed": await clients.free(kinds)}


def kinds_to_free(body: Mapping[str, object]) -> tuple[str, ...]:
    """Return the kinds that a body names; raise ConfigError for any other body."""
    what = body.get("what")
    if set(body) != {"what"} or what not in (*KINDS, "all"):
        names = ", ".join(f'"{kind}"' for kind in sorted(KINDS))
        raise ConfigError(f'Write {{"what": KIND}}, with one of {names} or "all".')
    return KINDS if what == "all" else (str(what),)
