"""sglang.srt.mem_cache.triton_ops.cache_move, in the scheduler process: accepted KV on CPU."""

from __future__ import annotations

from tlt_sglang.cpu.launchers import CopyLauncher
from tlt_sglang.patching.patch import replaces_upstream

PATCHES = (
    replaces_upstream(
        "sglang.srt.mem_cache.triton_ops.cache_move:copy_all_layer_kv_cache_tiled",
        CopyLauncher(),
        why="SGLang launches a Triton kernel, also on CPU",
        remove_when="this shape of SGLang is not supported any more",
        process="scheduler",
        only_on="cpu",
    ),
)
