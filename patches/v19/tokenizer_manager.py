"""sglang.srt.managers.tokenizer_manager, in the main process: drafter versions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream

_MANAGER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"


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


PATCHES = (update_request_meta_info,)
