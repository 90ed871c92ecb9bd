"""sglang.srt.server_args, in the main process: our strategy as SGLang's arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream

_MODULE = "sglang.srt.server_args"


@wraps_upstream(
    f"{_MODULE}:ServerArgs.check_server_args",
    why="the last step before processes start: arguments that were resolved before plugins loaded "
    "get the strategy, nothing runs if another plugin has undone a patch, and the app gets our "
    "routes, whoever serves it",
    remove_when="SGLang loads plugins before it resolves arguments, and lets them add routes",
    process="main",
)
def check_server_args(original: Upstream, args: Any) -> None:
    from tlt_sglang.cpu import ranks
    from tlt_sglang.engine import engine
    from tlt_sglang.launcher import prefork
    from tlt_sglang.startup import arguments, http_app

    arguments.before_processes(args)
    original(args)
    http_app.prepare()
    if engine.require().device == "cpu":
        ranks.share_cores(args.tp_size)
        prefork.use()


PATCHES = (check_server_args,)
