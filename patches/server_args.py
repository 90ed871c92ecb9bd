"""sglang.srt.server_args, in the process that starts SGLang: our strategy as SGLang's arguments."""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream

_MODULE = "sglang.srt.server_args"


@wraps_upstream(
    f"{_MODULE}:ServerArgs.resolve_once",
    why="the strategy has to be in SGLang's own fields before it resolves them",
    remove_when="SGLang lets plugins contribute defaults to ServerArgs",
    process="main",
    digests={"0.5.23": "d06b7dc84e127611"},
)
def resolve_once(original: Any, args: Any) -> None:
    from tlt_sglang.config.sglang_arguments import native_fields
    from tlt_sglang.engine import engine

    assert engine.current is not None
    if not getattr(args, "_resolution_finished", False):
        engine.current.settle(args)
        for name, value in native_fields(
            engine.current.config, args, engine.current.device
        ).items():
            setattr(args, name, value)
    original(args)


@wraps_upstream(
    f"{_MODULE}:ServerArgs.check_server_args",
    why="arguments resolved before plugins loaded must not run without the strategy asked for, nor "
    "anything if another plugin has undone a patch",
    remove_when="SGLang loads plugins before it resolves arguments, however it is started",
    process="main",
    digests={"0.5.23": "395ebf45c0400c1c"},
)
def check_server_args(original: Any, args: Any) -> None:
    from sglang.srt.arg_groups.overrides import resolved_view

    from tlt_sglang.config.sglang_arguments import check_resolved
    from tlt_sglang.engine import engine

    assert engine.current is not None
    engine.current.patcher.verify()
    check_resolved(engine.current.config, resolved_view(args), engine.current.device)
    original(args)


PATCHES = (resolve_once, check_server_args)
