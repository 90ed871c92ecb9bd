"""sglang.srt.server_args, in the main process: our strategy as SGLang's arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import Patch, wraps_upstream
from tlt_sglang.upstream import dataclass_fields as upstream_fields

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream

_MODULE = "sglang.srt.server_args"


@wraps_upstream(
    f"{_MODULE}:ServerArgs.resolve_once",
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


dataclass_fields = Patch(
    f"{_MODULE}:ServerArgs",
    upstream_fields.dataclass_fields,
    why="RL stacks look at dataclasses.fields(ServerArgs), which is no dataclass any more",
    remove_when="verl, slime, miles and UniRL look at the fields of a struct",
    process="main",
    digests={},
    kind="register",
    key="__dataclass_fields__",
)

PATCHES = (dataclass_fields, resolve_once, check_server_args)
