"""sglang.srt.entrypoints.http_server, in the main process: our routes and warm-up, and statuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.entrypoints.http_server:_setup_and_run_http_server",
    why="shared memory of killed processes is recognised by the id of their server, and several "
    "tokenizer workers import the app by its name",
    remove_when="SGLang removes what its processes leave behind, and loads plugins in tokenizer "
    "workers",
    process="main",
)
def setup_and_run_http_server(original: Upstream, *args: Any, **kwargs: Any) -> object:
    from tlt_sglang import upstream
    from tlt_sglang.launcher import leftovers

    port_args = kwargs.get("port_args") or args[3]
    leftovers.belongs_to(port_args.instance_id)
    upstream.current().serve_app("tlt_sglang.plugin:app")
    return original(*args, **kwargs)


@wraps_upstream(
    "sglang.srt.entrypoints.http_server:set_global_state",
    why="adds our routes and our warm-up to SGLang's app before it is served, by SGLang or by a "
    "stack's own uvicorn",
    remove_when="plugins can add HTTP routes and warm-ups",
    process="main",
)
def set_global_state(original: Upstream, global_state: object) -> None:
    from tlt_sglang.startup import http_app

    original(global_state)
    http_app.prepare()


PATCHES = (setup_and_run_http_server, set_global_state)
