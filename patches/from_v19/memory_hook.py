"""sglang.srt.arg_groups.memory_hook, in the main process: room for what TLT keeps on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.config.server_args import Arguments
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.arg_groups.memory_hook:reserve_for_graph_mb",
    why="the default size of the KV cache leaves no room for the graphs of several strategies",
    remove_when="SGLang reserves memory for what plugins say they need",
    process="main",
    only_on="cuda",
)
def reserve_for_graph_mb(original: Upstream, server_args: Arguments) -> float:
    from tlt_sglang.config.cuda_memory import reserved_bytes
    from tlt_sglang.engine import engine

    reserved: float = original(server_args)
    return reserved + reserved_bytes(engine.require().config, server_args) / 2**20


PATCHES = (reserve_for_graph_mb,)
