"""sglang.srt.server_args, in the main process: room for what TLT keeps on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.server_args:ServerArgs._handle_gpu_memory_settings",
    why="the default size of the KV cache leaves no room for the graphs of several strategies",
    remove_when="SGLang reserves memory for what plugins say they need",
    process="main",
    only_on="cuda",
)
def handle_gpu_memory_settings(original: Upstream, args: Any, gpu_mem: float | None) -> None:
    from tlt_sglang.config.cuda_memory import reserved_bytes
    from tlt_sglang.engine import engine

    by_default = args.mem_fraction_static is None
    original(args, gpu_mem)
    if by_default and gpu_mem is not None:
        reserved = reserved_bytes(engine.require().config, args) / 2**20
        args.mem_fraction_static = round(args.mem_fraction_static - reserved / gpu_mem, 3)


PATCHES = (handle_gpu_memory_settings,)
