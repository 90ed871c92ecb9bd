"""sglang.srt.entrypoints.http_server, in the main process: our routes and our warm-up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.entrypoints.http_server:_setup_and_run_http_server",
    why="adds our routes and our warm-up to SGLang's app before it is served",
    remove_when="plugins can add HTTP routes and warm-ups",
    process="main",
    digests={"0.5.23": "f25e2f374cb04d5c"},
)
def setup_and_run_http_server(original: Upstream, *args: Any, **kwargs: Any) -> object:
    from sglang.srt.entrypoints import http_server

    from tlt_sglang.engine import calibration
    from tlt_sglang.engine.admin import add_routes
    from tlt_sglang.launcher import leftovers

    port_args = kwargs.get("port_args") or args[3]
    leftovers.belongs_to(port_args.instance_id)
    calibration.register()
    add_routes(http_server.app, http_server.get_global_state)
    return original(*args, **kwargs)


PATCHES = (setup_and_run_http_server,)
