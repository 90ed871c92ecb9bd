"""sglang.srt.speculative.triton_ops.cache_locs, in the scheduler process: KV slots on CPU."""

from __future__ import annotations

from tlt_sglang.cpu.launchers import Launcher
from tlt_sglang.patching.patch import Patch, replaces_upstream

_MODULE = "sglang.srt.speculative.triton_ops.cache_locs"
_REMOVE = "this shape of SGLang is not supported any more"


def _launched(name: str, arguments: int) -> Patch:
    return replaces_upstream(
        f"{_MODULE}:{name}",
        Launcher(f"{name}_cpu", arguments),
        why="SGLang launches a Triton kernel, also on CPU",
        remove_when=_REMOVE,
        process="scheduler",
        only_on="cpu",
    )


PATCHES = (
    _launched("assign_req_to_token_pool", 6),
    _launched("assign_extend_cache_locs", 6),
    _launched("assign_draft_cache_locs_contiguous", 7),
    replaces_upstream(
        f"{_MODULE}:_is_xpu",
        True,
        why="SGLang finds no KV slots for drafts on CPU; where this is true, it launches a kernel",
        remove_when=_REMOVE,
        process="scheduler",
        only_on="cpu",
    ),
)
