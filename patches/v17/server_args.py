"""sglang.srt.server_args, in the main process: room for what TLT keeps on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.server_args:ServerArgs.reserve_for_graph_mb",
    why="the default size of the KV cache leaves no room for the graphs of several strategies",
    remove_when="SGLang reserves memory for what plugins say they need",
    process="main",
    only_on="cuda",
)
def reserve_for_graph_mb(original: Upstream, args: Any) -> float:
    from tlt_sglang.config.cuda_memory import reserved_bytes
    from tlt_sglang.engine import engine

    reserved: float = original(args)
    return reserved + reserved_bytes(engine.require().config, args) / 2**20


PATCHES = (reserve_for_graph_mb,)
