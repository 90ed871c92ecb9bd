"""sglang.srt.speculative.triton_ops.eagle, in the scheduler process: accepted tokens on CPU."""

from __future__ import annotations

from tlt_sglang.cpu.launchers import Launcher
from tlt_sglang.patching.patch import Patch, replaces_upstream


def _launched(name: str, arguments: int) -> Patch:
    return replaces_upstream(
        f"sglang.srt.speculative.triton_ops.eagle:{name}",
        Launcher(f"{name}_cpu", arguments),
        why="SGLang launches a Triton kernel, also on CPU",
        remove_when="this shape of SGLang is not supported any more",
        process="scheduler",
        only_on="cpu",
    )


PATCHES = (_launched("fill_bonus_tokens", 4), _launched("fill_accept_out_cache_loc", 3))
