"""sglang.srt.utils.common, in the main process: paths of requests for SGLang's HTTP metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.utils.common:_get_fastapi_request_path",
    why="with --enable-metrics and a newer FastAPI, requests to included routes, such as "
    "/v1/loads, are answered with status 500",
    remove_when="this shape of SGLang is not supported any more",
    process="main",
)
def get_fastapi_request_path(original: Upstream, request: Any) -> tuple[str, bool]:
    try:
        path: tuple[str, bool] = original(request)
    except AttributeError:  # the matching route is a router, which has no path
        return request.url.path, True
    return path


PATCHES = (get_fastapi_request_path,)
