"""sglang.srt.managers.tokenizer_manager, in the main process: drafter versions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._handle_batch_output",
    why="a request beside others that have drafter versions gets None for each of its tokens",
    remove_when="SGLang lets plugins add to a request's meta_info",
    process="main",
)
async def handle_batch_output(original: Upstream, manager: object, recv_obj: Any) -> None:
    from sglang.srt.managers.io_struct import unwrap_from_pickle, wrap_as_pickle

    from tlt_sglang.engine.online_drafter import VERSION_KEY

    info = unwrap_from_pickle(getattr(recv_obj, "customized_info", None)) or {}
    if VERSION_KEY in info:
        info[VERSION_KEY] = [
            [version for version in versions if version is not None]
            for versions in info[VERSION_KEY]
        ]
        recv_obj.customized_info = wrap_as_pickle(info)
    await original(manager, recv_obj)


PATCHES = (handle_batch_output,)
