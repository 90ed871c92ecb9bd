"""sglang.srt.entrypoints.http_server, in the main process: the status of a refused stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream
    from tlt_sglang.upstream.requests import Call


@wraps_upstream(
    "sglang.srt.entrypoints.http_server:serve_generate_request",
    why="a stream that is refused was answered with status 200, and the error within",
    remove_when="SGLang answers a refused stream of /generate with its status, as /v1/... does",
    process="main",
)
async def serve_generate_request(original: Upstream, obj: Call, request: object) -> object:
    from tlt_sglang.engine import admit

    return await admit.stream(await original(obj, request), obj.stream)


PATCHES = (serve_generate_request,)
