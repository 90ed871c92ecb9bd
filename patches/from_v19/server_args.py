"""sglang.srt.server_args, in the main process: the strategy becomes SGLang's own arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.server_args:ServerArgs.resolve_once",
    why="SGLang's own fields must describe the strategy before it resolves them",
    remove_when="SGLang lets plugins contribute defaults to ServerArgs",
    process="main",
)
def resolve_once(original: Upstream, args: Any) -> None:
    from tlt_sglang import upstream
    from tlt_sglang.startup import arguments

    if not upstream.current().is_resolved(args):
        arguments.before_resolution(args)
    original(args)


PATCHES = (resolve_once,)
