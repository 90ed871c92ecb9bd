"""sglang.srt.entrypoints.http_server, in the main process: our routes and warm-up, and statuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream
    from tlt_sglang.upstream.requests import Call


@wraps_upstream(
    "sglang.srt.entrypoints.http_server:_setup_and_run_http_server",
    why="adds our routes and our warm-up to SGLang's app before it is served",
    remove_when="plugins can add HTTP routes and warm-ups",
    process="main",
)
def setup_and_run_http_server(original: Upstream, *args: Any, **kwargs: Any) -> object:
    from sglang.srt.entrypoints import http_server
    from sglang.srt.environ import envs

    from tlt_sglang.engine import calibration
    from tlt_sglang.engine.admin import add_routes
    from tlt_sglang.launcher import leftovers
    from tlt_sglang.serving import http_errors

    port_args = kwargs.get("port_args") or args[3]
    leftovers.belongs_to(port_args.instance_id)
    calibration.register()
    http_errors.install(http_server.app)
    add_routes(http_server.app, http_server.get_global_state)
    # Several tokenizer workers import the app by this name.
    envs.SGLANG_HTTP_SERVER_APP_PATH.set("tlt_sglang.plugin:app")
    return original(*args, **kwargs)


@wraps_upstream(
    "sglang.srt.entrypoints.http_server:serve_generate_request",
    why="a stream that is refused was answered with status 200, and the error within",
    remove_when="SGLang answers a refused stream of /generate with its status, as /v1/... does",
    process="main",
)
async def serve_generate_request(original: Upstream, obj: Call, request: object) -> object:
    from tlt_sglang.engine import admit

    return await admit.stream(await original(obj, request), obj.stream)


PATCHES = (setup_and_run_http_server, serve_generate_request)
