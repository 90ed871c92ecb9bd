"""sglang.srt.server_args, in the main process: our strategy as SGLang's arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

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
    from tlt_sglang.config.sglang_arguments import native_fields
    from tlt_sglang.engine import engine

    if not getattr(args, "_resolution_finished", False):
        engine.require().settle(args)
        for name, value in native_fields(
            engine.require().config, args, engine.require().device
        ).items():
            setattr(args, name, value)
    original(args)


@wraps_upstream(
    f"{_MODULE}:ServerArgs.check_server_args",
    why="arguments that were resolved before plugins loaded must not run without the configured "
    "strategy, and nothing may run if another plugin has undone a patch",
    remove_when="SGLang loads plugins before it resolves arguments, however it is started",
    process="main",
)
def check_server_args(original: Upstream, args: Any) -> None:
    from sglang.srt.arg_groups.overrides import resolved_view

    from tlt_sglang.config.sglang_arguments import check_resolved
    from tlt_sglang.engine import engine

    engine.require().patcher.verify()
    check_resolved(engine.require().config, resolved_view(args), engine.require().device)
    original(args)


PATCHES = (resolve_once, check_server_args)
