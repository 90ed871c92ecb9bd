"""sglang.srt.managers.tokenizer_manager, in the main process: pauses, and drafter versions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import Patch, wraps_upstream

if TYPE_CHECKING:
    from collections.abc import Callable

    from tlt_sglang.upstream.protocols import Upstream


_MANAGER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"


def _wrapped(name: str) -> Callable[[Upstream], Patch]:
    return wraps_upstream(
        f"{_MANAGER}.{name}",
        why="an engine whose client has died while it was paused does not say what it waits for",
        remove_when="SGLang says what it waits for, and ends a pause that nobody ends",
        process="main",
    )


def _note(manager: Any, paused: bool) -> None:
    from tlt_sglang.engine import engine

    tlt = engine.require()
    tlt.clients.paused(manager, paused, tlt.config.client_timeout_s)


@_wrapped("init_weight_update")
def init_weight_update(original: Upstream, manager: Any) -> None:
    _note(manager, False)
    original(manager)


@_wrapped("pause_generation")
async def pause_generation(original: Upstream, manager: Any, obj: object) -> None:
    _note(manager, True)
    await original(manager, obj)


@_wrapped("continue_generation")
async def continue_generation(original: Upstream, manager: Any, obj: object) -> None:
    await original(manager, obj)
    _note(manager, False)


@wraps_upstream(
    f"{_MANAGER}.update_request_meta_info",
    why="a request beside others that have drafter versions gets None for each of its tokens",
    remove_when="SGLang lets plugins add to a request's meta_info",
    process="main",
)
def update_request_meta_info(
    original: Upstream,
    manager: Any,
    meta_info: object,
    state: object,
    customized_info: dict[str, list[list[int | None]]],
    index: int,
    *args: object,
) -> None:
    from tlt_sglang.engine.online_drafter import VERSION_KEY

    rows = customized_info.get(VERSION_KEY)
    if rows is not None:
        rows[index] = [version for version in rows[index] if version is not None]
    original(manager, meta_info, state, customized_info, index, *args)


PATCHES = (init_weight_update, pause_generation, continue_generation, update_request_meta_info)
